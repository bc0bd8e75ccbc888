//! What is measured, and the samples.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A figure of the report, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Measure {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    PodStart,
    ExecSync,
    StopPodSandbox,
    RemovePodSandbox,
    PodStop,
    PodsPerSecond,
    DaemonEmpty,
    DaemonFull,
    PerPod,
    IdleCpu,
    Pull,
    LogRate,
    LogRateStopped,
    LogWait,
    OciRun,
    PodRunning,
    PodGone,
    PodsReady,
    NodeEmpty,
    NodeFull,
    PerPodOfNode,
    NodeIdleCpu,
    ConfigMap,
    ProxyStart,
    ServiceCreated,
    ServiceDeleted,
    ServiceSeen,
    DeletionSeen,
    ProxyRss,
    ProxyPeak,
    ProxyCpu,
    FirstPacket,
    FirstPacketDirect,
    Throughput,
    ThroughputDirect,
    Requests,
    FailedRequests,
    RequestTime,
    RolloutTime,
}

/// How a figure is shown and judged.
pub(crate) struct About {
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) more_is_better: bool,
    /// What orlop promises; empty when nothing.
    pub(crate) promise: &'static str,
}

impl Measure {
    pub(crate) fn about(self) -> About {
        let about = |title, unit, promise| About { title, unit, more_is_better: false, promise };
        match self {
            Self::RunPodSandbox => about("RunPodSandbox", "ms", ""),
            Self::CreateContainer => about("CreateContainer", "ms", ""),
            Self::StartContainer => about("StartContainer", "ms", ""),
            Self::PodStart => about("**pod start**: these three, image present", "ms", "≤ 12"),
            Self::ExecSync => about("ExecSync `true`", "ms", "≤ 3"),
            Self::StopPodSandbox => about("StopPodSandbox", "ms", ""),
            Self::RemovePodSandbox => about("RemovePodSandbox", "ms", ""),
            Self::PodStop => about("**pod end**: these two", "ms", "≤ 8"),
            Self::PodsPerSecond => {
                About { more_is_better: true, ..about("100 pods at once, 10 requests in flight", "pods/s", "≥ 100") }
            }
            Self::DaemonEmpty => about("daemon without pods, RSS", "MB", ""),
            Self::DaemonFull => about("daemon with 100 pods, RSS", "MB", "≤ 30"),
            Self::PerPod => about("beside the application, each pod, PSS", "MB", "≤ 0.5"),
            Self::IdleCpu => about("idle with 100 pods, of one core", "%", "≤ 0.5"),
            Self::Pull => about("pull and unpack of the large image", "s", "≤ 0.4 of the reference"),
            Self::LogRate => {
                About { more_is_better: true, ..about("an application that logs as fast as it can", "MB/s", "") }
            }
            Self::LogRateStopped => {
                About { more_is_better: true, ..about("the same while the daemon is stopped for 30 s", "MB/s", "") }
            }
            Self::LogWait => about("the longest that it waits meanwhile", "ms", ""),
            Self::OciRun => about("OCI runtime alone: `run /bin/true`", "ms", "≤ 6"),
            Self::PodRunning => about("**pod created** → Running seen by a watcher", "ms", "≤ 50 (100)"),
            Self::PodGone => about("**pod deleted** → gone, as seen by a watcher", "ms", "≤ 60"),
            Self::PodsReady => about("100 pods created at once → all Ready", "s", "≤ 3"),
            Self::NodeEmpty => about("daemons before these pods, RSS", "MB", ""),
            Self::NodeFull => about("daemons with 100 pods, RSS", "MB", "≤ 40"),
            Self::PerPodOfNode => about("beside the application, each pod, PSS", "MB", "≤ 0.5"),
            Self::NodeIdleCpu => about("idle with 100 pods, of one core", "%", "≤ 0.5"),
            Self::ConfigMap => about("ConfigMap edited → file in the pod", "s", "≤ 1"),
            Self::ProxyStart => about("**process start** → a Service answers", "s", "≤ 2, iptables ≤ 8"),
            Self::ServiceCreated => about("**Service created** → answers", "ms", "≤ 20"),
            Self::ServiceDeleted => about("**Service deleted** → answers no more", "ms", "≤ 20"),
            Self::ServiceSeen => about("Service created → seen by a bare watcher", "ms", ""),
            Self::DeletionSeen => about("Service deleted → seen by a bare watcher", "ms", ""),
            Self::ProxyRss => about("RSS, steady", "MB", "≤ 60"),
            Self::ProxyPeak => about("RSS, peak", "MB", "≤ 120"),
            Self::ProxyCpu => about("CPU time of 1,000 endpoint changes", "s", ""),
            Self::FirstPacket => about("TCP connection through a Service", "µs", ""),
            Self::FirstPacketDirect => about("TCP connection to the pod, no proxy there", "µs", ""),
            Self::Throughput => About { more_is_better: true, ..about("one stream through a Service", "Gbit/s", "") },
            Self::ThroughputDirect => {
                About { more_is_better: true, ..about("one stream to the pod, no proxy there", "Gbit/s", "") }
            }
            Self::Requests => About { more_is_better: true, ..about("requests during all updates", "", "") },
            Self::FailedRequests => about("**of these failed**", "", "0"),
            Self::RequestTime => about("a request, 99th percentile", "ms", ""),
            Self::RolloutTime => about("an update takes", "s", ""),
        }
    }
}

/// What a run has found: tables by their titles, and what could not be measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) tables: BTreeMap<String, Results>,
    pub(crate) faults: Vec<String>,
}

impl Outcome {
    /// One table without a title.
    pub(crate) fn untitled(results: Results) -> Self {
        Self { tables: BTreeMap::from([(String::new(), results)]), faults: Vec::new() }
    }

    /// Adds those of another run.
    pub(crate) fn merge(&mut self, other: Self) {
        for (title, results) in other.tables {
            self.tables.entry(title).or_default().merge(results);
        }
        self.faults.extend(other.faults);
    }
}

/// Samples by figure.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results(BTreeMap<Measure, Samples>);

impl Results {
    pub(crate) fn add(&mut self, measure: Measure, value: f64) {
        self.0.entry(measure).or_default().0.push(value);
    }

    pub(crate) fn add_ms(&mut self, measure: Measure, took: Duration) {
        self.add(measure, took.as_secs_f64() * 1000.0);
    }

    /// Adds those of another run.
    pub(crate) fn merge(&mut self, other: Self) {
        for (measure, samples) in other.0 {
            self.0.entry(measure).or_default().0.extend(samples.0);
        }
    }

    pub(crate) fn get(&self, measure: Measure) -> Option<&Samples> {
        self.0.get(&measure)
    }

    /// The figures that there are, in the order of the report.
    pub(crate) fn measures(&self) -> impl Iterator<Item = Measure> {
        self.0.keys().copied()
    }
}

/// Values of one figure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// The value below which `percent` of the samples lie (nearest rank).
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = Samples((1..=10).rev().map(f64::from).collect());
        assert_eq!((samples.median(), samples.percentile(90), samples.percentile(100)), (5.0, 9.0, 10.0));
        assert_eq!(Samples(vec![7.0]).percentile(90), 7.0);
        assert!(Samples::default().median().is_nan());
    }
}
