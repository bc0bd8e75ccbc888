//! Which CPUs to take, so that those of a container are near to each other and few places are broken up. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::{CpuError, CpuSet, Options};
use crate::resources::topology::{Machine, Place};

/// `count` of the `free` CPUs.
pub(super) fn take(machine: &Machine, options: &Options, free: &CpuSet, count: usize) -> Result<CpuSet, CpuError> {
    if count == 0 {
        return Ok(CpuSet::default());
    }
    if count > free.len() {
        return Err(CpuError::TooFew { requested: count, available: free.len() });
    }
    let group = if options.full_pcpus_only { machine.cpus_per_core() } else { 1 };
    let spread = options.distribute_across_numa && count.is_multiple_of(group);
    let spread = if spread { distributed(machine, options, free, count, group) } else { None };
    Ok(spread.unwrap_or_else(|| packed(machine, options, free, count)))
}

/// As few places as possible, the fullest first: whole sockets and nodes, caches, cores, then single CPUs.
fn packed(machine: &Machine, options: &Options, free: &CpuSet, count: usize) -> CpuSet {
    let mut pile = Pile::new(machine, free.clone(), count);
    pile.take_whole(Pile::upper);
    pile.take_whole(Pile::lower);
    if options.prefer_align_by_cache && !options.distribute_across_numa {
        pile.take_caches();
    }
    if !options.distribute_across_cores {
        pile.take_whole(Pile::cores);
    }
    let singles = if options.distribute_across_cores { pile.spread_singles() } else { pile.singles() };
    let rest: CpuSet = singles.into_iter().take(pile.missing).collect();
    pile.take(&rest);
    pile.taken
}

/// A kind of place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Socket,
    Node,
    Core,
    Cache,
}

impl Level {
    fn of(self, place: &Place) -> usize {
        match self {
            Self::Socket => place.socket,
            Self::Node => place.node,
            Self::Core => place.core,
            Self::Cache => place.cache,
        }
    }
}

/// CPUs that are being taken.
struct Pile<'a> {
    machine: &'a Machine,
    free: CpuSet,
    taken: CpuSet,
    missing: usize,
    /// The larger of sockets and nodes, and the smaller.
    levels: (Level, Level),
}

/// Places of one level, in the order in which they are broken up.
type Places = (Level, Vec<usize>);

impl<'a> Pile<'a> {
    fn new(machine: &'a Machine, free: CpuSet, missing: usize) -> Self {
        let nodes_first = machine.socket_count() >= machine.node_count();
        let levels = if nodes_first { (Level::Node, Level::Socket) } else { (Level::Socket, Level::Node) };
        Self { machine, free, taken: CpuSet::default(), missing, levels }
    }

    fn take(&mut self, cpus: &CpuSet) {
        self.free = self.free.without(cpus);
        self.taken = self.taken.or(cpus);
        self.missing = self.missing.saturating_sub(cpus.len());
    }

    /// Free CPUs of a place.
    fn free_in(&self, level: Level, id: usize) -> CpuSet {
        self.machine.cpus_where(|place| level.of(place) == id).and(&self.free)
    }

    /// Places of `level` among `cpus`, those with the fewest free CPUs first.
    fn sorted(&self, level: Level, cpus: &CpuSet) -> Vec<usize> {
        let ids: BTreeSet<usize> =
            cpus.iter().filter_map(|cpu| self.machine.cpus.get(&cpu)).map(|place| level.of(place)).collect();
        let mut ids: Vec<usize> = ids.into_iter().collect();
        ids.sort_by_key(|id| (self.free_in(level, *id).len(), *id));
        ids
    }

    /// Places of `inner` in the order of the `outer` ones that they are in.
    fn nested(&self, (outer, ids): Places, inner: Level) -> Places {
        let mut all: Vec<usize> = Vec::new();
        for id in ids {
            let within = self.sorted(inner, &self.free_in(outer, id));
            let new: Vec<usize> = within.into_iter().filter(|id| !all.contains(id)).collect();
            all.extend(new);
        }
        (inner, all)
    }

    fn upper(&self) -> Places {
        (self.levels.0, self.sorted(self.levels.0, &self.free))
    }

    fn lower(&self) -> Places {
        self.nested(self.upper(), self.levels.1)
    }

    fn cores(&self) -> Places {
        self.nested(self.lower(), Level::Core)
    }

    fn caches(&self) -> Places {
        let nodes = if self.levels.0 == Level::Node { self.upper() } else { self.lower() };
        self.nested(nodes, Level::Cache)
    }

    /// Takes places of which nothing is taken yet, as long as all of one is needed.
    fn take_whole(&mut self, places: fn(&Self) -> Places) {
        let (level, ids) = places(self);
        for id in ids {
            let all = self.machine.cpus_where(|place| level.of(place) == id);
            if all.is_subset(&self.free) && all.len() <= self.missing {
                self.take(&all);
            }
        }
    }

