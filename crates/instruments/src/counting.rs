//! What counts: numbers by labels, and distributions of times.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::Text;

/// Counters by their labels. The labels are few: names of operations, reasons, status codes.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<String, u64>>);

impl Counts {
    /// One more.
    pub fn add(&self, labels: &str) {
        self.add_many(labels, 1);
    }

    /// So many more.
    pub fn add_many(&self, labels: &str, more: u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(labels) {
            Some(count) => *count += more,
            None => drop(counts.insert(labels.to_owned(), more)),
        }
    }

    /// How many there were.
    pub fn get(&self, labels: &str) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(labels).copied().unwrap_or(0)
    }

    /// The family with its samples.
    pub fn write(&self, text: &mut Text, name: &str, help: &str) {
        text.family(name, "counter", help);
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().for_each(|(labels, count)| text.sample(name, labels, count));
    }
}

/// A distribution of times.
#[derive(Debug)]
pub struct Histogram {
    /// Upper bounds in seconds, ascending.
    bounds: &'static [f64],
    /// How many there were up to each bound and above the one before; the last is above all.
    counts: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Histogram {
    /// None yet; `bounds` are upper bounds in seconds, ascending.
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_ns: AtomicU64::new(0) }
    }

    /// One more.
    pub fn observe(&self, took: Duration) {
        let place = self.bounds.partition_point(|bound| *bound < took.as_secs_f64());
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The family with its samples.
    pub fn write(&self, text: &mut Text, name: &str, help: &str) {
        text.family(name, "histogram", help);
        self.write_samples(text, name, "");
    }

    fn write_samples(&self, text: &mut Text, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let bounds = self.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        let mut below = 0;
        for (count, bound) in self.counts.iter().zip(bounds) {
            below += count.load(Ordering::Relaxed);
            text.sample(&format!("{name}_bucket"), &format!("{labels}{comma}le=\"{bound}\""), below);
        }
        let sum = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        text.sample(&format!("{name}_sum"), labels, sum);
        text.sample(&format!("{name}_count"), labels, below);
    }
}

/// Distributions by their labels.
#[derive(Debug)]
pub struct Histograms {
    bounds: &'static [f64],
    by_labels: Mutex<BTreeMap<String, Histogram>>,
}

impl Histograms {
    /// None yet; `bounds` are upper bounds in seconds, ascending.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, by_labels: Mutex::default() }
    }

    /// One more.
    pub fn observe(&self, labels: &str, took: Duration) {
        let mut all = self.by_labels.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get(labels) {
            Some(histogram) => histogram.observe(took),
            None => all.entry(labels.to_owned()).or_insert_with(|| Histogram::new(self.bounds)).observe(took),
        }
    }

    /// Forgets what has these labels.
    pub fn remove(&self, labels: &str) {
        self.by_labels.lock().unwrap_or_else(PoisonError::into_inner).remove(labels);
    }

    /// The family with its samples.
    pub fn write(&self, text: &mut Text, name: &str, help: &str) {
        text.family(name, "histogram", help);
        let all = self.by_labels.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(|(labels, histogram)| histogram.write_samples(text, name, labels));
    }
}
