//! `orlop proxy`: the service proxy alone, beside any kubelet and in the place of upstream's kube-proxy.
//!
//! ```text
//! flags, --config ─► Settings ─► ApiSource (Services, EndpointSlices, ServiceCIDRs, the Node) ─► proxy::Proxy ─► kernel
//!                                                                                                  │
//!                             /healthz /livez · /metrics /proxyMode /configz … · proxy.sock ◄──────┘
//! ```
//!
//! Rules outlive the process: it may end at any time, and its successor takes them over.

mod daemon;
mod explain;
mod settings;
mod watched;

use std::process::ExitCode;

use anyhow::Context as _;
use proxy::Proxy;

pub(crate) use self::explain::path as explain_path;
use self::settings::Settings;
use crate::args::{Places, ProxyOptions};
use crate::cli::client::block_on;
use crate::cli::format::print;
use crate::node::lock::Lock;
use crate::node::logging;
use crate::node::process::threads;

/// Serves Services until it is asked to end, or does the one thing that a flag asks for.
pub(crate) fn run(places: &Places, options: &ProxyOptions) -> anyhow::Result<ExitCode> {
    if options.version {
        print(&format!("orlop {} (kube-proxy of Kubernetes 1.37)\n", env!("CARGO_PKG_VERSION")));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(service) = &options.explain {
        return block_on(explain::ask(places, service))?.map(|()| ExitCode::SUCCESS);
    }
    let settings = Settings::new(places, options)?;
    logging::start(settings.log_level);
    settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    if let Some(file) = &options.write_config_to {
        return write_config(&settings, file).map(|()| ExitCode::SUCCESS);
    }
    let _lock = Lock::take(&settings.lock_dir)?;
    if options.cleanup {
        return clean_up(&settings).map(|()| ExitCode::SUCCESS);
    }
    if options.init_only {
        proxy::sysctls::apply(&settings.configuration.conntrack, &proxy::sysctls::Places::default())?;
        return Ok(ExitCode::SUCCESS);
    }
    let threads = threads()?;
    let served = threads.block_on(daemon::serve(&settings));
    threads.shutdown_background();
    served.map(|()| ExitCode::SUCCESS)
}

fn clean_up(settings: &Settings) -> anyhow::Result<()> {
    let chain = |error: proxy::RulesError| format!("{:#}", anyhow::Error::from(error));
    Proxy::remove_all_modes(&settings.proxy()).map_err(|failures| {
        let failures: Vec<String> = failures.into_iter().map(chain).collect();
        anyhow::anyhow!("some rules are left: {}", failures.join("; "))
    })
}

fn write_config(settings: &Settings, file: &std::path::Path) -> anyhow::Result<()> {
    let document = proxy::configuration::document(&settings.written);
    let text = serde_saphyr::to_string(&document).context("write the configuration as YAML")?;
    std::fs::write(file, text).with_context(|| {
        format!("--write-config-to {} cannot be written; name a file in a directory that is there", file.display())
    })
}
