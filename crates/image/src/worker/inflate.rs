//! Decompression, with an eye on bombs.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Limits;

/// As zstd's own tools by default; a frame that wants more is refused.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const BUFFER_BYTES: usize = 256 << 10;

/// How bytes are compressed, by the first of them: registries and builders disagree with themselves about media types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Decides by the first bytes; what nobody uses for layers is refused by name.
pub(crate) fn compression(start: &[u8]) -> io::Result<Compression> {
    let skippable = start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18];
    match start {
        [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
        _ if skippable => Ok(Compression::Zstd),
        _ if start.starts_with(b"BZh") => Err(unknown("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(unknown("xz")),
        _ => Ok(Compression::None),
    }
}

fn unknown(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("it is compressed with {name}: use gzip, zstd or nothing"))
}

/// The uncompressed bytes of a stream. It fails where they become more than any honest stream has.
pub(crate) struct Inflated<'a> {
    reader: Box<dyn Read + 'a>,
    taken: Arc<AtomicU64>,
    given: u64,
    gauge: Gauge,
}

impl<'a> Inflated<'a> {
    pub(crate) fn new(source: impl Read + 'a, limits: &Limits) -> io::Result<Self> {
        let taken = Arc::new(AtomicU64::new(0));
        let counted = Counted { source, count: Arc::clone(&taken) };
        let reader = decompressor(BufReader::with_capacity(BUFFER_BYTES, counted))?;
        Ok(Self { reader, taken, given: 0, gauge: Gauge::new(limits) })
    }
}

impl Read for Inflated<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.given += read as u64;
        self.gauge.check(self.taken.load(Ordering::Relaxed), self.given)?;
        Ok(read)
    }
}

fn decompressor<'a>(mut source: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression(source.fill_buf()?)? {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

struct Counted<R> {
    source: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Refuses bombs: streams that grow beyond any honest measure.
struct Gauge {
    ratio_max: u64,
    ratio_free_bytes: u64,
    total_max: u64,
}

impl Gauge {
    fn new(limits: &Limits) -> Self {
        Self {
            ratio_max: limits.ratio_max,
            ratio_free_bytes: limits.ratio_free_bytes,
            // Headers and padding come on top of the contents, which have the exact budget.
            total_max: limits.bytes_max.saturating_add(limits.bytes_max / 8).saturating_add(1 << 30),
        }
    }

    fn check(&self, taken: u64, given: u64) -> io::Result<()> {
        let swollen = given > self.ratio_free_bytes && given / taken.max(1) > self.ratio_max;
        if swollen || given > self.total_max {
            return Err(bomb(taken, given));
        }
        Ok(())
    }
}

fn bomb(taken: u64, given: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::FileTooLarge,
        format!("inflates {taken} bytes to more than {given}: a decompression bomb"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn limits() -> Limits {
        Limits { ratio_max: 20, ratio_free_bytes: 1 << 20, ..Limits::default() }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn inflate(bytes: &[u8], limits: &Limits) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Inflated::new(bytes, limits)?.read_to_end(&mut out).map(|_| out)
    }

    #[test]
    fn gives_back_what_was_compressed() {
        let plain = b"a layer".repeat(1000);
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zstd::encode_all(&plain[..], 3).unwrap()];
        let members = [gzip(&plain[..100]), gzip(&plain[100..])];
        for bytes in [
            plain.clone(),
            gzip(&plain),
            zstd::encode_all(&plain[..], 3).unwrap(),
            skippable.concat(),
            members.concat(),
        ] {
            assert_eq!(inflate(&bytes, &limits()).unwrap(), plain);
        }
        assert_eq!(inflate(b"", &limits()).unwrap(), b"");
    }

    #[test]
    fn refuses_bombs_and_what_it_does_not_know() {
        let zeros = vec![0; 4 << 20];
        for bomb in [gzip(&zeros), zstd::encode_all(&zeros[..], 3).unwrap()] {
            assert_eq!(inflate(&bomb, &limits()).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        }
        for other in [&b"BZh91AY"[..], &[0xfd, b'7', b'z', b'X', b'Z', 0]] {
            assert_eq!(inflate(other, &limits()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let cut = gzip(b"something");
        assert!(inflate(&cut[..cut.len() - 9], &limits()).is_err());
    }
}
