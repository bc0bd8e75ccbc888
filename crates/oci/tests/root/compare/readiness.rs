//! NOTIFY_SOCKET: what a service manager hears of a container that says it is ready, and what that has of the socket.

use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, ExitCode};
use std::time::Duration;

use super::{add_bind, pair};
use crate::bundle::Bundle;

/// It looks at what it has, says something else, and that it is ready.
const SCRIPT: &str =
    "env | grep NOTIFY; grep /run/notify /proc/self/mountinfo | cut -d' ' -f5,6; ls -ld /run/notify/* | cut -c1-10
    /notify STATUS=rising; /notify 'READY=1
STATUS=up'; exec sleep 1000";

/// This program as a container's: says its first argument at the socket that it is told.
pub(crate) fn notify(words: &[OsString]) -> ExitCode {
    let socket = std::env::var_os("NOTIFY_SOCKET").unwrap();
    let message = words[1].to_str().unwrap();
    UnixDatagram::unbound().unwrap().send_to(message.as_bytes(), socket).unwrap();
    ExitCode::SUCCESS
}

pub(super) fn all() {
    for (name, detached) in [("started", None), ("detached", Some(true)), ("foreground", Some(false))] {
        let pair = pair(&format!("readiness-{name}"), SCRIPT, |spec| {
            add_bind(spec, std::env::current_exe().unwrap().to_str().unwrap(), "/notify");
        });
        let [ours, theirs] = pair.each_ref().map(|bundle| heard(bundle, detached));
        assert_eq!(theirs.len(), 6, "runc itself cannot: {theirs:?}");
        assert_eq!(ours, theirs, "{name}");
    }
}

/// What a manager hears, that the command ends or not when it has, and what the container sees.
fn heard(bundle: &Bundle, detached: Option<bool>) -> Vec<String> {
    let path = bundle.path().join("manager.sock");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(testkit::pace::stretched(Duration::from_secs(60)))).unwrap();
    let mut command = match detached {
        None => {
            assert!(bundle.creation(&[]).env("NOTIFY_SOCKET", &path).status().unwrap().success());
            bundle.runtime(&["start", &bundle.id])
        }
        Some(detached) => run(bundle, detached),
    };
    let mut child = command.env("NOTIFY_SOCKET", &path).spawn().unwrap();
    let mut all: Vec<String> = (0..3).map(|_| message(&manager)).collect();
    let names = [(bundle.pid().to_string(), "the container"), (child.id().to_string(), "the command")];
    for (pid, name) in names {
        all.iter_mut().for_each(|text| *text = text.replace(&pid, name));
    }
    if detached == Some(false) {
        bundle.done(&["kill", &bundle.id, "KILL"]);
    }
    all.push(format!("{:?}", child.wait().unwrap().code()));
    all.extend([bundle.said(), manager_hears_more(&manager)]);
    all
}

fn run(bundle: &Bundle, detached: bool) -> Command {
    let said = std::fs::File::create(bundle.path().join("said")).unwrap();
    let mut command = bundle.runtime(&["run", "--bundle", bundle.path().to_str().unwrap()]);
    command.args(detached.then_some("--detach")).arg(&bundle.id);
    command.stdout(said.try_clone().unwrap()).stderr(said);
    command
}

/// A message; what comes with it is closed, which the barrier waits for.
fn message(manager: &UnixDatagram) -> String {
    let (mut buffer, mut fds) = ([0; 4096], Vec::new());
    let length = sys::fdpass::recv(manager.as_fd(), &mut buffer, &mut fds).unwrap();
    format!("{:?}, {} descriptors", String::from_utf8_lossy(&buffer[..length]), fds.len())
}

fn manager_hears_more(manager: &UnixDatagram) -> String {
    manager.set_nonblocking(true).unwrap();
    format!("more: {}", manager.recv(&mut [0; 64]).is_ok())
}
