//! The daemon's side of unpacking a layer: feeds the confined child, takes its report, and trusts none of it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Stdio;

use sys::tree::Dir;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;

use crate::child::Child;
use crate::config::Limits;
use crate::digest::Digest;
use crate::error::Error;
use crate::worker::protocol::{HexPath, Job, Order, Report, Unpacked};

const PIPE_BYTES: usize = 1 << 20;

/// A layer being unpacked. Dropping it ends the child.
#[derive(Debug)]
pub(crate) struct Unpack {
    layer: Digest,
    target: Dir,
    child: Child,
    input: Option<pipe::Sender>,
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
        let started = start(&target, limits);
        let (child, input) = started.map_err(|e| Error::Worker {
            layer: layer.clone(),
            reason: format!("cannot start the unpacking process: {e}"),
        })?;
        Ok(Self { layer: layer.clone(), target, child, input: Some(input) })
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
        let failed = |reason: String| Error::Worker { layer: self.layer.clone(), reason };
        let report = self.child.report().await.map_err(failed)?;
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

fn start(target: &Dir, limits: &Limits) -> io::Result<(Child, pipe::Sender)> {
    let (child_input, input) = io::pipe()?;
    // A narrow pipe is only slower: the kernel may refuse more for users with many pipes.
    let _ = sys::confine::widen_pipe(&input, PIPE_BYTES);
    let order = Order { job: Job::Unpack, limits: limits.clone() };
    let child = Child::start(target, &order, Stdio::from(child_input))?;
    Ok((child, pipe::Sender::from_owned_fd(OwnedFd::from(input))?))
}

/// Only the words of the report reach a message; nothing in it becomes a path or a command but the opaque
/// directories, which are opened beneath the target without following links.
fn accept(report: Report, layer: &Digest) -> Result<Unpacked, Error> {
    let layer = layer.clone();
    match report {
        Report::Done(unpacked) => Ok(unpacked),
        Report::Listed(_) => Err(Error::Worker { layer, reason: "the unpacking process has listed it instead".into() }),
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
