//! What a kubelet gets from its source, and what it gives.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cluster::k8s_openapi::api::core::v1::{Pod, PodStatus, Secret};
use cluster::{Change, EventKind, Source as _, SourceError, event_about};
use serde_json::{Value, json};
use testkit::control_plane::{Options, Part};
use testkit::serial::Test;

use crate::lab::{LIMIT, Lab, MAPS, NODE, PODS, SECRETS, key, run, told, when};

pub(crate) const TESTS: &[Test] = &[
    ("a_node_sees_its_own", a_node_sees_its_own),
    ("secrets_are_followed_while_a_pod_needs_them", secrets_are_followed_while_a_pod_needs_them),
    ("claims_lead_to_their_volumes", claims_lead_to_their_volumes),
    ("statuses_are_merged", statuses_are_merged),
    ("what_others_write_is_mended", what_others_write_is_mended),
    ("statuses_wait_for_a_server_that_is_away", statuses_wait_for_a_server_that_is_away),
    ("an_ended_pod_is_deleted_by_its_uid", an_ended_pod_is_deleted_by_its_uid),
    ("finalizers_do_not_bring_a_pod_back", finalizers_do_not_bring_a_pod_back),
    ("events_are_counted", events_are_counted),
    ("classes_name_handlers", classes_name_handlers),
    ("a_node_reads_its_claims_and_removes_its_slices", a_node_reads_its_claims_and_removes_its_slices),
    ("without_http2_it_works_as_well", without_http2_it_works_as_well),
    ("a_proxy_sees_services_and_slices", a_proxy_sees_services_and_slices),
];

fn a_node_sees_its_own() {
    let lab = Lab::new();
    lab.pod("mine", json!({}));
    let elsewhere = lab.pod("elsewhere", json!({"spec": {"nodeName": "n2"}}));
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        tokio::time::timeout(LIMIT, store.synced()).await.unwrap();
        assert!(source.failure().is_none());
        assert_eq!((store.pods().keys(), store.nodes().len()), (vec![key("mine")], 1));
        assert!(store.pods().find_uid(&elsewhere).is_none());
        // Not bound yet, then bound.
        lab.pod("later", json!({"spec": {"nodeName": null}}));
        lab.others().bind("default", "later", NODE).unwrap();
        when(store.pods(), &key("later"), |pod| pod.is_some()).await;
        let version = store.pods().get(&key("later")).unwrap().metadata.resource_version.clone();
        let there = lab.others().get(&format!("{PODS}/later")).unwrap();
        assert_eq!(version.as_deref(), there["metadata"]["resourceVersion"].as_str(), "the server's own");
        lab.others().request("DELETE", &format!("{PODS}/later?gracePeriodSeconds=0"), None).unwrap().json().unwrap();
        when(store.pods(), &key("later"), |pod| pod.is_none()).await;
    });
}

fn secret(value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": value}})
}

