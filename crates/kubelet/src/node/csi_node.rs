//! What a node tells its cluster of the CSI drivers that it has: the CSINode object, and labels and an annotation of the Node.

use std::collections::BTreeMap;

use cluster::Key;
use cluster::api::{Api, ApiError, Deletion, Patch};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::retry::Rests;

/// The node's ids at its drivers, as JSON.
const NODE_IDS: &str = "csi.volume.kubernetes.io/nodeid";

/// A driver, as the cluster is to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// Its name.
    pub name: String,
    /// What it calls this node.
    pub node_id: String,
    /// Where the node is in the driver's eyes; these become labels of the Node.
    pub topology: BTreeMap<String, String>,
    /// How many of its volumes the node can have.
    pub volumes_max: Option<i32>,
}

/// Why a driver is not known to the cluster.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// The driver has no name for the node.
    #[error("the driver gives this node no id")]
    NoId,
    /// The node has the label with another value, which others may rely on.
    #[error("the driver wants the node to have label {label}={wanted}, but it is {there}; remove one of them")]
    Label {
        /// The label.
        label: String,
        /// The driver's value.
        wanted: String,
        /// The node's.
        there: String,
    },
    /// The API server refuses, or does not answer.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// The objects of one node.
#[derive(Debug)]
pub struct CsiNode {
    api: Api,
    name: String,
    /// One change at a time: each reads what it changes.
    turn: Mutex<()>,
}

impl CsiNode {
    /// Those of the node called `name`.
    pub fn new(api: Api, name: &str) -> Self {
        Self { api, name: name.to_owned(), turn: Mutex::default() }
    }

    /// Makes a driver known; tries until the API server takes it. May be dropped.
    ///
    /// # Errors
    /// What another try does not mend.
    pub async fn announce(&self, driver: &Driver) -> Result<(), AnnounceError> {
        let mut rests = Rests::new();
        loop {
            match self.try_to_announce(driver).await {
                Err(AnnounceError::Api(error)) => {
                    tracing::warn!(driver = driver.name, %error, "a CSI driver is not known to the cluster yet; trying again");
                }
                announced => return announced,
            }
            rests.rest().await;
        }
    }

    async fn try_to_announce(&self, driver: &Driver) -> Result<(), AnnounceError> {
        let _turn = self.turn.lock().await;
        let key = Key::cluster(&self.name);
        let node: Node = self.api.get(&key).await?;
        if let Some(change) = node_with(&node, driver)? {
            self.api.patch::<Node>(&key, &Patch::merge(change)).await?;
        }
        let there = self.own(&node).await?;
        Ok(self.put(with(there, driver)).await?)
    }

    /// Forgets a driver. The cluster may not hear of it now: then it does when the driver comes back.
    pub async fn withdraw(&self, driver: &str) {
        if let Err(error) = self.try_to_withdraw(driver).await {
            tracing::warn!(driver, %error, "a CSI driver that is gone is still known to the cluster");
        }
    }

    async fn try_to_withdraw(&self, driver: &str) -> Result<(), ApiError> {
        let _turn = self.turn.lock().await;
        let key = Key::cluster(&self.name);
        match self.api.get::<CSINode>(&key).await {
            Ok(there) => self.put(without(there, driver)).await?,
            Err(ApiError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let node: Node = self.api.get(&key).await?;
        let mut ids = ids_of(&node);
        if ids.remove(driver).is_some() {
            self.api.patch::<Node>(&key, &Patch::merge(ids_change(&ids))).await?;
        }
        Ok(())
    }

    /// The node's CSINode: that of an earlier node of this name is none.
    async fn own(&self, node: &Node) -> Result<CSINode, ApiError> {
        let key = Key::cluster(&self.name);
        let new = CSINode {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                owner_references: Some(vec![owner(node)]),
                ..ObjectMeta::default()
            },
            spec: CSINodeSpec::default(),
            status: None,
        };
        match self.api.get::<CSINode>(&key).await {
            Err(ApiError::NotFound { .. }) => Ok(new),
            Ok(there) if is_owned_by(&there, node) => Ok(there),
            Ok(there) => {
                let how = Deletion { grace_period_s: None, uid: there.metadata.uid };
                self.api.delete::<CSINode>(&key, &how).await?;
                Ok(new)
            }
            Err(error) => Err(error),
        }
    }

    async fn put(&self, object: CSINode) -> Result<(), ApiError> {
        match object.metadata.resource_version {
            Some(_) => self.api.replace(&object).await.map(drop),
            None => self.api.create(&object).await.map(drop),
        }
    }
}

fn owner(node: &Node) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone().unwrap_or_default(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        ..OwnerReference::default()
    }
}

