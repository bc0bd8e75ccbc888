//! How many need a thing, and which things have come or gone since somebody asked.

use std::collections::BTreeMap;

/// One more or one less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    More,
    Less,
}

/// Counts of things.
#[derive(Debug)]
pub(super) struct Tally<T> {
    counts: BTreeMap<T, u32>,
    /// Those that have been counted since, and whether they were there before.
    touched: BTreeMap<T, bool>,
}

/// What differs since the last time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Turnover<T> {
    pub(super) come: Vec<T>,
    pub(super) gone: Vec<T>,
}

impl<T> Default for Tally<T> {
    fn default() -> Self {
        Tally { counts: BTreeMap::new(), touched: BTreeMap::new() }
    }
}

impl<T: Ord + Clone> Tally<T> {
    pub(super) fn count(&mut self, thing: T, step: Step) {
        let count = self.counts.get(&thing).copied().unwrap_or(0);
        self.touched.entry(thing.clone()).or_insert(count > 0);
        match (step, count) {
            (Step::More, _) => self.counts.insert(thing, count + 1),
            (Step::Less, 0 | 1) => self.counts.remove(&thing),
            (Step::Less, _) => self.counts.insert(thing, count - 1),
        };
    }

    pub(super) fn take(&mut self) -> Turnover<T> {
        let (mut come, mut gone) = (Vec::new(), Vec::new());
        for (thing, was) in std::mem::take(&mut self.touched) {
            match (was, self.counts.contains_key(&thing)) {
                (false, true) => come.push(thing),
                (true, false) => gone.push(thing),
                _ => {}
            }
        }
        Turnover { come, gone }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_and_the_last_matter() {
        let mut tally = Tally::default();
        let mut check = |steps: &[(char, Step)], come: &[char], gone: &[char]| {
            steps.iter().for_each(|(thing, step)| tally.count(*thing, *step));
            assert_eq!(tally.take(), Turnover { come: come.to_vec(), gone: gone.to_vec() });
        };
        check(&[('a', Step::More), ('a', Step::More), ('b', Step::More)], &['a', 'b'], &[]);
        check(&[('a', Step::Less), ('b', Step::Less)], &[], &['b']);
        check(&[('a', Step::Less), ('a', Step::More), ('c', Step::More), ('c', Step::Less)], &[], &[]);
        check(&[('a', Step::Less)], &[], &['a']);
    }
}
