//! Random histories over every field that a proxy acts on: however the model came to know of the objects, it means the same.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::tests::sorted;
use super::*;
use crate::diff;

/// All objects, by name.
#[derive(Debug, Clone, Default)]
struct World {
    services: BTreeMap<u8, Value>,
    slices: BTreeMap<u8, Value>,
    node: Value,
}

#[derive(Debug, Clone)]
enum Step {
    Service(u8, Option<Value>),
    Slice(u8, Option<Value>),
    Node(Value),
    Update,
}

/// One of these, or the field is missing.
fn one_of(values: &'static [&'static str]) -> impl Strategy<Value = Value> {
    prop::option::of(prop::sample::select(values)).prop_map(|text| text.map_or(Value::Null, Value::from))
}

/// Some of these.
fn some_of(values: &'static [&'static str]) -> impl Strategy<Value = Value> {
    prop::sample::subsequence(values, 0..=values.len()).prop_map(|texts| json!(texts))
}

fn port() -> impl Strategy<Value = Value> {
    let (names, protocols) = (one_of(&["web", "dns", ""]), one_of(&["TCP", "UDP", "SCTP", "QUIC"]));
    let node_port = prop::option::of(30_000u16..30_003);
    (names, protocols, 0u16..3, node_port).prop_map(|(name, protocol, number, node_port)| {
        json!({"name": name, "protocol": protocol, "port": number, "nodePort": node_port, "appProtocol": "x"})
    })
}

