//! Where a machine's CPUs and memory are, as its kernel tells below `/sys`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::Mask;
use crate::resources::cpu::CpuSet;

/// Where one CPU is. Numbers tell places apart, and mean nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The package.
    pub socket: usize,
    /// The NUMA node.
    pub node: usize,
    /// The core, by the lowest of its CPUs.
    pub core: usize,
    /// The CPUs that share the last cache before memory, by the lowest of them.
    pub cache: usize,
}

/// A NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Bytes of memory, and of huge pages by the name of the resource (`hugepages-2Mi`).
    pub memory: BTreeMap<String, u64>,
    /// Distances to all nodes, in their order.
    pub distances: Vec<u64>,
}

/// CPUs and NUMA nodes of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// CPUs that are online.
    pub cpus: BTreeMap<usize, Place>,
    /// NUMA nodes.
    pub nodes: BTreeMap<usize, Node>,
}

impl Machine {
    /// The machine whose `/sys` is at `sys`. A kernel without NUMA has one node.
    pub fn read(sys: &Path) -> Self {
        let nodes = read_nodes(sys);
        let node_of = |cpu: usize| nodes.iter().find(|(_, (cpus, _))| cpus.contains(cpu)).map_or(0, |(node, _)| *node);
        let online = set(&sys.join("devices/system/cpu/online"));
        let place = |cpu: usize| {
            let dir = sys.join(format!("devices/system/cpu/cpu{cpu}"));
            let socket = number(&dir.join("topology/physical_package_id")).unwrap_or(0);
            let lowest = |cpus: CpuSet| cpus.iter().find(|sibling| online.contains(*sibling)).unwrap_or(cpu);
            let core = lowest(set(&dir.join("topology/thread_siblings_list")));
            (cpu, Place { socket, node: node_of(cpu), core, cache: lowest(last_cache(&dir)) })
        };
        let cpus = online.iter().map(place).collect();
        let nodes = nodes.into_iter().map(|(number, (_, node))| (number, node)).collect();
        Self { cpus, nodes }
    }

    /// All NUMA nodes.
    pub fn mask(&self) -> Mask {
        Mask::of(self.nodes.keys().copied())
    }

    /// All CPUs.
    pub fn all(&self) -> CpuSet {
        self.cpus.keys().copied().collect()
    }

    /// CPUs that are in a certain place.
    pub(crate) fn cpus_where(&self, fits: impl Fn(&Place) -> bool) -> CpuSet {
        self.cpus.iter().filter(|(_, place)| fits(place)).map(|(cpu, _)| *cpu).collect()
    }

    /// How many sockets there are.
    pub(crate) fn socket_count(&self) -> usize {
        self.cpus.values().map(|place| place.socket).collect::<BTreeSet<_>>().len()
    }

    /// How many NUMA nodes have CPUs.
    pub(crate) fn node_count(&self) -> usize {
        self.cpus.values().map(|place| place.node).collect::<BTreeSet<_>>().len()
    }

    /// How many CPUs a core has.
    pub(crate) fn cpus_per_core(&self) -> usize {
        let cores = self.cpus.values().map(|place| place.core).collect::<BTreeSet<_>>().len();
        self.cpus.len().checked_div(cores).unwrap_or(1).max(1)
    }
}

/// Nodes with their CPUs.
fn read_nodes(sys: &Path) -> BTreeMap<usize, (CpuSet, Node)> {
    let dir = sys.join("devices/system/node");
    let online = set(&dir.join("online"));
    let read = |number: usize| {
        let dir = dir.join(format!("node{number}"));
        let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let distances = text("distance").split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let mut memory = BTreeMap::from([("memory".to_owned(), memory_bytes(&text("meminfo")))]);
        memory.extend(huge_pages(&dir.join("hugepages")));
        (number, (set(&dir.join("cpulist")), Node { memory, distances }))
    };
    let nodes: BTreeMap<_, _> = online.iter().map(read).collect();
    if nodes.is_empty() {
        // All of the memory is the one node's, as `/proc` beside `/sys` tells.
        let meminfo = sys.parent().and_then(|root| fs::read_to_string(root.join("proc/meminfo")).ok());
        let mut memory = BTreeMap::from([("memory".to_owned(), memory_bytes(&meminfo.unwrap_or_default()))]);
        memory.extend(huge_pages(&sys.join("kernel/mm/hugepages")));
        return [(0, (CpuSet::default(), Node { memory, distances: vec![10] }))].into();
    }
    nodes
}

