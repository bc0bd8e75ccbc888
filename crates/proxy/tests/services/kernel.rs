//! What `nft` lists against what the rules say.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use service::{Endpoint, Entry, Frontend, Model, Target};

use crate::host::{Host, NODE, Way};

/// The rules that the store asks for, computed afresh.
pub(crate) fn wanted(host: &Host) -> Model {
    let mut model = Model::new(NODE);
    host.store().services().list().iter().for_each(|service| model.set_service(service));
    host.store().endpoint_slices().list().iter().for_each(|slice| model.set_slice(slice));
    model.update();
    model
}

/// The table as `nft` lists it: elements of sets and maps as text, and names of chains.
struct Listing {
    sets: BTreeMap<String, BTreeMap<String, String>>,
    chains: BTreeSet<String>,
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Object(object) => match object.iter().next() {
            Some((kind, inner)) if ["concat", "elem", "val"].contains(&kind.as_str()) => text(inner),
            Some((kind, inner)) if inner.is_object() => format!("{kind} {}", text(&inner["target"])),
            Some((kind, _)) => kind.clone(),
            None => String::new(),
        },
        other => other.to_string(),
    }
}

impl Listing {
    fn read() -> Listing {
        #[expect(clippy::disallowed_methods, reason = "the listing of another program is the point")]
        let mut command = Command::new("nft");
        let output = testkit::host::output(command.args(["-j", "-n", "list", "table", "inet", "orlop-proxy"])).unwrap();
        let listing: Value = serde_json::from_slice(&output).unwrap();
        let (mut sets, mut chains) = (BTreeMap::new(), BTreeSet::new());
        for object in listing["nftables"].as_array().unwrap() {
            if let Some(chain) = object.get("chain") {
                chains.insert(text(&chain["name"]));
            } else if let Some(set) = object.get("map").or_else(|| object.get("set")) {
                let elements = set["elem"].as_array().into_iter().flatten().map(|element| match element {
                    Value::Array(pair) => (text(&pair[0]), text(&pair[1])),
                    key => (text(key), String::new()),
                });
                sets.insert(text(&set["name"]), elements.collect());
            }
        }
        Listing { sets, chains }
    }

    fn take(&mut self, set: &str, key: &str) -> String {
        let elements = self.sets.get_mut(set).unwrap_or_else(|| panic!("no {set}"));
        elements.remove(key).unwrap_or_else(|| panic!("no {key} in {set}: {elements:?}"))
    }

    fn take_side(&mut self, frontend: &Frontend, prefix: &str, entry: &Entry, target: &Target) -> Option<String> {
        let family = if frontend.address.is_ipv6() { 6 } else { 4 };
        let set = |word: &str| format!("{prefix}{word}{family}");
        let key = format!("{} {} {}", frontend.address, frontend.protocol.number(), frontend.port);
        let (number, verdicts) = match frontend.is_node_port() {
            true => {
                let key = format!("{} {}", frontend.protocol.number(), frontend.port);
                (self.take(&set("node-ports"), &key), "node-port-verdicts")
            }
            false => (self.take(&set("services"), &key), "verdicts"),
        };
        // `nft` takes a number in a value for one in network order, and so it does with one that is all of a key.
        let verdict = self.sets[&set(verdicts)][&number].clone();
        let count = target.endpoints().len();
        let kind = if frontend.is_node_port() { "node-port" } else { "lb" };
        let affinity = entry.affinity_s.map(|seconds| format!("-affinity-{seconds}")).unwrap_or_default();
        let expect = match target {
            Target::Endpoints(_) => format!("goto {}-{count}{affinity}", set(kind)),
            Target::Refuse => "goto refuse".to_owned(),
            Target::Drop => "drop".to_owned(),
        };
        assert_eq!(verdict, expect, "{frontend}");
        let place = |endpoint: &Endpoint| format!("{} {}", endpoint.address, endpoint.port);
        let wanted: BTreeSet<String> = target.endpoints().iter().map(place).collect();
        let slots: BTreeSet<String> =
            (0..count).map(|slot| self.take(&set("endpoints"), &format!("{key} {slot}"))).collect();
        assert_eq!(slots, wanted, "{frontend}");
        if entry.affinity_s.is_some() {
            let number = |slot| self.take(&set("numbers"), &format!("{key} {slot}")).parse().map(u32::swap_bytes);
            let numbers: Vec<u32> = (0..count).map(number).collect::<Result<_, _>>().unwrap();
            let member = |number| self.take(&set("members"), &format!("{key} {number}"));
            assert_eq!(numbers.iter().map(member).collect::<BTreeSet<_>>(), wanted, "{frontend}");
        }
        expect.strip_prefix("goto ").map(str::to_owned)
    }
}

