//! The drivers of a node: which are registered, and what is asked of them.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use plugin::csi::node_client::NodeClient;
use plugin::csi::node_service_capability::Type;
use plugin::csi::node_service_capability::rpc::Type as Ability;
use plugin::csi::{
    NodeExpandVolumeRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    NodeUnstageVolumeRequest, VolumeUsage,
};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::volume::Abilities;
use crate::plugins::{Plugin, Refusal};

/// How long a pod waits for a driver that is not registered before it says so. After a start of the node drivers are pods
/// themselves, and come a little later than others.
const REGISTERED_WITHIN: Duration = Duration::from_secs(10);

/// A call of a driver that failed.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// Nobody answers to this name.
    #[error("CSI driver {0} is not registered on this node; its node plugin has to run here")]
    Unregistered(String),
    /// It does not answer.
    #[error("CSI driver {driver}: {call}: no answer within {} s", within.as_secs())]
    Hung {
        /// Its name.
        driver: String,
        /// What it was asked.
        call: &'static str,
        /// How long it was given.
        within: Duration,
    },
    /// It refuses.
    #[error("CSI driver {driver}: {call}: rpc error: code = {code:?} desc = {message}")]
    Failed {
        /// Its name.
        driver: String,
        /// What it was asked.
        call: &'static str,
        /// The kind of refusal.
        code: Code,
        /// Its words.
        message: String,
    },
}

/// A driver that is registered. A handle.
#[derive(Debug, Clone)]
pub(super) struct Driver {
    name: Arc<str>,
    /// Its socket.
    endpoint: PathBuf,
    client: NodeClient<Channel>,
    pub(super) abilities: Abilities,
    within: Duration,
}

/// The drivers of a node, by name.
#[derive(Debug)]
pub(super) struct Drivers {
    all: watch::Sender<HashMap<String, Driver>>,
    /// Counts those that came.
    came: watch::Sender<u64>,
    /// How long each call may take.
    within: Duration,
}

impl Drivers {
    pub(super) fn new(within: Duration) -> Self {
        Self { all: watch::Sender::default(), came: watch::Sender::default(), within }
    }

    /// The driver of this name; waits a little for one that is not there.
    pub(super) async fn get(&self, name: &str) -> Result<Driver, DriverError> {
        let mut all = self.all.subscribe();
        let there = all.wait_for(|all| all.contains_key(name));
        let there = tokio::time::timeout(REGISTERED_WITHIN.min(self.within), there).await;
        let driver = there.ok().and_then(Result::ok).and_then(|all| all.get(name).cloned());
        driver.ok_or_else(|| DriverError::Unregistered(name.to_owned()))
    }

    /// The driver of this name, if it is there.
    pub(super) fn find(&self, name: &str) -> Option<Driver> {
        self.all.borrow().get(name).cloned()
    }

    /// Asks a plugin who it is, and serves pods by it from now on.
    pub(super) async fn add(&self, plugin: &Plugin) -> Result<NodeGetInfoResponse, Refusal> {
        check_versions(&plugin.versions)?;
        let refused = |error: &dyn fmt::Display| Refusal(error.to_string());
        let channel = plugin::connect(&plugin.endpoint).map_err(|error| refused(&error))?;
        let (name, client) = (Arc::from(plugin.name.as_str()), NodeClient::new(channel));
        let endpoint = plugin.endpoint.clone();
        let mut driver = Driver { name, endpoint, client, abilities: Abilities::default(), within: self.within };
        let info = driver.info().await.map_err(|error| refused(&error))?;
        driver.abilities = driver.ask_abilities().await.map_err(|error| refused(&error))?;
        self.all.send_modify(|all| drop(all.insert(plugin.name.clone(), driver)));
        self.came.send_modify(|count| *count += 1);
        Ok(info)
    }

