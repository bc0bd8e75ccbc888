//! The work: pods as a client of the API server asks for them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::api::{Api, Connection};

use crate::inside::IMAGE;

use super::NODE;
use super::watcher::{Stage, Watcher};

/// Where the pods are.
pub(super) const NAMESPACE: &str = "bench";

/// The longest that anything may take.
const LIMIT: Duration = Duration::from_secs(300);

/// An application that ends at once on SIGTERM.
const SCRIPT: &str = "trap exit TERM; sleep infinity & wait";

/// Asks for pods, and sees what becomes of them.
pub(super) struct Work {
    api: Api,
    watcher: Watcher,
    next: usize,
}

impl Work {
    /// Begins to watch.
    pub(super) fn start(api: &Api) -> anyhow::Result<Self> {
        Ok(Self { api: api.clone(), watcher: Watcher::start(api)?, next: 0 })
    }

    /// Creates pods at once, bound to the node, and waits until they have come to `stage`. Their names, and how long the
    /// last of them took from the first request on.
    pub(super) fn create(
        &mut self,
        count: usize,
        stage: Stage,
        extras: &Extras,
    ) -> anyhow::Result<(Vec<String>, Duration)> {
        let names: Vec<String> = (self.next..self.next + count).map(|number| format!("pod-{number}")).collect();
        self.next += count;
        let pods: Vec<Value> = names.iter().map(|name| pod(name, extras)).collect();
        let kind = "application/json";
        let requests = pods.iter().map(|pod| ("POST", collection("pods"), Some((kind, pod))));
        let begin = self.ask(requests.collect())?;
        let seen = self.watcher.wait(&names, stage, LIMIT)?;
        Ok((names, longest(begin, &seen)))
    }

    /// Deletes pods at once with the grace that they ask for, and waits until they are gone; how long that took.
    pub(super) fn delete(&mut self, pods: &[String]) -> anyhow::Result<Duration> {
        let requests = pods.iter().map(|pod| ("DELETE", format!("{}/{pod}", collection("pods")), None));
        let begin = self.ask(requests.collect())?;
        let gone = self.watcher.wait(pods, Stage::Gone, LIMIT)?;
        Ok(longest(begin, &gone))
    }

    /// Creates a ConfigMap.
    pub(super) fn create_config(&self, name: &str, data: &Value) -> anyhow::Result<()> {
        let object = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name }, "data": data });
        self.api.create(&collection("configmaps"), &object).map(drop)
    }

    /// Edits ConfigMaps at once; when the first was asked for.
    pub(super) fn edit_configs(&self, names: &[&str], data: &Value) -> anyhow::Result<Instant> {
        let (kind, patch) = ("application/merge-patch+json", json!({ "data": data }));
        let path = |name| format!("{}/{name}", collection("configmaps"));
        self.ask(names.iter().map(|name| ("PATCH", path(name), Some((kind, &patch)))).collect())
    }

    /// Sends all requests on connections that are open already, then waits for the answers; when the first was sent.
    fn ask(&self, requests: Vec<Request<'_>>) -> anyhow::Result<Instant> {
        let open = requests.iter().map(|_| self.api.connection()).collect::<anyhow::Result<Vec<Connection>>>()?;
        let begin = Instant::now();
        let sent = open
            .into_iter()
            .zip(requests)
            .map(|(connection, (method, path, body))| connection.send(method, &path, body));
        let sent = sent.collect::<anyhow::Result<Vec<_>>>()?;
        sent.into_iter().try_for_each(|sent| sent.reply()?.json().map(drop))?;
        Ok(begin)
    }
}

/// Method, path, and body with its type.
type Request<'a> = (&'a str, String, Option<(&'a str, &'a Value)>);

/// What a pod has beside its container's program: `volumes` and `volumeMounts`.
#[derive(Debug, Default)]
pub(super) struct Extras {
    pub(super) volumes: Vec<Value>,
    pub(super) mounts: Vec<Value>,
}

fn collection(kind: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/{kind}")
}

fn longest(begin: Instant, ends: &[Instant]) -> Duration {
    ends.iter().max().map(|end| end.saturating_duration_since(begin)).unwrap_or_default()
}

/// A pod; its name is the last word on the command line of its process.
fn pod(name: &str, extras: &Extras) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
        "spec": {
            "nodeName": NODE,
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 5,
            "containers": [{
                "name": "c", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", SCRIPT, name],
                "volumeMounts": extras.mounts,
            }],
            "volumes": extras.volumes,
        },
    })
}
