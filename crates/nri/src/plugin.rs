//! One plugin: how it comes to take part, and what it is asked.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{Mutex, MutexGuard, mpsc};
use tokio::time::{Instant, timeout_at};

use crate::VERSION;
use crate::api::{self, Container, Event, PodSandbox};
use crate::connection::{CallError, Connection, Incoming, UNIMPLEMENTED};
use crate::wire::PAYLOAD_MAX;

/// All events that there are, as bits.
const EVENTS: u32 = (1 << (Event::Last as u32 - 1)) - 1;
/// How much of the node's state goes into one message, so that it stays below what the protocol allows.
const PART_MAX: usize = 3 << 20;
/// What a message has around a pod or container.
const ENVELOPE: usize = 1 << 10;

/// Why a pod or container cannot be as plugins want it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PluginError {
    /// A plugin refuses.
    #[error("NRI plugin {plugin}: {message}")]
    Refused {
        /// Which.
        plugin: String,
        /// Its words.
        message: String,
    },
    /// Two plugins want different things.
    #[error("NRI plugins {first} and {second} both set {what}; remove one of them, or let one leave it alone")]
    Conflict {
        /// The one that is asked first.
        first: String,
        /// The other.
        second: String,
        /// What they both set.
        what: String,
    },
    /// Plugins could not be told of it.
    #[error(
        "its configuration has {0} bytes, of which NRI plugins can be told {PART_MAX}: give it fewer environment variables"
    )]
    TooLarge(usize),
}

/// Whether plugins can be told of a pod, or of a container with its pod: in one message, as all of them want it, and as one
/// that comes later has to be told.
///
/// # Errors
/// It is too large.
pub fn fits(pod: &PodSandbox, container: Option<&Container>) -> Result<(), PluginError> {
    let length = pod.encoded_len() + container.map_or(0, prost::Message::encoded_len);
    if length > PART_MAX { Err(PluginError::TooLarge(length)) } else { Ok(()) }
}

/// How a plugin is called: its index decides when it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) index: String,
    pub(crate) base: String,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.index, self.base)
    }
}

impl Name {
    /// From `10-name`, as a file of a plugin is called.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (index, base) = text.split_once('-')?;
        let name = Self { index: index.to_owned(), base: base.to_owned() };
        name.fault().is_none().then_some(name)
    }

    fn fault(&self) -> Option<String> {
        if self.index.len() != 2 || !self.index.bytes().all(|byte| byte.is_ascii_digit()) {
            return Some(format!("the index {:?} is not two digits", self.index));
        }
        self.base.is_empty().then(|| "it has no name".to_owned())
    }
}

/// Limits of time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) registration: Duration,
    pub(crate) request: Duration,
}

/// A plugin that takes part.
#[derive(Debug)]
pub(crate) struct Plugin {
    pub(crate) name: Name,
    /// [`Name`] as text.
    pub(crate) title: String,
    events: u32,
    pub(crate) connection: Arc<Connection>,
    limit: Duration,
    /// Whoever asks it: one at a time, as plugins expect it.
    turn: Mutex<()>,
}

