//! What commands say and how they end, and what `state` tells.

use serde_json::{Value, json};

use super::{pair, plain};
use crate::bundle::Bundle;

/// Commands one after the other. `ID` is the container, `BUNDLE` the bundle's directory; `(wait)` waits for the end of the
/// container's process.
type Steps = &'static [&'static str];

/// The same in codes, in what is printed, and in the last words of what fails.
const CASES: &[(&str, Steps)] = &[
    ("a-life", &["create ID", "state ID", "start ID", "kill ID KILL", "(wait)", "state ID", "delete ID", "state ID"]),
    (
        "of-nobody",
        &[
            "state ID",
            "start ID",
            "kill ID 9",
            "delete ID",
            "delete --force ID",
            "exec ID true",
            "pause ID",
            "resume ID",
            "ps ID",
            "update --memory 40m ID",
            "events --stats ID",
        ],
    ),
    (
        "created",
        &["create ID", "create ID", "exec ID echo inside", "resume ID", "ps --format json ID", "delete ID", "list -q"],
    ),
    ("started-twice", &["create ID", "start ID", "start ID", "delete ID", "delete --force ID", "list -q"]),
    (
        "signals",
        &[
            "create ID",
            "start ID",
            "kill ID 0",
            "kill ID SIGCONT",
            "kill ID cont",
            "kill ID 18",
            "kill ID SIGNOSUCH",
            "kill ID",
            "kill ID KILL",
            "(wait)",
            "kill ID 9",
            "kill --all ID 9",
            "delete ID",
        ],
    ),
    (
        "stopped",
        &[
            "create ID",
            "start ID",
            "kill ID 9",
            "(wait)",
            "start ID",
            "exec ID true",
            "pause ID",
            "resume ID",
            "update --memory 40m ID",
            "events --stats ID",
            "state ID",
            "list",
            "delete ID",
        ],
    ),
    (
        "paused",
        &[
            "create ID",
            "start ID",
            "pause ID",
            "state ID",
            "list",
            "exec ID true",
            "start ID",
            "delete ID",
            "resume ID",
            "resume ID",
            "state ID",
            "delete --force ID",
        ],
    ),
    ("ended-while-paused", &["create ID", "start ID", "pause ID", "kill ID KILL", "(wait)", "state ID", "delete ID"]),
    ("removed-while-paused", &["create ID", "start ID", "pause ID", "delete --force ID", "state ID", "list -q"]),
    (
        "paused-before-its-start",
        &["create ID", "pause ID", "state ID", "resume ID", "start ID", "state ID", "delete -f ID"],
    ),
    (
        "lists",
        &[
            "create ID",
            "list",
            "list --format json",
            "list -f json",
            "list --quiet",
            "start ID",
            "list",
            "ps ID",
            "ps -f json ID",
            "ps ID -o pid,comm",
            "delete -f ID",
            "list",
        ],
    ),
    ("run", &["run ID", "state ID"]),
    ("run-detached", &["run --detach --pid-file BUNDLE/pid ID", "state ID", "(pid)", "run ID", "delete --force ID"]),
    ("run-again", &["create ID", "delete --force ID", "run -d ID", "kill ID KILL", "(wait)", "delete ID"]),
    (
        "exec-codes",
        &[
            "create ID",
            "start ID",
            "exec ID true",
            "exec ID false",
            "exec ID sh -c (exit_7)",
            "exec ID nothing",
            "exec ID /no/thing",
            "exec ID /etc/passwd",
            "exec ID /bin",
            "exec ID",
            "exec ID sh -c (kill_9)",
            "delete -f ID",
        ],
    ),
    (
        "exec-options",
        &[
            "create ID",
            "start ID",
            "exec ID sh -c (look)",
            "exec --user 1000 ID sh -c (look)",
            "exec -u 1000:1001 ID sh -c (look)",
            "exec -u 0:7 -g 8 -g 9 ID sh -c (look)",
            "exec --cwd /bin ID sh -c (look)",
            "exec --env A=1 --env B=2 --env A=3 ID sh -c (look)",
            "exec --cap CAP_SYS_ADMIN ID sh -c (look)",
            "exec --cap CAP_NO ID sh -c (look)",
            "exec --no-new-privs ID sh -c (look)",
            "exec -u 4242 ID sh -c (look)",
            "exec --process BUNDLE/process.json ID",
            "exec --detach --pid-file BUNDLE/pid ID true",
            "(pid)",
            "delete -f ID",
        ],
    ),
    ("ways-in", &["create --no-pivot --no-new-keyring ID", "start ID", "exec ID ls /", "delete -f ID"]),
    ("bundles", &["spec --bundle BUNDLE", "(spec)", "(spec_rootless)"]),
];

