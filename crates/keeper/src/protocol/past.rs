//! What 0.1.0 said to its keepers and heard from them, byte for byte. Keepers of that version outlive an upgrade, so it is said
//! the same as long as [`super::VERSION_OLDEST`] is 1; `cargo xtask past` has written it down.
//!
//! A test here that fails is no reason to write the bytes anew: a new message, with a new version, stands beside the old one.

use executor::oci::{Linux, Mount, Namespace, NamespaceKind as Kind, Process as OciProcess, Root, Spec};
use executor::{ExecOptions, ExecPlan, HostFacts, LaunchPlan};

use super::frame::{Decoder, Message, encode};
use super::messages::*;
use super::wire::Blob;
use crate::record;

const V0_1_0: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../testkit/past/0.1.0/keeper"));

/// The name of the record among the messages.
const RECORD: &str = "record";

fn spec() -> Spec {
    let mount = |destination: &str, kind: &str| Mount {
        destination: destination.into(),
        kind: kind.into(),
        ..Mount::default()
    };
    let own = |kind| Namespace { kind, path: String::new() };
    let pods = |kind| Namespace { kind, path: "/pod".into() };
    Spec {
        process: Some(process("echo up; while read line; do echo got $line; done; exit 5")),
        root: Some(Root::default()),
        mounts: vec![mount("/proc", "proc"), mount("/dev", "tmpfs")],
        linux: Some(Linux {
            namespaces: vec![own(Kind::Mount), own(Kind::Pid), pods(Kind::Network), pods(Kind::Uts), pods(Kind::Ipc)],
            ..Linux::default()
        }),
        ..Spec::default()
    }
}

fn process(script: &str) -> OciProcess {
    OciProcess {
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin".to_owned()],
        cwd: "/".to_owned(),
        ..OciProcess::default()
    }
}

fn launch() -> Launch {
    let facts = HostFacts { capabilities: u64::MAX, ..HostFacts::default() };
    Launch {
        id: "c1".into(),
        plan: Blob(executor::plan(&spec(), &facts).unwrap().encode()),
        root: true,
        mounts: 0,
        cgroup: CgroupEntry::Stay,
        cgroups: 0,
        joins: [NamespaceKind::Net, NamespaceKind::Uts, NamespaceKind::Ipc]
            .map(|kind| Join { kind, from: JoinFrom::Pod })
            .to_vec(),
        stdio: Stdio { tty: None, stdin: true, stdin_once: true },
        log: Some(Log { name: "0.log".into(), rotate: Some(Rotate { bytes_max: 1 << 20, files_max: 3 }) }),
    }
}

fn exec() -> Exec {
    let facts = HostFacts { capabilities: u64::MAX, ..HostFacts::default() };
    let options = ExecOptions { container: &spec(), facts: &facts };
    let plan = executor::exec_plan(&process("echo executed; exit 4"), options).unwrap();
    Exec {
        id: "e1".into(),
        container: "c1".into(),
        plan: Blob(plan.encode()),
        tty: None,
        stdin: false,
        stdout: true,
        stderr: false,
    }
}

fn drive() -> Drive {
    Drive {
        id: "d1".into(),
        commands: Commands {
            program: "/usr/bin/runc".into(),
            words: vec![vec!["create".into(), "d1".into()], vec!["start".into(), "d1".into()]],
            directory: "b/d1".into(),
        },
        mounts: 2,
        cgroup: CgroupEntry::Directory,
        cgroups: 1,
        volumes: vec!["data".into()],
        joins: vec![Join { kind: NamespaceKind::Net, from: JoinFrom::Fd }],
        stdio: Stdio { tty: Some(WindowSize { rows: 24, columns: 80 }), stdin: false, stdin_once: false },
        log: None,
    }
}

fn snapshot() -> Snapshot {
    let process = Process { pid: 5, start_ticks: 6, at: UnixNanos(7) };
    let exit = Exit { code: 137, signal: 9, at: UnixNanos(8) };
    Snapshot {
        sandbox: Welcome {
            version: 1,
            sandbox: "s1".into(),
            pid: 4,
            boot_id: "0b7ce0e8-0000-4000-8000-000000000000".into(),
            started: UnixNanos(3),
        },
        reaper: Some(2),
        containers: vec![
            Container { id: "c1".into(), process: process.clone(), exit: Some(exit), lost_bytes: 9 },
            Container { id: "c2".into(), process: process.clone(), exit: None, lost_bytes: 0 },
        ],
        execs: vec![ExecSession { id: "e1".into(), container: "c1".into(), process, exit: None }],
    }
}