fn secrets_are_followed_while_a_pod_needs_them() {
    let lab = Lab::new();
    let needs = |names: &[&str]| {
        let env: Vec<Value> = names
            .iter()
            .map(|name| json!({"name": name.to_uppercase(), "valueFrom": {"secretKeyRef": {"name": name, "key": "k", "optional": true}}}))
            .collect();
        json!({"spec": {"containers": [{"name": "c", "image": "i", "env": env}], "volumes": [{"name": "v", "configMap": {"name": "m"}}]}})
    };
    lab.others().create(SECRETS, &secret("1")).unwrap();
    lab.map("unrelated", "1");
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        store.synced().await;
        lab.pod("p", needs(&["s", "none"]));
        when(store.pods(), &key("p"), |pod| pod.is_some()).await;
        let pod = store.pods().get(&key("p")).unwrap();
        let begun = Instant::now();
        source.look_up(&pod).await.unwrap();
        println!("  looked up after {:?}", begun.elapsed());
        let value = |secret: Option<&Secret>| secret.map(|secret| secret.data.as_ref().unwrap()["k"].0.clone());
        assert_eq!(value(store.secrets().get(&key("s")).as_deref()).unwrap(), b"1");
        // These are really missing, and appear.
        assert!(store.secrets().get(&key("none")).is_none() && store.config_maps().get(&key("m")).is_none());
        assert!(store.config_maps().get(&key("unrelated")).is_none());
        lab.map("m", "1");
        when(store.config_maps(), &key("m"), |map| map.is_some()).await;
        let begun = Instant::now();
        lab.others().merge(&format!("{SECRETS}/s"), &json!({"stringData": {"k": "2"}})).unwrap();
        when(store.secrets(), &key("s"), |secret| value(secret).as_deref() == Some(b"2")).await;
        println!("  a change was seen {:?} after it began", begun.elapsed());
        lab.others().delete(&format!("{MAPS}/m")).unwrap();
        when(store.config_maps(), &key("m"), |map| map.is_none()).await;

        // Shared with another pod, it stays until both are gone.
        lab.pod("q", needs(&["s"]));
        when(store.pods(), &key("q"), |pod| pod.is_some()).await;
        source.look_up(&store.pods().get(&key("q")).unwrap()).await.unwrap();
        let end = |name: &str| {
            lab.others()
                .request("DELETE", &format!("{PODS}/{name}?gracePeriodSeconds=0"), None)
                .unwrap()
                .json()
                .unwrap()
        };
        end("p");
        when(store.pods(), &key("p"), |pod| pod.is_none()).await;
        source.look_up(&store.pods().get(&key("q")).unwrap()).await.unwrap();
        assert!(store.secrets().get(&key("s")).is_some());
        // One that has ended needs nothing any more.
        lab.others().merge(&format!("{PODS}/q/status"), &json!({"status": {"phase": "Succeeded"}})).unwrap();
        when(store.secrets(), &key("s"), |secret| secret.is_none()).await;
    });
}

fn claims_lead_to_their_volumes() {
    let lab = Lab::new();
    const CLAIMS: &str = "/api/v1/namespaces/default/persistentvolumeclaims";
    let capacity = json!({"storage": "1Gi"});
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": capacity}}});
    let volume = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "pv"},
        "spec": {"accessModes": ["ReadWriteOnce"], "capacity": capacity, "hostPath": {"path": "/data"}}});
    lab.others().create(CLAIMS, &claim).unwrap();
    lab.others().create("/api/v1/persistentvolumes", &volume).unwrap();
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        lab.pod("p", json!({"spec": {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}}));
        when(store.pods(), &key("p"), |pod| pod.is_some()).await;
        source.look_up(&store.pods().get(&key("p")).unwrap()).await.unwrap();
        let unbound = store.persistent_volume_claims().get(&key("data")).unwrap();
        assert_eq!(unbound.spec.as_ref().unwrap().volume_name, None);
        // What the controller does to bind them; the node authorizer goes by the volume's reference.
        let of = json!({"namespace": "default", "name": "data", "uid": unbound.metadata.uid});
        lab.others().merge("/api/v1/persistentvolumes/pv", &json!({"spec": {"claimRef": of}})).unwrap();
        lab.others().merge(&format!("{CLAIMS}/data"), &json!({"spec": {"volumeName": "pv"}})).unwrap();
        lab.others().merge(&format!("{CLAIMS}/data/status"), &json!({"status": {"phase": "Bound"}})).unwrap();
        let pv = cluster::Key::cluster("pv");
        when(store.persistent_volumes(), &pv, |volume| volume.is_some()).await;
    });
}

pub(crate) fn status(value: Value) -> PodStatus {
    serde_json::from_value(value).unwrap()
}

/// Waits until the server has this of a pod.
pub(crate) fn server_has(lab: &Lab, name: &str, what: &str, holds: impl FnMut(&Value) -> bool) -> Value {
    lab.others().wait(PODS, name, LIMIT, holds).unwrap_or_else(|error| panic!("{what}: {error:#}"))
}

