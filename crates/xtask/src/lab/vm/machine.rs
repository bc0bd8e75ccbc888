//! One virtual machine: qemu without any acceleration by hardware, and what its jobs say on the second serial line.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::Shape;
use super::disk::System;
use super::kernel::Kernel;

/// From the start of qemu to the first job.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Lines of the kernel's console that are shown when something went wrong.
const CONSOLE_LINES: usize = 40;

/// qemu with the kernel and the disk; everything written is forgotten when it ends.
pub(super) fn command(kernel: &Kernel, system: &System, shape: Shape<'_>) -> anyhow::Result<Command> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]);
    qemu.arg("-m").arg(shape.memory_mib.to_string());
    qemu.args(["-nographic", "-no-reboot", "-nic", "none"]);
    qemu.arg("-kernel").arg(kernel.image()?).arg("-initrd").arg(system.initramfs());
    qemu.arg("-drive").arg(format!("file={},if=virtio,format=raw,snapshot=on,cache=unsafe", system.disk().display()));
    qemu.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 {}", shape.append));
    Ok(qemu)
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// With this exit code; a signal is 128 and its number.
    Code(i32),
    /// Not within its limit.
    Late(Duration),
    /// The machine ended under it: a crash of the kernel, or too little memory.
    Lost,
}

/// A job that began and ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) end: End,
    /// What it wrote to stdout and stderr.
    pub(crate) output: Vec<String>,
    pub(crate) took: Duration,
}

/// What is told while the machine runs.
#[derive(Debug)]
pub(crate) enum News<'a> {
    /// A job wrote a line.
    Line(&'a str),
    /// A job ended.
    Ended(&'a Outcome),
}

/// The job that the machine is at.
struct Running {
    name: String,
    begin: Instant,
    output: Vec<String>,
}

impl Running {
    fn ended(self, end: End, tell: &mut impl FnMut(News<'_>)) -> Outcome {
        let outcome = Outcome { name: self.name, end, output: self.output, took: self.begin.elapsed() };
        tell(News::Ended(&outcome));
        outcome
    }
}

/// A running machine.
pub(super) struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    reader: Option<std::thread::JoinHandle<()>>,
    console: PathBuf,
}

impl Machine {
    /// Starts `qemu`, with the jobs' disk; the kernel's console goes to the file `console`.
    pub(super) fn start(mut qemu: Command, jobs: &std::path::Path, console: PathBuf) -> anyhow::Result<Self> {
        qemu.arg("-drive").arg(format!("file={},if=virtio,format=raw,readonly=on", jobs.display()));
        qemu.args(["-monitor", "none", "-serial"]).arg(format!("file:{}", console.display()));
        qemu.args(["-serial", "stdio"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut qemu = qemu.spawn().context("start qemu")?;
        let stdout = qemu.stdout.take().context("stdout is piped")?;
        let (sender, lines) = channel();
        let reader = std::thread::spawn(move || read_lines(stdout, &sender));
        Ok(Self { qemu, lines, reader: Some(reader), console })
    }

    /// Follows the jobs until the machine ends or one of them is late; that one is the last outcome then. What happens is
    /// told at once.
    pub(super) fn follow(&mut self, limit: Duration, mut tell: impl FnMut(News<'_>)) -> Vec<Outcome> {
        let mut done = Vec::new();
        let mut running: Option<Running> = None;
        let mut deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let line = match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(why) => {
                    let end = if why == RecvTimeoutError::Timeout { End::Late(limit) } else { End::Lost };
                    let rest = self.rest();
                    if let Some(mut job) = running {
                        rest.iter().for_each(|line| tell(News::Line(line)));
                        job.output.extend(rest);
                        done.push(job.ended(end, &mut tell));
                    }
                    return done;
                }
            };
            match Mark::parse(&line) {
                Some(Mark::Begin(name)) => {
                    deadline = Instant::now() + limit;
                    running = Some(Running { name: name.to_owned(), begin: Instant::now(), output: Vec::new() });
                }
                Some(Mark::End(code)) => {
                    done.extend(running.take().map(|job| job.ended(End::Code(code), &mut tell)));
                }
                None => {
                    tell(News::Line(&line));
                    running.iter_mut().for_each(|job| job.output.push(line.clone()));
                }
            }
        }
    }

    /// Ends the machine. Returns what it had not said to the end, and what the kernel said last.
    fn rest(&mut self) -> Vec<String> {
        self.kill();
        let mut rest: Vec<String> = self.lines.iter().filter(|line| Mark::parse(line).is_none()).collect();
        rest.push(format!("the kernel's console ends with:\n{}", self.console()));
        rest
    }

    fn kill(&mut self) {
        // It has ended already unless a job was late.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }

    /// The end of the kernel's console.
    pub(super) fn console(&self) -> String {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join(); // it cannot panic, and ends with the pipe
        }
    }
}

fn read_lines(stdout: ChildStdout, to: &std::sync::mpsc::Sender<String>) {
    for line in BufReader::new(stdout).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
        if to.send(line).is_err() {
            return;
        }
    }
}

/// A line by which the machine's init tells where it is.
#[derive(Debug, PartialEq)]
enum Mark<'a> {
    Begin(&'a str),
    End(i32),
}

impl<'a> Mark<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        if let Some(name) = line.strip_prefix("@@begin ") {
            return Some(Self::Begin(name));
        }
        let (code, _) = line.strip_prefix("@@end ")?.split_once(' ')?;
        Some(Self::End(code.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_from_output() {
        assert_eq!(Mark::parse("@@begin a b"), Some(Mark::Begin("a b")));
        assert_eq!(Mark::parse("@@end 101 a b"), Some(Mark::End(101)));
        assert_eq!(Mark::parse("test @@end 1 x ... ok"), None);
    }
}
