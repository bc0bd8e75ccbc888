//! What a container may do: the security contexts of pod and container, merged (the container's wins).

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use cri::v1;
use cri::v1::{LinuxContainerSecurityContext, LinuxSandboxSecurityContext, NamespaceMode};
use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, SeccompProfile, SecurityContext,
};
use pod::spec;

use super::{Config, Request};
use crate::apparmor;

/// Why a security context cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecurityError {
    /// `runAsNonRoot` and `runAsUser: 0` together.
    #[error("container's runAsUser breaks non-root policy (pod: {pod:?}, container: {container})")]
    RunAsRoot {
        /// The pod.
        pod: String,
        /// The container.
        container: String,
    },
    /// `runAsNonRoot` with an image of root.
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    ImageRunsAsRoot {
        /// The pod.
        pod: String,
        /// The container.
        container: String,
    },
    /// `runAsNonRoot` with an image whose user is a name.
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: {container})"
    )]
    NamedUser {
        /// The pod.
        pod: String,
        /// The container.
        container: String,
        /// The name.
        user: String,
    },
    /// A profile of type `Localhost` without a file.
    #[error("localhostProfile must be set if {0} type is Localhost")]
    NoProfile(&'static str),
    /// Not a policy.
    #[error("unsupported supplementalGroupsPolicy: {0}")]
    GroupsPolicy(String),
}

/// The user that an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUser {
    /// By number; an image that names none runs as 0.
    Id(i64),
    /// By name, which only the image's own `/etc/passwd` can resolve.
    Name(String),
}

impl ImageUser {
    /// As the image service reports it.
    pub fn of(image: &v1::Image) -> Self {
        match &image.uid {
            Some(uid) => Self::Id(uid.value),
            None if image.username.is_empty() => Self::Id(0),
            None => Self::Name(image.username.clone()),
        }
    }
}

/// The ids of the host that a pod's user namespace maps to, from 0 inside on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    /// The host's id of the pod's root.
    pub first: u32,
    /// How many ids.
    pub length: u32,
}

/// Paths that containers must not see (the set that upstream's kubelet sends).
const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Paths that containers must not change.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a pod's security context asks for, for all containers.
fn of_pod(pod: &Pod) -> &PodSecurityContext {
    static NONE: OnceLock<PodSecurityContext> = OnceLock::new();
    spec::of(pod).security_context.as_ref().unwrap_or_else(|| NONE.get_or_init(PodSecurityContext::default))
}

fn of_container(container: &Container) -> &SecurityContext {
    static NONE: OnceLock<SecurityContext> = OnceLock::new();
    container.security_context.as_ref().unwrap_or_else(|| NONE.get_or_init(SecurityContext::default))
}

pub(super) fn sandbox(pod: &Pod, users: Option<UserRange>) -> Result<LinuxSandboxSecurityContext, SecurityError> {
    let context = of_pod(pod);
    Ok(LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(pod, users)),
        selinux_options: context.se_linux_options.as_ref().map(selinux),
        run_as_user: context.run_as_user.map(int64),
        run_as_group: context.run_as_group.map(int64),
        supplemental_groups: groups(context),
        supplemental_groups_policy: groups_policy(context)?,
        privileged: is_privileged(pod),
        // The sandbox itself needs nothing beyond the default, whatever its containers ask for.
        seccomp: Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::RuntimeDefault.into(),
            localhost_ref: String::new(),
        }),
        ..LinuxSandboxSecurityContext::default()
    })
}

/// Whether some container is privileged, be it one that was added to look into the pod.
pub(crate) fn is_privileged(pod: &Pod) -> bool {
    let own = spec::containers(pod).map(|(_, container)| container.security_context.as_ref());
    let added = spec::ephemeral(pod).map(|one| one.security_context.as_ref());
    own.chain(added).flatten().any(|context| context.privileged == Some(true))
}

pub(super) fn sysctls(pod: &Pod) -> HashMap<String, String> {
    let all = of_pod(pod).sysctls.iter().flatten();
    all.map(|sysctl| (sysctl.name.clone(), sysctl.value.clone())).collect()
}

