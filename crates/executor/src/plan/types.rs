//! What a plan consists of: plain values that name no host path but those of [`Source`].

use std::ffi::CString;

use sys::mount::Propagation;

use crate::oci::{IdMapping, NamespaceKind};
use crate::wire::{Bytes, DecodeError, decode, encode};

/// One container's start, compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// The process itself.
    pub process: ProcessPlan,
    /// Namespaces made for it, [`sys::process::namespace`].
    pub new_namespaces: u64,
    /// Namespaces that it joins. A user namespace is always joined: whoever launches makes it first
    /// ([`crate::namespaces::create`]) where the specification gives no path.
    pub joins: Vec<NamespaceKind>,
    /// Host name, in the UTS namespace that is made or joined.
    pub hostname: Option<String>,
    /// NIS domain name, in the same.
    pub domainname: Option<String>,
    /// The root file system; absent for a process that shares the caller's mounts.
    pub root: Option<RootPlan>,
    /// Bind mounts that the owner of the host's mounts opens ([`crate::prepare::open_sources`]).
    pub sources: Vec<Source>,
    /// Names below `/proc/sys` and their values.
    pub sysctls: Vec<(String, String)>,
    /// Offsets of the clocks of a new time namespace.
    pub time_offsets: Vec<TimeOffset>,
    /// Programs that the container's own process runs on its way.
    pub hooks: HooksPlan,
    /// Stop when the mounts are made, before the root is entered, until [`crate::Starting::go_on`].
    pub halts: bool,
    /// Stop before exec until [`crate::Gate::open`].
    pub gate: bool,
    /// SIGKILL when the launching process ends.
    pub dies_with_parent: bool,
    /// What could not be planned as asked.
    pub warnings: Vec<Warning>,
}

/// A process, of a container or of an exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessPlan {
    /// Paths to try, in order: one, or one for each directory of `PATH`.
    pub programs: Vec<CString>,
    /// Arguments, beginning with the name.
    pub arguments: Vec<CString>,
    /// Environment.
    pub environment: Vec<CString>,
    /// Working directory, absolute.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// Capabilities.
    pub capabilities: CapabilitySets,
    /// Resource (number of setrlimit(2)), soft and hard limit.
    pub rlimits: Vec<Rlimit>,
    /// exec never adds privileges.
    pub no_new_privileges: bool,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// The assembled filter, an array of `struct sock_filter`.
    pub seccomp: Option<SeccompPlan>,
    /// How it is scheduled; as the launcher without.
    pub scheduler: Option<SchedulerPlan>,
    /// Class and level of input and output, see ioprio_set(2).
    pub io_priority: Option<(u32, u32)>,
    /// Execution domain, see personality(2).
    pub personality: Option<u64>,
    /// CPUs, as words of 64, before it enters its control group.
    pub cpus_first: Vec<u64>,
    /// CPUs afterwards.
    pub cpus: Vec<u64>,
    /// AppArmor profile to execute under.
    pub apparmor: Option<String>,
    /// SELinux context to execute in.
    pub selinux: Option<String>,
    /// Name of a session keyring of its own.
    pub keyring: Option<String>,
    /// `HOME` comes from the container's `/etc/passwd` where the environment has none.
    pub finds_home: bool,
    /// The user owns the standard streams, unless they are the null device.
    pub owns_streams: bool,
    /// Whether it asks for a terminal.
    pub terminal: bool,
}

/// The five sets as bits, bit n for capability n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of capabilities(7)")]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

/// A resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimit {
    /// Number of setrlimit(2).
    pub resource: u32,
    /// In force.
    pub soft: u64,
    /// Ceiling.
    pub hard: u64,
}

/// A system call filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeccompPlan {
    /// An array of `struct sock_filter`.
    pub program: Bytes,
    /// Flags of seccomp(2).
    pub flags: u32,
    /// Calls are reported to a listener, see [`crate::Launched::listener`].
    pub notifies: bool,
}

/// How a process is scheduled, see sched_setattr(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerPlan {
    /// Number of the policy.
    pub policy: u32,
    /// `SCHED_FLAG_…`.
    pub flags: u64,
    /// -20 to 19.
    pub nice: i32,
    /// Of the real-time policies.
    pub priority: u32,
    /// Nanoseconds, of `SCHED_DEADLINE`.
    pub runtime_ns: u64,
    /// Nanoseconds, of `SCHED_DEADLINE`.
    pub deadline_ns: u64,
    /// Nanoseconds, of `SCHED_DEADLINE`.
    pub period_ns: u64,
}

/// Offset of a clock in a new time namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeOffset {
    /// `monotonic` or `boottime`.
    pub clock: String,
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds.
    pub nanosecs: u32,
}

/// Programs that the container's process runs on its way, with its state on their standard input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HooksPlan {
    /// The state as JSON, but for `pid` and `status`.
    pub state: String,
    /// In the container's namespaces, before its root is entered: by paths of the host.
    pub create_container: Vec<HookPlan>,
    /// In the container, before its program.
    pub start_container: Vec<HookPlan>,
}