fn statuses_are_merged() {
    let lab = Lab::new();
    let uid = lab.pod("p", json!({}));
    run(async {
        let source = lab.kubelet();
        when(source.store().pods(), &key("p"), |pod| pod.is_some()).await;
        // Others have their own conditions there, and write them while we do.
        let gate = |value: &str| json!({"status": {"conditions": [{"type": "example.com/gate", "status": value}]}});
        let others = |value: &str| {
            let body = Some(("application/strategic-merge-patch+json", &gate(value)))
                .map(|(kind, value)| (kind, value.clone()));
            let (kind, value) = body.unwrap();
            lab.others().request("PATCH", &format!("{PODS}/p/status"), Some((kind, &value))).unwrap().json().unwrap()
        };
        others("False");
        let ours = |ready: &str, ip: &str| {
            status(json!({
                "phase": "Running", "startTime": "2026-01-02T03:04:05Z", "podIP": ip, "podIPs": [{"ip": ip}],
                "observedGeneration": 1,
                "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-02T03:04:05Z"}],
                "containerStatuses": [{"name": "c", "image": "i", "imageID": "x", "ready": ready == "True", "restartCount": 0,
                    "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}}}],
            }))
        };
        source.update_pod_status(&uid, ours("False", "10.0.0.1")).await.unwrap();
        server_has(&lab, "p", "running", |pod| pod["status"]["phase"] == "Running");
        others("True");
        let begun = Instant::now();
        source.update_pod_status(&uid, ours("True", "10.0.0.2")).await.unwrap();
        let condition = |pod: &Value, kind: &str| {
            let all = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
            all.iter().find(|one| one["type"] == kind).map(|one| one["status"].as_str().unwrap().to_owned())
        };
        let pod = server_has(&lab, "p", "ready", |pod| condition(pod, "Ready").as_deref() == Some("True"));
        println!("  ready after {:?}", begun.elapsed());
        assert_eq!(condition(&pod, "example.com/gate").as_deref(), Some("True"));
        assert_eq!(pod["status"]["podIPs"], json!([{"ip": "10.0.0.2"}]));
        assert_eq!(pod["status"]["observedGeneration"], 1);

        // A phase that is terminal stays.
        source.update_pod_status(&uid, status(json!({"phase": "Failed", "reason": "Evicted"}))).await.unwrap();
        let pod = server_has(&lab, "p", "failed", |pod| pod["status"]["phase"] == "Failed");
        assert_eq!(pod["status"]["containerStatuses"], Value::Null);
        source.update_pod_status(&uid, status(json!({"phase": "Running", "message": "later"}))).await.unwrap();
        let pod = server_has(&lab, "p", "the message", |pod| pod["status"]["message"] == "later");
        assert_eq!((&pod["status"]["phase"], &pod["status"]["reason"]), (&json!("Failed"), &Value::Null));
        let nobody = source.update_pod_status("nobody", PodStatus::default()).await;
        assert!(matches!(nobody, Err(SourceError::NotFound { .. })));
    });
}

fn what_others_write_is_mended() {
    let lab = Lab::new();
    let uid = lab.pod("p", json!({}));
    run(async {
        let source = lab.kubelet();
        when(source.store().pods(), &key("p"), |pod| pod.is_some()).await;
        source.update_pod_status(&uid, status(json!({"phase": "Running", "message": "ours"}))).await.unwrap();
        server_has(&lab, "p", "ours", |pod| pod["status"]["message"] == "ours");
        lab.others()
            .merge(&format!("{PODS}/p/status"), &json!({"status": {"phase": "Pending", "message": "theirs"}}))
            .unwrap();
        server_has(&lab, "p", "mended", |pod| {
            pod["status"]["message"] == "ours" && pod["status"]["phase"] == "Running"
        });
        // Then there is rest: no patch without a change.
        let before = lab.others().get(&format!("{PODS}/p")).unwrap()["metadata"]["resourceVersion"].clone();
        lab.others().merge(&format!("{PODS}/p"), &json!({"metadata": {"labels": {"a": "b"}}})).unwrap();
        when(source.store().pods(), &key("p"), |pod| pod.is_some_and(|pod| pod.metadata.labels.is_some())).await;
        let watched = source.store().pods().get(&key("p")).unwrap().metadata.resource_version.clone();
        assert_ne!(watched.as_deref(), before.as_str());
        source.settle().await;
        let after = lab.others().get(&format!("{PODS}/p")).unwrap()["metadata"]["resourceVersion"].clone();
        assert_eq!(watched.as_deref(), after.as_str());
    });
}

