//! Feeds parsers with what they were not made for: bytes of a committed corpus, changed over and over.
//!
//! ```text
//! corpus/NAME/* ─► pool ─► change ─► parse ─► outcome ─► new? the input joins the pool
//! ```
//!
//! It is small on purpose, and needs nothing but the toolchain that builds orlop. A parser tells what came of an input
//! ([`Target::run`]); an input with an outcome that none had before is worth changing further, which is what coverage tells
//! other fuzzers. The seed is fixed in a run of the tests, so that two runs are the same; `cargo xtask fuzz` takes another one
//! each time. An input that a parser does not survive is written to a file: it belongs into the corpus once that is mended.

#![allow(clippy::print_stdout, reason = "tests speak on stdout")]

mod change;
mod dice;

use std::any::Any;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

pub use dice::Dice;

/// Environment variable: for how many seconds to go on, instead of the few inputs of a test.
pub const SECONDS: &str = "ORLOP_FUZZ_SECONDS";
/// Environment variable: where the random numbers begin.
pub const SEED: &str = "ORLOP_FUZZ_SEED";
/// Environment variable: the directory for inputs that were not survived.
pub const FINDINGS: &str = "ORLOP_FUZZ_FINDINGS";

/// Inputs of a run without [`SECONDS`], beside the corpus itself.
const INPUTS: u64 = 2000;
/// What is longer teaches a parser nothing that a shorter input does not.
const LENGTH_MAX: usize = 64 << 10;
/// Most inputs that are kept to be changed.
const POOL_MAX: usize = 2000;
/// A parser that has not come to an end by then has none.
const LONGEST: Duration = Duration::from_secs(60);
/// What the seed is if nobody says.
const SEED_DEFAULT: u64 = 0x006f_726c_6f70;

/// The most that a thread has held while it did something, in bytes.
pub type Meter = fn(&mut dyn FnMut()) -> usize;

/// A parser under test.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its corpus, and after `fuzz_` that of its test.
    pub name: &'static str,
    /// The crate's directory, in which there is `corpus/<name>`: `env!("CARGO_MANIFEST_DIR")`.
    pub root: &'static str,
    /// Words of its language.
    pub words: &'static [&'static str],
    /// How much memory it may take for an input of the greatest length.
    pub memory_max: usize,
    /// Measures that.
    pub meter: Meter,
}

impl Target {
    /// Feeds `parse` with the corpus and with changes of it. Its result is the outcome: what it made of the input, or why
    /// it refused.
    ///
    /// # Panics
    /// If `parse` does, if it takes more memory than it may, or if it comes to no end (which aborts the process).
    pub fn run<O: Hash>(&self, parse: impl FnMut(&[u8]) -> O) {
        self.run_in(&findings(), parse);
    }

    /// As [`Target::run`]; inputs that were not survived go into the directory `findings`.
    fn run_in<O: Hash>(&self, findings: &Path, mut parse: impl FnMut(&[u8]) -> O) {
        let corpus = self.corpus();
        assert!(!corpus.is_empty(), "{} has no corpus", self.name);
        let seed = number_of(SEED).unwrap_or(SEED_DEFAULT);
        let until = number_of(SECONDS).map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let watch = Watch::start(self.name, findings.to_owned());
        let mut tried = 0_u64;
        let mut seen = HashSet::new();
        let mut feed = |input: &[u8]| {
            tried += 1;
            watch.begin(input);
            let outcome = self.measured(input, findings, &mut parse);
            watch.end();
            seen.insert(outcome)
        };
        let mut pool = corpus;
        for input in &pool {
            feed(input);
        }
        let mut dice = Dice::new(seed);
        let mut left = INPUTS;
        while until.map_or(left > 0, |until| Instant::now() < until) {
            left = left.saturating_sub(1);
            let input = change::changed(&pool, self.words, LENGTH_MAX, &mut dice);
            if feed(&input) && pool.len() < POOL_MAX {
                pool.push(input);
            }
        }
        println!("fuzz {}: seed {seed}, {tried} inputs, {} outcomes", self.name, seen.len());
    }

