//! The store's tables by the API's plural names, for the local command line.

use cluster::{Object, Store, Table};
use serde::Serialize;
use serde_json::Value;

/// Calls `$body` with the table that `$kind` names; `None` for a kind that the store does not have.
macro_rules! with_table {
    ($store:expr, $kind:expr, $table:ident => $body:expr) => {
        match $kind {
            "pods" => {
                let $table = $store.pods();
                Some($body)
            }
            "services" => {
                let $table = $store.services();
                Some($body)
            }
            "endpointslices" => {
                let $table = $store.endpoint_slices();
                Some($body)
            }
            "configmaps" => {
                let $table = $store.config_maps();
                Some($body)
            }
            "secrets" => {
                let $table = $store.secrets();
                Some($body)
            }
            "serviceaccounts" => {
                let $table = $store.service_accounts();
                Some($body)
            }
            "namespaces" => {
                let $table = $store.namespaces();
                Some($body)
            }
            "nodes" => {
                let $table = $store.nodes();
                Some($body)
            }
            "persistentvolumeclaims" => {
                let $table = $store.persistent_volume_claims();
                Some($body)
            }
            "persistentvolumes" => {
                let $table = $store.persistent_volumes();
                Some($body)
            }
            "deployments" => {
                let $table = $store.deployments();
                Some($body)
            }
            "replicasets" => {
                let $table = $store.replica_sets();
                Some($body)
            }
            "statefulsets" => {
                let $table = $store.stateful_sets();
                Some($body)
            }
            "daemonsets" => {
                let $table = $store.daemon_sets();
                Some($body)
            }
            "jobs" => {
                let $table = $store.jobs();
                Some($body)
            }
            "cronjobs" => {
                let $table = $store.cron_jobs();
                Some($body)
            }
            "events" => {
                let $table = $store.events();
                Some($body)
            }
            _ => None,
        }
    };
}

/// The kinds that [`list`] knows.
pub(crate) const KINDS: &[&str] = &[
    "pods",
    "services",
    "endpointslices",
    "configmaps",
    "secrets",
    "serviceaccounts",
    "namespaces",
    "nodes",
    "persistentvolumeclaims",
    "persistentvolumes",
    "deployments",
    "replicasets",
    "statefulsets",
    "daemonsets",
    "jobs",
    "cronjobs",
    "events",
];

/// All objects of a kind as JSON, of one namespace or of all; `None` for an unknown kind.
pub(crate) fn list(
    store: &Store,
    kind: &str,
    namespace: Option<&str>,
) -> Option<Result<Vec<Value>, serde_json::Error>> {
    with_table!(store, kind, table => listed(table, namespace))
}

fn listed<T: Object + Serialize>(table: &Table<T>, namespace: Option<&str>) -> Result<Vec<Value>, serde_json::Error> {
    let objects = match namespace {
        // Objects without a namespace (nodes, volumes) are in every listing.
        Some(namespace) => [table.list_namespace(""), table.list_namespace(namespace)].concat(),
        None => table.list(),
    };
    objects.iter().map(|object| serde_json::to_value(object.as_ref())).collect()
}

/// A stream of ticks: one at the start, then one for each batch of changes of the kind; `None` for an unknown kind.
pub(crate) fn changes(store: &Store, kind: &str) -> Option<tokio::sync::mpsc::Receiver<()>> {
    with_table!(store, kind, table => ticks(table))
}

fn ticks<T: Object>(table: &Table<T>) -> tokio::sync::mpsc::Receiver<()> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut watch = table.watch();
    // Owned by its receiver: the task ends with the connection that reads it.
    tokio::spawn(async move {
        while sender.send(()).await.is_ok() {
            tokio::select! {
                () = watch.changed() => {}
                () = sender.closed() => return,
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;

    fn pod(namespace: &str, name: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.namespace = Some(namespace.into());
        pod.metadata.name = Some(name.into());
        pod
    }

    #[test]
    fn every_kind_is_listed() {
        let store = Store::new();
        KINDS.iter().for_each(|kind| assert!(list(&store, kind, None).is_some(), "{kind}"));
        assert!(list(&store, "unicorns", None).is_none());
    }

    #[test]
    fn a_listing_of_a_namespace_is_only_that() {
        let store = Store::new();
        store.pods().put(pod("default", "a"));
        store.pods().put(pod("other", "b"));
        assert_eq!(list(&store, "pods", Some("default")).unwrap().unwrap().len(), 1);
        assert_eq!(list(&store, "pods", None).unwrap().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_change_is_a_tick() {
        let store = Store::new();
        let mut ticks = changes(&store, "pods").unwrap();
        ticks.recv().await.unwrap();
        store.pods().put(pod("default", "a"));
        ticks.recv().await.unwrap();
    }
}