/// Everything that there is to say, each with the number of its file descriptors.
fn today() -> Vec<(&'static str, Message, usize)> {
    let size = WindowSize { rows: 25, columns: 132 };
    let exited = || Exited { id: "c1".into(), exit: Exit { code: 5, signal: 0, at: UnixNanos(8) } };
    let requests = [
        ("hello", Request::Hello(Hello { oldest: 1, newest: 1, role: Role::Control }), 0),
        ("snapshot", Request::Snapshot, 0),
        ("launch", Request::Launch(launch()), 2),
        ("exec", Request::Exec(exec()), 1),
        ("signal", Request::Signal(Signal { id: "c1".into(), signal: 10 }), 0),
        ("resize", Request::Resize(Resize { id: "c1".into(), size }), 0),
        ("reopen", Request::ReopenLog(ReopenLog { id: "c1".into(), directory: true }), 1),
        ("attach", Request::Attach(Attach { attach: 4, id: "c1".into(), stdin: true, stdout: true, stderr: false }), 2),
        ("close", Request::CloseStdin(CloseStdin { id: "c1".into() }), 0),
        (
            "namespace",
            Request::GetNamespace(GetNamespace { kind: NamespaceKind::Pid, container: Some("c1".into()) }),
            0,
        ),
        ("forget", Request::Forget(Forget { id: "c1".into() }), 0),
        ("shutdown", Request::Shutdown(Shutdown { kill: true }), 0),
        ("drive", Request::Drive(drive()), 5),
        (
            "drive-exec",
            Request::DriveExec(DriveExec {
                id: "e2".into(),
                container: "d1".into(),
                commands: Commands { program: "/usr/bin/runc".into(), words: vec![], directory: "b/e2".into() },
                tty: true,
                stdin: false,
                stdout: false,
                stderr: false,
            }),
            0,
        ),
    ];
    let failure = Failure { reason: Reason::Launch, step: "mount".into(), errno: 13, detail: "why".into() };
    let started = Started { process: snapshot().containers.remove(0).process, warnings: vec!["as it is".into()] };
    let replies = [
        ("welcome", Reply::Welcome(snapshot().sandbox), 0),
        ("told", Reply::Snapshot(snapshot()), 0),
        ("started", Reply::Started(started), 1),
        ("done", Reply::Done, 0),
        ("failed", Reply::Failed(failure), 0),
    ];
    let detached = Detached { id: "c1".into(), attach: 4, reason: DetachReason::Slow };
    let events = [
        ("exited", Event::Exited(exited())),
        ("exec-exited", Event::ExecExited(exited())),
        ("detached", Event::Detached(detached)),
        ("log", Event::LogTrouble(LogTrouble { id: "c1".into(), errno: 28, lost_bytes: 77 })),
    ];
    let requests = requests.into_iter().map(|(name, request, fds)| (name, Message::Request(request), fds));
    let replies = replies.into_iter().map(|(name, reply, fds)| (name, Message::Reply(reply), fds));
    let events = events.into_iter().map(|(name, event)| (name, Message::Event(event), 0));
    requests.chain(replies).chain(events).collect()
}

fn bytes(number: u32, message: &Message, fds: usize) -> Vec<u8> {
    let mut out = Vec::new();
    encode(number, message, fds, &mut out).unwrap();
    out
}

/// Where `cargo xtask past` wants it: today's messages, each with its place in the list as its number.
fn write(dir: &std::path::Path) {
    let frames = (1..).zip(today()).map(|(number, (name, message, fds))| (name, bytes(number, &message, fds)));
    let record = record::encode(&Snapshot { execs: vec![], ..snapshot() });
    let named: Vec<(&str, Vec<u8>)> = frames.chain([(RECORD, record)]).collect();
    let text = testkit::past::format(named.iter().map(|(name, bytes)| (*name, bytes.as_slice())));
    std::fs::write(dir.join("keeper"), text).unwrap();
}

/// Plans are decided anew by each version; it is their form that must not change.
fn without_plan(message: Message) -> Message {
    match message {
        Message::Request(Request::Launch(launch)) => {
            assert_eq!(LaunchPlan::decode(&launch.plan.0).unwrap().encode(), launch.plan.0, "the form of a plan");
            Message::Request(Request::Launch(Launch { plan: Blob::default(), ..launch }))
        }
        Message::Request(Request::Exec(exec)) => {
            assert_eq!(ExecPlan::decode(&exec.plan.0).unwrap().encode(), exec.plan.0, "the form of a plan");
            Message::Request(Request::Exec(Exec { plan: Blob::default(), ..exec }))
        }
        other => other,
    }
}

#[test]
fn what_0_1_0_said_is_said_the_same_and_understood() {
    if let Some(dir) = testkit::past::wanted() {
        write(&dir);
        return;
    }
    let past = testkit::past::parse(V0_1_0);
    assert_eq!(past.len(), 14 + 5 + 4 + 1, "requests, replies, events and the record");
    let today = today();
    for (name, said) in past.iter().filter(|(name, _)| *name != RECORD) {
        let (_, message, fds) = today.iter().find(|(known, ..)| known == name).unwrap();
        let mut decoder = Decoder::default();
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        decoder.push(said, (0..*fds).map(|_| null()));
        let frame = decoder.next_frame().unwrap_or_else(|error| panic!("{name}: {error}")).unwrap();
        assert_eq!(frame.fds.len(), *fds, "{name}");
        assert_eq!(bytes(frame.number, &frame.message, *fds), *said, "{name} is said in another way");
        assert_eq!(without_plan(frame.message), without_plan(message.clone()), "{name} means something else");
    }
}

#[test]
fn a_record_of_0_1_0_is_read() {
    let past = testkit::past::parse(V0_1_0);
    if testkit::past::wanted().is_none() {
        let (_, written) = past.iter().find(|(name, _)| *name == RECORD).unwrap();
        assert_eq!(record::decode(written), Some(Snapshot { execs: vec![], ..snapshot() }));
    }
}
