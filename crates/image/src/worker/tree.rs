//! Entries of an archive become files below the working directory, which is the worker's root.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::rc::Rc;

use sys::tree::{Dir, Kind as FileKind, Node};

use super::input::Input;
use super::path::{Meaning, Refusal, Relative, follow, meaning};
use super::protocol::HexPath;
use super::tar::{Archive, Entry, Kind, TarError};
use crate::Limits;

/// Why an entry could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It must not be.
    #[error("{0}")]
    Refused(String),
    /// The archive is broken.
    #[error(transparent)]
    Archive(#[from] TarError),
    /// The kernel said no.
    #[error("cannot {step}: {source}")]
    Io { step: &'static str, source: io::Error },
}

impl From<Refusal> for Failure {
    fn from(reason: Refusal) -> Self {
        Self::Refused(reason.to_owned())
    }
}

pub(crate) fn failed(step: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Io { step, source }
}

/// What the tree takes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Taken {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// A file tree being made.
pub(crate) struct Tree<'a> {
    root: Rc<Dir>,
    limits: &'a Limits,
    taken: Taken,
    content_bytes: u64,
    entries: u64,
    /// The directory of the entry before: most entries have the same one.
    last_parent: Option<(Vec<u8>, Rc<Dir>)>,
    opaque: BTreeSet<Vec<u8>>,
    opaque_bytes: usize,
    /// Times of directories, set last because each new entry changes them.
    directory_times: Vec<(Relative, sys::tree::Time)>,
}

const BLOCK_BYTES: u64 = 4096;
/// Paths of opaque directories, with two bytes for what stands between them: the report has each byte as two digits.
const OPAQUE_BYTES_MAX: usize = 4 << 20;
const IMPLIED_DIRECTORY_MODE: u32 = 0o755;
const SPECIAL_BITS: u32 = 0o7000;

impl<'a> Tree<'a> {
    pub(crate) fn new(root: Dir, limits: &'a Limits) -> Self {
        Self {
            root: Rc::new(root),
            limits,
            taken: Taken::default(),
            content_bytes: 0,
            entries: 0,
            last_parent: None,
            opaque: BTreeSet::new(),
            opaque_bytes: 0,
            directory_times: Vec::new(),
        }
    }

