//! What goes over a plugin's socket: two connections of ttrpc in one, each message in frames; no IO.
//!
//! | | bytes | meaning |
//! |---|---|---|
//! | frame | 4 | which connection, big-endian, as all numbers: [`PLUGIN`] or [`RUNTIME`] |
//! | | 4 | length of what follows |
//! | message | 4 | length of the payload |
//! | | 4 | stream: odd, chosen by who asks |
//! | | 1 | kind: [`REQUEST`] or [`RESPONSE`] |
//! | | 1 | flags, none for calls with one answer |
//! | | … | payload |
//!
//! A message may be cut into frames anywhere (containerd/nri `pkg/net/multiplex`, containerd/ttrpc `PROTOCOL.md`), but plugins of
//! the published library take only those that they can read at once, see [`encode`].

/// On this one the runtime calls the plugin.
pub(crate) const PLUGIN: u32 = 1;
/// On this one the plugin calls the runtime.
pub(crate) const RUNTIME: u32 = 2;
/// A call.
pub(crate) const REQUEST: u8 = 1;
/// Its answer.
pub(crate) const RESPONSE: u8 = 2;
/// Longest payload of a message.
pub(crate) const PAYLOAD_MAX: usize = 4 << 20;
const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;

/// One message of one of the connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) connection: u32,
    pub(crate) stream: u32,
    pub(crate) kind: u8,
    pub(crate) payload: Vec<u8>,
}

/// The other side does not keep to the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a message of {0} bytes is longer than the protocol allows")]
    TooLong(usize),
    #[error("there is no connection {0}")]
    Connection(u32),
}

/// Puts frames together again.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    trunk: Vec<u8>,
    /// What has arrived on each connection.
    plugin: Vec<u8>,
    runtime: Vec<u8>,
}

impl Decoder {
    /// Takes what was read.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.trunk.extend_from_slice(bytes);
        let mut used = 0;
        while let Some((header, rest)) = self.trunk[used..].split_first_chunk::<FRAME_HEADER>() {
            let (connection, length) = (number(&header[..4]), number(&header[4..]) as usize);
            if length > MESSAGE_HEADER + PAYLOAD_MAX {
                return Err(WireError::TooLong(length));
            }
            let Some(payload) = rest.get(..length) else { break };
            match connection {
                PLUGIN => self.plugin.extend_from_slice(payload),
                RUNTIME => self.runtime.extend_from_slice(payload),
                other => return Err(WireError::Connection(other)),
            }
            used += FRAME_HEADER + length;
        }
        self.trunk.drain(..used);
        Ok(())
    }

    /// The next whole message.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, WireError> {
        match take(&mut self.plugin, PLUGIN)? {
            Some(message) => Ok(Some(message)),
            None => take(&mut self.runtime, RUNTIME),
        }
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn take(buffer: &mut Vec<u8>, connection: u32) -> Result<Option<Message>, WireError> {
    let Some((header, rest)) = buffer.split_first_chunk::<MESSAGE_HEADER>() else { return Ok(None) };
    let length = number(&header[..4]) as usize;
    if length > PAYLOAD_MAX {
        return Err(WireError::TooLong(length));
    }
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let message = Message { connection, stream: number(&header[4..8]), kind: header[8], payload: payload.to_vec() };
    buffer.drain(..MESSAGE_HEADER + length);
    Ok(Some(message))
}

/// What a Go program reads at once of a connection, if it does not ask for more (`bufio.NewReader`).
const READ: usize = 4096;

