//! Who we are, and what is said when something is wrong.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use cluster::Key;
use cluster::api::{Api, ApiError, Bearer, Config, Deletion, Identity, NodeLease, Patch, Pem, Rate, Server, Trust};
use cluster::k8s_openapi::api::authentication::v1::{SelfSubjectReview, TokenRequest, TokenReview};
use cluster::k8s_openapi::api::authorization::v1::SubjectAccessReview;
use cluster::k8s_openapi::api::coordination::v1::Lease;
use cluster::k8s_openapi::api::core::v1::ConfigMap;
use cluster::k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use testkit::certificates::{self, Subject};
use testkit::serial::Test;

use crate::lab::{LIMIT, Lab, key, run};

pub(crate) const TESTS: &[Test] = &[
    ("objects_are_made_changed_and_deleted", objects_are_made_changed_and_deleted),
    ("leases_are_made_and_renewed", leases_are_made_and_renewed),
    ("tokens_and_access_are_reviewed", tokens_and_access_are_reviewed),
    ("files_change_who_we_are", files_change_who_we_are),
    ("plugins_and_proxies", plugins_and_proxies),
    ("faults_say_cause_and_remedy", faults_say_cause_and_remedy),
    ("a_frozen_server_costs_a_request_its_limit", a_frozen_server_costs_a_request_its_limit),
];

fn config_map(value: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": "m", "namespace": "default"}, "data": {"k": value}})).unwrap()
}

fn objects_are_made_changed_and_deleted() {
    let lab = Lab::new();
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        assert!(api.server_version().await.unwrap().git_version.starts_with("v1.37"));
        let made = api.create(&config_map("1")).await.unwrap();
        assert!(matches!(api.create(&config_map("1")).await, Err(ApiError::AlreadyExists { .. })));
        let changed: ConfigMap = api.patch(&key("m"), &Patch::merge(json!({"data": {"k": "2"}}))).await.unwrap();
        assert_eq!(changed.data.as_ref().unwrap()["k"], "2");
        assert!(matches!(api.replace(&made).await, Err(ApiError::Conflict { .. })), "an old version");
        assert_eq!(api.replace(&changed).await.unwrap().metadata.uid, made.metadata.uid);
        let other = Deletion { uid: Some("another".into()), ..Deletion::default() };
        assert!(matches!(api.delete::<ConfigMap>(&key("m"), &other).await, Err(ApiError::Conflict { .. })));
        api.delete::<ConfigMap>(&key("m"), &Deletion { uid: made.metadata.uid, ..Deletion::default() }).await.unwrap();
        let gone = api.get::<ConfigMap>(&key("m")).await.unwrap_err();
        assert!(gone.is_not_found() && gone.to_string().contains("\"m\""), "{gone}");
        let wrong = Patch::merge(json!({"data": 7}));
        api.create(&config_map("1")).await.unwrap();
        assert!(matches!(api.patch::<ConfigMap>(&key("m"), &wrong).await, Err(ApiError::Invalid { .. })));
    });
}

fn leases_are_made_and_renewed() {
    let lab = Lab::new();
    lab.plane.ensure_namespace("kube-node-lease").unwrap();
    run(async {
        let node = Api::new(lab.node()).unwrap();
        let admin = Api::new(lab.admin()).unwrap();
        let mut lease = NodeLease::new(node, "n1", 40);
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let there = Key::new("kube-node-lease", "n1");
        let renewed = async || admin.get::<Lease>(&there).await.unwrap().spec.unwrap().renew_time.unwrap().0;
        lease.renew(at(1_000_000_000), None).await.unwrap();
        assert_eq!(renewed().await, at(1_000_000_000));
        lease.renew(at(1_000_000_010), None).await.unwrap();
        // Somebody touches it, somebody removes it: the next renewal works all the same.
        let touch = Patch::merge(json!({"metadata": {"labels": {"a": "b"}}}));
        admin.patch::<Lease>(&there, &touch).await.unwrap();
        lease.renew(at(1_000_000_020), None).await.unwrap();
        admin.delete::<Lease>(&there, &Deletion::default()).await.unwrap();
        lease.renew(at(1_000_000_030), None).await.unwrap();
        assert_eq!(renewed().await, at(1_000_000_030));
        assert_eq!(admin.get::<Lease>(&there).await.unwrap().spec.unwrap().holder_identity.as_deref(), Some("n1"));
    });
}

