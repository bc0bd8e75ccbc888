//! Volumes of NFS servers, mounted by the kernel's own client.
//!
//! ```text
//! Share ──attempts──► for each version: options of one mount ──► detached mount ──(alone in the pod's directory)──► attached
//! ```
//!
//! The kernel does what the program `mount.nfs` is usually asked for, but for the name of the server and the choice of a version:
//! these are here, so that the daemon starts no program. A server that does not answer holds up the thread that mounts, and the
//! pod that waits for it. What is mounted in the end, when nobody waits any more, is attached to nothing and goes.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, ToSocketAddrs as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{NFSVolumeSource, PersistentVolume};
use sys::rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Cause;
use crate::threads::{ThreadError, patient};

/// How long a pod waits for a server before it says that it waits. The kernel itself gives up after some minutes.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// The versions that are tried, in this order, where the volume wants none (as `mount.nfs` does it).
const VERSIONS: [&str; 4] = ["4.2", "4.1", "4.0", "3"];

/// Attributes of a mount (mount_setattr(2)).
mod attribute {
    pub(super) const RDONLY: u64 = 0x1;
    pub(super) const NOSUID: u64 = 0x2;
    pub(super) const NODEV: u64 = 0x4;
    pub(super) const NOEXEC: u64 = 0x8;
    pub(super) const NOATIME: u64 = 0x10;
    pub(super) const STRICTATIME: u64 = 0x20;
    pub(super) const NODIRATIME: u64 = 0x80;
}

/// A directory of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    /// What its directory in the pod's is called: the PersistentVolume, or the volume of the pod.
    pub(super) name: String,
    server: String,
    path: String,
    pub(super) read_only: bool,
    options: Vec<String>,
}

/// The most attempts of a pod that may wait for servers at a time.
pub(super) const POD_MAX: usize = 4;
/// The most of all pods.
pub(super) const NODE_MAX: usize = 64;

/// What a pod has waited for in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Waits {
    #[error("the server has not answered yet, and may still do")]
    Server,
    #[error("an earlier attempt to mount it has not ended: the server does not answer")]
    Earlier,
    #[error("other volumes of the pod wait for servers that do not answer")]
    Pod,
    #[error("too many volumes of this node wait for servers that do not answer")]
    Node,
}

/// Attempts to mount. Each has a thread, which nobody can end while its server does not answer: there is a limit of them, for
/// each pod and for the node, and one at a time for what is the same. A place is free when the thread has ended.
#[derive(Debug)]
pub(super) struct Attempts {
    pod_max: usize,
    node: Arc<Semaphore>,
    /// By pod, and by server and path: those that somebody holds or waits for.
    others: Mutex<HashMap<Subject, Arc<Semaphore>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    Pod(String),
    Share(String, String),
}

/// The places of an attempt; they are free when it is dropped.
struct Places {
    attempts: Arc<Attempts>,
    held: Vec<OwnedSemaphorePermit>,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.held.clear();
        // Whoever comes gets a new one while this is locked.
        self.attempts.lock().retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
    }
}

impl Attempts {
    pub(super) fn new(pod_max: usize, node_max: usize) -> Arc<Self> {
        Arc::new(Self { pod_max, node: Arc::new(Semaphore::new(node_max)), others: Mutex::default() })
    }

