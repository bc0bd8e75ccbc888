//! `events`: what a control group has used, as both read it, and want of memory as it happens.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::pair;
use crate::bundle::Bundle;

/// It computes more than it may, writes to the disk, says so and stands still.
const WORK: &str =
    "dd if=/dev/zero of=/file bs=4096 count=64 oflag=direct; dd if=/dev/zero of=/cached bs=4096 count=64; i=0;
    while [ $i -lt 100000 ]; do i=$((i + 1)); done; echo done > /told; exec sleep 1000";

/// It waits until it is told to, and has a child that takes more memory than it may; told again, it does so itself.
const GREED: &str = "read line < /told; tail -n 1 /dev/zero; read line < /told; exec tail -n 1 /dev/zero";

/// What depends on who looks: times of version 1, which runc reads in ticks and we in nanoseconds, and what is mapped of files, as
/// pages of the runtime's program may be charged to the container that it began first.
const OF_THE_READER: &[&str] = &[
    "/cpu/usage/user",
    "/cpu/usage/kernel",
    "/memory/raw/file_mapped",
    "/memory/raw/mapped_file",
    "/memory/raw/total_mapped_file",
];

fn limited(spec: &mut Value, script: &str) {
    spec["root"]["readonly"] = json!(false);
    spec["process"]["args"] = json!(["sh", "-c", script]);
    spec["linux"]["resources"] = json!({
        "memory": { "limit": 32 << 20, "swap": 32 << 20 },
        "cpu": { "quota": 20000, "period": 50000, "cpus": "0" },
        "pids": { "limit": 77 },
    });
}

/// A pipe `/told` between the container and this process.
pub(super) fn pipe(bundle: &Bundle) -> std::path::PathBuf {
    let pipe = bundle.path().join("rootfs/told");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    pipe
}

/// The words of `events --stats`.
fn told(output: std::process::Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let event: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((event["type"].as_str(), event.as_object().unwrap().len()), (Some("stats"), 3), "{event}");
    event["data"].clone()
}

/// Both read the same group, in which nothing moves: each number has to be where runc has it, between what runc says before
/// and after.
pub(super) fn statistics() {
    let pair = pair("statistics", "", |spec| limited(spec, WORK));
    for bundle in &pair {
        let pipe = pipe(bundle);
        bundle.create(&[]);
        bundle.done(&["start", &bundle.id]);
        assert_eq!(std::fs::read_to_string(pipe).unwrap(), "done\n", "{}", bundle.said());
        bundle.done(&["pause", &bundle.id]);
    }
    let [ours, theirs] = &pair;
    let state = with_group_of(ours, theirs);
    let theirs_now = || told(theirs.output(&["events", "--stats", &theirs.id]));
    let (before, here, after) = (
        theirs_now(),
        told(ours.plainly(&["--root", state.path().to_str().unwrap(), "events", "--stats", &ours.id])),
        theirs_now(),
    );
    let mut all = Vec::new();
    compare("", &here, &before, &after, &mut all);
    let own = told(ours.output(&["events", "--stats", &ours.id]));
    for same in ["/memory/usage/limit", "/memory/swap/limit", "/pids", "/cpuset", "/hugetlb", "/network_interfaces"] {
        if own.pointer(same) != before.pointer(same) {
            all.push(format!("of its own group, {same}: {own}"));
        }
    }
    assert!(all.is_empty(), "{}\norlop {here}\nrunc {before}", all.join("\n"));
}

/// A state directory in which our container has the control group of the other.
fn with_group_of(ours: &Bundle, theirs: &Bundle) -> tempfile::TempDir {
    let state = tempfile::tempdir().unwrap();
    let record = std::fs::read_to_string(ours.path().join("state").join(&ours.id).join("state.json")).unwrap();
    let mut record: Value = serde_json::from_str(&record).unwrap();
    let groups = record["cgroup"].to_string().replace(&ours.id, &theirs.id);
    record["cgroup"] = serde_json::from_str(&groups).unwrap();
    std::fs::create_dir(state.path().join(&ours.id)).unwrap();
    std::fs::write(state.path().join(&ours.id).join("state.json"), record.to_string()).unwrap();
    state
}

