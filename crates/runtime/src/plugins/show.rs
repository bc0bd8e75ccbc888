//! Pods and containers as plugins see them.

use executor::oci;
use nri::api;

use crate::container::{Container, Phase};
use crate::sandbox::Sandbox;
use crate::spec;

pub(super) fn pod(sandbox: &Sandbox) -> api::PodSandbox {
    let metadata = sandbox.metadata();
    let config = &sandbox.config;
    let linux = config.linux.clone().unwrap_or_default();
    let (ips, pid) = {
        let live = sandbox.live();
        (live.ips.clone(), live.keeper_pid)
    };
    let limits = |of: Option<&cri::v1::LinuxContainerResources>| {
        // What is wrong with them is told where they are set.
        of.and_then(|one| spec::resources(one, &spec::Host::default()).ok()).map(|one| resources(&one))
    };
    api::PodSandbox {
        id: sandbox.id.clone(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        runtime_handler: sandbox.handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: limits(linux.overhead.as_ref()),
            pod_resources: limits(linux.resources.as_ref()),
            cgroup_parent: linux.cgroup_parent,
            cgroups_path: format!("/{}", sandbox.group.path().display()),
            ..api::LinuxPodSandbox::default()
        }),
        pid,
        ips,
    }
}

/// A container; `spec` is its configuration, where there is one already.
pub(super) fn container(container: &Container, spec: Option<&oci::Spec>) -> api::Container {
    let record = container.record().clone();
    let config = record.config.unwrap_or_default();
    let (pid, started_at) = {
        let live = container.live();
        (live.pid.unwrap_or(0), live.started_at)
    };
    let end = record.end.unwrap_or_default();
    let none = oci::Spec::default();
    let spec = spec.unwrap_or(&none);
    let process = spec.process.clone().unwrap_or_default();
    let labels = config.labels.into_iter().collect();
    api::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.sandbox.upgrade().map(|sandbox| sandbox.id.clone()).unwrap_or_default(),
        name: container.name.name.clone(),
        state: state(container.phase()).into(),
        labels,
        // Those of the request, and what the configuration has of the pod.
        annotations: config.annotations.into_iter().chain(spec.annotations.clone()).collect(),
        args: process.args,
        env: process.env,
        mounts: spec.mounts.iter().map(mount).collect(),
        hooks: spec.hooks.as_ref().map(hooks),
        linux: Some(linux(spec)),
        pid,
        rlimits: process.rlimits.iter().map(rlimit).collect(),
        created_at: record.created_at,
        started_at: if started_at == 0 { end.started_at } else { started_at },
        finished_at: end.finished_at,
        exit_code: end.exit_code,
        status_reason: end.reason,
        status_message: end.message,
        cdi_devices: config.cdi_devices.into_iter().map(|device| api::CdiDevice { name: device.name }).collect(),
        user: Some(api::User {
            uid: process.user.uid,
            gid: process.user.gid,
            additional_gids: process.user.additional_gids,
        }),
        image: Some(api::Image {
            name: config.image.map(|image| image.image).unwrap_or_default(),
            digest: record.image_ref.rsplit_once('@').map(|(_, digest)| digest.to_owned()).unwrap_or_default(),
            config_digest: record.image_id,
        }),
    }
}

fn state(phase: Phase) -> api::ContainerState {
    match phase {
        Phase::Making => api::ContainerState::ContainerUnknown,
        Phase::Created | Phase::Starting => api::ContainerState::ContainerCreated,
        Phase::Running => api::ContainerState::ContainerRunning,
        Phase::Exited => api::ContainerState::ContainerStopped,
    }
}

fn mount(mount: &oci::Mount) -> api::Mount {
    api::Mount {
        destination: mount.destination.clone(),
        r#type: mount.kind.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    }
}

fn hooks(hooks: &oci::Hooks) -> api::Hooks {
    let all = |hooks: &[oci::Hook]| hooks.iter().map(hook).collect();
    api::Hooks {
        prestart: all(&hooks.prestart),
        create_runtime: all(&hooks.create_runtime),
        create_container: all(&hooks.create_container),
        start_container: all(&hooks.start_container),
        poststart: all(&hooks.poststart),
        poststop: all(&hooks.poststop),
    }
}

fn hook(hook: &oci::Hook) -> api::Hook {
    api::Hook {
        path: hook.path.to_string_lossy().into_owned(),
        args: hook.args.clone(),
        env: hook.env.clone(),
        timeout: hook.timeout.map(|seconds| api::OptionalInt { value: seconds.into() }),
    }
}

fn rlimit(limit: &oci::Rlimit) -> api::PosixRlimit {
    api::PosixRlimit { r#type: limit.kind.clone(), hard: limit.hard, soft: limit.soft }
}

fn linux(spec: &oci::Spec) -> api::LinuxContainer {
    let linux = spec.linux.clone().unwrap_or_default();
    let score = spec.process.as_ref().and_then(|process| process.oom_score_adj);
    api::LinuxContainer {
        namespaces: linux.namespaces.iter().map(namespace).collect(),
        devices: linux.devices.iter().map(device).collect(),
        resources: linux.resources.as_ref().map(resources),
        oom_score_adj: score.map(|score| api::OptionalInt { value: score.into() }),
        cgroups_path: format!("/{}", linux.cgroups_path.trim_start_matches('/')),
        sysctl: linux.sysctl.into_iter().collect(),
        ..api::LinuxContainer::default()
    }
}

fn namespace(namespace: &oci::Namespace) -> api::LinuxNamespace {
    let kind = serde_json::to_value(namespace.kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
    api::LinuxNamespace { r#type: kind.unwrap_or_default(), path: namespace.path.clone() }
}

fn device(device: &oci::Device) -> api::LinuxDevice {
    api::LinuxDevice {
        path: device.path.clone(),
        r#type: device.kind.clone(),
        major: device.major.into(),
        minor: device.minor.into(),
        file_mode: device.file_mode.map(|value| api::OptionalFileMode { value }),
        uid: device.uid.map(|value| api::OptionalUInt32 { value }),
        gid: device.gid.map(|value| api::OptionalUInt32 { value }),
    }
}

/// Limits.
pub(super) fn resources(limits: &oci::Resources) -> api::LinuxResources {
    let signed = |value: Option<i64>| value.map(|value| api::OptionalInt64 { value });
    let unsigned = |value: Option<u64>| value.map(|value| api::OptionalUInt64 { value });
    let cpu = limits.cpu.as_ref().map(|cpu| api::LinuxCpu {
        shares: unsigned(cpu.shares),
        quota: signed(cpu.quota),
        period: unsigned(cpu.period),
        cpus: cpu.cpus.clone(),
        mems: cpu.mems.clone(),
        ..api::LinuxCpu::default()
    });
    let memory = limits.memory.as_ref().map(|memory| api::LinuxMemory {
        limit: signed(memory.limit),
        reservation: signed(memory.reservation),
        swap: signed(memory.swap),
        swappiness: unsigned(memory.swappiness),
        ..api::LinuxMemory::default()
    });
    let hugepage =
        |limit: &oci::HugepageLimit| api::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit };
    api::LinuxResources {
        memory,
        cpu,
        hugepage_limits: limits.hugepage_limits.iter().map(hugepage).collect(),
        unified: limits.unified.clone().into_iter().collect(),
        ..api::LinuxResources::default()
    }
}
