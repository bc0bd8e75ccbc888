//! The files behind the operator's paths: which there are, what they say, and when to look again.
//!
//! Everything is level-based: any change wakes one scan of all paths, so it does not matter by which sequence of
//! renames, writes or symlink swaps an editor or a tool replaces a file. What is watched are directories only: those
//! given, those that hold a given file, and those that hold or lead to a symlink on the way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sys::inotify::{Change, Inotify, WatchId};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::problem::{Problem, Severity};

/// After the first change: how long a quiet moment must be before the files are read. Tools that replace several files
/// do it within microseconds; a person waits for the result.
const QUIET: Duration = Duration::from_millis(5);
/// How long a stream of changes may put the reading off.
const QUIET_MAX: Duration = Duration::from_millis(40);
/// Symlinks followed on the way to one file, as the kernel's limit.
const LINKS_MAX: usize = 40;
/// Larger files are not manifests; etcd's limit for one object is 1.5 MB.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What one scan found.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Scan {
    /// The text of each manifest file, in the order of their paths.
    pub(crate) files: BTreeMap<PathBuf, Arc<str>>,
    /// Files and directories that are there but could not be read: what they said before stays in force.
    pub(crate) unreadable: BTreeSet<PathBuf>,
    pub(crate) problems: Vec<Problem>,
}

/// Which files of a directory are manifests. Hidden ones never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// `.yaml`, `.yml` and `.json`, as kubectl has it.
    Suffixed,
    /// All, as the kubelet has it of its static pods.
    All,
}

/// The operator's paths and the watches on them.
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    names: Names,
    stdin: Option<Arc<str>>,
    inotify: Option<AsyncFd<Inotify>>,
    watches: HashMap<WatchId, Watched>,
    /// A change was read that [`Files::changed`] has not answered yet.
    has_changed: bool,
}

struct Watched {
    directory: PathBuf,
    interest: Interest,
}

/// Which entries of a watched directory matter.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Interest {
    All,
    Names(BTreeSet<OsString>),
}

type Interests = BTreeMap<PathBuf, Interest>;

