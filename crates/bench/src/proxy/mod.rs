//! Service proxies before the objects of a real API server, each on a node of its own.
//!
//! ```text
//! world ── Services, EndpointSlices ──► API server ◄── proxy on the node ── rules ──┐
//!   ▲                                                                               ▼
//!   └── created, deleted ─────── probes: pod client ── Service ────────────────► pods a, b, c
//! ```

mod contestant;
mod probes;
mod sections;
mod world;

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::control_plane::{ControlPlane, Options};
use testkit::netns;
use testkit::service_lab::API_ADDRESS;

use crate::arguments::{ProxyArguments, ProxyMode, SideName};
use crate::measure::{Outcome, Results};

use contestant::Start;
use sections::Sections;
use world::World;

/// A proxy that carries each connection itself is for few Services.
const USERSPACE_MAX: u32 = 1000;
/// How long the kernel may take to tidy up a namespace of many rules.
const TIDY_LIMIT: Duration = Duration::from_secs(120);

/// Measures one side in all modes; called by [`crate::inside`].
pub(crate) fn run(name: SideName, arguments: &ProxyArguments, scratch: &Path) -> anyhow::Result<Outcome> {
    let ProxyArguments { services, endpoints, mode: modes, .. } = arguments;
    let is_small = *services <= USERSPACE_MAX || !modes.contains(&ProxyMode::Userspace);
    ensure!(is_small, "the mode userspace is measured with at most {USERSPACE_MAX} Services (--services)");
    netns::add_address(API_ADDRESS.into())?;
    let options = Options {
        address: IpAddr::V4(API_ADDRESS),
        service_range: world::SERVICE_RANGE.to_owned(),
        ..Options::default()
    };
    let plane = ControlPlane::start(&arguments.control_plane, &scratch.join("plane"), options)?;
    let world = World { services: *services, endpoints: *endpoints };
    let begun = Instant::now();
    world.write(plane.api())?;
    eprintln!("  {services} Services with {endpoints} endpoints each were written in {:.0?}", begun.elapsed());
    let mut outcome = Outcome::default();
    for mode in modes.iter().copied().filter(|mode| is_played(name, *mode)) {
        eprintln!("  {}", mode.word());
        let mut results = Results::default();
        let start = Start { name, mode, common: &arguments.common, plane: &plane, scratch };
        let mut sections = Sections { world: &world, api: plane.api(), arguments, results: &mut results };
        if let Err(error) = sections.run(&start) {
            outcome.faults.push(format!("{}, {}: {error:#}", name.word(), mode.word()));
        }
        outcome.tables.insert(format!("{}: {services} Services × {endpoints} endpoints", mode.word()), results);
        until_tidy();
    }
    Ok(outcome)
}

/// Upstream's has no such mode any more.
fn is_played(name: SideName, mode: ProxyMode) -> bool {
    (name, mode) != (SideName::Reference, ProxyMode::Userspace)
}

/// Waits until the kernel has ended the node before: rules of a namespace go before its links, and one end of a link is here.
fn until_tidy() {
    let deadline = Instant::now() + TIDY_LIMIT;
    let has_links = || {
        let links = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
        links.lines().any(|line| line.trim_start().starts_with("api"))
    };
    while has_links() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50)); // far from what is measured, and not worth a netlink socket
    }
}
