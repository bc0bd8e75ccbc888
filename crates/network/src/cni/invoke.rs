//! Starting a plugin: its own process group, a clean environment, a limit of time and of output.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use sys::rustix::io::Errno;
use sys::rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Most that a plugin may write to each of its outputs.
const OUTPUT_MAX: usize = 1 << 20;
/// What a killed process may take to be gone; the kernel may hold it in a hung file system.
const DEATH: Duration = Duration::from_secs(2);
/// A program that is being replaced cannot be started for a moment.
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
/// For plugins that start programs of the host themselves, such as `iptables`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a plugin did.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// Why a plugin has no output.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvokeError {
    #[error("it cannot be started: {0}")]
    Start(io::Error),
    #[error("it did not end within {} s and was killed; look at the plugin's own log, or raise the limit", .0.as_secs_f32())]
    TimeOut(Duration),
    #[error("it wrote more than {OUTPUT_MAX} bytes and was killed")]
    TooMuch,
    #[error("its pipes or its end cannot be read: {0}")]
    Wait(io::Error),
}

impl Output {
    /// How it ended, in words.
    pub(crate) fn describe(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "it ended".to_owned(),
        }
    }
}

/// Runs a plugin in the calling thread's network namespace until it ends or `limit` has passed.
pub(crate) fn run(
    program: &Path,
    environment: &[(&str, String)],
    input: &[u8],
    limit: Duration,
) -> Result<Output, InvokeError> {
    let child = start(program, environment).map_err(InvokeError::Start)?;
    let mut plugin = Plugin { child, limit, ends_at: Instant::now() + limit };
    let done = plugin.converse(input);
    if done.is_err() {
        plugin.kill();
    }
    done
}

fn start(program: &Path, environment: &[(&str, String)]) -> io::Result<Child> {
    #[allow(clippy::disallowed_methods, reason = "the operator has configured this plugin (R3)")]
    let mut command = Command::new(program);
    command.env_clear().env("PATH", PATH).envs(environment.iter().map(|(key, value)| (key, value)));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/").process_group(0);
    let mut tries = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_PAUSE); // Nothing tells when the writer closes it.
            }
            other => return other,
        }
    }
}

/// A running plugin.
struct Plugin {
    child: Child,
    limit: Duration,
    ends_at: Instant,
}

