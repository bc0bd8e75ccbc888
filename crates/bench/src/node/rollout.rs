//! A Deployment that is updated while clients ask its Service.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use testkit::api::Api;
use testkit::image::{Builder, Layout};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::arguments::RolloutArguments;
use crate::measure::{Measure, Results};
use crate::serve;

use super::work::NAMESPACE;

/// The image with the server.
pub(crate) const IMAGE: &str = "docker.io/library/server:latest";

const REPLICAS: u32 = 3;
const PORT: u16 = 8080;
/// The longest that anything may take.
const LIMIT: Duration = Duration::from_secs(300);
/// How long a client waits for its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients ask before an update and after it.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(3);

/// Makes the image: this program, and nothing else.
pub(crate) fn image(dir: &Path) -> anyhow::Result<Layout> {
    let mut builder = Builder::new(dir)?;
    let program = std::env::current_exe()?;
    builder.layer(|tar| {
        // containerd takes no sparse files.
        tar.sparse(false);
        Ok(tar.append_path_with_name(program, "server")?)
    })?;
    builder.finish(json!({ "Entrypoint": ["/server", serve::WORD, PORT.to_string()] }))
}

/// Updates the Deployment as often as wanted.
pub(super) fn measure(api: &Api, arguments: &RolloutArguments) -> anyhow::Result<Results> {
    let to = deploy(api)?;
    let clients = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    clients.block_on(async {
        let begun = Instant::now();
        while let Err(error) = ask(to).await {
            anyhow::ensure!(begun.elapsed() < LIMIT, "the Service does not answer: {error}");
            tokio::time::sleep(Duration::from_millis(20)).await; // rules have no event for who is outside of the proxy
        }
        Ok(())
    })?;
    let (mut results, mut all) = (Results::default(), Tally::default());
    for number in 1..=arguments.rollouts {
        let (end, ended) = watch::channel(());
        let asking = clients.spawn(load(to, arguments.rate, ended));
        std::thread::sleep(BEFORE);
        let begun = Instant::now();
        update(api, number)?;
        results.add(Measure::RolloutTime, begun.elapsed().as_secs_f64());
        std::thread::sleep(AFTER);
        drop(end);
        let tally = clients.block_on(asking).context("the clients panicked")?;
        eprintln!("    update {number}: {} requests, {} failed{}", tally.asked, tally.failed(), tally.reasons());
        all.add(tally);
    }
    results.add(Measure::Requests, f64::from(all.asked));
    results.add(Measure::FailedRequests, f64::from(all.failed()));
    all.times.sort_unstable();
    if let Some(took) = all.times.get(all.times.len() * 99 / 100) {
        results.add_ms(Measure::RequestTime, *took);
    }
    Ok(results)
}

/// Creates the Deployment and its Service, waits until all pods are Ready, and returns where the Service is.
fn deploy(api: &Api) -> anyhow::Result<SocketAddr> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": PORT }] },
    });
    let service = api.create(&format!("/api/v1/namespaces/{NAMESPACE}/services"), &service)?;
    let address = service["spec"]["clusterIP"].as_str().context("a Service has an address")?;
    let deployment = api.create(&deployments(), &deployment())?;
    until_rolled_out(api, &deployment)?;
    Ok((address.parse::<std::net::IpAddr>()?, 80).into())
}

/// Another template, and a wait for the end of the pods before.
fn update(api: &Api, number: u32) -> anyhow::Result<()> {
    let annotations = json!({ "metadata": { "annotations": { "update": number.to_string() } } });
    let patch = json!({ "spec": { "template": annotations } });
    let patched = api.merge(&format!("{}/web", deployments()), &patch)?;
    until_rolled_out(api, &patched)
}

/// As `kubectl rollout status` waits.
fn until_rolled_out(api: &Api, written: &Value) -> anyhow::Result<()> {
    let generation = written["metadata"]["generation"].as_i64();
    let is_rolled_out = |deployment: &Value| {
        let status = &deployment["status"];
        let counts = ["replicas", "updatedReplicas", "availableReplicas"];
        status["observedGeneration"].as_i64() >= generation
            && counts.iter().all(|count| status[count].as_u64() == Some(REPLICAS.into()))
    };
    api.wait(&deployments(), "web", LIMIT, is_rolled_out).map(drop)
}

fn deployments() -> String {
    format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments")
}

fn deployment() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": REPLICAS,
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": {
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": 10,
                    "containers": [{
                        "name": "server", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
                        "readinessProbe": { "httpGet": { "path": "/", "port": PORT }, "periodSeconds": 1 },
                    }],
                },
            },
        },
    })
}

/// What became of requests.
#[derive(Debug, Default)]
struct Tally {
    asked: u32,
    /// By what was said.
    failures: BTreeMap<String, u32>,
    /// Of those that were answered.
    times: Vec<Duration>,
}

impl Tally {
    fn failed(&self) -> u32 {
        self.failures.values().sum()
    }

    fn reasons(&self) -> String {
        self.failures.iter().map(|(reason, count)| format!("; {count} × {reason}")).collect()
    }

    fn note(&mut self, outcome: io::Result<Duration>) {
        self.asked += 1;
        match outcome {
            Ok(took) => self.times.push(took),
            Err(error) => *self.failures.entry(error.to_string()).or_default() += 1,
        }
    }

    fn add(&mut self, other: Self) {
        self.asked += other.asked;
        self.times.extend(other.times);
        other.failures.into_iter().for_each(|(reason, count)| *self.failures.entry(reason).or_default() += count);
    }
}

/// Sends `rate` requests a second until `ended`, each at its time, whether those before were answered or not.
async fn load(to: SocketAddr, rate: u32, mut ended: watch::Receiver<()>) -> Tally {
    let mut due = tokio::time::interval(Duration::from_secs(1) / rate);
    let (mut tally, mut asked) = (Tally::default(), JoinSet::new());
    loop {
        tokio::select! {
            _ = due.tick() => {
                asked.spawn(ask(to));
            }
            Some(Ok(outcome)) = asked.join_next() => tally.note(outcome),
            _ = ended.changed() => break,
        }
    }
    asked.join_all().await.into_iter().for_each(|outcome| tally.note(outcome));
    tally
}

/// One request; how long it took.
async fn ask(to: SocketAddr) -> io::Result<Duration> {
    let begun = Instant::now();
    let ask = async {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let is_good = text.starts_with("HTTP/1.1 200 ") && text.ends_with("ok\n");
        if is_good { Ok(()) } else { Err(io::Error::other("an answer that is none")) }
    };
    tokio::time::timeout(PATIENCE, ask).await.unwrap_or_else(|_| Err(io::Error::other("no answer in time")))?;
    Ok(begun.elapsed())
}
