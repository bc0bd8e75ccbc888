//! Things that are costly to make and safe to lose: kept below `$HOME/.cache/orlop`, each under a key of its inputs.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

/// The cache directory, made when absent. `ORLOP_CACHE_DIR` overrides the place.
///
/// # Errors
/// No home directory, or the directory cannot be made.
pub fn dir() -> anyhow::Result<PathBuf> {
    let dir = match std::env::var_os("ORLOP_CACHE_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(&std::env::var_os("HOME").context("HOME is not set; set it or ORLOP_CACHE_DIR")?)
            .join(".cache/orlop"),
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// A key of sixteen hex digits for `parts`.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize()[..8])
}

/// The entry `<name>-<key>`: returned when it is there, else made by `make` in a scratch directory and moved into place,
/// so that an interrupted run leaves no half entry. Runs that want the same entry at the same time wait for one of them.
///
/// # Errors
/// Those of `make` and of the file system.
pub fn entry(name: &str, key: &str, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    entry_in(&dir()?, name, key, make)
}

fn entry_in(
    root: &Path,
    name: &str,
    key: &str,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let place = root.join(format!("{name}-{key}"));
    if place.exists() {
        return Ok(place);
    }
    let lock = root.join(format!(".{name}-{key}.lock"));
    let held = lock_file(&lock, name)?;
    if !place.exists() {
        make_entry(root, &place, name, make)?;
    }
    // Those who wait hold the same file and find the entry made; who comes later does not look for the lock.
    let _ = std::fs::remove_file(&lock);
    drop(held);
    Ok(place)
}

fn lock_file(path: &Path, name: &str) -> anyhow::Result<std::fs::File> {
    let file = std::fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another run that makes {name}");
        file.lock().with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(file)
}

fn make_entry(
    root: &Path,
    place: &Path,
    name: &str,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let scratch = tempfile::Builder::new().prefix(&format!(".{name}-")).tempdir_in(root)?;
    make(scratch.path()).with_context(|| format!("make {name} for the cache"))?;
    match std::fs::rename(scratch.path(), place) {
        Ok(()) => std::mem::forget(scratch),
        Err(_) if place.exists() => {} // another run was faster; its entry has the same inputs
        Err(error) => {
            return Err(error).with_context(|| format!("move {name} to {}", place.display()));
        }
    }
    Ok(())
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_at_the_same_time_make_an_entry_once() {
        let root = tempfile::tempdir().unwrap();
        let made = std::sync::atomic::AtomicUsize::new(0);
        let begin = std::sync::Barrier::new(4);
        let run = || {
            begin.wait();
            let place = entry_in(root.path(), "thing", "k", |dir| {
                made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Ok(std::fs::write(dir.join("file"), "content")?)
            });
            assert_eq!(std::fs::read_to_string(place.unwrap().join("file")).unwrap(), "content");
        };
        std::thread::scope(|scope| drop([(); 4].map(|()| scope.spawn(run))));
        assert_eq!(made.into_inner(), 1);
        let left: Vec<_> = root.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["thing-k"]);
    }

    #[test]
    fn what_could_not_be_made_leaves_nothing_and_is_tried_again() {
        let root = tempfile::tempdir().unwrap();
        entry_in(root.path(), "thing", "k", |_| anyhow::bail!("no")).unwrap_err();
        assert!(!root.path().join("thing-k").exists());
        entry_in(root.path(), "thing", "k", |_| Ok(())).unwrap();
    }

    #[test]
    fn key_depends_on_where_parts_end() {
        assert_ne!(key([b"ab".as_slice(), b"c"]), key([b"a".as_slice(), b"bc"]));
    }
}
