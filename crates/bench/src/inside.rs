//! A run of one side, in namespaces of its own.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, mount};
use testkit::host;
use testkit::image::Layout;
use testkit::registry::Registry;

use crate::arguments::{Arguments, Images, Work};
use crate::measure::Outcome;
use crate::{node, proxy, runtime};

/// Where the registry listens, in the run's own network namespace.
const REGISTRY: ([u8; 4], u16) = ([127, 0, 0, 1], 5000);

/// The image of every pod.
pub(crate) const IMAGE: &str = "docker.io/library/busybox:latest";

/// Places that daemons and plugins write to whatever their configuration says.
const COVERED: &[&str] = &["/run", "/var/lib", "/var/log"];

/// The file in the run's directory with what was measured.
pub(crate) fn results_file(scratch: &Path) -> PathBuf {
    scratch.join("results.json")
}

/// Runs the one side that is wanted; called by [`crate::outside`].
pub(crate) fn run(arguments: &Arguments, scratch: &Path) -> anyhow::Result<()> {
    let [name] = arguments.common().side[..] else { bail!("one side at a time") };
    for place in COVERED {
        mount("tmpfs", *place, "tmpfs", MountFlags::empty(), None).with_context(|| format!("cover {place}"))?;
    }
    host::run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    let registry = arguments.images().map(|images| registry(images, arguments, scratch)).transpose()?;
    let results = match &arguments.work {
        Work::Runtime(work) => Outcome::untitled(runtime::run(name, work, scratch)?),
        Work::Node(work) => Outcome::untitled(node::run(name, work, scratch)?),
        Work::Proxy(work) => proxy::run(name, work, scratch)?,
        Work::Rollout(work) => Outcome::untitled(node::run_rollouts(name, work, scratch)?),
    };
    drop(registry);
    let mut file = std::fs::File::create(results_file(scratch))?;
    file.write_all(&serde_json::to_vec(&results)?)?;
    Ok(())
}

/// A registry with the images, which stands for docker.io.
fn registry(images: &Images, arguments: &Arguments, scratch: &Path) -> anyhow::Result<Registry> {
    let registry = Registry::start(SocketAddr::from(REGISTRY), &scratch.join("registry"))?;
    let Images { busybox, pause } = images;
    let mut images = vec![(busybox, IMAGE), (pause, "docker.io/orlop/pause:latest")];
    if let Work::Runtime(work) = &arguments.work {
        images.push((&work.large, runtime::LARGE));
    }
    let server = scratch.join("server");
    if let Work::Rollout(_) = &arguments.work {
        node::server_image(&server)?;
        images.push((&server, node::SERVER));
    }
    for (layout, name) in images {
        let name = name.trim_start_matches("docker.io/");
        let (repository, tag) = name.split_once(':').context("names have tags")?;
        registry.push(&Layout::open(layout), repository, tag)?;
    }
    let place = scratch.join("certs.d/docker.io");
    std::fs::create_dir_all(&place)?;
    let mirror = registry.address();
    let text = format!("[host.\"http://{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    std::fs::write(place.join("hosts.toml"), text)?;
    Ok(registry)
}
