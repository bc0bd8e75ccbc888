//! Running containers are kept on the CPUs that they may use: when one gets CPUs of its own, the others leave them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cri::service::RuntimeService;
use cri::v1;
use futures_util::future::join_all;
use tokio::sync::Notify;

use crate::retry::Rests;

/// How long a runtime may take to move a container: then the others are looked at again.
const MOVE_MAX: Duration = Duration::from_secs(10);

/// A container of a pod: the pod's uid, the container's name.
type Name = (String, String);

/// A container that runs, or is about to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    id: String,
    /// The CPUs that it was put on; none if that is not known.
    cpus: Option<String>,
}

/// All containers of the node, by name: of a container that was started again, the newest run.
pub(crate) struct Live {
    runtime: Arc<dyn RuntimeService>,
    runs: Mutex<BTreeMap<Name, Run>>,
    wake: Notify,
}

impl Live {
    pub(crate) fn new(runtime: Arc<dyn RuntimeService>) -> Self {
        Self { runtime, runs: Mutex::default(), wake: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Run>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container is on `cpus`, if that is known.
    pub(crate) fn track(&self, uid: &str, container: &str, id: &str, cpus: Option<String>) {
        self.lock().insert((uid.to_owned(), container.to_owned()), Run { id: id.to_owned(), cpus });
        self.wake();
    }

    /// A pod has ended.
    pub(crate) fn forget(&self, uid: &str) {
        self.lock().retain(|(owner, _), _| owner != uid);
    }

    /// Who may use which CPUs has changed.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Moves containers whenever that has to be, for ever. `usable` says where one may run.
    pub(crate) async fn run(&self, usable: impl Fn(&str, &str) -> String) {
        let mut rests = Rests::new();
        loop {
            self.wake.notified().await;
            while !self.moved_all(&usable).await {
                rests.rest().await;
            }
            rests = Rests::new();
        }
    }

    /// Moves all that are not where they may be; whether all of them are now.
    async fn moved_all(&self, usable: impl Fn(&str, &str) -> String) -> bool {
        let due: Vec<(Name, Run, String)> = {
            let runs = self.lock();
            let wanted = runs.iter().map(|(name, run)| (name.clone(), run.clone(), usable(&name.0, &name.1)));
            wanted.filter(|(_, run, cpus)| !cpus.is_empty() && run.cpus.as_ref() != Some(cpus)).collect()
        };
        join_all(due.into_iter().map(|(name, run, cpus)| self.moved(name, run, cpus)))
            .await
            .into_iter()
            .all(|done| done)
    }

    async fn moved(&self, name: Name, run: Run, cpus: String) -> bool {
        let linux = v1::LinuxContainerResources { cpuset_cpus: cpus.clone(), ..v1::LinuxContainerResources::default() };
        let (container_id, linux) = (run.id.clone(), Some(linux));
        let request = v1::UpdateContainerResourcesRequest { container_id, linux, ..Default::default() };
        let outcome = tokio::time::timeout(MOVE_MAX, self.runtime.update_container_resources(request)).await;
        let fault = match outcome {
            Ok(Ok(_)) => {
                self.settle(&name, &run, Some(Run { cpus: Some(cpus), ..run.clone() }));
                return true;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", MOVE_MAX.as_secs()),
        };
        if !self.is_running(&run.id).await {
            self.settle(&name, &run, None);
            return true;
        }
        let (uid, container) = &name;
        tracing::warn!(uid, container, cpus, fault, "a container cannot be moved to other CPUs; trying again");
        false
    }

    /// What is known of a run now, unless there is another one since.
    fn settle(&self, name: &Name, before: &Run, now: Option<Run>) {
        let mut runs = self.lock();
        if runs.get(name) != Some(before) {
            return;
        }
        match now {
            Some(run) => drop(runs.insert(name.clone(), run)),
            None => drop(runs.remove(name)),
        }
    }

    /// Whether a container has not ended. A runtime that does not answer is asked again.
    async fn is_running(&self, id: &str) -> bool {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        match tokio::time::timeout(MOVE_MAX, self.runtime.container_status(request)).await {
            Ok(Ok(v1::ContainerStatusResponse { status: Some(status), .. })) => {
                status.state != v1::ContainerState::ContainerExited as i32
            }
            Ok(Err(cri::Error::NotFound { .. })) => false,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes what it is told; `gone` has ended.
    #[derive(Default)]
    struct Runtime {
        moves: Mutex<Vec<(String, String)>>,
    }

    #[async_trait::async_trait]
    impl RuntimeService for Runtime {
        async fn update_container_resources(
            &self,
            request: v1::UpdateContainerResourcesRequest,
        ) -> Result<v1::UpdateContainerResourcesResponse, cri::Error> {
            if request.container_id == "gone" {
                return Err(cri::Error::FailedPrecondition("it has ended".to_owned()));
            }
            self.moves.lock().unwrap().push((request.container_id, request.linux.unwrap().cpuset_cpus));
            Ok(v1::UpdateContainerResourcesResponse {})
        }

        async fn container_status(
            &self,
            _: v1::ContainerStatusRequest,
        ) -> Result<v1::ContainerStatusResponse, cri::Error> {
            Err(cri::Error::NotFound { kind: "container", id: "gone".to_owned() })
        }
    }

    #[tokio::test]
    async fn containers_move_when_they_have_to_and_only_then() {
        let runtime = Arc::new(Runtime::default());
        let live = Live::new(runtime.clone());
        live.track("u", "shared", "one", Some("0-3".into()));
        live.track("u", "adopted", "two", None);
        live.track("v", "ended", "gone", None);
        let moves = || std::mem::take(&mut *runtime.moves.lock().unwrap());
        let text = |id: &str, cpus: &str| (id.to_owned(), cpus.to_owned());
        assert!(live.moved_all(|_, _| "0-3".into()).await);
        assert_eq!(moves(), [text("two", "0-3")]);
        assert!(live.moved_all(|_, container| if container == "shared" { "0" } else { "0-3" }.into()).await);
        assert_eq!(moves(), [text("one", "0")]);
        live.forget("u");
        assert!(live.moved_all(|_, _| "7".into()).await);
        assert_eq!(moves(), []);
        assert!(live.lock().is_empty(), "what has ended is forgotten");
    }
}