    /// Runs `work` on a thread when there is a place for it, for a pod, a server and a path of that.
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        (pod, server, path): (&str, &str, &str),
        within: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Result<T, ThreadError>, Waits> {
        let end = tokio::time::Instant::now() + within;
        let mut places = Places { attempts: self.clone(), held: Vec::new() };
        // Who waits for his own pod holds up nobody, and who waits for the node all the same.
        for (subject, max, waits) in [
            (Subject::Pod(pod.to_owned()), self.pod_max, Waits::Pod),
            (Subject::Share(server.to_owned(), path.to_owned()), 1, Waits::Earlier),
        ] {
            let semaphore = self.lock().entry(subject).or_insert_with(|| Arc::new(Semaphore::new(max))).clone();
            places.held.push(place(semaphore, end, waits).await?);
        }
        places.held.push(place(self.node.clone(), end, Waits::Node).await?);
        let thread = patient(move || {
            let _places = places;
            work()
        });
        tokio::time::timeout_at(end, thread).await.map_err(|_| Waits::Server)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Subject, Arc<Semaphore>>> {
        // Every section leaves the map whole.
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn place(
    semaphore: Arc<Semaphore>,
    end: tokio::time::Instant,
    waits: Waits,
) -> Result<OwnedSemaphorePermit, Waits> {
    match tokio::time::timeout_at(end, semaphore.acquire_owned()).await {
        Ok(Ok(permit)) => Ok(permit),
        // None of them is ever closed.
        Ok(Err(_)) | Err(_) => Err(waits),
    }
}

/// One call of the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Attempt {
    options: Vec<(String, Option<String>)>,
    attributes: u64,
}

impl Share {
    /// That of a pod's own volume.
    pub(super) fn inline(name: &str, source: &NFSVolumeSource) -> Self {
        Self {
            name: name.to_owned(),
            server: source.server.clone(),
            path: source.path.clone(),
            read_only: source.read_only == Some(true),
            options: Vec::new(),
        }
    }

    /// That of a claim.
    pub(super) fn of_claim(volume: &PersistentVolume, source: &NFSVolumeSource, read_only: bool) -> Self {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let options = volume.spec.as_ref().and_then(|spec| spec.mount_options.clone()).unwrap_or_default();
        let inline = Self::inline(name, source);
        Self { read_only: inline.read_only || read_only, options, ..inline }
    }

    /// Mounts it for a pod, attached to nothing. Others wait for the server only if they want the same of it.
    pub(super) async fn mount(&self, pod: &str, attempts: &Arc<Attempts>) -> Result<OwnedFd, Cause> {
        let share = self.clone();
        let mounted = attempts.run((pod, &self.server, &self.path), ANSWER_WITHIN, move || share.mounted());
        match mounted.await {
            Ok(mounted) => mounted?,
            Err(waits) => Err(self.failed(waits)),
        }
    }

    fn failed(&self, reason: impl ToString) -> Cause {
        Cause::Nfs { server: self.server.clone(), path: self.path.clone(), reason: reason.to_string() }
    }

    /// On a thread: looks the server up, and tries one version after the other.
    fn mounted(&self) -> Result<OwnedFd, Cause> {
        let address = address_of(&self.server).map_err(|error| self.failed(error))?;
        let mut last = None;
        for attempt in self.attempts(address)? {
            let options: Vec<_> = attempt.options.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
            match sys::mount::new_filesystem("nfs", &options, attempt.attributes) {
                Ok(mount) => return Ok(mount),
                Err(error) if error.errno == Errno::NODEV => return Err(no_client()),
                Err(error) => {
                    let is_other_version =
                        matches!(error.errno, Errno::PROTONOSUPPORT | Errno::OPNOTSUPP | Errno::INVAL);
                    let cause = self.failed(reason(error.errno));
                    if !is_other_version {
                        return Err(cause);
                    }
                    last = Some(cause);
                }
            }
        }
        Err(last.unwrap_or_else(|| self.failed("no version of NFS is left to try")))
    }

    /// What the kernel is asked for, in this order. Pure.
    fn attempts(&self, address: IpAddr) -> Result<Vec<Attempt>, Cause> {
        let Wanted { versions, options, mut attributes } = wanted(&self.options)?;
        if self.read_only {
            // Of the mount and not of the file system: another pod may write to the same.
            attributes |= attribute::RDONLY;
        }
        let versions = versions.unwrap_or_else(|| VERSIONS.map(str::to_owned).to_vec());
        let attempt = |version: &str| {
            let text = |key: &str, value: String| (key.to_owned(), Some(value));
            let own = [
                text("source", format!("{}:{}", bracketed(&self.server), self.path)),
                text("addr", address.to_string()),
                text("vers", version.to_owned()),
            ];
            Attempt { options: own.into_iter().chain(options.iter().cloned()).collect(), attributes }
        };
        Ok(versions.iter().map(|version| attempt(version)).collect())
    }
}

/// A kernel without it cannot be helped from here.
fn no_client() -> Cause {
    Cause::Unsupported(
        "this node's kernel has no NFS client; load its module (modprobe nfs), or install the package that has it \
         (linux-modules-extra, or the distribution's kernel modules)"
            .to_owned(),
    )
}

/// What an errno of the client says.
fn reason(errno: Errno) -> String {
    let hint = match errno {
        Errno::ACCESS | Errno::PERM => "the server does not export it to this node",
        Errno::NOENT => "the server has no such directory",
        Errno::PROTONOSUPPORT => "the server does not speak this version of NFS",
        Errno::CONNREFUSED => "nobody listens there",
        Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH => "the server cannot be reached",
        Errno::INVAL => "the kernel does not take these mount options",
        _ => return errno.to_string(),
    };
    format!("{errno}: {hint}")
}

/// IPv6 addresses stand in brackets before a path.
fn bracketed(server: &str) -> String {
    match server.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => server.to_owned(),
    }
}

fn address_of(server: &str) -> std::io::Result<IpAddr> {
    let server = server.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = server.parse() {
        return Ok(address);
    }
    let missing = || std::io::Error::new(std::io::ErrorKind::NotFound, "its name has no address");
    (server, 0).to_socket_addrs()?.next().map(|address| address.ip()).ok_or_else(missing)
}

/// What `mountOptions` of a PersistentVolume ask for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    versions: Option<Vec<String>>,
    options: Vec<(String, Option<String>)>,
    attributes: u64,
}

