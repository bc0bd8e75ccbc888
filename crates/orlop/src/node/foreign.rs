//! Another program as the node's runtime: containerd or CRI-O, by its CRI socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cri::{Client, ImageService as _, RuntimeService as _, v1};
use kubelet::qos::Driver;
use tokio::time::Instant;

use super::base::Identity;

/// A runtime that is started at the same time may take so long until it answers.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(250);

/// Where the other program listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// `containerRuntimeEndpoint`.
    pub(crate) runtime: PathBuf,
    /// `imageServiceEndpoint`, or the same.
    pub(crate) images: PathBuf,
    /// `runtimeRequestTimeout`.
    pub(crate) timeout: Duration,
}

/// Both services of it.
pub(super) struct Services {
    pub(super) runtime: Arc<Client>,
    pub(super) images: Arc<Client>,
    pub(super) identity: Identity,
    /// Who makes its control groups; older runtimes do not know the question.
    pub(super) cgroup_driver: Option<Driver>,
    /// Where the images are; an empty path where it does not tell.
    pub(super) image_root: PathBuf,
    /// Where what containers write is; where the images are, where it does not tell.
    pub(super) container_root: PathBuf,
}

/// Waits until it answers.
///
/// # Errors
/// It does not.
pub(super) async fn connect(endpoint: &Endpoint) -> anyhow::Result<Services> {
    let client = |socket| Ok::<_, cri::Error>(Arc::new(Client::new(socket)?.with_timeout(endpoint.timeout)));
    let runtime = client(&endpoint.runtime)?;
    let images = if endpoint.images == endpoint.runtime { runtime.clone() } else { client(&endpoint.images)? };
    let told = version(&runtime, &endpoint.runtime).await?;
    let identity = Identity { name: told.runtime_name, version: told.runtime_version };
    tracing::info!(name = identity.name, version = identity.version, "pods run on another runtime");
    let asked = answered(async || runtime.runtime_config(v1::RuntimeConfigRequest::default()).await).await;
    let config = match asked {
        Err(cri::Error::Unimplemented { .. }) => None,
        // Another driver than the one that it has would be another tree than that of the pods that run.
        other => Some(other.context("ask the runtime who makes its control groups")?),
    };
    let cgroup_driver = config.and_then(|config| config.linux).map(|linux| match linux.cgroup_driver() {
        v1::CgroupDriver::Systemd => Driver::Systemd,
        v1::CgroupDriver::Cgroupfs => Driver::Cgroupfs,
    });
    let told = answered(async || images.image_fs_info(v1::ImageFsInfoRequest::default()).await).await;
    let told = told.unwrap_or_else(|error| {
        tracing::warn!(%error, "the runtime does not tell where its images are: nobody is evicted for want of their disk");
        v1::ImageFsInfoResponse::default()
    });
    let image_root = place_of(told.image_filesystems).unwrap_or_default();
    // Upstream takes the first of each list, too.
    let container_root = place_of(told.container_filesystems).unwrap_or_else(|| image_root.clone());
    Ok(Services { runtime, images, identity, cgroup_driver, image_root, container_root })
}

fn place_of(systems: Vec<v1::FilesystemUsage>) -> Option<PathBuf> {
    systems.into_iter().find_map(|system| Some(system.fs_id?.mountpoint.into()))
}

async fn version(client: &Client, socket: &Path) -> anyhow::Result<v1::VersionResponse> {
    let told = answered(async || client.version(v1::VersionRequest::default()).await).await;
    told.with_context(|| {
        format!(
            "no runtime answers on unix://{}; start it, or leave out `containerRuntimeEndpoint` for orlop's own",
            socket.display()
        )
    })
}

/// Asks until somebody is there, for a while.
async fn answered<T>(ask: impl AsyncFn() -> Result<T, cri::Error>) -> Result<T, cri::Error> {
    let until = Instant::now() + ANSWERS_WITHIN;
    loop {
        match ask().await {
            Err(cri::Error::Unavailable(_)) if Instant::now() < until => tokio::time::sleep(RETRY).await,
            answer => return answer,
        }
    }
}
