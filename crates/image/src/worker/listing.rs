//! Where the files of an image archive lie in it: so the daemon reads them without having parsed the archive.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, Read as _, Seek as _};
use std::os::fd::AsFd as _;

use sys::tree::Dir;

use super::inflate::{Compression, Inflated, compression};
use super::input::{Positioned, Seekable, Spooled};
use super::path::{Relative, follow};
use super::protocol::{Listing, Member, SPOOL};
use super::tar::{Archive, Entry, Kind, TarError};
use super::tree::{Failure, failed, lossy};
use crate::Limits;

/// As many as 500 images of 128 layers each.
const MEMBERS_MAX: usize = 1 << 16;
const NAME_BYTES_MAX: usize = 1024;
/// All names together, so that the report stays within its bound.
const NAMES_BYTES_MAX: usize = 4 << 20;
const SPOOL_MODE: u32 = 0o600;

/// What stands at a name.
enum Found {
    File {
        offset: u64,
        size: u64,
    },
    /// Relative to the link's directory; absolute: from the root of the archive.
    Link(Vec<u8>),
}

/// Lists the archive on standard input; `root` is where it may be kept.
pub(crate) fn list(root: &Dir, limits: &Limits) -> Result<Listing, Failure> {
    let input = io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(failed("open the archive"))?;
    let regular = input.metadata().map_err(failed("look at the archive"))?.is_file();
    let mut peeked = io::BufReader::with_capacity(64, input);
    let start = peeked.fill_buf().map_err(TarError::Source)?;
    let plain = compression(start).map_err(TarError::Source)? == Compression::None;
    if regular && plain {
        let mut file = peeked.into_inner();
        file.rewind().map_err(TarError::Source)?;
        let source = Seekable::new(file).map_err(TarError::Source)?;
        return Ok(Listing { spooled: false, members: members(source)? });
    }
    let spool = root.create_file(SPOOL, SPOOL_MODE).map_err(failed("keep the archive"))?;
    let seen = peeked.buffer().to_vec();
    let whole = io::Cursor::new(seen).chain(peeked.into_inner());
    let inflated = Inflated::new(whole, limits).map_err(TarError::Source)?;
    Ok(Listing { spooled: true, members: members(Spooled::new(inflated, spool))? })
}

pub(crate) fn members(source: impl Positioned) -> Result<Vec<Member>, Failure> {
    let mut archive = Archive::new(source);
    let mut found = BTreeMap::new();
    let mut names_bytes = 0;
    while let Some(entry) = archive.next()? {
        let path = Relative::parse(&entry.name, NAME_BYTES_MAX)
            .map_err(|reason| Failure::Refused(format!("entry {:?} {reason}", lossy(&entry.name))))?;
        let Some(item) = item(&entry, archive.source().position())? else { continue };
        names_bytes += path.bytes().len();
        if found.len() == MEMBERS_MAX || names_bytes > NAMES_BYTES_MAX {
            return Err("has more files than an image archive needs".into());
        }
        found.insert(path.bytes().to_vec(), item);
    }
    Ok(resolve(&found))
}

fn item(entry: &Entry, offset: u64) -> Result<Option<Found>, Failure> {
    Ok(match entry.kind {
        Kind::File if entry.sparse.is_some() => {
            return Err(Failure::Refused(format!("entry {:?} is a sparse file", lossy(&entry.name))));
        }
        Kind::File => Some(Found::File { offset, size: entry.size }),
        Kind::Symlink => Some(Found::Link(entry.link.clone())),
        Kind::HardLink => Some(Found::Link([b"/", entry.link.as_slice()].concat())),
        Kind::Directory | Kind::Character | Kind::Block | Kind::Fifo => None,
    })
}

/// Files by all their names. Links to nowhere are left out; so are names that no JSON could refer to.
fn resolve(found: &BTreeMap<Vec<u8>, Found>) -> Vec<Member> {
    let place = |name: &Vec<u8>| {
        let link = |path: &[u8]| -> Result<_, std::convert::Infallible> {
            Ok(match found.get(path) {
                Some(Found::Link(target)) => Some(target.clone()),
                _ => None,
            })
        };
        let Ok(followed) = follow(name, link);
        match found.get(&followed.ok()?)? {
            Found::File { offset, size } => Some((*offset, *size)),
            Found::Link(_) => None,
        }
    };
    let members = found.keys().filter_map(|name| {
        let (offset, size) = place(name)?;
        Some(Member { name: String::from_utf8(name.clone()).ok()?, offset, size })
    });
    members.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(fill: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        fill(&mut builder);
        builder.into_inner().unwrap()
    }

    fn file(builder: &mut tar::Builder<Vec<u8>>, name: &str, text: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        builder.append_data(&mut header, name, text.as_bytes()).unwrap();
    }

    fn link(builder: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, target: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_entry_type(kind);
        builder.append_link(&mut header, name, target).unwrap();
    }

    fn texts(bytes: &[u8]) -> Vec<(String, String)> {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
        let seen = members(Seekable::new(file.try_clone().unwrap()).unwrap()).unwrap();
        let spooled = members(Spooled::new(bytes, tempfile::tempfile().unwrap())).unwrap();
        assert_eq!(seen, spooled);
        let text = |member: &Member| {
            let start = usize::try_from(member.offset).unwrap();
            let end = start + usize::try_from(member.size).unwrap();
            String::from_utf8(bytes[start..end].to_vec()).unwrap()
        };
        seen.iter().map(|member| (member.name.clone(), text(member))).collect()
    }

    #[test]
    fn finds_files_and_follows_links() {
        let bytes = archive(|tar| {
            file(tar, "./a/layer.tar", "one");
            file(tar, "manifest.json", "old");
            link(tar, tar::EntryType::Symlink, "b/layer.tar", "../a/layer.tar");
            link(tar, tar::EntryType::Link, "c", "a/layer.tar");
            link(tar, tar::EntryType::Symlink, "d", "nowhere");
            link(tar, tar::EntryType::Symlink, "e", "../../etc/passwd");
            link(tar, tar::EntryType::Symlink, "f", "f");
            file(tar, "manifest.json", "new");
        });
        let expected = [("a/layer.tar", "one"), ("b/layer.tar", "one"), ("c", "one"), ("manifest.json", "new")];
        assert_eq!(texts(&bytes), expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }

    #[test]
    fn refuses_a_cut_archive() {
        let bytes = archive(|tar| file(tar, "a", &"x".repeat(5000)));
        let cut = &bytes[..3000];
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, cut, 0).unwrap();
        assert!(members(Seekable::new(file).unwrap()).is_err());
        assert!(members(Spooled::new(cut, tempfile::tempfile().unwrap())).is_err());
    }
}