impl Files {
    /// Reads standard input to its end if `-` is among the paths.
    pub(crate) fn open(paths: &[PathBuf], names: Names) -> Result<Self, Box<Problem>> {
        let mut stdin = None;
        if paths.iter().any(|path| path.as_os_str() == "-") {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|error| problem(Path::new("-"), format!("cannot read standard input: {error}"), None))
                .map_err(Box::new)?;
            stdin = Some(text.into());
        }
        Ok(Files { paths: paths.to_vec(), names, stdin, inotify: None, watches: HashMap::new(), has_changed: false })
    }

    /// Reads all paths, and watches what leads to them. Watches are set before the files are read, so that no change
    /// between the two is lost.
    pub(crate) fn scan(&mut self) -> Scan {
        let watch_problem = self.update_watches().err().map(|problem| *problem);
        let mut scan = Scan::default();
        for path in &self.paths {
            match path.as_os_str() == "-" {
                true => _ = scan.files.insert(path.clone(), self.stdin.clone().unwrap_or_default()),
                false => scan_path(path, self.names, &mut scan),
            }
        }
        scan.problems.extend(watch_problem);
        scan
    }

    /// Waits until something changed and then was quiet for a moment. Cancel-safe: an unread change stays readable,
    /// and a scan that comes too often finds nothing new.
    pub(crate) async fn changed(&mut self) {
        // Whoever waits may drop this future after the first change was read: the next call must know of it.
        while !self.has_changed {
            self.has_changed = self.read_changes().await;
        }
        let latest = Instant::now() + QUIET_MAX;
        while Instant::now() < latest {
            let quiet = (Instant::now() + QUIET).min(latest);
            if timeout_at(quiet, self.read_changes()).await.is_err() {
                break;
            }
            sleep_until((Instant::now() + QUIET).min(latest)).await;
        }
        self.has_changed = false;
    }

    /// Whether the changes that wait concern us; waits for some.
    async fn read_changes(&mut self) -> bool {
        let Some(inotify) = &self.inotify else { return std::future::pending().await };
        let Ok(mut ready) = inotify.readable().await else { return std::future::pending().await };
        let changes = ready.try_io(|inotify| match inotify.get_ref().read() {
            Ok(changes) if changes.is_empty() => Err(std::io::ErrorKind::WouldBlock.into()),
            other => Ok(other.unwrap_or_else(|_| vec![Change::Overflow])),
        });
        let Ok(Ok(changes)) = changes else { return false };
        changes.iter().any(|change| self.concerns_us(change))
    }

    fn concerns_us(&self, change: &Change) -> bool {
        match change {
            Change::Overflow => true,
            Change::Directory { watch } => self.watches.contains_key(watch),
            Change::Entry { watch, name } => match self.watches.get(watch).map(|watched| &watched.interest) {
                Some(Interest::All) => true,
                Some(Interest::Names(names)) => names.contains(name),
                None => false,
            },
        }
    }

    /// Watches exactly the directories that matter now.
    fn update_watches(&mut self) -> Result<(), Box<Problem>> {
        let interests = interests(self.paths.iter().filter(|path| path.as_os_str() != "-"), self.names);
        if interests.is_empty() {
            return Ok(());
        }
        let mut failed = None;
        let mut watches = HashMap::new();
        let inotify = self.inotify()?;
        for (directory, interest) in interests {
            match inotify.add(&directory) {
                // Two paths may name one directory: the kernel gives the same watch.
                Ok(watch) => {
                    let known: &mut Watched = watches
                        .entry(watch)
                        .or_insert(Watched { directory, interest: Interest::Names(BTreeSet::new()) });
                    known.interest = union(&known.interest, &interest);
                }
                Err(error) if error.errno == sys::rustix::io::Errno::NOENT => {}
                Err(error) => failed = Some(not_watched(&directory, &error)),
            }
        }
        let old = std::mem::replace(&mut self.watches, watches);
        for (watch, watched) in old.into_iter().filter(|(watch, _)| !self.watches.contains_key(watch)) {
            // A watch of a directory that is gone costs nothing; what it would report is ignored.
            if let Some(Err(error)) = self.inotify.as_ref().map(|inotify| inotify.get_ref().remove(watch)) {
                tracing::debug!(directory = %watched.directory.display(), %error, "a watch could not be removed");
            }
        }
        failed.map_or(Ok(()), |problem| Err(Box::new(problem)))
    }

    fn inotify(&mut self) -> Result<&Inotify, Box<Problem>> {
        if self.inotify.is_none() {
            let fault = |cause: String| {
                let remedy = "raise sysctl fs.inotify.max_user_instances, or restart after each change".to_owned();
                Box::new(problem(Path::new(""), format!("changes of manifests are not seen: {cause}"), Some(remedy)))
            };
            let inotify = Inotify::new().map_err(|error| fault(error.to_string()))?;
            #[expect(deprecated, reason = "the replacement is unsafe; an OwnedFd inside keeps the descriptor open")]
            let registered = AsyncFd::new(inotify);
            self.inotify = Some(registered.map_err(|error| fault(error.to_string()))?);
        }
        Ok(self.inotify.as_ref().expect("set above").get_ref())
    }
}

fn union(a: &Interest, b: &Interest) -> Interest {
    match (a, b) {
        (Interest::Names(a), Interest::Names(b)) => Interest::Names(a | b),
        _ => Interest::All,
    }
}

fn not_watched(directory: &Path, error: &sys::Error) -> Problem {
    let remedy = "raise sysctl fs.inotify.max_user_watches, or restart after each change".to_owned();
    Problem {
        severity: Severity::Warning,
        ..problem(directory, format!("changes are not seen: {error}"), Some(remedy))
    }
}

/// The directories to watch for `paths`, and which of their entries matter.
fn interests<'p>(paths: impl Iterator<Item = &'p PathBuf>, names: Names) -> Interests {
    let mut interests = Interests::new();
    for path in paths {
        follow(path, &mut interests, LINKS_MAX);
        if path.is_dir() {
            interests.insert(path.clone(), Interest::All);
            for entry in manifest_entries(path, names).unwrap_or_default() {
                if entry.is_symlink() {
                    follow(&entry, &mut interests, LINKS_MAX);
                }
            }
        }
    }
    interests
}

