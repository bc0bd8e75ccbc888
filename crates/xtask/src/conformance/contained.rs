//! Namespaces around a run of upstream's node: its shims outlive containerd, and some of its paths are in no configuration.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use testkit::groups;
use tokio::signal::unix::{SignalKind, signal};

/// Places that its daemons write to whatever their configuration says.
const COVERED: &[&str] = &["/run", "/var/lib", "/var/log"];

/// Runs this program once more, with the same arguments and `--inside DIR`, in process and mount namespaces that end with it.
/// Nothing of it is there afterwards.
pub(super) fn run() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("orlop-conformance-").tempdir()?;
    let name: OsString = dir.path().file_name().context("a directory has a name")?.to_owned();
    let ended = outside(dir.path());
    groups::remove(&name)?;
    ended
}

/// A shell stands above the run, because the first process of a namespace has to reap what its children leave; it ends
/// everything with it.
fn outside(dir: &Path) -> anyhow::Result<()> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    unshare.args(["busybox", "sh", "-c", "trap : INT; \"$@\"; exit $?", "sh"]);
    unshare.arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).arg("--inside").arg(dir);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(async {
        // Ctrl-C reaches the run by itself, which is of the terminal's group and ends in order.
        let _interrupt = signal(SignalKind::interrupt())?;
        let (mut terminate, mut ended) = (signal(SignalKind::terminate())?, signal(SignalKind::child())?);
        let mut child = unshare.spawn().context("start unshare (util-linux)")?;
        loop {
            if let Some(status) = child.try_wait()? {
                return anyhow::Ok(status);
            }
            tokio::select! {
                _ = ended.recv() => {}
                _ = terminate.recv() => child.kill()?,
            }
        }
    })?;
    if !status.success() {
        bail!("the run failed: {status}");
    }
    Ok(())
}

/// As [`cover`], for the calling thread and what it starts from now on.
pub(crate) fn cover_apart() -> anyhow::Result<()> {
    #[expect(deprecated, reason = "the replacement is unsafe for flags that this call does not pass")]
    rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::FS).context("unshare the mount namespace")?;
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", flags).context("keep mounts from the machine")?;
    cover()
}

/// Covers what the machine itself needs; called inside, before anything starts.
pub(super) fn cover() -> anyhow::Result<()> {
    for place in COVERED {
        mount("tmpfs", *place, "tmpfs", MountFlags::empty(), None).with_context(|| format!("cover {place}"))?;
    }
    Ok(())
}
