//! A table that says what the API server says: list and watch of one kind.
//!
//! ```text
//!            ┌──────────────── 410, versions out of order ────────────────┐
//!            ▼                                                            │
//!   Nowhere ─┬─ streamed list (sendInitialEvents) ─┐                      │
//!            └─ pages, if the server cannot ───────┴─► At(version) ─ watch ┘
//!                                                           ▲          │
//!                                                           └ resume ──┘ ended, lost, silent
//! ```
//!
//! Objects are decoded one by one and handed over; there is no second copy. While a list is read anew, the objects that
//! are there stay, and those that it lacks go when it is complete: a server that restarts makes no object flap. A
//! connection that breaks loses nothing: the watch goes on from the last version that was seen.

mod backoff;
mod frames;
mod page;
mod poll;

use std::collections::HashSet;
use std::time::Duration;

use http_body_util::BodyExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use self::frames::{Event, Lines, TooLong};
use super::client::{Api, Call};
use super::connection::chain;
use super::error::ApiError;
use super::verbs::{Kind, collection};
use crate::percent::encode;
use crate::{Key, Table};

pub(super) use self::backoff::{Backoff, random};
pub use self::poll::poll;

/// The server says something at least every minute (bookmarks), whose connection is looked after by PING. When nothing
/// came for so many times [`super::Config::silence`], three minutes by default, a list is read anew: the server may have
/// been restored from a backup, and then tells nothing until it has reached the version that we asked for.
const SILENCES_MAX: u32 = 6;
/// The server ends a watch after this time, plus up to as much again: as client-go, so that watches spread over servers.
const WATCH_MIN: Duration = Duration::from_secs(300);
/// A watch that ends sooner and says nothing is a failure.
const WATCH_SHORT: Duration = Duration::from_secs(1);
/// After a server has come back, what a node follows asks for it within this time.
const RETURN_SPREAD: Duration = Duration::from_millis(300);
/// Objects of a page, as client-go.
const PAGE_OBJECTS: usize = 500;

/// Which objects of a kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    namespace: String,
    fields: Option<String>,
    labels: Option<String>,
}

impl Selection {
    /// All.
    pub fn all() -> Self {
        Self::default()
    }

    /// The one of this name. Nodes may follow Secrets, ConfigMaps and Nodes in no other way.
    pub fn named(key: &Key) -> Self {
        let fields = Some(format!("metadata.name={}", key.name()));
        Self { namespace: key.namespace().to_owned(), fields, labels: None }
    }

    /// Those of one namespace.
    pub fn in_namespace(namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..Self::default() }
    }

    /// Those whose fields match this selector.
    #[must_use]
    pub fn fields(self, selector: &str) -> Self {
        Self { fields: Some(selector.to_owned()), ..self }
    }

    /// Those whose labels match this selector.
    #[must_use]
    pub fn labels(self, selector: &str) -> Self {
        Self { labels: Some(selector.to_owned()), ..self }
    }

    pub(super) fn path<T: Kind>(&self, parameters: &[(&str, &str)]) -> String {
        let own = [("fieldSelector", &self.fields), ("labelSelector", &self.labels)];
        let own = own.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?)));
        let all = own.chain(parameters.iter().copied()).map(|(name, value)| format!("{name}={}", encode(value)));
        format!("{}?{}", collection::<T>(&self.namespace), all.collect::<Vec<_>>().join("&"))
    }
}

/// Where objects go.
pub trait Sink<T>: Send + 'static {
    /// The object is there in this version, perhaps again.
    fn put(&mut self, object: T);

    /// It is gone.
    fn remove(&mut self, key: &Key);
}

impl<T: Kind> Sink<T> for Table<T> {
    fn put(&mut self, object: T) {
        self.mirror(object);
    }

    fn remove(&mut self, key: &Key) {
        Table::remove(self, key);
    }
}

/// How well a kind is known.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// A list has been complete: what the sink lacks is not there. Stays true.
    pub is_known: bool,
    /// Why nothing new is heard at the moment.
    pub failure: Option<ApiError>,
}

/// Objects that are being followed, until this is dropped.
#[derive(Debug)]
pub struct Following {
    progress: watch::Receiver<Progress>,
    task: JoinHandle<()>,
}

