//! `linux.resources`: limits and device rules of the container's control group.

use sys::cgroup::{DeviceRule, IoLimit, IoLimitKind, Limits};

use super::PlanError;
use crate::oci;

/// The limits of `linux.resources` for the container's control group.
///
/// # Errors
/// Values that no kernel takes.
pub fn limits(resources: &oci::Resources) -> Result<Limits, PlanError> {
    let cpu = resources.cpu.clone().unwrap_or_default();
    let memory = resources.memory.clone().unwrap_or_default();
    if let (Some(limit), Some(swap)) = (memory.limit, memory.swap)
        && swap >= 0
        && swap < limit
    {
        return Err(PlanError::invalid("resources.memory.swap", swap, "is below the memory limit; it counts both"));
    }
    let io = resources.block_io.clone().unwrap_or_default();
    if io.leaf_weight.is_some() || io.weight_device.iter().any(|device| device.leaf_weight.is_some()) {
        let reason = "has been in no kernel since 5.0; leave it out";
        return Err(PlanError::invalid("resources.blockIO.leafWeight", "", reason));
    }
    Ok(Limits {
        cpu_shares: cpu.shares.filter(|shares| *shares > 0),
        cpu_quota_us: cpu.quota.filter(|quota| *quota != 0),
        cpu_period_us: cpu.period.filter(|period| *period > 0),
        cpuset_cpus: Some(cpu.cpus).filter(|cpus| !cpus.is_empty()),
        cpuset_mems: Some(cpu.mems).filter(|mems| !mems.is_empty()),
        memory_bytes: memory.limit.filter(|limit| *limit != 0),
        memory_swap_bytes: memory.swap.filter(|swap| *swap != 0),
        memory_min_bytes: None,
        pids: resources.pids.as_ref().and_then(|pids| pids.limit).filter(|limit| *limit != 0),
        memory_reservation_bytes: memory.reservation.filter(|bytes| *bytes != 0),
        swappiness: memory.swappiness,
        oom_killer_disabled: memory.disable_oom_killer,
        cpu_burst_us: cpu.burst,
        cpu_idle: cpu.idle,
        cpu_realtime_us: (
            cpu.realtime_runtime.filter(|runtime| *runtime != 0),
            cpu.realtime_period.filter(|period| *period != 0),
        ),
        io_weight: io.weight.filter(|weight| *weight != 0),
        io_weights: io.weight_device.iter().filter_map(io_weight).collect(),
        io_limits: io_limits(&io),
        checks_usage: memory.check_before_update == Some(true),
        network_class: resources.network.as_ref().and_then(|network| network.class_id),
        network_priorities: resources.network.iter().flat_map(priorities).collect(),
        rdma: resources.rdma.iter().map(|(name, one)| (name.clone(), one.hca_handles, one.hca_objects)).collect(),
        hugepages: resources.hugepage_limits.iter().map(|page| (page.page_size.clone(), page.limit)).collect(),
        unified: resources.unified.clone().into_iter().collect(),
    })
}

fn priorities(network: &oci::Network) -> impl Iterator<Item = (String, u32)> {
    network.priorities.iter().map(|one| (one.name.clone(), one.priority))
}

