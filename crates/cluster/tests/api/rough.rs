//! A way to the API server on which something is wrong with most answers: too busy, broken, slow, cut in the middle.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cluster::Source as _;
use cluster::api::{Api, ApiSource, ApiSourceConfig, Config};
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use testkit::certificates;
use testkit::serial::Test;
use tokio::net::{TcpListener, TcpStream};

use crate::lab::{LIMIT, Lab, NODE, PODS, key, run, when};
use crate::source::{server_has, status};

pub(crate) const TESTS: &[Test] = &[("a_server_that_falters_is_asked_again", a_server_that_falters_is_asked_again)];

/// What is wrong with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mood {
    /// 429 and when to come back.
    Busy,
    /// 500; nothing was done.
    Broken,
    /// Right, but late.
    Slow,
    /// It was done, but the answer breaks off after its first part.
    Cut,
    /// Nothing.
    Well,
}

const MOODS: [Mood; 7] = [Mood::Busy, Mood::Well, Mood::Cut, Mood::Broken, Mood::Well, Mood::Slow, Mood::Well];

type Body = BoxBody<Bytes, io::Error>;

/// Stands before an API server, and changes its mood with each request.
struct Rough {
    server: SocketAddr,
    asked: AtomicUsize,
    shown: Mutex<BTreeSet<Mood>>,
}

impl Rough {
    /// Returns its port.
    async fn start(dir: &Path, server: SocketAddr) -> (u16, Arc<Self>) {
        let pair = certificates::self_signed(dir, "rough", "127.0.0.1").unwrap();
        let chain = CertificateDer::pem_file_iter(pair.certificate).unwrap().map(Result::unwrap).collect();
        let settings = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let settings = settings.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let settings = settings.with_single_cert(chain, PrivateKeyDer::from_pem_file(pair.key).unwrap()).unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(settings));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let rough = Arc::new(Self { server, asked: AtomicUsize::new(0), shown: Mutex::default() });
        let serving = rough.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (acceptor, rough) = (acceptor.clone(), serving.clone());
                tokio::spawn(async move {
                    let Ok(client) = acceptor.accept(client).await else { return };
                    let service = service_fn(|request| rough.answer(request));
                    // A cut answer ends its connection with an error.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(client), service)
                        .await;
                });
            }
        });
        (port, rough)
    }

    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let mood = MOODS[self.asked.fetch_add(1, Ordering::Relaxed) % MOODS.len()];
        self.shown.lock().unwrap().insert(mood);
        match mood {
            Mood::Busy => Ok(refusal(StatusCode::TOO_MANY_REQUESTS)),
            Mood::Broken => Ok(refusal(StatusCode::INTERNAL_SERVER_ERROR)),
            Mood::Slow => {
                tokio::time::sleep(Duration::from_secs(2)).await;
                self.pass(request).await.map(|answer| answer.map(whole))
            }
            Mood::Cut => self.pass(request).await.map(|answer| answer.map(first_part)),
            Mood::Well => self.pass(request).await.map(|answer| answer.map(whole)),
        }
    }

    async fn pass(&self, request: Request<Incoming>) -> io::Result<Response<Incoming>> {
        let settings = trust::client(trust::anything()).unwrap().with_no_client_auth();
        let stream = TcpStream::connect(self.server).await?;
        let name = ServerName::IpAddress(self.server.ip().into());
        let stream = tokio_rustls::TlsConnector::from(Arc::new(settings)).connect(name, stream).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(io::Error::other)
    }
}

fn refusal(status: StatusCode) -> Response<Body> {
    let why =
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status.as_u16(), "message": "later"});
    let body = Full::from(why.to_string()).map_err(|never| match never {}).boxed();
    let answer = Response::builder().status(status).header(header::CONTENT_TYPE, "application/json");
    answer.header(header::RETRY_AFTER, "1").body(body).unwrap()
}

fn whole(body: Incoming) -> Body {
    body.map_err(io::Error::other).boxed()
}