impl Following {
    /// How well the objects are known.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Waits until all objects are known. Cancel-safe.
    pub async fn known(&self) {
        // The task, which has the sender, ends only with self.
        let _ = self.progress().wait_for(|progress| progress.is_known).await;
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows the selected objects of a kind from now on. Must be called inside a tokio runtime.
pub fn follow<T: Kind>(api: &Api, selection: Selection, sink: impl Sink<T>) -> Following {
    follow_from(api, selection, sink, Vec::new())
}

/// As [`follow`], where the sink has, or may get from elsewhere, these objects: those that the first list lacks go.
pub(super) fn follow_from<T: Kind>(
    api: &Api,
    selection: Selection,
    sink: impl Sink<T>,
    before: impl IntoIterator<Item = Key>,
) -> Following {
    let (sender, progress) = watch::channel(Progress::default());
    let engine = Engine {
        api: api.clone(),
        selection,
        sink,
        ledger: Ledger { known: before.into_iter().collect(), ..Ledger::default() },
        is_paged: false,
        has_heard: false,
        progress: sender,
        scratch: Vec::new(),
        of: std::marker::PhantomData,
    };
    Following { progress, task: tokio::spawn(engine.run()) }
}

/// Which objects the sink has from us, and up to which version.
#[derive(Debug, Default)]
struct Ledger {
    position: Position,
    known: HashSet<Key>,
    /// Those of the list that is being read.
    listed: Option<HashSet<Key>>,
}

/// From where a watch can go on.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Position {
    /// A list is needed; one that is not older than this version, if one is given.
    Nowhere { at_least: Option<String> },
    /// Everything up to this version is known.
    At(String),
}

impl Default for Position {
    fn default() -> Self {
        Position::Nowhere { at_least: None }
    }
}

impl Ledger {
    fn begin_list(&mut self) {
        self.listed = Some(HashSet::new());
    }

    fn note(&mut self, key: Key, version: Option<&str>) {
        if let Some(listed) = &mut self.listed {
            listed.insert(key.clone());
        } else {
            self.move_to(version);
        }
        self.known.insert(key);
    }

    fn forget(&mut self, key: &Key, version: Option<&str>) {
        self.known.remove(key);
        if let Some(listed) = &mut self.listed {
            listed.remove(key);
        } else {
            self.move_to(version);
        }
    }

    /// Versions within a list are in no order.
    fn move_to(&mut self, version: Option<&str>) {
        if let (Some(version), None) = (version.filter(|version| !version.is_empty()), &self.listed) {
            self.position = Position::At(version.to_owned());
        }
    }

    /// The list is complete; returns what it lacks.
    fn end_list(&mut self, version: &str) -> Vec<Key> {
        let Some(listed) = self.listed.take() else { return Vec::new() };
        let gone = self.known.difference(&listed).cloned().collect();
        self.known = listed;
        self.move_to(Some(version));
        gone
    }

    /// After a failure: where to go on. What the server has refused once is not asked for again.
    fn recover(&mut self, error: &ApiError) {
        self.listed = None;
        let known = match &self.position {
            Position::At(version) => Some(version.clone()),
            Position::Nowhere { at_least } => at_least.clone(),
        };
        self.position = match error {
            ApiError::Expired { .. } => Position::Nowhere { at_least: known },
            // Our version is of a future that the server does not know: it was restored from a backup.
            error if error.is_expired() => Position::Nowhere { at_least: None },
            error if error.is_transient() => return,
            _ => Position::Nowhere { at_least: known },
        };
    }
}

struct Engine<T, S> {
    api: Api,
    selection: Selection,
    sink: S,
    ledger: Ledger,
    /// The server streams no lists.
    is_paged: bool,
    /// Since the round began.
    has_heard: bool,
    progress: watch::Sender<Progress>,
    scratch: Vec<u8>,
    of: std::marker::PhantomData<fn() -> T>,
}

impl<T: Kind, S: Sink<T>> Engine<T, S> {
    async fn run(mut self) {
        let mut backoff = Backoff::new();
        let mut returns = self.api.returns();
        loop {
            returns.mark_unchanged();
            let begun = Instant::now();
            let ended = self.round().await;
            if self.has_heard {
                backoff.reset();
            }
            let error = match ended {
                Ok(()) if self.has_heard || begun.elapsed() >= WATCH_SHORT => continue,
                Ok(()) => self.api.lost("it ends every watch at once".into()),
                Err(error) => error,
            };
            self.fail(&error);
            let wait = backoff.wait(random()).max(error.retry_after().unwrap_or_default());
            // The wait begins anew for all who waited for a server that was away.
            let is_back = async {
                // The sender lives in the client.
                let _ = returns.changed().await;
                tokio::time::sleep(RETURN_SPREAD.mul_f64(random())).await;
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = is_back => {}
            }
        }
    }

