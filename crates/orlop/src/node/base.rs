//! What every node has: images, the pods' network, the runtime, and CRI on a socket; or the client of another program that
//! is the runtime.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use cri::{ImageService, RuntimeService};
use image::Images;
use image::credentials::Credentials;
use kubelet::configuration::{ImageGc, LogLimits};
use kubelet::node::eviction::Reclaim;
use kubelet::qos::Driver;
use kubelet::upkeep::{self, Upkeep};
use network::Network;
use runtime::{ImageServer, Runtime};
use sys::program::Seal;
use sys::zygote::Zygote;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::foreign::{self, Endpoint, Services};
use super::format;
use super::settings::{Agent, Settings};
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
    pub(super) runtime: Arc<dyn RuntimeService>,
    pub(super) image_service: Arc<dyn ImageService>,
    pub(super) credentials: Arc<Credentials>,
    /// None where another program is the runtime.
    own: Option<Own>,
    /// That program's socket.
    other: PathBuf,
    pub(super) identity: Identity,
    /// Who makes the control groups of containers; none where it does not tell.
    pub(super) cgroup_driver: Option<Driver>,
    /// Where images are.
    pub(super) image_root: PathBuf,
    /// Where what containers write is.
    pub(super) container_root: PathBuf,
    /// What it does for clients beyond an answer.
    pub(super) tasks: Tasks,
    /// Nobody is served any more.
    pub(super) stopped: CancellationToken,
    /// Why images stay on a disk that fills.
    pub(super) image_trouble: watch::Receiver<Option<upkeep::ImageTrouble>>,
    /// Removes images that nobody uses when the disk fills, and does whatever else nobody else does.
    collector: Option<JoinHandle<()>>,
}

/// How a runtime calls itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) version: String,
}

/// This program as the runtime.
pub(super) struct Own {
    pub(super) images: Arc<Images>,
    pub(super) network: Arc<Network>,
    pub(super) runtime: Arc<Runtime>,
    pub(super) image_server: Arc<ImageServer>,
    /// CRI's server.
    cri: JoinHandle<()>,
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
        let credentials = credentials(settings)?;
        let network = Network::new(network)?;
        let parts = runtime::Parts { images: images.clone(), network: network.clone(), zygote: zygote.into() };
        let mut config = runtime::Config::new(&layout.state_dir, &layout.run_dir);
        config.cgroup_parent = layout.group.clone().into();
        let LogLimits { bytes_max, files_max, .. } = settings.log_limits;
        let is_own = settings.agent == Agent::Own;
        config.log_limits = is_own.then_some(runtime::LogLimits { bytes_max, files_max });
        config.parents_from_top = !is_own;
        config.handlers.clone_from(&settings.runtime.handlers);
        config.nri = settings.runtime.nri(layout);
        config.device_ownership_from_security_context = settings.runtime.device_ownership_from_security_context;
        let runtime = Runtime::start(config, parts).await?;
        format::note(layout)?;
        let stopped = CancellationToken::new();
        let listener = cri::server::bind(&settings.cri_socket).await?;
        let image_server = Arc::new(ImageServer::new(images.clone(), runtime.clone()));
        let clients = runtime.for_clients();
        let served =
            cri::server::serve_with_tasks(listener, clients.clone(), image_server.clone(), clients, stopped.clone());
        let cri = tokio::spawn(served);
        let (trouble, image_trouble) = watch::channel(None);
        let shortage = upkeep::Shortage::new(trouble);
        let collector = is_own.then(|| collect_images(image_server.clone(), policy_of(settings.image_gc), shortage));
        Ok(Self {
            runtime: runtime.clone(),
            image_service: image_server.clone(),
            credentials,
            own: Some(Own { images, network, runtime, image_server, cri }),
            other: PathBuf::new(),
            identity: Identity { name: "orlop".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() },
            cgroup_driver: Some(Driver::Cgroupfs),
            image_root: layout.images(),
            container_root: layout.images(),
            tasks: Tasks::default(),
            stopped,
            image_trouble,
            collector: collector.map(tokio::spawn),
        })
    }

    /// Connects to another runtime, which may still be starting itself.
    pub(crate) async fn connect(settings: &Settings, endpoint: &Endpoint) -> anyhow::Result<Self> {
        let Services { runtime, images, identity, cgroup_driver, image_root, container_root } =
            foreign::connect(endpoint).await?;
        format::note(&settings.layout)?;
        let (trouble, image_trouble) = watch::channel(None);
        let upkeep = Upkeep {
            runtime: runtime.clone(),
            images: images.clone(),
            log_limits: settings.log_limits,
            image_gc: settings.image_gc,
            shortage: upkeep::Shortage::new(trouble),
        };
        Ok(Self {
            runtime,
            image_service: images,
            credentials: credentials(settings)?,
            own: None,
            other: endpoint.runtime.clone(),
            identity,
            cgroup_driver,
            image_root,
            container_root,
            tasks: Tasks::default(),
            stopped: CancellationToken::new(),
            image_trouble,
            collector: Some(tokio::spawn(upkeep.run())),
        })
    }

    /// This program's own runtime.
    ///
    /// # Errors
    /// Another program is the runtime: it has to be asked by its own tools.
    pub(super) fn own(&self) -> anyhow::Result<&Own> {
        let other = self.other.display();
        self.own.as_ref().with_context(|| {
            format!("the runtime of this node is another program; ask it by `crictl --runtime-endpoint unix://{other}`")
        })
    }

    /// Who removes images that nobody uses.
    pub(super) fn reclaim(&self) -> Arc<dyn Reclaim> {
        match &self.own {
            Some(own) => Arc::new(UnusedImages(own.image_server.clone())),
            None => Arc::new(upkeep::Images::new(self.runtime.clone(), self.image_service.clone())),
        }
    }

    /// Answers nobody any more; what runs goes on.
    pub(crate) async fn stop(&self) {
        self.stopped.cancel();
        if let Some(collector) = &self.collector {
            collector.abort();
        }
        self.tasks.end().await;
        if let Some(own) = &self.own {
            own.cri.abort();
            own.runtime.leave_group();
        }
    }
}

