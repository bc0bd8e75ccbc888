//! Where the node agent keeps things: upstream's places below one root, so that other tools find them.

use std::path::{Path, PathBuf};

/// The places of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The kubelet's root, upstream `/var/lib/kubelet`.
    pub root: PathBuf,
    /// The root of container logs, upstream `/var/log/pods`.
    pub logs: PathBuf,
}

impl Paths {
    /// The directory with one directory for each pod, by uid.
    pub fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// What belongs to one pod.
    pub fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// Files that the pod's containers write to and the node reads: a tmpfs with a budget. No container's name begins with
    /// a dot, so the hosts file has one.
    pub fn written(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("containers")
    }

    /// The pod's managed `/etc/hosts`.
    pub fn hosts_file(&self, uid: &str) -> PathBuf {
        self.written(uid).join(".etc-hosts")
    }

    /// A volume: `pods/<uid>/volumes/kubernetes.io~<plugin>/<name>`.
    pub fn volume(&self, uid: &str, plugin: &str, name: &str) -> PathBuf {
        self.pod(uid).join("volumes").join(format!("kubernetes.io~{plugin}")).join(name)
    }

    /// The sub-paths of volumes that a pod's containers mount.
    pub fn sub_paths(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("volume-subpaths")
    }

    /// Where a sub-path is bound that a container mounts: `pods/<uid>/volume-subpaths/<volume>/<container>/<index>`.
    pub fn sub_path(&self, uid: &str, volume: &str, container: &str, index: usize) -> PathBuf {
        self.sub_paths(uid).join(volume).join(container).join(index.to_string())
    }

    /// The file that a container writes its termination message to.
    pub fn termination_message(&self, uid: &str, container: &str, attempt: u32) -> PathBuf {
        self.written(uid).join(container).join(attempt.to_string())
    }

    /// Where plugins put the sockets that they register by.
    pub fn plugins_registry(&self) -> PathBuf {
        self.root.join("plugins_registry")
    }

    /// What belongs to plugins, and what the kubelet keeps for them: `plugins/<plugin>`.
    pub fn plugins(&self) -> PathBuf {
        self.root.join("plugins")
    }

    /// Where `localhostProfile` of seccomp is looked up.
    pub fn seccomp(&self) -> PathBuf {
        self.root.join("seccomp")
    }

    /// The directory of a pod's logs: `<namespace>_<name>_<uid>`.
    pub fn pod_logs(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.logs.join(format!("{namespace}_{name}_{uid}"))
    }

    /// A container's log file, relative to its pod's logs: `<container>/<attempt>.log`.
    pub fn container_log(container: &str, attempt: u32) -> PathBuf {
        Path::new(container).join(format!("{attempt}.log"))
    }
}
