//! Who goes first when the node is short of something. Pure.

use std::cmp::Ordering;

/// A pod that might be evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its priority.
    pub priority: i32,
    /// What it uses of what is short.
    pub usage: u64,
    /// What it asked for; none where pods cannot ask for it.
    pub request: Option<u64>,
}

impl Candidate {
    /// What it uses beyond its request; negative if it stays below.
    fn excess(&self) -> i128 {
        i128::from(self.usage) - i128::from(self.request.unwrap_or(0))
    }

    /// It uses more than it asked for. Of what pods cannot ask for, nobody has asked for less.
    fn exceeds(&self) -> bool {
        self.request.is_some() && self.excess() > 0
    }
}

/// The place of the pod that goes first, as upstream ranks them: who uses more than it asked for before who does not, then
/// the lower priority, then who exceeds its request by more.
pub fn first(candidates: &[Candidate]) -> Option<usize> {
    let order = |one: &Candidate, other: &Candidate| -> Ordering {
        let by_excess = other.exceeds().cmp(&one.exceeds());
        by_excess.then(one.priority.cmp(&other.priority)).then(other.excess().cmp(&one.excess()))
    };
    (0..candidates.len()).min_by(|one, other| order(&candidates[*one], &candidates[*other]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(priority: i32, usage: u64, request: u64) -> Candidate {
        Candidate { priority, usage, request: Some(request) }
    }

    #[test]
    fn who_uses_more_than_it_asked_for_goes_first() {
        let all = [candidate(0, 10, 100), candidate(100, 20, 10), candidate(0, 5, 0), candidate(0, 90, 80)];
        assert_eq!(first(&all), Some(3), "of low priority, and the largest excess among those");
        assert_eq!(first(&all[..2]), Some(1), "a high priority does not protect who exceeds its request");
        assert_eq!(first(&all[..1]), Some(0));
        assert_eq!(first(&[]), None);
    }

    #[test]
    fn of_process_ids_the_lowest_priority_gives_most() {
        let using = |priority, usage| Candidate { priority, usage, request: None };
        assert_eq!(first(&[using(1, 900), using(0, 3), using(0, 5)]), Some(2));
    }
}