/// The same in codes and in what is printed; what fails is told of in words of our own.
const IN_CODES: &[(&str, Steps)] = &[
    ("signals-unknown", &["create ID", "start ID", "kill ID 99", "kill ID -1", "delete -f ID"]),
    ("paused-twice", &["create ID", "start ID", "pause ID", "pause ID", "delete -f ID"]),
    ("lists-of-nothing", &["list", "list --format json", "list -q", "list --format xml", "ps --format xml ID"]),
    (
        "exec-refused",
        &[
            "create ID",
            "start ID",
            "exec --cwd /no/dir ID true",
            "exec --cwd bin ID true",
            "exec -e NOTHING ID true",
            "exec --user sailor ID true",
            "exec --cgroup no/such ID true",
            "exec --process BUNDLE/none.json ID",
            "delete -f ID",
        ],
    ),
    (
        "updates-refused",
        &[
            "create ID",
            "update ID",
            "update --memory much ID",
            "update --memory 41943040 ID",
            "update --cpuset-cpus 900 ID",
            "update --pids-limit x ID",
            "update --resources BUNDLE/none.json ID",
            "update --resources BUNDLE/garbage.json ID",
            "update --resources BUNDLE/elsewhere.json ID",
            "update --cpu-quota 5 ID",
            "update --cpu-period 5 ID",
            "update --memory 40m --memory-swap 30m ID",
            "start ID",
            "delete -f ID",
        ],
    ),
    (
        "names",
        &[
            "create .",
            "create ..",
            "create a/b",
            "create a:b",
            "create a,b",
            "delete a/b",
            "state ../x",
            "create",
            "state",
            "kill",
        ],
    ),
    (
        "no-bundle",
        &["create --bundle BUNDLE/none ID", "run --bundle BUNDLE/data ID", "create --bundle BUNDLE/rootfs ID"],
    ),
    (
        "files-of-pids",
        &[
            "create --pid-file BUNDLE/no/such/pid ID",
            "state ID",
            "create --pid-file BUNDLE/pid ID",
            "(pid)",
            "delete -f ID",
        ],
    ),
    (
        "sockets",
        &[
            "create --console-socket BUNDLE/none.sock ID",
            "create --console-socket BUNDLE/data/file ID",
            "create --pidfd-socket BUNDLE/none.sock ID",
            "state ID",
        ],
    ),
    ("events", &["create ID", "start ID", "events --interval 0s ID", "delete -f ID"]),
    ("options", &["create --nothing ID", "delete ID ID", "state --nothing ID"]),
    ("criu", &["create ID", "start ID", "(checkpoint)", "delete -f ID"]),
];

/// What an exec'd process is.
const LOOK: &str =
    "id; pwd; env | sort; grep -E '^(Cap|NoNewPrivs|Groups|Seccomp:)' /proc/self/status; ls /proc/self/fd | wc -l";

/// What a word in parentheses stands for.
fn script(word: &str) -> &str {
    match word {
        "(look)" => LOOK,
        "(exit_7)" => "exit 7",
        "(kill_9)" => "kill -9 $$",
        other => other,
    }
}

/// What a step does, without what differs from one container to the next.
#[derive(PartialEq, Eq, Debug)]
struct Step {
    /// Its code, and what it prints if it succeeds.
    printed: String,
    /// Its last words if it fails.
    last: String,
}

impl Step {
    fn said(printed: impl Into<String>) -> Self {
        Self { printed: printed.into(), last: String::new() }
    }
}

