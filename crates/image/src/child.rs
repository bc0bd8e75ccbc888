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
        let read = (&mut self.report).take(REPORT_BYTES_MAX).read_to_end(&mut bytes).await;
        let ended = self.process.wait().await;
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
