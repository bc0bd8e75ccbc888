//! Programs of the operator's that the runtime starts and waits for: other OCI runtimes (R3). Hooks are the executor's to start,
//! plugins of the Node Resource Interface are `nri`'s.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::fs::{MemfdFlags, memfd_create};
use sys::rustix::io::Errno;
use sys::rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Most that is read of what a program writes (R6).
const OUTPUT_MAX: u64 = 1 << 20;
/// What a killed process may take to be gone; the kernel may hold it in a hung file system.
const DEATH: Duration = Duration::from_secs(2);
/// For what the program itself starts by name.
pub(crate) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program to start.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// `NAME=value`; nothing else.
    pub(crate) environment: Vec<String>,
    /// Where it runs.
    pub(crate) directory: PathBuf,
    /// Its standard input.
    pub(crate) input: Vec<u8>,
    /// When it is killed.
    pub(crate) limit: Duration,
}

/// What it did.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
}

/// Why it came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("{} cannot be started", program.display())]
    Start {
        program: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: {status}{}", program.display(), told(output))]
    Failed { program: PathBuf, status: ExitStatus, output: String },
    #[error("{} did not end within {} s and was killed", program.display(), limit.as_secs())]
    TimedOut { program: PathBuf, limit: Duration },
}

fn told(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(": {output}") }
}

/// Runs it to its end. Waits: call it from a thread of its own.
///
/// # Errors
/// It cannot be started, ends with another code than 0, or takes too long.
pub(crate) fn run(call: &Call) -> Result<Output, ProgramError> {
    let failed = |source| ProgramError::Start { program: call.program.clone(), source };
    // Files instead of pipes: nobody has to read or write meanwhile, and what it leaves behind holds nobody up.
    let (stdout, stderr) = (memory(&[]).map_err(failed)?, memory(&[]).map_err(failed)?);
    let child = start(call, &stdout, &stderr).map_err(failed)?;
    let status = wait(child, call.limit).map_err(failed)?;
    let Some(status) = status else {
        return Err(ProgramError::TimedOut { program: call.program.clone(), limit: call.limit });
    };
    let stdout = content(stdout);
    if status.success() {
        return Ok(Output { stdout });
    }
    let output = String::from_utf8_lossy(&content(stderr)).trim().to_owned();
    Err(ProgramError::Failed { program: call.program.clone(), status, output })
}

fn memory(content: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("program", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn start(call: &Call, stdout: &File, stderr: &File) -> std::io::Result<Child> {
    #[allow(clippy::disallowed_methods, reason = "the operator has configured it (R3)")]
    let mut command = Command::new(&call.program);
    let variables = call.environment.iter().filter_map(|variable| variable.split_once('='));
    command.args(&call.arguments).env_clear().envs(variables).current_dir(&call.directory);
    command.stdin(memory(&call.input)?).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?).process_group(0);
    command.spawn()
}

/// How it ended; nothing when it had to be killed.
fn wait(mut child: Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    if is_readable(&ended, limit)? {
        return child.wait().map(Some);
    }
    // It has not been waited for, so the number is still its own; that it has ended meanwhile is no error.
    let _ = kill_process_group(pid, Signal::KILL);
    if is_readable(&ended, DEATH)? {
        child.wait()?;
    } else {
        tracing::warn!(pid = child.id(), "a killed program does not end");
    }
    Ok(None)
}

fn is_readable(pidfd: &OwnedFd, limit: Duration) -> std::io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Timespec::try_from(left).ok().as_ref()) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn content(mut file: File) -> Vec<u8> {
    let mut content = Vec::new();
    // What cannot be read of it is missing in a message.
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(OUTPUT_MAX).read_to_end(&mut content));
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, input: &str, limit: Duration) -> Result<Output, ProgramError> {
        run(&Call {
            program: "/bin/sh".into(),
            arguments: ["-c", script].map(str::to_owned).to_vec(),
            environment: vec![PATH.to_owned(), "A=b".to_owned()],
            directory: "/".into(),
            input: input.as_bytes().to_vec(),
            limit,
        })
    }

    #[test]
    fn what_a_program_says_and_how_it_ends() {
        let minute = Duration::from_secs(60);
        assert_eq!(shell("cat; echo $A$HOME", "in ", minute).unwrap().stdout, b"in b\n");
        let error = shell("echo why >&2; exit 3", "", minute).unwrap_err().to_string();
        assert_eq!(error, "/bin/sh: exit status: 3: why");
        let error = shell("sleep 600 & wait", "", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ProgramError::TimedOut { .. }), "{error}");
    }
}
