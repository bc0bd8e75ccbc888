//! This program in the machine: it, the node's, and what a command takes from the cache or the host go aboard; there it runs
//! the command with `--aboard`, by which it knows that all is there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use testkit::image::Layout;
use testkit::{go, host, pace};

use super::{Job, News, Outcome, Shape, run_jobs};

/// How many times longer than elsewhere things may take: the machine has no acceleration by hardware.
const PATIENCE: u32 = 8;

/// The longest run; it is there for one that hangs.
const LIMIT: Duration = Duration::from_secs(2 * 3600);

/// For a node with Python's applications, and a control plane beside it.
const MEMORY_MIB: u32 = 4096;

/// Makes the cache of entries that came with the disk: this program adds to it. In their names a key follows.
const CACHE: &str = "mkdir /run/cache && ln -s /jobs/*-???????????????? /run/cache/";

/// What `openssl` wants to read, of which nothing matters here.
const OPENSSL_CONFIGURATION: &str = "[req]\ndistinguished_name = dn\n[dn]\n";

/// What a command takes along.
#[derive(Default)]
pub(crate) struct Baggage {
    /// Go programs.
    pub(crate) programs: Vec<go::Program>,
    /// Images.
    pub(crate) images: Vec<Layout>,
    /// Programs of the host's that busybox has not, or otherwise.
    pub(crate) tools: Vec<&'static str>,
    /// Other files and directories.
    pub(crate) files: Vec<PathBuf>,
    /// Variables of the environment.
    pub(crate) variables: Vec<(&'static str, String)>,
}

/// Runs this program in the machine with `arguments` and, after them, `--aboard` and the node's program. What it prints is
/// given to `tell`.
///
/// # Errors
/// There is no machine to be had, or something to take along is missing.
pub(crate) fn run(
    name: &str,
    arguments: &str,
    orlop: &Path,
    baggage: Baggage,
    mut tell: impl FnMut(&str),
) -> anyhow::Result<Outcome> {
    let scratch = tempfile::tempdir()?;
    let job = job(name, arguments, orlop, baggage, scratch.path())?;
    let shape = Shape { memory_mib: MEMORY_MIB, ..Shape::default() };
    let mut outcomes = run_jobs(&[job], shape, LIMIT, |news| {
        if let News::Line(line) = news {
            tell(line);
        }
    })?;
    match outcomes.pop() {
        Some(outcome) if outcomes.is_empty() => Ok(outcome),
        _ => bail!("{name} is not the only job that ended"),
    }
}

fn job(name: &str, arguments: &str, orlop: &Path, baggage: Baggage, scratch: &Path) -> anyhow::Result<Job> {
    let this = std::env::current_exe().context("where is this program?")?;
    let openssl = scratch.join("openssl.cnf");
    std::fs::write(&openssl, OPENSSL_CONFIGURATION)?;
    let variables = [
        ("ORLOP_CACHE_DIR", "/run/cache".to_owned()),
        // The example lies in /jobs.
        ("CARGO_MANIFEST_DIR", "/jobs/crates/xtask".to_owned()),
        ("OPENSSL_CONF", "/jobs/openssl.cnf".to_owned()),
        (pace::VARIABLE, PATIENCE.to_string()),
    ];
    let variables = variables.iter().chain(&baggage.variables);
    let variables: String = variables.map(|(name, value)| format!("{name}={value} ")).collect();
    let file_name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (program, orlop_program) = (file_name(&this), file_name(orlop));
    let command = format!("{CACHE} && {variables}{program} {arguments} --aboard --orlop /jobs/{orlop_program}");
    let mut programs = vec![this, orlop.to_owned(), openssl];
    programs.extend(baggage.files);
    for program in baggage.programs {
        programs.push(go::build(&program)?.parent().context("an entry of the cache")?.to_owned());
    }
    programs.extend(baggage.images.iter().map(|image| image.dir().to_owned()));
    for tool in baggage.tools {
        programs.push(host::find(tool).with_context(|| format!("{tool} is not installed"))?);
    }
    Ok(Job { name: name.to_owned(), programs, command })
}
