//! The example, from an empty machine to a running node.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::bail;
use testkit::host;
use testkit::image::Layout;
use testkit::registry::Registry;

use crate::workspace::{build_release, root};

/// How to run it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run through unattended, check every point, and exit with 0 or 1.
    #[arg(long)]
    once: bool,
    /// Use the machine's own network instead of a private namespace.
    #[arg(long)]
    host: bool,
}

/// Where the demo's registry listens, inside its network namespace.
const REGISTRY: ([u8; 4], u16) = ([127, 0, 0, 1], 5000);

/// Everything a run needs, made before it enters its private network.
pub(crate) struct Stage {
    /// The program under demonstration.
    pub(crate) orlop: PathBuf,
    /// Scratch directories: state, run, logs, registry configuration, manifests.
    pub(crate) dir: tempfile::TempDir,
    registry: Registry,
}

/// Set-up, then the interactive or the unattended run.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a node makes namespaces, control groups and mounts: run the demo as root");
    }
    host::install(crate::images::TOOLS)?;
    host::install(&[testkit::registry::TOOL])?;
    let orlop = build_release()?;
    let stage = Stage::set_up(&orlop, options.host)?;
    if options.once {
        return crate::voyage::run(stage).map(|points| println!("demo: all {points} points hold"));
    }
    let mut up = stage.orlop();
    up.arg("up").arg(root().join("examples/ai-service"));
    println!("$ orlop up examples/ai-service    (Ctrl-C ends it)");
    crate::workspace::run(&mut up)
}

/// The trials of faults in a private network; returns how many there were.
pub(crate) fn try_faults(orlop: &Path) -> anyhow::Result<usize> {
    crate::voyage::try_faults(Stage::set_up(orlop, false)?)
}

/// The unattended run in a private network; returns how many points were checked.
pub(crate) fn once(orlop: &Path) -> anyhow::Result<usize> {
    crate::voyage::run(Stage::set_up(orlop, false)?)
}

impl Stage {
    pub(crate) fn set_up(orlop: &Path, on_host_network: bool) -> anyhow::Result<Self> {
        let ai_service = crate::images::ai_service()?;
        let busybox = crate::images::busybox()?;
        if !on_host_network {
            testkit::netns::enter_private()?;
        }
        let dir = tempfile::Builder::new().prefix("orlop-demo-").tempdir()?;
        let registry = Registry::start(SocketAddr::from(REGISTRY), &dir.path().join("registry"))?;
        registry.push(&ai_service, "myrepo/ai-service", "latest")?;
        registry.push(&busybox, "library/busybox", "latest")?;
        testkit::registry::write_hosts(&dir.path().join("certs.d"), "docker.io", SocketAddr::from(REGISTRY))?;
        Ok(Self { orlop: orlop.to_owned(), dir, registry })
    }

    /// Puts another image into the registry.
    pub(crate) fn push(&self, image: &Layout, repository: &str) -> anyhow::Result<()> {
        self.registry.push(image, repository, "latest").map(drop)
    }

    /// Where the registry listens.
    pub(crate) fn registry_address(&self) -> SocketAddr {
        self.registry.address()
    }

    /// The registry's process.
    pub(crate) fn registry_pid(&self) -> u32 {
        self.registry.pid()
    }

    /// The program with this stage's directories.
    pub(crate) fn orlop(&self) -> Command {
        let mut command = Command::new(&self.orlop);
        for (variable, name) in
            [("ORLOP_STATE_DIR", "state"), ("ORLOP_RUN_DIR", "run"), ("ORLOP_REGISTRY_CONFIG_DIR", "certs.d")]
        {
            command.env(variable, self.dir.path().join(name));
        }
        command
    }
}
