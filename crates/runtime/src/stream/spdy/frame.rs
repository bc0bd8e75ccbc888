//! Frames of SPDY/3.1 as values and bytes; no IO.
//!
//! ```text
//! control  1 version:15 type:16 | flags:8 length:24 | payload
//! data     0 stream:31          | flags:8 length:24 | payload
//! ```
//!
//! The payload of a data frame is passed on as it comes, so that memory is bounded by the longest control frame.

use bytes::{Buf as _, Bytes, BytesMut};

use super::headers::{Deflater, Headers, Inflater};
use crate::stream::channel::Message;

const HEADER_LEN: usize = 8;
/// The longest payload of a control frame. The standard asks for 8 KiB at least (§2.2.1).
const CONTROL_MAX: usize = 64 * 1024;
/// The longest payload of a data frame that we write.
pub(super) const DATA_MAX: usize = 64 * 1024;
const VERSION: u16 = 3;
const CONTROL: u16 = 0x8000;
const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;

/// Types of control frames.
mod kind {
    pub(super) const SYN_STREAM: u16 = 1;
    pub(super) const SYN_REPLY: u16 = 2;
    pub(super) const RST_STREAM: u16 = 3;
    pub(super) const PING: u16 = 6;
    pub(super) const GOAWAY: u16 = 7;
    pub(super) const HEADERS: u16 = 8;
}

/// Why bytes are no SPDY.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(in crate::stream) struct Malformed(pub(super) &'static str);

/// What a client says, as far as a server has to act on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// Opens a stream; `fin`: the client sends nothing on it, `mute`: the server may not.
    SynStream {
        stream: u32,
        headers: Headers,
        fin: bool,
        mute: bool,
    },
    /// A piece of the data of a stream; `fin`: it was the last.
    Data {
        stream: u32,
        bytes: Bytes,
        fin: bool,
    },
    /// The client sends nothing more on a stream.
    Finish {
        stream: u32,
    },
    /// The end of a stream in both directions.
    RstStream {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
}

/// Finds the frames in the bytes of a connection.
pub(super) struct Decoder {
    inflater: Inflater,
    data: Option<DataFrame>,
}

/// A data frame of which not all bytes have come.
struct DataFrame {
    stream: u32,
    fin: bool,
    missing: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { inflater: Inflater::new(), data: None }
    }

    /// Takes the next frame out of the buffer; `None` when more bytes are needed, never more than a control frame's.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, Malformed> {
        loop {
            if let Some(data) = self.data.take() {
                return Ok(self.piece(data, buffer));
            }
            let Some(&[a, b, c, d, flags, high, middle, low]) = buffer.first_chunk::<HEADER_LEN>() else {
                return Ok(None);
            };
            let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            let (first, second) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            if first & CONTROL == 0 {
                buffer.advance(HEADER_LEN);
                let fin = flags & FLAG_FIN != 0;
                // An empty frame says nothing, unless it is the last.
                if length > 0 || fin {
                    let stream = u32::from(first) << 16 | u32::from(second);
                    self.data = Some(DataFrame { stream, fin, missing: length });
                }
                continue;
            }
            if first != CONTROL | VERSION {
                return Err(Malformed("the client speaks another version of SPDY than 3"));
            }
            if length > CONTROL_MAX {
                return Err(Malformed("a control frame is too long"));
            }
            if buffer.len() < HEADER_LEN + length {
                return Ok(None);
            }
            let frame = buffer.split_to(HEADER_LEN + length);
            if let Some(frame) = self.control(second, flags, &frame[HEADER_LEN..])? {
                return Ok(Some(frame));
            }
        }
    }

    /// What there is of a data frame.
    fn piece(&mut self, data: DataFrame, buffer: &mut BytesMut) -> Option<Frame> {
        let bytes = buffer.split_to(data.missing.min(buffer.len())).freeze();
        let missing = data.missing - bytes.len();
        let DataFrame { stream, fin, .. } = data;
        if missing == 0 {
            return Some(Frame::Data { stream, bytes, fin });
        }
        self.data = Some(DataFrame { missing, ..data });
        (!bytes.is_empty()).then_some(Frame::Data { stream, bytes, fin: false })
    }

    /// A control frame; `None` if a server has nothing to do for it.
    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Option<Frame>, Malformed> {
        let fin = flags & FLAG_FIN != 0;
        let number = |at: usize| {
            let bytes = payload.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or(Malformed("a control frame is too short"))
        };
        let stream = || Ok(number(0)? & 0x7fff_ffff);
        Ok(match kind {
            kind::SYN_STREAM => {
                let block = payload.get(10..).ok_or(Malformed("a SYN_STREAM frame is too short"))?;
                let (headers, mute) = (self.inflater.headers(block)?, flags & FLAG_UNIDIRECTIONAL != 0);
                Some(Frame::SynStream { stream: stream()?, headers, fin, mute })
            }
            kind::SYN_REPLY | kind::HEADERS => {
                let stream = stream()?;
                // Nothing in them matters, but the blocks that follow may refer to them.
                self.inflater.headers(&payload[4..])?;
                fin.then_some(Frame::Finish { stream })
            }
            kind::RST_STREAM => Some(Frame::RstStream { stream: stream()? }),
            kind::PING => Some(Frame::Ping { id: number(0)? }),
            kind::GOAWAY => Some(Frame::GoAway),
            // SETTINGS and WINDOW_UPDATE: clients neither keep nor expect windows; spdystream, which all of them use,
            // knows none. What is unknown is to be ignored (§2.2.1).
            _ => None,
        })
    }
}