/// Notes the parent of `path`, and of every symlink on the way to what it names.
fn follow(path: &Path, interests: &mut Interests, links: usize) {
    let mut prefix = PathBuf::new();
    let mut components = path.components().peekable();
    while let Some(component) = components.next() {
        let parent = if prefix.as_os_str().is_empty() { PathBuf::from(".") } else { prefix.clone() };
        prefix.push(component);
        let Component::Normal(name) = component else { continue };
        let link = std::fs::read_link(&prefix).ok();
        let last = components.peek().is_none();
        if link.is_some() || last {
            add_name(interests, &parent, name);
        }
        if let (Some(target), true) = (link, links > 0) {
            let rest: PathBuf = components.collect();
            let target = parent.join(target);
            let target = if rest.as_os_str().is_empty() { target } else { target.join(rest) };
            return follow(&target, interests, links - 1);
        }
    }
}

fn add_name(interests: &mut Interests, directory: &Path, name: &std::ffi::OsStr) {
    let names = Interest::Names(BTreeSet::from([name.to_owned()]));
    let known = interests.entry(directory.to_owned()).or_insert(Interest::Names(BTreeSet::new()));
    *known = union(known, &names);
}

/// The manifests in a directory, without its subdirectories.
fn manifest_entries(directory: &Path, names: Names) -> std::io::Result<Vec<PathBuf>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if is_manifest_name(&path, names) && !path.is_dir() {
            entries.push(path);
        }
    }
    entries.sort();
    Ok(entries)
}

fn is_manifest_name(path: &Path, names: Names) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let suffixed = || {
        let suffix = path.extension();
        suffix.is_some_and(|suffix| suffix == "yaml" || suffix == "yml" || suffix == "json")
    };
    !hidden && (names == Names::All || suffixed())
}

fn scan_path(path: &Path, names: Names, scan: &mut Scan) {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => match manifest_entries(path, names) {
            Ok(entries) => entries.iter().for_each(|entry| scan_file(entry, scan)),
            Err(error) => unreadable(path, &error, scan),
        },
        Ok(_) => scan_file(path, scan),
        Err(error) => unreadable(path, &error, scan),
    }
}

fn scan_file(path: &Path, scan: &mut Scan) {
    match read_text(path) {
        Ok(text) => _ = scan.files.insert(path.to_owned(), text.into()),
        Err(error) => unreadable(path, &error, scan),
    }
}

/// A FIFO or a device could hang or never end, so only regular files are read.
fn read_text(path: &Path) -> std::io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("is not a regular file"));
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err(std::io::Error::other(format!("is larger than {FILE_BYTES_MAX} bytes")));
    }
    let mut text = String::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn unreadable(path: &Path, error: &std::io::Error, scan: &mut Scan) {
    let remedy = match error.kind() {
        std::io::ErrorKind::NotFound => "check the path; it is read as soon as it exists",
        std::io::ErrorKind::InvalidData => "write the file in UTF-8",
        _ => "check the permissions",
    };
    scan.unreadable.insert(path.to_owned());
    scan.problems.push(problem(path, format!("cannot be read: {error}"), Some(remedy.into())));
}

