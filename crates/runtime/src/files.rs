//! Files of a sandbox that its containers see.

use std::io;

use crate::sandbox::Sandbox;
use crate::spec::{self, SandboxFiles};

const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLV_CONF: &str = "resolv.conf";
/// Not a file: the name that the shared memory has in configurations, see [`crate::shm`].
const SHM: &str = "shm";
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

/// Writes those that do not depend on the sandbox's address.
pub(crate) fn put(sandbox: &Sandbox) -> io::Result<()> {
    sandbox.records.put_shared(HOSTNAME, &spec::hostname_file(&sandbox.config, &node_name()))?;
    let resolv_conf = spec::resolv_conf(&sandbox.config);
    // Without a request the node's resolver is meant; a node without one has none to give.
    let resolv_conf = resolv_conf.unwrap_or_else(|| std::fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default());
    sandbox.records.put_shared(RESOLV_CONF, &resolv_conf).map(drop)
}

/// Writes the hosts file, which names the sandbox's address, or is the node's in its network; a kubelet mounts one of its
/// own over it.
pub(crate) fn put_hosts(sandbox: &Sandbox) -> io::Result<()> {
    if sandbox.host_network() {
        let hosts = std::fs::read_to_string(HOST_HOSTS).unwrap_or_default(); // A node without one has none to give.
        return sandbox.records.put_shared(HOSTS, &hosts).map(drop);
    }
    let ips = sandbox.live().ips.clone();
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for ip in ips {
        text.push_str(&format!("{ip}\t{}\n", hostname(sandbox)));
    }
    sandbox.records.put_shared(HOSTS, &text).map(drop)
}

/// Where they are.
pub(crate) fn of(sandbox: &Sandbox) -> SandboxFiles {
    let directory = sandbox.records.directory();
    SandboxFiles {
        hostname: Some(directory.join(HOSTNAME)),
        hosts: Some(directory.join(HOSTS)),
        resolv_conf: Some(directory.join(RESOLV_CONF)),
        shm: Some(directory.join(SHM)),
    }
}
