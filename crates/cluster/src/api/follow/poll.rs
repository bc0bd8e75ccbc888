//! One object that may be read but not watched, looked at from time to time.

use std::time::Duration;

use tokio::sync::watch;

use super::backoff::{Backoff, random};
use super::{Following, Progress, Sink};
use crate::Key;
use crate::api::client::Api;
use crate::api::error::ApiError;
use crate::api::verbs::Kind;

/// Follows an object by reading it again after as long as `every` says for what was read. Must be called inside a tokio
/// runtime.
pub fn poll<T: Kind>(
    api: &Api,
    key: &Key,
    mut sink: impl Sink<T>,
    every: impl Fn(Option<&T>) -> Duration + Send + 'static,
) -> Following {
    let (sender, progress) = watch::channel(Progress::default());
    let (api, key) = (api.clone(), key.clone());
    let task = tokio::spawn(async move {
        let mut backoff = Backoff::new();
        loop {
            let wait = match api.get::<T>(&key).await {
                Ok(mut object) => {
                    object.metadata_mut().managed_fields = None;
                    let wait = every(Some(&object));
                    sink.put(object);
                    is_known(&sender);
                    backoff.reset();
                    wait
                }
                Err(error) if error.is_not_found() => {
                    sink.remove(&key);
                    is_known(&sender);
                    backoff.reset();
                    every(None)
                }
                Err(error) => {
                    tell(&sender, &key, T::KIND, error);
                    backoff.wait(random())
                }
            };
            tokio::time::sleep(wait).await;
        }
    });
    Following { progress, task }
}

fn is_known(sender: &watch::Sender<Progress>) {
    sender.send_if_modified(|progress| {
        let is_new = !progress.is_known || progress.failure.is_some();
        *progress = Progress { is_known: true, failure: None };
        is_new
    });
}

fn tell(sender: &watch::Sender<Progress>, key: &Key, kind: &str, error: ApiError) {
    let is_told = sender.borrow().failure.as_ref().is_some_and(|old| old.to_string() == error.to_string());
    match error {
        ApiError::Unreachable { .. } | ApiError::Lost { .. } => {}
        _ if is_told => {}
        _ => tracing::warn!(kind, object = %key, %error, "an object of the API server cannot be read"),
    }
    sender.send_modify(|progress| progress.failure = Some(error));
}
