//! Statuses of pods on their way to the API server.
//!
//! For each pod the latest status counts, and at most one request is on its way. What others write over it is noticed when
//! it comes back by the watch, and written again.
//!
//! ```text
//!   put ─► hold (≤ 100 ms, unless somebody waits for it) ─► patch ─► written
//!            ▲                                               │ refused: read anew
//!            └───────────────── back-off ◄───────────────────┘ failed
//! ```

mod diff;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::json;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::api::client::Api;
use crate::api::error::ApiError;
use crate::api::follow::{Backoff, random};
use crate::api::verbs::Patch;
use crate::{Key, Table};

/// How long a status waits that nobody waits for: the start of a pod makes several in a row.
const HOLD: Duration = Duration::from_millis(100);
/// Others write less often.
const CONFLICTS_MAX: u32 = 5;
/// Patches on their way together; a node that starts with 500 pods must not fill the server's queues.
const WRITERS_MAX: usize = 32;

/// Writes statuses. A handle: clones share the work.
#[derive(Clone)]
pub(super) struct Statuses {
    shared: Arc<Shared>,
    /// The writers; they end with this value.
    tasks: Arc<Mutex<JoinSet<()>>>,
}

struct Shared {
    api: Api,
    pods: Table<Pod>,
    /// By uid. Never held over `.await`.
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    writers: Semaphore,
}

/// One pod.
struct Slot {
    uid: String,
    key: Key,
    state: Mutex<State>,
    /// One request at a time.
    writing: tokio::sync::Mutex<()>,
    news: Notify,
}

struct State {
    wanted: Arc<PodStatus>,
    /// Counts what was wanted.
    count: u64,
    /// The last of these that the server has taken.
    written: u64,
    /// When it has to be written.
    due: Instant,
    /// The server's copy, if we know a newer one than the table does.
    base: Option<(u128, Arc<PodStatus>)>,
    has_writer: bool,
}

impl Statuses {
    pub(super) fn new(api: Api, pods: Table<Pod>) -> Self {
        let shared = Shared { api, pods, slots: Mutex::default(), writers: Semaphore::new(WRITERS_MAX) };
        Self { shared: Arc::new(shared), tasks: Arc::default() }
    }

