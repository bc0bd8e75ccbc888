//! Where one node keeps its things, and how it is told from another node on the same machine.

use std::path::{Path, PathBuf};

use crate::args::Places;

/// The well-known places of the node that an operator starts without naming others.
const STATE_DIR: &str = "/var/lib/orlop";
const RUN_DIR: &str = "/run/orlop";
const KUBELET_ROOT: &str = "/var/lib/kubelet";
const POD_LOGS: &str = "/var/log/pods";

/// All places and names of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// What survives a boot.
    pub(crate) state_dir: PathBuf,
    /// Sockets and records; on a tmpfs.
    pub(crate) run_dir: PathBuf,
    /// The kubelet's root.
    pub(crate) kubelet_root: PathBuf,
    /// Container logs.
    pub(crate) pod_logs: PathBuf,
    /// The bridge of the pods, at most 15 bytes.
    pub(crate) bridge: String,
    /// The control group of sandboxes that name no parent.
    pub(crate) group: String,
    /// The nftables table of the pods' network.
    pub(crate) pod_table: String,
    /// The nftables table of Services.
    pub(crate) service_table: String,
}

impl Layout {
    /// The layout of the node with these places: the well-known ones have the well-known names; every other run
    /// directory has names of its own, so that two nodes on one machine do not meet.
    pub(crate) fn new(places: &Places) -> Self {
        let (state_dir, run_dir) = (places.state_dir.clone(), places.run_dir.clone());
        let mark = if run_dir == Path::new(RUN_DIR) { String::new() } else { format!("-{:06x}", mark(&run_dir)) };
        let (kubelet_root, pod_logs) = if state_dir == Path::new(STATE_DIR) {
            (KUBELET_ROOT.into(), POD_LOGS.into())
        } else {
            (state_dir.join("kubelet"), state_dir.join("logs"))
        };
        Self {
            state_dir,
            run_dir,
            kubelet_root,
            pod_logs,
            bridge: format!("orlop{}", if mark.is_empty() { "0" } else { &mark }),
            group: format!("orlop{mark}"),
            pod_table: format!("orlop-net{mark}"),
            service_table: format!("orlop-proxy{mark}"),
        }
    }

    /// Whether this is the node that an operator starts without naming other places.
    pub(crate) fn is_well_known(&self) -> bool {
        self.run_dir == Path::new(RUN_DIR)
    }

    /// Where images are.
    pub(crate) fn images(&self) -> PathBuf {
        self.state_dir.join("images")
    }

    /// Where the node answers the local command line.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir.join("orlop.sock")
    }

    /// Whoever is this node's service proxy has this directory for itself.
    pub(crate) fn proxy(&self) -> PathBuf {
        self.run_dir.join("proxy")
    }

    /// Where the proxy alone answers the local command line.
    pub(crate) fn proxy_socket(&self) -> PathBuf {
        self.proxy().join("proxy.sock")
    }

    /// The name server's socket lies here.
    pub(crate) fn dns(&self) -> PathBuf {
        self.run_dir.join("dns")
    }

    /// Where the node's own messages go when it runs detached.
    pub(crate) fn log_file(&self) -> PathBuf {
        self.state_dir.join("orlop.log")
    }
}

/// Twenty-four bits that differ between directories (FNV-1a).
fn mark(path: &Path) -> u32 {
    let bytes = path.as_os_str().as_encoded_bytes();
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    hash & 0x00ff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(state: &str, run: &str) -> Layout {
        Layout::new(&Places { state_dir: state.into(), run_dir: run.into() })
    }

    #[test]
    fn the_default_node_has_the_well_known_names() {
        let layout = layout(STATE_DIR, RUN_DIR);
        assert_eq!((layout.bridge.as_str(), layout.pod_table.as_str()), ("orlop0", "orlop-net"));
        assert_eq!(layout.group, "orlop");
        assert_eq!(layout.kubelet_root, Path::new(KUBELET_ROOT));
    }

    #[test]
    fn two_nodes_do_not_meet() {
        let (one, two) = (layout("/a/state", "/a/run"), layout("/b/state", "/b/run"));
        assert_ne!(one.bridge, two.bridge);
        assert_ne!(one.group, two.group);
        assert!(one.bridge.len() <= 15, "{}", one.bridge);
        assert!(one.kubelet_root.starts_with("/a/state") && one.pod_logs.starts_with("/a/state"));
    }
}