/// Writes the frames of our direction.
#[derive(Default)]
pub(super) struct Encoder {
    deflater: Deflater,
    last_accepted: u32,
}

impl Encoder {
    /// Appends what a message is on the wire. Data may be longer than a frame.
    pub(super) fn encode(&mut self, message: &Message, out: &mut Vec<u8>) {
        match message {
            Message::Data { channel, bytes } => {
                for bytes in bytes.chunks(DATA_MAX) {
                    put_header(out, *channel, 0, bytes.len());
                    out.extend_from_slice(bytes);
                }
            }
            Message::Finish { channel } => put_header(out, *channel, FLAG_FIN, 0),
            Message::Reset { channel, status } => control(out, kind::RST_STREAM, &[*channel, *status]),
            Message::Pong { id } => control(out, kind::PING, &[*id]),
            Message::Close => control(out, kind::GOAWAY, &[self.last_accepted, 0]),
            Message::Accept { channel } => {
                self.last_accepted = *channel;
                let mut block = Vec::new();
                self.deflater.no_headers(&mut block);
                put_header(out, first_word(kind::SYN_REPLY), 0, 4 + block.len());
                out.extend_from_slice(&channel.to_be_bytes());
                out.extend_from_slice(&block);
            }
        }
    }
}

fn first_word(kind: u16) -> u32 {
    u32::from(CONTROL | VERSION) << 16 | u32::from(kind)
}

fn control(out: &mut Vec<u8>, kind: u16, numbers: &[u32]) {
    put_header(out, first_word(kind), 0, 4 * numbers.len());
    numbers.iter().for_each(|number| out.extend_from_slice(&number.to_be_bytes()));
}

