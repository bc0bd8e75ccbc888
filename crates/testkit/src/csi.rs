//! A CSI driver for tests, over real gRPC: its volumes are directories that it bind-mounts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plugin::csi::node_server::{Node, NodeServer};
use plugin::csi::node_service_capability::{Rpc, Type};
use plugin::csi::volume_capability::AccessType;
use plugin::csi::volume_usage::Unit;
use plugin::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, Topology, VolumeUsage,
};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::plugins::{Registrar, Server};

/// What a driver can do on a node.
pub use plugin::csi::node_service_capability::rpc::Type as Ability;

/// A driver, as it is set up.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// Its name, as PersistentVolumes have it.
    pub name: String,
    /// What it calls the node.
    pub node_id: String,
    /// Where its volumes are, a directory for each.
    pub volumes: PathBuf,
    /// What it can.
    pub abilities: Vec<Ability>,
    /// Labels of the node that it asks for.
    pub topology: HashMap<String, String>,
    /// How many volumes it can attach; 0 for no limit.
    pub volumes_max: i64,
}

/// A call that a driver has answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// `NodeStageVolume`
    Stage(NodeStageVolumeRequest),
    /// `NodeUnstageVolume`
    Unstage(NodeUnstageVolumeRequest),
    /// `NodePublishVolume`
    Publish(NodePublishVolumeRequest),
    /// `NodeUnpublishVolume`
    Unpublish(NodeUnpublishVolumeRequest),
    /// `NodeExpandVolume`
    Expand(NodeExpandVolumeRequest),
}

impl Call {
    /// Its name, as CSI has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stage(_) => "NodeStageVolume",
            Self::Unstage(_) => "NodeUnstageVolume",
            Self::Publish(_) => "NodePublishVolume",
            Self::Unpublish(_) => "NodeUnpublishVolume",
            Self::Expand(_) => "NodeExpandVolume",
        }
    }
}

/// A driver at work. It ends with this value; what it mounted stays.
#[derive(Debug)]
pub struct Driver {
    service: Service,
    /// What the node agent told it.
    pub registrar: Registrar,
    _servers: [Server; 2],
}

#[derive(Debug, Clone)]
struct Service {
    config: DriverConfig,
    calls: Arc<watch::Sender<Vec<Call>>>,
    /// The call that gets no answer.
    hung: Arc<watch::Sender<Option<&'static str>>>,
}

impl Driver {
    /// Serves the driver below a kubelet's root, and registers it there.
    ///
    /// # Errors
    /// A socket cannot be listened on.
    pub fn start(config: DriverConfig, kubelet_root: &Path) -> anyhow::Result<Self> {
        let endpoint = kubelet_root.join("plugins").join(&config.name).join("csi.sock");
        let registration = kubelet_root.join("plugins_registry").join(format!("{}-reg.sock", config.name));
        let registrar = Registrar::new("CSIPlugin", &config.name, &endpoint, &["1.0.0"]);
        let service = Service { config, calls: Arc::new(watch::Sender::new(Vec::new())), hung: Arc::default() };
        // The driver first: who is registered is called.
        let servers = [Server::start(&endpoint, NodeServer::new(service.clone()))?, registrar.serve(&registration)?];
        Ok(Self { service, registrar, _servers: servers })
    }

    /// The calls that it has answered; changes with each.
    pub fn calls(&self) -> watch::Receiver<Vec<Call>> {
        self.service.calls.subscribe()
    }

    /// The call of this name gets no answer from now on; none: all do, also those that wait for theirs.
    pub fn hang(&self, call: Option<&'static str>) {
        self.service.hung.send_replace(call);
    }
}

impl Service {
    async fn answer<T>(&self, call: Call, work: impl FnOnce() -> std::io::Result<T>) -> Result<Response<T>, Status> {
        let mut hung = self.hung.subscribe();
        // The sender is part of this service.
        let _ = hung.wait_for(|hung| *hung != Some(call.name())).await;
        let done = work().map_err(|error| Status::internal(error.to_string()))?;
        self.calls.send_modify(|calls| calls.push(call));
        Ok(Response::new(done))
    }

