//! What the operator wrote, checked.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use cluster::api::{Identity, Rate, Server, Trust};
use proxy::configuration::{self, Configuration};
use serde_json::Value;

use crate::args::{Places, ProxyOptions, level_of};
use crate::node::layout::Layout;
use crate::node::settings::host_name;

/// A proxy to run, as the operator wants it.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) configuration: Configuration,
    /// Everything that was written, for `/configz`.
    pub(super) written: Value,
    /// What of it has no effect.
    pub(super) warnings: Vec<String>,
    /// The node's name.
    pub(super) name: String,
    pub(super) log_level: tracing::Level,
    /// One proxy per directory: two would write the same table.
    pub(super) lock_dir: PathBuf,
    /// The configuration's file.
    pub(super) file: Option<PathBuf>,
    /// The flags that were given, for `/flagz`.
    pub(super) flags: Vec<(String, String)>,
    socket: PathBuf,
    /// The nftables table.
    table: String,
    master: Option<String>,
}

impl Settings {
    pub(super) fn new(places: &Places, options: &ProxyOptions) -> anyhow::Result<Self> {
        let sources = configuration::Sources {
            file: options.config.clone().map(|file| ("--config", file)),
            flags: flags(options),
            hostname: options.hostname_override.clone(),
        };
        let loaded = configuration::load(&sources);
        let loaded = loaded.map_err(|faults| anyhow!("{}", faults.0.join("\norlop: ")))?;
        let configuration = loaded.configuration;
        let written = Some(configuration.verbosity).filter(|number| *number > 0);
        let layout = Layout::new(places);
        Ok(Self {
            name: configuration.hostname_override.clone().unwrap_or_else(host_name),
            log_level: options.verbosity.or(written).map_or(options.log_level, level_of),
            lock_dir: layout.proxy(),
            socket: layout.proxy_socket(),
            file: options.config.clone(),
            flags: sources.flags,
            table: layout.service_table,
            master: options.master.clone(),
            written: loaded.written,
            warnings: loaded.warnings,
            configuration,
        })
    }

    /// Where the proxy answers the local command line.
    pub(super) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// How to reach the API server.
    pub(super) fn api(&self) -> anyhow::Result<cluster::api::Config> {
        let (per_second, burst) = self.configuration.rate;
        let mut config = match (&self.configuration.kubeconfig, &self.master) {
            (Some(path), _) => {
                let named = if self.file.is_some() { "clientConnection.kubeconfig" } else { "--kubeconfig" };
                cluster::api::Config::from_kubeconfig(path)
                    // It names its cause itself.
                    .map_err(|error| anyhow!("{named} {}: {error}", path.display()))?
            }
            (None, None) => cluster::api::Config::in_cluster()?,
            (None, Some(url)) => cluster::api::Config::new(server(url)?, Trust::Host, Identity::default()),
        };
        if let Some(url) = &self.master {
            config.server = server(url)?;
        }
        // A rate below zero is upstream's word for no limit.
        config.rate = (per_second > 0.0).then_some(Rate { per_second, burst });
        Ok(config)
    }

    /// What the proxy is told.
    pub(super) fn proxy(&self) -> proxy::Config {
        let table = self.table.clone();
        proxy::Config { table, ..proxy::Config::configured(&self.name, &self.configuration) }
    }
}

fn server(url: &str) -> anyhow::Result<Server> {
    match Server::parse(url) {
        Ok(server) => Ok(server),
        Err(fault) => bail!("--master {fault}"),
    }
}

/// The flags for fields, and the old ones for ports.
fn flags(options: &ProxyOptions) -> Vec<(String, String)> {
    let mut flags = options.configuration.given.clone();
    let old = [
        ("healthz-bind-address", options.healthz_port, "0.0.0.0"),
        ("metrics-bind-address", options.metrics_port, "127.0.0.1"),
    ];
    for (flag, port, address) in old {
        let given = flags.iter().any(|(name, _)| name == flag);
        if let Some(port) = port.filter(|port| *port == 0 || !given) {
            flags.retain(|(name, _)| name != flag);
            flags.push((flag.to_owned(), format!("{address}:{port}")));
        }
    }
    flags
}
