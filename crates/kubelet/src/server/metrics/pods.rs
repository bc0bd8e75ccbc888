//! Pods and their volumes, as they should be and as they are.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cluster::Store;
use instruments::{Text, labels};
use k8s_openapi::api::core::v1::Pod;

use crate::admission::is_static;
use crate::effects::plugin;
use crate::paths::Paths;

/// How many there are of each plugin's.
type ByPlugin = BTreeMap<String, usize>;

/// Counts them now.
pub(super) async fn write(text: &mut Text, store: &Store, paths: &Paths) {
    let pods = store.pods().list();
    let active: Vec<&Arc<Pod>> = pods.iter().filter(|pod| is_active(pod)).collect();
    let desired = "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.";
    by_source(text, "kubelet_desired_pods", desired, pods.iter());
    let help = "The number of pods the kubelet considers active and which are being considered when admitting new pods. static \
                is true if the pod is not from the apiserver.";
    by_source(text, "kubelet_active_pods", help, active.iter().copied());
    let mirrored = active.iter().filter(|pod| is_static(pod)).count();
    let help = "The number of mirror pods the kubelet will try to create (one per admitted static pod)";
    text.single("kubelet_mirror_pods", "gauge", help, mirrored);
    let ephemeral = active.iter().flat_map(|pod| pod::spec::of(pod).ephemeral_containers.iter().flatten()).count();
    let help = "Current number of ephemeral containers in pods managed by this kubelet.";
    text.single("kubelet_managed_ephemeral_containers", "gauge", help, ephemeral);
    let version = sys::cgroup::Hierarchy::detect().map_or(0, |hierarchy| if hierarchy.is_unified() { 2 } else { 1 });
    text.single("kubelet_cgroup_version", "gauge", "cgroup version on the hosts.", version);
    let places = paths.root.join("pods");
    let actual = tokio::task::spawn_blocking(move || volumes_below(&places)).await.unwrap_or_default();
    write_volumes(text, &actual, &volumes_of(&active));
}

fn is_active(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

fn by_source<'a>(text: &mut Text, name: &str, help: &str, pods: impl Iterator<Item = &'a Arc<Pod>>) {
    text.family(name, "gauge", help);
    let (files, server): (Vec<&Arc<Pod>>, Vec<&Arc<Pod>>) = pods.partition(|pod| is_static(pod));
    for (label, count) in [("", server.len()), ("true", files.len())] {
        text.sample(name, &labels(&[("static", label)]), count);
    }
}

fn volumes_of(pods: &[&Arc<Pod>]) -> ByPlugin {
    let mut counts = ByPlugin::new();
    for volume in pods.iter().flat_map(|pod| pod::spec::of(pod).volumes.iter().flatten()) {
        *counts.entry(plugin(volume).to_owned()).or_default() += 1;
    }
    counts
}

/// Volumes that have a directory in one of a pod: `<uid>/volumes/<plugin>/<name>`, where `~` stands for a slash.
fn volumes_below(pods: &Path) -> ByPlugin {
    let below = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut counts = ByPlugin::new();
    for plugin in below(pods).flat_map(|pod| below(&pod.join("volumes")).collect::<Vec<_>>()) {
        let name = plugin.file_name().map(|name| name.to_string_lossy().replace('~', "/")).unwrap_or_default();
        *counts.entry(name).or_default() += below(&plugin).count();
    }
    counts
}

fn write_volumes(text: &mut Text, actual: &ByPlugin, desired: &ByPlugin) {
    const TOTAL: &str = "volume_manager_total_volumes";
    text.family(TOTAL, "gauge", "Number of volumes in Volume Manager");
    for (state, counts) in [("actual_state_of_world", actual), ("desired_state_of_world", desired)] {
        for (plugin, count) in counts {
            text.sample(TOTAL, &labels(&[("plugin_name", plugin), ("state", state)]), count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_counted_by_their_plugins() {
        let dir = tempfile::tempdir().unwrap();
        for volume in [
            "u1/volumes/kubernetes.io~empty-dir/a",
            "u1/volumes/kubernetes.io~empty-dir/b",
            "u2/volumes/kubernetes.io~csi/c",
        ] {
            std::fs::create_dir_all(dir.path().join(volume)).unwrap();
        }
        let expect = [("kubernetes.io/csi".to_owned(), 1), ("kubernetes.io/empty-dir".to_owned(), 2)];
        assert_eq!(volumes_below(dir.path()), expect.into());
    }
}
