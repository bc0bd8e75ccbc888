//! Reads the logs of containers as the runtime writes them, across rotations.
//!
//! ```text
//! <container>/0.log.20260131-115900.gz   older, compressed
//! <container>/0.log.20260131-120000      older
//! <container>/0.log                      being written: `TIME STREAM TAG CONTENT`
//! ```
//!
//! A [`Reader`] is a position in this sequence. Following waits for the kernel's word that the directory changed; it
//! never polls. A line is lost or doubled in no rotation: an open file is read to its end before the next one, and the
//! next one is found by the place of the open one's inode in the sequence.

mod watches;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flate2::read::GzDecoder;
use futures_util::Stream;
use jiff::Timestamp;
use sys::rustix::fs::{Mode, OFlags, open};
use sys::rustix::io::Errno;

use watches::Watch;
pub use watches::Watches;

/// What of a log is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Goes on until the container ends.
    pub follow: bool,
    /// Begins so many lines before the end.
    pub tail_lines: Option<usize>,
    /// Leaves out what was written before.
    pub since: Option<Timestamp>,
    /// Puts the time before each line.
    pub timestamps: bool,
    /// Ends after so many bytes.
    pub limit_bytes: Option<usize>,
}

/// Bytes that one step of reading takes from a file.
const CHUNK: usize = 64 * 1024;
/// A longer line is taken in parts: runtimes write shorter ones, but a pod may write whatever it likes where it is let.
const LINE_MAX: usize = 64 * 1024;

/// The attempts of a container that have left a log, oldest first. `dir` is the container's directory.
pub fn attempts(dir: &Path) -> Vec<u32> {
    let names =
        fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut attempts: Vec<u32> = names.filter_map(|name| name.split('.').next()?.parse().ok()).collect();
    attempts.sort_unstable();
    attempts.dedup();
    attempts
}

/// The content of a log as a stream of bytes. It ends when everything is read; with `follow` when `ended` has come to
/// pass and everything is read. An error ends it, too. `watches` are those of all who follow.
pub fn stream(
    watches: Watches,
    path: PathBuf,
    options: Options,
    ended: impl Future<Output = ()> + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let follow = options.follow;
    let reader = Some(Reader::new(path, options));
    let start = Following { reader, watches, watch: None, ended: Box::pin(ended), follow };
    futures_util::stream::try_unfold(start, |mut state| async {
        let chunk = state.next().await?;
        Ok(chunk.map(|chunk| (chunk, state)))
    })
}

/// The last lines of a log, for the termination message of a container that wrote none.
///
/// # Errors
/// The file cannot be read.
pub fn last(path: &Path, lines: usize, bytes: usize) -> io::Result<String> {
    let mut reader = Reader::new(path.to_owned(), Options { tail_lines: Some(lines), ..Options::default() });
    let mut all = Vec::new();
    while let Step::Data(data) = reader.step()? {
        all.extend_from_slice(&data);
        all.drain(..all.len().saturating_sub(bytes));
    }
    Ok(String::from_utf8_lossy(&all).into_owned())
}

struct Following {
    /// Lent to a blocking thread while it reads.
    reader: Option<Reader>,
    watches: Watches,
    watch: Option<Watch>,
    ended: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>,
    follow: bool,
}

impl Following {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            // The watch is set before the read whose end it answers for, so that no write between them is missed.
            if self.follow && self.watch.is_none() {
                let directory = self.reader.as_ref().and_then(|reader| reader.path.parent());
                self.watch = directory.map(|directory| self.watches.add(directory)).transpose()?;
            }
            match self.step().await? {
                Step::Data(data) if data.is_empty() => {}
                Step::Data(data) => return Ok(Some(data)),
                Step::Done => return Ok(None),
                Step::End if !self.follow => return Ok(None),
                Step::End => self.wait().await?,
            }
        }
    }

    async fn step(&mut self) -> io::Result<Step> {
        let Some(mut reader) = self.reader.take() else { return Ok(Step::Done) };
        let task = tokio::task::spawn_blocking(move || {
            let step = reader.step();
            (reader, step)
        });
        let (reader, step) = task.await.map_err(io::Error::other)?;
        self.reader = Some(reader);
        step
    }

    /// Waits for a change of the files; after the container's end there is one more look.
    async fn wait(&mut self) -> io::Result<()> {
        let Some(watch) = &mut self.watch else { return Ok(()) };
        tokio::select! {
            changed = watch.changed() => changed,
            () = &mut self.ended => {
                self.follow = false;
                Ok(())
            }
        }
    }
}

