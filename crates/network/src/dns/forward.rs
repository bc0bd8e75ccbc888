//! Questions under way to other servers: whom to ask next, how long to wait, who gets the answer. Pure: sockets and
//! clock are the caller's.
//!
//! ```text
//! ask ──► sent to the first server ── answer ──► all who asked the same
//!             ╰─ refused, or silent for a while ──► sent to the next one, too ── … ── nobody left ──► SERVFAIL
//! ```
//! Who asks what is being asked already waits with the others. So a resolver that leads back here cannot make a storm,
//! and many clients cost one question.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use domain::base::iana::Rcode;

use super::message::{Ask, Query, Transport, is_answer, is_failure};

/// Questions under way at most; each holds a socket for every server that was asked.
const QUESTIONS_MAX: usize = 256;
/// Queries of one client that wait at most, so that one pod leaves room for the others.
const PER_CLIENT_MAX: usize = 64;
/// All queries that wait.
const WAITING_MAX: usize = 1024;
/// Silence after which the next server is asked, too. A resolver that has to ask the world takes up to a second.
const PATIENCE: Duration = Duration::from_millis(1200);
/// The same for a server that was silent or unreachable lately.
const PATIENCE_LITTLE: Duration = Duration::from_millis(250);
/// How long a server counts as silent.
const GRUDGE: Duration = Duration::from_secs(10);
/// All in all; the usual client gives up after 5 s, and shall learn that it failed.
const LIFE: Duration = Duration::from_secs(4);
/// The same when every server was silent lately.
const LIFE_SHORT: Duration = Duration::from_secs(1);

/// Who asked and gets the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    /// By datagram.
    Udp {
        /// Number of the socket on which the query came.
        socket: usize,
        /// Where from.
        address: SocketAddr,
    },
    /// By connection.
    Tcp {
        /// Number of the connection.
        connection: u32,
        /// Where from.
        ip: IpAddr,
    },
}

impl Client {
    fn ip(&self) -> IpAddr {
        match self {
            Client::Udp { address, .. } => address.ip(),
            Client::Tcp { ip, .. } => *ip,
        }
    }

    fn transport(&self) -> Transport {
        match self {
            Client::Udp { .. } => Transport::Udp,
            Client::Tcp { .. } => Transport::Tcp,
        }
    }
}

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Open a socket for this flight and send the message; report what comes back, or that it failed.
    Send { flight: u32, server: SocketAddr, transport: Transport, message: Vec<u8> },
    /// Close the flight's socket.
    Close { flight: u32 },
    /// Send the reply.
    Reply { client: Client, reply: Vec<u8> },
}

/// One message to one server.
#[derive(Debug)]
struct Flight {
    number: u32,
    server: SocketAddr,
    /// As sent, with its ID.
    message: Vec<u8>,
}

/// One question and all who wait for its answer.
#[derive(Debug)]
struct Question {
    message: Vec<u8>,
    transport: Transport,
    waiting: Vec<(Client, Query, Ask)>,
    flights: Vec<Flight>,
    servers: VecDeque<SocketAddr>,
    /// What the last server said that could not help.
    failure: Option<Vec<u8>>,
    next_server_at: Instant,
    ends_at: Instant,
}

/// All questions under way.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    questions: Vec<Question>,
    silent_until: HashMap<SocketAddr, Instant>,
    flights_made: u32,
}

impl Forwards {
    /// Sends a question on its way. `id` draws a number that cannot be guessed.
    pub(super) fn ask(
        &mut self,
        (client, query, ask): (Client, Query, Ask),
        servers: &[SocketAddr],
        now: Instant,
        id: impl FnMut() -> u16,
    ) -> Vec<Action> {
        let waiting = self.questions.iter().flat_map(|question| &question.waiting);
        let (mut all, mut own) = (0, 0);
        for (other, ..) in waiting {
            all += 1;
            own += usize::from(other.ip() == client.ip());
        }
        let transport = client.transport();
        let same = |q: &Question| q.transport == transport && q.message == ask.message;
        let known = self.questions.iter().position(same);
        let full =
            own >= PER_CLIENT_MAX || all >= WAITING_MAX || self.questions.len() >= QUESTIONS_MAX && known.is_none();
        if full || servers.is_empty() {
            return vec![Action::Reply { client, reply: query.fail(Rcode::SERVFAIL) }];
        }
        if let Some(known) = known {
            self.questions[known].waiting.push((client, query, ask));
            return Vec::new();
        }
        let (order, all_silent) = self.order(servers, now);
        self.questions.push(Question {
            message: ask.message.clone(),
            transport,
            waiting: vec![(client, query, ask)],
            flights: Vec::new(),
            servers: order,
            failure: None,
            next_server_at: now,
            ends_at: now + if all_silent { LIFE_SHORT } else { LIFE },
        });
        self.send_next(self.questions.len() - 1, now, id)
    }

