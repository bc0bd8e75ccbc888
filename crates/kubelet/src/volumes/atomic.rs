//! Writes a set of files so that readers see all of the old or all of the new, in upstream's layout:
//!
//! ```text
//! volume/
//! ├── ..2026_01_31_12_00_00.4f3a/     the files
//! ├── ..data -> ..2026_01_31_…        swapped by one rename
//! └── key -> ..data/key               one link for each first part of a path
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::Cause;
use super::payload::Files;

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes the directory, which must exist, show exactly these files; false when it did already. `own` sets who owns a new
/// version, before anybody sees it.
///
/// # Errors
/// The file system's; the old files stay visible then.
pub(super) fn write(dir: &Path, files: &Files, own: impl FnOnce(&Path) -> Result<(), Cause>) -> Result<bool, Cause> {
    let failed = |source| Cause::File { action: "write files to", path: dir.to_owned(), source };
    let old = match fs::read_link(dir.join(DATA)) {
        Ok(old) => Some(old),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    let is_current = old.as_ref().is_some_and(|old| shows(&dir.join(old), files));
    if !is_current {
        let name = new_name(dir);
        fill(&dir.join(&name), files).map_err(failed)?;
        own(&dir.join(&name))?;
        publish(dir, &name).map_err(failed)?;
    }
    link(dir, files).map_err(failed)?;
    clean(dir, files).map_err(failed)?;
    Ok(!is_current)
}

/// Whether a directory holds these files and no others.
fn shows(dir: &Path, files: &Files) -> bool {
    if !list(dir).is_ok_and(|found| found.iter().eq(files.keys())) {
        return false;
    }
    files.iter().all(|(path, file)| {
        let path = dir.join(path);
        // The group's bits may have been widened for an fsGroup.
        let same_mode = fs::metadata(&path).is_ok_and(|now| now.permissions().mode() & file.mode == file.mode);
        same_mode && fs::read(&path).is_ok_and(|data| data == file.data)
    })
}

/// The files in a directory, by their paths in it.
fn list(dir: &Path) -> io::Result<BTreeSet<String>> {
    let (mut found, mut directories) = (BTreeSet::new(), vec![PathBuf::new()]);
    while let Some(below) = directories.pop() {
        for entry in fs::read_dir(dir.join(&below))? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                directories.push(path);
            } else {
                found.insert(path.to_string_lossy().into_owned());
            }
        }
    }
    Ok(found)
}

