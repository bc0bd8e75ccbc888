//! Whether this node takes a pod that was bound to it: what upstream's kubelet asks, in its order and with its reasons. Pure.
//!
//! A scheduler has asked most of it before; pods that were bound by hand, races between two schedulers, and nodes that have
//! changed meanwhile are caught here.

pub(crate) mod affinity;
mod preemption;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Pod, PodSpec, Taint, Toleration};
use pod::quantity::Quantity;
use pod::{Change, spec};

use crate::apparmor;
use crate::node::features;
use crate::node::pressure::Pressures;
use crate::qos::{self, List};

pub use preemption::Preemption;
use preemption::{Want, asked};

/// Sysctls that are a pod's own and harm nobody else (features of 1.37).
const SAFE_SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_slow_start_after_idle",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// The node, as far as it matters to pods that come.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// What pods may use, by resource; `pods` is their number.
    pub allocatable: BTreeMap<String, Quantity>,
    /// What it is short of.
    pub pressures: Pressures,
    /// Its machine goes down.
    pub shutting_down: bool,
    /// Sysctls that the operator allows beside the safe ones: names, or beginnings that end with `*`
    /// (`allowedUnsafeSysctls`).
    pub sysctls: Vec<String>,
    /// Its kernel confines programs by AppArmor.
    pub apparmor: bool,
    /// Its runtime honours `supplementalGroupsPolicy`.
    pub supplemental_groups_policy: bool,
    /// What it declares that not every node has.
    pub features: Vec<&'static str>,
}

/// Why a pod is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// As the API spells it.
    pub reason: String,
    /// For the operator.
    pub message: String,
}

impl Rejection {
    fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }

    /// What it is to the pod.
    pub(crate) fn change(self) -> Change {
        let message = format!("Pod was rejected: {}", self.message);
        Change::Fail { reason: self.reason, message, grace_s: None, disrupted: false }
    }
}

/// Whether `site` takes `pod` beside `others`, which it has taken and which have not ended. For a critical pod others make
/// room, if there is any reason but that to reject it.
///
/// # Errors
/// Why not.
pub fn admit(pod: &Pod, site: &Site, others: &[&Pod]) -> Result<Preemption, Rejection> {
    if site.shutting_down {
        return Err(Rejection::new("NodeShutdown", "Pod was rejected as the node is shutting down."));
    }
    pressure(pod, site)?;
    sysctls(pod, site)?;
    system(pod, site)?;
    let mut short = shortages(pod, site, others).peekable();
    if let Some(first) = short.peek().filter(|_| !is_critical(pod)) {
        return Err(first.rejection());
    }
    place(pod, site)?;
    ports(pod, others)?;
    taints(pod, site)?;
    apparmor::check(pod, site.apparmor)
        .map_err(|why| Rejection::new("AppArmor", format!("Cannot enforce AppArmor: {why}")))?;
    declared(pod, site)?;
    preemption::choose(pod, others, short.map(Shortage::want).collect())
}

/// Whether `site` has what `pod`, which it runs, wants to have from now on.
///
/// # Errors
/// Why not; `true` if it never will, however few others there are.
pub fn resize(pod: &Pod, site: &Site, others: &[&Pod]) -> Result<(), (Rejection, bool)> {
    for resource in ["cpu", "memory"] {
        let Some(capacity) = site.allocatable.get(resource) else { continue };
        let asked = qos::of_pod(pod, resource, List::Requests);
        if asked > *capacity {
            let number = |amount: Quantity| if resource == "cpu" { amount.milli() } else { amount.units() };
            let (asked, capacity) = (number(asked), number(*capacity));
            let message =
                format!("Node didn't have enough capacity: {resource}, requested: {asked}, capacity: {capacity}");
            return Err((Rejection::new("Infeasible", message), true));
        }
    }
    match shortages(pod, site, others).next() {
        Some(short) => Err((short.rejection(), false)),
        None => Ok(()),
    }
}

