//! What an application that logs feels: with the daemon there, and while that is stopped.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::measure::{Measure, Results};

use super::side::Side;
use super::work::{Pod, Work};

/// What it writes, without end.
const PROGRAM: [&str; 2] = ["yes", "all hands on deck, all hands on deck, all hands on deck, ahoy"];
/// How long it is watched while the daemon runs.
const RUNNING: Duration = Duration::from_secs(10);
/// How long the daemon is stopped.
const STOPPED: Duration = Duration::from_secs(30);
/// How often it is looked at: no event tells what a process writes.
const LOOK: Duration = Duration::from_millis(10);
/// The size at which its log is cut.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// Measures it.
pub(super) async fn run(side: &Side, work: &Work, results: &mut Results) -> anyhow::Result<()> {
    eprintln!(
        "  {} s of logging, the daemon stopped for the last {}",
        (RUNNING + STOPPED).as_secs(),
        STOPPED.as_secs()
    );
    let (pod, _) = work.start_program(&PROGRAM).await?;
    let writer = Writer::of(work.process(&pod).await?, &pod);
    results.add(Measure::LogRate, writer.watch(RUNNING)?.megabytes_per_second);
    side.freeze()?;
    let stopped = writer.watch(STOPPED);
    side.go_on()?;
    let stopped = stopped?;
    results.add(Measure::LogRateStopped, stopped.megabytes_per_second);
    results.add_ms(Measure::LogWait, stopped.longest_wait);
    work.stop(&pod).await?;
    Ok(())
}

/// A process that writes, and where that goes.
struct Writer {
    io: PathBuf,
    log: PathBuf,
}

/// What was seen of it.
struct Seen {
    megabytes_per_second: f64,
    /// In which it has written nothing.
    longest_wait: Duration,
}

impl Writer {
    fn of(pid: u32, pod: &Pod) -> Self {
        Self { io: PathBuf::from(format!("/proc/{pid}/io")), log: pod.log().to_owned() }
    }

    fn watch(&self, time: Duration) -> anyhow::Result<Seen> {
        let begin = Instant::now();
        let at_first = self.written()?;
        let (mut written, mut since, mut longest_wait) = (at_first, begin, Duration::ZERO);
        while begin.elapsed() < time {
            std::thread::sleep(LOOK);
            self.cut()?;
            let now = self.written()?;
            longest_wait = longest_wait.max(since.elapsed());
            if now > written {
                (written, since) = (now, Instant::now());
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        let megabytes = (written - at_first) as f64 / 1e6;
        Ok(Seen { megabytes_per_second: megabytes / begin.elapsed().as_secs_f64(), longest_wait })
    }

    /// Bytes that it has written so far.
    fn written(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(&self.io).with_context(|| format!("read {}", self.io.display()))?;
        let count = text.lines().find_map(|line| line.strip_prefix("wchar: ")).context("the kernel counts no bytes")?;
        Ok(count.parse()?)
    }

    /// Daemons append, so that a file that was cut grows from its beginning.
    fn cut(&self) -> anyhow::Result<()> {
        if std::fs::metadata(&self.log)?.len() > LOG_BYTES_MAX {
            std::fs::File::options().write(true).open(&self.log)?.set_len(0)?;
        }
        Ok(())
    }
}
