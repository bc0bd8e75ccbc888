//! Frames: a header, a body and the file descriptors that came with them.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::messages::{Event, Reply, Request};
use super::wire::{DecodeError, Input};
use super::{BODY_MAX, FDS_MAX};

/// Size of a frame's header.
pub const HEADER_LEN: usize = 12;

/// One message of any direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Client → keeper.
    Request(Request),
    /// Keeper → client, in answer to the request of the same number.
    Reply(Reply),
    /// Keeper → controlling client.
    Event(Event),
}

/// A received message.
#[derive(Debug)]
pub struct Frame {
    /// Number of the request; 0 for events.
    pub number: u32,
    /// What was said.
    pub message: Message,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    fn kind(&self) -> u16 {
        match self {
            Self::Request(m) => m.kind(),
            Self::Reply(m) => m.kind(),
            Self::Event(m) => m.kind(),
        }
    }

    fn put_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Request(m) => m.put_body(out),
            Self::Reply(m) => m.put_body(out),
            Self::Event(m) => m.put_body(out),
        }
    }

    fn decode(kind: u16, body: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input::new(body);
        let message = match kind {
            0..0x100 => Request::take_body(kind, &mut input)?.map(Self::Request),
            0x100..0x200 => Reply::take_body(kind, &mut input)?.map(Self::Reply),
            _ => Event::take_body(kind, &mut input)?.map(Self::Event),
        };
        input.end()?;
        message.ok_or(DecodeError::Unknown { kind: "frame", value: kind.into() })
    }
}

/// Appends a frame to `out`; the caller sends `fds` file descriptors with its first byte.
///
/// # Errors
/// When the message is longer than [`BODY_MAX`] or has more than [`FDS_MAX`] file descriptors; `out` is as before.
pub fn encode(number: u32, message: &Message, fds: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_LEN]);
    message.put_body(out);
    let length = out.len() - start - HEADER_LEN;
    if length > BODY_MAX || fds > FDS_MAX {
        out.truncate(start);
        return Err(if fds > FDS_MAX {
            DecodeError::MissingFds { needed: fds, present: FDS_MAX }
        } else {
            DecodeError::TooLong(length)
        });
    }
    let header = Header { length, kind: message.kind(), fds, number };
    out[start..start + HEADER_LEN].copy_from_slice(&header.to_bytes());
    Ok(())
}

struct Header {
    length: usize,
    kind: u16,
    fds: usize,
    number: u32,
}

impl Header {
    #[allow(clippy::cast_possible_truncation, reason = "length is at most BODY_MAX, fds at most FDS_MAX")]
    fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        raw[..4].copy_from_slice(&(self.length as u32).to_le_bytes());
        raw[4..6].copy_from_slice(&self.kind.to_le_bytes());
        raw[6..8].copy_from_slice(&(self.fds as u16).to_le_bytes());
        raw[8..].copy_from_slice(&self.number.to_le_bytes());
        raw
    }

    fn from_bytes(raw: &[u8; HEADER_LEN]) -> Result<Self, DecodeError> {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *raw;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > BODY_MAX {
            return Err(DecodeError::TooLong(length));
        }
        let fds = usize::from(u16::from_le_bytes([g, h]));
        Ok(Self { length, kind: u16::from_le_bytes([e, f]), fds, number: u32::from_le_bytes([i, j, k, l]) })
    }
}

/// Turns what a socket delivers, in whatever pieces, into frames.
///
/// Feed it with [`Decoder::push`], then call [`Decoder::next_frame`] until it answers `None`. After an error the
/// connection is beyond repair.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    read: usize,
    fds: VecDeque<OwnedFd>,
}

impl Decoder {
    /// Adds received bytes and the file descriptors that came with them.
    pub fn push(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the peer does not keep to the protocol.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, DecodeError> {
        let Some((header, body)) = self.whole_frame()? else {
            self.compact();
            return Ok(None);
        };
        let message = Message::decode(header.kind, &self.bytes[body.clone()])?;
        self.read = body.end;
        if header.fds > self.fds.len() {
            return Err(DecodeError::MissingFds { needed: header.fds, present: self.fds.len() });
        }
        let fds = self.fds.drain(..header.fds).collect();
        Ok(Some(Frame { number: header.number, message, fds }))
    }

    fn whole_frame(&self) -> Result<Option<(Header, std::ops::Range<usize>)>, DecodeError> {
        let unread = &self.bytes[self.read..];
        let Some(raw) = unread.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::from_bytes(raw)?;
        let body = self.read + HEADER_LEN;
        let whole = unread.len() - HEADER_LEN >= header.length;
        let range = body..body + header.length;
        Ok(whole.then_some((header, range)))
    }

    /// Gives back memory between messages: a keeper waits for hours after a plan of a megabyte.
    fn compact(&mut self) {
        self.bytes.drain(..self.read);
        self.read = 0;
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        if self.fds.is_empty() {
            self.fds = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::messages::*;
    use super::super::wire::Blob;
    use super::*;

    fn samples() -> Vec<Message> {
        let exit = Exit { code: 137, signal: 9, at: UnixNanos(7) };
        let size = WindowSize { rows: 24, columns: 80 };
        vec![
            Message::Request(Request::Hello(Hello { oldest: 1, newest: 3, role: Role::Control })),
            Message::Request(Request::Snapshot),
            Message::Request(Request::Exec(Exec {
                id: "e".into(),
                container: "c".into(),
                plan: Blob(vec![1; 70_000]),
                tty: Some(size),
                stdin: false,
                stdout: true,
                stderr: true,
            })),
            Message::Reply(Reply::Done),
            Message::Reply(Reply::Failed(Failure {
                reason: Reason::Launch,
                step: "mount".into(),
                errno: 13,
                detail: "x".into(),
            })),
            Message::Event(Event::Exited(Exited { id: "c".into(), exit })),
        ]
    }

    #[test]
    fn frames_survive_any_fragmentation() {
        let mut stream = Vec::new();
        for (number, message) in (1..).zip(samples()) {
            encode(number, &message, 0, &mut stream).unwrap();
        }
        for piece in [1, 3, HEADER_LEN, 4096, stream.len()] {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for chunk in stream.chunks(piece) {
                decoder.push(chunk, []);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame.message);
                }
            }
            assert_eq!(seen, samples(), "in pieces of {piece}");
            assert_eq!(decoder.bytes.capacity(), 0, "memory is given back");
        }
    }

    #[test]
    fn lies_are_refused() {
        let mut stream = Vec::new();
        encode(1, &Message::Request(Request::Snapshot), 2, &mut stream).unwrap();
        let refuse = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes, []);
            decoder.next_frame().unwrap_err()
        };
        assert_eq!(refuse(&stream), DecodeError::MissingFds { needed: 2, present: 0 });
        stream[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(refuse(&stream), DecodeError::TooLong(u32::MAX as usize));
        stream[..4].copy_from_slice(&0_u32.to_le_bytes());
        stream[4..6].copy_from_slice(&0xff_u16.to_le_bytes());
        assert_eq!(refuse(&stream), DecodeError::Unknown { kind: "frame", value: 0xff });
    }
}