impl Plugin {
    /// Waits for its registration and configures it. A plugin that the runtime has started has its name from its file.
    pub(crate) async fn admit(
        connection: Arc<Connection>,
        calls: &mut mpsc::Receiver<Incoming>,
        given: Option<Name>,
        config: impl FnOnce(&Name) -> Result<String, String>,
        patience: Patience,
        runtime: (&str, &str),
    ) -> Result<Self, String> {
        let name = register(&connection, calls, given, patience.registration).await?;
        let milliseconds = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let request = api::ConfigureRequest {
            config: config(&name)?,
            runtime_name: runtime.0.to_owned(),
            runtime_version: runtime.1.to_owned(),
            registration_timeout: milliseconds(patience.registration),
            request_timeout: milliseconds(patience.request),
            nri_version: VERSION.to_owned(),
        };
        let answer = connection.call::<api::ConfigureResponse>("Configure", &request, patience.request).await;
        let events = answer.map_err(|error| format!("plugin {name} cannot be configured: {error}"))?.events;
        let events = match events.cast_unsigned() {
            0 => EVENTS,
            events if events & !EVENTS == 0 => events,
            events => return Err(format!("plugin {name} wants events that there are not: {events:#x}")),
        };
        let title = name.to_string();
        Ok(Self { name, title, events, connection, limit: patience.request, turn: Mutex::default() })
    }

    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & 1 << (event as u32 - 1) != 0
    }

    /// Nobody else asks it meanwhile.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Tells it of all pods and containers, in as many messages as it takes; what it wants changed. Its turn is the caller's.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<api::ContainerUpdate>, String> {
        let mut parts = parts(pods, containers);
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            let request = api::SynchronizeRequest { more: true, ..part };
            if !self.ask_to_synchronize(&request).await?.more {
                return Err("it does not take the state of this node in several messages".to_owned());
            }
        }
        Ok(self.ask_to_synchronize(&last).await?.update)
    }

    async fn ask_to_synchronize(&self, request: &api::SynchronizeRequest) -> Result<api::SynchronizeResponse, String> {
        let answer = self.connection.call("Synchronize", request, self.limit).await;
        answer.map_err(|error| format!("it cannot be synchronized: {error}"))
    }

    /// Asks it; nothing if it does not want to know, or is gone. One that does not answer as it should is let go.
    pub(crate) async fn ask<Answer: prost::Message + Default>(
        &self,
        event: Event,
        method: &str,
        request: &impl prost::Message,
    ) -> Result<Option<Answer>, PluginError> {
        if !self.wants(event) {
            return Ok(None);
        }
        let _turn = self.turn().await;
        self.answer_of(method, self.connection.call(method, request, self.limit).await)
    }

    /// Tells it of an event. Plugins older than the event's own call get it by another.
    pub(crate) async fn tell(&self, event: Event, about: &api::StateChangeEvent) -> Result<(), PluginError> {
        if !self.wants(event) {
            return Ok(());
        }
        let _turn = self.turn().await;
        let method = method_of(event);
        // All of these requests have the same fields.
        let request = api::StartContainerRequest { pod: about.pod.clone(), container: about.container.clone() };
        let told = match self.connection.call::<api::Empty>(method, &request, self.limit).await {
            Err(CallError::Refused { code: UNIMPLEMENTED, .. }) => {
                self.connection.call("StateChange", about, self.limit).await
            }
            told => told,
        };
        self.answer_of::<api::Empty>(method, told).map(drop)
    }

    fn answer_of<Answer>(
        &self,
        method: &str,
        answer: Result<Answer, CallError>,
    ) -> Result<Option<Answer>, PluginError> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(CallError::Refused { message, .. }) => {
                Err(PluginError::Refused { plugin: self.title.clone(), message })
            }
            Err(error @ CallError::TooLong(_)) => {
                Err(PluginError::Refused { plugin: self.title.clone(), message: error.to_string() })
            }
            Err(error) => {
                if !self.connection.is_closed() {
                    tracing::warn!(plugin = self.title, method, %error, "an NRI plugin is disconnected; pods go on without it");
                }
                self.connection.close();
                Ok(None)
            }
        }
    }
}

fn method_of(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::RemoveContainer => "RemoveContainer",
        // These have answers, or are none.
        Event::CreateContainer
        | Event::UpdateContainer
        | Event::StopContainer
        | Event::ValidateContainerAdjustment
        | Event::Unknown
        | Event::Last => "StateChange",
    }
}

async fn register(
    connection: &Connection,
    calls: &mut mpsc::Receiver<Incoming>,
    given: Option<Name>,
    limit: Duration,
) -> Result<Name, String> {
    let deadline = Instant::now() + limit;
    loop {
        let call = timeout_at(deadline, calls.recv()).await;
        let call = call.map_err(|_| format!("a plugin has not registered within {} s", limit.as_secs_f32()))?;
        let call = call.ok_or("a plugin has gone before it registered")?;
        if call.method != "RegisterPlugin" {
            connection.answer(call.stream, Err("a plugin registers first".to_owned())).await;
            continue;
        }
        let request = api::RegisterPluginRequest::decode(call.payload.as_slice());
        let request = request.map_err(|error| format!("a plugin registers strangely: {error}"))?;
        let name = given.clone().unwrap_or(Name { index: request.plugin_idx, base: request.plugin_name });
        return match name.fault() {
            None => {
                connection.answer(call.stream, Ok(Vec::new())).await;
                Ok(name)
            }
            Some(fault) => {
                connection.answer(call.stream, Err(fault.clone())).await;
                Err(format!("a plugin cannot register as {name}: {fault}"))
            }
        };
    }
}