    fn directory(&self, volume: &str) -> std::io::Result<PathBuf> {
        let directory = self.config.volumes.join(volume);
        std::fs::create_dir_all(&directory)?;
        Ok(directory)
    }

    fn can(&self, ability: Ability) -> bool {
        self.config.abilities.contains(&ability)
    }
}

#[async_trait::async_trait]
impl Node for Service {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        let (volume, target) = (request.volume_id.clone(), PathBuf::from(&request.staging_target_path));
        self.answer(Call::Stage(request), || {
            bind(&self.directory(&volume)?, &target)?;
            Ok(NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = PathBuf::from(&request.staging_target_path);
        self.answer(Call::Unstage(request), || {
            unbind(&target)?;
            Ok(NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let (volume, target) = (request.volume_id.clone(), PathBuf::from(&request.target_path));
        let (staged, readonly) = (PathBuf::from(&request.staging_target_path), request.readonly);
        let capability = request.volume_capability.as_ref().and_then(|capability| capability.access_type.clone());
        self.answer(Call::Publish(request), || {
            if matches!(capability, Some(AccessType::Block(_))) {
                // The one device that every machine has.
                std::fs::OpenOptions::new().create(true).append(true).open(&target)?;
                bind(Path::new("/dev/zero"), &target)?;
                return Ok(NodePublishVolumeResponse {});
            }
            let source = if self.can(Ability::StageUnstageVolume) && !staged.as_os_str().is_empty() {
                staged
            } else {
                self.directory(&volume)?
            };
            std::fs::create_dir_all(&target)?;
            bind(&source, &target)?;
            if readonly {
                mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, "")?;
            }
            Ok(NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = PathBuf::from(&request.target_path);
        self.answer(Call::Unpublish(request), || {
            unbind(&target)?;
            match std::fs::remove_dir(&target) {
                Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => std::fs::remove_file(&target)?,
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            Ok(NodeUnpublishVolumeResponse {})
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let path = request.into_inner().volume_path;
        let found = rustix::fs::statvfs(&path).map_err(|error| Status::internal(format!("{path}: {error}")))?;
        let usage = |total: u64, free: u64, scale: u64, unit: Unit| {
            let count = |number: u64| i64::try_from(number.saturating_mul(scale)).unwrap_or(i64::MAX);
            VolumeUsage { available: count(free), total: count(total), used: count(total - free), unit: unit.into() }
        };
        let usage = vec![
            usage(found.f_blocks, found.f_bfree, found.f_frsize, Unit::Bytes),
            usage(found.f_files, found.f_ffree, 1, Unit::Inodes),
        ];
        Ok(Response::new(NodeGetVolumeStatsResponse { usage }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let capacity_bytes = request.capacity_range.as_ref().map_or(0, |range| range.required_bytes);
        self.answer(Call::Expand(request), || Ok(NodeExpandVolumeResponse { capacity_bytes })).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability =
            |ability: &Ability| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: (*ability).into() })) };
        let capabilities = self.config.abilities.iter().map(capability).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let DriverConfig { node_id, topology, volumes_max, .. } = &self.config;
        Ok(Response::new(NodeGetInfoResponse {
            node_id: node_id.clone(),
            max_volumes_per_node: *volumes_max,
            accessible_topology: (!topology.is_empty()).then(|| Topology { segments: topology.clone() }),
        }))
    }
}

/// Shows `source` at `target`, once.
fn bind(source: &Path, target: &Path) -> std::io::Result<()> {
    if is_mounted(target)? { Ok(()) } else { Ok(mount_bind(source, target)?) }
}

/// What is not mounted need not be unmounted.
fn unbind(target: &Path) -> std::io::Result<()> {
    match unmount(target, UnmountFlags::empty()) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        unmounted => Ok(unmounted?),
    }
}

/// Whether something is mounted exactly there.
fn is_mounted(target: &Path) -> std::io::Result<bool> {
    let real = target.canonicalize()?;
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
    let mounted = table.lines().filter_map(|line| line.split(' ').nth(4)).any(|place| Path::new(place) == real);
    Ok(mounted)
}
