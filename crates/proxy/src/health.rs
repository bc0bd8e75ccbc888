//! Whether the rules keep up with what the cluster says, as `/healthz` and `/livez` tell it.
//!
//! What has not been written for twice `syncPeriod` makes the proxy unhealthy. Both address families are written in one
//! transaction, so they are well or ill together.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

/// Cluster autoscaler is about to remove the node (its `utils/taints`).
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
/// Names of the address families.
pub(crate) const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// What the loop tells of itself.
#[derive(Debug)]
pub struct Health {
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When rules were in place last.
    written: Option<Timestamp>,
    /// Since when something waits to be written.
    waits_since: Option<Instant>,
}

/// An answer to one of the paths.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// 200 or 503.
    pub is_healthy: bool,
    /// JSON.
    pub body: Value,
}

impl Health {
    /// A proxy that has written nothing; `sync_period` is upstream's `syncPeriod`.
    pub fn new(sync_period: Duration) -> Health {
        Health { patience: sync_period * 2, state: Mutex::default() }
    }

    /// Something has changed that is to be written.
    pub(crate) fn queued(&self, now: Instant) {
        self.state().waits_since.get_or_insert(now);
    }

    /// Everything is in place.
    pub(crate) fn updated(&self) {
        let mut state = self.state();
        state.waits_since = None;
        state.written = Some(Timestamp::now());
    }

    /// Whether what was to be written has been written in time.
    pub fn is_healthy(&self, now: Instant) -> bool {
        let waits = self.state().waits_since.map(|since| now.saturating_duration_since(since));
        waits.is_none_or(|waits| waits < self.patience)
    }

    /// `/livez`: the proxy alone.
    pub fn livez(&self, now: Instant) -> Answer {
        self.answer(now, None)
    }

    /// `/healthz`: whether load balancers should send anything here, so a node that is about to go is not healthy.
    pub fn healthz(&self, now: Instant, node: Option<&Node>) -> Answer {
        self.answer(now, Some(is_eligible(node)))
    }

    fn answer(&self, now: Instant, eligible: Option<bool>) -> Answer {
        let keeps_up = self.is_healthy(now);
        let is_healthy = keeps_up && eligible.unwrap_or(true);
        let current = Timestamp::now();
        let written = self.state().written;
        // As upstream's: of a healthy proxy this is now.
        let updated = if is_healthy { Some(current) } else { written };
        let mut body = json!({
            "lastUpdated": told(updated),
            "currentTime": told(Some(current)),
            "healthy": keeps_up,
        });
        if let Some(eligible) = eligible {
            body["nodeEligible"] = eligible.into();
        }
        if written.is_some() {
            let family = json!({"lastUpdated": told(written), "healthy": keeps_up});
            body["status"] = FAMILIES.iter().map(|name| ((*name).to_owned(), family.clone())).collect();
        }
        Answer { is_healthy, body }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Guards two instants; nobody panics between them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Go's zero time stands for never.
fn told(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |time| time.to_string())
}

fn is_eligible(node: Option<&Node>) -> bool {
    let Some(node) = node.filter(|node| node.metadata.deletion_timestamp.is_none()) else { return false };
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.into_iter().all(|taint| taint.key != TO_BE_DELETED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_waits_too_long_is_told() {
        let (health, begun) = (Health::new(Duration::from_secs(30)), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);
        assert!(health.livez(begun).is_healthy, "a proxy that starts is well");
        health.queued(begun);
        health.queued(after(50));
        assert!(health.livez(after(59)).is_healthy);
        let late = health.livez(after(61));
        assert!(!late.is_healthy && late.body["healthy"] == false);
        assert_eq!(late.body["lastUpdated"], "0001-01-01T00:00:00Z");
        health.updated();
        let well = health.livez(after(61));
        assert!(well.is_healthy && well.body["status"]["IPv6"]["healthy"] == true, "{well:?}");
        assert!(well.body.get("nodeEligible").is_none());
    }

    #[test]
    fn a_node_that_goes_gets_nothing_more() {
        let health = Health::new(Duration::from_secs(30));
        let check = |node: Option<Node>, expect: bool| {
            let answer = health.healthz(Instant::now(), node.as_ref());
            assert_eq!((answer.is_healthy, &answer.body["nodeEligible"]), (expect, &Value::from(expect)));
            assert_eq!(answer.body["healthy"], true);
        };
        check(None, false);
        check(Some(node(json!({"metadata": {}}))), true);
        check(Some(node(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}))), false);
        let taint = json!({"key": TO_BE_DELETED, "effect": "NoSchedule"});
        check(Some(node(json!({"metadata": {}, "spec": {"taints": [taint]}}))), false);
    }
}
