//! `conformance proxy`: upstream's service proxy and ours before the same objects and the same packets.
//!
//! ```text
//! etcd, kube-apiserver ─┬─ node ─ kube-proxy   ─ pods, outside, remote ─ questions ─┐
//!        ▲              └─ node ─ orlop proxy  ─ pods, outside, remote ─ questions ─┴─► differences
//!        └── scenarios, random histories
//! ```
//!
//! Nothing looks at rules: who answers, whom the endpoint sees, and how a refusal comes is all that counts.

mod contestant;
mod faults;
mod history;
mod known;
mod lab;
mod scenarios;
mod stage;
mod vm;
mod world;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use testkit::host::{self, Tool};

use crate::workspace::{build_release, root};
use contestant::{Contestant, Make, Mode};
use lab::Lab;
use scenarios::Scenario;
use stage::{Difference, Stage};

/// What kube-proxy works with, and what deletes rules on purpose.
const NFT: Tool = Tool::new("nft", "nftables");
const IPTABLES: Tool = Tool::new("iptables", "iptables");

/// A file that tells the directory of a run from others.
const MARK: &str = "proxies";

/// How to compare them.
#[derive(clap::Args)]
pub(crate) struct ProxyOptions {
    /// Who is compared with whom, as in `kube-proxy-iptables,orlop-userspace`
    #[arg(long, value_name = "ONE,OTHER", value_parser = pair,
        default_values = ["kube-proxy-nftables,orlop-nftables", "kube-proxy-iptables,orlop-iptables",
            "kube-proxy-iptables,orlop-userspace"])]
    pair: Vec<[Contestant; 2]>,
    /// Only scenarios whose names contain this
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// So many random histories for each pair
    #[arg(long, value_name = "N", default_value_t = 3)]
    histories: u64,
    /// Of so many steps
    #[arg(long, value_name = "N", default_value_t = 15)]
    steps: usize,
    /// The seed of the first history; the next ones follow
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Kill ours so many times while it writes
    #[arg(long, value_name = "N", default_value_t = 20)]
    kills: usize,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
    /// Where configurations and logs go, emptied before
    #[arg(long, value_name = "DIR", default_value = "target/conformance/proxy")]
    output: PathBuf,
    /// In the virtual machine, whose kernel has IPVS
    #[arg(long)]
    vm: bool,
    /// Set by this program for its run in the machine: all that is needed is there
    #[arg(long, hide = true, requires = "orlop", conflicts_with = "vm")]
    aboard: bool,
}

/// How a scenario ended for a pair.
struct Row {
    pair: [Contestant; 2],
    scenario: String,
    asked: usize,
    differences: Vec<Difference>,
    /// What else is worth knowing.
    note: String,
    /// Why it could not be played to its end.
    fault: Option<String>,
}

/// The command.
pub(crate) fn run(options: &ProxyOptions) -> anyhow::Result<()> {
    if !options.aboard {
        host::install(&[testkit::service_lab::TOOL, testkit::daemon::TOOL, NFT, IPTABLES])?;
    }
    let is_needed = options.vm || options.pair.iter().flatten().any(|who| who.make == Make::Orlop);
    let orlop = match is_needed {
        true => std::path::absolute(options.orlop.clone().map_or_else(build_release, Ok)?)?,
        false => PathBuf::new(),
    };
    if options.vm {
        return vm::run(options, &orlop);
    }
    let output = root().join(&options.output);
    super::empty(&output, MARK)?;
    raise_limit()?;
    let mut lab = Lab::start(&orlop, &output)?;
    let mut rows = Vec::new();
    for pair in options.pair.iter().copied() {
        rows.extend(play_all(&mut lab, pair, &options.chosen()));
        rows.extend(play_by_chance(&mut lab, pair, options));
    }
    let good = report(&rows);
    println!("logs: {}", output.display());
    if !good {
        bail!("the two do not do the same");
    }
    Ok(())
}

impl ProxyOptions {
    fn chosen(&self) -> Vec<&'static Scenario> {
        scenarios::ALL.iter().filter(|scenario| self.wants(scenario.name)).collect()
    }

    fn wants(&self, name: &str) -> bool {
        self.scenario.is_empty() || self.scenario.iter().any(|part| name.contains(part.as_str()))
    }

    /// What to play and how often, as on the command line.
    fn arguments(&self) -> String {
        let pairs = self.pair.iter().map(|[one, other]| format!("--pair {one},{other}"));
        let scenarios = self.scenario.iter().map(|name| format!("--scenario {name}"));
        let (histories, steps, seed, kills) = (self.histories, self.steps, self.seed(), self.kills);
        let numbers = format!("--histories {histories} --steps {steps} --seed {seed} --kills {kills}");
        pairs.chain(scenarios).chain([numbers]).collect::<Vec<_>>().join(" ")
    }

    /// Another one for each run, unless it is given.
    fn seed(&self) -> u64 {
        let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        self.seed.unwrap_or_else(|| now().map_or(0, |since| since.as_secs()))
    }
}

