//! Plugins that a daemon has started and not seen end, because it was killed: nobody reads what they answer, and what they
//! make after a DEL would be nobody's.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::process::Pid;

/// What tells plugins their sandbox (CNI's SPEC.md, "Parameters"): those that a plugin starts itself have it, too.
const SANDBOX: &[u8] = b"CNI_CONTAINERID=";
const KILL: i32 = 9;
/// What killed processes may take to be gone, all together; the kernel may hold one in a hung file system.
const DEATH: Duration = Duration::from_secs(2);

/// Ends all processes that work on these sandboxes, and waits for their ends. Returns how many there were.
///
/// # Errors
/// The processes cannot be listed, or one does not go.
pub(crate) fn end(sandboxes: &HashSet<&str>) -> io::Result<usize> {
    let (mut ended, ends_at) = (0, Instant::now() + DEATH);
    // One may start another between the look and its end.
    loop {
        let found = find(sandboxes)?;
        if found.is_empty() {
            return Ok(ended);
        }
        if Instant::now() > ends_at {
            let message = format!("{} processes of CNI plugins do not end", found.len());
            return Err(io::Error::new(io::ErrorKind::TimedOut, message));
        }
        ended += found.len();
        for process in &found {
            // It may have ended by itself.
            let _ = sys::process::send_signal(process.as_fd(), KILL);
        }
        found.iter().for_each(|process| wait(process, ends_at));
    }
}

fn find(sandboxes: &HashSet<&str>) -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        // First the descriptor: what is read then is about the same process, or nothing is signalled.
        let Some(process) = pid.and_then(|pid| sys::process::pidfd_open(pid).ok()) else { continue };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default(); // of one that has ended
        let mut variables = environment.split(|byte| *byte == 0);
        let sandbox = variables.find_map(|variable| std::str::from_utf8(variable.strip_prefix(SANDBOX)?).ok());
        if sandbox.is_some_and(|sandbox| sandboxes.contains(sandbox)) {
            found.push(process);
        }
    }
    Ok(found)
}

fn wait(process: &OwnedFd, ends_at: Instant) {
    let left = ends_at.saturating_duration_since(Instant::now());
    // Whatever it answers: the next look tells.
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Timespec::try_from(left).ok().as_ref());
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A plugin that works on `sandbox` with a program of its own, when both run.
    #[expect(clippy::disallowed_methods, reason = "what plugins are started by")]
    fn plugin(sandbox: &str) -> Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "sleep 1000 & echo; wait"]).env("CNI_CONTAINERID", sandbox).stdout(Stdio::piped());
        let mut plugin = command.spawn().unwrap();
        BufReader::new(plugin.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        plugin
    }

    #[test]
    fn all_of_a_sandbox_go_and_no_others() {
        let own = format!("orphans-{}", std::process::id());
        let [other, dead] = ["other", "dead"].map(|kind| format!("{own}-{kind}"));
        let (mut stays, mut goes) = (plugin(&other), plugin(&dead));
        // What has ended and was not waited for counts as gone.
        assert!(end(&HashSet::from([dead.as_str()])).unwrap() >= 2);
        assert_eq!(end(&HashSet::from([dead.as_str()])).unwrap(), 0);
        assert!(!goes.wait().unwrap().success());
        assert!(stays.try_wait().unwrap().is_none());
        assert_eq!(end(&HashSet::from([other.as_str()])).unwrap(), 2);
        stays.wait().unwrap();
    }
}
