//! Merging the hints of all resources of a request into one, by the policy of the operator.

use super::{Hint, Hints, Mask};

/// Hints to be combined, at most: their number grows with the product of what the resources offer.
const COMBINATIONS_MAX: usize = 1 << 20;

/// How much alignment the operator wants (`topologyManagerPolicy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// `none`
    #[default]
    None,
    /// `best-effort`
    BestEffort,
    /// `restricted`
    Restricted,
    /// `single-numa-node`
    SingleNumaNode,
}

impl Policy {
    /// By its name in the configuration.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "" | "none" => Self::None,
            "best-effort" => Self::BestEffort,
            "restricted" => Self::Restricted,
            "single-numa-node" => Self::SingleNumaNode,
            _ => return None,
        })
    }
}

/// The NUMA nodes of a machine, as far as they matter here.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Nodes {
    /// All of them.
    pub all: Mask,
    /// Distances between them, `[from][to]`, if near nodes are to be preferred (`prefer-closest-numa-nodes`).
    pub distances: Option<Vec<Vec<u64>>>,
}

/// The best combination of the hints of all resources; `None` where the policy forbids it.
pub fn merge(policy: Policy, nodes: &Nodes, all: &[Hints]) -> Option<Hint> {
    let mut offers: Vec<Vec<Hint>> = all.iter().map(offers).collect();
    if policy == Policy::SingleNumaNode {
        let fits = |hint: &Hint| hint.preferred && hint.affinity.is_none_or(|mask| mask.count() == 1);
        offers.iter_mut().for_each(|offer| offer.retain(fits));
    }
    let mut best = Merger::new(policy, nodes, &offers).best();
    if policy == Policy::SingleNumaNode && best.affinity == Some(nodes.all) {
        best.affinity = None;
    }
    match policy {
        Policy::None | Policy::BestEffort => Some(best),
        Policy::Restricted | Policy::SingleNumaNode => best.preferred.then_some(best),
    }
}

/// What can be chosen of one resource.
fn offers(hints: &Hints) -> Vec<Hint> {
    match hints {
        Hints::Indifferent => vec![Hint { affinity: None, preferred: true }],
        Hints::From(hints) if hints.is_empty() => vec![Hint { affinity: None, preferred: false }],
        Hints::From(hints) => hints.clone(),
    }
}

struct Merger<'a> {
    nodes: &'a Nodes,
    offers: &'a [Vec<Hint>],
    closest: bool,
    /// Of combinations that are not preferred, those with about as many nodes are best: what the resource that needs the
    /// most of them gets along with.
    enough: u32,
}

impl<'a> Merger<'a> {
    fn new(policy: Policy, nodes: &'a Nodes, offers: &'a [Vec<Hint>]) -> Self {
        let narrowest = |offer: &Vec<Hint>| offer.iter().filter_map(|hint| Some(hint.affinity?.count())).min();
        let enough = offers.iter().filter_map(narrowest).max().unwrap_or(0);
        let closest = nodes.distances.is_some() && policy != Policy::SingleNumaNode;
        Self { nodes, offers, closest, enough }
    }

    fn best(&self) -> Hint {
        let mut best: Option<Combined> = None;
        let mut chosen = vec![0; self.offers.len()];
        if self.offers.iter().all(|offer| !offer.is_empty()) {
            for _ in 0..COMBINATIONS_MAX {
                let candidate = self.combine(&chosen);
                if candidate.mask.count() > 0 && best.is_none_or(|best| self.is_better(candidate, best)) {
                    best = Some(candidate);
                }
                if !self.advance(&mut chosen) {
                    break;
                }
            }
        }
        let best = best.unwrap_or(Combined { mask: self.nodes.all, preferred: false });
        Hint { affinity: Some(best.mask), preferred: best.preferred }
    }

    /// The next combination; the last resource changes first.
    fn advance(&self, chosen: &mut [usize]) -> bool {
        for (at, offer) in chosen.iter_mut().zip(self.offers).rev() {
            *at += 1;
            if *at < offer.len() {
                return true;
            }
            *at = 0;
        }
        false
    }

    fn combine(&self, chosen: &[usize]) -> Combined {
        let hints = chosen.iter().zip(self.offers).map(|(at, offer)| offer[*at]);
        let mut first = None;
        hints.fold(Combined { mask: self.nodes.all, preferred: true }, |combined, hint| {
            let Some(mask) = hint.affinity else {
                return Combined { preferred: combined.preferred && hint.preferred, ..combined };
            };
            let same = *first.get_or_insert(mask) == mask;
            Combined { mask: combined.mask.and(mask), preferred: combined.preferred && hint.preferred && same }
        })
    }