/// What takes seconds and says most, as a part of all tests: upstream's iptables mode is left to the long run, as each
/// of its syncs starts six programs. Returns how many scenarios passed.
///
/// # Errors
/// An answer differs that is not meant to; it has been printed.
pub(crate) fn quick(orlop: &Path) -> anyhow::Result<usize> {
    const SCENARIOS: [&str; 8] = [
        "cluster-ip",
        "protocols",
        "external-policy",
        "terminating",
        "single-family",
        "without-node",
        "hairpin",
        "changes",
    ];
    host::install(&[testkit::service_lab::TOOL, testkit::daemon::TOOL, NFT])?;
    raise_limit()?;
    let dir = tempfile::Builder::new().prefix("orlop-proxies-").tempdir()?;
    let mut lab = Lab::start(&std::path::absolute(orlop)?, dir.path())?;
    let [one, other] = [Make::Upstream, Make::Orlop].map(|make| Contestant { make, mode: Mode::Nftables });
    let chosen: Vec<_> = scenarios::ALL.iter().filter(|scenario| SCENARIOS.contains(&scenario.name)).collect();
    let mut rows = play_all(&mut lab, [one, other], &chosen);
    let chosen = faults::ALL.iter().filter(|(name, _)| faults::QUICK.contains(name));
    let doses = || faults::Doses { kills: 0, changes: 6, seed: 1 };
    let plays = chosen.map(|(name, fault)| -> (String, Play<'_>) {
        ((*name).to_owned(), Box::new(move |stage: &mut Stage<'_>| fault(stage, &doses())))
    });
    rows.extend(on_stage(&mut lab, [one, other], &contestant::Options::DEFAULT, plays.collect()));
    let faults = rows.iter().filter(|row| !row.is_good()).count();
    ensure!(faults == 0, "{faults} of {} scenarios are answered differently by kube-proxy and by orlop", rows.len());
    Ok(rows.len())
}

/// Reads who is compared with whom.
fn pair(text: &str) -> Result<[Contestant; 2], String> {
    let (one, other) = text.split_once(',').ok_or("two names with a comma between them")?;
    Ok([one.parse()?, other.parse()?])
}

/// Each connection is a descriptor on either end, and all places are in this process.
fn raise_limit() -> anyhow::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// What a row does on the stage; it returns what else is worth knowing.
type Play<'p> = Box<dyn Fn(&mut Stage<'_>) -> anyhow::Result<String> + 'p>;

/// Plays `scenarios` with the same two programs as long as their options are the same.
fn play_all(lab: &mut Lab, pair: [Contestant; 2], scenarios: &[&'static Scenario]) -> Vec<Row> {
    let groups = scenarios.chunk_by(|one, next| one.options == next.options);
    let named = |scenario: &&'static Scenario| -> (String, Play<'static>) {
        let play = scenario.play;
        (scenario.name.to_owned(), Box::new(move |stage: &mut Stage<'_>| play(stage).map(|()| String::new())))
    };
    groups.flat_map(|group| on_stage(lab, pair, &group[0].options, group.iter().map(named).collect())).collect()
}

/// Random histories, and what goes wrong at random moments.
fn play_by_chance(lab: &mut Lab, pair: [Contestant; 2], options: &ProxyOptions) -> Vec<Row> {
    let mut plays: Vec<(String, Play<'_>)> = Vec::new();
    let first = options.seed();
    let histories = if options.wants("history") { options.histories } else { 0 };
    for seed in first..first + histories {
        plays
            .push((format!("history-{seed}"), Box::new(move |stage: &mut Stage<'_>| live(stage, seed, options.steps))));
    }
    for (name, fault) in faults::ALL.iter().filter(|(name, _)| options.wants(name)) {
        let doses = faults::Doses { kills: options.kills, changes: options.steps, seed: first };
        plays.push(((*name).to_owned(), Box::new(move |stage: &mut Stage<'_>| fault(stage, &doses))));
    }
    on_stage(lab, pair, &contestant::Options::DEFAULT, plays)
}

/// Plays all of `plays` with the same two programs. Where one fails, the next begins with fresh ones.
fn on_stage(
    lab: &mut Lab,
    pair: [Contestant; 2],
    options: &contestant::Options,
    plays: Vec<(String, Play<'_>)>,
) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut plays = plays.into_iter().peekable();
    while plays.peek().is_some() {
        let mut stage = match Stage::start(lab, pair, options) {
            Ok(stage) => stage,
            Err(error) => {
                let rest = plays.map(|(name, _)| Row::failed(pair, name, &error));
                rows.extend(rest.inspect(|row| row.print(Duration::ZERO)));
                return rows;
            }
        };
        for (name, play) in plays.by_ref() {
            let (row, goes_on) = perform(&mut stage, name, &play);
            rows.push(row);
            if !goes_on {
                break;
            }
        }
    }
    rows
}

/// The row of one play, and whether the stage is as it should be afterwards.
fn perform(stage: &mut Stage<'_>, name: String, play: &Play<'_>) -> (Row, bool) {
    let begun = Instant::now();
    stage.asked = 0;
    let outcome = play(stage);
    let pair = stage.pair();
    let (asked, differences) = (stage.asked, std::mem::take(&mut stage.differences));
    let (row, goes_on) = match outcome {
        Ok(note) => (Row { pair, scenario: name, asked, differences, note, fault: None }, true),
        Err(error) => (Row { asked, differences, ..Row::failed(pair, name, &error) }, false),
    };
    row.print(begun.elapsed());
    (row, goes_on)
}

/// Plays one history; what differs comes with the shortest way to it.
fn live(stage: &mut Stage<'_>, seed: u64, steps: usize) -> anyhow::Result<String> {
    let Some(found) = history::play(stage, seed, steps)? else { return Ok(String::new()) };
    stage.differences = found.differences;
    for (number, world) in found.worlds.iter().enumerate() {
        world.print(&format!("history {seed}, world {number}"))?;
    }
    Ok(format!("{} worlds lead to it", found.worlds.len()))
}

impl Row {
    fn failed(pair: [Contestant; 2], scenario: String, error: &anyhow::Error) -> Self {
        let fault = Some(format!("{error:#}"));
        Self { pair, scenario, asked: 0, differences: Vec::new(), note: String::new(), fault }
    }

    fn line(&self) -> String {
        let word = match (&self.fault, self.unexplained().count(), self.differences.len()) {
            (Some(_), ..) => "FAILED".to_owned(),
            (None, 0, 0) => "same".to_owned(),
            (None, 0, known) => format!("same but for {known} that are meant to differ"),
            (None, faults, _) => format!("DIFFERS in {faults}"),
        };
        let note = if self.note.is_empty() { String::new() } else { format!("; {}", self.note) };
        format!("{} | {} | {}: {word} of {} questions{note}", self.pair[0], self.pair[1], self.scenario, self.asked)
    }

    /// What is to be seen as soon as it is known.
    fn print(&self, took: Duration) {
        println!("{} ({:.1} s)", self.line(), took.as_secs_f64());
        self.unexplained().for_each(|difference| println!("  {}", difference.show(self.pair)));
        self.fault.iter().for_each(|fault| println!("  {fault}"));
    }

    fn is_good(&self) -> bool {
        self.fault.is_none() && self.unexplained().next().is_none()
    }

    fn unexplained(&self) -> impl Iterator<Item = &Difference> {
        self.differences.iter().filter(|difference| known::reason(difference, self.pair).is_none())
    }
}

/// Prints a table. Returns whether everything that differs is meant to.
fn report(rows: &[Row]) -> bool {
    let mut meant = std::collections::BTreeMap::<&str, usize>::new();
    for row in rows {
        for reason in row.differences.iter().filter_map(|difference| known::reason(difference, row.pair)) {
            *meant.entry(reason).or_default() += 1;
        }
    }
    println!();
    rows.iter().for_each(|row| println!("{}", row.line()));
    meant.iter().for_each(|(reason, count)| println!("meant ({count} times): {reason}"));
    let asked: usize = rows.iter().map(|row| row.asked).sum();
    let differ: usize = rows.iter().map(|row| row.unexplained().count()).sum();
    let bad = rows.iter().filter(|row| !row.is_good()).count();
    println!("proxy: {} rows, {bad} not as upstream; {asked} questions, {differ} answered differently", rows.len());
    bad == 0 && !rows.is_empty()
}
