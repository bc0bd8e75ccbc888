//! `orlop proxy`: the service proxy alone, beside any kubelet and in the place of upstream's kube-proxy.
//!
//! ```text
//! flags, --config ─► Settings ─► ApiSource (Services, EndpointSlices, ServiceCIDRs, the Node) ─► proxy::Proxy ─► kernel
//! ```
//!
//! Rules outlive the process: it may end at any time, and its successor takes them over.

mod settings;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use cluster::Source;
use cluster::api::{Api, ApiSource, ApiSourceConfig};
use proxy::Proxy;

use self::settings::Settings;
use crate::args::{Places, ProxyOptions};
use crate::cli::format::print;
use crate::node::lock::Lock;
use crate::node::logging;
use crate::node::process::{Signals, threads};

/// Serves Services until it is asked to end, or does the one thing that a flag asks for.
pub(crate) fn run(places: &Places, options: &ProxyOptions) -> anyhow::Result<ExitCode> {
    if options.version {
        print(&format!("orlop {} (kube-proxy of Kubernetes 1.37)\n", env!("CARGO_PKG_VERSION")));
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::new(places, options)?;
    logging::start(settings.log_level);
    settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    if let Some(file) = &options.write_config_to {
        return write_config(&settings, file).map(|()| ExitCode::SUCCESS);
    }
    let _lock = Lock::take(&settings.lock_dir)?;
    let threads = threads()?;
    let served = threads.block_on(serve(&settings));
    threads.shutdown_background();
    served.map(|()| ExitCode::SUCCESS)
}

async fn serve(settings: &Settings) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let source = follow(settings)?;
    let proxy = Proxy::start(settings.proxy(), source)?;
    tokio::select! {
        () = proxy.settled() => print(&format!(
            "orlop: Services are served on node {} ({}); Ctrl-C ends the proxy, the rules stay\n",
            settings.name, settings.configuration.mode
        )),
        () = signals.next() => return Ok(()),
    }
    signals.next().await;
    proxy.stop().await;
    Ok(())
}

fn follow(settings: &Settings) -> anyhow::Result<Arc<dyn Source>> {
    let api = Api::new(settings.api()?)?;
    let source = ApiSource::start(ApiSourceConfig {
        node_name: settings.name.clone(),
        kubelet: None,
        proxy: Some(api),
        event_rate: None,
        sealed: None,
        static_pods: None,
        static_pods_url: None,
    })?;
    Ok(source)
}

fn write_config(settings: &Settings, file: &std::path::Path) -> anyhow::Result<()> {
    let document = proxy::configuration::document(&settings.written);
    let text = serde_saphyr::to_string(&document).context("write the configuration as YAML")?;
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
