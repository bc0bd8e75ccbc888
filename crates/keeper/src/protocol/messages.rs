//! The messages and the values in them. See the table in [`super`].

use super::wire::{Blob, DecodeError, Input, Wire, wire_enum, wire_messages, wire_struct};

/// A wall-clock time in nanoseconds since 1970, as CRI wants it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixNanos(pub u64);

impl Wire for UnixNanos {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        u64::take(input).map(Self)
    }
}

wire_messages! {
    /// What a client may ask.
    pub enum Request {
        /// Opens a connection.
        0x01 => Hello(Hello),
        /// Asks for everything that the keeper knows.
        0x02 => Snapshot,
        /// Starts a container.
        0x03 => Launch(Launch),
        /// Starts a process in a running container.
        0x04 => Exec(Exec),
        /// Sends a signal to a container's init or an exec'd process.
        0x05 => Signal(Signal),
        /// Sets the terminal size of a container.
        0x06 => Resize(Resize),
        /// Closes and opens the log file again, after someone renamed it.
        0x07 => ReopenLog(ReopenLog),
        /// Copies a container's output to the client, and the client's input to the container.
        0x08 => Attach(Attach),
        /// Closes the container's standard input.
        0x09 => CloseStdin(CloseStdin),
        /// Asks for a file descriptor of a namespace of the pod.
        0x0a => GetNamespace(GetNamespace),
        /// Drops the record of a container or exec'd process that has ended.
        0x0b => Forget(Forget),
        /// Ends the keeper.
        0x0c => Shutdown(Shutdown),
        /// Starts a container by another OCI runtime.
        0x0d => Drive(Drive),
        /// Starts a process in such a container.
        0x0e => DriveExec(DriveExec),
    }
}

wire_messages! {
    /// What the keeper answers.
    pub enum Reply {
        /// To [`Request::Hello`].
        0x101 => Welcome(Welcome),
        /// To [`Request::Snapshot`].
        0x102 => Snapshot(Snapshot),
        /// To [`Request::Launch`] and [`Request::Exec`].
        0x103 => Started(Started),
        /// To all others.
        0x104 => Done,
        /// It did not work; nothing of it remains.
        0x1ff => Failed(Failure),
    }
}

wire_messages! {
    /// What the keeper tells its controlling connection.
    pub enum Event {
        /// A container's init has ended; all it had written to its pipes is in its log.
        0x201 => Exited(Exited),
        /// An exec'd process has ended.
        0x202 => ExecExited(Exited),
        /// An attached client was let go.
        0x203 => Detached(Detached),
        /// Output of a container is being lost, or no longer.
        0x204 => LogTrouble(LogTrouble),
    }
}

wire_enum! {
    /// What a connection is for.
    pub enum Role {
        /// The one that receives events. A new one replaces the old one.
        Control = 1,
        /// Requests only.
        Guest = 2,
    }

    /// A namespace of the pod.
    pub enum NamespaceKind {
        /// Network.
        Net = 1,
        /// Host and domain name.
        Uts = 2,
        /// System V IPC and POSIX message queues.
        Ipc = 3,
        /// Process ids.
        Pid = 4,
        /// User and group ids.
        User = 5,
        /// Mounts.
        Mount = 6,
        /// Control groups.
        Cgroup = 7,
    }

    /// Where a container's namespace comes from.
    pub enum JoinFrom {
        /// The pod's own, held by the keeper.
        Pod = 1,
        /// A file descriptor of the request.
        Fd = 2,
    }

    /// What the file descriptors of control groups are (`sys::cgroup::Entry`).
    pub enum CgroupEntry {
        /// There are none: the process stays in the keeper's group.
        Stay = 0,
        /// Version 2: one directory.
        Directory = 1,
        /// Version 1: a `cgroup.procs` of each hierarchy, open for writing.
        Files = 2,
    }

    /// What kind of failure a [`Failure`] is.
    pub enum Reason {
        /// The two speak no common version.
        Version = 1,
        /// The request does not fit the state: no such container, it runs already, it has no terminal.
        State = 2,
        /// The request itself is wrong.
        Invalid = 3,
        /// The sandbox's namespaces could not be made; the keeper ends.
        Sandbox = 4,
        /// The process could not be started; `step` is the executor's.
        Launch = 5,
        /// A system call failed; `step` names it.
        System = 6,
    }

    /// Why an attached client was let go.
    pub enum DetachReason {
        /// It did not read fast enough, and the container does not wait for it.
        Slow = 1,
        /// It closed its end.
        Gone = 2,
    }
}

