//! The model on objects as manifests spell them, and against a slow and simple reading of what Services mean.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{Endpoint, Protocol, Refusals, Target, diff};

fn service(value: Value) -> Service {
    serde_json::from_value(value).unwrap()
}

fn slice(value: Value) -> EndpointSlice {
    serde_json::from_value(value).unwrap()
}

fn web(spec: Value) -> Service {
    service(json!({"metadata": {"namespace": "d", "name": "web"}, "spec": spec}))
}

/// Endpoints on port 8080: last octet, node, ready, terminating (and serving).
fn web_slice(name: &str, endpoints: &[(u8, &str, bool, bool)]) -> EndpointSlice {
    let endpoint = |(n, node, ready, terminating): &(u8, &str, bool, bool)| {
        json!({"addresses": [format!("10.0.0.{n}")], "nodeName": node,
            "conditions": {"ready": ready, "serving": ready | terminating, "terminating": terminating},
            "targetRef": {"kind": "Pod", "uid": format!("pod-{n}")}})
    };
    slice(json!({"metadata": {"namespace": "d", "name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080}],
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>()}))
}

/// Rules in short: `address:port/protocol -> slots | outside slots`.
fn shown(model: &Model) -> Vec<String> {
    let target = |target: &Target| match target {
        Target::Endpoints(slots) => {
            let one = |endpoint: &Endpoint| {
                let last = endpoint.address.to_string().rsplit(['.', ':']).next().unwrap().to_owned();
                format!("{last}:{}", endpoint.port)
            };
            slots.iter().map(one).collect::<Vec<_>>().join(" ")
        }
        other => format!("{other:?}"),
    };
    let line = |(frontend, entry): (&Frontend, &Entry)| {
        let outside = entry.outside.as_ref().map(|outside| format!(" | {}", target(outside))).unwrap_or_default();
        format!("{frontend} -> {}{outside}", target(&entry.inside))
    };
    model.rules().iter().map(line).collect()
}

#[track_caller]
fn check(spec: Value, endpoints: &[(u8, &str, bool, bool)], expect: &[&str]) {
    let mut model = Model::new("here");
    model.set_service(&web(spec));
    model.set_slice(&web_slice("web-1", endpoints));
    model.update();
    assert_eq!(shown(&model), expect);
}

const NEAR_AND_FAR: &[(u8, &str, bool, bool)] = &[(1, "here", true, false), (2, "there", true, false)];
const FAR: &[(u8, &str, bool, bool)] = &[(2, "there", true, false)];

#[test]
fn kinds_of_services() {
    check(
        json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30000}]}),
        NEAR_AND_FAR,
        &["10.96.0.1:80/TCP -> 1:8080 2:8080"],
    );
    check(
        json!({"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30000}]}),
        &[],
        &["node port 30000/TCP -> Refuse", "10.96.0.1:80/TCP -> Refuse"],
    );
    check(json!({"clusterIP": "None", "ports": [{"port": 80}]}), NEAR_AND_FAR, &[]);
    check(json!({"ports": [{"port": 80}]}), NEAR_AND_FAR, &[]);
    check(json!({"type": "ExternalName", "clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), NEAR_AND_FAR, &[]);
    check(
        json!({"clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.9", "2001:db8::9"], "ports": [{"port": 80}]}),
        FAR,
        &["10.96.0.1:80/TCP -> 2:8080", "192.0.2.9:80/TCP -> 2:8080"],
    );
}

#[test]
fn an_address_that_no_service_can_have_is_a_problem_of_its_own() {
    let mut model = Model::new("here");
    let special = ["127.0.0.1", "224.0.0.1", "255.255.255.255", "169.254.0.1", "::1", "fe80::1", "ff0e::1"];
    let externals: Vec<&str> = special.into_iter().chain(["192.000.002.009"]).collect();
    model.set_service(&web(json!({"clusterIP": "10.96.0.1", "externalIPs": externals, "ports": [{"port": 80}]})));
    model.set_slice(&web_slice("web-1", FAR));
    model.update();
    assert_eq!(shown(&model), ["10.96.0.1:80/TCP -> 2:8080", "192.0.2.9:80/TCP -> 2:8080"]);
    let text = model.explain("d", "web").unwrap().to_string();
    for address in special {
        assert!(text.contains(&format!("  spec.externalIPs is left out: \"{address}\" cannot be used")), "{text}");
    }
}

#[test]
fn external_addresses_can_be_left_out() {
    let mut model = Model::new("here").without_external_ips();
    let external = json!({"clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.9"], "ports": [{"port": 80}]});
    model.set_service(&web(external));
    model.set_slice(&web_slice("web-1", FAR));
    model.update();
    assert_eq!(shown(&model), ["10.96.0.1:80/TCP -> 2:8080"]);
}

#[test]
fn sources_of_one_family_say_nothing_of_the_other() {
    let check = |ranges: &[&str], v4: Option<&[&str]>, v6: Option<&[&str]>| {
        let mut model = Model::new("here");
        let mut balanced = web(json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1",
            "clusterIPs": ["10.96.0.1", "fd00::1"], "ports": [{"port": 80}], "loadBalancerSourceRanges": ranges}));
        let ingress = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}, {"ip": "2001:db8::9"}]}});
        balanced.status = serde_json::from_value(ingress).unwrap();
        model.set_service(&balanced);
        model.update();
        for (address, expect) in [("192.0.2.9", v4), ("2001:db8::9", v6)] {
            let frontend = Frontend { address: address.parse().unwrap(), protocol: Protocol::Tcp, port: 80 };
            let sources = model.rules().get(&frontend).unwrap().sources.as_ref();
            let sources = sources.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
            assert_eq!(
                sources.as_deref(),
                expect.map(|all| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>()).as_deref(),
                "{ranges:?} at {address}"
            );
        }
    };
    check(&["198.51.100.0/24"], Some(&["198.51.100.0/24"]), None);
    check(&["2001:db8:1::/48"], None, Some(&["2001:db8:1::/48"]));
    check(&["198.51.100.0/24", "::/0"], Some(&["198.51.100.0/24"]), None);
    check(&[], None, None);
    // It may have been of either family.
    check(&["198.51.100.0/24", "nonsense"], Some(&["198.51.100.0/24"]), Some(&[]));
}

