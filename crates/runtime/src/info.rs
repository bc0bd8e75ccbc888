//! What the runtime says of itself, and in detail of a sandbox or container.

use std::collections::HashMap;

use cri::{Error, v1};
use serde_json::json;

use crate::core::{Core, blocking, now};
use crate::status as state;

/// The runtime's name, as nodes show it: `orlop://<version>`.
pub(crate) const NAME: &str = "orlop";

/// CRI `Version`.
pub(crate) fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        // The version of the kubelet's API for runtimes, which has been this since its first.
        version: "0.1.0".to_owned(),
        runtime_name: NAME.to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

/// CRI `Status`.
pub(crate) fn status(core: &Core, verbose: bool) -> v1::StatusResponse {
    let network = core.network.status();
    let condition = |kind: &str, problem: Option<(&str, String)>| {
        let status = problem.is_none();
        let (reason, message) = problem.unwrap_or_default();
        v1::RuntimeCondition { r#type: kind.to_owned(), status, reason: reason.to_owned(), message }
    };
    let conditions = vec![
        condition("RuntimeReady", None),
        condition("NetworkReady", network.problem.map(|problem| ("NetworkPluginNotReady", problem))),
    ];
    let features =
        v1::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: has_user_namespaces() };
    let mut info = HashMap::new();
    if verbose {
        info.insert("config".to_owned(), config(core).to_string());
    }
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus { conditions }),
        info,
        runtime_handlers: handlers(core, features),
        features: Some(features_of_all()),
    }
}

/// This runtime, by both of its names, and the others.
fn handlers(core: &Core, own: v1::RuntimeHandlerFeatures) -> Vec<v1::RuntimeHandler> {
    let handler = |name: &str, features: v1::RuntimeHandlerFeatures| v1::RuntimeHandler {
        name: name.to_owned(),
        features: Some(features),
    };
    let others = core.handlers.iter().map(|(name, known)| handler(name, known.features));
    [handler("", own), handler(NAME, own)].into_iter().chain(others).collect()
}

/// What every handler can do.
fn features_of_all() -> v1::RuntimeFeatures {
    v1::RuntimeFeatures { supplemental_groups_policy: true, user_namespaces_host_network: false, mount_options: true }
}

/// Whether the operator has left the kernel any, and they are of use.
pub(crate) fn has_user_namespaces() -> bool {
    remedy_for_users().is_none()
}

/// What to do so that pods may have user namespaces; none where they may.
pub(crate) fn remedy_for_users() -> Option<&'static str> {
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    match limit.trim().parse::<u64>() {
        Err(_) => Some("boot a kernel with CONFIG_USER_NS"),
        Ok(0) => Some("raise the sysctl user.max_user_namespaces"),
        Ok(_) if !sys::kernel::maps_owners_on_tmpfs() => Some("boot Linux 6.3 or newer"),
        Ok(_) => None,
    }
}

fn config(core: &Core) -> serde_json::Value {
    json!({
        "stateDir": core.config.state_dir,
        "runDir": core.config.run_dir,
        "cgroupParent": core.config.cgroup_parent,
        "streamingAddress": core.config.streaming_address.to_string(),
        "cgroupVersion": if core.hierarchy.is_unified() { 2 } else { 1 },
        "network": format!("{:?}", core.network.status().mode),
    })
}

/// CRI `PodSandboxStatus`.
pub(crate) fn sandbox(
    core: &Core,
    request: &v1::PodSandboxStatusRequest,
) -> Result<v1::PodSandboxStatusResponse, Error> {
    let sandbox = core.table.sandbox(&request.pod_sandbox_id)?;
    let mut info = HashMap::new();
    if request.verbose {
        let detail = json!({
            "sandboxID": sandbox.id,
            "pid": sandbox.live().keeper_pid,
            "directory": sandbox.records.directory(),
            "cgroup": sandbox.group.path(),
        });
        info.insert("info".to_owned(), detail.to_string());
    }
    Ok(v1::PodSandboxStatusResponse {
        status: Some(state::sandbox(&sandbox)),
        info,
        containers_statuses: state::containers_of(&sandbox),
        timestamp: now(),
    })
}

/// CRI `ContainerStatus`.
pub(crate) async fn container(
    core: &Core,
    request: &v1::ContainerStatusRequest,
) -> Result<v1::ContainerStatusResponse, Error> {
    let (sandbox, container) = core.table.container(&request.container_id)?;
    let mut info = HashMap::new();
    if request.verbose {
        let (records, id) = (sandbox.records.clone(), container.id.clone());
        let spec = blocking(move || records.spec(&id)).await.ok();
        let spec: Option<serde_json::Value> = spec.and_then(|json| serde_json::from_slice(&json).ok());
        let detail = json!({
            "sandboxID": sandbox.id,
            "pid": container.live().pid,
            "cgroup": container.group.path(),
            "runtimeSpec": spec.as_ref().and_then(|spec| spec.get("oci")),
        });
        info.insert("info".to_owned(), detail.to_string());
    }
    Ok(v1::ContainerStatusResponse { status: Some(state::container(&sandbox, &container)), info })
}
