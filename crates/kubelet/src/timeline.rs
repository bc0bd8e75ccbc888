//! The steps of a pod's start with their times: what `why` shows.

use std::time::{Duration, Instant};

use pod::Action;
use serde::{Deserialize, Serialize};

/// Steps that are kept of each pod; later ones are not part of its start.
const STEPS_MAX: usize = 64;

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// What was done.
    pub name: String,
    /// When it began, in milliseconds after the pod was first seen.
    pub begin_ms: f64,
    /// How long it took in milliseconds; absent while it goes on.
    pub length_ms: Option<f64>,
}

/// The steps of one pod.
#[derive(Debug)]
pub(crate) struct Timeline {
    first: Instant,
    steps: Vec<(String, Step)>,
}

impl Timeline {
    pub(crate) fn new() -> Self {
        Self { first: Instant::now(), steps: Vec::new() }
    }

    /// How long the pod has been seen.
    pub(crate) fn age(&self) -> Duration {
        self.first.elapsed()
    }

    /// For how long images were waited for.
    pub(crate) fn images(&self) -> Duration {
        let lengths =
            self.steps.iter().filter(|(_, step)| step.name.starts_with("image of ")).filter_map(|(_, step)| {
                // They are had at the same time, each for the time that it takes.
                step.length_ms
            });
        Duration::try_from_secs_f64(lengths.fold(0.0, f64::max) / 1000.0).unwrap_or_default()
    }

    fn now_ms(&self) -> f64 {
        self.first.elapsed().as_secs_f64() * 1000.0
    }

    pub(crate) fn begin(&mut self, action: &Action) {
        if let (Some(name), true) = (label(action), self.steps.len() < STEPS_MAX) {
            let step = Step { name, begin_ms: self.now_ms(), length_ms: None };
            self.steps.push((action.key(), step));
        }
    }

    pub(crate) fn end(&mut self, action: &Action) {
        let (key, now) = (action.key(), self.now_ms());
        let open = self.steps.iter_mut().rev().find(|(known, step)| *known == key && step.length_ms.is_none());
        if let Some((_, step)) = open {
            step.length_ms = Some(now - step.begin_ms);
        }
    }

    pub(crate) fn steps(&self) -> Vec<Step> {
        self.steps.iter().map(|(_, step)| step.clone()).collect()
    }

    /// For how long the newest open step has been going on.
    pub(crate) fn open_ms(&self) -> Option<(String, f64)> {
        let now = self.now_ms();
        let open = self.steps.iter().rev().find(|(_, step)| step.length_ms.is_none());
        open.map(|(_, step)| (step.name.clone(), now - step.begin_ms))
    }
}

/// The step's name; probes and the end of a pod are none.
fn label(action: &Action) -> Option<String> {
    Some(match action {
        Action::MountVolumes => "volumes".to_owned(),
        Action::CreateSandbox { .. } => "sandbox".to_owned(),
        Action::EnsureImage { container } => format!("image of {container}"),
        Action::Start { container, .. } => format!("start of {container}"),
        Action::PostStart { container, .. } => format!("postStart hook of {container}"),
        _ => return None,
    })
}
