//! What is kept for the node itself, and who gets what whole.

use std::collections::BTreeMap;
use std::time::Duration;

use configfile::Reader;
use pod::quantity::Quantity;
use serde_json::Value;

use super::{Enforced, EnforcedGroup};
use crate::qos::MemoryRules;
use crate::resources::cpu::{self, CpuSet, Reserved};
use crate::resources::policies::{Policies, Scope, Topology};
use crate::resources::{memory as memory_manager, topology as topology_manager};

pub(super) fn enforces_pods(reader: &Reader<'_>) -> bool {
    let field = "enforceNodeAllocatable";
    reader.get(field).is_none() || reader.texts(field).contains(&"pods".to_owned())
}

pub(super) fn enforced(reader: &mut Reader<'_>) -> Enforced {
    const FIELD: &str = "enforceNodeAllocatable";
    let written = reader.texts(FIELD);
    let mut enforced = Enforced { pods: enforces_pods(reader), groups: Vec::new() };
    if written.contains(&"none".to_owned()) && written.len() > 1 {
        reader.fault(FIELD, "none stands alone");
    }
    for item in &written {
        let (kind, cpu_only) = match item.strip_suffix("-compressible") {
            Some(kind) => (kind, true),
            None => (item.as_str(), false),
        };
        let (field, given) = match kind {
            "system-reserved" => ("systemReservedCgroup", "systemReserved"),
            "kube-reserved" => ("kubeReservedCgroup", "kubeReserved"),
            "none" | "pods" if !cpu_only => continue,
            _ => {
                reader.fault(
                    FIELD,
                    format!("{item:?} is none of pods, none, system-reserved, kube-reserved, and the latter two with -compressible"),
                );
                continue;
            }
        };
        if cpu_only && written.iter().any(|other| other == kind) {
            reader.fault(FIELD, format!("{kind} and {item} exclude each other"));
        }
        let Some(path) = reader.text(field) else {
            reader.fault(field, format!("{item} in {FIELD} needs it"));
            continue;
        };
        if reader.text("reservedSystemCPUs").is_some() {
            reader.fault(field, "it cannot be set together with reservedSystemCPUs");
        }
        let path = path.trim_start_matches('/').into();
        enforced.groups.push(EnforcedGroup { field, path, reserved: amounts(reader, given), cpu_only });
    }
    enforced
}

pub(super) fn memory_of_containers(reader: &mut Reader<'_>) -> MemoryRules {
    const FACTOR: &str = "memoryThrottlingFactor";
    const POLICY: &str = "memoryReservationPolicy";
    let factor = reader.get(FACTOR).and_then(Value::as_f64);
    if factor.is_some_and(|factor| factor <= 0.0 || factor > 1.0) {
        reader.fault(FACTOR, "it has to be above 0 and at most 1");
    }
    let policy = reader.text(POLICY);
    if !matches!(policy.as_deref(), None | Some("None" | "TieredReservation")) {
        reader.fault(
            POLICY,
            format!("{:?} is neither None nor TieredReservation", policy.as_deref().unwrap_or_default()),
        );
    }
    // Upstream's gate; what it switches off may be written.
    let is_on = reader.get("featureGates").and_then(|gates| gates.get("MemoryQoS")?.as_bool()) != Some(false);
    MemoryRules {
        single_kill: reader.get("singleProcessOOMKill").and_then(Value::as_bool),
        throttling_factor: factor.filter(|_| is_on),
        reserves: is_on && policy.as_deref() == Some("TieredReservation"),
    }
}

/// Quantities by resource. Those that are none have been told of.
fn amounts(reader: &Reader<'_>, path: &str) -> BTreeMap<String, Quantity> {
    let written = map(reader, path).into_iter();
    written.filter_map(|(resource, text)| Some((resource, Quantity::parse(&text).ok()?))).collect()
}

pub(super) fn reserved(reader: &mut Reader<'_>) -> BTreeMap<String, Quantity> {
    let mut reserved: BTreeMap<String, Quantity> = BTreeMap::new();
    for path in ["systemReserved", "kubeReserved"] {
        let map = reader.get(path).and_then(Value::as_object).cloned().unwrap_or_default();
        for (resource, text) in map {
            match text.as_str().map(Quantity::parse) {
                Some(Ok(amount)) => {
                    let before = reserved.get(&resource).map_or(0, |before| before.milli());
                    reserved.insert(resource, Quantity::from_milli(before.saturating_add(amount.milli())));
                }
                _ => reader.fault(path, format!("{resource}: {text} is not a quantity")),
            }
        }
    }
    if let Some(named) = reserved_cpus(reader) {
        let count = i64::try_from(named.len()).unwrap_or(i64::MAX);
        reserved.insert("cpu".to_owned(), Quantity::from_units(count));
    }
    reserved
}

