//! The memory manager's static policy: containers of Guaranteed pods get their memory and huge pages from certain NUMA nodes.
//! Pure, but for the file.
//!
//! Nodes are used alone or in groups: one that serves containers of a group serves no container alone, so that what is counted
//! as free on it is.

mod saved;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use pod::{QosClass, spec};

use super::checkpoint;
use super::topology::{Hint, Hints, Machine, Mask};
use crate::qos::{self, List};
pub(super) use saved::NAME;

const MEMORY: &str = "memory";

/// Bytes by resource: `memory`, `hugepages-<size>`.
pub type Bytes = BTreeMap<String, u64>;

/// Configuration of the static policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Static {
    /// What is kept for the system, by NUMA node (`reservedMemory`).
    pub reserved: BTreeMap<usize, Bytes>,
    /// What pods may not use of the whole machine: together the same.
    pub kept: Bytes,
}

/// Why a container gets no memory, in upstream's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("[memorymanager] failed to get the default NUMA affinity, no NUMA nodes with enough memory is available")]
    Nowhere,
    #[error("[memorymanager] failed to find NUMA nodes to extend the current topology hint")]
    NotThere,
    #[error("[memorymanager] failed to find the extended preferred hint")]
    NotPreferred,
    #[error("[memorymanager] preferred hint violates NUMA node allocation")]
    Mixed,
}

/// Memory that a container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) nodes: Mask,
    /// `memory`, or `hugepages-<size>`.
    pub(crate) resource: String,
    pub(crate) bytes: u64,
}

/// Blocks by pod's uid and container.
pub(crate) type Given = BTreeMap<String, BTreeMap<String, Vec<Block>>>;

/// One resource of one node, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    pub(crate) total: u64,
    pub(crate) system: u64,
    /// What can be given out, if nobody had anything.
    pub(crate) allocatable: u64,
    /// What is given out.
    pub(crate) given: u64,
}

impl Amounts {
    fn free(&self) -> u64 {
        self.allocatable.saturating_sub(self.given)
    }
}

/// A NUMA node with what is given out of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NodeState {
    /// How many blocks are on it.
    pub(crate) blocks: usize,
    /// The nodes that it serves together with; itself at least.
    pub(crate) group: Mask,
    pub(crate) amounts: BTreeMap<String, Amounts>,
}

/// Who has which memory.
#[derive(Debug)]
pub(crate) struct Memory {
    empty: BTreeMap<usize, NodeState>,
    given: Given,
}

impl Memory {
    /// Nobody has anything yet.
    ///
    /// # Errors
    /// What is reserved cannot be, or is not what the node keeps from pods.
    pub(crate) fn new(machine: &Arc<Machine>, config: &Static) -> Result<Self, String> {
        if let Some(node) = config.reserved.keys().find(|node| !machine.nodes.contains_key(*node)) {
            return Err(format!("reservedMemory: there is no NUMA node {node} on this machine"));
        }
        let mut sums = Bytes::new();
        for (resource, bytes) in config.reserved.values().flatten() {
            *sums.entry(resource.clone()).or_default() += bytes;
        }
        for resource in config.kept.keys().chain(sums.keys()).collect::<BTreeSet<_>>() {
            let of = |bytes: &Bytes| bytes.get(resource).copied().unwrap_or(0);
            if of(&sums) != of(&config.kept) {
                return Err(format!(
                    "reservedMemory: {} bytes of {resource} are reserved on all NUMA nodes together, and the node keeps {} from \
                     pods (kubeReserved, systemReserved and evictionHard); make them equal",
                    of(&sums),
                    of(&config.kept),
                ));
            }
        }
        if sums.get(MEMORY).copied().unwrap_or(0) == 0 {
            return Err("the Static policy needs some memory for the system: set reservedMemory".to_owned());
        }
        let node = |(number, node): (&usize, &super::topology::Node)| {
            let kept = config.reserved.get(number).cloned().unwrap_or_default();
            (*number, NodeState { blocks: 0, group: Mask::of([*number]), amounts: amounts(&node.memory, &kept) })
        };
        Ok(Self { empty: machine.nodes.iter().map(node).collect(), given: Given::new() })
    }

