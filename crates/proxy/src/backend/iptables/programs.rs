//! Which of the two kinds of iptables, where its programs are, and starting them.
//!
//! A host has its rules in nftables (`iptables-nft`) or in the kernel's own `ip_tables` (`iptables-legacy`), and whoever
//! writes into the other kind writes where nobody looks. What is there already decides, as the wrapper that kube-proxy's
//! image has does it: first a hint of a kubelet or a proxy, then where there are more rules.

use std::env;
use std::fmt;
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::thread::{JoinHandle, ScopedJoinHandle};
use std::time::Duration;

use netfilter::iptables::{self as tables, Remains};
use sys::netlink::{Socket, nft};
use sys::netns;
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{IptablesKind, RulesError, StartError};

/// Where programs of administrators are, wherever PATH leads.
const DIRECTORIES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
/// How long a program waits for others to release the lock of iptables-legacy, in seconds. Upstream gives up after 5; then
/// everything is written anew, which takes the lock for longer.
const LOCK_WAIT_S: &str = "30";
/// How long a program may take, lock and all: a table of ten thousand Services takes seconds. One that hangs would keep
/// everybody waiting who waits for rules.
const PROGRAM_LIMIT: Duration = Duration::from_secs(180);
/// Where iptables-legacy looks for the name of its lock.
const LOCK_FILE: &str = "XTABLES_LOCKFILE";
/// Ends what a script says of one table.
const COMMIT: &str = "COMMIT\n";
/// Of what a program says, as much as an operator reads.
const WORDS_MAX: usize = 500;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    const BOTH: &'static [Family] = &[Family::Ipv4, Family::Ipv6];

    pub(super) fn is_ipv6(self) -> bool {
        self == Family::Ipv6
    }

    /// Name of its programs.
    pub(super) fn program(self) -> &'static str {
        match self {
            Family::Ipv4 => "iptables",
            Family::Ipv6 => "ip6tables",
        }
    }

    pub(super) fn of_nft(self) -> nft::Family {
        match self {
            Family::Ipv4 => nft::Family::Ipv4,
            Family::Ipv6 => nft::Family::Ipv6,
        }
    }
}

/// Where the rules of a host are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nft,
    Legacy,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Nft => "nft",
            Kind::Legacy => "legacy",
        }
    }

    /// As `--version` says it; versions before 1.8 say nothing.
    fn of_version(version: &str) -> Kind {
        if version.contains("nf_tables") { Kind::Nft } else { Kind::Legacy }
    }
}

/// The programs of one kind.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) kind: Kind,
    families: &'static [Family],
    /// `restore` and `save`, by family.
    paths: [[PathBuf; 2]; 2],
}

impl fmt::Display for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iptables-{}", self.kind.word())
    }
}

impl Programs {
    /// Those of the kind that the operator names, or that this host uses.
    pub(super) fn find(wanted: IptablesKind) -> Result<Programs, StartError> {
        let nft = || Programs::of_kind(Kind::Nft);
        let legacy = || Programs::of_kind(Kind::Legacy);
        let found = match wanted {
            IptablesKind::Nft => nft(),
            IptablesKind::Legacy => legacy(),
            IptablesKind::AsFound => match (nft(), legacy()) {
                (Some(nft), Some(legacy)) => Some(used(nft, legacy)?),
                (nft, legacy) => nft.or(legacy),
            },
        };
        found.ok_or(StartError::NoIptables)
    }

    /// Those of a kind, if they are installed.
    fn of_kind(kind: Kind) -> Option<Programs> {
        let of_family = |family: Family| {
            let all = ["restore", "save"].map(|verb| find_program(family, kind, verb));
            let [Some(restore), Some(save)] = all else { return None };
            Some([restore, save])
        };
        let ipv4 = of_family(Family::Ipv4)?;
        let (ipv6, families) = match of_family(Family::Ipv6) {
            Some(ipv6) => (ipv6, Family::BOTH),
            None => (ipv4.clone(), &Family::BOTH[..1]),
        };
        Some(Programs { kind, families, paths: [ipv4, ipv6] })
    }

    /// Programs of the kinds that a proxy may have left something in, but for the one in use.
    pub(super) fn with_leftovers(in_use: Option<IptablesKind>) -> Vec<Programs> {
        let kinds: &[Kind] = match in_use {
            None => &[Kind::Nft, Kind::Legacy],
            // It is the one that has our rules.
            Some(IptablesKind::AsFound) => &[],
            Some(IptablesKind::Nft) => &[Kind::Legacy],
            Some(IptablesKind::Legacy) => &[Kind::Nft],
        };
        let there = |kind: &&Kind| match kind {
            Kind::Nft => has_nft_chain(&[tables::CANARY]),
            Kind::Legacy => Family::BOTH.iter().any(|family| !legacy_tables(*family).is_empty()),
        };
        kinds.iter().filter(there).filter_map(|kind| Programs::of_kind(*kind)).collect()
    }