    /// The files of the corpus, by name.
    fn corpus(&self) -> Vec<Vec<u8>> {
        let dir = Path::new(self.root).join("corpus").join(self.name);
        let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        files
            .iter()
            .map(|file| std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
            .collect()
    }

    /// The outcome of one input as a number.
    fn measured<O: Hash>(&self, input: &[u8], findings: &Path, parse: &mut impl FnMut(&[u8]) -> O) -> u64 {
        let mut result: Option<Result<u64, Box<dyn Any + Send>>> = None;
        let peak = (self.meter)(&mut || {
            let parsed = catch_unwind(AssertUnwindSafe(|| {
                let mut hasher = DefaultHasher::new();
                parse(input).hash(&mut hasher);
                hasher.finish()
            }));
            result = Some(parsed);
        });
        if peak > self.memory_max {
            let file = keep(findings, self.name, input);
            panic!("{} takes {peak} bytes of memory for an input of {}: {}", self.name, input.len(), file.display());
        }
        match result {
            Some(Ok(outcome)) => outcome,
            Some(Err(panic)) => {
                println!("fuzz {}: a panic; the input is {}", self.name, keep(findings, self.name, input).display());
                resume_unwind(panic)
            }
            None => panic!("the meter runs what it measures"),
        }
    }
}

fn number_of(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

fn findings() -> PathBuf {
    std::env::var_os(FINDINGS).map_or_else(|| std::env::temp_dir().join("orlop-fuzz"), PathBuf::from)
}

/// Writes an input to a file that is named for it.
fn keep(dir: &Path, name: &str, input: &[u8]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let file = dir.join(format!("{name}-{:016x}", hasher.finish()));
    let kept = std::fs::create_dir_all(dir).and_then(|()| std::fs::write(&file, input));
    kept.unwrap_or_else(|error| panic!("cannot write {}: {error}", file.display()));
    file
}

/// Ends the process if an input takes too long: nobody can end a thread.
struct Watch(Sender<Option<Vec<u8>>>);

impl Watch {
    fn start(name: &'static str, findings: PathBuf) -> Self {
        let (sender, inputs) = channel::<Option<Vec<u8>>>();
        let watch = move || {
            let mut current: Option<Vec<u8>> = None;
            loop {
                let news = match &current {
                    None => inputs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                    Some(_) => inputs.recv_timeout(LONGEST),
                };
                match (news, &current) {
                    (Ok(input), _) => current = input,
                    (Err(RecvTimeoutError::Timeout), Some(input)) => {
                        let file = keep(&findings, name, input);
                        println!("fuzz {name}: no end after {} s; the input is {}", LONGEST.as_secs(), file.display());
                        std::process::abort();
                    }
                    (Err(_), _) => return,
                }
            }
        };
        std::thread::spawn(watch);
        Self(sender)
    }

    fn begin(&self, input: &[u8]) {
        let _ = self.0.send(Some(input.to_vec())); // It ends after this does.
    }

    fn end(&self) {
        let _ = self.0.send(None); // As above.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Target = Target {
        name: "numbers",
        root: env!("CARGO_MANIFEST_DIR"),
        words: &["magic"],
        memory_max: 1 << 20,
        meter: |work| {
            work();
            0
        },
    };

    #[test]
    fn two_runs_are_the_same() {
        let inputs = || {
            let mut all = Vec::new();
            TARGET.run(|input| {
                all.push(input.to_vec());
                input.len()
            });
            all
        };
        let first = inputs();
        assert_eq!(first.len() as u64, INPUTS + 1);
        assert!(first.iter().all(|input| input.len() <= LENGTH_MAX));
        assert!(first == inputs());
    }

    #[test]
    fn what_lies_behind_several_steps_is_found() {
        let findings = tempfile::tempdir().unwrap();
        let found = catch_unwind(|| {
            TARGET.run_in(findings.path(), |input| {
                let text = String::from_utf8_lossy(input);
                let steps = (text.contains("magic"), text.contains("magicmagic"), input.first() == Some(&0xff));
                assert!(steps != (true, true, true), "found");
                steps
            });
        });
        assert!(found.is_err());
        let input = only_file(findings.path());
        assert!(input.first() == Some(&0xff) && String::from_utf8_lossy(&input).contains("magicmagic"));
    }

    fn only_file(dir: &Path) -> Vec<u8> {
        let files: Vec<_> = std::fs::read_dir(dir).unwrap().collect();
        let [Ok(file)] = &files[..] else { panic!("{files:?}") };
        std::fs::read(file.path()).unwrap()
    }

    #[test]
    fn greed_is_found() {
        let greedy = Target {
            meter: |work| {
                work();
                2 << 20
            },
            ..TARGET
        };
        let findings = tempfile::tempdir().unwrap();
        assert!(catch_unwind(|| greedy.run_in(findings.path(), <[u8]>::len)).is_err());
        assert_eq!(vec![only_file(findings.path())], greedy.corpus(), "the first input was too much");
    }
}