    /// Takes a status; it is on its way now. `pod` is the pod as its table has it.
    pub(super) fn put(&self, pod: &Pod, status: PodStatus) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let old = pod.status.clone().unwrap_or_default();
        let now = Instant::now();
        let slot = {
            let mut slots = self.shared.lock();
            let slot =
                slots.entry(uid.clone()).or_insert_with(|| Arc::new(Slot::new(uid, Key::of(&pod.metadata), now)));
            slot.clone()
        };
        let needs_writer = {
            let mut state = slot.lock();
            let is_new = state.count == 0;
            let before = if is_new { Arc::new(old) } else { state.wanted.clone() };
            // What has waited goes on to wait from when it came.
            let due = if diff::is_urgent(&before, &status) { now } else { now + HOLD };
            state.due = if state.is_clean() { due } else { due.min(state.due) };
            state.wanted = Arc::new(status);
            state.count += 1;
            !std::mem::replace(&mut state.has_writer, true)
        };
        slot.news.notify_one();
        if needs_writer {
            self.spawn(slot);
        }
    }

    /// Writes what has been put for this pod, if that is not done yet.
    ///
    /// # Errors
    /// The server's; the status is kept, and tried again.
    pub(super) async fn settle(&self, uid: &str) -> Result<(), ApiError> {
        let slot = self.shared.lock().get(uid).cloned();
        match slot {
            Some(slot) => self.shared.write(&slot).await,
            None => Ok(()),
        }
    }

    /// Writes everything that has been put; failures stay for the next daemon to find out.
    pub(super) async fn settle_all(&self) {
        let slots: Vec<Arc<Slot>> = self.shared.lock().values().cloned().collect();
        for slot in slots {
            if let Err(error) = self.shared.write(&slot).await {
                tracing::warn!(pod = %slot.key, %error, "the last status of a pod was not written");
            }
        }
    }

    /// The pod of this name is `there`, in this version, or gone: statuses of others of its name are nobody's any more, and
    /// its own may be another than the kubelet wants.
    pub(super) fn keep_only(&self, key: &Key, there: Option<&Pod>) {
        let uid = there.and_then(|pod| pod.metadata.uid.as_deref());
        self.shared.lock().retain(|known, slot| slot.key != *key || Some(known.as_str()) == uid);
        if let (Some(pod), Some(uid)) = (there, uid) {
            let slot = self.shared.lock().get(uid).cloned();
            slot.into_iter().for_each(|slot| self.look(slot, pod));
        }
    }

    /// The server has a new version of a pod: is its status still what the kubelet wants?
    fn look(&self, slot: Arc<Slot>, pod: &Pod) {
        let needs_writer = {
            let mut state = slot.lock();
            let is_news = state.base.as_ref().is_none_or(|(known, _)| *known < version(pod));
            // The table knows as much from here on.
            state.base.take_if(|(known, _)| *known <= version(pod));
            let theirs = pod.status.clone().unwrap_or_default();
            if !state.is_clean() || !is_news || diff::status_patch(&theirs, &state.wanted).is_none() {
                return;
            }
            state.count += 1;
            state.due = Instant::now() + HOLD;
            !std::mem::replace(&mut state.has_writer, true)
        };
        if needs_writer {
            self.spawn(slot);
        }
    }

    fn spawn(&self, slot: Arc<Slot>) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended leave nothing to look at.
        while tasks.try_join_next().is_some() {}
        let shared = self.shared.clone();
        tasks.spawn(async move { shared.keep_writing(slot).await });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes until nothing is left to be written.
    async fn keep_writing(&self, slot: Arc<Slot>) {
        let mut backoff = Backoff::new();
        let mut returns = self.api.returns();
        let mut told = String::new();
        loop {
            slot.hold().await;
            returns.mark_unchanged();
            let error = match self.write(&slot).await {
                Ok(()) if slot.rests() => return,
                Ok(()) => {
                    backoff.reset();
                    continue;
                }
                Err(error) => error,
            };
            match &error {
                // Nobody needs it any more; what is left goes with the pod.
                ApiError::NotFound { .. } => return slot.give_up(),
                ApiError::Invalid { .. } => {
                    tracing::error!(pod = %slot.key, %error, "the API server will not take the status of a pod");
                    return slot.give_up();
                }
                ApiError::Unreachable { .. } | ApiError::Lost { .. } => {}
                error if error.to_string() == told => {}
                error => tracing::warn!(pod = %slot.key, %error, "the status of a pod cannot be written; trying again"),
            }
            told = error.to_string();
            let wait = backoff.wait(random()).max(error.retry_after().unwrap_or_default());
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // The sender lives in the client.
                _ = returns.changed() => {}
            }
        }
    }

    /// Writes what is wanted by now; does nothing when that is written.
    async fn write(&self, slot: &Slot) -> Result<(), ApiError> {
        let _one_at_a_time = slot.writing.lock().await;
        let mut conflicts = 0;
        while let Some((count, patch)) = self.next(slot) {
            let Some(patch) = patch else {
                slot.lock().written = count;
                continue;
            };
            let sent = {
                let _turn = self.writers.acquire().await;
                self.api.patch::<Pod>(&slot.key, &patch).await
            };
            match sent {
                Ok(pod) => slot.took(count, &pod),
                Err(ApiError::Conflict { .. }) if conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                    self.read(slot).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What is wanted and not written, and how to get there; no patch when the server has it already.
    fn next(&self, slot: &Slot) -> Option<(u64, Option<Patch>)> {
        let mut state = slot.lock();
        if state.is_clean() {
            return None;
        }
        let there = self.pods.get(&slot.key).filter(|pod| pod.metadata.uid.as_ref() == Some(&slot.uid));
        if let Some(pod) = there
            && state.base.as_ref().is_none_or(|(known, _)| *known < version(&pod))
        {
            state.base = Some((version(&pod), Arc::new(pod.status.clone().unwrap_or_default())));
        }
        let base = state.base.as_ref().map(|(_, status)| status.clone()).unwrap_or_default();
        let patch = diff::status_patch(&base, &state.wanted);
        let patch =
            patch.map(|status| Patch::strategic(json!({"metadata": {"uid": slot.uid}, "status": status})).status());
        Some((state.count, patch))
    }

    /// Reads the pod anew. Another one of this name is as good as none.
    async fn read(&self, slot: &Slot) -> Result<(), ApiError> {
        let pod = self.api.get::<Pod>(&slot.key).await?;
        if pod.metadata.uid.as_ref() != Some(&slot.uid) {
            return Err(ApiError::NotFound { message: format!("pod {} is another one now", slot.key) });
        }
        slot.lock().base = Some((version(&pod), Arc::new(pod.status.unwrap_or_default())));
        Ok(())
    }
}

impl Slot {
    fn new(uid: String, key: Key, now: Instant) -> Self {
        let state = State { wanted: Arc::default(), count: 0, written: 0, due: now, base: None, has_writer: false };
        Self { uid, key, state: Mutex::new(state), writing: tokio::sync::Mutex::default(), news: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until what is wanted has to be written.
    async fn hold(&self) {
        loop {
            let due = self.lock().due;
            if due <= Instant::now() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = self.news.notified() => {}
            }
        }
    }

    /// Whether everything is written; then whoever wants more starts another writer.
    fn rests(&self) -> bool {
        let mut state = self.lock();
        state.has_writer = !state.is_clean();
        !state.has_writer
    }

    fn give_up(&self) {
        let mut state = self.lock();
        state.written = state.count;
        state.has_writer = false;
    }

    fn took(&self, count: u64, pod: &Pod) {
        let mut state = self.lock();
        state.written = count;
        state.base = Some((version(pod), Arc::new(pod.status.clone().unwrap_or_default())));
    }
}

impl State {
    fn is_clean(&self) -> bool {
        self.written == self.count
    }
}

/// Versions of one kind can be compared as numbers (KEP-5504).
fn version(pod: &Pod) -> u128 {
    pod.metadata.resource_version.as_deref().and_then(|text| text.parse().ok()).unwrap_or_default()
}
