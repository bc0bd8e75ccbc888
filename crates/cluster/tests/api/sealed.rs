//! A node starts without its API server.

use std::path::Path;
use std::time::Instant;

use cluster::api::ApiSource;
use cluster::k8s_openapi::api::authentication::v1::TokenRequestSpec;
use cluster::k8s_openapi::api::core::v1::{Pod, Secret};
use cluster::{Source as _, SourceError, Token};
use serde_json::{Value, json};
use testkit::control_plane::Part;
use testkit::serial::Test;

use crate::etcd::Etcd;
use crate::lab::{LIMIT, Lab, NODE, PODS, SECRETS, key, run, when};

pub(crate) const TESTS: &[Test] = &[
    ("pods_start_again_without_a_server", pods_start_again_without_a_server),
    ("a_server_that_refuses_is_not_away", a_server_that_refuses_is_not_away),
];

fn value(secret: Option<&Secret>) -> Option<Vec<u8>> {
    secret.map(|secret| secret.data.as_ref().unwrap()["k"].0.clone())
}

async fn token(source: &ApiSource, pod: &Pod) -> Result<Token, SourceError> {
    let bound = json!({"kind": "Pod", "apiVersion": "v1", "name": pod.metadata.name, "uid": pod.metadata.uid});
    let spec = json!({"audiences": [], "expirationSeconds": 600, "boundObjectRef": bound});
    let spec: TokenRequestSpec = serde_json::from_value(spec).unwrap();
    source.request_token(&key("default"), spec).await
}

/// Files come a moment after what they say: there is no event to wait for but their own.
async fn kept(dir: &Path, file: &str) {
    let begun = Instant::now();
    while !dir.join(file).exists() {
        assert!(begun.elapsed() < LIMIT, "{file} is not kept");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn pods_start_again_without_a_server() {
    let mut lab = Lab::new();
    let secret = |value: &str| json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": value}});
    lab.others().create(SECRETS, &secret("top secret")).unwrap();
    let service =
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}});
    lab.others().create("/api/v1/namespaces/default/services", &service).unwrap();
    let driver = json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "d.example"},
        "spec": {"attachRequired": false}});
    lab.others().create("/apis/storage.k8s.io/v1/csidrivers", &driver).unwrap();
    let env = json!([{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "N", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "k", "optional": true}}}]);
    let needs = json!({"spec": {"containers": [{"name": "c", "image": "i", "env": env}]}});
    let (stays, goes) = (lab.pod("stays", needs.clone()), lab.pod("goes", needs));
    run(async {
        let source = lab.keeping_kubelet();
        source.store().synced().await;
        let pod = source.store().pods().get(&key("stays")).unwrap();
        source.look_up(&pod).await.unwrap();
        let first = token(&source, &pod).await.unwrap();
        assert!(source.csi_driver("d.example").await.unwrap().is_some());
        for file in [
            "drivers/d.example".to_owned(),
            format!("pods/{stays}"),
            format!("pods/{goes}"),
            format!("tokens/{stays}"),
            "services/default".into(),
            format!("node/{NODE}"),
        ] {
            kept(&lab.sealed(), &file).await;
        }
        drop(source);
        let sealed = std::fs::read(lab.sealed().join(format!("pods/{stays}"))).unwrap();
        assert!(!sealed.windows(3).any(|window| window == b"top" || window == b"dG9"));

        lab.plane.kill(Part::ApiServer).unwrap();
        let begun = Instant::now();
        let source = lab.keeping_kubelet();
        let store = source.store();
        tokio::time::timeout(LIMIT, source.ready()).await.unwrap();
        let mut synced = std::pin::pin!(store.pods().synced());
        assert!(futures_util::poll!(&mut synced).is_pending(), "there may be pods that were not kept");
        println!("  known without a server after {:?}", begun.elapsed());
        assert_eq!(store.pods().keys(), ["goes", "stays"].map(key));
        assert_eq!(store.nodes().len(), 1);
        let begun = Instant::now();
        source.look_up(&store.pods().get(&key("stays")).unwrap()).await.unwrap();
        assert!(begun.elapsed().as_secs() < 1);
        assert_eq!(value(store.secrets().get(&key("s")).as_deref()).unwrap(), b"top secret");
        assert!(store.services().get(&key("web")).is_some());
        assert!(token(&source, &pod).await.unwrap() == first);
        let driver = source.csi_driver("d.example").await.unwrap().unwrap();
        assert_eq!(driver.spec.attach_required, Some(false));
        assert!(begun.elapsed().as_secs() < 1);
        let attachment = source.volume_attachment("csi-1").await.unwrap_err();
        assert!(attachment.is_passing(), "nobody knows whether it is attached still: {attachment}");
        let status = serde_json::from_value(json!({"phase": "Running", "message": "without a server"})).unwrap();
        source.update_pod_status(&stays, status).await.unwrap();

        // Meanwhile the world has changed.
        Etcd.delete("pods/default/goes");
        Etcd.delete("csidrivers/d.example");
        let meta =
            json!({"name": "s", "namespace": "default", "uid": "s", "creationTimestamp": "2026-01-02T03:04:05Z"});
        let changed =
            json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": meta, "data": {"k": "bmV3"}});
        Etcd.put(&[("secrets/default/s".into(), changed)]);
        lab.plane.run(Part::ApiServer).unwrap();
        when(store.pods(), &key("goes"), |pod| pod.is_none()).await;
        when(store.csi_drivers(), &cluster::Key::cluster("d.example"), |driver| driver.is_none()).await;
        tokio::time::timeout(LIMIT, synced).await.unwrap();
        when(store.secrets(), &key("s"), |secret| value(secret).as_deref() == Some(b"new")).await;
        let said = |pod: &Value| pod["status"]["message"] == "without a server";
        lab.others().wait(PODS, "stays", LIMIT, said).unwrap();
        while lab.sealed().join(format!("pods/{goes}")).exists() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await; // As above; a test that hangs is killed.
        }
    });
}

/// Wrong credentials are no reason to go by old files: there is somebody who knows better.
fn a_server_that_refuses_is_not_away() {
    let lab = Lab::new();
    lab.pod("p", json!({}));
    run(async {
        let source = lab.keeping_kubelet();
        source.store().synced().await;
        let uid = source.store().pods().get(&key("p")).unwrap().metadata.uid.clone().unwrap();
        kept(&lab.sealed(), &format!("pods/{uid}")).await;
        drop(source);
        let config = lab.node().with_identity(cluster::api::Identity::token("nobody's"));
        let kubelet = Some(cluster::api::Api::new(config).unwrap());
        let patience = std::time::Duration::from_millis(100);
        let sealed = cluster::api::SealConfig { dir: lab.sealed(), key: lab.dir.path().join("key"), patience };
        let source = ApiSource::start(cluster::api::ApiSourceConfig {
            node_name: NODE.into(),
            kubelet,
            proxy: None,
            event_rate: None,
            sealed: Some(sealed),
            static_pods: None,
            static_pods_url: None,
        });
        let source = source.unwrap();
        let ready = tokio::time::timeout(std::time::Duration::from_secs(2), source.ready()).await;
        assert!(ready.is_err() && source.store().pods().is_empty());
        assert!(source.failure().unwrap().to_string().contains("renew them"));
    });
}