/// What one step of reading gave.
enum Step {
    /// Bytes for the reader's reader; none when lines were left out.
    Data(Bytes),
    /// All that is written was read; more may come.
    End,
    /// Nothing will come any more: the limit is reached.
    Done,
}

/// A position in the files of one attempt.
struct Reader {
    path: PathBuf,
    options: Options,
    /// Files before the one being written that are not opened yet; `None` before the first step.
    older: Option<VecDeque<PathBuf>>,
    open: Option<Open>,
    filter: Filter,
}

/// Opens a log, which is a file: a pod that may write to the node's directory of logs could put a link to any file of the
/// node in its place, or a pipe that nobody writes to.
fn open_log(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let refused = || io::Error::new(io::ErrorKind::InvalidData, format!("{} is no log file", path.display()));
    let file = match open(path, flags, Mode::empty()) {
        Err(Errno::LOOP) => return Err(refused()),
        opened => File::from(opened?),
    };
    if file.metadata()?.is_file() { Ok(file) } else { Err(refused()) }
}

struct Open {
    lines: Box<dyn BufRead + Send>,
    inode: u64,
    /// The beginning of a line whose end is not written yet, or the part of a long one that comes next.
    partial: Vec<u8>,
}

impl Open {
    fn new(path: &Path) -> io::Result<Self> {
        let file = open_log(path)?;
        let inode = file.metadata()?.ino();
        let is_compressed = path.extension().is_some_and(|extension| extension == "gz");
        let lines: Box<dyn BufRead + Send> = if is_compressed {
            Box::new(BufReader::with_capacity(CHUNK, GzDecoder::new(file)))
        } else {
            Box::new(BufReader::with_capacity(CHUNK, file))
        };
        Ok(Self { lines, inode, partial: Vec::new() })
    }
}

impl Reader {
    fn new(path: PathBuf, options: Options) -> Self {
        let filter = Filter {
            since: options.since,
            timestamps: options.timestamps,
            left: options.limit_bytes,
            continues: false,
            line: None,
        };
        Self { path, options, older: None, open: None, filter }
    }

    fn step(&mut self) -> io::Result<Step> {
        if self.filter.left == Some(0) {
            return Ok(Step::Done);
        }
        if self.older.is_none() {
            self.begin()?;
        }
        let Some(open) = &mut self.open else { return self.open_next() };
        let data = read_lines(open, &mut self.filter)?;
        match data {
            Some(data) => Ok(Step::Data(data)),
            None => self.open_next(),
        }
    }

    /// Finds where to begin.
    fn begin(&mut self) -> io::Result<()> {
        let files = files(&self.path)?;
        let (first, skip) = match self.options.tail_lines {
            Some(lines) => find_tail(&files, lines)?,
            None => (0, 0),
        };
        let mut older: VecDeque<PathBuf> = files.into_iter().skip(first).collect();
        if let Some(file) = older.pop_front() {
            let mut open = Open::new(&file)?;
            io::copy(&mut open.lines.by_ref().take(skip), &mut io::sink())?;
            self.open = Some(open);
        }
        // The file being written is found by its name when its turn has come.
        older.retain(|file| *file != self.path);
        self.older = Some(older);
        Ok(())
    }

