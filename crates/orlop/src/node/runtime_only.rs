//! `orlop runtime`: the container runtime alone, for a node agent that is another program.

use std::process::ExitCode;

use super::base::{self, Base, Forked};
use super::process::{OPEN_FILES, Signals, open_files, seal, threads};
use super::settings::Settings;
use super::{format, logging, notify};
use crate::args::{NodeOptions, Places};
use crate::check;
use crate::cli::format::print;

/// Serves CRI until it is asked to end. What runs goes on, and the next runtime takes it over.
pub(crate) fn run(places: &Places, options: &NodeOptions) -> anyhow::Result<ExitCode> {
    seal()?;
    let settings = Settings::new(places, options)?;
    check::require(places)?;
    logging::start(options.log_level);
    let layout = &settings.layout;
    let _locks = format::take(layout)?;
    let forked = Forked::new()?;
    open_files(OPEN_FILES);
    let threads = threads()?;
    let served = threads.block_on(serve(&settings, forked));
    threads.shutdown_background();
    served.map(|()| ExitCode::SUCCESS)
}

async fn serve(settings: &Settings, forked: Forked) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let base = Base::start(settings, base::network_config(settings), forked.zygote).await?;
    print(&format!("orlop: CRI on unix://{}; Ctrl-C ends the runtime, pods go on\n", settings.cri_socket.display()));
    notify::ready();
    signals.next().await;
    base.stop().await;
    Ok(())
}
