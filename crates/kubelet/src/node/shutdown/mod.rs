//! A machine that goes down ends its pods in order: logind waits for us, for a time.
//!
//! ```text
//! lock ─► PrepareForShutdown(true) ─► NotReady, no new pods ─► pods by priority, the lowest first ─► lock given back
//!   ▲                                                                                                    │
//!   └──────────────────────────── PrepareForShutdown(false): called off ◄────────────────────────────────┘
//! ```

mod bus;
mod logind;

use std::sync::Arc;
use std::time::Duration;

use cluster::{EventKind, Key, Source, event_about};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use crate::context::{chain, name_of, uid_of};
use crate::retry::Rests;
use crate::{Ending, Kubelet};
use logind::{Logind, LogindError};

pub use logind::Places;

/// What a pod's status says that was ended; upstream's words.
pub(crate) const REASON: &str = "Terminated";
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// Why the node is not ready meanwhile.
pub const NOT_READY: &str = "node is shutting down";
/// Priority from which on a pod is critical (`system-cluster-critical`).
const CRITICAL: i32 = 2_000_000_000;

/// How long pods of a priority have to end, up to the next higher priority that is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// The lowest priority that it is for.
    pub priority: i32,
    /// Seconds.
    pub seconds: u32,
}

/// The periods that `shutdownGracePeriod` and `shutdownGracePeriodCriticalPods` mean.
pub fn periods(total: Duration, critical: Duration) -> Vec<Period> {
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    if total.is_zero() || critical > total {
        return Vec::new();
    }
    vec![
        Period { priority: 0, seconds: seconds(total.saturating_sub(critical)) },
        Period { priority: CRITICAL, seconds: seconds(critical) },
    ]
}

/// What a graceful shutdown works with.
pub struct Parts {
    /// Whose pods are ended.
    pub kubelet: Arc<Kubelet>,
    /// Where events go.
    pub source: Arc<dyn Source>,
    /// The node's name.
    pub node: String,
    /// How long pods have; not empty.
    pub periods: Vec<Period>,
    /// Where logind is.
    pub places: Places,
    /// Where everybody learns that the machine goes down.
    pub shutting_down: watch::Sender<bool>,
}

/// Delays shutdowns from now on, as long as there is a logind. Never returns.
pub async fn run(parts: Parts) {
    let mut rests = Rests::new();
    loop {
        let Err(error) = keep(&parts, &mut rests).await;
        tracing::warn!(
            error = chain(&error),
            "pods would not be ended in order if the machine went down; trying again"
        );
        rests.rest().await;
    }
}

/// Returns when logind cannot be heard any more.
async fn keep(parts: &Parts, rests: &mut Rests) -> Result<std::convert::Infallible, LogindError> {
    let mut logind = Logind::connect(&parts.places.bus).await?;
    let wanted = Duration::from_secs(parts.periods.iter().map(|period| u64::from(period.seconds)).sum());
    logind.allow(wanted, &parts.places.conf_dir).await?;
    let mut lock = Some(logind.inhibit().await?);
    if !logind.is_preparing().await? {
        parts.shutting_down.send_replace(false); // One may have been called off while nobody listened.
    }
    tracing::info!(seconds = wanted.as_secs(), "a shutdown of the machine waits for the pods");
    *rests = Rests::new();
    loop {
        let begins = logind.prepares().await?;
        parts.shutting_down.send_replace(begins);
        parts.tell(if begins {
            "Shutdown manager detected shutdown event"
        } else {
            "Shutdown manager detected shutdown cancellation"
        });
        if begins {
            parts.end_pods().await;
            lock = None;
        } else if lock.is_none() {
            lock = Some(logind.inhibit().await?);
        }
    }
}

impl Parts {
    fn tell(&self, message: &str) {
        tracing::warn!(message, "logind");
        if let Some(node) = self.source.store().nodes().get(&Key::cluster(&self.node)) {
            self.source.event(event_about(&*node, EventKind::Normal, "Shutdown", message, "kubelet"));
        }
    }

    /// Ends the pods of one period after the other. Who does not end in its time holds up nobody.
    async fn end_pods(&self) {
        let pods = self.kubelet.active_pods();
        for (period, members) in groups(&self.periods, pods) {
            for pod in &members {
                let grace_s = i64::from(period.seconds).min(pod::spec::grace_s(pod));
                tracing::info!(pod = %name_of(pod), grace_s, "ending a pod: the machine goes down");
                let ending = Ending { reason: REASON, message: MESSAGE.to_owned(), grace_s, disrupted: true };
                self.kubelet.end(uid_of(pod), ending);
            }
            let uids: Vec<&str> = members.iter().map(|pod| uid_of(pod)).collect();
            let limit = Duration::from_secs(period.seconds.into());
            if tokio::time::timeout(limit, self.kubelet.cleaned(&uids)).await.is_err() {
                tracing::warn!(
                    priority = period.priority,
                    seconds = period.seconds,
                    "not all pods have ended in their time"
                );
            }
        }
    }
}

/// The pods by the period that is theirs, the lowest priority first; periods without pods are left out.
fn groups(periods: &[Period], pods: Vec<Arc<Pod>>) -> Vec<(Period, Vec<Arc<Pod>>)> {
    let mut sorted = periods.to_vec();
    sorted.sort_by_key(|period| period.priority);
    let mut groups: Vec<(Period, Vec<Arc<Pod>>)> = sorted.into_iter().map(|period| (period, Vec::new())).collect();
    for pod in pods {
        let priority = pod::spec::of(&pod).priority.unwrap_or(0);
        // Those below the lowest go with it.
        let place = groups.partition_point(|(period, _)| period.priority <= priority).saturating_sub(1);
        if let Some((_, members)) = groups.get_mut(place) {
            members.push(pod);
        }
    }
    groups.retain(|(_, members)| !members.is_empty());
    groups
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, priority: Option<i32>) -> Arc<Pod> {
        let pod = json!({"metadata": {"name": name}, "spec": {"containers": [], "priority": priority}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn each_pod_has_the_period_at_or_below_its_priority() {
        let periods = [
            Period { priority: 1000, seconds: 2 },
            Period { priority: 0, seconds: 1 },
            Period { priority: 5000, seconds: 3 },
        ];
        let pods =
            [("none", None), ("low", Some(-7)), ("between", Some(999)), ("exact", Some(1000)), ("high", Some(9000))];
        let groups = groups(&periods, pods.map(|(name, priority)| pod(name, priority)).to_vec());
        let named: Vec<(u32, Vec<&str>)> = groups
            .iter()
            .map(|(period, pods)| {
                (period.seconds, pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect())
            })
            .collect();
        assert_eq!(named, [(1, vec!["none", "low", "between"]), (2, vec!["exact"]), (3, vec!["high"])]);
    }

    #[test]
    fn two_times_are_two_periods() {
        let s = Duration::from_secs;
        let two = vec![Period { priority: 0, seconds: 20 }, Period { priority: CRITICAL, seconds: 10 }];
        assert_eq!(periods(s(30), s(10)), two);
        assert_eq!(periods(s(0), s(0)), []);
    }
}
