//! Static pods, and what an API server sees of them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cluster::api::{Api, ApiSource, ApiSourceConfig, ManifestUrl};
use cluster::k8s_openapi::api::core::v1::PodStatus;
use cluster::{Key, Source as _};
use serde_json::{Value, json};
use testkit::control_plane::Part;
use testkit::serial::Test;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::lab::{LIMIT, Lab, NODE, PODS, key, run, when};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_static_pod_runs_without_a_server_and_is_mirrored_by_it",
        a_static_pod_runs_without_a_server_and_is_mirrored_by_it,
    ),
    ("a_deleted_mirror_is_made_again_and_an_orphan_goes", a_deleted_mirror_is_made_again_and_an_orphan_goes),
    ("a_server_of_manifests_that_is_silent_ends_nobody", a_server_of_manifests_that_is_silent_ends_nobody),
];

const NAME: &str = "web-n1";

fn write(dir: &Path, image: &str) {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"},
        "spec": {"containers": [{"name": "c", "image": image}]}});
    std::fs::write(dir.join("web.yaml"), pod.to_string()).unwrap();
}

fn ensure_node(lab: &Lab) {
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
    lab.others().ensure("/api/v1/nodes", &node).unwrap();
}

fn source(lab: &Lab) -> Arc<ApiSource> {
    source_with(lab, None)
}

fn source_with(lab: &Lab, static_pods_url: Option<ManifestUrl>) -> Arc<ApiSource> {
    let config = ApiSourceConfig {
        node_name: NODE.into(),
        kubelet: Some(Api::new(lab.node()).unwrap()),
        proxy: None,
        event_rate: None,
        sealed: None,
        static_pods: Some(lab.dir.path().join("manifests")),
        static_pods_url,
    };
    ApiSource::start(config).unwrap()
}

