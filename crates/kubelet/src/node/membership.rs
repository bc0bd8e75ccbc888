//! The node's place in its cluster: it registers, keeps its lease, and reports its status.
//!
//! ```text
//! register ─► lease   every quarter of its duration
//!         └─► status  when something has changed, looked at every 10 s; or when the last report is 5 min old
//!                ▲  └─► events about what has changed
//!             runtime, asked by a task of its own
//! ```

mod runtime;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster::api::{Api, ApiError, NodeLease, Patch};
use cluster::{Key, Source, Store, event_about};
use cri::service::{ImageService, RuntimeService};
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::describe::{self, NodeConfig, Observed};
use super::machine::Machine;
use super::news::{self, News};
use super::pressure::Pressures;
use super::shutdown;
use crate::resources::Resources;
use crate::upkeep::ImageTrouble;
use runtime::Said;

/// Between two tries while the API server does not answer: doubled each time, up to upstream's maximum.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(7);

/// What a membership works with.
#[derive(Clone)]
pub struct Parts {
    /// What the operator says about the node.
    pub config: NodeConfig,
    /// The machine.
    pub machine: Machine,
    /// Requests of the node.
    pub api: Api,
    /// Renewals, which wait behind nothing.
    pub heartbeats: Api,
    /// Where the node's own object is seen.
    pub store: Store,
    /// Where events about it go.
    pub source: Arc<dyn Source>,
    /// What is told when the daemon begins.
    pub first_news: Vec<News>,
    /// What keeps images on a disk that fills, from who removes those that nobody uses.
    pub image_trouble: watch::Receiver<Option<ImageTrouble>>,
    /// Whether pods can run.
    pub runtime: Arc<dyn RuntimeService>,
    /// What the node lists.
    pub images: Arc<dyn ImageService>,
    /// What the node is short of, from who looks after that.
    pub pressures: watch::Receiver<Pressures>,
    /// Whether the machine goes down.
    pub shutting_down: watch::Receiver<bool>,
    /// What the node has of devices.
    pub resources: Arc<Resources>,
    /// Volumes that pods want or have ([`crate::volumes::Volumes::in_use`]).
    pub volumes_in_use: watch::Receiver<BTreeSet<(String, String)>>,
    /// How often the status is looked at.
    pub update_every: Duration,
    /// How often it is reported though nothing has changed.
    pub report_every: Duration,
    /// How long the lease holds.
    pub lease_s: i32,
}

/// A node that is a member of its cluster. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Membership {
    tasks: JoinSet<()>,
}

impl Membership {
    /// Keeps the lease and reports the status from now on, of a node that has been registered.
    pub fn start(parts: Parts) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(keep_lease(parts.clone()));
        let (tell, told) = watch::channel(None);
        tasks.spawn(runtime::ask(parts.runtime.clone(), parts.images.clone(), parts.update_every, tell));
        let reporter = Reporter { parts, runtime: told, published: None, is_closed: false };
        tasks.spawn(reporter.run());
        Self { tasks }
    }

    /// Ends: the lease runs out, and the cluster sees that the node is gone.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Makes the Node object, or mends the labels of the one that is there; tries until the API server takes it. The node is
