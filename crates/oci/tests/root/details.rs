//! What callers hand over and get back: hooks, terminals, descriptors, further processes, filters that report.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::bundle::Bundle;

pub(crate) const TESTS: &[testkit::serial::Test] = &[
    ("hooks_run_in_their_order_and_places", hooks),
    ("a_hook_of_the_image_is_confined_as_its_program", confined_hooks),
    ("a_hook_that_fails_ends_the_container", failing_hooks),
    ("a_terminal_goes_to_the_callers_socket", terminal),
    ("exec_starts_what_it_is_told", exec),
    ("descriptors_are_handed_on", descriptors),
    ("a_filter_reports_to_its_listener", listener),
    ("mounts_map_ids", id_maps),
    ("processes_beside_the_first_are_ended", shared_pids),
    ("in_a_user_namespace_it_does_without_what_only_root_may", in_user_namespace),
];

/// A hook that notes its stage, what it is told, and what it sees.
fn hook(bundle: &Bundle, stage: &str, extra: &str) -> Value {
    let notes = bundle.path().join("notes");
    let script = format!(
        "read -r state; echo \"{stage} $state pid:$(readlink /proc/self/ns/pid) {extra}\" >> {}",
        notes.display()
    );
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] })
}

fn hooks() {
    let bundle = Bundle::new("hooks", "echo ran");
    std::fs::create_dir(bundle.path().join("rootfs/notes")).unwrap();
    let notes = bundle.path().display().to_string();
    bundle.change(|spec| {
        let host = |stage: &str| json!([hook(&bundle, stage, "$(pwd)")]);
        // By this path there is a mount of the container's already, and that of the host, too.
        let inside = format!("$(test -c {notes}/rootfs/dev/null && echo mounted)");
        let started = json!({
            "path": "/bin/sh",
            "args": ["sh", "-c", "read -r state; echo \"startContainer $state pid:$(readlink /proc/self/ns/pid)\" >> /notes/all"],
            "env": ["PATH=/bin"],
        });
        spec["hooks"] = json!({
            "prestart": host("prestart"),
            "createRuntime": host("createRuntime"),
            "createContainer": [hook(&bundle, "createContainer", &inside)],
            "startContainer": [started],
            "poststart": host("poststart"),
            "poststop": host("poststop"),
        });
        let bind = json!({ "destination": "/notes", "type": "bind", "source": format!("{notes}/rootfs/notes"),
            "options": ["bind"] });
        spec["mounts"].as_array_mut().unwrap().push(bind);
    });
    bundle.create(&[]);
    let lines = || std::fs::read_to_string(bundle.path().join("notes")).unwrap();
    assert_eq!(lines().lines().count(), 3, "{}", lines());
    let pid = bundle.pid();
    bundle.done(&["start", &bundle.id]);
    bundle.wait(pid);
    bundle.done(&["delete", &bundle.id]);
    let all = lines();
    let ours = std::fs::read_link("/proc/self/ns/pid").unwrap().display().to_string();
    let expect = [
        ("prestart", "creating", true),
        ("createRuntime", "creating", true),
        ("createContainer", "creating", false),
        ("poststart", "running", true),
        ("poststop", "stopped", true),
    ];
    assert_eq!(all.lines().count(), expect.len(), "{all}");
    for (line, (stage, status, of_host)) in all.lines().zip(expect) {
        assert!(line.starts_with(stage) && line.contains(&format!("\"status\":\"{status}\"")), "{line}");
        assert!(line.contains(&format!("\"id\":\"{}\"", bundle.id)) && line.contains("\"bundle\":"), "{line}");
        assert_eq!(line.contains(&format!("pid:{ours}")), of_host, "{line}");
    }
    assert!(all.contains(&format!("\"pid\":{pid}")), "{all}");
    assert!(all.lines().nth(2).unwrap().ends_with("mounted"), "{all}");
    let inside = std::fs::read_to_string(bundle.path().join("rootfs/notes/all")).unwrap();
    assert!(inside.contains("\"status\":\"created\"") && !inside.contains(&ours), "{inside}");
    assert_eq!(bundle.said(), "ran\n");
}

