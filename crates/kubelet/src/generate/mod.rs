//! From a pod to what the runtime is asked for: a pure translation, but for the few files that containers mount.
//!
//! [`sandbox_config`] and [`container_config`] only read their arguments. [`prepare_files`] makes on disk what the
//! mounts of a container config refer to. Labels and annotations are upstream's, so that another kubelet, or crictl,
//! recognises the containers.

mod identity;
mod security;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cluster::Store;
use cri::v1;
use k8s_openapi::api::core::v1::{Container, Pod};
use pod::QosClass;
use pod::spec::{self, Role};
use sys::cgroup::Cgroup;

use crate::admission::is_critical;
use crate::env::{self, EnvError, Environment, Sources};
use crate::facts::NodeFacts;
use crate::hosts::{self, ClusterDns, NameError};
use crate::paths::Paths;
use crate::qos::{self, Tree};

pub use identity::{annotation, container_hash, label};
pub(crate) use security::is_privileged;
pub use security::{ImageUser, UserRange};

/// Where a container's termination message goes unless the spec says otherwise.
const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";
const HOSTS_PATH: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What holds for all pods of a node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where things are.
    pub paths: Paths,
    /// The group in which the tree of the pods' groups stands (`cgroupRoot`); empty for the root of the hierarchy.
    pub cgroup_root: PathBuf,
    /// Who makes the groups of that tree.
    pub cgroup_driver: qos::Driver,
    /// The node.
    pub node: NodeFacts,
    /// The cluster's name service.
    pub dns: ClusterDns,
    /// The node's resolver settings, parsed ([`hosts::parse_resolv_conf`]).
    pub host_dns: v1::DnsConfig,
    /// Containers without a seccomp profile get the runtime's default (`seccompDefault`).
    pub seccomp_default: bool,
    /// How the kernel limits swap.
    pub swap: Swap,
    /// The machine's swap in bytes, of which Burstable containers get a share (`LimitedSwap`, version 2 only); 0 gives none.
    pub shared_swap_bytes: u64,
    /// What holds for the limits of all containers.
    pub rules: qos::Rules,
}

impl Config {
    /// The configuration for this machine: its resolver settings, which may be elsewhere than in the usual place and may be
    /// missing, and how its kernel limits the swap of `groups`, which are there.
    pub fn of_machine(
        paths: Paths,
        node: NodeFacts,
        dns: ClusterDns,
        resolv_conf: Option<&Path>,
        groups: &Tree,
    ) -> Self {
        let resolver = fs::read_to_string(resolv_conf.unwrap_or(Path::new(RESOLV_CONF))).unwrap_or_else(|error| {
            if let Some(path) = resolv_conf {
                tracing::warn!(path = %path.display(), %error, "`resolvConf` cannot be read: pods have no name servers of the node's");
            }
            String::new()
        });
        Self {
            paths,
            cgroup_root: PathBuf::new(),
            cgroup_driver: qos::Driver::Cgroupfs,
            node,
            dns,
            host_dns: hosts::parse_resolv_conf(&resolver),
            seccomp_default: false,
            swap: Swap::of(&groups.root()),
            shared_swap_bytes: 0,
            rules: qos::Rules::of_machine(),
        }
    }
}

/// The file of control groups version 2 that limits swap.
const SWAP_MAX: &str = "memory.swap.max";

/// How the kernel limits a control group's swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swap {
    /// Not at all: version 1 with `swapaccount=0`, or a kernel without.
    Unlimited,
    /// Version 1: by one number with memory, so only where that has a limit.
    WithMemory,
    /// Version 2: by a file of its own.
    Alone,
}

impl Swap {
    /// Of this group. The daemon's own would not tell: one at the root of version 2, or whose memory is not accounted, has no
    /// such file.
    fn of(group: &Cgroup) -> Self {
        let has = |file: &str| group.directories().iter().any(|dir| dir.join(file).exists());
        match (has(SWAP_MAX), has("memory.memsw.limit_in_bytes")) {
            (true, _) => Self::Alone,
            (false, true) => Self::WithMemory,
            (false, false) => Self::Unlimited,
        }
    }
}

/// Why the request for a sandbox or container cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Something that the environment needs is missing.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// The pod's name cannot be a host name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The security context forbids, or contradicts itself.
    #[error("{0}")]
    Security(#[from] security::SecurityError),
    /// A file that a container mounts could not be made.
    #[error("cannot make {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl GenerateError {
    /// The waiting reason that `kubectl` shows.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::File { .. } => "CreateContainerError",
            _ => "CreateContainerConfigError",
        }
    }
}

