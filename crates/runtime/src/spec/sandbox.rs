//! What belongs to a sandbox as a whole: its files, kernel parameters, place among the control groups, and notes.

use std::collections::BTreeMap;

use cri::v1;
use executor::oci::{IdMapping, Linux, NamespaceKind};

use super::namespaces::{is_host, mappings, of_sandbox};
use super::{ContainerInput, SpecError};

/// `/etc/hostname` of a sandbox; `host` is the host's own name, for sandboxes in its network.
pub(crate) fn hostname_file(sandbox: &v1::PodSandboxConfig, host: &str) -> String {
    let name = if sandbox.hostname.is_empty() { host } else { &sandbox.hostname };
    format!("{name}\n")
}

/// `/etc/resolv.conf` of a sandbox; `None` where the request leaves it to the host's.
pub(crate) fn resolv_conf(sandbox: &v1::PodSandboxConfig) -> Option<String> {
    let dns = sandbox.dns_config.as_ref()?;
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Some(text)
}

/// The control group of a `cgroup_parent`: the path itself, or that of a systemd slice, whose name holds its parents'
/// (systemd.slice(5)): `a-b.slice` is `a.slice/a-b.slice`.
pub(crate) fn group_of(cgroup_parent: &str) -> String {
    let Some(name) = cgroup_parent.strip_suffix(".slice").filter(|name| !name.contains('/')) else {
        return cgroup_parent.trim_start_matches('/').to_owned();
    };
    if name == "-" || name.is_empty() {
        return String::new();
    }
    let dashes = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    dashes.map(|end| format!("{}.slice", &name[..end])).collect::<Vec<_>>().join("/")
}

/// The kernel parameters of a sandbox's own network and IPC namespaces, defaults included.
///
/// Two are containerd's defaults: no port needs a privilege, and ping needs none. Both act inside the pod's network only.
///
/// # Errors
/// A parameter that is not the sandbox's own but the host's.
pub(crate) fn sandbox_sysctls(sandbox: &v1::PodSandboxConfig) -> Result<Vec<(String, String)>, SpecError> {
    let options = of_sandbox(sandbox);
    let (own_network, own_ipc) = (!is_host(options.network), !is_host(options.ipc));
    let mut all = BTreeMap::new();
    if own_network {
        all.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
        // Groups that the user namespace does not map cannot be written.
        if !mappings(options.userns_options.as_ref())?.are_mapped() {
            all.insert("net.ipv4.ping_group_range".to_owned(), "0 2147483647".to_owned());
        }
    }
    let wanted = sandbox.linux.iter().flat_map(|linux| &linux.sysctls);
    for (name, value) in wanted {
        all.insert(checked(name, own_network, own_ipc)?, value.clone());
    }
    Ok(all.into_iter().collect())
}

/// Users and groups of a user namespace.
pub(crate) type UsersAndGroups = (Vec<IdMapping>, Vec<IdMapping>);

/// The users and groups of the sandbox's user namespace; `None` without one.
///
/// # Errors
/// Mappings that cannot be.
pub(crate) fn sandbox_users(sandbox: &v1::PodSandboxConfig) -> Result<Option<UsersAndGroups>, SpecError> {
    let options = of_sandbox(sandbox);
    let users = mappings(options.userns_options.as_ref())?;
    if !users.are_mapped() {
        return Ok(None);
    }
    if is_host(options.network) {
        let problem = "needs a network of the pod's own: unset hostNetwork, or hostUsers: false";
        return Err(SpecError::invalid("namespace_options.userns_options", "POD", problem));
    }
    Ok(Some((users.uids, users.gids)))
}

/// The name, with dots, of a kernel parameter that somebody wants for a container.
///
/// # Errors
/// As [`sandbox_sysctls`].
pub(crate) fn container_sysctl(linux: &Linux, name: &str) -> Result<String, SpecError> {
    let has = |kind| linux.namespaces.iter().any(|one| one.kind == kind);
    checked(name, has(NamespaceKind::Network), has(NamespaceKind::Ipc))
}

/// The name with dots. Either separator is allowed (sysctl(8)); the first one in the name says which it is.
fn checked(name: &str, own_network: bool, own_ipc: bool) -> Result<String, SpecError> {
    let dotted = if is_slashed(name) { name.replace('/', ".") } else { name.to_owned() };
    let problem = match scope(&dotted) {
        Some(Scope::Network) if own_network => return Ok(dotted),
        Some(Scope::Ipc) if own_ipc => return Ok(dotted),
        Some(_) => "belongs to the host, whose namespace the sandbox shares",
        None => "has no namespace of its own: it would change the whole host",
    };
    Err(SpecError::invalid("sysctls", name, problem))
}