    fn is_better(&self, candidate: Combined, current: Combined) -> bool {
        if candidate.preferred != current.preferred {
            return candidate.preferred;
        }
        if candidate.preferred {
            return self.is_fitter(candidate.mask, current.mask);
        }
        let (new, old) = (candidate.mask.count(), current.mask.count());
        if old > self.enough {
            return self.is_fitter(candidate.mask, current.mask);
        }
        if old == self.enough {
            return new == self.enough && self.is_fitter(candidate.mask, current.mask);
        }
        // As near to enough as possible from below.
        match new.cmp(&old) {
            _ if new > self.enough => false,
            _ if new == self.enough => true,
            std::cmp::Ordering::Equal => self.is_fitter(candidate.mask, current.mask),
            order => order.is_gt(),
        }
    }

    fn is_fitter(&self, candidate: Mask, current: Mask) -> bool {
        if candidate == current {
            return false;
        }
        if !self.closest || candidate.count() != current.count() {
            return candidate.is_narrower_than(current);
        }
        let (near, far) = (self.distance(candidate), self.distance(current));
        near < far || (near == far && candidate < current)
    }

    /// The sum of distances between the nodes: of masks with as many nodes it compares as the average does.
    fn distance(&self, mask: Mask) -> u64 {
        let between = |from: usize, to: usize| {
            let row = self.nodes.distances.as_ref().and_then(|distances| distances.get(from));
            row.and_then(|row| row.get(to)).copied().unwrap_or(0)
        };
        mask.nodes().flat_map(|from| mask.nodes().map(move |to| between(from, to))).sum()
    }
}

#[derive(Clone, Copy)]
struct Combined {
    mask: Mask,
    preferred: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(nodes: &[usize], preferred: bool) -> Hint {
        Hint { affinity: Some(Mask::of(nodes.iter().copied())), preferred }
    }

    fn two() -> Nodes {
        Nodes { all: Mask::of([0, 1]), distances: None }
    }

    fn merged(policy: Policy, all: &[Hints]) -> Option<(Option<Vec<usize>>, bool)> {
        let best = merge(policy, &two(), all)?;
        Some((best.affinity.map(|mask| mask.nodes().collect()), best.preferred))
    }

    #[test]
    fn what_upstreams_table_says_of_two_nodes() {
        let (on_0, on_1, on_both) = (hint(&[0], true), hint(&[1], true), hint(&[0, 1], false));
        let (none, indifferent) = (Hints::From(vec![]), Hints::Indifferent);
        let any_of = |hints: &[Hint]| Hints::From(hints.to_vec());
        use Policy::{BestEffort, Restricted, SingleNumaNode};
        for (policy, all, expect) in [
            (BestEffort, vec![], Some((Some(vec![0, 1]), true))),
            (BestEffort, vec![indifferent.clone()], Some((Some(vec![0, 1]), true))),
            (BestEffort, vec![none.clone()], Some((Some(vec![0, 1]), false))),
            (BestEffort, vec![any_of(&[on_0]), any_of(&[on_1])], Some((Some(vec![0, 1]), false))),
            (BestEffort, vec![any_of(&[on_0, on_1]), any_of(&[on_1, on_both])], Some((Some(vec![1]), true))),
            (BestEffort, vec![any_of(&[on_both]), any_of(&[on_1])], Some((Some(vec![1]), false))),
            (Restricted, vec![any_of(&[on_0]), any_of(&[on_1])], None),
            (Restricted, vec![any_of(&[on_0]), indifferent.clone()], Some((Some(vec![0]), true))),
            (Restricted, vec![any_of(&[hint(&[0, 1], true)])], Some((Some(vec![0, 1]), true))),
            (SingleNumaNode, vec![], Some((None, true))),
            (SingleNumaNode, vec![any_of(&[hint(&[0, 1], true)])], None),
            (SingleNumaNode, vec![any_of(&[on_0, on_both]), any_of(&[on_0, on_1])], Some((Some(vec![0]), true))),
            (SingleNumaNode, vec![none], None),
        ] {
            assert_eq!(merged(policy, &all), expect, "{policy:?} {all:?}");
        }
    }

    #[test]
    fn of_as_many_nodes_the_closest_where_that_is_wanted() {
        let all = [Hints::From(vec![hint(&[0, 1], true), hint(&[0, 2], true), hint(&[2, 3], true)])];
        let near = |a: usize, b: usize| {
            if a == b {
                10
            } else if a / 2 == b / 2 && a >= 2 {
                11
            } else {
                21
            }
        };
        let distances = (0..4).map(|a| (0..4).map(|b| near(a, b)).collect()).collect();
        let nodes = Nodes { all: Mask::of(0..4), distances: Some(distances) };
        let best = merge(Policy::BestEffort, &nodes, &all).unwrap();
        assert_eq!(best.affinity, Some(Mask::of([2, 3])));
        let narrowest = merge(Policy::BestEffort, &Nodes { distances: None, ..nodes }, &all).unwrap();
        assert_eq!(narrowest.affinity, Some(Mask::of([0, 1])));
    }
}
