//! Tokens, certificates and trust in the volumes of pods that run: they change before they end, and when others change them.

use cluster::Source as _;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{ClusterTrustBundle, PodCertificateRequest};
use k8s_openapi::api::core::v1::Node as NodeObject;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;
use testkit::serial::Test;

use crate::desk::Desk;
use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_certificate_of_a_pod_is_renewed_when_its_signer_says_so",
        a_certificate_of_a_pod_is_renewed_when_its_signer_says_so,
    ),
    ("two_tokens_in_one_volume", two_tokens_in_one_volume),
    ("an_edited_trust_bundle_reaches_the_file", an_edited_trust_bundle_reaches_the_file),
];

/// A pod whose volume `v` shows these sources.
fn want(node: &Node, sources: &serde_json::Value) {
    let container = json!({ "name": "c", "image": node.image(), "command": ["sleep", "1000"],
        "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
    let volume = json!({ "name": "v", "projected": { "sources": sources } });
    node.want_spec("p", json!({ "terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [volume] }));
}

/// What a file of the volume has.
fn shown(node: &Node, file: &str) -> String {
    std::fs::read_to_string(volume(node).join(file)).unwrap_or_default()
}

fn volume(node: &Node) -> std::path::PathBuf {
    node.path("kubelet/pods").join(node.uid("p")).join("volumes/kubernetes.io~projected/v")
}

fn pem(body: &str) -> String {
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}

/// Waits for the request with this number, and answers it: with a certificate that is to be renewed then.
async fn issue(desk: &Desk, number: usize, body: &str, refresh_at: Timestamp) {
    let requests = desk.store().pod_certificate_requests();
    desk.when(&format!("request {number}"), |_| requests.len() == number).await;
    let key = cluster::Key::new("default", &format!("req-{number}"));
    requests.update(&key, |request| {
        let now = Time(Timestamp::now());
        let condition =
            json!({ "type": "Issued", "status": "True", "reason": "R", "message": "M", "lastTransitionTime": now });
        let status =
            json!({ "certificateChain": pem(body), "conditions": [condition], "beginRefreshAt": Time(refresh_at) });
        request.status = Some(serde_json::from_value(status).unwrap());
    });
}

fn a_certificate_of_a_pod_is_renewed_when_its_signer_says_so() {
    on_a_node(|node| async {
        let metadata = json!({ "name": "n", "uid": "node-uid" });
        let object: NodeObject = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        node.desk.store().nodes().put(object);
        let source =
            json!({ "signerName": "example.com/s", "keyType": "ED25519", "credentialBundlePath": "papers.pem" });
        want(&node, &json!([{ "podCertificate": source }]));
        issue(&node.desk, 1, "QUJD", Timestamp::now()).await;
        node.desk.running("p").await;
        let first = shown(&node, "papers.pem");
        assert!(first.ends_with(&pem("QUJD")), "{first}");
        let later = Timestamp::now() + SignedDuration::from_hours(1);
        issue(&node.desk, 2, "REVG", later).await;
        node.until(&volume(&node), "the next certificate is there", || {
            shown(&node, "papers.pem").ends_with(&pem("REVG"))
        })
        .await;
        let second = shown(&node, "papers.pem");
        let key = |bundle: &str| bundle.split("-----BEGIN CERTIFICATE").next().unwrap().to_owned();
        assert!(key(&first).contains("PRIVATE KEY") && key(&first) != key(&second), "it has a key of its own");
        let stubs: Vec<ByteString> =
            requests(&node.desk).into_iter().map(|one| one.spec.stub_pkc_s10_request).collect();
        assert_ne!(stubs[0], stubs[1]);
        node
    });
}

fn requests(desk: &Desk) -> Vec<PodCertificateRequest> {
    desk.store().pod_certificate_requests().list().iter().map(|one| (**one).clone()).collect()
}

fn two_tokens_in_one_volume() {
    on_a_node(|node| async {
        let own = json!({ "path": "own/token", "expirationSeconds": 600 });
        let other = json!({ "path": "vault/token", "audience": "vault", "expirationSeconds": 600 });
        want(&node, &json!([{ "serviceAccountToken": own }, { "serviceAccountToken": other }]));
        node.desk.running("p").await;
        let both = [shown(&node, "own/token"), shown(&node, "vault/token")];
        assert_eq!(both, ["default/default for ", "default/default for vault"]);
        node
    });
}

fn an_edited_trust_bundle_reaches_the_file() {
    fn bundle(text: &str) -> ClusterTrustBundle {
        let spec = json!({ "trustBundle": text });
        serde_json::from_value(json!({ "metadata": { "name": "flags" }, "spec": spec })).unwrap()
    }
    on_a_node(|node| async {
        let bundles = node.desk.store().cluster_trust_bundles().clone();
        bundles.put(bundle(&pem("QUJD")));
        want(&node, &json!([{ "clusterTrustBundle": { "name": "flags", "path": "trust.pem" } }]));
        node.desk.running("p").await;
        assert_eq!(shown(&node, "trust.pem"), pem("QUJD"));
        bundles.put(bundle(&pem("REVG")));
        node.until(&volume(&node), "the other is there", || shown(&node, "trust.pem") == pem("REVG")).await;
        node
    });
}