    /// Each server twice, those that were silent lately last; and whether all were.
    fn order(&self, servers: &[SocketAddr], now: Instant) -> (VecDeque<SocketAddr>, bool) {
        let (silent, good): (Vec<_>, Vec<_>) = servers.iter().partition(|server| self.is_silent(**server, now));
        let all_silent = good.is_empty();
        let once = || good.iter().chain(&silent).copied();
        (once().chain(once()).collect(), all_silent)
    }

    fn is_silent(&self, server: SocketAddr, now: Instant) -> bool {
        self.silent_until.get(&server).is_some_and(|until| *until > now)
    }

    /// Asks the next server, or ends the question when there is none and nothing can come any more.
    fn send_next(&mut self, index: usize, now: Instant, mut id: impl FnMut() -> u16) -> Vec<Action> {
        let Some(server) = self.questions[index].servers.pop_front() else {
            let question = &mut self.questions[index];
            question.next_server_at = question.ends_at;
            return if question.flights.is_empty() { self.end(index, None) } else { Vec::new() };
        };
        let patience = if self.is_silent(server, now) { PATIENCE_LITTLE } else { PATIENCE };
        self.flights_made = self.flights_made.wrapping_add(1);
        let number = self.flights_made;
        let question = &mut self.questions[index];
        question.next_server_at = now + patience;
        let mut message = question.message.clone();
        message[..2].copy_from_slice(&id().to_be_bytes());
        question.flights.push(Flight { number, server, message: message.clone() });
        vec![Action::Send { flight: number, server, transport: question.transport, message }]
    }

    fn find(&self, flight: u32) -> Option<(usize, usize)> {
        self.questions.iter().enumerate().find_map(|(index, question)| {
            question.flights.iter().position(|other| other.number == flight).map(|place| (index, place))
        })
    }

    /// A message came in for a flight. What does not answer it is passed over: it may be forged.
    pub(super) fn received(
        &mut self,
        flight: u32,
        response: &[u8],
        now: Instant,
        id: impl FnMut() -> u16,
    ) -> Vec<Action> {
        let Some((index, place)) = self.find(flight) else { return Vec::new() };
        let question = &mut self.questions[index];
        if !is_answer(&question.flights[place].message, response) {
            return Vec::new();
        }
        let server = question.flights[place].server;
        self.silent_until.remove(&server);
        if !is_failure(response) {
            return self.end(index, Some(response));
        }
        let question = &mut self.questions[index];
        question.failure = Some(response.to_vec());
        question.servers.retain(|other| *other != server);
        self.drop_flight(index, place, now, id)
    }

    /// A flight's socket failed: nobody is there, or there is no way.
    pub(super) fn failed(&mut self, flight: u32, now: Instant, id: impl FnMut() -> u16) -> Vec<Action> {
        let Some((index, place)) = self.find(flight) else { return Vec::new() };
        self.silent_until.insert(self.questions[index].flights[place].server, now + GRUDGE);
        self.drop_flight(index, place, now, id)
    }

    fn drop_flight(&mut self, index: usize, place: usize, now: Instant, id: impl FnMut() -> u16) -> Vec<Action> {
        let flight = self.questions[index].flights.swap_remove(place).number;
        let mut actions = vec![Action::Close { flight }];
        actions.extend(self.send_next(index, now, id));
        actions
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant, mut id: impl FnMut() -> u16) -> Vec<Action> {
        let mut actions = Vec::new();
        for index in (0..self.questions.len()).rev() {
            let question = &self.questions[index];
            if question.ends_at.min(question.next_server_at) > now {
                continue;
            }
            for flight in &question.flights {
                self.silent_until.insert(flight.server, now + GRUDGE);
            }
            if question.ends_at <= now {
                actions.extend(self.end(index, None));
            } else {
                actions.extend(self.send_next(index, now, &mut id));
            }
        }
        self.silent_until.retain(|_, until| *until > now);
        actions
    }

