//! What plugins want, put into a container's configuration. What this runtime cannot do is refused by name (R5).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use executor::oci;
use nri::{api, removal};

use crate::spec::{self, ContainerSpec, Host, SpecError};

fn unsupported(feature: &str) -> SpecError {
    SpecError::Unsupported {
        feature: format!("{feature}, which an NRI plugin asks for,"),
        reason: "this runtime does not set it; change the plugin's configuration, or take the pod to another node",
    }
}

fn refuse(wanted: bool, feature: &str) -> Result<(), SpecError> {
    if wanted { Err(unsupported(feature)) } else { Ok(()) }
}

/// Changes a configuration as plugins want it.
///
/// # Errors
/// The first that cannot be.
pub(super) fn adjust(
    spec: &mut ContainerSpec,
    wanted: &api::ContainerAdjustment,
    host: &Host,
) -> Result<(), SpecError> {
    let has_text = spec.raw_environment.is_empty();
    refuse(!wanted.env.is_empty() && !has_text, "a variable beside others that are not UTF-8")?;
    let oci = &mut spec.oci;
    let (gone, set) = parted(&wanted.annotations);
    oci.annotations.retain(|name, _| !gone.contains(&name.as_str()));
    oci.annotations.extend(set.into_iter().map(|(name, value)| (name.clone(), value.clone())));
    mounts(&mut oci.mounts, &wanted.mounts);
    let process = oci.process.get_or_insert_default();
    environment(&mut process.env, &wanted.env);
    if !wanted.args.is_empty() {
        process.args.clone_from(&wanted.args);
    }
    for limit in &wanted.rlimits {
        process.rlimits.retain(|one| one.kind != limit.r#type);
        process.rlimits.push(oci::Rlimit { kind: limit.r#type.clone(), hard: limit.hard, soft: limit.soft });
    }
    if let Some(wanted) = wanted.hooks.as_ref().filter(|hooks| **hooks != api::Hooks::default()) {
        hooks(oci.hooks.get_or_insert_default(), wanted)?;
    }
    if let Some(wanted) = &wanted.linux {
        linux(oci, wanted, host)?;
    }
    let names: Vec<&str> = wanted.cdi_devices.iter().map(|device| device.name.as_str()).collect();
    spec::add_cdi(oci, &names)
}

/// What goes, and what is set afterwards: a map has no order, and may hold both of one name.
fn parted(wanted: &HashMap<String, String>) -> (Vec<&str>, Vec<(&String, &String)>) {
    let gone = wanted.keys().filter_map(|name| removal(name)).collect();
    (gone, wanted.iter().filter(|(name, _)| removal(name).is_none()).collect())
}

/// Those of the same place are replaced; parents come before what lies in them.
fn mounts(list: &mut Vec<oci::Mount>, wanted: &[api::Mount]) {
    for mount in wanted {
        let at = removal(&mount.destination).unwrap_or(&mount.destination);
        list.retain(|one| one.destination != at);
        if removal(&mount.destination).is_none() {
            list.push(oci::Mount {
                destination: mount.destination.clone(),
                kind: mount.r#type.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
                ..oci::Mount::default()
            });
        }
    }
    if !wanted.is_empty() {
        list.sort_by_key(|mount| Path::new(&mount.destination).components().count());
    }
}

fn environment(list: &mut Vec<String>, wanted: &[api::KeyValue]) {
    for variable in wanted {
        let key = removal(&variable.key).unwrap_or(&variable.key);
        let at = list.iter().position(|entry| entry.strip_prefix(key).is_some_and(|rest| rest.starts_with('=')));
        match (at, removal(&variable.key)) {
            (Some(at), Some(_)) => drop(list.remove(at)),
            (None, Some(_)) => {}
            (Some(at), None) => list[at] = format!("{key}={}", variable.value),
            (None, None) => list.push(format!("{key}={}", variable.value)),
        }
    }
}

/// Of the stages that are run in the container's own process.
fn hooks(to: &mut oci::Hooks, wanted: &api::Hooks) -> Result<(), SpecError> {
    for (stage, hooks) in [
        ("prestart", &wanted.prestart),
        ("createRuntime", &wanted.create_runtime),
        ("poststart", &wanted.poststart),
        ("poststop", &wanted.poststop),
    ] {
        refuse(!hooks.is_empty(), &format!("a hook of the stage {stage}"))?;
    }
    let hook = |hook: &api::Hook| oci::Hook {
        path: PathBuf::from(&hook.path),
        args: hook.args.clone(),
        env: hook.env.clone(),
        timeout: hook.timeout.as_ref().and_then(|timeout| u32::try_from(timeout.value).ok()),
    };
    to.create_container.extend(wanted.create_container.iter().map(hook));
    to.start_container.extend(wanted.start_container.iter().map(hook));
    Ok(())
}

fn linux(spec: &mut oci::Spec, wanted: &api::LinuxContainerAdjustment, host: &Host) -> Result<(), SpecError> {
    refuse(!wanted.cgroups_path.is_empty(), "another control group")?;
    refuse(!wanted.namespaces.is_empty(), "another namespace")?;
    refuse(!wanted.net_devices.is_empty(), "a network device")?;
    refuse(wanted.rdt.is_some(), "a class of Intel RDT")?;
    refuse(wanted.memory_policy.is_some(), "a memory policy")?;
    let process = spec.process.get_or_insert_default();
    if let Some(score) = &wanted.oom_score_adj {
        let invalid = || SpecError::invalid("oom_score_adj", score.value, "is not between -1000 and 1000");
        let score = i32::try_from(score.value).ok().filter(|score| (-1000..=1000).contains(score));
        process.oom_score_adj = Some(score.ok_or_else(invalid)?);
    }
    if let Some(priority) = &wanted.io_priority {
        let class = priority.class().as_str_name();
        process.io_priority = (class != "IOPRIO_CLASS_NONE")
            .then(|| oci::IoPriority { class: class.to_owned(), priority: priority.priority });
    }
    if let Some(scheduler) = &wanted.scheduler {
        let known = api::LinuxSchedulerPolicy::try_from(scheduler.policy);
        refuse(known.is_err(), "an unknown scheduling policy")?;
        let policy = known.ok().filter(|policy| *policy != api::LinuxSchedulerPolicy::SchedNone);
        process.scheduler = policy.map(|policy| oci::Scheduler {
            policy: policy.as_str_name().to_owned(),
            nice: Some(scheduler.nice),
            priority: Some(scheduler.priority),
            flags: scheduler.flags().map(|flag| flag.as_str_name().to_owned()).collect(),
            runtime: Some(scheduler.runtime).filter(|time| *time != 0),
            deadline: Some(scheduler.deadline).filter(|time| *time != 0),
            period: Some(scheduler.period).filter(|time| *time != 0),
        });
    }
    let linux = spec.linux.get_or_insert_default();
    let (gone, set) = parted(&wanted.sysctl);
    linux.sysctl.retain(|name, _| !gone.contains(&name.as_str()));
    for (name, value) in set {
        linux.sysctl.insert(spec::container_sysctl(linux, name)?, value.clone());
    }
    if let Some(policy) = &wanted.seccomp_policy {
        linux.seccomp = Some(seccomp(policy));
    }
    devices(linux, &wanted.devices)?;
    if let Some(limits) = &wanted.resources {
        let known = linux.resources.get_or_insert_default();
        merge(known, resources(limits)?);
        for rule in &limits.devices {
            known.devices.push(device_rule(rule)?);
        }
        refuse(!known.unified.is_empty() && !host.facts.unified_cgroups, "resources.unified on version 1")?;
    }
    Ok(())
}

fn devices(linux: &mut oci::Linux, wanted: &[api::LinuxDevice]) -> Result<(), SpecError> {
    let is_mapped = !linux.uid_mappings.is_empty();
    for device in wanted {
        let at = removal(&device.path).unwrap_or(&device.path);
        linux.devices.retain(|one| one.path != at);
        if removal(&device.path).is_some() {
            continue;
        }
        refuse(is_mapped, "a device in a user namespace")?;
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| SpecError::invalid("devices", &device.path, "has a number that cannot be"))
        };
        let node = oci::Device {
            path: device.path.clone(),
            kind: device.r#type.clone(),
            major: number(device.major)?,
            minor: number(device.minor)?,
            file_mode: device.file_mode.as_ref().map(|mode| mode.value),
            uid: device.uid.as_ref().map(|uid| uid.value),
            gid: device.gid.as_ref().map(|gid| gid.value),
        };
        linux.resources.get_or_insert_default().devices.push(oci::DeviceRule {
            allow: true,
            kind: node.kind.clone(),
            major: Some(device.major),
            minor: Some(device.minor),
            access: "rwm".to_owned(),
        });
        linux.devices.push(node);
    }
    Ok(())
}

/// A number that cannot be must not become any number.
fn device_rule(rule: &api::LinuxDeviceCgroup) -> Result<oci::DeviceRule, SpecError> {
    let number = |number: &Option<api::OptionalInt64>| match number.as_ref().map(|number| number.value) {
        None | Some(-1) => Ok(None), // Any.
        Some(value) if u32::try_from(value).is_ok() => Ok(Some(value)),
        Some(value) => Err(SpecError::invalid("resources.devices", value, "is a number that cannot be")),
    };
    Ok(oci::DeviceRule {
        allow: rule.allow,
        kind: rule.r#type.clone(),
        major: number(&rule.major)?,
        minor: number(&rule.minor)?,
        access: rule.access.clone(),
    })
}

fn seccomp(policy: &api::LinuxSeccomp) -> oci::Seccomp {
    let argument = |argument: &api::LinuxSeccompArg| oci::SyscallArg {
        index: argument.index,
        value: argument.value,
        value_two: argument.value_two,
        op: argument.op.clone(),
    };
    let call = |call: &api::LinuxSyscall| oci::Syscall {
        names: call.names.clone(),
        action: call.action.clone(),
        errno_ret: call.errno_ret.as_ref().map(|errno| errno.value),
        args: call.args.iter().map(argument).collect(),
    };
    oci::Seccomp {
        default_action: policy.default_action.clone(),
        default_errno_ret: policy.default_errno.as_ref().map(|errno| errno.value),
        architectures: policy.architectures.clone(),
        flags: policy.flags.clone(),
        listener_path: policy.listener_path.clone(),
        listener_metadata: policy.listener_metadata.clone(),
        syscalls: policy.syscalls.iter().map(call).collect(),
    }
}

/// Limits as plugins have them, all but the rules of devices.
///
/// # Errors
/// One that this runtime does not set.
pub(super) fn resources(wanted: &api::LinuxResources) -> Result<oci::Resources, SpecError> {
    refuse(wanted.blockio_class.as_ref().is_some_and(|class| !class.value.is_empty()), "a class of block IO")?;
    refuse(wanted.rdt_class.as_ref().is_some_and(|class| !class.value.is_empty()), "a class of Intel RDT")?;
    if let Some(memory) = &wanted.memory {
        refuse(memory.kernel.is_some() || memory.kernel_tcp.is_some(), "a limit of the kernel's memory")?;
    }
    let memory = wanted.memory.as_ref().map(|memory| oci::Memory {
        limit: memory.limit.as_ref().map(|limit| limit.value),
        reservation: memory.reservation.as_ref().map(|limit| limit.value),
        swap: memory.swap.as_ref().map(|limit| limit.value),
        swappiness: memory.swappiness.as_ref().map(|limit| limit.value),
        disable_oom_killer: memory.disable_oom_killer.as_ref().map(|one| one.value),
        check_before_update: None,
    });
    let cpu = wanted.cpu.as_ref().map(|cpu| oci::Cpu {
        shares: cpu.shares.as_ref().map(|shares| shares.value),
        quota: cpu.quota.as_ref().map(|quota| quota.value),
        period: cpu.period.as_ref().map(|period| period.value),
        realtime_runtime: cpu.realtime_runtime.as_ref().map(|time| time.value),
        realtime_period: cpu.realtime_period.as_ref().map(|time| time.value),
        cpus: cpu.cpus.clone(),
        mems: cpu.mems.clone(),
        ..oci::Cpu::default()
    });
    let hugepage =
        |limit: &api::HugepageLimit| oci::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit };
    Ok(oci::Resources {
        memory,
        cpu,
        pids: wanted.pids.as_ref().map(|pids| oci::Pids { limit: Some(pids.limit) }),
        hugepage_limits: wanted.hugepage_limits.iter().map(hugepage).collect(),
        unified: wanted.unified.clone().into_iter().collect::<BTreeMap<_, _>>(),
        ..oci::Resources::default()
    })
}

