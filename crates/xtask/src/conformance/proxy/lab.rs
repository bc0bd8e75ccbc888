//! The API server, and what the test has written to it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};
use testkit::api::{Api, Reply};
use testkit::control_plane::{self, ControlPlane};
use testkit::service_lab::API_ADDRESS;
use testkit::{go, netns};

use super::contestant::{Programs, node_object};
use super::world::{Marker, NODE, Object, SERVICE_RANGES, World};

const JSON: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";

/// Everything that all contestants share.
pub(super) struct Lab {
    pub(super) plane: ControlPlane,
    pub(super) programs: Programs,
    written: BTreeMap<String, Object>,
    pub(super) marker: Marker,
}

impl Lab {
    /// Starts the API server in a namespace that the calling thread enters. What is written goes to `dir`.
    pub(super) fn start(orlop: &Path, dir: &Path) -> anyhow::Result<Self> {
        let parts = control_plane::build()?;
        let upstream = go::build(&go::KUBE_PROXY)?;
        netns::enter_private()?;
        netns::add_address(API_ADDRESS.into())?;
        let options = control_plane::Options {
            address: IpAddr::V4(API_ADDRESS),
            service_range: SERVICE_RANGES.to_owned(),
            ..control_plane::Options::default()
        };
        let plane = ControlPlane::start(&parts, &dir.join("plane"), options)?;
        plane.ensure_namespace("default")?;
        plane.api().ensure("/api/v1/nodes", &node_object())?;
        let kubeconfig = plane.proxy_kubeconfig()?;
        let programs = Programs { upstream, orlop: orlop.to_owned(), kubeconfig, dir: dir.to_owned() };
        Ok(Self { plane, programs, written: BTreeMap::new(), marker: Marker(0) })
    }

    /// Makes the API server have what `world` says and nothing else, and then a marker, which is returned.
    pub(super) fn write(&mut self, world: &World) -> anyhow::Result<Marker> {
        self.marker = Marker((self.marker.0 + 1) % 20_000);
        let mut marker = World::default();
        self.marker.add_to(&mut marker);
        let marker = marker.objects()?;
        let wanted = world.objects()?;
        let gone = |path: &&String| !wanted.contains_key(*path) && !marker.contains_key(*path);
        for path in self.written.keys().filter(gone).cloned().collect::<Vec<_>>() {
            self.plane.api().delete(&path)?;
            self.written.remove(&path);
        }
        for (path, object) in wanted.into_iter().chain(marker) {
            self.put(path, object)?;
        }
        Ok(self.marker)
    }

    fn put(&mut self, path: String, object: Object) -> anyhow::Result<()> {
        let api = self.plane.api();
        let before = self.written.get(&path);
        if before == Some(&object) {
            return Ok(());
        }
        match before {
            None => create(api, &object)?,
            // What may not be changed is made anew.
            Some(_) => {
                if !is_good(&api.request("PUT", &path, Some((JSON, &object.body)))?) {
                    api.delete(&path)?;
                    create(api, &object)?;
                }
            }
        }
        let cleared = || json!({ "status": { "loadBalancer": { "ingress": null } } });
        let had = before.is_some_and(|before| before.status.is_some());
        if let Some(status) = object.status.clone().or_else(|| had.then(cleared)) {
            let reply = api.request("PATCH", &format!("{path}/status"), Some((MERGE, &status)))?;
            reply.json().with_context(|| format!("status of {path}"))?;
        }
        self.written.insert(path, object);
        Ok(())
    }

    /// Labels the node.
    pub(super) fn label_node(&self, labels: &Value) -> anyhow::Result<()> {
        let patch = json!({ "metadata": { "labels": labels } });
        self.plane.api().merge(&format!("/api/v1/nodes/{NODE}"), &patch).map(drop)
    }
}

fn create(api: &Api, object: &Object) -> anyhow::Result<()> {
    api.create(&object.collection, &object.body).map(drop).with_context(|| object.body.to_string())
}

fn is_good(reply: &Reply) -> bool {
    (200..300).contains(&reply.status)
}