    /// At the end of the open file: the next one, if the log has gone on in another.
    fn open_next(&mut self) -> io::Result<Step> {
        let next = match self.older.as_mut().and_then(VecDeque::pop_front) {
            Some(older) => Some(older),
            None => self.successor()?,
        };
        let Some(next) = next else { return Ok(Step::End) };
        // The open file may have been written to between its end and its renaming.
        if let Some(open) = &mut self.open
            && let Some(rest) = read_lines(open, &mut self.filter)?
        {
            self.older.get_or_insert_default().push_front(next);
            return Ok(Step::Data(rest));
        }
        match Open::new(&next) {
            Ok(open) => self.open = Some(open),
            // It was rotated away or compressed since it was listed; the next step lists again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(Step::Data(Bytes::new()))
    }

    /// The file after the open one.
    fn successor(&self) -> io::Result<Option<PathBuf>> {
        let files = files(&self.path)?;
        let Some(open) = &self.open else { return Ok(files.into_iter().next()) };
        let inode = |file: &PathBuf| fs::metadata(file).map(|data| data.ino()).ok();
        match files.iter().position(|file| inode(file) == Some(open.inode)) {
            Some(index) => Ok(files.into_iter().nth(index + 1)),
            // The open file is gone, or was compressed under another inode: go on with what is written now.
            None => Ok(files.into_iter().next_back().filter(|file| *file == self.path)),
        }
    }
}

/// Reads about a chunk of whole lines; `None` at the end of what is written.
fn read_lines(open: &mut Open, filter: &mut Filter) -> io::Result<Option<Bytes>> {
    let mut out = Vec::new();
    let mut taken = 0;
    while taken < CHUNK {
        let room = (LINE_MAX - open.partial.len()) as u64;
        let count = open.lines.by_ref().take(room).read_until(b'\n', &mut open.partial)?;
        if count == 0 {
            break;
        }
        taken += count;
        if open.partial.ends_with(b"\n") || open.partial.len() == LINE_MAX {
            filter.take(&open.partial, &mut out);
            open.partial.clear();
        }
    }
    Ok((taken > 0).then(|| out.into()))
}

/// The files of an attempt that are there, oldest first.
fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let rotated = |other: &str| {
        let suffix = other.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'))?;
        // Half-written compressed files are called `.tmp`.
        (!suffix.ends_with(".tmp")).then(|| suffix.trim_end_matches(".gz").to_owned())
    };
    let mut older = Vec::new();
    let mut current = None;
    for entry in fs::read_dir(dir)? {
        let other = entry?.file_name().into_string().unwrap_or_default();
        if other == name {
            current = Some(path.to_owned());
        } else if let Some(time) = rotated(&other) {
            // Of a file and its compressed copy the file sorts first; the copy is left out.
            older.push((time, other));
        }
    }
    older.sort();
    older.dedup_by(|next, kept| next.0 == kept.0);
    Ok(older.into_iter().map(|(_, name)| dir.join(name)).chain(current).collect())
}

/// Where the last `lines` lines begin: in which file, and after how many of its bytes.
fn find_tail(files: &[PathBuf], lines: usize) -> io::Result<(usize, u64)> {
    let mut wanted = lines;
    for (index, file) in files.iter().enumerate().rev() {
        let is_compressed = file.extension().is_some_and(|extension| extension == "gz");
        let ends = if is_compressed { ends_of_compressed(file, wanted)? } else { ends_of_last(file, wanted)? };
        match ends {
            Ok(offset) => return Ok((index, offset)),
            Err(found) => wanted -= found,
        }
    }
    Ok((0, 0))
}

/// `Ok`: the offset at which the last `wanted` lines of a file begin; `Err`: it has only so many.
type Tail = Result<u64, usize>;

/// Reads backwards from the end.
fn ends_of_last(path: &Path, wanted: usize) -> io::Result<Tail> {
    let mut file = open_log(path)?;
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut buffer = vec![0; CHUNK];
    // The end of the last line counts as well: the wanted lines begin after one end more.
    let mut found = 0;
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let block = &mut buffer[..usize::try_from(end - start).unwrap_or(CHUNK)];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(block)?;
        for (index, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            if found == wanted {
                return Ok(Ok(start + index as u64 + 1));
            }
            found += 1;
        }
        end = start;
    }
    Ok(if found == wanted { Ok(0) } else { Err(found) })
}

/// Compressed files can only be read forwards: once to count the lines, once to where the last ones begin.
fn ends_of_compressed(path: &Path, wanted: usize) -> io::Result<Tail> {
    let open = || Ok::<_, io::Error>(BufReader::with_capacity(CHUNK, GzDecoder::new(open_log(path)?)));
    let (found, _) = skip_lines(&mut open()?, usize::MAX)?;
    let Some(before) = found.checked_sub(wanted) else { return Ok(Err(found)) };
    let (_, offset) = skip_lines(&mut open()?, before)?;
    Ok(Ok(offset))
}

/// Reads past `lines` lines, or to the end; how many lines that were, one without an end among them, and how many bytes.
fn skip_lines(reader: &mut impl BufRead, lines: usize) -> io::Result<(usize, u64)> {
    let (mut skipped, mut bytes, mut is_cut) = (0, 0, false);
    while skipped < lines {
        let block = reader.fill_buf()?;
        let Some(last) = block.last() else { break };
        is_cut = *last != b'\n';
        let mut taken = block.len();
        for (index, _) in block.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            skipped += 1;
            if skipped == lines {
                taken = index + 1;
                break;
            }
        }
        reader.consume(taken);
        bytes += taken as u64;
    }
    Ok((skipped + usize::from(is_cut && skipped < lines), bytes))
}

