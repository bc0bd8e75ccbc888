//! What on this machine belongs to orlop and has no owner.

use std::path::Path;

use super::agent::Agent;
use super::layout::Layout;
use super::lock::Lock;

/// Of a running node.
pub(super) async fn of_running(agent: &Agent) -> anyhow::Result<Vec<String>> {
    let mut unowned: Vec<String> = Vec::new();
    // Another program knows its own.
    if let Ok(own) = agent.base.own() {
        let line = |one: &runtime::Owned| format!("{} {}", one.kind, one.name);
        unowned.extend(own.runtime.fsck().await?.iter().filter(|one| one.owner.is_none()).map(line));
        let images = own.images.clone();
        unowned.extend(tokio::task::spawn_blocking(move || image_leftovers(&images)).await??);
    }
    let layout = &agent.layout;
    let known = |uid: &str| agent.store().pods().find_uid(uid).is_some();
    unowned.extend(pod_directories(layout).into_iter().filter(|(uid, _)| !known(uid)).map(|(_, line)| line));
    Ok(unowned)
}

fn image_leftovers(images: &image::Images) -> Result<Vec<String>, image::Error> {
    let line = |one: image::Unowned| format!("image store {} ({})", one.path.display(), one.reason);
    Ok(images.fsck()?.into_iter().map(line).collect())
}

/// The directories of pods below the kubelet's root, by uid, with the line that tells of each.
fn pod_directories(layout: &Layout) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(layout.kubelet_root.join("pods")).into_iter().flatten().flatten();
    entries
        .map(|entry| {
            let uid = entry.file_name().to_string_lossy().into_owned();
            (uid, format!("pod directory {}", entry.path().display()))
        })
        .collect()
}

/// Of a node that does not run: whatever is still there has no owner. A daemon that died leaves its pods on purpose:
/// the next `orlop up` takes them over, and until then they are listed.
pub(crate) fn of_stopped(layout: &Layout) -> anyhow::Result<Vec<String>> {
    if Lock::is_taken(&layout.run_dir) {
        anyhow::bail!("a node runs in {} but does not answer yet; try again", layout.run_dir.display());
    }
    let mut left = Vec::new();
    left.extend(sandboxes(&layout.run_dir));
    left.extend(name_server(layout));
    left.extend(pod_directories(layout).into_iter().map(|(_, line)| line));
    left.extend(control_groups()?);
    Ok(left)
}

fn sandboxes(run_dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run_dir.join("sandboxes")).into_iter().flatten().flatten();
    entries
        .map(|entry| format!("sandbox {} (no daemon owns it; `orlop up` takes it over)", entry.path().display()))
        .collect()
}

fn name_server(layout: &Layout) -> Vec<String> {
    let line = |one: network::Owned| format!("{} {} (no daemon owns it; `orlop up` takes it over)", one.kind, one.name);
    network::dns::fsck(&layout.dns()).into_iter().map(line).collect()
}

fn control_groups() -> anyhow::Result<Vec<String>> {
    let root = sys::cgroup::Hierarchy::detect()?.group(kubelet::qos::ROOT);
    // Another node of this machine, or another kubelet, has its pods in the same tree.
    if root.is_populated() {
        return Ok(Vec::new());
    }
    Ok(root
        .directories()
        .into_iter()
        .filter(|dir| dir.is_dir())
        .map(|dir| format!("cgroup {}", dir.display()))
        .collect())
}
