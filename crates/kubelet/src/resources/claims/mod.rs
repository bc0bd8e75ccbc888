//! Dynamic resource allocation: claims of pods for devices, which drivers make ready on the node.
//!
//! ```text
//! scheduler ─► ResourceClaim (allocated, reserved for a pod)
//! pod ─► names ─► source: the claim ─► table, checkpoint ─► driver: NodePrepareResources ─► CDI ids ─► container
//! pod gone ─► table ─► driver: NodeUnprepareResources, by the last pod of a claim ─► checkpoint
//! driver ─NodeWatchResources─► health ─► status of its pods
//! driver away ─► slices: nobody counts on its devices any more
//! ```
//!
//! A pod is noted before a driver is asked, in upstream's file, so that what was begun is undone by whoever is the node agent
//! then. Drivers are asked by the pods' own workers, and each call has a deadline: one that hangs holds up its pods only.

mod driver;
mod error;
mod health;
mod names;
mod saved;
mod slices;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cluster::{Key, Source};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodStatus, ResourceHealth, ResourceStatus};
use k8s_openapi::api::resource::v1::ResourceClaim;
use plugin::dra;
use plugin::dra_health::HealthStatus;
use plugin::resources::{CdiDevice, ClaimResource, DynamicResource};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::checkpoint::{self, Saver};
use crate::context::uid_of;
use crate::metrics::Metrics;
use crate::plugins::{Handler, Plugin, Refusal};
pub use driver::CALL_WITHIN;
use driver::Drivers;
pub(crate) use error::ClaimError;
use names::Named;
pub(super) use names::has_any;
pub use slices::DRIVER_AWAY;
use slices::Slices;
use table::{Call, Claim, Part, Table};

/// How long drivers may take, and be away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For one call ([`CALL_WITHIN`]).
    pub call_within: Duration,
    /// Until nobody counts on its devices any more ([`DRIVER_AWAY`]).
    pub away: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { call_within: CALL_WITHIN, away: DRIVER_AWAY }
    }
}

/// The claims of a node's pods. The drivers are followed until this is dropped.
pub(super) struct Claims {
    file: Saver,
    source: Arc<dyn Source>,
    shared: Arc<Shared>,
    drivers: Arc<Drivers>,
    metrics: Arc<Metrics>,
}

/// What those need, too, who follow drivers.
struct Shared {
    /// Short sections only, never over an await.
    table: Mutex<Table>,
    /// As above.
    health: Mutex<health::Table>,
    /// The health of a device that these pods have has changed.
    unwell: watch::Sender<BTreeSet<String>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_health(&self) -> MutexGuard<'_, health::Table> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The health of these devices has changed.
    fn tell(&self, driver: &str, devices: &BTreeSet<health::Device>) {
        if devices.is_empty() {
            return;
        }
        let pods = self.lock().users(driver, |one| devices.contains(&(one.pool.clone(), one.name.clone())));
        if !pods.is_empty() {
            self.unwell.send_modify(|unwell| unwell.extend(pods));
        }
    }
}

impl Claims {
    /// Recalls which claims were made ready. Must be called inside a tokio runtime.
    pub(super) fn start(
        root: &std::path::Path,
        source: Arc<dyn Source>,
        patience: Patience,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let file = root.join(saved::NAME);
        let claims = checkpoint::load(&file, saved::read).unwrap_or_default();
        let table = Mutex::new(Table::recall(claims));
        let shared = Arc::new(Shared { table, health: Mutex::default(), unwell: watch::Sender::default() });
        let slices = Slices::new(source.clone(), patience.away);
        let drivers = Drivers::new(slices, patience.call_within, metrics.clone());
        Arc::new(Self { file: Saver::new(file), source, shared, drivers, metrics })
    }

    /// Pods of which a device has fallen ill or recovered.
    pub(super) async fn unwell(&self) -> BTreeSet<String> {
        let mut unwell = self.shared.unwell.subscribe();
        // The sender lives as long as this.
        let _ = unwell.wait_for(|pods| !pods.is_empty()).await;
        self.shared.unwell.send_replace(BTreeSet::new())
    }

