//! Cuts what an application writes into records of the CRI log format; no IO.
//!
//! A record is `<RFC 3339 time> <stdout|stderr> <P|F> <content>\n`: F ends a line, P is a piece of one that goes on.

/// Longest content of a record; longer lines are split. All CRI runtimes use this number.
pub(crate) const CONTENT_MAX: usize = 16 << 10;
/// A batch of records is handed over once it is this long, so that a flood of empty lines does not grow memory.
const BATCH: usize = 16 << 10;

/// Which of a container's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One stream's unfinished line.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: Stream,
    pending: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, pending: Vec::new() }
    }

    /// Appends records to `batch` until `bytes` are used up or the batch is long enough; answers the bytes left over.
    pub(crate) fn feed<'a>(&mut self, mut bytes: &'a [u8], time: &str, batch: &mut Vec<u8>) -> &'a [u8] {
        while !bytes.is_empty() && batch.len() < BATCH {
            let room = CONTENT_MAX - self.pending.len();
            let newline = bytes.iter().take(room + 1).position(|byte| *byte == b'\n');
            bytes = match newline {
                Some(end) => {
                    self.record(b'F', &bytes[..end], time, batch);
                    &bytes[end + 1..]
                }
                None if bytes.len() > room => {
                    self.record(b'P', &bytes[..room], time, batch);
                    &bytes[room..]
                }
                None => {
                    self.pending.extend_from_slice(bytes);
                    &[]
                }
            };
        }
        bytes
    }

    /// Appends what is left of a line that will have no end.
    pub(crate) fn finish(&mut self, time: &str, batch: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.record(b'P', &[], time, batch);
        }
    }

    fn record(&mut self, tag: u8, content: &[u8], time: &str, batch: &mut Vec<u8>) {
        let pending = std::mem::take(&mut self.pending);
        for part in [time.as_bytes(), b" ", self.stream.name().as_bytes(), b" ", &[tag], b" ", &pending, content, b"\n"]
        {
            batch.extend_from_slice(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `pieces` become, with the time left out.
    fn records(pieces: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let (mut lines, mut log) = (Lines::new(Stream::Stdout), Vec::new());
        for mut piece in pieces.iter().copied() {
            while !piece.is_empty() {
                let mut batch = Vec::new();
                piece = lines.feed(piece, "T", &mut batch);
                assert!(batch.len() <= BATCH + CONTENT_MAX + 64, "a batch stays small");
                assert!(lines.pending.len() <= CONTENT_MAX);
                log.extend(batch);
            }
        }
        lines.finish("T", &mut log);
        let body = log.strip_suffix(b"\n").unwrap_or(&log);
        let record = |line: &[u8]| (line[9], line.strip_prefix(b"T stdout ").unwrap()[2..].to_vec());
        if log.is_empty() { Vec::new() } else { body.split(|b| *b == b'\n').map(record).collect() }
    }

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let want =
            vec![(b'F', b"one".to_vec()), (b'F', Vec::new()), (b'F', b"three".to_vec()), (b'P', b"end".to_vec())];
        assert_eq!(records(&[b"one\n\nthree\nend"]), want);
        let bytes: Vec<&[u8]> = b"one\n\nthree\nend".chunks(1).collect();
        assert_eq!(records(&bytes), want);
        assert_eq!(records(&[]), vec![]);
    }

    #[test]
    fn a_line_is_split_only_where_it_exceeds_the_limit() {
        let long = vec![b'x'; CONTENT_MAX + 1];
        let exact = [&long[1..], b"\n"].concat();
        assert_eq!(records(&[&exact]), vec![(b'F', long[1..].to_vec())]);
        let over = [&long[..], b"\n"].concat();
        assert_eq!(records(&[&over]), vec![(b'P', long[1..].to_vec()), (b'F', b"x".to_vec())]);
        assert_eq!(records(&[&over[..100], &over[100..]]), records(&[&over]));
    }

    #[test]
    fn nothing_is_lost_or_doubled() {
        let text: Vec<u8> =
            (0..300_000_u32).map(|n| if n % 7919 < 3 { b'\n' } else { b'a' + (n % 26) as u8 }).collect();
        for piece in [1, 100, 4096, 16_384, 65_536] {
            let pieces: Vec<&[u8]> = text.chunks(piece).collect();
            let rebuilt: Vec<u8> = records(&pieces)
                .into_iter()
                .flat_map(|(tag, content)| content.into_iter().chain((tag == b'F').then_some(b'\n')))
                .collect();
            assert!(rebuilt == text, "in pieces of {piece}");
        }
    }
}