#[test]
fn sources_may_have_leading_zeros() {
    let mut model = Model::new("here");
    let mut balanced = web(json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "ports": [{"port": 80}],
        "loadBalancerSourceRanges": ["010.001.0.0/16"]}));
    balanced.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}})).unwrap();
    model.set_service(&balanced);
    model.set_slice(&web_slice("web-1", FAR));
    model.update();
    let text = model.explain("d", "web").unwrap().to_string();
    assert!(text.contains("only from 10.1.0.0/16"), "{text}");
}

#[test]
fn traffic_policies() {
    let internal = json!({"clusterIP": "10.96.0.1", "internalTrafficPolicy": "Local", "ports": [{"port": 80}]});
    check(internal.clone(), NEAR_AND_FAR, &["10.96.0.1:80/TCP -> 1:8080"]);
    check(internal.clone(), FAR, &["10.96.0.1:80/TCP -> Drop"]);
    check(internal, &[], &["10.96.0.1:80/TCP -> Refuse"]);
    let external = json!({"type": "NodePort", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30000}]});
    check(
        external.clone(),
        NEAR_AND_FAR,
        &["node port 30000/TCP -> 1:8080 2:8080 | 1:8080", "10.96.0.1:80/TCP -> 1:8080 2:8080"],
    );
    check(external.clone(), FAR, &["node port 30000/TCP -> 2:8080 | Drop", "10.96.0.1:80/TCP -> 2:8080"]);
    check(
        external,
        &[(1, "here", false, true), (2, "there", true, false)],
        &["node port 30000/TCP -> 2:8080 | 1:8080", "10.96.0.1:80/TCP -> 2:8080"],
    );
}

