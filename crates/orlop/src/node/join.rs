//! `orlop node`: the life of a member of a cluster, or of a node that has none.

use std::process::ExitCode;
use std::sync::Arc;

use super::base::Forked;
use super::lock::Lock;
use super::member::Member;
use super::process::{Signals, open_files, seal, threads};
use super::settings::MemberSettings;
use super::{api, format, logging, notify, socket};
use crate::args::{MemberOptions, Places};
use crate::check;
use crate::cli::format::print;

/// Is a node of the cluster until it is asked to end. Pods go on, and the next daemon takes them over.
pub(crate) fn run(places: &Places, options: &MemberOptions) -> anyhow::Result<ExitCode> {
    seal()?;
    let settings = MemberSettings::new(places, options)?;
    check::require(places)?;
    logging::start(options.log_level());
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let layout = &settings.node.layout;
    let _locks = format::take(layout)?;
    let _root = Lock::take_root(&layout.kubelet_root)?;
    let forked = Forked::new()?;
    open_files(settings.configuration.max_open_files);
    let threads = threads()?;
    let served = threads.block_on(serve(&settings, forked));
    threads.shutdown_background();
    served.map(|()| ExitCode::SUCCESS)
}

async fn serve(settings: &MemberSettings, forked: Forked) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let member = tokio::select! {
        started = start(settings, forked) => started?,
        () = signals.next() => return Ok(()),
    };
    let listener = socket::listen(&settings.node.layout.socket())?;
    let stopped = api::Node::agent(&*member).stopped();
    let server = tokio::spawn(api::serve(listener, member.clone(), stopped));
    tell_up(settings, &member);
    notify::ready();
    signals.next().await;
    member.stop().await;
    let _ = server.await; // A panic there has been told.
    Ok(())
}

async fn start(settings: &MemberSettings, forked: Forked) -> anyhow::Result<Arc<Member>> {
    match &settings.kubeconfig {
        Some(kubeconfig) => Member::start(settings, kubeconfig, forked).await,
        None => Member::start_standalone(settings, forked).await,
    }
}

fn tell_up(settings: &MemberSettings, member: &Arc<Member>) {
    let pods = api::Node::agent(&**member).store().pods().len();
    if settings.kubeconfig.is_none() {
        let text = "has no API server and runs its static pods; Ctrl-C ends the daemon, pods go on";
        print(&format!("orlop: node {} {text}\n", settings.name));
        return;
    }
    let services = if settings.proxy.is_some() { "served here" } else { "left to a kube-proxy (--proxy-kubeconfig)" };
    print(&format!(
        "orlop: node {} is a member with {pods} pod{}; Services are {services}; Ctrl-C ends the daemon, pods go on\n",
        settings.name,
        if pods == 1 { "" } else { "s" },
    ));
}
