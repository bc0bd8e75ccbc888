//! Directories and mounts that volumes are made of, and whose they are.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;
use pod::spec;
use sys::rustix::fs::{AtFlags, Gid, Mode};
use sys::tree::{Dir, Kind, Meta};

use super::Cause;
use super::plan::Medium;
use crate::facts::NodeFacts;
use crate::qos;

/// Makes an emptyDir; what is in it stays. In memory it is a tmpfs of at most `size` bytes.
pub(super) fn empty_dir(path: &Path, medium: Medium, size: Option<u64>) -> Result<(), Cause> {
    make_dir(path)?;
    match medium {
        Medium::Disk => set_mode(path, 0o777),
        Medium::Memory | Medium::HugePages { .. } if is_mounted(path)? => Ok(()),
        Medium::Memory => {
            let size = size.map(|size| size.to_string());
            // Upstream leaves a tmpfs the mode that the kernel gives it, with the sticky bit.
            mount_tmpfs(path, size.as_deref(), "1777")
        }
        Medium::HugePages { page_bytes } => {
            let page = page_bytes.to_string();
            let mount =
                sys::mount::new_filesystem("hugetlbfs", &[("pagesize", Some(&page)), ("mode", Some("0777"))], 0)?;
            Ok(sys::mount::attach_at(mount.as_fd(), path)?)
        }
    }
}

/// What all containers of a pod may write to `/etc/hosts` and their termination messages, of which the node reads 4 KiB.
const WRITTEN_SIZE: &str = "1m";

/// Makes the directory of the files that containers write to, as a tmpfs: on a disk they could grow without end. A pod that
/// an earlier version began has its files there already, and keeps them.
pub(super) fn written(path: &Path) -> Result<(), Cause> {
    make_dir(path)?;
    let is_new = fs::read_dir(path).map_err(Cause::file("read", path))?.next().is_none();
    if is_new && !is_mounted(path)? { mount_tmpfs(path, Some(WRITTEN_SIZE), "0755") } else { Ok(()) }
}

/// How large an emptyDir in memory may become: its own limit, the pod's, or what the node leaves to pods.
pub(super) fn memory_size(pod: &Pod, node: &NodeFacts, limit: Option<u64>) -> Option<u64> {
    let of_pod = qos::pod_limits(pod, &qos::Rules::default()).memory_bytes.and_then(|bytes| u64::try_from(bytes).ok());
    let of_node = node.allocatable.get("memory").and_then(|memory| u64::try_from(memory.units()).ok());
    [limit, of_pod, of_node].into_iter().flatten().filter(|size| *size > 0).min()
}

/// Makes the directory of a volume with content.
pub(super) fn content_dir(path: &Path, in_memory: bool) -> Result<(), Cause> {
    make_dir(path)?;
    if in_memory && !is_mounted(path)? {
        return mount_tmpfs(path, None, "0777");
    }
    set_mode(path, 0o777)
}

/// Such a volume is mounted read-only, so the places where containers mount others inside it must exist before.
pub(super) fn nested_mountpoints(path: &Path, name: &str, pod: &Pod) -> Result<(), Cause> {
    for (_, container) in spec::containers(pod) {
        let mounts = || container.volume_mounts.iter().flatten();
        for outer in
            mounts().filter(|mount| mount.name == name && mount.sub_path.is_none() && mount.sub_path_expr.is_none())
        {
            let inner = mounts().filter_map(|mount| Path::new(&mount.mount_path).strip_prefix(&outer.mount_path).ok());
            for place in inner.filter(|place| !place.as_os_str().is_empty()) {
                let root = fs::File::open(path).map_err(Cause::file("open", path))?;
                sys::path::make_in_root_strictly(root.as_fd(), place, sys::path::Kind::Directory)?;
            }
        }
    }
    Ok(())
}

fn make_dir(path: &Path) -> Result<(), Cause> {
    fs::create_dir_all(path).map_err(Cause::file("make directory", path))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Cause> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Cause::file("change mode of", path))
}

/// Whether something is mounted at a directory: then it is on another device than its parent.
fn is_mounted(path: &Path) -> Result<bool, Cause> {
    let device = |path: &Path| fs::symlink_metadata(path).map(|data| data.dev()).map_err(Cause::file("look at", path));
    match path.parent() {
        Some(parent) => Ok(device(path)? != device(parent)?),
        None => Ok(true),
    }
}

fn mount_tmpfs(path: &Path, size: Option<&str>, mode: &str) -> Result<(), Cause> {
    let mut options = vec![("mode", Some(mode))];
    options.extend(size.map(|size| ("size", Some(size))));
    let plain = options.clone();
    // What was meant for memory must not reach a disk; the option came with Linux 6.3.
    options.push(("noswap", None));
    let mount = sys::mount::new_filesystem("tmpfs", &options, 0);
    let mount = mount.or_else(|_| sys::mount::new_filesystem("tmpfs", &plain, 0))?;
    Ok(sys::mount::attach_at(mount.as_fd(), path)?)
}

