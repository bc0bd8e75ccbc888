//! Two contestants before the same objects: what they are asked, and where their answers differ.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};
use testkit::service_lab::{Answer, Answers, Client, GATEWAY, NODE, Protocol, Question, SECOND, Times, ask_all};

use super::contestant::{Contestant, LIMIT, Make, Mode, Options, Running};
use super::known;
use super::lab::Lab;
use super::world::{Service, Slice, World, ZONE, cluster_ips, end};

/// What has not come by now is taken to be dropped, at first.
const SHORT: Duration = Duration::from_millis(250);
/// Where answers differ it is asked again, with more patience: chance and load may have done it. What is asked for the last
/// time may take as long as anything on a machine that hardly gets to it.
const PATIENT: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// Two of them at work, and all that came of it.
pub(super) struct Stage<'a> {
    pub(super) lab: &'a mut Lab,
    pub(super) sides: [Running; 2],
    pub(super) world: World,
    pub(super) differences: Vec<Difference>,
    pub(super) asked: usize,
}

/// One thing that is asked of both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Inquiry {
    pub(super) client: Client,
    pub(super) question: Question,
    pub(super) likeness: Likeness,
    /// Whether the Service that is asked leads to endpoints of this node only.
    pub(super) local: Local,
}

/// Traffic policies that are `Local`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Local {
    pub(super) inside: bool,
    pub(super) outside: bool,
}

/// When two sets of answers are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Likeness {
    /// They are the same.
    Same,
    /// As many of these endpoints answered: which ones is up to chance. The client itself saw the same, if it answered to both,
    /// and so did other endpoints of this node, and those elsewhere.
    Count(BTreeSet<IpAddr>),
}

impl Likeness {
    fn holds(&self, client: Client, [one, other]: [&Answers; 2]) -> bool {
        match self {
            Self::Same => one == other,
            Self::Count(_) => {
                self.has_same_endpoints([one, other])
                    && [Nearness::Client, Nearness::Node, Nearness::Elsewhere].iter().all(|nearness| {
                        let [one, other] = [one, other].map(|answers| seen(answers, client, *nearness));
                        one.is_empty() || other.is_empty() || one == other
                    })
            }
        }
    }

    /// Whether they are alike but for the clients that the endpoints saw.
    pub(super) fn has_same_endpoints(&self, answers: [&Answers; 2]) -> bool {
        let [one, other] = answers.map(|answers| answers.iter().filter_map(endpoint).collect::<BTreeSet<SocketAddr>>());
        let rest =
            |answers: &Answers| answers.iter().filter(|answer| !answer.is_served()).copied().collect::<Answers>();
        let is_alike = match self {
            Self::Same => one == other,
            Self::Count(all) => one.len() == other.len() && one.union(&other).all(|by| all.contains(&by.ip())),
        };
        is_alike && rest(answers[0]) == rest(answers[1])
    }
}

/// How near an endpoint is to who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nearness {
    /// It is who asks.
    Client,
    /// Another one of this node.
    Node,
    Elsewhere,
}

impl Nearness {
    fn of(endpoint: IpAddr, client: Client) -> Self {
        match known::is_local(endpoint) {
            _ if client.addresses().contains(&endpoint) => Self::Client,
            true => Self::Node,
            false => Self::Elsewhere,
        }
    }
}

/// The clients that endpoints so near saw.
fn seen(answers: &Answers, client: Client, nearness: Nearness) -> BTreeSet<IpAddr> {
    let seen = |answer: &Answer| match answer {
        Answer::Served { by, seen } if Nearness::of(by.ip(), client) == nearness => Some(*seen),
        _ => None,
    };
    answers.iter().filter_map(seen).collect()
}

/// Who answered, if somebody did.
pub(super) fn endpoint(answer: &Answer) -> Option<SocketAddr> {
    match answer {
        Answer::Served { by, .. } => Some(*by),
        _ => None,
    }
}

/// A question that was answered differently.
#[derive(Debug)]
pub(super) struct Difference {
    /// In which step of a scenario.
    pub(super) step: String,
    pub(super) what: String,
    /// What was asked and what came, if it was one of the usual questions.
    pub(super) found: Option<(Inquiry, [Answers; 2])>,
    pub(super) answers: [String; 2],
}

impl Difference {
    /// In full, with the names of the two.
    pub(super) fn show(&self, pair: [Contestant; 2]) -> String {
        let [one, other] = &self.answers;
        format!("{}: {}\n      {}: {one}\n      {}: {other}", self.step, self.what, pair[0], pair[1])
    }
}

impl fmt::Display for Inquiry {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Question { protocol, to: address, .. } = &self.question;
        write!(to, "{} to {address} from {}", protocol.name(), self.client.name())
    }
}

impl<'a> Stage<'a> {
    /// Starts both, with nothing to do but to show that they are there.
    pub(super) fn start(lab: &'a mut Lab, pair: [Contestant; 2], options: &Options) -> anyhow::Result<Self> {
        let marker = lab.write(&World::default())?;
        let start = |who, number| Running::start(who, number, options, &lab.programs);
        let mut sides = [start(pair[0], 1)?, start(pair[1], 2)?];
        for side in &mut sides {
            side.wait_for(marker)?;
        }
        let mut stage = Self { lab, sides, world: World::default(), differences: Vec::new(), asked: 0 };
        stage.show_zone()?;
        Ok(stage)
    }