    /// When [`Forwards::tick`] has something to do.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.questions.iter().map(|question| question.ends_at.min(question.next_server_at)).min()
    }

    /// Nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.questions.is_empty()
    }

    fn end(&mut self, index: usize, response: Option<&[u8]>) -> Vec<Action> {
        let question = self.questions.swap_remove(index);
        let response = response.or(question.failure.as_deref());
        let close = question.flights.iter().map(|flight| Action::Close { flight: flight.number });
        let reply = |(client, query, ask): &(Client, Query, Ask)| Action::Reply {
            client: *client,
            reply: response.map_or_else(|| query.fail(Rcode::SERVFAIL), |response| query.relay(ask, response)),
        };
        close.chain(question.waiting.iter().map(reply)).collect()
    }
}

#[cfg(test)]
mod tests {
    use domain::base::{Message, MessageBuilder, Name, Rtype};

    use super::*;
    use crate::dns::message::Verdict;
    use crate::dns::zone::Zone;

    const A: &str = "192.0.2.1:53";
    const B: &str = "192.0.2.2:53";

    struct World {
        forwards: Forwards,
        now: Instant,
        servers: Vec<SocketAddr>,
    }

    fn client(n: u16) -> Client {
        Client::Udp { socket: 0, address: ([10, 0, 0, 1], n).into() }
    }

    impl World {
        fn new(servers: &[&str]) -> World {
            let servers = servers.iter().map(|server| server.parse().unwrap()).collect();
            World { forwards: Forwards::default(), now: Instant::now(), servers }
        }

        fn ask_as(&mut self, client: Client, name: &str) -> Vec<Action> {
            let name: Name<Vec<u8>> = name.parse().unwrap();
            let mut builder = MessageBuilder::new_vec().question();
            builder.push((name, Rtype::A)).unwrap();
            let query = Query::read(&builder.finish(), Transport::Udp).unwrap();
            let Verdict::Ask(ask) = query.answer(&Zone::new("cluster.local").unwrap(), 0) else { panic!("known here") };
            self.forwards.ask((client, query, ask), &self.servers, self.now, || 7)
        }

        fn ask(&mut self, name: &str) -> Vec<Action> {
            self.ask_as(client(1), name)
        }

        fn answer(&mut self, sent: &Action, rcode: Rcode) -> Vec<Action> {
            let Action::Send { flight, message, .. } = sent else { panic!("{sent:?}") };
            let message = Message::from_slice(message).unwrap();
            let response = MessageBuilder::new_vec().start_answer(message, rcode).unwrap().finish();
            self.forwards.received(*flight, &response, self.now, || 8)
        }

        fn fail(&mut self, sent: &Action) -> Vec<Action> {
            let Action::Send { flight, .. } = sent else { panic!("{sent:?}") };
            self.forwards.failed(*flight, self.now, || 9)
        }

        /// Lets time pass until something happens.
        fn wait(&mut self) -> Vec<Action> {
            self.now = self.forwards.next_tick().expect("something is due");
            self.forwards.tick(self.now, || 10)
        }
    }

    fn show(actions: &[Action]) -> Vec<String> {
        let text = |action: &Action| match action {
            Action::Send { server, .. } => format!("send {server}"),
            Action::Close { .. } => "close".to_owned(),
            Action::Reply { client: Client::Udp { address, .. }, reply } => {
                format!("{} to {}", Message::from_slice(reply).unwrap().header().rcode(), address.port())
            }
            Action::Reply { client, .. } => format!("{client:?}"),
        };
        actions.iter().map(text).collect()
    }

    #[test]
    fn answers_of_any_kind_but_failures_are_passed_on() {
        for rcode in [Rcode::NOERROR, Rcode::NXDOMAIN] {
            let mut world = World::new(&[A, B]);
            let sent = world.ask("example.com");
            assert_eq!(show(&sent), ["send 192.0.2.1:53"]);
            assert_eq!(show(&world.answer(&sent[0], rcode)), ["close".to_owned(), format!("{rcode} to 1")]);
            assert!(world.forwards.is_empty() && world.forwards.next_tick().is_none());
        }
    }

