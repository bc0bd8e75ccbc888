//! Files in which the managers keep what they have given out. Upstream's kubelet reads them and writes such, so that a node
//! can change from one to the other while its pods run.
//!
//! Upstream protects each with the FNV-1a sum of the text that Go's `spew` makes of its data: types of fields in brackets,
//! maps sorted. The modules that own a file write that text.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::damaged;

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Corrupt {
    /// It is no such file.
    #[error("it cannot be parsed")]
    Json(#[from] serde_json::Error),
    /// It was damaged, or changed by hand.
    #[error("its checksum is {found}, and should be {expected}")]
    Checksum {
        /// What the file says.
        found: u64,
        /// What its data give.
        expected: u64,
    },
    /// It says what cannot be.
    #[error("{0}")]
    Content(String),
}

/// Whether the sum that a file has is that of the `text` which `spew` makes of its data.
pub(super) fn verify(found: u64, text: &str) -> Result<(), Corrupt> {
    let expected = sum(text);
    if found == expected { Ok(()) } else { Err(Corrupt::Checksum { found, expected }) }
}

/// FNV-1a of 32 bits.
pub(super) fn sum(text: &str) -> u64 {
    let sum = text.bytes().fold(0x811c_9dc5_u32, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    sum.into()
}

/// What a file says; none if there is no file. One that is of no use is set aside as `<file>.corrupt`, for whoever wants to
/// know what happened to it.
pub(super) fn load<T>(path: &Path, read: impl FnOnce(&[u8]) -> Result<T, Corrupt>) -> Option<T> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "a checkpoint cannot be read; beginning without it");
            return None;
        }
    };
    read(&bytes).inspect_err(|error| damaged::set_aside(path, error)).ok()
}

/// Replaces a file in one step. Nothing is synced: after a crash of the machine nothing runs that it tells of.
pub(super) fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, bytes)?;
    fs::rename(temporary, path)
}

/// A file that is replaced by one after the other, on a thread. A disk that does not answer holds up those who wait for this,
/// and one thread.
#[derive(Debug)]
pub(super) struct Saver(Arc<Mutex<PathBuf>>);

impl Saver {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(Arc::new(Mutex::new(path)))
    }

    /// Asks for the content when it is its turn, so that the newest is written last.
    pub(super) async fn save(&self, bytes: impl FnOnce() -> Vec<u8>) -> io::Result<()> {
        let path = self.0.clone().lock_owned().await;
        let bytes = bytes();
        let written = tokio::task::spawn_blocking(move || save(&path, &bytes)).await;
        written.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

/// Go's words for a list: its items between brackets.
pub(super) fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("[{}]", items.join(" "))
}

/// Go's words for a map: its pairs in their order.
pub(super) fn map<K: std::fmt::Display, V: std::fmt::Display>(pairs: impl IntoIterator<Item = (K, V)>) -> String {
    format!("map{}", list(pairs.into_iter().map(|(key, value)| format!("{key}:{value}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_gos() {
        // hash/fnv.New32a over the same text.
        assert_eq!(sum("(string){\"a\":\"b\\\"\"}"), 2_900_376_996);
    }

    /// This runtime has one thread. A pipe without a reader stands for a disk that does not answer.
    #[tokio::test]
    async fn a_disk_that_does_not_answer_holds_up_no_other() {
        use sys::rustix::fs::{CWD, FileType, Mode, mknodat};
        let dir = tempfile::tempdir().unwrap();
        let (path, pipe) = (dir.path().join("state"), dir.path().join("state.new"));
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let others_go_on = receiver.recv_timeout(std::time::Duration::from_secs(60));
            (others_go_on.is_ok(), fs::read(pipe).unwrap())
        });
        let saver = Saver::new(path.clone());
        let others = async {
            tokio::task::yield_now().await;
            sender.send(()).unwrap();
        };
        let (old, new, ()) = tokio::join!(saver.save(|| b"old".into()), saver.save(|| b"new".into()), others);
        assert!(old.is_ok() && new.is_ok());
        assert_eq!(reader.join().unwrap(), (true, b"old".to_vec()));
        assert_eq!(fs::read(path).unwrap(), b"new");
    }

    #[test]
    fn a_file_of_no_use_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let read = |bytes: &[u8]| Ok(serde_json::from_slice::<u8>(bytes)?);
        assert_eq!(load(&path, read), None);
        save(&path, b"7").unwrap();
        assert_eq!(load(&path, read), Some(7));
        save(&path, b"{").unwrap();
        assert_eq!(load(&path, read), None);
        assert!(!path.exists());
        assert_eq!(fs::read(dir.path().join("state.corrupt")).unwrap(), b"{");
    }
}
