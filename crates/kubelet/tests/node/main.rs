//! The kubelet over the real runtime: real sandboxes, containers, images and volumes, in network and mount namespaces of
//! their own. Only who wants the pods is the test itself.
//!
//! A plain program without the usual harness, as it must be able to be the unpacking child and the zygote: arguments
//! filter by name.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod changes;
mod claims;
mod cpus;
mod credentials;
mod csi;
mod desk;
mod devices;
mod endings;
mod eviction;
mod fixture;
mod health;
mod hugepages;
mod images;
mod metrics;
mod pods_api;
mod preemption;
mod shutdown;
mod sources;
mod swap;
mod systemd;
mod workers;

use std::process::ExitCode;

use testkit::serial::Test;

fn main() -> ExitCode {
    image::worker::maybe_run();
    let missing = fixture::enter_private().err().map(|error| format!("root for private namespaces ({error})"));
    let all = [
        changes::TESTS,
        credentials::TESTS,
        workers::TESTS,
        endings::TESTS,
        eviction::TESTS,
        health::TESTS,
        hugepages::TESTS,
        images::TESTS,
        metrics::TESTS,
        pods_api::TESTS,
        preemption::TESTS,
        shutdown::TESTS,
        sources::TESTS,
        swap::TESTS,
        devices::TESTS,
        claims::TESTS,
        cpus::TESTS,
        csi::TESTS,
    ];
    let all: Vec<Test> = all.concat();
    testkit::serial::main(&all, missing)
}
