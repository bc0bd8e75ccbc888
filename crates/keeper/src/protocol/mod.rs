//! What the daemon and a keeper say to each other, as values and bytes; no IO, so that any client can use it.
//!
//! # Frames
//! The two talk over a Unix stream socket. All integers are little-endian.
//!
//! | offset | size | meaning |
//! |---|---|---|
//! | 0 | 4 | length of the body in bytes, at most [`BODY_MAX`] |
//! | 4 | 2 | kind, see below |
//! | 6 | 2 | number of file descriptors that belong to this frame, at most [`FDS_MAX`] |
//! | 8 | 4 | request number chosen by the client, repeated in the reply; 0 in events |
//! | 12 | … | body: the fields of the message in declared order ([`wire`]) |
//!
//! File descriptors travel by `SCM_RIGHTS` with the first byte of their frame.
//!
//! # Messages
//! Kinds below 0x100 are requests (client → keeper), each answered by exactly one reply of 0x100…0x1ff. Requests are done in
//! their order, and so come the replies, but for those to [`Launch`], [`Exec`] and their like: they come when the process has executed
//! its program. Until then it can be killed by [`Signal`]. From 0x200 on are events, sent only to the controlling
//! connection.
//!
//! | kind | request | file descriptors, in order | reply |
//! |---|---|---|---|
//! | 0x01 | [`Hello`] | – | [`Welcome`] |
//! | 0x02 | snapshot | – | [`Snapshot`] |
//! | 0x03 | [`Launch`] | log directory if `log`; root if `root`; `mounts`; `cgroups`; one per `joins` from [`JoinFrom::Fd`] | [`Started`] + pidfd |
//! | 0x04 | [`Exec`] | stdin, stdout, stderr as flagged; none of them with `tty` | [`Started`] + pidfd (+ pty master with `tty`) |
//! | 0x05 | [`Signal`] | – | done |
//! | 0x06 | [`Resize`] | – | done |
//! | 0x07 | [`ReopenLog`] | new log directory if `directory` | done |
//! | 0x08 | [`Attach`] | stdin, stdout, stderr as flagged | done |
//! | 0x09 | [`CloseStdin`] | – | done |
//! | 0x0a | [`GetNamespace`] | – | done + namespace |
//! | 0x0b | [`Forget`] | – | done |
//! | 0x0c | [`Shutdown`] | – | done, then the keeper ends |
//! | 0x0d | [`Drive`] | log directory if `log`; root; `mounts`; `cgroups`; one per `joins` from [`JoinFrom::Fd`] | [`Started`] + pidfd |
//! | 0x0e | [`DriveExec`] | as [`Exec`] | as [`Exec`] |
//!
//! Any request may be answered by [`Failure`] instead. [`Hello`] comes first on every connection; a second controlling
//! connection replaces the first one, which is closed.
//!
//! # Delivery
//! Nothing is queued for a client that is away: the keeper's state is the truth and [`Snapshot`] tells all of it, exits
//! included, until they are forgotten. A client that does not read its events is disconnected and asks again.
//!
//! # Versions
//! [`Hello`] names the range of versions that the client speaks, [`Welcome`] the one that both will use. A version
//! only ever appends messages; a message never changes its fields within a kind. A plan inside a message has a version of its own
//! (`executor`): whoever raises that raises this one, and goes on writing plans of the version that a keeper of before reads. Tests
//! hold what 0.1.0 said (`testkit/past`).

mod frame;
#[cfg(test)]
mod fuzz;
mod messages;
#[cfg(test)]
mod past;
pub mod wire;

pub use frame::{Decoder, Frame, HEADER_LEN, Message, encode};
pub use messages::*;
pub use wire::{Blob, DecodeError};

/// The newest version that this build speaks.
pub const VERSION: u16 = 1;
/// The oldest version that this build speaks.
pub const VERSION_OLDEST: u16 = 1;
/// Longest body of a frame. An exec may carry 2 MiB of arguments and environment (`_STK_LIM / 4` in the kernel's
/// `fs/exec.c`), a plan a few hundred KiB beside them.
pub const BODY_MAX: usize = 4 << 20;
/// Most file descriptors of one frame; the kernel allows 253 a message (`SCM_MAX_FD`).
pub const FDS_MAX: usize = 253;
/// Name of the keeper's socket in the sandbox's directory.
pub const SOCKET: &str = "keeper.sock";
/// Name of the file in the sandbox's directory that mirrors [`Snapshot`] for the time after the keeper.
pub const RECORD: &str = "keeper.state";
/// Name of the file in the directory of [`Commands`] that the first of them writes the id of its process to.
pub const PID: &str = "pid";
/// Name of the socket there to which it sends the master of the terminal.
pub const CONSOLE: &str = "console.sock";
/// Name of the directory there on which the container's root is mounted, for the first command alone.
pub const ROOTFS: &str = "rootfs";
/// Name of the directory there with its other mounts by their numbers (volumes `v0`, …), and namespaces by the names that
/// they have in `/proc/<pid>/ns`.
pub const MOUNTS: &str = "mounts";