/// A container that is to be created.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Its pod.
    pub pod: &'a Pod,
    /// Its role.
    pub role: Role,
    /// Its spec.
    pub container: &'a Container,
    /// How often it has been started before.
    pub attempt: u32,
    /// What the image service called the pulled image.
    pub image_ref: &'a str,
    /// The user that the image names.
    pub image_user: &'a ImageUser,
    /// The pod's addresses; none in the host's network.
    pub ips: &'a [String],
    /// Its volumes' mounts ([`crate::volumes`]).
    pub mounts: &'a [v1::Mount],
    /// Where the pod's volumes are on the node, by name.
    pub volumes: &'a BTreeMap<String, PathBuf>,
    /// The run whose processes the container is to see (`targetContainerName`).
    pub target: Option<&'a str>,
    /// The ids of the pod's user namespace, with `hostUsers: false`.
    pub users: Option<UserRange>,
    /// ConfigMaps, Secrets and Services.
    pub store: &'a Store,
}

impl<'a> Request<'a> {
    /// What the container's environment is made from.
    pub fn sources(&self, config: &'a Config) -> Sources<'a> {
        Sources { pod: self.pod, ips: self.ips, node: &config.node, store: self.store, volumes: self.volumes }
    }

    fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    fn mounts_path(&self, path: &str) -> bool {
        self.mounts.iter().any(|mount| mount.container_path == path)
    }
}

/// The request for a pod's sandbox.
///
/// # Errors
/// A host name that is none, or a security context that cannot be.
pub fn sandbox_config(
    config: &Config,
    pod: &Pod,
    attempt: u32,
    users: Option<UserRange>,
) -> Result<v1::PodSandboxConfig, GenerateError> {
    let spec = spec::of(pod);
    let metadata = identity::sandbox(pod, attempt);
    let name = hosts::name_of(pod, &config.dns.domain)?;
    let hostname = if spec.host_network == Some(true) { String::new() } else { name.for_kernel(pod)? };
    let logs = config.paths.pod_logs(&metadata.namespace, &metadata.name, &metadata.uid);
    Ok(v1::PodSandboxConfig {
        metadata: Some(metadata),
        hostname,
        log_directory: text(&logs),
        dns_config: Some(hosts::dns_config(pod, &config.dns, &config.host_dns)),
        port_mappings: port_mappings(pod),
        labels: identity::sandbox_labels(pod),
        annotations: pod.metadata.annotations.clone().into_iter().flatten().collect(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: text(&Path::new("/").join(qos::place(
                config.cgroup_driver,
                &config.cgroup_root,
                &qos::pod_group(pod),
            ))),
            security_context: Some(security::sandbox(pod, users)?),
            sysctls: security::sysctls(pod),
            overhead: Some(overhead(config, pod)),
            resources: Some(pod_resources(config, pod)),
        }),
        windows: None,
    })
}

/// The request for a container.
///
/// # Errors
/// What is missing or forbidden; [`GenerateError::reason`] says how to show it.
pub fn container_config(config: &Config, request: &Request<'_>) -> Result<v1::ContainerConfig, GenerateError> {
    let environment = env::of_container(request.container, &request.sources(config))?;
    container_config_with(config, request, &environment)
}

/// As [`container_config`], with an environment that is made already.
///
/// # Errors
/// As [`container_config`].
pub fn container_config_with(
    config: &Config,
    request: &Request<'_>,
    environment: &Environment,
) -> Result<v1::ContainerConfig, GenerateError> {
    let container = request.container;
    let (command, args) = environment.command_line(container)?;
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: container.name.clone(), attempt: request.attempt }),
        image: Some(v1::ImageSpec {
            image: request.image_ref.to_owned(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..v1::ImageSpec::default()
        }),
        command,
        args,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: environment.iter().map(|(key, value)| v1::KeyValue { key: key.into(), value: value.into() }).collect(),
        mounts: mounts(config, request),
        labels: identity::container_labels(request.pod, container),
        annotations: identity::container_annotations(request.pod, container, request.attempt),
        log_path: text(&Paths::container_log(&container.name, request.attempt)),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources(config, request.pod, request.role, container)),
            security_context: Some(security::container(config, request)?),
        }),
        stop_signal: stop_signal(container),
        ..v1::ContainerConfig::default()
    })
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// All ports of the containers that run beside each other; a host port of 0 is none.
fn port_mappings(pod: &Pod) -> Vec<v1::PortMapping> {
    let running = spec::containers(pod).filter(|(role, _)| *role != Role::Init);
    let ports = running.flat_map(|(_, container)| container.ports.iter().flatten());
    let mapping = |port: &k8s_openapi::api::core::v1::ContainerPort| v1::PortMapping {
        protocol: match port.protocol.as_deref() {
            Some("UDP") => v1::Protocol::Udp,
            Some("SCTP") => v1::Protocol::Sctp,
            _ => v1::Protocol::Tcp,
        }
        .into(),
        container_port: port.container_port,
        host_port: port.host_port.unwrap_or(0),
        host_ip: port.host_ip.clone().unwrap_or_default(),
    };
    ports.map(mapping).collect()
}

