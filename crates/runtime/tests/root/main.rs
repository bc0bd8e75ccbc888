//! Tests as root: real keepers, real overlay roots, the real bridge, in network and mount namespaces of their own.
//!
//! A plain program without the usual harness, as it must be able to be the unpacking child, the zygote, and a daemon that
//! is killed: arguments filter by name.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod adoption;
mod answers;
mod attacks;
mod crictl;
mod delegation;
mod events;
mod faults;
mod fixture;
mod floods;
mod handlers;
mod lifecycle;
mod modules;
mod networks;
mod plugins;
mod requests;
mod streams;
mod usage;

use std::process::ExitCode;

use testkit::serial::Test;

fn main() -> ExitCode {
    image::worker::maybe_run();
    if let Some(code) = handlers::maybe_be_a_runtime() {
        return code;
    }
    adoption::maybe_be_a_daemon();
    handlers::fetch();
    let missing = fixture::enter_private().err().map(|error| format!("root for private namespaces ({error})"));
    let all: Vec<Test> = [
        floods::FIRST,
        lifecycle::TESTS,
        events::TESTS,
        answers::TESTS,
        requests::TESTS,
        networks::TESTS,
        usage::TESTS,
        crictl::TESTS,
        streams::TESTS,
        handlers::TESTS,
        plugins::TESTS,
        faults::TESTS,
        floods::TESTS,
        attacks::TESTS,
        delegation::TESTS,
        adoption::TESTS,
        modules::TESTS,
    ]
    .concat();
    testkit::serial::main(&all, missing)
}
