//! A copy of this process from before it had a thread, from which helper processes are forked later.
//!
//! ```text
//!   daemon ── number of the helper, flag, data, file descriptors (one packet) ──► zygote ── fork ──► helper
//! ```
//! A helper starts without a program being read from disk, and shares the pages of its siblings. The zygote answers
//! nothing: hand each helper one end of a socket pair and watch the other one. When the daemon goes, the zygote goes;
//! helpers stay.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::{fdpass, fork, process};

/// Longest data of an order.
pub const DATA_MAX: usize = 64 << 10;

/// What a zygote can start.
#[derive(Debug, Clone, Copy)]
pub struct Helper {
    /// By this name.
    pub name: &'static str,
    /// Its whole life. It begins with the data and the file descriptors of the order, in the zygote's session, which has no
    /// terminal and no environment; no other descriptors are open but the standard three, which are `/dev/null`.
    pub run: fn(Vec<u8>, Vec<OwnedFd>) -> !,
}

/// All that the zygote of one program can start.
pub trait Helpers {
    /// At most 256.
    const ALL: &'static [Helper];
}

/// The daemon's handle of a zygote.
#[derive(Debug)]
pub struct Zygote {
    socket: OwnedFd,
    helpers: &'static [Helper],
}

impl Zygote {
    /// Forks the zygote. Must be called before the program has a thread, best first thing in `main`.
    ///
    /// # Errors
    /// The kernel's, and `Unsupported` when there are threads.
    pub fn start<H: Helpers>() -> io::Result<Self> {
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        fork::fork_into(Vec::new(), vec![there], live::<H>)?;
        Ok(Self { socket: here, helpers: H::ALL })
    }

    /// Starts a helper. Does not wait for anything; may be called from any thread.
    ///
    /// # Errors
    /// `BrokenPipe` when the zygote has died, `InvalidInput` for more than [`DATA_MAX`] bytes, `NotFound` for a helper
    /// that is none of the zygote's.
    pub fn spawn(&self, name: &str, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.order(name, data, fds, None)
    }

    /// As [`Zygote::spawn`], where the helper begins its life in a control group of version 2.
    ///
    /// # Errors
    /// As [`Zygote::spawn`].
    pub fn spawn_in_group(
        &self,
        name: &str,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        group: BorrowedFd<'_>,
    ) -> io::Result<()> {
        self.order(name, data, fds, Some(group))
    }

    fn order(&self, name: &str, data: &[u8], fds: &[BorrowedFd<'_>], group: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let helper = self.helpers.iter().position(|helper| helper.name == name);
        let number = helper.and_then(|number| u8::try_from(number).ok());
        let number = number.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no helper {name}")))?;
        if data.len() > DATA_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} bytes for {name}", data.len())));
        }
        let order = [&[number, u8::from(group.is_some())], data].concat();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().copied().chain(group).collect();
        fdpass::send(self.socket.as_fd(), &order, &fds).map(drop)
    }
}

/// The life of the zygote.
fn live<H: Helpers>(_: Vec<u8>, mut fds: Vec<OwnedFd>) -> ! {
    let _ = fork::new_session(); // It is a fresh child and leads nothing, so this cannot fail.
    let _ = fork::detach_stdio(); // Without /dev/null it keeps the daemon's streams; nothing is written to them.
    let _ = process::set_dumpable(false); // Defence in depth; cannot fail for this value.
    // Proxies' passwords and the like: containers of a pod that share their processes see its first one, which comes from here.
    fork::forget_environment();
    fork::ignore_children();
    let _ = fork::set_process_name("orlop-zygote"); // Cosmetic.
    fork::trim_heap();
    if let Some(socket) = fds.pop() {
        while let Ok(Some((order, fds))) = next_order(&socket) {
            // The daemon sees a failure as the end of its socket pair.
            let _ = obey::<H>(&order, fds);
        }
    }
    process::exit_now(0)
}

fn obey<H: Helpers>(order: &[u8], mut fds: Vec<OwnedFd>) -> io::Result<()> {
    let Some((&[number, in_group], data)) = order.split_first_chunk() else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let run = H::ALL.get(usize::from(number)).ok_or(io::ErrorKind::NotFound)?.run;
    match if in_group == 0 { None } else { fds.pop() } {
        Some(group) => fork::fork_into_group(group.as_fd(), data.to_vec(), fds, run),
        None => fork::fork_into(data.to_vec(), fds, run).map(drop),
    }
}

/// One order; `None` when the daemon is gone.
fn next_order(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut order, mut fds) = (vec![0; DATA_MAX + 2], Vec::new());
    let length = fdpass::recv(socket.as_fd(), &mut order, &mut fds)?;
    order.truncate(length);
    order.shrink_to_fit();
    Ok((length > 0).then_some((order, fds)))
}
