//! Rotation of the logs that another runtime writes, by the names that upstream's kubelet gives: `0.log.20260102-030405`.
//!
//! No event tells that a file has grown over a limit, so it is looked at as often as upstream does. Nothing is compressed:
//! what is kept is bounded by number and size already.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cri::{RuntimeService, v1};
use futures_util::StreamExt as _;
use k8s_openapi::jiff::Timestamp;

use crate::configuration::LogLimits;

pub(super) async fn keep(runtime: Arc<dyn RuntimeService>, limits: LogLimits) {
    let mut paths = Paths::new();
    loop {
        tokio::time::sleep(limits.look_every).await;
        if let Err(error) = rotate_all(&*runtime, limits, &mut paths).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the logs of containers cannot be looked at");
        }
    }
}

/// Where running containers log, by their ids.
type Paths = HashMap<String, PathBuf>;

async fn rotate_all(runtime: &dyn RuntimeService, limits: LogLimits, known: &mut Paths) -> Result<(), cri::Error> {
    let state = v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning.into() };
    let filter = v1::ContainerFilter { state: Some(state), ..v1::ContainerFilter::default() };
    let running = runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) }).await?.containers;
    let mut paths = Paths::new();
    for v1::Container { id, .. } in running {
        let path = match known.remove(&id) {
            Some(path) => path,
            None => match log_path(runtime, &id).await {
                Ok(path) => path,
                Err(cri::Error::NotFound { .. }) => continue, // It has just been removed.
                Err(error) => {
                    tracing::warn!(id, %error, "where a container logs is not known");
                    continue;
                }
            },
        };
        paths.insert(id, path);
    }
    let large = paths.iter().filter(|(_, path)| path.metadata().is_ok_and(|facts| facts.len() > limits.bytes_max));
    let rotations = futures_util::stream::iter(large);
    let rotations = rotations.for_each_concurrent(limits.workers, async |(id, path)| {
        if let Err(error) = rotate(runtime, id, path, limits.files_max).await {
            tracing::warn!(log = %path.display(), %error, "a log cannot be rotated");
        }
    });
    rotations.await;
    *known = paths;
    Ok(())
}

async fn log_path(runtime: &dyn RuntimeService, container_id: &str) -> Result<PathBuf, cri::Error> {
    let request = v1::ContainerStatusRequest { container_id: container_id.to_owned(), verbose: false };
    let status = runtime.container_status(request).await?.status;
    Ok(status.map(|status| status.log_path.into()).unwrap_or_default())
}

/// Moves the log away and has the runtime begin another. One that the runtime does not leave stays where it was.
async fn rotate(runtime: &dyn RuntimeService, id: &str, path: &Path, files_max: u32) -> Result<(), String> {
    let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
    let aside = PathBuf::from(format!("{}.{stamp}", path.display()));
    std::fs::rename(path, &aside).map_err(|error| error.to_string())?;
    let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
    if let Err(error) = runtime.reopen_container_log(request).await {
        std::fs::rename(&aside, path).map_err(|error| error.to_string())?;
        return Err(error.to_string());
    }
    let rotated = rotated(path).map_err(|error| error.to_string())?;
    // The log itself is one of the files.
    let kept = usize::try_from(files_max).unwrap_or(usize::MAX).saturating_sub(1);
    for old in &rotated[..rotated.len().saturating_sub(kept)] {
        std::fs::remove_file(old).map_err(|error| format!("{}: {error}", old.display()))?;
    }
    Ok(())
}

/// The rotated files of a log, oldest first.
fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Vec::new()) };
    let begin = format!("{}.", name.to_string_lossy());
    let entries = std::fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    let ours = entries.into_iter().filter(|entry| entry.file_name().to_string_lossy().starts_with(&begin));
    let mut files: Vec<PathBuf> = ours.map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;

    use super::*;

    /// A runtime with one container, which writes on into the file that it has open.
    struct Writer {
        log: PathBuf,
        open: Mutex<std::fs::File>,
        is_stuck: bool,
    }

    impl Writer {
        fn new(log: PathBuf, is_stuck: bool) -> Self {
            let open = Mutex::new(std::fs::File::create(&log).unwrap());
            Self { log, open, is_stuck }
        }

        fn write(&self, bytes: usize) {
            std::io::Write::write_all(&mut *self.open.lock().unwrap(), &vec![b'x'; bytes]).unwrap();
        }
    }

    #[async_trait]
    impl RuntimeService for Writer {
        async fn list_containers(
            &self,
            _: v1::ListContainersRequest,
        ) -> Result<v1::ListContainersResponse, cri::Error> {
            Ok(v1::ListContainersResponse { containers: vec![v1::Container { id: "c".into(), ..Default::default() }] })
        }

        async fn container_status(
            &self,
            _: v1::ContainerStatusRequest,
        ) -> Result<v1::ContainerStatusResponse, cri::Error> {
            let log_path = self.log.to_string_lossy().into_owned();
            let status = Some(v1::ContainerStatus { log_path, ..Default::default() });
            Ok(v1::ContainerStatusResponse { status, ..Default::default() })
        }

        async fn reopen_container_log(
            &self,
            _: v1::ReopenContainerLogRequest,
        ) -> Result<v1::ReopenContainerLogResponse, cri::Error> {
            if self.is_stuck {
                return Err(cri::Error::FailedPrecondition("stuck".to_owned()));
            }
            *self.open.lock().unwrap() = std::fs::File::create(&self.log).unwrap();
            Ok(v1::ReopenContainerLogResponse::default())
        }
    }

    fn sizes(dir: &Path) -> Vec<u64> {
        let mut sizes: Vec<u64> =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).collect();
        sizes.sort_unstable();
        sizes
    }

    #[tokio::test]
    async fn a_log_over_its_limit_begins_anew_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (limits, mut paths) = (LogLimits { bytes_max: 100, files_max: 3, ..LogLimits::default() }, Paths::new());
        for old in ["20250101-000000", "20250102-000000"] {
            std::fs::write(dir.path().join(format!("0.log.{old}")), old).unwrap();
        }
        let writer = Writer::new(dir.path().join("0.log"), false);
        writer.write(100);
        rotate_all(&writer, limits, &mut paths).await.unwrap();
        assert_eq!(sizes(dir.path()), [15, 15, 100], "just within it");
        writer.write(1);
        rotate_all(&writer, limits, &mut paths).await.unwrap();
        assert_eq!(sizes(dir.path()), [0, 15, 101]);
        assert!(!dir.path().join("0.log.20250101-000000").exists(), "the oldest");
    }

    #[tokio::test]
    async fn a_log_that_the_runtime_does_not_leave_stays() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::new(dir.path().join("0.log"), true);
        writer.write(101);
        let limits = LogLimits { bytes_max: 100, files_max: 3, ..LogLimits::default() };
        rotate_all(&writer, limits, &mut Paths::new()).await.unwrap();
        writer.write(1);
        assert_eq!(writer.log.metadata().unwrap().len(), 102);
        assert_eq!(sizes(dir.path()), [102]);
    }
}
