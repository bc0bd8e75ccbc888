//! What a keeper is told when it begins.

use std::os::fd::{AsFd, BorrowedFd};

use sys::cgroup::Entry;

use crate::protocol::wire::{wire_enum, wire_struct};

wire_enum! {
    /// Which network namespace a pod is in.
    pub enum Network {
        /// The host's.
        Host = 0,
        /// One that comes as a file descriptor.
        Given = 1,
        /// A new one that the keeper makes; with a user namespace it is owned by that. Ask for it with
        /// `GetNamespace` to put an interface into it.
        New = 2,
    }
}

wire_struct! {
    /// A pod's sandbox.
    pub struct KeeperConfig {
        /// The sandbox's id.
        pub sandbox: String,
        /// Its network.
        pub network: Network,
        /// Whether the keeper itself enters its pod's own network, where `/proc/<pid>/net` then shows it to others. What
        /// other OCI runtimes start of their own accord, such as hooks, would be there, too.
        pub enters_network: bool,
        /// Whether a mount namespace comes along. It is kept for whoever asks with `GetNamespace`, and with it what is
        /// mounted there; only the first process of a shared pid namespace lives in it, unless it has labels.
        pub mounts: bool,
        /// Whether it has host and domain names of its own.
        pub own_uts: bool,
        /// Whether it has System V IPC and message queues of its own.
        pub own_ipc: bool,
        /// Whether its containers share one pid namespace, whose first process the keeper provides; wants `mounts`.
        pub shared_pid: bool,
        /// What that first process is labelled with, where the host labels containers.
        pub labels: Option<Labels>,
        /// Its user namespace, if it has one.
        pub user: Option<UserNamespace>,
        /// Its host name, where `own_uts`.
        pub hostname: Option<String>,
        /// Sysctls of its network and IPC namespaces: dotted name and value.
        pub sysctls: Vec<(String, String)>,
        /// The keeper's own protection from the OOM killer; as far as the daemon may grant it.
        pub oom_score_adj: i32,
        /// How long a process may take from its making to its program, in milliseconds.
        pub start_max_ms: u32,
    }

    /// SELinux labels of a pod.
    pub struct Labels {
        /// Of its processes.
        pub process: String,
        /// Of its files.
        pub file: String,
    }

    /// Ids of a user namespace.
    pub struct UserNamespace {
        /// User ids.
        pub uids: Vec<IdMapping>,
        /// Group ids.
        pub gids: Vec<IdMapping>,
    }

    /// A range of ids.
    pub struct IdMapping {
        /// First id inside.
        pub inside: u32,
        /// First id on the host.
        pub outside: u32,
        /// How many.
        pub count: u32,
    }
}

/// The file descriptors that go with a [`KeeperConfig`].
#[derive(Debug)]
pub struct KeeperFds<'a> {
    /// The sandbox's directory, mode 0700, on tmpfs: the keeper puts its socket and its record there.
    pub directory: BorrowedFd<'a>,
    /// The network namespace with [`Network::Given`].
    pub network: Option<BorrowedFd<'a>>,
    /// The mount namespace with [`KeeperConfig::mounts`].
    pub mounts: Option<BorrowedFd<'a>>,
    /// The control group for the keeper itself: a leaf on version 2, where it begins in it. On version 1 it moves there
    /// first, which takes the kernel an RCU grace period; whoever cannot wait for it moves the keeper later.
    pub cgroup: Option<&'a Entry>,
}

impl KeeperFds<'_> {
    /// Directory, network, mounts, control groups.
    pub(crate) fn in_order(&self) -> Vec<BorrowedFd<'_>> {
        let cgroups: &[_] = match self.cgroup {
            None | Some(Entry::Directory(_)) => &[],
            Some(Entry::Files(files)) => files,
        };
        let cgroups = cgroups.iter().map(AsFd::as_fd);
        [self.directory].into_iter().chain(self.network).chain(self.mounts).chain(cgroups).collect()
    }
}
