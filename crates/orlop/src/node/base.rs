//! What every node has: images, the pods' network, the runtime, and CRI on a socket.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use image::Images;
use image::credentials::Credentials;
use network::Network;
use runtime::{ImageServer, Runtime};
use sys::program::Seal;
use sys::zygote::Zygote;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::settings::Settings;
use super::tasks::Tasks;

/// The processes that have to be forked before there is a thread.
pub(crate) struct Forked {
    pub(super) zygote: Arc<Zygote>,
}

/// What the zygote can start.
struct Helpers;

impl sys::zygote::Helpers for Helpers {
    const ALL: &'static [sys::zygote::Helper] = &[keeper::HELPER, network::dns::HELPER];
}

impl Forked {
    /// Forks them.
    pub(crate) fn new() -> anyhow::Result<Self> {
        match sys::program::own_seal()? {
            Some(Seal::Mount) => {}
            Some(Seal::Memory) => tracing::warn!(
                "the program's file cannot be mounted here; a copy in memory runs, and takes its room there"
            ),
            None => anyhow::bail!("a daemon seals its program first"),
        }
        let zygote = Zygote::start::<Helpers>();
        let zygote = zygote.context("fork the process that keepers and the name server come from")?;
        Ok(Self { zygote: Arc::new(zygote) })
    }
}

/// The runtime's side of a node.
pub(crate) struct Base {
    pub(super) images: Arc<Images>,
    pub(super) credentials: Arc<Credentials>,
    pub(super) network: Arc<Network>,
    pub(super) runtime: Arc<Runtime>,
    pub(super) image_service: Arc<ImageServer>,
    /// What it does for clients beyond an answer.
    pub(super) tasks: Tasks,
    /// Nobody is served any more.
    pub(super) stopped: CancellationToken,
    /// CRI's server.
    cri: JoinHandle<()>,
    /// Removes images that nobody uses when the disk fills.
    collector: JoinHandle<()>,
}

impl Base {
    /// Adopts what runs and answers on the CRI socket.
    pub(crate) async fn start(
        settings: &Settings,
        network: network::Config,
        zygote: Arc<Zygote>,
    ) -> anyhow::Result<Self> {
        let layout = &settings.layout;
        let mut config = image::Config::new(layout.images());
        config.registry_config_dirs.clone_from(&settings.registry_config_dirs);
        config.docker_configs.clone_from(&settings.credentials.docker_configs);
        let images = Images::open(config)?;
        let credentials = Arc::new(Credentials::new(settings.credentials.clone())?);
        let network = Network::new(network)?;
        let parts = runtime::Parts { images: images.clone(), network: network.clone(), zygote: zygote.into() };
        let mut config = runtime::Config::new(&layout.state_dir, &layout.run_dir);
        config.cgroup_parent = layout.group.clone().into();
        let runtime = Runtime::start(config, parts).await?;
        let stopped = CancellationToken::new();
        let listener = cri::server::bind(&settings.cri_socket).await?;
        let image_service = Arc::new(ImageServer::new(images.clone(), runtime.clone()));
        let served = cri::server::serve(listener, runtime.for_clients(), image_service.clone(), stopped.clone());
        let cri = tokio::spawn(served);
        let collector = tokio::spawn(collect_images(image_service.clone(), settings.image_gc.clone()));
        Ok(Self {
            images,
            credentials,
            network,
            runtime,
            image_service,
            tasks: Tasks::default(),
            stopped,
            cri,
            collector,
        })
    }

    /// Answers nobody any more; what runs goes on.
    pub(crate) async fn stop(&self) {
        self.stopped.cancel();
        self.cri.abort();
        self.collector.abort();
        self.tasks.end().await;
        self.runtime.leave_group();
    }
}

/// Looks at the disk as often as upstream's kubelet does: how full it is, no event tells.
async fn collect_images(images: Arc<ImageServer>, policy: image::GcPolicy) {
    const PERIOD: Duration = Duration::from_secs(300);
    loop {
        tokio::time::sleep(PERIOD).await;
        match images.collect_garbage(&policy).await {
            Ok(reclaimed) if reclaimed.images.is_empty() && reclaimed.missing_bytes == 0 => {}
            Ok(reclaimed) => tracing::warn!(
                images = reclaimed.images.len(),
                bytes = reclaimed.bytes,
                missing_bytes = reclaimed.missing_bytes,
                "the disk is filling; images that nobody uses were removed"
            ),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "images cannot be collected"),
        }
    }
}

/// The pods' network of a node with these settings, without Services.
pub(super) fn network_config(settings: &Settings) -> network::Config {
    let layout = &settings.layout;
    network::Config {
        cni_conf_dir: settings.cni_conf_dir.clone(),
        cni_bin_dirs: vec![settings.cni_bin_dir.clone()],
        cni_state_dir: layout.state_dir.join("cni"),
        bridge: layout.bridge.clone(),
        subnets: settings.pods.to_string().parse().into_iter().collect(),
        table: layout.pod_table.clone(),
        ..network::Config::new(layout.run_dir.join("network"))
    }
}
