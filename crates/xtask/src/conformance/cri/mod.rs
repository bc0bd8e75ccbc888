//! `conformance cri`: the tests of container runtimes (critest of kubernetes-sigs/cri-tools), here or in a virtual machine.

mod vm;

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use testkit::daemon::{Daemon, Nursery};
use testkit::host::{self, Tool};
use testkit::registry::Registry;
use testkit::{containerd, go, netns};

use super::suite::{self, Choice, Suite};
use super::{contained, empty, left, report, until_done};
use crate::workspace::{build_release, root};

/// What it needs on the host beside what building needs.
const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool { program: "unshare", deb: "util-linux", rpm: "util-linux" },
    testkit::daemon::TOOL,
    testkit::registry::TOOL,
];

/// Where the registry listens, inside the private network.
const REGISTRY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 5000);
/// How long a runtime may take to answer, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to run them.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The program of the tests, instead of the one that is built from its Go module; static, for the virtual machine
    #[arg(long, value_name = "PROGRAM")]
    critest: Option<PathBuf>,
    /// Run them in the virtual machine, one after the other: its kernel has AppArmor, and control groups of version 2
    #[arg(long, conflicts_with_all = ["runtime_endpoint_of", "inside"])]
    vm: bool,
    /// Boot the machine with SELinux instead of AppArmor
    #[arg(long, requires = "vm")]
    selinux: bool,
    /// Whose runtime is tested
    #[arg(long, value_enum, value_name = "RUNTIME", default_value = "orlop")]
    runtime_endpoint_of: Whose,
    /// Only specs whose names match this regular expression
    #[arg(long, value_name = "REGEX")]
    focus: Option<String>,
    /// No specs whose names match this regular expression
    #[arg(long, value_name = "REGEX")]
    skip: Option<String>,
    /// Stream over WebSocket instead of SPDY
    #[arg(long)]
    websocket: bool,
    /// How many specs run side by side
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..))]
    procs: u16,
    /// The directory of another run, as one with containerd: what passed there and does not here is shown apart
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    /// Where the report and the logs go, emptied before [default: target/conformance/cri-orlop, …/cri-vm, or the like]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
    /// Set by this program for its run inside the namespaces of containerd: the directory of the run
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
    /// What critest is told beside that, as `-- -runtime-handler NAME`
    #[arg(last = true, value_name = "ARGUMENTS")]
    rest: Vec<OsString>,
}

/// A runtime with a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Whose {
    Orlop,
    /// With runc
    Containerd,
    /// With orlop in the place of runc
    ContainerdOverOrlop,
}

/// The command.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    host::install(TOOLS)?;
    let tests = match &options.critest {
        Some(program) => program.canonicalize().with_context(|| format!("find {}", program.display()))?,
        None => go::build(&go::CRITEST)?,
    };
    testkit::suite::build(testkit::suite::ALL)?;
    let under_test = UnderTest::prepared(options)?;
    let output = options.output();
    if let (true, UnderTest::Orlop(orlop)) = (options.vm, &under_test) {
        empty(&output, suite::LOG)?;
        vm::grade(orlop, &tests, options, &output)?;
        return report(&output, options.against.as_deref());
    }
    let suite = Suite { ginkgo: go::build(&go::GINKGO)?, tests };
    if let Some(dir) = &options.inside {
        contained::cover()?;
        return grade(&under_test, suite, dir, options);
    }
    empty(&output, suite::LOG)?;
    match under_test {
        UnderTest::Containerd { .. } => contained::run()?,
        UnderTest::Orlop(_) => {
            let dir = tempfile::Builder::new().prefix("orlop-conformance-").tempdir()?;
            grade(&under_test, suite, dir.path(), options)?;
        }
    }
    report(&output, options.against.as_deref())
}

impl Options {
    fn output(&self) -> PathBuf {
        let default = match self.runtime_endpoint_of {
            Whose::Orlop if self.selinux => "target/conformance/cri-selinux",
            Whose::Orlop if self.vm => "target/conformance/cri-vm",
            Whose::Orlop => "target/conformance/cri-orlop",
            Whose::Containerd => "target/conformance/cri-containerd",
            Whose::ContainerdOverOrlop => "target/conformance/cri-containerd-over-orlop",
        };
        root().join(self.output.as_deref().unwrap_or(Path::new(default)))
    }

    fn choice(&self) -> Choice<'_> {
        Choice { focus: self.focus.as_deref(), skip: self.skip.as_deref(), labels: None, procs: self.procs }
    }

    /// How critest is told by what it has to stream.
    fn streams(&self) -> impl Iterator<Item = &'static str> {
        let words = ["-websocket-exec", "-websocket-attach", "-websocket-portforward"];
        words.into_iter().filter(|_| self.websocket)
    }

    /// What critest is told.
    fn suite_arguments(&self, socket: &Path, nri: Option<&Path>) -> Vec<OsString> {
        let mut arguments = vec![format!("-runtime-endpoint=unix://{}", socket.display()).into()];
        arguments.extend(nri.map(|socket| format!("-nri-socket={}", socket.display()).into()));
        arguments.extend(self.streams().map(OsString::from));
        arguments.extend(self.rest.iter().cloned());
        arguments
    }
}