fn first_part(mut body: Incoming) -> Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<Frame<Bytes>>>(1);
    tokio::spawn(async move {
        if let Some(Ok(frame)) = body.frame().await {
            let part = frame.into_data().map(|data| data.slice(..data.len() / 2)).unwrap_or_default();
            let _ = sender.send(Ok(Frame::data(part))).await;
        }
        let _ = sender.send(Err(io::Error::other("cut"))).await;
    });
    let parts = futures_util::stream::unfold(receiver, async |mut parts| parts.recv().await.map(|part| (part, parts)));
    StreamBody::new(Box::pin(parts)).boxed()
}

/// A user with all rights and a token, since a certificate would not pass through.
fn token(lab: &Lab) -> String {
    const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
    let metadata = json!({"name": "rough"});
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata});
    lab.others().create(ACCOUNTS, &account).unwrap();
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": metadata,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "rough", "namespace": "default"}],
    });
    lab.others().create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).unwrap();
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let granted = lab.others().create(&format!("{ACCOUNTS}/rough/token"), &request).unwrap();
    granted["status"]["token"].as_str().unwrap().to_owned()
}

fn config(lab: &Lab, port: u16, token: &str) -> Config {
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("https://127.0.0.1:{port}"), "insecure-skip-tls-verify": true}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    let file = lab.dir.path().join("rough.kubeconfig");
    std::fs::write(&file, text.to_string()).unwrap();
    Config::from_kubeconfig(&file).unwrap()
}

/// Pods are seen and do not flap, Secrets and ConfigMaps follow, statuses and deletions arrive.
fn a_server_that_falters_is_asked_again() {
    let lab = Lab::new();
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
    lab.others().ensure("/api/v1/nodes", &node).unwrap();
    let volume = |n: usize| json!({"spec": {"volumes": [{"name": "v", "configMap": {"name": format!("m{n}")}}]}});
    let uids: Vec<String> = (0..5).map(|n| lab.pod(&format!("p{n}"), volume(n))).collect();
    let token = token(&lab);
    run(async {
        let (port, rough) = Rough::start(lab.dir.path(), lab.plane.address()).await;
        let source = ApiSource::start(ApiSourceConfig {
            node_name: NODE.into(),
            kubelet: Some(Api::new(config(&lab, port, &token)).unwrap()),
            proxy: None,
            event_rate: None,
            sealed: None,
            static_pods: None,
            static_pods_url: None,
        })
        .unwrap();
        let store = source.store();
        for n in 0..5 {
            when(store.pods(), &key(&format!("p{n}")), |pod| pod.is_some()).await;
        }
        let mut pods = store.pods().watch();
        while pods.try_next().is_some() {}
        for (n, uid) in uids.iter().enumerate() {
            let pod = store.pods().get(&key(&format!("p{n}"))).unwrap();
            tokio::time::timeout(LIMIT, async { while source.look_up(&pod).await.is_err() {} }).await.unwrap();
            lab.map(&format!("m{n}"), "1");
            when(store.config_maps(), &key(&format!("m{n}")), |map| map.is_some()).await;
            let message = format!("status {n}");
            source.update_pod_status(uid, status(json!({"phase": "Running", "message": message}))).await.unwrap();
            server_has(&lab, &format!("p{n}"), &message, |pod| pod["status"]["message"] == message.as_str());
        }
        while let Some(change) = pods.try_next() {
            assert!(change.object.is_some(), "{} has flapped", change.key);
        }
        for (n, uid) in uids.iter().enumerate() {
            tokio::time::timeout(LIMIT, async {
                while let Err(error) = source.delete_pod(uid).await {
                    assert!(error.is_passing(), "{error}");
                    tokio::task::yield_now().await;
                }
            })
            .await
            .unwrap();
            lab.others().wait_gone(PODS, &format!("p{n}"), LIMIT).unwrap();
        }
        let shown = rough.shown.lock().unwrap().clone();
        assert_eq!(shown, MOODS.into_iter().collect(), "after {:?} requests", rough.asked);
    });
}