/// Turns written lines into what the container said.
struct Filter {
    since: Option<Timestamp>,
    timestamps: bool,
    /// Bytes that may still go out.
    left: Option<usize>,
    /// The next line goes on with one that was written in parts.
    continues: bool,
    /// The line of which a part was taken.
    line: Option<Line>,
}

/// What is done with a line, however many parts it is taken in.
#[derive(Clone, Copy)]
struct Line {
    is_shown: bool,
    /// The next line goes on with it.
    is_partial: bool,
}

impl Filter {
    /// Takes a line, or a part of one that is too long; the last part ends as the line does.
    fn take(&mut self, part: &[u8], out: &mut Vec<u8>) {
        let (content, is_end) = match part.strip_suffix(b"\n") {
            Some(content) => (content, true),
            None => (part, false),
        };
        let (line, content) = match self.line.take() {
            Some(line) => (line, content),
            None => self.begin(content, out),
        };
        if line.is_shown {
            self.put(content, out);
            if is_end && !line.is_partial {
                self.put(b"\n", out);
            }
        }
        self.line = (!is_end).then_some(line);
    }

    /// What a line is, by its beginning, and where its content begins.
    fn begin<'a>(&mut self, part: &'a [u8], out: &mut Vec<u8>) -> (Line, &'a [u8]) {
        let Some(entry) = parse(part) else { return (Line { is_shown: true, is_partial: false }, part) };
        let continued = std::mem::replace(&mut self.continues, entry.is_partial);
        let is_shown = !self.since.is_some_and(|since| is_before(entry.time, since));
        if is_shown && self.timestamps && !continued {
            self.put(entry.time, out);
            self.put(b" ", out);
        }
        (Line { is_shown, is_partial: entry.is_partial }, entry.content)
    }

    fn put(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let count = self.left.map_or(bytes.len(), |left| left.min(bytes.len()));
        if let Some(left) = &mut self.left {
            *left -= count;
        }
        out.extend_from_slice(&bytes[..count]);
    }
}

struct Entry<'a> {
    time: &'a [u8],
    is_partial: bool,
    content: &'a [u8],
}

/// A line as the CRI has it: `TIME STREAM TAG CONTENT`; tags are joined by colons, the first says whether the line is
/// full (`F`) or goes on (`P`).
fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let content = parts.next().unwrap_or_default();
    let is_known = stream == b"stdout" || stream == b"stderr";
    is_known.then(|| Entry { time, is_partial: tag.first() == Some(&b'P'), content })
}