    /// Takes whole caches, and the rest from one that has room for all of it.
    fn take_caches(&mut self) {
        self.take_whole(Self::caches);
        let (_, ids) = self.caches();
        let per_core = self.machine.cpus_per_core();
        for id in ids {
            let within = self.free_in(Level::Cache, id);
            let cores: BTreeSet<usize> =
                within.iter().filter_map(|cpu| self.machine.cpus.get(&cpu)).map(|place| place.core).collect();
            let cores: Vec<usize> = cores.into_iter().take(self.missing.div_ceil(per_core)).collect();
            let of_cores = cores.iter().flat_map(|core| self.free_in(Level::Core, *core).iter().collect::<Vec<_>>());
            let cpus: CpuSet = of_cores.take(self.missing).collect();
            if self.missing > 0 && cpus.len() == self.missing {
                self.take(&cpus);
            }
        }
    }

    fn singles(&self) -> Vec<usize> {
        let (level, cores) = self.cores();
        cores.into_iter().flat_map(|core| self.free_in(level, core).iter().collect::<Vec<_>>()).collect()
    }

    /// Single CPUs by socket and number, which are first threads before second ones.
    fn spread_singles(&self) -> Vec<usize> {
        let (level, sockets) =
            if self.levels.0 == Level::Socket { self.upper() } else { self.nested(self.upper(), Level::Socket) };
        sockets.into_iter().flat_map(|socket| self.free_in(level, socket).iter().collect::<Vec<_>>()).collect()
    }
}

/// Evenly from as few nodes as possible; `None` if no nodes can give that (KEP-2902).
fn distributed(machine: &Machine, options: &Options, free: &CpuSet, count: usize, group: usize) -> Option<CpuSet> {
    let pile = Pile::new(machine, free.clone(), count);
    let (_, nodes) = if pile.levels.0 == Level::Node { pile.upper() } else { pile.lower() };
    let available: BTreeMap<usize, usize> =
        nodes.iter().map(|node| (*node, pile.free_in(Level::Node, *node).len())).collect();
    let groups_per_node = machine.cpus.len().div_ceil(group).div_ceil(machine.node_count().max(1)).max(1);
    let (least, most) = (count.div_ceil(group).div_ceil(groups_per_node), count.div_ceil(group).min(nodes.len()));
    for size in least..=most {
        let mut best: Option<Split> = None;
        for combination in combinations(&nodes, size) {
            let Some(split) = Split::of(machine, options, &available, &combination, count, group) else { continue };
            if best.as_ref().is_none_or(|best| split.is_better_than(best)) {
                best = Some(split);
            }
        }
        if let Some(best) = best {
            return best.take(machine, options, free);
        }
    }
    None
}

/// How many CPUs come from each node.
struct Split {
    amounts: BTreeMap<usize, usize>,
    /// How unevenly free CPUs are left: the variance of their numbers, times the square of the number of nodes.
    unevenness: u128,
    /// All nodes are in one socket; only where that is wanted.
    in_one_socket: bool,
}

impl Split {
    fn of(
        machine: &Machine,
        options: &Options,
        available: &BTreeMap<usize, usize>,
        nodes: &[usize],
        count: usize,
        group: usize,
    ) -> Option<Self> {
        let groups: usize = nodes.iter().map(|node| available[node] / group).sum();
        if groups * group < count {
            return None;
        }
        let mut each = count / nodes.len() / group * group;
        if options.align_by_socket {
            each = nodes.iter().map(|node| available[node] / group * group).fold(each, usize::min);
        }
        if nodes.iter().any(|node| available[node] < each) {
            return None;
        }
        let amounts: BTreeMap<usize, usize> = nodes.iter().map(|node| (*node, each)).collect();
        let rest = count - each * nodes.len();
        let has_more = |node: &&usize| available[*node] - each >= group;
        let willing: Vec<usize> = nodes.iter().filter(has_more).copied().collect();
        let sockets = machine.cpus.values().filter(|place| nodes.contains(&place.node)).map(|place| place.socket);
        let in_one_socket = options.align_by_socket && sockets.collect::<BTreeSet<_>>().len() == 1;
        let score = |amounts: BTreeMap<usize, usize>| {
            let left = available.iter().map(|(node, free)| free - amounts.get(node).copied().unwrap_or(0));
            Self { unevenness: unevenness(&left.collect::<Vec<_>>()), amounts, in_one_socket }
        };
        if rest == 0 {
            return Some(score(amounts));
        }
        // The rest goes to as many nodes as possible, and of those to which leave the most even machine.
        let subsets = (1..=willing.len()).rev().flat_map(|size| combinations(&willing, size));
        let splits = subsets.filter_map(|subset| with_rest(&amounts, available, &subset, rest, group)).map(score);
        splits.reduce(|best, other| if other.unevenness < best.unevenness { other } else { best })
    }

    fn is_better_than(&self, other: &Self) -> bool {
        if self.in_one_socket != other.in_one_socket {
            return self.in_one_socket;
        }
        self.unevenness < other.unevenness
    }

    fn take(&self, machine: &Machine, options: &Options, free: &CpuSet) -> Option<CpuSet> {
        let mut taken = CpuSet::default();
        for (node, amount) in &self.amounts {
            let within = machine.cpus_where(|place| place.node == *node).and(free);
            if within.len() < *amount {
                return None;
            }
            taken = taken.or(&packed(machine, options, &within, *amount));
        }
        Some(taken)
    }
}

