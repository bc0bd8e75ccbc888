//! The files of `image_manager`: one for each pull that goes on, one for each image that was pulled. Their names are sums of
//! what they are about.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::{PullIntent, PulledRecord, hex_sum};

const PREFIX: &str = "sha256-";
/// How the name of a file ends until it is whole.
const NEW: &str = ".tmp";

#[derive(Debug)]
pub(super) struct Files {
    pulling: PathBuf,
    pulled: PathBuf,
}

impl Files {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let files = Self { pulling: dir.join("pulling"), pulled: dir.join("pulled") };
        for dir in [&files.pulling, &files.pulled] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        Ok(files)
    }

    pub(super) fn begin(&self, image: &str) -> io::Result<()> {
        write(&file(&self.pulling, image), &PullIntent::new(image))
    }

    pub(super) fn end(&self, image: &str) {
        remove(&file(&self.pulling, image));
    }

    pub(super) fn is_pulling(&self, image: &str) -> bool {
        // One that cannot be read is about this image still: its name says so.
        file(&self.pulling, image).exists()
    }

    /// The images that were being pulled when an earlier kubelet ended.
    pub(super) fn pulling(&self) -> Vec<String> {
        let intents = all(&self.pulling).filter_map(|path| read::<PullIntent>(&path).ok().flatten());
        intents.filter(PullIntent::is_known).map(|intent| intent.image).collect()
    }

    /// The record of an image; none if no kubelet has pulled it.
    pub(super) fn record(&self, id: &str) -> io::Result<Option<PulledRecord>> {
        let Some(record) = read::<PulledRecord>(&file(&self.pulled, id))? else { return Ok(None) };
        if !record.is_known() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is of another kind or version"));
        }
        Ok(Some(record).filter(|record| record.image_ref == id))
    }

    pub(super) fn pulled(&self) -> Vec<PulledRecord> {
        all(&self.pulled).filter_map(|path| read(&path).ok().flatten()).collect()
    }

    /// Whether it could be written.
    pub(super) fn write_or_warn(&self, record: &PulledRecord) -> bool {
        let id = &record.image_ref;
        let written = write(&file(&self.pulled, id), record);
        written.inspect_err(|error| tracing::warn!(id, %error, "who pulled an image cannot be written down")).is_ok()
    }

    pub(super) fn forget(&self, id: &str) {
        remove(&file(&self.pulled, id));
    }
}

fn file(dir: &Path, about: &str) -> PathBuf {
    dir.join(format!("{PREFIX}{}", hex_sum(about.as_bytes())))
}

fn all(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_whole = |name: &str| name.starts_with(PREFIX) && !name.ends_with(NEW);
    entries.filter(move |entry| entry.file_name().to_str().is_some_and(is_whole)).map(|entry| entry.path())
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// In one step, and for root alone.
fn write(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(NEW);
    let mut text = serde_json::to_vec(content)?;
    text.push(b'\n');
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&text)?;
    fs::rename(temporary, path)
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "a record of a pull cannot be removed");
        }
        _ => {}
    }
}
