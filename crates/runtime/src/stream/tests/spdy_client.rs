//! A client of SPDY, as little as the tests need.

use std::collections::{HashMap, HashSet};

use flate2::{Compress, Compression, FlushCompress};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};

use crate::stream::spdy::{block, dictionary};

/// A connection after the upgrade.
pub(super) struct Client<I> {
    writer: Writer<WriteHalf<I>>,
    reader: Reader<ReadHalf<I>>,
}

/// What the client sends.
pub(super) struct Writer<W> {
    io: W,
    zlib: Compress,
    next: u32,
}

/// What the client receives.
pub(super) struct Reader<R> {
    io: R,
    /// What came for each stream and was not asked for.
    data: HashMap<u32, Vec<u8>>,
    accepted: HashSet<u32>,
    finished: HashSet<u32>,
    reset: HashMap<u32, u32>,
    gone_away: bool,
}

impl<I: AsyncRead + AsyncWrite> Client<I> {
    pub(super) fn new(io: I) -> Self {
        let (read, write) = tokio::io::split(io);
        Self { writer: Writer::new(write), reader: Reader::new(read) }
    }

    pub(super) fn split(&mut self) -> (&mut Writer<WriteHalf<I>>, &mut Reader<ReadHalf<I>>) {
        (&mut self.writer, &mut self.reader)
    }

    /// Asks for a stream.
    pub(super) async fn request(&mut self, headers: &[(&str, &str)]) -> u32 {
        self.writer.request(headers).await
    }

    /// Opens a stream, which is to be accepted.
    pub(super) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.request(headers).await;
        while !self.reader.accepted.contains(&stream) {
            assert!(self.reader.read().await, "no answer to stream {stream}");
        }
        stream
    }

    /// Opens the streams of these types.
    pub(super) async fn open_types<const N: usize>(&mut self, types: [&str; N]) -> [u32; N] {
        let mut streams = [0; N];
        for (stream, kind) in streams.iter_mut().zip(types) {
            *stream = self.open(&[("streamtype", kind)]).await;
        }
        streams
    }

    pub(super) async fn send(&mut self, stream: u32, bytes: &[u8]) {
        self.writer.send(stream, bytes).await;
    }

    pub(super) async fn finish(&mut self, stream: u32) {
        self.writer.finish(stream).await;
    }

    pub(super) async fn reset(&mut self, stream: u32) {
        self.writer.reset(stream).await;
    }

    pub(super) async fn received(&mut self, stream: u32, count: usize) -> Vec<u8> {
        self.reader.received(stream, count).await
    }

    /// All that comes on a stream until the server finishes it.
    pub(super) async fn rest(&mut self, stream: u32) -> String {
        while !self.reader.finished.contains(&stream) {
            assert!(self.reader.read().await, "stream {stream} was not finished");
        }
        String::from_utf8(self.reader.data.remove(&stream).unwrap_or_default()).unwrap()
    }

    /// The status with which the server resets a stream.
    pub(super) async fn reset_status(&mut self, stream: u32) -> u32 {
        while !self.reader.reset.contains_key(&stream) {
            assert!(self.reader.read().await, "stream {stream} was not reset");
        }
        self.reader.reset[&stream]
    }

    /// Waits for the end of the connection, which the server is to announce.
    pub(super) async fn closed(mut self) {
        while self.reader.read().await {}
        assert!(self.reader.gone_away);
    }
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    fn new(io: W) -> Self {
        let mut zlib = Compress::new(Compression::best(), true);
        zlib.set_dictionary(&dictionary()).unwrap();
        Self { io, zlib, next: 1 }
    }

    async fn request(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let mut compressed = Vec::with_capacity(4096);
        self.zlib.compress_vec(&block(headers), &mut compressed, FlushCompress::Sync).unwrap();
        let payload = [&stream.to_be_bytes()[..], &[0; 6], &compressed].concat();
        self.write([0x80, 3, 0, 1], 0, &payload).await;
        stream
    }

    pub(super) async fn send(&mut self, stream: u32, bytes: &[u8]) {
        for bytes in bytes.chunks(100_000) {
            self.write(stream.to_be_bytes(), 0, bytes).await;
        }
    }

    pub(super) async fn finish(&mut self, stream: u32) {
        self.write(stream.to_be_bytes(), 1, b"").await;
    }

    async fn reset(&mut self, stream: u32) {
        self.write([0x80, 3, 0, 3], 0, &[stream.to_be_bytes(), [0, 0, 0, 5]].concat()).await;
    }

    async fn write(&mut self, first_word: [u8; 4], flags: u8, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&first_word[..], &[flags], &length[1..], payload].concat();
        self.io.write_all(&frame).await.unwrap();
    }
}

impl<R: AsyncRead + Unpin> Reader<R> {
    fn new(io: R) -> Self {
        let (accepted, finished) = (HashSet::new(), HashSet::new());
        Self { io, data: HashMap::new(), accepted, finished, reset: HashMap::new(), gone_away: false }
    }

    /// Waits until so many bytes have come on a stream.
    pub(super) async fn received(&mut self, stream: u32, count: usize) -> Vec<u8> {
        while self.data.get(&stream).is_none_or(|data| data.len() < count) {
            assert!(self.read().await, "the connection ended");
        }
        let data = self.data.get_mut(&stream).unwrap();
        data.drain(..count).collect()
    }

    /// Reads a frame; `false` at the end of the connection.
    async fn read(&mut self) -> bool {
        let mut header = [0; 8];
        if self.io.read_exact(&mut header).await.is_err() {
            return false;
        }
        let [a, b, c, d, flags, length @ ..] = header;
        let length = u32::from_be_bytes([0, length[0], length[1], length[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.io.read_exact(&mut payload).await.unwrap();
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        match (a & 0x80 != 0, d) {
            (false, _) => {
                let stream = u32::from_be_bytes([a, b, c, d]);
                assert!(!self.finished.contains(&stream), "data after the end of stream {stream}");
                self.data.entry(stream).or_default().extend_from_slice(&payload);
                if flags & 1 != 0 {
                    self.finished.insert(stream);
                }
            }
            (true, 2) => drop(self.accepted.insert(number(0))),
            (true, 3) => drop(self.reset.insert(number(0), number(4))),
            (true, 7) => self.gone_away = true,
            (true, _) => panic!("an unexpected frame of type {d}"),
        }
        true
    }
}