/// The state in messages that are not too long. What [`fits`] has not seen, because there was no NRI then, may fit into none.
fn parts(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<api::SynchronizeRequest> {
    let mut parts = vec![api::SynchronizeRequest::default()];
    let mut length = 0;
    let mut room = |parts: &mut Vec<api::SynchronizeRequest>, more: usize| {
        if length + more > PART_MAX && length > 0 {
            parts.push(api::SynchronizeRequest::default());
            length = 0;
        }
        length += more;
    };
    let can_be_told = |kind: &str, id: &str, length: usize| {
        let can = length + ENVELOPE <= PAYLOAD_MAX;
        if !can {
            tracing::warn!(kind, id, length, "NRI plugins are not told of it: its configuration is too large");
        }
        can
    };
    for pod in pods.into_iter().filter(|pod| can_be_told("pod", &pod.id, pod.encoded_len())) {
        room(&mut parts, pod.encoded_len() + 8);
        if let Some(part) = parts.last_mut() {
            part.pods.push(pod);
        }
    }
    for container in containers.into_iter().filter(|one| can_be_told("container", &one.id, one.encoded_len())) {
        room(&mut parts, container.encoded_len() + 8);
        if let Some(part) = parts.last_mut() {
            part.containers.push(container);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_two_digits_first() {
        assert_eq!(Name::parse("10-a-b").map(|name| (name.index, name.base)), Some(("10".into(), "a-b".into())));
        for text in ["1-a", "100-a", "ab-c", "10-", "10"] {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_large_state_goes_in_parts() {
        let pod = |size: usize| PodSandbox { name: "x".repeat(size), ..PodSandbox::default() };
        let counts = |pods: Vec<PodSandbox>| {
            parts(pods, vec![Container::default()]).iter().map(|part| part.pods.len()).collect::<Vec<_>>()
        };
        assert_eq!(counts(vec![]), [0]);
        assert_eq!(counts(vec![pod(10), pod(10)]), [2]);
        assert_eq!(counts(vec![pod(2 << 20), pod(2 << 20), pod(10)]), [1, 2]);
        assert_eq!(counts(vec![pod(PAYLOAD_MAX), pod(10)]), [1], "what fits into no message is left out");
    }

    #[test]
    fn a_pod_and_its_container_fit_into_one_message() {
        let pod = PodSandbox { name: "x".repeat(1 << 20), ..PodSandbox::default() };
        let container = |size: usize| Container { env: vec!["x".repeat(size)], ..Container::default() };
        assert_eq!(fits(&pod, None), Ok(()));
        assert_eq!(fits(&pod, Some(&container(1 << 20))), Ok(()));
        assert!(
            matches!(fits(&pod, Some(&container(2 << 20))), Err(PluginError::TooLarge(length)) if length > PART_MAX)
        );
    }

    #[tokio::test]
    async fn a_question_that_is_too_long_is_the_containers_fault() {
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let (connection, _calls, work) = Connection::new(ours);
        let worker = tokio::spawn(work);
        let plugin = Plugin {
            name: Name { index: "10".into(), base: "a".into() },
            title: "10-a".into(),
            events: EVENTS,
            connection,
            limit: Duration::from_secs(60),
            turn: Mutex::default(),
        };
        let container = Container { env: vec!["x".repeat(PAYLOAD_MAX)], ..Container::default() };
        let request = api::CreateContainerRequest { pod: None, container: Some(container.clone()) };
        let answer =
            plugin.ask::<api::CreateContainerResponse>(Event::CreateContainer, "CreateContainer", &request).await;
        assert!(matches!(&answer, Err(PluginError::Refused { plugin, .. }) if plugin == "10-a"), "{answer:?}");
        let about = api::StateChangeEvent { container: Some(container), ..Default::default() };
        assert!(plugin.tell(Event::StartContainer, &about).await.is_err());
        assert!(!plugin.connection.is_closed(), "the plugin stays");
        plugin.connection.close();
        worker.await.unwrap();
    }
}