#[test]
fn load_balancers() {
    let mut model = Model::new("here");
    let spec = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 32000, "loadBalancerSourceRanges": ["198.51.100.7/24", "2001:db8::/32", "nonsense"],
        "ports": [{"port": 80}]});
    let mut service = web(spec);
    service.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [
        {"ip": "192.0.2.9"}, {"ip": "192.0.2.10", "ipMode": "Proxy"}, {"hostname": "x.example"}]}}))
    .unwrap();
    model.set_service(&service);
    model.set_slice(&web_slice("web-1", NEAR_AND_FAR));
    model.update();
    assert_eq!(shown(&model), ["10.96.0.1:80/TCP -> 1:8080 2:8080", "192.0.2.9:80/TCP -> 1:8080 2:8080 | 1:8080"]);
    let frontend = Frontend { address: [192, 0, 2, 9].into(), protocol: Protocol::Tcp, port: 80 };
    let sources = |model: &Model| -> Vec<String> {
        let entry = model.rules().get(&frontend).unwrap();
        entry.sources.iter().flat_map(|all| all.iter()).map(ToString::to_string).collect()
    };
    assert_eq!(sources(&model), ["198.51.100.0/24"]);
    assert_eq!(model.problems().len(), 1, "{:?}", model.problems());
    let checks = model.health_checks();
    assert_eq!((checks[0].port, checks[0].local_endpoints), (32000, 1));

    let node = json!({"metadata": {"name": "here"}, "status": {"addresses": [
        {"type": "InternalIP", "address": "198.51.100.3"}, {"type": "Hostname", "address": "here"}]}});
    model.set_node(&serde_json::from_value(node).unwrap());
    assert_eq!(model.update().changes.len(), 1);
    assert_eq!(sources(&model), ["198.51.100.0/24", "192.0.2.9/32"], "the node may come from the address itself");
}

#[test]
fn ports_find_their_endpoints_by_name_and_protocol() {
    let mut model = Model::new("here");
    model.set_service(&web(json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
        "sessionAffinity": "ClientIP", "ports": [
            {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}, {"name": "none", "port": 9}]})));
    for (name, family, address, number) in [("web-4", "IPv4", "10.0.0.1", 5353), ("web-6", "IPv6", "fd01::1", 5354)] {
        model.set_slice(&slice(json!({
            "metadata": {"namespace": "d", "name": name, "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family, "endpoints": [{"addresses": [address]}],
            "ports": [{"name": "dns", "port": number, "protocol": "UDP"}, {"name": "dns-tcp", "port": number}]})));
    }
    model.update();
    assert_eq!(
        shown(&model),
        [
            "10.96.0.1:9/TCP -> Refuse",
            "10.96.0.1:53/TCP -> 1:5353",
            "10.96.0.1:53/UDP -> 1:5353",
            "[fd00::1]:9/TCP -> Refuse",
            "[fd00::1]:53/TCP -> 1:5354",
            "[fd00::1]:53/UDP -> 1:5354",
        ]
    );
    assert!(model.rules().iter().all(|(_, entry)| entry.affinity_s == Some(10_800)));
}

#[test]
fn the_older_service_keeps_a_frontend() {
    let claims = |name: &str, created: &str| {
        service(json!({"metadata": {"namespace": "d", "name": name, "creationTimestamp": created},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}], "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": name.len()}}}}))
    };
    let mut model = Model::new("here");
    let winner = |model: &mut Model| {
        model.update();
        model.rules().iter().map(|(_, entry)| entry.affinity_s.unwrap()).collect::<Vec<_>>()
    };
    model.set_service(&claims("young", "2026-01-02T00:00:00Z"));
    assert_eq!(winner(&mut model), [5]);
    model.set_service(&claims("old", "2026-01-01T00:00:00Z"));
    assert_eq!(winner(&mut model), [3]);
    let problems = model.problems();
    assert_eq!(
        problems[0].to_string(),
        "10.96.0.1:80/TCP of Service d/young leads to Service d/old, which is older; give one of them another address or port"
    );
    model.remove_service("d", "old");
    assert_eq!(winner(&mut model), [5]);
    assert_eq!(model.problems(), []);
    model.remove_service("d", "young");
    assert_eq!(winner(&mut model), [0; 0]);
    assert!(model.services.is_empty());
}

