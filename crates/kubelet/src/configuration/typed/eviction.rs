//! When pods are evicted.

use std::time::Duration;

use configfile::{Reader, spans};
use pod::quantity::Quantity;
use serde_json::Value;

use super::resources::enforces_pods;
use crate::node::pressure::{Level, Policy, Signal, Threshold, Thresholds};

pub(super) fn eviction(reader: &mut Reader<'_>) -> Policy {
    let mut thresholds = hard_thresholds(reader);
    thresholds.extend(soft_thresholds(reader));
    for (signal, reclaim) in levels(reader, "evictionMinimumReclaim") {
        let own = thresholds.iter_mut().filter(|one| one.signal == signal);
        own.for_each(|one| one.reclaim = Some(reclaim));
    }
    // What all pods together may use runs short as the node's memory does.
    let memory = thresholds.iter().find(|one| one.signal == Signal::Memory && one.is_hard()).copied();
    let has_own = thresholds.iter().any(|one| one.signal == Signal::AllocatableMemory);
    let enforced = enforces_pods(reader);
    thresholds.extend(
        memory.filter(|_| enforced && !has_own).map(|one| Threshold { signal: Signal::AllocatableMemory, ..one }),
    );
    Policy {
        thresholds: Thresholds(thresholds),
        transition: reader.span("evictionPressureTransitionPeriod").unwrap_or(Duration::from_secs(300)),
        pod_grace_max_s: reader.number("evictionMaxPodGracePeriod", 0),
        local_storage: reader.flag("localStorageCapacityIsolation", true),
    }
}

/// A map that is written in part drops the defaults of the rest, unless `mergeDefaultEvictionSettings` says otherwise.
fn hard_thresholds(reader: &mut Reader<'_>) -> Vec<Threshold> {
    let written = levels(reader, "evictionHard");
    let is_empty = reader.get("evictionHard").and_then(Value::as_object).is_none_or(serde_json::Map::is_empty);
    let mut thresholds = match is_empty || reader.flag("mergeDefaultEvictionSettings", false) {
        true => Thresholds::upstream().0,
        false => Vec::new(),
    };
    thresholds.retain(|default| !written.iter().any(|(signal, _)| *signal == default.signal));
    thresholds.extend(written.into_iter().map(|(signal, level)| Threshold::hard(signal, level)));
    // A threshold of nothing is how one is switched off.
    thresholds.retain(|one| !matches!(one.level, Level::Amount(0) | Level::Share(0.0)));
    thresholds
}

fn soft_thresholds(reader: &mut Reader<'_>) -> Vec<Threshold> {
    let mut thresholds = Vec::new();
    for (signal, level) in levels(reader, "evictionSoft") {
        // The names of signals have dots, so they are no paths.
        let periods = reader.get("evictionSoftGracePeriod").and_then(Value::as_object);
        let grace = periods.and_then(|periods| spans::parse(periods.get(signal.name())?.as_str()?));
        match grace.filter(|grace| !grace.is_zero()) {
            Some(grace) => thresholds.push(Threshold { grace, ..Threshold::hard(signal, level) }),
            None => reader.fault(
                "evictionSoftGracePeriod",
                format!("grace period must be specified for the soft eviction threshold {}", signal.name()),
            ),
        }
    }
    thresholds
}

/// Amounts by signal.
fn levels(reader: &mut Reader<'_>, path: &str) -> Vec<(Signal, Level)> {
    let map = reader.get(path).and_then(Value::as_object).cloned().unwrap_or_default();
    let mut levels = Vec::new();
    for (name, text) in map {
        let text = text.as_str().unwrap_or_default();
        match (Signal::named(&name), level(text)) {
            // What containers write lies beside the images: its thresholds are theirs.
            (Some(Signal::ContainerDisk | Signal::ContainerInodes), Some(_)) => {}
            (Some(signal), Some(level)) => levels.push((signal, level)),
            (None, _) => reader.fault(path, format!("there is no signal {name:?}")),
            (_, None) => reader.fault(path, format!("{name}: {text:?} is neither a quantity nor a percentage")),
        }
    }
    levels
}

/// `100Mi` or `10%`.
fn level(text: &str) -> Option<Level> {
    match text.strip_suffix('%') {
        Some(percent) => {
            let percent: f64 = percent.parse().ok()?;
            (0.0..=100.0).contains(&percent).then_some(Level::Share(percent / 100.0))
        }
        None => u64::try_from(Quantity::parse(text).ok()?.units()).ok().map(Level::Amount),
    }
}
