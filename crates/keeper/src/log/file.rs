//! A log file: appends batches of records, rotates, and survives a full disk.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use sys::rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat};

use crate::clock;
use crate::protocol::{Rotate, UnixNanos};

/// Permissions of a log file, as containerd makes it.
const MODE: u32 = 0o640;

/// Where a container's records go.
#[derive(Debug)]
pub(crate) struct LogFile {
    directory: OwnedFd,
    name: String,
    rotate: Option<Rotate>,
    file: File,
    size: u64,
    lost: Lost,
}

/// Records that the file could not take.
#[derive(Debug, Default)]
struct Lost {
    /// Since the container began.
    bytes_total: u64,
    /// Since the last marker in the file.
    bytes: u64,
    records: u64,
    errno: i32,
}

/// What changed for the worse or the better with a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// As before.
    Same,
    /// Records began to be lost, for this error.
    Failing(i32),
    /// The file takes records again.
    Recovered,
}

impl LogFile {
    /// Opens the file, or makes it; an existing one is appended to.
    pub(crate) fn open(directory: OwnedFd, name: String, rotate: Option<Rotate>) -> io::Result<Self> {
        if name.is_empty() || name.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of a log file is no path"));
        }
        let file = open_append(&directory, &name)?;
        let size = file.metadata()?.len();
        Ok(Self { directory, name, rotate, file, size, lost: Lost::default() })
    }

    /// Output that could not be written so far, in bytes of records.
    pub(crate) fn lost_bytes(&self) -> u64 {
        self.lost.bytes_total
    }

    /// Opens the file again, in `directory` if that was made anew. Until it succeeds the old one is written.
    pub(crate) fn reopen(&mut self, directory: Option<OwnedFd>) -> io::Result<()> {
        let file = open_append(directory.as_ref().unwrap_or(&self.directory), &self.name)?;
        self.size = file.metadata()?.len();
        self.file = file;
        if let Some(directory) = directory {
            self.directory = directory;
        }
        Ok(())
    }

    /// Appends whole records. What the file cannot take is dropped and counted; once it can again, a record says so.
    pub(crate) fn append(&mut self, records: &[u8], now: UnixNanos) -> Health {
        if self.is_full_with(records.len()) {
            // Failure leaves the old file in place, which then grows: better than to lose records.
            let _ = self.rotate(now);
        }
        let failing = self.lost.records > 0;
        let result = if failing { self.write_marker(now) } else { Ok(()) };
        match result.and_then(|()| self.write_records(records)) {
            Ok(()) if failing => Health::Recovered,
            Ok(()) => Health::Same,
            Err(error) => self.drop_records(records, &error, failing),
        }
    }

    fn is_full_with(&self, more: usize) -> bool {
        let limit = self.rotate.as_ref().map_or(u64::MAX, |rotate| rotate.bytes_max);
        self.size > 0 && self.size + more as u64 > limit
    }

    /// Writes all records or none.
    fn write_records(&mut self, records: &[u8]) -> io::Result<()> {
        let result = self.file.write_all(records);
        match result {
            Ok(()) => self.size += records.len() as u64,
            // Part of it may have been written, and a torn record would garble the next one. If that fails as well, the
            // first error is the one to tell.
            Err(_) => drop(self.file.set_len(self.size)),
        }
        result
    }

    fn write_marker(&mut self, now: UnixNanos) -> io::Result<()> {
        let (time, Lost { bytes, records, errno, .. }) = (clock::rfc3339(now), &self.lost);
        let cause = io::Error::from_raw_os_error(*errno);
        let marker =
            format!("{time} stderr F orlop: {records} records ({bytes} bytes) of this log were lost: {cause}\n");
        self.write_records(marker.as_bytes())?;
        self.lost = Lost { bytes_total: self.lost.bytes_total, ..Lost::default() };
        Ok(())
    }

    fn drop_records(&mut self, records: &[u8], error: &io::Error, failing: bool) -> Health {
        let lost = &mut self.lost;
        lost.errno = error.raw_os_error().unwrap_or_default();
        lost.bytes += records.len() as u64;
        lost.bytes_total += records.len() as u64;
        lost.records += records.iter().filter(|byte| **byte == b'\n').count() as u64;
        if failing { Health::Same } else { Health::Failing(lost.errno) }
    }

    /// Renames the file to `<name>.<time>`, begins a new one and removes the oldest.
    fn rotate(&mut self, now: UnixNanos) -> io::Result<()> {
        let mut rotated = rotated_files(&self.directory, &self.name)?;
        let name = next_name(&self.name, &rotated, now.0 / 1_000_000_000);
        renameat_with(&self.directory, &self.name, &self.directory, &name, RenameFlags::NOREPLACE)?;
        match open_append(&self.directory, &self.name) {
            Ok(file) => (self.file, self.size) = (file, 0),
            Err(error) => {
                renameat_with(&self.directory, &name, &self.directory, &self.name, RenameFlags::NOREPLACE)?;
                return Err(error);
            }
        }
        rotated.push(name);
        for old in surplus(&rotated, self.rotate.as_ref().map_or(u32::MAX, |rotate| rotate.files_max)) {
            unlinkat(&self.directory, old, AtFlags::empty())?;
        }
        Ok(())
    }
}