#[test]
fn a_pod_serves_until_it_ends() {
    let mut model = Model::new("here");
    let addresses = [IpAddr::from([10, 0, 0, 1])];
    let mut set = |ready, terminating| {
        model.set_slice(&web_slice("web-1", &[(1, "here", ready, terminating), (2, "there", true, false)]));
        (model.serves("pod-1", &addresses), model.serves("pod-2", &[]))
    };
    assert_eq!(set(true, false), (true, false), "pods of other nodes are none of ours");
    assert_eq!(set(true, true), (false, false), "published although it ends");
    assert_eq!(set(false, false), (false, false));
    assert_eq!(set(true, false), (true, false));
    model.remove_slice("d", "web-1");
    assert!(!model.serves("pod-1", &addresses));
    let manual = json!({"metadata": {"namespace": "d", "name": "m", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]});
    model.set_slice(&slice(manual));
    assert!(model.serves("pod-1", &addresses), "an endpoint without a name counts by its address");
}

#[test]
fn others_services_and_slices_are_left_alone() {
    let mut model = Model::new("here");
    model.set_service(&service(json!({"metadata": {"namespace": "d", "name": "web",
        "labels": {"service.kubernetes.io/service-proxy-name": "other"}},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}})));
    let mut headless = web_slice("web-1", NEAR_AND_FAR);
    headless.metadata.labels.as_mut().unwrap().insert("service.kubernetes.io/headless".into(), "".into());
    model.set_slice(&headless);
    assert!(model.update().is_empty());
    assert!(!model.serves("pod-1", &[]));
}

// Against a slow and simple reading.

/// What the world looks like: services by name, slices by name.
#[derive(Debug, Clone, Default)]
struct World {
    services: BTreeMap<u8, Spec>,
    slices: BTreeMap<u8, Slice>,
    zone: bool,
}

#[derive(Debug, Clone)]
struct Spec {
    created: u8,
    address: u8,
    port: u8,
    node_port: bool,
    internal_local: bool,
    external_local: bool,
    affinity: bool,
}

#[derive(Debug, Clone)]
struct Slice {
    service: u8,
    endpoints: Vec<End>,
}

#[derive(Debug, Clone)]
struct End {
    address: u8,
    local: bool,
    ready: bool,
    serving: bool,
    terminating: bool,
    zones: Option<bool>,
}

#[derive(Debug, Clone)]
enum Step {
    Service(u8, Option<Spec>),
    Slice(u8, Option<Slice>),
    Zone(bool),
    Update,
}

fn specs() -> impl Strategy<Value = Spec> {
    (0u8..3, 1u8..4, 1u8..3, any::<[bool; 4]>()).prop_map(|(created, address, port, flags)| Spec {
        created,
        address,
        port,
        node_port: flags[0],
        internal_local: flags[1],
        external_local: flags[2],
        affinity: flags[3],
    })
}

