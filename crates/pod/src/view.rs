//! What is known of a pod.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodCondition};
use serde::{Deserialize, Serialize};

use crate::backoff::{self, Backoff};
use crate::probe::{Kind, States};
use crate::resize::{Allocation, Resize, Sizes};

/// The reason for which a sandbox waits for its pod's claims, as the API spells it.
pub(crate) const CLAIMS_FAILED: &str = "FailedPrepareDynamicResources";

/// Everything that is known of a pod beside its spec.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// What outlives the daemon.
    pub record: Record,
    /// The pod's volumes.
    pub volumes: Setup,
    /// What drivers have made ready, or may have, for the pod's claims for devices.
    pub claims: Setup,
    /// The pod's sandbox.
    pub sandbox: Sandbox,
    /// Containers by name, as they run now. In boxes, because a node of the map has room for eleven, and pods have one or two.
    pub containers: BTreeMap<String, Box<ContainerView>>,
    /// Actions under way, by [`crate::Action::key`].
    pub busy: BTreeSet<String>,
    /// What has not been taken down yet.
    pub left: Left,
    /// The endpoints of an ending pod have left the service rules.
    pub left_services: bool,
}

/// What a restarted daemon has to know of a pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When the node took the pod on (`status.startTime`).
    pub started: Option<Timestamp>,
    /// How often the sandbox has been made anew.
    pub sandbox_attempt: u32,
    /// The sandbox attempt in which all init containers have succeeded.
    pub initialized: Option<u32>,
    /// A container has ended in a way that begins all of them anew: what still runs is ended first (KEP-5532).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resetting: bool,
    /// What is remembered of such ends, of whichever container: the next one costs time.
    #[serde(default)]
    pub resets: Backoff,
    /// When the node saw that the pod is to be deleted, by its own clock: the API server's may say something else, and the word
    /// may have been long under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<Timestamp>,
    /// Why the pod has been ended by the node: reason and message. Never reverts.
    pub failed: Option<(String, String)>,
    /// Less time than its own that the pod has to end, when the node needs what it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_s: Option<i64>,
    /// The node ended the pod for the node's sake and not for what the pod did (condition `DisruptionTarget`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disrupted: bool,
    /// By container name; in boxes as in [`View::containers`].
    pub containers: BTreeMap<String, Box<ContainerRecord>>,
    /// What the node has granted the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated: Option<Box<Allocation>>,
    /// What the pod's group was made for, if that is not what was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Box<Allocation>>,
    /// A resize that is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<Box<Resize>>,
    /// Failures of the volumes.
    pub volumes: Outage,
    /// Failures of the sandbox.
    pub sandbox: Outage,
    /// The conditions of a pod whose source does not bring them back, since when they hold above all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<PodCondition>,
}

/// A step that failed, and when it may be tried again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outage {
    /// The reason as the API spells it, and a message; `None` when the last try went well.
    pub error: Option<(String, String)>,
    /// When the next try may begin.
    pub backoff: Backoff,
}

impl Outage {
    /// A step on this node failed: it is tried again soon, and at once when what it waits for appears ([`crate::Change::Retry`]).
    pub(crate) fn fail(&mut self, reason: &str, message: &str, now: Timestamp) {
        self.error = Some((reason.to_owned(), message.to_owned()));
        self.backoff = self.backoff.after_failed_try(now, SignedDuration::from_secs(1), SignedDuration::from_secs(10));
    }

    /// A registry failed: it gets upstream's rest.
    pub(crate) fn fail_pull(&mut self, reason: &str, message: &str, now: Timestamp) {
        self.error = Some((reason.to_owned(), message.to_owned()));
        self.backoff = self.backoff.after_failed_try(now, backoff::FIRST, backoff::LONGEST);
    }

    pub(crate) fn retry(&mut self) {
        self.backoff.since = None;
    }
}

/// What a restarted daemon has to know of a container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// How often it was started again.
    pub restarts: i32,
    /// The delay before the next start.
    pub backoff: Backoff,
    /// Pulls that failed.
    pub pull: Outage,
    /// Creation or start that failed.
    pub create: Outage,
    /// The probes of the run with the id `probed`.
    pub probes: States,
    /// The run that the probes are about.
    pub probed: Option<String>,
    /// The run whose postStart hook has succeeded.
    pub post_started: Option<String>,
    /// The run whose preStop hook is over, well or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_stopped: Option<String>,
    /// The newest run that has ended.
    pub last: Option<Run>,
    /// The one that ended before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Run>,
    /// What the run that goes on was given, if that is not what was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actuated: Option<Box<Sizes>>,
    /// The run that is ended so that another one begins with other resources or another image.
    #[serde(default, alias = "resizing", skip_serializing_if = "Option::is_none")]
    pub replacing: Option<String>,
    /// What the newest pull or run is of, as the pod calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

