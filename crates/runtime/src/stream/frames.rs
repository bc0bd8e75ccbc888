//! Frames of WebSocket (RFC 6455 §5), the server's side, as values and bytes; no IO.
//!
//! The payload of a data frame is passed on as it comes: some clients send all of a command's input in one message, of any
//! length, and none of it waits here for the rest.

use bytes::{Buf as _, BytesMut};

/// The longest payload of a control frame (§5.5).
const CONTROL_MAX: usize = 125;
const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;

/// What a frame is (§5.2).
mod opcode {
    pub(super) const CONTINUATION: u8 = 0;
    pub(super) const TEXT: u8 = 1;
    pub(super) const BINARY: u8 = 2;
    pub(super) const CLOSE: u8 = 8;
    pub(super) const PING: u8 = 9;
    pub(super) const PONG: u8 = 10;
}

/// Why bytes are no WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Malformed(&'static str);

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// A piece of a message; `last`: the message ends with it. Text and bytes are the same here.
    Data { bytes: BytesMut, last: bool },
    /// To be answered with the same bytes.
    Ping(BytesMut),
    /// The client sends nothing more.
    Close,
}

/// Finds the frames in the bytes of a connection.
#[derive(Default)]
pub(super) struct Decoder {
    data: Option<DataFrame>,
    /// Whether a message goes on in another frame.
    unfinished: bool,
}

/// A data frame of which not all bytes have come.
struct DataFrame {
    missing: u64,
    /// What the next bytes are masked with.
    mask: [u8; 4],
    /// Whether it is the last of its message.
    fin: bool,
}

impl Decoder {
    /// Takes the next frame, or what there is of a data frame, out of the buffer; `None` when more bytes are needed, never
    /// more than a control frame's.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, Malformed> {
        loop {
            if let Some(data) = self.data.take() {
                return Ok(self.piece(data, buffer));
            }
            let Some(header) = Header::parse(buffer)? else { return Ok(None) };
            if header.opcode < opcode::CLOSE {
                buffer.advance(header.length);
                self.begin(&header)?;
                continue;
            }
            let payload = match usize::try_from(header.payload) {
                Ok(payload @ ..=CONTROL_MAX) if header.fin => payload,
                _ => return Err(Malformed("a control frame is too long or in pieces")),
            };
            if buffer.len() < header.length + payload {
                return Ok(None);
            }
            buffer.advance(header.length);
            let mut bytes = buffer.split_to(payload);
            unmask(&mut bytes, header.mask);
            match header.opcode {
                opcode::CLOSE => return Ok(Some(Frame::Close)),
                opcode::PING => return Ok(Some(Frame::Ping(bytes))),
                opcode::PONG => {}
                _ => return Err(Malformed("a frame is of no known kind")),
            }
        }
    }

    /// Notes what a data frame begins.
    fn begin(&mut self, header: &Header) -> Result<(), Malformed> {
        match (header.opcode, self.unfinished) {
            (opcode::CONTINUATION, true) | (opcode::TEXT | opcode::BINARY, false) => {}
            (opcode::CONTINUATION, false) => return Err(Malformed("nothing is there to be continued")),
            (opcode::TEXT | opcode::BINARY, true) => return Err(Malformed("a message begins within another")),
            _ => return Err(Malformed("a frame is of no known kind")),
        }
        self.unfinished = !header.fin;
        self.data = Some(DataFrame { missing: header.payload, mask: header.mask, fin: header.fin });
        Ok(())
    }

    /// What there is of a data frame.
    fn piece(&mut self, mut data: DataFrame, buffer: &mut BytesMut) -> Option<Frame> {
        let there = usize::try_from(data.missing).map_or(buffer.len(), |missing| missing.min(buffer.len()));
        let mut bytes = buffer.split_to(there);
        unmask(&mut bytes, data.mask);
        data.missing -= there as u64;
        data.mask.rotate_left(there % 4);
        if data.missing == 0 {
            return Some(Frame::Data { bytes, last: data.fin });
        }
        self.data = Some(data);
        (!bytes.is_empty()).then_some(Frame::Data { bytes, last: false })
    }
}

/// How a frame of a client begins.
struct Header {
    /// How long this is.
    length: usize,
    opcode: u8,
    fin: bool,
    /// How long the payload is.
    payload: u64,
    mask: [u8; 4],
}