fn is_slashed(name: &str) -> bool {
    name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/')
}

enum Scope {
    Network,
    Ipc,
}

/// Whose parameter it is (namespaces(7); the list of runc's validator).
fn scope(name: &str) -> Option<Scope> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    match name {
        _ if name.starts_with("net.") => Some(Scope::Network),
        _ if name.starts_with("fs.mqueue.") || IPC.contains(&name) => Some(Scope::Ipc),
        _ => None,
    }
}

/// What containerd notes on containers, for hooks and for those who look with `crictl inspect`.
pub(super) fn annotations(input: &ContainerInput<'_>) -> BTreeMap<String, String> {
    let pod = input.sandbox.metadata.clone().unwrap_or_default();
    let container = input.config.metadata.clone().unwrap_or_default();
    let image = input.config.image.clone().unwrap_or_default();
    let image = if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image };
    let notes = [
        ("container-type", "container".to_owned()),
        ("sandbox-id", input.sandbox_id.to_owned()),
        ("sandbox-name", pod.name),
        ("sandbox-namespace", pod.namespace),
        ("sandbox-uid", pod.uid),
        ("container-name", container.name),
        ("image-name", image),
    ];
    notes.into_iter().map(|(name, value)| (format!("io.kubernetes.cri.{name}"), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(options: v1::NamespaceOption, sysctls: &[(&str, &str)]) -> v1::PodSandboxConfig {
        let security_context =
            Some(v1::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
        let sysctls = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let linux = Some(v1::LinuxPodSandboxConfig { security_context, sysctls, ..Default::default() });
        v1::PodSandboxConfig { linux, ..v1::PodSandboxConfig::default() }
    }

    fn check(options: &v1::NamespaceOption, sysctls: &[(&str, &str)], expect: Result<&[(&str, &str)], &str>) {
        match (sandbox_sysctls(&sandbox(options.clone(), sysctls)), expect) {
            (Ok(found), Ok(expect)) => {
                let found: Vec<_> = found.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                assert_eq!(found, expect);
            }
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (found, expect) => panic!("{found:?} instead of {expect:?}"),
        }
    }

    const PORTS: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
    const PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

    #[test]
    fn kernel_parameters_of_a_sandbox() {
        let pod = v1::NamespaceOption::default();
        check(&pod, &[], Ok(&[PORTS, PING]));
        check(
            &pod,
            &[("net/ipv4/ping_group_range", "1 0"), ("kernel.shmmax", "9"), ("fs.mqueue.msg_max", "7")],
            Ok(&[("fs.mqueue.msg_max", "7"), ("kernel.shmmax", "9"), PORTS, ("net.ipv4.ping_group_range", "1 0")]),
        );
        check(&pod, &[("kernel.panic", "1")], Err("whole host"));
        check(&pod, &[("kernel.shmmaxx", "1")], Err("whole host"));
        let host = v1::NamespaceOption { network: 2, ipc: 2, ..pod.clone() };
        check(&host, &[], Ok(&[]));
        check(&host, &[("net.core.somaxconn", "1")], Err("belongs to the host"));
        check(&host, &[("kernel.sem", "1")], Err("belongs to the host"));
        let mapping = vec![v1::IdMapping { host_id: 65536, container_id: 0, length: 65536 }];
        let users = v1::UserNamespace { mode: 0, uids: mapping.clone(), gids: mapping };
        check(&v1::NamespaceOption { userns_options: Some(users), ..pod }, &[], Ok(&[PORTS]));
    }

    #[test]
    fn files() {
        let dns = v1::DnsConfig {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        let named = v1::PodSandboxConfig { hostname: "web".into(), dns_config: Some(dns), ..Default::default() };
        let text = "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(&named).as_deref(), Some(text));
        assert_eq!(hostname_file(&named, "node"), "web\n");
        let bare = v1::PodSandboxConfig::default();
        assert_eq!((resolv_conf(&bare), hostname_file(&bare, "node")), (None, "node\n".to_owned()));
    }

    #[test]
    fn slices_hold_their_parents() {
        for (parent, expect) in [
            ("/kubepods/burstable/pod1", "kubepods/burstable/pod1"),
            ("kubepods-burstable-pod1.slice", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"),
            ("/a.slice/a-b.slice", "a.slice/a-b.slice"),
            ("system.slice", "system.slice"),
            ("-.slice", ""),
            ("", ""),
        ] {
            assert_eq!(group_of(parent), expect, "{parent}");
        }
    }
}
