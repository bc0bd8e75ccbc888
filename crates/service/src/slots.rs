//! Slots: endpoints keep their places as well as they can.

use std::collections::HashSet;
use std::sync::Arc;

use crate::Endpoint;

/// Puts the `wanted` endpoints (without duplicates) into slots, with as few changes against `old` as possible.
pub(crate) fn keep(old: Option<&Arc<[Endpoint]>>, wanted: &[Endpoint]) -> Arc<[Endpoint]> {
    let Some(old) = old else { return wanted.into() };
    let staying: HashSet<&Endpoint> = old.iter().collect();
    let wanted_set: HashSet<&Endpoint> = wanted.iter().collect();
    let mut new = wanted.iter().filter(|endpoint| !staying.contains(endpoint));
    let mut slots = old.to_vec();
    let mut at = 0;
    while at < slots.len() {
        if !wanted_set.contains(&slots[at]) {
            match new.next() {
                Some(endpoint) => slots[at] = *endpoint,
                None => {
                    slots.swap_remove(at);
                    continue;
                }
            }
        }
        at += 1;
    }
    slots.extend(new);
    if *slots == **old { old.clone() } else { slots.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(n: u8) -> Endpoint {
        Endpoint { address: [10, 0, 0, n].into(), port: 80, local: false }
    }

    fn endpoints(numbers: &[u8]) -> Vec<Endpoint> {
        numbers.iter().copied().map(endpoint).collect()
    }

    #[track_caller]
    fn check(old: &[u8], wanted: &[u8], expect: &[u8]) {
        let old: Arc<[Endpoint]> = endpoints(old).into();
        assert_eq!(*keep(Some(&old), &endpoints(wanted)), *endpoints(expect));
    }

    #[test]
    fn the_last_moves_into_a_gap_unless_somebody_new_does() {
        check(&[1, 2, 3, 4], &[1, 3, 4], &[1, 4, 3]);
        check(&[1, 2, 3, 4], &[1, 3, 4, 5], &[1, 5, 3, 4]);
        check(&[1, 2, 3], &[], &[]);
        check(&[1, 2, 3], &[1], &[1]);
        check(&[], &[1, 2], &[1, 2]);
        check(&[1], &[1, 2], &[1, 2]);
    }

    proptest! {
        #[test]
        fn nobody_is_lost_and_little_changes(
            old in prop::collection::hash_set(0u8..40, 0..20),
            wanted in prop::collection::btree_set(0u8..40, 0..20),
        ) {
            let old: Arc<[Endpoint]> = old.iter().copied().map(endpoint).collect();
            let wanted: Vec<Endpoint> = wanted.iter().copied().map(endpoint).collect();
            let slots = keep(Some(&old), &wanted);
            let mut sorted = slots.to_vec();
            sorted.sort_unstable();
            prop_assert_eq!(&sorted, &wanted);
            let written = slots.iter().enumerate().filter(|(at, endpoint)| old.get(*at) != Some(endpoint)).count();
            let left = old.iter().filter(|endpoint| !wanted.contains(endpoint)).count();
            let came = wanted.iter().filter(|endpoint| !old.contains(endpoint)).count();
            prop_assert!(written <= left.max(came), "{} written, {} left, {} came", written, left, came);
        }
    }
}
