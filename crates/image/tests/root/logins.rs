//! Registries that want to know who asks.

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use image::credentials::{Credentials, CredentialsConfig, Found, Holder, PullSecret};
use image::{Auth, Error, Reference, Silent};
use testkit::bad_network::{Answer, Proxy, Request};
use testkit::registry::{Manner, PASSWORD, Registry, USER};
use testkit::serial::Test;

use crate::fixture::{Scene, registry, registry_with, run, sample};

pub(crate) const TESTS: &[Test] = &[
    ("a_registry_that_wants_a_login_gets_one", a_registry_that_wants_a_login_gets_one),
    ("the_nodes_own_config_json_is_asked", the_nodes_own_config_json_is_asked),
    ("tokens_come_from_token_servers", tokens_come_from_token_servers),
    ("credentials_go_to_no_other_host", credentials_go_to_no_other_host),
    ("images_come_from_ecr_by_its_provider", images_come_from_ecr_by_its_provider),
];

fn login(username: &str, password: &str) -> Auth {
    Auth::Basic { username: username.into(), password: password.into() }
}

/// A registry with the sample image that wants a login.
fn locked(scene: &Scene) -> Registry {
    registry(scene).push(&sample(scene, "sample"), "sample", "1").unwrap();
    registry_with(scene, &Manner { login: true, ..Manner::default() })
}

fn a_registry_that_wants_a_login_gets_one() {
    let scene = Scene::new();
    let registry = locked(&scene);
    let name = format!("{}/sample:1", registry.address());
    run(async {
        let error = scene.pull(&name).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }) && !error.may_pass(), "{error}");
        assert!(error.to_string().contains("imagePullSecret"), "{error}");
        for wrong in
            [login(USER, "wrong"), login("", ""), Auth::RegistryToken("t".into()), Auth::IdentityToken("t".into())]
        {
            let error = scene.pull_as(&name, wrong).await.unwrap_err();
            assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
            assert!(error.to_string().contains("check the credentials"), "{error}");
        }
        scene.assert_untouched().await;
        scene.pull_as(&name, login(USER, PASSWORD)).await.unwrap();
        // Whoever pulled it: another pull has to show credentials of its own.
        scene.pull(&name).await.unwrap_err();
    });
}