impl Plugin {
    /// Feeds the input and reads both outputs until the process has ended. Processes that it leaves behind may keep the
    /// pipes open; nobody waits for those.
    fn converse(&mut self, mut input: &[u8]) -> Result<Output, InvokeError> {
        let ended =
            pidfd_open(pid_of(&self.child), PidfdFlags::empty()).map_err(|error| InvokeError::Wait(error.into()))?;
        let (mut stdin, mut stdout, mut stderr) =
            (self.child.stdin.take(), self.child.stdout.take(), self.child.stderr.take());
        for pipe in
            [stdin.as_ref().map(|p| p.as_fd()), stdout.as_ref().map(|p| p.as_fd()), stderr.as_ref().map(|p| p.as_fd())]
        {
            pipe.map_or(Ok(()), set_nonblocking).map_err(InvokeError::Wait)?;
        }
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            if input.is_empty() {
                stdin = None;
            }
            let is_over = {
                let mut fds = vec![PollFd::new(&ended, PollFlags::IN)];
                fds.extend(stdin.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
                fds.extend(stdout.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
                fds.extend(stderr.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
                self.wait(&mut fds)?;
                !fds[0].revents().is_empty()
            };
            if let Some(pipe) = &mut stdin {
                match pipe.write(input) {
                    Ok(written) => input = &input[written..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // It does not want to read; what it answers tells whether that is a fault.
                    Err(_) => input = &[],
                }
            }
            take(&mut stdout, &mut out)?;
            take(&mut stderr, &mut err)?;
            if is_over {
                let status = self.child.wait().map_err(InvokeError::Wait)?;
                return Ok(Output { status, stdout: out, stderr: err });
            }
        }
    }

    fn wait(&self, fds: &mut [PollFd<'_>]) -> Result<(), InvokeError> {
        loop {
            let left = self.ends_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(InvokeError::TimeOut(self.limit));
            }
            match poll(fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(InvokeError::Wait(errno.into())),
            }
        }
    }

    /// Ends the plugin and all that it has started. If even that takes long, a thread waits for it.
    fn kill(mut self) {
        let pid = pid_of(&self.child);
        let ended = pidfd_open(pid, PidfdFlags::empty());
        // It has not been waited for, so the number is still its own; that it has ended meanwhile is no error.
        let _ = kill_process_group(pid, Signal::KILL);
        self.ends_at = Instant::now() + DEATH;
        let gone = ended.is_ok_and(|ended| self.wait(&mut [PollFd::new(&ended, PollFlags::IN)]).is_ok());
        let mut reap = move || drop(self.child.wait()); // Its status tells nothing: we killed it.
        if gone {
            return reap();
        }
        if let Err(error) = std::thread::Builder::new().name("reap-cni-plugin".into()).spawn(reap) {
            tracing::warn!(%error, "a killed CNI plugin stays a zombie");
        }
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn set_nonblocking(pipe: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?)
}

/// Reads what is there; closes the pipe at its end.
fn take<R: io::Read>(pipe: &mut Option<R>, into: &mut Vec<u8>) -> Result<(), InvokeError> {
    let Some(open) = pipe else { return Ok(()) };
    let most = OUTPUT_MAX + 1 - into.len();
    match open.take(most as u64).read_to_end(into) {
        Ok(_) if into.len() > OUTPUT_MAX => Err(InvokeError::TooMuch),
        Ok(_) => {
            *pipe = None;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            if into.len() > OUTPUT_MAX {
                Err(InvokeError::TooMuch)
            } else {
                Ok(())
            }
        }
        Err(error) => Err(InvokeError::Wait(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn script(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugin");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    fn run_script(text: &str, input: &[u8], limit: Duration) -> Result<Output, InvokeError> {
        let (_dir, path) = script(text);
        run(&path, &[("CNI_COMMAND", "ADD".to_owned())], input, limit)
    }

    #[test]
    fn input_output_and_end_are_passed() {
        let output = run_script("cat; echo oops >&2; exit 3", b"hello", LONG).unwrap();
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"hello"[..], &b"oops\n"[..]));
        assert_eq!(output.describe(), "exit status 3");
        assert_eq!(run_script("kill -9 $$", b"", LONG).unwrap().describe(), "killed by signal 9");
        let large = vec![b'x'; 300_000];
        assert_eq!(run_script("cat", &large, LONG).unwrap().stdout, large);
        assert!(run_script("exit 0", &large, LONG).unwrap().status.success(), "input that nobody reads is no fault");
    }

    #[test]
    fn the_environment_is_clean() {
        let output = run_script("env", b"", LONG).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let names: Vec<&str> = text.lines().filter_map(|line| line.split('=').next()).collect();
        let unknown: Vec<_> = names
            .iter()
            .filter(|name| !["PATH", "CNI_COMMAND", "PWD", "OLDPWD", "_", "SHLVL"].contains(name))
            .collect();
        assert!(unknown.is_empty() && names.contains(&"CNI_COMMAND"), "{text}");
    }

    #[test]
    fn a_hung_plugin_is_killed_with_all_it_started() {
        let (dir, path) = script("sleep 1000 & echo $! > child; cd /; wait");
        let text =
            std::fs::read_to_string(&path).unwrap().replace("> child", &format!("> {}/child", dir.path().display()));
        std::fs::write(&path, text).unwrap();
        let error = run(&path, &[], b"", Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, InvokeError::TimeOut(_)), "{error}");
        let child = std::fs::read_to_string(dir.path().join("child")).unwrap();
        let begin = Instant::now();
        // Somebody else's child now: it is a zombie until init reaps it.
        let runs =
            |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        while runs(child.trim()) {
            assert!(begin.elapsed() < LONG, "its child still runs");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_process_left_behind_is_not_waited_for() {
        let begin = Instant::now();
        let output = run_script("sleep 60 & echo done", b"", LONG).unwrap();
        assert_eq!(output.stdout, b"done\n");
        assert!(begin.elapsed() < LONG);
    }

    #[test]
    fn endless_output_is_cut() {
        assert!(matches!(run_script("exec cat /dev/zero", b"", LONG), Err(InvokeError::TooMuch)));
        assert!(matches!(run_script("exec cat /dev/zero >&2", b"", LONG), Err(InvokeError::TooMuch)));
    }

    #[test]
    fn what_cannot_be_started_is_said() {
        let missing = run(Path::new("/nonexistent/plugin"), &[], b"", LONG).unwrap_err();
        assert!(matches!(missing, InvokeError::Start(_)), "{missing}");
    }
}
