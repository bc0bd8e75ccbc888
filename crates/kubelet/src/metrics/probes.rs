//! The probes of containers, by their results and by what they took. What is gone is counted no more: its labels are names of
//! pods, of which there is no end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use instruments::{Histograms, Text, labels};
use k8s_openapi::api::core::v1::Pod;
use pod::probe::{Kind, Outcome};

use super::SHORT;
use crate::context::uid_of;

/// Of all pods that are there.
#[derive(Debug)]
pub(super) struct Probes {
    by_pod: Mutex<BTreeMap<String, OfPod>>,
    durations: Histograms,
}

/// Of one pod, by their labels.
#[derive(Debug, Default)]
struct OfPod {
    results: BTreeMap<String, u64>,
    durations: BTreeSet<String>,
}

impl Default for Probes {
    fn default() -> Self {
        Self { by_pod: Mutex::default(), durations: Histograms::new(SHORT) }
    }
}

impl Probes {
    /// A probe was answered.
    pub(super) fn answered(&self, pod: &Pod, container: &str, kind: Kind, outcome: Outcome, took: Duration) {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let (namespace, name) = (text(&pod.metadata.namespace), text(&pod.metadata.name));
        let own = [("container", container), ("namespace", &namespace), ("pod", &name)];
        let result = match outcome {
            Outcome::Success => "successful",
            Outcome::Failure => "failed",
        };
        let rest = [("pod_uid", uid_of(pod)), ("probe_type", kind.as_str()), ("result", result)];
        let duration = labels(&[own.as_slice(), &[("probe_type", kind.as_str())]].concat());
        let mut pods = self.lock();
        let of_pod = pods.entry(uid_of(pod).to_owned()).or_default();
        *of_pod.results.entry(labels(&[own, rest].concat())).or_default() += 1;
        self.durations.observe(&duration, took);
        of_pod.durations.insert(duration);
    }

    /// A pod is gone.
    pub(super) fn forget(&self, uid: &str) {
        let gone = self.lock().remove(uid).unwrap_or_default();
        gone.durations.iter().for_each(|labels| self.durations.remove(labels));
    }

    /// All of it.
    pub(super) fn write(&self, text: &mut Text) {
        const TOTAL: &str = "prober_probe_total";
        let help = "Cumulative number of a liveness, readiness or startup probe for a container by result.";
        text.family(TOTAL, "counter", help);
        let pods = self.lock();
        let results = pods.values().flat_map(|of_pod| &of_pod.results);
        results.for_each(|(labels, count)| text.sample(TOTAL, labels, count));
        self.durations.write(text, "prober_probe_duration_seconds", "Duration in seconds for a probe response.");
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OfPod>> {
        self.by_pod.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
