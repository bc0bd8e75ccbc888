//! Container logs, as far as the client moves them.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use cri::Error;
use keeper::protocol::{ReopenLog, Request};

use crate::core::{Core, failed, patient};
use crate::exec;
use crate::launch::log_path;
use crate::single::Outcome;

/// CRI `ReopenContainerLog`: the client has renamed the file; the output goes on in a new one.
pub(crate) async fn reopen(core: &Core, id: &str) -> Outcome {
    let (sandbox, container) = exec::running(core, id)?;
    let config = container.record().config.clone().unwrap_or_default();
    let Some(path) = log_path(&sandbox, &config) else {
        return Err(Error::FailedPrecondition(format!("container {} has no log", container.id)));
    };
    let fail =
        |error: &(dyn std::error::Error + 'static)| failed("opening the log again of container", &container.id, error);
    // The directory may have been made anew, too; and where it is may not answer.
    let directory = patient(move || {
        let directory = Path::new(&path).parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory).and_then(|()| fs::File::open(directory)).map(OwnedFd::from)
    });
    let directory = directory.await?.map_err(|error| fail(&error))?;
    let request = Request::ReopenLog(ReopenLog { id: container.id.clone(), directory: true });
    let keeper = sandbox.keeper().map_err(|error| fail(&error))?;
    keeper.done(request, vec![directory]).await.map(drop).map_err(|error| fail(&error))
}
