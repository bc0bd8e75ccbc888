//! How long another runtime may take for a call, as upstream's kubelet has it (`runtimeRequestTimeout`).

use std::any::Any;
use std::time::Duration;

use crate::v1;

/// The limit of one call, where `usual` is that of most. None for what takes as long as it takes: a pull, and a command
/// without a time of its own.
pub(crate) fn of(request: &dyn Any, usual: Duration) -> Option<Duration> {
    if request.is::<v1::PullImageRequest>() {
        return None;
    }
    if request.is::<v1::RunPodSandboxRequest>() {
        return Some(usual.saturating_mul(2));
    }
    if let Some(stop) = request.downcast_ref::<v1::StopContainerRequest>() {
        return Some(usual.saturating_add(seconds(stop.timeout)));
    }
    if let Some(exec) = request.downcast_ref::<v1::ExecSyncRequest>() {
        return (exec.timeout > 0).then(|| usual.saturating_add(seconds(exec.timeout)));
    }
    if let Some(checkpoint) = request.downcast_ref::<v1::CheckpointContainerRequest>() {
        return Some(usual.max(seconds(checkpoint.timeout)));
    }
    Some(usual)
}

fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_upstreams_limits() {
        let check = |request: &dyn Any, expect: Option<u64>| {
            assert_eq!(of(request, Duration::from_secs(120)), expect.map(Duration::from_secs));
        };
        check(&v1::StatusRequest::default(), Some(120));
        check(&v1::RunPodSandboxRequest::default(), Some(240));
        check(&v1::PullImageRequest::default(), None);
        let stop = |timeout| v1::StopContainerRequest { timeout, ..Default::default() };
        check(&stop(30), Some(150));
        check(&stop(-1), Some(120));
        let exec = |timeout| v1::ExecSyncRequest { timeout, ..Default::default() };
        check(&exec(5), Some(125));
        check(&exec(0), None);
        let checkpoint = |timeout| v1::CheckpointContainerRequest { timeout, ..Default::default() };
        check(&checkpoint(600), Some(600));
        check(&checkpoint(1), Some(120));
    }
}
