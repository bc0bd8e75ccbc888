//! Files that are of no use any more: a kubelet goes on without them.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// Renames a file to `<file>.corrupt`, for whoever wants to know what happened to it.
pub(crate) fn set_aside(path: &Path, error: &(dyn Error + 'static)) {
    let aside = aside(path);
    tracing::error!(
        path = %path.display(), error, aside = %aside.display(), "a file of the kubelet is of no use; it is set aside, and begun anew"
    );
    if let Err(error) = fs::rename(path, &aside) {
        tracing::warn!(path = %path.display(), %error, "it cannot be set aside, and will be overwritten");
    }
}

/// Where that file is then.
pub(crate) fn aside(path: &Path) -> PathBuf {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".corrupt");
    aside.into()
}