    /// Changes when a driver comes.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.drivers.news()
    }

    /// The pods that have claims, or that something was begun for.
    pub(super) fn pods(&self) -> BTreeSet<String> {
        self.shared.lock().pods()
    }

    /// Whether drivers have something to undo for a pod.
    pub(super) fn holds(&self, uid: &str) -> bool {
        self.shared.lock().holds(uid)
    }

    /// Has a pod's claims made ready. Done again, it asks drivers only for what they have not made ready for this daemon. It
    /// may be dropped at any time: what was begun is undone with the pod.
    ///
    /// # Errors
    /// The first thing that is missing. Before anything is asked of a driver, all of them are there.
    pub(super) async fn prepare(&self, pod: &Pod) -> Result<(), ClaimError> {
        let begun = Instant::now();
        let prepared = self.prepared(pod).await;
        self.metrics.claims_done("PrepareResources", prepared.is_err(), begun.elapsed());
        self.count();
        prepared
    }

    async fn prepared(&self, pod: &Pod) -> Result<(), ClaimError> {
        let mut wanted = Vec::new();
        for named in names::of_pod(pod)? {
            let claim = self.look_up(pod, &named).await?;
            for driver in claim.drivers(Call::Prepare) {
                self.drivers.get(driver)?;
            }
            wanted.push(claim);
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let batches = self.shared.lock().begin(uid_of(pod), &wanted)?;
        self.save().await?;
        if batches.is_empty() && self.are_ready(&wanted) {
            return Ok(());
        }
        let asked = batches.iter().map(|(driver, batch)| self.ask(driver, batch));
        let answered: Result<Vec<()>, ClaimError> = futures_util::future::join_all(asked).await.into_iter().collect();
        answered?;
        self.shared.lock().settle(&wanted);
        self.save().await
    }

    fn are_ready(&self, wanted: &[Claim]) -> bool {
        let table = self.shared.lock();
        wanted.iter().all(|one| table.get(&one.namespace, &one.name).is_some_and(|claim| claim.is_prepared))
    }

    async fn ask(&self, driver: &str, batch: &[dra::Claim]) -> Result<(), ClaimError> {
        let answer = self.drivers.get(driver)?.prepare(batch.to_vec()).await?;
        self.shared.lock().take_devices(driver, batch, &answer)
    }

    /// What the cluster says of a claim of a pod. While it says nothing, what was made ready for the pod before is enough: that
    /// it may use the claim was seen then.
    async fn look_up(&self, pod: &Pod, named: &Named) -> Result<Claim, ClaimError> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
        match self.source.resource_claim(&Key::new(&namespace, &named.name)).await {
            Ok(claim) => {
                names::check(pod, named, &claim)?;
                allocated(&claim)
            }
            Err(source) => {
                let known = self.shared.lock().get(&namespace, &named.name).cloned();
                let known = known.filter(|claim| source.is_passing() && claim.pods.contains(uid_of(pod)));
                known.ok_or_else(|| ClaimError::Source { claim: named.name.clone(), source })
            }
        }
    }

    /// Drivers undo what they have done for a pod, unless other pods use it. Done again, it finds nothing left to do.
    ///
    /// # Errors
    /// The first of those that occurred; what could be undone is.
    pub(super) async fn release(&self, uid: &str) -> Result<(), ClaimError> {
        if !self.holds(uid) {
            return Ok(());
        }
        let begun = Instant::now();
        let released = self.released(uid).await;
        self.metrics.claims_done("UnprepareResources", released.is_err(), begun.elapsed());
        self.count();
        released
    }

    async fn released(&self, uid: &str) -> Result<(), ClaimError> {
        let (batches, names) = self.shared.lock().release(uid);
        let asked = batches.iter().map(|(driver, batch)| self.undo(driver, batch));
        let undone: Vec<_> = batches.keys().zip(futures_util::future::join_all(asked).await).collect();
        let failed =
            |claim: &Claim| undone.iter().any(|(driver, one)| one.is_err() && claim.parts.contains_key(*driver));
        {
            let mut table = self.shared.lock();
            for name in names {
                if table.claims().get(&name).is_some_and(|claim| claim.is_released && !failed(claim)) {
                    table.forget(&name);
                }
            }
        }
        let saved = self.save().await;
        undone.into_iter().try_for_each(|(_, one)| one)?;
        saved
    }

    async fn undo(&self, driver: &str, batch: &[dra::Claim]) -> Result<(), ClaimError> {
        let answer = self.drivers.get(driver)?.unprepare(batch.to_vec()).await?;
        table::check(batch, Call::Unprepare, answer.claims.iter().map(|(uid, one)| (uid, &one.error)))
    }

    /// Writes down what the table says.
    async fn save(&self) -> Result<(), ClaimError> {
        let saved = self.file.save(|| saved::write(self.shared.lock().claims()));
        saved.await.map_err(ClaimError::Save)
    }

    fn count(&self) {
        self.metrics.claims_in_use(self.shared.lock().in_use());
    }

    /// The CDI ids of the devices that a container has by its pod's claims.
    ///
    /// # Errors
    /// They were not made ready.
    pub(super) async fn cdi(&self, pod: &Pod, container: &Container) -> Result<Vec<String>, ClaimError> {
        let used = names::of_container(pod, container)?;
        if used.keys().any(|name| !self.has(pod, name)) {
            // What upstream's file told of it is lost; drivers answer the same again.
            self.prepare(pod).await?;
        }
        let table = self.shared.lock();
        let mut ids: Vec<String> = Vec::new();
        for (name, requests) in &used {
            let claim = claim_of(&table, pod, name).ok_or_else(|| ClaimError::Unprepared { claim: name.clone() })?;
            let devices = requests.iter().flat_map(|request| claim.devices(request));
            for id in devices.flat_map(|(_, device)| &device.cdi) {
                if !ids.contains(id) {
                    ids.push(id.clone());
                }
            }
        }
        Ok(ids)
    }

    fn has(&self, pod: &Pod, name: &str) -> bool {
        claim_of(&self.shared.lock(), pod, name).is_some()
    }

    /// The claims of a container, for the pod resources API.
    pub(super) fn resources(&self, pod: &Pod, container: &Container) -> Vec<DynamicResource> {
        let Ok(used) = names::of_container(pod, container) else { return Vec::new() };
        let table = self.shared.lock();
        let claims = used.keys().filter_map(|name| claim_of(&table, pod, name));
        claims.map(dynamic_resource).collect()
    }

    /// Says in a pod's status how the devices of its claims are.
    pub(super) fn describe(&self, pod: &Pod, status: &mut PodStatus) {
        for status in status.container_statuses.iter_mut().flatten() {
            let container = pod::spec::container(pod, &status.name);
            if let Some((_, container)) = container {
                self.describe_container(pod, &container, status);
            }
        }
    }

    fn describe_container(&self, pod: &Pod, container: &Container, status: &mut ContainerStatus) {
        for used in container.resources.iter().flat_map(|resources| resources.claims.iter().flatten()) {
            let request = used.request.as_deref().unwrap_or_default();
            let Some(name) = names::of_entry(pod, &used.name) else { continue };
            let resources = self.health_of(pod, &name, request);
            if resources.is_empty() {
                continue;
            }
            let name = match request {
                "" => format!("claim:{}", used.name),
                request => format!("claim:{}/{request}", used.name),
            };
            let all = status.allocated_resources_status.get_or_insert_default();
            all.push(ResourceStatus { name, resources: Some(resources) });
        }
    }

    fn health_of(&self, pod: &Pod, name: &str, request: &str) -> Vec<ResourceHealth> {
        let (table, now) = (self.shared.lock(), tokio::time::Instant::now());
        let Some(claim) = claim_of(&table, pod, name) else { return Vec::new() };
        let health = self.shared.lock_health();
        let mut all: BTreeMap<String, ResourceHealth> = BTreeMap::new();
        for (driver, device) in claim.devices(request) {
            let resource_id = match device.cdi.first() {
                Some(id) => id.clone(),
                None => format!("{driver}/{}/{}", device.pool, device.name),
            };
            let told = health.of(driver, &device.pool, &device.name, now);
            all.entry(resource_id.clone()).or_insert(ResourceHealth {
                health: Some(word(told.status).to_owned()),
                message: Some(told.message).filter(|message| !message.is_empty()),
                resource_id,
            });
        }
        all.into_values().collect()
    }
}

