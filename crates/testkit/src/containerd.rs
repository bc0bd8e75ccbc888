//! containerd as the runtime of a node: what it reads.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::json;

/// The repository of the sandboxes' image, which the registry that stands for docker.io has to have.
pub const PAUSE: &str = "orlop/pause";

/// Its program, below the directory of the reference's programs.
///
/// # Errors
/// It is not there.
pub fn program(programs: &Path) -> anyhow::Result<PathBuf> {
    let program = programs.join("containerd");
    program.canonicalize().with_context(|| format!("find {}", program.display()))
}

/// Makes the directory `dir` with those of `programs`, but for runc: by its name there is `runtime`. Returns `dir`.
///
/// # Errors
/// `dir` is there already, or a link cannot be made.
pub fn replace_runc(programs: &Path, runtime: &Path, dir: PathBuf) -> anyhow::Result<PathBuf> {
    std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    for entry in std::fs::read_dir(programs)? {
        let entry = entry?;
        let is_runc = entry.file_name() == "runc";
        let program = if is_runc { runtime.canonicalize()? } else { entry.path().canonicalize()? };
        symlink(program, dir.join(entry.file_name()))?;
    }
    Ok(dir)
}

/// The network of its pods.
#[derive(Debug, Clone, Copy)]
pub struct Network<'a> {
    /// Their addresses: a range, or one of each family with a comma between them.
    pub pods: &'a str,
    /// Whether what they send to others comes from the node's address; where there are routes to pods it need not.
    pub masquerade: bool,
}

impl Network<'static> {
    /// For a node alone.
    pub const ALONE: Self = Self { pods: "10.88.0.0/16", masquerade: true };
}

/// Writes its configuration and that of its network, with everything that it makes below `scratch`: registries are
/// looked up in `certs.d` there. Returns its command line.
///
/// # Errors
/// A file cannot be written.
pub fn prepare(programs: &Path, scratch: &Path, socket: &Path, network: &Network<'_>) -> anyhow::Result<[String; 2]> {
    let config = scratch.join("containerd.toml");
    std::fs::write(&config, text(programs, scratch, socket))?;
    let dir = scratch.join("cni");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("10-bench.conflist"), network.config())?;
    Ok(["--config".to_owned(), config.display().to_string()])
}

/// containerd's defaults but for places, the sandbox image, and OOM scores, which not every machine lets it lower.
fn text(programs: &Path, scratch: &Path, socket: &Path) -> String {
    let (programs, scratch, socket) = (programs.display(), scratch.display(), socket.display());
    format!(
        "version = 4
root = '{scratch}/root'
state = '{scratch}/state'
imports = []
[debug]
level = 'warn'
[plugins.'io.containerd.server.v1.grpc']
address = '{socket}'
[plugins.'io.containerd.server.v1.ttrpc']
address = '{socket}.ttrpc'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = 'docker.io/{PAUSE}:latest'
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = '{scratch}/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['{programs}']
conf_dir = '{scratch}/cni'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
runtime_path = '{programs}/containerd-shim-runc-v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = '{programs}/runc'
[plugins.'io.containerd.internal.v1.opt']
path = '{scratch}/opt'
[plugins.'io.containerd.nri.v1.nri']
disable = true
"
    )
}

impl Network<'_> {
    /// The bridge as clusters without another network have it, host ports included.
    fn config(&self) -> String {
        let ranges: Vec<_> = self.pods.split(',').map(|range| json!([{ "subnet": range }])).collect();
        let anywhere = |range: &str| if range.contains(':') { "::/0" } else { "0.0.0.0/0" };
        let routes: Vec<_> = self.pods.split(',').map(|range| json!({ "dst": anywhere(range) })).collect();
        let bridge = json!({
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": self.masquerade,
            "ipMasqBackend": "nftables",
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": ranges,
                "routes": routes,
            },
        });
        let ports = json!({ "type": "portmap", "backend": "nftables", "capabilities": { "portMappings": true } });
        json!({ "cniVersion": "1.0.0", "name": "bench", "plugins": [bridge, ports] }).to_string()
    }
}
