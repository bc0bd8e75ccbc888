//! From `create` to `delete`, and what is refused on the way.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use sys::cgroup::Hierarchy;
use sys::rustix::process::Pid;

use crate::bundle::Bundle;

pub(crate) const TESTS: &[testkit::serial::Test] = &[
    ("a_container_is_created_started_and_deleted", lifecycle),
    ("what_cannot_be_is_refused_in_runcs_words", refusals),
    ("a_failed_creation_leaves_nothing", failures),
    ("groups_of_others_stay", groups_of_others),
    ("run_ends_as_its_process_does", run),
];

fn lifecycle() {
    let bundle = Bundle::new("life", "trap 'exit 3' TERM; echo up; while true; do sleep 0.1; done");
    bundle.change(|spec| spec["annotations"] = json!({ "a": "b" }));
    let pid_file = bundle.path().join("pid");
    bundle.create(&["--pid-file", pid_file.to_str().unwrap()]);
    let state = bundle.state();
    let pid = bundle.pid();
    assert_eq!(std::fs::read_to_string(pid_file).unwrap(), pid.to_string());
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], bundle.id);
    assert_eq!(state["bundle"], bundle.path().canonicalize().unwrap().to_str().unwrap());
    assert_eq!(state["annotations"], json!({ "a": "b" }));
    assert_eq!(bundle.said(), "", "it waits");
    assert!(!bundle.groups().is_empty());

    bundle.done(&["start", &bundle.id]);
    assert_eq!((bundle.status(), bundle.pid()), ("running".to_owned(), pid));
    let listed = bundle.done(&["list", "--format", "json"]);
    assert!(listed.contains(&bundle.id) && listed.contains("\"owner\":\"root\""), "{listed}");
    let pids = bundle.done(&["ps", "--format", "json", &bundle.id]);
    assert!(pids.contains(&pid.to_string()), "{pids}");

    bundle.done(&["pause", &bundle.id]);
    assert_eq!(bundle.status(), "paused");
    assert_eq!(bundle.refused(&["exec", &bundle.id, "true"]), {
        "exec failed: cannot exec in a paused container (use --ignore-paused to override)"
    });
    bundle.done(&["resume", &bundle.id]);
    assert_eq!(bundle.output(&["exec", &bundle.id, "sh", "-c", "exit 7"]).status.code(), Some(7));

    bundle.done(&["kill", &bundle.id, "TERM"]);
    bundle.wait(pid);
    assert_eq!((bundle.status(), bundle.pid()), ("stopped".to_owned(), 0));
    bundle.done(&["delete", &bundle.id]);
    assert_eq!(bundle.refused(&["state", &bundle.id]), "container does not exist");
    assert_eq!(bundle.groups(), Vec::<std::path::PathBuf>::new());
    assert_eq!(bundle.said(), "up\n");
}

fn refusals() {
    let bundle = Bundle::new("refusals", "sleep 1000");
    let id = bundle.id.as_str();
    assert_eq!(bundle.refused(&["state", id]), "container does not exist");
    assert_eq!(bundle.refused(&["kill", id, "9"]), "container does not exist");
    assert_eq!(bundle.refused(&["delete", id]), "container does not exist");
    bundle.done(&["delete", "--force", id]);
    bundle.create(&[]);
    let again = ["create", "--bundle", bundle.path().to_str().unwrap(), id];
    assert_eq!(bundle.refused(&again), "runc create failed: container with given ID already exists");
    bundle.done(&["start", id]);
    assert_eq!(bundle.refused(&["start", id]), "cannot start an already running container");
    let running = format!("cannot delete container {id} that is not stopped: running");
    assert_eq!(bundle.refused(&["delete", id]), running);
    assert_eq!(bundle.refused(&["kill", id, "NOSUCH"]), "unknown signal \"NOSUCH\"");
    assert_eq!(bundle.refused(&["resume", id]), "container not paused");
    let pid = bundle.pid();
    bundle.done(&["kill", id, "KILL"]);
    bundle.wait(pid);
    assert_eq!(bundle.refused(&["kill", id, "9"]), "container not running");
    bundle.done(&["kill", "--all", id, "9"]);
    assert_eq!(bundle.refused(&["start", id]), "cannot start a container that has stopped");
    assert_eq!(bundle.refused(&["exec", id, "true"]), "exec failed: cannot exec in a stopped container");
    assert!(bundle.refused(&["checkpoint", "--image-path", "/x", id]).contains("CRIU"));
    bundle.done(&["delete", "--force", id]);
}

