//! What processes use, by the kernel's own account.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A process of this namespace.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    dir: PathBuf,
    /// The name of its first thread, 15 bytes at most.
    pub(crate) name: String,
    /// The path of its program in its own mount namespace; empty when it has ended.
    pub(crate) program: PathBuf,
    /// Its program; `None` when it has ended.
    file: Option<FileId>,
}

/// A file by device and inode: a program may have another path in its processes, which run a mount of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    /// The file at a path; links are followed.
    pub(crate) fn of(path: &Path) -> std::io::Result<Self> {
        std::fs::metadata(path).map(|found| Self(found.dev(), found.ino()))
    }
}

/// All of this process namespace.
pub(crate) fn all() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    pids.map(|entry| Process::read(&entry.path())).collect()
}

impl Process {
    fn read(dir: &Path) -> Self {
        let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default().trim_end().to_owned();
        let exe = dir.join("exe");
        let program = std::fs::read_link(&exe).unwrap_or_default();
        Self { dir: dir.to_owned(), name, program, file: FileId::of(&exe).ok() }
    }

    /// Whether it runs this program.
    pub(crate) fn runs(&self, program: FileId) -> bool {
        self.file == Some(program)
    }

    /// Resident memory, what is shared included.
    pub(crate) fn rss_mb(&self) -> f64 {
        megabytes(&self.dir.join("status"), "VmRSS:")
    }

    /// Resident memory, where each shared page counts by the part of those who share it.
    pub(crate) fn pss_mb(&self) -> f64 {
        megabytes(&self.dir.join("smaps_rollup"), "Pss:")
    }

    /// CPU time of all its threads.
    pub(crate) fn cpu_ns(&self) -> u64 {
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
        let found: Vec<Process> = all().into_iter().filter(|process| process.runs(own)).collect();
        assert!(!found.is_empty());
        assert!(
            found.iter().all(|process| process.rss_mb() >= process.pss_mb() && process.pss_mb() > 0.1),
            "{found:?}"
        );
        assert!(found.iter().all(|process| process.cpu_ns() > 0), "{found:?}");
    }
}
