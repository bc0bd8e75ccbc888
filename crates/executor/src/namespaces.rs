//! Namespaces that outlive a container: a pod's own, held as descriptors.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use sys::error::Context as _;
use sys::process::{self, Child, Clone, namespace};
use sys::rustix::fs::{Mode, OFlags};
use sys::rustix::io::Errno;

use crate::oci::{IdMapping, NamespaceKind};
use crate::plan::mask_of;

/// Which namespaces to make, and what to set in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Of `Network`, `Ipc`, `Uts`, `Time`, `Cgroup`, `Mount`. A user namespace is asked for by its mappings, a pid
    /// namespace by [`crate::reaper::start`].
    pub kinds: Vec<NamespaceKind>,
    /// Users of a new user namespace that owns all the others; empty for none.
    pub uids: Vec<IdMapping>,
    /// Its groups.
    pub gids: Vec<IdMapping>,
    /// Host name in the new UTS namespace.
    pub hostname: Option<String>,
    /// Dotted names and values, set in the new network and IPC namespaces, or in those of `inside`.
    pub sysctls: Vec<(String, String)>,
}

/// Makes namespaces. The caller stays where it is and has one thread only. Sysctls of the network go to `network` if
/// that is not made anew.
///
/// # Errors
/// The call that failed; nothing remains.
pub fn create(request: &Request, network: Option<BorrowedFd<'_>>) -> sys::Result<Vec<(NamespaceKind, OwnedFd)>> {
    let (mine, theirs) = crate::launch::channel_pair().during("socketpair", "")?;
    let wanted = request.kinds.iter().fold(0, |bits, kind| bits | mask_of(*kind));
    let user = if request.uids.is_empty() { 0 } else { namespace::USER };
    // A user namespace is made first, with the process: what the process makes afterwards belongs to it.
    let namespaces = if user == 0 { wanted } else { user };
    let keep: Vec<BorrowedFd<'_>> = network.into_iter().chain([theirs.as_fd()]).collect();
    let how = Clone { namespaces, keep: Some(&keep), ..Clone::default() };
    let child = process::spawn(&how, || match holder(request, user, wanted, network, theirs.as_fd()) {
        Ok(()) => 0,
        Err(error) => {
            let _ =
                sys::fdpass::send(theirs.as_fd(), format!("!{}\0{error}", error.errno.raw_os_error()).as_bytes(), &[]);
            1
        }
    })?;
    drop(theirs);
    let made = hold(request, &child, user, &mine);
    drop(mine); // The end of the channel is the end of the holder.
    let _ = process::reap(child.pidfd.as_fd());
    made
}

/// The process that lends its namespaces until the channel ends.
fn holder(
    request: &Request,
    user: u64,
    wanted: u64,
    network: Option<BorrowedFd<'_>>,
    channel: BorrowedFd<'_>,
) -> sys::Result<()> {
    if user != 0 {
        wait(channel)?; // until the mappings are written
        process::become_root()?;
        process::leave(wanted)?;
    }
    if let Some(name) = &request.hostname {
        process::set_host_name(name)?;
    }
    if let Some(network) = network.filter(|_| !request.sysctls.is_empty()) {
        process::join(network, namespace::NETWORK)?;
    }
    crate::launch::sysctls(&request.sysctls).map_err(|error| sys::Error {
        call: "sysctl",
        subject: error.detail.clone(),
        errno: Errno::from_raw_os_error(error.errno),
    })?;
    sys::fdpass::send(channel, b"made", &[]).during("send", "the holder's channel")?;
    wait(channel).map(drop)
}

fn wait(channel: BorrowedFd<'_>) -> sys::Result<usize> {
    sys::fdpass::recv(channel, &mut [0; 8], &mut Vec::new()).during("recv", "the holder's channel")
}

fn hold(request: &Request, child: &Child, user: u64, channel: &OwnedFd) -> sys::Result<Vec<(NamespaceKind, OwnedFd)>> {
    if user != 0 {
        let proc = format!("/proc/{}", child.pid.as_raw_nonzero());
        fs::write(format!("{proc}/uid_map"), mappings(&request.uids)).during("write", "uid_map")?;
        fs::write(format!("{proc}/gid_map"), mappings(&request.gids)).during("write", "gid_map")?;
        sys::fdpass::send(channel.as_fd(), b"go", &[]).during("send", "the holder")?;
    }
    let mut answer = [0; 512];
    let length = sys::fdpass::recv(channel.as_fd(), &mut answer, &mut Vec::new()).during("recv", "the holder")?;
    if &answer[..length] != b"made" {
        return Err(failure(&answer[..length]));
    }
    let user_kind = (user != 0).then_some(NamespaceKind::User);
    let kinds = user_kind.into_iter().chain(request.kinds.iter().copied());
    kinds.map(|kind| Ok((kind, open(child, kind)?))).collect()
}

fn failure(answer: &[u8]) -> sys::Error {
    let text = String::from_utf8_lossy(answer);
    let (errno, subject) = text.strip_prefix('!').and_then(|rest| rest.split_once('\0')).unwrap_or(("10", "it ended"));
    let errno = Errno::from_raw_os_error(errno.parse().unwrap_or(10));
    sys::Error { call: "namespaces", subject: subject.to_owned(), errno }
}

fn mappings(ranges: &[IdMapping]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.container_id, range.host_id, range.size)).collect()
}

/// The namespace of a process.
///
/// # Errors
/// The process has ended.
pub fn open(process: &Child, kind: NamespaceKind) -> sys::Result<OwnedFd> {
    let path = format!("/proc/{}/ns/{}", process.pid.as_raw_nonzero(), file_name(kind));
    sys::rustix::fs::open(Path::new(&path), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during("open", path)
}

/// Its name below `/proc/<pid>/ns`.
pub fn file_name(kind: NamespaceKind) -> &'static str {
    match kind {
        NamespaceKind::User => "user",
        NamespaceKind::Pid => "pid",
        NamespaceKind::Network => "net",
        NamespaceKind::Mount => "mnt",
        NamespaceKind::Ipc => "ipc",
        NamespaceKind::Uts => "uts",
        NamespaceKind::Cgroup => "cgroup",
        NamespaceKind::Time => "time",
    }
}