/// What a process is and may, and whether the filter lets it make a directory.
const CONFINEMENT: &str = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' /proc/self/status; ulimit -n; pwd; umask; \
    mkdir /tmp/made 2>&1 | sed 's/.*: //'";

fn confined_hooks() {
    let bundle = Bundle::new("confined", &format!("{{ {CONFINEMENT}; }} > /notes/program"));
    let notes = bundle.path().join("rootfs/notes");
    std::fs::create_dir(&notes).unwrap();
    std::fs::create_dir(bundle.path().join("rootfs/home")).unwrap();
    std::fs::set_permissions(&notes, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    bundle.change(|spec| {
        let script = format!("{{ {CONFINEMENT}; }} > /notes/hook");
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] });
        spec["hooks"] = json!({ "startContainer": [hook] });
        spec["root"]["readonly"] = json!(true);
        spec["process"]["user"] = json!({ "uid": 1234, "gid": 1235, "additionalGids": [1236] });
        spec["process"]["cwd"] = json!("/home");
        spec["mounts"].as_array_mut().unwrap().extend([
            json!({ "destination": "/notes", "type": "bind", "source": notes, "options": ["bind"] }),
            json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" }),
        ]);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 39 },
                // As common profiles have it: whoever runs hooks must not be filtered, too.
                { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
            ],
        });
    });
    for no_new_privileges in [true, false] {
        bundle.change(|spec| spec["process"]["noNewPrivileges"] = json!(no_new_privileges));
        assert_eq!(bundle.run(), (Some(0), String::new()));
        let read = |name: &str| std::fs::read_to_string(notes.join(name)).unwrap();
        assert_eq!(read("hook"), read("program"));
        for part in ["1234\t1234", "CapEff:", "Seccomp:\t2", "/home", "not empty"] {
            assert!(read("hook").contains(part), "{part}: {}", read("hook"));
        }
    }
}

fn failing_hooks() {
    let bundle = Bundle::new("bad-hooks", "sleep 1000");
    let id = bundle.id.as_str();
    let create = ["create", "--bundle", bundle.path().to_str().unwrap(), id];
    let script = |text: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", text], "timeout": 1 }]);
    for (stage, text, part) in [
        ("createRuntime", "echo because >&2; exit 3", "createRuntime hook #0: exit status 3: because"),
        ("createContainer", "exit 4", "createContainer hook #0: exit status 4"),
        ("createRuntime", "exec sleep 1000", "createRuntime hook #0: not done after 1 s"),
    ] {
        bundle.change(|spec| spec["hooks"] = json!({ stage: script(text) }));
        let refused = bundle.refused(&create);
        assert!(refused.contains(part), "{refused}");
        assert_eq!(bundle.refused(&["state", id]), "container does not exist");
        assert!(bundle.groups().is_empty());
    }
    for (stage, text) in [("startContainer", "exit 5"), ("poststart", "exit 5")] {
        bundle.change(|spec| spec["hooks"] = json!({ stage: script(text) }));
        bundle.create(&[]);
        let pid = bundle.pid();
        let refused = bundle.refused(&["start", id]);
        assert!(refused.contains(&format!("{stage} hook #0: exit status 5")), "{refused}");
        bundle.wait(pid);
        assert_eq!(bundle.status(), "stopped");
        bundle.done(&["delete", id]);
    }
}

/// What arrives at a socket: a message and a descriptor.
pub(crate) fn receive(listener: &UnixListener) -> (Vec<u8>, OwnedFd) {
    let (socket, _) = listener.accept().unwrap();
    let (mut buffer, mut fds) = (vec![0; 8192], Vec::new());
    let length = sys::fdpass::recv(socket.as_fd(), &mut buffer, &mut fds).unwrap();
    buffer.truncate(length);
    (buffer, fds.pop().unwrap())
}

/// Reads what a terminal says; whether there was more.
pub(crate) fn more(master: &mut std::fs::File, text: &mut String) -> bool {
    let mut buffer = [0; 256];
    match master.read(&mut buffer) {
        Ok(count @ 1..) => text.push_str(&String::from_utf8_lossy(&buffer[..count])),
        _ => return false,
    }
    true
}

