//! The small file that tells what a keeper knew, for the time when it no longer can.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use sys::rustix::fs::{CWD, Mode, OFlags, openat, renameat};

use crate::protocol::{RECORD, Snapshot, VERSION, VERSION_OLDEST, wire};

/// What the file begins with; the protocol's version follows.
const MAGIC: &[u8] = b"orlop-keeper";

/// Replaces the record in the working directory, in one step. The directory is a tmpfs, so nothing is synced.
pub(crate) fn write(snapshot: &Snapshot) -> io::Result<()> {
    let temporary = format!("{RECORD}.new");
    fs::write(&temporary, encode(snapshot))?;
    Ok(renameat(CWD, &temporary, CWD, RECORD)?)
}

/// Reads the record that a keeper left in the sandbox's directory. Compare its boot id: a record of another boot says
/// nothing about processes.
///
/// # Errors
/// `NotFound` without a record, `InvalidData` for one that this version cannot read.
pub fn read_record(directory: impl AsFd) -> io::Result<Snapshot> {
    let file = openat(directory, RECORD, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut fs::File::from(file), &mut bytes)?;
    decode(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a keeper's record of this version"))
}

pub(crate) fn encode(snapshot: &Snapshot) -> Vec<u8> {
    [MAGIC, &VERSION.to_le_bytes(), &wire::encode(snapshot)].concat()
}

pub(crate) fn decode(bytes: &[u8]) -> Option<Snapshot> {
    let (version, body) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<2>()?;
    (VERSION_OLDEST..=VERSION).contains(&u16::from_le_bytes(*version)).then(|| wire::decode(body).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Container, Exit, Process, UnixNanos, Welcome};

    #[test]
    fn a_record_survives_and_a_foreign_one_is_refused() {
        let sandbox =
            Welcome { version: VERSION, sandbox: "s".into(), pid: 1, boot_id: "b".into(), started: UnixNanos(1) };
        let exit = Some(Exit { code: 137, signal: 9, at: UnixNanos(2) });
        let process = Process { pid: 5, start_ticks: 6, at: UnixNanos(7) };
        let containers = vec![Container { id: "c".into(), process, exit, lost_bytes: 0 }];
        let snapshot = Snapshot { sandbox, reaper: None, containers, execs: vec![] };
        let mut bytes = encode(&snapshot);
        assert_eq!(decode(&bytes), Some(snapshot));
        bytes[MAGIC.len()] ^= 1;
        assert_eq!(decode(&bytes), None);
        assert_eq!(decode(b""), None);
    }
}
