//! Who a sandbox or container is: labels and annotations under upstream's names.

use std::collections::HashMap;

use cri::v1::PodSandboxMetadata;
use k8s_openapi::api::core::v1::{Container, Pod};

/// Labels.
pub mod label {
    /// The pod's name.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// The pod's namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// The pod's uid.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// The container's name.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
}

/// Annotations of containers.
pub mod annotation {
    /// A hash of what makes it another container, in hexadecimal.
    pub const HASH: &str = "io.kubernetes.container.hash";
    /// How often it was started before.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Where it writes its termination message.
    pub const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// `File` or `FallbackToLogsOnError`.
    pub const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// The preStop handler as JSON.
    pub const PRE_STOP_HANDLER: &str = "io.kubernetes.container.preStopHandler";
    /// The ports as JSON.
    pub const PORTS: &str = "io.kubernetes.container.ports";
    /// The grace period of the pod's deletion.
    pub const DELETION_GRACE_PERIOD: &str = "io.kubernetes.pod.deletionGracePeriod";
    /// The pod's own grace period.
    pub const TERMINATION_GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";
}

pub(super) fn sandbox(pod: &Pod, attempt: u32) -> PodSandboxMetadata {
    let metadata = &pod.metadata;
    PodSandboxMetadata {
        name: metadata.name.clone().unwrap_or_default(),
        uid: metadata.uid.clone().unwrap_or_default(),
        namespace: metadata.namespace.clone().unwrap_or_else(|| "default".into()),
        attempt,
    }
}

/// The pod's own labels, and who it is.
pub(super) fn sandbox_labels(pod: &Pod) -> HashMap<String, String> {
    pod.metadata.labels.clone().into_iter().flatten().chain(who(pod)).collect()
}

pub(super) fn container_labels(pod: &Pod, container: &Container) -> HashMap<String, String> {
    who(pod).into_iter().chain([(label::CONTAINER_NAME.to_owned(), container.name.clone())]).collect()
}

fn who(pod: &Pod) -> [(String, String); 3] {
    let PodSandboxMetadata { name, uid, namespace, .. } = sandbox(pod, 0);
    [(label::POD_NAME.to_owned(), name), (label::POD_NAMESPACE.to_owned(), namespace), (label::POD_UID.to_owned(), uid)]
}

pub(super) fn container_annotations(pod: &Pod, container: &Container, attempt: u32) -> HashMap<String, String> {
    let message_path = container.termination_message_path.as_deref().unwrap_or(super::TERMINATION_MESSAGE_PATH);
    let pre_stop = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
    let ports = container.ports.as_ref().filter(|ports| !ports.is_empty());
    let always = [
        (annotation::HASH, Some(format!("{:x}", container_hash(container)))),
        (annotation::RESTART_COUNT, Some(attempt.to_string())),
        (annotation::TERMINATION_MESSAGE_PATH, Some(message_path.to_owned())),
        (
            annotation::TERMINATION_MESSAGE_POLICY,
            Some(container.termination_message_policy.clone().unwrap_or_else(|| "File".into())),
        ),
        (annotation::DELETION_GRACE_PERIOD, pod.metadata.deletion_grace_period_seconds.map(|s| s.to_string())),
        (
            annotation::TERMINATION_GRACE_PERIOD,
            pod::spec::of(pod).termination_grace_period_seconds.map(|s| s.to_string()),
        ),
        (annotation::PRE_STOP_HANDLER, pre_stop.and_then(|handler| serde_json::to_string(handler).ok())),
        (annotation::PORTS, ports.and_then(|ports| serde_json::to_string(ports).ok())),
    ];
    always.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

/// What makes it another container: its name and image. The number is the one that upstream's kubelet writes
/// (FNV-1a over Go's print of the JSON), so that a node may change its kubelet and keep its containers.
pub fn container_hash(container: &Container) -> u32 {
    let image = container.image.as_deref().unwrap_or_default();
    let json = format!(r#"{{"image":{},"name":{}}}"#, go_json(image), go_json(&container.name));
    let numbers: Vec<String> = json.bytes().map(|byte| byte.to_string()).collect();
    fnv1a(format!("([]uint8)[{}]", numbers.join(" ")).as_bytes())
}

/// A JSON string as Go writes it: `<`, `>`, `&` and two separators are escaped, too.
fn go_json(text: &str) -> String {
    let json = serde_json::to_string(text).unwrap_or_default();
    let escapes =
        [('<', "\\u003c"), ('>', "\\u003e"), ('&', "\\u0026"), ('\u{2028}', "\\u2028"), ('\u{2029}', "\\u2029")];
    escapes.into_iter().fold(json, |json, (from, to)| json.replace(from, to))
}

/// FNV-1a, 32 bits.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}
