//! How long service rules take: all of them at a start, and one change among many. In a network namespace of its own.
//!
//!     cargo xtask bench services [SERVICES] [ENDPOINTS] [--mode MODE]...
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cluster::k8s_openapi::api::core::v1::{Event, NodeStatus, PodStatus, Service};
use cluster::k8s_openapi::api::discovery::v1::EndpointSlice;
use cluster::{Key, Source, SourceError, Store};
use proxy::configuration::DetectLocal;
use proxy::{Config, IptablesKind, Mode, Proxy};
use serde_json::json;

/// Changes that are measured one by one.
const CHANGES: u32 = 100;

#[derive(Default)]
struct Desired(Store);

#[async_trait]
impl Source for Desired {
    fn store(&self) -> &Store {
        &self.0
    }
    async fn update_pod_status(&self, _uid: &str, _status: PodStatus) -> Result<(), SourceError> {
        Ok(())
    }
    async fn delete_pod(&self, _uid: &str) -> Result<(), SourceError> {
        Ok(())
    }
    async fn request_deletion(&self, _uid: &str, _grace_period_s: Option<i64>) -> Result<(), SourceError> {
        Ok(())
    }
    async fn update_node_status(&self, _name: &str, _status: NodeStatus) -> Result<(), SourceError> {
        Ok(())
    }
    fn event(&self, event: Event) {
        panic!("{:?}", event.message);
    }
}

fn name(n: u32) -> String {
    format!("service-{n}")
}

fn service(n: u32) -> Service {
    let address = Ipv4Addr::from(0x0a60_0000 + n + 1);
    let object = json!({"metadata": {"namespace": "default", "name": name(n)},
        "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"name": "http", "port": 80}]}});
    serde_json::from_value(object).unwrap()
}

/// `first` leaves out the endpoints before it.
fn slice(n: u32, first: u32, endpoints: u32) -> EndpointSlice {
    let endpoint = |at: u32| {
        json!({"addresses": [Ipv4Addr::from(0x0b00_0000 + n * endpoints + at)],
            "nodeName": if at.is_multiple_of(10) { "here" } else { "there" },
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("pod-{n}-{at}"),
                "uid": format!("00000000-0000-0000-{n:04x}-{at:012x}")}})
    };
    let object = json!({"metadata": {"namespace": "default", "name": format!("{}-x", name(n)),
            "labels": {"kubernetes.io/service-name": name(n)}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
        "endpoints": (first..endpoints).map(endpoint).collect::<Vec<_>>()});
    serde_json::from_value(object).unwrap()
}

fn memory_mb(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().split(' ').next().unwrap().parse::<f64>().unwrap() / 1024.0
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1000.0;
    println!("{what}: p50 {:.2} ms, p90 {:.2} ms, most {:.2} ms", at(50), at(90), at(100));
}

async fn changes(proxy: &Proxy, change: impl Fn(u32)) -> Vec<Duration> {
    let mut times = Vec::new();
    for n in 0..CHANGES {
        // A change that is alone does not wait for the pace of the one before.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        change(n);
        proxy.settled().await;
        times.push(begun.elapsed());
    }
    times
}

/// How rules are carried out: a mode of the proxy, and which kind of iptables.
fn config(mode: &str) -> Config {
    let mut config = Config::new("here");
    (config.mode, config.iptables.kind) = match mode {
        "iptables-nft" => (Mode::Iptables, IptablesKind::Nft),
        "iptables-legacy" => (Mode::Iptables, IptablesKind::Legacy),
        other => (other.parse().unwrap(), IptablesKind::AsFound),
    };
    config.local = DetectLocal::Cluster(vec!["11.0.0.0/8".parse().unwrap()]);
    config
}

async fn run(mode: &str, services: u32, endpoints: u32) {
    let desired = Arc::new(Desired::default());
    let store = &desired.0;
    // What a start takes ends with the first answer, what a change takes with the kernel's: both include the scheduler.
    for n in 0..services {
        store.services().put(service(n));
        store.endpoint_slices().put(slice(n, 0, endpoints));
    }
    store.set_synced();
    println!("{mode}: {services} services with {endpoints} endpoints each");
    let before = memory_mb("VmRSS");
    for (at, what) in ["start, no rules there", "start, all rules there"].into_iter().enumerate() {
        let begun = Instant::now();
        let proxy = Proxy::start(config(mode), desired.clone()).unwrap();
        proxy.settled().await;
        println!("{what}: {:.0} ms", begun.elapsed().as_secs_f64() * 1000.0);
        if at == 0 {
            println!(
                "memory: {before:.0} MB for the objects, {:.0} MB more with the rules",
                memory_mb("VmRSS") - before
            );
        }
        proxy.stop().await;
    }
    let proxy = Proxy::start(config(mode), desired.clone()).unwrap();
    proxy.settled().await;
    let leaves = changes(&proxy, |n| drop(store.endpoint_slices().put(slice(n, 1, endpoints)))).await;
    show("an endpoint leaves", leaves);
    let comes = changes(&proxy, |n| drop(store.endpoint_slices().put(slice(n, 0, endpoints)))).await;
    show("an endpoint comes", comes);
    let created = changes(&proxy, |n| {
        store.services().put(service(services + n));
        store.endpoint_slices().put(slice(services + n, 0, endpoints));
    });
    show("a service is created", created.await);
    let removed = changes(&proxy, |n| {
        store.services().remove(&Key::new("default", &name(services + n)));
    });
    show("a service is removed", removed.await);
    proxy.cleanup().await.unwrap();
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(default, |number| number.parse().unwrap());
    let (services, endpoints) = (number(10_000), number(10));
    let mode = arguments.next().unwrap_or_else(|| Mode::default().to_string());
    testkit::netns::enter_private().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(&mode, services, endpoints));
}
