//! Containers that an earlier version has made: what it has written of them is in `testkit/past/<version>/oci`.

use serde_json::Value;

use crate::bundle::Bundle;

pub(crate) const TESTS: &[testkit::serial::Test] = &[("a_container_of_0_1_0_goes_on", goes_on)];

/// What differs from one container to the next.
const OF_THE_CONTAINER: [&str; 7] = ["id", "bundle", "rootfs", "created", "pid", "startedTicks", "cgroup"];

fn goes_on() {
    let bundle = Bundle::new("past", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done");
    bundle.create(&[]);
    let path = bundle.path().join("state").join(&bundle.id).join("state.json");
    let mut today: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    if let Some(dir) = testkit::past::wanted() {
        return write(&dir, &mut today);
    }
    let record = testkit::past::dir("0.1.0").join("oci/state.json");
    let mut past: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    for field in OF_THE_CONTAINER {
        assert!(past.get(field).is_some(), "{field} is in the record");
        past[field] = today[field].take();
    }
    std::fs::write(&path, past.to_string()).unwrap();

    let state = bundle.state();
    assert_eq!((&state["status"], &state["id"]), (&"created".into(), &bundle.id.as_str().into()));
    assert_eq!(state["annotations"]["org.example"], "past");
    bundle.done(&["start", &bundle.id]);
    assert_eq!(bundle.done(&["exec", &bundle.id, "echo", "inside"]), "inside\n");
    bundle.done(&["update", "--pids-limit", "70", &bundle.id]);
    let pids = bundle.groups().iter().find_map(|dir| std::fs::read_to_string(dir.join("pids.max")).ok());
    assert_eq!(pids.as_deref(), Some("70\n"));
    bundle.done(&["pause", &bundle.id]);
    assert_eq!(bundle.status(), "paused");
    bundle.done(&["resume", &bundle.id]);
    let pid = bundle.pid();
    while bundle.said().is_empty() {
        std::thread::yield_now();
    }
    bundle.done(&["kill", &bundle.id, "TERM"]);
    bundle.wait(pid);
    assert_eq!(bundle.status(), "stopped");
    bundle.done(&["delete", &bundle.id]);
    assert!(!path.exists() && bundle.groups().is_empty());
}

/// Writes down what this version leaves, without what is the machine's.
fn write(dir: &std::path::Path, record: &mut Value) {
    let plain = [
        ("id", "past".into()),
        ("bundle", "/bundle".into()),
        ("rootfs", "/bundle/rootfs".into()),
        ("pid", 1000.into()),
        ("startedTicks", 1000.into()),
        ("cgroup", serde_json::json!([["memory", "/sys/fs/cgroup/memory/past"], ["", "/sys/fs/cgroup/past"]])),
    ];
    plain.into_iter().for_each(|(field, value)| record[field] = value);
    record["spec"]["annotations"]["org.example"] = "past".into();
    let dir = dir.join("oci");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("state.json"), serde_json::to_string_pretty(record).unwrap()).unwrap();
}
