//! Files of a sandbox that its containers see.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::sandbox::Sandbox;
use crate::selinux::relabel;
use crate::shared::{self, SHM, Shared};
use crate::spec::{self, SandboxFiles};

const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLV_CONF: &str = "resolv.conf";
/// Where the node's own resolver configuration is.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";
const HOST_HOSTS: &str = "/etc/hosts";

/// The sandbox's host name: the one asked for, or the node's.
pub(crate) fn hostname(sandbox: &Sandbox) -> String {
    match sandbox.config.hostname.as_str() {
        "" => node_name(),
        name => name.to_owned(),
    }
}

fn node_name() -> String {
    sys::rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Makes them, but for what depends on the sandbox's address.
pub(crate) fn make(sandbox: &Sandbox, root_is_initramfs: bool) -> io::Result<Shared> {
    let hostname = spec::hostname_file(&sandbox.config, &node_name());
    // Without a request the node's resolver is meant; a node without one has none to give.
    let resolv_conf = spec::resolv_conf(&sandbox.config);
    let resolv_conf = resolv_conf.unwrap_or_else(|| std::fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default());
    let files = [(HOSTNAME, hostname), (RESOLV_CONF, resolv_conf), (HOSTS, hosts(sandbox))];
    shared::make(root_is_initramfs, &files)
}

/// Writes the hosts file again, now that the sandbox has its address.
pub(crate) fn put_hosts(sandbox: &Sandbox, shared: &Shared) -> io::Result<()> {
    if sandbox.host_network() { Ok(()) } else { shared.put(HOSTS, &hosts(sandbox)) }
}

/// The hosts file names the sandbox's address, or is the node's in its network; a kubelet mounts one of its own over it.
fn hosts(sandbox: &Sandbox) -> String {
    if sandbox.host_network() {
        return std::fs::read_to_string(HOST_HOSTS).unwrap_or_default(); // A node without one has none to give.
    }
    let ips = sandbox.live().ips.clone();
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for ip in ips {
        text.push_str(&format!("{ip}\t{}\n", hostname(sandbox)));
    }
    text
}

/// The names that they have in configurations; nothing is there on the host.
pub(crate) fn of(sandbox: &Sandbox) -> SandboxFiles {
    let directory = sandbox.records.directory();
    SandboxFiles {
        hostname: Some(directory.join(HOSTNAME)),
        hosts: Some(directory.join(HOSTS)),
        resolv_conf: Some(directory.join(RESOLV_CONF)),
        shm: Some(directory.join(SHM)),
    }
}

/// Detached mounts of them for a container, by those names; labelled for it where there are labels.
pub(crate) fn copies(
    sandbox: &Sandbox,
    namespace: BorrowedFd<'_>,
    label: Option<&str>,
) -> io::Result<BTreeMap<String, OwnedFd>> {
    let named = |name: &str| Path::join(sandbox.records.directory(), name).to_string_lossy().into_owned();
    let copies = shared::copies(namespace, &[HOSTNAME, HOSTS, RESOLV_CONF, SHM])?;
    if let Some(label) = label {
        copies.iter().try_for_each(|(_, mount)| relabel::tree(mount.as_fd(), label))?;
    }
    Ok(copies.into_iter().map(|(name, mount)| (named(name), mount)).collect())
}