    /// Takes over what was given before, but from nodes that are not there any more.
    pub(crate) fn recall(&mut self, given: Given) {
        let all = self.all();
        for (uid, mut containers) in given {
            containers.retain(|container, blocks| {
                let fits = blocks.iter().all(|block| block.nodes.count() > 0 && block.nodes.and(all) == block.nodes);
                if !fits {
                    tracing::warn!(uid, container, "the NUMA nodes that a container had are not there any more");
                }
                fits
            });
            if !containers.is_empty() {
                self.given.insert(uid, containers);
            }
        }
    }

    fn all(&self) -> Mask {
        Mask::of(self.empty.keys().copied())
    }

    /// The nodes with all that is given out of them.
    pub(crate) fn nodes(&self) -> BTreeMap<usize, NodeState> {
        let mut nodes = self.empty.clone();
        for block in self.given.values().flat_map(BTreeMap::values).flatten() {
            let mut left = block.bytes;
            for number in block.nodes.nodes() {
                let Some(node) = nodes.get_mut(&number) else { continue };
                node.blocks += 1;
                node.group = block.nodes;
                if let Some(amounts) = node.amounts.get_mut(&block.resource) {
                    let here = left.min(amounts.free());
                    amounts.given += here;
                    left -= here;
                }
            }
        }
        nodes
    }

    /// Gives a container what it asks for, from `affinity` if that is named. It may have what init containers of its pod, named
    /// in `before`, had on the same nodes.
    pub(crate) fn give(
        &mut self,
        (uid, container): (&str, &str),
        wanted: &Bytes,
        hint: Option<Hint>,
        before: &[String],
    ) -> Result<(), MemoryError> {
        if wanted.is_empty() || self.of(uid, container).is_some() {
            return Ok(());
        }
        let nodes = self.nodes();
        let reusable = |mask: Mask, resource: &str| self.reusable(uid, before, mask, resource);
        let options = options(&nodes, wanted, reusable);
        let named = hint.and_then(|hint| hint.affinity);
        let chosen = match named {
            None => best(&options, |_| true).ok_or(MemoryError::Nowhere)?,
            Some(mask) if has_room(&nodes, mask, wanted) => Hint { affinity: Some(mask), preferred: true },
            Some(mask) => best(&options, |other| other.and(mask) == mask).ok_or(MemoryError::NotThere)?,
        };
        if !chosen.preferred && named.is_some() && hint.is_some_and(|hint| hint.preferred) {
            return Err(MemoryError::NotPreferred);
        }
        let mask = chosen.affinity.unwrap_or_default();
        if is_mixed(&nodes, mask) {
            return Err(MemoryError::Mixed);
        }
        self.take_over(uid, before, mask, wanted);
        let block =
            |(resource, bytes): (&String, &u64)| Block { nodes: mask, resource: resource.clone(), bytes: *bytes };
        let blocks = wanted.iter().map(block).collect();
        self.given.entry(uid.to_owned()).or_default().insert(container.to_owned(), blocks);
        Ok(())
    }

    /// What init containers of a pod had on these nodes, which have ended.
    fn reusable(&self, uid: &str, before: &[String], mask: Mask, resource: &str) -> u64 {
        let blocks = before.iter().filter_map(|name| self.of(uid, name)).flatten();
        blocks.filter(|block| block.nodes == mask && block.resource == resource).map(|block| block.bytes).sum()
    }