fn ends() -> impl Strategy<Value = End> {
    (1u8..12, any::<[bool; 4]>(), prop::option::weighted(0.8, any::<bool>())).prop_map(|(address, flags, zones)| End {
        address,
        // One address is always on one node.
        local: address % 2 == 0,
        ready: flags[0] || flags[1],
        serving: flags[2],
        terminating: flags[3],
        zones,
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slices =
        (0u8..4, prop::collection::vec(ends(), 0..6)).prop_map(|(service, endpoints)| Slice { service, endpoints });
    let step = prop_oneof![
        3 => (0u8..4, prop::option::weighted(0.8, specs())).prop_map(|(name, spec)| Step::Service(name, spec)),
        5 => (0u8..6, prop::option::weighted(0.8, slices)).prop_map(|(name, slice)| Step::Slice(name, slice)),
        1 => any::<bool>().prop_map(Step::Zone),
        3 => Just(Step::Update),
    ];
    prop::collection::vec(step, 0..60)
}

fn api_service(name: u8, spec: &Spec) -> Service {
    service(json!({"metadata": {"namespace": "d", "name": format!("s{name}"),
        "creationTimestamp": format!("2026-01-0{}T00:00:00Z", spec.created + 1)},
        "spec": {"type": if spec.node_port { "NodePort" } else { "ClusterIP" },
            "clusterIP": format!("10.96.0.{}", spec.address),
            "internalTrafficPolicy": if spec.internal_local { "Local" } else { "Cluster" },
            "externalTrafficPolicy": if spec.external_local { "Local" } else { "Cluster" },
            "sessionAffinity": if spec.affinity { "ClientIP" } else { "None" },
            "ports": [{"port": spec.port, "nodePort": 30_000 + i32::from(spec.port)}]}}))
}

fn api_slice(name: u8, given: &Slice) -> EndpointSlice {
    let end = |end: &End| {
        json!({"addresses": [format!("10.0.0.{}", end.address)],
            "nodeName": if end.local { "here" } else { "there" },
            "conditions": {"ready": end.ready, "serving": end.serving, "terminating": end.terminating},
            "hints": end.zones.map(|here| json!({"forZones": [{"name": if here { "z" } else { "y" }}]}))})
    };
    slice(json!({"metadata": {"namespace": "d", "name": format!("e{name}"),
        "labels": {"kubernetes.io/service-name": format!("s{}", given.service)}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080}],
        "endpoints": given.endpoints.iter().map(end).collect::<Vec<_>>()}))
}

fn api_node(zone: bool) -> Node {
    let labels = if zone { json!({"topology.kubernetes.io/zone": "z"}) } else { json!({}) };
    serde_json::from_value(json!({"metadata": {"name": "here", "labels": labels}})).unwrap()
}

/// Where a new connection may end up: last octets, or what else happens to it.
type Fate = Result<BTreeSet<u8>, &'static str>;

/// Fate of a connection to a frontend, read off the objects as the API's documentation explains them.
fn fate(world: &World, node_port: bool, address: u8, port: u8, outside: bool) -> Option<(Fate, bool)> {
    let claims = world
        .services
        .iter()
        .filter(|(_, spec)| spec.port == port && if node_port { spec.node_port } else { spec.address == address });
    let (name, spec) = claims.min_by_key(|(name, spec)| (spec.created, **name))?;
    let ends: Vec<&End> =
        world.slices.values().filter(|slice| slice.service == *name).flat_map(|slice| &slice.endpoints).collect();
    // Of several words on one address that of who does not end counts, else the best, of equal ones the first.
    let rank = |end: &End| if end.ready { 2 } else { u8::from(end.serving && end.terminating) };
    let best = |address: u8| {
        ends.iter().rev().filter(|end| end.address == address).max_by_key(|end| (!end.terminating, rank(end))).copied()
    };
    let addresses: BTreeSet<u8> = ends.iter().map(|end| end.address).collect();
    let ranked = |wanted: u8, local: bool| -> BTreeSet<u8> {
        let fits = |end: &End| rank(end) == wanted && (!local || end.local);
        addresses.iter().copied().filter(|address| best(*address).is_some_and(fits)).collect()
    };
    let serving = |local| Some(ranked(2, local)).filter(|all| !all.is_empty()).unwrap_or_else(|| ranked(1, local));
    let hinted = |address: &u8| best(*address).and_then(|end| end.zones);
    let mut cluster = serving(false);
    if world.zone && ranked(2, false).iter().all(|one| hinted(one).is_some()) {
        let near: BTreeSet<u8> = ranked(2, false).into_iter().filter(|one| hinted(one) == Some(true)).collect();
        if !near.is_empty() {
            cluster = near;
        }
    }
    let only_local = if node_port { outside && spec.external_local } else { spec.internal_local };
    let chosen = if only_local { serving(true) } else { cluster.clone() };
    let fate = match (chosen.is_empty(), cluster.is_empty()) {
        (false, _) => Ok(chosen),
        (true, false) => Err("drop"),
        (true, true) => Err("refuse"),
    };
    Some((fate, spec.affinity))
}

fn fate_in(rules: &Rules, frontend: &Frontend, outside: bool) -> Option<(Fate, bool)> {
    let entry = rules.get(frontend)?;
    let target = entry.outside.as_ref().filter(|_| outside).unwrap_or(&entry.inside);
    let last = |endpoint: &Endpoint| match endpoint.address {
        IpAddr::V4(v4) => v4.octets()[3],
        IpAddr::V6(_) => panic!("no IPv6 here"),
    };
    let fate = match target {
        Target::Endpoints(slots) => {
            let set: BTreeSet<u8> = slots.iter().map(last).collect();
            assert_eq!(set.len(), slots.len(), "an endpoint in two slots");
            Ok(set)
        }
        Target::Drop => Err("drop"),
        Target::Refuse => Err("refuse"),
    };
    Some((fate, entry.affinity_s.is_some()))
}

/// Rules without the history that slots have.
pub(super) fn sorted(rules: &Rules) -> Rules {
    let sort = |target: &Target| match target {
        Target::Endpoints(slots) => {
            let mut slots = slots.to_vec();
            slots.sort_unstable();
            Target::Endpoints(slots.into())
        }
        other => other.clone(),
    };
    let mut plain = Rules::default();
    for (frontend, entry) in rules.iter() {
        let entry = Entry { inside: sort(&entry.inside), outside: entry.outside.as_ref().map(sort), ..entry.clone() };
        plain.set(*frontend, Some(entry));
    }
    plain
}

fn fresh(world: &World) -> Model {
    let mut model = Model::new("here");
    model.set_node(&api_node(world.zone));
    world.services.iter().for_each(|(name, spec)| model.set_service(&api_service(*name, spec)));
    world.slices.iter().for_each(|(name, slice)| model.set_slice(&api_slice(*name, slice)));
    model.update();
    model
}

impl World {
    fn take(&mut self, step: &Step, model: &mut Model) {
        match step {
            Step::Service(name, Some(spec)) => {
                self.services.insert(*name, spec.clone());
                model.set_service(&api_service(*name, spec));
            }
            Step::Service(name, None) => {
                self.services.remove(name);
                model.remove_service("d", &format!("s{name}"));
            }
            Step::Slice(name, Some(slice)) => {
                self.slices.insert(*name, slice.clone());
                model.set_slice(&api_slice(*name, slice));
            }
            Step::Slice(name, None) => {
                self.slices.remove(name);
                model.remove_slice("d", &format!("e{name}"));
            }
            Step::Zone(zone) => {
                self.zone = *zone;
                model.set_node(&api_node(*zone));
            }
            Step::Update => {}
        }
    }
}

fn check_fates(world: &World, rules: &Rules) -> Result<(), TestCaseError> {
    let mut known = 0;
    for (node_port, address, port) in (0..4).flat_map(|address| (1..3).map(move |port| (address == 0, address, port))) {
        let (host, number) =
            if node_port { ([0; 4], 30_000 + u16::from(port)) } else { ([10, 96, 0, address], port.into()) };
        let frontend = Frontend { address: host.into(), protocol: Protocol::Tcp, port: number };
        known += usize::from(rules.get(&frontend).is_some());
        for outside in [false, true] {
            let expect = fate(world, node_port, address, port, outside);
            prop_assert_eq!(fate_in(rules, &frontend, outside), expect, "{} outside: {}", frontend, outside);
        }
    }
    prop_assert_eq!(known, rules.len());
    Ok(())
}

#[test]
fn a_health_check_counts_pods_not_addresses() {
    let mut model = Model::new("here");
    model.set_service(&web(json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 30500, "ports": [{"name": "", "port": 80, "nodePort": 30080}]})));
    model.set_slice(&web_slice(
        "web-4",
        &[(1, "here", true, false), (2, "here", true, false), (3, "there", true, false)],
    ));
    let endpoint = |n| json!({"addresses": [format!("fd00::{n}")], "nodeName": "here", "conditions": {"ready": true}});
    model.set_slice(&slice(json!({"metadata": {"namespace": "d", "name": "web-6",
        "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv6",
        "ports": [{"name": "", "port": 8080}], "endpoints": [endpoint(1), endpoint(2)]})));
    model.update();
    assert_eq!(model.health_checks()[0].local_endpoints, 2);
}