/// A message in frames: what is read with its header, and the rest, as Go programs write it. A longer first frame is an error to
/// plugins of the published library, whose connections give a reader whole frames or none.
pub(crate) fn encode(message: &Message) -> Result<Vec<u8>, WireError> {
    let length = message.payload.len();
    let too_long = WireError::TooLong(length);
    if length > PAYLOAD_MAX {
        return Err(too_long);
    }
    let mut whole = Vec::with_capacity(MESSAGE_HEADER + length);
    for number in [u32::try_from(length).map_err(|_| too_long)?, message.stream] {
        whole.extend_from_slice(&number.to_be_bytes());
    }
    whole.extend_from_slice(&[message.kind, 0]);
    whole.extend_from_slice(&message.payload);
    let (first, rest) = whole.split_at(whole.len().min(READ));
    let mut bytes = Vec::with_capacity(2 * FRAME_HEADER + whole.len());
    for frame in [first, rest].into_iter().filter(|frame| !frame.is_empty()) {
        bytes.extend_from_slice(&message.connection.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(frame.len()).map_err(|_| too_long)?.to_be_bytes());
        bytes.extend_from_slice(frame);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(connection: u32, stream: u32, payload: &[u8]) -> Message {
        Message { connection, stream, kind: REQUEST, payload: payload.to_vec() }
    }

    #[test]
    fn messages_survive_any_cut() {
        let sent = [message(PLUGIN, 1, b"one"), message(PLUGIN, 5, &[7; 300]), message(RUNTIME, 3, b"")];
        let bytes: Vec<u8> = [0, 2, 1].into_iter().flat_map(|at: usize| encode(&sent[at]).unwrap()).collect();
        for size in [1, 3, 7, 64, bytes.len()] {
            let (mut decoder, mut received) = (Decoder::default(), Vec::new());
            for chunk in bytes.chunks(size) {
                decoder.push(chunk).unwrap();
                while let Some(one) = decoder.next().unwrap() {
                    received.push(one);
                }
            }
            // The order counts on each connection.
            received.sort_by_key(|one| (one.connection, one.stream));
            assert_eq!(received, sent);
        }
    }

    #[test]
    fn a_message_in_several_frames_is_one() {
        // As Go writes it: header and payload apart.
        let whole = encode(&message(RUNTIME, 9, b"payload")).unwrap();
        let (header, payload) = whole[FRAME_HEADER..].split_at(MESSAGE_HEADER);
        let frame = |part: &[u8]| {
            [&RUNTIME.to_be_bytes()[..], &u32::try_from(part.len()).unwrap().to_be_bytes(), part].concat()
        };
        let mut decoder = Decoder::default();
        decoder.push(&frame(header)).unwrap();
        assert_eq!(decoder.next(), Ok(None));
        decoder.push(&frame(payload)).unwrap();
        assert_eq!(decoder.next(), Ok(Some(message(RUNTIME, 9, b"payload"))));
    }

    /// The lengths of frames.
    fn frames(mut bytes: &[u8]) -> Vec<usize> {
        let mut lengths = Vec::new();
        while let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER>() {
            lengths.push(number(&header[4..]) as usize);
            bytes = &rest[lengths[lengths.len() - 1]..];
        }
        lengths
    }

    /// critest's spec of containers that a plugin hears of when it comes in found that they were too much for it.
    #[test]
    fn a_reader_of_four_kibibytes_gets_all_of_a_long_message() {
        for (payload, expect) in [
            (0, vec![MESSAGE_HEADER]),
            (READ - MESSAGE_HEADER, vec![READ]),
            (READ, vec![READ, MESSAGE_HEADER]),
            (1 << 20, vec![READ, (1 << 20) + MESSAGE_HEADER - READ]),
        ] {
            let sent = message(PLUGIN, 3, &vec![5; payload]);
            let bytes = encode(&sent).unwrap();
            assert_eq!(frames(&bytes), expect);
            let mut decoder = Decoder::default();
            decoder.push(&bytes).unwrap();
            assert_eq!(decoder.next(), Ok(Some(sent)));
        }
    }

    #[test]
    fn what_is_too_long_or_strange_is_refused() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(&[0, 0, 0, 3, 0, 0, 0, 0]), Err(WireError::Connection(3)));
        let mut decoder = Decoder::default();
        assert!(matches!(decoder.push(&[0, 0, 0, 1, 255, 0, 0, 0]), Err(WireError::TooLong(_))));
        let mut decoder = Decoder::default();
        decoder.push(&[&[0, 0, 0, 1, 0, 0, 0, 10][..], &[255; 10]].concat()).unwrap();
        assert!(matches!(decoder.next(), Err(WireError::TooLong(_))));
        assert!(encode(&message(PLUGIN, 1, &vec![0; PAYLOAD_MAX + 1])).is_err());
    }
}