/// Options as they are written for mount(8): some are of every mount, some were only ever for programs, the rest is the
/// client's.
fn wanted(written: &[String]) -> Result<Wanted, Cause> {
    let mut wanted = Wanted::default();
    let each = written.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|text| !text.is_empty());
    for option in each {
        let (key, value) = option.split_once('=').map_or((option, None), |(key, value)| (key, Some(value)));
        let set = match (key, value) {
            ("ro", None) => attribute::RDONLY,
            ("nosuid", None) => attribute::NOSUID,
            ("nodev", None) => attribute::NODEV,
            ("noexec", None) => attribute::NOEXEC,
            ("noatime", None) => attribute::NOATIME,
            ("strictatime", None) => attribute::STRICTATIME,
            ("nodiratime", None) => attribute::NODIRATIME,
            ("rw" | "suid" | "dev" | "exec" | "atime" | "relatime" | "diratime" | "async" | "defaults", None) => 0,
            ("auto" | "noauto" | "nofail" | "_netdev" | "fg" | "nouser" | "user" | "users", None) | ("retry", _) => 0,
            ("vers" | "nfsvers", Some(version)) => {
                wanted.versions = Some(versions(version));
                0
            }
            ("v3" | "v4" | "v4.0" | "v4.1" | "v4.2", None) => {
                wanted.versions = Some(versions(&key[1..]));
                0
            }
            ("bg" | "addr" | "source" | "remount" | "bind", _) => {
                return Err(Cause::Invalid(format!("mount option {option:?} is not for a volume of a pod")));
            }
            (key, _) if key.starts_with("x-") || key.starts_with("comment") => 0,
            (key, value) => {
                wanted.options.push((key.to_owned(), value.map(str::to_owned)));
                0
            }
        };
        wanted.attributes |= set;
    }
    Ok(wanted)
}

/// `4` is 4.0 for the kernel; for `mount.nfs` it is the newest of them that the server has.
fn versions(version: &str) -> Vec<String> {
    let all: &[&str] = if version == "4" { &VERSIONS[..3] } else { &[version] };
    all.iter().map(|&version| version.to_owned()).collect()
}

/// Shares of a pod that are mounted and attached to nothing yet, by the names of its volumes.
pub(super) type Mounted = BTreeMap<String, OwnedFd>;