fn config_json(registry: &Registry) -> String {
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    format!(r#"{{"auths": {{"http://{}/v2/": {{"auth": "{auth}"}}}}}}"#, registry.address())
}

fn the_nodes_own_config_json_is_asked() {
    let scene = Scene::with(|config, dir| config.docker_configs = vec![dir.join("missing"), dir.join("config.json")]);
    let registry = locked(&scene);
    let name = format!("{}/sample:1", registry.address());
    let config = config_json(&registry);
    run(async {
        let error = scene.pull(&name).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
        std::fs::write(scene.path("config.json"), "{").unwrap();
        let error = scene.pull(&name).await.unwrap_err();
        assert!(matches!(error, Error::Configuration { .. }) && error.to_string().contains("config.json"), "{error}");
        std::fs::write(scene.path("config.json"), &config).unwrap();
        scene.pull(&name).await.unwrap();
        let secret = PullSecret::DockerConfigJson(config.as_bytes());
        let credentials = Credentials::new(CredentialsConfig::default()).unwrap();
        let found = credentials.lookup(&name.parse().unwrap(), &[secret], None).await;
        assert_eq!(found, [Found { auth: login(USER, PASSWORD), holder: Holder::Secret(0) }]);
    });
}

/// A token server and a registry that takes only its tokens, in one. It knows the user, the refresh token `refresh`, and
/// gives `guest` tokens to everybody if `open`.
fn token_server(upstream: &Registry, open: bool) -> Proxy {
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let token = |name: &str| {
        let body = format!(r#"{{"access_token": "{name}", "expires_in": 300}}"#);
        Answer::Reply(200, vec![("Content-Type", "application/json".into())], body.into_bytes())
    };
    Proxy::start(upstream.address(), move |request| {
        let host = request.header("host").unwrap_or_default();
        if request.path.starts_with("/token") {
            let asked_right = request.path.contains("scope=repository%3Asample%3Apull")
                || request.body.contains("scope=repository%3Asample%3Apull");
            return match (request.method.as_str(), request.header("authorization")) {
                _ if !asked_right => Answer::Reply(400, vec![], b"which scope?".to_vec()),
                ("POST", _) if request.body.contains("grant_type=refresh_token&refresh_token=refresh&") => {
                    token("member")
                }
                ("GET", Some(value)) if value == format!("Basic {basic}") => token("member"),
                ("GET", None) if open => token("guest"),
                _ => Answer::Reply(401, vec![], br#"{"details": "incorrect username or password"}"#.to_vec()),
            };
        }
        match request.header("authorization") {
            Some("Bearer member" | "Bearer own") => Answer::Forward,
            Some("Bearer guest") if open => Answer::Forward,
            _ => Answer::Reply(401, vec![("WWW-Authenticate", challenge(host))], vec![]),
        }
    })
}

fn challenge(host: &str) -> String {
    format!(r#"Bearer realm="http://{host}/token?account=node",service="reg",scope="repository:sample:pull""#)
}

fn tokens(proxy: &Proxy) -> Vec<Request> {
    proxy.seen().into_iter().filter(|request| request.path.starts_with("/token")).collect()
}

fn tokens_come_from_token_servers() {
    let cases = [
        (true, None, true),
        (false, None, false),
        (false, Some(login(USER, PASSWORD)), true),
        (true, Some(login(USER, "wrong")), false),
        (false, Some(Auth::IdentityToken("refresh".into())), true),
        (false, Some(Auth::IdentityToken("stale".into())), false),
        (false, Some(Auth::RegistryToken("own".into())), true),
        (false, Some(Auth::RegistryToken("other".into())), false),
    ];
    for (open, auth, expected) in cases {
        let scene = Scene::new();
        let registry = registry(&scene);
        registry.push(&sample(&scene, "sample"), "sample", "1").unwrap();
        let server = token_server(&registry, open);
        let reference: Reference = format!("{}/sample:1", server.address()).parse().unwrap();
        run(async {
            let case = format!("{auth:?}, open: {open}");
            let own_token = matches!(auth, Some(Auth::RegistryToken(_)));
            match scene.images.pull(&reference, auth, &Silent).await {
                Ok(_) => assert!(expected, "{case}"),
                Err(error) => assert!(!expected && matches!(error, Error::Unauthorized { .. }), "{case}: {error}"),
            }
            let asked = tokens(&server);
            assert_eq!(asked.len(), usize::from(!own_token), "{case}: one token is enough for the whole pull");
            for request in asked {
                let service = if request.method == "POST" { &request.body } else { &request.path };
                assert!(service.contains("service=reg"), "{service}");
            }
        });
    }
}

/// Blobs often come by a redirect from a store that is somebody else.
fn credentials_go_to_no_other_host() {
    let scene = Scene::new();
    let registry = registry(&scene);
    registry.push(&sample(&scene, "sample"), "sample", "1").unwrap();
    let elsewhere = Proxy::start(registry.address(), |_| Answer::Forward);
    let there = elsewhere.address();
    let front = Proxy::start(registry.address(), move |request| match request.header("authorization") {
        None => Answer::Reply(401, vec![("WWW-Authenticate", "Basic realm=\"x\"".into())], vec![]),
        Some(_) if request.is_blob() => {
            Answer::Reply(307, vec![("Location", format!("http://{there}{}", request.path))], vec![])
        }
        Some(_) => Answer::Forward,
    });
    scene.hosts_toml(
        "example.test",
        &format!("server = \"http://{0}\"\n[host.\"http://{0}\".header]\nx-operator = \"secret\"\n", front.address()),
    );
    run(async {
        scene.pull_as("example.test/sample:1", login(USER, PASSWORD)).await.unwrap();
        assert!(front.seen().iter().any(|request| request.header("x-operator").is_some()));
        let followed = elsewhere.seen();
        assert_eq!(followed.len(), 3, "the configuration and two layers");
        for request in followed {
            assert_eq!((request.header("authorization"), request.header("x-operator")), (None, None));
        }
    });
}

const ECR: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";

/// What Amazon's program answers, with the login of the test registry. It checks what it is asked.
const PROVIDER: &str = r#"#!/bin/sh
case "$(cat)" in
*'"kind":"CredentialProviderRequest"'*'"image":"123456789012.dkr.ecr.eu-west-1.amazonaws.com/sample"'*) ;;
*) echo "not asked for the image" >&2; exit 1 ;;
esac
echo call >> "$(dirname "$0")/calls"
cat <<END
{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry",
 "cacheDuration":"6h0m0s","auth":{"123456789012.dkr.ecr.eu-west-1.amazonaws.com":{"username":"AWS","password":"secret-token"}}}
END
"#;

/// The whole of examples/ecr: its configuration file, a provider, a registry that wants a login under ECR's name.
fn images_come_from_ecr_by_its_provider() {
    use std::os::unix::fs::PermissionsExt as _;
    let scene = Scene::new();
    let registry = locked(&scene);
    scene.hosts_toml(ECR, &format!("server = \"http://{}\"\n", registry.address()));
    let bin_dir = scene.path("providers");
    std::fs::create_dir(&bin_dir).unwrap();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/ecr/credential-providers.yaml");
    let config = CredentialsConfig {
        provider_config: Some(example),
        provider_bin_dir: Some(bin_dir.clone()),
        ..CredentialsConfig::default()
    };
    let error = Credentials::new(config.clone()).unwrap_err().to_string();
    assert!(error.contains("ecr-credential-provider"), "without the program it is refused: {error}");
    let program = bin_dir.join("ecr-credential-provider");
    std::fs::write(&program, PROVIDER).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let credentials = Arc::new(Credentials::new(config).unwrap());
    let name = format!("{ECR}/sample:1");
    run(async {
        let error = scene.pull(&name).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
        for _ in 0..3 {
            let found = credentials.lookup(&name.parse().unwrap(), &[], None).await;
            assert_eq!(found, [Found { auth: login(USER, PASSWORD), holder: Holder::Node }]);
            let image = scene.pull_as(&name, found[0].auth.clone()).await.unwrap();
            assert_eq!(image.repo_tags, std::slice::from_ref(&name));
        }
        assert_eq!(std::fs::read_to_string(bin_dir.join("calls")).unwrap(), "call\n");
        assert_eq!(credentials.lookup(&"quay.io/sample:1".parse().unwrap(), &[], None).await, []);
    });
}
