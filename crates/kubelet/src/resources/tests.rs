//! CPUs, memory and devices of a machine with two NUMA nodes, together.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::cpu::{Cpus, Options, Reserved, Static};
use super::*;
use crate::resources::topology::samples::machine;

/// Four CPUs and 1000 bytes in each node, of which the first keeps a CPU and 100 bytes; one device in the first, two in the
/// second.
struct Two {
    nodes: Nodes,
    cpus: Cpus,
    memory: Memory,
    devices: devices::Table,
}

const GADGET: &str = "example.com/gadget";

fn bytes(bytes: u64) -> memory::Bytes {
    [("memory".to_owned(), bytes)].into()
}

impl Two {
    fn new() -> Self {
        let machine = Arc::new(machine(2, 1, 4, 1, 1000));
        let cpu = Static { options: Options::default(), reserved: Reserved::Named("0".parse().unwrap()) };
        let kept = memory::Static { reserved: [(0, bytes(100))].into(), kept: bytes(100) };
        let mut devices = devices::Table::default();
        let on = |(id, node): (&str, i64)| (id.to_owned(), devices::Device { is_healthy: true, nodes: vec![node] });
        devices.listed(GADGET, [("a", 0), ("b", 1), ("c", 1)].map(on).into());
        Self {
            nodes: Nodes { all: machine.mask(), distances: None },
            cpus: Cpus::new(machine.clone(), &cpu).unwrap(),
            memory: Memory::new(&machine, &kept).unwrap(),
            devices,
        }
    }

    /// Where so many CPUs, bytes and devices come from; none of what is 0 is asked for.
    fn aligned(&self, policy: Policy, cpus: usize, memory: u64, count: usize) -> Option<(Vec<usize>, bool)> {
        let need = Need { uid: "u", container: "c", resource: GADGET, count, ..Need::default() };
        let devices = (count > 0).then(|| self.devices.hints(&need, self.nodes.all));
        let cpus = (cpus > 0).then(|| self.cpus.hints(cpus, &CpuSet::default()));
        let memory = if memory > 0 { self.memory.hints("u", &bytes(memory), &[]) } else { Vec::new() };
        let hints: Vec<Hints> = devices.into_iter().chain(cpus).chain(memory).collect();
        let best = topology::merge(policy, &self.nodes, &hints)?;
        Some((best.affinity.map(|mask| mask.nodes().collect()).unwrap_or_default(), best.preferred))
    }
}

#[test]
fn what_belongs_together_comes_from_one_node_if_it_can() {
    let two = Two::new();
    let (first, second) = (Some((vec![0], true)), Some((vec![1], true)));
    let (both, torn) = (Some((vec![0, 1], true)), Some((vec![0, 1], false)));
    // As best-effort, restricted and single-numa-node have it.
    for (cpus, memory, devices, expect) in [
        (2, 500, 1, [first.clone(), first.clone(), first.clone()]),
        (2, 500, 2, [second.clone(), second.clone(), second.clone()]),
        (4, 500, 1, [second.clone(), second.clone(), second.clone()]),
        (2, 950, 1, [second.clone(), second.clone(), second.clone()]),
        (0, 500, 2, [second.clone(), second.clone(), second.clone()]),
        // No node has five CPUs, and one device is enough of a node.
        (5, 500, 1, [torn.clone(), None, None]),
        (2, 1500, 1, [torn.clone(), None, None]),
        // Whatever is asked for needs both.
        (5, 1500, 3, [both.clone(), both.clone(), None]),
        // More than there is.
        (2, 500, 4, [Some((vec![0], false)), None, None]),
    ] {
        let policies = [Policy::BestEffort, Policy::Restricted, Policy::SingleNumaNode];
        let found = policies.map(|policy| two.aligned(policy, cpus, memory, devices));
        assert_eq!(found, expect, "{cpus} CPUs, {memory} bytes, {devices} devices");
    }
}

#[test]
fn who_comes_later_goes_where_all_is_left() {
    let mut two = Two::new();
    let of = |uid| Need { uid, container: "c", resource: GADGET, count: 1, ..Need::default() };
    two.devices.reserve(&of("early"), &["a".to_owned()].into());
    // CPUs and memory would be on the first node, too.
    assert_eq!(two.aligned(Policy::SingleNumaNode, 2, 500, 1), Some((vec![1], true)));
    two.cpus.give(("early", "c"), 3, Some(Mask::of([1])), &CpuSet::default()).unwrap();
    assert_eq!(two.aligned(Policy::SingleNumaNode, 2, 500, 1), None);
    assert_eq!(two.aligned(Policy::SingleNumaNode, 1, 500, 1), Some((vec![1], true)));
}

/// `topologyManagerScope: pod`: what is asked for at one time.
#[test]
fn a_pod_as_a_whole_needs_what_runs_at_one_time() {
    let cpus = |count: u32| json!({ "limits": { "cpu": count.to_string(), "memory": "1Mi" } });
    let container = |name: &str, count: u32| json!({ "name": name, "resources": cpus(count) });
    let mut sidecar = container("s", 1);
    sidecar["restartPolicy"] = json!("Always");
    let spec = json!({ "initContainers": [container("i", 3), sidecar, container("j", 4)],
        "containers": [container("c", 2), container("d", 1)] });
    let pod: Pod = serde_json::from_value(json!({ "metadata": {}, "spec": spec })).unwrap();
    assert_eq!(peak(&pod, |container| cpu::whole_cpus(&pod, container)), 5);
}
