//! What the runtime says of itself and of its images. A task of its own asks: a runtime that hangs holds up no report of the
//! node, which then says that it is down.

use std::sync::Arc;
use std::time::Duration;

use cri::service::{ImageService, RuntimeService};
use cri::v1;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::node::describe::Handler;

/// For so long a runtime may answer nobody before the node is not ready, as upstream (`maxWaitForContainerRuntime`): it may
/// be restarting.
const DOWN_AFTER: Duration = Duration::from_secs(30);
/// One that does not answer is asked so often, as upstream does it always.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// What it said last.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Said {
    /// Why no pod can run, if so.
    pub(super) trouble: Option<String>,
    pub(super) images: Vec<(Vec<String>, u64)>,
    pub(super) handlers: Vec<Handler>,
    pub(super) supplemental_groups_policy: bool,
}

/// Asks from now on, and tells what was said each time that it is known whether there is an answer. Never returns.
pub(super) async fn ask(
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
    every: Duration,
    tell: watch::Sender<Option<Said>>,
) {
    let mut failing_since = None;
    loop {
        let mut said = tell.borrow().clone();
        let begun = Instant::now();
        match within(runtime.status(v1::StatusRequest::default())).await {
            Ok(status) => {
                failing_since = None;
                let before = said.take().unwrap_or_default();
                let listed = within(images.list_images(v1::ListImagesRequest::default())).await;
                said = Some(read(&status, listed.ok().map_or(before.images, names)));
            }
            Err(cause) => {
                let since = *failing_since.get_or_insert(begun);
                if said.is_none() || since.elapsed() >= DOWN_AFTER {
                    said.get_or_insert_default().trouble = Some(format!("container runtime is down: {cause}"));
                }
            }
        }
        tell.send_replace(said);
        tokio::time::sleep(failing_since.map_or(every, |_| every.min(ASK_AGAIN))).await;
    }
}

/// An answer, or why there is none.
async fn within<T>(answer: impl Future<Output = Result<T, cri::Error>>) -> Result<T, String> {
    match tokio::time::timeout(DOWN_AFTER, answer).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it has not answered for {} s", DOWN_AFTER.as_secs())),
    }
}

fn read(status: &v1::StatusResponse, images: Vec<(Vec<String>, u64)>) -> Said {
    let features = status.features.as_ref();
    Said {
        trouble: trouble(status),
        images,
        handlers: status.runtime_handlers.iter().map(handler).collect(),
        supplemental_groups_policy: features.is_some_and(|features| features.supplemental_groups_policy),
    }
}

fn names(listed: v1::ListImagesResponse) -> Vec<(Vec<String>, u64)> {
    let name = |image: v1::Image| (image.repo_digests.into_iter().chain(image.repo_tags).collect(), image.size);
    listed.images.into_iter().map(name).collect()
}

/// The conditions of CRI without which no pod can run. Others are a runtime's own: containerd tells by one that something
/// it uses will go.
const REQUIRED: [&str; 2] = ["RuntimeReady", "NetworkReady"];

