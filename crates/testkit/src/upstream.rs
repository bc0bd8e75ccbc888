//! A node as upstream has it: containerd, the kubelet, and where Services are wanted kube-proxy.
//!
//! Whoever runs one does so in process and mount namespaces of its own: shims outlive containerd, and some of its paths are
//! in no configuration.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::mount::mount_bind;

use crate::containerd;
use crate::go;

/// Settings of the kernel that upstream's kubelet writes, below `/proc/sys`, and their values
/// (kubernetes: `pkg/kubelet/cm/container_manager_linux.go`, `setupKernelTunables`).
const TUNABLES: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// A program with its arguments.
pub type Invocation = (PathBuf, Vec<String>);

/// What the daemons of a node are made from.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    /// The directory with the programs of [`go::REFERENCE`] and [`go::REFERENCE_NODE`].
    pub programs: &'a Path,
    /// Everything is written below it; `certs.d` there says where registries are.
    pub scratch: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// Its address, or one of each family with a comma between them.
    pub address: &'a str,
    /// As whom the kubelet speaks to the API server.
    pub kubeconfig: &'a Path,
    /// The network of its pods, where containerd makes it.
    pub network: containerd::Network<'a>,
    /// A KubeletConfiguration, to which the rest is added.
    pub configuration: &'a str,
}

impl Node<'_> {
    /// containerd and the kubelet, in the order in which they start. The kernel is spared: see [`spare_the_kernel`].
    ///
    /// # Errors
    /// A program is missing, or a file cannot be written.
    pub fn daemons(&self) -> anyhow::Result<Vec<Invocation>> {
        spare_the_kernel(self.scratch)?;
        let socket = self.scratch.join("cri.sock");
        let runtime = containerd::prepare(self.programs, self.scratch, &socket, &self.network)?;
        Ok(vec![(containerd::program(self.programs)?, runtime.into()), self.kubelet(&socket)?])
    }

    /// The kubelet alone, with whatever runtime listens on `socket`. Who calls it has spared the kernel.
    ///
    /// # Errors
    /// It is missing, or its configuration cannot be written.
    pub fn kubelet(&self, socket: &Path) -> anyhow::Result<Invocation> {
        let config = self.scratch.join("kubelet.yaml");
        std::fs::write(&config, format!("{}{}", self.configuration, settings(socket)))?;
        let pairs = [
            ("--kubeconfig", self.kubeconfig.display().to_string()),
            ("--config", config.display().to_string()),
            ("--hostname-override", self.name.to_owned()),
            ("--node-ip", self.address.to_owned()),
            ("--cert-dir", self.scratch.join("pki").display().to_string()),
        ];
        let arguments = pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        Ok((self.program(&go::KUBELET)?, arguments))
    }

    /// kube-proxy in a mode of its own.
    ///
    /// # Errors
    /// It is missing.
    pub fn proxy(&self, kubeconfig: &Path, mode: &str, pods: &str) -> anyhow::Result<Invocation> {
        Ok((self.program(&go::KUBE_PROXY)?, self.proxy_arguments(kubeconfig, mode, pods)))
    }

    /// What it is told, for whoever takes the same flags.
    pub fn proxy_arguments(&self, kubeconfig: &Path, mode: &str, pods: &str) -> Vec<String> {
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={}", self.name),
            format!("--proxy-mode={mode}"),
            format!("--cluster-cidr={pods}"),
            // The machine's own limit is not a test's to change; times are those of the network namespace.
            "--conntrack-max-per-core=0".to_owned(),
            "--oom-score-adj=0".to_owned(),
        ];
        arguments.into()
    }

    fn program(&self, program: &go::Program) -> anyhow::Result<PathBuf> {
        let program = self.programs.join(program.name);
        program.canonicalize().with_context(|| format!("find {}", program.display()))
    }
}

/// What a kubelet needs to be told on any machine that builds and tests.
fn settings(socket: &Path) -> String {
    format!(
        "containerRuntimeEndpoint: unix://{}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
oomScoreAdj: 0
",
        socket.display()
    )
}

/// Lets the kubelet find the values that it wants, and whatever it writes go to files of this run: these settings are
/// the whole machine's. The mounts are those of the caller's mount namespace.
///
/// # Errors
/// The calling thread may not mount.
pub fn spare_the_kernel(scratch: &Path) -> anyhow::Result<()> {
    let dir = scratch.join("tunables");
    std::fs::create_dir_all(&dir)?;
    for (name, value) in TUNABLES {
        let (file, setting) = (dir.join(name.replace('/', ".")), Path::new("/proc/sys").join(name));
        std::fs::write(&file, format!("{value}\n"))?;
        mount_bind(&file, &setting).with_context(|| format!("cover {}", setting.display()))?;
    }
    Ok(())
}
