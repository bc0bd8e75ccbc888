//! Sets of NUMA nodes.

/// A set of NUMA nodes, by their numbers. Numbers from 64 on are in none: no kernel counts so far in practice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mask(u64);

impl Mask {
    /// The nodes with these numbers.
    pub fn of(nodes: impl IntoIterator<Item = usize>) -> Self {
        Self(nodes.into_iter().filter(|node| *node < 64).fold(0, |bits, node| bits | 1 << node))
    }

    /// How many there are.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether a node is among them.
    pub fn contains(self, node: usize) -> bool {
        node < 64 && self.0 >> node & 1 == 1
    }

    /// Their numbers, ascending.
    pub fn nodes(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |node| self.contains(*node))
    }

    /// Whether both have a node in common.
    pub fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The nodes of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The nodes of either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Fewer nodes; of as many, those with the lower numbers.
    pub fn is_narrower_than(self, other: Self) -> bool {
        (self.count(), self.0) < (other.count(), other.0)
    }

    /// All sets of at least one of these nodes, the smallest first and of as many the lower numbers first.
    pub fn subsets(self) -> Vec<Self> {
        let nodes: Vec<usize> = self.nodes().collect();
        let mut sets: Vec<Self> = (1..1u64 << nodes.len().min(SUBSETS_NODES_MAX))
            .map(|bits| Self::of(nodes.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1).map(|(_, node)| *node)))
            .collect();
        sets.sort_by_key(|set| (set.count(), *set));
        sets
    }
}

/// Nodes whose sets are all looked at, at most: there are two to the power of it.
const SUBSETS_NODES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_come_from_small_to_large() {
        let sets: Vec<Vec<usize>> =
            Mask::of([0, 2, 3]).subsets().into_iter().map(|set| set.nodes().collect()).collect();
        assert_eq!(sets, [vec![0], vec![2], vec![3], vec![0, 2], vec![0, 3], vec![2, 3], vec![0, 2, 3]]);
        assert!(Mask::default().subsets().is_empty());
    }

    #[test]
    fn narrower_is_fewer_then_lower() {
        assert!(Mask::of([3]).is_narrower_than(Mask::of([0, 1])));
        assert!(Mask::of([0, 2]).is_narrower_than(Mask::of([1, 2])));
        assert!(!Mask::of([1]).is_narrower_than(Mask::of([1])));
    }
}
