//! Files in which the managers keep what they have given out. Upstream's kubelet reads them and writes such, so that a node
//! can change from one to the other while its pods run.
//!
//! Upstream protects each with the FNV-1a sum of the text that Go's `spew` makes of its data: types of fields in brackets,
//! maps sorted. The modules that own a file write that text.

use std::fs;
use std::io;
use std::path::Path;

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
    read(&bytes).inspect_err(|error| set_aside(path, error)).ok()
}

fn set_aside(path: &Path, error: &Corrupt) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".corrupt");
    tracing::error!(
        path = %path.display(), error = error as &dyn std::error::Error, aside = %Path::new(&aside).display(),
        "a checkpoint is of no use; it is set aside, and begun anew"
    );
    if let Err(error) = fs::rename(path, &aside) {
        tracing::warn!(path = %path.display(), %error, "a checkpoint cannot be set aside; it will be overwritten");
    }
}

/// Replaces a file in one step. Nothing is synced: after a crash of the machine nothing runs that it tells of.
pub(super) fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, bytes)?;
    fs::rename(temporary, path)
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
