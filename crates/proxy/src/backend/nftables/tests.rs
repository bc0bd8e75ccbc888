//! Damage to the table, in a network namespace of each test's own.

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use service::Model;
use sys::netlink::nft::{Data, Element, Verdict};

use super::*;

fn service(name: &str, ip: &str, more: &Value) -> Service {
    let mut object = json!({"metadata": {"namespace": "default", "name": name},
        "spec": {"type": "NodePort", "clusterIP": ip, "ports": [{"port": 80, "nodePort": 30_080}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.9"}]}}});
    let spec = object["spec"].as_object_mut().unwrap();
    spec.extend(more.as_object().unwrap().clone());
    serde_json::from_value(object).unwrap()
}

fn slice(service: &str, addresses: &[&str]) -> EndpointSlice {
    let endpoint = |address: &&str| {
        let node = if address.ends_with('1') { "here" } else { "there" };
        json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}})
    };
    serde_json::from_value(json!({"metadata": {"namespace": "default", "name": service,
            "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "", "port": 8080}]}))
    .unwrap()
}

/// Of every kind of set something.
fn model() -> Model {
    let mut model = Model::new("here");
    let ranges = json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"]});
    model.set_service(&service("web", "10.96.0.10", &ranges));
    model.set_slice(&slice("web", &["10.85.0.1", "10.85.0.2", "10.85.0.3"]));
    let ports = json!([{"port": 80}]);
    let local = json!({"sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"],
        "ports": ports});
    model.set_service(&service("local", "10.96.0.11", &local));
    model.set_slice(&slice("local", &["10.85.0.1", "10.85.0.2"]));
    model
}

/// Runs a test with the table of these rules.
fn with_table(test: impl FnOnce(Nftables, Model) + Send) {
    let run = || {
        let mut nftables = Nftables::open(&Config::new("here")).unwrap();
        let mut model = model();
        model.update();
        nftables.replace(model.rules(), &Network::default()).unwrap();
        test(nftables, model);
        Ok(())
    };
    if let Err(error) = sys::netns::create(run) {
        println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error})");
    }
}

/// What somebody else does.
fn somebody(table: &str, does: impl FnOnce(&mut Batch)) {
    let mut batch = Batch::new(ServiceTable::FAMILY, table);
    does(&mut batch);
    Socket::netfilter().unwrap().commit(batch).unwrap();
}

fn nft(arguments: &[&str]) {
    #[expect(clippy::disallowed_methods, reason = "what another program does to the table is the point")]
    let mut command = std::process::Command::new("nft");
    testkit::host::output(command.args(arguments)).unwrap();
}

/// Looks as if it had not been counted lately.
fn is_there(nftables: &mut Nftables) -> bool {
    nftables.next_count = Instant::now();
    nftables.is_there().unwrap()
}

#[test]
fn elements_that_somebody_removed_or_added_are_missed() {
    with_table(|mut nftables, model| {
        let name = nftables.name.clone();
        let mut netfilter = Socket::netfilter().unwrap();
        for set in nftables.table.fixed_sets() {
            let before = netfilter.elements(ServiceTable::FAMILY, &name, &set).unwrap();
            let Some((key, _)) = before.first().cloned() else { continue };
            let damages: [&dyn Fn(&mut Batch); 2] =
                [&|batch| batch.flush_set(&set), &|batch| batch.delete_elements(&set, [&key[..]])];
            for damage in damages {
                somebody(&name, damage);
                assert!(!is_there(&mut nftables), "{set}");
                nftables.replace(model.rules(), &Network::default()).unwrap();
                let mut after = netfilter.elements(ServiceTable::FAMILY, &name, &set).unwrap();
                let mut before = before.clone();
                before.sort_unstable();
                after.sort_unstable();
                assert_eq!(before, after, "{set}");
                assert!(is_there(&mut nftables), "{set}");
            }
        }
        let services = ServiceTable::FRONTENDS[0];
        let read = netfilter.elements(ServiceTable::FAMILY, &name, services).unwrap();
        assert!(read.len() >= 3, "{read:?}");
        let mut key = read[0].0.clone();
        key[0] ^= 1;
        somebody(&name, |batch| {
            batch.add_elements(services, [Element { key: &key, data: Data::Value(&read[0].1) }]);
        });
        assert!(!is_there(&mut nftables), "one more");
    });
}

#[test]
fn elements_that_somebody_replaced_are_missed() {
    with_table(|mut nftables, model| {
        let name = nftables.name.clone();
        let mut netfilter = Socket::netfilter().unwrap();
        let mut replaced = 0;
        for map in nftables.table.fixed_sets() {
            let there = netfilter.elements(ServiceTable::FAMILY, &name, &map).unwrap();
            let Some((key, value)) = there.first().cloned() else { continue };
            let mut other = value.clone();
            other.iter_mut().take(1).for_each(|byte| *byte ^= 1);
            // Those of maps of verdicts have no bytes.
            let data = match map.contains("verdicts") || map.starts_with("firewall") {
                true => Data::Verdict(Verdict::Return),
                false if value.is_empty() => continue,
                false => Data::Value(&other),
            };
            somebody(&name, |batch| {
                batch.delete_elements(&map, [&key[..]]);
                batch.add_elements(&map, [Element { key: &key, data }]);
            });
            assert!(!is_there(&mut nftables), "{map}");
            nftables.replace(model.rules(), &Network::default()).unwrap();
            assert!(is_there(&mut nftables), "{map}");
            replaced += 1;
        }
        assert!(replaced >= 8, "{replaced} maps");
    });
}

#[test]
fn rules_that_somebody_removed_are_missed_in_every_chain() {
    with_table(|mut nftables, model| {
        let name = nftables.name.clone();
        let chains = Socket::netfilter().unwrap().chains(ServiceTable::FAMILY, &name).unwrap();
        assert!(chains.iter().any(|chain| chain == "lb4-3"), "{chains:?}");
        for chain in chains {
            nft(&["flush", "chain", "inet", &name, &chain]);
            assert_eq!(is_there(&mut nftables), is_empty_anyway(&chain), "{chain}");
            nftables.replace(model.rules(), &Network::default()).unwrap();
            assert!(is_there(&mut nftables), "{chain}");
        }
    });
}

/// They hold rules for the ranges of Services only, which are not known here.
fn is_empty_anyway(chain: &str) -> bool {
    chain.ends_with("-last")
}

#[test]
fn changes_of_ours_and_of_other_tables_are_no_damage() {
    with_table(|mut nftables, mut model| {
        for round in 0..8 {
            let addresses: Vec<String> = (1..=round).map(|n| format!("10.85.1.{n}")).collect();
            model.set_slice(&slice("web", &addresses.iter().map(String::as_str).collect::<Vec<_>>()));
            let affinity = json!({"sessionAffinity": "ClientIP", "ports": [{"port": 81}]});
            let local = json!({"externalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["203.0.113.0/24"],
                "type": "LoadBalancer", "ports": [{"port": 80}]});
            match round % 3 {
                0 => model.remove_service("default", "local"),
                1 => model.set_service(&service("local", "10.96.0.12", &affinity)),
                _ => model.set_service(&service("local", "10.96.0.11", &local)),
            }
            somebody("other", |batch| batch.add_table());
            nftables.update(&model.update()).unwrap();
            somebody("other", |batch| batch.delete_table());
            assert!(is_there(&mut nftables), "round {round}");
        }
    });
}
