//! What daemon and server process say to each other.
//!
//! ```text
//! length u32 | kind u8 | body
//! process ──► Hello (with its listening sockets)            once, when a daemon connects
//! daemon  ──► Zone, Stop         process ──► Done, Failed   in turn
//! ```
//! A daemon sends zones only to the process that it started itself. From one of an earlier daemon, which may be of an
//! earlier version, it wants Hello and Stop: these two never change.

use super::snapshot;
use super::zone::Zone;

/// Largest zone: some 100,000 records.
pub(super) const BODY_MAX: usize = 8 << 20;
const HEADER: usize = 5;

const HELLO: u8 = 1;
const STOP: u8 = 2;
const ZONE: u8 = 3;
const DONE: u8 = 4;
const FAILED: u8 = 5;

/// Daemon to process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Serve this from now on.
    Zone(Zone),
    /// Take no more queries, finish those under way and end.
    Stop,
}

/// Process to daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// The process and how many of the descriptors that come with this are UDP sockets; the others are TCP listeners.
    Hello { pid: u32, udp: u32 },
    /// The zone is served; no more queries are taken.
    Done,
    /// Something could not be done.
    Failed(String),
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a message of the DNS server's protocol")]
pub(super) struct Malformed;

/// One message with its header.
pub(super) trait Message: Sized {
    fn encode(&self) -> Vec<u8>;
    fn decode(kind: u8, body: &[u8]) -> Result<Self, Malformed>;
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).expect("bodies are far shorter");
    [&length.to_be_bytes(), &[kind][..], body].concat()
}

impl Message for Order {
    fn encode(&self) -> Vec<u8> {
        match self {
            Order::Zone(zone) => frame(ZONE, &snapshot::encode(zone)),
            Order::Stop => frame(STOP, &[]),
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Result<Self, Malformed> {
        match kind {
            ZONE => snapshot::decode(body).map(Order::Zone).map_err(|_| Malformed),
            STOP => Ok(Order::Stop),
            _ => Err(Malformed),
        }
    }
}

impl Message for Report {
    fn encode(&self) -> Vec<u8> {
        match self {
            Report::Hello { pid, udp } => frame(HELLO, &[pid.to_be_bytes(), udp.to_be_bytes()].concat()),
            Report::Done => frame(DONE, &[]),
            Report::Failed(reason) => frame(FAILED, reason.as_bytes()),
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Result<Self, Malformed> {
        match (kind, body) {
            // A later version may say more.
            (HELLO, [a, b, c, d, e, f, g, h, ..]) => Ok(Report::Hello {
                pid: u32::from_be_bytes([*a, *b, *c, *d]),
                udp: u32::from_be_bytes([*e, *f, *g, *h]),
            }),
            (DONE, []) => Ok(Report::Done),
            (FAILED, reason) => Ok(Report::Failed(String::from_utf8_lossy(reason).into_owned())),
            _ => Err(Malformed),
        }
    }
}

/// Turns what a socket delivers, in whatever pieces, into messages.
#[derive(Debug, Default)]
pub(super) struct Decoder(Vec<u8>);

impl Decoder {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next message; `None` until more bytes come.
    pub(super) fn next<M: Message>(&mut self) -> Result<Option<M>, Malformed> {
        let Some(([a, b, c, d, kind], rest)) = self.0.split_first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).map_err(|_| Malformed)?;
        if length > BODY_MAX {
            return Err(Malformed);
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = M::decode(*kind, body)?;
        self.0.drain(..HEADER + length);
        self.0.shrink_to(64);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::zone::tests::example;

    #[test]
    fn messages_survive_in_any_pieces() {
        let orders = [Order::Zone(example()), Order::Stop];
        let reports = [Report::Hello { pid: 7, udp: 2 }, Report::Done, Report::Failed("why".into())];
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        for byte in orders.iter().flat_map(Message::encode) {
            decoder.push(&[byte]);
            seen.extend(decoder.next::<Order>().unwrap());
        }
        assert_eq!(seen, orders);
        decoder.push(&reports.iter().flat_map(Message::encode).collect::<Vec<_>>());
        for report in reports {
            assert_eq!(decoder.next(), Ok(Some(report)));
        }
        assert_eq!(decoder.next::<Report>(), Ok(None));
    }

    #[test]
    fn a_length_without_bounds_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(&[0xff, 0xff, 0xff, 0xff, ZONE]);
        assert_eq!(decoder.next::<Order>(), Err(Malformed));
    }
}
