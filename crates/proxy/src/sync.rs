//! The loop: changes of the store become transactions.
//!
//! ```text
//!           a change ┌─────────────── wait ◄──────────────┐
//!                    ▼                                     │
//!   pace ─► take all changes ─► in step? ─yes─► difference ┤─ done: answer who waits
//!                                  │no                     │
//!                                  └──► replace everything ┘─ failed: not in step, back off
//! ```
//!
//! The first change after a while is written at once; those that come while one is written go together into the next
//! transaction. A transaction that fails leaves the kernel as it was and the loop out of step: then everything is written
//! anew, the first time at once.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster::{EventKind, Key, Source, Store, Watch, event_about};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::jiff::Timestamp;
use service::{Explanation, Frontend, Model, Name, Network, Problem};
use sys::rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::{self, Backend};
use crate::conntrack::Conntrack;
use crate::flows::{self, Suspects};
use crate::health::Health;
use crate::health_ports::{Blocked, HealthPorts};
use crate::metrics::{Extent, Metrics};
use crate::proxy::resumed;
use crate::surroundings::Surroundings;
use crate::trouble::Trouble;
use crate::{Config, Mode, Owned, RulesError, StartError, Tallies};

/// As upstream's events name themselves.
const COMPONENT: &str = "kube-proxy";
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long packets that the rules of before have led to an endpoint may be on their way to it: they wait in a processor's
/// backlog, which a busy machine empties as it runs any other thread.
const ON_THE_WAY: Duration = Duration::from_millis(30);
/// However long the kernel took, the next change waits no longer than this.
const PACE_MAX: Duration = Duration::from_secs(1);
/// Objects that are decoded before others get the thread.
const DECODE_MAX: usize = 200;

/// When the cluster changed what a slice says (RFC 3339).
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Slices whose way to the rules is measured with one sync.
const TRIGGERS_MAX: usize = 10_000;

/// What others ask of the loop.
#[derive(Debug)]
pub(crate) enum Request {
    /// Tell when no rule leads to this ending pod.
    Left { pod_uid: String, addresses: Vec<IpAddr>, done: oneshot::Sender<()> },
    /// Tell when the kernel says what the store says.
    Settled(oneshot::Sender<()>),
    /// List what is ours in the kernel.
    Owned(oneshot::Sender<Result<Vec<Owned>, RulesError>>),
    /// Tell what a packet to a Service meets.
    Explain { service: Name, answer: oneshot::Sender<Option<Explanation>> },
    /// Count what the rules are.
    Tallies(oneshot::Sender<Tallies>),
}

/// The kernel's side: the rules, and connection tracking.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) rules: Box<dyn Backend>,
    /// None where no connection is led by the kernel.
    flows: Option<Conntrack>,
}

impl Kernel {
    /// Opens both in the calling thread's namespace.
    pub(crate) fn open(config: &Config) -> Result<Kernel, StartError> {
        let rules = backend::open(config)?;
        let tracks = config.mode != Mode::Userspace;
        Ok(Kernel { rules, flows: tracks.then(Conntrack::open).transpose().map_err(StartError::Kernel)? })
    }
}

/// The state of the loop.
pub(crate) struct Sync {
    config: Config,
    /// Where the rules are, for messages.
    place: String,
    source: Arc<dyn Source>,
    services: Watch<Service>,
    slices: Watch<EndpointSlice>,
    nodes: Watch<Node>,
    ranges: Watch<ServiceCIDR>,
    requests: mpsc::Receiver<Request>,
    stop: CancellationToken,
    model: Model,
    surroundings: Surroundings,
    /// What holds around the rules that were replaced last.
    network: Network,
    health_ports: HealthPorts,
    telemetry: Telemetry,
    started: Timestamp,
    /// Slices that have changed since the last sync: IPv6, and when.
    triggers: Vec<(bool, Timestamp)>,
    /// Out on loan while it works.
    kernel: Option<Kernel>,
    step: Step,
    /// When rules changed last.
    changed: Instant,
    /// UDP frontends whose flows have not been looked at since they changed.
    suspicious: HashSet<Frontend>,
    waiting: Vec<Request>,
    said: BTreeSet<Problem>,
    /// Health-check ports that could not be opened, as told.
    blocked: BTreeSet<(Name, u16)>,
    /// Problems may be others than those said.
    services_changed: bool,
    /// No sync before.
    next_sync: Instant,
    /// When to look whether the rules are still there.
    next_look: Instant,
    /// Nobody knows whether they are.
    unseen: Trouble,
    /// No look for stale flows before.
    next_flows: Instant,
    /// They cannot be removed.
    stale: Trouble,
    /// Other modes may have left rules.
    other_modes: bool,
}