/// Attaches a share at its place, unless it is there from before. What is there is not touched: it may not answer.
pub(super) fn attach(place: &Path, mounted: Option<&OwnedFd>) -> Result<(), Cause> {
    use std::os::fd::AsFd as _;
    if super::remove::is_mountpoint(place)? {
        return Ok(());
    }
    let mounted = mounted.ok_or(Cause::Over)?;
    std::fs::create_dir_all(place).map_err(Cause::file("create", place))?;
    Ok(sys::mount::attach_at(mounted.as_fd(), place)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn share(options: &[&str], read_only: bool) -> Share {
        let source: NFSVolumeSource =
            serde_json::from_value(json!({"server": "files.example", "path": "/a b"})).unwrap();
        let options = options.iter().map(|&option| option.to_owned()).collect();
        Share { read_only, options, ..Share::inline("v", &source) }
    }

    fn attempts(options: &[&str], read_only: bool) -> Vec<(String, u64)> {
        let attempts = share(options, read_only).attempts("192.0.2.7".parse().unwrap()).unwrap();
        let text = |attempt: &Attempt| {
            let option = |(key, value): &(String, Option<String>)| match value {
                Some(value) => format!("{key}={value}"),
                None => key.clone(),
            };
            attempt.options.iter().map(option).collect::<Vec<_>>().join(",")
        };
        attempts.iter().map(|attempt| (text(attempt), attempt.attributes)).collect()
    }

    #[test]
    fn versions_are_tried_from_the_newest_on() {
        let expect: Vec<_> = ["4.2", "4.1", "4.0", "3"]
            .map(|version| (format!("source=files.example:/a b,addr=192.0.2.7,vers={version}"), 0))
            .into();
        assert_eq!(attempts(&[], false), expect);
    }

    #[test]
    fn what_is_wanted_is_passed_on() {
        let written = ["nfsvers=4.1,hard", "noatime", "rsize=1048576", "_netdev", "x-systemd.automount", "nosuid"];
        let expect = "source=files.example:/a b,addr=192.0.2.7,vers=4.1,hard,rsize=1048576".to_owned();
        assert_eq!(attempts(&written, true), [(expect, 0x1 | 0x2 | 0x10)]);
        assert_eq!(attempts(&["v4"], false).len(), 3);
        assert!(attempts(&["vers=3"], false)[0].0.ends_with("vers=3"));
        let refused = share(&["bg"], false).attempts("192.0.2.7".parse().unwrap()).unwrap_err();
        assert!(refused.to_string().contains("\"bg\""), "{refused}");
    }

    #[tokio::test]
    async fn servers_that_do_not_answer_get_no_more_threads() {
        const LONG: Duration = Duration::from_secs(60);
        const SHORT: Duration = Duration::from_millis(20);
        let attempts = Attempts::new(2, 3);
        let mut hung = Vec::new();
        for (pod, path) in [("a", "/1"), ("a", "/2"), ("b", "/3")] {
            let (release, released) = std::sync::mpsc::channel::<()>();
            let waits = attempts.run((pod, "s", path), SHORT, move || released.recv().is_ok()).await;
            assert_eq!(waits.unwrap_err(), Waits::Server);
            hung.push(release);
        }
        let never = || unreachable!("there is no place for it");
        assert_eq!(attempts.run(("c", "s", "/1"), SHORT, never).await.unwrap_err(), Waits::Earlier);
        assert_eq!(attempts.run(("a", "s", "/4"), SHORT, never).await.unwrap_err(), Waits::Pod);
        assert_eq!(attempts.run(("c", "other", "/"), SHORT, never).await.unwrap_err(), Waits::Node);
        hung.remove(0);
        assert_eq!(attempts.run(("c", "s", "/1"), LONG, || 7).await.unwrap().unwrap(), 7);
        assert_eq!(attempts.run(("a", "s", "/4"), LONG, || 8).await.unwrap().unwrap(), 8);
        hung.clear();
        assert_eq!(attempts.run(("a", "s", "/2"), LONG, || 9).await.unwrap().unwrap(), 9);
        assert_eq!(attempts.run(("b", "s", "/3"), LONG, || 9).await.unwrap().unwrap(), 9);
        assert_eq!(attempts.lock().len(), 0, "nothing is kept of them");
    }

    #[test]
    fn addresses() {
        assert_eq!(bracketed("fd00::1"), "[fd00::1]");
        assert_eq!(bracketed("files.example"), "files.example");
        assert_eq!(address_of("[fd00::1]").unwrap(), "fd00::1".parse::<IpAddr>().unwrap());
        assert_eq!(address_of("192.0.2.7").unwrap(), "192.0.2.7".parse::<IpAddr>().unwrap());
    }
}
