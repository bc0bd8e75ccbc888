//! The `Node` object: what the kubelet says about its machine. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use pod::quantity::Quantity;

use super::machine::{Machine, architecture};
use super::pressure::{Pressures, Signal, Thresholds};

/// Most names of one image that it lists, as upstream.
const IMAGE_NAMES_MAX: usize = 5;
/// Set where the controller attaches volumes, which is how every node works today.
const CONTROLLER_ATTACHES: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

/// What the operator chose, for a cloud's controller.
const PROVIDED_ADDRESSES: &str = "alpha.kubernetes.io/provided-node-ip";

/// What the operator says about the node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeConfig {
    /// Its name.
    pub name: String,
    /// The machine's host name; label `kubernetes.io/hostname` and an address.
    pub hostname: String,
    /// Its addresses, the preferred first.
    pub addresses: Vec<IpAddr>,
    /// A controller of a cloud names the node's addresses (`--cloud-provider=external`); it is told these, which the operator
    /// chose (`--node-ip`).
    pub cloud: Option<Vec<IpAddr>>,
    /// Port of the kubelet's API.
    pub port: Option<u16>,
    /// Labels beside those that every node has (`--node-labels`).
    pub labels: BTreeMap<String, String>,
    /// Taints that the node is born with (`registerWithTaints`).
    pub taints: Vec<Taint>,
    /// A node that is born unschedulable (`registerSchedulable: false`).
    pub unschedulable: bool,
    /// The cloud's name for it (`providerID`).
    pub provider_id: Option<String>,
    /// How many pods it takes (`maxPods`).
    pub pods_max: u32,
    /// How many images it lists (`nodeStatusMaxImages`); all of them without.
    pub images_max: Option<usize>,
    /// What pods may not use (`systemReserved` and `kubeReserved` together), by resource.
    pub reserved: BTreeMap<String, Quantity>,
    /// Below these the node is under pressure; what they keep free is no pod's either.
    pub thresholds: Thresholds,
    /// `containerRuntimeVersion`: name and version of the runtime.
    pub runtime_version: String,
    /// `kubeletVersion`.
    pub kubelet_version: String,
    /// `declaredFeatures`.
    pub features: Vec<&'static str>,
}

/// What changes while the node runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// When it was seen.
    pub now: Timestamp,
    /// What the node is short of.
    pub pressures: Pressures,
    /// Volumes that must not be taken away, by the names that the attach/detach controller knows.
    pub volumes_in_use: BTreeSet<String>,
    /// Why pods cannot run, if so.
    pub not_ready: Option<String>,
    /// Images with their names and bytes.
    pub images: Vec<(Vec<String>, u64)>,
    /// What the runtime's handlers can do.
    pub handlers: Vec<Handler>,
    /// Whether the runtime honours `supplementalGroupsPolicy`.
    pub supplemental_groups_policy: bool,
    /// Devices by resource: how many there are, and how many of them can be given to pods.
    pub devices: BTreeMap<String, (usize, usize)>,
}

/// A handler of the runtime (RuntimeClass); the default one has no name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Handler {
    /// Its name.
    pub name: String,
    /// `recursiveReadOnlyMounts`
    pub recursive_read_only_mounts: bool,
    /// `userNamespaces`
    pub user_namespaces: bool,
}

/// What no pod may use, by resource, as far as the machine has it: what is reserved, and what the hard thresholds keep
/// free. It may be more than there is.
pub fn reservation(config: &NodeConfig, machine: &Machine) -> BTreeMap<String, Quantity> {
    let kept_free = |resource: &str, capacity: Quantity| {
        let threshold = match resource {
            "memory" => config.thresholds.hard(Signal::Memory),
            "ephemeral-storage" => config.thresholds.hard(Signal::NodeDisk),
            _ => None,
        };
        let capacity = u64::try_from(capacity.units()).unwrap_or(0);
        let bytes = threshold.map_or(0, |threshold| threshold.of(capacity));
        Quantity::from_units(i64::try_from(bytes).unwrap_or(i64::MAX))
    };
    let kept = |(resource, capacity): (&String, &Quantity)| {
        let reserved = config.reserved.get(resource).copied().unwrap_or_default();
        (resource.clone(), reserved + kept_free(resource, *capacity))
    };
    machine.capacity.iter().map(kept).collect()
}