fn failures() {
    let bundle = Bundle::new("failures", "true");
    let id = bundle.id.as_str();
    let create = ["create", "--bundle", bundle.path().to_str().unwrap(), id];
    let fails = |change: fn(&mut serde_json::Value), part: &str| {
        let before = std::fs::read(bundle.path().join("config.json")).unwrap();
        bundle.change(change);
        let text = bundle.refused(&create);
        assert!(text.contains(part), "{text}");
        assert_eq!(bundle.refused(&["state", id]), "container does not exist");
        assert_eq!(bundle.groups(), Vec::<std::path::PathBuf>::new());
        std::fs::write(bundle.path().join("config.json"), before).unwrap();
    };
    fails(|spec| spec["root"]["path"] = json!("nowhere"), "no such file or directory");
    fails(|spec| spec["ociVersion"] = json!("3.0.0"), "3.0.0");
    fails(|spec| spec["process"]["terminal"] = json!(true), "console socket");
    fails(|spec| spec["linux"]["sysctl"] = json!({ "vm.swappiness": "1" }), "separate kernel namespace");
    fails(
        |spec| {
            let mount = json!({ "destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"] });
            spec["mounts"].as_array_mut().unwrap().push(mount);
        },
        "no such file or directory",
    );
    fails(|spec| spec["mounts"][0]["type"] = json!("nofs"), "no such device");
}

/// A process that holds nothing of this one's, whose failure it outlives.
fn sleeper() -> std::process::Child {
    let mut sleep = Command::new("sleep");
    sleep.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn groups_of_others() {
    let bundle = Bundle::new("others", "sleep 1000");
    let id = bundle.id.as_str();
    let group = Hierarchy::whole(Path::new("/sys/fs/cgroup")).unwrap().group(id);
    let (inner, empty) = (group.child("inner"), group.child("empty"));
    inner.create().unwrap();
    empty.create().unwrap();
    let mut other = sleeper();
    inner.add(Pid::from_child(&other)).unwrap();
    let create = ["create", "--bundle", bundle.path().to_str().unwrap(), id];
    assert!(bundle.refused(&create).contains("container's cgroup is not empty: 1 process(es) found"));
    assert!(empty.exists() && inner.processes() == [Pid::from_child(&other)]);
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(bundle.refused(&create).contains("there are groups below it"));
    assert!(empty.exists() && inner.exists());
    // The kernel would still count what was just below it.
    group.delete().unwrap();
    group.create().unwrap();

    // Nothing is in it: it is used, and left.
    bundle.change(|spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] }));
    let refused = bundle.refused(&create);
    assert!(refused.contains("createRuntime hook #0"), "{refused}");
    assert!(group.exists());
    bundle.change(|spec| spec["hooks"] = json!({}));
    bundle.create(&[]);
    assert_eq!(group.processes().len(), 1);
    inner.create().unwrap();
    let mut other = sleeper();
    inner.add(Pid::from_child(&other)).unwrap();
    bundle.done(&["delete", "--force", id]);
    assert!(group.processes().is_empty() && other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
    group.delete().unwrap();
}

fn run() {
    let bundle = Bundle::new("run", "echo out; exit 5");
    assert_eq!(bundle.run(), (Some(5), "out\n".to_owned()));
    assert_eq!(bundle.refused(&["state", &bundle.id]), "container does not exist");
    bundle.change(|spec| spec["process"]["args"] = json!(["sh", "-c", "kill -9 $$"]));
    bundle.change(|spec| spec["process"]["args"] = json!(["nothing"]));
    let (code, text) = bundle.run();
    assert_eq!(code, Some(1));
    assert!(text.ends_with("exec: \"nothing\": executable file not found in $PATH\n"), "{text}");
}