/// Writes the files to a new directory.
fn fill(new: &Path, files: &Files) -> io::Result<()> {
    fs::create_dir(new)?;
    fs::set_permissions(new, fs::Permissions::from_mode(0o755))?;
    for (path, file) in files {
        let path = new.join(path);
        make_parents(new, &path)?;
        let mut made = fs::OpenOptions::new().write(true).create_new(true).mode(file.mode).open(&path)?;
        made.write_all(&file.data)?;
        // The mode at creation went through the umask.
        made.set_permissions(fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}

/// Lets `..data` point to a new version.
fn publish(dir: &Path, name: &str) -> io::Result<()> {
    let link = dir.join(NEW_DATA);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(name, &link)?;
    fs::rename(&link, dir.join(DATA))
}

/// Makes the directories between `root` and `path`.
fn make_parents(root: &Path, path: &Path) -> io::Result<()> {
    let above = path.ancestors().skip(1).take_while(|above| *above != root);
    let missing: Vec<&Path> = above.take_while(|above| !above.is_dir()).collect();
    for directory in missing.into_iter().rev() {
        fs::create_dir(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// A name that does not exist yet: the time, as upstream writes it, and a number.
fn new_name(dir: &Path) -> String {
    let time = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let time = time.strftime("%Y_%m_%d_%H_%M_%S").to_string();
    let names = (1u32..).map(|number| format!("..{time}.{number:010}"));
    let mut free = names.filter(|name| fs::symlink_metadata(dir.join(name)).is_err());
    free.next().unwrap_or_default()
}

/// The first parts of the paths: what users see in the volume.
fn visible(files: &Files) -> BTreeSet<&str> {
    files.keys().filter_map(|path| path.split('/').next()).collect()
}

/// Links what users see. A link is the same for every version, so it is made once.
fn link(dir: &Path, files: &Files) -> io::Result<()> {
    for name in visible(files) {
        match symlink(Path::new(DATA).join(name), dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Removes links that lead nowhere now, older versions, and what a daemon that was killed has not finished.
fn clean(dir: &Path, files: &Files) -> io::Result<()> {
    let current = fs::read_link(dir.join(DATA))?;
    let tree = sys::tree::Dir::open(dir)?;
    let visible = visible(files);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type()?;
        let is_unused = !name.starts_with("..") && !visible.contains(&*name);
        if kind.is_symlink() && (is_unused || name == NEW_DATA) {
            fs::remove_file(entry.path())?;
        } else if kind.is_dir() && name.starts_with("..") && Path::new(&*name) != current {
            tree.remove_all(entry.file_name().as_bytes())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::payload::File;
    use super::*;

    fn files(all: &[(&str, &str, u32)]) -> Files {
        let file = |(path, data, mode): &(&str, &str, u32)| {
            ((*path).to_owned(), File { data: data.as_bytes().to_vec(), mode: *mode })
        };
        all.iter().map(file).collect()
    }

    fn put(dir: &Path, all: &[(&str, &str, u32)]) -> bool {
        write(dir, &files(all), |_| Ok(())).unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.filter(|name| !name.starts_with("..2")).collect();
        names.sort();
        names
    }

    #[test]
    fn versions_replace_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert!(put(dir, &[("a", "1", 0o400), ("d/e", "2", 0o644)]));
        assert_eq!(names(dir), ["..data", "a", "d"]);
        assert_eq!(fs::read_to_string(dir.join("d/e")).unwrap(), "2");
        assert_eq!(fs::metadata(dir.join("a")).unwrap().permissions().mode() & 0o777, 0o400);
        assert_eq!(fs::read_link(dir.join("a")).unwrap(), Path::new("..data/a"));
        let first = fs::read_link(dir.join("..data")).unwrap();

        assert!(!put(dir, &[("a", "1", 0o400), ("d/e", "2", 0o644)]), "nothing changed");
        assert_eq!(fs::read_link(dir.join("..data")).unwrap(), first);

        assert!(put(dir, &[("a", "3", 0o400)]));
        assert_eq!(names(dir), ["..data", "a"]);
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert!(!dir.join(first).exists(), "the old version is gone");
        assert!(put(dir, &[]));
        assert_eq!(names(dir), ["..data"]);
    }

    /// What a daemon leaves that is killed in the middle of a write, at each of its steps.
    #[test]
    fn a_write_that_was_cut_off_is_made_whole() {
        let (old, new) = ([("a", "1", 0o644), ("b", "1", 0o644)], [("a", "2", 0o644), ("c/d", "2", 0o644)]);
        type Cut = fn(&Path, &Path);
        let cuts: [(&str, Cut); 5] = [
            ("an empty directory", |_, next| fs::create_dir(next).unwrap()),
            ("some of the files", |_, next| drop(fill(next, &files(&[("a", "2", 0o644)])))),
            ("all of them", |_, next| drop(fill(next, &files(&[("a", "2", 0o644), ("c/d", "2", 0o644)])))),
            ("the link beside", |dir, next| {
                fill(next, &files(&[("a", "2", 0o644), ("c/d", "2", 0o644)])).unwrap();
                symlink(next.file_name().unwrap(), dir.join(NEW_DATA)).unwrap();
            }),
            ("the version, but no links to its files", |dir, next| {
                fill(next, &files(&[("a", "2", 0o644), ("c/d", "2", 0o644)])).unwrap();
                publish(dir, next.file_name().unwrap().to_str().unwrap()).unwrap();
            }),
        ];
        for (what, cut) in cuts {
            // The files that the next daemon is to show may be the old ones again.
            for wanted in [&new[..], &old[..]] {
                let dir = tempfile::tempdir().unwrap();
                let dir = dir.path();
                put(dir, &old);
                cut(dir, &dir.join(new_name(dir)));
                put(dir, wanted);
                let visible = wanted.iter().map(|(path, ..)| path.split('/').next().unwrap());
                let expected: Vec<&str> = ["..data"].into_iter().chain(visible).collect();
                assert_eq!(names(dir), expected, "{what}");
                assert!(shows(&dir.join(fs::read_link(dir.join(DATA)).unwrap()), &files(wanted)), "{what}");
                let versions = fs::read_dir(dir).unwrap().flatten().filter(|entry| entry.path().is_dir());
                let versions = versions.filter(|entry| entry.file_name().to_string_lossy().starts_with("..2"));
                assert_eq!(versions.count(), 1, "{what}");
            }
        }
    }
}
