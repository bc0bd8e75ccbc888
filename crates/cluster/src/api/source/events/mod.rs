//! Events on their way to the API server: bounded, in order, never waited for.

mod correlate;

use std::time::Duration;

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::correlate::{Correlator, Decision};
use crate::Key;
use crate::api::client::Api;
use crate::api::config::Rate;
use crate::api::error::ApiError;
use crate::api::follow::{Backoff, random};
use crate::api::rate::Bucket;
use crate::api::verbs::Patch;

/// As upstream's broadcaster; what comes when it is full is lost.
const QUEUE_MAX: usize = 1000;
/// How long the server may be away before an event is given up, as upstream (12 tries, 10 s apart).
const PATIENCE: Duration = Duration::from_secs(120);

/// Takes events. They are sent until this is dropped.
#[derive(Debug)]
pub(super) struct Recorder {
    queue: mpsc::Sender<Event>,
    task: JoinHandle<()>,
}

impl Recorder {
    /// Events of this node, `rate` at most (upstream: `eventRecordQPS`, `eventBurst`). Must be called inside a tokio runtime.
    pub(super) fn new(api: Api, node: &str, rate: Option<Rate>) -> Self {
        let (queue, events) = mpsc::channel(QUEUE_MAX);
        let bucket = rate.map(|rate| Bucket::new(rate, Instant::now()));
        let sender = Sender { api, node: node.to_owned(), correlator: Correlator::new(), bucket, names: 0 };
        Self { queue, task: tokio::spawn(sender.run(events)) }
    }

    /// Takes an event; when too many wait, it is lost.
    pub(super) fn record(&self, event: Event) {
        if let Err(lost) = self.queue.try_send(event) {
            let event = lost.into_inner();
            tracing::debug!(reason = event.reason, message = event.message, "an event is lost: too many wait");
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Sender {
    api: Api,
    node: String,
    correlator: Correlator,
    bucket: Option<Bucket>,
    names: u32,
}

impl Sender {
    async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            let name = self.name(&event);
            let event = self.completed(event);
            match self.correlator.observe(event, name, Timestamp::now(), Instant::now()) {
                Decision::Drop => {}
                Decision::Create(event) => self.send(&event, false).await,
                Decision::CountUp(event) => self.send(&event, true).await,
            }
        }
    }

    /// As upstream: what it is about and when, in nanoseconds. The count keeps two of the same instant apart.
    fn name(&mut self, event: &Event) -> String {
        self.names = self.names.wrapping_add(1);
        let about = event.involved_object.name.as_deref().unwrap_or("unknown");
        format!("{about}.{:x}{:02x}", Timestamp::now().as_nanosecond(), self.names & 0xff)
    }

    fn completed(&self, mut event: Event) -> Event {
        let namespace = event.involved_object.namespace.clone().filter(|namespace| !namespace.is_empty());
        event.metadata.namespace = Some(namespace.unwrap_or_else(|| "default".into()));
        event.source.get_or_insert_default().host = Some(self.node.clone());
        event.reporting_instance = Some(self.node.clone());
        event
    }

    async fn send(&mut self, event: &Event, counts_up: bool) {
        if let Some(bucket) = &mut self.bucket {
            let wait = bucket.take(Instant::now());
            tokio::time::sleep(wait).await;
        }
        let mut backoff = Backoff::new();
        let until = Instant::now() + PATIENCE;
        loop {
            let error = match self.try_to_send(event, counts_up).await {
                Ok(()) => return,
                Err(error) => error,
            };
            if !error.is_transient() || Instant::now() >= until {
                // In a namespace that ends there can be no new events: nobody misses them.
                tracing::debug!(reason = event.reason, message = event.message, %error, "an event is not taken");
                return;
            }
            tokio::time::sleep(backoff.wait(random()).max(error.retry_after().unwrap_or_default())).await;
        }
    }

    async fn try_to_send(&self, event: &Event, counts_up: bool) -> Result<(), ApiError> {
        if counts_up {
            let change = json!({
                "count": event.count, "message": event.message, "lastTimestamp": event.last_timestamp,
            });
            match self.api.patch::<Event>(&Key::of(&event.metadata), &Patch::strategic(change)).await {
                // The server keeps events for an hour.
                Err(error) if error.is_not_found() => {}
                done => return done.map(drop),
            }
        }
        match self.api.create(event).await {
            // An attempt whose answer was lost had arrived.
            Err(ApiError::AlreadyExists { .. }) => Ok(()),
            done => done.map(drop),
        }
    }
}
