//! The three standard streams of a new process.

use std::os::fd::{AsFd as _, OwnedFd};

use sys::pty;
use sys::rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, makedev, open, openat2};
use sys::rustix::io::Errno;

use super::{LaunchError, Stdio, Step};

/// What becomes standard input, output and error.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) three: [OwnedFd; 3],
}

/// The host's `/dev/null` for streams that nobody has given, opened before an image is the root.
pub(crate) fn null_for(stdio: &Stdio) -> Result<Option<OwnedFd>, LaunchError> {
    let is_complete = match stdio {
        Stdio::Streams { stdin, stdout, stderr } => stdin.is_some() && stdout.is_some() && stderr.is_some(),
        Stdio::Terminal { .. } => true,
    };
    let null = || open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    (!is_complete).then(null).transpose().map_err(|errno| LaunchError::new(Step::Streams, errno, "/dev/null"))
}

/// Fills up what is missing from `null`; a terminal becomes the session's.
pub(crate) fn connect(
    stdio: &Stdio,
    terminal: Option<&OwnedFd>,
    null: Option<&OwnedFd>,
) -> Result<Streams, LaunchError> {
    let three = match stdio {
        Stdio::Streams { stdin, stdout, stderr } => {
            [or_null(stdin, null)?, or_null(stdout, null)?, or_null(stderr, null)?]
        }
        Stdio::Terminal { rows, columns } => {
            let Some(master) = terminal else {
                return Err(LaunchError { step: Step::Terminal, errno: 25, detail: "there is no devpts".to_owned() });
            };
            of_terminal(master, *rows, *columns)
                .map_err(|error| LaunchError::io(Step::Terminal, &error, "the container's terminal"))?
        }
    };
    Ok(Streams { three })
}

fn of_terminal(master: &OwnedFd, rows: u16, columns: u16) -> std::io::Result<[OwnedFd; 3]> {
    let terminal = pty::peer(master)?;
    if rows != 0 && columns != 0 {
        pty::resize(&terminal, rows, columns)?;
    }
    pty::make_controlling(&terminal)?;
    Ok([terminal.try_clone()?, terminal.try_clone()?, terminal])
}

fn or_null(stream: &Option<OwnedFd>, null: Option<&OwnedFd>) -> Result<OwnedFd, LaunchError> {
    let failed = |error: std::io::Error| LaunchError::io(Step::Streams, &error, "/dev/null");
    match (stream, stream.is_none().then(own_null).flatten()) {
        (Some(stream), _) => stream.as_fd().try_clone_to_owned().map_err(failed),
        (None, Some(own)) => Ok(own),
        (None, None) => match null {
            Some(null) => null.try_clone().map_err(failed),
            None => Err(LaunchError::new(Step::Streams, Errno::NOENT, "/dev/null")),
        },
    }
}

/// The container's own, by which a program can find it again. What an image has put in its place is not opened: it could be a
/// link to what the launcher holds.
fn own_null() -> Option<OwnedFd> {
    let resolve = ResolveFlags::NO_SYMLINKS;
    let is_null = |fd: &OwnedFd| {
        fstat(fd).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == makedev(1, 3)
        })
    };
    // Opening a device can do things: it is looked at first.
    let place = openat2(CWD, "/dev/null", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).ok()?;
    if !is_null(&place) {
        return None;
    }
    let own =
        openat2(CWD, "/dev/null", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty(), resolve).ok()?;
    is_null(&own).then_some(own)
}
