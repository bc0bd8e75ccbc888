//! Who has which level. Two pods without a level of their own never have the same: it is what keeps one out of the
//! other's files.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Categories of a policy (`c0` to `c1023`), as upstream has them.
const CATEGORIES: u32 = 1024;
/// Pairs of two different ones.
const PAIRS: u32 = CATEGORIES * (CATEGORIES - 1) / 2;

/// The levels in use, each with how many hold it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Levels(Arc<Mutex<HashMap<String, usize>>>);

/// A level in use; it is free again when the last that holds it has gone.
#[derive(Debug)]
pub(crate) struct Lease {
    levels: Levels,
    level: String,
}

impl Levels {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Every section leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a level that was named, whoever else holds it.
    pub(crate) fn hold(&self, level: &str) -> Lease {
        *self.lock().entry(level.to_owned()).or_default() += 1;
        Lease { levels: self.clone(), level: level.to_owned() }
    }

    /// A level of two categories that nobody holds; none when all are held.
    pub(crate) fn unique(&self) -> Option<Lease> {
        let begin = u32::from_le_bytes(sys::random::bytes());
        let mut held = self.lock();
        let free = (0..PAIRS).map(|step| pair(begin.wrapping_add(step) % PAIRS));
        let level = free.map(|(low, high)| format!("s0:c{low},c{high}")).find(|level| !held.contains_key(level))?;
        held.insert(level.clone(), 1);
        Some(Lease { levels: self.clone(), level })
    }
}

/// The pairs in the order of their larger number, then of the smaller.
fn pair(number: u32) -> (u32, u32) {
    let mut high = (1 + 8 * number).isqrt().div_ceil(2);
    if high * (high - 1) / 2 > number {
        high -= 1;
    }
    (number - high * (high - 1) / 2, high)
}

impl Lease {
    pub(crate) fn level(&self) -> &str {
        &self.level
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = self.levels.lock();
        if let Some(count) = held.get_mut(&self.level) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.level);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_categories_comes_once() {
        let mut number = 0;
        for high in 1..CATEGORIES {
            for low in 0..high {
                assert_eq!(pair(number), (low, high));
                number += 1;
            }
        }
        assert_eq!(number, PAIRS);
    }

    #[test]
    fn a_level_is_free_when_the_last_has_gone() {
        let levels = Levels::default();
        let first = levels.unique().unwrap();
        let second = levels.hold(first.level());
        let level = first.level().to_owned();
        drop(first);
        assert_eq!(levels.lock().get(&level), Some(&1));
        drop(second);
        assert!(levels.lock().is_empty());
    }

    #[test]
    fn nobody_gets_what_another_has() {
        let levels = Levels::default();
        let all: Vec<Lease> = (0..500).map(|_| levels.unique().unwrap()).collect();
        let different: std::collections::HashSet<&str> = all.iter().map(Lease::level).collect();
        assert_eq!(different.len(), all.len());
        levels.lock().extend((0..PAIRS).map(pair).map(|(low, high)| (format!("s0:c{low},c{high}"), 1)));
        assert!(levels.unique().is_none());
    }
}