pub(super) fn container(
    config: &Config,
    request: &Request<'_>,
) -> Result<LinuxContainerSecurityContext, SecurityError> {
    let (whole, own) = (of_pod(request.pod), of_container(request.container));
    let user = own.run_as_user.or(whole.run_as_user);
    check_non_root(request, own.run_as_non_root.or(whole.run_as_non_root), user)?;
    let masked = own.proc_mount.as_deref() != Some("Unmasked");
    let profile = apparmor::profile(request.pod, &request.container.name, Some(own));
    #[expect(deprecated, reason = "older runtimes know no other field")]
    Ok(LinuxContainerSecurityContext {
        capabilities: own.capabilities.as_ref().map(|wanted| v1::Capability {
            add_capabilities: wanted.add.clone().unwrap_or_default(),
            drop_capabilities: wanted.drop.clone().unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged: own.privileged == Some(true),
        namespace_options: Some(with_target(namespaces(request.pod, request.users), request.target)),
        selinux_options: own.se_linux_options.as_ref().or(whole.se_linux_options.as_ref()).map(selinux),
        // The image's own user is left to the runtime, which also reads the group that belongs to it.
        run_as_user: user.map(int64),
        run_as_group: own.run_as_group.or(whole.run_as_group).map(int64),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: groups(whole),
        supplemental_groups_policy: groups_policy(whole)?,
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths: if masked { masked_paths().to_vec() } else { Vec::new() },
        readonly_paths: if masked { READONLY_PATHS.map(str::to_owned).to_vec() } else { Vec::new() },
        seccomp: Some(seccomp(config, own.seccomp_profile.as_ref().or(whole.seccomp_profile.as_ref()))?),
        apparmor_profile: profile.as_ref().map(old_name).unwrap_or_default(),
        apparmor: profile.map(security_profile).transpose()?,
        ..LinuxContainerSecurityContext::default()
    })
}

fn int64(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}

/// Holds `runAsNonRoot` against the user that the container will run as.
fn check_non_root(request: &Request<'_>, non_root: Option<bool>, user: Option<i64>) -> Result<(), SecurityError> {
    if non_root != Some(true) {
        return Ok(());
    }
    let metadata = &request.pod.metadata;
    let pod = format!(
        "{}_{}({})",
        metadata.name.as_deref().unwrap_or_default(),
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.uid.as_deref().unwrap_or_default()
    );
    let container = request.container.name.clone();
    match (user, request.image_user) {
        (Some(0), _) => Err(SecurityError::RunAsRoot { pod, container }),
        (Some(_), _) => Ok(()),
        (None, ImageUser::Id(0)) => Err(SecurityError::ImageRunsAsRoot { pod, container }),
        (None, ImageUser::Id(_)) => Ok(()),
        (None, ImageUser::Name(user)) => Err(SecurityError::NamedUser { pod, container, user: user.clone() }),
    }
}

fn namespaces(pod: &Pod, users: Option<UserRange>) -> v1::NamespaceOption {
    let spec = spec::of(pod);
    let node_if = |shared: Option<bool>, else_: NamespaceMode| -> i32 {
        if shared == Some(true) { NamespaceMode::Node } else { else_ }.into()
    };
    let own_pid =
        if spec.share_process_namespace == Some(true) { NamespaceMode::Pod } else { NamespaceMode::Container };
    v1::NamespaceOption {
        network: node_if(spec.host_network, NamespaceMode::Pod),
        pid: node_if(spec.host_pid, own_pid),
        ipc: node_if(spec.host_ipc, NamespaceMode::Pod),
        target_id: String::new(),
        userns_options: Some(user_namespace(users.filter(|_| spec.host_users == Some(false)))),
    }
}

/// A container with processes of its own may see those of another instead.
fn with_target(options: v1::NamespaceOption, target: Option<&str>) -> v1::NamespaceOption {
    match target {
        Some(target) if options.pid() == NamespaceMode::Container => {
            v1::NamespaceOption { pid: NamespaceMode::Target.into(), target_id: target.to_owned(), ..options }
        }
        _ => options,
    }
}

/// The mapping of a pod's range.
pub(super) fn mapping(users: UserRange) -> v1::IdMapping {
    v1::IdMapping { host_id: users.first, container_id: 0, length: users.length }
}

fn user_namespace(users: Option<UserRange>) -> v1::UserNamespace {
    let Some(users) = users else {
        return v1::UserNamespace { mode: NamespaceMode::Node.into(), uids: Vec::new(), gids: Vec::new() };
    };
    let mapping = vec![mapping(users)];
    v1::UserNamespace { mode: NamespaceMode::Pod.into(), uids: mapping.clone(), gids: mapping }
}

fn selinux(options: &k8s_openapi::api::core::v1::SELinuxOptions) -> v1::SeLinuxOption {
    v1::SeLinuxOption {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        r#type: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    }
}

/// `fsGroup` first, as upstream orders them.
fn groups(context: &PodSecurityContext) -> Vec<i64> {
    context.fs_group.into_iter().chain(context.supplemental_groups.iter().flatten().copied()).collect()
}

fn groups_policy(context: &PodSecurityContext) -> Result<i32, SecurityError> {
    let name = context.supplemental_groups_policy.as_deref().unwrap_or("Merge");
    let policy = v1::SupplementalGroupsPolicy::from_str_name(name);
    policy.map(Into::into).ok_or_else(|| SecurityError::GroupsPolicy(name.to_owned()))
}

fn seccomp(config: &Config, profile: Option<&SeccompProfile>) -> Result<v1::SecurityProfile, SecurityError> {
    use v1::security_profile::ProfileType;
    let (kind, localhost_ref) = match profile.map(|profile| profile.type_.as_str()) {
        Some("RuntimeDefault") => (ProfileType::RuntimeDefault, String::new()),
        None if config.seccomp_default => (ProfileType::RuntimeDefault, String::new()),
        Some("Localhost") => {
            let file = profile.and_then(|profile| profile.localhost_profile.as_deref());
            let file = file.filter(|file| !file.is_empty()).ok_or(SecurityError::NoProfile("seccompProfile"))?;
            (ProfileType::Localhost, config.paths.seccomp().join(file).to_string_lossy().into_owned())
        }
        _ => (ProfileType::Unconfined, String::new()),
    };
    Ok(v1::SecurityProfile { profile_type: kind.into(), localhost_ref })
}

fn security_profile(profile: AppArmorProfile) -> Result<v1::SecurityProfile, SecurityError> {
    use v1::security_profile::ProfileType;
    let localhost_ref = profile.localhost_profile.unwrap_or_default();
    let kind = match profile.type_.as_str() {
        "Unconfined" => ProfileType::Unconfined,
        "Localhost" if localhost_ref.is_empty() => return Err(SecurityError::NoProfile("appArmorProfile")),
        "Localhost" => ProfileType::Localhost,
        _ => ProfileType::RuntimeDefault,
    };
    Ok(v1::SecurityProfile { profile_type: kind.into(), localhost_ref })
}

/// The profile in CRI's field of before there were types.
fn old_name(profile: &AppArmorProfile) -> String {
    match profile.type_.as_str() {
        "Unconfined" => "unconfined".to_owned(),
        "Localhost" => format!("localhost/{}", profile.localhost_profile.as_deref().unwrap_or_default()),
        _ => "runtime/default".to_owned(),
    }
}

/// [`MASKED_PATHS`], and the throttling counters of each CPU, through which a container could watch its neighbours.
fn masked_paths() -> &'static [String] {
    static PATHS: OnceLock<Vec<String>> = OnceLock::new();
    PATHS.get_or_init(|| {
        let throttle = (0..).map(|cpu| format!("/sys/devices/system/cpu/cpu{cpu}"));
        let throttle = throttle.take_while(|cpu| Path::new(cpu).exists()).map(|cpu| format!("{cpu}/thermal_throttle"));
        let throttle = throttle.filter(|path| Path::new(path).exists());
        MASKED_PATHS.map(str::to_owned).into_iter().chain(throttle).collect()
    })
}