/// Chains and rules as `iptables-save` lists them. The order is left out: it does not matter between Services, and within one
/// it is the text's, which is checked where that is made.
pub(crate) fn rules_of_iptables(way: Way) -> BTreeSet<String> {
    let listing = way.iptables("-save", "");
    listing.lines().filter(|line| line.contains("KUBE-")).map(str::to_owned).collect()
}

/// What is held for packets on their way goes when the proxy looks at its rules next.
const HELD_LIMIT: Duration = Duration::from_secs(60);

/// Checks that the kernel has the rules, and soon nothing but the rules.
pub(crate) async fn check(host: &Host) {
    let begun = Instant::now();
    while let Err(surplus) = check_now(host) {
        assert!(begun.elapsed() < HELD_LIMIT, "this is left over: {surplus}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn check_now(host: &Host) -> Result<(), String> {
    let mut listing = Listing::read();
    let model = wanted(host);
    let fixed = ["prerouting", "output", "postrouting", "prerouting-last", "output-last", "refuse"];
    let mut chains: BTreeSet<String> = fixed.map(str::to_owned).into_iter().collect();
    for family in [4, 6] {
        chains.extend(["inbound", "outbound", "dispatch", "leaving"].map(|name| format!("{name}{family}")));
    }
    let (mut local, mut sources) = (BTreeSet::new(), BTreeSet::new());
    for (frontend, entry) in model.rules().iter() {
        let family = if frontend.address.is_ipv6() { 6 } else { 4 };
        chains.extend(listing.take_side(frontend, "", entry, &entry.inside));
        if let Some(outside) = &entry.outside {
            chains.extend(listing.take_side(frontend, "outside-", entry, outside));
        }
        let key = format!("{} {} {}", frontend.address, frontend.protocol.number(), frontend.port);
        if entry.inside.endpoints().iter().any(|endpoint| !endpoint.local) {
            let away = if entry.is_external() && entry.outside.is_none() { "-away" } else { "" };
            listing.take(&format!("masquerade{away}{family}"), &key);
        }
        if let Some(admitted) = &entry.sources {
            let verdict = listing.take(&format!("firewall{family}"), &key);
            chains.extend(verdict.strip_prefix("jump ").map(str::to_owned));
            sources.insert((admitted.clone(), verdict));
        }
        local.extend(entry.endpoints().filter(|endpoint| endpoint.local).map(|endpoint| (family, endpoint.address)));
    }
    for (family, address) in local {
        listing.take(&format!("hairpins{family}"), &format!("{address} {address}"));
    }
    let distinct: BTreeSet<_> = sources.iter().map(|(admitted, _)| admitted.clone()).collect();
    assert_eq!(distinct.len(), sources.len(), "one chain for one list of sources");
    assert!(listing.chains.is_superset(&chains), "{:?} are no {chains:?}", listing.chains);
    for (_, verdicts) in listing.sets.iter_mut().filter(|(set, _)| set.contains("verdicts")) {
        let led: Vec<&str> = verdicts.values().filter_map(|verdict| verdict.strip_prefix("goto ")).collect();
        assert!(led.iter().all(|chain| listing.chains.contains(*chain)), "{led:?}");
        assert_eq!(led.len(), led.iter().collect::<BTreeSet<_>>().len(), "one number for one chain");
        verdicts.clear();
    }
    listing.sets.retain(|_, elements| !elements.is_empty());
    match listing.sets.is_empty() && listing.chains == chains {
        true => Ok(()),
        false => Err(format!("{:?}, chains {:?}", listing.sets, listing.chains.difference(&chains))),
    }
}