    /// One list, if one is needed, and one watch. Ends without an error when the server ends the watch.
    async fn round(&mut self) -> Result<(), ApiError> {
        self.has_heard = false;
        if self.is_paged && matches!(self.ledger.position, Position::Nowhere { .. }) {
            self.list().await?;
        }
        match self.watch().await {
            Err(ApiError::Invalid { code: 400 | 422, message }) if !self.is_paged && self.ledger.listed.is_some() => {
                tracing::debug!(kind = T::KIND, message, "the API server streams no lists; they are read in pages");
                self.is_paged = true;
                self.list().await?;
                self.watch().await
            }
            ended => ended,
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.ledger.recover(error);
        let selection = self.selection.fields.as_deref().unwrap_or_default();
        let same = |old: &ApiError| old.to_string() == error.to_string();
        let is_told = self.progress.borrow().failure.as_ref().is_some_and(same);
        match error {
            // The client has told of it, once for all.
            ApiError::Unreachable { .. }
            | ApiError::Lost { .. }
            | ApiError::Expired { .. }
            | ApiError::TimedOut { .. } => {
                tracing::debug!(kind = T::KIND, selection, %error, "a watch is started again");
            }
            _ if is_told => {}
            _ => tracing::warn!(kind = T::KIND, selection, %error, "the API server's objects cannot be followed"),
        }
        self.progress.send_modify(|progress| progress.failure = Some(error.clone()));
    }

    /// Reads all pages.
    async fn list(&mut self) -> Result<(), ApiError> {
        let Position::Nowhere { at_least } = self.ledger.position.clone() else { return Ok(()) };
        self.ledger.begin_list();
        let limit = PAGE_OBJECTS.to_string();
        let mut from = String::new();
        loop {
            let mut parameters = vec![("limit", limit.as_str())];
            match &at_least {
                _ if !from.is_empty() => parameters.push(("continue", &from)),
                Some(version) => {
                    parameters
                        .extend([("resourceVersion", version.as_str()), ("resourceVersionMatch", "NotOlderThan")]);
                }
                None => {}
            }
            let call = Call::get(self.selection.path::<T>(&parameters));
            let title = call.title();
            let text = self.api.call(call).await?;
            let mut unreadable = Vec::new();
            let meta = page::read::<T>(&text, &mut |item| match item {
                Ok(object) => self.put(object),
                Err((raw, error)) => unreadable.push(frames::unreadable(raw.get().as_bytes(), &error)),
            });
            let meta = meta.map_err(|error| ApiError::Answer { request: title, reason: error.to_string() })?;
            self.has_heard = true;
            unreadable.into_iter().try_for_each(|event| self.apply(event))?;
            if meta.r#continue.is_empty() {
                self.end_list(&meta.resource_version);
                return Ok(());
            }
            from = meta.r#continue;
        }
    }

    /// Hears what changes until the server ends the watch. Without a position the list comes first, in the same stream.
    async fn watch(&mut self) -> Result<(), ApiError> {
        let limit = WATCH_MIN.mul_f64(1.0 + random()).as_secs().to_string();
        let mut parameters =
            vec![("watch", "true"), ("allowWatchBookmarks", "true"), ("timeoutSeconds", limit.as_str())];
        let position = self.ledger.position.clone();
        match &position {
            Position::At(version) => parameters.push(("resourceVersion", version)),
            Position::Nowhere { at_least } => {
                self.ledger.begin_list();
                parameters.extend([("sendInitialEvents", "true"), ("resourceVersionMatch", "NotOlderThan")]);
                parameters.extend(at_least.iter().map(|version| ("resourceVersion", version.as_str())));
            }
        }
        let call = Call::get(self.selection.path::<T>(&parameters));
        let mut stream = self.api.stream(&call).await?;
        if let Position::At(_) = position {
            self.is_well();
        }
        let mut lines = Lines::default();
        let silence_max = self.api.config().silence * SILENCES_MAX;
        loop {
            let frame = match timeout(silence_max, stream.body.frame()).await {
                Err(_) => {
                    self.ledger.position = Position::default();
                    return Err(self.api.timed_out(silence_max));
                }
                Ok(None) => return Ok(()),
                Ok(Some(Err(error))) => return Err(self.api.lost(chain(&error))),
                Ok(Some(Ok(frame))) => frame,
            };
            let Some(piece) = frame.data_ref() else { continue };
            self.has_heard = true;
            lines.feed(piece, |line| self.take(line)).map_err(|failure| match failure {
                Failure::Api(error) => error,
                Failure::Answer(reason) => ApiError::Answer { request: call.title(), reason },
            })?;
        }
    }

    fn take(&mut self, line: &[u8]) -> Result<(), Failure> {
        let event = frames::event(line, &mut self.scratch).map_err(|error| Failure::Answer(error.to_string()))?;
        event.map_or(Ok(()), |event| self.apply(event).map_err(Failure::Api))
    }