    /// Returns whether nobody serves by this name any more: the next version may have come on another socket.
    pub(super) fn remove(&self, plugin: &Plugin) -> bool {
        self.all.send_if_modified(|all| {
            let is_it = all.get(&plugin.name).is_some_and(|one| one.endpoint == plugin.endpoint);
            is_it && all.remove(&plugin.name).is_some()
        });
        !self.all.borrow().contains_key(&plugin.name)
    }

    /// Changes when a driver comes.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.came.subscribe()
    }
}

/// Drivers of CSI 0.x are long gone, and 2.x may be anything.
fn check_versions(versions: &[String]) -> Result<(), Refusal> {
    let is_known = |version: &String| version.trim_start_matches('v').split('.').next() == Some("1");
    if versions.iter().any(is_known) {
        return Ok(());
    }
    Err(Refusal(format!("this node speaks CSI 1.x, and the driver only {versions:?}")))
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $call:literal $method:ident($request:ty);)*) => {
        impl Driver {
            $($(#[$doc])* pub(super) async fn $name(&self, request: $request) -> Result<(), DriverError> {
                self.answered($call, self.client.clone().$method(request)).await.map(drop)
            })*
        }
    };
}

calls! {
    /// Makes a volume ready for all pods of the node.
    stage = "NodeStageVolume" node_stage_volume(NodeStageVolumeRequest);
    /// The opposite.
    unstage = "NodeUnstageVolume" node_unstage_volume(NodeUnstageVolumeRequest);
    /// Shows a volume to a pod.
    publish = "NodePublishVolume" node_publish_volume(NodePublishVolumeRequest);
    /// The opposite.
    unpublish = "NodeUnpublishVolume" node_unpublish_volume(NodeUnpublishVolumeRequest);
    /// Lets the node take notice of a volume's new size.
    expand = "NodeExpandVolume" node_expand_volume(NodeExpandVolumeRequest);
}

impl Driver {
    /// How full a volume is.
    pub(super) async fn stats(&self, request: NodeGetVolumeStatsRequest) -> Result<Vec<VolumeUsage>, DriverError> {
        let asked = self.client.clone();
        let answer = self.answered("NodeGetVolumeStats", { asked }.node_get_volume_stats(request)).await?;
        Ok(answer.usage)
    }

    async fn info(&self) -> Result<NodeGetInfoResponse, DriverError> {
        self.answered("NodeGetInfo", self.client.clone().node_get_info(NodeGetInfoRequest {})).await
    }

    async fn ask_abilities(&self) -> Result<Abilities, DriverError> {
        let asked = self.client.clone();
        let request = NodeGetCapabilitiesRequest {};
        let answer = self.answered("NodeGetCapabilities", { asked }.node_get_capabilities(request)).await?;
        let mut abilities = Abilities::default();
        for capability in answer.capabilities {
            let Some(Type::Rpc(rpc)) = capability.r#type else { continue };
            match rpc.r#type() {
                Ability::StageUnstageVolume => abilities.stages = true,
                Ability::GetVolumeStats => abilities.tells_stats = true,
                Ability::ExpandVolume => abilities.expands = true,
                Ability::SingleNodeMultiWriter => abilities.tells_writers_apart = true,
                Ability::VolumeMountGroup => abilities.sets_group = true,
                Ability::Unknown => {}
            }
        }
        Ok(abilities)
    }

    async fn answered<T>(
        &self,
        call: &'static str,
        asked: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, DriverError> {
        let (driver, within) = (self.name.to_string(), self.within);
        match tokio::time::timeout(within, asked).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => {
                Err(DriverError::Failed { driver, call, code: status.code(), message: status.message().to_owned() })
            }
            Err(_) => Err(DriverError::Hung { driver, call, within }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let check = |versions: &[&str]| check_versions(&versions.iter().map(|&v| v.to_owned()).collect::<Vec<_>>());
        assert!(check(&["1.0.0"]).is_ok() && check(&["0.3.0", "v1.12.0"]).is_ok());
        assert!(check(&["2.0.0"]).unwrap_err().0.contains("2.0.0"));
        assert!(check(&[]).is_err());
    }
}
