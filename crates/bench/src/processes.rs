//! What processes use, by the kernel's own account.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a process is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The same number of them for any number of pods.
    Daemon,
    /// Beside each pod's application.
    PerPod,
}

/// What a side runs beside the pods' applications.
#[derive(Debug, Clone)]
pub(crate) struct Crew {
    /// The daemons' programs.
    daemons: Vec<FileId>,
}

/// CPU time from one moment on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meter {
    used_ns: u64,
    begin: Instant,
}

impl Crew {
    /// Of daemons that run these programs.
    pub(crate) fn new(programs: &[PathBuf]) -> std::io::Result<Self> {
        Ok(Self { daemons: programs.iter().map(|program| FileId::of(program)).collect::<Result<_, _>>()? })
    }

    /// What a process does for this side; none for the others: applications, control planes.
    fn role(&self, process: &Process) -> Option<Role> {
        let is_daemons = process.file.is_some_and(|file| self.daemons.contains(&file));
        match process.name.as_str() {
            name if is_daemons && name.contains("keeper") => Some(Role::PerPod),
            _ if is_daemons => Some(Role::Daemon),
            name if name.starts_with("containerd-shim") => Some(Role::PerPod),
            _ if process.program == Path::new("/pause") => Some(Role::PerPod),
            _ => None,
        }
    }

    fn processes(&self) -> impl Iterator<Item = (Role, Process)> {
        all().into_iter().filter_map(|process| Some((self.role(&process)?, process)))
    }

    /// RSS of the daemons' processes, or PSS of those that stand beside the pods.
    pub(crate) fn memory_mb(&self, role: Role) -> f64 {
        let with_role = self.processes().filter(|(has, _)| *has == role);
        let of = |process: &Process| match role {
            Role::Daemon => process.rss_mb(),
            Role::PerPod => process.pss_mb(),
        };
        with_role.map(|(_, process)| of(&process)).sum()
    }

    /// Begins to count CPU time.
    pub(crate) fn meter(&self) -> Meter {
        Meter { used_ns: self.cpu_ns(), begin: Instant::now() }
    }

    /// CPU time since then, in percent of one core.
    pub(crate) fn percent_since(&self, meter: Meter) -> f64 {
        let used = Duration::from_nanos(self.cpu_ns().saturating_sub(meter.used_ns));
        100.0 * used.as_secs_f64() / meter.begin.elapsed().as_secs_f64()
    }

    fn cpu_ns(&self) -> u64 {
        self.processes().map(|(_, process)| process.cpu_ns()).sum()
    }
}

/// A process of this namespace.
#[derive(Debug, Clone)]
struct Process {
    dir: PathBuf,
    /// The name of its first thread, 15 bytes at most.
    name: String,
    /// The path of its program in its own mount namespace; empty when it has ended.
    program: PathBuf,
    /// Its program; `None` when it has ended.
    file: Option<FileId>,
}

/// A file by device and inode: a program may have another path in its processes, which run a mount of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId(u64, u64);

impl FileId {
    /// The file at a path; links are followed.
    fn of(path: &Path) -> std::io::Result<Self> {
        std::fs::metadata(path).map(|found| Self(found.dev(), found.ino()))
    }
}

/// All of this process namespace.
fn all() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    pids.map(|entry| Process::read(&entry.path())).collect()
}

/// One process with all that it starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    pid: u32,
}

impl Usage {
    /// Of the process with this number.
    pub(crate) fn of(pid: u32) -> Self {
        Self { pid }
    }

    /// Resident memory of the process itself.
    pub(crate) fn rss_mb(self) -> f64 {
        megabytes(&self.file("smaps_rollup"), "Rss:")
    }

    /// The most that it ever was.
    pub(crate) fn peak_mb(self) -> f64 {
        megabytes(&self.file("status"), "VmHWM:")
    }

    /// CPU time of the process and of those that it has started and waited for, in seconds.
    pub(crate) fn cpu_s(self) -> f64 {
        let text = std::fs::read_to_string(self.file("stat")).unwrap_or_default();
        cpu_ticks(&text) / USER_HZ
    }

    fn file(self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join(name)
    }
}

/// What the kernel counts CPU time in where it shows it (time(7), "USER_HZ"): the same on all machines that orlop runs on.
const USER_HZ: f64 = 100.0;

