//! Control groups of a run, which no namespace ends: made and removed by the run's name.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::pace;

/// Where control groups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";

/// Makes a group called `name` at the top of each hierarchy, where upstream's kubelet looks for its `cgroupRoot`, and in this
/// process's own groups, where orlop does.
///
/// # Errors
/// Those of the kernel.
pub fn make(name: &Path) -> anyhow::Result<()> {
    let mut places = hierarchies(Path::new(MOUNT));
    places.extend(own_groups(&std::fs::read_to_string("/proc/self/cgroup")?));
    for group in places.iter().map(|place| place.join(name)) {
        std::fs::create_dir_all(&group).with_context(|| format!("create {}", group.display()))?;
    }
    Ok(())
}

/// The directories of the groups that `/proc/self/cgroup` lists, of which each line is `number:controllers:path`
/// (cgroups(7)).
fn own_groups(list: &str) -> Vec<PathBuf> {
    let directory = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some(Path::new(MOUNT).join(controllers).join(path.trim_start_matches('/')))
    };
    list.lines().filter_map(directory).filter(|dir| dir.join("cgroup.procs").exists()).collect()
}

/// Version 2 is mounted as one; version 1 with a directory for each controller.
fn hierarchies(mount: &Path) -> Vec<PathBuf> {
    let is_group = |dir: &PathBuf| dir.join("cgroup.procs").exists();
    if is_group(&mount.to_owned()) {
        vec![mount.to_owned()]
    } else {
        directories(mount).into_iter().filter(is_group).collect()
    }
}

/// Removes every group called `name`, with the groups in it. Their processes have been killed; the kernel may still be at
/// it.
///
/// # Errors
/// A process is left.
pub fn remove(name: &OsStr) -> anyhow::Result<()> {
    remove_below(Path::new(MOUNT), name)
}

fn remove_below(dir: &Path, name: &OsStr) -> anyhow::Result<()> {
    for child in directories(dir) {
        if child.file_name() == Some(name) {
            remove_group(&child)?;
        } else {
            remove_below(&child, name)?;
        }
    }
    Ok(())
}

fn remove_group(dir: &Path) -> anyhow::Result<()> {
    directories(dir).iter().try_for_each(|child| remove_group(child))?;
    for _ in 0..100 {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                std::thread::sleep(pace::stretched(Duration::from_millis(50))); // version 1 has no event for an empty group
            }
            other => return other.with_context(|| format!("remove {}", dir.display())),
        }
    }
    bail!("{} still has processes", dir.display())
}

fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}
