//! The life of a node: checks, forks, threads, and the way back.
//!
//! ```text
//! sealed program ─► settings ─► locks ─► zygote, name server (forked before any thread) ─► tokio ─► Alone ─► Ctrl-C or `down` ─► end
//! ```

use std::process::ExitCode;

use anyhow::bail;
use clap::Parser as _;

use super::alone::Alone;
use super::base::Forked;
use super::detach::{self, Waiter};
use super::lock::Lock;
use super::process::{OPEN_FILES, Signals, open_files, seal, threads};
use super::settings::UpSettings;
use super::{api, format, logging, notices};
use crate::args::{Arguments, Command, Places, UpOptions};
use crate::check;
use crate::cli::format::print;

/// `orlop up`.
pub(crate) fn run(places: &Places, options: &UpOptions) -> anyhow::Result<ExitCode> {
    seal()?;
    let settings = UpSettings::new(places, options)?;
    check::require(places)?;
    if options.detach {
        if Lock::is_taken(&settings.node.layout.state_dir) {
            Lock::take(&settings.node.layout.state_dir)?;
        }
        return detach::run(&settings.node.layout.log_file());
    }
    live(&settings, options, &mut Waiter::default())?;
    Ok(ExitCode::SUCCESS)
}

/// The forked node of `--detach`: the command line says what to run.
pub(super) fn detached(waiter: &mut Waiter) -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let Command::Up(options) = arguments.command else { bail!("only `up` can be detached") };
    let settings = UpSettings::new(&arguments.places, &options)?;
    live(&settings, &options, waiter)
}

/// From the locks to the last file.
fn live(settings: &UpSettings, options: &UpOptions, waiter: &mut Waiter) -> anyhow::Result<()> {
    logging::start(options.node.log_level);
    let layout = &settings.node.layout;
    let _locks = format::take(layout)?;
    let forked = Forked::new()?;
    open_files(OPEN_FILES);
    let threads = threads()?;
    let outcome = threads.block_on(serve(settings, options, forked, waiter));
    // A path that hangs for ever must not keep the node from ending.
    threads.shutdown_background();
    outcome
}

async fn serve(settings: &UpSettings, options: &UpOptions, forked: Forked, waiter: &mut Waiter) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let running = Alone::start(settings, forked).await?;
    let listener = super::socket::listen(&settings.node.layout.socket())?;
    let server = tokio::spawn(api::serve(listener, running.clone(), running.agent.stopped()));
    let printer = (!options.detach).then(|| tokio::spawn(notices::run(running.agent.store().clone())));
    tell_up(settings, &running, options);
    waiter.up();
    tokio::select! {
        () = signals.next() => {}
        () = running.agent.asked_to_end() => {}
    }
    let ended = end(&running, &mut signals).await;
    let _ = server.await; // A panic there has been told.
    if let Some(printer) = printer {
        printer.abort();
    }
    if ended.is_ok() {
        super::socket::remove_run_dir(&settings.node.layout.run_dir);
    }
    ended
}

/// Ends all pods. A second signal gives them no more time, a third leaves those that hang to the next node.
async fn end(running: &Alone, signals: &mut Signals) -> anyhow::Result<()> {
    let hurry = async {
        signals.next().await;
        running.hurry().await;
        signals.next().await;
    };
    tokio::select! {
        ended = running.end() => ended,
        () = hurry => {
            running.agent.stop().await;
            bail!("left running: {}; `orlop up` takes them over again", running.agent.pod_names().join(", "))
        }
    }
}

fn tell_up(settings: &UpSettings, running: &Alone, options: &UpOptions) {
    let pods = running.agent.store().pods().len();
    let until = if options.detach { "`orlop down`" } else { "Ctrl-C" };
    print(&format!(
        "orlop: node {} is up with {pods} pod{}; services in {}, DNS {}; {until} ends it\n",
        settings.name,
        if pods == 1 { "" } else { "s" },
        settings.services,
        settings.dns,
    ));
}
