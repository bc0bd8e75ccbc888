//! Benchmarks of a container runtime over its CRI socket: orlop and the reference on the same work, in turn.
//! `cargo xtask bench` builds what is needed and starts this program, which is built with optimisation so that the client
//! is not what is measured.
//!
//! ```text
//! outside ─ unshare ─ sh (first process, reaps) ─ inside ─┬─ registry
//!    │                                                    └─ daemon ─ shims or keepers ─ containers
//!    └─ removes the control groups, sums up, prints
//! ```
//!
//! Each run has process, mount and network namespaces of its own: whatever happens, nothing of it outlives it.
#![allow(clippy::print_stdout, reason = "a command line speaks on stdout")]
#![allow(clippy::disallowed_methods, reason = "a developer tool starts the programs that it measures")]

mod arguments;
mod inside;
mod measure;
mod outside;
mod processes;
mod report;
mod sections;
mod side;
mod work;

use clap::Parser as _;

use arguments::Arguments;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match &arguments.inside {
        Some(scratch) => inside::run(&arguments, scratch),
        None => outside::run(&arguments),
    }
}
