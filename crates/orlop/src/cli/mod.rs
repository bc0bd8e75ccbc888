//! The local command line: each command asks the running node over its socket and prints the answer.

pub(crate) mod client;
pub(crate) mod describe;
pub(crate) mod down;
pub(crate) mod events;
pub(crate) mod format;
pub(crate) mod fsck;
pub(crate) mod get;
pub(crate) mod images;
pub(crate) mod logs;
pub(crate) mod ps;
pub(crate) mod streams;
pub(crate) mod top;
pub(crate) mod version;
pub(crate) mod why;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Pod;

use client::Client;

/// What a user may put before a name: `pod/x`, `deployment/x`, `service/x` or only `x`.
pub(crate) fn split_kind(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or(("pod", name))
}

/// Finds the pod that `name` means: itself, or the first ready one of a workload or a service.
///
/// # Errors
/// There is none; the message lists what is there.
pub(crate) async fn find_pod(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Pod> {
    let (kind, name) = split_kind(name);
    let pods: Vec<Pod> = client.objects("pods", Some(namespace)).await?;
    let found = match kind {
        "pod" | "pods" | "po" => pods.iter().find(|pod| pod.metadata.name.as_deref() == Some(name)),
        _ => {
            let selector = client.selector(kind, namespace, name).await?;
            let mut matching = pods.iter().filter(|pod| has_labels(pod, &selector));
            matching.clone().find(|pod| ps::is_ready(pod)).or_else(|| matching.next())
        }
    };
    if let Some(pod) = found {
        return Ok(pod.clone());
    }
    let known: Vec<&str> = pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
    bail!(
        "no {kind} {name:?} in namespace {namespace:?}; pods there: {}",
        if known.is_empty() { "none".to_owned() } else { known.join(", ") }
    )
}

/// Whether the pod carries all of `wanted`.
pub(crate) fn has_labels(pod: &Pod, wanted: &[(String, String)]) -> bool {
    let labels = pod.metadata.labels.as_ref();
    wanted.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// Parses `a=b,c=d`.
///
/// # Errors
/// A part without `=`.
pub(crate) fn parse_selector(text: &str) -> anyhow::Result<Vec<(String, String)>> {
    text.split(',')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (key, value) = part.split_once('=').with_context(|| format!("--selector {part:?}: write key=value"))?;
            Ok((key.trim_end_matches('=').to_owned(), value.trim_start_matches('=').to_owned()))
        })
        .collect()
}

/// The container that a command means when none was named.
///
/// # Errors
/// The pod has no container `wanted`; the message lists those it has.
pub(crate) fn container_of(pod: &Pod, wanted: Option<&str>) -> anyhow::Result<String> {
    let spec = pod.spec.as_ref().context("the pod has no spec")?;
    let names =
        spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|container| container.name.as_str());
    match wanted {
        None => names.clone().next().map(str::to_owned).context("the pod has no containers"),
        Some(wanted) if names.clone().any(|name| name == wanted) => Ok(wanted.to_owned()),
        Some(wanted) => bail!("the pod has no container {wanted:?}; it has: {}", names.collect::<Vec<_>>().join(", ")),
    }
}
