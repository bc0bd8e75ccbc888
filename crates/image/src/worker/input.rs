//! Where archives are read from.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write as _};

/// Bytes in order, some of which nobody needs to see.
pub(crate) trait Input: BufRead {
    /// Passes over the next `bytes`. Fails where there are fewer.
    fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let available = self.fill_buf()?.len();
            if available == 0 {
                return Err(truncated());
            }
            let step = available.min(usize::try_from(bytes).unwrap_or(usize::MAX));
            self.consume(step);
            bytes -= step as u64;
        }
        Ok(())
    }
}

/// Reads what is buffered: `Read` of whatever has a buffer.
pub(crate) fn read_buffered(reader: &mut impl BufRead, buffer: &mut [u8]) -> io::Result<usize> {
    let available = reader.fill_buf()?;
    let bytes = available.len().min(buffer.len());
    buffer[..bytes].copy_from_slice(&available[..bytes]);
    reader.consume(bytes);
    Ok(bytes)
}

pub(crate) fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends in the middle of an entry")
}

/// An input that knows how far it has come.
pub(crate) trait Positioned: Input {
    /// Bytes passed so far.
    fn position(&self) -> u64;
}

const BUFFER_BYTES: usize = 64 << 10;

/// A plain file: what is skipped is not read.
pub(crate) struct Seekable {
    reader: BufReader<File>,
    position: u64,
    length: u64,
}

impl Seekable {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { reader: BufReader::with_capacity(BUFFER_BYTES, file), position: 0, length })
    }
}

impl Read for Seekable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl BufRead for Seekable {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.reader.consume(bytes);
        self.position += bytes as u64;
    }
}

impl Input for Seekable {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let target = self.position.checked_add(bytes).filter(|target| *target <= self.length).ok_or_else(truncated)?;
        self.reader.seek_relative(i64::try_from(bytes).map_err(|_| truncated())?)?;
        self.position = target;
        Ok(())
    }
}

impl Positioned for Seekable {
    fn position(&self) -> u64 {
        self.position
    }
}

/// A stream that is kept in a file as it is read.
pub(crate) struct Spooled<R> {
    reader: BufReader<R>,
    file: File,
    position: u64,
}

impl<R: Read> Spooled<R> {
    pub(crate) fn new(reader: R, file: File) -> Self {
        Self { reader: BufReader::with_capacity(4 * BUFFER_BYTES, reader), file, position: 0 }
    }
}

impl<R: Read> Read for Spooled<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, buffer)
    }
}

impl<R: Read> BufRead for Spooled<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.reader.buffer().is_empty() {
            let fresh = self.reader.fill_buf()?;
            self.file.write_all(fresh)?;
        }
        Ok(self.reader.buffer())
    }

    fn consume(&mut self, bytes: usize) {
        self.reader.consume(bytes);
        self.position += bytes as u64;
    }
}

impl<R: Read> Input for Spooled<R> {}

impl<R: Read> Positioned for Spooled<R> {
    fn position(&self) -> u64 {
        self.position
    }
}
