//! The control plane of the lab, as root in a network namespace of its own: what the other crates' tests rely on.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts kubectl and openssl")]

use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::certificates::Subject;
use testkit::control_plane::{self, ControlPlane, Options, Part};
use testkit::serial::{self, Test};
use testkit::{go, host, netns};

const ADDRESS: [u8; 4] = [198, 18, 0, 1];

const LIMIT: Duration = Duration::from_secs(60);

const TESTS: &[Test] = &[
    ("kubectl_speaks_to_a_fresh_control_plane", kubectl_speaks_to_a_fresh_control_plane),
    ("nodes_may_do_what_is_theirs", nodes_may_do_what_is_theirs),
    ("the_api_server_goes_and_comes_back", the_api_server_goes_and_comes_back),
    ("a_bootstrap_token_brings_a_signed_certificate", a_bootstrap_token_brings_a_signed_certificate),
    ("controllers_and_scheduler_work", controllers_and_scheduler_work),
    ("kubeadm_finds_what_it_reads_to_join", kubeadm_finds_what_it_reads_to_join),
    ("names_of_services_are_answered", names_of_services_are_answered),
];

fn main() -> ExitCode {
    let missing = programs().err().map(|error| format!("go and the module proxy ({error:#})"));
    let missing = missing.or_else(|| {
        let entered = netns::enter_private();
        entered.err().map(|error| format!("root for a private network ({error:#})"))
    });
    serial::main(TESTS, missing)
}

/// From the cache, after `main` has built them outside of the private network.
fn programs() -> anyhow::Result<PathBuf> {
    control_plane::build_with(&[go::KUBEADM, go::COREDNS])
}

struct Lab {
    plane: ControlPlane,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self::with(Options::default())
    }

    /// At an address that others reach.
    fn reachable() -> Self {
        netns::add_address(ADDRESS.into()).unwrap();
        Self::with(Options { address: ADDRESS.into(), ..Options::default() })
    }

    fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let plane = ControlPlane::start(&programs().unwrap(), dir.path(), options).unwrap();
        Self { plane, _dir: dir }
    }

    fn kubectl(&self, line: &str) -> String {
        let mut kubectl = self.plane.kubectl().unwrap();
        String::from_utf8(host::output(kubectl.args(line.split(' '))).unwrap()).unwrap()
    }
}

fn kubectl_speaks_to_a_fresh_control_plane() {
    let begun = Instant::now();
    let lab = Lab::new();
    println!("up after {:?}", begun.elapsed());
    assert_eq!(lab.kubectl("get nodes"), "");
    lab.kubectl("create namespace other");
    assert!(lab.kubectl("get namespaces -o name").lines().any(|name| name == "namespace/other"));
    assert!(lab.kubectl("version").contains("Server Version: v1.37.2"));
    let pids = [Part::Etcd, Part::ApiServer].map(|part| lab.plane.pid(part).unwrap());
    drop(lab);
    for pid in pids {
        assert!(!PathBuf::from(format!("/proc/{pid}")).exists(), "it ends with its value");
    }
}

fn node(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } })
}

fn nodes_may_do_what_is_theirs() {
    let lab = Lab::new();
    let subject = |name| Subject { name, organisations: &["system:nodes"], hosts: &[] };
    let api = lab.plane.api_as(&subject("system:node:a")).unwrap();
    api.create("/api/v1/nodes", &node("a")).unwrap();
    let refused = api.request("POST", "/api/v1/nodes", Some(("application/json", &node("b")))).unwrap();
    assert_eq!(refused.status, 403, "the admission plug-in keeps a node to itself: {refused:?}");
    lab.plane.ensure_namespace("default").unwrap();
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "s" } });
    lab.plane.api().create("/api/v1/namespaces/default/secrets", &secret).unwrap();
    let secret = "/api/v1/namespaces/default/secrets/s";
    assert_eq!(api.request("GET", secret, None).unwrap().status, 403, "no pod of this node uses it");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p" },
        "spec": {
            "nodeName": "a",
            "containers": [{ "name": "c", "image": "i", "envFrom": [{ "secretRef": { "name": "s" } }] }],
        },
    });
    lab.plane.api().create("/api/v1/namespaces/default/pods", &pod).unwrap();
    // The authorizer learns of the pod by a watch of its own.
    let deadline = Instant::now() + LIMIT;
    while api.request("GET", secret, None).unwrap().status != 200 {
        assert!(Instant::now() < deadline, "a pod of this node uses the secret now");
    }
    let proxy = lab.plane.api_as(&Subject { name: "system:kube-proxy", ..Subject::default() }).unwrap();
    proxy.get("/api/v1/services").unwrap();
    assert_eq!(proxy.request("GET", "/api/v1/secrets", None).unwrap().status, 403);
}

fn the_api_server_goes_and_comes_back() {
    let mut lab = Lab::new();
    let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "m" }, "data": { "a": "1" } });
    lab.plane.api().create("/api/v1/namespaces/default/configmaps", &map).unwrap();
    for leave in [ControlPlane::kill, ControlPlane::stop] {
        leave(&mut lab.plane, Part::ApiServer).unwrap();
        lab.plane.api().get("/version").unwrap_err();
        lab.plane.run(Part::ApiServer).unwrap();
        assert_eq!(lab.plane.api().get("/api/v1/namespaces/default/configmaps/m").unwrap()["data"]["a"], "1");
    }
    lab.plane.pause(Part::ApiServer).unwrap();
    std::net::TcpStream::connect(lab.plane.address()).expect("the kernel takes connections for it");
    let api = lab.plane.api().clone();
    let answer = std::thread::spawn(move || api.get("/version"));
    lab.plane.resume(Part::ApiServer).unwrap();
    answer.join().unwrap().unwrap();
}

