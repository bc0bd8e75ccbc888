//! What is on disk of published volumes: whose they are, also for a daemon that has never seen their pods. Upstream's files,
//! so that either kubelet can take down what the other has mounted.
//!
//! Nothing here touches what is mounted. All of it is blocking work on the kubelet's own directories.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::{Cause, remove};
use super::volume::{self, CsiVolume};
use crate::paths::Paths;

const FILE: &str = "vol_data.json";

/// What is known of a volume that was published, or may have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    #[serde(default, rename = "specVolID")]
    pub(super) name: String,
    pub(super) volume_handle: String,
    pub(super) driver_name: String,
    #[serde(default)]
    node_name: String,
    #[serde(default, rename = "attachmentID")]
    attachment_id: String,
    #[serde(default)]
    volume_lifecycle_mode: String,
}

/// A published volume of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) record: Record,
    /// Where the pod's containers find it.
    pub(super) target: PathBuf,
    /// Where it is staged.
    pub(super) staging: PathBuf,
    /// The record's own directory.
    dir: PathBuf,
}

impl Record {
    pub(super) fn of(volume: &CsiVolume, node: &str) -> Self {
        Self {
            name: volume.name.clone(),
            volume_handle: volume.handle.clone(),
            driver_name: volume.driver.clone(),
            node_name: node.to_owned(),
            attachment_id: volume.attachment(node),
            volume_lifecycle_mode: volume.mode().to_owned(),
        }
    }

    pub(super) fn is_persistent(&self) -> bool {
        self.volume_lifecycle_mode != "Ephemeral"
    }

    /// Whether another record is of the same volume.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (&self.driver_name, &self.volume_handle) == (&other.driver_name, &other.volume_handle)
    }

    pub(super) fn unique_name(&self) -> String {
        volume::unique_name(&self.driver_name, &self.volume_handle)
    }
}

impl Published {
    /// Whether it has yet to be taken down.
    pub(super) fn is_recorded(&self) -> bool {
        self.dir.join(FILE).exists()
    }
}

/// Writes down that a volume is about to be published, so that it will be taken down whatever happens next.
pub(super) fn write(paths: &Paths, uid: &str, volume: &CsiVolume, node: &str) -> Result<(), Cause> {
    let target = volume.target(paths, uid);
    let dir = record_dir(paths, uid, volume);
    make_dir(&dir)?;
    if let Some(parent) = target.parent() {
        make_dir(parent)?;
    }
    write_file(&dir.join(FILE), &Record::of(volume, node))
}

/// Makes the directory that a volume is staged at, and writes down whose it is. What is mounted there is not touched.
pub(super) fn stage(paths: &Paths, volume: &CsiVolume) -> Result<PathBuf, Cause> {
    let staging = volume.staging(paths);
    if !remove::is_mountpoint(&staging)? {
        make_dir(&staging)?;
    }
    if let Some(parent) = staging.parent().filter(|_| !volume.is_block()) {
        let data = BTreeMap::from([("volumeHandle", &volume.handle), ("driverName", &volume.driver)]);
        write_file(&parent.join(FILE), &data)?;
    }
    Ok(staging)
}

/// The published volumes of a pod. What cannot be read is told, and left to whoever removes the pod's directory.
pub(super) fn of_pod(paths: &Paths, uid: &str) -> Vec<Published> {
    let mounts = entries(&paths.pod(uid).join("volumes/kubernetes.io~csi"));
    let blocks = entries(&paths.pod(uid).join("volumeDevices/kubernetes.io~csi"));
    let mounts = mounts.into_iter().map(|dir| (dir, false));
    let all = mounts.chain(blocks.into_iter().map(|dir| (dir, true))).filter_map(|(dir, is_block)| {
        let record = read(&dir)?;
        let (target, staging) = if is_block {
            let devices = volume::block_dir(paths);
            (devices.join("publish").join(&record.name).join(uid), devices.join("staging").join(&record.name))
        } else {
            (dir.join("mount"), volume::staging(paths, &record.driver_name, &record.volume_handle))
        };
        Some(Published { record, target, staging, dir })
    });
    all.collect()
}

