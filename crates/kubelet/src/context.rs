//! What the workers of all pods share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cluster::{EventKind, Source, event_about};
use cri::service::{ImageService, RuntimeService};
use cri::v1::AuthConfig;
use k8s_openapi::api::core::v1::Pod;
use pod::spec::Role;
use pod::{Note, NoteKind};
use tokio::sync::{Semaphore, watch};

use crate::admission::Rejection;
use crate::admission::Site;
use crate::generate;
use crate::metrics::Metrics;
use crate::oom::Kills;
use crate::pulled::{Pulled, Verification};
use crate::qos::Tree;
use crate::records::Records;
use crate::resources::Resources;
use crate::retry::Outage;
use crate::users::Users;
use crate::volumes::Volumes;

/// Who makes sure that no new connection goes to a pod that is about to end.
#[async_trait]
pub trait Barrier: Send + Sync + 'static {
    /// Returns when no service rule of this node leads to these addresses of an ending pod.
    async fn left(&self, pod: &Pod, addresses: &[String]);
}

/// Where credentials for an image come from.
#[async_trait]
pub trait Keychain: Send + Sync + 'static {
    /// Credentials to try for `image`, in order; none for an anonymous pull.
    async fn credentials(&self, pod: &Pod, image: &str) -> Vec<Credential>;
}

/// A login for a registry.
#[derive(Clone, PartialEq)]
pub struct Credential {
    /// What the registry is shown.
    pub auth: AuthConfig,
    /// Who may use it.
    pub holder: Holder,
}

/// Who may use a login, and so what was had with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// Every pod of the node.
    Node,
    /// The pods that name this secret, which it is from.
    Secret(ObjectName),
    /// The pods of this service account, in whose name it was given.
    ServiceAccount(ObjectName),
}

/// An object of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectName {
    /// Its uid.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Who knows what the node is like at the moment.
pub trait SiteNow: Send + Sync + 'static {
    /// The node now.
    fn now(&self) -> Site;
}

/// A barrier for nodes without service rules.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoBarrier;

#[async_trait]
impl Barrier for NoBarrier {
    async fn left(&self, _pod: &Pod, _addresses: &[String]) {}
}

/// Configuration of a kubelet.
#[derive(Debug, Clone)]
pub struct Config {
    /// What holds for all pods.
    pub generate: generate::Config,
    /// Where records of pods are kept over a restart.
    pub records_dir: PathBuf,
    /// How long an ending pod waits for the service rules at most; zero switches the barrier off.
    pub barrier_timeout: Duration,
    /// The runtime's name, which stands before ids of containers in statuses.
    pub runtime_name: String,
    /// Most pulls of images at a time; as many as there are without.
    pub pulls_max: Option<usize>,
    /// Which images pods need credentials for though they are on the node.
    pub verification: Verification,
}

/// What the kubelet works with.
#[derive(Clone)]
pub struct Parts {
    /// The desired state.
    pub source: Arc<dyn Source>,
    /// Sandboxes and containers.
    pub runtime: Arc<dyn RuntimeService>,
    /// Images.
    pub images: Arc<dyn ImageService>,
    /// Volumes.
    pub volumes: Arc<Volumes>,
    /// The termination barrier.
    pub barrier: Arc<dyn Barrier>,
    /// Credentials of images.
    pub keychain: Arc<dyn Keychain>,
    /// Control groups of pods.
    pub groups: Tree,
    /// Devices, and whatever else is given out whole.
    pub resources: Arc<Resources>,
    /// The node to which pods are admitted; without one every pod is taken.
    pub site: Option<Arc<dyn SiteNow>>,
    /// What the kubelet counts.
    pub metrics: Arc<Metrics>,
}

/// Everything that a worker needs beside its pod.
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) parts: Parts,
    pub(crate) records: Records,
    pub(crate) users: Users,
    /// Who may use the images that are there.
    pub(crate) pulled: Pulled,
    /// Whom the kernel has killed.
    pub(crate) kills: Kills,
    /// Who may pull an image now, where that is limited.
    pub(crate) pulls: Option<Semaphore>,
    /// The runtime does not say what runs.
    pub(crate) outage: Outage,
    /// Changes whenever a worker has taken a step.
    pub(crate) steps: watch::Sender<()>,
}

impl Context {
    /// Tells the operator.
    pub(crate) fn note(&self, pod: &Pod, note: &Note) {
        let kind = match note.kind {
            NoteKind::Normal => EventKind::Normal,
            NoteKind::Warning => EventKind::Warning,
        };
        let mut event = event_about(pod, kind, note.reason, note.message.clone(), "kubelet");
        event.involved_object.field_path = note.container.as_ref().map(|name| {
            let role = pod::spec::names(pod).find_map(|(role, other)| (other == name).then_some(role));
            let list = match role {
                Some(Role::Init | Role::Sidecar) => "initContainers",
                Some(Role::Ephemeral) => "ephemeralContainers",
                Some(Role::Main) | None => "containers",
            };
            format!("spec.{list}{{{name}}}")
        });
        tracing::info!(pod = %name_of(pod), reason = note.reason, container = note.container, "{}", note.message);
        self.parts.source.event(event);
    }

    pub(crate) fn normal(&self, pod: &Pod, reason: &'static str, message: String, container: Option<&str>) {
        self.note(pod, &Note::normal(reason, message, container.map(str::to_owned)));
    }

    /// The node does not take a pod.
    pub(crate) fn rejected(&self, pod: &Pod, rejection: &Rejection) {
        self.parts.metrics.rejected(&rejection.reason);
        let message = rejection.message.clone();
        tracing::info!(pod = %name_of(pod), reason = rejection.reason, "{message}");
        self.parts.source.event(event_about(pod, EventKind::Warning, &rejection.reason, message, "kubelet"));
    }

    pub(crate) fn warning(&self, pod: &Pod, reason: &'static str, message: String, container: Option<&str>) {
        self.note(pod, &Note::warning(reason, message, container.map(str::to_owned)));
    }
}

/// `namespace/name`.
pub(crate) fn name_of(pod: &Pod) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    format!("{}/{}", text(&pod.metadata.namespace), text(&pod.metadata.name))
}

/// The pod's uid.
pub(crate) fn uid_of(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
