//! What on this machine belongs to orlop and has no owner.

mod stopped;

use super::agent::Agent;
use super::layout::Layout;

pub(super) use stopped::of_stopped;

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
    // One that was removed by force is known to nobody else until it has ended.
    let at_work = agent.kubelet.pods();
    let known = |uid: &str| {
        let has_worker = at_work.iter().any(|(pod, _)| pod.metadata.uid.as_deref() == Some(uid));
        has_worker || agent.store().pods().find_uid(uid).is_some()
    };
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
