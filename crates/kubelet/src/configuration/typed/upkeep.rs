//! What the node does of itself: logs, images, a shutdown.

use std::path::{Component, PathBuf};
use std::time::Duration;

use configfile::Reader;
use pod::quantity::Quantity;
use serde_json::Value;

use super::{ImageGc, LogLimits};
use crate::node::shutdown::{self as node_shutdown, Period};
use crate::pulled::{Allowlist, Verification};

pub(super) fn log_limits(reader: &mut Reader<'_>) -> LogLimits {
    let size = reader.text("containerLogMaxSize").unwrap_or_else(|| "10Mi".to_owned());
    let bytes = Quantity::parse(&size).ok().and_then(|size| u64::try_from(size.units()).ok());
    let limits = LogLimits {
        bytes_max: bytes.unwrap_or_default(),
        files_max: reader.number("containerLogMaxFiles", 5),
        look_every: reader.span("containerLogMonitorInterval").unwrap_or(Duration::from_secs(10)),
        workers: reader.number("containerLogMaxWorkers", 1),
    };
    if limits.look_every < Duration::from_secs(3) {
        reader.fault("containerLogMonitorInterval", format!("{:?} is less than 3s", limits.look_every));
    }
    if limits.workers == 0 {
        reader.fault("containerLogMaxWorkers", "0 is less than 1");
    }
    if limits.bytes_max == 0 {
        reader.fault("containerLogMaxSize", format!("{size:?} is no quantity above 0, such as 10Mi"));
    }
    if limits.files_max < 2 {
        reader.fault("containerLogMaxFiles", format!("{} is less than 2", limits.files_max));
    }
    limits
}

pub(super) fn pod_logs_dir(reader: &mut Reader<'_>) -> Option<PathBuf> {
    let dir = reader.file("podLogsDir")?;
    let is_plain = dir.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !dir.is_absolute() || !is_plain || !dir.as_os_str().is_ascii() {
        reader.fault("podLogsDir", format!("{} is not an absolute path of ASCII names", dir.display()));
    }
    Some(dir)
}

pub(super) fn image_gc(reader: &mut Reader<'_>) -> ImageGc {
    let (high, low) = ("imageGCHighThresholdPercent", "imageGCLowThresholdPercent");
    let gc = ImageGc {
        high_percent: reader.number(high, 85),
        low_percent: reader.number(low, 80),
        minimum_age: reader.span("imageMinimumGCAge").unwrap_or(Duration::from_secs(120)),
        maximum_age: reader.span("imageMaximumGCAge"),
    };
    for (path, percent) in [(high, gc.high_percent), (low, gc.low_percent)] {
        if percent > 100 {
            reader.fault(path, format!("{percent} is not between 0 and 100"));
        }
    }
    if gc.low_percent >= gc.high_percent {
        reader.fault(low, format!("{} is not below {high} {}", gc.low_percent, gc.high_percent));
    }
    if gc.maximum_age.is_some_and(|most| most <= gc.minimum_age) {
        reader.fault("imageMaximumGCAge", "it has to be longer than imageMinimumGCAge");
    }
    gc
}

pub(super) fn verification(reader: &mut Reader<'_>) -> Verification {
    const POLICY: &str = "imagePullCredentialsVerificationPolicy";
    const LIST: &str = "preloadedImagesVerificationAllowlist";
    const GATE: &str = "KubeletEnsureSecretPulledImages";
    let listed = reader.texts(LIST);
    let verification = match reader.text(POLICY).as_deref() {
        // Upstream's gate.
        None if reader.get("featureGates").and_then(|gates| gates.get(GATE)?.as_bool()) == Some(false) => {
            Verification::Never
        }
        None | Some("NeverVerifyPreloadedImages") => Verification::NotPreloaded,
        Some("NeverVerify") => Verification::Never,
        Some("AlwaysVerify") => Verification::Always,
        Some("NeverVerifyAllowlistedImages") => match Allowlist::parse(&listed) {
            Ok(list) => return Verification::NotListed(list),
            Err(fault) => {
                reader.fault(LIST, fault);
                return Verification::default();
            }
        },
        Some(other) => {
            let known = "NeverVerify, NeverVerifyPreloadedImages, NeverVerifyAllowlistedImages, AlwaysVerify";
            reader.fault(POLICY, format!("{other:?} is none of {known}"));
            Verification::default()
        }
    };
    if !listed.is_empty() {
        reader.fault(LIST, format!("it needs {POLICY} NeverVerifyAllowlistedImages"));
    }
    verification
}

pub(super) fn shutdown(reader: &mut Reader<'_>) -> Vec<Period> {
    const BY_PRIORITY: &str = "shutdownGracePeriodByPodPriority";
    let total = reader.span("shutdownGracePeriod").unwrap_or_default();
    let critical = reader.span("shutdownGracePeriodCriticalPods").unwrap_or_default();
    if critical > total {
        reader.fault("shutdownGracePeriodCriticalPods", "it is part of shutdownGracePeriod, and longer");
    }
    let written = reader.get(BY_PRIORITY).and_then(Value::as_array).cloned().unwrap_or_default();
    if written.is_empty() {
        return node_shutdown::periods(total, critical);
    }
    if !total.is_zero() || !critical.is_zero() {
        reader.fault(BY_PRIORITY, "it cannot be set together with shutdownGracePeriod");
    }
    let mut periods: Vec<Period> = Vec::new();
    for item in written {
        let number = |name: &str| item.get(name).and_then(Value::as_i64);
        let priority = number("priority").and_then(|number| i32::try_from(number).ok());
        let seconds = number("shutdownGracePeriodSeconds").and_then(|number| u32::try_from(number).ok());
        match priority.zip(seconds) {
            Some((priority, seconds)) if periods.iter().all(|one| one.priority != priority) => {
                periods.push(Period { priority, seconds });
            }
            _ => reader.fault(BY_PRIORITY, format!("{item} has no priority and seconds of its own")),
        }
    }
    periods
}
