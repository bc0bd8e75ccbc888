//! The cluster's names: what services and pods of the store mean in DNS, handed to the name server when it changes.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointSlice};
use network::Protocol;
use network::dns::{Endpoint, Port, Server, Target, Zone};

/// The label by which a slice names its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What a zone is made for.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    /// The cluster's domain.
    pub(super) domain: String,
    /// Ranges of services and pods, as `10.96.0.0/16`.
    pub(super) networks: Vec<String>,
}

/// Keeps the server's zone up to date until it is dropped.
pub(super) async fn serve(store: Store, server: Arc<Server>, scope: Scope) {
    let mut services = store.services().watch();
    let mut slices = store.endpoint_slices().watch();
    let mut pods = store.pods().watch();
    let mut served = None;
    loop {
        let zone = zone(&store, &scope);
        if served.as_ref() != Some(&zone) {
            match server.update(zone.clone()).await {
                Ok(()) => served = Some(zone),
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the name server does not have the newest names; the next change tries again"
                ),
            }
        }
        tokio::select! {
            () = services.changed() => {}
            () = slices.changed() => {}
            () = pods.changed() => {}
        }
        // What changed is read from the tables: only that they changed matters.
        while services.try_next().is_some() || slices.try_next().is_some() || pods.try_next().is_some() {}
    }
}

/// All names of this moment. What cannot be a name is left out, as its object is at fault.
fn zone(store: &Store, scope: &Scope) -> Zone {
    let mut zone = Zone::new(&scope.domain).unwrap_or_else(|_| Zone::new("cluster.local").expect("it is a DNS name"));
    scope.networks.iter().filter_map(|network| network.parse().ok()).for_each(|network| zone.add_network(network));
    let slices = by_service(store);
    for service in store.services().list() {
        let key = Key::of(&service.metadata);
        let own = slices.get(&key).map_or(&[][..], Vec::as_slice);
        let Some(target) = target(&service, own) else { continue };
        if let Err(error) = zone.add_service(key.namespace(), key.name(), &target) {
            tracing::debug!(service = %key, %error, "a service has no name in DNS");
        }
    }
    for pod in store.pods().list() {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        for ip in addresses(&pod) {
            // Namespaces are DNS labels: validation saw to that.
            let _ = zone.add_pod(namespace, ip);
        }
    }
    zone
}

fn by_service(store: &Store) -> HashMap<Key, Vec<Arc<EndpointSlice>>> {
    let mut slices: HashMap<Key, Vec<Arc<EndpointSlice>>> = HashMap::new();
    for slice in store.endpoint_slices().list() {
        let labels = slice.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|labels| labels.get(SERVICE_NAME)) else { continue };
        let key = Key::new(slice.metadata.namespace.as_deref().unwrap_or("default"), service);
        slices.entry(key).or_default().push(slice);
    }
    slices
}

/// The addresses of a pod in the pods' network.
fn addresses(pod: &Pod) -> HashSet<IpAddr> {
    if pod::spec::of(pod).host_network == Some(true) {
        return HashSet::new();
    }
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|one| one.ip.parse().ok()).collect()
}

/// Where a service's name leads; `None` while it has no address yet.
fn target(service: &Service, slices: &[Arc<EndpointSlice>]) -> Option<Target> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return Some(Target::External(spec.external_name.clone()?));
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        let all = spec.publish_not_ready_addresses == Some(true);
        return Some(Target::Headless(slices.iter().flat_map(|slice| endpoints(slice, all)).collect()));
    }
    let ips: Vec<IpAddr> = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
    let ports = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|port| named_port(port.name.as_deref(), port.protocol.as_deref(), port.port));
    (!ips.is_empty()).then(|| Target::Cluster { ips, ports: ports.collect() })
}

fn endpoints(slice: &EndpointSlice, all: bool) -> Vec<Endpoint> {
    let ports: Vec<Port> = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|port| named_port(port.name.as_deref(), port.protocol.as_deref(), port.port?))
        .collect();
    let wanted = |endpoint: &&SliceEndpoint| {
        all || endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready != Some(false))
    };
    let of = |endpoint: &SliceEndpoint| -> Vec<Endpoint> {
        let ips = endpoint.addresses.iter().filter_map(|ip| ip.parse().ok());
        ips.map(|ip| Endpoint { ip, hostname: endpoint.hostname.clone(), ports: ports.clone() }).collect()
    };
    slice.endpoints.iter().flatten().filter(wanted).flat_map(of).collect()
}

fn named_port(name: Option<&str>, protocol: Option<&str>, port: i32) -> Option<Port> {
    let protocol = match protocol {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(_) => return None,
    };
    let name = name.filter(|name| !name.is_empty())?.to_owned();
    Some(Port { name, protocol, port: u16::try_from(port).ok()? })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: serde_json::Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec})).unwrap()
    }

    fn slice() -> Arc<EndpointSlice> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": "web-1", "namespace": "default"}, "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080}],
                "endpoints": [
                    {"addresses": ["10.85.0.2"], "hostname": "web-0", "conditions": {"ready": true}},
                    {"addresses": ["10.85.0.3"], "conditions": {"ready": false}}]
            }))
            .unwrap(),
        )
    }

    #[test]
    fn services_lead_where_their_kind_says() {
        let plain =
            target(&service(json!({"clusterIPs": ["10.96.0.7"], "ports": [{"name": "http", "port": 80}]})), &[]);
        let Some(Target::Cluster { ips, ports }) = plain else { panic!("{plain:?}") };
        assert_eq!((ips[0].to_string().as_str(), ports[0].port), ("10.96.0.7", 80));
        let other = target(&service(json!({"type": "ExternalName", "externalName": "x.example"})), &[]);
        assert_eq!(other, Some(Target::External("x.example".into())));
        assert_eq!(target(&service(json!({"ports": [{"port": 80}]})), &[]), None);
    }

    #[test]
    fn a_headless_service_names_its_ready_endpoints() {
        let count = |spec| match target(&service(spec), &[slice()]) {
            Some(Target::Headless(endpoints)) => endpoints.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(count(json!({"clusterIP": "None"})), 1);
        assert_eq!(count(json!({"clusterIP": "None", "publishNotReadyAddresses": true})), 2);
    }
}
