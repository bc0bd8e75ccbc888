//! The drivers that have registered, and what is asked of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use plugin::dra::{self, NodePrepareResourcesResponse, NodeUnprepareResourcesResponse};
use plugin::dra_v1beta1 as v1beta1;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::ClaimError;
use super::slices::Slices;
use super::table::Call;
use crate::metrics::Metrics;
use crate::plugins::{Plugin, Refusal};
use crate::retry::Rests;

/// How long a driver may take for a call (upstream's `defaultClientCallTimeout`).
pub const CALL_WITHIN: Duration = Duration::from_secs(45);

/// What drivers call the versions of the protocol.
const V1: &str = "v1.DRAPlugin";
const V1BETA1: &str = "v1beta1.DRAPlugin";

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V1Beta1,
}

impl Version {
    /// The driver's own order of preference counts, as upstream has it.
    fn choose(offered: &[String]) -> Result<Self, Refusal> {
        let known = offered.iter().find_map(|one| match one.as_str() {
            V1 => Some(Self::V1),
            V1BETA1 => Some(Self::V1Beta1),
            _ => None,
        });
        known.ok_or_else(|| Refusal(format!("none of the services {offered:?} is known here: {V1}, {V1BETA1}")))
    }

    fn package(self) -> &'static str {
        match self {
            Self::V1 => "k8s.io.kubelet.pkg.apis.dra.v1",
            Self::V1Beta1 => "k8s.io.kubelet.pkg.apis.dra.v1beta1",
        }
    }
}

/// A driver's plugin on this node.
pub(super) struct Driver {
    name: String,
    endpoint: PathBuf,
    version: Version,
    within: Duration,
    metrics: Arc<Metrics>,
    /// The connection that is there now; none while nobody listens.
    link: watch::Sender<Option<Channel>>,
}

/// A driver with all that goes on for it, which ends with this.
struct Registered {
    driver: Arc<Driver>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// All drivers. Of two plugins of one driver, as an update has them for a while, the newest that is there is asked.
pub(super) struct Drivers {
    /// Short sections only, never over an await.
    all: Mutex<HashMap<String, Vec<Registered>>>,
    came: watch::Sender<u64>,
    slices: Slices,
    within: Duration,
    metrics: Arc<Metrics>,
}

impl Drivers {
    pub(super) fn new(slices: Slices, within: Duration, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { all: Mutex::default(), came: watch::Sender::default(), slices, within, metrics })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Registered>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver of this name.
    pub(super) fn get(&self, name: &str) -> Result<Arc<Driver>, ClaimError> {
        let all = self.lock();
        let plugins = all.get(name).map_or(&[][..], Vec::as_slice);
        let there = plugins.iter().rev().find(|one| one.driver.is_there()).or(plugins.last());
        there.map(|one| one.driver.clone()).ok_or_else(|| ClaimError::Unregistered(name.to_owned()))
    }

    /// Serves pods by a plugin from now on. `follow` is what else is to be done while it is registered.
    pub(super) fn add(
        self: &Arc<Self>,
        plugin: &Plugin,
        follow: impl FnOnce(Arc<Driver>) -> Option<AbortOnDropHandle<()>>,
    ) -> Result<(), Refusal> {
        let driver = Arc::new(Driver {
            name: plugin.name.clone(),
            endpoint: plugin.endpoint.clone(),
            version: Version::choose(&plugin.versions)?,
            within: self.within,
            metrics: self.metrics.clone(),
            link: watch::Sender::default(),
        });
        let keeper = tokio::spawn(keep_link(Arc::downgrade(self), driver.clone()));
        let tasks = [AbortOnDropHandle::new(keeper)].into_iter().chain(follow(driver.clone())).collect();
        {
            let mut all = self.lock();
            let plugins = all.entry(plugin.name.clone()).or_default();
            plugins.retain(|one| one.driver.endpoint != plugin.endpoint);
            plugins.push(Registered { driver, _tasks: tasks });
        }
        self.came.send_modify(|count| *count += 1);
        self.look(&plugin.name);
        Ok(())
    }

    /// A plugin is gone. Returns whether it was the last of its driver.
    pub(super) fn remove(&self, plugin: &Plugin) -> bool {
        let is_last = {
            let mut all = self.lock();
            let plugins = all.entry(plugin.name.clone()).or_default();
            plugins.retain(|one| one.driver.endpoint != plugin.endpoint);
            let is_last = plugins.is_empty();
            if is_last {
                all.remove(&plugin.name);
            }
            is_last
        };
        self.look(&plugin.name);
        is_last
    }

    /// Changes when a driver comes.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.came.subscribe()
    }

    /// What the node has of a driver can be had while one of its plugins is there.
    fn look(&self, name: &str) {
        let is_there = self.lock().get(name).is_some_and(|plugins| plugins.iter().any(|one| one.driver.is_there()));
        self.slices.tell(name, is_there);
    }
}