/// Waits until the server's pod is as wanted.
async fn server_has(lab: &Lab, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let begun = std::time::Instant::now();
    loop {
        let pod = lab.others().get(&format!("{PODS}/{NAME}")).unwrap_or_default();
        if holds(&pod) {
            return pod;
        }
        assert!(begun.elapsed() < LIMIT, "{what}: {pod}");
        // Others write to it, and this client has no watch.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn mirrors(pod: &Value, uid: &str) -> bool {
    pod["metadata"]["annotations"]["kubernetes.io/config.mirror"] == uid
        && pod["metadata"]["deletionTimestamp"].is_null()
}

fn uid_of(source: &ApiSource) -> Option<String> {
    source.store().pods().get(&key(NAME))?.metadata.uid.clone()
}

fn a_static_pod_runs_without_a_server_and_is_mirrored_by_it() {
    let mut lab = Lab::new();
    let dir = lab.dir.path().join("manifests");
    std::fs::create_dir(&dir).unwrap();
    write(&dir, "i:1");
    // The Node is there, the server is not.
    ensure_node(&lab);
    lab.plane.kill(Part::ApiServer).unwrap();
    run(async {
        let source = source(&lab);
        tokio::time::timeout(LIMIT, source.ready()).await.unwrap();
        let first = uid_of(&source).unwrap();
        let pod = source.store().pods().get(&key(NAME)).unwrap();
        source.look_up(&pod).await.unwrap();
        let status = |message: &str| PodStatus { message: Some(message.into()), ..PodStatus::default() };
        source.update_pod_status(&first, status("runs")).await.unwrap();
        lab.plane.run(Part::ApiServer).unwrap();
        let told = |pod: &Value| mirrors(pod, &first) && pod["status"]["message"] == "runs";
        let mirror = server_has(&lab, "it is mirrored, with its status", told).await;
        assert_eq!(mirror["metadata"]["ownerReferences"][0]["kind"], "Node");
        assert_eq!(mirror["spec"]["tolerations"][0], json!({"operator": "Exists", "effect": "NoExecute"}));
        // Another version: the one before has to go first.
        write(&dir, "i:2");
        when(source.store().pods(), &key(NAME), |pod| pod.is_some_and(|pod| pod.metadata.deletion_timestamp.is_some()))
            .await;
        assert_eq!(uid_of(&source), Some(first.clone()));
        source.delete_pod(&first).await.unwrap();
        let other = |uid: Option<&String>| uid.is_some_and(|uid| *uid != first);
        when(source.store().pods(), &key(NAME), |pod| other(pod.and_then(|pod| pod.metadata.uid.as_ref()))).await;
        let second = uid_of(&source).unwrap();
        server_has(&lab, "the mirror is of the new one", |pod| mirrors(pod, &second)).await;
        std::fs::remove_file(dir.join("web.yaml")).unwrap();
        when(source.store().pods(), &key(NAME), |pod| pod.is_some_and(|pod| pod.metadata.deletion_timestamp.is_some()))
            .await;
        source.delete_pod(&second).await.unwrap();
        server_has(&lab, "the mirror goes", Value::is_null).await;
    });
}

fn a_deleted_mirror_is_made_again_and_an_orphan_goes() {
    let lab = Lab::new();
    let dir = lab.dir.path().join("manifests");
    std::fs::create_dir(&dir).unwrap();
    write(&dir, "i:1");
    let mirror = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "gone"}}});
    lab.pod("orphan-n1", mirror);
    ensure_node(&lab);
    // Whoever says that it is a static pod is none.
    lab.pod("false", json!({"metadata": {"annotations": {"kubernetes.io/config.source": "file"}}}));
    run(async {
        let source = source(&lab);
        source.store().synced().await;
        let uid = uid_of(&source).unwrap();
        let first = server_has(&lab, "it is mirrored", |pod| mirrors(pod, &uid)).await;
        let path = format!("{PODS}/{NAME}?gracePeriodSeconds=30");
        lab.others().request("DELETE", &path, None).unwrap().json().unwrap();
        let again = |pod: &Value| mirrors(pod, &uid) && pod["metadata"]["uid"] != first["metadata"]["uid"];
        server_has(&lab, "it is mirrored again", again).await;
        assert_eq!(uid_of(&source), Some(uid), "the pod runs on");
        assert_eq!(source.store().pods().keys(), [key("false"), Key::new("default", NAME)]);
        let declared = source.store().pods().get(&key("false")).unwrap().metadata.annotations.clone().unwrap();
        assert_eq!(declared["kubernetes.io/config.source"], "api");
        let begun = std::time::Instant::now();
        while lab.others().get(&format!("{PODS}/orphan-n1")).is_ok() {
            assert!(begun.elapsed() < LIMIT, "the orphan stays");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
}

/// What runs may be declared there, and so may what the mirrors show.
fn a_server_of_manifests_that_is_silent_ends_nobody() {
    let lab = Lab::new();
    let dir = lab.dir.path().join("manifests");
    std::fs::create_dir(&dir).unwrap();
    write(&dir, "i:1");
    lab.pod("other-n1", json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "before"}}}));
    ensure_node(&lab);
    let other = format!("{PODS}/other-n1");
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (url, every) = (format!("http://{}/pods", listener.local_addr().unwrap()), Duration::from_secs(1));
        let source = source_with(&lab, Some(ManifestUrl { url, headers: Default::default(), every }));
        let (silent, _) = listener.accept().await.unwrap();
        tokio::time::timeout(LIMIT, source.ready()).await.unwrap();
        let uid = uid_of(&source).unwrap();
        server_has(&lab, "the mirror of a file's pod waits for nobody", |pod| mirrors(pod, &uid)).await;
        assert!(lab.others().get(&other).is_ok());
        assert!(tokio::time::timeout(Duration::ZERO, source.store().pods().synced()).await.is_err());
        drop(silent);
        let answers = async {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            }
        };
        tokio::select! {
            () = answers => {}
            synced = tokio::time::timeout(LIMIT, source.store().pods().synced()) => synced.unwrap(),
        }
        let begun = std::time::Instant::now();
        while lab.others().get(&other).is_ok() {
            assert!(begun.elapsed() < LIMIT, "the mirror of no pod stays");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}
