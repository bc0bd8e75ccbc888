//! `/containerLogs`: which run's log is meant, and its bytes.

use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use cri::{RuntimeService, v1};
use futures_util::{StreamExt as _, TryStreamExt as _};
use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use pod::spec;

use super::{Answer, Api, Body, Failure, Query};
use crate::logs::{self, Options};
use crate::paths::Paths;

impl Api {
    pub(super) async fn container_logs(&self, pod: &Pod, container: &str, query: &Query) -> Answer {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        if spec::container(pod, container).is_none() {
            return Err(Failure::bad_request(format!("container {container} is not valid for pod {name}")));
        }
        let options = options(query).map_err(Failure::bad_request)?;
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let dir = self.paths.pod_logs(namespace, name, pod.metadata.uid.as_deref().unwrap_or_default());
        let files = dir.join(container);
        let listed = tokio::task::spawn_blocking(move || logs::attempts(&files)).await;
        let attempts = listed.map_err(|error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        let attempt = choose(pod, container, &attempts, query.is_set("previous")).map_err(Failure::bad_request)?;
        let running = self.container_id(pod, container, Some(v1::ContainerState::ContainerRunning)).await?;
        // An older run has ended, whatever runs now.
        let follow = options.follow && attempts.last() == Some(&attempt) && running.is_some();
        let ended = ended(self.runtime.clone(), running.unwrap_or_default());
        let path = dir.join(Paths::container_log(container, attempt));
        let content = logs::stream(self.followed.clone(), path, Options { follow, ..options }, ended);
        // A failure in the middle can only end the answer: its status has been sent.
        let content = content.inspect_err(|error| tracing::warn!(%error, "cannot read a container's log"));
        let frames = content.scan((), |(), chunk| ready(chunk.ok())).map(|bytes| Ok(Frame::data(bytes)));
        let body: Body = StreamBody::new(frames).boxed_unsync();
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::OK;
        let kind = http::HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
        Ok(response)
    }
}

fn options(query: &Query) -> Result<Options, String> {
    let seconds: Option<i64> = query.number("sinceSeconds")?;
    let since_time = query.get("sinceTime").map(|text| text.parse::<Timestamp>());
    let since_time = since_time.transpose().map_err(|error| format!("sinceTime: {error}"))?;
    let ago = seconds.and_then(|seconds| Timestamp::now().checked_sub(SignedDuration::from_secs(seconds)).ok());
    Ok(Options {
        follow: query.is_set("follow"),
        tail_lines: query.number("tailLines")?,
        since: ago.or(since_time),
        timestamps: query.is_set("timestamps"),
        limit_bytes: query.number("limitBytes")?,
    })
}

/// The run whose log is meant, of those that left one: as upstream, while a container waits to be restarted its last
/// run counts as the current *and* as the previous one.
fn choose(pod: &Pod, container: &str, attempts: &[u32], previous: bool) -> Result<u32, String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let state = status_of(pod, container).and_then(|status| status.state.as_ref());
    let waiting = state.and_then(|state| state.waiting.as_ref());
    let from_end = if previous && waiting.is_none() { 2 } else { 1 };
    let chosen = attempts.len().checked_sub(from_end).and_then(|index| attempts.get(index));
    chosen.copied().ok_or_else(|| match waiting.and_then(|waiting| waiting.reason.as_deref()) {
        _ if previous => format!("previous terminated container {container:?} in pod {name:?} not found"),
        Some(reason) => format!("container {container:?} in pod {name:?} is waiting to start: {reason}"),
        None => format!("container {container:?} in pod {name:?} is waiting to start"),
    })
}

fn status_of<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let all = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    all.into_iter().flatten().flatten().find(|status| status.name == container)
}

/// How often a runtime without events is asked whether a container still runs.
const ASK: Duration = Duration::from_secs(1);

/// Waits for a container's end.
async fn ended(runtime: Arc<dyn RuntimeService>, id: String) {
    let Ok(mut events) = runtime.get_container_events(v1::GetEventsRequest {}).await else {
        while is_running(&*runtime, &id).await {
            tokio::time::sleep(ASK).await;
        }
        return;
    };
    // It may have ended before the events began.
    while is_running(&*runtime, &id).await {
        match events.next().await {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return,
        }
    }
}

async fn is_running(runtime: &dyn RuntimeService, id: &str) -> bool {
    let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    let status = runtime.container_status(request).await.ok().and_then(|answer| answer.status);
    status.is_some_and(|status| status.state == i32::from(v1::ContainerState::ContainerRunning))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn which_run_is_meant() {
        let pod = |state: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": "p"}, "status": {"containerStatuses": [
                {"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 1, "state": state}]}}))
            .unwrap()
        };
        let running = pod(json!({"running": {}}));
        let waiting = pod(json!({"waiting": {"reason": "CrashLoopBackOff"}}));
        assert_eq!(choose(&running, "c", &[0, 1], false), Ok(1));
        assert_eq!(choose(&running, "c", &[0, 1], true), Ok(0));
        assert_eq!(choose(&waiting, "c", &[0, 1], false), Ok(1));
        assert_eq!(choose(&waiting, "c", &[0, 1], true), Ok(1));
        let missing = choose(&waiting, "c", &[], false).unwrap_err();
        assert_eq!(missing, r#"container "c" in pod "p" is waiting to start: CrashLoopBackOff"#);
        let missing = choose(&running, "c", &[0], true).unwrap_err();
        assert_eq!(missing, r#"previous terminated container "c" in pod "p" not found"#);
    }
}