/// Runs the specs against a runtime of their own; they leave their report.
fn grade(under_test: &UnderTest, mut suite: Suite, dir: &Path, options: &Options) -> anyhow::Result<()> {
    let output = options.output();
    netns::enter_private()?;
    let nursery = Arc::new(Nursery::new());
    let registry = Registry::start_in(&nursery, REGISTRY, &dir.join("registry"))?;
    testkit::suite::publish(testkit::suite::ALL, &registry)?;
    testkit::suite::write_hosts(&dir.join("certs.d"), registry.address())?;
    let socket = dir.join("cri.sock");
    let (program, arguments) = under_test.invocation(dir, &socket, &registry)?;
    let mut daemon = Daemon::new(&nursery, &program, arguments, output.join("runtime.log"));
    daemon.start()?;
    daemon.wait_ready(PATIENCE, || UnixStream::connect(&socket).is_ok())?;
    // By its name ginkgo knows that it has not to be compiled.
    let tests = std::mem::replace(&mut suite.tests, dir.join("critest.test"));
    symlink(tests, &suite.tests)?;
    let nri = under_test.nri_socket(dir);
    let run = suite.start(&options.choice(), &options.suite_arguments(&socket, nri.as_deref()), &output)?;
    let ended = until_done(run, || daemon.check());
    let end = under_test.end(&mut daemon, dir);
    ended.and(end)
}

/// What is tested.
enum UnderTest {
    /// This program.
    Orlop(PathBuf),
    /// containerd with what belongs to it, in a directory; `runc` is another program by that name.
    Containerd { programs: PathBuf, runc: Option<PathBuf> },
}

impl UnderTest {
    fn prepared(options: &Options) -> anyhow::Result<Self> {
        let orlop = || options.orlop.as_ref().map_or_else(build_release, |program| Ok(std::path::absolute(program)?));
        let reference = || go::build_all("reference", go::REFERENCE);
        Ok(match options.runtime_endpoint_of {
            Whose::Orlop => Self::Orlop(orlop()?),
            Whose::Containerd => Self::Containerd { programs: reference()?, runc: None },
            Whose::ContainerdOverOrlop => Self::Containerd { programs: reference()?, runc: Some(orlop()?) },
        })
    }

    /// How it is started, with everything that it writes below `dir`.
    fn invocation(&self, dir: &Path, socket: &Path, registry: &Registry) -> anyhow::Result<(PathBuf, Vec<String>)> {
        match self {
            Self::Orlop(program) => {
                let mut words = vec!["runtime".to_owned(), format!("--listen=unix://{}", socket.display())];
                words.push(format!("--registry-config-dir={}", dir.join("certs.d").display()));
                words.push(format!("--cni-conf-dir={}", dir.join("cni").display()));
                words.push("--log-level=info".to_owned());
                words.extend(left::places(dir));
                Ok((program.clone(), words))
            }
            Self::Containerd { programs, runc } => {
                // Another image than the one whose names the specs count.
                let pause = testkit::suite::PAUSE.layout()?.tagged("3.10.2");
                registry.push(&pause, containerd::PAUSE, "latest")?;
                let programs = match runc {
                    Some(runc) => &containerd::replace_runc(programs, runc, dir.join("programs"))?,
                    None => programs,
                };
                let words = containerd::prepare(programs, dir, socket, &containerd::Network::ALONE)?;
                Ok((containerd::program(programs)?, words.into()))
            }
        }
    }

    /// Where plugins of the Node Resource Interface connect, with a socket of this run's own.
    fn nri_socket(&self, dir: &Path) -> Option<PathBuf> {
        matches!(self, Self::Orlop(_)).then(|| dir.join("run/nri.sock"))
    }

    /// Ends it. The specs remove their pods; what they leave is told and removed, and the rest of orlop goes with it.
    fn end(&self, daemon: &mut Daemon, dir: &Path) -> anyhow::Result<()> {
        daemon.stop(PATIENCE)?;
        let Self::Orlop(program) = self else { return Ok(()) };
        let left = left::sandboxes(dir);
        left::remove(program, dir)?;
        ensure!(left.is_empty(), "the specs have ended and these sandboxes are left:\n  {}", left.join("\n  "));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn critest_is_told_what_the_user_says() {
        let told = |words: &str| {
            let words = format!("cri {words}");
            let line = Line::try_parse_from(words.split_whitespace()).unwrap_or_else(|error| panic!("{error}"));
            let told = line.options.suite_arguments(Path::new("/run/cri.sock"), Some(Path::new("/run/nri.sock")));
            told.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(told(""), "-runtime-endpoint=unix:///run/cri.sock -nri-socket=/run/nri.sock");
        assert_eq!(
            told("--websocket --focus Image -- -runtime-handler runc"),
            "-runtime-endpoint=unix:///run/cri.sock -nri-socket=/run/nri.sock -websocket-exec -websocket-attach \
             -websocket-portforward -runtime-handler runc"
        );
    }
}
