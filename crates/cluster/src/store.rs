//! All tables of a node.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::certificates::v1::{ClusterTrustBundle, PodCertificateRequest};
use k8s_openapi::api::core::v1::{
    ConfigMap, Event, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::storage::v1::CSIDriver;
use tokio::sync::watch;

use crate::Table;
use crate::table::Clock;

/// One table per kind. A handle: clones share the tables.
#[derive(Clone, Debug)]
pub struct Store {
    tables: Arc<Tables>,
}

macro_rules! tables {
    ($($(#[$doc:meta])* $name:ident: $kind:ty,)*) => {
        #[derive(Debug)]
        struct Tables {
            version: Arc<Clock>,
            $($name: Table<$kind>,)*
        }

        impl Store {
            /// A store without objects, not yet synced.
            pub fn new() -> Self {
                let version = Arc::<Clock>::default();
                Store { tables: Arc::new(Tables {
                    $($name: Table::new(version.clone()),)*
                    version,
                }) }
            }

            $($(#[$doc])* pub fn $name(&self) -> &Table<$kind> {
                &self.tables.$name
            })*

            /// Called by a source that fills all tables, when they hold all that it knew at the start.
            pub fn set_synced(&self) {
                $(self.tables.$name.set_synced();)*
            }
        }
    };
}

tables! {
    /// Pods bound to this node. A pod whose `deletionTimestamp` is set stays until the kubelet has ended it.
    pods: Pod,
    /// Services.
    services: Service,
    /// EndpointSlices.
    endpoint_slices: EndpointSlice,
    /// ServiceCIDRs (cluster-scoped): where the addresses of Services are from, if the source says.
    service_cidrs: ServiceCIDR,
    /// ConfigMaps.
    config_maps: ConfigMap,
    /// Secrets; `stringData` has been folded into `data`.
    secrets: Secret,
    /// ServiceAccounts.
    service_accounts: ServiceAccount,
    /// Namespaces (cluster-scoped).
    namespaces: Namespace,
    /// Nodes (cluster-scoped); the alone mode has one, this node.
    nodes: Node,
    /// PersistentVolumeClaims; `spec.volumeName` names the bound volume.
    persistent_volume_claims: PersistentVolumeClaim,
    /// PersistentVolumes (cluster-scoped); in the alone mode directories, as `hostPath`.
    persistent_volumes: PersistentVolume,
    /// RuntimeClasses (cluster-scoped), once a pod has named one.
    runtime_classes: RuntimeClass,
    /// CSIDrivers (cluster-scoped), once a pod has a volume of one.
    csi_drivers: CSIDriver,
    /// ClusterTrustBundles (cluster-scoped), once a pod shows one.
    cluster_trust_bundles: ClusterTrustBundle,
    /// PodCertificateRequests of this node's pods, once one wants a certificate.
    pod_certificate_requests: PodCertificateRequest,
    /// Deployments.
    deployments: Deployment,
    /// ReplicaSets, of Deployments and their own.
    replica_sets: ReplicaSet,
    /// StatefulSets.
    stateful_sets: StatefulSet,
    /// DaemonSets.
    daemon_sets: DaemonSet,
    /// Jobs.
    jobs: Job,
    /// CronJobs.
    cron_jobs: CronJob,
    /// Events, aggregated and bounded.
    events: Event,
}

impl Store {
    /// Waits until pods, Services and nodes are known ([`Table::synced`]).
    pub async fn synced(&self) {
        self.pods().synced().await;
        self.services().synced().await;
        self.nodes().synced().await;
    }

    /// Lets the next `resourceVersion` be greater than `version`: for a source that restores saved objects.
    pub fn advance_version(&self, version: u64) {
        self.tables.version.0.send_modify(|latest| *latest = version.max(*latest));
    }

    /// Changes whenever any table does: for who looks at several of them.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.tables.version.0.subscribe()
    }

    /// Counts all changes; the newest `resourceVersion` given out is not greater.
    pub fn version(&self) -> u64 {
        *self.tables.version.0.borrow()
    }
}

impl Default for Store {
    fn default() -> Self {
        Store::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn synced_waits_for_the_source() {
        let store = Store::new();
        let waiter = tokio::spawn({
            let store = store.clone();
            async move { store.synced().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        store.set_synced();
        waiter.await.unwrap();
        store.synced().await;
    }

    #[test]
    fn versions_grow_over_all_tables() {
        let store = Store::new();
        store.advance_version(41);
        let mut pod = Pod::default();
        pod.metadata.name = Some("a".into());
        assert_eq!(store.pods().put(pod).metadata.resource_version.as_deref(), Some("42"));
        assert_eq!(store.version(), 42);
    }
}