fn stop_signal(container: &Container) -> i32 {
    let name = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    let signal = name.and_then(|name| v1::Signal::from_str_name(&format!("SIGNAL_{name}")));
    signal.unwrap_or(v1::Signal::RuntimeDefault).into()
}

fn signed(shares: u64) -> i64 {
    i64::try_from(shares).unwrap_or(i64::MAX)
}

fn overhead(config: &Config, pod: &Pod) -> v1::LinuxContainerResources {
    let list = spec::of(pod).overhead.clone();
    let Some(list) = list.filter(|list| !list.is_empty()) else { return v1::LinuxContainerResources::default() };
    let amount = |name: &str| {
        let text = list.get(name).map(|amount| amount.0.as_str()).unwrap_or_default();
        pod::quantity::Quantity::parse(text).unwrap_or_default()
    };
    let cpu = amount("cpu").milli();
    v1::LinuxContainerResources {
        cpu_period: period(config),
        cpu_quota: config.rules.quota_us(cpu).unwrap_or(0),
        cpu_shares: signed(qos::shares(cpu)),
        memory_limit_in_bytes: amount("memory").units(),
        ..v1::LinuxContainerResources::default()
    }
}

/// What the containers of a pod may use together, for runtimes that size a virtual machine by it.
fn pod_resources(config: &Config, pod: &Pod) -> v1::LinuxContainerResources {
    let limits = qos::pod_limits(pod, &config.rules);
    v1::LinuxContainerResources {
        cpu_period: period(config),
        cpu_quota: limits.cpu_quota_us.unwrap_or(0),
        cpu_shares: signed(limits.cpu_shares.unwrap_or(qos::SHARES_MIN)),
        memory_limit_in_bytes: limits.memory_bytes.unwrap_or(0),
        ..v1::LinuxContainerResources::default()
    }
}

/// What a container gets of the machine.
pub(crate) fn resources(config: &Config, pod: &Pod, role: Role, container: &Container) -> v1::LinuxContainerResources {
    use qos::List;
    // A container without a limit of its own is bounded by the limit of the pod as a whole.
    let limit = |resource: &str| {
        let own = qos::of_container(container, resource, List::Limits);
        let whole = spec::of(pod).resources.as_ref().and_then(|whole| whole.limits.as_ref());
        let whole = whole.and_then(|list| list.get(resource));
        own.or_else(|| whole.and_then(|amount| pod::quantity::Quantity::parse(&amount.0).ok())).unwrap_or_default()
    };
    let cpu = limit("cpu").milli();
    let memory = limit("memory").units();
    let asked = qos::of_container(container, "cpu", List::Requests).map_or(cpu, |amount| amount.milli());
    v1::LinuxContainerResources {
        cpu_period: period(config),
        cpu_quota: config.rules.quota_us(cpu).unwrap_or(0),
        cpu_shares: signed(qos::shares(asked)),
        memory_limit_in_bytes: memory,
        memory_swap_limit_in_bytes: if config.swap == Swap::WithMemory { memory } else { 0 },
        unified: unified(config, pod, container).collect(),
        oom_score_adj: qos::oom_score_adj(pod, role, container, config.node.memory_bytes),
        hugepage_limits: hugepages(config, |resource| limit(resource).units()),
        ..v1::LinuxContainerResources::default()
    }
}

/// What only control groups of version 2 can do.
fn unified(config: &Config, pod: &Pod, container: &Container) -> impl Iterator<Item = (String, String)> + use<> {
    let swap =
        (config.swap == Swap::Alone).then(|| (SWAP_MAX.to_owned(), swap_bytes(config, pod, container).to_string()));
    let allocatable = config.node.allocatable.get("memory").map(|amount| amount.units());
    let memory = config.rules.memory.map(|memory| memory.of_container(pod, container, allocatable));
    swap.into_iter().chain(memory.unwrap_or_default())
}

/// What a container may swap: its part of the machine's swap is that of the machine's memory which it asks for, as upstream
/// gives it; who has its memory for sure, or is critical, swaps nothing.
fn swap_bytes(config: &Config, pod: &Pod, container: &Container) -> u64 {
    use qos::List;
    let asked = qos::of_container(container, "memory", List::Requests);
    let is_bounded = asked == qos::of_container(container, "memory", List::Limits);
    if is_bounded || is_critical(pod) || QosClass::of(pod) != QosClass::Burstable {
        return 0;
    }
    let asked = u128::try_from(asked.map_or(0, |amount| amount.units())).unwrap_or(0);
    let memory = u128::from(config.node.memory_bytes);
    if asked > memory || memory == 0 {
        return 0;
    }
    u64::try_from(asked * u128::from(config.shared_swap_bytes) / memory).unwrap_or(0)
}

