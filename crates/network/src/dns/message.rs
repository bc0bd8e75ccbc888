//! From a query's bytes to a reply's bytes, or to the question that another server must answer. Pure.

use domain::base::iana::{Class, Opcode, OptRcode, Rcode};
use domain::base::message_builder::{AdditionalBuilder, AnswerBuilder, PushError};
use domain::base::name::ParsedName;
use domain::base::record::ComposeRecord;
use domain::base::wire::ParseError;
use domain::base::{CharStr, Message, MessageBuilder, Name, Record, Rtype, Serial, StaticCompressor, ToName as _, Ttl};
use domain::rdata::{A, Aaaa, AllRecordData, Cname, Hinfo, Ns, Ptr, Soa, Srv, Txt};

use super::zone::{Answer, Data, Dname, Zone, shared};

/// Everything is known here first, so a short life costs nobody a round trip through the world.
const TTL: Ttl = Ttl::from_secs(5);
/// Largest UDP reply to a client that did not say what it takes (RFC 1035, 4.2.1).
const UDP_PLAIN_MAX: usize = 512;
/// Largest UDP reply at all: what passes without fragments (RFC 9715), and what a forged sender can have sent to others.
const UDP_MAX: u16 = 1232;
/// An OPT record without options: root, type, size, flags, length.
const OPT_LEN: usize = 11;
/// Aliases that are followed within the zone.
const ALIASES_MAX: usize = 8;
/// Longest query that is read; a name has 255 bytes, the rest is room for options.
pub(crate) const QUERY_MAX: usize = 2048;

const ANY: Rtype = Rtype::from_int(255);

type Target = StaticCompressor<Vec<u8>>;

/// How a query came and its reply goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// A well-formed query.
#[derive(Clone, Debug)]
pub(crate) struct Query {
    message: Message<Vec<u8>>,
    name: Dname,
    rtype: Rtype,
    /// Whether DNSSEC records are wanted, from a client that speaks EDNS.
    edns: Option<bool>,
    reply_max: usize,
}

/// What is done about a query.
#[derive(Clone, Debug)]
pub(crate) enum Verdict {
    Reply(Vec<u8>),
    Ask(Ask),
}

