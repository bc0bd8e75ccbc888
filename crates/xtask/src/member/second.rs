//! A second node on the machine, whose kubelet's port the first one has.

use std::process::Stdio;

use anyhow::ensure;

use super::{ADDRESS, Fleet};

const NAME: &str = "second";

/// The point: it ends before the cluster hears of it.
pub(super) fn refused(fleet: &mut Fleet) -> anyhow::Result<String> {
    let dir = fleet.stage.dir.path().join(NAME);
    let mut node = fleet.stage.orlop();
    node.env("ORLOP_STATE_DIR", dir.join("state")).env("ORLOP_RUN_DIR", dir.join("run"));
    node.arg("node").arg("--kubeconfig").arg(dir.join("kubelet.conf"));
    node.arg("--bootstrap-kubeconfig").arg(&fleet.bootstrap_kubeconfig);
    node.arg("--config").arg(fleet.stage.dir.path().join("kubelet.yaml"));
    node.args(["--hostname-override", NAME, "--node-ip"]).arg(ADDRESS.to_string());
    let ended = node.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&ended.stderr);
    let holder = format!("(pid {}) listens there", fleet.node.id());
    ensure!(!ended.status.success() && said.contains(&holder), "it ended with {}: {said}", ended.status);
    let shown = fleet.kubectl(&format!("get node {NAME} --ignore-not-found -o name"))?;
    ensure!(shown.is_empty(), "the cluster has {shown}");
    ensure!(!dir.join("kubelet.conf").exists(), "it has joined");
    Ok(holder)
}
