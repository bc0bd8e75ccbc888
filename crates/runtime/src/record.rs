//! What has to survive the daemon: one record for each sandbox and container, on the run directory's tmpfs.
//!
//! ```text
//! <run-dir>/sandboxes/<id>/sandbox           SandboxRecord
//!                          containers/<id>   ContainerRecord
//!                          containers/<id>.json   the container's configuration, for exec and `inspect`
//!                          b/<id>/           its bundle, for hooks and other OCI runtimes
//!                          keeper.sock, keeper.state   the keeper's own
//! ```
//! Records are protobuf, so that a newer daemon reads what an older one wrote. Each is replaced in one step; nothing is
//! synced, for after a power failure there is nothing left that they describe.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cri::v1;
use prost::Message as _;

/// What a sandbox was asked to be, and how far it came.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SandboxRecord {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    /// The kernel's boot; a record of another one describes nothing that lives.
    #[prost(string, tag = "2")]
    pub(crate) boot_id: String,
    #[prost(int64, tag = "3")]
    pub(crate) created_at: i64,
    #[prost(message, optional, tag = "4")]
    pub(crate) config: Option<v1::PodSandboxConfig>,
    #[prost(string, tag = "5")]
    pub(crate) handler: String,
    #[prost(string, repeated, tag = "6")]
    pub(crate) ips: Vec<String>,
    #[prost(enumeration = "Progress", tag = "7")]
    pub(crate) progress: i32,
    /// Another OCI runtime that its containers run by: the program, also when no handler names it any more.
    #[prost(string, tag = "8")]
    pub(crate) driver: String,
    /// Its arguments before each command.
    #[prost(string, repeated, tag = "9")]
    pub(crate) driver_arguments: Vec<String>,
    /// SELinux labels of its processes and files.
    #[prost(message, optional, tag = "10")]
    pub(crate) labels: Option<RecordedLabels>,
    /// See `Config::parents_from_top`.
    #[prost(bool, tag = "11")]
    pub(crate) parent_from_top: bool,
}

/// SELinux labels.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RecordedLabels {
    #[prost(string, tag = "1")]
    pub(crate) process: String,
    #[prost(string, tag = "2")]
    pub(crate) file: String,
}

/// How far a sandbox or container came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Progress {
    /// It is being made; its client has heard of no success.
    Making = 0,
    /// It was made.
    Made = 1,
    /// It has ended.
    Ended = 2,
}

/// What a container was asked to be, and what became of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ContainerRecord {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(int64, tag = "2")]
    pub(crate) created_at: i64,
    #[prost(message, optional, tag = "3")]
    pub(crate) config: Option<v1::ContainerConfig>,
    #[prost(enumeration = "Progress", tag = "4")]
    pub(crate) progress: i32,
    /// The image it was made from, see `v1::ContainerStatus`.
    #[prost(string, tag = "5")]
    pub(crate) image_id: String,
    #[prost(string, tag = "6")]
    pub(crate) image_ref: String,
    #[prost(message, optional, tag = "7")]
    pub(crate) user: Option<v1::LinuxContainerUser>,
    /// Number of the signal that stops it.
    #[prost(uint32, tag = "8")]
    pub(crate) stop_signal: u32,
    /// Resources as they were last set.
    #[prost(message, optional, tag = "9")]
    pub(crate) resources: Option<v1::LinuxContainerResources>,
    /// How it ended.
    #[prost(message, optional, tag = "10")]
    pub(crate) end: Option<End>,
    /// The signal that stops it by CRI's name, which numbers signals in a way of its own.
    #[prost(enumeration = "v1::Signal", tag = "11")]
    pub(crate) stop_signal_name: i32,
    /// Ids of the images that are mounted in it as volumes.
    #[prost(string, repeated, tag = "12")]
    pub(crate) volume_images: Vec<String>,
    /// SELinux labels of its processes and files.
    #[prost(message, optional, tag = "13")]
    pub(crate) labels: Option<RecordedLabels>,
    /// It has been sent the signal that stops it.
    #[prost(bool, tag = "14")]
    pub(crate) asked: bool,
}

/// How a container ended.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct End {
    /// 0 if it never ran.
    #[prost(int64, tag = "1")]
    pub(crate) started_at: i64,
    #[prost(int64, tag = "2")]
    pub(crate) finished_at: i64,
    #[prost(int32, tag = "3")]
    pub(crate) exit_code: i32,
    #[prost(string, tag = "4")]
    pub(crate) reason: String,
    #[prost(string, tag = "5")]
    pub(crate) message: String,
}

