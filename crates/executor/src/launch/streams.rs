//! The three standard streams of a new process.

use std::os::fd::{AsFd as _, OwnedFd};

use sys::pty;

use super::{LaunchError, Stdio, Step};

/// What becomes standard input, output and error.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) three: [OwnedFd; 3],
}

/// Opens what is missing; a terminal becomes the session's.
pub(crate) fn connect(stdio: &Stdio, terminal: Option<&OwnedFd>) -> Result<Streams, LaunchError> {
    let three = match stdio {
        Stdio::Streams { stdin, stdout, stderr } => [or_null(stdin)?, or_null(stdout)?, or_null(stderr)?],
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

fn or_null(stream: &Option<OwnedFd>) -> Result<OwnedFd, LaunchError> {
    let null = || std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    match stream {
        Some(stream) => stream.as_fd().try_clone_to_owned(),
        None => null(),
    }
    .map_err(|error| LaunchError::io(Step::Streams, &error, "/dev/null"))
}