/// Sees to it that it is known whether the plugin listens: upstream counts on a driver only while it is connected.
async fn keep_link(drivers: Weak<Drivers>, driver: Arc<Driver>) {
    let look = || {
        // They own this task, and end it with themselves.
        if let Some(drivers) = drivers.upgrade() {
            drivers.look(&driver.name);
        }
    };
    let mut rests = Rests::new();
    loop {
        match plugin::connect_now(&driver.endpoint).await {
            Ok((channel, ended)) => {
                driver.link.send_replace(Some(channel));
                look();
                ended.await;
                driver.link.send_replace(None);
                tracing::warn!(driver = driver.name, endpoint = %driver.endpoint.display(), "a DRA driver has gone");
                look();
                rests = Rests::new();
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::debug!(driver = driver.name, error, "a DRA driver does not listen; trying again");
            }
        }
        rests.rest().await;
    }
}

impl Driver {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn endpoint(&self) -> &Path {
        &self.endpoint
    }

    fn is_there(&self) -> bool {
        self.link.borrow().is_some()
    }

    /// The connection, or one that is made by the call.
    pub(super) fn channel(&self) -> Result<Channel, ClaimError> {
        if let Some(channel) = self.link.borrow().clone() {
            return Ok(channel);
        }
        plugin::connect(&self.endpoint).map_err(|cause| ClaimError::Address { driver: self.name.clone(), cause })
    }

    /// Has claims made ready.
    pub(super) async fn prepare(&self, claims: Vec<dra::Claim>) -> Result<NodePrepareResourcesResponse, ClaimError> {
        let channel = self.channel()?;
        match self.version {
            Version::V1 => {
                let mut client = dra::dra_plugin_client::DraPluginClient::new(channel);
                let request = dra::NodePrepareResourcesRequest { claims };
                self.answered(Call::Prepare, client.node_prepare_resources(request)).await
            }
            Version::V1Beta1 => {
                let mut client = v1beta1::dra_plugin_client::DraPluginClient::new(channel);
                let request = v1beta1::NodePrepareResourcesRequest { claims: older(claims) };
                let answer = self.answered(Call::Prepare, client.node_prepare_resources(request)).await?;
                Ok(newer(answer))
            }
        }
    }

    /// Has it undone.
    pub(super) async fn unprepare(
        &self,
        claims: Vec<dra::Claim>,
    ) -> Result<NodeUnprepareResourcesResponse, ClaimError> {
        let channel = self.channel()?;
        match self.version {
            Version::V1 => {
                let mut client = dra::dra_plugin_client::DraPluginClient::new(channel);
                let request = dra::NodeUnprepareResourcesRequest { claims };
                self.answered(Call::Unprepare, client.node_unprepare_resources(request)).await
            }
            Version::V1Beta1 => {
                let mut client = v1beta1::dra_plugin_client::DraPluginClient::new(channel);
                let request = v1beta1::NodeUnprepareResourcesRequest { claims: older(claims) };
                let answer = self.answered(Call::Unprepare, client.node_unprepare_resources(request)).await?;
                let claims = answer.claims.into_iter();
                let claims = claims.map(|(uid, one)| (uid, dra::NodeUnprepareResourceResponse { error: one.error }));
                Ok(NodeUnprepareResourcesResponse { claims: claims.collect() })
            }
        }
    }

    async fn answered<T>(
        &self,
        call: Call,
        asked: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, ClaimError> {
        let begun = Instant::now();
        let answer = tokio::time::timeout(self.within, asked).await;
        let code = match &answer {
            Ok(Ok(_)) => Code::Ok,
            Ok(Err(status)) => status.code(),
            Err(_) => Code::DeadlineExceeded,
        };
        let (driver, call) = (self.name.clone(), call.name());
        self.metrics.asked_driver(
            &driver,
            &format!("/{}.DRAPlugin/{call}", self.version.package()),
            code,
            begun.elapsed(),
        );
        match answer {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(ClaimError::Refused { driver, call, status: Box::new(status) }),
            Err(_) => Err(ClaimError::Hung { driver, call, within: self.within }),
        }
    }
}

fn older(claims: Vec<dra::Claim>) -> Vec<v1beta1::Claim> {
    claims.into_iter().map(|dra::Claim { namespace, uid, name }| v1beta1::Claim { namespace, uid, name }).collect()
}

fn newer(answer: v1beta1::NodePrepareResourcesResponse) -> NodePrepareResourcesResponse {
    let device = |device: v1beta1::Device| dra::Device {
        request_names: device.request_names,
        pool_name: device.pool_name,
        device_name: device.device_name,
        cdi_device_ids: device.cdi_device_ids,
        share_id: None,
    };
    let claim = |one: v1beta1::NodePrepareResourceResponse| dra::NodePrepareResourceResponse {
        devices: one.devices.into_iter().map(device).collect(),
        error: one.error,
    };
    let claims = answer.claims.into_iter().map(|(uid, one)| (uid, claim(one)));
    NodePrepareResourcesResponse { claims: claims.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let choose = |offered: &[&str]| Version::choose(&offered.iter().map(|&one| one.to_owned()).collect::<Vec<_>>());
        assert_eq!(choose(&["v1.DRAPlugin", "v1beta1.DRAPlugin", "v1.DRAResourceHealth"]), Ok(Version::V1));
        assert_eq!(choose(&["v1beta1.DRAPlugin"]), Ok(Version::V1Beta1));
        assert!(choose(&["1.0.0"]).unwrap_err().0.contains("1.0.0"));
        assert!(choose(&[]).is_err());
    }
}