#[test]
fn a_service_explains_itself() {
    let mut model = Model::new("here");
    model.set_service(&web(json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 30500, "sessionAffinity": "ClientIP",
        "ports": [{"name": "", "port": 80, "nodePort": 30080}, {"name": "more", "port": 81}]})));
    model.set_slice(&web_slice("web-1", &[(1, "there", true, false), (2, "here", false, false)]));
    model.update();
    assert_eq!(model.rules().refusals(), Refusals { internal: [0, 0], external: [1, 0] });
    let checks = model.health_checks();
    assert_eq!((checks.len(), checks[0].port, checks[0].local_endpoints), (1, 30500, 0));
    let text = model.explain("d", "web").unwrap().to_string();
    for line in [
        "  10.96.0.1:80/TCP (cluster IP): to 1 endpoint; a client keeps its endpoint for 10800 s",
        "  node port 30080/TCP (node port): to 1 endpoint; from outside the cluster dropped, as nobody serves on this node \
         (externalTrafficPolicy: Local)",
        "  10.96.0.1:81/TCP (cluster IP): refused, as nobody serves",
        "    10.0.0.1:8080 elsewhere\n",
        "    10.0.0.2:8080 on this node, left out: not ready",
        "    2 more whose EndpointSlice has no port of this name and protocol",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(model.explain("d", "other").is_none());
    model.remove_service("d", "web");
    model.update();
    assert!(model.health_checks().is_empty() && model.explain("d", "web").is_none());
}