/// `length` is less than 2^24.
fn put_header(out: &mut Vec<u8>, first_word: u32, flags: u8, length: usize) {
    out.extend_from_slice(&first_word.to_be_bytes());
    out.push(flags);
    out.extend_from_slice(&length.to_be_bytes()[size_of::<usize>() - 3..]);
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::super::headers::{dictionary, tests::block};
    use super::*;

    fn data(stream: u32, flags: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_header(&mut out, stream, flags, bytes.len());
        out.extend_from_slice(bytes);
        out
    }

    fn syn_stream(zlib: &mut Compress, stream: u32, flags: u8, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut compressed = Vec::with_capacity(4096);
        zlib.compress_vec(&block(headers), &mut compressed, FlushCompress::Sync).unwrap();
        let mut out = Vec::new();
        put_header(&mut out, first_word(kind::SYN_STREAM), flags, 10 + compressed.len());
        out.extend_from_slice(&stream.to_be_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&compressed);
        out
    }

    fn zlib() -> Compress {
        let mut zlib = Compress::new(Compression::best(), true);
        zlib.set_dictionary(&dictionary()).unwrap();
        zlib
    }

    /// Feeds the decoder in pieces, as a connection does. Answers the frames, joined data and the most it ever held.
    fn decode(input: &[u8], piece: usize) -> (Result<Vec<Frame>, Malformed>, usize) {
        let (mut decoder, mut buffer, mut frames, mut held) = (Decoder::new(), BytesMut::new(), Vec::new(), 0);
        for bytes in input.chunks(piece) {
            buffer.extend_from_slice(bytes);
            loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (Err(error), held),
                }
            }
            held = held.max(buffer.len());
        }
        (Ok(joined(frames)), held)
    }

    /// Pieces of one data frame as one.
    fn joined(frames: Vec<Frame>) -> Vec<Frame> {
        let mut joined: Vec<Frame> = Vec::new();
        for frame in frames {
            match (joined.last_mut(), frame) {
                (
                    Some(Frame::Data { stream: last, bytes: before, fin: fin @ false }),
                    Frame::Data { stream, bytes, fin: end },
                ) if *last == stream => {
                    *before = [&before[..], &bytes].concat().into();
                    *fin = end;
                }
                (_, frame) => joined.push(frame),
            }
        }
        joined
    }

    fn conversation() -> (Vec<u8>, Vec<Frame>) {
        let mut zlib = zlib();
        let headers = |block: &[(&str, &str)]| {
            let mut zlib = self::zlib();
            let mut compressed = Vec::with_capacity(4096);
            zlib.compress_vec(&super::super::headers::tests::block(block), &mut compressed, FlushCompress::Sync)
                .unwrap();
            Inflater::new().headers(&compressed).unwrap()
        };
        let settings = [&[0x80, 3, 0, 4, 0, 0, 0, 12][..], &[0; 12]].concat();
        let input = [
            settings,
            syn_stream(&mut zlib, 1, 0, &[("streamtype", "error")]),
            syn_stream(&mut zlib, 3, FLAG_FIN | FLAG_UNIDIRECTIONAL, &[("streamtype", "stdin")]),
            data(1, 0, &[7; 3000]),
            data(1, 0, b""),
            data(1, FLAG_FIN, b"end"),
            data(3, FLAG_FIN, b""),
            vec![0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9],
            vec![0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 5],
            vec![0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        let frames = vec![
            Frame::SynStream { stream: 1, headers: headers(&[("streamtype", "error")]), fin: false, mute: false },
            Frame::SynStream { stream: 3, headers: headers(&[("streamtype", "stdin")]), fin: true, mute: true },
            Frame::Data { stream: 1, bytes: [&[7; 3000][..], b"end"].concat().into(), fin: true },
            Frame::Data { stream: 3, bytes: Bytes::new(), fin: true },
            Frame::Ping { id: 9 },
            Frame::RstStream { stream: 1 },
            Frame::GoAway,
        ];
        (input, frames)
    }

    #[test]
    fn frames_come_out_as_they_were_sent() {
        let (input, expect) = conversation();
        for piece in [1, 2, 7, 8, 9, 1000, input.len()] {
            assert_eq!(decode(&input, piece).0.unwrap(), expect, "pieces of {piece}");
        }
    }

    #[test]
    fn malformed_frames() {
        let check = |input: &[u8]| assert!(decode(input, 5).0.is_err(), "{input:?}");
        check(&[0x80, 2, 0, 1, 0, 0, 0, 0]);
        check(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]);
        check(&[0x80, 3, 0, 1, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
        check(&[0x80, 3, 0, 2, 0, 0, 0, 2, 0, 0]);
        check(&[0x80, 3, 0, 6, 0, 0, 0, 0]);
        check(&[0x80, 3, 0, 3, 0, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn our_frames() {
        let mut encoder = Encoder::default();
        let mut check = |message: Message, expect: &[u8]| {
            let mut out = Vec::new();
            encoder.encode(&message, &mut out);
            assert_eq!(out, expect, "{message:?}");
        };
        check(Message::Data { channel: 5, bytes: "hi".into() }, &[0, 0, 0, 5, 0, 0, 0, 2, b'h', b'i']);
        check(Message::Data { channel: 5, bytes: Bytes::new() }, &[]);
        check(Message::Finish { channel: 5 }, &[0, 0, 0, 5, 1, 0, 0, 0]);
        check(Message::Reset { channel: 5, status: 1 }, &[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 1]);
        check(Message::Pong { id: 7 }, &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 7]);
        let no_headers = [0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let reply = |length, stream| vec![0x80, 3, 0, 2, 0, 0, 0, length, 0, 0, 0, stream];
        check(Message::Accept { channel: 1 }, &[&reply(20, 1)[..], &[0x78, 1], &no_headers].concat());
        check(Message::Accept { channel: 3 }, &[&reply(18, 3)[..], &no_headers].concat());
        check(Message::Close, &[0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0]);
    }

    #[test]
    fn long_data_is_many_frames() {
        let (mut encoder, mut out) = (Encoder::default(), Vec::new());
        encoder.encode(&Message::Data { channel: 1, bytes: vec![7; 2 * DATA_MAX + 1].into() }, &mut out);
        assert_eq!(out.len(), 2 * DATA_MAX + 1 + 3 * HEADER_LEN);
        let data = Frame::Data { stream: 1, bytes: vec![7; 2 * DATA_MAX + 1].into(), fin: false };
        assert_eq!(decode(&out, 999).0.unwrap(), [data]);
    }

    proptest! {
        /// Whatever comes, it is refused or waited for, and no more than a control frame is ever held.
        #[test]
        fn any_bytes(input in prop::collection::vec(any::<u8>(), 0..4096), piece in 1..500_usize) {
            let (_, held) = decode(&input, piece);
            prop_assert!(held <= HEADER_LEN + CONTROL_MAX);
        }

        /// The same for what looks like SPDY: a conversation with a few bytes changed, cut out or put in.
        #[test]
        fn damaged_conversations(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..8),
            piece in 1..500_usize,
        ) {
            let (mut input, _) = conversation();
            for (place, byte, how) in damage {
                let at = place.index(input.len());
                match how {
                    0 => input[at] = byte,
                    1 => input.insert(at, byte),
                    _ => drop(input.remove(at)),
                }
            }
            let (_, held) = decode(&input, piece);
            prop_assert!(held <= HEADER_LEN + CONTROL_MAX + piece);
        }
    }
}
