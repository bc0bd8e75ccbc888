//! Capabilities (capabilities(7)): names, and the five sets of the calling process.

use rustix::io::Errno;

use crate::error::{Error, Result};

/// Names by number, without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Every capability that has a name, as bits.
pub const ALL: u64 = (1 << NAMES.len()) - 1;

/// The number of a capability by its name, with or without `CAP_`, in any case.
pub fn number(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|known| *known == bare).and_then(|index| u32::try_from(index).ok())
}

/// The names of the capabilities in `bits`, with `CAP_`.
pub fn names(bits: u64) -> Vec<String> {
    let named = NAMES.iter().enumerate().filter(|(number, _)| bits & (1 << number) != 0);
    named.map(|(_, name)| format!("CAP_{name}")).collect()
}

/// The sets of the calling process that capset(2) knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sets {
    /// What counts now.
    pub effective: u64,
    /// What can be made effective.
    pub permitted: u64,
    /// What survives exec of a file that has it inheritable.
    pub inheritable: u64,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
const VERSION: u32 = 0x2008_0522;

/// The calling process's sets.
///
/// # Errors
/// None in practice.
pub fn get() -> Result<Sets> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut halves = [Half::default(); 2];
    // SAFETY: version 3 fills exactly two halves; both outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) }, "capget")?;
    let join = |pick: fn(&Half) -> u32| u64::from(pick(&halves[0])) | u64::from(pick(&halves[1])) << 32;
    Ok(Sets {
        effective: join(|half| half.effective),
        permitted: join(|half| half.permitted),
        inheritable: join(|half| half.inheritable),
    })
}

/// Sets the calling process's sets.
///
/// # Errors
/// `EPERM` for more than it has.
pub fn set(sets: &Sets) -> Result<()> {
    let mut header = Header { version: VERSION, pid: 0 };
    let half = |shift: u32| Half {
        effective: word(sets.effective >> shift),
        permitted: word(sets.permitted >> shift),
        inheritable: word(sets.inheritable >> shift),
    };
    let halves = [half(0), half(32)];
    // SAFETY: version 3 reads exactly two halves; both outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, halves.as_ptr()) }, "capset")
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn word(bits: u64) -> u32 {
    bits as u32
}

/// The calling process's bounding set.
pub fn bounding() -> u64 {
    let bit = |number: u32| match prctl(libc::PR_CAPBSET_READ, number, 0) {
        1 => Some(1 << number),
        0 => Some(0),
        // Beyond the last capability of this kernel.
        _ => None,
    };
    (0..64).map_while(bit).fold(0, |bits, bit| bits | bit)
}

/// Takes everything out of the bounding set that is not in `keep`.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP.
pub fn bound(keep: u64) -> Result<()> {
    let dropped = (0..64).filter(|number| keep & 1 << number == 0);
    for number in dropped {
        match prctl(libc::PR_CAPBSET_READ, number, 0) {
            1 => check(prctl(libc::PR_CAPBSET_DROP, number, 0), "PR_CAPBSET_DROP")?,
            0 => {}
            // Beyond the last capability of this kernel.
            _ => break,
        }
    }
    Ok(())
}

/// Makes the ambient set exactly `bits`; they have to be permitted and inheritable.
///
/// # Errors
/// `EPERM` for one that is not.
pub fn set_ambient(bits: u64) -> Result<()> {
    check(prctl(libc::PR_CAP_AMBIENT, ambient(libc::PR_CAP_AMBIENT_CLEAR_ALL), 0), "PR_CAP_AMBIENT_CLEAR_ALL")?;
    for number in (0..64).filter(|number| bits & 1 << number != 0) {
        check(prctl(libc::PR_CAP_AMBIENT, ambient(libc::PR_CAP_AMBIENT_RAISE), number), "PR_CAP_AMBIENT_RAISE")?;
    }
    Ok(())
}

fn ambient(operation: libc::c_int) -> u32 {
    u32::try_from(operation).unwrap_or(0)
}

fn prctl(option: libc::c_int, first: u32, second: u32) -> libc::c_long {
    let (first, second, zero) = (libc::c_ulong::from(first), libc::c_ulong::from(second), 0 as libc::c_ulong);
    // SAFETY: these options take plain numbers.
    unsafe { libc::prctl(option, first, second, zero, zero) }.into()
}

fn check(result: libc::c_long, call: &'static str) -> Result<()> {
    if result >= 0 {
        return Ok(());
    }
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    Err(Error { call, subject: String::new(), errno })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(number("CAP_SYS_ADMIN"), Some(21));
        assert_eq!(number("net_bind_service"), Some(10));
        assert_eq!(number("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(number("CAP_"), None);
        assert_eq!(names(1 | 1 << 40), ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"]);
    }

    #[test]
    fn what_is_effective_is_permitted() {
        let sets = get().unwrap();
        assert_eq!(sets.effective & !sets.permitted, 0);
    }
}
