//! Overlay file systems, and the place for images.

use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, fsopen};

use super::{Finding, read};

/// Numbers of file systems that cannot hold the upper layer of an overlay (linux/magic.h; fs/overlayfs asks for extended
/// attributes, whiteouts and `d_type`, and refuses itself).
const UNFIT: &[(i64, &str)] = &[
    (0x794c_7630, "overlayfs"),
    (0x6969, "NFS"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9p"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x4d44, "vfat"),
];

/// Less room than this is worth a word.
const ROOM_BYTES: u64 = 2 << 30;

pub(super) fn findings(state_dir: &Path) -> Vec<Finding> {
    vec![overlay(fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map(drop)), images(state_dir)]
}

/// `opened` is how the kernel answered to the name; that makes it load the module.
fn overlay(opened: Result<(), Errno>) -> Finding {
    const WHAT: &str = "overlayfs";
    match opened {
        Ok(()) => Finding::ok(WHAT, "present"),
        Err(Errno::PERM) if !is_registered(&read("/proc/filesystems")) => Finding::unknown(WHAT),
        Err(Errno::PERM) => Finding::ok(WHAT, "present"),
        Err(error) => Finding::missing(
            WHAT,
            error.to_string(),
            "load it (`modprobe overlay`) or boot a kernel with CONFIG_OVERLAY_FS",
        ),
    }
}

fn is_registered(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay")
}

fn images(state_dir: &Path) -> Finding {
    const WHAT: &str = "state directory";
    // It may not exist yet; its parents will hold it.
    let Some(place) = state_dir.ancestors().find(|dir| dir.is_dir()) else {
        return Finding::missing(WHAT, format!("{} leads nowhere", state_dir.display()), "name another by --state-dir");
    };
    match (rustix::fs::statfs(place), rustix::fs::statvfs(place)) {
        (Ok(kind), Ok(room)) => storage(state_dir, kind.f_type, room.f_bavail.saturating_mul(room.f_frsize)),
        (Err(error), _) | (_, Err(error)) => {
            Finding::missing(WHAT, format!("{}: {error}", place.display()), "name another by --state-dir")
        }
    }
}

fn storage(dir: &Path, kind: i64, room_bytes: u64) -> Finding {
    const WHAT: &str = "state directory";
    let dir = dir.display();
    if let Some((_, name)) = UNFIT.iter().find(|(number, _)| *number == kind) {
        let remedy = "containers cannot write there; name a directory on ext4, xfs or btrfs by --state-dir";
        return Finding::missing(WHAT, format!("{dir} is on {name}"), remedy);
    }
    if room_bytes < ROOM_BYTES {
        let remedy = "images need room: free some, or name another directory by --state-dir";
        return Finding::limited(WHAT, format!("{dir} has {} MiB left", room_bytes >> 20), remedy);
    }
    Finding::ok(WHAT, format!("{dir} has {} GiB left", room_bytes >> 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn overlays_are_asked_for_by_name() {
        assert_eq!(overlay(Ok(())).verdict, Verdict::Ok);
        assert_eq!(overlay(Err(Errno::NODEV)).verdict, Verdict::Missing);
        assert!(is_registered("nodev\tproc\nnodev\toverlay\n\text4\n"));
        assert!(!is_registered("nodev\tproc\n\text4\n"));
    }

    #[test]
    fn layers_need_a_fit_file_system_with_room() {
        let check = |kind, room| storage(Path::new("/var/lib/orlop"), kind, room).verdict;
        const EXT4: i64 = 0xef53;
        assert_eq!(check(EXT4, 80 << 30), Verdict::Ok);
        assert_eq!(check(EXT4, 80 << 20), Verdict::Limited);
        assert_eq!(check(0x794c_7630, 80 << 30), Verdict::Missing);
    }
}
