//! A zygote, real keepers and real containers on a busybox tree.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

use executor::oci::{Linux, Mount, Namespace, NamespaceKind, Process, Root, Spec};
use executor::{ExecOptions, HostFacts};
use keeper::protocol::{self, *};
use keeper::{KeeperConfig, KeeperFds, Network, Zygote};
use sys::cgroup::{Cgroup, Entry, Hierarchy};
use sys::process::{pidfd_open, send_signal};
use sys::rustix::process::{Resource, Rlimit as Limit};

/// Forked before anything else; tests start their keepers from it.
static ZYGOTE: OnceLock<Zygote> = OnceLock::new();

fn main() -> ExitCode {
    let missing = (!sys::rustix::process::geteuid().is_root()).then(|| "root".to_owned());
    if missing.is_none() {
        ZYGOTE.set(Zygote::start().unwrap()).unwrap();
    }
    testkit::serial::main(
        &[
            ("output_is_logged_and_the_exit_is_told", logs_and_exit),
            ("a_keeper_outlives_its_connection", reconnect),
            ("a_keeper_without_descriptors_rests_until_it_has_some", without_descriptors),
            ("input_and_output_of_an_attached_client", attach),
            ("exec_with_streams_and_exit_code", exec),
            ("a_dead_keeper_ends_its_containers_and_leaves_a_record", dead_keeper),
            ("what_cannot_be_launched_is_explained", failures),
            ("a_host_name_and_sysctls_belong_to_the_pod", sandbox),
            ("a_keeper_is_found_in_the_network_of_its_pod", in_the_network),
            ("a_keeper_knows_nothing_of_the_nodes_environment", environment),
            ("a_stopped_process_does_not_hold_its_keeper", stopped),
            ("a_process_that_cannot_be_taken_in_is_ended", not_taken_in),
            ("a_line_of_a_gigabyte_is_streamed", endless_line),
            ("a_keeper_does_what_0_1_0_says", yesterday),
        ],
        missing,
    )
}

/// A keeper and a blocking client of it.
struct Client {
    dir: tempfile::TempDir,
    socket: UnixStream,
    decoder: Decoder,
    number: u32,
    events: Vec<Event>,
}

fn config() -> KeeperConfig {
    KeeperConfig {
        sandbox: "s1".into(),
        network: Network::New,
        enters_network: false,
        mounts: false,
        own_uts: true,
        own_ipc: true,
        shared_pid: false,
        labels: None,
        user: None,
        hostname: Some("pod".into()),
        sysctls: vec![("net.ipv4.ip_default_ttl".into(), "21".into())],
        oom_score_adj: 0,
        start_max_ms: 60_000,
    }
}