/// What pods may use of the machine. Huge pages are set aside from memory at boot: it is no memory for others any more.
pub fn allocatable(config: &NodeConfig, machine: &Machine) -> BTreeMap<String, Quantity> {
    let capacity = &machine.capacity;
    let pages = capacity.iter().filter(|(name, _)| name.starts_with("hugepages-"));
    let pages = pages.fold(0_i64, |sum, (_, amount)| sum.saturating_add(amount.milli()));
    let kept = reservation(config, machine);
    let left = |(resource, capacity): (&String, &Quantity)| {
        let kept = kept.get(resource).map_or(0, |amount| amount.milli());
        let aside = if resource == "memory" { pages } else { 0 };
        let milli = capacity.milli().saturating_sub(kept).saturating_sub(aside);
        (resource.clone(), Quantity::from_milli(milli.max(0)))
    };
    capacity.iter().map(left).collect()
}

/// The object with which the node registers.
pub fn node(config: &NodeConfig, machine: &Machine, observed: &Observed) -> Node {
    Node {
        metadata: ObjectMeta {
            name: Some(config.name.clone()),
            labels: Some(labels(config)),
            annotations: Some(annotations(config)),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: (!config.taints.is_empty()).then(|| config.taints.clone()),
            unschedulable: config.unschedulable.then_some(true),
            provider_id: config.provider_id.clone(),
            ..NodeSpec::default()
        }),
        status: Some(status(config, machine, observed, None)),
    }
}

fn annotations(config: &NodeConfig) -> BTreeMap<String, String> {
    let attaches = (CONTROLLER_ATTACHES.to_owned(), "true".to_owned());
    let chosen = config.cloud.as_ref().filter(|chosen| !chosen.is_empty());
    let chosen = chosen.map(|chosen| chosen.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
    [attaches].into_iter().chain(chosen.map(|chosen| (PROVIDED_ADDRESSES.to_owned(), chosen))).collect()
}

/// The labels that every node has, and the operator's, which win.
pub fn labels(config: &NodeConfig) -> BTreeMap<String, String> {
    let own = [
        ("kubernetes.io/hostname", config.hostname.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ];
    let mut labels: BTreeMap<String, String> =
        own.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    labels.extend(config.labels.clone());
    labels
}

/// The status. Conditions of `before` keep their transition times; those that others wrote are not repeated here.
pub fn status(config: &NodeConfig, machine: &Machine, observed: &Observed, before: Option<&NodeStatus>) -> NodeStatus {
    let pods = ("pods".to_owned(), resource::Quantity(config.pods_max.to_string()));
    let written = |amounts: &BTreeMap<String, Quantity>, count: fn(&(usize, usize)) -> usize| {
        let own = amounts.iter().map(|(name, amount)| (name.clone(), quantity(name, *amount)));
        let device = |(name, counts): (&String, _)| (name.clone(), resource::Quantity(count(counts).to_string()));
        own.chain([pods.clone()]).chain(observed.devices.iter().map(device)).collect()
    };
    let mut info = machine.info.clone();
    info.container_runtime_version.clone_from(&config.runtime_version);
    info.kubelet_version.clone_from(&config.kubelet_version);
    NodeStatus {
        addresses: Some(addresses(config)),
        allocatable: Some(written(&allocatable(config, machine), |counts| counts.1)),
        capacity: Some(written(&machine.capacity, |counts| counts.0)),
        conditions: Some(conditions(observed, before)),
        daemon_endpoints: config
            .port
            .map(|port| NodeDaemonEndpoints { kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }) }),
        declared_features: Some(config.features.iter().map(|name| (*name).to_owned()).collect()),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(observed.supplemental_groups_policy) }),
        images: Some(images(&observed.images, config.images_max.unwrap_or(usize::MAX))),
        node_info: Some(info),
        volumes_in_use: Some(observed.volumes_in_use.iter().cloned().collect()),
        runtime_handlers: Some(observed.handlers.iter().map(handler).collect()),
        ..NodeStatus::default()
    }
}

/// As upstream writes it: memory in Ki, CPUs whole or in thousandths.
fn quantity(name: &str, amount: Quantity) -> resource::Quantity {
    let units = amount.units();
    resource::Quantity(match name {
        "cpu" if amount.milli() % 1000 != 0 => format!("{}m", amount.milli()),
        "memory" | "ephemeral-storage" if units % 1024 == 0 && units > 0 => format!("{}Ki", units / 1024),
        _ => units.to_string(),
    })
}

fn addresses(config: &NodeConfig) -> Vec<NodeAddress> {
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    // Which of its addresses is the node's, only the cloud knows, if the operator did not choose.
    let known = if config.cloud.as_ref().is_some_and(Vec::is_empty) { &[] } else { config.addresses.as_slice() };
    let ips = known.iter().map(|ip| address("InternalIP", ip.to_string()));
    ips.chain([address("Hostname", config.hostname.clone())]).collect()
}

fn handler(handler: &Handler) -> NodeRuntimeHandler {
    NodeRuntimeHandler {
        name: Some(handler.name.clone()),
        features: Some(NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(handler.recursive_read_only_mounts),
            user_namespaces: Some(handler.user_namespaces),
        }),
    }
}

