//! Programs that the operator configured to give out credentials: run with a time limit, a bound on what they say, and
//! an end that takes their children along.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use sys::rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

/// Which program, and how it is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// Beside the daemon's own environment.
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) time_limit: Duration,
}

/// Why a program gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("cannot start {}: {reason}", path.display())]
    Start { path: PathBuf, reason: String },
    #[error("{} did not end within {limit:?} and was killed", path.display())]
    TimedOut { path: PathBuf, limit: Duration },
    #[error("{} wrote more than {ANSWER_BYTES_MAX} bytes and was killed", path.display())]
    TooMuch { path: PathBuf },
    #[error("{} failed ({status}): {words}", path.display())]
    Failed { path: PathBuf, status: String, words: String },
    #[error("cannot talk to {}: {reason}", path.display())]
    Broken { path: PathBuf, reason: String },
}

/// What a program has said, and how it ended.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) output: Vec<u8>,
    status: ExitStatus,
    words: String,
}

/// No honest answer is longer; an ECR token takes about 3 KiB.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// What a message shows of its complaints.
const WORDS_BYTES_MAX: usize = 2 << 10;

impl Program {
    /// Runs the program on `input` to its end, whatever that is. Dropping this kills the program.
    pub(crate) async fn run(&self, input: &[u8]) -> Result<Answer, ProgramError> {
        let broken = |e: io::Error| ProgramError::Broken { path: self.path.clone(), reason: e.to_string() };
        let mut running = self.start().await?;
        match tokio::time::timeout(self.time_limit, running.talk(input)).await {
            Err(_) => return Err(ProgramError::TimedOut { path: self.path.clone(), limit: self.time_limit }),
            Ok(result) => result.map_err(broken)?,
        }
        if running.output.len() > ANSWER_BYTES_MAX {
            return Err(ProgramError::TooMuch { path: self.path.clone() });
        }
        running.end().map_err(broken)
    }

    /// As [`Program::run`], for programs that end with 0 when they have an answer.
    pub(crate) async fn ask(&self, input: &[u8]) -> Result<Vec<u8>, ProgramError> {
        let answer = self.run(input).await?;
        if answer.status.success() {
            return Ok(answer.output);
        }
        Err(self.failure(answer))
    }

    pub(crate) fn failure(&self, answer: Answer) -> ProgramError {
        let status = answer.status.to_string();
        ProgramError::Failed { path: self.path.clone(), status, words: answer.words }
    }

    async fn start(&self) -> Result<Running, ProgramError> {
        let failed = |reason: String| ProgramError::Start { path: self.path.clone(), reason };
        let program = self.clone();
        // It may lie on a file system that hangs.
        let child = tokio::task::spawn_blocking(move || program.spawn()).await;
        let child = child.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
        Running::new(child).map_err(|e| failed(e.to_string()))
    }

    #[expect(clippy::disallowed_methods, reason = "the operator has configured this program by name and directory")]
    fn spawn(&self) -> io::Result<Child> {
        Command::new(&self.path)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    }
}

impl Answer {
    pub(crate) fn is_success(&self) -> bool {
        self.status.success()
    }
}

/// A program at work. It dies with this, and so does all that it has started, as far as that is in its process group.
struct Running {
    child: Option<Child>,
    /// Readable when the program has ended.
    ended: AsyncFd<OwnedFd>,
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    output: Vec<u8>,
    words: Vec<u8>,
}

impl Running {
    fn new(mut child: Child) -> io::Result<Self> {
        let ended = sys::process::pidfd_open(pid(&child)).map_err(io::Error::other).and_then(watch);
        let stdin = child.stdin.take().map(|end| pipe::Sender::from_owned_fd(end.into())).transpose();
        let stdout = child.stdout.take().map(|end| pipe::Receiver::from_owned_fd(end.into())).transpose();
        let stderr = child.stderr.take().map(|end| pipe::Receiver::from_owned_fd(end.into())).transpose();
        let parts = ended.and_then(|ended| Ok((ended, stdin?, stdout?, stderr?)));
        match parts {
            Ok((ended, stdin, stdout, stderr)) => {
                Ok(Self { child: Some(child), ended, stdin, stdout, stderr, output: Vec::new(), words: Vec::new() })
            }
            Err(e) => {
                kill_and_reap(child);
                Err(e)
            }
        }
    }

    /// Feeds and listens until the program ends or has said too much. Who holds its pipes after it is not waited for.
    async fn talk(&mut self, mut input: &[u8]) -> io::Result<()> {
        loop {
            tokio::select! {
                ended = self.ended.readable() => break ended.map(|mut guard| guard.retain_ready())?,
                read = listen(&self.stdout) => if !take_in(read?, &mut self.output, ANSWER_BYTES_MAX + 1) {
                    self.stdout = None;
                },
                read = listen(&self.stderr) => if !take_in(read?, &mut self.words, WORDS_BYTES_MAX) {
                    self.stderr = None;
                },
                written = feed(&self.stdin, input) => match written {
                    Some(bytes) if bytes < input.len() => input = &input[bytes..],
                    _ => self.stdin = None,
                },
            }
            if self.output.len() > ANSWER_BYTES_MAX {
                return Ok(());
            }
        }
        drain(self.stdout.take(), &mut self.output, ANSWER_BYTES_MAX + 1)?;
        drain(self.stderr.take(), &mut self.words, WORDS_BYTES_MAX)
    }

