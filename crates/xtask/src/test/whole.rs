//! Whole runs in the machine, on control groups of version 2.
//!
//! ```text
//! test --only PART --vm ─► cache, host's programs, orlop, this program ─► jobs' disk ─► test --only PART --aboard
//! ```

use std::path::Path;

use anyhow::{Context as _, bail};
use testkit::go;

use super::Part;
use super::count::Count;
use crate::lab::vm::End;
use crate::lab::vm::aboard::{self, Baggage};

/// What a run takes along beside the example.
fn baggage(part: Part) -> anyhow::Result<Baggage> {
    let plane = |programs: &[&[go::Program]]| [&[go::CONTROL_PLANE], programs].concat().concat();
    let tools = vec!["openssl", "curl", "setpriv", "date", "unshare"];
    let mut baggage = match part {
        Part::Voyage | Part::Trials | Part::Faults => Baggage::default(),
        Part::Member | Part::Kubeadm | Part::Containerd => {
            let programs = plane(&[go::REFERENCE, &[go::DRA_TEST_DRIVER, go::METRICS_SERVER, go::KUBEADM]]);
            Baggage { programs, images: vec![crate::images::pause()?], tools, ..Baggage::default() }
        }
        Part::Restarts => Baggage { programs: plane(&[&[go::BRIDGE, go::HOST_LOCAL]]), tools, ..Baggage::default() },
        Part::Peer => {
            let images = vec![crate::images::pause()?];
            Baggage { programs: plane(&[&[go::KUBELET]]), images, tools, ..Baggage::default() }
        }
        Part::Crates | Part::Vm | Part::Proxy => bail!("{part:?} is no run of a whole node that goes with --vm"),
    };
    baggage.files.push(crate::workspace::root().join("examples"));
    baggage.images.extend([crate::images::ai_service()?, crate::images::busybox()?]);
    Ok(baggage)
}

/// Runs it and adds its points to `count`.
///
/// # Errors
/// A point does not hold, or there is no machine to be had.
pub(super) fn run(part: Part, orlop: &Path, count: &mut Count) -> anyhow::Result<()> {
    println!("{} in a virtual machine", part.name());
    let arguments = format!("test --only {}", part.name());
    let outcome = aboard::run(&part.name(), &arguments, orlop, baggage(part)?, |line| {
        if Count::total(line).is_none() {
            println!("vm: {line}");
        }
    })?;
    let total = outcome.output.iter().rev().find_map(|line| Count::total(line));
    if outcome.end != End::Code(0) {
        bail!("{} failed in the machine: {:?}", part.name(), outcome.end);
    }
    let total = total.context("it tells no count")?;
    println!("vm: {} ... {total} ({:.0} s)", part.name(), outcome.took.as_secs_f64());
    count.add(total);
    Ok(())
}