fn statuses_wait_for_a_server_that_is_away() {
    let mut lab = Lab::new();
    let uids: Vec<String> = (0..5).map(|n| lab.pod(&format!("p{n}"), json!({}))).collect();
    run(async {
        let source = lab.kubelet();
        for n in 0..5 {
            when(source.store().pods(), &key(&format!("p{n}")), |pod| pod.is_some()).await;
        }
        let mut pods = source.store().pods().watch();
        while pods.try_next().is_some() {}
        lab.plane.kill(Part::ApiServer).unwrap();
        for (n, uid) in uids.iter().enumerate() {
            for message in 0..20 {
                let now = status(json!({"phase": "Running", "message": format!("{n} {message}")}));
                source.update_pod_status(uid, now).await.unwrap();
            }
        }
        let away = source.delete_pod(&uids[0]).await.unwrap_err();
        assert!(away.is_passing(), "{away}");
        lab.plane.run(Part::ApiServer).unwrap();
        let begun = Instant::now();
        for n in 0..5 {
            let wanted = format!("{n} 19");
            server_has(&lab, &format!("p{n}"), &wanted, |pod| pod["status"]["message"] == wanted.as_str());
        }
        println!("  all were written {:?} after the server was ready", begun.elapsed());
        while let Some(Change { key, object, .. }) = pods.try_next() {
            assert!(object.is_some(), "{key} has flapped");
        }
    });
}

fn an_ended_pod_is_deleted_by_its_uid() {
    let lab = Lab::new();
    let uid = lab.pod("p", json!({}));
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        when(store.pods(), &key("p"), |pod| pod.is_some()).await;
        lab.others().request("DELETE", &format!("{PODS}/p?gracePeriodSeconds=7"), None).unwrap().json().unwrap();
        let ends = |pod: Option<&Pod>| pod.is_some_and(|pod| pod.metadata.deletion_timestamp.is_some());
        when(store.pods(), &key("p"), ends).await;
        assert_eq!(store.pods().get(&key("p")).unwrap().metadata.deletion_grace_period_seconds, Some(7));
        source.request_deletion(&uid, Some(2)).await.unwrap();
        when(store.pods(), &key("p"), |pod| {
            pod.is_some_and(|pod| pod.metadata.deletion_grace_period_seconds == Some(2))
        })
        .await;
        // The last status arrives before the pod goes.
        let version =
            lab.others().get(&format!("{PODS}/p")).unwrap()["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
        source.update_pod_status(&uid, status(json!({"phase": "Failed", "message": "the last word"}))).await.unwrap();
        let begun = Instant::now();
        source.delete_pod(&uid).await.unwrap();
        println!("  deleted after {:?}", begun.elapsed());
        assert!(store.pods().is_empty());
        let mut last = Value::Null;
        let watch = format!("{PODS}?watch=1&resourceVersion={version}");
        lab.others()
            .watch(&watch, LIMIT, |event| {
                last = event["object"].take();
                event["type"] == "DELETED"
            })
            .unwrap();
        assert_eq!(last["status"]["message"], "the last word");
        source.delete_pod(&uid).await.unwrap();

        // Another one of this name is left alone.
        let first = lab.pod("q", json!({}));
        when(store.pods(), &key("q"), |pod| pod.is_some()).await;
        lab.others().request("DELETE", &format!("{PODS}/q?gracePeriodSeconds=0"), None).unwrap().json().unwrap();
        let second = lab.pod("q", json!({}));
        source.delete_pod(&first).await.unwrap();
        when(store.pods(), &key("q"), |pod| pod.is_some_and(|pod| pod.metadata.uid.as_ref() == Some(&second))).await;
        assert_eq!(lab.others().get(&format!("{PODS}/q")).unwrap()["metadata"]["uid"], second.as_str());
    });
}

fn finalizers_do_not_bring_a_pod_back() {
    let lab = Lab::new();
    let finalizers = json!({"metadata": {"finalizers": ["example.com/wait"]}});
    let first = lab.pod("p", finalizers);
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        when(store.pods(), &key("p"), |pod| pod.is_some()).await;
        lab.others().delete(&format!("{PODS}/p")).unwrap();
        when(store.pods(), &key("p"), |pod| pod.is_some_and(|pod| pod.metadata.deletion_timestamp.is_some())).await;
        source.delete_pod(&first).await.unwrap();
        assert!(store.pods().is_empty());
        let mut pods = store.pods().watch();
        lab.others().merge(&format!("{PODS}/p"), &json!({"metadata": {"labels": {"a": "b"}}})).unwrap();
        lab.others().merge(&format!("{PODS}/p"), &json!({"metadata": {"finalizers": null}})).unwrap();
        lab.others().wait_gone(PODS, "p", LIMIT).unwrap();
        let second = lab.pod("p", json!({}));
        let next = tokio::time::timeout(LIMIT, pods.next()).await.unwrap();
        assert_eq!(next.object.unwrap().metadata.uid, Some(second), "nothing was seen of the first");
    });
}

