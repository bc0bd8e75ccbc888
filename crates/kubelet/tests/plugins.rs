//! Plugins that come, hang, are replaced and go, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kubelet::plugins::{Handler, Plugin, Refusal, Registry};
use testkit::plugins::Registrar;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// For what comes within milliseconds on a machine at rest.
const LIMIT: Duration = Duration::from_secs(60);

/// Tells what it hears; refuses who is called `unwanted`.
struct Told(UnboundedSender<(&'static str, Plugin)>);

#[async_trait]
impl Handler for Told {
    fn kind(&self) -> &'static str {
        "TestPlugin"
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        self.0.send(("came", plugin.clone())).unwrap();
        if plugin.name == "unwanted" { Err(Refusal("it is not wanted".to_owned())) } else { Ok(()) }
    }

    async fn deregister(&self, plugin: &Plugin) {
        self.0.send(("went", plugin.clone())).unwrap();
    }
}

struct Fixture {
    scratch: tempfile::TempDir,
    _registry: Registry,
    heard: UnboundedReceiver<(&'static str, Plugin)>,
}

impl Fixture {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (tell, heard) = unbounded_channel();
        let registry = Registry::start(&scratch.path().join("registry"), vec![Arc::new(Told(tell))]).unwrap();
        Self { scratch, _registry: registry, heard }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.scratch.path().join("registry").join(name)
    }

    async fn next(&mut self) -> (&'static str, String) {
        let (what, plugin) = tokio::time::timeout(LIMIT, self.heard.recv()).await.unwrap().unwrap();
        (what, plugin.name)
    }
}

fn plugin(name: &str) -> Registrar {
    Registrar::new("TestPlugin", name, std::path::Path::new("/run/endpoint.sock"), &["v1"])
}

async fn is_told(registrar: &Registrar, accepted: bool, error: &str) {
    let mut told = registrar.told();
    let told = tokio::time::timeout(LIMIT, told.wait_for(|told| !told.is_empty())).await.unwrap().unwrap();
    let last = told.last().unwrap();
    assert_eq!((last.plugin_registered, last.error.contains(error)), (accepted, true), "{last:?}");
}

#[tokio::test]
async fn a_plugin_comes_is_replaced_and_goes() {
    let mut fixture = Fixture::new();
    let (first, second) = (plugin("a"), plugin("a"));
    // In a directory that is made later than the registry began.
    let socket = fixture.socket("below/a.sock");
    let server = first.serve(&socket).unwrap();
    assert_eq!(fixture.next().await, ("came", "a".to_owned()));
    is_told(&first, true, "").await;
    // As after kill -9: the file stays, and the next one replaces it.
    server.kill();
    let server = second.serve(&socket).unwrap();
    assert_eq!(fixture.next().await, ("came", "a".to_owned()), "the same plugin is taken anew");
    is_told(&second, true, "").await;
    // Another plugin on the same socket.
    server.kill();
    let server = plugin("b").serve(&socket).unwrap();
    assert_eq!(fixture.next().await, ("went", "a".to_owned()));
    assert_eq!(fixture.next().await, ("came", "b".to_owned()));
    drop(server);
    assert_eq!(fixture.next().await, ("went", "b".to_owned()));
}

#[tokio::test]
async fn one_that_hangs_holds_nobody_up() {
    let mut fixture = Fixture::new();
    let hung = plugin("hung");
    hung.hang(true);
    let server = hung.serve(&fixture.socket("hung.sock")).unwrap();
    let _other = plugin("other").serve(&fixture.socket("other.sock")).unwrap();
    assert_eq!(fixture.next().await, ("came", "other".to_owned()));
    // It comes back as a new process.
    server.kill();
    let _healed = plugin("healed").serve(&fixture.socket("hung.sock")).unwrap();
    assert_eq!(fixture.next().await, ("came", "healed".to_owned()));
}

#[tokio::test]
async fn who_is_refused_hears_why() {
    let mut fixture = Fixture::new();
    let (unwanted, unknown) = (plugin("unwanted"), Registrar::new("OddPlugin", "odd", "/x".as_ref(), &[]));
    let _servers = [
        unwanted.serve(&fixture.socket("unwanted.sock")).unwrap(),
        unknown.serve(&fixture.socket("odd.sock")).unwrap(),
    ];
    assert_eq!(fixture.next().await, ("came", "unwanted".to_owned()));
    is_told(&unwanted, false, "it is not wanted").await;
    is_told(&unknown, false, "no plugins of type \"OddPlugin\"").await;
}
