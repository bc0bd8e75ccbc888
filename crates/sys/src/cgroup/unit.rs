//! Groups that a service manager makes as its units: what it is told of their limits, in the properties and types of
//! org.freedesktop.systemd1(5) and systemd.resource-control(5).
//!
//! They are runc's, since operators look for them by `systemctl show`. What has no property is written to the group alone.
//! The files of the group have the exact values; the properties are what systemd writes when it writes again.

use super::v2::{swap_only, weight};
use super::{DeviceRule, Hierarchy, Limits, Version};
use crate::error::{Error, Result};

/// A value of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnitValue {
    /// `t`; the largest is no limit.
    Number(u64),
    /// `s`
    Text(&'static str),
    /// `ay`: a bit for each, the first of the first byte for number 0.
    Mask(Vec<u8>),
    /// `a(ss)`
    Pairs(Vec<(String, String)>),
}

/// A property and its value.
pub type UnitProperty = (&'static str, UnitValue);

/// Since when systemd has what it had not from the beginning.
mod since {
    pub(super) const QUOTA_PERIOD: u32 = 242;
    pub(super) const CPUSET: u32 = 244;
    pub(super) const DEVICES_BY_NUMBER: u32 = 240;
    pub(super) const IDLE: u32 = 252;
    pub(super) const OOM_POLICY: u32 = 253;
}

/// Length of a period where none is given, in microseconds: the kernel's.
const PERIOD: u64 = 100_000;

impl Hierarchy {
    /// The properties for `limits`, for a systemd of this version.
    ///
    /// # Errors
    /// `EINVAL` for CPUs and values of files that are none.
    pub fn unit_properties(&self, limits: &Limits, systemd: u32) -> Result<Vec<UnitProperty>> {
        let mut all = Vec::new();
        let mut number = |name, value: Option<u64>| all.extend(value.map(|value| (name, UnitValue::Number(value))));
        let is_idle = limits.cpu_idle == Some(1) && systemd >= since::IDLE;
        match &self.version {
            Version::V1(_) => {
                number("MemoryLimit", limits.memory_bytes.map(or_unlimited));
                number("CPUShares", limits.cpu_shares);
                number("BlockIOWeight", limits.io_weight.map(u64::from));
            }
            Version::V2(_) => {
                let swap = limits.memory_swap_bytes.map(|both| swap_only(both, limits.memory_bytes));
                number("MemoryMax", limits.memory_bytes.map(or_unlimited));
                number("MemoryLow", limits.memory_reservation_bytes.map(or_unlimited));
                number("MemorySwapMax", swap.map(or_unlimited));
                // No weight is how systemd is told that it is idle.
                number("CPUWeight", if is_idle { Some(0) } else { limits.cpu_shares.map(weight) });
            }
        }
        number("TasksMax", limits.pids.map(tasks));
        all.extend(quota(limits.cpu_quota_us.unwrap_or(0), limits.cpu_period_us.unwrap_or(0), systemd));
        for (name, list) in [("AllowedCPUs", &limits.cpuset_cpus), ("AllowedMemoryNodes", &limits.cpuset_mems)] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                all.extend(mask(name, list, systemd)?);
            }
        }
        for (file, value) in &limits.unified {
            all.extend(of_file(file, value.trim(), limits, systemd)?);
        }
        Ok(all)
    }

    /// Further properties, which a unit takes only when it is made.
    pub fn unit_birth_properties(&self, limits: &Limits, systemd: u32) -> Vec<UnitProperty> {
        let whole = limits.unified.iter().find(|(file, _)| file == "memory.oom.group").map(|(_, value)| value.trim());
        let policy = match whole.filter(|_| systemd >= since::OOM_POLICY) {
            Some("0") => "continue",
            Some("1") => "kill",
            _ => return Vec::new(),
        };
        vec![("OOMPolicy", UnitValue::Text(policy))]
    }

    /// The properties for the devices of `rules`. systemd knows no rules that forbid single ones, and no numbers of devices of
    /// all kinds: such a list is narrower here than in the group's own rules, never wider.
    pub fn unit_devices(&self, rules: &[DeviceRule], systemd: u32) -> Vec<UnitProperty> {
        let (all, devices) = allowed(rules);
        let policy = if all && devices.is_empty() { "auto" } else { "strict" };
        let devices = if all { Vec::new() } else { devices };
        let named = devices.iter().filter_map(|device| Some((place(device, systemd)?, device.access.clone())));
        // Nothing first: what a unit has of them stays otherwise.
        vec![
            ("DeviceAllow", UnitValue::Pairs(Vec::new())),
            ("DevicePolicy", UnitValue::Text(policy)),
            ("DeviceAllow", UnitValue::Pairs(named.collect())),
        ]
    }
}

