//! The stream side of the worker: compressed bytes in, uncompressed pieces out, hashed on the way.
//!
//! ```text
//! stdin ─► inflate (thread) ─┬─► hash (thread)
//!                            └─► files (main thread)
//! ```
//!
//! Pieces are shared and go back to the inflating thread when both have let go of them, so memory is bounded.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::Limits;
use crate::digest::{Algorithm, Digest, Hasher};
use crate::worker::inflate::Inflated;
use crate::worker::input::{Input, read_buffered};

const PIECE_BYTES: usize = 256 << 10;
/// Pieces under way to each of the two readers.
const QUEUE: usize = 8;

type Piece = Vec<u8>;
type Shared = Arc<Piece>;

/// The uncompressed archive, as the main thread reads it.
pub(crate) struct Stream {
    incoming: Receiver<Result<Shared, io::Error>>,
    spare: SyncSender<Piece>,
    current: Option<Shared>,
    used: usize,
    ended: bool,
    hasher: JoinHandle<Digest>,
    gate: Option<SyncSender<()>>,
}

impl Stream {
    /// Starts the two threads. They touch `source` when [`Stream::open`] is called, and then read it to its end.
    pub(crate) fn start(source: impl Read + Send + 'static, limits: &Limits) -> io::Result<Self> {
        let (spare, spares) = sync_channel(2 * QUEUE);
        let (to_files, incoming) = sync_channel(QUEUE);
        let (to_hash, to_be_hashed) = sync_channel::<Shared>(QUEUE);
        let outputs = Outputs { to_files, to_hash, spares };
        let limits = limits.clone();
        let (gate, opened) = sync_channel(1);
        let wait_and_inflate = move || {
            if opened.recv().is_ok() {
                inflate(source, &limits, &outputs);
            }
        };
        std::thread::Builder::new().name("inflate".into()).spawn(wait_and_inflate)?;
        let returns = spare.clone();
        let hasher = std::thread::Builder::new().name("hash".into()).spawn(move || hash(&to_be_hashed, &returns))?;
        Ok(Self { incoming, spare, current: None, used: 0, ended: false, hasher, gate: Some(gate) })
    }

    /// Lets the bytes in: call it when the process is confined.
    pub(crate) fn open(&mut self) {
        if let Some(gate) = self.gate.take() {
            // The channel holds one message and its receiver waits for it.
            let _ = gate.send(());
        }
    }

    /// Reads what is left and returns the digest of everything.
    pub(crate) fn finish(mut self) -> io::Result<Digest> {
        loop {
            let left = self.fill_buf()?.len();
            if left == 0 {
                break;
            }
            self.consume(left);
        }
        self.hasher.join().map_err(|_| io::Error::other("the hashing thread is gone"))
    }

    fn take_next(&mut self) -> io::Result<()> {
        if let Some(done) = self.current.take() {
            recycle(done, &self.spare);
        }
        self.used = 0;
        match self.incoming.recv() {
            Ok(piece) => self.current = Some(piece?),
            Err(_) => self.ended = true,
        }
        Ok(())
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while !self.ended && self.current.as_ref().is_none_or(|piece| piece.len() == self.used) {
            self.take_next()?;
        }
        Ok(self.current.as_ref().map_or(&[], |piece| &piece[self.used..]))
    }

    fn consume(&mut self, bytes: usize) {
        self.used += bytes;
    }
}

impl Input for Stream {}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, buffer)
    }
}

struct Outputs {
    to_files: SyncSender<Result<Shared, io::Error>>,
    to_hash: SyncSender<Shared>,
    spares: Receiver<Piece>,
}

fn inflate(source: impl Read, limits: &Limits, outputs: &Outputs) {
    if let Err(error) = try_inflate(source, limits, outputs) {
        // The reader is gone only when it has failed itself.
        let _ = outputs.to_files.send(Err(error));
    }
}

fn try_inflate(source: impl Read, limits: &Limits, outputs: &Outputs) -> io::Result<()> {
    let mut reader = Inflated::new(source, limits)?;
    loop {
        let mut piece = outputs.spares.try_recv().unwrap_or_default();
        piece.resize(PIECE_BYTES, 0);
        let filled = fill(&mut reader, &mut piece)?;
        if filled == 0 {
            return Ok(());
        }
        piece.truncate(filled);
        let piece = Arc::new(piece);
        let sent = outputs.to_hash.send(Arc::clone(&piece)).is_ok() && outputs.to_files.send(Ok(piece)).is_ok();
        if !sent {
            return Ok(());
        }
    }
}

fn fill(reader: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match reader.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

fn hash(incoming: &Receiver<Shared>, spare: &SyncSender<Piece>) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    while let Ok(piece) = incoming.recv() {
        hasher.update(&piece);
        recycle(piece, spare);
    }
    hasher.finish()
}

fn recycle(piece: Shared, spare: &SyncSender<Piece>) {
    if let Some(piece) = Arc::into_inner(piece) {
        // A full queue means enough spares: this one is freed.
        let _ = spare.try_send(piece);
    }
}