/// The volumes that pods of this node have, each with its pod's uid.
pub(super) fn of_node(paths: &Paths) -> Vec<(String, Published)> {
    let uids = entries(&paths.pods()).into_iter();
    let uids = uids.filter_map(|dir| Some(dir.file_name()?.to_str()?.to_owned()));
    uids.flat_map(|uid| of_pod(paths, &uid).into_iter().map(move |one| (uid.clone(), one))).collect()
}

/// Forgets a volume that has been unpublished: its directory goes, which is empty if the driver did its part.
pub(super) fn forget(published: &Published) -> Result<(), Cause> {
    let target = &published.target;
    if remove::is_mountpoint(target)? {
        let message = format!("driver {} has not unmounted {}", published.record.driver_name, target.display());
        return Err(Cause::Invalid(message));
    }
    // Drivers are to remove it, and some do not.
    gone(fs::remove_dir(target).or_else(|error| match error.kind() {
        io::ErrorKind::NotADirectory => fs::remove_file(target),
        _ => Err(error),
    }))
    .map_err(Cause::file("remove", target))?;
    let file = published.dir.join(FILE);
    gone(fs::remove_file(&file)).map_err(Cause::file("remove", &file))?;
    gone(fs::remove_dir(&published.dir)).map_err(Cause::file("remove", &published.dir))
}

/// Removes the place where a volume was staged.
pub(super) fn forget_staged(staging: &Path) -> Result<(), Cause> {
    if remove::is_mountpoint(staging)? {
        let message = format!("the driver has not unmounted {}", staging.display());
        return Err(Cause::Invalid(message));
    }
    gone(fs::remove_dir(staging)).map_err(Cause::file("remove", staging))?;
    if let Some(parent) = staging.parent().filter(|_| staging.ends_with("globalmount")) {
        gone(fs::remove_file(parent.join(FILE))).map_err(Cause::file("remove", parent))?;
        gone(fs::remove_dir(parent)).map_err(Cause::file("remove", parent))?;
    }
    Ok(())
}

fn record_dir(paths: &Paths, uid: &str, volume: &CsiVolume) -> PathBuf {
    if volume.is_block() {
        return paths.pod(uid).join("volumeDevices/kubernetes.io~csi").join(&volume.name);
    }
    paths.volume(uid, "csi", &volume.name)
}

fn read(dir: &Path) -> Option<Record> {
    let path = dir.join(FILE);
    let read = fs::read(&path).and_then(|text| serde_json::from_slice(&text).map_err(io::Error::other));
    match read {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "nobody knows any more which CSI driver's volume this was");
            None
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    // What is not there has no entries.
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn make_dir(dir: &Path) -> Result<(), Cause> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o750).create(dir);
    made.map_err(Cause::file("make directory", dir))
}

/// Replaced as a whole: a half of it would say nothing.
fn write_file(path: &Path, content: &impl Serialize) -> Result<(), Cause> {
    let text = serde_json::to_vec(content).map_err(io::Error::other).map_err(Cause::file("write", path))?;
    let temporary = path.with_extension("new");
    fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path)).map_err(Cause::file("write", path))
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_upstream_are_read() {
        let text = r#"{"attachmentID":"csi-1","driverName":"d","nodeName":"n","specVolID":"pv","volumeHandle":"h",
            "volumeLifecycleMode":"Persistent","seLinuxMountContext":""}"#;
        let record: Record = serde_json::from_str(text).unwrap();
        assert_eq!((record.unique_name().as_str(), record.is_persistent()), ("kubernetes.io/csi/d^h", true));
        let written = serde_json::to_value(&record).unwrap();
        assert_eq!(written["specVolID"], "pv");
        assert_eq!(written["attachmentID"], "csi-1");
    }
}
