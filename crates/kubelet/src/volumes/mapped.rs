//! Devices as upstream's kubelet maps them for a pod, on a node that was one of its before: it binds the device to a place of
//! its volume's, and attaches a loop device to that, which keeps the device open, so that no other gets its name.
//!
//! ```text
//! plugins/kubernetes.io/csi/volumeDevices/NAME/dev/UID       of a CSI driver
//! plugins/kubernetes.io~local-volume/volumeDevices/NAME/UID  of a local volume
//! ```

use std::fs;
use std::path::Path;

use super::{Cause, remove};
use crate::paths::Paths;

const LOCAL: &str = "kubernetes.io~local-volume";

/// Takes off what is mapped at a place. Blocking; nothing happens where nothing is.
pub(super) fn take_off(place: &Path) -> Result<(), Cause> {
    if place.symlink_metadata().is_err() {
        return Ok(());
    }
    // The kernel has the file's real name.
    let real = fs::canonicalize(place).map_err(Cause::file("look at", place))?;
    sys::loops::of_file(&real)?.iter().try_for_each(|device| sys::loops::detach(device))?;
    remove::mount_at(place)?;
    fs::remove_file(place).map_err(Cause::file("remove", place))
}

/// Takes off the local volumes that are mapped for a pod. Blocking.
pub(super) fn take_off_local(paths: &Paths, uid: &str) -> Result<(), Cause> {
    // What is not there has no entries.
    let links = fs::read_dir(paths.pod(uid).join("volumeDevices").join(LOCAL)).into_iter().flatten().flatten();
    for link in links {
        let volume = paths.plugins().join(LOCAL).join("volumeDevices").join(link.file_name());
        take_off(&volume.join(uid))?;
        let _ = fs::remove_dir(volume); // Other pods may have it, too.
    }
    Ok(())
}
