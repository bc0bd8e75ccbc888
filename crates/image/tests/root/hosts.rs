//! `hosts.toml` in all its variants, against real registries.

use image::Error;
use testkit::bad_network::{Answer, Proxy};
use testkit::certificates::{Pair, self_signed, signed};
use testkit::registry::{Manner, Registry};
use testkit::serial::Test;

use crate::fixture::{Scene, free_port, registry, registry_with, run, sample};

pub(crate) const TESTS: &[Test] = &[
    ("mirrors_are_asked_in_order", mirrors_are_asked_in_order),
    ("a_mirror_may_lack_what_it_likes", a_mirror_may_lack_what_it_likes),
    ("capabilities_say_who_is_asked_for_what", capabilities_say_who_is_asked_for_what),
    ("paths_and_headers_are_the_operators", paths_and_headers_are_the_operators),
    ("the_server_is_the_last_resort", the_server_is_the_last_resort),
    ("a_registry_by_its_authority", a_registry_by_its_authority),
    ("a_registry_that_is_its_own_authority", a_registry_that_is_its_own_authority),
    ("a_registry_that_wants_a_certificate", a_registry_that_wants_a_certificate),
    ("a_registry_that_nobody_verifies", a_registry_that_nobody_verifies),
    ("docker_style_certificate_files", docker_style_certificate_files),
    ("a_faulty_hosts_toml_is_told", a_faulty_hosts_toml_is_told),
];

const NAME: &str = "example.test/sample:1";

fn stocked(scene: &Scene) -> Registry {
    let registry = registry(scene);
    registry.push(&sample(scene, "sample"), "sample", "1").unwrap();
    registry
}

/// Proxies that note who was asked and answer with `status`, or hand on.
fn watched(registry: &Registry, status: Option<u16>) -> Proxy {
    Proxy::start(registry.address(), move |_| match status {
        Some(status) => Answer::Reply(status, vec![], vec![]),
        None => Answer::Forward,
    })
}

fn mirrors_are_asked_in_order() {
    let scene = Scene::new();
    let registry = stocked(&scene);
    let (first, second) = (watched(&registry, None), watched(&registry, None));
    let text = |one: &Proxy, other: &Proxy| {
        format!(
            "server = \"http://127.0.0.1:9\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
            one.address(),
            other.address()
        )
    };
    run(async {
        // The order of the file, not of the names.
        for (one, other) in [(&first, &second), (&second, &first)] {
            let before = (one.seen().len(), other.seen().len());
            scene.hosts_toml("example.test", &text(one, other));
            scene.pull(NAME).await.unwrap();
            assert!(one.seen().len() > before.0);
            assert_eq!(other.seen().len(), before.1);
        }
        // A mirror of several registries is told which one is meant.
        assert!(first.seen().iter().all(|request| request.path.contains("ns=example.test")));
    });
}

fn a_mirror_may_lack_what_it_likes() {
    for status in [404, 401, 403, 500] {
        let scene = Scene::new();
        let registry = stocked(&scene);
        let (bad, good) = (watched(&registry, Some(status)), watched(&registry, None));
        scene.hosts_toml(
            "example.test",
            &format!(
                "server = \"http://{}\"\n[host.\"http://127.0.0.1:{}\"]\n[host.\"http://{}\"]\n",
                good.address(),
                free_port(),
                bad.address()
            ),
        );
        run(async {
            scene.pull(NAME).await.unwrap();
            assert!(!bad.seen().is_empty() && !good.seen().is_empty());
        });
    }
}

fn capabilities_say_who_is_asked_for_what() {
    let scene = Scene::new();
    let registry = stocked(&scene);
    let (puller, resolver) = (watched(&registry, None), watched(&registry, None));
    scene.hosts_toml(
        "example.test",
        &format!(
            "server = \"http://{}\"\ncapabilities = [\"resolve\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
            resolver.address(),
            puller.address()
        ),
    );
    run(async {
        scene.pull(NAME).await.unwrap();
        assert_eq!(resolver.seen().len(), 1, "the tag");
        assert!(resolver.seen()[0].path.contains("/manifests/1"));
        assert!(puller.seen().iter().all(|request| request.is_blob()));
        scene.hosts_toml("example.test", "capabilities = [\"push\"]\n");
        let error = scene.pull(NAME).await.unwrap_err();
        assert!(error.to_string().contains("capability"), "{error}");
    });
}