impl Client {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: KeeperConfig) -> Self {
        let mut client = Self::silent(config);
        client.hello();
        client
    }

    /// One that has not said hello.
    fn silent(config: KeeperConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = File::open(dir.path()).unwrap();
        let fds = KeeperFds { directory: directory.as_fd(), network: None, mounts: None, cgroup: None };
        let socket = ZYGOTE.get().unwrap().spawn_keeper(config, &fds).unwrap();
        Self { dir, socket, decoder: Decoder::default(), number: 0, events: Vec::new() }
    }

    fn hello(&mut self) -> Welcome {
        let hello = Hello { oldest: protocol::VERSION_OLDEST, newest: protocol::VERSION, role: Role::Control };
        match self.ask(Request::Hello(hello), &[]).0 {
            Reply::Welcome(welcome) => welcome,
            other => panic!("{other:?}"),
        }
    }

    fn reconnect(&mut self) {
        self.socket = UnixStream::connect(self.dir.path().join(protocol::SOCKET)).unwrap();
        self.decoder = Decoder::default();
        self.hello();
    }

    fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let (mut buffer, mut fds) = ([0; 65536], Vec::new());
            match sys::fdpass::recv(self.socket.as_fd(), &mut buffer, &mut fds).unwrap() {
                0 => return None,
                count => self.decoder.push(&buffer[..count], fds),
            }
        }
    }

    fn ask(&mut self, request: Request, fds: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        let asked = self.send(request, fds);
        let (number, reply, fds) = self.reply();
        assert_eq!(number, asked);
        (reply, fds)
    }

    fn send(&mut self, request: Request, fds: &[BorrowedFd<'_>]) -> u32 {
        self.number += 1;
        let mut bytes = Vec::new();
        protocol::encode(self.number, &Message::Request(request), fds.len(), &mut bytes).unwrap();
        self.send_bytes(&bytes, fds);
        self.number
    }

    fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let sent = sys::fdpass::send(self.socket.as_fd(), bytes, fds).unwrap();
        (&self.socket).write_all(&bytes[sent..]).unwrap();
    }

    /// Says what another version has written down, and hears the answer.
    fn say(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        self.send_bytes(bytes, fds);
        let (number, reply, fds) = self.reply();
        assert_eq!(number.to_le_bytes(), bytes[8..12]);
        (reply, fds)
    }

    /// The next reply, and to which request.
    fn reply(&mut self) -> (u32, Reply, Vec<OwnedFd>) {
        loop {
            let frame = self.frame().expect("the keeper answers");
            match frame.message {
                Message::Reply(reply) => return (frame.number, reply, frame.fds),
                Message::Event(event) => self.events.push(event),
                Message::Request(_) => panic!("keepers do not ask"),
            }
        }
    }

    fn event(&mut self) -> Event {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.frame().expect("the keeper lives").message {
            Message::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }

    fn exit(&mut self) -> (String, Exit) {
        loop {
            if let Event::Exited(exited) | Event::ExecExited(exited) = self.event() {
                return (exited.id, exited.exit);
            }
        }
    }

    fn launch(&mut self, tree: &Path, spec: &Spec, stdio: Stdio) -> Reply {
        self.launch_in(None, tree, spec, stdio, None)
    }

    /// In a control group, with a log that rotates.
    fn launch_in(
        &mut self,
        group: Option<&Cgroup>,
        tree: &Path,
        spec: &Spec,
        stdio: Stdio,
        rotate: Option<Rotate>,
    ) -> Reply {
        let asked = self.send_launch(group, tree, spec, stdio, rotate);
        let (number, reply, _) = self.reply();
        assert_eq!(number, asked);
        reply
    }

    fn send_launch(
        &mut self,
        group: Option<&Cgroup>,
        tree: &Path,
        spec: &Spec,
        stdio: Stdio,
        rotate: Option<Rotate>,
    ) -> u32 {
        let (entry, groups) = match group.map(|group| group.entry().unwrap()) {
            None => (CgroupEntry::Stay, Vec::new()),
            Some(Entry::Directory(directory)) => (CgroupEntry::Directory, vec![directory]),
            Some(Entry::Files(files)) => (CgroupEntry::Files, files),
        };
        let plan = executor::plan(spec, &HostFacts::read().unwrap()).unwrap();
        let mounts = executor::prepare::open_sources(&plan, None).unwrap();
        let (root, logs) = (sys::mount::copy_tree(tree, false).unwrap(), File::open(self.dir.path()).unwrap());
        let join = |kind| Join { kind, from: JoinFrom::Pod };
        let launch = Launch {
            id: "c1".into(),
            plan: Blob(plan.encode()),
            root: true,
            mounts: u16::try_from(mounts.len()).unwrap(),
            cgroup: entry,
            cgroups: u16::try_from(groups.len()).unwrap(),
            joins: [protocol::NamespaceKind::Net, protocol::NamespaceKind::Uts, protocol::NamespaceKind::Ipc]
                .map(join)
                .to_vec(),
            stdio,
            log: Some(Log { name: "0.log".into(), rotate }),
        };
        let fds: Vec<BorrowedFd<'_>> =
            [logs.as_fd(), root.as_fd()].into_iter().chain(mounts.iter().chain(&groups).map(OwnedFd::as_fd)).collect();
        self.send(Request::Launch(launch), &fds)
    }

    fn log(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("0.log")).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if std::os::unix::net::UnixStream::connect(self.dir.path().join(protocol::SOCKET)).is_ok() {
            self.ask(Request::Shutdown(Shutdown { kill: true }), &[]);
        }
    }
}

fn quiet() -> Stdio {
    Stdio { tty: None, stdin: false, stdin_once: false }
}

