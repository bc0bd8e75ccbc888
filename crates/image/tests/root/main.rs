//! Tests as root: real registries on loopback in a network namespace of their own, real files, real mounts.
//!
//! A plain program without the usual harness, as it must be able to be the unpacking child: arguments filter by name.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod fixture;
mod loads;
mod pulls;

use std::process::ExitCode;

use testkit::serial::Test;

fn main() -> ExitCode {
    image::worker::maybe_run();
    let missing = testkit::netns::enter_private().err().map(|error| format!("root for a private network ({error:#})"));
    let all: Vec<Test> = [loads::TESTS, pulls::TESTS].concat();
    testkit::serial::main(&all, missing)
}