    /// The families that rules are written for.
    pub(super) fn families(&self) -> &'static [Family] {
        self.families
    }

    /// How many lines a script of a whole replacement should have.
    pub(super) fn lines_max(&self) -> usize {
        match self.kind {
            // A start of the program takes as long as comparing this many lines with each other.
            Kind::Nft => 4000,
            Kind::Legacy => usize::MAX,
        }
    }

    /// Lists tables; all of them if none is named.
    pub(super) fn save(&self, family: Family, table: &[&str]) -> Result<String, RulesError> {
        // `iptables-legacy-save` makes the table that it is asked for.
        let [_, save] = &self.paths[usize::from(family.is_ipv6())];
        let output = run(save, table.iter().flat_map(|table| ["-t", table]), "")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Carries out a script. What it does not mention stays.
    pub(super) fn restore(&self, family: Family, script: &str) -> Result<(), RulesError> {
        self.restoring(family)?.end(script, script).map(drop)
    }

    /// Carries out scripts one after the other as they come, up to the first that is refused.
    pub(super) fn restore_all(
        &self,
        family: Family,
        mut scripts: impl Iterator<Item = String>,
    ) -> Result<(), RulesError> {
        match self.kind {
            Kind::Nft => self.restore_ahead(family, scripts),
            // Who reads has the lock, and who carries out needs it.
            Kind::Legacy => scripts.try_for_each(|script| self.restore(family, &script)),
        }
    }

    /// While the kernel is at one script, the program for the next reads: up to its first `COMMIT` a script changes nothing,
    /// and reading takes as long as carrying out.
    fn restore_ahead(&self, family: Family, scripts: impl Iterator<Item = String>) -> Result<(), RulesError> {
        std::thread::scope(|scope| {
            let mut before: Option<ScopedJoinHandle<'_, Result<Output, RulesError>>> = None;
            for script in scripts {
                let commit = script.find(COMMIT).unwrap_or(0);
                let mut next = self.restoring(family)?;
                next.read(&script[..commit]);
                // Without its end the next one is refused as a whole.
                before.take().map_or(Ok(()), done)?;
                before = Some(scope.spawn(move || next.end(&script[commit..], &script)));
            }
            before.map_or(Ok(()), done)
        })
    }

    fn restoring(&self, family: Family) -> Result<Running<'_>, RulesError> {
        let [restore, _] = &self.paths[usize::from(family.is_ipv6())];
        Running::start(restore, ["--noflush", "--counters", "-w", LOCK_WAIT_S])
    }

    /// Finds out whether programs and kernel have all that rules need, in a network namespace that ends with the trial. A
    /// kernel without IPv6 is served in IPv4 alone.
    ///
    /// What they can do without (`counts`, `compares`) is left out where they have it not.
    pub(super) fn try_out(&mut self, config: &mut tables::Config) -> Result<(), StartError> {
        const LESS: [[bool; 2]; 3] = [[false, true], [true, false], [false, false]];
        let wanted = config.clone();
        let mut tried = self.try_with(config);
        for [counts, compares] in LESS {
            let lesser = [wanted.counts && counts, wanted.compares && compares];
            if matches!(tried, Err(StartError::IptablesUnusable(_))) && lesser != [config.counts, config.compares] {
                [config.counts, config.compares] = lesser;
                tried = self.try_with(config);
            }
        }
        if wanted.counts && !config.counts {
            tracing::info!("rules are not counted: iptables has no match nfacct");
        }
        if wanted.compares && !config.compares {
            tracing::info!("each endpoint has a chain of its own, however many there are: iptables has no match bpf");
        }
        tried
    }

    fn try_with(&mut self, config: &tables::Config) -> Result<(), StartError> {
        let scripts = tables::trial(config);
        let this = &*self;
        let tried = netns::create(|| {
            let all = |family: &Family| {
                let mut scripts = scripts.of(family.is_ipv6()).iter();
                scripts.try_for_each(|script| this.restore(*family, script))
            };
            let _counters = config.counts.then(super::with_counters); // The scripts tell whether they are there.
            Ok(Family::BOTH.iter().map(all).collect::<Vec<_>>())
        });
        let results = match tried {
            Ok((_, results)) => results,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(StartError::IptablesNotPermitted(error));
            }
            Err(error) => return Err(StartError::Namespace(error)),
        };
        for (family, result) in Family::BOTH.iter().zip(results) {
            match (family, result) {
                (_, Ok(())) => {}
                (Family::Ipv4, Err(error)) => return Err(StartError::IptablesUnusable(error)),
                (Family::Ipv6, Err(error)) if !has_ipv6() => {
                    tracing::info!(%error, "this kernel has no IPv6: Services are served in IPv4 alone");
                    self.families = &Family::BOTH[..1];
                }
                (Family::Ipv6, Err(error)) => return Err(StartError::IptablesUnusable(error)),
            }
        }
        Ok(())
    }
}