    /// Makes what `entry` says, reading its data from `archive`.
    pub(crate) fn add<R: Input>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), Failure> {
        self.charge(entry)?;
        let path = Relative::parse(&entry.name, self.limits.path_bytes_max)?;
        if path.is_root() {
            return self.describe_root(entry);
        }
        let (directory, base) = path.split();
        match meaning(base)? {
            Meaning::Ignored => Ok(()),
            Meaning::Opaque => self.hide_below(directory),
            Meaning::Whiteout(hidden) => self.white_out(directory, hidden),
            Meaning::Plain => self.create(&path, entry, archive),
        }
    }

    /// Sets what had to wait for the last entry.
    pub(crate) fn finish(mut self) -> Result<(Taken, Vec<HexPath>), Failure> {
        for (path, time) in std::mem::take(&mut self.directory_times).iter().rev() {
            let (directory, base) = path.split();
            // A later entry may have put something else in the place of the directory, or of one above it.
            let Ok(parent) = self.existing(directory) else { continue };
            match parent.meta(base) {
                Ok(meta) if meta.kind == FileKind::Directory => {
                    parent.set_times(base, *time).map_err(failed("set the times of a directory"))?
                }
                _ => {}
            }
        }
        Ok((self.taken, self.opaque.into_iter().map(HexPath).collect()))
    }

    fn note_opaque(&mut self, path: Vec<u8>) -> Result<(), Failure> {
        let bytes = path.len() + 2;
        if self.opaque.insert(path) {
            self.opaque_bytes += bytes;
        }
        if self.opaque_bytes > OPAQUE_BYTES_MAX {
            return Err(Failure::Refused(format!(
                "brings the paths of opaque directories above {OPAQUE_BYTES_MAX} bytes"
            )));
        }
        Ok(())
    }

    /// An entry of the archive, or a directory that it only implies.
    fn charge_entry(&mut self) -> Result<(), Failure> {
        self.entries += 1;
        if self.entries > self.limits.entries_max {
            return Err(Failure::Refused(format!(
                "is one more than the {} entries that a layer may have",
                self.limits.entries_max
            )));
        }
        Ok(())
    }

    fn charge(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.charge_entry()?;
        if entry.kind == Kind::File {
            self.content_bytes = self.content_bytes.saturating_add(entry.size);
        }
        if self.content_bytes > self.limits.bytes_max {
            return Err(Failure::Refused(format!("brings the layer above {} bytes", self.limits.bytes_max)));
        }
        Ok(())
    }

    fn describe_root(&self, entry: &Entry) -> Result<(), Failure> {
        if entry.kind != Kind::Directory {
            return Err("would replace the root directory".into());
        }
        let root = self.root.open_real(b".").map_err(failed("open the root directory"))?;
        describe(root.as_fd(), entry, true)
    }

    fn hide_below(&mut self, directory: &[u8]) -> Result<(), Failure> {
        let (_, real) = self.parent(directory)?;
        self.note_opaque(real)
    }

    fn white_out(&mut self, directory: &[u8], hidden: &[u8]) -> Result<(), Failure> {
        let (parent, real) = self.parent(directory)?;
        match parent.meta(hidden) {
            // This layer's own directory stays, without what the layers below have in it.
            Ok(meta) if meta.kind == FileKind::Directory => self.note_opaque(join(&real, hidden)),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.taken.inodes += 1;
                parent.create_node(hidden, Node::Character { device: (0, 0) }, 0).map_err(failed("create a whiteout"))
            }
            Err(e) => Err(failed("look for what a whiteout hides")(e)),
        }
    }

    fn create<R: Input>(&mut self, path: &Relative, entry: &Entry, archive: &mut Archive<R>) -> Result<(), Failure> {
        let (directory, base) = path.split();
        let (parent, real) = self.parent(directory)?;
        match entry.kind {
            Kind::File => self.create_file(&parent, base, entry, archive)?,
            Kind::Directory => {
                self.create_directory(&parent, &real, base, entry)?;
                self.directory_times.push((path.clone(), entry.mtime));
            }
            Kind::HardLink => return self.create_hard_link(&parent, &real, base, entry),
            Kind::Symlink => self.create_symlink(&parent, base, entry)?,
            Kind::Character => self.create_node(&parent, base, entry, Node::Character { device: entry.device })?,
            Kind::Block => self.create_node(&parent, base, entry, Node::Block { device: entry.device })?,
            Kind::Fifo => self.create_node(&parent, base, entry, Node::Fifo)?,
        }
        self.taken.inodes += 1;
        Ok(())
    }

    fn create_file<R: Input>(
        &mut self,
        parent: &Dir,
        base: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), Failure> {
        let mut file = self
            .replacing(parent, base, |parent| parent.create_file(base, entry.mode & !SPECIAL_BITS))
            .map_err(failed("create a file"))?;
        let stored = match &entry.sparse {
            None => copy(&mut file, archive)?,
            Some(map) => copy_fragments(&mut file, archive, map, entry.size)?,
        };
        self.taken.bytes += stored.next_multiple_of(BLOCK_BYTES);
        describe(file.as_fd(), entry, false)?;
        sys::tree::set_times(file.as_fd(), entry.mtime).map_err(failed("set the times of a file"))
    }

    fn create_directory(&mut self, parent: &Dir, real: &[u8], base: &[u8], entry: &Entry) -> Result<(), Failure> {
        self.taken.bytes += BLOCK_BYTES;
        let plain = entry.uid == 0 && entry.gid == 0 && entry.mode & SPECIAL_BITS == 0 && entry.xattrs.is_empty();
        match parent.create_dir(base, entry.mode) {
            Ok(()) if plain => return Ok(()),
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => self.replace_by_directory(parent, real, base)?,
            Err(e) => return Err(failed("create a directory")(e)),
        }
        let directory = parent.open_real(base).map_err(failed("open a directory"))?;
        describe(directory.as_fd(), entry, true)
    }

    /// A directory stays and is described anew. Anything else goes; where it was a whiteout, the new directory must
    /// not show what the layers below have.
    fn replace_by_directory(&mut self, parent: &Dir, real: &[u8], base: &[u8]) -> Result<(), Failure> {
        let meta = parent.meta(base).map_err(failed("look at what is there"))?;
        if meta.kind == FileKind::Directory {
            return Ok(());
        }
        if meta.kind == FileKind::Whiteout {
            self.note_opaque(join(real, base))?;
        }
        parent.remove_file(base).map_err(failed("replace a file by a directory"))?;
        parent.create_dir(base, IMPLIED_DIRECTORY_MODE).map_err(failed("create a directory"))
    }

    fn create_hard_link(&mut self, parent: &Dir, real: &[u8], base: &[u8], entry: &Entry) -> Result<(), Failure> {
        let target = Relative::from_root(&entry.link, self.limits.path_bytes_max).map_err(|reason| {
            Failure::Refused(format!("is a hard link to {:?}, which {reason}", lossy(&entry.link)))
        })?;
        if target.is_root() {
            return Err("is a hard link to the root directory".into());
        }
        let (directory, name) = target.split();
        let not_there =
            |_| Failure::Refused(format!("is a hard link to {:?}, which this layer does not have", lossy(&entry.link)));
        let old = self.existing(directory).map_err(not_there)?;
        let meta = old
            .meta(name)
            .map_err(failed("look at the target of a hard link"))
            .map_err(|e| not_there_or(e, &not_there))?;
        if meta.kind == FileKind::Directory {
            return Err("is a hard link to a directory".into());
        }
        if join(real, base) == target.bytes() {
            return Err("is a hard link to itself".into());
        }
        self.replacing(parent, base, |parent| parent.create_hard_link(base, &old, name))
            .map_err(failed("create a hard link"))
    }

    fn create_symlink(&mut self, parent: &Dir, base: &[u8], entry: &Entry) -> Result<(), Failure> {
        if entry.link.is_empty() || entry.link.len() > self.limits.path_bytes_max {
            return Err("is a symbolic link with an empty or overlong target".into());
        }
        self.replacing(parent, base, |parent| parent.create_symlink(base, &entry.link))
            .map_err(failed("create a symbolic link"))?;
        describe_unopened(parent, base, entry)
    }

    fn create_node(&mut self, parent: &Dir, base: &[u8], entry: &Entry, node: Node) -> Result<(), Failure> {
        self.replacing(parent, base, |parent| parent.create_node(base, node, entry.mode))
            .map_err(failed("create a device or named pipe"))?;
        describe_unopened(parent, base, entry)
    }

    /// A later entry of the same name wins: what is there goes, if it is in the way.
    fn replacing<T>(&mut self, parent: &Dir, base: &[u8], create: impl Fn(&Dir) -> io::Result<T>) -> io::Result<T> {
        match create(parent) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.last_parent = None;
                parent.remove_all(base)?;
                create(parent)
            }
            other => other,
        }
    }

    /// The directory at `path` and its real path, made if it is not there (some builders leave directories out).
    fn parent(&mut self, path: &[u8]) -> Result<(Rc<Dir>, Vec<u8>), Failure> {
        if path.is_empty() {
            return Ok((Rc::clone(&self.root), Vec::new()));
        }
        if let Some((known, dir)) = self.last_parent.as_ref().filter(|(known, _)| known == path) {
            return Ok((Rc::clone(dir), known.clone()));
        }
        let real = self.real_path(path)?;
        if real.is_empty() {
            return Ok((Rc::clone(&self.root), real));
        }
        let dir = Rc::new(self.open_or_create(&real)?);
        if real == path {
            self.last_parent = Some((real.clone(), Rc::clone(&dir)));
        }
        Ok((dir, real))
    }

    /// `path` without symbolic links. The usual case, no link at all, costs one call.
    fn real_path(&self, path: &[u8]) -> Result<Vec<u8>, Failure> {
        if self.root.open_real(path).is_ok() {
            return Ok(path.to_vec());
        }
        let root = &self.root;
        let resolved = follow(path, |at| match root.read_link(at) {
            Ok(target) => Ok(Some(target)),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::InvalidInput | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(failed("read a symbolic link")(e)),
        })?;
        Ok(resolved?)
    }

    fn open_or_create(&mut self, real: &[u8]) -> Result<Dir, Failure> {
        match self.root.open_real(real) {
            Ok(dir) => return Ok(dir),
            // Something that is no directory may be a whiteout.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(e) => return Err(parent_failure(e)),
        }
        let ends = real.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).chain([real.len()]);
        for end in ends {
            self.create_implied(&real[..end])?;
        }
        self.root.open_real(real).map_err(parent_failure)
    }

    fn create_implied(&mut self, path: &[u8]) -> Result<(), Failure> {
        match self.root.create_dir(path, IMPLIED_DIRECTORY_MODE) {
            Ok(()) => {
                self.charge_entry()?;
                self.taken.inodes += 1;
                self.taken.bytes += BLOCK_BYTES;
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => self.uncover(path),
            Err(e) => Err(parent_failure(e)),
        }
    }

    /// A directory that is only implied may stand where a whiteout was.
    fn uncover(&mut self, path: &[u8]) -> Result<(), Failure> {
        match self.root.meta(path) {
            Ok(meta) if meta.kind == FileKind::Whiteout => {
                self.note_opaque(path.to_vec())?;
                self.root.remove_file(path).map_err(failed("replace a whiteout"))?;
                self.root.create_dir(path, IMPLIED_DIRECTORY_MODE).map_err(failed("create a directory"))
            }
            _ => Ok(()),
        }
    }

    fn existing(&self, path: &[u8]) -> Result<Dir, Failure> {
        if path.is_empty() {
            return self.root.open_real(b".").map_err(failed("open the root directory"));
        }
        self.root.open_real(&self.real_path(path)?).map_err(parent_failure)
    }
}