/// A claim that is used by a pod.
fn claim_of<'a>(table: &'a Table, pod: &Pod, name: &str) -> Option<&'a Claim> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    table.get(namespace, name).filter(|claim| claim.pods.contains(uid_of(pod)))
}

fn word(status: HealthStatus) -> &'static str {
    match status {
        HealthStatus::Healthy => "Healthy",
        HealthStatus::Unhealthy => "Unhealthy",
        HealthStatus::Unknown => "Unknown",
    }
}

fn dynamic_resource(claim: &Claim) -> DynamicResource {
    let resource = |(driver, device): (&str, &table::Device)| ClaimResource {
        cdi_devices: device.cdi.iter().map(|name| CdiDevice { name: name.clone() }).collect(),
        driver_name: driver.to_owned(),
        pool_name: device.pool.clone(),
        device_name: device.name.clone(),
        share_id: device.share.clone(),
    };
    DynamicResource {
        claim_name: claim.name.clone(),
        claim_namespace: claim.namespace.clone(),
        claim_resources: claim.devices("").map(resource).collect(),
    }
}

/// Which drivers have devices for a claim.
fn allocated(claim: &ResourceClaim) -> Result<Claim, ClaimError> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let (name, namespace) = (text(&claim.metadata.name), text(&claim.metadata.namespace));
    let allocation = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
    let allocation = allocation.ok_or_else(|| ClaimError::NotAllocated { claim: name.clone() })?;
    let results = allocation.devices.iter().flat_map(|devices| devices.results.iter().flatten());
    let mut parts: BTreeMap<String, Part> = BTreeMap::new();
    for result in results {
        let skips: BTreeSet<String> = result.skip_node_operations.iter().flatten().cloned().collect();
        // A call is left out if no device of the driver wants it.
        match parts.get_mut(&result.driver) {
            Some(part) => part.skips = both(&part.skips, &skips),
            None => drop(parts.insert(result.driver.clone(), Part { skips, ..Part::default() })),
        }
    }
    Ok(Claim { uid: text(&claim.metadata.uid), name, namespace, parts, ..Claim::default() })
}