fn is_before(time: &[u8], since: Timestamp) -> bool {
    let time = std::str::from_utf8(time).ok().and_then(|text| text.parse::<Timestamp>().ok());
    time.is_some_and(|time| time < since)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;
    use std::io::Write as _;

    fn line(number: usize) -> String {
        format!("2026-01-31T12:00:{number:02}.000000000Z stdout F line {number}\n")
    }

    fn log() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut gz = flate2::write::GzEncoder::new(
            File::create(dir.path().join("0.log.20260131-115900.gz")).unwrap(),
            flate2::Compression::fast(),
        );
        gz.write_all((line(0) + &line(1)).as_bytes()).unwrap();
        gz.finish().unwrap();
        fs::write(dir.path().join("0.log.20260131-120000"), line(2) + &line(3)).unwrap();
        fs::write(dir.path().join("0.log.20260131-120001.gz.tmp"), "half").unwrap();
        fs::write(&path, line(4) + &line(5)).unwrap();
        fs::write(dir.path().join("1.log"), "another attempt").unwrap();
        (dir, path)
    }

    fn append(path: &Path, text: &str) {
        fs::OpenOptions::new().append(true).create(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    fn expected(numbers: std::ops::Range<usize>) -> String {
        numbers.map(|number| format!("line {number}\n")).collect()
    }

    async fn read(path: &Path, options: Options) -> String {
        let chunks: Vec<_> =
            stream(Watches::default(), path.to_owned(), options, std::future::pending()).collect().await;
        chunks.into_iter().map(|chunk| String::from_utf8(chunk.unwrap().to_vec()).unwrap()).collect()
    }

    #[tokio::test]
    async fn rotated_files_are_read_in_order() {
        let (_dir, path) = log();
        assert_eq!(read(&path, Options::default()).await, expected(0..6));
        for lines in 0..8 {
            let options = Options { tail_lines: Some(lines), ..Options::default() };
            assert_eq!(read(&path, options).await, expected(6usize.saturating_sub(lines)..6), "tail {lines}");
        }
        let since = Some("2026-01-31T12:00:03Z".parse().unwrap());
        assert_eq!(read(&path, Options { since, ..Options::default() }).await, expected(3..6));
        assert_eq!(read(&path, Options { limit_bytes: Some(9), ..Options::default() }).await, "line 0\nli");
        assert_eq!(attempts(path.parent().unwrap()), [0, 1]);
        assert_eq!(last(&path, 2, 8).unwrap(), "\nline 5\n");
    }

    #[tokio::test]
    async fn parts_of_a_line_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(
            &path,
            "2026-01-31T12:00:00Z stdout P a\n2026-01-31T12:00:01Z stdout F b\n2026-01-31T12:00:02Z stderr F \nodd\n",
        )
        .unwrap();
        assert_eq!(read(&path, Options::default()).await, "ab\n\nodd\n");
        let timed = read(&path, Options { timestamps: true, ..Options::default() }).await;
        assert_eq!(timed, "2026-01-31T12:00:00Z ab\n2026-01-31T12:00:02Z \nodd\n");
    }

    /// A log is no larger in memory than elsewhere, whatever is in it.
    #[tokio::test]
    async fn a_line_without_end_is_read_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let long = "x".repeat(9 * LINE_MAX + 5);
        let header = "2026-01-31T12:00:00Z stdout";
        let text = format!("{header} P {long}\n{header} F {long}\n{long}\n{header} F end\n");
        let mut gz = flate2::write::GzEncoder::new(
            File::create(dir.path().join("0.log.20260131-115900.gz")).unwrap(),
            flate2::Compression::fast(),
        );
        gz.write_all(text.as_bytes()).unwrap();
        gz.finish().unwrap();
        fs::write(&path, &text).unwrap();
        let said = format!("{long}{long}\n{long}\nend\n");
        let timed = format!("2026-01-31T12:00:00Z {long}{long}\n{long}\n2026-01-31T12:00:00Z end\n");
        assert_eq!(read(&path, Options::default()).await, said.repeat(2));
        assert_eq!(read(&path, Options { timestamps: true, ..Options::default() }).await, timed.repeat(2));
        let tail = Options { tail_lines: Some(6), ..Options::default() };
        assert_eq!(read(&path, tail).await, format!("{long}\nend\n{said}"));
        let since = Some("2026-01-31T12:00:01Z".parse().unwrap());
        assert_eq!(read(&path, Options { since, ..Options::default() }).await, format!("{long}\n").repeat(2));
        let mut reader = Reader::new(path.clone(), Options::default());
        while let Step::Data(data) = reader.step().unwrap() {
            let held = reader.open.as_ref().map_or(0, |open| open.partial.capacity());
            assert!(data.len().max(held) <= 2 * LINE_MAX, "{} and {held} bytes", data.len());
        }
        assert_eq!(last(&path, 80, 8).unwrap(), "xxx\nend\n");
    }

    #[tokio::test]
    async fn following_loses_nothing_over_rotations() {
        let (dir, path) = log();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let options = Options { follow: true, tail_lines: Some(1), ..Options::default() };
        let mut followed = std::pin::pin!(stream(Watches::default(), path.clone(), options, async move {
            let _ = ended.await;
        }));
        let mut seen = String::new();
        let mut until = async |seen: &mut String, end: &str| {
            while !seen.ends_with(end) {
                seen.push_str(std::str::from_utf8(&followed.next().await.unwrap().unwrap()).unwrap());
            }
        };
        until(&mut seen, "line 5\n").await;
        append(&path, &line(6));
        until(&mut seen, "line 6\n").await;
        // Two rotations while the reader looks away, a write just before each, and a line in two pieces.
        append(&path, &line(7));
        fs::rename(&path, dir.path().join("0.log.20260131-120100")).unwrap();
        append(&path, &line(8));
        fs::rename(&path, dir.path().join("0.log.20260131-120200")).unwrap();
        let (head, tail) = (line(9)[..20].to_owned(), line(9)[20..].to_owned());
        append(&path, &head);
        until(&mut seen, "line 8\n").await;
        append(&path, &tail);
        until(&mut seen, "line 9\n").await;
        append(&path, &line(10));
        end.send(()).unwrap();
        while let Some(chunk) = followed.next().await {
            seen.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        }
        assert_eq!(seen, expected(5..11));
    }
}
