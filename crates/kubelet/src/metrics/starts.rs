//! What starts and what ends: pods with their groups and sandboxes, containers, images.

use std::time::Duration;

use instruments::{Counts, Histogram, Histograms, Text, labels};
use pod::spec::Role;

use super::{SHORT, STARTS};

/// Upstream's for pulls.
const PULLS: &[f64] = &[
    1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0,
    3600.0,
];

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Above how many bytes an image counts as what, as upstream has it.
const SIZES: [(u64, &str); 12] = [
    (100 * GIB, "GT100GB"),
    (60 * GIB, "60GB-100GB"),
    (40 * GIB, "40GB-60GB"),
    (30 * GIB, "30GB-40GB"),
    (20 * GIB, "20GB-30GB"),
    (10 * GIB, "10GB-20GB"),
    (5 * GIB, "5GB-10GB"),
    (GIB, "1GB-5GB"),
    (500 * MIB, "500MB-1GB"),
    (100 * MIB, "100MB-500MB"),
    (10 * MIB, "10MB-100MB"),
    (0, "0-10MB"),
];

/// A start of a sandbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SandboxStart<'a> {
    /// Of the RuntimeClass.
    pub(crate) handler: &'a str,
    /// The pod has users of its own.
    pub(crate) own_users: bool,
    /// How long the runtime took.
    pub(crate) took: Duration,
    /// It could not be made.
    pub(crate) failed: bool,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Starts {
    pods: Counts,
    failed_pods: Counts,
    mapped_pods: Counts,
    failed_mapped_pods: Counts,
    sandboxes: Histograms,
    failed_sandboxes: Counts,
    containers: Counts,
    failed_containers: Counts,
    ended_containers: Counts,
    workers: Histogram,
    groups: Histograms,
    pulls: Histograms,
    total: Histogram,
}

impl Default for Starts {
    fn default() -> Self {
        Self {
            pods: Counts::default(),
            failed_pods: Counts::default(),
            mapped_pods: Counts::default(),
            failed_mapped_pods: Counts::default(),
            sandboxes: Histograms::new(SHORT),
            failed_sandboxes: Counts::default(),
            containers: Counts::default(),
            failed_containers: Counts::default(),
            ended_containers: Counts::default(),
            workers: Histogram::new(SHORT),
            groups: Histograms::new(SHORT),
            pulls: Histograms::new(PULLS),
            total: Histogram::new(STARTS),
        }
    }
}

impl Starts {
    pub(super) fn sandbox(&self, SandboxStart { handler, own_users, took, failed }: SandboxStart<'_>) {
        let handler = labels(&[("runtime_handler", handler)]);
        self.sandboxes.observe(&handler, took);
        let (all, mapped) = (&self.pods, &self.mapped_pods);
        let failures = [(&self.failed_pods, &self.failed_mapped_pods)].into_iter().filter(|_| failed);
        for (all, mapped) in [(all, mapped)].into_iter().chain(failures) {
            all.add("");
            if own_users {
                mapped.add("");
            }
        }
        if failed {
            self.failed_sandboxes.add(&handler);
        }
    }

    pub(super) fn container(&self, role: Role, failed: Option<&str>) {
        let kind = ("container_type", type_of(role));
        match failed {
            None => self.containers.add(&labels(&[kind])),
            Some(code) => self.failed_containers.add(&labels(&[("code", code), kind])),
        }
    }

    pub(super) fn container_ended(&self, role: Role, exit_code: i32, reason: &str) {
        let kind = ("container_type", type_of(role));
        let code = exit_code.to_string();
        self.ended_containers.add(&labels(&[kind, ("exit_code", &code), ("reason", reason)]));
    }

    pub(super) fn worker(&self, waited: Duration) {
        self.workers.observe(waited);
    }

    pub(super) fn group(&self, operation: &str, took: Duration) {
        self.groups.observe(&labels(&[("operation_type", operation)]), took);
    }

    pub(super) fn pull(&self, bytes: u64, took: Duration) {
        let size = SIZES.iter().find(|(above, _)| bytes > *above).map_or("N/A", |(_, size)| size);
        self.pulls.observe(&labels(&[("image_size_in_bytes", size)]), took);
    }

    pub(super) fn total(&self, took: Duration) {
        self.total.observe(took);
    }

