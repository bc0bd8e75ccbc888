//! Scenarios made by hand: each takes one thing that the API can say and looks at what packets meet.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use testkit::service_lab::{Answer, Client, Flow, NODE, Pair, Protocol, backend, get};

use super::contestant::{Locality, METRICS, Options};
use super::stage::{Stage, endpoint, inquiry};
use super::world::{Conditions, Endpoint, Family, OTHER_NODE, Service, Slice, World, ZONE, cluster_ips, crowd, end};

use Protocol::{Sctp, Tcp, Udp};

/// How long something may take that comes by itself.
const LIMIT: Duration = Duration::from_secs(30);

/// A name, what both proxies are told, and what happens.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) options: Options,
    pub(super) play: fn(&mut Stage<'_>) -> anyhow::Result<()>,
}

const fn plain(name: &'static str, play: fn(&mut Stage<'_>) -> anyhow::Result<()>) -> Scenario {
    Scenario { name, options: Options::DEFAULT, play }
}

/// All of them, those with the same options side by side.
pub(super) const ALL: &[Scenario] = &[
    plain("cluster-ip", cluster_ip),
    plain("protocols", protocols),
    plain("node-port", node_port),
    plain("external-ip", external_ip),
    plain("load-balancer", load_balancer),
    plain("source-ranges", source_ranges),
    plain("affinity", affinity),
    plain("affinity-time-out", affinity_time_out),
    plain("internal-policy", internal_policy),
    plain("external-policy", external_policy),
    plain("terminating", terminating),
    plain("zone-hints", zone_hints),
    plain("node-hints", node_hints),
    plain("not-ready", not_ready),
    plain("ignored-services", ignored_services),
    plain("named-ports", named_ports),
    plain("many-slices", many_slices),
    plain("duplicates", duplicates),
    plain("single-family", single_family),
    plain("without-node", without_node),
    plain("hairpin", hairpin),
    plain("many-endpoints", many_endpoints),
    plain("host-endpoints", host_endpoints),
    plain("nobody", nobody),
    plain("unknown-address", unknown_address),
    plain("health-check", health_check),
    plain("metrics", metrics),
    plain("udp-flow", udp_flow),
    plain("changes", changes),
    Scenario { name: "masquerade-all", options: Options { masquerade_all: true, ..Options::DEFAULT }, play: node_port },
    Scenario { name: "node-cidr", options: by(Locality::NodeCidr), play: locality },
    Scenario { name: "interface-prefix", options: by(Locality::Prefix), play: locality },
    Scenario { name: "bridge-interface", options: by(Locality::Bridge), play: locality },
    Scenario { name: "node-port-primary", options: on(&["primary"]), play: node_port },
    Scenario { name: "node-port-addresses", options: on(&["10.244.0.0/16", "2001:db8::/112"]), play: node_port },
    Scenario { name: "node-port-localhost", options: on(&["127.0.0.0/8", "192.0.2.0/24"]), play: node_port },
    Scenario {
        name: "no-localhost-node-ports",
        options: Options { localhost_node_ports: false, ..Options::DEFAULT },
        play: node_port,
    },
];

const fn by(locality: Locality) -> Options {
    Options { locality, ..Options::DEFAULT }
}

const fn on(node_port_addresses: &'static [&'static str]) -> Options {
    Options { node_port_addresses, ..Options::DEFAULT }
}

