//! Developer commands: demo, test, check, bench, conformance, fuzz, lab, codegen, past.
#![allow(clippy::print_stdout, reason = "a command line speaks on stdout")]
#![allow(clippy::disallowed_methods, reason = "a developer tool starts compilers and test programs")]

mod bench;
mod check;
mod codegen;
mod conformance;
mod demo;
mod fuzz;
mod images;
mod lab;
mod member;
mod past;
mod test;
mod tidy;
mod voyage;
mod workspace;

use clap::{Parser, Subcommand};

/// Developer commands of orlop.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Set up everything and run `orlop up examples/ai-service` (root).
    Demo(demo::Options),
    /// All tests: unit, root and the whole voyage (root).
    Test(test::Options),
    /// Measure orlop and the reference (containerd, runc, CNI plugins) side by side (root).
    Bench(bench::Options),
    /// Published suites of others against a node of orlop (root).
    #[command(subcommand)]
    Conformance(conformance::Conformance),
    /// Feed a parser with damaged input for a while.
    Fuzz(fuzz::Options),
    /// What must hold before a commit: format, lints, dependency direction.
    Check(check::Options),
    /// Build and enter labs.
    #[command(subcommand)]
    Lab(lab::Lab),
    /// Generate the committed protobuf messages.
    Codegen,
    /// Write down what this version leaves on disk, once for a release: tests of later ones read it (root).
    Past(past::Options),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Conformance(suite) => conformance::run(&suite),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Check(options) => check::run_command(&options),
        Command::Lab(lab) => lab::run(&lab),
        Command::Codegen => codegen::run(),
        Command::Past(options) => past::run(&options),
    }
}
