//! Leaving the lab running: the same command once more in a session of its own, which tells over its standard input when
//! it is up.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};

/// The word for "up".
const READY: &str = "ready";

/// Lines of the log that a failure shows.
const LOG_LINES: usize = 20;

/// Starts `up` again with its output in `log`, and returns when it is up.
///
/// # Errors
/// It is not going to be up; the end of its log is in the message.
pub(super) fn run(log: &Path) -> anyhow::Result<()> {
    if let Some(parent) = log.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let output = std::fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new(std::env::current_exe()?);
    child.args(std::env::args_os().skip(1)).arg("--detached");
    child.stdin(OwnedFd::from(theirs)).stdout(output.try_clone()?).stderr(output);
    child.spawn().context("start the lab's process")?;
    drop(child); // holds a copy of its end of the pair
    let mut said = String::new();
    ours.read_to_string(&mut said)?;
    if said == READY {
        return Ok(());
    }
    let text = std::fs::read_to_string(log)?;
    let lines: Vec<&str> = text.lines().collect();
    bail!("the lab did not come up:\n{}", lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
}

/// In the second run: nobody's terminal is ours any more.
pub(super) fn begin() -> anyhow::Result<()> {
    rustix::process::setsid().map(drop).context("begin a session")
}

/// In the second run: tells the first that the lab is up.
pub(super) fn tell() -> anyhow::Result<()> {
    let mut first = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // The first may have been interrupted; the lab stays up, as `down` would say.
    let _ = first.write_all(READY.as_bytes());
    first.shutdown(std::net::Shutdown::Both).context("end the conversation with the first run")
}