/// What the loop tells of itself. A handle.
#[derive(Debug, Clone)]
pub(crate) struct Telemetry {
    pub(crate) health: Arc<Health>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Telemetry {
    pub(crate) fn new(config: &Config) -> Telemetry {
        Telemetry { health: Arc::new(Health::new(config.sync_period)), metrics: Arc::new(Metrics::new(config.mode)) }
    }

    /// Something has come that may change rules.
    fn queued(&self) {
        self.health.queued(std::time::Instant::now());
        self.metrics.queued();
    }
}

/// How the kernel's rules relate to the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// They are the same.
    In,
    /// Nobody knows; the next attempt to replace them is due then.
    Out { due: Instant, backoff: Duration },
}

/// Nothing is known yet.
fn model(config: &Config) -> Model {
    let model = Model::new(&config.node_name);
    if config.external_ips { model } else { model.without_external_ips() }
}

impl Sync {
    pub(crate) fn new(
        config: Config,
        source: Arc<dyn Source>,
        kernel: Kernel,
        requests: mpsc::Receiver<Request>,
        telemetry: Telemetry,
        stop: CancellationToken,
    ) -> Sync {
        let store = source.store();
        let now = Instant::now();
        Sync {
            services: store.services().watch(),
            slices: store.endpoint_slices().watch(),
            nodes: store.nodes().watch(),
            ranges: store.service_cidrs().watch(),
            surroundings: Surroundings::new(&config),
            network: Network::default(),
            health_ports: HealthPorts::new(telemetry.health.clone()),
            telemetry,
            started: Timestamp::now(),
            triggers: Vec::new(),
            blocked: BTreeSet::new(),
            model: model(&config),
            source,
            other_modes: config.remove_other_modes,
            place: kernel.rules.place(),
            config,
            requests,
            stop,
            kernel: Some(kernel),
            step: Step::Out { due: now, backoff: BACKOFF_FIRST },
            changed: now,
            suspicious: HashSet::new(),
            waiting: Vec::new(),
            said: BTreeSet::new(),
            services_changed: false,
            next_sync: now,
            next_look: now,
            unseen: Trouble::default(),
            next_flows: now,
            stale: Trouble::default(),
        }
    }

    /// Runs until it is told to stop.
    pub(crate) async fn run(mut self) -> Kernel {
        let stop = self.stop.clone();
        // Each step that the cancellation may cut short is one that waits; the kernel's work is never left half-way.
        let store = self.source.store().clone();
        if stop.run_until_cancelled(self.know(store)).await.is_some() {
            loop {
                self.take_changes().await;
                self.look().await;
                self.sync().await;
                self.answer().await;
                if stop.run_until_cancelled(self.wait()).await.is_none() {
                    break;
                }
            }
        }
        self.kernel.expect("it comes back from each loan")
    }

    /// Takes in what comes until everything has come that was there at the start. Cancel-safe.
    async fn know(&mut self, store: Store) {
        let known = async {
            store.services().synced().await;
            store.endpoint_slices().synced().await;
            store.nodes().synced().await;
        };
        tokio::pin!(known);
        loop {
            tokio::select! {
                () = &mut known => return,
                change = self.services.next() => self.set_service(change),
                change = self.slices.next() => self.set_slice(change),
                change = self.nodes.next() => self.set_node(change),
                change = self.ranges.next() => self.surroundings.set_service_cidr(&change),
            }
        }
    }

    /// Returns when there is something to do and the pace allows it.
    async fn wait(&mut self) {
        let due = match self.step {
            Step::In => self.next_look,
            Step::Out { due, .. } => due,
        };
        // All of these are cancel-safe: a change stays in its watch until it is taken.
        tokio::select! {
            Some(request) = self.requests.recv() => self.waiting.push(request),
            change = self.services.next() => self.set_service(change),
            change = self.slices.next() => self.set_slice(change),
            change = self.nodes.next() => self.set_node(change),
            change = self.ranges.next() => self.surroundings.set_service_cidr(&change),
            () = tokio::time::sleep_until(due) => {}
        }
        tokio::time::sleep_until(self.next_sync).await;
    }

    async fn take_changes(&mut self) {
        let mut taken = 0;
        loop {
            if let Some(change) = self.services.try_next() {
                self.set_service(change);
            } else if let Some(change) = self.slices.try_next() {
                self.set_slice(change);
            } else if let Some(change) = self.nodes.try_next() {
                self.set_node(change);
            } else if let Some(change) = self.ranges.try_next() {
                self.surroundings.set_service_cidr(&change);
            } else {
                break;
            }
            taken += 1;
            if taken % DECODE_MAX == 0 {
                tokio::task::yield_now().await;
            }
        }
        while let Ok(request) = self.requests.try_recv() {
            self.waiting.push(request);
        }
    }