    /// What a container takes over from init containers is not theirs any more.
    fn take_over(&mut self, uid: &str, before: &[String], mask: Mask, wanted: &Bytes) {
        let Some(pod) = self.given.get_mut(uid) else { return };
        let mut left = wanted.clone();
        let blocks = pod.iter_mut().filter(|(name, _)| before.contains(name)).flat_map(|(_, blocks)| blocks.iter_mut());
        for block in blocks.filter(|block| block.nodes == mask) {
            if let Some(left) = left.get_mut(&block.resource) {
                let taken = block.bytes.min(*left);
                block.bytes -= taken;
                *left -= taken;
            }
        }
    }

    /// From which NUMA nodes a request can be met, for each of its resources.
    pub(crate) fn hints(&self, uid: &str, wanted: &Bytes, before: &[String]) -> Vec<Hints> {
        let reusable = |mask: Mask, resource: &str| self.reusable(uid, before, mask, resource);
        let options = options(&self.nodes(), wanted, reusable);
        // As upstream: where there is no room at all, the allocation says so.
        if options.is_empty() {
            return Vec::new();
        }
        wanted.keys().map(|_| Hints::From(options.clone())).collect()
    }

    /// What a container has.
    pub(crate) fn of(&self, uid: &str, container: &str) -> Option<&Vec<Block>> {
        self.given.get(uid)?.get(container)
    }

    /// The nodes from which a container takes its memory.
    pub(crate) fn nodes_of(&self, uid: &str, container: &str) -> Mask {
        self.of(uid, container).into_iter().flatten().fold(Mask::default(), |nodes, block| nodes.or(block.nodes))
    }

    /// What could be given out of each node, if nobody had anything.
    pub(crate) fn allocatable(&self) -> Vec<Block> {
        let of = |(number, node): (&usize, &NodeState)| {
            let nodes = Mask::of([*number]);
            let some = node.amounts.iter().filter(|(_, amounts)| amounts.allocatable > 0);
            let block = move |(resource, amounts): (&String, &Amounts)| Block {
                nodes,
                resource: resource.clone(),
                bytes: amounts.allocatable,
            };
            some.map(block).collect::<Vec<_>>()
        };
        self.empty.iter().flat_map(of).collect()
    }

    /// Takes back what a pod has; whether that was anything.
    pub(crate) fn release(&mut self, uid: &str) -> bool {
        self.given.remove(uid).is_some()
    }

    /// The pods that have something.
    pub(crate) fn holders(&self) -> impl Iterator<Item = &String> {
        self.given.keys()
    }

    /// Keeps in `dir` what is given.
    pub(crate) fn save(&self, dir: &Path) {
        let path = dir.join(NAME);
        if let Err(error) = checkpoint::save(&path, &saved::write(&self.nodes(), &self.given)) {
            tracing::error!(path = %path.display(), %error, "which containers have which memory cannot be kept");
        }
    }

    /// What was kept in `dir`.
    pub(crate) fn load(dir: &Path) -> Given {
        checkpoint::load(&dir.join(NAME), saved::read).unwrap_or_default()
    }
}

/// Huge pages are part of a node's memory, which nobody else can use.
fn amounts(memory: &Bytes, kept: &Bytes) -> BTreeMap<String, Amounts> {
    let huge: u64 = memory.iter().filter(|(resource, _)| *resource != MEMORY).map(|(_, bytes)| bytes).sum();
    let amounts = |(resource, total): (&String, &u64)| {
        let (total, system) = (*total, kept.get(resource).copied().unwrap_or(0));
        let unusable = if resource == MEMORY { system.saturating_add(huge) } else { system };
        (resource.clone(), Amounts { total, system, allocatable: total.saturating_sub(unusable), given: 0 })
    };
    memory.iter().map(amounts).collect()
}

fn sum(nodes: &BTreeMap<usize, NodeState>, mask: Mask, resource: &str, of: impl Fn(&Amounts) -> u64) -> u64 {
    let amounts = mask.nodes().filter_map(|number| nodes.get(&number)?.amounts.get(resource));
    amounts.map(of).fold(0, u64::saturating_add)
}