/// not ready: that, the first report says. Returns the node as the server has it.
pub async fn register(api: &Api, config: &NodeConfig, machine: &Machine) -> Node {
    let mut pause = RETRY_FIRST;
    loop {
        match try_to_register(api, config, machine).await {
            Ok(node) => return node,
            Err(error) => {
                tracing::warn!(node = config.name, %error, "the node cannot be registered; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

async fn try_to_register(api: &Api, config: &NodeConfig, machine: &Machine) -> Result<Node, ApiError> {
    let observed = Observed {
        now: Timestamp::now(),
        pressures: Pressures::default(),
        not_ready: Some("the kubelet is starting".to_owned()),
        volumes_in_use: BTreeSet::new(),
        images: Vec::new(),
        handlers: Vec::new(),
        supplemental_groups_policy: false,
        devices: BTreeMap::new(),
    };
    let own = describe::node(config, machine, &observed);
    match api.create(&own).await {
        Err(ApiError::AlreadyExists { .. }) => {}
        created => return created,
    }
    let key = Key::cluster(&config.name);
    let there: Node = api.get(&key).await?;
    match mended(&own, &there) {
        None => Ok(there),
        Some(metadata) => api.patch(&key, &Patch::merge(json!({"metadata": metadata}))).await,
    }
}

/// What has to be written over the metadata of a node that is there: labels, and that the controller attaches its volumes.
fn mended(own: &Node, there: &Node) -> Option<Value> {
    let mut metadata = serde_json::Map::new();
    metadata.extend(missing_labels(own, there).map(|labels| ("labels".to_owned(), labels)));
    let known = there.metadata.annotations.clone().unwrap_or_default();
    let attaches = own.metadata.annotations.iter().flatten().filter(|(name, value)| known.get(*name) != Some(*value));
    let attaches: serde_json::Map<String, Value> =
        attaches.map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    if !attaches.is_empty() {
        metadata.insert("annotations".to_owned(), Value::Object(attaches));
    }
    (!metadata.is_empty()).then_some(Value::Object(metadata))
}

/// Labels that a node which is there lacks, or has with another value. Only those that upstream mends: what the operator
/// chose is set when the node is born, and may have been changed since.
fn missing_labels(own: &Node, there: &Node) -> Option<Value> {
    const MENDED: [&str; 10] = [
        "kubernetes.io/hostname",
        "kubernetes.io/os",
        "kubernetes.io/arch",
        "beta.kubernetes.io/os",
        "beta.kubernetes.io/arch",
        "topology.kubernetes.io/zone",
        "topology.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region",
        "node.kubernetes.io/instance-type",
    ];
    let known = there.metadata.labels.clone().unwrap_or_default();
    let own = own.metadata.labels.iter().flatten();
    let missing: serde_json::Map<String, Value> = own
        .filter(|(name, value)| MENDED.contains(&name.as_str()) && known.get(*name) != Some(*value))
        .map(|(name, value)| (name.clone(), Value::from(value.as_str())))
        .collect();
    (!missing.is_empty()).then_some(Value::Object(missing))
}

/// Renews the lease for ever. What fails is told once, and that it works again.
async fn keep_lease(parts: Parts) {
    let mut lease = NodeLease::new(parts.heartbeats.clone(), &parts.config.name, parts.lease_s);
    let every = Duration::from_secs(u64::try_from(parts.lease_s).unwrap_or(40).max(4)) / 4;
    let (mut pause, mut failing) = (RETRY_FIRST, false);
    loop {
        let owner = owner(&parts);
        match lease.renew(Timestamp::now(), owner.as_ref()).await {
            Ok(()) => {
                if std::mem::take(&mut failing) {
                    tracing::info!(node = parts.config.name, "the lease is renewed again");
                }
                pause = RETRY_FIRST;
                tokio::time::sleep(every).await;
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(node = parts.config.name, %error, "the lease cannot be renewed; trying again");
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
    }
}

/// The Node, as the owner of its lease.
fn owner(parts: &Parts) -> Option<OwnerReference> {
    let node = parts.store.nodes().get(&Key::cluster(&parts.config.name))?;
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: parts.config.name.clone(),
        uid: node.metadata.uid.clone()?,
        ..OwnerReference::default()
    })
}

/// Reports the node's status.
struct Reporter {
    parts: Parts,
    /// What the runtime said, as soon as it has been asked.
    runtime: watch::Receiver<Option<Said>>,
    published: Option<Published>,
    /// No pods are sent here.
    is_closed: bool,
}

/// The last status that the server has taken.
struct Published {
    status: NodeStatus,
    when: Instant,
    /// Of the Node that has it.
    version: Option<u64>,
}

impl Reporter {
    async fn run(mut self) {
        if self.runtime.wait_for(Option::is_some).await.is_err() {
            return; // The membership ends.
        }
        let mut resources = self.parts.resources.changes();
        let mut nodes = self.parts.store.nodes().watch();
        self.tell(News::normal("Starting", "Starting kubelet."));
        std::mem::take(&mut self.parts.first_news).into_iter().for_each(|news| self.tell(news));
        loop {
            if let Err(error) = self.report().await {
                tracing::warn!(node = self.parts.config.name, %error, "the node's status was not taken");
            }
            tokio::select! {
                // The server may have been told otherwise: of a node that it does not hear from, it says Unknown.
                () = nodes.changed() => {}
                // Every ten seconds: what the machine has left, no event tells.
                asked = self.runtime.changed() => if asked.is_err() { return },
                // What the node is short of, schedulers need to know at once. Who looks after that may have ended.
                Ok(()) = self.parts.pressures.changed() => {}
                Ok(()) = self.parts.shutting_down.changed() => {}
                // The parts hold the sender.
                _ = resources.changed() => {}
                // The attach/detach controller waits for it, and so do the pods. The volumes may have ended.
                Ok(()) = self.parts.volumes_in_use.changed() => {}
                Ok(()) = self.parts.image_trouble.changed() => {
                    let trouble = self.parts.image_trouble.borrow_and_update().clone();
                    trouble.iter().flat_map(ImageTrouble::news).for_each(|news| self.tell(news));
                }
            }
        }
    }

    fn tell(&self, News { kind, reason, message }: News) {
        let name = &self.parts.config.name;
        tracing::info!(node = name, reason, "{message}");
        let node = self.parts.store.nodes().get(&Key::cluster(name)).unwrap_or_else(|| {
            // It has just been registered, and is not seen yet.
            let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
            Arc::new(Node { metadata, ..Node::default() })
        });
        self.parts.source.event(event_about(&*node, kind, reason, message, "kubelet"));
    }

    /// Tells whether pods are still sent here, if that has changed.
    fn tell_place(&mut self) {
        let node = self.parts.store.nodes().get(&Key::cluster(&self.parts.config.name));
        let Some(node) = node else { return };
        let is_closed = node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true));
        if std::mem::replace(&mut self.is_closed, is_closed) != is_closed {
            self.tell(news::of_place(&self.parts.config.name, is_closed));
        }
    }

    /// Publishes the status if it has changed, if the server has another, or if the last report is old.
    async fn report(&mut self) -> Result<(), ApiError> {
        self.tell_place();
        let observed = self.observe();
        let there = self.there();
        let before = there.as_ref().or(self.published.as_ref().map(|published| &published.status));
        let mut status = describe::status(&self.parts.config, &self.parts.machine, &observed, before);
        let named = there.as_ref().and_then(|there| there.addresses.as_ref());
        if self.parts.config.cloud.is_some() && named.is_some_and(|named| !named.is_empty()) {
            status.addresses = None; // They are the cloud's to change.
        }
        if let Some(published) = &self.published
            && !describe::differs(&published.status, &status)
            && !there.as_ref().is_some_and(|there| describe::contradicts(there, &status))
            && published.when.elapsed() < self.parts.report_every
        {
            return Ok(());
        }
        let patch = Patch::strategic(change(&status, before)).status();
        let node = self.parts.api.patch::<Node>(&Key::cluster(&self.parts.config.name), &patch).await?;
        let name = &self.parts.config.name;
        let news = match &self.published {
            None => news::of_first(name, before, &status),
            Some(published) => news::of_change(name, &published.status, &status),
        };
        news.into_iter().for_each(|news| self.tell(news));
        self.published = Some(Published { status, when: Instant::now(), version: version_of(&node) });
        Ok(())
    }

    /// The status as the server has it, unless what is known of that is from before the last report.
    fn there(&self) -> Option<NodeStatus> {
        let node = self.parts.store.nodes().get(&Key::cluster(&self.parts.config.name))?;
        let reported = self.published.as_ref().and_then(|published| published.version);
        let is_old = version_of(&node).zip(reported).is_some_and(|(version, reported)| version < reported);
        node.status.clone().filter(|_| !is_old)
    }

    /// What is to be reported, all of which counts as seen.
    fn observe(&mut self) -> Observed {
        let Said { trouble, images, handlers, supplemental_groups_policy } =
            self.runtime.borrow_and_update().clone().unwrap_or_default();
        let going_down = self.parts.shutting_down.borrow_and_update().then(|| shutdown::NOT_READY.to_owned());
        let not_ready = match (trouble, going_down) {
            (Some(trouble), Some(going_down)) => Some(format!("[{trouble}, {going_down}]")),
            (trouble, going_down) => trouble.or(going_down),
        };
        let in_use = self.parts.volumes_in_use.borrow_and_update();
        Observed {
            now: Timestamp::now(),
            pressures: *self.parts.pressures.borrow_and_update(),
            not_ready,
            volumes_in_use: in_use.iter().map(|(volume, _)| volume.clone()).collect(),
            images,
            handlers,
            supplemental_groups_policy,
            devices: self.parts.resources.amounts(),
        }
    }
}

/// Versions of one object can be compared, as clients of today may (KEP-5504).
fn version_of(node: &Node) -> Option<u64> {
    node.metadata.resource_version.as_ref()?.parse().ok()
}

/// The patch from `before` to `status`. Conditions are merged by their type, so those of others stay; addresses are
/// replaced, as two of them may have one type; resources that are gone are removed.
fn change(status: &NodeStatus, before: Option<&NodeStatus>) -> Value {
    let mut fields = serde_json::to_value(status).unwrap_or_default();
    if let Some(addresses) = fields["addresses"].as_array_mut() {
        addresses.push(json!({"$patch": "replace"}));
    }
    for (name, now, old) in [
        ("capacity", &status.capacity, before.and_then(|before| before.capacity.as_ref())),
        ("allocatable", &status.allocatable, before.and_then(|before| before.allocatable.as_ref())),
    ] {
        // Extended resources are others': device plugins and whoever patched the node.
        let gone = old.into_iter().flatten().map(|(resource, _)| resource).filter(|resource| {
            resource.starts_with("hugepages-") && !now.as_ref().is_some_and(|now| now.contains_key(*resource))
        });
        gone.for_each(|resource| fields[name][resource] = Value::Null);
    }
    json!({"status": fields})
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeAddress;
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;

    #[test]
    fn an_annotation_that_a_node_lacks_is_written() {
        let node = |annotations: Value| -> Node {
            serde_json::from_value(json!({"metadata": {"annotations": annotations}})).unwrap()
        };
        let own = node(json!({"a": "true"}));
        assert_eq!(mended(&own, &node(json!({"b": "1"}))), Some(json!({"annotations": {"a": "true"}})));
        assert_eq!(mended(&own, &node(json!({"a": "true", "b": "1"}))), None);
    }

    #[test]
    fn labels_are_mended_and_others_stay() {
        let node = |labels: Value| -> Node { serde_json::from_value(json!({"metadata": {"labels": labels}})).unwrap() };
        let own = node(json!({"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "disk": "ssd"}));
        let there =
            node(json!({"kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64", "disk": "hdd", "other": "x"}));
        assert_eq!(missing_labels(&own, &there), Some(json!({"kubernetes.io/arch": "amd64"})));
        assert_eq!(missing_labels(&own, &own), None);
    }

    #[test]
    fn addresses_are_replaced_and_sizes_that_are_gone_are_removed() {
        let quantity = |name: &str| (name.to_owned(), Quantity("1".into()));
        let capacity = |names: &[&str]| Some(names.iter().map(|name| quantity(name)).collect());
        let before =
            NodeStatus { capacity: capacity(&["cpu", "hugepages-1Gi", "example.com/gpu"]), ..Default::default() };
        let status = NodeStatus {
            capacity: capacity(&["cpu"]),
            addresses: Some(vec![NodeAddress { type_: "InternalIP".into(), address: "192.0.2.1".into() }]),
            ..NodeStatus::default()
        };
        let expected = json!({"status": {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}, {"$patch": "replace"}],
            "capacity": {"cpu": "1", "hugepages-1Gi": null},
        }});
        assert_eq!(change(&status, Some(&before)), expected);
    }
}