/// Which of two kinds this host uses.
fn used(nft: Programs, legacy: Programs) -> Result<Programs, StartError> {
    if has_nft_chain(&tables::HINTS) {
        return Ok(nft);
    }
    let mut legacy_rules = 0;
    for family in Family::BOTH {
        // A table that is asked for comes into being; so only those that are there are.
        for table in legacy_tables(*family) {
            let listing = legacy.save(*family, &[&table]).map_err(StartError::Iptables)?;
            if Remains::read(&listing, family.is_ipv6()).has_hint() {
                return Ok(legacy);
            }
            legacy_rules += rules(&listing);
        }
    }
    let mut nft_rules = 0;
    if legacy_rules > 0 {
        for family in Family::BOTH {
            nft_rules += rules(&nft.save(*family, &[]).map_err(StartError::Iptables)?);
        }
    }
    Ok(if legacy_rules > nft_rules { legacy } else { nft })
}

fn rules(listing: &str) -> usize {
    listing.lines().filter(|line| line.starts_with('-')).count()
}

/// Whether nftables has one of these chains in a table `mangle`. A kernel without nftables has none.
fn has_nft_chain(chains: &[&str]) -> bool {
    let Ok(mut netfilter) = Socket::netfilter() else { return false };
    let mut has = |family: Family, chain| netfilter.chain_uses(family.of_nft(), "mangle", chain);
    let mut all = Family::BOTH.iter().flat_map(|family| chains.iter().map(move |chain| (*family, *chain)));
    all.any(|(family, chain)| matches!(has(family, chain), Ok(Some(_))))
}

/// Tables that the kernel's own `ip_tables` have in this network namespace.
pub(super) fn legacy_tables(family: Family) -> Vec<String> {
    let file = match family {
        Family::Ipv4 => "/proc/thread-self/net/ip_tables_names",
        Family::Ipv6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // Without the module there is no such file.
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn has_ipv6() -> bool {
    Path::new("/proc/thread-self/net/if_inet6").exists()
}

/// `iptables-nft-restore`, or an `iptables-restore` that says it is of this kind.
fn find_program(family: Family, kind: Kind, verb: &str) -> Option<PathBuf> {
    let program = family.program();
    find_in_path(&format!("{program}-{}-{verb}", kind.word())).or_else(|| {
        let plain = find_in_path(&format!("{program}-{verb}"))?;
        let version = run(&plain, ["--version"], "").ok()?;
        (Kind::of_version(&String::from_utf8_lossy(&version.stdout)) == kind).then_some(plain)
    })
}

fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(DIRECTORIES.map(PathBuf::from));
    directories
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// Runs a program to its end.
fn run<'a>(program: &Path, arguments: impl IntoIterator<Item = &'a str>, input: &str) -> Result<Output, RulesError> {
    Running::start(program, arguments)?.end(input, input)
}

/// What became of a program that a thread waits for.
fn done(program: ScopedJoinHandle<'_, Result<Output, RulesError>>) -> Result<(), RulesError> {
    program.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(drop)
}

/// A program that reads. It ends with this value at the latest.
struct Running<'p> {
    program: &'p Path,
    child: Child,
    /// Taken when all has been said.
    stdin: Option<ChildStdin>,
    /// Ends it when its time is over.
    limit: Option<JoinHandle<()>>,
}

impl<'p> Running<'p> {
    /// Starts a program. Its environment is empty but for where programs and the lock are.
    fn start<'a>(program: &'p Path, arguments: impl IntoIterator<Item = &'a str>) -> Result<Self, RulesError> {
        #[expect(clippy::disallowed_methods, reason = "the operator has chosen the mode that works by this program")]
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C");
        command.envs(env::var_os(LOCK_FILE).map(|file| (LOCK_FILE, file)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| failed(program, &error))?;
        let stdin = child.stdin.take();
        let mut running = Running { program, child, stdin, limit: None };
        let process = pidfd_open(Pid::from_child(&running.child), PidfdFlags::empty());
        let process = process.map_err(|errno| failed(program, &errno.into()))?;
        running.limit = Some(std::thread::spawn(move || end_in_time(&process)));
        Ok(running)
    }

    /// Lets it read. A program that has said enough reads no more: what it said matters, and that is told at the end.
    fn read(&mut self, input: &str) {
        if let Some(stdin) = &mut self.stdin
            && stdin.write_all(input.as_bytes()).is_err()
        {
            self.stdin = None;
        }
    }

