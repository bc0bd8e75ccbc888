//! The life of the proxy alone.

use std::sync::Arc;

use anyhow::Context as _;
use cluster::api::{Api, ApiSource, ApiSourceConfig};
use cluster::{EventKind, Key, Source, event_about};
use instruments::Text;
use k8s_openapi::api::core::v1::Node;
use proxy::{ListenError, Proxy, Telling};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::explain;
use super::settings::Settings;
use super::watched::Watched;
use crate::cli::format::print;
use crate::node::process::Signals;
use crate::node::{client_metrics, socket};

/// As upstream's events name themselves.
const COMPONENT: &str = "kube-proxy";
/// Freed heap is given back when nothing has changed for so long.
const QUIET: std::time::Duration = std::time::Duration::from_secs(5);

/// Serves until it is asked to end, its configuration changes, or an address cannot be had that it must have.
pub(super) async fn serve(settings: &Settings) -> anyhow::Result<()> {
    let configuration = &settings.configuration;
    let mut signals = Signals::new()?;
    let mut watched = settings.file.as_deref().map(Watched::new).transpose()?;
    set_process(settings)?;
    let api = Api::new(settings.api()?)?;
    let source = follow(settings, api.clone())?;
    let proxy = Proxy::start(settings.proxy(), source.clone())?;
    let mut servers: JoinSet<Result<(), ListenError>> = JoinSet::new();
    let telling = telling(settings, &proxy, source.clone(), api);
    let hard = configuration.bind_address_hard_fail;
    if let Some(address) = configuration.healthz {
        servers.spawn(telling.clone().serve_healthz(address, hard));
    }
    if let Some(address) = configuration.metrics {
        servers.spawn(telling.clone().serve_metrics(address, hard));
    }
    let listener = socket::listen(&settings.socket())?;
    let (questions, mut others) = (proxy.questions(), JoinSet::new());
    others.spawn(explain::serve(listener, questions));
    others.spawn(be_thrifty(source.store().changes()));
    let mut is_told = false;
    let ended = loop {
        tokio::select! {
            () = proxy.settled(), if !is_told => {
                is_told = true;
                tell_started(settings, &*source);
            }
            () = signals.next() => break Ok(()),
            changed = changed(&mut watched) => break Err(changed),
            Some(served) = servers.join_next() => match served {
                Ok(Err(error)) => break Err(tell_not_heard(settings, &*source, error)),
                Ok(Ok(())) => {}
                Err(error) => break Err(error).context("a server ended"),
            },
        }
    };
    servers.shutdown().await;
    others.shutdown().await;
    proxy.stop().await;
    ended
}

/// What concerns this process and the kernel at large.
fn set_process(settings: &Settings) -> anyhow::Result<()> {
    let score = settings.configuration.oom_score_adj;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::warn!(%error, score, "oomScoreAdj cannot be set; it needs CAP_SYS_RESOURCE");
    }
    proxy::sysctls::apply(&settings.configuration.conntrack, &proxy::sysctls::Places::default())?;
    Ok(())
}

fn follow(settings: &Settings, api: Api) -> anyhow::Result<Arc<ApiSource>> {
    Ok(ApiSource::start(ApiSourceConfig {
        node_name: settings.name.clone(),
        kubelet: None,
        proxy: Some(api),
        event_rate: None,
        sealed: None,
        static_pods: None,
        static_pods_url: None,
    })?)
}

fn telling(settings: &Settings, proxy: &Proxy, source: Arc<ApiSource>, api: Api) -> Telling {
    Telling {
        node_name: settings.name.clone(),
        store: source.store().clone(),
        mode: settings.configuration.mode,
        health: proxy.health(),
        metrics: proxy.metrics(),
        questions: proxy.questions(),
        configuration: Arc::new(proxy::configuration::document(&settings.written)),
        flags: Arc::new(settings.flags.clone()),
        more: Some(Arc::new(move |text: &mut Text| client_metrics::write(text, &api))),
    }
}

fn tell_started(settings: &Settings, source: &dyn Source) {
    let Settings { name, configuration, .. } = settings;
    source.event(event_about(&node(settings, source), EventKind::Normal, "Starting", "", COMPONENT));
    print(&format!(
        "orlop: Services are served on node {name} ({}); Ctrl-C ends the proxy, the rules stay\n",
        configuration.mode
    ));
}

fn tell_not_heard(settings: &Settings, source: &dyn Source, error: ListenError) -> anyhow::Error {
    let reason = match error.field {
        "healthzBindAddress" => "FailedToStartProxierHealthcheck",
        _ => "FailedToStartMetricServer",
    };
    source.event(event_about(&node(settings, source), EventKind::Warning, reason, error.to_string(), COMPONENT));
    error.into()
}

/// The Node that events are about; by its name alone while nobody knows it.
fn node(settings: &Settings, source: &dyn Source) -> Node {
    let known = source.store().nodes().get(&Key::cluster(&settings.name));
    known.map_or_else(
        || {
            let mut node = Node::default();
            node.metadata.name = Some(settings.name.clone());
            node
        },
        |node| Node::clone(&node),
    )
}

async fn changed(watched: &mut Option<Watched>) -> anyhow::Error {
    match watched {
        Some(watched) => watched.changed().await,
        None => std::future::pending().await,
    }
}

/// Gives back to the kernel what reading all objects has left of the heap.
async fn be_thrifty(mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        while let Ok(Ok(())) = tokio::time::timeout(QUIET, changes.changed()).await {}
        // A panic there would have told of itself.
        let _ = tokio::task::spawn_blocking(sys::fork::trim_heap).await;
    }
}