fn has_room(nodes: &BTreeMap<usize, NodeState>, mask: Mask, wanted: &Bytes) -> bool {
    wanted.iter().all(|(resource, bytes)| sum(nodes, mask, resource, Amounts::free) >= *bytes)
}

/// Whether nodes would be used together of which one serves alone, or with others.
fn is_mixed(nodes: &BTreeMap<usize, NodeState>, mask: Mask) -> bool {
    let in_use = mask.nodes().filter_map(|number| nodes.get(&number)).filter(|node| node.blocks > 0);
    mask.count() > 1 && in_use.into_iter().any(|node| node.group != mask)
}

/// All sets of nodes that can meet a request. Preferred are those of as few nodes as an empty machine would need.
fn options(nodes: &BTreeMap<usize, NodeState>, wanted: &Bytes, reusable: impl Fn(Mask, &str) -> u64) -> Vec<Hint> {
    let sets = Mask::of(nodes.keys().copied()).subsets();
    let could = |mask: &&Mask| {
        wanted.iter().all(|(resource, bytes)| sum(nodes, **mask, resource, |amounts| amounts.allocatable) >= *bytes)
    };
    let fewest = sets.iter().filter(could).map(|mask| mask.count()).min();
    let can = |mask: &&Mask| {
        let mut alone = mask.nodes().filter_map(|number| nodes.get(&number));
        let in_group = mask.count() == 1 && alone.any(|node| node.group.count() > 1);
        let has_room = wanted.iter().all(|(resource, bytes)| {
            sum(nodes, **mask, resource, Amounts::free).saturating_add(reusable(**mask, resource)) >= *bytes
        });
        could(mask) && !in_group && !is_mixed(nodes, **mask) && has_room
    };
    let hint = |mask: &Mask| Hint { affinity: Some(*mask), preferred: Some(mask.count()) == fewest };
    sets.iter().filter(can).map(hint).collect()
}

/// The preferred and narrowest of those that fit.
fn best(options: &[Hint], fits: impl Fn(Mask) -> bool) -> Option<Hint> {
    let fitting = options.iter().filter(|hint| hint.affinity.is_some_and(&fits)).copied();
    fitting.min_by_key(|hint| (!hint.preferred, hint.affinity.map(|mask| (mask.count(), mask))))
}

