//! AppArmor: which profiles the kernel has, and the one that containers get by default.
//!
//! `default.profile` is the default as people read it, `default.bin` the same as the kernel does. The node writes that
//! itself: no `apparmor_parser` has to be there, and none is started (R3).

use std::fs;
use std::io;
use std::path::PathBuf;

/// The name of the default profile.
pub(crate) const DEFAULT: &str = "orlop-default";

const COMPILED: &[u8] = include_bytes!("default.bin");

/// Where the kernel shows its policy (securityfs).
const PLACE: &str = "/sys/kernel/security/apparmor";

/// The kernel's policy.
#[derive(Debug)]
pub(crate) struct Policy {
    place: PathBuf,
}

impl Policy {
    pub(crate) fn of_kernel() -> Self {
        Self { place: PLACE.into() }
    }

    /// Whether a profile of that name is loaded.
    ///
    /// # Errors
    /// The list cannot be read.
    pub(crate) fn has(&self, name: &str) -> io::Result<bool> {
        let list = fs::read_to_string(self.place.join("profiles"))?;
        Ok(list.lines().filter_map(|line| line.rsplit_once(" (")).any(|(profile, _)| profile == name))
    }

    /// Loads the default profile unless one of its name is there: an operator may have another one by that name.
    ///
    /// # Errors
    /// The kernel refuses (CAP_MAC_ADMIN is needed).
    pub(crate) fn ensure_default(&self) -> io::Result<()> {
        if self.has(DEFAULT)? {
            return Ok(());
        }
        match fs::write(self.place.join(".load"), COMPILED) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()), // Another container's was faster.
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_profile_is_loaded_once() {
        let dir = tempfile::tempdir().unwrap();
        let policy = Policy { place: dir.path().to_owned() };
        assert!(policy.ensure_default().is_err(), "there is no list");
        let list = |text: &str| fs::write(dir.path().join("profiles"), text).unwrap();
        list("orlop-default-2 (enforce)\n/usr/bin/a b (complain)\n");
        assert!(policy.has("/usr/bin/a b").unwrap() && !policy.has("/usr/bin/a").unwrap());
        policy.ensure_default().unwrap();
        assert_eq!(fs::read(dir.path().join(".load")).unwrap(), COMPILED);
        fs::remove_file(dir.path().join(".load")).unwrap();
        list("orlop-default (enforce)\n");
        policy.ensure_default().unwrap();
        assert!(!dir.path().join(".load").exists());
    }

    #[test]
    fn the_compiled_profile_is_of_this_name() {
        assert!(COMPILED.windows(DEFAULT.len()).any(|bytes| bytes == DEFAULT.as_bytes()));
    }
}