/// Nobody waits for the reader of a pipe that somebody has put there, and nothing is written into anything but a file.
fn open_append(directory: impl AsFd, name: &str) -> io::Result<File> {
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(openat(directory, name, flags, Mode::from_raw_mode(MODE))?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is no regular file"))),
    }
}

/// Names of the rotated files of `name`, oldest first.
fn rotated_files(directory: impl AsFd, name: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?.file_name().to_string_lossy().into_owned();
        if stamp_of(&entry, name).is_some() {
            found.push(entry);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The time in a rotated file's name, compressed or not.
fn stamp_of<'a>(rotated: &'a str, name: &str) -> Option<&'a str> {
    let stamp = rotated.strip_prefix(name)?.strip_prefix('.')?;
    let stamp = stamp.strip_suffix(".gz").unwrap_or(stamp);
    let shape = |(at, byte): (usize, u8)| if at == 8 { byte == b'-' } else { byte.is_ascii_digit() };
    (stamp.len() == 15 && stamp.bytes().enumerate().all(shape)).then_some(stamp)
}

/// A name that sorts after all `rotated` ones: a log that rotates twice in a second borrows from the next, and a clock
/// that jumps back changes no order.
fn next_name(name: &str, rotated: &[String], mut seconds: u64) -> String {
    let last = rotated.iter().filter_map(|file| stamp_of(file, name)).max().unwrap_or_default();
    if clock::stamp(seconds).as_str() <= last {
        seconds = clock::seconds_of(last).map_or(seconds, |last| last + 1);
    }
    format!("{name}.{}", clock::stamp(seconds))
}

/// The oldest files, so many that `files_max` are left with the current one.
fn surplus(rotated: &[String], files_max: u32) -> &[String] {
    let keep = (files_max.max(1) - 1) as usize;
    &rotated[..rotated.len().saturating_sub(keep)]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const AT: UnixNanos = UnixNanos(1_136_214_245_000_000_000);

    fn open(dir: &Path, rotate: Option<Rotate>) -> LogFile {
        LogFile::open(File::open(dir).unwrap().into(), "0.log".into(), rotate).unwrap()
    }

    #[test]
    fn a_log_is_a_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = sys::rustix::fs::FileType::Fifo;
        sys::rustix::fs::mknodat(sys::rustix::fs::CWD, dir.path().join("0.log"), pipe, 0o600.into(), 0).unwrap();
        let open = || LogFile::open(File::open(dir.path()).unwrap().into(), "0.log".into(), None);
        open().unwrap_err();
        let reader = File::options().read(true).write(true).open(dir.path().join("0.log")).unwrap();
        assert!(open().unwrap_err().to_string().contains("no regular file"));
        drop(reader);
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn rotation_keeps_the_newest_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("0.log.old"), "not ours").unwrap();
        let mut log = open(dir.path(), Some(Rotate { bytes_max: 10, files_max: 3 }));
        for record in ["first..\n", "second.\n", "third..\n", "fourth.\n"] {
            assert_eq!(log.append(record.as_bytes(), AT), Health::Same);
        }
        assert_eq!(names(dir.path()), ["0.log", "0.log.20060102-150406", "0.log.20060102-150407", "0.log.old"]);
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(text("0.log.20060102-150406"), "second.\n");
        assert_eq!(text("0.log.20060102-150407"), "third..\n");
        assert_eq!(text("0.log"), "fourth.\n");
    }

    #[test]
    fn a_clock_that_jumps_back_changes_no_order() {
        let rotated = ["0.log.20300101-000000.gz".to_owned()];
        assert_eq!(next_name("0.log", &rotated, AT.0 / 1_000_000_000), "0.log.20300101-000001");
        assert_eq!(next_name("0.log", &[], AT.0 / 1_000_000_000), "0.log.20060102-150405");
    }

    #[test]
    fn a_renamed_file_is_written_until_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), None);
        log.append(b"one\n", AT);
        std::fs::rename(dir.path().join("0.log"), dir.path().join("moved")).unwrap();
        log.append(b"two\n", AT);
        log.reopen(None).unwrap();
        log.append(b"three\n", AT);
        assert_eq!(std::fs::read(dir.path().join("moved")).unwrap(), b"one\ntwo\n");
        assert_eq!(std::fs::read(dir.path().join("0.log")).unwrap(), b"three\n");
    }

    #[test]
    fn what_a_full_disk_refuses_is_named_later() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), None);
        log.append(b"before\n", AT);
        let good = std::mem::replace(&mut log.file, File::options().append(true).open("/dev/full").unwrap());
        assert_eq!(log.append(b"lost one\n", AT), Health::Failing(28));
        assert_eq!(log.append(b"lost two\n", AT), Health::Same);
        assert_eq!(log.lost_bytes(), 18);
        log.file = good;
        assert_eq!(log.append(b"after\n", AT), Health::Recovered);
        let text = std::fs::read_to_string(dir.path().join("0.log")).unwrap();
        let marker = "2006-01-02T15:04:05.000000000Z stderr F orlop: 2 records (18 bytes) of this log were lost: \
                      No space left on device (os error 28)\n";
        assert_eq!(text, format!("before\n{marker}after\n"));
    }

    #[test]
    fn a_name_is_no_path() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", "../0.log", "a/b"] {
            assert!(LogFile::open(File::open(dir.path()).unwrap().into(), name.into(), None).is_err(), "{name:?}");
        }
    }
}
