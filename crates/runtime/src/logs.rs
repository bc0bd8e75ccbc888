//! Container logs, as far as the client moves them.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use cri::Error;
use keeper::protocol::{ReopenLog, Request};
use sys::path::Kind;
use sys::rustix::fs::OFlags;

use crate::core::{Core, failed, patient};
use crate::exec;
use crate::launch::log_path;
use crate::single::Outcome;

/// CRI `ReopenContainerLog`: the client has renamed the file; the output goes on in a new one.
pub(crate) async fn reopen(core: &Core, id: &str) -> Outcome {
    let (sandbox, container) = exec::running(core, id)?;
    let config = container.record().config.clone().unwrap_or_default();
    if log_path(&sandbox, &config).is_none() {
        return Err(Error::FailedPrecondition(format!("container {} has no log", container.id)));
    }
    let fail =
        |error: &(dyn std::error::Error + 'static)| failed("opening the log again of container", &container.id, error);
    // The directory may have been made anew, too; and where it is may not answer.
    let of_pod = sandbox.config.log_directory.clone();
    let directory = patient(move || open_directory(Path::new(&of_pod), Path::new(&config.log_path)));
    let directory = directory.await?.map_err(|error| fail(&error))?;
    let request = Request::ReopenLog(ReopenLog { id: container.id.clone(), directory: true });
    let keeper = sandbox.keeper().map_err(|error| fail(&error))?;
    keeper.done(request, vec![directory]).await.map(drop).map_err(|error| fail(&error))
}

/// Opens the directory of the log at `path` below the pod's, made if it is missing. Both stand where their names say: a link was
/// put there by somebody who may write where pods log, and would have the node write to where it leads.
///
/// # Errors
/// `ELOOP` for a link.
pub(crate) fn open_directory(of_pod: &Path, path: &Path) -> io::Result<OwnedFd> {
    let no_place = || io::Error::new(io::ErrorKind::InvalidInput, "the log directory has no name");
    let (of_pods, name) = (of_pod.parent().ok_or_else(no_place)?, of_pod.file_name().ok_or_else(no_place)?);
    fs::create_dir_all(of_pods)?;
    let of_pods = if of_pods.as_os_str().is_empty() { Path::new(".") } else { of_pods };
    let place = Path::new(name).join(path.parent().unwrap_or(Path::new("")));
    let opened = sys::path::open_place(of_pods).and_then(|root| {
        sys::path::make_in_root_strictly(root.as_fd(), &place, Kind::Directory)?;
        sys::path::open_unlinked(root.as_fd(), &place, OFlags::RDONLY | OFlags::DIRECTORY)
    });
    opened.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_directory_of_a_log_is_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (pods, host) = (dir.path().join("linked/pods"), dir.path().join("host"));
        fs::create_dir_all(dir.path().join("real/pods")).unwrap();
        fs::create_dir(&host).unwrap();
        // Where pods log is the operator's choice.
        symlink("real", dir.path().join("linked")).unwrap();
        let open = |pod: &str, path: &str| open_directory(&pods.join(pod), Path::new(path));
        open("pod", "c/0.log").unwrap();
        assert!(dir.path().join("real/pods/pod/c").is_dir());
        symlink(&host, pods.join("pod/d")).unwrap();
        symlink(&host, pods.join("other")).unwrap();
        for (pod, path) in [("pod", "d/0.log"), ("other", "c/0.log"), ("other", "0.log")] {
            open(pod, path).unwrap_err();
        }
        fs::remove_dir_all(pods.join("pod/c")).unwrap();
        symlink("../other", pods.join("pod/c")).unwrap();
        open("pod", "c/0.log").unwrap_err();
        assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
    }
}
