//! The program: argv, configuration, wiring and the local command line.

mod args;
mod check;
mod cli;
mod node;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use args::{Arguments, Command};
use cli::client::Client;

/// Exit code for a command that failed; usage errors end with 2 (clap's own).
const FAILED: u8 = 1;

fn main() -> ExitCode {
    // An unpacking child is this program too; it must not get further than here.
    image::worker::maybe_run();
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("orlop: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "orlop", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(options) => check::run(&arguments.places, &options),
        Command::Up(options) => node::up::run(&arguments.places, &options),
        Command::Node(options) => node::join::run(&arguments.places, &options),
        Command::Runtime(options) => node::runtime_only::run(&arguments.places, &options),
        Command::Fsck(options) => cli::fsck::run(&arguments.places, &options),
        command => {
            let client = Client::new(arguments.places.socket());
            cli::client::block_on(ask(&client, command))?
        }
    }
}

/// The commands that ask a running node.
async fn ask(client: &Client, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ps(options) => cli::ps::run(client, &options).await?,
        Command::Logs(options) => cli::logs::run(client, &options).await?,
        Command::Exec(options) => return cli::streams::exec(client, &options).await,
        Command::Attach(options) => return cli::streams::attach(client, &options).await,
        Command::Cp(options) => cli::streams::cp(client, &options).await?,
        Command::PortForward(options) => cli::streams::port_forward(client, &options).await?,
        Command::Get(options) => cli::get::run(client, &options).await?,
        Command::Describe(options) => cli::describe::run(client, &options).await?,
        Command::Events(options) => cli::events::run(client, &options).await?,
        Command::Top(options) => cli::top::run(client, &options).await?,
        Command::Why(options) => cli::why::run(client, &options).await?,
        Command::Images(options) => cli::images::list(client, &options).await?,
        Command::Pull(options) => cli::images::pull(client, &options.image).await?,
        Command::Load { path } => cli::images::load(client, &path).await?,
        Command::Rmi(options) => cli::images::remove(client, &options.image).await?,
        Command::Version(options) => cli::version::run(client, &options).await?,
        Command::Down => cli::down::run(client).await?,
        Command::Up(_)
        | Command::Node(_)
        | Command::Runtime(_)
        | Command::Fsck(_)
        | Command::Check(_)
        | Command::Completion { .. } => {
            anyhow::bail!("not a question to a running node")
        }
    }
    Ok(ExitCode::SUCCESS)
}
