//! Where a filter reports system calls: `linux.seccomp.listenerPath`.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use executor::{hook, oci};

use crate::container::Container;
use crate::error::Error;

/// Gives the filter's descriptor to the listener, with the state of the process ("The Container Process State" in
/// config-linux.md).
pub(crate) fn hand_over(container: &Container, listener: &OwnedFd) -> Result<(), Error> {
    let record = &container.record;
    let filter = record.spec.linux.as_ref().and_then(|linux| linux.seccomp.as_ref());
    let Some(filter) = filter else { return Ok(()) };
    let json = |error| Error::json("the container's state")(error);
    let pid = u32::try_from(record.pid).unwrap_or(0);
    let state = hook::with_status(&container.state(), pid, "running").map_err(json)?;
    let state: serde_json::Value = serde_json::from_str(&state).map_err(json)?;
    let message = serde_json::json!({
        "ociVersion": oci::VERSION,
        "fds": ["seccompFd"],
        "pid": record.pid,
        "metadata": filter.listener_metadata,
        "state": state,
    });
    let path = Path::new(&filter.listener_path);
    let socket = UnixStream::connect(path).map_err(Error::file("connect to", path))?;
    let sent = sys::fdpass::send(socket.as_fd(), message.to_string().as_bytes(), &[listener.as_fd()]);
    sent.map(drop).map_err(Error::file("send to", path))
}