/// A pod that keeps the cluster going: of the mirror kind, or with the priority of system pods.
pub fn is_critical(pod: &Pod) -> bool {
    const SYSTEM_CRITICAL: i32 = 2_000_000_000;
    is_static(pod) || spec::of(pod).priority.is_some_and(|priority| priority >= SYSTEM_CRITICAL)
}

/// A pod that comes from a file of the node.
pub(crate) fn is_static(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    let source = annotations.and_then(|annotations| annotations.get("kubernetes.io/config.source"));
    source.is_some_and(|source| source != "api")
}

fn pressure(pod: &Pod, site: &Site) -> Result<(), Rejection> {
    let short = site.pressures;
    if is_critical(pod) || short == Pressures::default() {
        return Ok(());
    }
    let tolerates_memory = || {
        let pressed = Taint {
            key: "node.kubernetes.io/memory-pressure".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        pod::qos::QosClass::of(pod) != pod::qos::QosClass::BestEffort || tolerates(pod, &pressed)
    };
    if !(short.disk || short.pids) && tolerates_memory() {
        return Ok(());
    }
    let short: Vec<&str> = short.names().collect();
    Err(Rejection::new("Evicted", format!("The node had condition: [{}]. ", short.join(" "))))
}

fn sysctls(pod: &Pod, site: &Site) -> Result<(), Rejection> {
    let security = spec::of(pod).security_context.as_ref();
    for sysctl in security.iter().flat_map(|security| security.sysctls.iter().flatten()) {
        let name = sysctl.name.replace('/', ".");
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == *pattern,
        };
        if !SAFE_SYSCTLS.contains(&name.as_str()) && !site.sysctls.iter().any(matches) {
            return Err(Rejection::new(
                "SysctlForbidden",
                format!("forbidden sysctl: {name:?} not allowlisted; the node's allowedUnsafeSysctls can allow it"),
            ));
        }
        if let Some(namespace) = of_host(&name, spec::of(pod)) {
            let message = format!("forbidden sysctl: {name:?} not allowed with host {namespace} enabled");
            return Err(Rejection::new("SysctlForbidden", message));
        }
    }
    Ok(())
}

/// Which of the host's namespaces, if the pod shares it, a sysctl would be set in.
fn of_host(sysctl: &str, spec: &PodSpec) -> Option<&'static str> {
    let hosts: [(&[&str], bool, &str); 3] = [
        (&["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."], spec.host_ipc == Some(true), "IPC"),
        (&["net."], spec.host_network == Some(true), "Net"),
        // Users are the host's where nothing is said.
        (&["user."], spec.host_users != Some(false), "User"),
    ];
    let mut shared = hosts.into_iter().filter(|(_, is_shared, _)| *is_shared);
    let found = shared.find(|(beginnings, ..)| beginnings.iter().any(|beginning| sysctl.starts_with(beginning)));
    found.map(|(_, _, namespace)| namespace)
}

/// What a pod needs of the kind that nodes declare.
fn declared(pod: &Pod, site: &Site) -> Result<(), Rejection> {
    let missing = features::missing(pod, &site.features);
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("Pod requires node features that are not available: {}", missing.join(", "));
    Err(Rejection::new("PodFeatureUnsupported", message))
}

