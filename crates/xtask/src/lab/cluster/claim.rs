//! Who has the lab: a lock that ends with its holder, in a file that names the holder's process.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The lab is ours for as long as this lives.
#[derive(Debug)]
pub(super) struct Claim {
    file: File,
}

/// The process that has the lab.
#[derive(Debug)]
pub(super) struct Running {
    /// Its number.
    pub(super) pid: i32,
    process: OwnedFd,
}

impl Claim {
    /// Takes the lab in `dir`, empty.
    ///
    /// # Errors
    /// Somebody has it, or the directory holds something else.
    pub(super) fn take(dir: &Path) -> anyhow::Result<Self> {
        if !lock_file(dir).exists() && dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            bail!("{} is not empty and holds no lab; name another directory", dir.display());
        }
        let mut file = open(dir)?;
        if let Err(error) = file.try_lock() {
            let [shell, down] = ["shell", "down"].map(|words| super::command_line(dir, words));
            match holder(&mut file, error)? {
                Some(Running { pid, .. }) => {
                    bail!("the lab is up already (process {pid}): `{shell}` enters it, `{down}` ends it")
                }
                None => bail!("the lab is just being started or ended by somebody else; try again"),
            }
        }
        clear(dir)?;
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        file.set_len(0)?;
        file.rewind()?;
        write!(file, "{}", std::process::id())?;
        Ok(Self { file })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = self.file.unlock(); // It ends with the file; but a process that is just being started has that, too.
    }
}

impl Running {
    /// Who has the lab in `dir`. What one that was killed has left there is removed.
    pub(super) fn find(dir: &Path) -> anyhow::Result<Option<Self>> {
        if !lock_file(dir).exists() {
            return Ok(None);
        }
        let mut file = open(dir)?;
        match file.try_lock() {
            Ok(()) => {
                clear(dir)?;
                // As in `Claim::drop`.
                file.unlock()?;
                Ok(None)
            }
            Err(error) => holder(&mut file, error),
        }
    }

    /// Asks it to end and waits.
    ///
    /// # Errors
    /// It goes on after `limit`.
    pub(super) fn end(&self, limit: Duration) -> anyhow::Result<()> {
        pidfd_send_signal(&self.process, Signal::TERM).context("end the lab's process")?;
        let timeout = Timespec::try_from(limit)?;
        if poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&timeout))? == 0 {
            bail!(
                "process {} has not ended within {} s; `kill -9 {0}` ends it and all it started",
                self.pid,
                limit.as_secs()
            );
        }
        Ok(())
    }
}

/// The process named by a lock file that somebody holds; none while it has not written its name.
fn holder(file: &mut File, error: TryLockError) -> anyhow::Result<Option<Running>> {
    if let TryLockError::Error(error) = error {
        return Err(error).context("lock the lab");
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(None) };
    let process = pidfd_open(pid, PidfdFlags::empty()).ok();
    Ok(process.map(|process| Running { pid: pid.as_raw_nonzero().get(), process }))
}

fn lock_file(dir: &Path) -> PathBuf {
    dir.with_extension("lock")
}

fn open(dir: &Path) -> anyhow::Result<File> {
    let path = lock_file(dir);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
    file.with_context(|| format!("open {}", path.display()))
}

fn clear(dir: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_is_had_by_one_until_it_ends() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("cluster");
        assert!(Running::find(&dir).unwrap().is_none());
        let claim = Claim::take(&dir).unwrap();
        std::fs::write(dir.join("kubeconfig"), "").unwrap();
        let error = Claim::take(&dir).unwrap_err().to_string();
        assert!(error.contains("is up already"), "{error}");
        let running = Running::find(&dir).unwrap().unwrap();
        assert_eq!(u32::try_from(running.pid).unwrap(), std::process::id());
        drop(claim);
        assert!(Running::find(&dir).unwrap().is_none());
        assert!(!dir.exists(), "what is left of a killed one is removed");
        Claim::take(&dir).unwrap();
    }

    #[test]
    fn a_directory_of_other_things_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("thesis"), "").unwrap();
        let error = Claim::take(root.path()).unwrap_err().to_string();
        assert!(error.contains("holds no lab"), "{error}");
        assert!(Running::find(root.path()).unwrap().is_none());
        assert!(root.path().join("thesis").exists());
    }
}
