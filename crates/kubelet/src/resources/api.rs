//! The pod resources API: monitoring agents ask here which pod has which devices, CPUs and memory.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use plugin::resources::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
use plugin::resources::{
    AllocatableResourcesRequest, AllocatableResourcesResponse, ContainerDevices, ContainerMemory, ContainerResources,
    GetPodResourcesRequest, GetPodResourcesResponse, ListPodResourcesRequest, ListPodResourcesResponse, NumaNode,
    PodResources, TopologyInfo,
};
use pod::spec::{self, Role};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::Resources;
use super::memory::Block;
use crate::context::uid_of;

/// The pods of the node that have not ended.
pub(crate) type Pods = Box<dyn Fn() -> Vec<Arc<Pod>> + Send + Sync>;

/// Calls that are answered: so many a second, and so many at once (upstream's `DefaultQPS` and `DefaultBurstTokens`).
const PER_SECOND: u32 = 100;
const BURST: u32 = 10;

/// The service, ready to be served.
pub(super) fn service(resources: &Arc<Resources>, pods: Pods) -> PodResourcesListerServer<impl PodResourcesLister> {
    let limit = Mutex::new(Limit::full(Instant::now()));
    // Its tasks end with the resources, which must not wait for them.
    PodResourcesListerServer::new(Lister { resources: Arc::downgrade(resources), pods, limit })
}

struct Lister {
    resources: std::sync::Weak<Resources>,
    pods: Pods,
    /// Short sections only.
    limit: Mutex<Limit>,
}

impl Lister {
    fn resources(&self) -> Result<Arc<Resources>, Status> {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        if !limit.allows(Instant::now()) {
            return Err(Status::resource_exhausted("rejected by rate limit"));
        }
        self.resources.upgrade().ok_or_else(|| Status::unavailable("the node ends"))
    }
}

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(&self, _: Request<ListPodResourcesRequest>) -> Result<Response<ListPodResourcesResponse>, Status> {
        let resources = self.resources()?;
        let pod_resources = (self.pods)().iter().map(|pod| of_pod(&resources, pod)).collect();
        Ok(Response::new(ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<AllocatableResourcesRequest>,
    ) -> Result<Response<AllocatableResourcesResponse>, Status> {
        let resources = self.resources()?;
        let cpus = resources.cpus.as_ref().map(|pool| pool.lock().allocatable()).unwrap_or_default();
        Ok(Response::new(AllocatableResourcesResponse {
            devices: devices(resources.devices.usable()),
            cpu_ids: ids(cpus.iter()),
            memory: resources.memory().map(|memory| memory_of(&memory.allocatable())).unwrap_or_default(),
        }))
    }

    async fn get(&self, request: Request<GetPodResourcesRequest>) -> Result<Response<GetPodResourcesResponse>, Status> {
        let resources = self.resources()?;
        let GetPodResourcesRequest { pod_name, pod_namespace } = request.into_inner();
        let is_it = |pod: &&Arc<Pod>| {
            pod.metadata.name.as_ref() == Some(&pod_name) && pod.metadata.namespace.as_ref() == Some(&pod_namespace)
        };
        let pods = (self.pods)();
        let missing = || Status::not_found(format!("pod {pod_name} in namespace {pod_namespace} not found"));
        let pod = pods.iter().find(is_it).ok_or_else(missing)?;
        Ok(Response::new(GetPodResourcesResponse { pod_resources: Some(of_pod(&resources, pod)) }))
    }
}

fn of_pod(resources: &Resources, pod: &Pod) -> PodResources {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    // Init containers that end are left out, as upstream does it.
    let running = spec::containers(pod).filter(|(role, _)| matches!(role, Role::Sidecar | Role::Main));
    PodResources {
        name: text(&pod.metadata.name),
        namespace: text(&pod.metadata.namespace),
        containers: running.map(|(_, container)| of_container(resources, pod, container)).collect(),
        ..PodResources::default()
    }
}

fn of_container(resources: &Resources, pod: &Pod, container: &Container) -> ContainerResources {
    let (uid, name) = (uid_of(pod), container.name.as_str());
    let cpus = resources.cpus.as_ref().and_then(|pool| pool.lock().of(uid, name).cloned()).unwrap_or_default();
    ContainerResources {
        name: name.to_owned(),
        devices: devices(resources.devices.of(uid, name)),
        cpu_ids: ids(cpus.iter()),
        memory: resources
            .memory()
            .and_then(|memory| memory.of(uid, name).map(|all| memory_of(all)))
            .unwrap_or_default(),
        dynamic_resources: resources.claims.resources(pod, container),
    }
}

fn ids(cpus: impl Iterator<Item = usize>) -> Vec<i64> {
    cpus.filter_map(|cpu| i64::try_from(cpu).ok()).collect()
}

fn memory_of(blocks: &[Block]) -> Vec<ContainerMemory> {
    let memory = |block: &Block| ContainerMemory {
        memory_type: block.resource.clone(),
        size: block.bytes,
        topology: Some(TopologyInfo {
            nodes: ids(block.nodes.nodes()).into_iter().map(|id| NumaNode { id }).collect(),
        }),
    };
    blocks.iter().map(memory).collect()
}

/// Devices with their resource and NUMA nodes, one by one: each may be near to another node.
fn devices(all: Vec<(String, String, Vec<i64>)>) -> Vec<ContainerDevices> {
    let device = |(resource_name, id, nodes): (String, String, Vec<i64>)| {
        let nodes: Vec<NumaNode> = nodes.into_iter().map(|id| NumaNode { id }).collect();
        let topology = (!nodes.is_empty()).then_some(TopologyInfo { nodes });
        ContainerDevices { resource_name, device_ids: vec![id], topology }
    };
    all.into_iter().map(device).collect()
}

/// How many calls may still come.
struct Limit {
    left: f64,
    since: Instant,
}

impl Limit {
    fn full(now: Instant) -> Self {
        Self { left: f64::from(BURST), since: now }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let passed: Duration = now.duration_since(self.since);
        self.left = (self.left + passed.as_secs_f64() * f64::from(PER_SECOND)).min(f64::from(BURST));
        self.since = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_limited() {
        let mut now = Instant::now();
        let mut limit = Limit::full(now);
        assert_eq!((0..20).filter(|_| limit.allows(now)).count(), 10);
        now += Duration::from_millis(50);
        assert_eq!((0..20).filter(|_| limit.allows(now)).count(), 5);
    }
}