/// The largest first, digests before tags.
fn images(images: &[(Vec<String>, u64)], most: usize) -> Vec<ContainerImage> {
    let mut listed: Vec<&(Vec<String>, u64)> = images.iter().filter(|(names, _)| !names.is_empty()).collect();
    listed.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let image = |(names, bytes): &(Vec<String>, u64)| ContainerImage {
        names: Some(names.iter().take(IMAGE_NAMES_MAX).cloned().collect()),
        size_bytes: i64::try_from(*bytes).ok(),
    };
    listed.into_iter().take(most).map(image).collect()
}

/// The kubelet's own conditions, `Ready` last: who watches for it sees the others, too.
fn conditions(observed: &Observed, before: Option<&NodeStatus>) -> Vec<NodeCondition> {
    let (pressures, now) = (observed.pressures, observed.now);
    let said = [
        pressure(
            "MemoryPressure",
            pressures.memory,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        pressure(
            "DiskPressure",
            pressures.disk,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pressure(
            "PIDPressure",
            pressures.pids,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
        match &observed.not_ready {
            None => ("Ready", "True", "KubeletReady", "kubelet is posting ready status".to_owned()),
            Some(why) => ("Ready", "False", "KubeletNotReady", why.clone()),
        },
    ];
    let known = before.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    said.into_iter().map(|said| condition(said, known, now)).collect()
}

type Said = (&'static str, &'static str, &'static str, String);

fn pressure(
    type_: &'static str,
    there: bool,
    bad: (&'static str, &'static str),
    good: (&'static str, &'static str),
) -> Said {
    let (status, (reason, message)) = if there { ("True", bad) } else { ("False", good) };
    (type_, status, reason, message.to_owned())
}

fn condition((type_, status, reason, message): Said, known: &[NodeCondition], now: Timestamp) -> NodeCondition {
    let before = known.iter().find(|condition| condition.type_ == type_ && condition.status == status);
    let since = before.and_then(|condition| condition.last_transition_time.clone());
    NodeCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(since.unwrap_or(Time(now))),
    }
}

/// Whether two statuses differ in more than the times of their conditions.
pub fn differs(one: &NodeStatus, other: &NodeStatus) -> bool {
    let still = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            (condition.last_heartbeat_time, condition.last_transition_time) = (None, None);
        }
        status
    };
    still(one) != still(other)
}

/// Whether the server has a condition of the node in another state than the node does: one that it did not hear of for a
/// while is Unknown there.
pub fn contradicts(server: &NodeStatus, own: &NodeStatus) -> bool {
    let there = |type_: &str| {
        let mut conditions = server.conditions.iter().flatten();
        conditions.find(|condition| condition.type_ == type_).map(|condition| &condition.status)
    };
    own.conditions.iter().flatten().any(|condition| there(&condition.type_) != Some(&condition.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NodeConfig {
        NodeConfig {
            name: "n1".into(),
            hostname: "host".into(),
            addresses: vec![IpAddr::from([192, 0, 2, 7])],
            cloud: None,
            port: Some(10250),
            labels: [("disk".to_owned(), "ssd".to_owned())].into(),
            taints: Vec::new(),
            unschedulable: false,
            provider_id: None,
            pods_max: 110,
            images_max: Some(50),
            reserved: [("cpu".to_owned(), Quantity::from_milli(250))].into(),
            thresholds: Thresholds::upstream(),
            runtime_version: "orlop://0.1.0".into(),
            kubelet_version: "v1.37.0".into(),
            features: vec!["A", "B"],
        }
    }

    fn machine() -> Machine {
        let capacity = [("cpu", 2), ("memory", 1 << 30), ("ephemeral-storage", 1 << 30), ("hugepages-2Mi", 0)];
        let capacity = capacity.map(|(name, units)| (name.to_owned(), Quantity::from_units(units)));
        Machine { capacity: capacity.into(), ..Machine::default() }
    }

    fn observed(second: i64) -> Observed {
        Observed {
            now: Timestamp::from_second(second).unwrap(),
            pressures: Pressures::default(),
            not_ready: None,
            volumes_in_use: BTreeSet::new(),
            images: vec![(vec!["small".into()], 1), (vec!["large".into()], 9), (vec![], 100)],
            handlers: vec![Handler::default()],
            supplemental_groups_policy: true,
            devices: [("example.com/gpu".to_owned(), (3, 2))].into(),
        }
    }

    #[test]
    fn addresses_are_left_to_a_cloud_that_names_them() {
        let of = |cloud: Option<Vec<IpAddr>>| {
            let node = node(&NodeConfig { cloud, ..config() }, &machine(), &observed(0));
            let addresses = node.status.unwrap().addresses.unwrap().into_iter().map(|address| address.type_);
            let told = node.metadata.annotations.unwrap().remove("alpha.kubernetes.io/provided-node-ip");
            (addresses.collect::<Vec<_>>(), told)
        };
        assert_eq!(of(None), (vec!["InternalIP".to_owned(), "Hostname".to_owned()], None));
        assert_eq!(of(Some(Vec::new())), (vec!["Hostname".to_owned()], None));
        let (addresses, told) = of(Some(vec![IpAddr::from([192, 0, 2, 7]), "2001:db8::7".parse().unwrap()]));
        assert_eq!((addresses.len(), told.as_deref()), (2, Some("192.0.2.7,2001:db8::7")));
    }

    #[test]
    fn pods_get_what_nothing_else_is_kept_for() {
        let status = status(&config(), &machine(), &observed(0), None);
        let (capacity, allocatable) = (status.capacity.unwrap(), status.allocatable.unwrap());
        assert_eq!((capacity["cpu"].0.as_str(), allocatable["cpu"].0.as_str()), ("2", "1750m"));
        assert_eq!((capacity["memory"].0.as_str(), allocatable["memory"].0.as_str()), ("1048576Ki", "946176Ki"));
        assert_eq!(allocatable["ephemeral-storage"].0, "966367642");
        assert_eq!((capacity["pods"].0.as_str(), allocatable["pods"].0.as_str()), ("110", "110"));
        assert_eq!(capacity["hugepages-2Mi"].0, "0");
        assert_eq!((capacity["example.com/gpu"].0.as_str(), allocatable["example.com/gpu"].0.as_str()), ("3", "2"));
    }

    #[test]
    fn huge_pages_are_no_other_memory() {
        let mut machine = machine();
        machine.capacity.insert("hugepages-2Mi".to_owned(), Quantity::from_units(512 << 20));
        let left = allocatable(&config(), &machine);
        // Besides, the hard threshold keeps 100Mi.
        assert_eq!((left["memory"].units(), left["hugepages-2Mi"].units()), (412 << 20, 512 << 20));
        assert_eq!(reservation(&config(), &machine)["memory"].units(), 100 << 20, "pages are not kept from pods");
        machine.capacity.insert("hugepages-1Gi".to_owned(), Quantity::from_units(1 << 30));
        assert_eq!(allocatable(&config(), &machine)["memory"].units(), 0);
    }

    #[test]
    fn a_transition_is_told_once_and_heartbeats_make_no_difference() {
        let first = status(&config(), &machine(), &observed(10), None);
        let second = status(&config(), &machine(), &observed(20), Some(&first));
        assert!(!differs(&first, &second));
        assert_ne!(first, second, "the heartbeat");
        let broken = Observed { not_ready: Some("the runtime is down".into()), ..observed(30) };
        let third = status(&config(), &machine(), &broken, Some(&second));
        assert!(differs(&second, &third));
        let ready = third.conditions.unwrap().pop().unwrap();
        assert_eq!((ready.type_.as_str(), ready.status.as_str()), ("Ready", "False"));
        assert_eq!(ready.last_transition_time.unwrap().0, broken.now);
    }

    #[test]
    fn what_a_server_says_of_a_node_that_it_did_not_hear_of() {
        let own = status(&config(), &machine(), &observed(10), None);
        let mut server = own.clone();
        let other = NodeCondition { type_: "Others".into(), status: "True".into(), ..NodeCondition::default() };
        server.conditions.as_mut().unwrap().insert(0, other);
        assert!(!contradicts(&server, &own), "what others say is theirs");
        let ready = server.conditions.as_mut().unwrap().last_mut().unwrap();
        (ready.status, ready.last_transition_time) =
            ("Unknown".into(), Some(Time(Timestamp::from_second(50).unwrap())));
        assert!(contradicts(&server, &own));
        let again = status(&config(), &machine(), &observed(60), Some(&server)).conditions.unwrap().pop().unwrap();
        assert_eq!(again.last_transition_time.unwrap().0.as_second(), 60, "it is ready since now");
        server.conditions = None;
        assert!(contradicts(&server, &own));
    }

    #[test]
    fn the_operators_labels_and_the_usual_ones() {
        let node = node(&config(), &machine(), &observed(0));
        let labels = node.metadata.labels.unwrap();
        assert_eq!((labels["kubernetes.io/hostname"].as_str(), labels["disk"].as_str()), ("host", "ssd"));
        let status = node.status.unwrap();
        assert_eq!(status.addresses.unwrap().len(), 2);
        assert_eq!(status.declared_features.unwrap(), ["A", "B"]);
        let names: Vec<_> = status.images.unwrap().into_iter().flat_map(|image| image.names.unwrap()).collect();
        assert_eq!(names, ["large", "small"], "the largest first, without those that have no name");
    }
}