fn spec(script: &str) -> Spec {
    let mount = |destination: &str, kind: &str| Mount {
        destination: destination.into(),
        kind: kind.into(),
        ..Mount::default()
    };
    let own = |kind| Namespace { kind, path: String::new() };
    let pods = |kind| Namespace { kind, path: "/pod".into() };
    use NamespaceKind as Kind;
    Spec {
        process: Some(Process {
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["PATH=/bin".to_owned()],
            cwd: "/".to_owned(),
            ..Process::default()
        }),
        root: Some(Root::default()),
        mounts: vec![mount("/proc", "proc"), mount("/dev", "tmpfs")],
        linux: Some(Linux {
            namespaces: vec![own(Kind::Mount), own(Kind::Pid), pods(Kind::Network), pods(Kind::Uts), pods(Kind::Ipc)],
            ..Linux::default()
        }),
        ..Spec::default()
    }
}

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    testkit::image::busybox_root(dir.path()).unwrap();
    dir
}

fn started(reply: Reply) -> protocol::Process {
    match reply {
        Reply::Started(started) => started.process,
        other => panic!("{other:?}"),
    }
}

fn logs_and_exit() {
    let (tree, mut client) = (tree(), Client::new());
    started(client.launch(tree.path(), &spec("echo out; echo err >&2; printf part; exit 5"), quiet()));
    let (id, exit) = client.exit();
    assert_eq!((id.as_str(), exit.code, exit.signal), ("c1", 5, 0));
    let mut log = client.log();
    log.sort();
    assert_eq!(log, ["stderr F err", "stdout F out", "stdout P part"]);
}

fn reconnect() {
    let (tree, mut client) = (tree(), Client::new());
    let process = started(client.launch(
        tree.path(),
        &spec("echo up; while ! test -e /go; do sleep 0.02; done; echo went; exit 9"),
        quiet(),
    ));
    client.socket.shutdown(std::net::Shutdown::Both).unwrap();
    std::fs::write(tree.path().join("go"), "").unwrap();
    client.reconnect();
    let exit = loop {
        let (Reply::Snapshot(snapshot), _) = client.ask(Request::Snapshot, &[]) else { panic!("no snapshot") };
        assert_eq!(snapshot.containers[0].process, process);
        if let Some(exit) = &snapshot.containers[0].exit {
            break exit.clone();
        }
        client.exit();
    };
    assert_eq!(exit.code, 9);
    assert_eq!(client.log(), ["stdout F up", "stdout F went"], "nothing is lost or doubled");
}

/// Who connects meanwhile is taken in afterwards.
fn without_descriptors() {
    let mut client = Client::silent(config());
    let keeper = pid(client.hello().pid);
    let limit = |most: Limit| sys::rustix::process::prlimit(Some(keeper), Resource::Nofile, most).unwrap();
    let before = limit(Limit { current: Some(0), ..sys::rustix::process::getrlimit(Resource::Nofile) });
    let begun = Rested::of(keeper);
    client.socket = UnixStream::connect(client.dir.path().join(protocol::SOCKET)).unwrap();
    let told = loop {
        let now = Rested::of(keeper);
        if now.times >= begun.times + 3 || now.worked >= begun.worked + 100 {
            break now;
        }
        std::thread::yield_now();
    };
    assert!(told.times >= begun.times + 3, "it has worked for a second of the processor without a rest");
    limit(before);
    client.decoder = Decoder::default();
    client.hello();
}

/// How often a process has waited for something, and how many hundredths of a second it has worked.
struct Rested {
    times: u64,
    worked: u64,
}

impl Rested {
    fn of(process: sys::rustix::process::Pid) -> Self {
        let read = |file| std::fs::read_to_string(format!("/proc/{}/{file}", process.as_raw_nonzero())).unwrap();
        let (status, stat) = (read("status"), read("stat"));
        let times = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        // Behind the name: the state is the first, utime and stime are the twelfth and the thirteenth.
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        Self { times: times.trim().parse().unwrap(), worked: fields.map(|field| field.parse::<u64>().unwrap()).sum() }
    }
}

