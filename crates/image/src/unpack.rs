//! The daemon's side of the unpacking child: starts it, feeds it, takes its report, and trusts none of it.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Child, Stdio};

use sys::tree::Dir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;

use crate::config::Limits;
use crate::digest::Digest;
use crate::error::Error;
use crate::worker::protocol::{ARGUMENT, HexPath, Order, Report, Unpacked};

const PIPE_BYTES: usize = 1 << 20;
/// A report with more opaque directories than this holds is no honest one.
const REPORT_BYTES_MAX: u64 = 16 << 20;

/// A layer being unpacked. Dropping it ends the child.
#[derive(Debug)]
pub(crate) struct Unpack {
    layer: Digest,
    target: Dir,
    child: Reaped,
    input: Option<pipe::Sender>,
    report: pipe::Receiver,
}

/// What the tree takes on disk, and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    pub(crate) diff_id: Digest,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl Unpack {
    /// Starts a child that unpacks `layer` into the empty directory `target`.
    pub(crate) fn start(layer: &Digest, target: Dir, limits: &Limits) -> Result<Self, Error> {
        spawn(&target, limits)
            .and_then(|(child, input, report)| {
                // A narrow pipe is only slower: the kernel may refuse more for users with many pipes.
                let _ = sys::confine::widen_pipe(&input, PIPE_BYTES);
                let input = Some(pipe::Sender::from_owned_fd(input)?);
                Ok((child, input, pipe::Receiver::from_owned_fd(report)?))
            })
            .map(|(child, input, report)| Self { layer: layer.clone(), target, child, input, report })
            .map_err(|e| Error::Worker {
                layer: layer.clone(),
                reason: format!("cannot start the unpacking process: {e}"),
            })
    }

    /// Hands over more bytes. An error means that the child wants no more: [`Unpack::finish`] says why.
    pub(crate) async fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.input {
            Some(input) => input.write_all(bytes).await,
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Tells the child that this was all, and waits for its report.
    pub(crate) async fn finish(mut self) -> Result<Tree, Error> {
        self.input = None;
        let mut bytes = Vec::new();
        let read = (&mut self.report).take(REPORT_BYTES_MAX).read_to_end(&mut bytes).await;
        let ended = self.child.wait().await;
        let failed = |reason: String| Error::Worker { layer: self.layer.clone(), reason };
        read.map_err(|e| failed(format!("cannot read the report: {e}")))?;
        let report = serde_json::from_slice(&bytes)
            .map_err(|_| failed(format!("the unpacking process ended without a report ({ended})")))?;
        let unpacked = accept(report, &self.layer)?;
        let target = self.target;
        let opaque = unpacked.opaque;
        tokio::task::spawn_blocking(move || mark_opaque(&target, &opaque))
            .await
            .map_err(|e| failed(e.to_string()))?
            .map_err(|e| failed(format!("cannot mark an opaque directory: {e}")))?;
        Ok(Tree { diff_id: unpacked.diff_id, bytes: unpacked.bytes, inodes: unpacked.inodes })
    }
}

#[expect(clippy::disallowed_methods, reason = "/proc/self/exe is this very program, not another one")]
fn spawn(target: &Dir, limits: &Limits) -> io::Result<(Reaped, OwnedFd, OwnedFd)> {
    let (child_input, input) = io::pipe()?;
    let (report, child_report) = io::pipe()?;
    let order = serde_json::to_string(&Order { limits: limits.clone() })?;
    let child = std::process::Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .arg(order)
        .env_clear()
        .current_dir(format!("/proc/self/fd/{}", target.as_fd().as_raw_fd()))
        .stdin(Stdio::from(child_input))
        .stdout(Stdio::from(child_report))
        .stderr(Stdio::null())
        .spawn()?;
    Ok((Reaped(Some(child)), input.into(), report.into()))
}

/// Only the words of the report reach a message; nothing in it becomes a path or a command but the opaque
/// directories, which are opened beneath the target without following links.
fn accept(report: Report, layer: &Digest) -> Result<Unpacked, Error> {
    let layer = layer.clone();
    match report {
        Report::Done(unpacked) => Ok(unpacked),
        Report::Refused { entry, reason } => Err(Error::MaliciousLayer { layer, entry, reason }),
        Report::Corrupt { reason } => Err(Error::CorruptLayer { layer, reason }),
        Report::DiskFull { entry } => {
            Err(Error::DiskFull { object: format!("layer {layer} (entry {entry:?})"), path: "the image store".into() })
        }
        Report::Failed { reason } => Err(Error::Worker { layer, reason }),
    }
}

/// `trusted.` attributes take CAP_SYS_ADMIN, which the child does not have; so its parent sets them.
fn mark_opaque(target: &Dir, directories: &[HexPath]) -> io::Result<()> {
    for HexPath(path) in directories {
        let path = if path.is_empty() { b"." } else { path.as_slice() };
        let directory = target.open_real(path)?;
        sys::xattr::set(directory.as_fd(), c"trusted.overlay.opaque", b"y")?;
    }
    Ok(())
}

/// A child that is killed and waited for when nobody wants it any more.
#[derive(Debug)]
struct Reaped(Option<Child>);

impl Reaped {
    /// Waits for the end of a child that has closed its report.
    async fn wait(&mut self) -> String {
        let Some(mut child) = self.0.take() else { return "already gone".into() };
        match tokio::task::spawn_blocking(move || child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        // Either it is killed or it has ended; in both cases there is something to reap.
        let _ = child.kill();
        // A child in a hung file system does not end at once: a thread of its own waits, not the caller. If no thread
        // can be had, the zombie goes with this process.
        let _ = std::thread::Builder::new().name("reap-unpack".into()).spawn(move || child.wait());
    }
}