fn spec() -> impl Strategy<Value = Value> {
    let addresses = some_of(&["10.96.0.1", "10.96.0.2", "fd00:96::1"]);
    let kinds = one_of(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
    let policies = (one_of(&["Local", "Cluster"]), one_of(&["Local", "Cluster"]));
    let affinity = (one_of(&["ClientIP", "None"]), prop::option::of(0i32..3));
    let outside = (some_of(&["192.0.2.1", "2001:db8::1", "nonsense"]), some_of(&["10.0.0.0/8", "::/0", "none"]));
    let ports = prop::collection::vec(port(), 0..4);
    (addresses, kinds, policies, affinity, outside, ports, prop::option::of(30_500i32..30_502)).prop_map(
        |(addresses, kind, (internal, external), (affinity, timeout), (external_ips, ranges), ports, health)| {
            let first = addresses[0].as_str().map_or(json!("None"), Value::from);
            json!({"type": kind, "clusterIP": first, "clusterIPs": addresses, "ports": ports,
                "internalTrafficPolicy": internal, "externalTrafficPolicy": external,
                "sessionAffinity": affinity, "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout}},
                "externalIPs": external_ips, "loadBalancerSourceRanges": ranges, "healthCheckNodePort": health})
        },
    )
}

fn service_object() -> impl Strategy<Value = Value> {
    let ingress = prop::collection::vec((one_of(&["198.51.100.1", "2001:db8::2"]), one_of(&["VIP", "Proxy"])), 0..3);
    let foreign = prop::bool::weighted(0.1);
    (spec(), ingress, foreign, 1u8..4).prop_map(|(spec, ingress, foreign, day)| {
        let ingress: Vec<Value> = ingress.into_iter().map(|(ip, mode)| json!({"ip": ip, "ipMode": mode})).collect();
        let labels = if foreign { json!({"service.kubernetes.io/service-proxy-name": "x"}) } else { json!({}) };
        json!({"metadata": {"namespace": "d", "labels": labels, "creationTimestamp": format!("2026-01-0{day}T00:00:00Z")},
            "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}})
    })
}

fn endpoint(ipv6: bool) -> impl Strategy<Value = Value> {
    let conditions = any::<[Option<bool>; 3]>();
    let hints = (some_of(&["y", "z"]), some_of(&["here", "there"]), any::<bool>());
    (1u8..6, one_of(&["here", "there"]), conditions, hints).prop_map(
        move |(n, node, conditions, (zones, nodes, any))| {
            let [ready, serving, terminating] = conditions;
            let named = |names: &Value| -> Vec<Value> {
                names.as_array().into_iter().flatten().map(|name| json!({"name": name})).collect()
            };
            let hints = any.then(|| json!({"forZones": named(&zones), "forNodes": named(&nodes)}));
            let address = if ipv6 { format!("fd00::{n}") } else { format!("10.0.0.{n}") };
            json!({"addresses": [address, "10.9.9.9"], "nodeName": node, "hostname": "h", "hints": hints,
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "targetRef": {"kind": "Pod", "uid": format!("p{n}")}})
        },
    )
}

fn slice_ports() -> impl Strategy<Value = Vec<(Value, Value, Option<i32>)>> {
    let port = (one_of(&["web", "dns", ""]), one_of(&["TCP", "UDP"]), prop::option::of(8080i32..8083));
    prop::collection::vec(port, 0..4)
}

fn slice_object() -> impl Strategy<Value = Value> {
    (any::<bool>(), 0u8..4, prop::bool::weighted(0.1)).prop_flat_map(|(ipv6, service, headless)| {
        (prop::collection::vec(endpoint(ipv6), 0..5), slice_ports()).prop_map(move |(endpoints, ports)| {
            let mut labels = json!({"kubernetes.io/service-name": format!("s{service}")});
            if headless {
                labels["service.kubernetes.io/headless"] = json!("");
            }
            let port = |(name, protocol, number)| json!({"name": name, "protocol": protocol, "port": number});
            json!({"metadata": {"namespace": "d", "labels": labels}, "addressType": if ipv6 { "IPv6" } else { "IPv4" },
                "endpoints": endpoints, "ports": ports.into_iter().map(port).collect::<Vec<Value>>()})
        })
    })
}

fn node_object() -> impl Strategy<Value = Value> {
    (one_of(&["y", "z"]), some_of(&["10.1.2.3", "192.0.2.9", "fd00:9::1"])).prop_map(|(zone, addresses)| {
        let addresses = addresses.as_array().into_iter().flatten();
        let addresses: Vec<Value> = addresses.map(|one| json!({"type": "InternalIP", "address": one})).collect();
        let labels = if zone.is_null() { json!({}) } else { json!({"topology.kubernetes.io/zone": zone}) };
        json!({"metadata": {"name": "here", "labels": labels}, "status": {"addresses": addresses}})
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u8..4, prop::option::weighted(0.8, service_object())).prop_map(|(name, object)| Step::Service(name, object)),
        5 => (0u8..6, prop::option::weighted(0.8, slice_object())).prop_map(|(name, object)| Step::Slice(name, object)),
        1 => node_object().prop_map(Step::Node),
        3 => Just(Step::Update),
    ];
    prop::collection::vec(step, 0..40)
}

fn named<T: serde::de::DeserializeOwned>(object: &Value, name: String) -> T {
    let mut object = object.clone();
    object["metadata"]["name"] = name.into();
    serde_json::from_value(object).unwrap()
}

impl World {
    fn take(&mut self, step: Step, model: &mut Model) {
        match step {
            Step::Service(name, Some(object)) => {
                model.set_service(&named(&object, format!("s{name}")));
                self.services.insert(name, object);
            }
            Step::Service(name, None) => {
                self.services.remove(&name);
                model.remove_service("d", &format!("s{name}"));
            }
            Step::Slice(name, Some(object)) => {
                model.set_slice(&named(&object, format!("e{name}")));
                self.slices.insert(name, object);
            }
            Step::Slice(name, None) => {
                self.slices.remove(&name);
                model.remove_slice("d", &format!("e{name}"));
            }
            Step::Node(object) => {
                model.set_node(&named(&object, "here".to_owned()));
                self.node = object;
            }
            Step::Update => {}
        }
    }

    fn fresh(&self) -> Model {
        let mut model = Model::new("here");
        // In another order than they came.
        self.slices.iter().rev().for_each(|(name, slice)| model.set_slice(&named(slice, format!("e{name}"))));
        self.services.iter().rev().for_each(|(name, service)| model.set_service(&named(service, format!("s{name}"))));
        if !self.node.is_null() {
            model.set_node(&named(&self.node, "here".to_owned()));
        }
        model.update();
        model
    }
}

proptest! {
    #[test]
    fn history_does_not_matter(steps in steps()) {
        let (mut world, mut model, mut kernel) = (World::default(), Model::new("here"), Rules::default());
        for step in steps.into_iter().chain([Step::Update]) {
            let is_update = matches!(step, Step::Update);
            world.take(step, &mut model);
            if !is_update {
                continue;
            }
            let before = model.rules().clone();
            let difference = model.update();
            prop_assert_eq!(&difference, &diff(&before, model.rules()), "the quick way and the full comparison");
            kernel.apply(difference);
            prop_assert_eq!(&kernel, model.rules(), "what has been applied bit by bit");
            let fresh = world.fresh();
            prop_assert_eq!(sorted(model.rules()), sorted(fresh.rules()));
            prop_assert_eq!(model.problems(), fresh.problems());
            prop_assert_eq!(model.health_checks(), fresh.health_checks());
            for name in 0u8..4 {
                let explain = |model: &Model| model.explain("d", &format!("s{name}")).map(|one| one.to_string());
                prop_assert_eq!(explain(&model), explain(&fresh));
            }
        }
    }
}
