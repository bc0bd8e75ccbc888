//! Events about the node: what has changed from one of its statuses to the next, and what it begins with. Pure.

use cluster::EventKind;
use k8s_openapi::api::core::v1::{NodeCondition, NodeStatus};

/// Something to tell about the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// How serious.
    pub kind: EventKind,
    /// As upstream spells it.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
}

impl News {
    /// Something expected.
    pub fn normal(reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind: EventKind::Normal, reason, message: message.into() }
    }

    /// Something to look at.
    pub fn warning(reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind: EventKind::Warning, reason, message: message.into() }
    }

    fn status(node: &str, reason: &'static str) -> Self {
        Self::normal(reason, format!("Node {node} status is now: {reason}"))
    }
}

/// Conditions, and what is told when they become true and false.
const PRESSURES: [(&str, &str, &str); 3] = [
    ("MemoryPressure", "NodeHasInsufficientMemory", "NodeHasSufficientMemory"),
    ("DiskPressure", "NodeHasDiskPressure", "NodeHasNoDiskPressure"),
    ("PIDPressure", "NodeHasInsufficientPID", "NodeHasSufficientPID"),
];

/// What a daemon tells with its first status; `before` is the last one of the daemon before it. What the node is short of it
/// tells whatever was known, as upstream does.
pub(super) fn of_first(node: &str, before: Option<&NodeStatus>, now: &NodeStatus) -> Vec<News> {
    let boot = |status: &NodeStatus| status.node_info.as_ref().map(|info| info.boot_id.clone()).unwrap_or_default();
    let old_boot = before.map(boot).unwrap_or_default();
    let has_rebooted = !old_boot.is_empty() && old_boot != boot(now);
    let rebooted = has_rebooted
        .then(|| News::warning("Rebooted", format!("Node {node} has been rebooted, boot id: {}", boot(now))));
    let pressures = PRESSURES
        .iter()
        .map(|(condition, bad, good)| News::status(node, if is_true(Some(now), condition) { bad } else { good }));
    rebooted.into_iter().chain(pressures).chain(ready(node, before, now)).collect()
}

/// What a daemon tells with a later one.
pub(super) fn of_change(node: &str, before: &NodeStatus, now: &NodeStatus) -> Vec<News> {
    let pressures = PRESSURES.iter().filter_map(|(condition, bad, good)| {
        let is = is_true(Some(now), condition);
        (is != is_true(Some(before), condition)).then(|| News::status(node, if is { bad } else { good }))
    });
    pressures.chain(ready(node, Some(before), now)).collect()
}

/// Whether pods may be sent to the node has changed.
pub(super) fn of_place(node: &str, is_closed: bool) -> News {
    News::status(node, if is_closed { "NodeNotSchedulable" } else { "NodeSchedulable" })
}

fn ready(node: &str, before: Option<&NodeStatus>, now: &NodeStatus) -> Option<News> {
    let is = is_true(Some(now), "Ready");
    (is != is_true(before, "Ready")).then(|| News::status(node, if is { "NodeReady" } else { "NodeNotReady" }))
}

fn is_true(status: Option<&NodeStatus>, condition: &str) -> bool {
    let conditions: &[NodeCondition] = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|one| one.type_ == condition && one.status == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(conditions: &[&str], boot: &str) -> NodeStatus {
        let conditions: Vec<_> = conditions.iter().map(|name| json!({"type": name, "status": "True"})).collect();
        let info = json!({
            "bootID": boot, "architecture": "", "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "",
            "kubeletVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": "" });
        serde_json::from_value(json!({"conditions": conditions, "nodeInfo": info})).unwrap()
    }

    fn reasons(news: &[News]) -> Vec<&'static str> {
        news.iter().map(|one| one.reason).collect()
    }

    #[test]
    fn a_daemon_begins_with_what_it_finds() {
        let sufficient = ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"];
        let ready = status(&["Ready"], "b");
        assert_eq!(reasons(&of_first("n", None, &ready)), [sufficient.as_slice(), &["NodeReady"]].concat());
        assert_eq!(reasons(&of_first("n", Some(&ready), &ready)), sufficient);
        assert_eq!(of_first("n", None, &ready)[3].message, "Node n status is now: NodeReady");
        let rebooted = of_first("n", Some(&status(&["Ready"], "a")), &ready);
        assert_eq!((rebooted[0].kind, rebooted[0].reason), (EventKind::Warning, "Rebooted"));
        assert_eq!(rebooted[0].message, "Node n has been rebooted, boot id: b");
        let short = status(&["DiskPressure"], "b");
        let expect = ["NodeHasSufficientMemory", "NodeHasDiskPressure", "NodeHasSufficientPID", "NodeNotReady"];
        assert_eq!(reasons(&of_first("n", Some(&ready), &short)), expect);
    }

    #[test]
    fn later_it_tells_what_has_changed() {
        let (ready, short) = (status(&["Ready"], "b"), status(&["Ready", "MemoryPressure", "PIDPressure"], "b"));
        assert!(of_change("n", &ready, &ready).is_empty());
        assert_eq!(reasons(&of_change("n", &ready, &short)), ["NodeHasInsufficientMemory", "NodeHasInsufficientPID"]);
        assert_eq!(reasons(&of_change("n", &short, &ready)), ["NodeHasSufficientMemory", "NodeHasSufficientPID"]);
        assert_eq!(reasons(&of_change("n", &ready, &status(&[], "b"))), ["NodeNotReady"]);
        assert_eq!(
            (of_place("n", true).reason, of_place("n", false).reason),
            ("NodeNotSchedulable", "NodeSchedulable")
        );
    }
}