fn or_unlimited(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// None at all is no number that systemd takes.
fn tasks(limit: i64) -> u64 {
    or_unlimited(limit).max(1)
}

/// systemd counts in whole percents of a CPU: what is between them is rounded up.
fn quota(quota: i64, period: u64, systemd: u32) -> Vec<UnitProperty> {
    const PERCENT: u64 = 10_000;
    let mut all = Vec::new();
    if period != 0 && systemd >= since::QUOTA_PERIOD {
        all.push(("CPUQuotaPeriodUSec", UnitValue::Number(period)));
    }
    if quota == 0 && period == 0 {
        return all;
    }
    let period = if period == 0 { PERIOD } else { period };
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0);
    let each_second = quota
        .map_or(u64::MAX, |quota| (quota.saturating_mul(1_000_000) / period).div_ceil(PERCENT).saturating_mul(PERCENT));
    all.push(("CPUQuotaPerSecUSec", UnitValue::Number(each_second)));
    all
}

fn mask(name: &'static str, list: &str, systemd: u32) -> Result<Option<UnitProperty>> {
    let bits = bits(list).ok_or_else(|| invalid(name, list))?;
    Ok((systemd >= since::CPUSET).then_some((name, UnitValue::Mask(bits))))
}

fn invalid(name: &str, value: &str) -> Error {
    Error { call: "set", subject: format!("{name} to {value:?}"), errno: rustix::io::Errno::INVAL }
}

/// `0-3,7` as bits.
fn bits(list: &str) -> Option<Vec<u8>> {
    /// More CPUs than any kernel knows.
    const MAX: usize = 1 << 16;
    let mut bits = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MAX {
            return None;
        }
        bits.resize(bits.len().max(last / 8 + 1), 0);
        (first..=last).for_each(|number| bits[number / 8] |= 1 << (number % 8));
    }
    (!bits.is_empty()).then_some(bits)
}

/// What a file of version 2 is as a property; nothing for those that systemd does not know.
fn of_file(file: &str, value: &str, limits: &Limits, systemd: u32) -> Result<Vec<UnitProperty>> {
    let number = |text: &str| -> Result<u64> {
        if text == "max" { Ok(u64::MAX) } else { text.parse().map_err(|_| invalid(file, value)) }
    };
    let one = |name| Ok(vec![(name, UnitValue::Number(number(value)?))]);
    let is = |wanted: &str| limits.unified.iter().any(|(file, value)| file == wanted && value.trim() == "1");
    match file {
        "cpu.idle" if value == "1" && systemd >= since::IDLE => Ok(vec![("CPUWeight", UnitValue::Number(0))]),
        "cpu.weight" if is("cpu.idle") && systemd >= since::IDLE => Ok(Vec::new()),
        "cpu.weight" => one("CPUWeight"),
        "cpu.max" => {
            let (quota_us, period) = value.split_once(' ').unwrap_or((value, "100000"));
            let quota_us = i64::try_from(number(quota_us.trim())?).unwrap_or(-1);
            Ok(quota(quota_us, number(period.trim())?, systemd))
        }
        "cpuset.cpus" => Ok(mask("AllowedCPUs", value, systemd)?.into_iter().collect()),
        "cpuset.mems" => Ok(mask("AllowedMemoryNodes", value, systemd)?.into_iter().collect()),
        "memory.high" => one("MemoryHigh"),
        "memory.low" => one("MemoryLow"),
        "memory.min" => one("MemoryMin"),
        "memory.max" => one("MemoryMax"),
        "memory.swap.max" => one("MemorySwapMax"),
        "pids.max" => Ok(vec![("TasksMax", UnitValue::Number(number(value)?.max(1)))]),
        _ => Ok(Vec::new()),
    }
}