fn step(bundle: &Bundle, pid: &mut i32, line: &str) -> Step {
    let path = bundle.path().to_str().unwrap();
    match line {
        "(wait)" => {
            bundle.wait(*pid);
            return Step::said("it has ended");
        }
        "(pid)" => {
            let text = std::fs::read_to_string(bundle.path().join("pid")).unwrap_or_default();
            return Step::said(format!("a number: {}", text.parse::<i32>().is_ok_and(|pid| pid > 0)));
        }
        "(checkpoint)" => {
            let output = bundle.output(&["checkpoint", "--image-path", path, &bundle.id]);
            return Step::said(format!("{:?}", output.status.code()));
        }
        "(spec)" | "(spec_rootless)" => return Step::said(template(bundle, line == "(spec_rootless)")),
        _ => {}
    }
    let words = line.split(' ').map(|word| script(word).replace("ID", &bundle.id).replace("BUNDLE", path));
    let words: Vec<String> = words.collect();
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    let makes = matches!(words[0], "create" | "run");
    if makes && !words.contains(&"--bundle") {
        words.splice(1..1, ["--bundle", path]);
    }
    let said = bundle.path().join("said");
    let (code, text, error) = if words[0] == "create" || words.contains(&"-d") || words.contains(&"--detach") {
        // The container keeps what it is given.
        let errors = bundle.path().join("errors");
        let (output, error) = (std::fs::File::create(&said).unwrap(), std::fs::File::create(&errors).unwrap());
        let status = bundle.runtime(&words).stdout(output).stderr(error).status().unwrap();
        (status.code(), String::new(), std::fs::read_to_string(errors).unwrap())
    } else {
        let output = bundle.output(&words);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    if makes && code == Some(0) {
        let state = bundle.output(&["state", &bundle.id]).stdout;
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        *pid = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
    }
    let last = if code == Some(0) { "" } else { error.lines().last().unwrap_or_default() };
    // The numbers of processes are all that `ps` has.
    let numbers = words[0] == "ps";
    let text = without_values(&text).unwrap_or(text);
    let text: Vec<String> = text.lines().map(|line| words_of(line, bundle, *pid, numbers)).collect();
    let printed = if code == Some(0) { text.join("\n    ") } else { String::new() };
    Step { printed: format!("{code:?} {printed}"), last: words_of(last, bundle, *pid, numbers) }
}

/// The words of a line: the process' number and times without their values, or all numbers.
fn words_of(line: &str, bundle: &Bundle, pid: i32, numbers: bool) -> String {
    let line = plain(line, bundle);
    let changes = |word: &str| {
        let bare = word.trim_matches(|letter: char| "[],\"".contains(letter));
        let is_number = !bare.is_empty() && bare.bytes().all(|byte| byte.is_ascii_digit());
        let is_time = bare.contains(':') && bare.bytes().all(|byte| byte.is_ascii_digit() || b":.-TZ".contains(&byte));
        bare == pid.to_string() || is_time || (numbers && is_number)
    };
    let words = line.split_whitespace().map(|word| if changes(word) { "N" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// A list of containers in JSON, without what differs from one to the next.
fn without_values(text: &str) -> Option<String> {
    let mut containers: Vec<serde_json::Map<String, Value>> = serde_json::from_str(text).ok()?;
    for container in &mut containers {
        container.insert("pid".to_owned(), json!(container.get("pid")?.as_i64()? > 0));
        container.insert("created".to_owned(), json!(container.get("created")?.is_string()));
    }
    serde_json::to_string_pretty(&containers).ok()
}

/// The configuration that `spec` writes.
fn template(bundle: &Bundle, rootless: bool) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut words = vec!["spec", "--bundle", dir.path().to_str().unwrap()];
    words.extend(rootless.then_some("--rootless"));
    bundle.done(&words);
    let mut spec: Value = serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    (spec["ociVersion"], spec["hostname"]) = (json!(""), json!(""));
    spec.to_string()
}

fn furnish(bundle: &Bundle) {
    let process = json!({ "args": ["sh", "-c", LOOK], "cwd": "/bin", "user": { "uid": 1000, "gid": 1001, "umask": 7 },
        "env": ["PATH=/bin", "WORD=w"], "capabilities": { "bounding": ["CAP_KILL"] } });
    std::fs::write(bundle.path().join("process.json"), process.to_string()).unwrap();
    std::fs::write(bundle.path().join("garbage.json"), "{ memory: ").unwrap();
    let elsewhere = json!({ "unified": { "../cgroup.procs": "1" } });
    std::fs::write(bundle.path().join("elsewhere.json"), elsewhere.to_string()).unwrap();
}

pub(super) fn all() {
    let with_words = CASES.iter().flat_map(|case| differences(case, true));
    let all: Vec<String> = with_words.chain(IN_CODES.iter().flat_map(|case| differences(case, false))).collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

/// Where the two differ in a case; `words` tells whether that may be in the last words.
fn differences((name, steps): &(&str, Steps), words: bool) -> Vec<String> {
    let script = if *name == "run" { "echo ran; exit 3" } else { "exec sleep 1000" };
    let pair = pair(&format!("commands-{name}"), script, |_| {});
    let [ours, theirs] = pair.each_ref().map(|bundle| {
        furnish(bundle);
        let mut pid = 0;
        steps.iter().map(|line| step(bundle, &mut pid, line)).collect::<Vec<_>>()
    });
    let differ = |ours: &Step, theirs: &Step| ours.printed != theirs.printed || (words && ours.last != theirs.last);
    let pairs = steps.iter().zip(ours.iter().zip(&theirs)).filter(|(_, (ours, theirs))| differ(ours, theirs));
    pairs
        .map(|(line, (ours, theirs))| format!("{name}, {line}: orlop {ours:?}\n{name}, {line}:  runc {theirs:?}"))
        .collect()
}

/// The fields of `state` and what is in them, but for what differs from one container to the next.
fn state(bundle: &Bundle) -> String {
    let text = bundle.done(&["state", &bundle.id]);
    let mut state: Value = serde_json::from_str(&text).unwrap();
    assert!(state["created"].as_str().unwrap().ends_with('Z'), "{text}");
    state["created"] = json!("now");
    state["pid"] = json!(state["pid"].as_i64().unwrap() > 0);
    // In the order in which they are written.
    let names: Vec<&str> = text.lines().filter_map(|line| line.trim().split('"').nth(1)).collect();
    plain(&format!("{state} {names:?}"), bundle)
}

pub(super) fn states() {
    let annotate = |spec: &mut Value| spec["annotations"] = json!({ "org.example": "x" });
    let pair = pair("states", "exec sleep 1000", annotate);
    let [ours, theirs] = pair.each_ref().map(|bundle| {
        bundle.create(&[]);
        let mut states = vec![state(bundle)];
        bundle.done(&["start", &bundle.id]);
        states.push(state(bundle));
        bundle.done(&["pause", &bundle.id]);
        states.push(state(bundle));
        bundle.done(&["resume", &bundle.id]);
        let pid = bundle.pid();
        bundle.done(&["kill", &bundle.id, "SIGKILL"]);
        bundle.wait(pid);
        states.push(state(bundle));
        states
    });
    assert_eq!(ours, theirs);
}

/// How commands end: the code, and the last words.
pub(super) fn ends() {
    let mut all = Vec::new();
    let cases: [(&str, &[&str]); 6] = [
        ("code", &["sh", "-c", "exit 42"]),
        ("signal", &["sh", "-c", "kill -TERM 1; ulimit -c 0; kill -SEGV $$; exit 9"]),
        ("missing", &["nothing"]),
        ("missing-path", &["/no/thing"]),
        ("not-executable", &["/etc/passwd"]),
        ("directory", &["/bin"]),
    ];
    for (name, args) in cases {
        let pair = pair(&format!("end-{name}"), "", |spec| spec["process"]["args"] = json!(args));
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            let (code, text) = bundle.run();
            let last = text.lines().last().unwrap_or_default();
            format!("{code:?} {}", plain(last, bundle))
        });
        if ours != theirs {
            all.push(format!("{name}: orlop {ours}\n{name}:  runc {theirs}"));
        }
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}
