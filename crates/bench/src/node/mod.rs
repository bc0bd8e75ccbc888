//! Nodes of a real API server, seen by a client that creates pods and watches them.
//!
//! ```text
//! work ── creates, deletes, edits ──► API server ◄── node
//!   ▲                                     │
//!   └─────────────── watcher ◄────────────┘
//! ```

mod configs;
mod rollout;
mod sections;
mod side;
mod watcher;
mod work;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use testkit::control_plane::{ControlPlane, Options, Part};
use testkit::{host, netns};

use crate::arguments::{NodeArguments, RolloutArguments, SideName};
use crate::measure::Results;

pub(crate) use rollout::{IMAGE as SERVER, image as server_image};
use side::{Place, Side};
use work::Work;

/// The address of API server and node, inside the run's network namespace (RFC 5737).
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The node's name.
const NODE: &str = "bench";

/// Measures one side; called by [`crate::inside`].
pub(crate) fn run(name: SideName, arguments: &NodeArguments, scratch: &Path) -> anyhow::Result<Results> {
    netns::add_address(ADDRESS)?;
    let options = Options { address: ADDRESS, ..Options::default() };
    let plane = ControlPlane::start(&arguments.control_plane, &scratch.join("plane"), options)?;
    plane.ensure_namespace(work::NAMESPACE)?;
    let place = Place { arguments: &arguments.common, plane: &plane, scratch, pods: arguments.many, proxy: None };
    let mut side = Side::new(name, &place)?;
    let measured = side.start(plane.api()).and_then(|()| {
        let mut work = Work::start(plane.api())?;
        sections::run(side.crew(), &mut work, arguments)
    });
    match measured {
        Ok(results) => side.stop().map(|()| results),
        Err(error) => Err(error).with_context(|| format!("{}\n{}", name.word(), side.log_ends())),
    }
}

/// Measures one side's rolling updates; called by [`crate::inside`].
pub(crate) fn run_rollouts(name: SideName, arguments: &RolloutArguments, scratch: &Path) -> anyhow::Result<Results> {
    netns::add_address(ADDRESS)?;
    let options = Options { address: ADDRESS, ..Options::default() };
    // A packet that has no route is refused before any rule sees it, and here is no default route as nodes have one.
    let way = ["route", "add", &options.service_range, "dev", "lo"];
    host::run(Command::new("ip").args(way))?;
    let mut plane = ControlPlane::start(&arguments.control_plane, &scratch.join("plane"), options)?;
    plane.run(Part::ControllerManager)?;
    plane.run(Part::Scheduler)?;
    plane.ensure_namespace(work::NAMESPACE)?;
    let proxy = Some(arguments.mode.as_str());
    let place = Place { arguments: &arguments.common, plane: &plane, scratch, pods: 0, proxy };
    let mut side = Side::new(name, &place)?;
    let measured = side.start(plane.api()).and_then(|()| rollout::measure(plane.api(), arguments));
    match measured {
        Ok(results) => side.stop().map(|()| results),
        Err(error) => Err(error).with_context(|| format!("{}\n{}", name.word(), side.log_ends())),
    }
}