impl Header {
    /// `None`: not all of it is there.
    fn parse(buffer: &[u8]) -> Result<Option<Self>, Malformed> {
        let &[first, second, ref rest @ ..] = buffer else { return Ok(None) };
        if first & RESERVED != 0 {
            return Err(Malformed("a frame is of an extension that was not agreed on"));
        }
        if second & MASKED == 0 {
            return Err(Malformed("a frame is not masked"));
        }
        let (payload, rest) = match (second & !MASKED, rest) {
            (126, &[a, b, ref rest @ ..]) => (u16::from_be_bytes([a, b]).into(), rest),
            (127, &[a, b, c, d, e, f, g, h, ref rest @ ..]) => (u64::from_be_bytes([a, b, c, d, e, f, g, h]), rest),
            (126.., _) => return Ok(None),
            (short, rest) => (short.into(), rest),
        };
        if payload >> 63 != 0 {
            return Err(Malformed("a frame has no such length"));
        }
        let Some((mask, rest)) = rest.split_first_chunk() else { return Ok(None) };
        let (length, opcode) = (buffer.len() - rest.len(), first & !FIN);
        Ok(Some(Self { length, opcode, fin: first & FIN != 0, payload, mask: *mask }))
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let (words, rest) = bytes.as_chunks_mut();
    for word in words {
        *word = (u32::from_ne_bytes(*word) ^ u32::from_ne_bytes(mask)).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

/// What we say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Binary,
    Close,
    Pong,
}

/// A whole message in one frame.
pub(super) fn encode(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let opcode = match kind {
        Kind::Text => opcode::TEXT,
        Kind::Binary => opcode::BINARY,
        Kind::Close => opcode::CLOSE,
        Kind::Pong => opcode::PONG,
    };
    let mut frame = Vec::with_capacity(10 + payload.len());
    frame.push(FIN | opcode);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..126), _) => frame.push(length),
        (_, Ok(length)) => {
            frame.push(126);
            frame.extend(length.to_be_bytes());
        }
        _ => {
            frame.push(127);
            frame.extend((payload.len() as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::protocol::frame;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};

    use super::*;

    /// What these bytes say if they come `step` at a time; pieces of data are joined.
    fn decoded(bytes: &[u8], step: usize) -> Result<Vec<Frame>, Malformed> {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        let (mut frames, mut begun) = (Vec::new(), BytesMut::new());
        for bytes in bytes.chunks(step) {
            buffer.extend_from_slice(bytes);
            while let Some(frame) = decoder.next(&mut buffer)? {
                match frame {
                    Frame::Data { bytes, last } => {
                        begun.extend_from_slice(&bytes);
                        if last {
                            frames.push(Frame::Data { bytes: begun.split(), last });
                        }
                    }
                    frame => frames.push(frame),
                }
            }
        }
        assert!(buffer.is_empty() && begun.is_empty(), "all has been said");
        Ok(frames)
    }

    fn data(bytes: &[u8]) -> Frame {
        Frame::Data { bytes: bytes.into(), last: true }
    }

    /// The examples of RFC 6455 §5.7 that are a client's.
    #[test]
    fn examples_of_the_standard() {
        let hello = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        let pong = [0x8a, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        for step in 1..12 {
            assert_eq!(decoded(&[pong, hello, pong].concat(), step), Ok(vec![data(b"Hello")]), "{step}");
        }
        assert_eq!(encode(Kind::Text, b"Hello"), b"\x81\x05Hello");
        assert_eq!(encode(Kind::Pong, b"Hello"), b"\x8a\x05Hello");
        assert_eq!(encode(Kind::Binary, &[7; 256])[..5], [0x82, 126, 1, 0, 7]);
        assert_eq!(encode(Kind::Binary, &[7; 65536])[..11], [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0, 7]);
    }

    /// A frame as another implementation writes it.
    fn written(opcode: OpCode, fin: bool, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
        let header = frame::FrameHeader { is_final: fin, opcode, mask: Some(mask), ..Default::default() };
        let frame = frame::Frame::from_payload(header, payload.to_vec().into());
        let mut bytes = Vec::new();
        frame.format(&mut bytes).unwrap();
        bytes
    }

    proptest::proptest! {
        #[test]
        fn messages_are_what_another_writes(
            messages in proptest::collection::vec(
                proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..300), 1..4), 0..4),
            long in 65_000..66_000_usize,
            mask: [u8; 4],
            step in 1..1000_usize,
        ) {
            let (mut bytes, mut expect) = (Vec::new(), Vec::new());
            for pieces in &messages {
                for (at, piece) in pieces.iter().enumerate() {
                    let opcode = OpCode::Data(if at == 0 { Data::Binary } else { Data::Continue });
                    bytes.extend(written(opcode, at + 1 == pieces.len(), piece, mask));
                    // A control frame may come between the frames of a message.
                    bytes.extend(written(OpCode::Control(Control::Ping), true, b"?", mask));
                    expect.push(Frame::Ping(b"?"[..].into()));
                }
                let at = expect.len() - 1;
                expect.insert(at, data(&pieces.concat()));
            }
            bytes.extend(written(OpCode::Data(Data::Text), true, &vec![1; long], mask));
            bytes.extend(written(OpCode::Control(Control::Close), true, &[3, 232], mask));
            expect.extend([data(&vec![1; long]), Frame::Close]);
            proptest::prop_assert_eq!(decoded(&bytes, step), Ok(expect));
        }
    }

    #[test]
    fn what_no_client_may_say() {
        let check = |bytes: &[u8], expect| assert_eq!(decoded(bytes, 1), Err(Malformed(expect)));
        check(b"\x82\x00", "a frame is not masked");
        check(b"\xc2\x80", "a frame is of an extension that was not agreed on");
        check(b"\x83\x80....", "a frame is of no known kind");
        check(b"\x8b\x80....", "a frame is of no known kind");
        check(b"\x80\x80....", "nothing is there to be continued");
        check(b"\x02\x80....\x82\x80....", "a message begins within another");
        check(b"\x09\x80....", "a control frame is too long or in pieces");
        check(b"\x89\xfe\x00\x7e....", "a control frame is too long or in pieces");
        check(b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff", "a frame has no such length");
    }
}
