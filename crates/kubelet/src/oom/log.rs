//! The kernel's log, record by record (Documentation/ABI/testing/dev-kmsg), or as a whole where it has no device.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom};

use sys::rustix::fs::{Mode, OFlags, open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::message::{Kill, Reader};

const LOG: &str = "/dev/kmsg";
/// The longest record, with what stands before and after its text (`PRINTKRB_RECORD_MAX` is 1024, each byte up to four).
const RECORD_MAX: usize = 8192;

/// What the log says of kills, from its oldest record on.
pub(super) struct Log {
    file: File,
    reader: Reader,
}

impl Log {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { file: file()?, reader: Reader::default() })
    }

    /// The next kill; none if there is no more yet.
    pub(super) fn next(&mut self) -> io::Result<Option<Kill>> {
        while let Some(record) = record(&self.file)? {
            if let Some(kill) = self.reader.record(&record) {
                return Ok(Some(kill));
            }
        }
        Ok(None)
    }
}

/// The kills of which the log tells from now on.
pub(super) struct News {
    file: AsyncFd<File>,
    reader: Reader,
}

impl News {
    pub(super) fn open() -> io::Result<Self> {
        let mut file = file()?;
        file.seek(SeekFrom::End(0))?;
        #[expect(deprecated, reason = "its replacement is unsafe; a file keeps what that asks for")]
        let file = AsyncFd::with_interest(file, Interest::READABLE)?;
        Ok(Self { file, reader: Reader::default() })
    }

    pub(super) async fn next(&mut self) -> io::Result<Kill> {
        loop {
            let mut ready = self.file.readable().await?;
            match record(self.file.get_ref())? {
                Some(record) => {
                    if let Some(kill) = self.reader.record(&record) {
                        return Ok(kill);
                    }
                }
                None => ready.clear_ready(),
            }
        }
    }
}

/// The kills that the whole log tells of, the oldest first.
pub(super) fn all() -> io::Result<Vec<Kill>> {
    let text = sys::klog::read_all()?;
    let mut reader = Reader::default();
    Ok(String::from_utf8_lossy(&text).lines().filter_map(|line| reader.line(line)).collect())
}

fn file() -> io::Result<File> {
    Ok(open(LOG, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// One record; none if there is no more yet. Those that were overwritten before they were read are passed over.
fn record(mut file: &File) -> io::Result<Option<String>> {
    let mut record = [0; RECORD_MAX];
    loop {
        return match file.read(&mut record) {
            Ok(length) => Ok(record.get(..length).map(|record| String::from_utf8_lossy(record).into_owned())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if [ErrorKind::BrokenPipe, ErrorKind::Interrupted].contains(&error.kind()) => continue,
            Err(error) => Err(error),
        };
    }
}