fn paths_and_headers_are_the_operators() {
    let scene = Scene::new();
    let registry = stocked(&scene);
    let proxy = Proxy::start(registry.address(), |request| {
        Answer::ForwardTo(request.path.replace("/api/docker/v2/", "/v2/").replace("/other/", "/v2/"))
    });
    run(async {
        for (path, settings, expected) in [
            ("api/docker", "", "/api/docker/v2/sample/manifests/1"),
            ("api/docker/v2", "", "/api/docker/v2/sample/manifests/1"),
            ("other", "override_path = true\n", "/other/sample/manifests/1"),
        ] {
            scene.hosts_toml(
                "example.test",
                &format!(
                    "server = \"http://127.0.0.1:9\"\n[host.\"http://{0}/{path}\"]\n{settings}[host.\"http://{0}/{path}\".header]\n\
                     x-one = \"1\"\nx-two = [\"2\", \"3\"]\n",
                    proxy.address()
                ),
            );
            let before = proxy.seen().len();
            scene.pull(NAME).await.unwrap();
            let request = &proxy.seen()[before];
            assert!(request.path.starts_with(expected), "{}", request.path);
            let values: Vec<_> = request
                .headers
                .iter()
                .filter(|(name, _)| name.starts_with("x-"))
                .map(|(_, value)| value.as_str())
                .collect();
            assert_eq!(values, ["1", "2", "3"]);
        }
    });
}

fn the_server_is_the_last_resort() {
    let scene = Scene::new();
    let registry = stocked(&scene);
    let mirror = watched(&registry, Some(404));
    run(async {
        let name = format!("{}/sample:1", registry.address());
        // Without `server` it is the registry of the name itself, after all mirrors.
        scene.hosts_toml(&registry.address().to_string(), &format!("[host.\"http://{}\"]\n", mirror.address()));
        scene.pull(&name).await.unwrap();
        assert_eq!(mirror.seen().len(), 4, "the manifest, the configuration and two layers");
        // Every registry's own directory wins over the default one.
        scene.hosts_toml("_default", "server = \"http://127.0.0.1:9\"\n");
        scene.pull(&name).await.unwrap();
        let error = scene.pull(NAME).await.unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:9"), "{error}");
    });
}

fn tls(scene: &Scene, pair: &Pair, client_authority: Option<&Pair>) -> Registry {
    let manner = Manner {
        tls: Some((pair.certificate.clone(), pair.key.clone())),
        client_authority: client_authority.map(|pair| pair.certificate.clone()),
        ..Manner::default()
    };
    registry_with(scene, &manner)
}

/// Writes a hosts.toml for a TLS registry and pulls.
async fn pull_by(scene: &Scene, registry: &Registry, settings: &str) -> Result<(), Error> {
    scene.hosts_toml("example.test", &format!("server = \"https://{}\"\n{settings}", registry.address()));
    scene.pull(NAME).await.map(drop)
}

fn a_registry_by_its_authority() {
    let scene = Scene::new();
    drop(stocked(&scene));
    let dir = scene.dir.path();
    let authority = self_signed(dir, "authority", "authority.test").unwrap();
    let other = self_signed(dir, "other", "other.test").unwrap();
    let registry = tls(&scene, &signed(dir, "server", "127.0.0.1", &authority).unwrap(), None);
    let wrong_name = tls(&scene, &signed(dir, "elsewhere", "elsewhere.test", &authority).unwrap(), None);
    let ca = |pair: &Pair| format!("ca = \"{}\"\n", pair.certificate.display());
    run(async {
        pull_by(&scene, &registry, &ca(&authority)).await.unwrap();
        // Relative to the hosts.toml, and several.
        std::fs::copy(&authority.certificate, scene.path("certs.d/example.test/ca.pem")).unwrap();
        let several = format!("ca = [\"{}\", \"ca.pem\"]\n", other.certificate.display());
        pull_by(&scene, &registry, &several).await.unwrap();
        for settings in [String::new(), ca(&other)] {
            let error = pull_by(&scene, &registry, &settings).await.unwrap_err().to_string();
            assert!(error.contains("certificate"), "{error}");
        }
        let error = pull_by(&scene, &wrong_name, &ca(&authority)).await.unwrap_err().to_string();
        assert!(error.contains("not valid for name"), "{error}");
        let error = pull_by(&scene, &registry, "ca = \"missing.pem\"\n").await.unwrap_err().to_string();
        assert!(error.contains("missing.pem"), "{error}");
        let key_instead = format!("ca = \"{}\"\n", authority.key.display());
        let error = pull_by(&scene, &registry, &key_instead).await.unwrap_err().to_string();
        assert!(error.contains("no certificate"), "{error}");
    });
}