wire_struct! {
    /// Body of [`Request::Hello`].
    pub struct Hello {
        /// Oldest version that the client speaks.
        pub oldest: u16,
        /// Newest version that the client speaks.
        pub newest: u16,
        /// What the connection is for.
        pub role: Role,
    }

    /// Body of [`Reply::Welcome`].
    pub struct Welcome {
        /// The version that both speak from now on.
        pub version: u16,
        /// The sandbox that this keeper keeps.
        pub sandbox: String,
        /// The keeper's process id; `/proc/<pid>/ns/{net,uts,ipc}` are the pod's.
        pub pid: u32,
        /// The kernel's boot id, so that a record can be told from one of an earlier boot.
        pub boot_id: String,
        /// When the keeper began.
        pub started: UnixNanos,
    }

    /// Body of [`Request::Launch`].
    pub struct Launch {
        /// The container's id, new in this sandbox.
        pub id: String,
        /// An encoded `executor::LaunchPlan`.
        pub plan: Blob,
        /// Whether the first file descriptor (after the log's) is the detached root.
        pub root: bool,
        /// How many detached mounts come with the request.
        pub mounts: u16,
        /// How the container enters its control group.
        pub cgroup: CgroupEntry,
        /// How many file descriptors of control groups come with the request.
        pub cgroups: u16,
        /// The namespaces that the container joins.
        pub joins: Vec<Join>,
        /// Its standard streams.
        pub stdio: Stdio,
        /// Where its output is logged; discarded when absent.
        pub log: Option<Log>,
    }

    /// One namespace to join.
    pub struct Join {
        /// Which.
        pub kind: NamespaceKind,
        /// Whose.
        pub from: JoinFrom,
    }

    /// The standard streams of a container.
    pub struct Stdio {
        /// The size of its terminal, if it has one. Then all output is standard output.
        pub tty: Option<WindowSize>,
        /// Whether standard input stays open for clients to attach; `/dev/null` otherwise.
        pub stdin: bool,
        /// Whether standard input is closed when the first client that attached to it goes.
        pub stdin_once: bool,
    }

    /// A log file. Its directory comes as a file descriptor.
    pub struct Log {
        /// Name of the file in its directory.
        pub name: String,
        /// Limits for rotation by the keeper; without them the file grows until someone renames it.
        pub rotate: Option<Rotate>,
    }

    /// When the keeper rotates a log by itself.
    pub struct Rotate {
        /// A file is renamed before it grows beyond this.
        pub bytes_max: u64,
        /// How many files are kept, the current one included; at least 1.
        pub files_max: u32,
    }

    /// Size of a terminal.
    pub struct WindowSize {
        /// Lines.
        pub rows: u16,
        /// Characters a line.
        pub columns: u16,
    }

    /// Body of [`Reply::Started`].
    pub struct Started {
        /// The new process.
        pub process: Process,
        /// What could not be done as asked although the process runs.
        pub warnings: Vec<String>,
    }

    /// A process that the keeper started.
    pub struct Process {
        /// Process id in the keeper's pid namespace.
        pub pid: u32,
        /// Field 22 of `/proc/<pid>/stat`: with the pid and the boot id it names the process for ever.
        pub start_ticks: u64,
        /// When it was started.
        pub at: UnixNanos,
    }

    /// Body of [`Request::Exec`].
    pub struct Exec {
        /// Id of the session, new in this sandbox.
        pub id: String,
        /// The container.
        pub container: String,
        /// An encoded `executor::ExecPlan`.
        pub plan: Blob,
        /// Runs it on a new terminal of this size; the reply carries its master, and the session ends with it.
        pub tty: Option<WindowSize>,
        /// Whether a file descriptor for standard input comes with the request; `/dev/null` otherwise.
        pub stdin: bool,
        /// The same for standard output.
        pub stdout: bool,
        /// The same for standard error.
        pub stderr: bool,
    }

    /// What another OCI runtime is asked to do.
    pub struct Commands {
        /// Its program.
        pub program: String,
        /// The arguments of each command, which are run one after the other. The first makes the process.
        pub words: Vec<Vec<String>>,
        /// Their working directory, below the sandbox's: [`super::PID`], [`super::CONSOLE`] and the rest are in it.
        pub directory: String,
    }

    /// Body of [`Request::Drive`].
    pub struct Drive {
        /// The container's id, new in this sandbox.
        pub id: String,
        /// What makes and starts it.
        pub commands: Commands,
        /// How many detached mounts come with the request, beside the root.
        pub mounts: u16,
        /// How the first command enters the control group from which the bundle's path of one counts.
        pub cgroup: CgroupEntry,
        /// How many file descriptors of control groups come with the request.
        pub cgroups: u16,
        /// Directories of the root that it can mount over themselves.
        pub volumes: Vec<String>,
        /// The namespaces that it can join.
        pub joins: Vec<Join>,
        /// Its standard streams.
        pub stdio: Stdio,
        /// Where its output is logged; discarded when absent.
        pub log: Option<Log>,
    }

    /// Body of [`Request::DriveExec`].
    pub struct DriveExec {
        /// Id of the session, new in this sandbox.
        pub id: String,
        /// The container.
        pub container: String,
        /// What makes it.
        pub commands: Commands,
        /// Whether it has a terminal; the reply carries its master, and the session ends with it.
        pub tty: bool,
        /// Whether a file descriptor for standard input comes with the request; `/dev/null` otherwise.
        pub stdin: bool,
        /// The same for standard output.
        pub stdout: bool,
        /// The same for standard error.
        pub stderr: bool,
    }

    /// Body of [`Request::Signal`]; done as well when the process has ended but is not forgotten.
    pub struct Signal {
        /// A container or an exec session.
        pub id: String,
        /// Number of the signal.
        pub signal: u32,
    }

    /// Body of [`Request::Resize`].
    pub struct Resize {
        /// A container with a terminal.
        pub id: String,
        /// Its new size.
        pub size: WindowSize,
    }

    /// Body of [`Request::ReopenLog`].
    pub struct ReopenLog {
        /// The container, running or not.
        pub id: String,
        /// Whether a file descriptor of the directory comes with the request (it was made anew).
        pub directory: bool,
    }

    /// Body of [`Request::Attach`]. The file descriptors are pipes or sockets; the keeper makes them non-blocking.
    pub struct Attach {
        /// Number chosen by the client, for [`Event::Detached`].
        pub attach: u32,
        /// A running container.
        pub id: String,
        /// Whether a source of standard input comes with the request. At its end the container sees the end of its
        /// input if it was started with `stdin_once`.
        pub stdin: bool,
        /// Whether a sink for standard output comes with the request.
        pub stdout: bool,
        /// Whether a sink for standard error comes with the request.
        pub stderr: bool,
    }

    /// Body of [`Request::CloseStdin`].
    pub struct CloseStdin {
        /// The container.
        pub id: String,
    }

    /// Body of [`Request::GetNamespace`].
    pub struct GetNamespace {
        /// Which; the host's when the pod has none of its own.
        pub kind: NamespaceKind,
        /// Of this container instead of the pod.
        pub container: Option<String>,
    }

    /// Body of [`Request::Forget`]; done as well when there is no such record.
    pub struct Forget {
        /// A container or an exec session that has ended. Its log file is closed.
        pub id: String,
    }

    /// Body of [`Request::Shutdown`].
    pub struct Shutdown {
        /// Kill what still runs and do not ask.
        pub kill: bool,
    }

    /// Everything that the keeper knows: body of [`Reply::Snapshot`] and content of the file [`super::RECORD`].
    pub struct Snapshot {
        /// The sandbox.
        pub sandbox: Welcome,
        /// Process id of the pod's pid-1, where the pod shares one pid namespace.
        pub reaper: Option<u32>,
        /// All containers that are not forgotten.
        pub containers: Vec<Container>,
        /// All exec sessions that are not forgotten. The file has none of them.
        pub execs: Vec<ExecSession>,
    }

    /// One container.
    pub struct Container {
        /// Its id.
        pub id: String,
        /// Its init.
        pub process: Process,
        /// How it ended, if it did.
        pub exit: Option<Exit>,
        /// Output that was dropped because the log could not take it.
        pub lost_bytes: u64,
    }

    /// One exec session.
    pub struct ExecSession {
        /// Its id.
        pub id: String,
        /// Its container.
        pub container: String,
        /// Its process.
        pub process: Process,
        /// How it ended, if it did.
        pub exit: Option<Exit>,
    }

    /// How a process ended.
    pub struct Exit {
        /// Its exit code; 128 + `signal` when a signal ended it.
        pub code: u32,
        /// The signal that ended it, 0 if none.
        pub signal: u32,
        /// When the keeper saw it.
        pub at: UnixNanos,
    }

    /// Body of [`Event::Exited`] and [`Event::ExecExited`].
    pub struct Exited {
        /// The container or exec session.
        pub id: String,
        /// How it ended.
        pub exit: Exit,
    }

    /// Body of [`Event::Detached`].
    pub struct Detached {
        /// The container.
        pub id: String,
        /// The number in [`Attach`].
        pub attach: u32,
        /// Why.
        pub reason: DetachReason,
    }

    /// Body of [`Event::LogTrouble`].
    pub struct LogTrouble {
        /// The container.
        pub id: String,
        /// The error of the write, 0 when the log works again.
        pub errno: i32,
        /// Bytes of output lost so far.
        pub lost_bytes: u64,
    }

    /// Body of [`Reply::Failed`].
    pub struct Failure {
        /// What kind of failure.
        pub reason: Reason,
        /// The step that failed.
        pub step: String,
        /// The kernel's error number, 0 if there is none.
        pub errno: i32,
        /// Objects and remedy, for a human.
        pub detail: String,
    }
}