fn ends(names: &[&'static str]) -> Vec<Endpoint> {
    names.iter().map(|name| end(name)).collect()
}

/// One service with one slice.
fn one(service: Service, names: &[&'static str]) -> World {
    with(service, &ends(names))
}

fn with(service: Service, endpoints: &[Endpoint]) -> World {
    let slice = Slice::new(service.number, endpoints);
    World { services: vec![service], slices: vec![slice] }
}

/// Both worlds at once.
fn and(mut world: World, other: World) -> World {
    world.services.extend(other.services);
    world.slices.extend(other.slices);
    world
}

fn cluster_ip(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("one endpoint", one(Service::new(1), &["a"]))?;
    stage.see("five endpoints", one(Service::new(1), &["a", "b", "c", "r", "s"]))?;
    let other_port = |client| inquiry(client, Tcp, cluster_ips(1).v4.into(), 81);
    stage.see_with(
        "a port that it has not",
        one(Service::new(1), &["b", "r"]),
        Client::ALL.map(other_port).to_vec(),
    )?;
    let mut one_family = World::default();
    one_family.services.push(Service::new(1));
    one_family.slices.push(Slice::new(1, &ends(&["r"])));
    stage.see("another", one_family)
}

fn protocols(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = Service::new(2).ports(&[("tcp", Tcp, 53), ("udp", Udp, 53), ("sctp", Sctp, 53)]).node_ports();
    let ports = [("tcp", Tcp, Some(8080)), ("udp", Udp, Some(8081)), ("sctp", Sctp, Some(8080))];
    let slice = Slice::new(2, &ends(&["a", "r"])).ports(&ports);
    stage.see("two endpoints", World { services: vec![service.clone()], slices: vec![slice] })?;
    let slice = Slice::new(2, &[]).ports(&ports);
    stage.see("none", World { services: vec![service], slices: vec![slice] })
}

fn node_port(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("local and remote", one(Service::new(3).node_ports(), &["a", "r"]))?;
    stage.see("none", one(Service::new(3).node_ports(), &[]))
}

fn external_ip(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = Service::new(4).with("externalIPs", json!(["198.51.100.4", "2001:db8:4::4"]));
    stage.see("local and remote", one(service.clone(), &["a", "r"]))?;
    stage.see("none", one(service.clone(), &[]))?;
    // An address of the node itself.
    let own = Service::new(4).with("externalIPs", json!([NODE.v4]));
    stage.see("the node's own address", one(own, &["b"]))?;
    let local = service.with("externalTrafficPolicy", json!("Local"));
    stage.see("policy Local", one(local.clone(), &["a", "r"]))?;
    stage.see("policy Local without a local one", one(local, &["r"]))
}

fn balanced(number: u8) -> Service {
    Service::new(number)
        .balanced(json!({ "ip": format!("198.51.100.{number}"), "ipMode": "VIP" }))
        .balanced(json!({ "ip": format!("2001:db8:5::{number}"), "ipMode": "VIP" }))
}

fn load_balancer(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("two endpoints", one(balanced(5), &["a", "r"]))?;
    stage.see("none", one(balanced(5), &[]))?;
    let proxied = Service::new(5).balanced(json!({ "ip": "198.51.100.5", "ipMode": "Proxy" }));
    stage.see("ipMode Proxy", one(proxied, &["a", "r"]))?;
    let no_mode = Service::new(5).balanced(json!({ "ip": "198.51.100.5" }));
    stage.see("no ipMode", one(no_mode.clone(), &["a"]))?;
    let without =
        Service::new(5).balanced(json!({ "ip": "198.51.100.5" })).with("allocateLoadBalancerNodePorts", json!(false));
    let without = Service { ports: Service::new(5).ports, ..without };
    stage.see("without node ports", one(without, &["a"]))?;
    let named = no_mode.balanced(json!({ "hostname": "balancer.example" }));
    stage.see("a name", one(named, &["a"]))
}

fn source_ranges(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let ranges = |ranges: Value| balanced(6).with("loadBalancerSourceRanges", ranges);
    for (step, allowed) in [
        ("outside only", json!(["192.0.2.2/32", "2001:db8::2/128"])),
        ("pods only", json!(["10.244.0.0/16", "fd00:10:244::/48"])),
        ("the node only", json!(["192.0.2.1/32", "2001:db8::1/128"])),
        ("pod a only", json!(["10.244.0.11/32", "fd00:10:244::11/128"])),
        ("one family only", json!(["192.0.2.0/24"])),
        ("nobody", json!(["203.0.113.0/24"])),
        ("everybody", json!(["0.0.0.0/0", "::/0"])),
        ("spaces and twice", json!([" 192.0.2.0/24", "192.0.2.0/24"])),
    ] {
        stage.see(step, one(ranges(allowed), &["a", "r"]))?;
    }
    let local = ranges(json!(["192.0.2.2/32"])).with("externalTrafficPolicy", json!("Local"));
    stage.see("with policy Local", one(local, &["a", "r"]))?;
    stage.see("without endpoints", one(ranges(json!(["192.0.2.2/32"])), &[]))
}

fn sticky(number: u8, seconds: u32) -> Service {
    let config = json!({ "clientIP": { "timeoutSeconds": seconds } });
    Service::new(number).with("sessionAffinity", json!("ClientIP")).with("sessionAffinityConfig", config)
}

fn affinity(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("cluster address", one(sticky(7, 10_800), &["a", "b", "r", "s"]))?;
    stage.see("node port", one(sticky(8, 10_800).node_ports(), &["a", "b", "r", "s"]))?;
    let udp = sticky(9, 10_800).ports(&[("", Udp, 80)]);
    let slice = Slice::new(9, &ends(&["a", "b", "r", "s"])).ports(&[("", Udp, Some(8080))]);
    stage.see("UDP", World { services: vec![udp], slices: vec![slice] })?;
    let local = sticky(10, 10_800).node_ports().with("externalTrafficPolicy", json!("Local"));
    stage.see("policy Local", one(local, &["a", "b", "r"]))
}

/// With pauses that are longer than the time-out each connection may lead elsewhere.
fn affinity_time_out(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    const ROUNDS: usize = 14;
    stage.write(one(sticky(11, 1), &["a", "b"]))?;
    let ask = || vec![inquiry(Client::Pod, Tcp, cluster_ips(11).v4.into(), 80)];
    let mut seen = [BTreeSet::new(), BTreeSet::new()];
    for _ in 0..ROUNDS {
        for (seen, answers) in seen.iter_mut().zip(stage.answers(&ask())?) {
            seen.extend(answers.iter().flatten().filter_map(endpoint));
        }
        // The passing of time is what is tested.
        std::thread::sleep(Duration::from_millis(1200));
    }
    let seen = seen.map(|all| all.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", "));
    stage.note("both endpoints get their turn", "who answered in all", seen);
    Ok(())
}

fn internal_policy(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = || Service::new(12).with("internalTrafficPolicy", json!("Local"));
    stage.see("local and remote", one(service(), &["a", "b", "r"]))?;
    stage.see("remote only", one(service(), &["r", "s"]))?;
    stage.see("none", one(service(), &[]))?;
    stage.see("with node ports", one(service().node_ports(), &["a", "r"]))?;
    stage.see("remote only, with node ports", one(service().node_ports(), &["r"]))
}

fn external_policy(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service =
        || balanced(13).with("externalTrafficPolicy", json!("Local")).with("healthCheckNodePort", json!(32_013));
    stage.see("local and remote", one(service(), &["a", "b", "r"]))?;
    stage.see("remote only", one(service(), &["r", "s"]))?;
    stage.see("none", one(service(), &[]))?;
    let both = || service().with("internalTrafficPolicy", json!("Local"));
    stage.see("both policies", one(both(), &["a", "r"]))?;
    stage.see("both policies, remote only", one(both(), &["r"]))
}

fn terminating(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    use Conditions::{Ended, Serving, Unready};
    let cases: [(&str, Vec<Endpoint>); 6] = [
        ("one of each", vec![end("a"), end("b").is(Serving), end("r"), end("s").is(Serving)]),
        ("all ending, all serving", vec![end("a").is(Serving), end("r").is(Serving)]),
        ("all ending, none serving", vec![end("a").is(Ended), end("r").is(Ended)]),
        ("the local one ends and serves", vec![end("a").is(Serving), end("r")]),
        ("the local one ends and does not", vec![end("a").is(Ended), end("b").is(Unready), end("r")]),
        ("the remote one ends", vec![end("a"), end("r").is(Serving)]),
    ];
    for (step, endpoints) in cases {
        let external =
            balanced(14).with("externalTrafficPolicy", json!("Local")).with("healthCheckNodePort", json!(32_014));
        let internal = Service::new(15).with("internalTrafficPolicy", json!("Local"));
        let all = [with(external, &endpoints), with(internal, &endpoints), with(Service::new(16), &endpoints)];
        stage.see(step, all.into_iter().reduce(and).unwrap_or_default())?;
    }
    Ok(())
}

fn zone_hints(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    const FAR: &str = "far";
    let service = || Service::new(17).with("trafficDistribution", json!("PreferSameZone"));
    let hinted = |name, zone| end(name).for_zones(&[zone]);
    stage.see("own zone", with(service(), &[hinted("a", ZONE), hinted("r", ZONE), hinted("s", FAR)]))?;
    stage.see("no endpoint for this zone", with(service(), &[hinted("a", FAR), hinted("r", FAR)]))?;
    stage.see("one without a hint", with(service(), &[hinted("a", ZONE), hinted("r", FAR), end("s")]))?;
    let ready_only = [hinted("a", ZONE), hinted("b", FAR), end("s").is(Conditions::Unready)];
    stage.see("one without a hint that is not ready", with(service(), &ready_only))?;
    let ending = [hinted("a", ZONE).is(Conditions::Serving), hinted("r", FAR).is(Conditions::Serving)];
    stage.see("all ending", with(service(), &ending))?;
    let local = service().node_ports().with("externalTrafficPolicy", json!("Local"));
    stage.see("with policy Local", with(local, &[hinted("a", FAR), hinted("b", ZONE), hinted("r", ZONE)]))?;
    let plain = with(Service::new(17), &[hinted("a", ZONE), hinted("s", FAR)]);
    stage.see("hints without a wish", plain.clone())?;
    stage.lab.label_node(&json!({ "topology.kubernetes.io/zone": null }))?;
    let unlabelled = stage.see("a node without a zone", with(service(), &[hinted("a", ZONE), hinted("s", FAR)]));
    stage.lab.label_node(&json!({ "topology.kubernetes.io/zone": ZONE }))?;
    unlabelled
}

fn node_hints(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = || Service::new(18).with("trafficDistribution", json!("PreferSameNode"));
    let hinted = |name, node| end(name).for_nodes(&[node]).for_zones(&[ZONE]);
    let here = super::world::NODE;
    stage.see("own node", with(service(), &[hinted("a", here), hinted("b", here), hinted("r", OTHER_NODE)]))?;
    stage.see("no endpoint for this node", with(service(), &[hinted("r", OTHER_NODE), hinted("s", OTHER_NODE)]))?;
    let zones = [hinted("r", OTHER_NODE), end("s").for_nodes(&[OTHER_NODE]).for_zones(&["far"])];
    stage.see("none for this node, one for this zone", with(service(), &zones))?;
    stage.see("one without a hint", with(service(), &[hinted("a", here), end("r")]))?;
    stage
        .see("the own one ends", with(service(), &[hinted("a", here).is(Conditions::Serving), hinted("r", OTHER_NODE)]))
}

fn not_ready(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let published = Service::new(19).with("publishNotReadyAddresses", json!(true));
    // The slices say it: these are ready, whatever the pods are.
    stage.see("published", one(published.clone(), &["a", "r"]))?;
    stage.see("not published", with(published, &[end("a"), end("r").is(Conditions::Unready)]))?;
    stage.see("conditions unknown", with(Service::new(19), &[end("a").is(Conditions::Unknown)]))?;
    stage.see("nobody is ready", with(Service::new(19), &[end("a").is(Conditions::Unready)]))
}

fn ignored_services(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let headless = Service::new(20).with("clusterIP", json!("None"));
    let elsewhere = Service::new(21).label("service.kubernetes.io/service-proxy-name", "another");
    let name = Service::new(22).with("type", json!("ExternalName")).with("externalName", json!("example.com"));
    let all = [one(headless, &["a"]), one(elsewhere, &["a"]), one(name, &["a"]), one(Service::new(23), &["a"])];
    let all = all.into_iter().reduce(and).unwrap_or_default();
    let asked = [20, 21, 22].map(|number| inquiry(Client::Pod, Tcp, cluster_ips(number).v4.into(), 80));
    stage.see_with("headless, by another proxy, a name", all, asked.to_vec())?;
    stage.see("taken over", one(Service::new(21), &["a", "r"]))?;
    let given = Service::new(21).label("service.kubernetes.io/service-proxy-name", "another");
    stage.see("given away", one(given, &["a", "r"]))
}

fn named_ports(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = Service::new(24).ports(&[("web", Tcp, 80), ("other", Tcp, 81), ("third", Tcp, 82)]);
    let ports = [("web", Tcp, Some(8080)), ("other", Tcp, Some(8081)), ("third", Tcp, None)];
    let slice = Slice::new(24, &ends(&["a", "r"])).ports(&ports);
    stage.see("three ports", World { services: vec![service.clone()], slices: vec![slice] })?;
    // Pods may give one name to different numbers: then there is a slice for each.
    let slices = vec![
        Slice::new(24, &ends(&["a"])).ports(&[("web", Tcp, Some(8080))]),
        Slice::new(24, &ends(&["b"])).ports(&[("web", Tcp, Some(8081))]).number(1),
    ];
    stage.see("one name, two numbers", World { services: vec![service], slices })
}

fn many_slices(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let slice = |number, names: &[&'static str]| Slice::new(25, &ends(names)).number(number);
    let world = |slices| World { services: vec![Service::new(25)], slices };
    stage.see("three slices", world(vec![slice(0, &["a"]), slice(1, &["b", "r"]), slice(2, &["s"])]))?;
    stage.see("one has gone", world(vec![slice(0, &["a"]), slice(2, &["s"])]))?;
    stage.see("endpoints change places", world(vec![slice(0, &["s"]), slice(2, &["a"])]))?;
    stage.see("slices without a service", World { services: Vec::new(), slices: vec![slice(0, &["a"])] })
}

fn duplicates(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let world = |second: Endpoint| World {
        services: vec![Service::new(26)],
        slices: vec![Slice::new(26, &ends(&["a", "b"])), Slice::new(26, &[second, end("r")]).number(1)],
    };
    // Of two that do not end, one ready, upstream takes either.
    stage.see("in two slices", world(end("a")))?;
    stage.see("ready here, ending there", world(end("a").is(Conditions::Serving)))?;
    let successor = World {
        services: vec![Service::new(26)],
        slices: vec![
            Slice::new(26, &[end("a").is(Conditions::Unready)]),
            Slice::new(26, &[end("a").is(Conditions::Serving)]).number(1),
        ],
    };
    stage.see("its address has passed to one that is not ready", successor)
}

/// Services of one family in a cluster of both.
fn single_family(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    for family in [Family::V4, Family::V6] {
        let step = |what: &str| format!("{} {what}", family.name());
        let other = cluster_ips(36).both().into_iter().find(|address| address.is_ipv6() == (family == Family::V4));
        let asked: Vec<_> = other.into_iter().map(|address| inquiry(Client::Pod, Tcp, address, 80)).collect();
        let plain = Service::new(36).only(family).node_ports();
        stage.see_with(&step("alone"), one(plain.clone(), &["a", "r"]), asked)?;
        stage.see(&step("without endpoints"), one(plain, &[]))?;
        // What is of the other family leads nowhere.
        let outside = balanced(36).only(family).with("externalIPs", json!(["198.51.100.136", "2001:db8:4::136"]));
        stage.see(&step("with addresses of both"), one(outside.clone(), &["a", "r"]))?;
        let ranges = json!(["192.0.2.0/24", "2001:db8::/64"]);
        stage.see(&step("and their ranges"), one(outside.with("loadBalancerSourceRanges", ranges), &["a", "r"]))?;
    }
    stage.see("both again", one(Service::new(36).node_ports(), &["a", "r"]))
}

/// Endpoints of which nobody says on which node they are, as those have that people write themselves. None of them is a client:
/// kube-proxy 1.37.2 with nftables loses what a pod sends to itself by such an endpoint.
fn without_node(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let anywhere = |names: &[&'static str]| names.iter().map(|name| end(name).anywhere()).collect::<Vec<_>>();
    stage.see("all of them", with(Service::new(37).node_ports(), &anywhere(&["b", "r"])))?;
    let internal = || Service::new(37).with("internalTrafficPolicy", json!("Local"));
    let external = || balanced(38).with("externalTrafficPolicy", json!("Local"));
    let external = || external().with("healthCheckNodePort", json!(32_038));
    for (step, endpoints) in [
        ("policy Local, one that is known", [anywhere(&["b", "r"]), ends(&["c"])].concat()),
        ("policy Local, none that is known", anywhere(&["b", "r"])),
    ] {
        stage.see(step, and(with(internal(), &endpoints), with(external(), &endpoints)))?;
    }
    Ok(())
}

fn hairpin(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = balanced(27).with("externalIPs", json!(["198.51.100.127"]));
    stage.see("only itself", one(service.clone(), &["a"]))?;
    let local = service.with("externalTrafficPolicy", json!("Local")).with("healthCheckNodePort", json!(32_027));
    stage.see("with policy Local", one(local, &["a"]))?;
    let udp = Service::new(28).ports(&[("udp", Udp, 80), ("sctp", Sctp, 80)]);
    let slice = Slice::new(28, &ends(&["a"])).ports(&[("udp", Udp, Some(8080)), ("sctp", Sctp, Some(8080))]);
    stage.see("other protocols", World { services: vec![udp], slices: vec![slice] })
}

/// With more than a thousand endpoints both write their rules in another way, what has changed since at least.
fn many_endpoints(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = |number| balanced(number).with("externalIPs", json!(["198.51.100.140"]));
    let local = |number| {
        let local = service(number).with("externalTrafficPolicy", json!("Local"));
        local.with("healthCheckNodePort", json!(32_040))
    };
    stage.see("few", one(service(40), &["a", "b", "r"]))?;
    stage.see("many, not of this Service", and(one(service(40), &["a", "b", "r"]), crowd()))?;
    stage.see("one has left since", and(one(service(40), &["a", "r"]), crowd()))?;
    stage.see("only itself", and(one(service(40), &["a"]), crowd()))?;
    stage.see("with policy Local", and(one(local(40), &["a", "r"]), crowd()))?;
    stage.see("with affinity", and(one(sticky(41, 600).node_ports(), &["b", "c", "r"]), crowd()))?;
    let udp = Service::new(42).ports(&[("udp", Udp, 80), ("sctp", Sctp, 80)]);
    let slice = Slice::new(42, &ends(&["a", "r"])).ports(&[("udp", Udp, Some(8080)), ("sctp", Sctp, Some(8080))]);
    stage.see("other protocols", and(World { services: vec![udp], slices: vec![slice] }, crowd()))?;
    stage.see("none", and(one(service(40), &[]), crowd()))?;
    stage.see("few again", one(service(40), &["a", "b", "r"]))
}

fn host_endpoints(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("this node", one(Service::new(29).node_ports(), &["node"]))?;
    stage.see("both nodes", one(Service::new(29).node_ports(), &["node", "remote"]))?;
    let local = Service::new(29).node_ports().with("externalTrafficPolicy", json!("Local"));
    stage.see("with policy Local", one(local, &["node", "remote"]))
}

fn nobody(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let ports = [("tcp", Tcp, 80), ("udp", Udp, 80), ("sctp", Sctp, 80)];
    let service = balanced(30).ports(&ports).node_ports().with("externalIPs", json!(["198.51.100.130"]));
    stage.see("no slice", World { services: vec![service.clone()], slices: Vec::new() })?;
    let ports = [("tcp", Tcp, Some(8080)), ("udp", Udp, Some(8080)), ("sctp", Sctp, Some(8080))];
    let slice = Slice::new(30, &ends(&["a"])).ports(&ports);
    stage.see("somebody comes", World { services: vec![service.clone()], slices: vec![slice] })?;
    let slice = Slice::new(30, &[end("a").is(Conditions::Unready)]).ports(&ports);
    stage.see("and is not ready", World { services: vec![service], slices: vec![slice] })
}

fn unknown_address(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let unknown = Pair { v4: [10, 96, 77, 77].into(), v6: [0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x7777].into() };
    let ask = |protocol| {
        let both = unknown.both();
        Client::ALL.into_iter().flat_map(move |client| both.map(|address| inquiry(client, protocol, address, 80)))
    };
    let asked = [Tcp, Udp].into_iter().flat_map(ask).collect();
    stage.see_with("an address that no service has", one(Service::new(31), &["a"]), asked)?;
    let gone = cluster_ips(31).both().map(|address| inquiry(Client::Pod, Tcp, address, 80));
    stage.see_with("an address that one had", World::default(), gone.to_vec())
}

fn health_check(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    const PORT: u16 = 32_032;
    let service = balanced(32).with("externalTrafficPolicy", json!("Local")).with("healthCheckNodePort", json!(PORT));
    for (step, endpoints) in [
        ("two local endpoints", ends(&["a", "b", "r"])),
        ("none", ends(&["r"])),
        ("one that ends", vec![end("a").is(Conditions::Serving), end("r")]),
    ] {
        stage.write(with(service.clone(), &endpoints))?;
        let to = [Client::Outside, Client::Node];
        for client in to {
            settle(stage, step, &format!("health check from {}", client.name()), |stage| health(stage, client, PORT))?;
        }
    }
    stage.write(World::default())?;
    settle(stage, "gone", "health check", |stage| health(stage, Client::Outside, PORT))
}

/// Status, header and body, as far as they say something of the service.
fn health(stage: &Stage<'_>, client: Client, port: u16) -> anyhow::Result<[String; 2]> {
    let ask = |number: usize| -> anyhow::Result<String> {
        let place = stage.sides[number].side.place(client);
        let to = SocketAddr::new(NODE.v4.into(), port);
        let told = place.run(get(to, "/".to_owned(), Duration::from_secs(3)))?;
        let Ok(text) = told else { return Ok("no answer".to_owned()) };
        let (head, body) = text.split_once("\r\n\r\n").context("an answer of HTTP")?;
        let status = head.lines().next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
        let header = head.lines().find(|line| line.to_lowercase().starts_with("x-load-balancing-endpoint-weight"));
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| json!(body));
        Ok(format!("{status} {} {body}", header.unwrap_or("no weight").to_lowercase()))
    };
    Ok([ask(0)?, ask(1)?])
}

/// Notes what `ask` finds when both agree, or when they have not for a while.
fn settle(
    stage: &mut Stage<'_>,
    step: &str,
    what: &str,
    mut ask: impl FnMut(&Stage<'_>) -> anyhow::Result<[String; 2]>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let answers = loop {
        let answers = ask(stage)?;
        if answers[0] == answers[1] || Instant::now() > deadline {
            break answers;
        }
    };
    stage.note(step, what, answers);
    Ok(())
}

/// Beginnings of the names of metrics that kube-proxy tells and orlop does not, and why.
const NOT_TOLD: &[(&str, &str)] = &[
    ("aggregator_", "they are API servers', whose library kube-proxy is made with"),
    ("apiserver_", "they are API servers', whose library kube-proxy is made with"),
    ("cardinality_enforcement_", "no label is cut off"),
    ("disabled_metrics_total", "no metric is turned off"),
    ("go_", "orlop is no program of Go's"),
    ("hidden_metrics_total", "no metric is hidden"),
    ("kubernetes_feature_enabled", "gates are those of upstream's program"),
    ("process_network_", "these are the whole node's, and others tell them"),
    ("process_virtual_memory_max_bytes", "nothing limits it"),
    ("registered_metrics_total", "all that there are are told"),
    ("rest_client_exec_plugin_", "who gives credentials is not counted"),
    ("rest_client_rate_limiter_duration_seconds", "waits for the limit of requests are not told apart"),
    ("rest_client_request_size_bytes", "requests to the API server are counted and timed, not weighed"),
    ("rest_client_response_size_bytes", "requests to the API server are counted and timed, not weighed"),
    ("rest_client_transport_", "there is one client with one transport"),
];

/// Families that dashboards may read.
fn metrics(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("something to count", one(Service::new(39).node_ports(), &["a", "r"]))?;
    let families = |number: usize| -> anyhow::Result<BTreeSet<String>> {
        let told = stage.sides[number].metrics(METRICS)?;
        let names = told.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        Ok(names.map(str::to_owned).collect())
    };
    let [one, other] = [families(0)?, families(1)?];
    let is_excused = |name: &&String| NOT_TOLD.iter().any(|(beginning, _)| name.starts_with(beginning));
    let lacking: Vec<&str> = one.difference(&other).filter(|name| !is_excused(name)).map(String::as_str).collect();
    stage.note("something to count", "metrics that are not told", [String::new(), lacking.join(" ")]);
    Ok(())
}

/// A client that keeps its port must get to who is there now.
fn udp_flow(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let service = Service::new(33).ports(&[("", Udp, 53)]).node_ports();
    let world = |names: &[&'static str]| World {
        services: vec![service.clone()],
        slices: vec![Slice::new(33, &ends(names)).ports(&[("", Udp, Some(8080))])],
    };
    let targets: [(Client, IpAddr, u16); 4] = [
        (Client::Pod, cluster_ips(33).v4.into(), 53),
        (Client::Pod, cluster_ips(33).v6.into(), 53),
        (Client::Node, cluster_ips(33).v4.into(), 53),
        (Client::Outside, NODE.v4.into(), 30_330),
    ];
    // Begun before there is anybody, then with one endpoint, then with another.
    stage.write(World::default())?;
    let flows = targets.map(|(client, address, port)| open(stage, client, SocketAddr::new(address, port)));
    let flows = flows.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    for (step, names) in [("the first", &["a"][..]), ("another", &["b"]), ("a remote one", &["r"]), ("none", &[])] {
        stage.write(world(names))?;
        for (number, (client, address, _)) in targets.iter().enumerate() {
            let wanted = names.first().map(|name| backend(name)).transpose()?.map(|end| end.address.like(*address));
            let what = format!("flow to {address} from {}", client.name());
            let mut led = settle_flow(stage, &flows[number], wanted)?;
            // Upstream lets flows to a node port go on to an endpoint that has left, if nobody else came.
            if wanted.is_none() && *address == IpAddr::from(NODE.v4) {
                "nowhere".clone_into(&mut led[0]);
            }
            stage.note(step, &what, led);
        }
    }
    Ok(())
}

type Flows = [Arc<Flow>; 2];

fn open(stage: &Stage<'_>, client: Client, to: SocketAddr) -> anyhow::Result<Flows> {
    let open = |number: usize| -> anyhow::Result<Arc<Flow>> {
        let place = stage.sides[number].side.place(client);
        Ok(Arc::new(place.run(Flow::open(to))??))
    };
    Ok([open(0)?, open(1)?])
}

/// Asks until the flow leads where it should, and tells where it led last.
fn settle_flow(stage: &Stage<'_>, flows: &Flows, wanted: Option<IpAddr>) -> anyhow::Result<[String; 2]> {
    let lead = |number: usize| -> anyhow::Result<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let flow = Arc::clone(&flows[number]);
            // The socket stays in its namespace, whoever uses it.
            let place = stage.sides[number].side.node();
            let led = match place.run(async move { flow.ask(Duration::from_millis(300)).await })? {
                Answer::Served { by, .. } => Some(by.ip()),
                _ => None,
            };
            if led == wanted || Instant::now() > deadline {
                return Ok(led.map_or("nowhere".to_owned(), |address| address.to_string()));
            }
        }
    };
    Ok([lead(0)?, lead(1)?])
}