proptest! {
    #[test]
    fn the_model_means_what_the_objects_say(steps in steps()) {
        let (mut world, mut model, mut kernel) = (World::default(), Model::new("here"), Rules::default());
        for step in steps.iter().chain([&Step::Update]) {
            world.take(step, &mut model);
            if !matches!(step, Step::Update) {
                continue;
            }
            let before = model.rules().clone();
            let difference = model.update();
            prop_assert_eq!(&difference, &diff(&before, model.rules()), "the quick way and the full comparison");
            kernel.apply(difference);
            prop_assert_eq!(&kernel, model.rules(), "what has been applied bit by bit");
            prop_assert!(model.update().is_empty(), "deciding after doing finds nothing to do");
            check_fates(&world, model.rules())?;
            prop_assert_eq!(sorted(model.rules()), sorted(fresh(&world).rules()), "history does not matter");
        }
    }

    #[test]
    fn a_difference_leads_from_one_to_the_other(a in steps(), b in steps()) {
        let rules = |steps: &[Step]| {
            let (mut world, mut model) = (World::default(), Model::new("here"));
            steps.iter().for_each(|step| world.take(step, &mut model));
            model.update();
            model.rules().clone()
        };
        let (a, b) = (rules(&a), rules(&b));
        let mut applied = a.clone();
        applied.apply(diff(&a, &b));
        prop_assert_eq!(&applied, &b);
        prop_assert!(diff(&b, &b).is_empty());
    }
}
