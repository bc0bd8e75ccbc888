//! Tests as root: real registries on loopback in a network namespace of their own, real files, real mounts.
//!
//! A plain program without the usual harness, as it must be able to be the unpacking child: arguments filter by name.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod attacks;
mod faults;
mod fixture;
mod hosts;
mod loads;
mod logins;
mod malicious;
mod pulls;
mod stores;

use std::process::ExitCode;

use testkit::serial::Test;

fn main() -> ExitCode {
    image::worker::maybe_run();
    if let Some(code) = stores::maybe_run_daemon() {
        return code;
    }
    let missing = testkit::netns::enter_private().err().map(|error| format!("root for a private network ({error:#})"));
    let all: Vec<Test> = [
        attacks::TESTS,
        faults::TESTS,
        hosts::TESTS,
        loads::TESTS,
        logins::TESTS,
        malicious::TESTS,
        pulls::TESTS,
        stores::TESTS,
    ]
    .concat();
    testkit::serial::main(&all, missing)
}
