//! What a container may do: capabilities, system calls, devices, covered paths, labels.

use std::sync::OnceLock;

use cri::v1;
use cri::v1::security_profile::ProfileType;
use executor::{HostFacts, oci};

use super::namespaces::Users;
use super::{ContainerInput, Prepared, SpecError};

/// What every container has unless it is dropped (containerd's and Docker's set).
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The security context of a container; an absent one asks for nothing.
pub(super) fn context(config: &v1::ContainerConfig) -> &v1::LinuxContainerSecurityContext {
    static NONE: OnceLock<v1::LinuxContainerSecurityContext> = OnceLock::new();
    let own = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    own.unwrap_or_else(|| NONE.get_or_init(v1::LinuxContainerSecurityContext::default))
}

/// Refuses what this node cannot do.
pub(super) fn check(
    input: &ContainerInput<'_>,
    context: &v1::LinuxContainerSecurityContext,
    warnings: &mut Vec<String>,
) -> Result<(), SpecError> {
    let sandbox = input.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if context.privileged && !sandbox.is_some_and(|sandbox| sandbox.privileged) {
        return Err(SpecError::invalid("privileged", true, "is not allowed in a sandbox that is not privileged"));
    }
    refuse_annotated_cdi(input.config)?;
    tell_of_label(input, context, warnings);
    Ok(())
}

/// CDI prefix of annotations, by which device plugins asked before CRI had a field.
const CDI_ANNOTATION: &str = "cdi.k8s.io/";

fn refuse_annotated_cdi(config: &v1::ContainerConfig) -> Result<(), SpecError> {
    let annotated = config.annotations.iter().filter(|(name, _)| name.starts_with(CDI_ANNOTATION));
    match annotated.map(|(_, devices)| devices).min() {
        None => Ok(()),
        Some(name) => Err(SpecError::Unsupported {
            feature: format!("the CDI device {name} by an annotation"),
            reason: "annotations change no container; the request has a field for it (cdi_devices), as its device plugin has",
        }),
    }
}

/// The AppArmor profile that a container is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AppArmorRequest {
    /// None: unconfined, privileged, or on a kernel that has none.
    Nothing,
    /// The runtime's own; `asked` for by name, or by nobody.
    Default {
        /// It is refused where it cannot be had, and left out otherwise.
        asked: bool,
    },
    /// One that the operator has loaded.
    Loaded(String),
}

/// What a container asks of AppArmor. One that says nothing gets the default profile, as upstream's runtimes give it; a
/// privileged one only what it names.
pub(super) fn apparmor_request(
    context: &v1::LinuxContainerSecurityContext,
    enabled: bool,
) -> Result<AppArmorRequest, SpecError> {
    #[expect(deprecated, reason = "older kubelets send it")]
    let old = &context.apparmor_profile;
    let wanted = request("apparmor", context.apparmor.as_ref(), old)?;
    let wanted = match wanted {
        Some((ProfileType::Unconfined, _)) => AppArmorRequest::Nothing,
        None | Some((ProfileType::RuntimeDefault, _)) if context.privileged => AppArmorRequest::Nothing,
        None => AppArmorRequest::Default { asked: false },
        Some((ProfileType::RuntimeDefault, _)) => AppArmorRequest::Default { asked: true },
        Some((ProfileType::Localhost, name)) => AppArmorRequest::Loaded(name),
    };
    let name = match &wanted {
        _ if enabled => return Ok(wanted),
        AppArmorRequest::Nothing | AppArmorRequest::Default { asked: false } => return Ok(AppArmorRequest::Nothing),
        AppArmorRequest::Default { asked: true } => "RuntimeDefault",
        AppArmorRequest::Loaded(name) => name,
    };
    Err(SpecError::Unsupported {
        feature: format!("the AppArmor profile {name}"),
        reason: "apparmor is not enabled in this kernel, or securityfs is not mounted; remove the profile, or set it to \
            Unconfined",
    })
}

/// The label of its processes. A privileged container has none, as under containerd: the policy says which it gets when its
/// program is executed.
pub(super) fn process_label(input: &ContainerInput<'_>, context: &v1::LinuxContainerSecurityContext) -> String {
    let labels = input.labels.filter(|_| !context.privileged);
    labels.map(|labels| labels.process.clone()).unwrap_or_default()
}

