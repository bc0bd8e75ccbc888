//! Reasons of events: those of upstream's kube-proxy 1.37 (`cmd/kube-proxy`, `pkg/proxy`), each of which is sent or is not for a
//! reason.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};

const OF_UPSTREAM: [&str; 6] = [
    "FailedToStartMetricServer",
    "FailedToStartProxierHealthcheck",
    "FailedToStartServiceHealthcheck",
    "IPVSDeprecation",
    "KubeProxyDefaultMode",
    "Starting",
];

/// Those that are not sent, and why.
const NOT_SENT: [(&str, &str); 2] = [
    ("IPVSDeprecation", "the mode ipvs stays"),
    ("KubeProxyDefaultMode", "whoever names no mode gets nftables, whatever upstream's default is by then"),
];

/// Those of ours.
const OWN: [&str; 2] = ["ServiceNotProxied", "ServiceRulesFailed"];

/// All that the sources say which decide about events, but for what tests say.
fn sources() -> String {
    fn read(path: &Path, text: &mut String) {
        if path.is_dir() {
            fs::read_dir(path).unwrap().for_each(|entry| read(&entry.unwrap().path(), text));
        } else {
            text.push_str(fs::read_to_string(path).unwrap().split("#[cfg(test)]").next().unwrap());
        }
    }
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    for place in ["src", "../orlop/src/proxy"] {
        read(&own.join(place), &mut text);
    }
    text
}

#[test]
fn every_reason_of_upstream_is_sent_or_not_for_a_reason() {
    let sources = sources();
    let is_sent = |reason: &str| sources.contains(&format!("\"{reason}\""));
    for reason in OF_UPSTREAM {
        let excused = NOT_SENT.iter().find(|(name, _)| *name == reason);
        assert!(is_sent(reason) != excused.is_some(), "{reason}: not for a reason: {excused:?}");
    }
    for (name, why) in NOT_SENT {
        assert!(OF_UPSTREAM.contains(&name) && !why.is_empty(), "{name}");
    }
    for reason in OWN {
        assert!(is_sent(reason), "{reason}");
    }
}
