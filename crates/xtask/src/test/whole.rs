//! Whole runs in the machine, on control groups of version 2: this program, the node, and what a run takes from the cache or
//! the host go aboard; there this program makes the same run.
//!
//! ```text
//! test --only PART --vm ─► cache, host's programs, orlop, this program ─► jobs' disk ─► test --only PART --aboard
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use testkit::image::Layout;
use testkit::{go, host, pace};

use super::Part;
use super::count::Count;
use crate::lab::vm::{End, Job, News, Shape, run_jobs};

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

/// What a run takes along beside the example: Go programs, images, and programs of the host's that busybox has not, or
/// otherwise.
#[derive(Default)]
struct Baggage {
    programs: Vec<go::Program>,
    images: Vec<Layout>,
    tools: &'static [&'static str],
}

impl Baggage {
    fn of(part: Part) -> anyhow::Result<Self> {
        let plane = |programs: &[&[go::Program]]| [&[go::CONTROL_PLANE], programs].concat().concat();
        let tools = &["openssl", "curl", "setpriv", "date", "unshare"][..];
        Ok(match part {
            Part::Voyage | Part::Trials | Part::Faults => Self::default(),
            Part::Member => {
                let programs = plane(&[go::REFERENCE, &[go::DRA_TEST_DRIVER, go::KUBEADM]]);
                Self { programs, images: vec![crate::images::pause()?], tools }
            }
            Part::Restarts => Self { programs: plane(&[&[go::BRIDGE, go::HOST_LOCAL]]), tools, ..Self::default() },
            Part::Peer => Self { programs: plane(&[&[go::KUBELET]]), images: vec![crate::images::pause()?], tools },
            Part::Crates | Part::Vm | Part::Proxy => bail!("{part:?} is no run of a whole node that goes with --vm"),
        })
    }
}

/// Runs it and adds its points to `count`.
///
/// # Errors
/// A point does not hold, or there is no machine to be had.
pub(super) fn run(part: Part, orlop: &Path, count: &mut Count) -> anyhow::Result<()> {
    println!("{} in a virtual machine", part.name());
    let scratch = tempfile::tempdir()?;
    let job = job(part, orlop, scratch.path())?;
    let shape = Shape { memory_mib: MEMORY_MIB, ..Shape::default() };
    let outcomes = run_jobs(&[job], shape, LIMIT, |news| {
        if let News::Line(line) = news
            && Count::total(line).is_none()
        {
            println!("vm: {line}");
        }
    })?;
    let [outcome] = &outcomes[..] else { bail!("{} jobs ended", outcomes.len()) };
    let total = outcome.output.iter().rev().find_map(|line| Count::total(line));
    if outcome.end != End::Code(0) {
        bail!("{} failed in the machine: {:?}", part.name(), outcome.end);
    }
    let total = total.context("it tells no count")?;
    println!("vm: {} ... {total} ({:.0} s)", part.name(), outcome.took.as_secs_f64());
    count.add(total);
    Ok(())
}

fn job(part: Part, orlop: &Path, scratch: &Path) -> anyhow::Result<Job> {
    let this = std::env::current_exe().context("where is this program?")?;
    let openssl = scratch.join("openssl.cnf");
    std::fs::write(&openssl, OPENSSL_CONFIGURATION)?;
    let mut programs = vec![this.clone(), orlop.to_owned(), openssl, crate::workspace::root().join("examples")];
    let Baggage { programs: from_go, images, tools } = Baggage::of(part)?;
    for program in from_go {
        programs.push(go::build(&program)?.parent().context("an entry of the cache")?.to_owned());
    }
    for image in [crate::images::ai_service()?, crate::images::busybox()?].into_iter().chain(images) {
        programs.push(image.dir().to_owned());
    }
    for tool in tools {
        programs.push(host::find(tool).with_context(|| format!("{tool} is not installed"))?);
    }
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let variables = [
        ("ORLOP_CACHE_DIR", "/run/cache".to_owned()),
        // The example lies in /jobs.
        ("CARGO_MANIFEST_DIR", "/jobs/crates/xtask".to_owned()),
        ("OPENSSL_CONF", "/jobs/openssl.cnf".to_owned()),
        (pace::VARIABLE, PATIENCE.to_string()),
    ];
    let variables: String = variables.iter().map(|(name, value)| format!("{name}={value} ")).collect();
    let (this, orlop) = (name(&this), name(orlop));
    let command = format!("{CACHE} && {variables}{this} test --only {} --aboard --orlop /jobs/{orlop}", part.name());
    Ok(Job { name: part.name(), programs, command })
}