fn attach() {
    let (tree, mut client) = (tree(), Client::new());
    let stdio = Stdio { tty: None, stdin: true, stdin_once: true };
    started(client.launch(tree.path(), &spec("while read line; do echo got $line; done; echo over"), stdio));
    let (theirs_in, mut input) = std::io::pipe().unwrap();
    let (mut output, theirs_out) = std::io::pipe().unwrap();
    let request = Attach { attach: 4, id: "c1".into(), stdin: true, stdout: true, stderr: false };
    assert_eq!(client.ask(Request::Attach(request), &[theirs_in.as_fd(), theirs_out.as_fd()]).0, Reply::Done);
    drop((theirs_in, theirs_out));
    input.write_all(b"one\ntwo\n").unwrap();
    drop(input);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "got one\ngot two\nover\n");
    assert_eq!(client.exit().1.code, 0);
    assert_eq!(client.log(), ["stdout F got one", "stdout F got two", "stdout F over"]);
}

fn exec() {
    let (tree, mut client) = (tree(), Client::new());
    let spec = spec("sleep 1000");
    started(client.launch(tree.path(), &spec, quiet()));
    let mut process = spec.process.clone().unwrap();
    process.args = ["sh", "-c", "cat; echo $$ >&2; exit 4"].map(str::to_owned).to_vec();
    let facts = HostFacts::read().unwrap();
    let plan = executor::exec_plan(&process, ExecOptions { container: &spec, facts: &facts }).unwrap();
    let (theirs_in, mut input) = std::io::pipe().unwrap();
    let (mut output, theirs_out) = std::io::pipe().unwrap();
    let request = Exec {
        id: "e1".into(),
        container: "c1".into(),
        plan: Blob(plan.encode()),
        tty: None,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let (reply, fds) = client.ask(Request::Exec(request), &[theirs_in.as_fd(), theirs_out.as_fd()]);
    started(reply);
    assert_eq!(fds.len(), 1, "a pidfd");
    drop((theirs_in, theirs_out));
    input.write_all(b"through").unwrap();
    drop(input);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
    let (id, exit) = client.exit();
    assert_eq!((id.as_str(), exit.code), ("e1", 4));
    assert_eq!(client.ask(Request::Forget(Forget { id: "e1".into() }), &[]).0, Reply::Done);
    assert_eq!(client.ask(Request::Signal(Signal { id: "c1".into(), signal: 9 }), &[]).0, Reply::Done);
    let (_, exit) = client.exit();
    assert_eq!((exit.code, exit.signal), (137, 9));
}

fn dead_keeper() {
    let (tree, mut client) = (tree(), Client::new());
    let welcome = client.hello();
    let process = started(client.launch(tree.path(), &spec("echo up; sleep 1000"), quiet()));
    let container = sys::process::pidfd_open(pid(process.pid)).unwrap();
    let keeper = sys::process::pidfd_open(pid(welcome.pid)).unwrap();
    sys::process::send_signal(keeper.as_fd(), 9).unwrap();
    let mut gone = [sys::rustix::event::PollFd::new(&container, sys::rustix::event::PollFlags::IN)];
    sys::rustix::event::poll(&mut gone, None).unwrap();
    let record = keeper::read_record(File::open(client.dir.path()).unwrap()).unwrap();
    assert_eq!(record.containers[0].process, process);
    assert_eq!(record.containers[0].exit, None);
}

fn pid(raw: u32) -> sys::rustix::process::Pid {
    sys::rustix::process::Pid::from_raw(i32::try_from(raw).unwrap()).unwrap()
}

fn failures() {
    let (tree, mut client) = (tree(), Client::new());
    let mut spec = spec("true");
    spec.process.as_mut().unwrap().args = vec!["missing".into()];
    match client.launch(tree.path(), &spec, quiet()) {
        Reply::Failed(failure) => {
            assert_eq!((failure.reason, failure.errno), (Reason::Launch, 2), "{}", failure.detail)
        }
        other => panic!("{other:?}"),
    }
    let signal = Signal { id: "nobody".into(), signal: 9 };
    assert!(matches!(client.ask(Request::Signal(signal), &[]).0, Reply::Failed(Failure { reason: Reason::State, .. })));
}

fn sandbox() {
    let (tree, mut client) = (tree(), Client::new());
    started(client.launch(tree.path(), &spec("hostname; cat /proc/sys/net/ipv4/ip_default_ttl"), quiet()));
    client.exit();
    assert_eq!(client.log(), ["stdout F pod", "stdout F 21"]);
    let get = GetNamespace { kind: protocol::NamespaceKind::Net, container: None };
    assert_eq!(client.ask(Request::GetNamespace(get), &[]).1.len(), 1);
}

/// As the first process of a pod is with other runtimes, for who reads `/proc/<pid>/net`.
fn in_the_network() {
    let network = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/net")).unwrap();
    let mut outside = Client::new();
    assert_eq!(network(&outside.hello().pid.to_string()), network("self"));
    let (tree, mut client) = (tree(), Client::with(KeeperConfig { enters_network: true, ..config() }));
    let keeper = client.hello().pid;
    let get = GetNamespace { kind: protocol::NamespaceKind::Net, container: None };
    let (_, pod) = client.ask(Request::GetNamespace(get), &[]);
    let pod = std::fs::read_link(format!("/proc/self/fd/{}", pod[0].as_raw_fd())).unwrap();
    assert_eq!(network(&keeper.to_string()), pod);
    assert_ne!(pod, network("self"));
    let reads = "sed -n 3p /proc/net/dev; exit 7";
    started(client.launch(tree.path(), &spec(reads), quiet()));
    assert_eq!(client.exit().1.code, 7, "it lives and starts containers");
    let host = KeeperConfig { network: Network::Host, enters_network: true, sysctls: Vec::new(), ..config() };
    assert_eq!(network(&Client::with(host).hello().pid.to_string()), network("self"), "the host's is not entered");
}

/// Who may look into a process that is made by it would find it there.
fn environment() {
    let variables = |who: &str| std::fs::read(format!("/proc/{who}/environ")).unwrap();
    let path = format!("PATH={}", std::env::var("PATH").unwrap());
    let is_in = |bytes: &[u8]| bytes.windows(path.len()).any(|part| part == path.as_bytes());
    assert!(is_in(&variables("self")) && is_in(&memory_of("self")), "there is something to forget");
    let mut client = Client::new();
    let keeper = client.hello().pid.to_string();
    assert!(variables(&keeper).iter().all(|byte| *byte == 0));
    assert!(!is_in(&memory_of(&keeper)));
}

/// Its stack, on which the kernel puts the environment, and its heap.
fn memory_of(pid: &str) -> Vec<u8> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let file = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut memory = Vec::new();
    for line in maps.lines().filter(|line| line.ends_with("[stack]") || line.ends_with("[heap]")) {
        let (begin, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [begin, end] = [begin, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut part = vec![0; usize::try_from(end - begin).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut part, begin).unwrap();
        memory.extend(part);
    }
    memory
}

/// A control group whose processes can be stopped. It ends with the test.
struct Freezer(Cgroup);

impl Freezer {
    fn new(name: &str) -> Self {
        let group = Hierarchy::detect().unwrap().group(format!("orlop-test-{name}-{}", std::process::id()));
        group.create().unwrap();
        Self(group)
    }

    fn set(&self, frozen: bool) {
        let of_v1 = ("freezer.state", if frozen { "FROZEN" } else { "THAWED" });
        let of_v2 = ("cgroup.freeze", if frozen { "1" } else { "0" });
        for directory in self.0.directories() {
            let known = [of_v1, of_v2].map(|(name, word)| (directory.join(name), word));
            known.iter().filter(|(file, _)| file.exists()).for_each(|(file, word)| std::fs::write(file, word).unwrap());
        }
    }
}

impl Freezer {
    /// Those that have come to the freezer at least; with version 1 there are other hierarchies after it.
    fn processes(&self) -> std::collections::BTreeSet<u32> {
        let files = self.0.directories().into_iter().map(|directory| directory.join("cgroup.procs"));
        let texts: Vec<String> = files.map(|file| std::fs::read_to_string(file).unwrap()).collect();
        texts.iter().flat_map(|text| text.lines()).map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set(false);
        while self.0.exists() {
            self.0.kill().unwrap();
            let _ = self.0.delete(); // Until the last of its processes has ended.
        }
    }
}

/// Whatever stops a new process, as a pod can where it shares its process namespace: the keeper goes on, and gives it up.
fn stopped() {
    let (tree, mut client) = (tree(), Client::with(KeeperConfig { start_max_ms: 2000, ..config() }));
    let group = Freezer::new("keeper");
    let spec = spec("sleep 1000");
    let init = started(client.launch_in(Some(&group.0), tree.path(), &spec, quiet(), None)).pid;
    let facts = HostFacts::read().unwrap();
    let process = spec.process.clone().unwrap();
    let plan = executor::exec_plan(&process, ExecOptions { container: &spec, facts: &facts }).unwrap();
    let exec = |id: &str| {
        let (id, container, plan) = (id.to_owned(), "c1".to_owned(), Blob(plan.encode()));
        Request::Exec(Exec { id, container, plan, tty: None, stdin: false, stdout: false, stderr: false })
    };
    let failed = |reply: Reply| match reply {
        Reply::Failed(failure) => (failure.reason, failure.step, failure.errno),
        other => panic!("{other:?}"),
    };
    group.set(true);
    let late = client.send(exec("late"), &[]);
    assert!(matches!(client.ask(Request::Snapshot, &[]).0, Reply::Snapshot(_)), "others are answered meanwhile");
    let (number, reply, _) = client.reply();
    let waiting = |errno| (Reason::Launch, "waiting for the new process".to_owned(), errno);
    assert_eq!((number, failed(reply)), (late, waiting(110)));

    let killed = client.send(exec("killed"), &[]);
    let kill = client.send(Request::Signal(Signal { id: "killed".into(), signal: 9 }), &[]);
    let (number, reply, _) = client.reply();
    assert_eq!((number, failed(reply)), (killed, waiting(125)));
    let (number, reply, _) = client.reply();
    assert_eq!((number, reply), (kill, Reply::Done));

    // cgroup v1 holds them until the group thaws, v2 lets a frozen process die.
    let left = group.processes().into_iter().filter(|one| *one != init);
    let left: Vec<OwnedFd> = left.filter_map(|one| pidfd_open(pid(one)).ok()).collect();
    group.set(false);
    for one in &left {
        // Each answer is a turn of the keeper's loop, in which it sees who has ended.
        while send_signal(one.as_fd(), 0).is_ok() {
            client.ask(Request::Snapshot, &[]);
        }
    }
}

/// A process has come to its program, and the keeper has no descriptor left to follow it by.
fn not_taken_in() {
    let (tree, mut client) = (tree(), Client::new());
    let group = Freezer::new("keeper-full");
    let spec = spec("sleep 1000");
    let launch = |client: &mut Client| client.send_launch(Some(&group.0), tree.path(), &spec, quiet(), None);
    cannot_take_in(&mut client, &group, launch);
    let launched = launch(&mut client);
    let (number, reply, _) = client.reply();
    assert_eq!(number, launched);
    started(reply);
}

/// Has a keeper start a process that stops on its way, and not take it in.
fn cannot_take_in(client: &mut Client, group: &Freezer, ask: impl FnOnce(&mut Client) -> u32) {
    use sys::rustix::process::{Resource, Rlimit, getrlimit, prlimit};
    let keeper = pid(client.hello().pid);
    let before = group.processes();
    group.set(true);
    let asked = ask(client);
    let made = loop {
        client.ask(Request::Snapshot, &[]);
        let made: Vec<u32> = group.processes().into_iter().filter(|one| !before.contains(one)).collect();
        if !made.is_empty() {
            break made;
        }
    };
    let made: Vec<OwnedFd> = made.into_iter().map(|one| pidfd_open(pid(one)).unwrap()).collect();
    // Below the first number that a copy may have a limit is another error.
    let none = Rlimit { current: Some(4), ..getrlimit(Resource::Nofile) };
    let limits = prlimit(Some(keeper), Resource::Nofile, none).unwrap();
    group.set(false);
    let (number, reply, _) = client.reply();
    prlimit(Some(keeper), Resource::Nofile, limits).unwrap();
    assert_eq!(number, asked);
    match reply {
        Reply::Failed(failure) => assert_eq!((failure.step.as_str(), failure.errno), ("pidfd", 24)),
        other => panic!("{other:?}"),
    }
    for one in &made {
        // Each answer is a turn of the keeper's loop, in which it sees who has ended.
        while send_signal(one.as_fd(), 0).is_ok() {
            client.ask(Request::Snapshot, &[]);
        }
    }
}

/// The most memory that a process has had, in bytes.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// No line is too long to be written in pieces, and no piece waits for the next.
fn endless_line() {
    const FILE_MAX: u64 = 1 << 20;
    let (tree, mut client) = (tree(), Client::new());
    let keeper = client.hello().pid;
    let before = peak(keeper);
    let rotate = Some(Rotate { bytes_max: FILE_MAX, files_max: 2 });
    let spec = spec("head -c 1073741824 /dev/zero; exit 6");
    started(client.launch_in(None, tree.path(), &spec, quiet(), rotate));
    assert_eq!(client.exit().1.code, 6);
    let grown = peak(keeper) - before;
    assert!(grown < 4 << 20, "{grown} bytes");
    let (Reply::Snapshot(snapshot), _) = client.ask(Request::Snapshot, &[]) else { panic!("no snapshot") };
    assert_eq!(snapshot.containers[0].lost_bytes, 0);
    let files: Vec<_> = std::fs::read_dir(client.dir.path()).unwrap().map(|entry| entry.unwrap()).collect();
    let logs: Vec<_> = files.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("0.log")).collect();
    assert_eq!(logs.len(), 2, "{logs:?}");
    for log in logs {
        let bytes = std::fs::read(log.path()).unwrap();
        assert!(bytes.len() as u64 <= FILE_MAX);
        for record in bytes.strip_suffix(b"\n").unwrap().split(|byte| *byte == b'\n') {
            let content = record.splitn(4, |byte| *byte == b' ').nth(3).unwrap();
            assert!(content.iter().all(|byte| *byte == 0) && content.len() <= 16 << 10, "{}", content.len());
        }
    }
}

/// What a daemon of 0.1.0 says to its keepers, as it was written down then; that it is said the same today is another test's.
fn yesterday() {
    const SAID: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../testkit/past/0.1.0/keeper"));
    let said: BTreeMap<&str, Vec<u8>> = testkit::past::parse(SAID).into_iter().collect();
    let (tree, mut client) = (tree(), Client::silent(config()));
    let (Reply::Welcome(welcome), _) = client.say(&said["hello"], &[]) else { panic!("no welcome") };
    assert_eq!((welcome.version, welcome.sandbox.as_str()), (1, "s1"));
    let (root, logs) = (sys::mount::copy_tree(tree.path(), false).unwrap(), File::open(client.dir.path()).unwrap());
    let (launched, fds) = client.say(&said["launch"], &[logs.as_fd(), root.as_fd()]);
    let process = started(launched);
    assert_eq!(fds.len(), 1, "a pidfd");
    let (Reply::Snapshot(snapshot), _) = client.say(&said["snapshot"], &[]) else { panic!("no snapshot") };
    assert_eq!((snapshot.containers[0].id.as_str(), &snapshot.containers[0].process), ("c1", &process));

    let (mut output, theirs) = std::io::pipe().unwrap();
    started(client.say(&said["exec"], &[theirs.as_fd()]).0);
    drop(theirs);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "executed\n");
    let (id, exit) = client.exit();
    assert_eq!((id.as_str(), exit.code), ("e1", 4));

    assert_eq!(client.say(&said["namespace"], &[]).1.len(), 1);
    assert!(matches!(client.say(&said["resize"], &[]).0, Reply::Failed(Failure { reason: Reason::State, .. })));
    std::fs::rename(client.dir.path().join("0.log"), client.dir.path().join("0.log.1")).unwrap();
    assert_eq!(client.say(&said["reopen"], &[logs.as_fd()]).0, Reply::Done);
    let (theirs_in, mut input) = std::io::pipe().unwrap();
    let (mut output, theirs_out) = std::io::pipe().unwrap();
    assert_eq!(client.say(&said["attach"], &[theirs_in.as_fd(), theirs_out.as_fd()]).0, Reply::Done);
    drop((theirs_in, theirs_out));
    input.write_all(b"one\n").unwrap();
    drop(input);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "got one\n");
    let (id, exit) = client.exit();
    assert_eq!((id.as_str(), exit.code), ("c1", 5));
    assert_eq!(client.log(), ["stdout F got one"], "after the log was opened anew");
    assert_eq!(client.say(&said["signal"], &[]).0, Reply::Done, "it has ended and is not forgotten");
    assert_eq!(client.say(&said["forget"], &[]).0, Reply::Done);
    // The last one: `Drop` finds nobody any more.
    assert_eq!(client.say(&said["shutdown"], &[]).0, Reply::Done);
    assert!(client.frame().is_none(), "the keeper has ended");
}