/// What the node knows about registries.
fn credentials(settings: &Settings) -> anyhow::Result<Arc<Credentials>> {
    let credentials = Credentials::new(settings.credentials.clone());
    Ok(Arc::new(credentials.context("--image-credential-provider-config")?))
}

/// What the images that nobody uses take can be had back.
struct UnusedImages(Arc<ImageServer>);

#[async_trait]
impl Reclaim for UnusedImages {
    async fn unused_images(&self) -> Result<(), String> {
        let reclaimed = self.0.remove_unused().await.map_err(|error| error.to_string())?;
        tracing::info!(images = reclaimed.images.len(), bytes = reclaimed.bytes, "removed images that nobody uses");
        Ok(())
    }
}

fn policy_of(gc: ImageGc) -> image::GcPolicy {
    image::GcPolicy {
        high_threshold_percent: gc.high_percent,
        low_threshold_percent: gc.low_percent,
        minimum_age: gc.minimum_age,
        maximum_age: gc.maximum_age,
    }
}

/// Looks at the disk as often as upstream's kubelet does: how full it is, no event tells.
async fn collect_images(images: Arc<ImageServer>, policy: image::GcPolicy, mut shortage: upkeep::Shortage) {
    const PERIOD: Duration = Duration::from_secs(300);
    loop {
        tokio::time::sleep(PERIOD).await;
        match images.collect_garbage(&policy).await {
            Ok(reclaimed) => shortage.tell(upkeep::Freed {
                images: reclaimed.images.len(),
                bytes: reclaimed.bytes,
                missing_bytes: reclaimed.missing_bytes,
            }),
            Err(error) => shortage.fail(&error),
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
        cluster: settings.cluster.iter().filter_map(|range| range.to_string().parse().ok()).collect(),
        table: layout.pod_table.clone(),
        ..network::Config::new(layout.run_dir.join("network"))
    }
}
