//! A virtual machine with Debian's cloud kernel: what the host's kernel lacks is tested there.
//!
//! ```text
//! kernel package ─► vmlinuz ─────────────┐
//! busybox, modules, init.sh ─► disk ─────┼─► qemu ─ second serial line ─► @@begin JOB / its output / @@end CODE JOB
//! test programs (static) ─► jobs' disk ──┘
//! ```

pub(crate) mod aboard;
mod disk;
mod kernel;
mod machine;
mod security;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use testkit::host::{self, Tool};

pub(crate) use machine::{End, News, Outcome};
pub(crate) use security::Security;

use disk::System;
use kernel::Kernel;
use machine::Machine;

/// What to run in the machine.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Static programs to take along; each is run without arguments unless --run says otherwise
    programs: Vec<PathBuf>,
    /// A shell command to run instead, with the programs in its PATH; may be given several times
    #[arg(long)]
    run: Vec<String>,
    /// Added to the kernel's command line
    #[arg(long, default_value = "")]
    append: String,
    /// Mebibytes of memory
    #[arg(long, value_name = "MIB", default_value_t = Shape::default().memory_mib)]
    memory: u32,
    /// Seconds until a job is given up
    #[arg(long, default_value_t = 600)]
    limit: u64,
}

/// Boots the machine with SELinux in the place of AppArmor.
pub(crate) const SELINUX: &str = "lsm=lockdown,yama,selinux";

/// What the lab needs on the host.
pub(crate) const TOOLS: &[Tool] = &[
    Tool { program: "qemu-system-x86_64", deb: "qemu-system-x86", rpm: "qemu-system-x86-core" },
    Tool { program: "busybox", deb: "busybox-static", rpm: "busybox" },
    Tool::new("cpio", "cpio"),
    Tool::new("depmod", "kmod"),
    Tool { program: "xz", deb: "xz-utils", rpm: "xz" },
    Tool::new("mke2fs", "e2fsprogs"),
    Tool::new("strip", "binutils"),
    Tool::new("stat", "coreutils"),
    Tool::new("ipcmk", "util-linux"),
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool::new("nft", "nftables"),
    Tool { program: "conntrack", deb: "conntrack", rpm: "conntrack-tools" },
    testkit::registry::TOOL,
];

/// What a machine is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape<'a> {
    /// Added to the kernel's command line.
    pub(crate) append: &'a str,
    /// Its memory.
    pub(crate) memory_mib: u32,
}

impl Default for Shape<'_> {
    fn default() -> Self {
        Self { append: "", memory_mib: 1024 }
    }
}

/// A command in the machine.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// How it is called in reports.
    pub(crate) name: String,
    /// Files that it needs, found by their names in its `PATH`, and directories, found beside them in `/jobs`. Libraries of
    /// programs, also of those directly in a directory, come with them.
    pub(crate) programs: Vec<PathBuf>,
    /// One line of shell.
    pub(crate) command: String,
}

/// The command.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.programs.is_empty() && options.run.is_empty() {
        return shell(options.shape());
    }
    let limit = Duration::from_secs(options.limit);
    let outcomes = run_jobs(&jobs(options)?, options.shape(), limit, |news| {
        if let News::Line(line) = news {
            println!("{line}");
        }
    })?;
    let failed: Vec<String> = outcomes
        .iter()
        .filter(|outcome| outcome.end != End::Code(0))
        .map(|outcome| format!("{}: {:?}", outcome.name, outcome.end))
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    bail!("failed in the machine: {}", failed.join("; "))
}

impl Options {
    fn shape(&self) -> Shape<'_> {
        Shape { append: &self.append, memory_mib: self.memory }
    }
}

fn jobs(options: &Options) -> anyhow::Result<Vec<Job>> {
    if options.run.is_empty() {
        return options.programs.iter().map(|program| program_job(program.clone())).collect();
    }
    let job = |command: &String| Job {
        name: command.replace('\t', " "),
        programs: options.programs.clone(),
        command: command.clone(),
    };
    Ok(options.run.iter().map(job).collect())
}

fn program_job(program: PathBuf) -> anyhow::Result<Job> {
    let name = program.file_name().and_then(|name| name.to_str()).context("a program has a name")?.to_owned();
    Ok(Job { command: name.clone(), programs: vec![program], name })
}

/// Runs the jobs one after the other and returns how each ended. A job that takes longer than `limit` ends its machine;
/// those after it run in a new one. What happens is told at once.
///
/// # Errors
/// The machine cannot be made or does not boot; its console is in the message.
pub(crate) fn run_jobs(
    jobs: &[Job],
    shape: Shape<'_>,
    limit: Duration,
    mut tell: impl FnMut(News<'_>),
) -> anyhow::Result<Vec<Outcome>> {
    host::install(TOOLS)?;
    let kernel = Kernel::fetch()?;
    let system = System::make(&kernel)?;
    let scratch = tempfile::tempdir()?;
    let mut outcomes: Vec<Outcome> = Vec::new();
    while let Some(rest) = jobs.get(outcomes.len()..).filter(|rest| !rest.is_empty()) {
        let disk = disk::jobs_disk(rest, scratch.path())?;
        let qemu = machine::command(&kernel, &system, shape)?;
        let mut machine = Machine::start(qemu, &disk, scratch.path().join("console"))?;
        let done = machine.follow(limit, &mut tell);
        if done.is_empty() {
            bail!("the machine ended before its first job; its console:\n{}", machine.console());
        }
        outcomes.extend(done);
    }
    Ok(outcomes)
}

fn shell(shape: Shape<'_>) -> anyhow::Result<()> {
    host::install(TOOLS)?;
    let kernel = Kernel::fetch()?;
    let system = System::make(&kernel)?;
    crate::workspace::run(&mut machine::command(&kernel, &system, shape)?)
}