fn tokens_and_access_are_reviewed() {
    let lab = Lab::new();
    run(async {
        let api = Api::new(lab.admin()).unwrap();
        let asked: TokenRequest =
            serde_json::from_value(json!({"spec": {"audiences": [], "expirationSeconds": 3600}})).unwrap();
        let given = api.request_token(&key("default"), &asked).await.unwrap().status.unwrap().token.unwrap();
        let review =
            |token: &str| -> TokenReview { serde_json::from_value(json!({"spec": {"token": token}})).unwrap() };
        let known = api.review_token(&review(&given)).await.unwrap().status.unwrap();
        let user = known.user.unwrap().username.unwrap();
        assert_eq!(user, "system:serviceaccount:default:default");
        assert_ne!(api.review_token(&review("nobody's")).await.unwrap().status.unwrap().authenticated, Some(true));
        let may = async |verb: &str, user: &str| {
            let attributes = json!({"verb": verb, "resource": "nodes", "subresource": "proxy", "name": "n1"});
            let groups = json!(["system:authenticated"]);
            let review = json!({"spec": {"user": user, "groups": groups, "resourceAttributes": attributes}});
            let review: SubjectAccessReview = serde_json::from_value(review).unwrap();
            api.review_access(&review).await.unwrap().status.unwrap().allowed
        };
        assert!(!may("get", &user).await);
        // Who has the token is who it names.
        let config = lab.admin().with_identity(Identity::token(&given));
        assert_eq!(who(&Api::new(config).unwrap()).await, Ok(user));
    });
}

/// Our name, as the server knows it.
async fn who(api: &Api) -> Result<String, String> {
    let review = api.create(&SelfSubjectReview::default()).await.map_err(|error| error.to_string())?;
    Ok(review.status.unwrap().user_info.unwrap().username.unwrap())
}

/// Asks until the answer is another one; files are looked at every few seconds.
async fn becomes(api: &Api, name: &str) {
    let begun = Instant::now();
    loop {
        let now = who(api).await;
        if now.as_deref() == Ok(name) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{now:?} does not become {name}");
        tokio::time::sleep(Duration::from_millis(100)).await; // A file has no event that the client would tell us.
    }
}

fn files_change_who_we_are() {
    let lab = Lab::new();
    run(async {
        let admin = Api::new(lab.admin()).unwrap();
        let token = async |account: &str| {
            let account = key(account);
            admin.request_token(&account, &TokenRequest::default()).await.unwrap().status.unwrap().token.unwrap()
        };
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "other"}});
        lab.others().create("/api/v1/namespaces/default/serviceaccounts", &account).unwrap();
        let file = lab.dir.path().join("token");
        std::fs::write(&file, token("default").await).unwrap();
        let bearer = Some(Bearer::File(file.clone()));
        let api = Api::new(lab.admin().with_identity(Identity { bearer, ..Identity::default() })).unwrap();
        becomes(&api, "system:serviceaccount:default:default").await;
        std::fs::write(&file, token("other").await).unwrap();
        becomes(&api, "system:serviceaccount:default:other").await;

        // A certificate that is renewed by a link to another file, as the kubelet's is. Its connection is another one.
        let link = lab.dir.path().join("current.pem");
        let pem = |name: &str| {
            let subject = Subject { name, ..Subject::default() };
            let pair = certificates::issue(lab.dir.path(), name, &subject, lab.plane.authority()).unwrap();
            let both = [std::fs::read(pair.certificate).unwrap(), std::fs::read(pair.key).unwrap()].concat();
            let file = lab.dir.path().join(format!("{name}.pem"));
            std::fs::write(&file, both).unwrap();
            let new = lab.dir.path().join("new.pem");
            std::os::unix::fs::symlink(&file, &new).unwrap();
            std::fs::rename(&new, &link).unwrap();
        };
        pem("alice");
        let both = Pem::File(link.clone());
        let api = Api::new(lab.admin().with_identity(Identity::certificate(both.clone(), both))).unwrap();
        becomes(&api, "alice").await;
        pem("bob");
        becomes(&api, "bob").await;
    });
}

fn kubeconfig(lab: &Lab, cluster: &Value, user: &Value) -> Config {
    let mut all = json!({
        "server": format!("https://{}", lab.plane.address()),
        "certificate-authority": lab.plane.authority().certificate,
    });
    for (field, value) in cluster.as_object().unwrap() {
        all[field] = value.clone();
    }
    let text = json!({
        "clusters": [{"name": "c", "cluster": all}], "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x",
    });
    let file = lab.dir.path().join("test.kubeconfig");
    std::fs::write(&file, text.to_string()).unwrap();
    Config::from_kubeconfig(&file).unwrap()
}