    fn apply(&mut self, event: Event<T>) -> Result<(), ApiError> {
        match event {
            Event::Put(object) => self.put(object),
            Event::Gone(metadata) => self.remove(&metadata),
            Event::Bookmark { version, ends_list: true } => self.end_list(&version),
            Event::Bookmark { version, ends_list: false } => self.ledger.move_to(Some(&version)),
            Event::Failed(status) => {
                let code = status.code.and_then(|code| u16::try_from(code).ok()).unwrap_or(500);
                return Err(ApiError::of_status(code, *status, "the watch failed", None));
            }
            Event::Unreadable { metadata, reason } => self.keep_old(&metadata, &reason),
        }
        Ok(())
    }

    fn put(&mut self, mut object: T) {
        let metadata = object.metadata_mut();
        metadata.managed_fields = None;
        self.ledger.note(Key::of(metadata), metadata.resource_version.as_deref());
        self.sink.put(object);
    }

    fn remove(&mut self, metadata: &ObjectMeta) {
        let key = Key::of(metadata);
        self.ledger.forget(&key, metadata.resource_version.as_deref());
        self.sink.remove(&key);
    }

    /// One bad object spoils no other; of this one the last good version counts.
    fn keep_old(&mut self, metadata: &ObjectMeta, reason: &str) {
        let key = Key::of(metadata);
        tracing::warn!(kind = T::KIND, object = %key, reason, "an object of the API server cannot be read and is left as it was");
        match self.ledger.known.contains(&key) {
            true => self.ledger.note(key, metadata.resource_version.as_deref()),
            false => self.ledger.move_to(metadata.resource_version.as_deref()),
        }
    }

    fn end_list(&mut self, version: &str) {
        for key in self.ledger.end_list(version) {
            self.sink.remove(&key);
        }
        self.is_well();
        self.progress.send_if_modified(|progress| !std::mem::replace(&mut progress.is_known, true));
    }

    fn is_well(&self) {
        self.progress.send_if_modified(|progress| progress.failure.take().is_some());
    }
}

/// Why a line was not taken.
enum Failure {
    Api(ApiError),
    Answer(String),
}

impl From<TooLong> for Failure {
    fn from(TooLong: TooLong) -> Self {
        Failure::Answer("an event does not end".into())
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[test]
    fn selections_become_queries() {
        let path = |selection: Selection| selection.path::<Pod>(&[("watch", "true")]);
        assert_eq!(path(Selection::all()), "/api/v1/pods?watch=true");
        let mine = Selection::all().fields("spec.nodeName=n1");
        assert_eq!(path(mine), "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&watch=true");
        let one = Selection::named(&Key::new("shop", "web"));
        assert_eq!(path(one), "/api/v1/namespaces/shop/pods?fieldSelector=metadata.name%3Dweb&watch=true");
    }

    fn key(name: &str) -> Key {
        Key::new("default", name)
    }

    fn at(version: &str) -> Position {
        Position::At(version.into())
    }

    #[test]
    fn what_a_list_lacks_goes_when_it_is_complete() {
        let mut ledger = Ledger::default();
        ledger.begin_list();
        ledger.note(key("a"), Some("9"));
        ledger.note(key("b"), Some("3"));
        assert_eq!(ledger.position, Position::default());
        assert!(ledger.end_list("10").is_empty());
        ledger.note(key("c"), Some("11"));
        assert_eq!(ledger.position, at("11"));
        // A new list, which breaks half-way, and another.
        ledger.recover(&ApiError::Expired { message: String::new() });
        assert_eq!(ledger.position, Position::Nowhere { at_least: Some("11".into()) });
        ledger.begin_list();
        ledger.note(key("a"), Some("9"));
        ledger.recover(&ApiError::Lost { server: String::new(), reason: String::new() });
        ledger.begin_list();
        ledger.note(key("b"), Some("3"));
        ledger.note(key("d"), Some("20"));
        let mut gone = ledger.end_list("21");
        gone.sort();
        assert_eq!((gone, ledger.position), (vec![key("a"), key("c")], at("21")));
    }

    #[test]
    fn failures_resume_or_list_anew() {
        let after = |error: ApiError| {
            let mut ledger = Ledger { position: at("5"), ..Ledger::default() };
            ledger.recover(&error);
            ledger.position
        };
        let (server, message) = (String::new, String::new);
        assert_eq!(after(ApiError::Lost { server: server(), reason: message() }), at("5"));
        assert_eq!(after(ApiError::Throttled { message: message(), retry_after: None }), at("5"));
        let not_older = Position::Nowhere { at_least: Some("5".into()) };
        assert_eq!(after(ApiError::Expired { message: message() }), not_older);
        assert_eq!(after(ApiError::Invalid { code: 400, message: message() }), not_older);
        let future = "Too large resource version: 5, current: 3".to_owned();
        let future = ApiError::Server { code: 504, reason: "Timeout".into(), message: future, retry_after: None };
        assert_eq!(after(future), Position::Nowhere { at_least: None });
    }
}
