//! Settings of the kernel that IPVS needs, the same as upstream's kube-proxy makes.

use std::io;
use std::path::Path;

use sys::kernel;

use crate::StartError;

/// Where settings of the network are; those of the namespace of whoever opens them.
const NET: &str = "/proc/sys/net";

/// What is set, and to what.
fn wanted(version: (u32, u32), strict_arp: bool) -> Vec<(&'static str, &'static str)> {
    let mut wanted = vec![
        // Connections are tracked, so that sources can be translated and firewalls see them.
        ("ipv4/vs/conntrack", "1"),
        // A connection whose server has gone is scheduled anew instead of being dropped in silence.
        ("ipv4/vs/expire_nodest_conn", "1"),
        // A client that is remembered does not go back to a server that ends.
        ("ipv4/vs/expire_quiescent_template", "1"),
        ("ipv4/ip_forward", "1"),
    ];
    // Before 5.9 a client that uses a port again waits for a second when this is on (Linux f0a5e4d7a594, "allow
    // connection reuse for unconfirmed conntrack"); later it has to be on, or connections go to servers that end.
    if version < (5, 9) {
        wanted.push(("ipv4/vs/conn_reuse_mode", "0"));
    }
    if strict_arp {
        // The addresses of Services are on every node: no node may answer for them on its other interfaces.
        wanted.extend([("ipv4/conf/all/arp_ignore", "1"), ("ipv4/conf/all/arp_announce", "2")]);
    }
    wanted
}

/// Sets what is not so yet.
pub(super) fn set(strict_arp: bool) -> Result<(), StartError> {
    for (name, value) in wanted(kernel::version(), strict_arp) {
        set_one(name, value).map_err(|source| StartError::Setting { name: format!("net/{name}"), source })?;
    }
    Ok(())
}

/// One that is right already is not written: it may be read-only in a container.
fn set_one(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new(NET).join(name);
    if std::fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    std::fs::write(path, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_kernels_are_told_about_reuse() {
        let has = |version, strict, name| wanted(version, strict).iter().any(|(one, _)| *one == name);
        assert!(has((5, 8), false, "ipv4/vs/conn_reuse_mode") && !has((6, 1), false, "ipv4/vs/conn_reuse_mode"));
        assert!(has((6, 1), true, "ipv4/conf/all/arp_ignore") && !has((6, 1), false, "ipv4/conf/all/arp_ignore"));
    }
}