/// A question to another server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    /// The query to send, its ID 0. Equal ones have the same answer.
    pub(crate) message: Vec<u8>,
    /// Aliases that led from the client's question to this one; the client's name, or the previous target, comes first.
    chain: Vec<(Dname, Dname)>,
}

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    /// It is none: what to reply, if anything.
    pub(crate) fn read(bytes: &[u8], transport: Transport) -> Result<Query, Option<Vec<u8>>> {
        let message = Message::from_octets(bytes.to_vec()).map_err(|_| None)?;
        if message.header().qr() {
            return Err(None);
        }
        if message.header().opcode() != Opcode::QUERY {
            return Err(Some(headless(&message, Rcode::NOTIMP)));
        }
        let malformed = || Some(headless(&message, Rcode::FORMERR));
        let question = message.sole_question().map_err(|_| malformed())?;
        let name = shared(question.qname().to_name());
        let (rtype, class) = (question.qtype(), question.qclass());
        let opt = message.opt().map(|opt| (opt.dnssec_ok(), opt.udp_payload_size(), opt.version()));
        let reply_max = match (transport, opt) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, Some((_, size, _))) => usize::from(size.min(UDP_MAX)).max(UDP_PLAIN_MAX),
            (Transport::Udp, None) => UDP_PLAIN_MAX,
        };
        let edns = opt.map(|(dnssec, ..)| dnssec);
        let query = Query { message, name, rtype, edns, reply_max };
        if opt.is_some_and(|(.., version)| version != 0) {
            return Err(Some(query.reply_extended(OptRcode::BADVERS)));
        }
        if class != Class::IN {
            return Err(Some(query.fail(Rcode::REFUSED)));
        }
        if matches!(rtype, Rtype::AXFR | Rtype::IXFR) {
            return Err(Some(query.fail(Rcode::NOTIMP)));
        }
        Ok(query)
    }

    /// The answer from the zone, or what must be asked elsewhere. Records of one kind begin at `turn`, so that clients
    /// which take the first one spread.
    pub(crate) fn answer(&self, zone: &Zone, turn: usize) -> Verdict {
        if self.rtype == ANY {
            // RFC 8482: such questions serve attacks by reflection.
            return Verdict::Reply(self.compose(Rcode::NOERROR, true, |answer| {
                let text = |text: &'static [u8]| CharStr::from_octets(text).expect("short enough");
                answer.push((&self.name, TTL, Hinfo::new(text(b"RFC8482"), text(b""))))
            }));
        }
        let mut chain: Vec<(Dname, Dname)> = Vec::new();
        loop {
            let name = chain.last().map_or(&self.name, |(_, target)| target);
            match zone.lookup(name, self.rtype) {
                Answer::Alias(target) if chain.len() < ALIASES_MAX => {
                    let owner = name.clone();
                    chain.push((owner, target.clone()));
                }
                Answer::Alias(_) => return Verdict::Reply(self.fail(Rcode::SERVFAIL)),
                Answer::Elsewhere => return Verdict::Ask(self.ask(chain)),
                Answer::NoName => return Verdict::Reply(self.negative(zone, &chain, Rcode::NXDOMAIN)),
                Answer::NoData => return Verdict::Reply(self.no_data(zone, &chain)),
                Answer::Records(records) => return Verdict::Reply(self.positive(zone, &chain, &records, turn)),
            }
        }
    }

    fn positive(&self, zone: &Zone, chain: &[(Dname, Dname)], records: &[&Data], turn: usize) -> Vec<u8> {
        let name = chain.last().map_or(&self.name, |(_, target)| target);
        let (before, from) = records.split_at(turn % records.len().max(1));
        let turned = || from.iter().chain(before).copied();
        let fill = |answer: &mut AnswerBuilder<Target>| {
            push_chain(answer, chain)?;
            turned().try_for_each(|data| answer.push(ZoneRecord { owner: name, data }))
        };
        self.compose_with(Rcode::NOERROR, true, fill, |additional| {
            for target in turned().filter_map(srv_target) {
                for rtype in [Rtype::A, Rtype::AAAA] {
                    if let Answer::Records(records) = zone.lookup(target, rtype) {
                        records.into_iter().try_for_each(|data| additional.push(ZoneRecord { owner: target, data }))?;
                    }
                }
            }
            Ok(())
        })
    }

    fn no_data(&self, zone: &Zone, chain: &[(Dname, Dname)]) -> Vec<u8> {
        let name = chain.last().map_or(&self.name, |(_, target)| target);
        if name != zone.domain() || !matches!(self.rtype, Rtype::SOA | Rtype::NS) {
            return self.negative(zone, chain, Rcode::NOERROR);
        }
        self.compose(Rcode::NOERROR, true, |answer| {
            push_chain(answer, chain)?;
            match self.rtype {
                Rtype::SOA => answer.push((name, TTL, authority(zone))),
                _ => answer.push((name, TTL, Ns::new(zone.name_server()))),
            }
        })
    }

    fn negative(&self, zone: &Zone, chain: &[(Dname, Dname)], rcode: Rcode) -> Vec<u8> {
        let name = chain.last().map_or(&self.name, |(_, target)| target);
        let apex = if name.ends_with(zone.domain()) { zone.domain().clone() } else { reverse_apex(name) };
        let mut answer = self.begin(rcode, true);
        if push_chain(&mut answer, chain).is_err() {
            return self.finish(answer.tc_rewind_into().additional());
        }
        let mut section = answer.authority();
        // A negative answer without SOA is one that is not remembered.
        let _ = section.push((&apex, TTL, authority(zone)));
        self.finish(section.additional())
    }

    /// The question as this server asks it: nothing of the client's but name, type and what it wants.
    fn ask(&self, chain: Vec<(Dname, Dname)>) -> Ask {
        let name = chain.last().map_or(&self.name, |(_, target)| target);
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_rd(self.message.header().rd());
        builder.header_mut().set_cd(self.message.header().cd());
        builder.header_mut().set_ad(self.message.header().ad());
        let mut question = builder.question();
        let written = question.push((name, self.rtype)).and_then(|()| {
            let mut additional = question.additional();
            if let Some(dnssec) = self.edns {
                additional.opt(|opt| {
                    opt.set_udp_payload_size(UDP_MAX);
                    opt.set_dnssec_ok(dnssec);
                    Ok(())
                })?;
            }
            Ok(additional.finish())
        });
        Ask { message: written.expect("a vector takes every question"), chain }
    }

    /// What the client gets of another server's answer to `ask`.
    pub(crate) fn relay(&self, ask: &Ask, response: &[u8]) -> Vec<u8> {
        if !ask.chain.is_empty() {
            return self.relay_alias(ask, response);
        }
        let Ok(message) = Message::from_slice(response) else { return self.fail(Rcode::SERVFAIL) };
        if response.len() > self.reply_max || message.header_counts().qdcount() != 1 {
            let mut short = self.begin(message.header().rcode(), false);
            short.header_mut().set_tc(response.len() > self.reply_max);
            return self.finish(short.additional());
        }
        let mut reply = response.to_vec();
        reply[..2].copy_from_slice(&self.message.as_slice()[..2]);
        reply
    }

    fn relay_alias(&self, ask: &Ask, response: &[u8]) -> Vec<u8> {
        let message = Message::from_slice(response).ok();
        let read = message.and_then(|message| Some((message.header().rcode(), answers(message).ok()?)));
        match read {
            Some((rcode, records)) => self.compose(rcode, false, |answer| {
                push_chain(answer, &ask.chain)?;
                records.iter().try_for_each(|record| answer.push(record))
            }),
            None => self.fail(Rcode::SERVFAIL),
        }
    }

    /// A reply without records.
    pub(crate) fn fail(&self, rcode: Rcode) -> Vec<u8> {
        self.finish(self.begin(rcode, false).additional())
    }

    fn reply_extended(&self, rcode: OptRcode) -> Vec<u8> {
        let mut additional = self.begin(rcode.rcode(), false).additional();
        additional
            .opt(|opt| {
                opt.set_udp_payload_size(UDP_MAX);
                opt.set_rcode(rcode);
                Ok(())
            })
            .expect("a vector takes every record");
        additional.finish().into_target()
    }

    fn compose(
        &self,
        rcode: Rcode,
        ours: bool,
        fill: impl FnOnce(&mut AnswerBuilder<Target>) -> Result<(), PushError>,
    ) -> Vec<u8> {
        self.compose_with(rcode, ours, fill, |_| Ok(()))
    }

    /// A reply with these records, or without any and marked as truncated when they are too many.
    fn compose_with(
        &self,
        rcode: Rcode,
        ours: bool,
        fill: impl FnOnce(&mut AnswerBuilder<Target>) -> Result<(), PushError>,
        add: impl FnOnce(&mut AdditionalBuilder<Target>) -> Result<(), PushError>,
    ) -> Vec<u8> {
        let mut answer = self.begin(rcode, ours);
        if fill(&mut answer).is_err() {
            return self.finish(answer.tc_rewind_into().additional());
        }
        let mut additional = answer.additional();
        // Additional records that do not fit are left out, which is what they are there for.
        let _ = add(&mut additional);
        self.finish(additional)
    }

    fn begin(&self, rcode: Rcode, ours: bool) -> AnswerBuilder<Target> {
        let mut builder =
            MessageBuilder::from_target(StaticCompressor::new(Vec::new())).expect("a vector takes a header");
        builder.set_push_limit(self.reply_max - OPT_LEN);
        builder.header_mut().set_aa(ours);
        builder.header_mut().set_ra(true);
        builder.header_mut().set_cd(self.message.header().cd());
        builder.start_error(&self.message, rcode)
    }

    fn finish(&self, mut additional: AdditionalBuilder<Target>) -> Vec<u8> {
        additional.clear_push_limit();
        if self.edns.is_some() {
            additional
                .opt(|opt| {
                    opt.set_udp_payload_size(UDP_MAX);
                    Ok(())
                })
                .expect("a vector takes every record");
        }
        additional.finish().into_target()
    }
}

