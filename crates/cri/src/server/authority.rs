//! Lets clients in whose `:authority` is the path of the socket.
//!
//! gRPC in Python and C++ names the percent-encoded path of a Unix socket as `:authority`, Go clients with a dialer of
//! their own and Java name the path itself. `h2` resets such a request: neither is an authority of RFC 3986
//! (hyperium/h2 issue 442). Nobody looks at the authority of a request that came over a Unix socket, so this layer
//! replaces the two characters at fault, `/` and `%`, by `-` before `h2` sees them.
//!
//! The replacement keeps every length: in plain text the characters are one byte each, and in Huffman's code of HPACK
//! (RFC 7541 appendix B) all three have six bits. So frames stay as long as they say, and both sides agree on the
//! size of each entry of the dynamic table, whether later requests name the authority by its index or not.
//!
//! ```text
//! preface ─► frame header ─┬─ HEADERS: wait for the whole frame, replace, pass on
//!                ▲         ├─ any other: pass on as it comes
//!                ╰─────────╯
//! ```

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Length of the client's preface (RFC 9113 §3.4).
const PREFACE_LEN: usize = 24;
const FRAME_HEADER_LEN: usize = 9;
/// The longest frame that the server accepts: the protocol's default, which hyper announces. Longer ones are passed on
/// as they are, to be refused.
const FRAME_MAX: usize = 16 * 1024;
/// How much is read at once.
const READ_LEN: usize = 8 * 1024;
const TYPE_HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;

/// A connection from a client, with acceptable authorities.
pub(super) struct AnyAuthority<S> {
    stream: S,
    /// What was read and not yet passed on.
    buffer: BytesMut,
    /// How much of the buffer may be passed on.
    ready: usize,
    scan: Scan,
}

/// What begins at the end of the part of the buffer that may be passed on.
#[derive(Debug, Clone, Copy)]
enum Scan {
    FrameHeader,
    /// So many bytes that do not matter.
    Skip(usize),
}