/// Takes what `new` sets.
pub(crate) fn merge(known: &mut oci::Resources, new: oci::Resources) {
    if let Some(new) = new.memory {
        let known = known.memory.get_or_insert_default();
        known.limit = new.limit.or(known.limit);
        known.reservation = new.reservation.or(known.reservation);
        // Memory and swap together: a limit of both that is below one of memory is none.
        known.swap = new.swap.or(if new.limit.is_some() { new.limit } else { known.swap });
        known.swappiness = new.swappiness.or(known.swappiness);
        known.disable_oom_killer = new.disable_oom_killer.or(known.disable_oom_killer);
    }
    if let Some(new) = new.cpu {
        let known = known.cpu.get_or_insert_default();
        known.shares = new.shares.or(known.shares);
        known.quota = new.quota.or(known.quota);
        known.period = new.period.or(known.period);
        known.realtime_runtime = new.realtime_runtime.or(known.realtime_runtime);
        known.realtime_period = new.realtime_period.or(known.realtime_period);
        if !new.cpus.is_empty() {
            known.cpus = new.cpus;
        }
        if !new.mems.is_empty() {
            known.mems = new.mems;
        }
    }
    known.pids = new.pids.or(known.pids.take());
    for limit in new.hugepage_limits {
        known.hugepage_limits.retain(|one| one.page_size != limit.page_size);
        known.hugepage_limits.push(limit);
    }
    known.unified.extend(new.unified);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(wanted: &api::ContainerAdjustment) -> Result<oci::Spec, String> {
        let mut spec = ContainerSpec::default();
        let process = spec.oci.process.get_or_insert_default();
        process.env = vec!["A=1".to_owned(), "B=2".to_owned()];
        process.args = vec!["sleep".to_owned()];
        spec.oci.mounts =
            ["/a", "/a/b", "/c"].map(|at| oci::Mount { destination: at.to_owned(), ..Default::default() }).into();
        adjusted_from(spec, wanted)
    }

    fn adjusted_from(mut spec: ContainerSpec, wanted: &api::ContainerAdjustment) -> Result<oci::Spec, String> {
        adjust(&mut spec, wanted, &Host::default()).map(|()| spec.oci).map_err(|error| error.to_string())
    }

    fn of_linux(linux: api::LinuxContainerAdjustment) -> api::ContainerAdjustment {
        api::ContainerAdjustment { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn what_plugins_want_is_there() {
        let variable = |key: &str, value: &str| api::KeyValue { key: key.to_owned(), value: value.to_owned() };
        let mount =
            |at: &str| api::Mount { destination: at.to_owned(), source: "/host".to_owned(), ..Default::default() };
        let limits = api::LinuxResources {
            memory: Some(api::LinuxMemory { limit: Some(api::OptionalInt64 { value: 7 }), ..Default::default() }),
            pids: Some(api::LinuxPids { limit: 9 }),
            ..Default::default()
        };
        let wanted = api::ContainerAdjustment {
            env: vec![variable("-A", ""), variable("B", "two"), variable("C", "3")],
            mounts: vec![mount("-/c"), mount("/a/b"), mount("/d")],
            args: vec!["true".to_owned()],
            rlimits: vec![api::PosixRlimit { r#type: "RLIMIT_NOFILE".to_owned(), hard: 5, soft: 4 }],
            ..of_linux(api::LinuxContainerAdjustment {
                resources: Some(limits),
                oom_score_adj: Some(api::OptionalInt { value: -5 }),
                ..Default::default()
            })
        };
        let spec = adjusted(&wanted).unwrap();
        let process = spec.process.unwrap();
        assert_eq!((process.env, process.args), (vec!["B=two".into(), "C=3".into()], vec!["true".to_owned()]));
        assert_eq!((process.rlimits[0].hard, process.oom_score_adj), (5, Some(-5)));
        let at: Vec<&str> = spec.mounts.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(at, ["/a", "/d", "/a/b"]);
        let limits = spec.linux.unwrap().resources.unwrap();
        let memory = limits.memory.unwrap();
        assert_eq!((memory.limit, memory.swap, limits.pids.unwrap().limit), (Some(7), Some(7), Some(9)));
    }

    /// A container in these namespaces of its pod.
    fn container_in(kinds: &[oci::NamespaceKind]) -> ContainerSpec {
        let mut spec = ContainerSpec::default();
        let joined = |kind: &oci::NamespaceKind| oci::Namespace { kind: *kind, path: "/run/it".to_owned() };
        spec.oci.linux.get_or_insert_default().namespaces = kinds.iter().map(joined).collect();
        spec
    }

    #[test]
    fn no_kernel_parameter_of_the_host_is_set() {
        use executor::oci::NamespaceKind::{Ipc, Network};
        let set = |kinds: &[oci::NamespaceKind], name: &str| {
            let sysctl = [(name.to_owned(), "1".to_owned())].into();
            let wanted = of_linux(api::LinuxContainerAdjustment { sysctl, ..Default::default() });
            let spec = adjusted_from(container_in(kinds), &wanted)?;
            Ok::<_, String>(spec.linux.unwrap().sysctl.into_keys().collect::<Vec<_>>())
        };
        for (own, name) in
            [(Network, "net.core.somaxconn"), (Ipc, "kernel.shmmax"), (Ipc, "kernel.sem"), (Ipc, "fs.mqueue.msg_max")]
        {
            let other = if own == Network { Ipc } else { Network };
            assert_eq!(set(&[own], name).unwrap(), [name]);
            for kinds in [&[][..], &[other]] {
                assert!(set(kinds, name).unwrap_err().contains("belongs to the host"), "{name}");
            }
        }
        assert_eq!(set(&[Network], "net/core/somaxconn").unwrap(), ["net.core.somaxconn"]);
        assert!(set(&[], "net/core/somaxconn").unwrap_err().contains("belongs to the host"));
        assert!(set(&[Network, Ipc], "kernel.panic").unwrap_err().contains("whole host"));
    }

    #[test]
    fn what_is_removed_and_set_is_set() {
        // Many, as maps order them at random.
        let names: Vec<String> = (0..32).map(|number| format!("net.{number}")).collect();
        let both =
            names.iter().flat_map(|name| [(format!("-{name}"), String::new()), (name.clone(), "new".to_owned())]);
        let wanted: HashMap<_, _> = both.chain([("-net.gone".to_owned(), String::new())]).collect();
        let mut before = container_in(&[oci::NamespaceKind::Network]);
        let known: BTreeMap<_, _> =
            ["net.0", "net.gone", "net.kept"].map(|name| (name.to_owned(), "old".to_owned())).into();
        before.oci.annotations.clone_from(&known);
        before.oci.linux.get_or_insert_default().sysctl = known;
        let wanted = api::ContainerAdjustment {
            annotations: wanted.clone(),
            ..of_linux(api::LinuxContainerAdjustment { sysctl: wanted, ..Default::default() })
        };
        let spec = adjusted_from(before, &wanted).unwrap();
        let kept = [("net.kept".to_owned(), "old".to_owned())];
        let expect: BTreeMap<_, _> = names.into_iter().map(|name| (name, "new".to_owned())).chain(kept).collect();
        assert_eq!(spec.annotations, expect);
        assert_eq!(spec.linux.unwrap().sysctl, expect);
    }

    #[test]
    fn a_scheduler_can_be_none() {
        let scheduled = |policy| {
            let scheduler = Some(api::LinuxScheduler { policy, nice: 3, ..Default::default() });
            let wanted = of_linux(api::LinuxContainerAdjustment { scheduler, ..Default::default() });
            let mut before = ContainerSpec::default();
            before.oci.process.get_or_insert_default().scheduler =
                Some(oci::Scheduler { policy: "SCHED_IDLE".to_owned(), ..Default::default() });
            adjusted_from(before, &wanted).map(|spec| spec.process.unwrap().scheduler.map(|one| one.policy))
        };
        assert_eq!(scheduled(api::LinuxSchedulerPolicy::SchedNone.into()).unwrap(), None);
        assert_eq!(scheduled(api::LinuxSchedulerPolicy::SchedBatch.into()).unwrap().as_deref(), Some("SCHED_BATCH"));
        assert!(scheduled(77).unwrap_err().contains("an unknown scheduling policy"));
    }

    #[test]
    fn rules_of_devices_come_after_those_before() {
        let ruled = |major, minor| {
            let number = |value| Some(api::OptionalInt64 { value });
            let rule = api::LinuxDeviceCgroup {
                allow: true,
                r#type: "c".to_owned(),
                major: number(major),
                minor: number(minor),
                access: "rw".to_owned(),
            };
            let resources = Some(api::LinuxResources { devices: vec![rule], ..Default::default() });
            let wanted = of_linux(api::LinuxContainerAdjustment { resources, ..Default::default() });
            let mut before = ContainerSpec::default();
            let limits = before.oci.linux.get_or_insert_default().resources.get_or_insert_default();
            limits.devices.push(oci::DeviceRule::default());
            adjusted_from(before, &wanted).map(|spec| spec.linux.unwrap().resources.unwrap().devices)
        };
        let rule = |minor| oci::DeviceRule {
            allow: true,
            kind: "c".to_owned(),
            major: Some(10),
            minor,
            access: "rw".to_owned(),
        };
        assert_eq!(ruled(10, 200).unwrap(), [oci::DeviceRule::default(), rule(Some(200))]);
        assert_eq!(ruled(10, -1).unwrap(), [oci::DeviceRule::default(), rule(None)]);
        assert!(ruled(10, 1 << 32).unwrap_err().contains("cannot be"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let group = api::LinuxContainerAdjustment { cgroups_path: "/x".to_owned(), ..Default::default() };
        assert!(adjusted(&of_linux(group)).unwrap_err().contains("another control group"));
        let hooks = api::Hooks { prestart: vec![api::Hook::default()], ..Default::default() };
        let wanted = api::ContainerAdjustment { hooks: Some(hooks), ..Default::default() };
        assert!(adjusted(&wanted).unwrap_err().contains("a hook of the stage prestart"));
    }
}