/// Whether all devices are allowed beside those listed, and the list. Of a list that says what is forbidden nothing is taken
/// over: nothing is allowed then.
fn allowed(rules: &[DeviceRule]) -> (bool, Vec<DeviceRule>) {
    let (mut all, mut listed) = (false, Vec::<DeviceRule>::new());
    for rule in rules {
        let is_all = rule.kind == 'a' && rule.major.is_none() && rule.minor.is_none();
        if is_all {
            all = rule.allow;
            listed.clear();
            continue;
        }
        let same = |one: &DeviceRule| (one.kind, one.major, one.minor) == (rule.kind, rule.major, rule.minor);
        match listed.iter_mut().find(|one| same(one)) {
            Some(one) if rule.allow != all => {
                let more: String = rule.access.chars().filter(|letter| !one.access.contains(*letter)).collect();
                one.access.push_str(&more);
            }
            Some(one) => one.access.retain(|letter| !rule.access.contains(letter)),
            // Allowed in a list of what is allowed, or forbidden in one of what is forbidden.
            None if rule.allow != all => listed.push(rule.clone()),
            None => {}
        }
    }
    listed.retain(|one| !one.access.is_empty());
    (all, listed)
}

/// How systemd calls a device, or all of a kind or a major number.
fn place(device: &DeviceRule, systemd: u32) -> Option<String> {
    let kind = match device.kind {
        'b' => "block",
        'c' => "char",
        _ => return None,
    };
    let path = |major, minor| format!("/dev/{kind}/{major}:{minor}");
    match (device.major, device.minor) {
        (None, None) => Some(format!("{kind}-*")),
        (Some(major), None) if systemd >= since::DEVICES_BY_NUMBER => Some(format!("{kind}-{major}")),
        // An older one looks for the file, and tells of those that are not there.
        (Some(major), Some(minor)) if systemd >= since::DEVICES_BY_NUMBER || exists(&path(major, minor)) => {
            Some(path(major, minor))
        }
        _ => None,
    }
}

