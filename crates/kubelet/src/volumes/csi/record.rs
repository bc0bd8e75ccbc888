//! What is on disk of published volumes: whose they are, also for a daemon that has never seen their pods. Upstream's files,
//! so that either kubelet can take down what the other has mounted.
//!
//! ```text
//! pods/UID/volumes/kubernetes.io~csi/NAME/vol_data.json              a volume with a file system
//! pods/UID/volumeDevices/kubernetes.io~csi/NAME -> …/publish/NAME/UID   a device, its record is that of all its pods:
//! plugins/kubernetes.io/csi/volumeDevices/NAME/data/vol_data.json
//! ```
//!
//! Nothing here touches what drivers have mounted. All of it is blocking work on the kubelet's own directories.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::{Cause, mapped, remove};
use super::volume::{self, CsiVolume};
use crate::paths::Paths;

const FILE: &str = "vol_data.json";
/// Where a pod's devices are, in its own directory.
const DEVICES: &str = "volumeDevices/kubernetes.io~csi";

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
    /// Its entry in the pod's directory: a directory, of a device a link.
    entry: PathBuf,
    is_block: bool,
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
        match self.is_block {
            true => self.entry.symlink_metadata().is_ok(),
            false => self.entry.join(FILE).exists(),
        }
    }
}

/// Writes down that a volume is about to be published, so that it will be taken down whatever happens next.
pub(super) fn write(paths: &Paths, uid: &str, volume: &CsiVolume, node: &str) -> Result<(), Cause> {
    let (target, record) = (volume.target(paths, uid), Record::of(volume, node));
    if let Some(parent) = target.parent() {
        make_dir(parent)?;
    }
    if !volume.is_block() {
        let dir = paths.volume(uid, "csi", &volume.name);
        make_dir(&dir)?;
        return write_file(&dir.join(FILE), &record);
    }
    let data = volume::device_dir(paths, &volume.name).join("data");
    make_dir(&data)?;
    write_file(&data.join(FILE), &record)?;
    let devices = paths.pod(uid).join(DEVICES);
    make_dir(&devices)?;
    let link = devices.join(&volume.name);
    match symlink(&target, &link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(Cause::file("make link", &link)),
    }
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
    let mounts = entries(&paths.pod(uid).join("volumes/kubernetes.io~csi")).into_iter().filter_map(|entry| {
        let record = read(&entry)?;
        let staging = volume::staging(paths, &record.driver_name, &record.volume_handle);
        Some(Published { target: entry.join("mount"), staging, record, entry, is_block: false })
    });
    let devices = entries(&paths.pod(uid).join(DEVICES)).into_iter().filter_map(|entry| {
        let record = read(&device_data(paths, &entry))?;
        let devices = volume::block_dir(paths);
        let (target, staging) =
            (devices.join("publish").join(&record.name).join(uid), devices.join("staging").join(&record.name));
        Some(Published { target, staging, record, entry, is_block: true })
    });
    mounts.chain(devices).collect()
}

/// Where the record of a pod's device is. An older daemon had it in the pod's directory.
fn device_data(paths: &Paths, entry: &Path) -> PathBuf {
    if entry.join(FILE).exists() {
        return entry.to_owned();
    }
    let name = entry.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    volume::device_dir(paths, name).join("data")
}

/// The volumes that pods of this node have, each with its pod's uid.
pub(super) fn of_node(paths: &Paths) -> Vec<(String, Published)> {
    let uids = entries(&paths.pods()).into_iter();
    let uids = uids.filter_map(|dir| Some(dir.file_name()?.to_str()?.to_owned()));
    uids.flat_map(|uid| of_pod(paths, &uid).into_iter().map(move |one| (uid.clone(), one))).collect()
}

/// Takes off what upstream's kubelet has mapped of a device: its driver cannot let go of what is in use.
pub(super) fn unmap(paths: &Paths, uid: &str, published: &Published) -> Result<(), Cause> {
    match published.is_block {
        true => mapped::take_off(&volume::device_dir(paths, &published.record.name).join("dev").join(uid)),
        false => Ok(()),
    }
}

/// Forgets a volume that has been unpublished: its directory goes, which is empty if the driver did its part.
pub(super) fn forget(paths: &Paths, published: &Published) -> Result<(), Cause> {
    let Published { target, entry, record, is_block, .. } = published;
    if remove::is_mountpoint(target)? {
        let message = format!("driver {} has not unmounted {}", record.driver_name, target.display());
        return Err(Cause::Invalid(message));
    }
    // Drivers are to remove it, and some do not.
    remove_at(target)?;
    if *is_block {
        return forget_device(paths, published);
    }
    remove_at(&entry.join(FILE))?;
    remove_at(entry)
}

/// With the last of its pods goes what is known of the device.
fn forget_device(paths: &Paths, published: &Published) -> Result<(), Cause> {
    let Published { record, entry, .. } = published;
    let dir = volume::device_dir(paths, &record.name);
    remove_at(&entry.join(FILE))?;
    remove_at(entry)?;
    if entries(&paths.pods()).iter().any(|pod| pod.join(DEVICES).join(&record.name).symlink_metadata().is_ok()) {
        return Ok(());
    }
    remove_at(&volume::block_dir(paths).join("publish").join(&record.name))?;
    remove_at(&dir.join("data").join(FILE))?;
    [dir.join("data"), dir.join("dev"), dir].iter().try_for_each(|dir| remove_at(dir))
}

/// Removes a file, a link, or an empty directory.
fn remove_at(path: &Path) -> Result<(), Cause> {
    let removed = fs::remove_dir(path).or_else(|error| match error.kind() {
        io::ErrorKind::NotADirectory => fs::remove_file(path),
        _ => Err(error),
    });
    match removed {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
        removed => removed.map_err(Cause::file("remove", path)),
    }
}

/// Removes the place where a volume was staged.
pub(super) fn forget_staged(staging: &Path) -> Result<(), Cause> {
    if remove::is_mountpoint(staging)? {
        let message = format!("the driver has not unmounted {}", staging.display());
        return Err(Cause::Invalid(message));
    }
    remove_at(staging)?;
    if let Some(parent) = staging.parent().filter(|_| staging.ends_with("globalmount")) {
        remove_at(&parent.join(FILE))?;
        remove_at(parent)?;
    }
    Ok(())
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