fn terminal() {
    let bundle = Bundle::new("terminal", "tty; stty size; read line; echo \"read $line\"");
    bundle.change(|spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({ "height": 33, "width": 99 });
    });
    let path = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // The caller reads the command's output to its end, as containerd's shim does: the process must not hold it.
    let bundle_path = bundle.path().to_str().unwrap();
    bundle.done(&["create", "--bundle", bundle_path, "--console-socket", path.to_str().unwrap(), &bundle.id]);
    let (name, master) = receive(&listener);
    assert_eq!(name, b"/dev/ptmx");
    bundle.done(&["start", &bundle.id]);
    let mut master = std::fs::File::from(master);
    let mut text = String::new();
    // What is typed before the size is told is echoed in between.
    while !text.contains("33 99\r\n") && more(&mut master, &mut text) {}
    assert_eq!(text, "/dev/pts/0\r\n33 99\r\n");
    master.write_all(b"word\n").unwrap();
    while more(&mut master, &mut text) {}
    assert!(text.ends_with("read word\r\n"), "{text:?}");
}

fn exec() {
    let bundle = Bundle::new("exec", "sleep 1000");
    bundle.create(&[]);
    bundle.done(&["start", &bundle.id]);
    let id = bundle.id.as_str();
    let look = "id -u; id -g; pwd; echo $WORD";
    let options = ["--user", "7:8", "--cwd", "/bin", "--env", "WORD=w"];
    let said = bundle.done(&[&["exec"][..], &options, &[id, "sh", "-c", look]].concat());
    assert_eq!(said, "7\n8\n/bin\nw\n");

    let process = bundle.path().join("process.json");
    let with_process = json!({ "args": ["sh", "-c", "echo out; exec sleep 1000"], "cwd": "/", "user": {},
        "env": ["PATH=/bin"] });
    std::fs::write(&process, with_process.to_string()).unwrap();
    let pid_file = bundle.path().join("exec.pid");
    let (process, pid_path) = (process.to_str().unwrap(), pid_file.to_str().unwrap());
    let mut detached = bundle.runtime(&["exec", "--detach", "--pid-file", pid_path, "--process", process, id]);
    let (mut output, input) = std::io::pipe().unwrap();
    assert!(detached.stdout(input).status().unwrap().success());
    drop(detached);
    let mut said = [0; 4];
    output.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"out\n");
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let pids: Vec<i32> = serde_json::from_str(&bundle.done(&["ps", "--format", "json", id])).unwrap();
    assert!(pids.contains(&pid), "{pids:?} has {pid}");
    let output = bundle.output(&["exec", id, "nothing"]);
    assert_eq!(output.status.code(), Some(255));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.ends_with("exec: \"nothing\": executable file not found in $PATH\n"), "{text}");
    let killed = bundle.output(&["exec", id, "sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.status.code(), Some(137));
    bundle.done(&["delete", "--force", id]);
    bundle.wait(pid);
}

/// A bundle's runtime by the name that it is called by, for programs that start it.
pub(crate) fn called(bundle: &Bundle) -> std::path::PathBuf {
    let path = bundle.path().join("runc");
    std::os::unix::fs::symlink(bundle.runtime(&[]).get_program(), &path).unwrap();
    path
}

fn descriptors() {
    let bundle = Bundle::new("descriptors", "cat <&3; ls /proc/self/fd | wc -l");
    let file = bundle.path().join("data");
    std::fs::write(&file, "handed on\n").unwrap();
    let words = ["run", "--preserve-fds", "1", "--bundle", bundle.path().to_str().unwrap(), &bundle.id];
    // A shell gives it number 3.
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "file=$1; shift; exec 3<$file; exec \"$@\"", "sh"]).arg(&file);
    shell.arg(called(&bundle)).args(bundle.runtime(&words).get_args());
    let output = shell.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Three streams, the one handed on, and that of the directory that `ls` reads.
    assert_eq!(text, "handed on\n5\n", "{}", String::from_utf8_lossy(&output.stderr));
    let error =
        bundle.refused(&["create", "--preserve-fds", "3", "--bundle", bundle.path().to_str().unwrap(), &bundle.id]);
    assert!(error.contains("bad file descriptor"), "{error}");
}