impl<S> AnyAuthority<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, buffer: BytesMut::new(), ready: 0, scan: Scan::Skip(PREFACE_LEN) }
    }

    /// Finds out how much more of the buffer may be passed on.
    fn advance(&mut self) {
        loop {
            let rest = &mut self.buffer[self.ready..];
            match self.scan {
                Scan::Skip(count) => {
                    let passed = count.min(rest.len());
                    self.ready += passed;
                    if passed < count {
                        self.scan = Scan::Skip(count - passed);
                        return;
                    }
                    self.scan = Scan::FrameHeader;
                }
                Scan::FrameHeader => {
                    let Some(&[high, middle, low, kind, flags, ..]) = rest.get(..FRAME_HEADER_LEN) else { return };
                    let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
                    if kind == TYPE_HEADERS && length <= FRAME_MAX {
                        let Some(payload) = rest.get_mut(FRAME_HEADER_LEN..FRAME_HEADER_LEN + length) else { return };
                        make_acceptable(payload, flags);
                    }
                    self.scan = Scan::Skip(FRAME_HEADER_LEN + length);
                }
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ready == 0 {
            this.buffer.reserve(READ_LEN);
            let read = tokio_util::io::poll_read_buf(Pin::new(&mut this.stream), cx, &mut this.buffer);
            if ready!(read)? == 0 {
                // What is left is the beginning of a frame that will never be whole.
                this.ready = this.buffer.len();
                break;
            }
            this.advance();
        }
        let count = this.ready.min(out.remaining());
        out.put_slice(&this.buffer[..count]);
        this.buffer.advance(count);
        this.ready -= count;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Replaces what is at fault in the `:authority` of a HEADERS frame. What cannot be parsed stays for `h2` to refuse; so
/// does an authority that only a CONTINUATION frame completes, which no client sends: pseudo-headers come first.
fn make_acceptable(payload: &mut [u8], flags: u8) {
    let Some(block) = header_block(payload, flags) else { return };
    let block = &mut payload[block];
    let Some(value) = (Fields { block, at: 0 }).authority() else { return };
    let bytes = &mut block[value.bytes];
    if value.huffman {
        replace_huffman(bytes);
    } else {
        bytes.iter_mut().filter(|byte| matches!(byte, b'/' | b'%')).for_each(|byte| *byte = b'-');
    }
}

/// The payload without padding and priority (RFC 9113 §6.2).
fn header_block(payload: &[u8], flags: u8) -> Option<Range<usize>> {
    let (mut start, mut end) = (0, payload.len());
    if flags & FLAG_PADDED != 0 {
        end = end.checked_sub(usize::from(*payload.first()?))?;
        start += 1;
    }
    if flags & FLAG_PRIORITY != 0 {
        start += 5;
    }
    (start <= end).then_some(start..end)
}

/// The string of a header's name or value.
struct Text {
    bytes: Range<usize>,
    huffman: bool,
}

/// The header fields of a block (RFC 7541 §6).
struct Fields<'a> {
    block: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    /// Index of `:authority` in the static table.
    const AUTHORITY: usize = 1;

    /// The literal value of `:authority`, if there is one. A value that is named by its index was replaced when it came.
    fn authority(&mut self) -> Option<Text> {
        loop {
            let first = *self.block.get(self.at)?;
            let prefix_bits = match first {
                0x80.. => {
                    self.integer(7)?;
                    continue;
                }
                0x40.. => 6,
                0x20.. => {
                    self.integer(5)?;
                    continue;
                }
                _ => 4,
            };
            let name = match self.integer(prefix_bits)? {
                0 => {
                    let name = self.text()?;
                    !name.huffman && &self.block[name.bytes] == b":authority"
                }
                index => index == Self::AUTHORITY,
            };
            let value = self.text()?;
            if name {
                return Some(value);
            }
        }
    }

    /// An integer whose first bits are the low ones of the current byte (§5.1).
    fn integer(&mut self, prefix_bits: u32) -> Option<usize> {
        let mask = (1 << prefix_bits) - 1;
        let mut value = usize::from(*self.block.get(self.at)?) & mask;
        self.at += 1;
        if value < mask {
            return Some(value);
        }
        for shift in (0..28).step_by(7) {
            let byte = *self.block.get(self.at)?;
            self.at += 1;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A string (§5.2).
    fn text(&mut self) -> Option<Text> {
        let huffman = *self.block.get(self.at)? & 0x80 != 0;
        let length = self.integer(7)?;
        let start = self.at;
        self.at = start.checked_add(length).filter(|end| *end <= self.block.len())?;
        Some(Text { bytes: start..self.at, huffman })
    }
}

/// The codes of `%`, `-` and `/`.
const PERCENT: u32 = 0b01_0101;
const HYPHEN: u32 = 0b01_0110;
const SLASH: u32 = 0b01_1000;

/// Where the codes of each length end. They are canonical: codes of one length are consecutive numbers, and a longer
/// code begins with more than any shorter one. Codes of 19 bits and more, of the backslash and of what is not printable
/// ASCII, are left alone, and so is what follows them.
const LENGTHS: [(usize, u32); 10] = [
    (5, 0xa),
    (6, 0x2e),
    (7, 0x7c),
    (8, 0xfe),
    (10, 0x3fd),
    (11, 0x7fd),
    (12, 0xffc),
    (13, 0x1ffe),
    (14, 0x3ffe),
    (15, 0x7fff),
];

/// Walks over the codes and replaces those of `/` and `%`.
fn replace_huffman(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some((length, code)) = code_at(bytes, at) {
        if length == 6 && (code == SLASH || code == PERCENT) {
            put_bits(bytes, at, length, HYPHEN);
        }
        at += length;
    }
}

/// Length and value of the code that begins at a bit; `None` in the padding at the end.
fn code_at(bytes: &[u8], at: usize) -> Option<(usize, u32)> {
    LENGTHS.iter().find_map(|&(length, end)| {
        let code = bits(bytes, at, length)?;
        (code < end).then_some((length, code))
    })
}

fn bits(bytes: &[u8], at: usize, count: usize) -> Option<u32> {
    if at + count > bytes.len() * 8 {
        return None;
    }
    let bit = |at: usize| u32::from(bytes[at / 8] >> (7 - at % 8) & 1);
    Some((at..at + count).fold(0, |value, at| value << 1 | bit(at)))
}

fn put_bits(bytes: &mut [u8], at: usize, count: usize, value: u32) {
    for index in 0..count {
        let mask = 0x80 >> ((at + index) % 8);
        let byte = &mut bytes[(at + index) / 8];
        if value >> (count - 1 - index) & 1 == 1 {
            *byte |= mask;
        } else {
            *byte &= !mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// A HEADERS frame of stream 1 with this block.
    fn headers(flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        let mut frame = vec![0, 0, length, TYPE_HEADERS, flags, 0, 0, 0, 1];
        frame.extend_from_slice(payload);
        frame
    }

    /// What comes out for `input` when it arrives in pieces of `piece` bytes.
    async fn passed(input: &[u8], piece: usize) -> Vec<u8> {
        let (mut client, server) = tokio::io::duplex(piece);
        let mut filtered = AnyAuthority::new(server);
        let mut output = Vec::new();
        let write = async {
            client.write_all(input).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let ((), read) = tokio::join!(write, filtered.read_to_end(&mut output));
        read.unwrap();
        output
    }

    async fn check(block: &[u8], expect: &[u8]) {
        let bytes = |block: &[u8]| {
            let data = [0, 0, 3, 0, 0, 0, 0, 0, 1, b'/', b'%', b'/'];
            [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", headers(4, block).as_slice(), &data].concat()
        };
        for piece in [1, 7, 1000] {
            assert_eq!(passed(&bytes(block), piece).await, bytes(expect), "pieces of {piece}");
        }
    }

    #[tokio::test]
    async fn plain_values() {
        // :method POST, then :authority by its index in the static table, then a path that is to stay.
        check(b"\x83\x41\x06/a%2Fb\x44\x02/p", b"\x83\x41\x06-a-2Fb\x44\x02/p").await;
        // The name as text; without and never indexed.
        check(b"\x40\x0a:authority\x02/a", b"\x40\x0a:authority\x02-a").await;
        check(b"\x01\x02/a", b"\x01\x02-a").await;
        check(b"\x11\x02/a", b"\x11\x02-a").await;
        // After a change of the table's size, and an entry of the dynamic table.
        check(b"\x3f\xe1\x1f\xbe\x01\x02/a", b"\x3f\xe1\x1f\xbe\x01\x02-a").await;
    }

    #[tokio::test]
    async fn acceptable_values_stay() {
        for block in [&b"\x83\x41\x09localhost"[..], b"\x83\x44\x06/a%2Fb", b"\x41\x7f/cut off", b"\x41", b"\xff"] {
            check(block, block).await;
        }
    }

    /// `www.example.com` is from RFC 7541 appendix C.4.1; `/run/x%` was encoded by hand from appendix B.
    #[tokio::test]
    async fn huffman_values() {
        let example = b"\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";
        check(example, example).await;
        // / 011000, r 101100, u 101101, n 101010, / 011000, x 1111001, % 010101, padding 111
        let path = [0b0110_0010, 0b1100_1011, 0b0110_1010, 0b0110_0011, 0b1100_1010, 0b1011_1111];
        let name = [0b0101_1010, 0b1100_1011, 0b0110_1010, 0b0101_1011, 0b1100_1010, 0b1101_1111];
        check(&[&[0x41, 0x86][..], &path].concat(), &[&[0x41, 0x86][..], &name].concat()).await;
    }

    #[test]
    fn padding_and_priority_are_no_headers() {
        let check = |flags, payload: &[u8], expect| assert_eq!(header_block(payload, flags), expect);
        check(0, b"abc", Some(0..3));
        check(FLAG_PADDED, b"\x02abc..", Some(1..4));
        check(FLAG_PADDED | FLAG_PRIORITY, b"\x01.....abc.", Some(6..9));
        check(FLAG_PADDED, b"\xff", None);
        check(FLAG_PRIORITY, b"abc", None);
        check(FLAG_PADDED, b"", None);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut seed = 1_u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u8::try_from(seed >> 56).unwrap()
        };
        for length in 0..2000 {
            let mut payload: Vec<u8> = (0..length % 64).map(|_| random()).collect();
            make_acceptable(&mut payload, random());
        }
    }
}
