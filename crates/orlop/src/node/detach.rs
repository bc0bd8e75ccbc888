//! `--detach`: the node as a process of its own, while the command waits until it is up.
//!
//! ```text
//! orlop up --detach ──fork──► node (session of its own, output to the log file)
//!        ▲                      │ "+" when it is up, "-" and the reason when it cannot be
//!        ╰────────pipe──────────╯
//! ```

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};

use crate::cli::format::print;

/// How the node tells the command that waits for it. A node in the foreground has nobody who waits.
#[derive(Debug, Default)]
pub(crate) struct Waiter(Option<File>);

impl Waiter {
    /// The node is up. Said once; what comes later concerns nobody.
    pub(crate) fn up(&mut self) {
        self.tell(b"+");
    }

    /// The node cannot be.
    pub(crate) fn failed(&mut self, error: &anyhow::Error) {
        self.tell(format!("-{error:#}").as_bytes());
    }

    fn tell(&mut self, text: &[u8]) {
        if let Some(mut pipe) = self.0.take() {
            let _ = pipe.write_all(text); // The command may have been interrupted; the node goes on.
        }
    }
}

/// Forks the node and waits until it is up. The process must have one thread.
pub(crate) fn run(log: &Path) -> anyhow::Result<ExitCode> {
    let (mut reader, writer) = std::io::pipe()?;
    let log_file = open_log(log).with_context(|| format!("open {}", log.display()))?;
    let pid = sys::fork::fork_into(Vec::new(), vec![writer.into(), log_file.into()], node)?;
    let mut answer = String::new();
    reader.read_to_string(&mut answer)?;
    match answer.split_at_checked(1) {
        Some(("+", _)) => {
            let log = log.display();
            print(&format!("orlop: the node runs (pid {pid}); it logs to {log}; `orlop down` ends it\n"));
            Ok(ExitCode::SUCCESS)
        }
        Some(("-", reason)) => bail!("{reason}"),
        _ => bail!("the node ended before it was up; see {}", log.display()),
    }
}

/// The life of the forked process.
fn node(_: Vec<u8>, mut fds: Vec<OwnedFd>) -> ! {
    let (Some(log), Some(pipe)) = (fds.pop(), fds.pop()) else { sys::process::exit_now(1) };
    let mut waiter = Waiter(Some(pipe.into()));
    let began = begin(&log);
    let code = match began {
        Ok(()) => super::up::detached(&mut waiter),
        Err(error) => Err(error),
    };
    if let Err(error) = &code {
        waiter.failed(error);
        eprintln!("orlop: {error:#}");
    }
    std::process::exit(i32::from(code.is_err()))
}

/// Leaves the terminal; what is on standard input (`orlop up -`) can still be read.
fn begin(log: &OwnedFd) -> anyhow::Result<()> {
    sys::fork::new_session()?;
    sys::process::set_standard_streams([std::io::stdin().as_fd(), log.as_fd(), log.as_fd()])?;
    Ok(())
}

fn open_log(log: &Path) -> std::io::Result<File> {
    if let Some(dir) = log.parent() {
        std::fs::create_dir_all(dir)?;
    }
    File::options().create(true).append(true).mode(0o600).open(log)
}