impl ContainerRecord {
    /// Failures of another image tell nothing of this one. Returns whether there was another.
    pub(crate) fn take_image(&mut self, image: Option<String>) -> bool {
        let is_another = self.image.is_some() && self.image != image;
        if is_another {
            (self.backoff, self.pull, self.create) = Default::default();
        }
        self.image = image;
        is_another
    }
}

/// One run of a container, from start to end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its id, without a scheme.
    pub id: String,
    /// When it started.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// Its exit code.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, …
    pub reason: String,
    /// Its termination message.
    pub message: String,
}

/// How much of an ending pod is left on the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Left {
    /// Whatever there was.
    #[default]
    Everything,
    /// Containers that have ended, and their logs.
    Logs,
    /// Nothing but its object, in the source.
    Object,
    /// The source has been told.
    Nothing,
}

impl Run {
    /// The end of a run that nobody can tell about any more, as upstream has it.
    pub fn unknown() -> Self {
        Self {
            exit_code: 137,
            reason: "ContainerStatusUnknown".to_owned(),
            message: "The container could not be located when the pod was terminated".to_owned(),
            ..Self::default()
        }
    }
}

/// How far a preparation is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Setup {
    /// Not begun, or to be tried again.
    #[default]
    Absent,
    /// Done.
    Ready,
}

/// The pod's sandbox.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Sandbox {
    /// There is none.
    #[default]
    Absent,
    /// It stands.
    Ready {
        /// Its id.
        id: String,
        /// The pod's addresses; empty on the host's network.
        addresses: Vec<String>,
    },
    /// It broke, or was stopped; its remains have to go before there is a new one.
    Lost {
        /// Its id.
        id: String,
    },
}

impl Sandbox {
    /// Its id, while there is one.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Absent => None,
            Self::Ready { id, .. } | Self::Lost { id } => Some(id),
        }
    }
}

/// A container now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ContainerView {
    /// The image that its next start uses, when it is on the node.
    pub image: Option<String>,
    /// The digest under which the registry knows it (`imageID`).
    pub image_id: String,
    /// The run that goes on.
    pub running: Option<Running>,
    /// The run that has ended and was not followed by another.
    pub ended: Option<Run>,
    /// The startup or readiness probe that found nobody listening when it was asked last, and when that was.
    pub refused: Option<(Kind, Timestamp)>,
}

/// A run that goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    /// Its id, without a scheme.
    pub id: String,
    /// When it started.
    pub started: Timestamp,
}

impl View {
    /// Whether a step has failed that the appearance of an object may heal.
    pub fn waits_for_objects(&self) -> bool {
        let failed = |outage: &Outage| outage.error.is_some();
        failed(&self.record.volumes)
            || self.waits_for_claims()
            || self.record.containers.values().any(|container| failed(&container.create))
    }

    /// Whether the sandbox is not made because claims are not ready.
    pub(crate) fn waits_for_claims(&self) -> bool {
        self.record.sandbox.error.as_ref().is_some_and(|(reason, _)| reason == CLAIMS_FAILED)
    }

    /// The record of a container; made when there is none.
    pub fn record_of(&mut self, container: &str) -> &mut ContainerRecord {
        self.record.containers.entry(container.to_owned()).or_default()
    }

    /// The view of a container; made when there is none.
    pub fn container_mut(&mut self, container: &str) -> &mut ContainerView {
        self.containers.entry(container.to_owned()).or_default()
    }

    /// The run of a container that goes on.
    pub fn running(&self, container: &str) -> Option<&Running> {
        self.containers.get(container)?.running.as_ref()
    }

    /// Whether a container has got another image than what is known is about.
    pub(crate) fn is_outdated(&self, container: &Container) -> bool {
        let known = self.record.containers.get(&container.name).and_then(|record| record.image.as_ref());
        known.is_some_and(|image| container.image.as_ref() != Some(image))
    }

    /// Whether nothing of the pod is left on the node.
    pub fn is_taken_down(&self) -> bool {
        matches!(self.left, Left::Object | Left::Nothing)
    }

    /// Whether an action with this key is under way.
    pub fn is_busy(&self, key: &str) -> bool {
        self.busy.contains(key)
    }
}

/// `name_namespace(uid)`, as upstream names a pod in messages.
pub(crate) fn describe(pod: &Pod) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    format!("{}_{}({})", text(&pod.metadata.name), text(&pod.metadata.namespace), text(&pod.metadata.uid))
}
