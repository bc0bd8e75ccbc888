//! Storms: an object that changes all the time, and pods that have too much to tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::k8s_openapi::api::core::v1::{ConfigMap, Pod};
use cluster::{EventKind, Source as _, event_about};
use serde_json::{Value, json};
use testkit::serial::Test;

use crate::etcd::Etcd;
use crate::lab::{LIMIT, Lab, MAPS, key, run, when};
use crate::scale::resident_kb;

pub(crate) const TESTS: &[Test] = &[
    ("an_object_that_changes_all_the_time_holds_up_nobody", an_object_that_changes_all_the_time_holds_up_nobody),
    ("ten_thousand_events_are_told_within_limits", ten_thousand_events_are_told_within_limits),
];

const CHANGES: usize = 10_000;

/// It changes until another pod and what that refers to have been seen, ten thousand times at least.
fn an_object_that_changes_all_the_time_holds_up_nobody() {
    let lab = Lab::new();
    let mounts = |map: &str| json!({"spec": {"volumes": [{"name": "v", "configMap": {"name": map}}]}});
    lab.map("m", "0");
    lab.pod("p", mounts("m"));
    let there = lab.others().get(&format!("{MAPS}/m")).unwrap();
    run(async {
        let source = lab.kubelet();
        let store = source.store();
        when(store.pods(), &key("p"), |pod| pod.is_some()).await;
        source.look_up(&store.pods().get(&key("p")).unwrap()).await.unwrap();
        let before = resident_kb();
        let is_over = Arc::new(AtomicBool::new(false));
        let (over, begun) = (is_over.clone(), Instant::now());
        let storm = tokio::task::spawn_blocking(move || {
            let changes = (1..).take_while(|n| *n <= CHANGES || !over.load(Ordering::Relaxed));
            changes.inspect(|n| Etcd.put(&[changed(&there, *n)])).last().unwrap()
        });
        lab.map("other", "1");
        lab.pod("q", mounts("other"));
        when(store.pods(), &key("q"), |pod| pod.is_some()).await;
        source.look_up(&store.pods().get(&key("q")).unwrap()).await.unwrap();
        assert!(store.config_maps().get(&key("other")).is_some());
        println!("  another pod was known after {:?}", begun.elapsed());
        is_over.store(true, Ordering::Relaxed);
        let last = storm.await.unwrap().to_string();
        println!("  {last} changes within {:?}", begun.elapsed());
        let has_last = |map: Option<&ConfigMap>| map.is_some_and(|map| map.data.as_ref().unwrap()["k"] == last);
        when(store.config_maps(), &key("m"), has_last).await;
        let grown = (resident_kb() - before) / 1024;
        assert!(grown < 20, "{grown} MB more for one object");
    });
}

/// The ConfigMap as etcd has it, with another value.
fn changed(map: &Value, n: usize) -> (String, Value) {
    let mut map = map.clone();
    map["data"]["k"] = json!(n.to_string());
    map["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    ("configmaps/default/m".to_owned(), map)
}

/// Upstream's limit: of each pod 25 at once.
fn ten_thousand_events_are_told_within_limits() {
    const PODS: usize = 40;
    const EACH: usize = 250;
    const EVENTS: &str = "/api/v1/namespaces/default/events";
    let pod = |name: &str| -> Pod {
        let metadata = json!({"name": name, "namespace": "default", "uid": format!("uid-{name}")});
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    };
    let pods: Vec<Pod> = (0..PODS).map(|n| pod(&format!("p{n}"))).collect();
    let lab = Lab::new();
    let told = |reason: &str| {
        let all = lab.others().get(EVENTS).unwrap()["items"].as_array().cloned().unwrap_or_default();
        all.into_iter().filter(|event| event["reason"] == reason).collect::<Vec<_>>()
    };
    run(async {
        let source = lab.kubelet();
        let before = resident_kb();
        for _ in 0..EACH {
            for pod in &pods {
                source.event(event_about(
                    pod,
                    EventKind::Warning,
                    "BackOff",
                    "Back-off restarting failed container c",
                    "kubelet",
                ));
            }
            tokio::task::yield_now().await;
        }
        // Another pod is heard as soon as there is room.
        let begun = Instant::now();
        while told("Last").is_empty() {
            assert!(begun.elapsed() < LIMIT, "the others are told: {:?}", told("BackOff").len());
            source.event(event_about(&pod("q"), EventKind::Normal, "Last", "the last", "kubelet"));
            tokio::time::sleep(Duration::from_millis(50)).await; // Nothing tells of room.
        }
        println!("  another pod was heard after {:?}", begun.elapsed());
        let counts: Vec<i64> = told("BackOff").iter().filter_map(|event| event["count"].as_i64()).collect();
        assert_eq!(counts.len(), PODS, "one event for each pod");
        assert!(counts.iter().all(|count| (1..=25).contains(count)), "{counts:?}");
        let grown = (resident_kb() - before) / 1024;
        assert!(grown < 20, "{grown} MB more for what was told");
    });
}
