//! What becomes of pods, and when: one watch, in a thread of its own.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use serde_json::Value;
use testkit::api::Api;

use super::work::NAMESPACE;

/// How long a watch may last; longer than any run.
const WATCH_LIMIT: Duration = Duration::from_secs(3600);

/// How far a pod has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Running,
    Ready,
    Gone,
}

/// A pod that has come to a stage.
#[derive(Debug)]
struct Sight {
    pod: String,
    stage: Stage,
    at: Instant,
}

/// Sees all pods of the namespace.
#[derive(Debug)]
pub(super) struct Watcher {
    sights: Receiver<Sight>,
    /// It ends with the API server at the latest; taken when it has ended before.
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    /// When each pod came to each stage first.
    seen: HashMap<(String, Stage), Instant>,
}

impl Watcher {
    /// Begins to watch; what happens from now on is seen.
    pub(super) fn start(api: &Api) -> anyhow::Result<Self> {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        let list = api.get(&path)?;
        let version = list["metadata"]["resourceVersion"].as_str().context("a list has a version")?;
        let (tell, sights) = channel();
        let (api, version) = (api.clone(), version.to_owned());
        let thread = std::thread::spawn(move || watch(&api, &path, version, &tell));
        Ok(Self { sights, thread: Some(thread), seen: HashMap::new() })
    }

    /// Waits until each of `pods` has come to `stage`; when each of them did.
    pub(super) fn wait(&mut self, pods: &[String], stage: Stage, limit: Duration) -> anyhow::Result<Vec<Instant>> {
        let deadline = Instant::now() + limit;
        loop {
            let times: Vec<Instant> =
                pods.iter().filter_map(|pod| self.seen.get(&(pod.clone(), stage)).copied()).collect();
            if times.len() == pods.len() {
                return Ok(times);
            }
            match self.sights.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Sight { pod, stage, at }) => drop(self.seen.entry((pod, stage)).or_insert(at)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{} of {} pods are {stage:?} after {} s", times.len(), pods.len(), limit.as_secs())
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.failure()),
            }
        }
    }

    /// Why there is nothing to see any more.
    fn failure(&mut self) -> anyhow::Error {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error.context("the watch of pods"),
            _ => anyhow!("the watch of pods has ended"),
        }
    }
}

/// Tells of every change until nobody listens. The server ends watches that it cannot feed fast enough; they go on where
/// they ended, as every client's.
fn watch(api: &Api, path: &str, mut version: String, tell: &Sender<Sight>) -> anyhow::Result<()> {
    let limit = WATCH_LIMIT.as_secs();
    loop {
        let mut has_heard = false;
        let path = format!("{path}?watch=1&timeoutSeconds={limit}&resourceVersion={version}");
        let ended = api.watch(&path, WATCH_LIMIT, |event| {
            let at = Instant::now();
            has_heard = true;
            let metadata = &event["object"]["metadata"];
            metadata["resourceVersion"].as_str().unwrap_or_default().clone_into(&mut version);
            let pod = metadata["name"].as_str().unwrap_or_default();
            stages(event).any(|stage| tell.send(Sight { pod: pod.to_owned(), stage, at }).is_err())
        });
        if ended.is_ok() || !has_heard {
            return ended;
        }
    }
}

/// The stages that a pod is at, by an event about it.
fn stages(event: &Value) -> impl Iterator<Item = Stage> {
    let (status, is_gone) = (&event["object"]["status"], event["type"] == "DELETED");
    let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_ready = conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True");
    let stages = [
        (Stage::Running, !is_gone && status["phase"] == "Running"),
        (Stage::Ready, !is_gone && is_ready),
        (Stage::Gone, is_gone),
    ];
    stages.into_iter().filter_map(|(stage, holds)| holds.then_some(stage))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_tells_the_stages() {
        let event = |kind: &str, phase: &str, ready: &str| {
            let status = json!({ "phase": phase, "conditions": [{ "type": "Ready", "status": ready }] });
            stages(&json!({ "type": kind, "object": { "status": status } })).collect::<Vec<_>>()
        };
        assert_eq!(event("ADDED", "Pending", "False"), []);
        assert_eq!(event("MODIFIED", "Running", "False"), [Stage::Running]);
        assert_eq!(event("MODIFIED", "Running", "True"), [Stage::Running, Stage::Ready]);
        assert_eq!(event("DELETED", "Running", "True"), [Stage::Gone]);
    }
}
