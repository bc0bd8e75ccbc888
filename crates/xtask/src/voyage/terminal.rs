//! A terminal as a person has it: commands on one end, keys and a screen on the other.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::wait;

const SOON: Duration = Duration::from_secs(30);

/// A pseudo-terminal.
pub(crate) struct Terminal {
    master: OwnedFd,
    path: std::path::PathBuf,
}

impl Terminal {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::unlockpt(&master)?;
        let path = rustix::pty::ptsname(&master, Vec::new())?.into_string()?.into();
        Ok(Self { master, path })
    }

    /// Starts a command that has it as its stdin and stdout.
    pub(crate) fn run(&self, command: &mut Command) -> anyhow::Result<Child> {
        let open = || {
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
            rustix::fs::open(&self.path, flags, rustix::fs::Mode::empty())
        };
        command.stdin(open()?).stdout(open()?).stderr(Stdio::inherit()).spawn().context("start the command")
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) -> anyhow::Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(&self.master, size)?)
    }

    pub(crate) fn enter(&self, keys: &str) -> anyhow::Result<()> {
        let mut left = keys.as_bytes();
        while !left.is_empty() {
            left = &left[rustix::io::write(&self.master, left)?..];
        }
        Ok(())
    }
}

/// What has come out of a terminal.
pub(crate) struct Screen {
    master: OwnedFd,
    seen: String,
}

impl Screen {
    pub(crate) fn of(terminal: &Terminal) -> anyhow::Result<Self> {
        let master = terminal.master.try_clone()?;
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok(Self { master, seen: String::new() })
    }

    /// Waits until this has been seen, and forgets all before it.
    pub(crate) fn wait_for(&mut self, expect: &str) -> anyhow::Result<()> {
        let outcome = wait(&format!("the terminal shows {expect:?}"), SOON, || {
            let mut buffer = [0; 4096];
            match rustix::io::read(&self.master, &mut buffer) {
                Ok(count) => self.seen.push_str(&String::from_utf8_lossy(&buffer[..count])),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            let Some(at) = self.seen.find(expect) else { return Ok(None) };
            self.seen.drain(..at + expect.len());
            Ok(Some(()))
        });
        outcome.with_context(|| format!("it shows {:?}", self.seen))
    }
}