/// A label means nothing to a kernel without SELinux, and charts ask for one wherever they run: upstream's runtimes leave it
/// out there, and so do we, aloud.
fn tell_of_label(input: &ContainerInput<'_>, context: &v1::LinuxContainerSecurityContext, warnings: &mut Vec<String>) {
    let sandbox = input.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let is_some = |options: &&v1::SeLinuxOption| **options != v1::SeLinuxOption::default();
    let own = context.selinux_options.as_ref().filter(is_some);
    let options = own.or(sandbox.and_then(|sandbox| sandbox.selinux_options.as_ref()).filter(is_some));
    if let Some(options) = options.filter(|_| input.labels.is_none() || context.privileged) {
        let label = format!("{}:{}:{}:{}", options.user, options.role, options.r#type, options.level);
        warnings.push(format!("the SELinux label {label} has no effect: SELinux does not confine this container"));
    }
}

/// A security profile, in the field of today or in the deprecated text; `None` where nothing is asked for.
fn request(
    field: &'static str,
    profile: Option<&v1::SecurityProfile>,
    old: &str,
) -> Result<Option<(ProfileType, String)>, SpecError> {
    let local = |name: &str| (ProfileType::Localhost, name.strip_prefix("localhost/").unwrap_or(name).to_owned());
    let Some(profile) = profile else {
        return match old {
            "" => Ok(None),
            "runtime/default" | "docker/default" => Ok(Some((ProfileType::RuntimeDefault, String::new()))),
            "unconfined" => Ok(Some((ProfileType::Unconfined, String::new()))),
            name if name.starts_with("localhost/") => Ok(Some(local(name))),
            name => Err(SpecError::invalid(field, name, "is no profile")),
        };
    };
    let kind = ProfileType::try_from(profile.profile_type)
        .map_err(|_| SpecError::invalid(field, profile.profile_type, "is no type of profile"))?;
    match (kind, profile.localhost_ref.as_str()) {
        (ProfileType::Localhost, "") => Err(SpecError::invalid(field, "Localhost", "has no localhost_ref")),
        (ProfileType::Localhost, name) => Ok(Some(local(name))),
        (_, "") => Ok(Some((kind, String::new()))),
        (_, name) => Err(SpecError::invalid(field, name, "has a localhost_ref, which only Localhost has")),
    }
}

/// The seccomp profile that is asked for.
pub(super) fn seccomp_request(
    context: &v1::LinuxContainerSecurityContext,
) -> Result<Option<(ProfileType, String)>, SpecError> {
    #[expect(deprecated, reason = "older kubelets send it")]
    let old = &context.seccomp_profile_path;
    request("seccomp", context.seccomp.as_ref(), old)
}

/// The filter of system calls. Privileged containers have none, as in containerd.
pub(super) fn seccomp(
    input: &ContainerInput<'_>,
    context: &v1::LinuxContainerSecurityContext,
    process: &oci::Process,
) -> Result<Option<oci::Seccomp>, SpecError> {
    let wanted = seccomp_request(context)?;
    if context.privileged {
        return Ok(None);
    }
    match wanted {
        None | Some((ProfileType::Unconfined, _)) => Ok(None),
        Some((ProfileType::RuntimeDefault, _)) => {
            let bounding = process.capabilities.as_ref().map_or(&[][..], |sets| &sets.bounding);
            Ok(Some(executor::seccomp::default_profile(bounding)))
        }
        Some((ProfileType::Localhost, path)) => match &input.prepared.seccomp {
            Some(profile) => Ok(Some(profile.clone())),
            None => Err(SpecError::invalid("seccomp", path, "was not read: prepare() comes first")),
        },
    }
}

/// The capability sets of a container's process.
pub(super) fn capabilities(
    context: &v1::LinuxContainerSecurityContext,
    facts: &HostFacts,
) -> Result<oci::Capabilities, SpecError> {
    let all = facts.capabilities & sys::caps::ALL;
    let wanted = context.capabilities.clone().unwrap_or_default();
    let ambient = named("add_ambient_capabilities", &wanted.add_ambient_capabilities)?;
    let added = named("add_capabilities", &wanted.add_capabilities)?;
    let dropped = named("drop_capabilities", &wanted.drop_capabilities)?;
    let held = if context.privileged {
        all
    } else {
        // Everything goes before single ones come, so that "drop ALL, add X" leaves X, and "add ALL, drop X" all but X.
        let mut held =
            DEFAULT_CAPABILITIES.iter().filter_map(|name| sys::caps::number(name)).fold(0, |a, n| a | 1 << n);
        if names_all(&wanted.add_capabilities) {
            held = all;
        }
        if names_all(&wanted.drop_capabilities) {
            held = 0;
        }
        (held | added) & !dropped | ambient
    };
    let names = sys::caps::names(held);
    let raised = sys::caps::names(if names_all(&wanted.add_ambient_capabilities) { held } else { ambient });
    Ok(oci::Capabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        // The kernel raises into the ambient set only what is inheritable, too (capabilities(7)).
        inheritable: raised.clone(),
        ambient: raised,
    })
}

fn names_all(names: &[String]) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case("ALL"))
}

/// Those that are named one by one, as bits.
fn named(field: &'static str, names: &[String]) -> Result<u64, SpecError> {
    let mut singles = names.iter().filter(|name| !name.eq_ignore_ascii_case("ALL"));
    singles.try_fold(0, |bits, name| {
        let number = sys::caps::number(name);
        let number = number.ok_or_else(|| SpecError::invalid(field, name, "is no capability of Linux"))?;
        Ok(bits | 1 << number)
    })
}

/// Masked and read-only paths: those of the request, none for a privileged container.
pub(super) fn covered_paths(context: &v1::LinuxContainerSecurityContext) -> (Vec<String>, Vec<String>) {
    if context.privileged {
        return (Vec::new(), Vec::new());
    }
    (context.masked_paths.clone(), context.readonly_paths.clone())
}

/// Device nodes; in a user namespace they are mounts instead, see [`super::mounts`].
pub(super) fn devices(prepared: &Prepared, users: &Users) -> Vec<oci::Device> {
    if users.are_mapped() {
        return Vec::new();
    }
    prepared.devices.iter().map(|device| device.node.clone()).collect()
}

/// What the control group lets the container use: its devices, or all.
pub(super) fn device_rules(prepared: &Prepared, context: &v1::LinuxContainerSecurityContext) -> Vec<oci::DeviceRule> {
    let everything = |allow| oci::DeviceRule { allow, access: "rwm".to_owned(), ..oci::DeviceRule::default() };
    if context.privileged {
        return vec![everything(true)];
    }
    let rule = |device: &super::HostDevice| oci::DeviceRule {
        allow: true,
        kind: device.node.kind.clone(),
        major: Some(device.node.major.into()),
        minor: Some(device.node.minor.into()),
        access: device.access.clone(),
    };
    let devices = prepared.devices.iter().filter(|device| device.node.kind != "p");
    [everything(false)].into_iter().chain(devices.map(rule)).collect()
}
