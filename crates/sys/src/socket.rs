//! Options of sockets that no crate has.

use std::os::fd::{AsFd, AsRawFd as _};

use rustix::io::{Errno, Result};

/// `IP_TRANSPARENT` (`linux/in.h`)
const IP_TRANSPARENT: libc::c_int = 19;
/// `IPV6_TRANSPARENT` (`linux/in6.h`)
const IPV6_TRANSPARENT: libc::c_int = 75;

/// Lets a socket have an address that is not this host's, before it is bound.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN or CAP_NET_RAW in the network namespace.
pub fn set_transparent(socket: impl AsFd, ipv6: bool) -> Result<()> {
    let (level, option) =
        if ipv6 { (libc::IPPROTO_IPV6, IPV6_TRANSPARENT) } else { (libc::IPPROTO_IP, IP_TRANSPARENT) };
    let on: libc::c_int = 1;
    // SAFETY: the option value is a live c_int for the duration of the call and its size is passed with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(0),
        )
    };
    if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}