    #[test]
    fn the_next_server_is_asked_when_one_fails() {
        let mut world = World::new(&[A, B]);
        let first = world.ask("example.com");
        let second = world.answer(&first[0], Rcode::SERVFAIL);
        assert_eq!(show(&second), ["close", "send 192.0.2.2:53"]);
        assert_eq!(show(&world.answer(&second[1], Rcode::REFUSED)), ["close", "REFUSED to 1"], "the last one's word");
    }

    #[test]
    fn a_slow_server_may_still_answer() {
        let mut world = World::new(&[A, B]);
        let first = world.ask("example.com");
        assert_eq!(show(&world.wait()), ["send 192.0.2.2:53"]);
        assert_eq!(show(&world.answer(&first[0], Rcode::NOERROR)), ["close", "close", "NOERROR to 1"]);
    }

    #[test]
    fn silence_ends_before_the_client_gives_up_and_is_remembered() {
        let mut world = World::new(&[A]);
        let begin = world.now;
        world.ask("example.com");
        assert_eq!(show(&world.wait()), ["send 192.0.2.1:53"]);
        let mut end = Vec::new();
        while end.is_empty() {
            end = world.wait();
        }
        assert_eq!(show(&end), ["close", "close", "SERVFAIL to 1"]);
        assert_eq!(world.now - begin, LIFE);
        let begin = world.now;
        world.ask("example.com");
        while !world.forwards.is_empty() {
            world.wait();
        }
        assert_eq!(world.now - begin, LIFE_SHORT);
    }

    #[test]
    fn nobody_there_is_said_at_once() {
        let mut world = World::new(&[A]);
        let sent = world.ask("example.com");
        let again = world.fail(&sent[0]);
        assert_eq!(show(&again), ["close", "send 192.0.2.1:53"]);
        assert_eq!(show(&world.fail(&again[1])), ["close", "SERVFAIL to 1"]);
        assert_eq!(show(&World::new(&[]).ask("example.com")), ["SERVFAIL to 1"]);
    }

    #[test]
    fn a_server_that_was_silent_is_asked_last_for_a_while() {
        let mut world = World::new(&[A, B]);
        let sent = world.ask("example.com");
        let next = world.fail(&sent[0]);
        world.answer(&next[1], Rcode::NOERROR);
        let sent = world.ask("example.com");
        assert_eq!(show(&sent), ["send 192.0.2.2:53"]);
        world.answer(&sent[0], Rcode::NOERROR);
        world.now += GRUDGE;
        assert_eq!(show(&world.ask("example.com")), ["send 192.0.2.1:53"]);
    }

    #[test]
    fn the_same_question_goes_out_once() {
        let mut world = World::new(&[A]);
        let sent = world.ask_as(client(1), "example.com");
        assert!(world.ask_as(client(2), "example.com").is_empty(), "also if it is our own, sent back to us");
        assert_eq!(show(&world.ask_as(client(3), "eXample.com")), ["send 192.0.2.1:53"], "the case belongs to it");
        assert_eq!(show(&world.answer(&sent[0], Rcode::NOERROR)), ["close", "NOERROR to 1", "NOERROR to 2"]);
    }

    #[test]
    fn one_client_leaves_room_for_others() {
        let mut world = World::new(&[A]);
        for n in 0..PER_CLIENT_MAX {
            assert_eq!(show(&world.ask(&format!("n{n}.example.com"))), ["send 192.0.2.1:53"]);
        }
        assert_eq!(show(&world.ask("one.more.example.com")), ["SERVFAIL to 1"]);
        let other = Client::Udp { socket: 0, address: ([10, 0, 0, 2], 1).into() };
        assert_eq!(show(&world.ask_as(other, "example.com")), ["send 192.0.2.1:53"]);
    }

    #[test]
    fn forged_answers_are_passed_over() {
        let mut world = World::new(&[A]);
        let sent = world.ask("example.com");
        let Action::Send { flight, message, .. } = &sent[0] else { panic!() };
        let asked = Message::from_slice(message).unwrap();
        let mut forged = MessageBuilder::new_vec().start_answer(asked, Rcode::NXDOMAIN).unwrap().finish();
        forged[1] ^= 1;
        assert!(world.forwards.received(*flight, &forged, world.now, || 8).is_empty());
        assert_eq!(show(&world.answer(&sent[0], Rcode::NOERROR)), ["close", "NOERROR to 1"]);
    }
}