fn number(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn io_weight(one: &oci::WeightDevice) -> Option<((u32, u32), u16)> {
    one.weight.filter(|weight| *weight != 0).map(|weight| ((number(one.major), number(one.minor)), weight))
}

fn io_limits(io: &oci::BlockIo) -> Vec<IoLimit> {
    let kinds = [
        (IoLimitKind::ReadBytes, &io.throttle_read_bps_device),
        (IoLimitKind::WriteBytes, &io.throttle_write_bps_device),
        (IoLimitKind::Reads, &io.throttle_read_iops_device),
        (IoLimitKind::Writes, &io.throttle_write_iops_device),
    ];
    let limit = |kind, one: &oci::ThrottleDevice| IoLimit {
        kind,
        device: (number(one.major), number(one.minor)),
        rate: one.rate,
    };
    kinds.into_iter().flat_map(|(kind, devices)| devices.iter().map(move |one| limit(kind, one))).collect()
}

/// Devices that every container may use (config-linux.md, "Default Devices"), and mknod of any, which gives nothing.
/// `/dev/net/tun`, which every other runtime allows, too: VPNs make the node themselves.
const DEFAULT_DEVICES: [(char, Option<u32>, Option<u32>, &str); 11] = [
    ('c', None, None, "m"),
    ('b', None, None, "m"),
    ('c', Some(1), Some(3), "rwm"),
    ('c', Some(1), Some(5), "rwm"),
    ('c', Some(1), Some(7), "rwm"),
    ('c', Some(1), Some(8), "rwm"),
    ('c', Some(1), Some(9), "rwm"),
    ('c', Some(5), Some(0), "rwm"),
    ('c', Some(5), Some(2), "rwm"),
    ('c', Some(136), None, "rwm"),
    ('c', Some(10), Some(200), "rwm"),
];

/// The device rules of `linux.resources`, those of the default devices included.
///
/// # Errors
/// Unknown kinds.
pub fn device_rules(resources: &oci::Resources) -> Result<Vec<DeviceRule>, PlanError> {
    let defaults = DEFAULT_DEVICES.iter().map(|(kind, major, minor, access)| DeviceRule {
        allow: true,
        kind: *kind,
        major: *major,
        minor: *minor,
        access: (*access).to_owned(),
    });
    // The defaults come last: configurations begin with "deny all" and rely on what every container has.
    let own = resources.devices.iter().map(device_rule).collect::<Result<Vec<_>, _>>()?;
    Ok(own.into_iter().chain(defaults).collect())
}

fn device_rule(rule: &oci::DeviceRule) -> Result<DeviceRule, PlanError> {
    let kind = match rule.kind.as_str() {
        "" | "a" => 'a',
        "b" => 'b',
        "c" | "u" => 'c',
        other => return Err(PlanError::invalid("resources.devices.type", other, "is none of a, b and c")),
    };
    let access = if rule.access.is_empty() { "rwm".to_owned() } else { rule.access.clone() };
    if !access.bytes().all(|letter| b"rwm".contains(&letter)) {
        return Err(PlanError::invalid("resources.devices.access", access, "has a letter beside r, w and m"));
    }
    let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
    Ok(DeviceRule { allow: rule.allow, kind, major: number(rule.major), minor: number(rule.minor), access })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_devices_are_taken_and_those_of_leaves_refused() {
        let limits = |io: serde_json::Value| {
            let resources = serde_json::json!({ "blockIO": io, "memory": { "checkBeforeUpdate": true } });
            limits(&serde_json::from_value(resources).unwrap())
        };
        let taken =
            limits(serde_json::json!({ "weightDevice": [{ "major": 8, "minor": 16, "weight": 200 }] })).unwrap();
        assert_eq!((taken.io_weights, taken.checks_usage), (vec![((8, 16), 200)], true));
        for io in [
            serde_json::json!({ "leafWeight": 10 }),
            serde_json::json!({ "weightDevice": [{ "major": 8, "minor": 16, "leafWeight": 10 }] }),
        ] {
            assert!(limits(io).unwrap_err().to_string().contains("leafWeight"));
        }
    }

    #[test]
    fn default_devices_survive_a_denial_of_all() {
        let devices = vec![oci::DeviceRule { allow: false, access: "rwm".into(), ..oci::DeviceRule::default() }];
        let rules = device_rules(&oci::Resources { devices, ..oci::Resources::default() }).unwrap();
        assert_eq!((rules[0].allow, rules[0].kind), (false, 'a'));
        let last =
            |major, minor| rules.iter().rev().find(|rule| rule.major == Some(major) && rule.minor == Some(minor));
        assert!(last(1, 3).is_some_and(|rule| rule.allow));
    }
}