/// The sum of utime, stime, cutime and cstime of a `/proc/PID/stat` (proc_pid_stat(5)): 14th to 17th field, and the second,
/// in brackets, may contain anything.
fn cpu_ticks(stat: &str) -> f64 {
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    fields.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum()
}

/// The root directory, as it sees it, of the process with this word on its command line.
pub(crate) fn root_of(word: &str) -> Option<PathBuf> {
    let found = all().into_iter().find(|process| {
        let line = std::fs::read(process.dir.join("cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|one| one == word.as_bytes())
    });
    found.map(|process| process.dir.join("root"))
}

impl Process {
    fn read(dir: &Path) -> Self {
        let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default().trim_end().to_owned();
        let exe = dir.join("exe");
        let program = std::fs::read_link(&exe).unwrap_or_default();
        Self { dir: dir.to_owned(), name, program, file: FileId::of(&exe).ok() }
    }

    /// Resident memory, what is shared included. It is counted page by page: `status` has a sum that the kernel brings up to
    /// date in batches.
    fn rss_mb(&self) -> f64 {
        megabytes(&self.dir.join("smaps_rollup"), "Rss:")
    }

    /// Resident memory, where each shared page counts by the part of those who share it.
    fn pss_mb(&self) -> f64 {
        megabytes(&self.dir.join("smaps_rollup"), "Pss:")
    }

    /// CPU time of all its threads.
    fn cpu_ns(&self) -> u64 {
        let threads = std::fs::read_dir(self.dir.join("task")).into_iter().flatten().flatten();
        threads.map(|thread| first_number(&thread.path().join("schedstat"))).sum()
    }
}

fn first_number(file: &Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// A value in KiB after `key`; 0 when the process has ended.
fn megabytes(file: &Path, key: &str) -> f64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse::<f64>().ok());
    value.unwrap_or(0.0) * 1024.0 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_listed_and_has_memory() {
        let own = FileId::of(&std::env::current_exe().unwrap()).unwrap();
        // Another test's child may be this program for a moment, too.
        let dir = Path::new("/proc").join(std::process::id().to_string());
        let found: Vec<Process> = all().into_iter().filter(|process| process.dir == dir).collect();
        let [process] = &found[..] else { panic!("{found:?}") };
        assert_eq!(process.file, Some(own));
        let pss_mb = process.pss_mb();
        let rss_mb = process.rss_mb();
        assert!(rss_mb > 0.1 && pss_mb > 0.1 && pss_mb < 2.0 * rss_mb, "{rss_mb} {pss_mb} {process:?}");
        assert!(process.cpu_ns() > 0, "{process:?}");
    }

    #[test]
    fn times_stand_after_any_name() {
        let stat = "7 (a) b) R 1 7 7 0 -1 4194304 99 0 0 0 10 20 3 4 20 0 1 0 100";
        assert!((cpu_ticks(stat) - 37.0).abs() < f64::EPSILON);
        assert!(cpu_ticks("").abs() < f64::EPSILON);
    }

    #[test]
    fn a_crew_is_its_daemons_and_what_stands_beside_pods() {
        let (node, other) = (FileId(1, 1), FileId(1, 2));
        let crew = Crew { daemons: vec![node] };
        let role = |name: &str, file, program: &str| {
            crew.role(&Process {
                dir: PathBuf::new(),
                name: name.to_owned(),
                program: program.into(),
                file: Some(file),
            })
        };
        assert_eq!(role("node", node, "/bin/node"), Some(Role::Daemon));
        assert_eq!(role("keeper", node, "/bin/node"), Some(Role::PerPod));
        assert_eq!(role("keeper", other, "/bin/other"), None);
        assert_eq!(role("containerd-shim", other, "/bin/containerd-shim-runc-v2"), Some(Role::PerPod));
        assert_eq!(role("pause", other, "/pause"), Some(Role::PerPod));
    }

    #[test]
    fn a_process_is_found_by_a_word_on_its_command_line() {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "read line", "a-word-of-its-own"]).stdin(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let root = root_of("a-word-of-its-own").unwrap();
        assert_eq!(root, Path::new("/proc").join(child.id().to_string()).join("root"));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(root_of("a-word-of-its-own"), None);
    }
}