fn listener() {
    let bundle = Bundle::new("listener", "mkdir /tmp/x; echo done");
    let path = bundle.path().join("listener.sock");
    let socket = UnixListener::bind(&path).unwrap();
    bundle.change(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": path,
            "listenerMetadata": "about it",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY" }],
        });
    });
    bundle.create(&[]);
    let pid = bundle.pid();
    bundle.done(&["start", &bundle.id]);
    let (message, filter) = receive(&socket);
    let message: Value = serde_json::from_slice(&message).unwrap();
    assert_eq!((message["pid"].as_i64(), message["metadata"].as_str()), (Some(pid.into()), Some("about it")));
    assert_eq!(message["fds"], json!(["seccompFd"]));
    assert_eq!(message["state"]["id"], bundle.id);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", filter.as_raw_fd())).unwrap();
    assert!(link.display().to_string().contains("seccomp"), "{link:?}");
    // The call waits for an answer; without a listener it fails.
    drop(filter);
    bundle.wait(pid);
    assert!(
        bundle.said().contains("Function not implemented") && bundle.said().ends_with("done\n"),
        "{}",
        bundle.said()
    );
}

fn id_maps() {
    let bundle = Bundle::new("id-maps", "stat -c '%u %g' /own/file /mapped/file; touch /own/new 2>&1");
    let data = bundle.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "").unwrap();
    std::os::unix::fs::chown(data.join("file"), Some(1000), Some(1000)).unwrap();
    bundle.change(|spec| {
        let map = json!([{ "containerID": 1000, "hostID": 2000, "size": 10 }, { "containerID": 0, "hostID": 0, "size": 1 }]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        let bind = |destination: &str, options: Value| {
            json!({ "destination": destination, "type": "bind", "source": data, "options": options })
        };
        mounts.push(bind("/own", json!(["bind"])));
        let mut mapped = bind("/mapped", json!(["bind", "idmap"]));
        mapped["uidMappings"] = map.clone();
        mapped["gidMappings"] = map;
        mounts.push(mapped);
    });
    let (code, text) = bundle.run();
    assert_eq!((code, text.as_str()), (Some(0), "1000 1000\n2000 2000\n"));
}

/// As Podman starts it for a user: as the root of a namespace, with mounts of its own.
fn in_user_namespace() {
    let bundle = Bundle::new(
        "rootless",
        "cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && echo null; ls -l /dev/zero | cut -c1",
    );
    bundle.change(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["type"] != "cgroup");
        // A group that is not mapped owns no terminals.
        let terminals = mounts.iter_mut().find(|mount| mount["type"] == "devpts").unwrap();
        terminals["options"].as_array_mut().unwrap().retain(|option| option != "gid=5");
    });
    let words = ["run", "--bundle", bundle.path().to_str().unwrap(), &bundle.id];
    let mut unshare = std::process::Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount"]).arg(called(&bundle));
    let output = unshare.args(bundle.runtime(&words).get_args()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert_eq!(String::from_utf8_lossy(&text), " 0 0 1\nnull\nc\n");
}

fn shared_pids() {
    let bundle = Bundle::new("shared-pids", "sleep 1000 & exec sleep 1000");
    bundle.change(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|one| one["type"] != "pid");
    });
    bundle.create(&[]);
    bundle.done(&["start", &bundle.id]);
    let pids = || -> Vec<i32> { serde_json::from_str(&bundle.done(&["ps", "--format", "json", &bundle.id])).unwrap() };
    // The shell has to come to its second program.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while pids().len() < 2 && std::time::Instant::now() < deadline {}
    let found = pids();
    assert_eq!(found.len(), 2);
    bundle.done(&["kill", &bundle.id, "KILL"]);
    found.into_iter().for_each(|pid| bundle.wait(pid));
    bundle.done(&["delete", &bundle.id]);
    assert!(bundle.groups().is_empty());
}