fn exists(path: &str) -> bool {
    std::path::Path::new(path).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1() -> Hierarchy {
        Hierarchy { version: Version::V1(Vec::new()) }
    }

    fn v2() -> Hierarchy {
        Hierarchy { version: Version::V2("/".into()) }
    }

    fn shown(properties: Vec<UnitProperty>) -> String {
        let one = |(name, value): &UnitProperty| match value {
            UnitValue::Number(u64::MAX) => format!("{name}=infinity"),
            UnitValue::Number(number) => format!("{name}={number}"),
            UnitValue::Text(text) => format!("{name}={text}"),
            UnitValue::Mask(bits) => format!("{name}={bits:?}"),
            UnitValue::Pairs(pairs) => {
                format!("{name}={}", pairs.iter().map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>().join(","))
            }
        };
        properties.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn limits_are_the_properties_of_each_version() {
        let limits = Limits {
            memory_bytes: Some(64 << 20),
            memory_swap_bytes: Some(96 << 20),
            memory_reservation_bytes: Some(-1),
            cpu_shares: Some(1024),
            cpu_quota_us: Some(12_345),
            cpu_period_us: Some(50_000),
            cpuset_cpus: Some("0-1,9".to_owned()),
            io_weight: Some(500),
            pids: Some(0),
            ..Limits::default()
        };
        let common = "TasksMax=1 CPUQuotaPeriodUSec=50000 CPUQuotaPerSecUSec=250000 AllowedCPUs=[3, 2]";
        assert_eq!(
            shown(v1().unit_properties(&limits, 252).unwrap()),
            format!("MemoryLimit=67108864 CPUShares=1024 BlockIOWeight=500 {common}")
        );
        assert_eq!(
            shown(v2().unit_properties(&limits, 252).unwrap()),
            format!("MemoryMax=67108864 MemoryLow=infinity MemorySwapMax=33554432 CPUWeight=100 {common}")
        );
        // An old one is told what it knows.
        let old = shown(v2().unit_properties(&limits, 239).unwrap());
        assert!(old.ends_with("TasksMax=1 CPUQuotaPerSecUSec=250000"), "{old}");
        assert_eq!(shown(v2().unit_properties(&Limits::default(), 252).unwrap()), "");
    }

    #[test]
    fn files_of_version_2_are_properties_too() {
        let with = |files: &[(&str, &str)]| {
            let unified = files.iter().map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect();
            v2().unit_properties(&Limits { unified, ..Limits::default() }, 253).map(shown)
        };
        for (files, expect) in [
            (&[("memory.high", "1048576 ")][..], "MemoryHigh=1048576"),
            (&[("memory.swap.max", "max")], "MemorySwapMax=infinity"),
            (&[("cpu.max", "max 100000")], "CPUQuotaPeriodUSec=100000 CPUQuotaPerSecUSec=infinity"),
            (&[("cpu.max", "5000")], "CPUQuotaPeriodUSec=100000 CPUQuotaPerSecUSec=50000"),
            (&[("cpu.idle", "1"), ("cpu.weight", "50")], "CPUWeight=0"),
            (&[("pids.max", "0")], "TasksMax=1"),
            (&[("cpuset.mems", "0")], "AllowedMemoryNodes=[1]"),
            (&[("hugetlb.2MB.max", "0"), ("memory.oom.group", "1")], ""),
        ] {
            assert_eq!(with(files).unwrap(), expect, "{files:?}");
        }
        for wrong in [[("memory.high", "much")], [("cpuset.cpus", "3-1")], [("cpu.max", "1 x")]] {
            assert!(with(&wrong).is_err(), "{wrong:?}");
        }
        let unified = vec![("memory.oom.group".to_owned(), "1".to_owned())];
        let limits = Limits { unified, ..Limits::default() };
        assert_eq!(shown(v2().unit_birth_properties(&limits, 253)), "OOMPolicy=kill");
        assert_eq!(shown(v2().unit_birth_properties(&limits, 252)), "");
    }

    #[test]
    fn devices_are_a_list_of_what_is_allowed() {
        let rule =
            |allow, kind, major, minor, access: &str| DeviceRule { allow, kind, major, minor, access: access.into() };
        let none = rule(false, 'a', None, None, "rwm");
        let devices = |rules: &[DeviceRule]| shown(v2().unit_devices(rules, 252));
        let list = [
            none.clone(),
            rule(true, 'c', None, None, "m"),
            rule(true, 'c', Some(1), Some(3), "r"),
            rule(true, 'c', Some(1), Some(3), "rw"),
            rule(true, 'c', Some(136), None, "rwm"),
            rule(true, 'c', None, Some(1), "rwm"),
            rule(true, 'b', Some(8), Some(0), "rwm"),
            rule(false, 'b', Some(8), Some(0), "rwm"),
        ];
        assert_eq!(
            devices(&list),
            "DeviceAllow= DevicePolicy=strict DeviceAllow=char-* m,/dev/char/1:3 rw,char-136 rwm"
        );
        let all = rule(true, 'a', None, None, "rwm");
        assert_eq!(devices(&[none, all.clone()]), "DeviceAllow= DevicePolicy=auto DeviceAllow=");
        let but_one = rule(false, 'b', Some(8), None, "rwm");
        assert_eq!(devices(&[all, but_one]), "DeviceAllow= DevicePolicy=strict DeviceAllow=");
    }
}