fn problem(file: &Path, message: String, remedy: Option<String>) -> Problem {
    Problem { severity: Severity::Error, file: file.into(), line: 0, object: None, field: None, message, remedy }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(scan: &Scan) -> Vec<String> {
        scan.files.keys().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_directory_gives_its_manifests() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.yml", "c.json", "d.txt", ".e.yaml", "f.yaml~"] {
            fs::write(directory.path().join(name), "x").unwrap();
        }
        fs::create_dir(directory.path().join("sub.yaml")).unwrap();
        let mut files = Files::open(&[directory.path().into()], Names::Suffixed).unwrap();
        files.paths = vec![directory.path().into()];
        let scan = Scan { problems: Vec::new(), ..scan_without_watching(&files) };
        assert_eq!(names(&scan), ["a.yml", "b.yaml", "c.json"]);
        files.names = Names::All;
        assert_eq!(names(&scan_without_watching(&files)), ["a.yml", "b.yaml", "c.json", "d.txt", "f.yaml~"]);
    }

    fn scan_without_watching(files: &Files) -> Scan {
        let mut scan = Scan::default();
        files.paths.iter().for_each(|path| scan_path(path, files.names, &mut scan));
        scan
    }

    #[test]
    fn what_cannot_be_read_is_a_problem() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("latin.yaml"), b"a: \xe4").unwrap();
        let files = Files {
            paths: vec![directory.path().into(), "/no/such".into()],
            ..Files::open(&[], Names::Suffixed).unwrap()
        };
        let scan = scan_without_watching(&files);
        assert_eq!(scan.unreadable.len(), 2);
        assert!(scan.problems[0].to_string().ends_with("; write the file in UTF-8"), "{}", scan.problems[0]);
        assert!(scan.problems[1].to_string().contains("check the path"));
    }

    /// Each way by which tools replace a manifest must end in a wake-up.
    #[tokio::test]
    async fn every_way_to_replace_a_file_is_seen() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir_all(path("v1")).unwrap();
        fs::create_dir_all(path("v2")).unwrap();
        fs::write(path("v1/a.yaml"), "1").unwrap();
        fs::write(path("v2/a.yaml"), "2").unwrap();
        symlink("v1", path("current")).unwrap();
        fs::write(path("single.yaml"), "1").unwrap();
        fs::create_dir_all(path("mount/..one")).unwrap();
        fs::write(path("mount/..one/m.yaml"), "1").unwrap();
        symlink("..one", path("mount/..data")).unwrap();
        symlink("..data/m.yaml", path("mount/m.yaml")).unwrap();
        let mut files = Files::open(&[path("current"), path("single.yaml"), path("mount")], Names::Suffixed).unwrap();
        let before = files.scan();
        assert_eq!(before.files.len(), 3);

        type Step<'s> = Box<dyn Fn() + 's>;
        let steps: [(&str, Step<'_>); 5] = [
            ("write in place", Box::new(|| fs::write(path("single.yaml"), "2").unwrap())),
            (
                "rename over",
                Box::new(|| {
                    fs::write(path(".swap"), "3").unwrap();
                    fs::rename(path(".swap"), path("single.yaml")).unwrap();
                }),
            ),
            (
                "swap a directory's symlink",
                Box::new(|| {
                    symlink("v2", path("next")).unwrap();
                    fs::rename(path("next"), path("current")).unwrap();
                }),
            ),
            (
                "a kubelet's ..data swap",
                Box::new(|| {
                    fs::create_dir_all(path("mount/..two")).unwrap();
                    fs::write(path("mount/..two/m.yaml"), "2").unwrap();
                    symlink("..two", path("mount/..next")).unwrap();
                    fs::rename(path("mount/..next"), path("mount/..data")).unwrap();
                }),
            ),
            ("remove", Box::new(|| fs::remove_file(path("v2/a.yaml")).unwrap())),
        ];
        let mut last = before;
        for (what, step) in steps {
            step();
            loop {
                files.changed().await;
                let scan = files.scan();
                if scan != last {
                    last = scan;
                    break;
                }
            }
            eprintln!("seen: {what}");
        }
        assert_eq!(last.files.len(), 2);
    }

    #[tokio::test]
    async fn a_wait_that_is_dropped_loses_nothing() {
        let root = tempfile::tempdir().unwrap();
        let mut files = Files::open(&[root.path().to_owned()], Names::Suffixed).unwrap();
        files.scan();
        fs::write(root.path().join("a.yaml"), "x").unwrap();
        // Dropped while it waits for a quiet moment, as the engine does when a table changes.
        let dropped = tokio::time::timeout(QUIET / 2, files.changed()).await;
        assert!(dropped.is_err());
        tokio::time::timeout(Duration::from_secs(20), files.changed()).await.unwrap();
        assert_eq!(files.scan().files.len(), 1);
    }

    #[tokio::test]
    async fn a_path_that_appears_later_is_seen() {
        let root = tempfile::tempdir().unwrap();
        let mut files = Files::open(&[root.path().join("later.yaml")], Names::Suffixed).unwrap();
        assert_eq!(files.scan().problems.len(), 1);
        fs::write(root.path().join("unrelated"), "").unwrap();
        fs::write(root.path().join("later.yaml"), "x").unwrap();
        files.changed().await;
        assert_eq!(files.scan().files.len(), 1);
    }
}