/// What a container is to have from certain nodes.
pub(crate) fn wanted(pod: &Pod, container: &Container) -> Bytes {
    // Resources of a pod as a whole are shared by its containers.
    if spec::of(pod).resources.is_some() || QosClass::of(pod) != QosClass::Guaranteed {
        return Bytes::new();
    }
    let lists = container.resources.iter().flat_map(|resources| [&resources.requests, &resources.limits]);
    let names: BTreeSet<&String> = lists.flatten().flat_map(BTreeMap::keys).collect();
    let counted = names.into_iter().filter(|name| *name == MEMORY || name.starts_with("hugepages-"));
    let bytes = counted.filter_map(|name| {
        let units = qos::of_container(container, name, List::Requests)?.units();
        Some((name.clone(), u64::try_from(units).ok().filter(|bytes| *bytes > 0)?))
    });
    bytes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::topology::samples::machine;

    /// Nodes of 10 bytes, of which the first keeps 2.
    fn memory(nodes: usize) -> Memory {
        let reserved = [(0, Bytes::from([(MEMORY.to_owned(), 2)]))].into();
        let config = Static { reserved, kept: [(MEMORY.to_owned(), 2)].into() };
        Memory::new(&Arc::new(machine(1, nodes, 1, 1, 10)), &config).unwrap()
    }

    fn bytes(bytes: u64) -> Bytes {
        [(MEMORY.to_owned(), bytes)].into()
    }

    fn on(nodes: &[usize]) -> Option<Hint> {
        Some(Hint { affinity: Some(Mask::of(nodes.iter().copied())), preferred: true })
    }

    fn give(memory: &mut Memory, uid: &str, size: u64, hint: Option<Hint>) -> Result<Vec<usize>, MemoryError> {
        memory.give((uid, "c"), &bytes(size), hint, &[])?;
        Ok(memory.nodes_of(uid, "c").nodes().collect())
    }

    fn hints(memory: &Memory, size: u64) -> Vec<(Vec<usize>, bool)> {
        let all = memory.hints("new", &bytes(size), &[]);
        let Some(Hints::From(hints)) = all.first() else { return Vec::new() };
        hints.iter().map(|hint| (hint.affinity.unwrap().nodes().collect(), hint.preferred)).collect()
    }

    #[test]
    fn one_node_if_that_has_room() {
        let mut memory = memory(2);
        assert_eq!(hints(&memory, 8), [(vec![0], true), (vec![1], true), (vec![0, 1], false)]);
        assert_eq!(hints(&memory, 9), [(vec![1], true), (vec![0, 1], false)]);
        assert_eq!(give(&mut memory, "a", 8, None).unwrap(), [0]);
        assert_eq!(give(&mut memory, "b", 1, None).unwrap(), [1]);
        assert_eq!(give(&mut memory, "c", 1, on(&[0])), Err(MemoryError::NotThere));
        assert_eq!(give(&mut memory, "c", 10, None), Err(MemoryError::Nowhere));
        // Both nodes serve alone already.
        assert_eq!(hints(&memory, 9), [(vec![1], true)]);
        assert!(memory.release("a") && !memory.release("a"));
        assert_eq!(give(&mut memory, "c", 8, on(&[0])).unwrap(), [0]);
    }

    #[test]
    fn a_group_of_nodes_serves_only_as_such() {
        let mut memory = memory(3);
        assert_eq!(give(&mut memory, "a", 15, None).unwrap(), [0, 1]);
        assert_eq!(hints(&memory, 2), [(vec![2], true), (vec![0, 1], false)]);
        assert_eq!(give(&mut memory, "b", 2, on(&[0])).unwrap_err(), MemoryError::NotPreferred);
        assert_eq!(give(&mut memory, "b", 12, on(&[1, 2])).unwrap_err(), MemoryError::Mixed);
        let nodes = memory.nodes();
        let given = |node: usize| nodes[&node].amounts[MEMORY].given;
        assert_eq!([given(0), given(1), given(2)], [8, 7, 0]);
    }

    #[test]
    fn what_an_init_container_had_is_used_again() {
        let mut memory = memory(1);
        let before = ["init".to_owned()];
        memory.give(("u", "init"), &bytes(8), None, &[]).unwrap();
        memory.give(("u", "c"), &bytes(5), None, &before).unwrap();
        assert_eq!(memory.of("u", "init").unwrap()[0].bytes, 3);
        memory.give(("u", "d"), &bytes(3), None, &before).unwrap();
        assert_eq!(memory.give(("u", "e"), &bytes(1), None, &before), Err(MemoryError::Nowhere));
        assert_eq!(memory.nodes()[&0].amounts[MEMORY].given, 8);
    }

    #[test]
    fn huge_pages_are_no_other_memory() {
        let table = amounts(&[(MEMORY.to_owned(), 100), ("hugepages-2Mi".to_owned(), 20)].into(), &bytes(10));
        assert_eq!((table[MEMORY].allocatable, table["hugepages-2Mi"].allocatable), (70, 20));
    }

    #[test]
    fn what_is_reserved_has_to_fit() {
        let machine = Arc::new(machine(1, 2, 1, 1, 10));
        let config =
            |node: usize, size: u64, kept: u64| Static { reserved: [(node, bytes(size))].into(), kept: bytes(kept) };
        assert!(Memory::new(&machine, &config(1, 2, 2)).is_ok());
        for config in [config(5, 2, 2), config(0, 2, 3), config(0, 0, 0)] {
            assert!(Memory::new(&machine, &config).is_err(), "{config:?}");
        }
    }
}