    fn set_service(&mut self, change: cluster::Change<Service>) {
        self.services_changed = true;
        self.telemetry.metrics.service_changed();
        self.telemetry.queued();
        match change.object {
            Some(service) => self.model.set_service(&service),
            None => self.model.remove_service(change.key.namespace(), change.key.name()),
        }
    }

    fn set_slice(&mut self, change: cluster::Change<EndpointSlice>) {
        self.telemetry.metrics.endpoints_changed();
        self.telemetry.queued();
        match change.object {
            Some(slice) => {
                self.note_trigger(&slice);
                self.model.set_slice(&slice);
            }
            None => self.model.remove_slice(change.key.namespace(), change.key.name()),
        }
    }

    /// What has changed before the start says nothing of this proxy's speed.
    fn note_trigger(&mut self, slice: &EndpointSlice) {
        let text = slice.metadata.annotations.as_ref().and_then(|all| all.get(TRIGGERED));
        let Some(time) = text.and_then(|text| text.parse::<Timestamp>().ok()) else { return };
        if time >= self.started && self.triggers.len() < TRIGGERS_MAX {
            self.triggers.push((slice.address_type == "IPv6", time));
        }
    }

    fn set_node(&mut self, change: cluster::Change<Node>) {
        let own = change.key.name() == self.config.node_name;
        if let Some(node) = change.object.filter(|_| own) {
            self.model.set_node(&node);
            self.surroundings.set_node(&node);
        }
    }

