//! The directory of a pod's volumes: who may change it, and until when.

use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Mutex as Turn;

use super::Cause;
use crate::threads::patient;

/// The directory of one pod.
#[derive(Debug, Default)]
pub(super) struct Ground {
    /// One at a time changes the directory. Whoever does touches nothing but files and mounts of the kubelet itself.
    turn: Arc<Turn<()>>,
    /// Guards the phase, for short sections.
    phase: Mutex<Phase>,
}

#[derive(Debug, Default)]
enum Phase {
    /// The volumes are being made.
    #[default]
    Making,
    /// They are there, as this version of the pod wants them.
    Shown(Arc<Pod>),
    /// They are being taken down: nothing new appears.
    Over,
}

impl Ground {
    /// Runs `work` on a thread, alone in the directory and to its end, also when nobody waits any more.
    ///
    /// # Errors
    /// Those of `work`, or [`Cause::Over`].
    pub(super) async fn alone<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<T, Cause> + Send + 'static,
    ) -> Result<T, Cause> {
        let turn = self.turn.clone().lock_owned().await;
        let ground = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            if ground.is_over() { Err(Cause::Over) } else { work() }
        });
        task.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    /// Lets nothing new appear, waits for who is at work in the directory, and runs `work`. What was mounted for the pod may
    /// not answer, so this has a thread of its own.
    ///
    /// # Errors
    /// Those of `work`.
    pub(super) async fn end(&self, work: impl FnOnce() -> Result<(), Cause> + Send + 'static) -> Result<(), Cause> {
        self.finish();
        let turn = self.turn.clone().lock_owned().await;
        patient(move || {
            let _turn = turn;
            work()
        })
        .await?
    }

    /// From now on nothing new appears.
    pub(super) fn finish(&self) {
        self.set(Phase::Over);
    }

    /// Whether the volumes are being taken down.
    pub(super) fn is_over(&self) -> bool {
        matches!(*self.lock(), Phase::Over)
    }

    /// The volumes are there, as this version of the pod wants them.
    pub(super) fn show(&self, pod: Arc<Pod>) {
        self.set(Phase::Shown(pod));
    }

    /// They are not there, after all.
    pub(super) fn hide(&self) {
        self.set(Phase::Making);
    }

    /// The version of the pod whose volumes are there; none while they are made or taken down.
    pub(super) fn shown(&self) -> Option<Arc<Pod>> {
        match &*self.lock() {
            Phase::Shown(pod) => Some(pod.clone()),
            Phase::Making | Phase::Over => None,
        }
    }

    fn set(&self, phase: Phase) {
        let mut now = self.lock();
        if !matches!(*now, Phase::Over) {
            *now = phase;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