type Foreign<'a> = Record<ParsedName<&'a [u8]>, AllRecordData<&'a [u8], ParsedName<&'a [u8]>>>;

/// The records that another server answered; they are written anew, since their names may point to other places of the
/// message.
fn answers(message: &Message<[u8]>) -> Result<Vec<Foreign<'_>>, ParseError> {
    message.answer()?.into_records().collect()
}

/// A reply to what could not be read beyond its header.
fn headless(message: &Message<Vec<u8>>, rcode: Rcode) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    let header = builder.header_mut();
    header.set_id(message.header().id());
    header.set_qr(true);
    header.set_opcode(message.header().opcode());
    header.set_rd(message.header().rd());
    header.set_rcode(rcode);
    builder.finish()
}

/// Whether `response` answers `sent`. A server that cannot read a question may leave it out.
pub(crate) fn is_answer(sent: &[u8], response: &[u8]) -> bool {
    let (Ok(sent), Ok(response)) = (Message::from_slice(sent), Message::from_slice(response)) else { return false };
    let wordless = response.header().qr()
        && response.header().id() == sent.header().id()
        && response.header_counts().qdcount() == 0
        && response.header().rcode() != Rcode::NOERROR;
    response.is_answer(sent) || wordless
}

/// Whether another server may know better than the one that answered this.
pub(crate) fn is_failure(response: &[u8]) -> bool {
    let rcode = Message::from_slice(response).map(|message| message.header().rcode());
    matches!(rcode, Ok(Rcode::SERVFAIL | Rcode::REFUSED | Rcode::NOTIMP | Rcode::FORMERR) | Err(_))
}