/// Adds where `here` is not what is between the other two.
fn compare(place: &str, here: &Value, before: &Value, after: &Value, all: &mut Vec<String>) {
    let mut differ = |what: &str| all.push(format!("{place}: {what}: orlop {here}, runc {before}, {after}"));
    match (here, before, after) {
        (Value::Object(one), Value::Object(two), Value::Object(three)) => {
            let names: std::collections::BTreeSet<_> = one.keys().chain(two.keys()).chain(three.keys()).collect();
            for name in names {
                let zero = json!(0);
                match (one.get(name), two.get(name), three.get(name)) {
                    (Some(one), Some(two), Some(three)) => compare(&format!("{place}/{name}"), one, two, three, all),
                    // What is zero need not be there, and may have become more meanwhile.
                    (one, Some(Value::Number(_)), None) | (one, None, Some(Value::Number(_))) => {
                        let [one, two, three] =
                            [one, two.get(name), three.get(name)].map(|value| value.unwrap_or(&zero));
                        compare(&format!("{place}/{name}"), one, two, three, all);
                    }
                    _ => all.push(format!("{place}/{name}: orlop {here}, runc {before}")),
                }
            }
        }
        (Value::Array(one), Value::Array(two), Value::Array(three)) => {
            if one.len() != two.len() || two.len() != three.len() {
                return differ("lengths");
            }
            for (index, one) in one.iter().enumerate() {
                compare(&format!("{place}/{index}"), one, &two[index], &three[index], all);
            }
        }
        (Value::Number(_), Value::Number(_), Value::Number(_)) if OF_THE_READER.contains(&place) => {}
        (Value::Number(one), Value::Number(two), Value::Number(three)) => {
            let [one, two, three] = [one, two, three].map(|number| number.as_f64().unwrap());
            if one < two.min(three) || one > two.max(three) {
                differ("numbers");
            }
        }
        _ if here == before => {}
        _ => differ("values"),
    }
}

/// That a container has run out of memory: a child first, then its only process.
pub(super) fn want_of_memory() {
    let pair = pair("want-of-memory", "", |spec| limited(spec, GREED));
    for (bundle, who) in pair.iter().zip(["orlop", "runc"]) {
        let pipe = pipe(bundle);
        bundle.create(&[]);
        bundle.done(&["start", &bundle.id]);
        let mut command = bundle.runtime(&["events", "--interval", "100ms", &bundle.id]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut rest = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        // Who tells the first hears of all that happens from there on.
        let first = rest.next().unwrap_or_default();
        let oom = json!({ "type": "oom", "id": bundle.id });
        let is_oom = |line: &String| serde_json::from_str::<Value>(line).unwrap() == oom;
        std::fs::write(&pipe, "go\n").unwrap();
        let of_child: Vec<String> = std::iter::once(first).chain(up_to(&mut rest, is_oom)).collect();
        assert!(of_child.last().is_some_and(is_oom), "{who}: {of_child:?}");
        let pid = bundle.pid();
        std::fs::write(&pipe, "go\n").unwrap();
        bundle.wait(pid);
        // runc ends when the group is empty, which with version 2 the kernel may tell before it tells of the want: it puts off
        // by 10 ms what changes again and again. With version 1 runc goes on as long as there is a group.
        let mut of_last = up_to(&mut rest, is_oom);
        bundle.done(&["delete", "--force", &bundle.id]);
        of_last.extend(rest);
        assert!(child.wait().unwrap().success());
        assert!(who == "runc" || of_last.iter().any(is_oom), "{of_last:?}");
        let events = of_child.iter().chain(&of_last).map(|line| serde_json::from_str::<Value>(line).unwrap());
        let is_whole =
            |event: &Value| event["id"] == json!(bundle.id) && event["type"] == "stats" && event["data"].is_object();
        let events: Vec<Value> = events.collect();
        assert!(is_whole(&events[0]) && events.iter().all(|event| is_whole(event) || *event == oom), "{events:?}");
    }
}

/// Lines to the first that is meant, or as many as a minute has.
fn up_to(lines: &mut impl Iterator<Item = String>, is_meant: impl Fn(&String) -> bool) -> Vec<String> {
    let mut taken = Vec::new();
    while taken.len() < 600 && !taken.last().is_some_and(&is_meant) {
        match lines.next() {
            Some(line) => taken.push(line),
            None => break,
        }
    }
    taken
}
