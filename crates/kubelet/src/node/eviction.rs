//! Ending pods when the node runs short of memory, before the kernel ends something at random.

use std::sync::Arc;
use std::time::Duration;

use cluster::{EventKind, Source, event_about};
use k8s_openapi::api::core::v1::Pod;
use pod::eviction::{self, Candidate};

use super::machine::binary;
use super::pressure::{Room, Signals, Thresholds};
use crate::Kubelet;
use crate::admission::is_critical;
use crate::qos::{self, List, Tree};

/// How often the node is looked at, as upstream does: what is left of its memory, no event tells without another process
/// that watches.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A pod below a hard threshold gets no time, but what SIGTERM needs to be heard.
const GRACE_S: i64 = 1;

/// What eviction works with.
pub struct Parts {
    /// Whose pods are ended.
    pub kubelet: Arc<Kubelet>,
    /// Where events go.
    pub source: Arc<dyn Source>,
    /// The pods' control groups.
    pub groups: Tree,
    /// Below these, pods are ended.
    pub thresholds: Thresholds,
}

/// Ends one pod after the other while memory is short. Never returns.
pub async fn run(parts: Parts) {
    let Some(threshold) = parts.thresholds.memory else { return std::future::pending().await };
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(memory) = Signals::memory() else { continue };
        let least = threshold.of(memory.capacity);
        if memory.available < least {
            relieve(&parts, memory, least);
        }
    }
}

/// Ends the pod that goes first.
fn relieve(parts: &Parts, memory: Room, least: u64) {
    let pods = candidates(parts);
    let ranked: Vec<Candidate> = pods.iter().map(|(_, candidate)| candidate.clone()).collect();
    let Some((pod, candidate)) = eviction::first(&ranked).and_then(|first| pods.get(first)) else {
        tracing::warn!(available = binary(memory.available), "memory is short, and there is no pod to evict");
        return;
    };
    let message = message(pod, candidate, memory, least);
    let name = crate::context::name_of(pod);
    tracing::warn!(pod = %name, available = binary(memory.available), "memory is short; evicting a pod");
    parts.source.event(event_about(&**pod, EventKind::Warning, "Evicted", message.clone(), "kubelet"));
    parts.kubelet.evict(pod.metadata.uid.as_deref().unwrap_or_default(), "Evicted", &message, GRACE_S);
}

/// Pods that use memory and may be ended.
fn candidates(parts: &Parts) -> Vec<(Arc<Pod>, Candidate)> {
    let pods = parts.kubelet.pods().into_iter();
    let running = pods.filter(|(pod, status)| {
        let phase = status.as_ref().and_then(|status| status.phase.as_deref());
        !is_critical(pod) && phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
    });
    running
        .map(|(pod, _)| {
            let request = qos::of_pod(&pod, "memory", List::Requests).units();
            let candidate = Candidate {
                priority: pod::spec::of(&pod).priority.unwrap_or(0),
                usage: parts.groups.pod(&pod).stats().memory.working_set_bytes,
                request: u64::try_from(request).unwrap_or(0),
            };
            (pod, candidate)
        })
        .collect()
}

fn message(pod: &Pod, candidate: &Candidate, memory: Room, least: u64) -> String {
    let mut text = format!(
        "The node was low on resource: memory. Threshold quantity: {}, available: {}. ",
        kibibytes(least),
        kibibytes(memory.available)
    );
    if candidate.usage > candidate.request {
        let names: Vec<&str> = pod::spec::containers(pod).map(|(_, container)| container.name.as_str()).collect();
        text += &format!(
            "The pod (containers {}) was using {}, request is {}, has larger consumption of memory. ",
            names.join(", "),
            kibibytes(candidate.usage),
            kibibytes(candidate.request)
        );
    }
    text
}

fn kibibytes(bytes: u64) -> String {
    format!("{}Ki", bytes / 1024)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_message_says_what_was_short_and_who_used_it() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}})).unwrap();
        let candidate = Candidate { priority: 0, usage: 300 << 10, request: 100 << 10 };
        let text = message(&pod, &candidate, Room { capacity: 1 << 30, available: 50 << 20 }, 100 << 20);
        assert_eq!(
            text,
            "The node was low on resource: memory. Threshold quantity: 102400Ki, available: 51200Ki. The pod (containers a, b) \
             was using 300Ki, request is 100Ki, has larger consumption of memory. "
        );
    }
}