fn is_owned_by(there: &CSINode, node: &Node) -> bool {
    there.metadata.owner_references.iter().flatten().any(|one| *one == owner(node))
}

/// With the driver as it is now, and the others.
fn with(there: CSINode, driver: &Driver) -> CSINode {
    let mut object = without(there, &driver.name);
    object.spec.drivers.push(CSINodeDriver {
        name: driver.name.clone(),
        node_id: driver.node_id.clone(),
        allocatable: driver.volumes_max.map(|count| VolumeNodeResources { count: Some(count) }),
        topology_keys: Some(driver.topology.keys().cloned().collect()),
    });
    object
}

fn without(mut there: CSINode, driver: &str) -> CSINode {
    there.spec.drivers.retain(|one| one.name != driver);
    there
}

/// How the Node has to change; none if it has all.
fn node_with(node: &Node, driver: &Driver) -> Result<Option<Value>, AnnounceError> {
    if driver.node_id.is_empty() {
        return Err(AnnounceError::NoId);
    }
    let none = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&none);
    let mut new = BTreeMap::new();
    for (label, wanted) in &driver.topology {
        match labels.get(label) {
            Some(there) if there == wanted => {}
            Some(there) => {
                let (label, wanted, there) = (label.clone(), wanted.clone(), there.clone());
                return Err(AnnounceError::Label { label, wanted, there });
            }
            None => drop(new.insert(label.clone(), wanted.clone())),
        }
    }
    let mut ids = ids_of(node);
    let is_known = ids.get(&driver.name) == Some(&driver.node_id);
    if is_known && new.is_empty() {
        return Ok(None);
    }
    ids.insert(driver.name.clone(), driver.node_id.clone());
    let mut change = ids_change(&ids);
    change["metadata"]["labels"] = json!(new);
    Ok(Some(change))
}

fn ids_of(node: &Node) -> BTreeMap<String, String> {
    let text = node.metadata.annotations.as_ref().and_then(|annotations| annotations.get(NODE_IDS));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

fn ids_change(ids: &BTreeMap<String, String>) -> Value {
    let text = (!ids.is_empty()).then(|| json!(ids).to_string());
    json!({"metadata": {"annotations": {NODE_IDS: text}}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(topology: &[(&str, &str)]) -> Driver {
        let topology = topology.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Driver { name: "d".to_owned(), node_id: "id".to_owned(), topology, volumes_max: Some(3) }
    }

    #[test]
    fn the_node_gets_ids_and_labels() {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"zone": "a"}}})).unwrap();
        let change = node_with(&node, &driver(&[("zone", "a"), ("rack", "7")])).unwrap().unwrap();
        let annotations = json!({NODE_IDS: "{\"d\":\"id\"}"});
        assert_eq!(change, json!({"metadata": {"annotations": annotations, "labels": {"rack": "7"}}}));
        let known: Node = serde_json::from_value(json!({"metadata": {"annotations": annotations}})).unwrap();
        assert_eq!(node_with(&known, &driver(&[])).unwrap(), None);
        let error = node_with(&node, &driver(&[("zone", "b")])).unwrap_err().to_string();
        assert!(error.contains("zone=b") && error.contains("it is a"), "{error}");
    }

    #[test]
    fn drivers_come_and_go() {
        let other = json!({"spec": {"drivers": [{"name": "other", "nodeID": "o"}, {"name": "d", "nodeID": "old"}]}});
        let there: CSINode = serde_json::from_value(other).unwrap();
        let with = with(there, &driver(&[("zone", "a")]));
        let shown = |object: &CSINode| serde_json::to_value(&object.spec.drivers).unwrap();
        let d = json!({"name": "d", "nodeID": "id", "allocatable": {"count": 3}, "topologyKeys": ["zone"]});
        let other = json!({"name": "other", "nodeID": "o"});
        assert_eq!(shown(&with), json!([other, d]));
        assert_eq!(shown(&without(with, "d")), json!([other]));
    }
}