    /// Lets it read the rest of `input` and waits for its end.
    fn end(mut self, rest: &str, input: &str) -> Result<Output, RulesError> {
        let [stdout, stderr] = std::thread::scope(|scope| {
            let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
            let readers = [scope.spawn(|| read_all(stdout)), scope.spawn(|| read_all(stderr))];
            self.read(rest);
            self.stdin = None;
            readers.map(|reader| reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let status = self.child.wait().map_err(|error| failed(self.program, &error))?;
        let text = |bytes: io::Result<Vec<u8>>| bytes.map_err(|error| failed(self.program, &error));
        let output = Output { status, stdout: text(stdout)?, stderr: text(stderr)? };
        if output.status.success() { Ok(output) } else { Err(refusal(self.program, input, &output)) }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // It has ended unless nobody wants its end any more, and then neither call can fail.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if let Some(limit) = self.limit.take() {
            let _ = limit.join(); // it cannot panic, and it ends with the program
        }
    }
}

fn read_all(from: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.map_or(Ok(0), |mut from| from.read_to_end(&mut bytes)).map(|_| bytes)
}

fn failed(program: &Path, error: &io::Error) -> RulesError {
    RulesError::Program { program: program.display().to_string(), words: error.to_string(), line: None }
}

/// Kills a process that has not ended in time.
fn end_in_time(process: &OwnedFd) {
    let limit = Timespec::try_from(PROGRAM_LIMIT).ok();
    // It is ready when the process has ended; an error is as good as time that has passed.
    let has_ended = poll(&mut [PollFd::new(process, PollFlags::IN)], limit.as_ref()).is_ok_and(|ready| ready > 0);
    if !has_ended {
        let _ = pidfd_send_signal(process, Signal::KILL); // It may have ended just now.
    }
}

fn refusal(program: &Path, input: &str, output: &Output) -> RulesError {
    let said = String::from_utf8_lossy(&output.stderr);
    let words: String = said.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(WORDS_MAX).collect();
    let words = if words.is_empty() { output.status.to_string() } else { words };
    RulesError::Program { program: program.display().to_string(), line: faulty_line(&said, input), words }
}

/// The line of the input that a program complains about.
fn faulty_line(said: &str, input: &str) -> Option<String> {
    let number = said.split("line").skip(1).find_map(|rest| {
        let digits: String = rest.trim_start_matches([':', ' ']).chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<usize>().ok()
    })?;
    input.lines().nth(number.checked_sub(1)?).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_names_its_line() {
        let input = "*nat\n-A NOWHERE -j ACCEPT\nCOMMIT\n";
        for said in [
            "iptables-restore: line 2 failed\n",
            "iptables-restore v1.8.9 (nf_tables): Couldn't load target\nError occurred at line: 2\nTry `-h'",
        ] {
            assert_eq!(faulty_line(said, input).as_deref(), Some("-A NOWHERE -j ACCEPT"));
        }
        assert_eq!(faulty_line("Permission denied (you must be root)", input), None);
        assert_eq!(faulty_line("line 0 failed", input), None);
    }

    #[test]
    fn scripts_are_carried_out_in_order_up_to_one_that_is_refused() {
        let chain = |name: &str, rule: &str| format!("*nat\n:{name} - [0:0]\n{rule}COMMIT\n");
        let scripts = [
            chain("ONE", ""),
            // It needs the one before.
            chain("TWO", "-A TWO -j ONE\n"),
            chain("THREE", "-A NOWHERE -j ACCEPT\n"),
            chain("FOUR", ""),
        ];
        for programs in [Kind::Nft, Kind::Legacy].into_iter().filter_map(Programs::of_kind) {
            let tried = netns::create(|| {
                let restored = programs.restore_all(Family::Ipv4, scripts.iter().cloned());
                Ok((restored, programs.save(Family::Ipv4, &["nat"])))
            });
            let (restored, saved) = match tried {
                Ok((_, tried)) => tried,
                Err(error) => return println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error})"),
            };
            let RulesError::Program { line, .. } = restored.unwrap_err() else { panic!("{programs}") };
            assert_eq!(line.as_deref(), Some("-A NOWHERE -j ACCEPT"), "{programs}");
            let saved = saved.unwrap();
            let is_there = |line: &str| saved.lines().any(|one| one == line);
            assert!(is_there("-A TWO -j ONE") && !saved.contains(":FOUR"), "{programs}: {saved}");
        }
    }

    #[test]
    fn versions_name_their_kind() {
        assert_eq!(Kind::of_version("iptables-restore v1.8.9 (nf_tables)"), Kind::Nft);
        assert_eq!(Kind::of_version("iptables-restore v1.8.9 (legacy)"), Kind::Legacy);
        assert_eq!(Kind::of_version("iptables v1.6.1"), Kind::Legacy);
    }
}