fn a_bootstrap_token_brings_a_signed_certificate() {
    let mut lab = Lab::new();
    lab.plane.run(Part::ControllerManager).unwrap();
    let kubeconfig = lab.plane.bootstrap_kubeconfig().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let request = dir.path().join("request.pem");
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "/dev/null"]);
    host::run(openssl.args(["-subj", "/O=system:nodes/CN=system:node:a", "-out"]).arg(&request)).unwrap();
    let encoded = host::output(std::process::Command::new("base64").arg("-w0").arg(&request)).unwrap();
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": { "name": "a" },
        "spec": {
            "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
            "usages": ["digital signature", "client auth"],
            "request": String::from_utf8(encoded).unwrap(),
        },
    });
    let file = dir.path().join("request.json");
    std::fs::write(&file, object.to_string()).unwrap();
    let mut kubectl = lab.plane.kubectl().unwrap();
    host::run(kubectl.env("KUBECONFIG", kubeconfig).args(["create", "-f"]).arg(&file)).unwrap();
    let requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    lab.plane.api().wait(requests, "a", LIMIT, |request| request["status"]["certificate"].is_string()).unwrap();
}

fn controllers_and_scheduler_work() {
    let mut lab = Lab::new();
    lab.plane.run(Part::ControllerManager).unwrap();
    lab.plane.run(Part::Scheduler).unwrap();
    let api = lab.plane.api();
    api.create("/api/v1/nodes", &node("a")).unwrap();
    let quantities = json!({ "cpu": "2", "memory": "1Gi", "pods": "10" });
    let ready = json!({
        "capacity": quantities, "allocatable": quantities,
        "conditions": [{
            "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
            "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z",
        }],
    });
    api.merge("/api/v1/nodes/a/status", &json!({ "status": ready })).unwrap();
    let labels = json!({ "app": "x" });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "x" },
        "spec": { "selector": { "matchLabels": labels }, "template": {
            "metadata": { "labels": labels }, "spec": { "containers": [{ "name": "c", "image": "i" }] },
        } },
    });
    // The service account of the namespace is the controller manager's work, too.
    api.wait("/api/v1/namespaces/default/serviceaccounts", "default", LIMIT, |_| true).unwrap();
    api.create("/apis/apps/v1/namespaces/default/deployments", &deployment).unwrap();
    let mut node = None;
    api.watch("/api/v1/namespaces/default/pods?watch=1", LIMIT, |event| {
        node = event["object"]["spec"]["nodeName"].as_str().map(str::to_owned);
        node.is_some()
    })
    .unwrap();
    assert_eq!(node.as_deref(), Some("a"));
    let pods = api.get("/api/v1/namespaces/default/pods").unwrap();
    let pod = pods["items"][0]["metadata"]["name"].as_str().unwrap().to_owned();
    api.merge("/apis/apps/v1/namespaces/default/deployments/x", &json!({ "spec": { "replicas": 0 } })).unwrap();
    let deleted = |object: &Value| object["metadata"]["deletionTimestamp"].is_string();
    api.wait("/api/v1/namespaces/default/pods", &pod, LIMIT, deleted).unwrap();
    lab.kubectl(&format!("delete pod {pod} --grace-period=0 --force"));
    api.wait_gone("/api/v1/namespaces/default/pods", &pod, LIMIT).unwrap();
}

fn kubeadm_finds_what_it_reads_to_join() {
    let mut lab = Lab::reachable();
    lab.plane.run(Part::ControllerManager).unwrap();
    let join = lab.plane.prepare_join().unwrap();
    // The controller manager signs what the token shall be trusted with.
    let signed = |map: &Value| map["data"]["jws-kubeconfig-lab000"].is_string();
    lab.plane.api().wait("/api/v1/namespaces/kube-public/configmaps", "cluster-info", LIMIT, signed).unwrap();
    let mut kubeadm = std::process::Command::new(programs().unwrap().join("kubeadm"));
    kubeadm.args(["join", "phase", "preflight"]).args(join.arguments());
    // Nothing of this machine is of interest here.
    kubeadm.args(["--ignore-preflight-errors=all", "--node-name=n", "--cri-socket=unix:///run/none.sock"]);
    let said = String::from_utf8(host::output(&mut kubeadm).unwrap()).unwrap();
    assert!(said.contains("Reading configuration from the \"kubeadm-config\" ConfigMap"), "{said}");
}

/// A question for the IPv4 address of `name` (RFC 1035, section 4).
fn dns_question(name: &str) -> Vec<u8> {
    let header = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let labels = name.split('.').flat_map(|label| {
        std::iter::once(u8::try_from(label.len()).unwrap()).chain(label.bytes()).collect::<Vec<u8>>()
    });
    header.into_iter().chain(labels).chain([0, 0, 1, 0, 1]).collect()
}

fn names_of_services_are_answered() {
    let mut lab = Lab::reachable();
    let api = lab.plane.api();
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    let endpoint = |slice: &Value| slice["endpoints"][0]["addresses"][0] == "198.18.0.1";
    api.wait(slices, "kubernetes", LIMIT, endpoint).unwrap();
    lab.plane.run(Part::Dns).unwrap();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let question = dns_question("kubernetes.default.svc.cluster.local");
    let mut answer = [0; 512];
    let mut ask = || {
        socket.send_to(&question, (Ipv4Addr::from(ADDRESS), 53)).unwrap();
        socket.recv(&mut answer).ok() // a datagram may be lost, as for every client
    };
    let size = (0..10).find_map(|_| ask()).expect("an answer");
    let (code, octets) = (answer[3] & 15, &answer[..size]);
    assert!(code == 0 && octets.windows(4).any(|address| address == [10, 96, 0, 1]), "{octets:?}");
}
