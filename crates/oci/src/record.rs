//! What is kept of a container: `<root>/<id>/state.json`, and beside it the socket at which its process waits.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use executor::oci;
use serde::{Deserialize, Serialize};
use sys::error::Context as _;
use sys::rustix::fs::{Mode, OFlags};
use sys::rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

use crate::error::Error;
use crate::systemd::Unit;

/// What `create` knows of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    pub(crate) id: String,
    /// Absolute.
    pub(crate) bundle: PathBuf,
    /// Absolute.
    pub(crate) rootfs: PathBuf,
    /// When, RFC 3339.
    pub(crate) created: String,
    /// The first process; 0 until there is one.
    pub(crate) pid: i32,
    /// When that began, in ticks since the boot: process ids are used again.
    pub(crate) started_ticks: u64,
    /// Directories of the control group with their controllers; none without a group.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) cgroup: Vec<(String, PathBuf)>,
    /// The group was there before the container.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) group_was_there: bool,
    /// systemd's unit that the group belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<Unit>,
    /// The configuration, as it was.
    pub(crate) spec: oci::Spec,
}

const RECORD: &str = "state.json";
const SOCKET: &str = "start.sock";
/// The directory that a container gets to see, and in it the socket at which it says that it is ready.
const NOTIFY_DIRECTORY: &str = "notify";
pub(crate) const NOTIFY_SOCKET: &str = "notify.sock";

/// A container's directory.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    dir: PathBuf,
}

impl Place {
    /// Where the container `id` is, or would be.
    pub(crate) fn of(root: &Path, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        Ok(Self { dir: root.join(id) })
    }

    /// Makes it. A container whose directory is there exists, whatever is in it.
    pub(crate) fn make(&self) -> Result<(), Error> {
        let mut builder = std::fs::DirBuilder::new();
        if let Some(root) = self.dir.parent() {
            builder.recursive(true).mode(0o700).create(root).map_err(Error::file("make", root))?;
        }
        match builder.recursive(false).mode(0o711).create(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Exists),
            other => other.map_err(Error::file("make", &self.dir)),
        }
    }

    pub(crate) fn remove(&self) -> Result<(), Error> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", &self.dir)(error)),
            _ => Ok(()),
        }
    }

    pub(crate) fn read(&self) -> Result<Record, Error> {
        let path = self.dir.join(RECORD);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(Error::json(path)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Err(Error::NotExist)
            }
            Err(error) => Err(Error::file("read", path)(error)),
        }
    }

    /// In one step, for readers: they see the old one or the new.
    pub(crate) fn write(&self, record: &Record) -> Result<(), Error> {
        let (path, fresh) = (self.dir.join(RECORD), self.dir.join(".state.json"));
        let bytes = serde_json::to_vec(record).map_err(Error::json(&path))?;
        write_file(&fresh, &bytes, 0o600)?;
        std::fs::rename(&fresh, &path).map_err(Error::file("rename", path))
    }

    /// Whether the process has not been started yet.
    pub(crate) fn is_waiting(&self) -> bool {
        self.dir.join(SOCKET).exists()
    }

    /// The socket at which the process is to wait.
    pub(crate) fn listen(&self) -> Result<OwnedFd, Error> {
        let (_directory, address) = self.address(SOCKET)?;
        let socket = self.socket()?;
        bind(&socket, &address).during("bind", self.dir.join(SOCKET).display())?;
        listen(&socket, 4).during("listen", self.dir.join(SOCKET).display())?;
        Ok(socket)
    }

    /// A connection to the process that waits; nothing when nobody does.
    pub(crate) fn connect(&self) -> Result<Option<OwnedFd>, Error> {
        use sys::rustix::io::Errno;
        let (_directory, address) = self.address(SOCKET)?;
        let socket = self.socket()?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Some(socket)),
            Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
            Err(errno) => Ok(Err(errno).during("connect", self.dir.join(SOCKET).display())?),
        }
    }

    /// Makes the directory that a container gets to see.
    pub(crate) fn make_notify_directory(&self) -> Result<PathBuf, Error> {
        let path = self.dir.join(NOTIFY_DIRECTORY);
        let made = std::fs::create_dir(&path).and_then(|()| open_to(&path, 0o755));
        made.map_err(Error::file("make", &path))?;
        Ok(path)
    }

    /// The socket in it; anybody in the container may send to it.
    pub(crate) fn listen_for_readiness(&self) -> Result<OwnedFd, Error> {
        let path = self.dir.join(NOTIFY_DIRECTORY).join(NOTIFY_SOCKET);
        let (_directory, address) = self.address(&format!("{NOTIFY_DIRECTORY}/{NOTIFY_SOCKET}"))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
        let socket = socket.during("socket", path.display())?;
        bind(&socket, &address).during("bind", path.display())?;
        open_to(&path, 0o777).map_err(Error::file("open", &path))?;
        Ok(socket)
    }

    /// The process does not wait any more.
    pub(crate) fn forget_socket(&self) {
        let _ = std::fs::remove_file(self.dir.join(SOCKET)); // Then it goes with the directory.
    }

    fn socket(&self) -> Result<OwnedFd, Error> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        Ok(socket.during("socket", self.dir.join(SOCKET).display())?)
    }

    /// By a descriptor of the directory, whose path may be longer than the 108 bytes of an address. It has to live as long as
    /// the address is used.
    fn address(&self, name: &str) -> Result<(OwnedFd, SocketAddrUnix), Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = sys::rustix::fs::open(&self.dir, flags, Mode::empty()).during("open", self.dir.display())?;
        let path = format!("/proc/self/fd/{}/{name}", directory.as_fd().as_raw_fd());
        let address = SocketAddrUnix::new(path).during("bind", self.dir.display())?;
        Ok((directory, address))
    }
}

/// Whatever the caller's umask is.
fn open_to(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// Writes a file that nobody else may read halfway. It is always a new one: where others may write to the directory, what
/// has its name could be a link to any file.
pub(crate) fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    use std::io::Write as _;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::file("remove", path)(error)),
        _ => {}
    }
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(bytes)).map_err(Error::file("write", path))
}

/// Letters, digits and `_+-.`, as runc has it: a name is a directory's, too.
fn check_id(id: &str) -> Result<(), Error> {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || "_+-.".contains(letter);
    match id {
        "" => Err(Error::EmptyId),
        "." | ".." => Err(Error::InvalidId(id.to_owned())),
        _ if id.chars().all(allowed) => Ok(()),
        _ => Err(Error::InvalidId(id.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for id in ["a", "a.b_c+d-1", "..."] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "ä"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn a_file_is_written_to_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("file"), dir.path().join("other"));
        std::fs::write(&other, "theirs").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        write_file(&path, b"ours", 0o600).unwrap();
        write_file(&path, b"again", 0o600).unwrap();
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "theirs");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "again");
    }

    #[test]
    fn a_long_path_has_a_socket() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::of(&root.path().join("x".repeat(100)), &"y".repeat(64)).unwrap();
        place.make().unwrap();
        assert!(matches!(place.make(), Err(Error::Exists)));
        assert!(place.connect().unwrap().is_none());
        let listener = place.listen().unwrap();
        assert!(place.is_waiting());
        assert!(place.connect().unwrap().is_some());
        drop(listener);
        assert!(place.connect().unwrap().is_none(), "nobody listens");
        place.remove().unwrap();
    }
}
