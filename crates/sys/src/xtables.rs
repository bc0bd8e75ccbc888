//! The tables of iptables as the kernel's own `ip_tables` and `ip6_tables` keep them (`iptables-legacy`).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// How full a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Rules, and what begins and ends chains.
    pub entries: u32,
    /// All of them together.
    pub bytes: u32,
}

/// `struct ipt_getinfo` (linux/netfilter_ipv4/ip_tables.h), the same as `struct ip6t_getinfo`.
#[repr(C)]
struct GetInfo {
    name: [u8; TABLE_NAME_BYTES],
    valid_hooks: u32,
    hook_entry: [u32; HOOKS],
    underflow: [u32; HOOKS],
    num_entries: u32,
    size: u32,
}

/// `XT_TABLE_MAXNAMELEN`.
const TABLE_NAME_BYTES: usize = 32;
/// `NF_INET_NUMHOOKS`.
const HOOKS: usize = 5;
/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`.
const GET_INFO: libc::c_int = 64;

/// A socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Xtables {
    fd: OwnedFd,
    level: libc::c_int,
}

impl Xtables {
    /// Opens a socket for one address family.
    ///
    /// # Errors
    /// CAP_NET_RAW is missing, or the kernel has no such family.
    pub fn open(ipv6: bool) -> io::Result<Xtables> {
        let (family, level) =
            if ipv6 { (AddressFamily::INET6, libc::SOL_IPV6) } else { (AddressFamily::INET, libc::SOL_IP) };
        let raw = Some(rustix::net::ipproto::RAW);
        let fd = rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, raw)?;
        Ok(Xtables { fd, level })
    }

    /// How full a table is. The kernel makes a table that is asked for, so ask for those that are there.
    ///
    /// # Errors
    /// The kernel has no such table (`ENOENT`) or no `ip_tables` (`ENOPROTOOPT`), or CAP_NET_ADMIN is missing.
    pub fn usage(&self, table: &str) -> io::Result<Usage> {
        let mut name = [0; TABLE_NAME_BYTES];
        let bytes = table.as_bytes();
        name.get_mut(..bytes.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(bytes);
        let mut info =
            GetInfo { name, valid_hooks: 0, hook_entry: [0; HOOKS], underflow: [0; HOOKS], num_entries: 0, size: 0 };
        let mut length = libc::socklen_t::try_from(size_of::<GetInfo>()).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `length` bytes into `info`, whose fields take any bit pattern; both live here.
        let got = unsafe {
            libc::getsockopt(self.fd.as_raw_fd(), self.level, GET_INFO, (&raw mut info).cast(), &raw mut length)
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Usage { entries: info.num_entries, bytes: info.size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_struct_has_this_size() {
        assert_eq!(size_of::<GetInfo>(), 84);
    }
}
