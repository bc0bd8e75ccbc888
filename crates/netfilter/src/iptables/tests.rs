//! Scripts, carried out on tables in memory that are as strict as the kernel's.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use proptest::prelude::*;
use serde_json::{Value, json};
use service::Model;

use super::*;

/// Chains by table and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Tables(BTreeMap<(String, String), Vec<String>>);

const BUILT_IN: [(&str, &[&str]); 3] = [
    ("mangle", &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"]),
    ("filter", &["INPUT", "FORWARD", "OUTPUT"]),
    ("nat", &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]),
];

impl Tables {
    fn new() -> Tables {
        let chains = BUILT_IN.iter().flat_map(|(table, chains)| chains.iter().map(move |chain| (*table, *chain)));
        Tables(chains.map(|(table, chain)| ((table.to_owned(), chain.to_owned()), Vec::new())).collect())
    }

    /// As `iptables-restore --noflush`.
    fn restore(&mut self, script: &str) {
        let mut table = String::new();
        for line in script.lines() {
            let at = |chain: &str| (table.clone(), chain.to_owned());
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
            } else if line == "COMMIT" {
                self.check(&table);
                table.clear();
            } else if let Some(rest) = line.strip_prefix(':') {
                let chain = rest.strip_suffix(" - [0:0]").unwrap();
                self.0.insert(at(chain), Vec::new());
            } else if let Some(chain) = line.strip_prefix("-X ") {
                let rules = self.0.remove(&at(chain)).unwrap_or_else(|| panic!("no chain: {line}"));
                assert!(rules.is_empty(), "{line}: {rules:?}");
            } else {
                let (verb, rest) = line.split_once(' ').unwrap();
                let (chain, rule) = rest.split_once(' ').unwrap();
                let rules = self.0.get_mut(&at(chain)).unwrap_or_else(|| panic!("no chain: {line}"));
                match verb {
                    "-A" => rules.push(rule.to_owned()),
                    "-I" => rules.insert(0, rule.to_owned()),
                    "-D" => {
                        let found = rules.iter().position(|one| one == rule);
                        rules.remove(found.unwrap_or_else(|| panic!("no rule: {line}")));
                    }
                    _ => panic!("{line}"),
                }
            }
        }
        assert_eq!(table, "", "a section has an end");
    }

    /// Every jump leads to a chain.
    fn check(&self, table: &str) {
        const VERDICTS: [&str; 7] = ["ACCEPT", "DROP", "REJECT", "RETURN", "MARK", "MASQUERADE", "DNAT"];
        for ((_, chain), rules) in self.0.iter().filter(|((of, _), _)| of == table) {
            for to in rules.iter().filter_map(|rule| save::target(rule)) {
                let there = VERDICTS.contains(&to) || self.0.contains_key(&(table.to_owned(), to.to_owned()));
                assert!(there, "{chain} leads to {to}, which is not there");
            }
        }
    }

    /// As `iptables-save`.
    fn listing(&self) -> String {
        let mut listing = String::new();
        for (table, _) in BUILT_IN {
            let of_table = || self.0.iter().filter(move |((of, _), _)| of == table);
            listing.push_str(&format!("*{table}\n"));
            of_table().for_each(|((_, chain), _)| listing.push_str(&format!(":{chain} - [0:0]\n")));
            for ((_, chain), rules) in of_table() {
                rules.iter().for_each(|rule| listing.push_str(&format!("-A {chain} {rule}\n")));
            }
            listing.push_str("COMMIT\n");
        }
        listing
    }

    /// How often a chain is used: by its rules, and by those that jump to it.
    fn uses(&self, table: Table, chain: &str) -> usize {
        let of_table = self.0.iter().filter(|((of, _), _)| of == table.name()).flat_map(|(_, rules)| rules);
        let jumps = of_table.filter(|rule| save::target(rule) == Some(chain)).count();
        self.chain(table.name(), chain).len() + jumps
    }

    fn chain(&self, table: &str, chain: &str) -> &[String] {
        self.0.get(&(table.to_owned(), chain.to_owned())).map_or(&[], Vec::as_slice)
    }

    /// What does not depend on the order in which ports came.
    fn sorted(mut self) -> Tables {
        for ((table, chain), rules) in &mut self.0 {
            if chain == "KUBE-NODEPORTS" || chain == "KUBE-EXTERNAL-SERVICES" || chain == "KUBE-PROXY-FIREWALL" {
                rules.sort_unstable();
            }
            if chain == "KUBE-SERVICES" {
                let last = rules.pop().expect("the last rule is always there");
                let what = if table == "nat" { "-j KUBE-NODEPORTS" } else { "-j REJECT" };
                assert!(last.ends_with(what), "the last one: {last}");
                rules.sort_unstable();
                rules.push(last);
            }
        }
        self
    }
}

