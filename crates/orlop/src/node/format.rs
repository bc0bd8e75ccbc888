//! Which format a node's directories are in: a later version reads what an earlier one wrote, and none takes over what it
//! does not know.
//!
//! `<state-dir>/format` and `<run-dir>/format` hold a number and the version that wrote it. The number counts for all that
//! lies in the directory, and for the keepers whose sockets do. What an earlier version may pass over (a new file, a field
//! that it can do without) leaves it as it is; it is raised where an earlier version would take something for what it is not.
//! `docs/ARCHITECTURE.md` has what is in which file, and by which rule it changes.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::layout::Layout;
use super::lock::Lock;

/// Name of the file.
const FILE: &str = "format";

/// A directory's kind, with the formats that this version knows.
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// The first that it reads. Directories of before there was a number are of format 1.
    oldest: u32,
    /// The one that it writes.
    newest: u32,
    /// How an operator gets rid of another one.
    way_out: &'static str,
}

/// What survives a boot.
const STATE: Kind = Kind {
    oldest: 1,
    newest: 1,
    way_out: "move the directory away: images are pulled again, and data of local claims stay where it was moved to",
};
/// What does not, and the keepers that run.
const RUN: Kind =
    Kind { oldest: 1, newest: 1, way_out: "drain the node and boot it: nothing in the directory survives that" };

/// A directory that this version leaves alone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormatError {
    /// It was written by a later version.
    #[error(
        "{dir} is in format {found}, written by orlop {by}; this is orlop {}, which knows up to format {newest}. Nothing was \
         changed, and what runs goes on: start orlop {by} again, or {way_out}",
        env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        found: u32,
        /// The version that wrote it.
        by: String,
        /// The newest format that is known.
        newest: u32,
        /// What else can be done.
        way_out: &'static str,
    },
    /// It was written by a version that is too long ago.
    #[error(
        "{dir} is in format {found}, written by orlop {by}; this is orlop {}, which reads none before format {oldest}. \
         Nothing was changed, and what runs goes on: start a version between the two first, or {way_out}",
        env!("CARGO_PKG_VERSION")
    )]
    Older {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        found: u32,
        /// The version that wrote it.
        by: String,
        /// The oldest format that is read.
        oldest: u32,
        /// What else can be done.
        way_out: &'static str,
    },
    /// It does not say.
    #[error("{path} does not say which format the directory has; write the number of it there ({newest} is today's)")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Today's format.
        newest: u32,
        /// The cause.
        source: io::Error,
    },
    /// Today's format cannot be noted.
    #[error("cannot write {path}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Takes both directories of a node for this process alone. They are as they were: see [`note`].
///
/// # Errors
/// Another process has one of them, or it is in a format that this version does not know.
pub(crate) fn take(layout: &Layout) -> anyhow::Result<[Lock; 2]> {
    let locks = [Lock::take(&layout.state_dir)?, Lock::take(&layout.run_dir)?];
    STATE.check(&layout.state_dir)?;
    RUN.check(&layout.run_dir)?;
    Ok(locks)
}

/// Notes today's format in both directories, which are taken, once what an earlier version has left was taken over: where that
/// cannot be, the earlier version has to find them as it knows them. So nothing that it would not know is written before.
///
/// # Errors
/// They cannot be read or written.
pub(crate) fn note(layout: &Layout) -> Result<(), FormatError> {
    STATE.note(&layout.state_dir, STATE.check(&layout.state_dir)?)?;
    RUN.note(&layout.run_dir, RUN.check(&layout.run_dir)?)
}