fn push_chain(answer: &mut AnswerBuilder<Target>, chain: &[(Dname, Dname)]) -> Result<(), PushError> {
    chain.iter().try_for_each(|(owner, target)| answer.push((owner, TTL, Cname::new(target))))
}

/// A record of the zone on its way into a message.
struct ZoneRecord<'a> {
    owner: &'a Dname,
    data: &'a Data,
}

impl ComposeRecord for ZoneRecord<'_> {
    fn compose_record<T: domain::base::wire::Composer + ?Sized>(&self, target: &mut T) -> Result<(), T::AppendError> {
        let owner = self.owner;
        match self.data {
            Data::A(v4) => (owner, TTL, A::new(*v4)).compose_record(target),
            Data::Aaaa(v6) => (owner, TTL, Aaaa::new(*v6)).compose_record(target),
            Data::Srv { port, target: name } => (owner, TTL, Srv::new(0, 100, *port, name)).compose_record(target),
            Data::Ptr(name) => (owner, TTL, Ptr::new(name)).compose_record(target),
            Data::Cname(name) => (owner, TTL, Cname::new(name)).compose_record(target),
            Data::Txt(text) => {
                let text: Txt<Vec<u8>> = Txt::build_from_slice(text).expect("a short text of ours");
                (owner, TTL, text).compose_record(target)
            }
        }
    }
}

fn srv_target(data: &Data) -> Option<&Dname> {
    match data {
        Data::Srv { target, .. } => Some(target),
        _ => None,
    }
}

