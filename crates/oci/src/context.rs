//! What holds for every command: where states are kept, how control groups are made, where errors go.

use std::path::{Path, PathBuf};

use crate::args::{Arguments, Rootless};
use crate::error::Error;
use crate::log::Log;

/// What holds for every command.
#[derive(Debug)]
pub(crate) struct Context {
    /// Below it each container has a directory.
    pub(crate) root: PathBuf,
    /// Whether the caller chose it.
    pub(crate) root_given: bool,
    /// systemd makes the control groups.
    pub(crate) systemd: bool,
    /// Control groups that may not be made are done without.
    pub(crate) rootless: bool,
    pub(crate) log: Log,
}

impl Context {
    pub(crate) fn new(arguments: &Arguments) -> Result<Self, Error> {
        let is_root = sys::rustix::process::geteuid().is_root();
        let root = match &arguments.root {
            Some(root) => std::path::absolute(root).map_err(Error::file("find", root))?,
            None => default_root(),
        };
        let rootless = match arguments.rootless {
            Rootless::True => true,
            Rootless::False => false,
            // As whose root this is: in a namespace of users, as Podman makes one for a user, root may less.
            Rootless::Auto => !is_root || executor::in_user_namespace(),
        };
        let log = Log::open(arguments.log.as_deref(), arguments.log_format)?;
        Ok(Self { root, root_given: arguments.root.is_some(), systemd: arguments.systemd_cgroup, rootless, log })
    }
}

/// runc's own place, as its callers know it: a user's own, also where he is called root in a namespace of his.
fn default_root() -> PathBuf {
    let is_root = sys::rustix::process::geteuid().is_root();
    let of_user =
        || !is_root || executor::in_user_namespace() && std::env::var_os("USER").is_none_or(|name| name != "root");
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|_| of_user()) {
        Some(dir) => Path::new(&dir).join("runc"),
        None => PathBuf::from("/run/runc"),
    }
}