    /// Reaps a program that has ended, and ends what it left behind.
    fn end(mut self) -> io::Result<Answer> {
        let mut child = self.child.take().ok_or(io::ErrorKind::NotFound)?;
        kill(&child);
        let status = child.wait()?;
        let words = String::from_utf8_lossy(&self.words).trim().to_owned();
        Ok(Answer { output: std::mem::take(&mut self.output), status, words })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.take().into_iter().for_each(kill_and_reap);
    }
}

#[expect(deprecated, reason = "an OwnedFd is all that the deprecation asks for, and the replacement is unsafe")]
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(pidfd, Interest::READABLE)
}

/// What can be read now; none at the end. Never ready without a pipe.
async fn listen(pipe: &Option<pipe::Receiver>) -> io::Result<Option<Vec<u8>>> {
    let Some(pipe) = pipe else { return std::future::pending().await };
    let mut piece = vec![0; 16 << 10];
    loop {
        pipe.readable().await?;
        match pipe.try_read(&mut piece) {
            Ok(0) => return Ok(None),
            Ok(read) => {
                piece.truncate(read);
                return Ok(Some(piece));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// How much of `input` was taken; none if nobody takes more. Never ready without a pipe.
async fn feed(pipe: &Option<pipe::Sender>, input: &[u8]) -> Option<usize> {
    let Some(pipe) = pipe else { return std::future::pending().await };
    loop {
        // A program that does not want its input is free not to read it.
        pipe.writable().await.ok()?;
        match pipe.try_write(input) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return other.ok(),
        }
    }
}

/// Keeps `most` bytes; false at the end.
fn take_in(piece: Option<Vec<u8>>, kept: &mut Vec<u8>, most: usize) -> bool {
    let Some(piece) = piece else { return false };
    let room = most.saturating_sub(kept.len());
    kept.extend_from_slice(&piece[..piece.len().min(room)]);
    true
}

/// Takes in what a program that has ended has left in its pipe.
fn drain(pipe: Option<pipe::Receiver>, kept: &mut Vec<u8>, most: usize) -> io::Result<()> {
    let Some(pipe) = pipe else { return Ok(()) };
    let room = u64::try_from(most.saturating_sub(kept.len())).unwrap_or(u64::MAX);
    match File::from(pipe.into_nonblocking_fd()?).take(room).read_to_end(kept) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Ok(()),
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// The child has not been reaped, so the group is still its own. Gone already is as good.
fn kill(child: &Child) {
    let _ = sys::process::kill_group(pid(child));
}

fn kill_and_reap(mut child: Child) {
    kill(&child);
    // One in a hung file system does not end at once: a thread of its own waits, not the caller. If no thread can be
    // had, the zombie goes with this process.
    let _ = std::thread::Builder::new().name("reap-program".into()).spawn(move || child.wait());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn shell(script: &str) -> Program {
        Program {
            path: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![("GREETING".into(), "hello".into())],
            time_limit: Duration::from_secs(20),
        }
    }

    #[tokio::test]
    async fn passes_input_arguments_and_environment() {
        let input = "x".repeat(300_000);
        let answer = shell("echo $GREETING; wc -c; echo complaint >&2").ask(input.as_bytes()).await.unwrap();
        assert_eq!(String::from_utf8(answer).unwrap().split_whitespace().collect::<Vec<_>>(), ["hello", "300000"]);
    }

    #[tokio::test]
    async fn tells_what_a_failure_said() {
        let error = shell("echo 'no such role' >&2; exit 3").ask(b"ignored").await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("no such role"), "{error}");
        let program = Program { path: "/nowhere/provider".into(), ..shell("") };
        let error = program.ask(b"").await.unwrap_err().to_string();
        assert!(error.contains("cannot start /nowhere/provider"), "{error}");
    }

    #[tokio::test]
    async fn does_not_wait_for_what_a_program_leaves_behind() {
        let started = Instant::now();
        assert_eq!(shell("sleep 1000 & echo done").ask(b"").await.unwrap(), b"done\n");
        assert!(started.elapsed() < Duration::from_secs(15), "the sleeping child holds the pipes");
    }

    /// A program that is too slow is killed with its children: the last of them closes this pipe.
    #[tokio::test]
    async fn kills_the_whole_group_in_time() {
        let (alive, held) = io::pipe().unwrap();
        let held_at = std::os::fd::AsRawFd::as_raw_fd(&held);
        let inherited = format!("exec 9>/proc/{}/fd/{held_at}; sleep 1000 & sleep 1000", std::process::id());
        let program = Program { time_limit: Duration::from_millis(300), ..shell(&inherited) };
        let error = program.ask(b"").await.unwrap_err();
        assert!(matches!(error, ProgramError::TimedOut { .. }), "{error}");
        drop(held);
        let mut alive = pipe::Receiver::from_owned_fd(alive.into()).unwrap();
        let mut nothing = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut alive, &mut nothing).await.unwrap();
    }

    #[tokio::test]
    async fn bounds_what_it_takes_in() {
        let error = shell("yes").ask(b"").await.unwrap_err();
        assert!(matches!(error, ProgramError::TooMuch { .. }), "{error}");
        let error = shell("yes complaint | head -c 3000000 >&2; exit 1").ask(b"").await.unwrap_err();
        assert!(error.to_string().len() < 4096, "{error}");
    }
}
