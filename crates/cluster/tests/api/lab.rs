//! A control plane and what tests do with it.

use std::sync::Arc;
use std::time::Duration;

use cluster::api::{Api, ApiSource, ApiSourceConfig, Config, SealConfig};
use cluster::{Change, Key, Object, Store, Table, Watch};
use serde_json::{Value, json};
use testkit::control_plane::{self, ControlPlane, Options};

/// Longer than anything takes on a machine that builds something else at the same time.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const NODE: &str = "n1";
pub(crate) const PODS: &str = "/api/v1/namespaces/default/pods";
pub(crate) const MAPS: &str = "/api/v1/namespaces/default/configmaps";
pub(crate) const SECRETS: &str = "/api/v1/namespaces/default/secrets";

pub(crate) struct Lab {
    pub(crate) plane: ControlPlane,
    pub(crate) dir: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let plane = ControlPlane::start(&control_plane::build().unwrap(), dir.path(), options).unwrap();
        plane.ensure_namespace("default").unwrap();
        Self { plane, dir }
    }

    /// The test kit's own client, with all rights: what others do in the cluster.
    pub(crate) fn others(&self) -> &testkit::api::Api {
        self.plane.api()
    }

    pub(crate) fn admin(&self) -> Config {
        Config::from_kubeconfig(&self.plane.admin_kubeconfig().unwrap()).unwrap()
    }

    pub(crate) fn node(&self) -> Config {
        Config::from_kubeconfig(&self.plane.node_kubeconfig(NODE).unwrap()).unwrap()
    }

    pub(crate) fn proxy(&self) -> Config {
        Config::from_kubeconfig(&self.plane.proxy_kubeconfig().unwrap()).unwrap()
    }

    /// The Node object and the source of its kubelet.
    pub(crate) fn kubelet(&self) -> Arc<ApiSource> {
        self.kubelet_with(None)
    }

    /// One that keeps what its pods need.
    pub(crate) fn keeping_kubelet(&self) -> Arc<ApiSource> {
        let (dir, key) = (self.sealed(), self.dir.path().join("key"));
        self.kubelet_with(Some(SealConfig { dir, key, patience: Duration::from_secs(1) }))
    }

    pub(crate) fn sealed(&self) -> std::path::PathBuf {
        self.dir.path().join("sealed")
    }

    pub(crate) fn kubelet_with(&self, sealed: Option<SealConfig>) -> Arc<ApiSource> {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
        // It is there, if there is no server to ask.
        self.others().ensure("/api/v1/nodes", &node).ok();
        self.source(Some(Api::new(self.node()).unwrap()), None, sealed)
    }

    /// The source of a proxy alone.
    pub(crate) fn service_proxy(&self) -> Arc<ApiSource> {
        self.source(None, Some(Api::new(self.proxy()).unwrap()), None)
    }

    fn source(&self, kubelet: Option<Api>, proxy: Option<Api>, sealed: Option<SealConfig>) -> Arc<ApiSource> {
        let config = ApiSourceConfig {
            node_name: NODE.into(),
            kubelet,
            proxy,
            event_rate: None,
            sealed,
            static_pods: None,
            static_pods_url: None,
        };
        ApiSource::start(config).unwrap()
    }

    /// Creates a pod that is bound to the node; returns its uid.
    pub(crate) fn pod(&self, name: &str, more: Value) -> String {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "i"}]},
        });
        merge(&mut pod, more);
        let made = self.others().create(PODS, &pod).unwrap();
        made["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    pub(crate) fn map(&self, name: &str, value: &str) {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": value}});
        self.others().create(MAPS, &map).unwrap();
    }

    pub(crate) fn set_map(&self, name: &str, value: &str) {
        self.others().merge(&format!("{MAPS}/{name}"), &json!({"data": {"k": value}})).unwrap();
    }
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// Runs a test on a runtime of its own. The lab is made outside: its client blocks.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test)
}

pub(crate) fn key(name: &str) -> Key {
    Key::new("default", name)
}

/// Waits until an object that the table keeps is as wanted.
pub(crate) async fn when<T: Object>(table: &Table<T>, key: &Key, holds: impl Fn(Option<&T>) -> bool) {
    let mut watch = table.watch();
    let waited = tokio::time::timeout(LIMIT, async {
        while !holds(table.get(key).as_deref()) {
            watch.next().await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{key} is not as it should be"));
}

/// The next object that a watch tells of. For tables that objects pass through ([`Table::let_pass`]): once it is told of, such
/// a table has no more of it than its name.
pub(crate) async fn told<T: Object>(watch: &mut Watch<T>) -> Change<T> {
    tokio::time::timeout(LIMIT, watch.next()).await.expect("the watch tells of something")
}

/// A store without a source.
pub(crate) fn store() -> Store {
    Store::new()
}
