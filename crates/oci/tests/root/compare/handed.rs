//! What goes in and out beside the streams: hooks, descriptors, terminals.

use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use super::{pair, plain};
use crate::bundle::Bundle;
use crate::details::{called, more, receive};

const STAGES: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// What a hook notes: what it is told, where it is, what it is.
const NOTE: &str = "read -r state; { echo \"$0 $*\"; echo \"$state\"; env | sort; \
    for kind in mnt pid net ipc uts user; do echo \"$kind $(readlink /proc/self/ns/$kind)\"; done; \
    grep -E '^(Uid|Gid|Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/cgroup | sort | tail -n 1; } >>";

/// Hooks at each stage, two of them each, that note what they find.
fn add_hooks(spec: &mut Value) {
    for stage in STAGES {
        let dir = if stage == "startContainer" { "/notes" } else { "@BUNDLE/rootfs/notes" };
        let hook = |number: u32| {
            let script = format!("{NOTE} {dir}/{stage}; echo heard; echo seen >&2");
            let words = json!(["sh", "-c", script, stage, number.to_string()]);
            json!({ "path": "/bin/sh", "args": words, "env": ["PATH=/usr/bin:/bin", "WORD=w"], "timeout": 60 })
        };
        spec["hooks"][stage] = json!([hook(1), hook(2)]);
    }
    let bind =
        json!({ "destination": "/notes", "type": "bind", "source": "@BUNDLE/rootfs/notes", "options": ["bind"] });
    spec["mounts"].as_array_mut().unwrap().push(bind);
    spec["annotations"] = json!({ "org.example": "x" });
}

/// The notes of some stages, without numbers of processes and namespaces, but for whether those are the host's.
fn notes(bundle: &Bundle, stages: &[&str]) -> Vec<String> {
    let text = stages.iter().map(|stage| {
        let text = std::fs::read_to_string(bundle.path().join("rootfs/notes").join(stage)).unwrap_or_default();
        // Where a hook of these stages begins is nobody's business.
        let anywhere = ["createContainer", "poststart"].contains(stage);
        let lines = text.lines().filter(|line| !(anywhere && line.starts_with("PWD=")));
        lines.map(|line| format!("{stage}: {}", note(stage, line, bundle))).collect::<Vec<_>>()
    });
    text.collect::<Vec<_>>().concat()
}

fn note(stage: &str, line: &str, bundle: &Bundle) -> String {
    let line = plain(line, bundle);
    if let Ok(mut state) = serde_json::from_str::<Value>(&line)
        && state.is_object()
    {
        state["pid"] = json!(state["pid"].as_i64().is_some_and(|pid| pid > 0));
        // runc has them when the container is created, and says so; by the specification it runs by then.
        if stage == "poststart" {
            state["status"] = json!("");
        }
        return state.to_string();
    }
    match line.split_once(' ') {
        Some((kind, link)) if link.contains(":[") => {
            let own = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
            format!("{kind} of the host: {}", own.as_os_str() == link)
        }
        _ => line,
    }
}

pub(super) fn hooks() {
    let pair = pair("hooks", "echo ran", add_hooks);
    let [ours, theirs] = pair.each_ref().map(|bundle| {
        std::fs::create_dir(bundle.path().join("rootfs/notes")).unwrap();
        bundle.create(&[]);
        let created = notes(bundle, &STAGES[..4]);
        let pid = bundle.pid();
        bundle.done(&["start", &bundle.id]);
        bundle.wait(pid);
        let started = notes(bundle, &STAGES);
        bundle.done(&["delete", &bundle.id]);
        ([created, started, notes(bundle, &STAGES)], bundle.said())
    });
    assert!(theirs.0[2].len() > 150, "runc itself cannot: {theirs:?}");
    for (ours, theirs) in ours.0.iter().zip(&theirs.0) {
        assert_eq!(super::differences(ours, theirs), Vec::<String>::new());
    }
    assert_eq!(ours.1, theirs.1, "what the container's streams got");
}

/// Descriptors beyond the three, and what a program is told of them.
pub(super) fn descriptors() {
    let script = "cat <&3; cat <&4; env | grep LISTEN; ls /proc/self/fd | wc -l; echo done";
    for (name, options, variables) in [
        ("none", &[][..], &[][..]),
        ("two", &["--preserve-fds", "2"], &[]),
        ("one-of-two", &["--preserve-fds", "1"], &[]),
        ("activated", &[], &[("LISTEN_FDS", "2"), ("LISTEN_PID", "1"), ("LISTEN_FDNAMES", "a:b")]),
        ("activated-and-more", &["--preserve-fds", "1"], &[("LISTEN_FDS", "1")]),
    ] {
        let pair = pair(&format!("descriptors-{name}"), script, |_| {});
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            let words = [&["run", "--bundle", bundle.path().to_str().unwrap()], options, &[&bundle.id]].concat();
            let mut shell = std::process::Command::new("sh");
            shell.args(["-c", "file=$1; shift; exec 3<$file 4<$file; exec \"$@\"", "sh"]);
            shell.arg(bundle.path().join("data/file")).arg(called(bundle)).args(bundle.runtime(&words).get_args());
            let output = shell.envs(variables.iter().copied()).output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
        });
        assert_eq!(ours, theirs, "{name}");
    }
}

/// The terminal of a container, as its caller and its program see it.
pub(super) fn terminals() {
    let look = "tty; stty -a; ls -l /dev/console | awk '{print $1, $3, $4}'; grep console /proc/self/mountinfo | \
        awk '{print $5, $6}'; awk '{print $1 == $5, $1 == $6, $7 != 0}' /proc/$$/stat; readlink /proc/self/fd/0; echo done";
    for (name, user, size) in [("plain", 0, Value::Null), ("sized", 1000, json!({ "height": 30, "width": 120 }))] {
        let pair = pair(&format!("terminal-{name}"), look, |spec| {
            spec["process"]["terminal"] = json!(true);
            spec["process"]["user"] = json!({ "uid": user, "gid": user });
            if !size.is_null() {
                spec["process"]["consoleSize"] = size.clone();
            }
        });
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            let path = bundle.path().join("console.sock");
            let listener = UnixListener::bind(&path).unwrap();
            let bundle_path = bundle.path().to_str().unwrap();
            bundle.done(&["create", "--bundle", bundle_path, "--console-socket", path.to_str().unwrap(), &bundle.id]);
            let (message, master) = receive(&listener);
            bundle.done(&["start", &bundle.id]);
            let (mut master, mut text) = (std::fs::File::from(master), String::new());
            while more(&mut master, &mut text) {}
            // The name of the file is nobody's business; that of a multiplexer tells what came.
            assert!(message.ends_with(b"/ptmx"), "{message:?}");
            text
        });
        assert!(theirs.ends_with("done\r\n"), "runc itself cannot: {theirs:?}");
        assert_eq!(ours, theirs, "{name}");
    }
}