    /// Makes sure that both know the node's zone. Kube-proxy 1.37.2 may miss it for good: it registers the handler of the
    /// Node's labels after it has begun to listen for them (`cmd/kube-proxy/app/server.go`, `NewNodeTopologyConfig`), and
    /// skips what has not changed since. A change it sees.
    fn show_zone(&mut self) -> anyhow::Result<()> {
        const NUMBER: u8 = 253;
        for zone in [Value::Null, json!(ZONE)] {
            self.lab.label_node(&json!({ "topology.kubernetes.io/zone": zone }))?;
        }
        let ends = [end("a").for_zones(&[ZONE]), end("r").for_zones(&["far"])];
        self.write(World { services: vec![Service::new(NUMBER)], slices: vec![Slice::new(NUMBER, &ends)] })?;
        let mut asked = inquiry(Client::Pod, Protocol::Tcp, cluster_ips(NUMBER).v4.into(), 80);
        asked.question.times = Times::Together(often(2));
        let deadline = Instant::now() + LIMIT;
        loop {
            let answers = self.answers(std::slice::from_ref(&asked))?;
            if answers.iter().flatten().all(|answers| answers.len() == 1 && answers.iter().all(Answer::is_served)) {
                return self.write(World::default());
            }
            ensure!(Instant::now() < deadline, "one of the two does not learn the node's zone");
        }
    }

    pub(super) fn pair(&self) -> [Contestant; 2] {
        [self.sides[0].who, self.sides[1].who]
    }

    /// Writes `world` and waits until both have seen it.
    pub(super) fn write(&mut self, world: World) -> anyhow::Result<()> {
        self.world = world;
        self.write_marker()?;
        // Kube-proxy with IPVS writes its services one by one, in any order, and what belongs to them after that. What is
        // written later it takes up when it has done all of it.
        let is_by_and_by = |side: &Running| side.who == Contestant { make: Make::Upstream, mode: Mode::Ipvs };
        if self.sides.iter().any(is_by_and_by) { self.write_marker() } else { Ok(()) }
    }

    /// Makes the API server have the world and another marker, and waits until both have seen that.
    fn write_marker(&mut self) -> anyhow::Result<()> {
        let marker = self.lab.write(&self.world)?;
        self.sides.iter_mut().try_for_each(|side| side.wait_for(marker))
    }

    /// Writes `world` and asks both for everything that is in it.
    pub(super) fn see(&mut self, step: &str, world: World) -> anyhow::Result<()> {
        self.see_with(step, world, Vec::new())
    }

    /// As [`Stage::see`], with `more` questions.
    pub(super) fn see_with(&mut self, step: &str, world: World, more: Vec<Inquiry>) -> anyhow::Result<()> {
        self.write(world)?;
        let inquiries = inquiries(&self.world).into_iter().chain(more).collect();
        self.compare(step, inquiries)
    }

    /// Asks both all of `inquiries` and notes where they differ.
    pub(super) fn compare(&mut self, step: &str, inquiries: Vec<Inquiry>) -> anyhow::Result<()> {
        self.asked += inquiries.len();
        let mut open = self.differing(inquiries)?;
        // What is known to differ is not asked again, unless it has to do with answers that did not come in time.
        let mut settled: Vec<_> = open.extract_if(.., |found| self.is_meant(found) && !is_silent(found)).collect();
        for limit in PATIENT {
            let patient = |(inquiry, _): (Inquiry, _)| Inquiry {
                question: Question { limit, times: oftener(inquiry.question.times), ..inquiry.question },
                ..inquiry
            };
            open = self.differing(open.into_iter().map(patient).collect())?;
            settled.extend(open.extract_if(.., |found| self.is_meant(found)));
        }
        for (inquiry, answers) in settled.into_iter().chain(open) {
            let (step, what, shown) = (step.to_owned(), inquiry.to_string(), answers.each_ref().map(shown));
            self.differences.push(Difference { step, what, found: Some((inquiry, answers)), answers: shown });
        }
        Ok(())
    }

    fn is_meant(&self, (inquiry, answers): &(Inquiry, [Answers; 2])) -> bool {
        known::reason_for(inquiry, answers.each_ref(), self.pair()).is_some()
    }

    /// Notes that `what` was answered in these ways, if they differ.
    pub(super) fn note(&mut self, step: &str, what: &str, answers: [String; 2]) {
        self.asked += 1;
        if answers[0] != answers[1] {
            let (step, what) = (step.to_owned(), what.to_owned());
            self.differences.push(Difference { step, what, found: None, answers });
        }
    }