    /// Finds out whether somebody has removed the rules.
    async fn look(&mut self) {
        let now = Instant::now();
        if self.step != Step::In || self.next_look > now {
            return;
        }
        self.next_look = now + self.config.look_every;
        let looked = self.with_kernel(|kernel| kernel.rules.is_there()).await;
        if looked.is_ok() && self.unseen.ends() {
            tracing::info!(place = self.place, "the kernel tells again whether the service rules are there");
        }
        match looked {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(place = self.place, "somebody has removed the service rules; they are written anew");
                self.step = Step::Out { due: now, backoff: BACKOFF_FIRST };
                self.telemetry.queued();
            }
            Err(error) => {
                if self.unseen.fails(&error) {
                    tracing::warn!(%error, "the kernel does not tell whether the service rules are there");
                }
                self.next_look = Instant::now() + self.unseen.rest();
            }
        }
    }

    /// Brings the kernel into step with the model.
    async fn sync(&mut self) {
        let difference = self.model.update();
        self.tell_problems();
        self.suspicious.extend(flows::suspicious(&difference));
        let begun = Instant::now();
        self.heed_surroundings(begun);
        match self.step {
            Step::In if difference.is_empty() => {}
            Step::In => {
                let families = difference.families();
                let update = move |kernel: &mut Kernel| kernel.rules.update(&difference).map(|()| kernel.rules.took());
                match self.with_kernel(update).await {
                    Ok(took) => {
                        self.changed = Instant::now();
                        let all = begun.elapsed();
                        let took = took.unwrap_or_else(|| families.map(|is_touched| is_touched.then_some(all)));
                        self.telemetry.metrics.synced(Extent::Difference, took);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a change of service rules was refused; all of them are written anew");
                        self.telemetry.metrics.failed(Extent::Difference);
                        self.replace(BACKOFF_FIRST).await;
                    }
                }
            }
            Step::Out { due, .. } if due > begun => {}
            Step::Out { backoff, .. } => self.replace(backoff).await,
        }
        if self.step == Step::In {
            self.tell_in_step();
            self.delete_stale_flows().await;
        }
        self.serve_health_checks();
        let ended = Instant::now();
        // Half of the time is for others, however slow the kernel is.
        self.next_sync = ended + (ended - begun).clamp(self.config.pace, PACE_MAX);
    }

    /// What the rules go by beside the objects may have changed.
    fn heed_surroundings(&mut self, now: Instant) {
        let network = self.surroundings.network();
        if network == self.network {
            return;
        }
        tracing::info!(?network, "what is known of the network has changed");
        self.network = network;
        self.telemetry.queued();
        if self.step == Step::In {
            self.step = Step::Out { due: now, backoff: BACKOFF_FIRST };
        }
    }

    fn tell_in_step(&mut self) {
        self.telemetry.health.updated();
        self.telemetry.metrics.settled();
        let now = Timestamp::now();
        for (ipv6, since) in self.triggers.drain(..) {
            self.telemetry.metrics.programmed(ipv6, now.duration_since(since).unsigned_abs());
        }
    }

    /// Load balancers ask on these ports.
    fn serve_health_checks(&mut self) {
        let blocked = self.health_ports.set(self.model.health_checks(), &self.network);
        for one in &blocked {
            if !self.blocked.contains(&(one.service.clone(), one.port)) {
                self.tell_blocked(one);
            }
        }
        self.blocked = blocked.into_iter().map(|one| (one.service, one.port)).collect();
    }

    fn tell_blocked(&self, blocked: &Blocked) {
        let Blocked { service, port, error } = blocked;
        tracing::warn!(%service, port, %error, "load balancers cannot ask for the health of a service");
        let node = &self.config.node_name;
        let message = format!("node {node} cannot listen on healthCheckNodePort {port} of Service {service}: {error}");
        self.tell_of(service, "FailedToStartServiceHealthcheck", message);
    }

    async fn replace(&mut self, backoff: Duration) {
        let (rules, network) = (self.model.rules().clone(), self.network.clone());
        let (frontends, begun) = (rules.len(), Instant::now());
        self.suspicious.extend(flows::all(&rules));
        let replaced = self.with_kernel(move |kernel| {
            // Those that went while nobody looked: their clients must not stay where they are.
            let left = kernel.rules.udp_frontends().unwrap_or_else(|error| {
                tracing::warn!(%error, "UDP clients of Services that went meanwhile stay where they are until they pause");
                Vec::new()
            });
            kernel.rules.replace(&rules, &network).map(|()| (left, kernel.rules.took()))
        });
        match replaced.await {
            Ok((left, took)) => {
                self.suspicious.extend(left);
                self.step = Step::In;
                self.changed = Instant::now();
                let took = took.unwrap_or([Some(begun.elapsed()); 2]);
                self.telemetry.metrics.synced(Extent::All, took);
                tracing::info!(place = self.place, frontends, "service rules are in place");
                self.remove_other_modes().await;
            }
            Err(error) => {
                self.telemetry.metrics.failed(Extent::All);
                self.tell_failure(&error, backoff);
                let next = (backoff * 2).min(BACKOFF_MAX);
                self.step = Step::Out { due: Instant::now() + backoff, backoff: next };
            }
        }
    }

    /// Once this mode's rules are in place: connections that are open do not depend on rules, new ones meet either.
    async fn remove_other_modes(&mut self) {
        if !std::mem::take(&mut self.other_modes) {
            return;
        }
        let config = self.config.clone();
        if let Err(error) = self.with_kernel(move |_| backend::remove_other_modes(&config)).await {
            // The next replacement tries again.
            self.other_modes = true;
            let mode = self.config.mode;
            tracing::warn!(%error, "rules of other proxy modes than {mode} cannot be removed; they stay beside the new ones");
        }
    }

    async fn delete_stale_flows(&mut self) {
        if self.next_flows > Instant::now() {
            return;
        }
        let suspects = Suspects::new(&self.suspicious, self.model.rules());
        if suspects.is_empty() {
            return;
        }
        let begun = Instant::now();
        let delete = move |flows: &mut Conntrack| flows.delete_stale(&suspects);
        let deleted = self.with_kernel(move |kernel| kernel.flows.as_mut().map_or(Ok([0; 2]), delete)).await;
        match deleted {
            Ok(deleted) => {
                self.suspicious.clear();
                if self.stale.ends() {
                    tracing::info!("flows of UDP endpoints that left can be removed again");
                }
                self.telemetry.metrics.flows_checked(begun.elapsed(), deleted);
                let deleted: u64 = deleted.iter().sum();
                if deleted > 0 {
                    tracing::debug!(deleted, "flows of UDP endpoints that left are gone");
                }
            }
            // A later sync looks again, if that can help.
            Err(error) => {
                if is_lacking(error.errno) {
                    self.suspicious.clear();
                }
                if self.stale.fails(&error) {
                    tracing::warn!(
                        %error,
                        "flows of UDP endpoints that left cannot be removed: their clients go on to send there until \
                         they pause; the kernel needs CONFIG_NF_CT_NETLINK"
                    );
                }
                self.next_flows = Instant::now() + self.stale.rest();
            }
        }
    }

    /// Where the kernel leads connections, it knows how many.
    async fn count_connections(&mut self, explained: &mut Explanation) {
        let frontends: HashSet<Frontend> = explained.led().collect();
        let counted = self.with_kernel(move |kernel| kernel.flows.as_mut().map(|flows| flows.count(&frontends))).await;
        match counted {
            Some(Ok(counts)) => {
                explained.set_connections(|protocol, endpoint| counts.get(&(protocol, endpoint)).copied().unwrap_or(0))
            }
            Some(Err(error)) => tracing::warn!(%error, "connections of a Service cannot be counted"),
            None => {}
        }
    }

    async fn with_kernel<T: Send + 'static>(&mut self, work: impl FnOnce(&mut Kernel) -> T + Send + 'static) -> T {
        let mut kernel = self.kernel.take().expect("it comes back from each loan");
        let (kernel, result) = resumed(
            tokio::task::spawn_blocking(move || {
                let result = work(&mut kernel);
                (kernel, result)
            })
            .await,
        );
        self.kernel = Some(kernel);
        result
    }

    /// Answers those whose time has come.
    async fn answer(&mut self) {
        // An answer that cannot be sent is one that nobody waits for.
        for request in std::mem::take(&mut self.waiting) {
            match request {
                Request::Owned(answer) => {
                    let owned = self.with_kernel(|kernel| kernel.rules.owned()).await;
                    let _ = answer.send(owned);
                }
                Request::Explain { service, answer } => {
                    let mut explained = self.model.explain(&service.namespace, &service.name);
                    if let Some(explained) = &mut explained {
                        self.count_connections(explained).await;
                    }
                    let _ = answer.send(explained);
                }
                Request::Tallies(answer) => {
                    let tallies = self.with_kernel(|kernel| kernel.rules.tallies()).await;
                    let _ = answer.send(Tallies { refusals: self.model.rules().refusals(), ..tallies });
                }
                Request::Settled(done) if self.step == Step::In => {
                    let _ = done.send(());
                }
                Request::Left { pod_uid, addresses, done }
                    if self.step == Step::In && !self.model.serves(&pod_uid, &addresses) =>
                {
                    self.answer_left(done);
                }
                request => self.waiting.push(request),
            }
        }
        self.waiting.retain(|request| !request.is_abandoned());
    }

    /// Answers at once, unless rules have changed a moment ago: perhaps those that led there.
    fn answer_left(&self, done: oneshot::Sender<()>) {
        let due = self.changed + ON_THE_WAY;
        if due <= Instant::now() {
            let _ = done.send(());
            return;
        }
        // It ends by itself, a moment later.
        tokio::spawn(async move {
            tokio::time::sleep_until(due).await;
            let _ = done.send(());
        });
    }

    fn tell_problems(&mut self) {
        if !std::mem::take(&mut self.services_changed) {
            return;
        }
        let problems: BTreeSet<Problem> = self.model.problems().into_iter().collect();
        for problem in problems.difference(&self.said) {
            tracing::warn!(service = %problem.service, %problem, "a service does not work as written");
            self.tell_of(&problem.service, "ServiceNotProxied", problem.to_string());
        }
        self.said = problems;
    }

    /// An event about a Service: by its name alone if the store keeps no more of it.
    fn tell_of(&self, service: &Name, reason: &str, message: String) {
        let key = Key::new(&service.namespace, &service.name);
        let object = self.source.store().services().get(&key).unwrap_or_else(|| {
            let mut named = Service::default();
            named.metadata.namespace = Some((*service.namespace).into());
            named.metadata.name = Some((*service.name).into());
            named.into()
        });
        self.source.event(event_about(&*object, EventKind::Warning, reason, message, COMPONENT));
    }

    fn tell_failure(&self, error: &RulesError, retry_in: Duration) {
        tracing::error!(place = self.place, %error, ?retry_in, "service rules cannot be written");
        if let Some(node) = self.source.store().nodes().get(&Key::cluster(&self.config.node_name)) {
            let message = format!(
                "the rules of Services were refused in {}: {error}; Services stay as they were, trying again",
                self.place
            );
            self.source.event(event_about(&*node, EventKind::Warning, "ServiceRulesFailed", message, COMPONENT));
        }
    }
}

/// Whether the kernel has no such part.
fn is_lacking(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::OPNOTSUPP | Errno::PROTONOSUPPORT)
}

impl Request {
    /// Whether nobody waits for the answer any more.
    fn is_abandoned(&self) -> bool {
        match self {
            Request::Left { done, .. } | Request::Settled(done) => done.is_closed(),
            Request::Owned(answer) => answer.is_closed(),
            Request::Explain { answer, .. } => answer.is_closed(),
            Request::Tallies(answer) => answer.is_closed(),
        }
    }
}
