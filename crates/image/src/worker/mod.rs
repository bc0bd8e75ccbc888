//! The confined child that turns the bytes of a layer into files, and lists image archives (R2: bytes of images are
//! parsed here and nowhere else).
//!
//! It is this same program, started by [`crate::child`] with a hidden argument: working directory = the empty target,
//! standard input = the layer or archive, standard output = the [`protocol::Report`]. Before the first byte it has no root but the
//! target, no network, six capabilities, a memory limit and a short list of system calls.

pub(crate) mod inflate;
pub(crate) mod input;
pub(crate) mod listing;
pub(crate) mod path;
pub(crate) mod protocol;
mod stream;
pub(crate) mod tar;
mod tree;

use std::io::{self, Write as _};
use std::path::Path;

use protocol::{ARGUMENT, Job, Order, Report, Unpacked};
use stream::Stream;
use sys::confine;
use tar::TarError;
use tree::{Failure, Tree};

const OPEN_FILES_MAX: u64 = 64;

/// Runs the worker and never returns, if this process was started as one; else does nothing.
///
/// Call it first in `main`, before any thread exists.
pub fn maybe_run() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|first| first != ARGUMENT) {
        return;
    }
    let report = arguments.next().and_then(|order| serde_json::from_str(order.to_str()?).ok()).map_or_else(
        || Report::Failed { reason: "the order on the command line is malformed".into() },
        |order: Order| run(&order),
    );
    // If the daemon is gone, nobody is left to be told.
    let _ = io::stdout().write_all(&serde_json::to_vec(&report).unwrap_or_default());
    std::process::exit(0);
}

fn run(order: &Order) -> Report {
    match order.job {
        Job::Unpack => run_unpack(order),
        Job::List => run_list(order),
    }
}

fn run_unpack(order: &Order) -> Report {
    let started = confine_process(order, confine::UNPACKING).and_then(|()| Stream::start(io::stdin(), &order.limits));
    // The filter comes last: it forbids new threads.
    let ready = started.and_then(|stream| confine::allow_only(&confine::unpacking_calls()).map(|()| stream));
    match ready {
        Ok(mut stream) => {
            stream.open();
            unpack(stream, order)
        }
        Err(error) => not_confined(&error),
    }
}

fn run_list(order: &Order) -> Report {
    let confined = confine_process(order, confine::NOTHING);
    let ready = confined.and_then(|()| confine::allow_only(&confine::unpacking_calls()));
    if let Err(error) = ready {
        return not_confined(&error);
    }
    let root = match sys::tree::Dir::open(Path::new("/")) {
        Ok(root) => root,
        Err(error) => return Report::Failed { reason: format!("cannot open the work directory: {error}") },
    };
    match listing::list(&root, &order.limits) {
        Ok(listing) => Report::Listed(listing),
        Err(failure) => report_failure("", failure),
    }
}

fn not_confined(error: &io::Error) -> Report {
    Report::Failed {
        reason: format!("cannot confine the unpacking process: {error}; it needs root or a user namespace of its own"),
    }
}

fn confine_process(order: &Order, capabilities: confine::Capabilities) -> io::Result<()> {
    sys::tree::clear_umask();
    confine::enter_root()?;
    confine::limit(confine::Budget {
        memory_bytes_max: order.limits.memory_bytes_max,
        file_bytes_max: order.limits.bytes_max,
        open_files_max: OPEN_FILES_MAX,
    })?;
    confine::keep_capabilities(capabilities)?;
    end_with_the_daemon()
}

/// Nobody waits for a report that nobody can read: what this process was doing is to be swept away.
fn end_with_the_daemon() -> io::Result<()> {
    let watch = || {
        confine::wait_until_unread(io::stdout());
        sys::process::exit_now(1);
    };
    std::thread::Builder::new().name("watch".into()).spawn(watch).map(drop)
}

fn unpack(stream: Stream, order: &Order) -> Report {
    let root = match sys::tree::Dir::open(Path::new("/")) {
        Ok(root) => root,
        Err(error) => return Report::Failed { reason: format!("cannot open the target: {error}") },
    };
    let mut archive = tar::Archive::new(stream);
    let mut tree = Tree::new(root, &order.limits);
    loop {
        match archive.next() {
            Ok(None) => break,
            Ok(Some(entry)) => {
                if let Err(failure) = tree.add(&entry, &mut archive) {
                    return report_failure(&tree::lossy(&entry.name), failure);
                }
            }
            Err(error) => return report_failure("", error.into()),
        }
    }
    finish(tree, archive.into_source())
}

fn finish(tree: Tree<'_>, stream: Stream) -> Report {
    let (taken, opaque) = match tree.finish() {
        Ok(result) => result,
        Err(failure) => return report_failure("", failure),
    };
    match stream.finish() {
        Ok(diff_id) => Report::Done(Unpacked { diff_id, bytes: taken.bytes, inodes: taken.inodes, opaque }),
        Err(error) => report_failure("", TarError::Source(error).into()),
    }
}

fn report_failure(entry: &str, failure: Failure) -> Report {
    let entry = entry.to_owned();
    match failure {
        Failure::Refused(reason) => Report::Refused { entry, reason },
        Failure::Archive(TarError::Source(error)) if error.kind() == io::ErrorKind::FileTooLarge => {
            Report::Refused { entry, reason: error.to_string() }
        }
        Failure::Archive(TarError::Source(error)) if is_full(&error) => Report::DiskFull { entry },
        Failure::Archive(error) => Report::Corrupt { reason: error.to_string() },
        Failure::Io { source, .. } if is_full(&source) => Report::DiskFull { entry },
        Failure::Io { step, source } => {
            Report::Failed { reason: format!("cannot {step} for entry {entry:?}: {source}") }
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