/// Name of a sandbox's record in its directory.
const SANDBOX: &str = "sandbox";
/// Where the records of its containers are.
const CONTAINERS: &str = "containers";
/// The kernel takes 6 MiB of arguments and variables (`bprm_stack_limits` in fs/exec.c).
const SPEC_BYTES_MAX: usize = 8 << 20;
/// Where their bundles are. The name is short: a socket below has a path of at most 107 bytes.
const BUNDLES: &str = "b";

/// The directory of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Records {
    directory: PathBuf,
}

impl Records {
    /// The records in a sandbox's directory, which need not exist.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory; only root sees into it.
    pub(crate) fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().mode(0o700).create(&self.directory)?;
        fs::DirBuilder::new().mode(0o700).create(self.directory.join(CONTAINERS))
    }

    /// Removes the directory with all that is in it; one that is gone is no error.
    pub(crate) fn remove(&self) -> io::Result<()> {
        gone_is_fine(fs::remove_dir_all(&self.directory))
    }

    pub(crate) fn sandbox(&self) -> io::Result<SandboxRecord> {
        decode(&fs::read(self.directory.join(SANDBOX))?)
    }

    pub(crate) fn put_sandbox(&self, record: &SandboxRecord) -> io::Result<()> {
        self.put(Path::new(SANDBOX), &record.encode_to_vec())
    }

    /// All containers; one whose record cannot be read is named with the reason.
    pub(crate) fn containers(&self) -> io::Result<Vec<Result<ContainerRecord, (PathBuf, io::Error)>>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.directory.join(CONTAINERS))? {
            let path = entry?.path();
            if path.extension().is_none() {
                found.push(fs::read(&path).and_then(|bytes| decode(&bytes)).map_err(|error| (path, error)));
            }
        }
        Ok(found)
    }

    pub(crate) fn container(&self, id: &str) -> io::Result<ContainerRecord> {
        decode(&fs::read(self.directory.join(CONTAINERS).join(id))?)
    }

    pub(crate) fn put_container(&self, record: &ContainerRecord) -> io::Result<()> {
        self.put(&Path::new(CONTAINERS).join(&record.id), &record.encode_to_vec())
    }

    /// The container's configuration as JSON.
    pub(crate) fn spec(&self, id: &str) -> io::Result<Vec<u8>> {
        fs::read(self.spec_path(id))
    }

    /// One that is larger than any that can be executed is refused: it lies in memory.
    pub(crate) fn put_spec(&self, id: &str, json: &[u8]) -> io::Result<()> {
        if json.len() > SPEC_BYTES_MAX {
            let reason = format!("{} bytes are more than the {SPEC_BYTES_MAX} of any that can be executed", json.len());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
        }
        self.put(&Path::new(CONTAINERS).join(format!("{id}.json")), json)
    }

    fn spec_path(&self, id: &str) -> PathBuf {
        self.directory.join(CONTAINERS).join(format!("{id}.json"))
    }

    /// A container's bundle; most have none.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.directory.join(BUNDLES).join(id)
    }

    pub(crate) fn remove_container(&self, id: &str) -> io::Result<()> {
        gone_is_fine(fs::remove_dir_all(self.bundle(id)))?;
        gone_is_fine(fs::remove_file(self.spec_path(id)))?;
        gone_is_fine(fs::remove_file(self.directory.join(CONTAINERS).join(id)))
    }

    fn put(&self, name: &Path, bytes: &[u8]) -> io::Result<()> {
        let path = self.directory.join(name);
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes)?;
        fs::rename(&temporary, &path)
    }
}

fn decode<T: prost::Message + Default>(bytes: &[u8]) -> io::Result<T> {
    T::decode(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_that_nothing_executes_takes_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("s"));
        records.create().unwrap();
        records.put_spec("c", &vec![b' '; SPEC_BYTES_MAX]).unwrap();
        records.remove_container("c").unwrap();
        let error = records.put_spec("c", &vec![b' '; SPEC_BYTES_MAX + 1]).unwrap_err();
        assert!(error.to_string().contains("8388609 bytes"), "{error}");
        records.spec("c").unwrap_err();
    }
}