/// The amounts with `rest` dealt out to the nodes of a subset in turn.
fn with_rest(
    amounts: &BTreeMap<usize, usize>,
    available: &BTreeMap<usize, usize>,
    subset: &[usize],
    mut rest: usize,
    group: usize,
) -> Option<BTreeMap<usize, usize>> {
    let mut amounts = amounts.clone();
    while rest > 0 {
        let before = rest;
        for node in subset {
            let amount = amounts.get_mut(node)?;
            if rest > 0 && available[node] - *amount >= group {
                *amount += group;
                rest = rest.saturating_sub(group);
            }
        }
        if rest == before {
            return None;
        }
    }
    Some(amounts)
}

fn unevenness(numbers: &[usize]) -> u128 {
    let (count, sum) = (numbers.len() as u128, numbers.iter().map(|number| *number as u128).sum::<u128>());
    let squares: u128 = numbers.iter().map(|number| (*number as u128).pow(2)).sum();
    count * squares - sum.pow(2)
}

/// All choices of `size` of the items, in their order.
fn combinations(items: &[usize], size: usize) -> Vec<Vec<usize>> {
    if size == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (at, first) in items.iter().enumerate() {
        for mut rest in combinations(&items[at + 1..], size - 1) {
            rest.insert(0, *first);
            all.push(rest);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::topology::samples::machine;

    fn taken(machine: &Machine, options: &Options, free: &str, count: usize) -> String {
        take(machine, options, &free.parse().unwrap(), count).unwrap().to_string()
    }

    #[test]
    fn packed_as_upstream_does_it() {
        let plain = Options::default();
        // One socket, four cores of two threads: 0 and 4 are one core.
        let single = machine(1, 1, 4, 2, 0);
        // Two sockets of a node each: 0-2 and 6-8, 3-5 and 9-11.
        let dual = machine(2, 1, 3, 2, 0);
        // Two sockets of two nodes each.
        let nodes = machine(2, 2, 2, 1, 0);
        for (machine, free, count, expect) in [
            (&single, "0-7", 1, "0"),
            (&single, "0-7", 2, "0,4"),
            (&single, "0-7", 3, "0-1,4"),
            (&single, "1,3,5-7", 2, "1,5"),
            // The core that is broken up already comes first.
            (&single, "1-7", 1, "4"),
            (&dual, "0-11", 6, "0-2,6-8"),
            (&dual, "0-11", 8, "0-3,6-9"),
            // The socket with fewer free CPUs is used up first.
            (&dual, "0,2,3-11", 2, "0,6"),
            (&dual, "1-11", 6, "3-5,9-11"),
            (&nodes, "0-7", 2, "0-1"),
            (&nodes, "0-7", 4, "0-3"),
            (&nodes, "1-7", 2, "2-3"),
        ] {
            assert_eq!(taken(machine, &plain, free, count), expect, "{count} of {free}");
        }
        assert!(take(&single, &plain, &"0".parse().unwrap(), 2).is_err());
    }

    #[test]
    fn spread_over_cores() {
        let options = Options { distribute_across_cores: true, ..Options::default() };
        assert_eq!(taken(&machine(1, 1, 4, 2, 0), &options, "0-7", 3), "0-2");
    }

    #[test]
    fn distributed_over_nodes() {
        let options = Options { distribute_across_numa: true, ..Options::default() };
        let whole = Options { full_pcpus_only: true, ..options.clone() };
        // Four nodes of four CPUs.
        let four = machine(2, 2, 4, 1, 0);
        // Two nodes of four cores with two threads: 0-3 and 8-11, 4-7 and 12-15.
        let threads = machine(2, 1, 4, 2, 0);
        for (machine, options, free, count, expect) in [
            (&four, &options, "0-15", 4, "0-3"),
            (&four, &options, "0-15", 6, "0-2,4-6"),
            (&four, &options, "0-15", 5, "0-2,4-5"),
            (&four, &options, "0-15", 12, "0-11"),
            (&four, &options, "2-15", 6, "4-6,8-10"),
            (&threads, &whole, "0-15", 12, "0-2,4-6,8-10,12-14"),
            (&threads, &whole, "0-15", 10, "0-2,4-5,8-10,12-13"),
        ] {
            assert_eq!(taken(machine, options, free, count), expect, "{count} of {free}");
        }
    }

    #[test]
    fn one_cache_rather_than_two() {
        let options = Options { prefer_align_by_cache: true, ..Options::default() };
        // One node with two caches of four cores.
        let mut machine = machine(1, 1, 8, 1, 0);
        machine.cpus.values_mut().for_each(|place| place.cache = place.core / 4 * 4);
        assert_eq!(taken(&machine, &options, "1-7", 4), "4-7");
        assert_eq!(taken(&machine, &options, "1-7", 3), "1-3");
        assert_eq!(taken(&machine, &Options::default(), "1-7", 4), "1-4");
    }
}