    pub(super) fn write(&self, text: &mut Text) {
        // Of these there is one sample each, from the start.
        for (counts, name, help) in [
            (&self.pods, "kubelet_started_pods_total", "Cumulative number of pods started"),
            (&self.failed_pods, "kubelet_started_pods_errors_total", "Cumulative number of errors when starting pods"),
            (
                &self.mapped_pods,
                "kubelet_started_user_namespaced_pods_total",
                "Cumulative number of pods with user namespaces started. This metric will only be collected on Linux.",
            ),
            (
                &self.failed_mapped_pods,
                "kubelet_started_user_namespaced_pods_errors_total",
                "Cumulative number of errors when starting pods with user namespaces. This metric will only be collected on \
                 Linux.",
            ),
        ] {
            text.single(name, "counter", help, counts.get(""));
        }
        for (counts, name, help) in [
            (&self.containers, "kubelet_started_containers_total", "Cumulative number of containers started"),
            (
                &self.failed_containers,
                "kubelet_started_containers_errors_total",
                "Cumulative number of errors when starting containers",
            ),
            (
                &self.ended_containers,
                "kubelet_terminated_containers_total",
                "Cumulative number of container terminations.",
            ),
            (
                &self.failed_sandboxes,
                "kubelet_run_podsandbox_errors_total",
                "Cumulative number of the run_podsandbox operation errors by RuntimeClass.Handler.",
            ),
        ] {
            counts.write(text, name, help);
        }
        self.write_durations(text);
    }

    fn write_durations(&self, text: &mut Text) {
        let help = "Duration in seconds of the run_podsandbox operations. Broken down by RuntimeClass.Handler.";
        self.sandboxes.write(text, "kubelet_run_podsandbox_duration_seconds", help);
        let help = "Duration in seconds for cgroup manager operations. Broken down by method.";
        self.groups.write(text, "kubelet_cgroup_manager_duration_seconds", help);
        self.pulls.write(text, "kubelet_image_pull_duration_seconds", "Duration in seconds to pull an image.");
        let help = "Duration in seconds from kubelet seeing a pod to starting a worker.";
        self.workers.write(text, "kubelet_pod_worker_start_duration_seconds", help);
        let help = "Duration in seconds to start a pod since creation, including time to pull images and run init containers, \
                    measured from pod creation timestamp to when all its containers are reported as started and observed via \
                    watch";
        self.total.write(text, "kubelet_pod_start_total_duration_seconds", help);
    }
}

/// As upstream names it.
fn type_of(role: Role) -> &'static str {
    match role {
        Role::Main => "container",
        Role::Init | Role::Sidecar => "init_container",
        Role::Ephemeral => "ephemeral_container",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_starts_is_counted_and_what_fails_besides() {
        let starts = Starts::default();
        let sandbox = SandboxStart { handler: "", own_users: false, took: Duration::from_millis(20), failed: false };
        starts.sandbox(sandbox);
        starts.sandbox(SandboxStart { own_users: true, failed: true, ..sandbox });
        starts.container(Role::Main, None);
        starts.container(Role::Init, Some("CreateContainerError"));
        starts.container_ended(Role::Main, 137, "OOMKilled");
        starts.worker(Duration::from_millis(1));
        starts.group("create", Duration::from_millis(1));
        starts.pull(10 * MIB + 1, Duration::from_secs(2));
        let mut text = Text::default();
        starts.write(&mut text);
        for line in [
            "kubelet_started_pods_total 2",
            "kubelet_started_pods_errors_total 1",
            "kubelet_started_user_namespaced_pods_total 1",
            "kubelet_started_user_namespaced_pods_errors_total 1",
            r#"kubelet_run_podsandbox_errors_total{runtime_handler=""} 1"#,
            r#"kubelet_started_containers_total{container_type="container"} 1"#,
            r#"kubelet_started_containers_errors_total{code="CreateContainerError",container_type="init_container"} 1"#,
            r#"kubelet_terminated_containers_total{container_type="container",exit_code="137",reason="OOMKilled"} 1"#,
            "kubelet_pod_worker_start_duration_seconds_count 1",
            r#"kubelet_cgroup_manager_duration_seconds_count{operation_type="create"} 1"#,
            r#"kubelet_image_pull_duration_seconds_count{image_size_in_bytes="10MB-100MB"} 1"#,
        ] {
            assert!(text.out.lines().any(|found| found == line), "{line} is not in\n{}", text.out);
        }
    }
}