fn system(pod: &Pod, site: &Site) -> Result<(), Rejection> {
    const OS: &str = "kubernetes.io/os";
    let wanted = pod.metadata.labels.as_ref().and_then(|labels| labels.get(OS));
    if wanted.is_some_and(|os| Some(os) != site.labels.get(OS) && os != "linux") {
        return Err(Rejection::new(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    if spec::of(pod).os.as_ref().is_some_and(|os| os.name != "linux") {
        return Err(Rejection::new("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"));
    }
    let security = spec::of(pod).security_context.as_ref();
    let policy = security.and_then(|security| security.supplemental_groups_policy.as_deref());
    if policy == Some("Strict") && !site.supplemental_groups_policy {
        return Err(Rejection::new(
            "SupplementalGroupsPolicyNotSupported",
            "SupplementalGroupsPolicy=Strict is not supported in this node",
        ));
    }
    Ok(())
}

/// A request that does not fit; CPUs in thousandths, as upstream's message has them.
struct Shortage<'a> {
    resource: &'a str,
    asked: i64,
    used: i64,
    capacity: i64,
}

impl Shortage<'_> {
    fn rejection(&self) -> Rejection {
        let Self { resource, asked, used, capacity } = self;
        let message = format!(
            "Node didn't have enough resource: {resource}, requested: {asked}, used: {used}, capacity: {capacity}"
        );
        Rejection::new(&format!("OutOf{resource}"), message)
    }

    fn want(self) -> Want {
        let amount = self.asked.saturating_sub(self.capacity.saturating_sub(self.used));
        Want { resource: self.resource.to_owned(), amount }
    }
}

/// Requests that do not fit beside those of the others, in upstream's order. Resources that the node does not have at all
/// are not asked about: they are the cluster's.
fn shortages<'a>(pod: &'a Pod, site: &'a Site, others: &'a [&Pod]) -> impl Iterator<Item = Shortage<'a>> {
    const FIRST: [&str; 4] = ["pods", "cpu", "memory", "ephemeral-storage"];
    let more = site.allocatable.keys().map(String::as_str).filter(|name| !FIRST.contains(name));
    FIRST.into_iter().chain(more).filter_map(|resource| {
        let capacity = *site.allocatable.get(resource)?;
        let capacity = if resource == "cpu" { capacity.milli() } else { capacity.units() };
        let used = others.iter().fold(0_i64, |sum, other| sum.saturating_add(asked(other, resource)));
        let asked = asked(pod, resource);
        let is_short = asked > 0 && used.saturating_add(asked) > capacity;
        is_short.then_some(Shortage { resource, asked, used, capacity })
    })
}

fn place(pod: &Pod, site: &Site) -> Result<(), Rejection> {
    if !affinity::matches(pod, site) {
        return Err(Rejection::new(
            "NodeAffinity",
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        ));
    }
    if spec::of(pod).node_name.as_ref().is_some_and(|node| !node.is_empty() && *node != site.name) {
        return Err(Rejection::new(
            "NodeName",
            "Predicate NodeName failed: node(s) didn't match the requested node name",
        ));
    }
    Ok(())
}

/// A host port of one pod: address, protocol, number. `0.0.0.0` is all addresses.
type HostPort = (String, String, i32);

fn host_ports(pod: &Pod) -> BTreeSet<HostPort> {
    let ports = spec::containers(pod).flat_map(|(_, container)| container.ports.iter().flatten());
    let taken = ports.filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0)?;
        let address = port.host_ip.clone().filter(|address| !address.is_empty() && address != "::");
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        Some((address.unwrap_or_else(|| "0.0.0.0".to_owned()), protocol, number))
    });
    taken.collect()
}

fn ports(pod: &Pod, others: &[&Pod]) -> Result<(), Rejection> {
    let wanted = host_ports(pod);
    let any = |address: &str| address == "0.0.0.0";
    let meets = |one: &HostPort, other: &HostPort| {
        one.1 == other.1 && one.2 == other.2 && (one.0 == other.0 || any(&one.0) || any(&other.0))
    };
    let is_taken =
        others.iter().flat_map(|other| host_ports(other)).any(|other| wanted.iter().any(|one| meets(one, &other)));
    if !wanted.is_empty() && is_taken {
        return Err(Rejection::new(
            "NodePorts",
            "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports",
        ));
    }
    Ok(())
}