fn events_are_counted() {
    let lab = Lab::new();
    lab.pod("p", json!({}));
    run(async {
        let source = lab.kubelet();
        when(source.store().pods(), &key("p"), |pod| pod.is_some()).await;
        let pod = source.store().pods().get(&key("p")).unwrap();
        let tell = |message: &str| {
            source.event(event_about(&*pod, EventKind::Warning, "BackOff", message, "kubelet"));
        };
        (0..5).for_each(|_| tell("the same"));
        tell("another");
        const EVENTS: &str = "/api/v1/namespaces/default/events";
        // The API server has some of its own to tell.
        let list = || {
            let all = lab.others().get(EVENTS).unwrap()["items"].as_array().unwrap().clone();
            all.into_iter().filter(|event| event["source"]["component"] == "kubelet").collect::<Vec<_>>()
        };
        let begun = Instant::now();
        while list().len() < 2 {
            assert!(begun.elapsed() < LIMIT, "{:?}", list());
            tokio::time::sleep(Duration::from_millis(20)).await; // The lab's client watches one name, and these have none yet.
        }
        let mut seen: Vec<_> = list().iter().map(|event| (event["message"].clone(), event["count"].clone())).collect();
        seen.sort_by_key(|(message, _)| message.to_string());
        assert_eq!(seen, [(json!("another"), json!(1)), (json!("the same"), json!(5))]);
        let event = &list()[0];
        assert_eq!((&event["source"]["host"], &event["reportingInstance"]), (&json!(NODE), &json!(NODE)));
        assert_eq!(event["involvedObject"]["uid"].as_str(), pod.metadata.uid.as_deref());
        // A pod that talks too much is cut short: 25 at once.
        (0..60).for_each(|_| tell("the same"));
        let second = lab.pod("q", json!({}));
        when(source.store().pods(), &key("q"), |pod| pod.is_some()).await;
        let other = source.store().pods().find_uid(&second).unwrap();
        source.event(event_about(&*other, EventKind::Normal, "Last", "the last", "kubelet"));
        while !list().iter().any(|event| event["reason"] == "Last") {
            assert!(begun.elapsed() < LIMIT, "{:?}", list());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let count = list().iter().find(|event| event["message"] == "the same").unwrap()["count"].as_i64().unwrap();
        assert_eq!(count, 24, "one of the 25 was the other");
    });
}

fn classes_name_handlers() {
    let lab = Lab::new();
    let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "sandboxed"}, "handler": "runsc"});
    lab.others().create("/apis/node.k8s.io/v1/runtimeclasses", &class).unwrap();
    run(async {
        let source = lab.kubelet();
        assert_eq!(source.runtime_handler("sandboxed").await.unwrap(), "runsc");
        let missing = source.runtime_handler("other").await.unwrap_err();
        assert_eq!(missing.to_string(), "RuntimeClass other does not exist");
    });
}

