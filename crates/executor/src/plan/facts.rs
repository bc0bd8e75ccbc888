//! What a plan has to know about the host.

use std::fs;
use std::path::Path;

use sys::error::Context as _;

/// What a plan has to know about the host. Read once; it does not change while the node runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// The capabilities that the node itself may hand on, as bits.
    pub capabilities: u64,
    /// Control groups are version 2.
    pub unified_cgroups: bool,
    /// The hierarchies of version 1 by the name of their mount point, each with the mount's own options.
    pub cgroup_hierarchies: Vec<(String, Vec<String>)>,
    /// The root of the host's mounts is the initramfs, which cannot be pivoted away.
    pub root_is_initramfs: bool,
    /// This process itself is in a user namespace: it makes no device nodes.
    pub in_user_namespace: bool,
    /// The kernel confines programs by AppArmor profiles.
    pub apparmor: bool,
    /// The kernel labels processes by SELinux.
    pub selinux: bool,
}

impl HostFacts {
    /// Reads them from `/proc` and `/sys`.
    ///
    /// # Errors
    /// No `/proc`.
    pub fn read() -> sys::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").during("read", "/proc/self/mountinfo")?;
        Ok(Self {
            capabilities: sys::caps::bounding() & sys::caps::get()?.permitted,
            unified_cgroups: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            cgroup_hierarchies: cgroup_hierarchies(&mounts),
            root_is_initramfs: root_is_initramfs(&mounts),
            in_user_namespace: self::in_user_namespace(),
            apparmor: fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y")),
            selinux: sys::kernel::has_selinux(),
        })
    }
}

/// The fields of a line of mountinfo (proc_pid_mountinfo(5)): mount point, kind, options of the file system.
fn mounts(mountinfo: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    mountinfo.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = filesystem.split(' ');
        let (kind, options) = (fields.next()?, fields.nth(1)?);
        Some((mount.split(' ').nth(4)?, kind, options))
    })
}

fn cgroup_hierarchies(mountinfo: &str) -> Vec<(String, Vec<String>)> {
    let found = mounts(mountinfo).filter(|(_, kind, _)| *kind == "cgroup").filter_map(|(at, _, options)| {
        let name = at.strip_prefix("/sys/fs/cgroup/").filter(|name| !name.contains('/'))?;
        Some((name.to_owned(), options.split(',').filter(|o| names_hierarchy(o)).map(str::to_owned).collect()))
    });
    let mut found: Vec<(String, Vec<String>)> =
        found.filter(|(_, options): &(_, Vec<_>)| !options.is_empty()).collect();
    found.sort();
    found.dedup();
    found
}

/// Whether an option says which hierarchy it is.
fn names_hierarchy(option: &str) -> bool {
    !matches!(option, "rw" | "ro" | "xattr" | "noprefix" | "clone_children") && !option.starts_with("release_agent=")
}

/// Whether this process is in a user namespace.
pub fn in_user_namespace() -> bool {
    maps_ids(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default())
}

/// Only in the first namespace all ids mean themselves.
fn maps_ids(uid_map: &str) -> bool {
    !uid_map.is_empty() && uid_map.split_whitespace().ne(["0", "0", "4294967295"])
}

fn root_is_initramfs(mountinfo: &str) -> bool {
    mounts(mountinfo).filter(|(at, ..)| *at == "/").last().is_some_and(|(_, kind, _)| kind == "rootfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
31 22 0:28 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
32 22 0:29 / /other rw - cgroup cgroup rw,memory
";

    #[test]
    fn hierarchies_are_known_by_their_mounts() {
        let found = cgroup_hierarchies(MOUNTINFO);
        let cpu = ("cpu,cpuacct".to_owned(), vec!["cpu".to_owned(), "cpuacct".to_owned()]);
        assert_eq!(found, [cpu, ("systemd".to_owned(), vec!["name=systemd".to_owned()])]);
    }

    #[test]
    fn a_user_namespace_is_known_by_its_mapping() {
        assert!(!maps_ids("         0          0 4294967295\n"));
        assert!(maps_ids("         0       1000          1\n"));
    }

    #[test]
    fn the_initramfs_is_told_from_a_disk() {
        assert!(!root_is_initramfs(MOUNTINFO));
        assert!(root_is_initramfs("1 1 0:2 / / rw - rootfs none rw\n"));
    }
}