/// Taints that would have the pod evicted at once. Static pods are not moved by taints.
fn taints(pod: &Pod, site: &Site) -> Result<(), Rejection> {
    let mut evicting = site.taints.iter().filter(|taint| taint.effect == "NoExecute");
    match evicting.find(|taint| !tolerates(pod, taint)) {
        Some(taint) if !is_static(pod) => Err(Rejection::new(
            "TaintToleration",
            format!("Predicate TaintToleration failed: node(s) had untolerated taint {{{}}}", written(taint)),
        )),
        _ => Ok(()),
    }
}

fn written(taint: &Taint) -> String {
    format!("{}: {}", taint.key, taint.value.as_deref().unwrap_or_default())
}

fn tolerates(pod: &Pod, taint: &Taint) -> bool {
    spec::of(pod).tolerations.iter().flatten().any(|toleration| covers(toleration, taint))
}

fn covers(toleration: &Toleration, taint: &Taint) -> bool {
    let same =
        |written: &Option<String>, value: &str| written.as_deref().is_none_or(|text| text.is_empty() || text == value);
    if !same(&toleration.effect, &taint.effect) || !same(&toleration.key, &taint.key) {
        return false;
    }
    let values = (toleration.value.as_deref().unwrap_or_default(), taint.value.as_deref().unwrap_or_default());
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        "Gt" | "Lt" => {
            let (Ok(bound), Ok(value)) = (values.0.parse::<i64>(), values.1.parse::<i64>()) else { return false };
            if toleration.operator.as_deref() == Some("Gt") { value > bound } else { value < bound }
        }
        _ => values.0 == values.1,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn asking(cpu: &str, port: Option<i32>) -> Pod {
        let ports: Vec<Value> = port.iter().map(|port| json!({"containerPort": 80, "hostPort": port})).collect();
        pod(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}, "ports": ports}]}))
    }

    fn site() -> Site {
        Site {
            name: "n1".into(),
            labels: [("kubernetes.io/os", "linux"), ("disk", "ssd")].map(|(k, v)| (k.into(), v.into())).into(),
            allocatable: [("cpu", 2000), ("pods", 3000)]
                .map(|(name, milli)| (name.to_owned(), Quantity::from_milli(milli)))
                .into(),
            ..Site::default()
        }
    }

    fn reason(pod: &Pod, site: &Site, others: &[&Pod]) -> Option<String> {
        admit(pod, site, others).err().map(|rejection| rejection.reason)
    }

    #[test]
    fn a_profile_of_apparmor_needs_a_kernel_that_has_it() {
        let profile = json!({"type": "RuntimeDefault"});
        let confined = pod(json!({"containers": [], "securityContext": {"appArmorProfile": profile}}));
        let rejection = admit(&confined, &site(), &[]).unwrap_err();
        assert_eq!(rejection.reason, "AppArmor");
        assert_eq!(rejection.message, "Cannot enforce AppArmor: AppArmor is not enabled on the host");
        assert_eq!(reason(&confined, &Site { apparmor: true, ..site() }, &[]), None);
    }

    #[test]
    fn requests_have_to_fit() {
        let (one, half) = (asking("1", None), asking("500m", None));
        assert_eq!(reason(&one, &site(), &[&one]), None);
        let resized = |asked: &str, others: &[&Pod]| {
            super::resize(&asking(asked, None), &site(), others)
                .err()
                .map(|(rejection, never)| (rejection.reason, never))
        };
        assert_eq!(resized("1500m", &[&half]), None);
        assert_eq!(resized("1500m", &[&one]), Some(("OutOfcpu".to_owned(), false)));
        assert_eq!(resized("3", &[]), Some(("Infeasible".to_owned(), true)));
        assert_eq!(reason(&one, &site(), &[&one, &half]).as_deref(), Some("OutOfcpu"));
        assert_eq!(reason(&half, &site(), &[&half, &half, &half]).as_deref(), Some("OutOfpods"));
        let message = admit(&asking("4", None), &site(), &[]).unwrap_err().message;
        assert_eq!(message, "Node didn't have enough resource: cpu, requested: 4000, used: 0, capacity: 2000");
        let exotic = pod(json!({"containers": [{"name": "c", "resources": {"requests": {"example.com/x": "1"}}}]}));
        assert_eq!(reason(&exotic, &site(), &[]), None, "a resource of the cluster");
    }

    #[test]
    fn critical_pods_find_room_or_say_what_else_is_wrong() {
        let one = asking("1", None);
        let critical = |more: Value| {
            let resources = json!({"requests": {"cpu": "1500m"}});
            let mut spec = json!({"priority": 2_000_000_000, "containers": [{"name": "c", "resources": resources}]});
            spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            pod(spec)
        };
        let chosen = admit(&critical(json!({})), &site(), &[&one]).unwrap();
        assert_eq!((chosen.pods, chosen.resource.as_str()), (vec![0], "cpu"));
        assert_eq!(admit(&critical(json!({})), &site(), &[]), Ok(Preemption::default()));
        let elsewhere = critical(json!({"nodeName": "n2"}));
        assert_eq!(reason(&elsewhere, &site(), &[&one]).as_deref(), Some("NodeName"), "nobody goes in vain");
    }

    #[test]
    fn host_ports_are_one_pods_each() {
        let (one, other) = (asking("1m", Some(80)), asking("1m", Some(81)));
        assert_eq!(reason(&one, &site(), &[&other]), None);
        assert_eq!(reason(&one, &site(), &[&one]).as_deref(), Some("NodePorts"));
    }

    #[test]
    fn taints_that_evict() {
        let taint = |effect: &str| Taint {
            key: "dedicated".into(),
            value: Some("ai".into()),
            effect: effect.into(),
            ..Taint::default()
        };
        let tainted = Site { taints: vec![taint("NoExecute")], ..site() };
        let plain = pod(json!({"containers": []}));
        assert_eq!(reason(&plain, &tainted, &[]).as_deref(), Some("TaintToleration"));
        assert_eq!(reason(&plain, &Site { taints: vec![taint("NoSchedule")], ..site() }, &[]), None);
        for toleration in [
            json!({"operator": "Exists"}),
            json!({"key": "dedicated", "value": "ai", "effect": "NoExecute"}),
            json!({"key": "dedicated", "operator": "Exists"}),
        ] {
            let tolerant = pod(json!({"containers": [], "tolerations": [toleration]}));
            assert_eq!(reason(&tolerant, &tainted, &[]), None, "{tolerant:?}");
        }
        let other = pod(json!({"containers": [], "tolerations": [{"key": "dedicated", "value": "web"}]}));
        assert!(reason(&other, &tainted, &[]).is_some());
    }

    #[test]
    fn sysctls_need_the_operators_leave() {
        let with =
            |name: &str| pod(json!({"containers": [], "securityContext": {"sysctls": [{"name": name, "value": "1"}]}}));
        assert_eq!(reason(&with("net.ipv4.tcp_syncookies"), &site(), &[]), None);
        assert_eq!(reason(&with("kernel/msgmax"), &site(), &[]).as_deref(), Some("SysctlForbidden"));
        let lenient = Site { sysctls: vec!["kernel.msg*".into()], ..site() };
        assert_eq!(reason(&with("kernel/msgmax"), &lenient, &[]), None);
    }

    #[test]
    fn no_sysctl_of_the_hosts_namespaces() {
        let with = |name: &str, host: &str, is_set: bool| {
            let sysctls = json!([{"name": name, "value": "1"}]);
            pod(json!({"containers": [], host: is_set, "securityContext": {"sysctls": sysctls}}))
        };
        let lenient = Site { sysctls: vec!["fs.mqueue.*".into(), "user.max_net_namespaces".into()], ..site() };
        for (sysctl, host, is_set, namespace) in [
            ("net.ipv4.tcp_syncookies", "hostNetwork", true, "Net"),
            ("kernel/shm_rmid_forced", "hostIPC", true, "IPC"),
            ("fs.mqueue.msg_max", "hostIPC", true, "IPC"),
            ("user.max_net_namespaces", "hostUsers", true, "User"),
        ] {
            let rejection = admit(&with(sysctl, host, is_set), &lenient, &[]).unwrap_err();
            assert_eq!(rejection.reason, "SysctlForbidden");
            let name = sysctl.replace('/', ".");
            let expect = format!("forbidden sysctl: {name:?} not allowed with host {namespace} enabled");
            assert_eq!(rejection.message, expect);
            assert_eq!(reason(&with(sysctl, host, !is_set), &lenient, &[]), None, "{sysctl}");
        }
        assert_eq!(reason(&with("net.ipv4.tcp_syncookies", "hostIPC", true), &lenient, &[]), None);
    }

    #[test]
    fn a_policy_of_groups_needs_a_runtime_that_honours_it() {
        let with =
            |policy: &str| pod(json!({"containers": [], "securityContext": {"supplementalGroupsPolicy": policy}}));
        let rejection = admit(&with("Strict"), &site(), &[]).unwrap_err();
        assert_eq!(rejection.reason, "SupplementalGroupsPolicyNotSupported");
        assert_eq!(rejection.message, "SupplementalGroupsPolicy=Strict is not supported in this node");
        assert_eq!(reason(&with("Merge"), &site(), &[]), None);
        assert_eq!(reason(&with("Strict"), &Site { supplemental_groups_policy: true, ..site() }, &[]), None);
    }

    #[test]
    fn a_feature_that_is_not_declared() {
        let mapped = pod(json!({"containers": [], "hostNetwork": true, "hostUsers": false}));
        let rejection = admit(&mapped, &site(), &[]).unwrap_err();
        assert_eq!(rejection.reason, "PodFeatureUnsupported");
        let expect = "Pod requires node features that are not available: UserNamespacesHostNetworkSupport";
        assert_eq!(rejection.message, expect);
        let able = Site { features: vec!["UserNamespacesHostNetworkSupport"], ..site() };
        assert_eq!(reason(&mapped, &able, &[]), None);
    }

    #[test]
    fn a_machine_that_goes_down_takes_nobody() {
        let critical = pod(json!({"containers": [], "priority": 2_000_001_000}));
        let down = Site { shutting_down: true, ..site() };
        assert_eq!(reason(&critical, &down, &[]).as_deref(), Some("NodeShutdown"));
    }

    #[test]
    fn under_memory_pressure_the_best_effort_stay_out() {
        let short = |memory, disk| Site { pressures: Pressures { memory, disk, pids: false }, ..site() };
        let pressed = short(true, false);
        assert_eq!(reason(&pod(json!({"containers": [{"name": "c"}]})), &pressed, &[]).as_deref(), Some("Evicted"));
        assert_eq!(reason(&asking("1m", None), &pressed, &[]), None);
        assert!(reason(&asking("1m", None), &short(false, true), &[]).is_some());
        let critical = pod(json!({"containers": [{"name": "c"}], "priority": 2_000_000_001}));
        assert_eq!((reason(&critical, &pressed, &[]), reason(&critical, &short(true, true), &[])), (None, None));
        let rejection = admit(&asking("1m", None), &short(true, true), &[]).unwrap_err();
        assert_eq!(rejection.message, "The node had condition: [MemoryPressure DiskPressure]. ");
    }

    #[test]
    fn another_system_or_node() {
        assert_eq!(
            reason(&pod(json!({"containers": [], "os": {"name": "windows"}})), &site(), &[]).as_deref(),
            Some("PodOSNotSupported")
        );
        assert_eq!(
            reason(&pod(json!({"containers": [], "nodeSelector": {"disk": "hdd"}})), &site(), &[]).as_deref(),
            Some("NodeAffinity")
        );
        assert_eq!(
            reason(&pod(json!({"containers": [], "nodeName": "n2"})), &site(), &[]).as_deref(),
            Some("NodeName")
        );
    }
}
