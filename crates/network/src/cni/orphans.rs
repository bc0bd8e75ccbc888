//! Plugins that a daemon has started and not seen end, because it was killed: nobody reads what they answer, and what they
//! make after a DEL would be nobody's.
//!
//! They are looked for among the processes of the daemon's own control groups: a plugin is in them as its daemon was. Processes of
//! pods never are, and of those nothing is read: the kernel lets them say that their environment is large, and holds up who reads it
//! while they wait for a file system that hangs.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::process::Pid;

/// What tells plugins their sandbox (CNI's SPEC.md, "Parameters"): those that a plugin starts itself have it, too.
const SANDBOX: &[u8] = b"CNI_CONTAINERID=";
/// And what they are to do.
const ADD: &[u8] = b"CNI_COMMAND=ADD";
const KILL: i32 = 9;
/// What killed processes may take to be gone, all together; the kernel may hold one in a hung file system.
const DEATH: Duration = Duration::from_secs(2);

/// More is no plugin's environment.
const ENVIRONMENT_MAX: u64 = 1 << 20;

/// Which processes of a sandbox were left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// All.
    All,
    /// Those of what came after a whole ADD.
    After,
}

/// Ends all processes that work on these sandboxes, and waits for their ends. Returns how many there were.
///
/// # Errors
/// The processes cannot be listed, or one does not go.
pub(crate) fn end(sandboxes: &HashMap<&str, Work>) -> io::Result<usize> {
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

fn find(sandboxes: &HashMap<&str, Work>) -> io::Result<Vec<OwnedFd>> {
    let own = fs::read("/proc/self/cgroup")?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        // First the descriptor: what is read then is about the same process, or nothing is signalled.
        let Some(process) = pid.and_then(|pid| sys::process::pidfd_open(pid).ok()) else { continue };
        // Unreadable is what has ended.
        if fs::read(entry.path().join("cgroup")).ok().as_ref() != Some(&own) {
            continue;
        }
        let environment = environment(&entry.path()).unwrap_or_default();
        let mut variables = environment.split(|byte| *byte == 0);
        let is_add = variables.clone().any(|variable| variable == ADD);
        let sandbox = variables.find_map(|variable| std::str::from_utf8(variable.strip_prefix(SANDBOX)?).ok());
        let work = sandbox.and_then(|sandbox| sandboxes.get(sandbox));
        if work.is_some_and(|work| *work == Work::All || !is_add) {
            found.push(process);
        }
    }
    Ok(found)
}

fn environment(process: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(process.join("environ"))?.take(ENVIRONMENT_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
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
    fn plugin(sandbox: &str, command: &str) -> Child {
        let mut plugin = Command::new("/bin/sh");
        plugin.args(["-c", "sleep 1000 & echo; wait"]).stdout(Stdio::piped());
        plugin.env("CNI_CONTAINERID", sandbox).env("CNI_COMMAND", command);
        let mut plugin = plugin.spawn().unwrap();
        BufReader::new(plugin.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        plugin
    }

    #[test]
    fn all_of_a_sandbox_go_and_no_others() {
        let own = format!("orphans-{}", std::process::id());
        let [other, dead] = ["other", "dead"].map(|kind| format!("{own}-{kind}"));
        let (mut stays, mut goes) = (plugin(&other, "ADD"), plugin(&dead, "ADD"));
        // What has ended and was not waited for counts as gone.
        assert!(end(&HashMap::from([(dead.as_str(), Work::All)])).unwrap() >= 2);
        assert_eq!(end(&HashMap::from([(dead.as_str(), Work::All)])).unwrap(), 0);
        assert!(!goes.wait().unwrap().success());
        assert!(stays.try_wait().unwrap().is_none());
        assert_eq!(end(&HashMap::from([(other.as_str(), Work::All)])).unwrap(), 2);
        stays.wait().unwrap();
    }

    #[test]
    fn what_an_add_has_left_running_stays_and_a_del_goes() {
        let sandbox = format!("orphans-after-{}", std::process::id());
        let (mut serves, mut deletes) = (plugin(&sandbox, "ADD"), plugin(&sandbox, "DEL"));
        assert_eq!(end(&HashMap::from([(sandbox.as_str(), Work::After)])).unwrap(), 2);
        deletes.wait().unwrap();
        assert!(serves.try_wait().unwrap().is_none());
        assert_eq!(end(&HashMap::from([(sandbox.as_str(), Work::All)])).unwrap(), 2);
        serves.wait().unwrap();
    }
}
