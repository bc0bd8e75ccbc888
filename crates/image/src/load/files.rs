//! The files of an archive or a directory, by name.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use bytes::Bytes;
use sys::tree::{Dir, Kind};

use crate::Images;
use crate::child::Child;
use crate::digest::{Algorithm, Digest, Hasher};
use crate::error::Error;
use crate::manifest::DOCUMENT_BYTES_MAX;
use crate::store::Staging;
use crate::worker::protocol::{Job, Listing, Order, Report, SPOOL};

const PIECE_BYTES: u64 = 1 << 20;

/// What is to be loaded.
#[derive(Debug)]
pub(crate) struct Files {
    /// As the operator named it.
    path: PathBuf,
    kind: FilesKind,
}

#[derive(Debug)]
enum FilesKind {
    Directory(Dir),
    Archive {
        file: Arc<File>,
        /// Offset and size by name, within the file.
        members: HashMap<String, (u64, u64)>,
        /// Holds the file, if it is a copy, and takes it along.
        _staging: Staging,
    },
}

/// Where one file's bytes are.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    file: Arc<File>,
    offset: u64,
    size: u64,
    /// For messages: the archive and the file in it.
    archive: PathBuf,
    name: String,
}

impl Files {
    /// Opens a directory, or has a confined child list an archive.
    pub(crate) async fn open(images: &Arc<Images>, path: &Path) -> Result<Self, Error> {
        let opened = {
            let path = path.to_owned();
            images.blocking(move |_| open(&path)).await?
        };
        let kind = match opened {
            Opened::Directory(dir) => FilesKind::Directory(dir),
            Opened::File(file) => list(images, path, file).await?,
        };
        Ok(Self { path: path.to_owned(), kind })
    }

    /// As the operator named it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// An error that names the archive.
    pub(crate) fn faulty(&self, reason: impl Into<String>) -> Error {
        faulty(&self.path, reason)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        matches!(self.locate(name), Ok(Some(_)))
    }

    /// Finds a file that the archive itself names.
    pub(crate) fn place(&self, name: &str) -> Result<Place, Error> {
        self.locate(name)?.ok_or_else(|| self.faulty(format!("it names {name}, which it does not have")))
    }

    /// Reads a small document whole.
    pub(crate) fn document(&self, name: &str) -> Result<Bytes, Error> {
        let place = self.place(name)?;
        let most = DOCUMENT_BYTES_MAX as u64;
        if place.size > most {
            return Err(self.faulty(format!("{name} has {} bytes, more than the {most} of any honest one", place.size)));
        }
        place.piece(0, most).map(Bytes::from)
    }

    fn locate(&self, name: &str) -> Result<Option<Place>, Error> {
        let name = name.trim_start_matches("./");
        let found = match &self.kind {
            FilesKind::Archive { file, members, .. } => {
                members.get(name).map(|(offset, size)| (Arc::clone(file), *offset, *size))
            }
            FilesKind::Directory(dir) => open_in(dir, name)
                .map_err(|e| self.faulty(format!("cannot open {name} in it: {e}")))?
                .map(|(file, size)| (Arc::new(file), 0, size)),
        };
        Ok(found.map(|(file, offset, size)| Place {
            file,
            offset,
            size,
            archive: self.path.clone(),
            name: name.to_owned(),
        }))
    }
}

fn faulty(path: &Path, reason: impl Into<String>) -> Error {
    Error::Archive { path: path.to_owned(), reason: reason.into() }
}

enum Opened {
    Directory(Dir),
    File(File),
}

fn open(path: &Path) -> Result<Opened, Error> {
    let file = File::open(path).map_err(|e| faulty(path, e.to_string()))?;
    let directory = file.metadata().map_err(|e| faulty(path, e.to_string()))?.is_dir();
    Ok(if directory { Opened::Directory(Dir::from(std::os::fd::OwnedFd::from(file))) } else { Opened::File(file) })
}