/// Holds a path of the node against its type, and makes it if the type says so.
pub(super) fn host_path(path: &Path, kind: &str) -> Result<(), Cause> {
    if kind.is_empty() {
        return Ok(());
    }
    let found = match fs::metadata(path) {
        Ok(found) => Some(found.file_type()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Cause::file("look at", path)(error)),
    };
    let is = |expected, test: fn(&fs::FileType) -> bool| match found {
        Some(found) if test(&found) => Ok(()),
        _ => Err(Cause::HostPath { path: path.to_owned(), expected }),
    };
    match kind {
        "DirectoryOrCreate" if found.is_none() => {
            make_dir(path)?;
            set_mode(path, 0o755)
        }
        "FileOrCreate" if found.is_none() => {
            fs::OpenOptions::new().create(true).append(true).open(path).map_err(Cause::file("make file", path))?;
            set_mode(path, 0o644)
        }
        "DirectoryOrCreate" | "Directory" => is("directory", fs::FileType::is_dir),
        "FileOrCreate" | "File" => is("file", fs::FileType::is_file),
        "Socket" => is("socket file", fs::FileType::is_socket),
        "CharDevice" => is("character device", fs::FileType::is_char_device),
        "BlockDevice" => is("block device", fs::FileType::is_block_device),
        other => Err(Cause::Invalid(format!("{other} is an invalid volume type"))),
    }
}

/// Whether the pod's group gets to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writable {
    Yes,
    No,
}

impl Writable {
    /// The bits that the group gets for files (upstream's masks for fsGroup).
    fn mask(self) -> u32 {
        match self {
            Self::Yes => 0o660,
            Self::No => 0o440,
        }
    }
}

/// The group that a pod's volumes belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FsGroup {
    id: Option<u32>,
    only_on_mismatch: bool,
}

impl FsGroup {
    pub(super) fn of(pod: &Pod) -> Self {
        let context = spec::of(pod).security_context.as_ref();
        let policy = context.and_then(|context| context.fs_group_change_policy.as_deref());
        Self {
            id: context.and_then(|context| context.fs_group).and_then(|id| u32::try_from(id).ok()),
            only_on_mismatch: policy == Some("OnRootMismatch"),
        }
    }

    /// Gives everything below `path` to the group, but nothing that is mounted there. Every step goes by descriptor and
    /// follows no link: another pod may be writing to the same directory. `is_over` says when nobody waits for it any more.
    pub(super) fn apply(self, path: &Path, writable: Writable, is_over: &dyn Fn() -> bool) -> Result<(), Cause> {
        let Some(id) = self.id else { return Ok(()) };
        let failed = |error| Cause::file("give to the pod's group", path)(error);
        let root = Dir::open(path).map_err(failed)?;
        let top = sys::tree::meta(root.as_fd()).map_err(failed)?;
        if self.only_on_mismatch && writable == Writable::Yes && top.gid == id && top.mode & 0o2770 == 0o2770 {
            return Ok(());
        }
        let give = |file: BorrowedFd<'_>, meta: Meta| match is_over() {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => give(file, meta, id, writable),
        };
        // The root last: who asks for a mismatch of it must not find what was left half done.
        root.for_each_below(give).and_then(|()| give(root.as_fd(), top)).map_err(failed)
    }
}

/// Changes group and mode of what `file` refers to, where they differ.
fn give(file: BorrowedFd<'_>, meta: Meta, id: u32, writable: Writable) -> io::Result<()> {
    if meta.gid != id {
        sys::rustix::fs::chownat(file, "", None, Some(Gid::from_raw(id)), AtFlags::EMPTY_PATH)?;
    }
    let mode = match meta.kind {
        Kind::Symlink => return Ok(()),
        Kind::Directory => meta.mode | writable.mask() | 0o2110,
        _ => meta.mode | writable.mask(),
    };
    // A change of the group takes special bits away.
    if mode != meta.mode || meta.gid != id {
        chmod(file, mode)?;
    }
    Ok(())
}

/// Changes the mode of an `O_PATH` descriptor's file; fchmod(2) does not take one, its name in `/proc` does the same.
fn chmod(file: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(sys::rustix::fs::chmod(&name, Mode::from_raw_mode(mode))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_paths_are_what_they_should_be() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name| dir.path().join(name);
        let check = |name, kind| host_path(&at(name), kind).map_err(|cause| cause.to_string());
        assert!(check("none", "").is_ok() && !at("none").exists());
        assert!(check("d", "Directory").unwrap_err().contains("is not a directory"));
        check("d/e", "DirectoryOrCreate").unwrap();
        check("d", "Directory").unwrap();
        check("f", "FileOrCreate").unwrap();
        check("f", "File").unwrap();
        assert!(check("f", "Socket").unwrap_err().ends_with("is not a socket file"));
        let _listener = std::os::unix::net::UnixListener::bind(at("s")).unwrap();
        check("s", "Socket").unwrap();
        assert!(host_path(Path::new("/dev/null"), "CharDevice").is_ok());
        assert!(check("f", "Odd").unwrap_err().contains("invalid volume type"));
    }

    #[test]
    fn the_smallest_limit_counts() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": {"containers": [
            {"name": "c", "resources": {"limits": {"memory": "64Mi"}}}]}}))
        .unwrap();
        let node = NodeFacts::default();
        assert_eq!(memory_size(&pod, &node, Some(1 << 20)), Some(1 << 20));
        assert_eq!(memory_size(&pod, &node, None), Some(64 << 20));
    }
}