fn config() -> Config {
    with(Network {
        local: sources(&["10.0.0.0/8", "fd00::/16"]),
        service_cidrs: vec!["172.30.0.0/16".parse().unwrap(), "fd30::/112".parse().unwrap()],
        ..Network::default()
    })
}

fn with(network: Network) -> Config {
    Config { network, ..Config::new() }
}

fn sources(ranges: &[&str]) -> Local {
    Local::Sources(ranges.iter().map(|range| range.parse().unwrap()).collect())
}

fn service(name: &str, spec: Value, ingress: &[&str]) -> Service {
    let ingress: Vec<Value> = ingress.iter().map(|ip| json!({"ip": ip})).collect();
    serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": name}, "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress}}}))
    .unwrap()
}

/// Endpoints on port 8080 of `web`: address and node.
fn slice(name: &str, endpoints: &[(String, &str)]) -> EndpointSlice {
    let kind = if endpoints.iter().any(|(address, _)| address.contains(':')) { "IPv6" } else { "IPv4" };
    let endpoint = |(address, node): &(String, &str)| json!({"addresses": [address], "nodeName": node});
    serde_json::from_value(json!({
        "metadata": {"namespace": "ns", "name": format!("{name}-{kind}"), "labels": {"kubernetes.io/service-name": name}},
        "addressType": kind, "ports": [{"name": "p80", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>()}))
    .unwrap()
}

fn tables_of(config: Config, model: &Model, ipv6: bool) -> Tables {
    let network = config.network.clone();
    let scripts = ServiceRules::new(config).replace(model.rules(), &network, &Families::default(), usize::MAX);
    let mut tables = Tables::new();
    scripts.of(ipv6).iter().for_each(|script| tables.restore(script));
    assert_eq!(scripts.of(ipv6).len(), 1);
    tables
}

/// Writes the rules of one Service and checks chains of the table `nat`, or `filter/CHAIN`.
#[track_caller]
fn check(config: Config, spec: Value, ingress: &[&str], endpoints: &[(&str, &str)], expect: &[(&str, &[&str])]) {
    let mut model = Model::new("here");
    model.set_service(&service("web", spec, ingress));
    let endpoints: Vec<_> = endpoints.iter().map(|(address, node)| ((*address).to_owned(), *node)).collect();
    model.set_slice(&slice("web", &endpoints));
    model.update();
    let tables = tables_of(config, &model, false);
    for (chain, rules) in expect {
        let (table, chain) = chain.split_once('/').unwrap_or(("nat", chain));
        assert_eq!(tables.chain(table, chain), *rules, "{table} {chain}");
    }
}

const NEAR: (&str, &str) = ("10.180.0.1", "here");
const FAR: (&str, &str) = ("10.180.0.2", "there");

#[test]
fn a_cluster_ip() {
    let spec = json!({"clusterIP": "172.30.0.41", "ports": [{"name": "p80", "port": 80}]});
    let names = PortNames::new("web:p80");
    let (svc, near, far) = (names.chain("SVC"), names.endpoint(NEAR.0), names.endpoint(FAR.0));
    let to = "-d 172.30.0.41/32 -p tcp -m comment --comment \"ns/web:p80 cluster IP\" -m tcp --dport 80";
    check(
        config(),
        spec.clone(),
        &[],
        &[NEAR, FAR],
        &[
            (
                "KUBE-SERVICES",
                &[
                    &format!("{to} -j {svc}"),
                    "-m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this \
                     chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
                ],
            ),
            (
                &svc,
                &[
                    &format!("! -s 10.0.0.0/8 {to} -j KUBE-MARK-MASQ"),
                    &format!(
                        "-m comment --comment \"ns/web:p80 -> 10.180.0.1:8080\" -m statistic --mode random --probability \
                         0.5000000000 -j {near}"
                    ),
                    &format!("-m comment --comment \"ns/web:p80 -> 10.180.0.2:8080\" -j {far}"),
                ],
            ),
            (
                &near,
                &[
                    "-s 10.180.0.1/32 -m comment --comment ns/web:p80 -j KUBE-MARK-MASQ",
                    "-p tcp -m comment --comment ns/web:p80 -m tcp -j DNAT --to-destination 10.180.0.1:8080",
                ],
            ),
            (
                "filter/KUBE-SERVICES",
                &["-d 172.30.0.0/16 -m comment --comment \"no service has this address and port\" -m addrtype ! \
                   --dst-type LOCAL -j REJECT"],
            ),
        ],
    );
    let all = with(Network { masquerade_all: true, ..Network::default() });
    let refusal =
        "-d 172.30.0.41/32 -p tcp -m comment --comment \"ns/web:p80 has no endpoints\" -m tcp --dport 80 -j REJECT";
    check(all.clone(), spec.clone(), &[], &[], &[("filter/KUBE-SERVICES", &[refusal]), (&svc, &[])]);
    let tail = format!("-m comment --comment \"ns/web:p80 -> 10.180.0.1:8080\" -j {near}");
    check(all, spec.clone(), &[], &[NEAR], &[(&svc, &[&format!("{to} -j KUBE-MARK-MASQ"), &tail])]);
    let several = with(Network { local: sources(&["10.1.0.0/16", "10.2.0.0/16"]), ..Network::default() });
    check(
        several,
        spec.clone(),
        &[],
        &[NEAR],
        &[
            (&svc, &[&format!("{to} -j KUBE-MARK-MASQ-OUTSIDE"), &tail]),
            ("KUBE-MARK-MASQ-OUTSIDE", &["-s 10.1.0.0/16 -j RETURN", "-s 10.2.0.0/16 -j RETURN", "-j KUBE-MARK-MASQ"]),
        ],
    );
    for (local, outside) in
        [(Local::Bridge("cni0".into()), "! -i cni0"), (Local::InterfacePrefix("lxc".into()), "! -i lxc+")]
    {
        let config = with(Network { local, ..Network::default() });
        let mark = format!("{outside} {to} -j KUBE-MARK-MASQ");
        check(config, spec.clone(), &[], &[NEAR], &[(&svc, &[&mark, &tail])]);
    }
    check(Config::new(), spec, &[], &[NEAR], &[(&svc, &[&tail])]);
}

#[test]
fn affinity_remembers_in_the_endpoints_chain() {
    let spec =
        json!({"clusterIP": "172.30.0.41", "sessionAffinity": "ClientIP", "ports": [{"name": "p80", "port": 80}]});
    let names = PortNames::new("web:p80");
    let (svc, near) = (names.chain("SVC"), names.endpoint(NEAR.0));
    let comment = "-m comment --comment \"ns/web:p80 -> 10.180.0.1:8080\"";
    check(
        Config::new(),
        spec,
        &[],
        &[NEAR],
        &[
            (
                &svc,
                &[
                    &format!("{comment} -m recent --rcheck --seconds 10800 --reap --name {near} -j {near}"),
                    &format!("{comment} -j {near}"),
                ],
            ),
            (
                &near,
                &[
                    "-s 10.180.0.1/32 -m comment --comment ns/web:p80 -j KUBE-MARK-MASQ",
                    &format!(
                        "-p tcp -m comment --comment ns/web:p80 -m recent --set --name {near} -m tcp -j DNAT \
                         --to-destination 10.180.0.1:8080"
                    ),
                ],
            ),
        ],
    );
}

#[test]
fn addresses_for_the_outside() {
    let spec = |policy: &str, ranges: &[&str]| {
        json!({"type": "LoadBalancer", "clusterIP": "172.30.0.41", "externalIPs": ["192.0.2.9"],
            "externalTrafficPolicy": policy, "healthCheckNodePort": 30001, "loadBalancerSourceRanges": ranges,
            "ports": [{"name": "p80", "port": 80, "nodePort": 30080}]})
    };
    let names = PortNames::new("web:p80");
    let [svc, svl, ext, fw] = ["SVC", "SVL", "EXT", "FW"].map(|kind| names.chain(kind));
    let to = |address: &str, words: &str| {
        format!("-d {address}/32 -p tcp -m comment --comment \"ns/web:p80 {words}\" -m tcp --dport 80")
    };
    let node_port = format!("-p tcp -m comment --comment ns/web:p80 -m tcp --dport 30080 -j {ext}");
    let about = |before: &str| format!("-m comment --comment \"{before} ns/web:p80 external destinations\"");
    let cluster = [format!("{} -j KUBE-MARK-MASQ", about("masquerade traffic for")), format!("-j {svc}")];
    check(
        config(),
        spec("Cluster", &["203.0.113.0/25"]),
        &["198.51.100.7"],
        &[FAR],
        &[
            ("KUBE-NODEPORTS", &[&node_port]),
            (&ext, &[&cluster[0], &cluster[1]]),
            (
                &fw,
                &[
                    &format!("-s 203.0.113.0/25 -m comment --comment \"ns/web:p80 loadbalancer IP\" -j {ext}"),
                    "-m comment --comment \"other traffic to ns/web:p80 will be dropped by KUBE-PROXY-FIREWALL\"",
                ],
            ),
            (
                "filter/KUBE-PROXY-FIREWALL",
                &[&format!("{} -j DROP", to("198.51.100.7", &format!("traffic not accepted by {fw}")))],
            ),
            ("filter/KUBE-EXTERNAL-SERVICES", &[]),
        ],
    );
    let inside = [
        format!("-s 10.0.0.0/8 {} -j {svc}", about("pod traffic for")),
        format!("{} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ", about("masquerade LOCAL traffic for")),
        format!("{} -m addrtype --src-type LOCAL -j {svc}", about("route LOCAL traffic for")),
    ];
    let [pods, mark, node] = inside.each_ref().map(String::as_str);
    check(
        config(),
        spec("Local", &[]),
        &[],
        &[NEAR, FAR],
        &[
            (&ext, &[pods, mark, node, &format!("-j {svl}")]),
            (&svl, &[&format!("-m comment --comment \"ns/web:p80 -> 10.180.0.1:8080\" -j {}", names.endpoint(NEAR.0))]),
            (
                "filter/KUBE-NODEPORTS",
                &["-p tcp -m comment --comment \"ns/web:p80 health check node port\" -m tcp --dport 30001 -j ACCEPT"],
            ),
        ],
    );
    let local = "has no local endpoints";
    let to_node = |words: &str| {
        format!("-p tcp -m comment --comment \"ns/web:p80 {words}\" -m addrtype --dst-type LOCAL -m tcp --dport 30080")
    };
    check(
        config(),
        spec("Local", &[]),
        &[],
        &[FAR],
        &[
            (&ext, &[pods, mark, node]),
            (&svl, &[]),
            (
                "filter/KUBE-EXTERNAL-SERVICES",
                &[&format!("{} -j DROP", to("192.0.2.9", local)), &format!("{} -j DROP", to_node(local))],
            ),
        ],
    );
    let none = "has no endpoints";
    check(
        config(),
        spec("Local", &[]),
        &[],
        &[],
        &[
            (&ext, &[]),
            ("KUBE-NODEPORTS", &[]),
            (
                "filter/KUBE-EXTERNAL-SERVICES",
                &[&format!("{} -j REJECT", to("192.0.2.9", none)), &format!("{} -j REJECT", to_node(none))],
            ),
        ],
    );
}

/// So many endpoints of a Service that clients come back to, behind an address that no step of a history uses: all that is
/// written from then on is written in short.
fn crowd(model: &mut Model) {
    let spec = json!({"clusterIP": "172.30.0.99", "clusterIPs": ["172.30.0.99", "fd30::99"], "ports": [{"name": "p80", "port": 80}]});
    model.set_service(&service("crowd", spec, &[]));
    for prefix in ["10.7.0.", "fd07::"] {
        let one = |n: usize| match prefix.contains(':') {
            true => format!("{prefix}{n:x}"),
            false => format!("10.7.{}.{}", n / 256, n % 256),
        };
        let endpoints: Vec<_> = (0..=FULL_ENDPOINTS_MAX).map(|n| (one(n), "there")).collect();
        model.set_slice(&slice("crowd", &endpoints));
    }
}

#[test]
fn many_endpoints_have_no_chains_of_their_own() {
    let mut model = Model::new("here");
    let spec = |affinity: &str| json!({"clusterIP": "172.30.0.41", "sessionAffinity": affinity, "ports": [{"name": "p80", "port": 80}]});
    let few = [(NEAR.0.to_owned(), NEAR.1), (FAR.0.to_owned(), FAR.1)];
    let config = Config { compares: true, ..config() };
    let (mut rules, mut tables) = (ServiceRules::new(config.clone()), Tables::new());
    let names = PortNames::new("web:p80");
    let (svc, near) = (names.chain("SVC"), names.endpoint(NEAR.0));
    let endpoint_chains = |tables: &Tables| tables.0.keys().filter(|(_, chain)| chain.starts_with("KUBE-SEP-")).count();

    model.set_service(&service("web", spec("None"), &[]));
    model.set_slice(&slice("web", &few));
    model.update();
    rules
        .replace(model.rules(), &config.network, &Families::default(), usize::MAX)
        .of(false)
        .iter()
        .for_each(|script| tables.restore(script));
    assert_eq!(endpoint_chains(&tables), 2, "as upstream has them");
    assert!(
        tables.chain("nat", "KUBE-POSTROUTING")[0]
            .ends_with("--bytecode \"6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 1,6 0 0 0\" -j KUBE-MARK-MASQ")
    );

    crowd(&mut model);
    tables.restore(rules.update(&model.update()).of(false));
    assert_eq!(endpoint_chains(&tables), 2, "what has not changed stands as it was");
    assert!(rules.is_used(false, |table, chain| tables.uses(table, chain)));

    model.set_slice(&slice("web", &few[..1]));
    tables.restore(rules.update(&model.update()).of(false));
    assert_eq!(endpoint_chains(&tables), 0);
    assert_eq!(tables.chain("nat", &svc)[1..], ["-p tcp -m tcp -j DNAT --to-destination 10.180.0.1:8080"]);
    model.set_slice(&slice("web", &few));
    tables.restore(rules.update(&model.update()).of(false));
    let drawn =
        "-p tcp -m statistic --mode random --probability 0.5000000000 -m tcp -j DNAT --to-destination 10.180.0.1:8080";
    assert_eq!(tables.chain("nat", &svc)[1], drawn);

    model.set_service(&service("web", spec("ClientIP"), &[]));
    tables.restore(rules.update(&model.update()).of(false));
    assert_eq!(endpoint_chains(&tables), 2, "what a client comes back to is remembered in a chain");
    assert!(tables.chain("nat", &near)[1].contains("-m recent --set"));
    assert!(rules.is_whole(&Remains::read(&tables.listing(), false), false));
    assert_eq!(tables.clone().sorted(), tables_of(config, &model, false).sorted());
}

#[test]
fn chains_of_endpoints_that_have_none_any_more_go_in_pieces() {
    let mut model = Model::new("here");
    crowd(&mut model);
    model.update();
    let (full, short) = (config(), Config { compares: true, ..config() });
    let mut tables = tables_of(full.clone(), &model, false);
    let remains = Families([Remains::read(&tables.listing(), false), Remains::default()]);
    let scripts = ServiceRules::new(short.clone()).replace(model.rules(), &full.network, &remains, 400);
    assert!(scripts.of(false).iter().all(|script| script.lines().count() < 3000), "no script has them all");
    scripts.of(false).iter().for_each(|script| tables.restore(script));
    assert_eq!(tables.sorted(), tables_of(short, &model, false).sorted());
}

/// Names of the chains of a port, as they are computed for any name.
struct PortNames(names::PortNames);

impl PortNames {
    fn new(text: &str) -> PortNames {
        let (name, port) = text.split_once(':').unwrap();
        let service = service::Name { namespace: "ns".into(), name: name.into() };
        let port = service::ServicePort { service, name: port.into(), health_check_port: None };
        PortNames(names::PortNames::new(&port, service::Protocol::Tcp))
    }

    fn chain(&self, kind: &str) -> String {
        match kind {
            "SVC" => self.0.cluster(),
            "SVL" => self.0.local(),
            "EXT" => self.0.external(),
            _ => self.0.firewall(),
        }
    }

    fn endpoint(&self, address: &str) -> String {
        self.0.endpoint(&service::Endpoint { address: address.parse().unwrap(), port: 8080, local: false })
    }
}

#[test]
fn node_ports_keep_to_their_addresses() {
    let spec = json!({"type": "NodePort", "clusterIP": "172.30.0.41", "ports": [{"name": "p80", "port": 80, "nodePort": 30080}]});
    let last = |before: &str| {
        format!(
            "{before}-m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this \
             chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
        )
    };
    let check = |config: Config, ipv6: bool, expect: &[String]| {
        let mut model = Model::new("here");
        model.set_service(&service("web", spec.clone(), &[]));
        model.update();
        let tables = tables_of(config, &model, ipv6);
        let rules = tables.chain("nat", "KUBE-SERVICES");
        assert_eq!(rules, expect);
        tables
    };
    let guarded = |tables: &Tables| tables.chain("filter", "INPUT").iter().any(|rule| rule == "-j KUBE-FIREWALL");
    assert!(guarded(&check(Config::new(), false, &[last("")])));
    assert!(!guarded(&check(Config::new(), true, &[last("! -d ::1/128 ")])));
    let closed = Config { localhost_node_ports: false, ..Config::new() };
    assert!(!guarded(&check(closed, false, &[last("! -d 127.0.0.0/8 ")])));
    let within = |ranges: &[&str]| {
        let ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
        with(Network { node_ports: service::NodePorts::In(ranges), ..Network::default() })
    };
    let some = within(&["127.0.0.0/8", "192.0.2.0/24", "2001:db8::/64"]);
    assert!(guarded(&check(some.clone(), false, &[last("-d 127.0.0.0/8 "), last("-d 192.0.2.0/24 ")])));
    check(some.clone(), true, &[last("-d 2001:db8::/64 ")]);
    check(Config { localhost_node_ports: false, ..some }, false, &[last("-d 192.0.2.0/24 ")]);
    assert!(!guarded(&check(within(&["192.0.2.0/24"]), false, &[last("-d 192.0.2.0/24 ")])));
}

#[test]
fn what_node_ports_take_on_loopback_addresses_is_counted_first() {
    let config = Config { counts: true, ..config() };
    let mut model = Model::new("here");
    let spec = json!({"type": "NodePort", "clusterIP": "172.30.0.41", "clusterIPs": ["172.30.0.41"],
        "ports": [{"name": "p80", "port": 80, "nodePort": 3001}]});
    let mut rules = ServiceRules::new(config.clone());
    let mut tables = Tables::new();
    let scripts = rules.replace(model.rules(), &config.network, &Families::default(), usize::MAX);
    scripts.of(false).iter().for_each(|script| tables.restore(script));
    let chain_is_counted_first = |tables: &Tables| {
        let [counted, plain] = tables.chain("nat", "KUBE-NODEPORTS") else { panic!("{tables:?}") };
        assert!(
            counted.starts_with("-d 127.0.0.0/8 ") && counted.contains("--nfacct-name localhost_nps_accepted_pkts")
        );
        assert!(plain.starts_with("-p tcp ") && !plain.contains("nfacct"), "{plain}");
        assert_eq!(save::target(counted), save::target(plain));
    };
    model.set_service(&service("svc", spec, &[]));
    model.set_slice(&slice("svc", &[("10.1.0.1".to_owned(), "here")]));
    let difference = model.update();
    let script = rules.update(&difference).of(false).clone();
    tables.restore(&script);
    chain_is_counted_first(&tables);
    chain_is_counted_first(&tables_of(config.clone(), &model, false));
    assert!(tables.chain("filter", "KUBE-FORWARD")[0].contains("--nfacct-name ct_state_invalid_dropped_pkts"));
    let of_ours = |tables: &Tables, table: &str| -> usize {
        let ours = |((of, chain), _): &(&(String, String), &Vec<String>)| of == table && chain.starts_with("KUBE-");
        tables.0.iter().filter(ours).map(|(_, rules)| rules.len()).sum()
    };
    for table in Table::ALL {
        assert_eq!(rules.count(table, false), of_ours(&tables, table.name()), "{table:?}");
    }
    // The Service's address, its two node ports, its chains: EXT 2, SVC 2, SEP 2.
    assert_eq!(count_written([script.as_str()], Table::Nat), 9);
    assert_eq!(count_written([script.as_str()], Table::Filter), 0);
}

#[test]
fn a_name_cannot_end_the_line() {
    let mut model = Model::new("here");
    let name = "web\"\n-A INPUT -j ACCEPT\n#";
    model.set_service(&service(name, json!({"clusterIP": "172.30.0.41", "ports": [{"port": 80}]}), &[]));
    model.update();
    let tables = tables_of(config(), &model, false);
    let comment = "--comment \"ns/web__-A_INPUT_-j_ACCEPT__ has no endpoints\"";
    assert!(tables.chain("filter", "KUBE-SERVICES")[0].contains(comment));
    assert!(!tables.chain("filter", "INPUT").iter().any(|rule| rule == "-j ACCEPT"));
}

#[test]
fn what_is_not_ours_stays() {
    let mut model = Model::new("here");
    model.set_service(&service(
        "web",
        json!({"clusterIP": "172.30.0.41", "ports": [{"name": "p80", "port": 80}]}),
        &[],
    ));
    model.set_slice(&slice("web", &[(NEAR.0.to_owned(), NEAR.1)]));
    model.update();
    let mut tables = Tables::new();
    tables.restore(
        "*nat\n:DOCKER - [0:0]\n:KUBE-SVC-OLD - [0:0]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j DOCKER\n\
         -A PREROUTING -m comment --comment \"older words\" -j KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-SVC-OLD\nCOMMIT\n\
         *filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\nCOMMIT\n",
    );
    let foreign = tables.clone();
    let remains = Families([Remains::read(&tables.listing(), false), Remains::default()]);
    let scripts = ServiceRules::new(config()).replace(model.rules(), &config().network, &remains, usize::MAX);
    tables.restore(&scripts.of(false)[0]);
    assert_eq!(tables.chain("nat", "PREROUTING"), foreign.chain("nat", "PREROUTING"), "there is such a jump already");
    assert_eq!(tables.chain("filter", "INPUT").iter().filter(|rule| rule.ends_with("-j KUBE-FIREWALL")).count(), 1);
    assert!(!tables.0.contains_key(&("nat".to_owned(), "KUBE-SVC-OLD".to_owned())));
    for script in removal(&Remains::read(&tables.listing(), false), 1) {
        tables.restore(&script);
    }
    let left: Vec<&str> =
        tables.0.keys().map(|(_, chain)| chain.as_str()).filter(|name| name.contains("KUBE")).collect();
    assert_eq!(left, ["KUBE-FIREWALL"]);
    assert_eq!(tables.chain("nat", "PREROUTING"), ["-j DOCKER"]);
    assert!(removal(&Remains::read(&tables.listing(), false), usize::MAX).is_empty(), "nothing is left to do");
}

/// One step of a history.
#[derive(Debug, Clone)]
enum Step {
    Service { n: u8, external: bool, local: [bool; 2], ranges: bool, affinity: bool, port_name: bool },
    Remove { n: u8 },
    Endpoints { n: u8, near: Vec<u8>, far: Vec<u8> },
}

fn step() -> impl Strategy<Value = Step> {
    let service = (0..4u8, any::<bool>(), any::<[bool; 2]>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(n, external, local, ranges, affinity, port_name)| Step::Service {
            n,
            external,
            local,
            ranges,
            affinity,
            port_name,
        },
    );
    let some = || prop::collection::vec(0..6u8, 0..4);
    let endpoints = (0..4u8, some(), some()).prop_map(|(n, near, far)| Step::Endpoints { n, near, far });
    prop_oneof![3 => service, 1 => (0..4u8).prop_map(|n| Step::Remove { n }), 4 => endpoints]
}

fn take(model: &mut Model, step: &Step) {
    match step {
        Step::Service { n, external, local, ranges, affinity, port_name } => {
            let policy = |local: bool| if local { "Local" } else { "Cluster" };
            // Two Services share each address.
            let (v4, v6) = (format!("172.30.0.{}", n / 2), format!("fd30::{:x}", n / 2 + 1));
            let spec = json!({"type": if *external { "LoadBalancer" } else { "ClusterIP" }, "clusterIP": v4,
                "clusterIPs": [v4, v6], "sessionAffinity": if *affinity { "ClientIP" } else { "None" },
                "internalTrafficPolicy": policy(local[0]), "externalTrafficPolicy": policy(local[1]),
                "healthCheckNodePort": 30100 + i32::from(*n),
                "loadBalancerSourceRanges": if *ranges { &["203.0.113.0/24", "2001:db8::/32"][..] } else { &[] },
                "ports": [{"name": if *port_name { "p80" } else { "" }, "port": 80, "nodePort": 30000 + i32::from(n / 2)},
                    {"name": "dns", "port": 53, "protocol": "UDP"}]});
            model.set_service(&service(&format!("s{n}"), spec, &["198.51.100.1", "2001:db8:1::1"]));
        }
        Step::Remove { n } => model.remove_service("ns", &format!("s{n}")),
        Step::Endpoints { n, near, far } => {
            let one = |prefix: &str, last: &u8, node| (format!("{prefix}{last}"), node);
            for prefix in ["10.1.0.", "fd00::"] {
                let near = near.iter().map(|last| one(prefix, last, "here"));
                let all: Vec<_> = near.chain(far.iter().map(|last| one(prefix, last, "there"))).collect();
                model.set_slice(&slice(&format!("s{n}"), &all));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn changes_lead_where_a_replacement_does(
        history in prop::collection::vec(prop::collection::vec(step(), 1..4), 1..12),
        crowded in prop::bool::weighted(0.25),
    ) {
        let config = || Config { compares: crowded, ..config() };
        let mut model = Model::new("here");
        if crowded {
            crowd(&mut model);
            model.update();
        }
        let mut rules = ServiceRules::new(config());
        let mut tables = Families([Tables::new(), Tables::new()]);
        let scripts = rules.replace(model.rules(), &config().network, &Families::default(), usize::MAX);
        for ipv6 in [false, true] {
            tables.of_mut(ipv6).restore(&scripts.of(ipv6)[0]);
        }
        for steps in history {
            steps.iter().for_each(|step| take(&mut model, step));
            let scripts = rules.update(&model.update());
            for ipv6 in [false, true] {
                tables.of_mut(ipv6).restore(scripts.of(ipv6));
                let anew = tables_of(config(), &model, ipv6);
                prop_assert_eq!(tables.of(ipv6).clone().sorted(), anew.sorted());
            }
        }
        for ipv6 in [false, true] {
            let whole = tables.of(ipv6);
            prop_assert!(rules.is_used(ipv6, |table, chain| whole.uses(table, chain)));
            let is_ours = |chain: &str| chain.starts_with("KUBE-");
            for (at, _) in whole.0.iter().filter(|((_, chain), rules)| is_ours(chain) && !rules.is_empty()) {
                let mut damaged = whole.clone();
                damaged.0.insert(at.clone(), Vec::new());
                prop_assert!(!rules.is_used(ipv6, |table, chain| damaged.uses(table, chain)), "{at:?} has been emptied");
            }
        }
        // In small pieces over what is there, something stale included.
        for ipv6 in [false, true] {
            tables.of_mut(ipv6).restore("*nat\n:KUBE-SEP-STALE - [0:0]\n:KUBE-SVC-STALE - [0:0]\n-A KUBE-SVC-STALE -j KUBE-SEP-STALE\nCOMMIT\n");
        }
        let remains = Families([false, true].map(|ipv6| Remains::read(&tables.of(ipv6).listing(), ipv6)));
        let pieces = rules.replace(model.rules(), &config().network, &remains, 5);
        for ipv6 in [false, true] {
            pieces.of(ipv6).iter().for_each(|piece| tables.of_mut(ipv6).restore(piece));
            prop_assert_eq!(tables.of(ipv6), &tables_of(config(), &model, ipv6));
            prop_assert!(rules.is_whole(&Remains::read(&tables.of(ipv6).listing(), ipv6), ipv6));
        }
    }
}