impl Kind {
    /// The format that a directory says it has, if it is one that is known.
    fn check(self, dir: &Path) -> Result<Option<u32>, FormatError> {
        let Self { oldest, newest, way_out } = self;
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(FormatError::Unreadable { path, newest, source }),
        };
        let Some(text) = text else { return Ok(None) };
        let (number, by) = parse(&text).map_err(|source| FormatError::Unreadable { path, newest, source })?;
        let (dir, by) = (dir.to_owned(), by.to_owned());
        match number {
            found if found > newest => Err(FormatError::Newer { dir, found, by, newest, way_out }),
            found if found < oldest => Err(FormatError::Older { dir, found, by, oldest, way_out }),
            found => Ok(Some(found)),
        }
    }

    /// Notes today's format, unless it is noted. What has to be converted from an earlier one is converted before.
    fn note(self, dir: &Path, found: Option<u32>) -> Result<(), FormatError> {
        if found == Some(self.newest) {
            return Ok(());
        }
        let (path, fresh) = (dir.join(FILE), dir.join(".format"));
        let write = || {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(text(self.newest).as_bytes())?;
            // A power failure must not leave an empty one: the node would not start.
            file.sync_all()?;
            std::fs::rename(&fresh, &path)
        };
        write().map_err(|source| FormatError::Unwritable { path: path.clone(), source })
    }
}

fn text(number: u32) -> String {
    format!("{number}\norlop {}\n", env!("CARGO_PKG_VERSION"))
}

/// The number, and the version that wrote it.
fn parse(text: &str) -> io::Result<(u32, &str)> {
    let mut lines = text.lines();
    let number = lines.next().unwrap_or_default().trim().parse();
    let number = number.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((number, lines.next().and_then(|line| line.strip_prefix("orlop ")).unwrap_or("(unknown)")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Places;

    fn layout(dir: &Path) -> Layout {
        Layout::new(&Places { state_dir: dir.join("state"), run_dir: dir.join("run") })
    }

    fn written(layout: &Layout) -> [String; 2] {
        [&layout.state_dir, &layout.run_dir].map(|dir| std::fs::read_to_string(dir.join(FILE)).unwrap())
    }

    #[test]
    fn a_directory_of_before_there_was_a_number_is_taken_and_numbered() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let locks = take(&layout).unwrap();
        let is_there = |dir: &PathBuf| dir.join(FILE).exists();
        assert!(!is_there(&layout.state_dir) && !is_there(&layout.run_dir), "nothing has been taken over yet");
        note(&layout).unwrap();
        let first = written(&layout);
        assert_eq!(first, [text(1), text(1)]);
        drop(locks);
        drop(take(&layout).unwrap());
        note(&layout).unwrap();
        assert_eq!(written(&layout), first);
    }

    #[test]
    fn a_directory_of_a_later_version_is_left_alone_with_the_remedy() {
        for (late, remedy) in [("state", "move the directory away"), ("run", "drain the node and boot it")] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join(late)).unwrap();
            std::fs::write(dir.path().join(late).join(FILE), "2\norlop 9.8.7\n").unwrap();
            let layout = layout(dir.path());
            let error = take(&layout).unwrap_err().to_string();
            for word in [late, "format 2", "orlop 9.8.7 again", "up to format 1", remedy] {
                assert!(error.contains(word), "{word}: {error}");
            }
            assert_eq!(std::fs::read_to_string(dir.path().join(late).join(FILE)).unwrap(), "2\norlop 9.8.7\n");
            let other = if late == "run" { "state" } else { "run" };
            assert!(!dir.path().join(other).join(FILE).exists(), "the other one is as it was");
        }
    }

    #[test]
    fn a_directory_of_too_long_ago_is_left_alone_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "1\norlop 0.1.0\n").unwrap();
        let error = Kind { oldest: 2, newest: 3, ..RUN }.check(dir.path()).unwrap_err().to_string();
        for word in ["format 1", "orlop 0.1.0", "none before format 2", "a version between"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn a_file_that_says_nothing_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "one\n", "-1\n"] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let error = STATE.check(dir.path()).unwrap_err().to_string();
            assert!(error.contains("write the number of it there (1 is today's)"), "{error}");
        }
    }
}
