//! EndpointSlices: which pods stand behind a Service, and whether they take requests.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::common::{is_owned_by, is_ready, is_terminal, is_terminating, name, owned_by, short_hash};
use super::{Change, Plan, selector};
use crate::Key;
use crate::manifests::Kind;

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const CONTROLLER: &str = "endpointslice-controller.k8s.io";

/// Ports of a slice: name, number, protocol.
type Ports = Vec<(String, i32, String)>;

pub(crate) fn reconcile(service: &Service, pods: &[Arc<Pod>], slices: &[Arc<EndpointSlice>]) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &service.spec else { return plan };
    let Some(wanted) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else { return plan };
    if spec.type_.as_deref() == Some("ExternalName") {
        return plan;
    }
    let chosen = pods.iter().filter(|pod| {
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        pod.metadata.namespace == service.metadata.namespace && selector::contains(wanted, &labels)
    });
    // Named ports may have other numbers in other pods: one slice for each set of ports.
    let mut groups: BTreeMap<Ports, Vec<Endpoint>> = BTreeMap::new();
    for pod in chosen {
        if let Some(endpoint) = endpoint(service, pod) {
            groups.entry(ports(spec.ports.as_deref().unwrap_or_default(), pod)).or_default().push(endpoint);
        }
    }
    let known = slices.iter().filter(|slice| is_owned_by(&slice.metadata, &service.metadata));
    let mut surplus: Vec<&Arc<EndpointSlice>> = known.collect();
    for (ports, mut endpoints) in groups {
        endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
        let slice = slice(service, &ports, endpoints);
        let old = surplus.iter().position(|old| old.metadata.name == slice.metadata.name);
        match old.map(|at| surplus.swap_remove(at)) {
            None => plan.push(Change::Create(slice.into_any())),
            Some(old) if old.endpoints == slice.endpoints && old.ports == slice.ports => {}
            Some(old) => {
                let metadata = old.metadata.clone();
                plan.push(Change::Replace(EndpointSlice { metadata, ..slice }.into_any()));
            }
        }
    }
    for slice in surplus {
        plan.push(Change::Remove("EndpointSlice", Key::of(&slice.metadata)));
    }
    plan
}

fn endpoint(service: &Service, pod: &Pod) -> Option<Endpoint> {
    let address = pod.status.as_ref()?.pod_ip.clone().filter(|address| !address.is_empty())?;
    if is_terminal(pod) {
        return None;
    }
    let spec = service.spec.as_ref()?;
    let (serving, terminating) = (is_ready(pod), is_terminating(pod));
    let ready = (serving || spec.publish_not_ready_addresses == Some(true)) && !terminating;
    let pod_spec = pod.spec.as_ref()?;
    let named =
        pod_spec.hostname.as_ref().filter(|_| pod_spec.subdomain.as_deref() == service.metadata.name.as_deref());
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: named.cloned(),
        node_name: pod_spec.node_name.clone(),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    })
}

/// The service's ports in this pod; a name that the pod does not have is left out.
fn ports(ports: &[ServicePort], pod: &Pod) -> Ports {
    let resolve = |port: &ServicePort| -> Option<(String, i32, String)> {
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
        let number = match &port.target_port {
            None => port.port,
            Some(IntOrString::Int(0)) => port.port,
            Some(IntOrString::Int(number)) => *number,
            Some(IntOrString::String(wanted)) => named_port(pod, wanted, &protocol)?,
        };
        Some((port.name.clone().unwrap_or_default(), number, protocol))
    };
    ports.iter().filter_map(resolve).collect()
}

fn named_port(pod: &Pod, wanted: &str, protocol: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let fits = ports
        .find(|port| port.name.as_deref() == Some(wanted) && port.protocol.as_deref().unwrap_or("TCP") == protocol);
    fits.map(|port| port.container_port)
}

fn slice(service: &Service, ports: &Ports, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let owner = name(&service.metadata);
    let suffix = short_hash(format!("{ports:?}").as_bytes());
    let labels = [(SERVICE_NAME.into(), owner.into()), (MANAGED_BY.into(), CONTROLLER.into())];
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(format!("{owner}-{}", &suffix[..5])),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels.into()),
            owner_references: Some(owned_by(service)),
            ..ObjectMeta::default()
        },
        address_type: "IPv4".into(),
        endpoints: Some(endpoints),
        ports: Some(
            ports
                .iter()
                .map(|(name, number, protocol)| EndpointPort {
                    name: Some(name.clone()),
                    port: Some(*number),
                    protocol: Some(protocol.clone()),
                    app_protocol: None,
                })
                .collect(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::common::tests::object;
    use super::*;
    use crate::manifests::AnyObject;

    fn service() -> Service {
        object(json!({"metadata": {"name": "web"}, "spec": {"selector": {"a": "b"},
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}]}}))
    }

    fn pod(name: &str, ready: bool, ending: bool) -> Arc<Pod> {
        let mut pod: Pod = object(json!({"metadata": {"name": name, "labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": format!("10.0.0.{}", name.len()),
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}}));
        pod.metadata.deletion_timestamp =
            ending.then(|| serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        Arc::new(pod)
    }

    fn created(plan: &Plan) -> &EndpointSlice {
        match &plan.changes[..] {
            [Change::Create(AnyObject::EndpointSlice(slice))] => slice,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn conditions_follow_the_pods() {
        let plan =
            reconcile(&service(), &[pod("a", true, false), pod("bb", false, false), pod("ccc", true, true)], &[]);
        let slice = created(&plan);
        assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
        let flags: Vec<_> = slice
            .endpoints
            .iter()
            .flatten()
            .map(|endpoint| endpoint.conditions.clone().unwrap())
            .map(|conditions| [conditions.ready, conditions.serving, conditions.terminating].map(Option::unwrap))
            .collect();
        assert_eq!(flags, [[true, true, false], [false, false, false], [false, true, true]]);
    }

    #[test]
    fn what_is_right_stays() {
        let pods = [pod("a", true, false)];
        let mut slice = created(&reconcile(&service(), &pods, &[])).clone();
        slice.metadata.uid = Some("u".into());
        assert_eq!(reconcile(&service(), &pods, &[Arc::new(slice.clone())]), Plan::default());
        let plan = reconcile(&service(), &[], &[Arc::new(slice)]);
        assert!(matches!(plan.changes[..], [Change::Remove("EndpointSlice", _)]));
    }
}
