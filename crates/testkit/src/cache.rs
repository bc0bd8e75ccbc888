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
/// so that an interrupted run leaves no half entry.
///
/// # Errors
/// Those of `make` and of the file system.
pub fn entry(name: &str, key: &str, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    let root = dir()?;
    let place = root.join(format!("{name}-{key}"));
    if place.exists() {
        return Ok(place);
    }
    let scratch = tempfile::Builder::new().prefix(&format!(".{name}-")).tempdir_in(&root)?;
    make(scratch.path()).with_context(|| format!("make {name} for the cache"))?;
    match std::fs::rename(scratch.path(), &place) {
        Ok(()) => std::mem::forget(scratch),
        Err(_) if place.exists() => {} // another run was faster; its entry has the same inputs
        Err(error) => {
            return Err(error).with_context(|| format!("move {name} to {}", place.display()));
        }
    }
    Ok(place)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_depends_on_where_parts_end() {
        assert_ne!(key([b"ab".as_slice(), b"c"]), key([b"a".as_slice(), b"bc"]));
    }
}
