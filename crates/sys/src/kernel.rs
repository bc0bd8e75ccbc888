//! Which kernel this is, for what cannot be found out by trying.

/// Major and minor number of the running kernel.
pub fn version() -> (u32, u32) {
    parse(&rustix::system::uname().release().to_string_lossy())
}

/// Major and minor number in a release such as `6.1.0-56-cloud-amd64`; zeros for what is none.
pub fn parse(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Whether mounts of a tmpfs can show owners through a user namespace (Linux 6.3, mm/shmem.c `FS_ALLOW_IDMAP`). Without
/// it a pod cannot have users of its own, because the files that its containers share are on one.
pub fn maps_owners_on_tmpfs() -> bool {
    version() >= (6, 3)
}

/// Whether the kernel confines programs by AppArmor and shows its policy (securityfs is mounted).
pub fn has_apparmor() -> bool {
    let enabled = std::fs::read("/sys/module/apparmor/parameters/enabled");
    enabled.is_ok_and(|text| text.starts_with(b"Y")) && std::path::Path::new("/sys/kernel/security/apparmor").exists()
}

/// Whether the kernel labels by SELinux and shows its policy (selinuxfs is mounted).
pub fn has_selinux() -> bool {
    std::path::Path::new("/sys/fs/selinux/enforce").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_begin_with_two_numbers() {
        for (release, expect) in
            [("6.1.0-56-cloud-amd64", (6, 1)), ("5.15", (5, 15)), ("6.18.44", (6, 18)), ("?", (0, 0))]
        {
            assert_eq!(parse(release), expect, "{release}");
        }
    }
}
