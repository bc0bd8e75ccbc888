//! The daemon's side of a confined child: starts it, takes its report, and trusts none of it.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::Stdio;

use sys::tree::Dir;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use crate::worker::protocol::{ARGUMENT, Order, Report};

/// A report with more opaque directories or members than this holds is no honest one.
const REPORT_BYTES_MAX: u64 = 16 << 20;

/// A child at work. Dropping it ends the child.
#[derive(Debug)]
pub(crate) struct Child {
    process: Reaped,
    report: pipe::Receiver,
}

impl Child {
    /// Starts a child that does what `order` says, with `target` as its root and `input` to read.
    pub(crate) fn start(target: &Dir, order: &Order, input: Stdio) -> io::Result<Self> {
        let (report, child_report) = io::pipe()?;
        let process = spawn(target, order, input, child_report.into())?;
        Ok(Self { process, report: pipe::Receiver::from_owned_fd(OwnedFd::from(report))? })
    }

    /// Waits until the child has said how it went; a reason if it said nothing.
    pub(crate) async fn report(mut self) -> Result<Report, String> {
        let mut bytes = Vec::new();
        let read = (&mut self.report).take(REPORT_BYTES_MAX + 1).read_to_end(&mut bytes).await;
        // It has ended, or says more than anybody reads, or does more than it says.
        self.process.kill();
        let ended = self.process.wait().await;
        if bytes.len() as u64 > REPORT_BYTES_MAX {
            return Err(format!("the report of the confined process is longer than {REPORT_BYTES_MAX} bytes"));
        }
        read.map_err(|e| format!("cannot read the report of the confined process: {e}"))?;
        serde_json::from_slice(&bytes).map_err(|_| format!("the confined process ended without a report ({ended})"))
    }
}

#[expect(clippy::disallowed_methods, reason = "/proc/self/exe is this very program, not another one")]
fn spawn(target: &Dir, order: &Order, input: Stdio, report: OwnedFd) -> io::Result<Reaped> {
    let child = std::process::Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .arg(serde_json::to_string(order)?)
        .env_clear()
        .current_dir(format!("/proc/self/fd/{}", target.as_fd().as_raw_fd()))
        .stdin(input)
        .stdout(Stdio::from(report))
        .stderr(Stdio::null())
        .spawn()?;
    Ok(Reaped(Some(child)))
}

/// A process that is killed and waited for when nobody wants it any more.
#[derive(Debug)]
struct Reaped(Option<std::process::Child>);

impl Reaped {
    fn kill(&mut self) {
        // One that has ended already keeps the status that it has.
        let _ = self.0.as_mut().map(std::process::Child::kill);
    }

    /// Waits for the end of a child that has closed its report.
    async fn wait(&mut self) -> String {
        let Some(mut child) = self.0.take() else { return "already gone".into() };
        match tokio::task::spawn_blocking(move || child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        // Either it is killed or it has ended; in both cases there is something to reap.
        let _ = child.kill();
        // A child in a hung file system does not end at once: a thread of its own waits, not the caller. If no thread
        // can be had, the zombie goes with this process.
        let _ = std::thread::Builder::new().name("reap-unpack".into()).spawn(move || child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe takes 64 KiB: who says more waits for a reader, and was waited for.
    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "a child that says what no worker says")]
    async fn a_report_without_end_ends_its_child() {
        let (report, theirs) = io::pipe().unwrap();
        let yes = std::process::Command::new("yes").stdout(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        let report = pipe::Receiver::from_owned_fd(OwnedFd::from(report)).unwrap();
        let error = Child { process: Reaped(Some(yes)), report }.report().await.unwrap_err();
        assert!(error.contains("longer than 16777216 bytes"), "{error}");
    }
}