/// A regular file below `dir`; no link is followed.
fn open_in(dir: &Dir, name: &str) -> io::Result<Option<(File, u64)>> {
    let file = match dir.open_file(name.as_bytes()) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let meta = sys::tree::meta(file.as_fd())?;
    if meta.kind != Kind::File {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok(Some((file, meta.size)))
}

async fn list(images: &Images, path: &Path, file: File) -> Result<FilesKind, Error> {
    let staging = images.store.stage()?;
    let root = Dir::open(staging.path()).map_err(|e| Error::store("open", staging.path(), e))?;
    let listing = run_child(images, path, &root, &file).await?;
    let file = if listing.spooled {
        let (spool, _) = open_in(&root, &String::from_utf8_lossy(SPOOL))
            .and_then(|spool| spool.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(|e| Error::store("open", staging.path().join("archive"), e))?;
        spool
    } else {
        file
    };
    let length = file.metadata().map_err(|e| faulty(path, e.to_string()))?.len();
    let inside = |offset: u64, size: u64| offset.checked_add(size).is_some_and(|end| end <= length);
    let members = listing.members.into_iter().filter(|member| inside(member.offset, member.size));
    let members = members.map(|member| (member.name, (member.offset, member.size))).collect();
    Ok(FilesKind::Archive { file: Arc::new(file), members, _staging: staging })
}

async fn run_child(images: &Images, path: &Path, root: &Dir, file: &File) -> Result<Listing, Error> {
    let order = Order { job: Job::List, limits: images.config.limits.clone() };
    let child = file.try_clone().and_then(|input| Child::start(root, &order, Stdio::from(input)));
    let child = child.map_err(|e| faulty(path, format!("cannot start the process that reads it: {e}")))?;
    match child.report().await.map_err(|reason| faulty(path, reason))? {
        Report::Listed(listing) => Ok(listing),
        Report::Refused { entry, reason } => Err(faulty(path, format!("{entry} {reason}").trim_start())),
        Report::Corrupt { reason } => Err(faulty(path, format!("it is no tar archive, or a damaged one: {reason}"))),
        Report::DiskFull { .. } => Err(Error::DiskFull {
            object: format!("the uncompressed archive {}", path.display()),
            path: images.config.state_dir.clone(),
        }),
        Report::Failed { reason } => Err(faulty(path, reason)),
        Report::Done(_) => Err(faulty(path, "the confined process has unpacked it instead of listing it")),
    }
}

impl Place {
    /// Bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        format!("{} in {}", self.name, self.archive.display())
    }

    /// At most `most` bytes from `from` on; fewer only at the file's end.
    pub(crate) fn piece(&self, from: u64, most: u64) -> Result<Vec<u8>, Error> {
        let wanted = self.size.saturating_sub(from).min(most);
        let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(usize::MAX)];
        let read = self.file.read_exact_at(&mut bytes, self.offset + from);
        read.map_err(|e| faulty(&self.archive, format!("cannot read {}: {e}", self.name)))?;
        Ok(bytes)
    }

    /// Reads the file through for its digest.
    pub(crate) fn digest(&self) -> Result<Digest, Error> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut at = 0;
        while at < self.size {
            let piece = self.piece(at, PIECE_BYTES)?;
            hasher.update(&piece);
            at += piece.len() as u64;
        }
        Ok(hasher.finish())
    }

    /// The file as a stream.
    pub(crate) fn read(&self) -> Reading {
        Reading { place: self.clone(), at: 0 }
    }
}

/// A file being read, off the threads that serve others: it may lie on a hung file system.
#[derive(Debug)]
pub(crate) struct Reading {
    place: Place,
    at: u64,
}

impl Reading {
    /// The next bytes; none at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.at >= self.place.size {
            return Ok(None);
        }
        let (place, at) = (self.place.clone(), self.at);
        let read = tokio::task::spawn_blocking(move || place.piece(at, PIECE_BYTES)).await;
        let bytes = read.unwrap_or_else(|e| Err(faulty(&self.place.archive, e.to_string())))?;
        self.at += bytes.len() as u64;
        Ok(Some(bytes.into()))
    }
}