fn reserved_cpus(reader: &mut Reader<'_>) -> Option<CpuSet> {
    let text = reader.text("reservedSystemCPUs")?;
    text.parse().map_err(|error: cpu::ParseError| reader.fault("reservedSystemCPUs", error)).ok()
}

pub(super) fn policies(reader: &mut Reader<'_>, reserved: &BTreeMap<String, Quantity>) -> Policies {
    let cpu = match reader.text("cpuManagerPolicy").as_deref() {
        None | Some("none") => None,
        Some("static") => {
            let milli = reserved.get("cpu").map_or(0, |amount| amount.milli());
            let count = usize::try_from(milli).unwrap_or(0).div_ceil(1000);
            let named = reader.text("reservedSystemCPUs").and_then(|text| text.parse().ok());
            let reserved = named.map_or(Reserved::Count(count), Reserved::Named);
            Some(cpu::Static { options: cpu_options(reader), reserved })
        }
        Some(other) => {
            reader.fault("cpuManagerPolicy", format!("{other:?} is neither none nor static"));
            None
        }
    };
    Policies { cpu, memory: memory(reader), topology: topology(reader) }
}

/// The policy of memory; what the node keeps of the whole machine is the node's to say.
fn memory(reader: &mut Reader<'_>) -> Option<memory_manager::Static> {
    match reader.text("memoryManagerPolicy").as_deref() {
        None | Some("None") => None,
        Some("Static") => {
            Some(memory_manager::Static { reserved: reserved_memory(reader), ..memory_manager::Static::default() })
        }
        Some(other) => {
            reader.fault("memoryManagerPolicy", format!("{other:?} is neither None nor Static"));
            None
        }
    }
}

fn reserved_memory(reader: &mut Reader<'_>) -> BTreeMap<usize, memory_manager::Bytes> {
    let written = reader.get("reservedMemory").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut reserved: BTreeMap<usize, memory_manager::Bytes> = BTreeMap::new();
    for one in &written {
        let node = one["numaNode"].as_u64().and_then(|node| usize::try_from(node).ok());
        let limits = one["limits"].as_object().cloned().unwrap_or_default();
        for (resource, text) in limits {
            let amount = text.as_str().and_then(|text| Quantity::parse(text).ok());
            let bytes = amount.and_then(|amount| u64::try_from(amount.units()).ok());
            match node.zip(bytes) {
                Some((node, bytes)) => drop(reserved.entry(node).or_default().insert(resource, bytes)),
                None => reader.fault("reservedMemory", format!("{one} is not a numaNode with limits")),
            }
        }
    }
    reserved
}

fn cpu_options(reader: &mut Reader<'_>) -> cpu::Options {
    let written = map(reader, "cpuManagerPolicyOptions");
    cpu::Options::parse(&written).unwrap_or_else(|fault| {
        reader.fault("cpuManagerPolicyOptions", fault);
        cpu::Options::default()
    })
}

fn topology(reader: &mut Reader<'_>) -> Topology {
    let mut wanted = Topology::default();
    let policy = reader.text("topologyManagerPolicy").unwrap_or_default();
    match topology_manager::Policy::parse(&policy) {
        Some(policy) => wanted.policy = policy,
        None => reader.fault(
            "topologyManagerPolicy",
            format!("{policy:?} is none of none, best-effort, restricted, single-numa-node"),
        ),
    }
    match reader.text("topologyManagerScope").as_deref() {
        None | Some("container") => {}
        Some("pod") => wanted.scope = Scope::Pod,
        Some(other) => reader.fault("topologyManagerScope", format!("{other:?} is neither container nor pod")),
    }
    for (name, value) in map(reader, "topologyManagerPolicyOptions") {
        let is_read = match name.as_str() {
            "prefer-closest-numa-nodes" => value.parse().map(|closest| wanted.closest = closest).is_ok(),
            "max-allowable-numa-nodes" => value.parse().map(|most| wanted.nodes_max = most).is_ok(),
            _ => false,
        };
        if !is_read {
            reader.fault("topologyManagerPolicyOptions", format!("{name}: {value:?} is no option with such a value"));
        }
    }
    wanted
}

pub(super) fn cpu_period(reader: &mut Reader<'_>) -> Option<u64> {
    const FIELD: &str = "cpuCFSQuotaPeriod";
    let period = reader.span(FIELD).unwrap_or(Duration::from_millis(100));
    if !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&period) {
        reader.fault(FIELD, format!("{period:?} is not between 1ms and 1s"));
    }
    let period = u64::try_from(period.as_micros()).unwrap_or(u64::MAX);
    reader.flag("cpuCFSQuota", true).then_some(period)
}

/// Texts by name.
fn map(reader: &Reader<'_>, path: &str) -> BTreeMap<String, String> {
    let pairs = reader.get(path).and_then(Value::as_object).into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}
