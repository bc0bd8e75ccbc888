//! `update`: other limits for a container that runs.

use std::io::Read as _;
use std::path::Path;

use executor::oci::{BlockIo, Cpu, Memory, Pids, Resources};

use crate::args::UpdateOptions;
use crate::container::{Container, Status};
use crate::context::Context;
use crate::error::Error;

pub(crate) fn run(context: &Context, options: &UpdateOptions) -> Result<(), Error> {
    let mut container = Container::load(context, &options.id)?;
    if container.status() == Status::Stopped {
        return Err(Error::NotRunning);
    }
    if options.l3_cache_schema.is_some() || options.mem_bw_schema.is_some() {
        return Err(Error::Invalid("Intel RDT is not supported".to_owned()));
    }
    let mut wanted = match &options.resources {
        Some(path) => read(path)?,
        None => from_flags(options)?,
    };
    let had = container.record.spec.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    complete(&mut wanted, had.and_then(|had| had.memory.as_ref()));
    let none = || Error::Invalid("the container has no control group to limit".to_owned());
    crate::cgroups::check_resources(Some(&wanted))?;
    let (group, limits) = (container.group().ok_or_else(none)?, executor::limits(&wanted)?);
    if let Some(unit) = &container.record.unit {
        unit.set(&limits)?;
    }
    group.set(&limits)?;
    if let Some(linux) = &mut container.record.spec.linux {
        let had = linux.resources.take().unwrap_or_default();
        linux.resources = Some(merged(had, wanted));
    }
    container.place.write(&container.record)
}

fn read(path: &Path) -> Result<Resources, Error> {
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut bytes).map_err(Error::file("read", "standard input"))?;
    } else {
        bytes = std::fs::read(path).map_err(Error::file("read", path))?;
    }
    crate::spec::parse(&bytes).map_err(Error::json(path))
}

fn from_flags(options: &UpdateOptions) -> Result<Resources, Error> {
    let bytes = |option: &Option<String>| option.as_deref().map(parse_bytes).transpose();
    let cpu = Cpu {
        shares: options.cpu_share,
        quota: options.cpu_quota,
        period: options.cpu_period,
        burst: options.cpu_burst,
        cpus: options.cpuset_cpus.clone().unwrap_or_default(),
        mems: options.cpuset_mems.clone().unwrap_or_default(),
        idle: options.cpu_idle,
        realtime_runtime: options.cpu_rt_runtime,
        realtime_period: options.cpu_rt_period,
    };
    let memory = Memory {
        limit: bytes(&options.memory)?,
        reservation: bytes(&options.memory_reservation)?,
        swap: bytes(&options.memory_swap)?,
        ..Memory::default()
    };
    Ok(Resources {
        cpu: Some(cpu),
        memory: Some(memory),
        pids: options.pids_limit.map(|limit| Pids { limit: Some(limit) }),
        block_io: options.blkio_weight.map(|weight| BlockIo { weight: Some(weight), ..BlockIo::default() }),
        ..Resources::default()
    })
}

/// The limits of memory and of memory with swap go together: version 2 has one for swap alone, which is their difference.
fn complete(wanted: &mut Resources, had: Option<&Memory>) {
    let (Some(memory), Some(had)) = (&mut wanted.memory, had) else { return };
    if memory.limit.is_some() != memory.swap.is_some() {
        memory.limit = memory.limit.or(had.limit);
        memory.swap = memory.swap.or(had.swap);
    }
}

/// Bytes, or a number with a unit of 1024: `64m`, `1GiB`, `-1`.
fn parse_bytes(text: &str) -> Result<i64, Error> {
    let wrong = || Error::Invalid(format!("invalid value {text:?} for a size in bytes"));
    if text == "-1" {
        return Ok(-1);
    }
    let lower = text.trim().to_ascii_lowercase();
    let split = lower.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(split);
    let factor: i64 = match unit.trim() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.parse::<i64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(wrong)
}

/// What was, with what is new in its place.
fn merged(had: Resources, new: Resources) -> Resources {
    let (had_cpu, cpu) = (had.cpu.unwrap_or_default(), new.cpu.unwrap_or_default());
    let (had_memory, memory) = (had.memory.unwrap_or_default(), new.memory.unwrap_or_default());
    let or = |new: String, had: String| if new.is_empty() { had } else { new };
    let mut unified = had.unified;
    unified.extend(new.unified);
    Resources {
        cpu: Some(Cpu {
            shares: cpu.shares.or(had_cpu.shares),
            quota: cpu.quota.or(had_cpu.quota),
            period: cpu.period.or(had_cpu.period),
            burst: cpu.burst.or(had_cpu.burst),
            cpus: or(cpu.cpus, had_cpu.cpus),
            mems: or(cpu.mems, had_cpu.mems),
            idle: cpu.idle.or(had_cpu.idle),
            realtime_runtime: cpu.realtime_runtime.or(had_cpu.realtime_runtime),
            realtime_period: cpu.realtime_period.or(had_cpu.realtime_period),
        }),
        memory: Some(Memory {
            limit: memory.limit.or(had_memory.limit),
            reservation: memory.reservation.or(had_memory.reservation),
            swap: memory.swap.or(had_memory.swap),
            swappiness: memory.swappiness.or(had_memory.swappiness),
            disable_oom_killer: memory.disable_oom_killer.or(had_memory.disable_oom_killer),
            check_before_update: memory.check_before_update.or(had_memory.check_before_update),
        }),
        pids: new.pids.or(had.pids),
        block_io: new.block_io.or(had.block_io),
        hugepage_limits: if new.hugepage_limits.is_empty() { had.hugepage_limits } else { new.hugepage_limits },
        network: new.network.or(had.network),
        rdma: if new.rdma.is_empty() { had.rdma } else { new.rdma },
        devices: had.devices,
        unified,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, expect) in [("1024", 1024), ("64m", 64 << 20), ("1GiB", 1 << 30), ("-1", -1), ("2 kb", 2048)] {
            assert_eq!(parse_bytes(text).unwrap(), expect, "{text}");
        }
        for wrong in ["", "m", "1x", "-5", "9999999999999t"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_and_swap_are_limited_together() {
        let memory = |limit, swap| Memory { limit, swap, ..Memory::default() };
        let had = memory(Some(40), Some(60));
        for (wanted, limit, swap) in [
            (memory(Some(50), None), Some(50), Some(60)),
            (memory(None, Some(70)), Some(40), Some(70)),
            (memory(Some(1), Some(2)), Some(1), Some(2)),
            (memory(None, None), None, None),
        ] {
            let mut wanted = Resources { memory: Some(wanted), ..Resources::default() };
            complete(&mut wanted, Some(&had));
            let memory = wanted.memory.unwrap();
            assert_eq!((memory.limit, memory.swap), (limit, swap));
        }
    }

    #[test]
    fn what_is_not_named_stays() {
        let had: Resources = serde_json::from_str(r#"{"cpu":{"shares":2,"quota":5},"pids":{"limit":7}}"#).unwrap();
        let new: Resources = serde_json::from_str(r#"{"cpu":{"quota":9},"memory":{"limit":1}}"#).unwrap();
        let merged = merged(had, new);
        let cpu = merged.cpu.unwrap();
        assert_eq!((cpu.shares, cpu.quota), (Some(2), Some(9)));
        assert_eq!((merged.memory.unwrap().limit, merged.pids.unwrap().limit), (Some(1), Some(7)));
    }
}