fn not_there_or(failure: Failure, not_there: &impl Fn(Failure) -> Failure) -> Failure {
    match &failure {
        Failure::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => not_there(failure),
        _ => failure,
    }
}

fn parent_failure(source: io::Error) -> Failure {
    match source.kind() {
        io::ErrorKind::NotADirectory => "has a parent that is not a directory".into(),
        _ if source.raw_os_error() == Some(ELOOP) => "has a parent that is a symbolic link to nowhere".into(),
        _ => failed("open the parent directory")(source),
    }
}

const ELOOP: i32 = 40;

fn join(directory: &[u8], base: &[u8]) -> Vec<u8> {
    if directory.is_empty() { base.to_vec() } else { [directory, b"/", base].concat() }
}

pub(crate) fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn copy<R: Input>(file: &mut std::fs::File, archive: &mut Archive<R>) -> Result<u64, Failure> {
    let mut total = 0;
    loop {
        let piece = archive.data().map_err(TarError::Source)?;
        if piece.is_empty() {
            return Ok(total);
        }
        file.write_all(piece).map_err(failed("write a file"))?;
        let used = piece.len();
        total += used as u64;
        archive.consume(used);
    }
}

fn copy_fragments<R: Input>(
    file: &mut std::fs::File,
    archive: &mut Archive<R>,
    map: &[(u64, u64)],
    size: u64,
) -> Result<u64, Failure> {
    use std::io::Seek as _;
    let mut total = 0;
    for (offset, length) in map {
        file.seek(io::SeekFrom::Start(*offset)).map_err(failed("seek in a sparse file"))?;
        let mut left = *length;
        while left > 0 {
            let piece = archive.data().map_err(TarError::Source)?;
            if piece.is_empty() {
                return Err(TarError::Malformed("a sparse file has less data than its map says".into()).into());
            }
            let used = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            file.write_all(&piece[..used]).map_err(failed("write a sparse file"))?;
            archive.consume(used);
            left -= used as u64;
        }
        total += length;
    }
    file.set_len(size).map_err(failed("set the length of a sparse file"))?;
    Ok(total)
}

