//! The alone mode's source: a store whose objects come from manifests, and what its users may ask of it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Event, Node, NodeStatus, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::engine::{self, Engine};
use super::events::Events;
use super::files::{Files, Names};
use super::kinds::{self, AnyObject};
use super::problem::Problem;
use crate::controllers::common::{ALPHABET, is_terminating};
use crate::controllers::service::Range;
use crate::controllers::{Change, Plan};
use crate::source::{EventKind, Source, SourceError, event_about};
use crate::state::{Saver, State};
use crate::{Key, Store};

/// Configuration of [`Manifests`].
#[derive(Debug, Clone)]
pub struct ManifestsConfig {
    /// Files and directories; `-` is standard input.
    pub paths: Vec<PathBuf>,
    /// Where what must survive the daemon is kept.
    pub state_dir: PathBuf,
    /// Where the directories of persistent volumes are made.
    pub volumes_dir: PathBuf,
    /// Name of this node.
    pub node_name: String,
    /// Addresses of services.
    pub services: Range,
    /// Namespace of objects that name none.
    pub namespace: String,
}

/// A source that reads manifests and runs the controllers that a control plane would.
pub struct Manifests {
    pub(super) config: ManifestsConfig,
    pub(super) store: Store,
    pub(super) state: State,
    events: Mutex<Events>,
    pub(super) problems: tokio::sync::watch::Sender<Vec<Problem>>,
    /// Set when everything is to end.
    pub(super) ending: CancellationToken,
    pub(super) tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Manifests {
    /// Reads what was saved and what is declared, and starts the controllers.
    ///
    /// # Errors
    /// A state directory that cannot be written, or standard input that cannot be read.
    pub fn start(config: ManifestsConfig) -> Result<Arc<Self>, StartError> {
        let store = Store::new();
        let state = State::open(config.state_dir.join("cluster"))?;
        state.restore(&store);
        engine::renew_volumes(&store);
        let files = Files::open(&config.paths, Names::Suffixed).map_err(StartError::Input)?;
        let events = Mutex::new(Events::restored(&store));
        let saver = Saver::new(state.clone(), &store);
        let manifests = Arc::new(Self {
            config,
            store,
            state,
            events,
            problems: tokio::sync::watch::Sender::new(Vec::new()),
            ending: CancellationToken::new(),
            tasks: Mutex::default(),
        });
        manifests.ensure_node();
        let engine = Engine::start(manifests.clone(), files);
        manifests.store.set_synced();
        let tasks = vec![tokio::spawn(engine.run()), tokio::spawn(saver.run())];
        *manifests.tasks.lock().unwrap_or_else(PoisonError::into_inner) = tasks;
        Ok(manifests)
    }

    /// What is wrong with the manifests now; changes with them.
    pub fn problems(&self) -> tokio::sync::watch::Receiver<Vec<Problem>> {
        self.problems.subscribe()
    }

    /// Asks all pods to end, stops the controllers, and returns when the last pod is gone.
    pub async fn end_everything(&self) {
        self.ending.cancel();
        let mut pods = self.store.pods().watch();
        loop {
            let left = self.store.pods().list();
            if left.is_empty() {
                return;
            }
            for pod in left.iter().filter(|pod| !is_terminating(pod)) {
                self.end_pod(&Key::of(&pod.metadata), None);
            }
            pods.changed().await;
        }
    }

    /// Removes everything that was saved. For the end, when no pod is left.
    ///
    /// # Errors
    /// The file system's.
    pub fn erase(&self) -> std::io::Result<()> {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
        self.state.erase()
    }

    fn ensure_node(&self) {
        let name = &self.config.node_name;
        let labels = [
            ("kubernetes.io/hostname".to_owned(), name.clone()),
            ("kubernetes.io/os".to_owned(), "linux".to_owned()),
            ("kubernetes.io/arch".to_owned(), if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }.to_owned()),
        ];
        if self.store.nodes().get(&Key::new("", name)).is_none() {
            let metadata = ObjectMeta { name: Some(name.clone()), labels: Some(labels.into()), ..fresh() };
            self.store.nodes().put(Node { metadata, ..Node::default() });
        }
    }

    pub(super) fn end_pod(&self, key: &Key, grace_s: Option<i64>) {
        let now = Timestamp::now();
        self.store.pods().update(key, |pod| {
            let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
            let grace = grace_s.unwrap_or(own).max(0);
            let end = now.saturating_add(SignedDuration::from_secs(grace)).unwrap_or(now);
            let earlier = pod.metadata.deletion_timestamp.as_ref().is_none_or(|known| end < known.0);
            if earlier {
                pod.metadata.deletion_timestamp = Some(Time(end));
                pod.metadata.deletion_grace_period_seconds = Some(grace);
            }
        });
    }

    pub(super) fn record(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.record(&self.store, event, Timestamp::now());
    }

