//! Which namespaces a container has of its own, and which it shares with its pod, a neighbour or the host.

use cri::v1;
use cri::v1::NamespaceMode;
use executor::oci::{IdMapping, Namespace, NamespaceKind};

use super::{ContainerInput, SpecError};

/// The mappings of a user namespace; empty without one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Users {
    pub(super) uids: Vec<IdMapping>,
    pub(super) gids: Vec<IdMapping>,
}

impl Users {
    /// Whether the container is in a user namespace.
    pub(super) fn are_mapped(&self) -> bool {
        !self.uids.is_empty()
    }
}

/// The sandbox's options, which decide for its containers too.
pub(super) fn of_sandbox(sandbox: &v1::PodSandboxConfig) -> v1::NamespaceOption {
    let context = sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    context.and_then(|context| context.namespace_options.clone()).unwrap_or_default()
}

/// Whether an option is the host's namespace.
pub(super) fn is_host(mode: i32) -> bool {
    mode == i32::from(NamespaceMode::Node)
}

/// The mappings of the sandbox's user namespace, which the container's request has to name, too.
pub(super) fn users(input: &ContainerInput<'_>) -> Result<Users, SpecError> {
    let of_sandbox = mappings(of_sandbox(input.sandbox).userns_options.as_ref())?;
    let context = super::security::context(input.config);
    let own = context.namespace_options.as_ref().and_then(|options| options.userns_options.as_ref());
    if mappings(own)? == of_sandbox {
        return Ok(of_sandbox);
    }
    let value = own.map_or_else(|| "none".to_owned(), |own| format!("{own:?}"));
    Err(SpecError::invalid("namespace_options.userns_options", value, "differs from that of the sandbox"))
}

/// Valid mappings, or none where the host's users are wanted.
pub(super) fn mappings(options: Option<&v1::UserNamespace>) -> Result<Users, SpecError> {
    let field = "namespace_options.userns_options";
    let Some(options) = options else { return Ok(Users::default()) };
    match NamespaceMode::try_from(options.mode) {
        Ok(NamespaceMode::Node) if options.uids.is_empty() && options.gids.is_empty() => Ok(Users::default()),
        Ok(NamespaceMode::Node) => {
            Err(SpecError::invalid(field, "NODE", "has mappings, which only a user namespace of the pod can have"))
        }
        Ok(NamespaceMode::Pod) => Ok(Users { uids: one(&options.uids)?, gids: one(&options.gids)? }),
        _ => Err(SpecError::invalid(field, options.mode, "is neither POD nor NODE")),
    }
}

/// Kubelets send one range each, and idmapped mounts are only defined for that.
fn one(mappings: &[v1::IdMapping]) -> Result<Vec<IdMapping>, SpecError> {
    match mappings {
        [one] if one.length > 0 => Ok(vec![id_mapping(one)]),
        _ => {
            let value = format!("{mappings:?}");
            Err(SpecError::invalid("userns_options", value, "is not exactly one mapping of a length above 0"))
        }
    }
}

pub(super) fn id_mapping(mapping: &v1::IdMapping) -> IdMapping {
    IdMapping { container_id: mapping.container_id, host_id: mapping.host_id, size: mapping.length }
}

/// The namespaces of a container. Network, IPC and names are its sandbox's, whatever its own options say, as in containerd.
pub(super) fn namespaces(
    input: &ContainerInput<'_>,
    context: &v1::LinuxContainerSecurityContext,
    users: &Users,
) -> Result<Vec<Namespace>, SpecError> {
    let sandbox = of_sandbox(input.sandbox);
    let own = context.namespace_options.clone().unwrap_or_default();
    let mut list = vec![fresh(NamespaceKind::Mount)];
    if users.are_mapped() {
        list.push(joined(input, NamespaceKind::User)?);
    }
    if !is_host(pod_or_node("network", sandbox.network)?) {
        list.push(joined(input, NamespaceKind::Network)?);
        list.push(joined(input, NamespaceKind::Uts)?);
    }
    if !is_host(pod_or_node("ipc", sandbox.ipc)?) {
        list.push(joined(input, NamespaceKind::Ipc)?);
    }
    match NamespaceMode::try_from(own.pid) {
        Ok(NamespaceMode::Container) => list.push(fresh(NamespaceKind::Pid)),
        Ok(NamespaceMode::Pod | NamespaceMode::Target) => list.push(joined(input, NamespaceKind::Pid)?),
        Ok(NamespaceMode::Node) => {}
        Err(_) => return Err(SpecError::invalid("namespace_options.pid", own.pid, "is no namespace mode")),
    }
    // A privileged container manages the host's groups.
    if !context.privileged {
        list.push(fresh(NamespaceKind::Cgroup));
    }
    Ok(list)
}

fn pod_or_node(field: &'static str, mode: i32) -> Result<i32, SpecError> {
    match NamespaceMode::try_from(mode) {
        Ok(NamespaceMode::Pod | NamespaceMode::Node) => Ok(mode),
        _ => Err(SpecError::invalid(field, mode, "is neither POD nor NODE")),
    }
}

fn fresh(kind: NamespaceKind) -> Namespace {
    Namespace { kind, path: String::new() }
}

fn joined(input: &ContainerInput<'_>, kind: NamespaceKind) -> Result<Namespace, SpecError> {
    let path = input.namespaces.get(&kind).filter(|path| !path.is_empty()).cloned();
    let missing = || {
        let name = executor::namespaces::file_name(kind);
        SpecError::invalid("namespace_options", name, "is a namespace that the sandbox was not made with")
    };
    Ok(Namespace { kind, path: path.ok_or_else(missing)? })
}