/// Nobody transfers this zone, so its serial tells nothing; the last number is how long "no" is remembered.
fn authority(zone: &Zone) -> Soa<Dname> {
    let hours = |n| Ttl::from_hours(n);
    Soa::new(zone.name_server(), zone.host_master(), Serial(1), hours(2), hours(1), hours(24), TTL)
}

fn reverse_apex(name: &Dname) -> Dname {
    let suffix = name.iter_suffixes().find(|suffix| suffix.label_count() == 3);
    shared(suffix.map_or_else(Name::root, |suffix| suffix.to_name()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dns::zone::tests::example;
    use crate::dns::zone::{Endpoint, Port, Target as ServiceTarget};

    fn query(name: &str, rtype: Rtype) -> Vec<u8> {
        let name: Name<Vec<u8>> = name.parse().unwrap();
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(0x1234);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        builder.push((name, rtype)).unwrap();
        builder.finish()
    }

    fn with_edns(query: &[u8], size: u16, version: u8) -> Vec<u8> {
        let mut bytes = query.to_vec();
        bytes[11] += 1;
        bytes.extend_from_slice(&[0, 0, 41]);
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(&[0, version, 0, 0, 0, 0]);
        bytes
    }

    fn reply_to(bytes: &[u8], transport: Transport) -> Vec<u8> {
        match Query::read(bytes, transport) {
            Ok(query) => match query.answer(&example(), 0) {
                Verdict::Reply(reply) => reply,
                Verdict::Ask(ask) => panic!("asks elsewhere: {ask:?}"),
            },
            Err(reply) => reply.expect("a reply"),
        }
    }

    /// Code, flags and records of a reply in one line.
    fn show(reply: &[u8]) -> String {
        let message = Message::from_slice(reply).unwrap();
        let header = message.header();
        assert!(header.qr() && header.id() == 0x1234, "{header:?}");
        let mut text = format!("{}", header.rcode());
        for (flag, name) in [(header.aa(), "aa"), (header.tc(), "tc"), (header.ra(), "ra")] {
            if flag {
                text += &format!(" {name}");
            }
        }
        for section in [message.answer(), message.authority(), message.additional()] {
            text += " |";
            for record in section.unwrap() {
                let record = record.unwrap();
                let record = record.to_any_record::<AllRecordData<_, ParsedName<_>>>().unwrap();
                text += &match record.rtype() {
                    Rtype::OPT => format!(" OPT:{}", record.class().to_int()),
                    rtype => format!(" {rtype}:{}", record.data()),
                };
            }
        }
        text
    }

    fn ask(name: &str, rtype: Rtype) -> String {
        show(&reply_to(&query(name, rtype), Transport::Udp))
    }

    #[test]
    fn answers_are_authoritative_and_complete() {
        let soa = "SOA:ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 3600 86400 5";
        for (name, rtype, expected) in [
            ("web.default.svc.cluster.local", Rtype::A, "NOERROR aa ra | A:10.96.0.7 | |".to_owned()),
            ("WEB.default.svc.Cluster.Local", Rtype::A, "NOERROR aa ra | A:10.96.0.7 | |".to_owned()),
            (
                "_http._tcp.web.default.svc.cluster.local",
                Rtype::SRV,
                "NOERROR aa ra | SRV:0 100 80 web.default.svc.cluster.local | | A:10.96.0.7 AAAA:fd00:96::7".to_owned(),
            ),
            (
                "in.default.svc.cluster.local",
                Rtype::A,
                "NOERROR aa ra | CNAME:web.default.svc.cluster.local. A:10.96.0.7 | |".to_owned(),
            ),
            (
                "in.default.svc.cluster.local",
                Rtype::TXT,
                format!("NOERROR aa ra | CNAME:web.default.svc.cluster.local. | {soa} |"),
            ),
            ("dns-version.cluster.local", Rtype::TXT, "NOERROR aa ra | TXT:\"1.1.0\" | |".to_owned()),
            ("cluster.local", Rtype::NS, "NOERROR aa ra | NS:ns.dns.cluster.local. | |".to_owned()),
            ("cluster.local", Rtype::SOA, format!("NOERROR aa ra | {soa} | |")),
            ("cluster.local", Rtype::A, format!("NOERROR aa ra | | {soa} |")),
            ("db.data.svc.cluster.local", Rtype::AAAA, format!("NOERROR aa ra | | {soa} |")),
            ("no.data.svc.cluster.local", Rtype::A, format!("NXDOMAIN aa ra | | {soa} |")),
            ("8.0.85.10.in-addr.arpa", Rtype::PTR, format!("NXDOMAIN aa ra | | {soa} |")),
            ("web.default.svc.cluster.local", ANY, "NOERROR aa ra | HINFO:\"RFC8482\" \"\" | |".to_owned()),
            ("www.example.com", ANY, "NOERROR aa ra | HINFO:\"RFC8482\" \"\" | |".to_owned()),
            ("cluster.local", Rtype::AXFR, "NOTIMP ra | | |".to_owned()),
        ] {
            assert_eq!(ask(name, rtype), expected, "{name} {rtype}");
        }
    }

    #[test]
    fn edns_is_answered_and_bounded() {
        let plain = query("web.default.svc.cluster.local", Rtype::A);
        let edns = |size, version| show(&reply_to(&with_edns(&plain, size, version), Transport::Udp));
        assert_eq!(edns(4096, 0), "NOERROR aa ra | A:10.96.0.7 | | OPT:1232");
        assert!(edns(4096, 1).starts_with("NOERROR ra |"), "the code's upper half is in OPT");
        let badvers = reply_to(&with_edns(&plain, 4096, 1), Transport::Udp);
        assert_eq!(Message::from_slice(&badvers).unwrap().opt_rcode(), OptRcode::BADVERS);
    }

    #[test]
    fn what_does_not_fit_is_truncated() {
        let mut zone = Zone::new("cluster.local").unwrap();
        let endpoint = |n: u8| Endpoint {
            ip: [10, 0, 0, n].into(),
            hostname: Some(format!("pod-{n}")),
            ports: vec![Port { name: "x".into(), protocol: crate::Protocol::Tcp, port: 1 }],
        };
        zone.add_service("ns", "many", &ServiceTarget::Headless((0..200).map(endpoint).collect())).unwrap();
        let name = "_x._tcp.many.ns.svc.cluster.local";
        let reply = |bytes: &[u8], transport| match Query::read(bytes, transport).unwrap().answer(&zone, 0) {
            Verdict::Reply(reply) => reply,
            Verdict::Ask(_) => unreachable!(),
        };
        let plain = query(name, Rtype::SRV);
        for (bytes, most) in
            [(plain.clone(), 512), (with_edns(&plain, 1000, 0), 1000), (with_edns(&plain, 9000, 0), 1232)]
        {
            let udp = reply(&bytes, Transport::Udp);
            let message = Message::from_slice(&udp).unwrap();
            assert!(udp.len() <= most && message.header().tc() && message.header_counts().ancount() == 0);
        }
        let tcp = reply(&plain, Transport::Tcp);
        let message = Message::from_slice(&tcp).unwrap();
        assert!(!message.header().tc());
        assert_eq!((message.header_counts().ancount(), message.header_counts().arcount()), (200, 200));
        // Those with additional records that do not fit are no less complete.
        let addresses = reply(&query("many.ns.svc.cluster.local", Rtype::A), Transport::Tcp);
        assert!(addresses.len() < 200 * 16 + 60, "names are compressed: {}", addresses.len());
    }

    #[test]
    fn replies_begin_with_another_record_each_time() {
        let bytes = query("db.data.svc.cluster.local", Rtype::A);
        let first = |turn| match Query::read(&bytes, Transport::Udp).unwrap().answer(&example(), turn) {
            Verdict::Reply(reply) => show(&reply),
            Verdict::Ask(_) => unreachable!(),
        };
        assert_eq!(first(0), "NOERROR aa ra | A:10.85.0.2 A:10.85.0.3 | |");
        assert_eq!(first(1), "NOERROR aa ra | A:10.85.0.3 A:10.85.0.2 | |");
    }

    #[test]
    fn what_is_no_query_is_refused_or_ignored() {
        let good = query("web.default.svc.cluster.local", Rtype::A);
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Query::read(&bytes, Transport::Udp).err()
        };
        assert_eq!(changed(2, 0x80), Some(None), "a reply is never replied to");
        assert!(show(&changed(2, 0x28).unwrap().unwrap()).starts_with("NOTIMP"), "an update");
        assert!(show(&changed(5, 2).unwrap().unwrap()).starts_with("FORMERR"), "two questions");
        assert!(show(&changed(5, 0).unwrap().unwrap()).starts_with("FORMERR"), "none");
        assert!(show(&changed(12, 0xc0).unwrap().unwrap()).starts_with("FORMERR"), "a pointer into itself");
        assert!(show(&changed(good.len() - 1, 3).unwrap().unwrap()).starts_with("REFUSED"), "class CHAOS");
        assert_eq!(Query::read(&good[..11], Transport::Udp).err(), Some(None));
    }

    fn elsewhere(name: &str) -> (Query, Ask) {
        let query = Query::read(&with_edns(&query(name, Rtype::A), 600, 0), Transport::Udp).unwrap();
        match query.answer(&example(), 0) {
            Verdict::Ask(ask) => (query, ask),
            Verdict::Reply(reply) => panic!("{}", show(&reply)),
        }
    }

    /// What an upstream server answers.
    fn response(ask: &Ask, records: usize, rcode: Rcode) -> Vec<u8> {
        let asked = Message::from_slice(&ask.message).unwrap();
        let mut answer = MessageBuilder::new_vec().start_answer(asked, rcode).unwrap();
        let name = asked.sole_question().unwrap().qname().to_vec();
        let other: Name<Vec<u8>> = "host.example.com".parse().unwrap();
        if records > 0 {
            answer.push((&name, Ttl::from_secs(60), Cname::new(&other))).unwrap();
        }
        for n in 0..records {
            answer.push((&other, Ttl::from_secs(60), A::from_octets(192, 0, 2, u8::try_from(n).unwrap()))).unwrap();
        }
        answer.finish()
    }

    #[test]
    fn other_names_are_asked_without_what_concerns_only_us() {
        let (query, ask) = elsewhere("www.Example.com");
        let asked = Message::from_slice(&ask.message).unwrap();
        assert_eq!(asked.sole_question().unwrap().qname().to_string(), "www.Example.com", "the case is a secret, too");
        assert!(asked.header().rd() && asked.opt().is_some_and(|opt| opt.udp_payload_size() == UDP_MAX));
        let reply = query.relay(&ask, &response(&ask, 1, Rcode::NOERROR));
        assert_eq!(show(&reply), "NOERROR | CNAME:host.example.com. A:192.0.2.0 | |", "as it came");
        assert_eq!(show(&query.relay(&ask, &response(&ask, 0, Rcode::NXDOMAIN))), "NXDOMAIN | | |");
        let long = query.relay(&ask, &response(&ask, 50, Rcode::NOERROR));
        assert!(show(&long).starts_with("NOERROR tc"), "more than the client takes: {}", show(&long));
    }

    #[test]
    fn an_external_name_comes_with_its_addresses() {
        let (query, ask) = elsewhere("out.default.svc.cluster.local");
        let asked = Message::from_slice(&ask.message).unwrap();
        assert_eq!(asked.sole_question().unwrap().qname().to_string(), "www.example.com");
        let reply = query.relay(&ask, &response(&ask, 1, Rcode::NOERROR));
        let expected = "NOERROR ra | CNAME:www.example.com. CNAME:host.example.com. A:192.0.2.0 | | OPT:1232";
        assert_eq!(show(&reply), expected);
        let missing = query.relay(&ask, &response(&ask, 0, Rcode::NXDOMAIN));
        assert_eq!(show(&missing), "NXDOMAIN ra | CNAME:www.example.com. | | OPT:1232");
        let mut damaged = response(&ask, 1, Rcode::NOERROR);
        damaged.truncate(damaged.len() - 2);
        assert!(show(&query.relay(&ask, &damaged)).starts_with("SERVFAIL"));
    }

    #[test]
    fn aliases_in_a_circle_end() {
        let mut zone = Zone::new("cluster.local").unwrap();
        let other = |name: &str| ServiceTarget::External(format!("{name}.ns.svc.cluster.local"));
        zone.add_service("ns", "a", &other("b")).unwrap();
        zone.add_service("ns", "b", &other("a")).unwrap();
        let query = Query::read(&query("a.ns.svc.cluster.local", Rtype::A), Transport::Udp).unwrap();
        assert!(matches!(query.answer(&zone, 0), Verdict::Reply(reply) if show(&reply).starts_with("SERVFAIL")));
    }

    #[test]
    fn only_the_answer_is_an_answer() {
        let (_, ask) = elsewhere("www.example.com");
        let mut sent = ask.message.clone();
        sent[..2].copy_from_slice(&[7, 7]);
        let answer = |id: [u8; 2], ask: &Ask| {
            let mut response = response(ask, 1, Rcode::NOERROR);
            response[..2].copy_from_slice(&id);
            response
        };
        assert!(is_answer(&sent, &answer([7, 7], &ask)));
        assert!(!is_answer(&sent, &answer([7, 8], &ask)));
        assert!(!is_answer(&sent, &answer([7, 7], &elsewhere("www.example.net").1)));
        assert!(!is_answer(&sent, &sent), "a question is no answer");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_bytes_make_it_panic_or_answer_at_length(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            check_any(&bytes);
        }

        #[test]
        fn no_damage_makes_it_panic_or_answer_at_length(
            place in 0usize..80, value: u8, cut in 0usize..80, name in 0usize..4,
        ) {
            let names = ["web.default.svc.cluster.local", "out.default.svc.cluster.local", "www.example.com", "."];
            let mut bytes = with_edns(&query(names[name], Rtype::A), 1232, 0);
            let length = bytes.len();
            bytes[place % length] = value;
            bytes.truncate(length - cut % length);
            check_any(&bytes);
        }

        #[test]
        fn no_response_makes_it_panic(place in 0usize..120, value: u8, cut in 0usize..120, external: bool) {
            let (query, ask) = elsewhere(if external { "out.default.svc.cluster.local" } else { "www.example.com" });
            let mut bytes = response(&ask, 3, Rcode::NOERROR);
            let length = bytes.len();
            bytes[place % length] = value;
            bytes.truncate(length - cut % length);
            let _ = (is_answer(&ask.message, &bytes), is_failure(&bytes));
            let reply = query.relay(&ask, &bytes);
            prop_assert!(reply.len() <= 600 && reply[..2] == [0x12, 0x34]);
        }
    }

    fn check_any(bytes: &[u8]) {
        let reply = match Query::read(bytes, Transport::Udp) {
            Ok(query) => match query.answer(&example(), 1) {
                Verdict::Reply(reply) => Some(reply),
                Verdict::Ask(ask) => Some(query.relay(&ask, &response(&ask, 1, Rcode::NOERROR))),
            },
            Err(reply) => reply,
        };
        if let Some(reply) = reply {
            assert!(reply.len() <= usize::from(UDP_MAX) && reply[..2] == bytes[..2] && reply[2] & 0x80 != 0);
        }
    }
}
