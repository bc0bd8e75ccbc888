//! Benchmarks of container runtimes over their CRI sockets, and of nodes and service proxies under an API server: orlop and
//! the reference on the same work, in turn.
//! `cargo xtask bench` builds what is needed and starts this program, which is built with optimisation so that the client
//! is not what is measured.
//!
//! ```text
//! outside ─ unshare ─ sh (first process, reaps) ─ inside ─┬─ registry
//!    │                                                    ├─ etcd and API server, if nodes or proxies are measured
//!    │                                                    └─ daemons ─ shims or keepers ─ containers
//!    └─ removes the control groups, sums up, prints
//! ```
//!
//! Each run has process, mount and network namespaces of its own: whatever happens, nothing of it outlives it.
#![allow(clippy::print_stdout, reason = "a command line speaks on stdout")]
#![allow(clippy::disallowed_methods, reason = "a developer tool starts the programs that it measures")]

mod arguments;
mod inside;
mod measure;
mod node;
mod outside;
mod processes;
mod proxy;
mod report;
mod runtime;
mod serve;

use clap::Parser as _;

use arguments::Arguments;

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    if words.next().is_some_and(|word| word == serve::WORD) {
        return serve::run(&words.next().unwrap_or_default());
    }
    let arguments = Arguments::parse();
    match &arguments.common().inside {
        Some(scratch) => inside::run(&arguments, scratch),
        None => outside::run(&arguments),
    }
}