/// Owner, mode and attributes of something open; in this order, as a change of owner clears the special bits and file capabilities.
fn describe(file: std::os::fd::BorrowedFd<'_>, entry: &Entry, mode_is_open: bool) -> Result<(), Failure> {
    let owned = entry.uid != 0 || entry.gid != 0;
    if owned || mode_is_open {
        sys::tree::set_owner(file, entry.uid, entry.gid).map_err(failed("set an owner"))?;
    }
    if mode_is_open || entry.mode & SPECIAL_BITS != 0 {
        sys::tree::set_mode(file, entry.mode).map_err(failed("set a mode"))?;
    }
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_kept(name)) {
        let name = sys::tree::c_string(name).map_err(failed("set an extended attribute"))?;
        tolerate(sys::xattr::set(file, &name, value))?;
    }
    Ok(())
}

fn describe_unopened(parent: &Dir, base: &[u8], entry: &Entry) -> Result<(), Failure> {
    if entry.uid != 0 || entry.gid != 0 {
        parent.set_owner(base, entry.uid, entry.gid).map_err(failed("set an owner"))?;
    }
    let mut kept = entry.xattrs.iter().filter(|(name, _)| is_kept(name)).peekable();
    if kept.peek().is_some() {
        parent.enter().map_err(failed("enter a directory"))?;
    }
    for (name, value) in kept {
        let (path, name) = (sys::tree::c_string(base), sys::tree::c_string(name));
        let (path, name) = (path.map_err(failed("name a file"))?, name.map_err(failed("name an extended attribute"))?);
        tolerate(sys::xattr::set_here(&path, &name, value))?;
    }
    parent.set_times(base, entry.mtime).map_err(failed("set the times of a file"))
}

/// Attributes that images mean: user data, file capabilities, access control lists. Not those that overlayfs acts upon, and
/// not those that belong to the host's security policy.
fn is_kept(name: &[u8]) -> bool {
    let wanted = name.starts_with(b"user.") || name == b"security.capability" || name.starts_with(b"system.posix_acl_");
    wanted && !name.starts_with(b"user.overlay.")
}

/// A file system without extended attributes costs the image its attributes, not its life, as in all other runtimes; and
/// `user.` attributes are for files and directories only.
fn tolerate(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::Unsupported || e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other.map_err(failed("set an extended attribute")),
    }
}
