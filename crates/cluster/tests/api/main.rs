//! The client and the source against a real kube-apiserver, as root in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test program")]

mod client;
mod etcd;
mod following;
mod lab;
mod rough;
mod scale;
mod sealed;
mod source;
mod statics;
mod storm;

use std::process::ExitCode;

use testkit::serial::{self, Test};
use testkit::{control_plane, netns};

const TESTS: &[&[Test]] = &[
    client::TESTS,
    following::TESTS,
    source::TESTS,
    rough::TESTS,
    sealed::TESTS,
    statics::TESTS,
    scale::TESTS,
    storm::TESTS,
];

fn main() -> ExitCode {
    // Built, or found in the cache, before the way to the module proxy is gone.
    let missing = control_plane::build().err().map(|error| format!("go and the module proxy ({error:#})"));
    let missing = missing.or_else(|| {
        let entered = netns::enter_private();
        entered.err().map(|error| format!("root for a private network ({error:#})"))
    });
    serial::main(&TESTS.concat(), missing)
}
