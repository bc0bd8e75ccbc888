//! What the operator decides, and the parts that a runtime is made of.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// How a runtime is set up. [`Config::new`] has the defaults of a node.
#[derive(Debug, Clone)]
pub struct Config {
    /// What outlives a boot: `/var/lib/orlop`.
    pub state_dir: PathBuf,
    /// What does not, on a tmpfs: `/run/orlop`. Sandboxes live in `sandboxes/<id>` below it.
    pub run_dir: PathBuf,
    /// The control group of sandboxes that name no parent; one group for each is made below it.
    pub cgroup_parent: PathBuf,
    /// Whether the parents that requests name are paths from the top of each hierarchy, as other node agents mean them;
    /// otherwise they count from the groups that this process is in, where orlop's own kubelet makes them. Version 2 makes a
    /// difference only where a service manager has delegated a part of the tree.
    pub parents_from_top: bool,
    /// Where exec, attach and port forwarding are served; port 0 takes any that is free.
    pub streaming_address: SocketAddr,
    /// When the keepers rotate a container's log; without limits it grows until the kubelet rotates it.
    pub log_limits: Option<LogLimits>,
    /// Other OCI runtimes that pods can ask for.
    pub handlers: Vec<HandlerConfig>,
    /// Whether devices that are asked for by their paths belong in the container to the user and the group that it is to run as
    /// (`runAsUser`, `runAsGroup`), unless these are root; else as on the host.
    pub device_ownership_from_security_context: bool,
    /// How plugins of the Node Resource Interface come in, if they do.
    pub nri: Option<nri::Config>,
}

/// Another OCI runtime, which pods ask for by the `handler` of their RuntimeClass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerConfig {
    /// The handler's name; none of `""` and `"orlop"`, which are this runtime itself.
    pub name: String,
    /// The runtime's program, which has runc's command line.
    pub path: PathBuf,
    /// Arguments before each command.
    pub arguments: Vec<String>,
}

/// When a container's log is rotated, by the names of the kubelet's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// `containerLogMaxSize`, in bytes.
    pub bytes_max: u64,
    /// `containerLogMaxFiles`.
    pub files_max: u32,
}

impl Config {
    /// The defaults, with all state below the two directories.
    pub fn new(state_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            run_dir: run_dir.into(),
            cgroup_parent: "orlop".into(),
            parents_from_top: false,
            streaming_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            log_limits: Some(LogLimits { bytes_max: 10 << 20, files_max: 5 }),
            handlers: Vec::new(),
            device_ownership_from_security_context: false,
            nri: None,
        }
    }
}

/// What a runtime is made of.
#[derive(Debug)]
pub struct Parts {
    /// The images.
    pub images: Arc<image::Images>,
    /// The pods' network; the runtime adopts it.
    pub network: Arc<network::Network>,
    /// Where keepers are forked from.
    pub zygote: keeper::Zygote,
}