/// A limit for every page size; sizes that the container does not name are forbidden to it.
fn hugepages(config: &Config, asked: impl Fn(&str) -> i64) -> Vec<v1::HugepageLimit> {
    let limits = config.rules.huge_page_limits(asked).into_iter();
    limits.map(|(page_size, limit)| v1::HugepageLimit { page_size, limit }).collect()
}

/// The length of a CPU period; 0 is the runtime's own.
fn period(config: &Config) -> i64 {
    config.rules.cpu_period_us.map_or(0, signed)
}

/// Whether the node manages the container's `/etc/hosts`: it must know what to write, and no volume may be there.
fn manages_hosts(request: &Request<'_>) -> bool {
    let known = !request.ips.is_empty() || spec::of(request.pod).host_network == Some(true);
    known && !request.mounts_path(HOSTS_PATH)
}

fn mounts(config: &Config, request: &Request<'_>) -> Vec<v1::Mount> {
    let file = |container_path: &str, host_path: PathBuf| v1::Mount {
        container_path: container_path.to_owned(),
        host_path: text(&host_path),
        selinux_relabel: sys::kernel::has_selinux(),
        ..v1::Mount::default()
    };
    let mut mounts = request.mounts.to_vec();
    if manages_hosts(request) {
        mounts.push(file(HOSTS_PATH, config.paths.hosts_file(request.uid())));
    }
    let path = termination_path(request.container);
    if !request.mounts_path(&path) {
        let name = &request.container.name;
        mounts.push(file(&path, config.paths.termination_message(request.uid(), name, request.attempt)));
    }
    if let Some(users) = request.users {
        // The pod sees the files as its own: their ids are mapped as its user namespace maps them.
        for mount in &mut mounts {
            mount.uid_mappings = vec![security::mapping(users)];
            mount.gid_mappings = vec![security::mapping(users)];
        }
    }
    mounts
}

/// Where the container writes its termination message; relative paths begin at the root.
fn termination_path(container: &Container) -> String {
    let path = container.termination_message_path.as_deref().filter(|path| !path.is_empty());
    let path = path.unwrap_or(TERMINATION_MESSAGE_PATH);
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Makes the files that the mounts of a container refer to: `/etc/hosts`, the termination message, the log's
/// directory. Repeating it for the same attempt keeps a termination message.
///
/// # Errors
/// The file and the cause.
pub fn prepare_files(config: &Config, request: &Request<'_>) -> Result<(), GenerateError> {
    let uid = request.uid();
    let metadata = identity::sandbox(request.pod, 0);
    let logs = config.paths.pod_logs(&metadata.namespace, &metadata.name, uid).join(&request.container.name);
    make_dir(&logs)?;
    if manages_hosts(request) {
        let path = config.paths.hosts_file(uid);
        write_file(&path, hosts_content(config, request)?.as_bytes())?;
    }
    let message = config.paths.termination_message(uid, &request.container.name, request.attempt);
    touch(&message)?;
    forget_old(&message, request.attempt);
    Ok(())
}

/// Of a container's messages the newest and the one before it stay, as its runs do.
fn forget_old(message: &Path, newest: u32) {
    let entries = message.parent().and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    for entry in entries {
        let attempt = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if attempt.is_some_and(|attempt| attempt + 1 < newest) {
            let _ = fs::remove_file(entry.path()); // It goes with the pod at the latest.
        }
    }
}

fn hosts_content(config: &Config, request: &Request<'_>) -> Result<String, GenerateError> {
    let spec = spec::of(request.pod);
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    if spec.host_network == Some(true) {
        let failed = |source| GenerateError::File { path: HOSTS_PATH.into(), source };
        return Ok(hosts::host_network_file(&fs::read_to_string(HOSTS_PATH).map_err(failed)?, aliases));
    }
    let name = hosts::name_of(request.pod, &config.dns.domain)?;
    Ok(hosts::managed_file(request.ips, &name, aliases))
}

fn make_dir(path: &Path) -> Result<(), GenerateError> {
    fs::create_dir_all(path).map_err(|source| GenerateError::File { path: path.to_owned(), source })
}

/// Writes a file in place: it may be mounted in a running container, so it keeps its inode.
fn write_file(path: &Path, content: &[u8]) -> Result<(), GenerateError> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    let written = fs::write(path, content).and_then(|()| set_mode(path, 0o644));
    written.map_err(|source| GenerateError::File { path: path.to_owned(), source })
}

/// An empty file that any user of the container may write.
fn touch(path: &Path) -> Result<(), GenerateError> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    let made = fs::OpenOptions::new().create(true).append(true).open(path).and_then(|_| set_mode(path, 0o666));
    made.map_err(|source| GenerateError::File { path: path.to_owned(), source })
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests;