/// The calls that neither wants.
fn both(one: &BTreeSet<String>, other: &BTreeSet<String>) -> BTreeSet<String> {
    match (one.contains("All"), other.contains("All")) {
        (true, _) => other.clone(),
        (_, true) => one.clone(),
        _ => one & other,
    }
}

/// Takes the drivers that register.
#[async_trait]
impl Handler for Claims {
    fn kind(&self) -> &'static str {
        "DRAPlugin"
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        let health = health::Version::choose(&plugin.versions);
        let follow = |driver| {
            let follow = health.map(|version| health::follow(self.shared.clone(), driver, version));
            follow.map(|task| AbortOnDropHandle::new(tokio::spawn(task)))
        };
        self.drivers.add(plugin, follow)
    }

    async fn deregister(&self, plugin: &Plugin) {
        if !self.drivers.remove(plugin) {
            return; // Another plugin of the driver tells of the same devices.
        }
        let changed = self.shared.lock_health().clear(&plugin.name);
        self.shared.tell(&plugin.name, &changed);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calls_are_left_out_that_no_device_of_a_driver_wants() {
        let device = |driver: &str, skips: &[&str]| json!({ "driver": driver, "device": "d", "pool": "p", "request": "r", "skipNodeOperations": skips });
        let results = [
            device("a", &["All"]),
            device("a", &["NodePrepareResources"]),
            device("b", &["All"]),
            device("b", &[]),
            device("c", &["All"]),
        ];
        let status = json!({ "allocation": { "devices": { "results": results } } });
        let claim = json!({ "metadata": { "name": "c", "uid": "u", "namespace": "n" }, "spec": {}, "status": status });
        let claim = allocated(&serde_json::from_value(claim).unwrap()).unwrap();
        assert_eq!(claim.drivers(Call::Prepare).collect::<Vec<_>>(), ["b"]);
        assert_eq!(claim.drivers(Call::Unprepare).collect::<Vec<_>>(), ["a", "b"]);
        let none = json!({ "metadata": { "name": "c" }, "spec": {} });
        let refused = allocated(&serde_json::from_value(none).unwrap()).unwrap_err();
        assert_eq!(refused.to_string(), "ResourceClaim c: not allocated");
    }
}