/// `Node 0 MemTotal:       16384 kB`, or without the node.
fn memory_bytes(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.split_once("MemTotal:")).map(|(_, rest)| rest);
    total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn huge_pages(dir: &Path) -> Vec<(String, u64)> {
    let read = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let bytes = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()? * 1024;
        let pages = u64::try_from(number(&entry.path().join("nr_hugepages"))?).ok()?;
        Some((format!("hugepages-{}", crate::node::machine::binary(bytes)), pages * bytes))
    };
    fs::read_dir(dir).into_iter().flatten().flatten().filter_map(read).collect()
}

/// The CPUs with which one shares its cache of the third level, which is the last before memory on machines that have it.
fn last_cache(cpu: &Path) -> CpuSet {
    let caches = fs::read_dir(cpu.join("cache")).into_iter().flatten().flatten();
    let third = caches.map(|cache| cache.path()).find(|cache| number(&cache.join("level")) == Some(3));
    third.map(|cache| set(&cache.join("shared_cpu_list"))).unwrap_or_default()
}

fn number(path: &Path) -> Option<usize> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn set(path: &Path) -> CpuSet {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

/// Machines to test with.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    /// `sockets` × `nodes` in each × `cores` in each × `threads`, numbered as Linux does: all first threads come first. Each
    /// node has a cache and `memory` bytes.
    pub(crate) fn machine(sockets: usize, nodes: usize, cores: usize, threads: usize, memory: u64) -> Machine {
        let all = sockets * nodes * cores;
        let place = |cpu: usize| {
            let core = cpu % all;
            let node = core / cores;
            (cpu, Place { socket: node / nodes, node, core, cache: node * cores })
        };
        let node = |number: usize| {
            let near = |other: usize| {
                if other == number {
                    10
                } else if other / nodes == number / nodes {
                    12
                } else {
                    32
                }
            };
            let distances = (0..sockets * nodes).map(near).collect();
            (number, Node { memory: [("memory".to_owned(), memory)].into(), distances })
        };
        Machine { cpus: (0..all * threads).map(place).collect(), nodes: (0..sockets * nodes).map(node).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, content) in files {
            let path = root.join("devices/system").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{content}\n")).unwrap();
        }
    }

    #[test]
    fn a_machine_with_two_sockets_and_a_cpu_that_is_off() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &[("cpu/online", "0-2"), ("node/online", "0-1")]);
        for (cpu, socket, siblings, cache) in [(0, "0", "0,2", "0,2"), (1, "1", "1,3", "1,3"), (2, "0", "0,2", "0,2")] {
            let file = |name: &str| format!("cpu/cpu{cpu}/{name}");
            write(
                dir.path(),
                &[
                    (&file("topology/physical_package_id"), socket),
                    (&file("topology/thread_siblings_list"), siblings),
                    (&file("cache/index0/level"), "1"),
                    (&file("cache/index3/level"), "3"),
                    (&file("cache/index3/shared_cpu_list"), cache),
                ],
            );
        }
        for (node, cpus) in [(0, "0,2"), (1, "1,3")] {
            let file = |name: &str| format!("node/node{node}/{name}");
            write(
                dir.path(),
                &[
                    (&file("cpulist"), cpus),
                    (&file("distance"), "10 21"),
                    (&file("meminfo"), "Node 0 MemTotal:       2048 kB"),
                    (&file("hugepages/hugepages-2048kB/nr_hugepages"), "4"),
                ],
            );
        }
        let machine = Machine::read(dir.path());
        let place = |socket, node, core| Place { socket, node, core, cache: core };
        assert_eq!(machine.cpus, [(0, place(0, 0, 0)), (1, place(1, 1, 1)), (2, place(0, 0, 0))].into());
        assert_eq!(machine.nodes[&1].distances, [10, 21]);
        let memory = [("hugepages-2Mi".to_owned(), 8 << 20), ("memory".to_owned(), 2 << 20)].into();
        assert_eq!(machine.nodes[&0].memory, memory);
    }

    #[test]
    fn a_kernel_without_numa_has_one_node() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path().join("sys");
        write(&sys, &[("cpu/online", "0-1")]);
        fs::create_dir(dir.path().join("proc")).unwrap();
        fs::write(dir.path().join("proc/meminfo"), "MemTotal:  7 kB\n").unwrap();
        let machine = Machine::read(&sys);
        assert_eq!(machine.nodes[&0].memory["memory"], 7 * 1024);
        let place = |cpu| Place { socket: 0, node: 0, core: cpu, cache: cpu };
        assert_eq!(machine.cpus, [(0, place(0)), (1, place(1))].into());
        assert_eq!((machine.mask(), machine.cpus_per_core()), (Mask::of([0]), 1));
    }

    #[test]
    fn this_machine() {
        let machine = Machine::read(Path::new("/sys"));
        assert!(!machine.cpus.is_empty() && !machine.nodes.is_empty());
    }
}