    /// A new object gets what the API server would give it.
    pub(super) fn create(&self, mut object: AnyObject) {
        let metadata = object.metadata_mut();
        if let (None, Some(prefix)) = (&metadata.name, &metadata.generate_name) {
            metadata.name = Some(format!("{prefix}{}", suffix()));
        }
        let ObjectMeta { uid, creation_timestamp, .. } = fresh();
        metadata.uid = uid;
        metadata.creation_timestamp = creation_timestamp;
        metadata.generation = Some(1);
        match object {
            // A pod is on disk before anybody sees it: its uid names what runs.
            AnyObject::Pod(mut pod) => {
                pod.spec.get_or_insert_default().node_name.get_or_insert_with(|| self.config.node_name.clone());
                pod.status = Some(PodStatus { phase: Some("Pending".into()), ..PodStatus::default() });
                let message = format!("Successfully assigned {} to {}", Key::of(&pod.metadata), self.config.node_name);
                let event = event_about(&*pod, EventKind::Normal, "Scheduled", message, "default-scheduler");
                match self.state.create(self.store.pods(), *pod) {
                    Ok(_) => self.record(event),
                    Err(error) => tracing::error!(%error, "a pod is not started: its state cannot be saved"),
                }
            }
            other => other.put(&self.store),
        }
    }

    pub(super) fn carry_out(&self, plan: Plan) -> bool {
        let any = !plan.changes.is_empty();
        for change in plan.changes {
            match change {
                Change::Create(object) => self.create(object),
                Change::Replace(object) => {
                    if object.known(&self.store).is_some() {
                        object.put(&self.store);
                    }
                }
                Change::Remove("Pod", key) | Change::EndPod { key, grace_s: None } => self.end_pod(&key, None),
                Change::EndPod { key, grace_s } => self.end_pod(&key, grace_s),
                Change::Remove(kind, key) => kinds::remove(kind, &key, &self.store),
                Change::Event(event) => self.record(*event),
            }
        }
        any
    }
}

/// Why the source could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] SourceError),
    /// Standard input.
    #[error("{0}")]
    Input(Box<Problem>),
}

#[async_trait]
impl Source for Manifests {
    fn store(&self) -> &Store {
        &self.store
    }

    async fn update_pod_status(&self, uid: &str, status: PodStatus) -> Result<(), SourceError> {
        let missing = || SourceError::NotFound { kind: "Pod", name: uid.to_owned() };
        let pod = self.store.pods().find_uid(uid).ok_or_else(missing)?;
        let updated = self.store.pods().update(&Key::of(&pod.metadata), |pod| take_status(pod, status));
        updated.map(drop).ok_or_else(missing)
    }

    async fn delete_pod(&self, uid: &str) -> Result<(), SourceError> {
        if let Some(pod) = self.store.pods().find_uid(uid) {
            self.store.pods().remove(&Key::of(&pod.metadata));
        }
        Ok(())
    }

    async fn request_deletion(&self, uid: &str, grace_period_s: Option<i64>) -> Result<(), SourceError> {
        let missing = || SourceError::NotFound { kind: "Pod", name: uid.to_owned() };
        let pod = self.store.pods().find_uid(uid).ok_or_else(missing)?;
        self.end_pod(&Key::of(&pod.metadata), grace_period_s);
        Ok(())
    }

    async fn update_node_status(&self, name: &str, status: NodeStatus) -> Result<(), SourceError> {
        let updated = self.store.nodes().update(&Key::new("", name), |node| node.status = Some(status));
        updated.map(drop).ok_or_else(|| SourceError::NotFound { kind: "Node", name: name.to_owned() })
    }

    fn event(&self, event: Event) {
        self.record(event);
    }
}

impl std::fmt::Debug for Manifests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manifests").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What the API server gives every object.
pub(super) fn fresh() -> ObjectMeta {
    let mut bytes = sys::random::bytes::<16>();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let uid = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    ObjectMeta { uid: Some(uid), creation_timestamp: Some(Time(Timestamp::now())), ..ObjectMeta::default() }
}

/// Five characters, as the API server appends to `generateName`.
fn suffix() -> String {
    sys::random::bytes::<5>().iter().map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect()
}

/// The kubelet's status of a pod, with the conditions that others have written.
fn take_status(pod: &mut Pod, mut status: PodStatus) {
    let before = pod.status.take().and_then(|status| status.conditions).unwrap_or_default();
    let own = status.conditions.get_or_insert_default();
    let foreign = before.into_iter().filter(|other| own.iter().all(|mine| mine.type_ != other.type_));
    let foreign: Vec<_> = foreign.collect();
    own.extend(foreign);
    pod.status = Some(status);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_of_others_stay() {
        let status = |conditions: &[(&str, &str)]| PodStatus {
            conditions: Some(
                conditions
                    .iter()
                    .map(|(kind, status)| {
                        serde_json::from_value(serde_json::json!({"type": kind, "status": status})).unwrap()
                    })
                    .collect(),
            ),
            ..PodStatus::default()
        };
        let mut pod = Pod { status: Some(status(&[("gate", "True"), ("Ready", "False")])), ..Pod::default() };
        take_status(&mut pod, status(&[("Ready", "True")]));
        assert_eq!(pod.status, Some(status(&[("Ready", "True"), ("gate", "True")])));
    }
}
