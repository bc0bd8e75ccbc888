//! Ten thousand Services with ten endpoints each.

use std::time::Instant;

use cluster::Source as _;
use cluster::k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};
use testkit::control_plane::Part;
use testkit::serial::Test;

use crate::etcd::Etcd;
use crate::lab::{LIMIT, Lab, run, told};

pub(crate) const TESTS: &[Test] = &[("ten_thousand_services", ten_thousand_services)];

const SERVICES: usize = 10_000;
const ENDPOINTS: usize = 10;

fn ten_thousand_services() {
    let mut lab = Lab::new();
    let begun = Instant::now();
    Etcd.put(&(0..SERVICES).map(service).collect::<Vec<_>>());
    Etcd.put(&(0..SERVICES).map(slice).collect::<Vec<_>>());
    println!("  stored after {:?}", begun.elapsed());
    // A server that has just started reads them all first.
    lab.plane.stop(Part::ApiServer).unwrap();
    lab.plane.run(Part::ApiServer).unwrap();
    let before = resident_kb();
    std::fs::write("/proc/self/clear_refs", "5").expect("the kernel lets a process forget its own peak");
    run(async {
        let begun = Instant::now();
        let source = lab.service_proxy();
        let store = source.store();
        // As a proxy does: it keeps of a slice what it needs.
        let mut slices = store.endpoint_slices().watch();
        let reader = tokio::spawn(async move {
            let mut seen = 0;
            while seen < SERVICES {
                seen += usize::from(slices.next().await.object.is_some_and(|slice| slice.endpoints.is_some()));
            }
            slices
        });
        tokio::time::timeout(LIMIT, store.services().synced()).await.unwrap();
        println!("  services known after {:?}", begun.elapsed());
        tokio::time::timeout(LIMIT, store.endpoint_slices().synced()).await.unwrap();
        println!("  slices known after {:?}", begun.elapsed());
        let _slices = tokio::time::timeout(LIMIT, reader).await.unwrap().unwrap();
        assert_eq!((store.endpoint_slices().len(), store.endpoint_slices().list().len()), (SERVICES, 0));
        let grown = (resident_kb() - before) / 1024;
        assert!(grown < 60, "{grown} MB: more than the trimmed Services and the names of slices");
        println!(
            "  {} MB more resident, {} MB more at most",
            (resident_kb() - before) / 1024,
            (peak_kb() - before) / 1024
        );
        let one = cluster::Key::new("default", "s7");
        let mut services = store.services().watch();
        let begun = Instant::now();
        lab.others()
            .merge("/api/v1/namespaces/default/services/s7", &json!({"spec": {"sessionAffinity": "ClientIP"}}))
            .unwrap();
        let is_changed =
            |service: &Service| service.spec.as_ref().unwrap().session_affinity.as_deref() == Some("ClientIP");
        loop {
            let change = told(&mut services).await;
            if change.key == one && change.object.is_some_and(|service| is_changed(&service)) {
                break;
            }
        }
        println!("  a change was seen {:?} after it began", begun.elapsed());
    });
}

fn metadata(name: &str) -> Value {
    let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:ports": {}, "f:selector": {}, "f:type": {}}});
    json!({
        "name": name, "namespace": "default", "uid": format!("00000000-0000-4000-8000-{name:0>12}"),
        "creationTimestamp": "2026-01-02T03:04:05Z", "labels": {"app": name},
        "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
            "time": "2026-01-02T03:04:05Z", "fieldsType": "FieldsV1", "fieldsV1": fields}],
    })
}

fn service(n: usize) -> (String, Value) {
    let name = format!("s{n}");
    let address = format!("10.96.{}.{}", n / 250 + 1, n % 250 + 1);
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(&name),
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None", "selector": {"app": name},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
        },
        "status": {"loadBalancer": {}},
    });
    (format!("services/specs/default/{name}"), service)
}

fn slice(n: usize) -> (String, Value) {
    let name = format!("s{n}-abcde");
    let endpoint = |m: usize| {
        let pod = n * ENDPOINTS + m;
        json!({
            "addresses": [format!("10.{}.{}.{}", 128 + pod / 65536, pod / 256 % 256, pod % 256)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", pod % 500), "zone": format!("zone-{}", pod % 3),
            "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("s{n}-{m}-abcde"), "uid": format!("11111111-0000-4000-8000-{pod:012}")},
        })
    };
    let mut metadata = metadata(&name);
    metadata["labels"] = json!({"kubernetes.io/service-name": format!("s{n}"), "app": format!("s{n}"),
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"});
    metadata["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "Service", "name": format!("s{n}"), "uid": "x", "controller": true}]);
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
    });
    (format!("endpointslices/default/{name}"), slice)
}

fn status_kb(field: &str) -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

pub(crate) fn resident_kb() -> i64 {
    status_kb("VmRSS")
}

fn peak_kb() -> i64 {
    status_kb("VmHWM")
}
