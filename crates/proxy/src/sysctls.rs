//! Limits and times of connection tracking, as the operator wants them. The limit is the whole machine's and only ever
//! raised: others may need more.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::configuration::Conntrack;

/// As upstream: more would take memory that machines with many processors have no use for.
const TRACKED_MAX: u64 = 1 << 20;
/// Connections for each bucket of the table.
const TRACKED_PER_BUCKET: u64 = 4;

/// Where the kernel's settings are.
#[derive(Debug, Clone)]
pub struct Places {
    /// `/proc/sys`
    pub sysctls: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
}

impl Default for Places {
    fn default() -> Places {
        Places { sysctls: "/proc/sys".into(), sys: "/sys".into() }
    }
}

/// A setting that the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot set {path} to {value}; run once as root with --init-only, or let it be by the fields of `conntrack` \
     (maxPerCore 0, times 0s)"
)]
pub struct SysctlError {
    /// The file.
    pub path: PathBuf,
    /// What was to be written.
    pub value: u64,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// A setting and what it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    path: PathBuf,
    value: u64,
    /// More than that is left as it is.
    at_least: bool,
}

/// Sets what differs from what the operator wants.
///
/// # Errors
/// The first setting that the kernel refused.
pub fn apply(conntrack: &Conntrack, places: &Places) -> Result<(), SysctlError> {
    let processors =
        online(&places.sys).or_else(|| std::thread::available_parallelism().ok().map(|all| all.get() as u64));
    for setting in wanted(conntrack, processors.unwrap_or(1), places) {
        setting.apply()?;
    }
    Ok(())
}

fn wanted(conntrack: &Conntrack, processors: u64, places: &Places) -> Vec<Setting> {
    let netfilter = |name: &str| places.sysctls.join("net/netfilter").join(name);
    let mut settings = Vec::new();
    let max = tracked_max(conntrack, processors);
    if max > 0 {
        let buckets = places.sys.join("module/nf_conntrack/parameters/hashsize");
        settings.push(Setting { path: netfilter("nf_conntrack_max"), value: max, at_least: true });
        settings.push(Setting { path: buckets, value: max / TRACKED_PER_BUCKET, at_least: true });
    }
    let times = [
        ("nf_conntrack_tcp_timeout_established", conntrack.tcp_established),
        ("nf_conntrack_tcp_timeout_close_wait", conntrack.tcp_close_wait),
        ("nf_conntrack_udp_timeout", conntrack.udp),
        ("nf_conntrack_udp_timeout_stream", conntrack.udp_stream),
    ];
    let times = times.into_iter().filter_map(|(name, time)| Some((name, time?)));
    settings.extend(times.map(|(name, time): (_, Duration)| Setting {
        path: netfilter(name),
        value: time.as_secs(),
        at_least: false,
    }));
    if conntrack.tcp_be_liberal {
        settings.push(Setting { path: netfilter("nf_conntrack_tcp_be_liberal"), value: 1, at_least: false });
    }
    settings
}

/// 0 leaves what is.
fn tracked_max(conntrack: &Conntrack, processors: u64) -> u64 {
    match u64::from(conntrack.max_per_core) * processors {
        0 => 0,
        scaled if scaled > TRACKED_MAX => TRACKED_MAX,
        scaled => scaled.max(conntrack.min.into()),
    }
}

/// Processors of the whole machine: this process may be kept to some of them.
fn online(sys: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(sys.join("devices/system/cpu/online")).ok()?;
    count(text.trim())
}

/// `0-3,8` are five.
fn count(list: &str) -> Option<u64> {
    let each = list.split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first).map(|between| between + 1)
    });
    each.sum()
}

impl Setting {
    fn apply(&self) -> Result<(), SysctlError> {
        let is = std::fs::read_to_string(&self.path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let fits = is.is_some_and(|is| is == self.value || (self.at_least && is > self.value));
        if fits {
            return Ok(());
        }
        tracing::info!(path = %self.path.display(), was = is, value = self.value, "connection tracking is set");
        let written = std::fs::write(&self.path, self.value.to_string());
        written.map_err(|source| SysctlError { path: self.path.clone(), value: self.value, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_follows_the_processors_within_bounds() {
        let check = |max_per_core, min, processors, expect| {
            let conntrack = Conntrack { max_per_core, min, ..Conntrack::default() };
            assert_eq!(tracked_max(&conntrack, processors), expect);
        };
        check(32768, 131_072, 2, 131_072);
        check(32768, 131_072, 8, 262_144);
        check(32768, 131_072, 128, 1 << 20);
        check(0, 131_072, 8, 0);
        check(1, 0, 8, 8);
    }

    #[test]
    fn processors_are_counted() {
        assert_eq!(count("0"), Some(1));
        assert_eq!(count("0-3,8"), Some(5));
        assert_eq!(count(""), None);
        assert_eq!(count("3-1"), None);
    }

    #[test]
    fn what_is_more_stays_and_what_is_less_is_raised() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { sysctls: dir.path().join("proc"), sys: dir.path().join("sys") };
        let files = [
            ("sys/devices/system/cpu/online", "0-7"),
            ("sys/module/nf_conntrack/parameters/hashsize", "1024"),
            ("proc/net/netfilter/nf_conntrack_max", "900000"),
            ("proc/net/netfilter/nf_conntrack_tcp_timeout_established", "432000"),
            ("proc/net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600"),
            ("proc/net/netfilter/nf_conntrack_udp_timeout", "30"),
        ];
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        apply(&Conntrack::default(), &places).unwrap();
        let read = |path: &str| std::fs::read_to_string(dir.path().join(path)).unwrap();
        assert_eq!(read("proc/net/netfilter/nf_conntrack_max"), "900000");
        assert_eq!(read("sys/module/nf_conntrack/parameters/hashsize"), "65536");
        assert_eq!(read("proc/net/netfilter/nf_conntrack_tcp_timeout_established"), "86400");
        assert_eq!(read("proc/net/netfilter/nf_conntrack_udp_timeout"), "30");
        let missing = Conntrack { udp_stream: Some(Duration::from_secs(9)), ..Conntrack::default() };
        std::fs::remove_dir_all(dir.path().join("proc")).unwrap();
        let error = apply(&missing, &places).unwrap_err().to_string();
        assert!(error.contains("nf_conntrack_max") && error.contains("--init-only"), "{error}");
    }
}