fn plugins_and_proxies() {
    let lab = Lab::new();
    let token = lab.plane.bootstrap_token().unwrap();
    let answer = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token},
    });
    let answer_file = lab.dir.path().join("answer.json");
    std::fs::write(&answer_file, answer.to_string()).unwrap();
    run(async {
        let exec = json!({"exec": {
            "apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/cat", "args": [answer_file],
            "interactiveMode": "IfAvailable",
        }});
        let api = Api::new(kubeconfig(&lab, &json!({}), &exec)).unwrap();
        assert_eq!(who(&api).await.unwrap(), "system:bootstrap:lab000");
        // A plugin's answer that the server refuses is asked for again.
        let wrong = answer.to_string().replace(&token, "nobody's");
        std::fs::write(&answer_file, wrong).unwrap();
        let api = Api::new(kubeconfig(&lab, &json!({}), &exec)).unwrap();
        assert!(who(&api).await.unwrap_err().contains("what /bin/cat gives out"));
        std::fs::write(&answer_file, answer.to_string()).unwrap();
        assert_eq!(who(&api).await.unwrap(), "system:bootstrap:lab000");

        let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", proxy.local_addr().unwrap());
        let serving = tokio::spawn(serve_connect(proxy));
        let through = kubeconfig(&lab, &json!({"proxy-url": url}), &json!({"token": token}));
        assert_eq!(who(&Api::new(through).unwrap()).await.unwrap(), "system:bootstrap:lab000");
        assert_eq!(serving.await.unwrap(), format!("CONNECT {} HTTP/1.1", lab.plane.address()));
    });
}

/// A proxy for one connection; returns what it was asked for.
async fn serve_connect(listener: tokio::net::TcpListener) -> String {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    let (client, _) = listener.accept().await.unwrap();
    let mut client = BufReader::new(client);
    let mut asked = String::new();
    client.read_line(&mut asked).await.unwrap();
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        client.read_line(&mut line).await.unwrap();
    }
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    let target = asked.split(' ').nth(1).unwrap();
    let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
    tokio::spawn(async move {
        // It ends when either side does.
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    });
    asked.trim().to_owned()
}

fn faults_say_cause_and_remedy() {
    let lab = Lab::new();
    run(async {
        let check = async |config: Config, words: &[&str]| {
            let error = Api::new(config).unwrap().server_version().await.unwrap_err().to_string();
            println!("  {error}");
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        let address = lab.plane.address().to_string();
        check(lab.admin().with_identity(Identity::token("nobody's")), &[&address, "a token", "renew"]).await;
        let missing = Identity { bearer: Some(Bearer::File("/nowhere/token".into())), ..Identity::default() };
        check(lab.admin().with_identity(missing), &["/nowhere/token", "check"]).await;
        let elsewhere = |server: Server| Config { server, ..lab.admin() };
        check(elsewhere(Server::new("127.0.0.1", 1)), &["cannot reach", "127.0.0.1:1", "refused"]).await;
        // A certificate for other names, another authority, a server without TLS.
        let other = certificates::authority(lab.dir.path(), "other").unwrap();
        let trust = Trust::Authorities(Pem::File(other.certificate));
        check(Config { trust, ..lab.admin() }, &["certificate-authority", "not the one"]).await;
        let named = Config { server_name: Some("elsewhere.example".into()), ..lab.admin() };
        check(named, &["tls-server-name"]).await;
        let plain = plain_server();
        check(elsewhere(Server::new("127.0.0.1", plain)), &["does not speak TLS"]).await;
        check(Config { trust: Trust::Authorities(Pem::File("/nowhere/ca".into())), ..lab.admin() }, &["/nowhere/ca"])
            .await;

        // A client certificate of somebody else's authority: the server says so, or hangs up.
        let stranger = certificates::issue(
            lab.dir.path(),
            "stranger",
            &Subject { name: "s", ..Subject::default() },
            &other_authority(lab.dir.path()),
        )
        .unwrap();
        let identity = Identity::certificate(Pem::File(stranger.certificate), Pem::File(stranger.key));
        check(lab.admin().with_identity(identity), &[&address, "certificate", "renew"]).await;

        let proxy = Api::new(lab.proxy()).unwrap();
        let refused = proxy.get::<ConfigMap>(&key("m")).await.unwrap_err();
        assert!(
            matches!(refused, ApiError::Forbidden { .. }) && refused.to_string().contains("system:kube-proxy"),
            "{refused}"
        );
    });
}

fn other_authority(dir: &Path) -> certificates::Pair {
    certificates::Pair { certificate: dir.join("other.crt"), key: dir.join("other.key") }
}

/// Answers everything in plain words.
fn plain_server() -> u16 {
    use std::io::Write as _;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // The client may be gone.
            let _ = stream.unwrap().write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    port
}

fn a_frozen_server_costs_a_request_its_limit() {
    let mut lab = Lab::new();
    let config = lab.admin().with_timeout(Duration::from_secs(1));
    let api = Api::new(Config { rate: Some(Rate { per_second: 1000.0, burst: 10 }), ..config }).unwrap();
    run(async {
        api.server_version().await.unwrap();
        lab.plane.pause(testkit::control_plane::Part::ApiServer).unwrap();
        let begun = Instant::now();
        let error = api.server_version().await.unwrap_err();
        assert!(matches!(error, ApiError::TimedOut { .. }), "{error}");
        assert!((1.0..10.0).contains(&begun.elapsed().as_secs_f64()));
        lab.plane.resume(testkit::control_plane::Part::ApiServer).unwrap();
        while let Err(error) = api.server_version().await {
            assert!(error.is_transient() && begun.elapsed() < LIMIT, "{error}");
        }
    });
}