/// One hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookPlan {
    /// Program.
    pub program: CString,
    /// Arguments, beginning with the name.
    pub arguments: Vec<CString>,
    /// Environment.
    pub environment: Vec<CString>,
    /// Seconds until it is killed.
    pub timeout_s: Option<u32>,
}

/// The root file system and everything in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootPlan {
    /// Mounts in order.
    pub mounts: Vec<MountPlan>,
    /// Nodes in the `/dev` that the plan makes.
    pub devices: Vec<DeviceNode>,
    /// Symbolic links in the `/dev` that the plan makes: name and destination.
    pub device_links: Vec<(String, String)>,
    /// Paths nobody can read.
    pub masked_paths: Vec<String>,
    /// Paths nobody can write.
    pub readonly_paths: Vec<String>,
    /// The root mount becomes read-only at the end.
    pub readonly: bool,
    /// Propagation of the whole tree at the end; private without.
    pub propagation: Option<PropagationPlan>,
    /// How the root is entered.
    pub entry: RootEntry,
    /// The directory of the host that the root is attached on until it is entered. Hooks look for it there.
    pub at: String,
    /// SELinux label of its message queues and of what covers masked directories; that of its file systems is in their options.
    pub label: Option<String>,
}

/// How the root is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootEntry {
    /// pivot_root(2): the old root is gone.
    Pivot,
    /// Mount over `/` and chroot(2): where the host's root is the initramfs, which cannot be pivoted away.
    Chroot,
}

/// Propagation, of one mount or of all below too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PropagationPlan {
    /// Which.
    pub kind: Propagation,
    /// Everything below too.
    pub recursive: bool,
}

/// One mount in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPlan {
    /// Where, absolute.
    pub target: String,
    /// What.
    pub what: Mounted,
    /// The target is a file when it has to be made.
    pub is_file: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mounted {
    /// The detached mount of [`LaunchPlan::sources`] with this index. Its attributes are set already.
    Source(u32),
    /// A new file system, made in the container's namespaces.
    New(FilesystemPlan),
    /// A tmpfs with the device nodes: the container's `/dev`.
    Devices(FilesystemPlan),
    /// What the root has at the target itself, as a mount of its own: it stays writable where the root does not.
    Own,
}

/// A file system to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesystemPlan {
    /// Its kind: `proc`, `tmpfs`.
    pub kind: String,
    /// Options of its own: name, and value where it has one.
    pub options: Vec<(String, Option<String>)>,
    /// [`sys::mount::attribute`]s of the mount.
    pub attributes: u64,
    /// Copies what the image has at the target into it.
    pub copy_up: bool,
}

/// A bind mount's source on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Path on the host.
    pub path: String,
    /// Where it appears, for messages.
    pub target: String,
    /// Everything mounted below comes along.
    pub recursive: bool,
    /// [`sys::mount::attribute`]s to set on the mount.
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// What is changed on everything below, too.
    pub below: Below,
    /// Propagation; private without.
    pub propagation: Option<PropagationPlan>,
    /// Id mapping.
    pub id_map: IdMap,
}

/// [`sys::mount::attribute`]s of a mount and of everything below it, by `rro`, `rexec` and the like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Below {
    /// To set.
    pub set: u64,
    /// To clear.
    pub clear: u64,
}

/// The id mapping of a bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdMap {
    /// None.
    None,
    /// That of the container's user namespace.
    Container {
        /// Everything below too.
        recursive: bool,
    },
    /// One of its own.
    Own {
        /// Users.
        uids: Vec<IdMapping>,
        /// Groups.
        gids: Vec<IdMapping>,
        /// Everything below too.
        recursive: bool,
    },
}

/// A node in the container's `/dev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Path in the container, absolute.
    pub path: String,
    /// `c`, `b` or `p`, or the host's node as a mount.
    pub kind: DeviceKind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// How a device node comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A character device made by mknod(2).
    Character,
    /// A block device made by mknod(2).
    Block,
    /// A named pipe.
    Fifo,
    /// The source with this index: in a user namespace the kernel makes no device nodes.
    Bound(u32),
}

/// What could not be done as asked although the process runs. Say it once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// Lowering the score needs CAP_SYS_RESOURCE, which the node does not have.
    #[error("oom_score_adj {wanted} needs CAP_SYS_RESOURCE; it is {got}")]
    OomScoreAdj {
        /// Asked for.
        wanted: i32,
        /// What it is.
        got: i32,
    },
    /// Capabilities that the node does not have itself, as bits.
    #[error("the node itself lacks capabilities {0:#x}; they are left out")]
    Capabilities(u64),
    /// A capability that this build does not know.
    #[error("there is no capability {0}; it is left out")]
    UnknownCapability(String),
}

impl LaunchPlan {
    /// As bytes: a version, then the fields in order. For a reader of the same version.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// From bytes.
    ///
    /// # Errors
    /// Bytes of another version, or cut off.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        decode(bytes)
    }
}