/// What may change in the life of a service.
fn changes(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("a plain one", one(Service::new(34), &["a", "r"]))?;
    stage.see("gets node ports", one(Service::new(34).node_ports(), &["a", "r"]))?;
    stage.see("and a load balancer", one(balanced(34), &["a", "r"]))?;
    let external =
        balanced(34).with("externalTrafficPolicy", json!("Local")).with("healthCheckNodePort", json!(32_034));
    stage.see("and a policy", one(external, &["a", "r"]))?;
    stage.see("and loses all", one(Service::new(34), &["a", "r"]))?;
    let config = json!({ "clientIP": { "timeoutSeconds": 10_800 } });
    let sticky = Service::new(34).with("sessionAffinity", json!("ClientIP")).with("sessionAffinityConfig", config);
    stage.see("gets affinity", one(sticky, &["a", "r"]))?;
    stage.see("and loses it", one(Service::new(34), &["a", "r"]))?;
    stage.see("another port", one(Service::new(34).ports(&[("", Tcp, 8888)]), &["a", "r"]))?;
    stage.see("another protocol", {
        let slice = Slice::new(34, &ends(&["a", "r"])).ports(&[("", Udp, Some(8080))]);
        World { services: vec![Service::new(34).ports(&[("", Udp, 8888)])], slices: vec![slice] }
    })?;
    stage.see("goes", World::default())?;
    stage.see("comes back", one(Service::new(34), &["b"]))
}

/// Everything that masquerading depends on.
fn locality(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    stage.see("local and remote", one(balanced(35), &["a", "r"]))?;
    let local = balanced(35).with("externalTrafficPolicy", json!("Local")).with("healthCheckNodePort", json!(32_035));
    stage.see("policy Local", one(local, &["a", "r"]))
}
