//! Which sockets there are.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sys::inotify::Inotify;

/// Plugins make no deeper trees than this.
const DEPTH_MAX: usize = 8;

/// Tells a socket from another one of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    inode: u64,
    /// The number of an inode is soon used again; when it was made differs. (Unlike ctime, this one survives chmod.)
    made: (i64, i64),
}

/// The sockets, by path.
pub(super) type Scan = HashMap<PathBuf, Identity>;

/// The sockets in a directory and below it, each directory being watched before it is read. Names that begin with a dot are
/// not ready yet (upstream).
pub(super) fn sockets(root: &Path, watches: &Inotify) -> io::Result<Scan> {
    std::fs::create_dir_all(root)?;
    let mut found = Scan::new();
    look_into(root, DEPTH_MAX, watches, &mut found)?;
    Ok(found)
}

fn look_into(directory: &Path, depth: usize, watches: &Inotify, found: &mut Scan) -> io::Result<()> {
    watches.add(directory).map_err(io::Error::other)?;
    for entry in std::fs::read_dir(directory)? {
        // What is gone again is seen by the next scan.
        let Ok(entry) = entry else { continue };
        let Ok(meta) = entry.metadata() else { continue };
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if meta.file_type().is_socket() {
            found.insert(entry.path(), Identity { inode: meta.ino(), made: (meta.mtime(), meta.mtime_nsec()) });
        } else if meta.is_dir() && depth > 0 {
            // A directory that cannot be read hides no sockets but its own.
            if let Err(error) = look_into(&entry.path(), depth - 1, watches, found) {
                tracing::debug!(directory = %entry.path().display(), %error, "not looked into for plugins");
            }
        }
    }
    Ok(())
}