fn a_node_reads_its_claims_and_removes_its_slices() {
    const API: &str = "/apis/resource.k8s.io/v1";
    let lab = Lab::new();
    let version = "resource.k8s.io/v1";
    let request = json!({"name": "r", "exactly": {"deviceClassName": "c"}});
    let claim = json!({"apiVersion": version, "kind": "ResourceClaim", "metadata": {"name": "gpu"},
        "spec": {"devices": {"requests": [request]}}});
    lab.others().create(&format!("{API}/namespaces/default/resourceclaims"), &claim).unwrap();
    for (name, node, driver) in [("a", NODE, "v.com"), ("b", NODE, "w.com"), ("c", "n2", "v.com")] {
        let pool = json!({"name": name, "generation": 1, "resourceSliceCount": 1});
        let spec = json!({"nodeName": node, "driver": driver, "pool": pool, "devices": [{"name": "one"}]});
        let slice = json!({"apiVersion": version, "kind": "ResourceSlice", "metadata": {"name": name}, "spec": spec});
        lab.others().create(&format!("{API}/resourceslices"), &slice).unwrap();
    }
    let slices = || -> Vec<String> {
        let all = lab.others().get(&format!("{API}/resourceslices")).unwrap()["items"].take();
        let names = all.as_array().unwrap().iter().map(|one| one["metadata"]["name"].as_str().unwrap().to_owned());
        names.collect()
    };
    lab.pod("p", json!({"spec": {"resourceClaims": [{"name": "x", "resourceClaimName": "gpu"}]}}));
    run(async {
        let source = lab.kubelet();
        // The server learns a moment later that the node may read it.
        let deadline = Instant::now() + LIMIT;
        let claim = loop {
            match source.resource_claim(&key("gpu")).await {
                Ok(claim) => break claim,
                Err(error) => assert!(error.is_passing() && Instant::now() < deadline, "{error}"),
            }
        };
        assert_eq!(claim.metadata.name.as_deref(), Some("gpu"));
        source.remove_resource_slices(Some("v.com")).await.unwrap();
        assert_eq!(slices(), ["b", "c"]);
        source.remove_resource_slices(None).await.unwrap();
        source.remove_resource_slices(None).await.unwrap();
        assert_eq!(slices(), ["c"], "those of another node stay");
    });
}

/// Some balancers in front of API servers speak HTTP/1.1 only.
fn without_http2_it_works_as_well() {
    let extra = vec![(Part::ApiServer, "--disable-http2-serving".to_owned())];
    let lab = Lab::with(Options { extra, ..Options::default() });
    let uid = lab.pod("p", json!({"spec": {"volumes": [{"name": "v", "configMap": {"name": "m"}}]}}));
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        store.synced().await;
        let pod = store.pods().get(&key("p")).unwrap();
        source.look_up(&pod).await.unwrap();
        lab.map("m", "1");
        when(store.config_maps(), &key("m"), |map| map.is_some()).await;
        source.update_pod_status(&uid, status(json!({"phase": "Running"}))).await.unwrap();
        when(store.pods(), &key("p"), |pod| {
            pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref()) == Some("Running")
        })
        .await;
        source.delete_pod(&uid).await.unwrap();
        lab.others().wait_gone(PODS, "p", LIMIT).unwrap();
    });
}

fn a_proxy_sees_services_and_slices() {
    let lab = Lab::new();
    const SERVICES: &str = "/api/v1/namespaces/default/services";
    let service = |name: &str, more: Value| {
        let mut spec = json!({"ports": [{"port": 80}], "selector": {"a": "b"}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let annotations = json!({"kubectl.kubernetes.io/last-applied-configuration": "{}"});
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "annotations": annotations}, "spec": spec});
        lab.others().create(SERVICES, &service).unwrap();
    };
    service("web", json!({}));
    service("headless", json!({"clusterIP": "None"}));
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}], "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true}}]});
    lab.others().create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", &slice).unwrap();
    run(async {
        let source = lab.service_proxy();
        let store = source.store();
        let (mut services, mut slices) = (store.services().watch(), store.endpoint_slices().watch());
        let known = async {
            store.services().synced().await;
            store.endpoint_slices().synced().await;
            store.nodes().synced().await;
        };
        tokio::time::timeout(LIMIT, known).await.unwrap();
        // The API server makes its own some time after it is ready.
        let mut seen = BTreeMap::new();
        while !["kubernetes", "web"].iter().all(|name| seen.contains_key(&key(name))) {
            let change = told(&mut services).await;
            seen.extend(change.object.map(|service| (change.key, service)));
        }
        assert_eq!(seen.keys().map(|key| key.name()).collect::<Vec<_>>(), ["kubernetes", "web"]);
        assert_eq!(seen[&key("web")].metadata.annotations, None);
        let slice = loop {
            let change = told(&mut slices).await;
            if change.key == key("web-1") {
                break change.object.unwrap();
            }
        };
        assert_eq!(slice.endpoints.as_ref().unwrap()[0].addresses, ["10.0.0.1"]);
        lab.others().delete(&format!("{SERVICES}/web")).unwrap();
        while store.services().keys().contains(&key("web")) {
            told(&mut services).await;
        }
    });
}