    /// Those that are answered differently at this moment.
    pub(super) fn differing(&self, inquiries: Vec<Inquiry>) -> anyhow::Result<Vec<(Inquiry, [Answers; 2])>> {
        let mut differing = Vec::new();
        for lot in inquiries.chunks(self.at_once()) {
            let [one, other] = self.answers(lot)?;
            let answered = lot.iter().cloned().zip(one.into_iter().zip(other));
            let answered = answered.map(|(inquiry, (one, other))| (inquiry, [one, other]));
            differing.extend(
                answered.filter(|(inquiry, answers)| !inquiry.likeness.holds(inquiry.client, answers.each_ref())),
            );
        }
        Ok(differing)
    }

    /// How much is asked at the same time. The mode userspace opens a file for each flow of UDP, and each connection that is made
    /// at once with others is one: with thousands of them some give way, as they should.
    fn at_once(&self) -> usize {
        const LOT: usize = 8;
        if self.pair().iter().any(|who| who.mode == Mode::Userspace) { LOT } else { usize::MAX }
    }

    /// What each side answers, in the order of the questions. All clients of both ask at the same time.
    pub(super) fn answers(&self, inquiries: &[Inquiry]) -> anyhow::Result<[Vec<Answers>; 2]> {
        let asked = self.sides.each_ref().map(|side| {
            Client::ALL.map(|client| {
                let of = inquiries.iter().filter(|inquiry| inquiry.client == client);
                side.side.place(client).start(ask_all(of.map(|inquiry| inquiry.question.clone()).collect()))
            })
        });
        let mut answers = [Vec::new(), Vec::new()];
        for (pending, answers) in asked.into_iter().zip(&mut answers) {
            let mut of_clients = Vec::new();
            for pending in pending {
                of_clients.push(pending.wait()?.into_iter());
            }
            let next = |inquiry: &Inquiry| of_clients[inquiry.client as usize].next().unwrap_or_default();
            *answers = inquiries.iter().map(next).collect();
        }
        Ok(answers)
    }
}

/// Whether somebody got no answer.
fn is_silent((_, answers): &(Inquiry, [Answers; 2])) -> bool {
    answers.iter().any(|answers| answers.contains(&Answer::Silent))
}

fn oftener(times: Times) -> Times {
    match times {
        Times::Together(times) => Times::Together(times + times / 2),
        Times::InTurn(times) => Times::InTurn(times),
    }
}

pub(super) fn shown(answers: &Answers) -> String {
    answers.iter().map(Answer::to_string).collect::<Vec<_>>().join(", ")
}

/// Everything that can be asked of the services of a world, by everybody.
pub(super) fn inquiries(world: &World) -> Vec<Inquiry> {
    let asked = world.services.iter().filter(|service| !service.is_crowd);
    asked.flat_map(|service| of_service(service, world)).collect()
}

fn of_service(service: &Service, world: &World) -> Vec<Inquiry> {
    let endpoints = world.endpoints(service.number);
    let sticky = service.is("sessionAffinity", "ClientIP");
    let (likeness, times) = match sticky {
        true => (Likeness::Count(world.addresses(service.number)), Times::InTurn(often(endpoints).min(12))),
        false => (Likeness::Same, Times::Together(often(endpoints))),
    };
    let local = Local {
        inside: service.is("internalTrafficPolicy", "Local"),
        outside: service.is("externalTrafficPolicy", "Local"),
    };
    let mut inquiries = Vec::new();
    for port in &service.ports {
        let addresses = service.cluster_ips().into_iter().chain(service.external_ips());
        let of_node = node_addresses().into_iter();
        let targets = addresses
            .map(|address| (address, port.number))
            .chain(port.node_port.into_iter().flat_map(|number| of_node.clone().map(move |address| (address, number))));
        for (address, number) in targets {
            for client in clients(address) {
                let times = if port.protocol == Protocol::Sctp { fewer(times) } else { times };
                let question = question(client, port.protocol, SocketAddr::new(address, number), times);
                inquiries.push(Inquiry { client, question, likeness: likeness.clone(), local });
            }
        }
    }
    inquiries
}

/// A few connections to one address.
pub(super) fn inquiry(client: Client, protocol: Protocol, address: IpAddr, port: u16) -> Inquiry {
    let question = question(client, protocol, SocketAddr::new(address, port), Times::Together(3));
    Inquiry { client, question, likeness: Likeness::Same, local: Local::default() }
}

fn question(client: Client, protocol: Protocol, to: SocketAddr, times: Times) -> Question {
    Question { protocol, to, source: client.source(to.ip()), times, limit: SHORT }
}

/// So many connections meet each of `endpoints` with a probability of more than 0.9999.
fn often(endpoints: usize) -> usize {
    match endpoints {
        0 | 1 => 3,
        endpoints => 12 * endpoints.min(10),
    }
}

/// Raw sockets each hear the answers to all others.
fn fewer(times: Times) -> Times {
    match times {
        Times::Together(times) => Times::Together(times.min(24)),
        in_turn @ Times::InTurn(_) => in_turn,
    }
}

/// Loopback means the node to nobody else.
fn clients(address: IpAddr) -> Vec<Client> {
    if address.is_loopback() { vec![Client::Node] } else { Client::ALL.to_vec() }
}

fn node_addresses() -> Vec<IpAddr> {
    let own = [NODE, SECOND, GATEWAY].into_iter().flat_map(testkit::service_lab::Pair::both);
    own.chain([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]).collect()
}