/// webpki refuses a certificate of an authority as a server's; people make such ones for a single registry.
fn a_registry_that_is_its_own_authority() {
    let scene = Scene::new();
    drop(stocked(&scene));
    let own = self_signed(scene.dir.path(), "own", "127.0.0.1").unwrap();
    let other_name = self_signed(scene.dir.path(), "other", "other.test").unwrap();
    let (registry, misnamed) = (tls(&scene, &own, None), tls(&scene, &other_name, None));
    let ca = |pair: &Pair| format!("ca = \"{}\"\n", pair.certificate.display());
    run(async {
        pull_by(&scene, &registry, &ca(&own)).await.unwrap();
        pull_by(&scene, &registry, &ca(&other_name)).await.unwrap_err();
        let error = pull_by(&scene, &misnamed, &ca(&other_name)).await.unwrap_err().to_string();
        assert!(error.contains("not valid for name"), "{error}");
    });
}

fn a_registry_that_wants_a_certificate() {
    let scene = Scene::new();
    drop(stocked(&scene));
    let dir = scene.dir.path();
    let authority = self_signed(dir, "authority", "authority.test").unwrap();
    let other = self_signed(dir, "other", "other.test").unwrap();
    let registry = tls(&scene, &signed(dir, "server", "127.0.0.1", &authority).unwrap(), Some(&authority));
    let client = signed(dir, "client", "node.test", &authority).unwrap();
    let stranger = signed(dir, "stranger", "node.test", &other).unwrap();
    let both = scene.path("both.pem");
    let text = [&client.certificate, &client.key].map(|path| std::fs::read_to_string(path).unwrap()).concat();
    std::fs::write(&both, text).unwrap();
    let ca = format!("ca = \"{}\"\n", authority.certificate.display());
    let pair = |pair: &Pair| format!("[\"{}\", \"{}\"]", pair.certificate.display(), pair.key.display());
    run(async {
        for client in
            [format!("[{}]", pair(&client)), format!("\"{}\"", both.display()), format!("[\"{}\"]", both.display())]
        {
            pull_by(&scene, &registry, &format!("{ca}client = {client}\n")).await.unwrap();
        }
        for settings in [ca.clone(), format!("{ca}client = [{}]\n", pair(&stranger))] {
            let error = pull_by(&scene, &registry, &settings).await.unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        }
    });
}

fn a_registry_that_nobody_verifies() {
    let scene = Scene::new();
    drop(stocked(&scene));
    let pair = self_signed(scene.dir.path(), "x", "elsewhere.test").unwrap();
    let registry = tls(&scene, &pair, None);
    run(async {
        pull_by(&scene, &registry, "skip_verify = true\n").await.unwrap();
        pull_by(&scene, &registry, "skip_verify = false\n").await.unwrap_err();
        // Loopback is believed without a word, as containerd does it, TLS or not.
        std::fs::remove_dir_all(scene.path("certs.d")).unwrap();
        scene.pull(&format!("{}/sample:1", registry.address())).await.unwrap();
    });
}

fn docker_style_certificate_files() {
    let scene = Scene::new();
    drop(stocked(&scene));
    let dir = scene.dir.path();
    let authority = self_signed(dir, "authority", "authority.test").unwrap();
    let registry = tls(&scene, &signed(dir, "server", "127.0.0.1", &authority).unwrap(), Some(&authority));
    let client = signed(dir, "client", "node.test", &authority).unwrap();
    let files = scene.path("certs.d").join(registry.address().to_string());
    std::fs::create_dir_all(&files).unwrap();
    std::fs::copy(&authority.certificate, files.join("ca.crt")).unwrap();
    std::fs::copy(&client.certificate, files.join("client.cert")).unwrap();
    std::fs::copy(&client.key, files.join("client.key")).unwrap();
    run(async {
        scene.pull(&format!("{}/sample:1", registry.address())).await.unwrap();
    });
}

fn a_faulty_hosts_toml_is_told() {
    let scene = Scene::new();
    run(async {
        for (text, words) in [
            ("server = ", "hosts.toml"),
            ("capabilities = [\"fly\"]", "fly"),
            ("server = \"ftp://x\"", "ftp"),
            ("client = [[\"a\", \"b\", \"c\"]]", "client"),
        ] {
            scene.hosts_toml("example.test", text);
            let error = scene.pull(NAME).await.unwrap_err();
            assert!(matches!(error, Error::Configuration { .. }), "{error}");
            let told = error.to_string();
            assert!(told.contains(words) && told.contains("certs.d/example.test/hosts.toml"), "{told}");
        }
    });
}