/// What the runtime says against running pods.
fn trouble(status: &v1::StatusResponse) -> Option<String> {
    let conditions = status.status.iter().flat_map(|status| &status.conditions);
    let bad: Vec<String> = conditions
        .filter(|condition| !condition.status && REQUIRED.contains(&condition.r#type.as_str()))
        .map(|condition| format!("{}: {} {}", condition.r#type, condition.reason, condition.message))
        .collect();
    (!bad.is_empty()).then(|| bad.join("; "))
}

fn handler(handler: &v1::RuntimeHandler) -> Handler {
    let features = handler.features.unwrap_or_default();
    Handler {
        name: handler.name.clone(),
        recursive_read_only_mounts: features.recursive_read_only_mounts,
        user_namespaces: features.user_namespaces,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio_util::task::AbortOnDropHandle;

    use super::*;

    /// Whether and how it answers may change at any time.
    struct Fake {
        hangs: watch::Sender<bool>,
        /// So many questions fail at once.
        failures: AtomicU32,
    }

    impl Fake {
        /// One that answers, and what is told of it.
        fn asked() -> (Arc<Self>, watch::Receiver<Option<Said>>, AbortOnDropHandle<()>) {
            let fake = Arc::new(Self { hangs: watch::Sender::new(false), failures: AtomicU32::new(0) });
            let (tell, told) = watch::channel(None);
            let task = tokio::spawn(ask(fake.clone(), fake.clone(), Duration::from_secs(10), tell));
            (fake, told, AbortOnDropHandle::new(task))
        }
    }

    #[async_trait::async_trait]
    impl RuntimeService for Fake {
        async fn status(&self, _: v1::StatusRequest) -> Result<v1::StatusResponse, cri::Error> {
            let _ = self.hangs.subscribe().wait_for(|hangs| !hangs).await;
            let fail = |left: u32| left.checked_sub(1);
            match self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fail) {
                Ok(_) => Err(cri::Error::Unavailable("restarting".to_owned())),
                Err(_) => Ok(v1::StatusResponse::default()),
            }
        }
    }

    #[async_trait::async_trait]
    impl ImageService for Fake {
        async fn list_images(&self, _: v1::ListImagesRequest) -> Result<v1::ListImagesResponse, cri::Error> {
            let image = v1::Image { repo_tags: vec!["i:1".to_owned()], size: 7, ..v1::Image::default() };
            Ok(v1::ListImagesResponse { images: vec![image] })
        }
    }

    fn is_down(said: &Option<Said>) -> bool {
        said.as_ref().is_some_and(|said| said.trouble.is_some())
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_hangs_is_down_until_it_answers() {
        let (fake, mut told, _task) = Fake::asked();
        let first = told.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!((first.trouble, first.images.len()), (None, 1));
        fake.hangs.send_replace(true);
        let down = told.wait_for(is_down).await.unwrap().clone().unwrap();
        assert_eq!(down.trouble.unwrap(), "container runtime is down: it has not answered for 30 s");
        assert_eq!(down.images, first.images, "what it has is not forgotten");
        fake.hangs.send_replace(false);
        told.wait_for(|said| !is_down(said)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_restarts_is_not_down() {
        let (fake, mut told, _task) = Fake::asked();
        told.wait_for(Option::is_some).await.unwrap();
        // The sixth failure is 25 s after the first.
        fake.failures.store(6, Ordering::Relaxed);
        while fake.failures.load(Ordering::Relaxed) > 0 {
            told.changed().await.unwrap();
            assert!(!is_down(&told.borrow_and_update()));
        }
        told.changed().await.unwrap();
        assert!(!is_down(&told.borrow_and_update()));
        fake.failures.store(7, Ordering::Relaxed);
        told.wait_for(is_down).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_never_answered_is_down_at_once() {
        let (fake, mut told, _task) = Fake::asked();
        fake.failures.store(1, Ordering::Relaxed);
        let first = told.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!(first.trouble.unwrap(), "container runtime is down: restarting");
    }

    #[test]
    fn only_what_keeps_pods_from_running_is_trouble() {
        let condition = |name: &str| v1::RuntimeCondition {
            r#type: name.to_owned(),
            status: false,
            reason: "R".to_owned(),
            message: "m".to_owned(),
        };
        let status = |names: &[&str]| v1::StatusResponse {
            status: Some(v1::RuntimeStatus { conditions: names.iter().map(|name| condition(name)).collect() }),
            ..v1::StatusResponse::default()
        };
        assert_eq!(trouble(&status(&["ContainerdHasNoDeprecationWarnings"])), None);
        assert_eq!(
            trouble(&status(&["RuntimeReady", "NetworkReady"])).unwrap(),
            "RuntimeReady: R m; NetworkReady: R m"
        );
    }
}
