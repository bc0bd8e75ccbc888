//! Docker Engine and Podman of Debian with this runtime: this program is the runtime when it is called `runc`.
//!
//! They are not installed: their packages lie over this machine's root, in namespaces without a way out that end with the test.
//! Only a control group of theirs is made on the host.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts the callers")]

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use testkit::debian;

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if words.first().map(Path::new).and_then(Path::file_name).is_some_and(|name| name == "runc") {
        return oci::main(words);
    }
    testkit::serial::main(
        &[("docker_runs_containers_with_it", docker), ("podman_runs_containers_with_it", podman)],
        missing(),
    )
}

fn missing() -> Option<String> {
    if !sys::rustix::process::geteuid().is_root() {
        return Some("root".to_owned());
    }
    debian::engines().err().map(|error| format!("Docker and Podman of Debian: {error:#}"))
}

/// Lays the packages over this machine's root, for this mount namespace alone, and goes on in that. They are copied: a layer
/// may not be within another.
const ENTER: &str = "set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /tmp
mkdir /tmp/upper /tmp/work /tmp/root
cp -a $1/. /tmp/upper
mount -t overlay overlay -o lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work /tmp/root
cd /tmp/root
for dir in run tmp var/lib; do mount -t tmpfs tmpfs $dir; done
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount --bind $2 mnt
exec chroot . /bin/bash /mnt/script";

/// What each of the callers is asked for. `$START`, `$RUN` and `$EXEC` are theirs; `tr` takes away what a terminal adds.
const WORK: &str = r#"
$RUN bb sh -c 'echo hello; exit 3'; echo "code $?"
$RUN bb nothing 2>/dev/null; echo "code $?"
$RUN bb /etc 2>/dev/null; echo "code $?"
printf 'word\n' | script -qec "$RUN -it bb sh -c 'tty; read x; echo got \$x; exit 6'" /dev/null | tr -d '\r' | grep -E 'pts|got'
$RUN -i bb cat < /mnt/word
$RUN --memory 32m --pids-limit 50 --cap-drop ALL --read-only --tmpfs /x --security-opt no-new-privileges -v /mnt:/v:ro bb \
    sh -c 'touch /y /v/y /x/y 2>&1 | grep -c "Read-only"; ls /x; grep -E "CapEff|NoNewPrivs" /proc/self/status | tr -d "\t"'
$START -d --name one bb sleep 1000 > /dev/null
$EXEC one sh -c 'echo in; exit 4'; echo "code $?"
script -qec "$EXEC -it one tty" /dev/null < /dev/null | grep -o '/dev/pts/[0-9]*'
$CALL pause one > /dev/null; $CALL inspect --format '{{.State.Status}}' one; $CALL unpause one > /dev/null
$CALL top one | grep -q 'sleep 1000' && echo listed
$CALL restart -t 1 one > /dev/null 2>&1; $EXEC one echo again
$CALL kill one > /dev/null; $CALL rm -f one > /dev/null; $CALL ps -aq
"#;

const SAID: &str = "hello
code 3
code 127
code 126
/dev/pts/0
got word
word
2
y
CapEff:0000000000000000
NoNewPrivs:1
in
code 4
/dev/pts/1
paused
listed
again
";

/// Runs a script in the Debian, with a busybox at `/mnt/bb.tar`; what it says.
fn lab(name: &str, script: &str) -> String {
    let root = debian::engines().unwrap();
    // Not below /tmp, which is another there.
    let scratch = tempfile::tempdir_in(testkit::cache::dir().unwrap()).unwrap();
    let file = |name: &str| scratch.path().join(name);
    std::fs::copy(std::env::current_exe().unwrap(), file("runc")).unwrap();
    std::fs::create_dir(file("busybox")).unwrap();
    testkit::image::busybox_root(&file("busybox")).unwrap();
    let tar = Command::new("tar").arg("-C").arg(file("busybox")).arg("-cf").arg(file("bb.tar")).arg(".").status();
    assert!(tar.unwrap().success());
    std::fs::write(file("word"), "word\n").unwrap();
    let group = format!("orlop-test-{name}-{}", std::process::id());
    let limits = "--ulimit nofile=1024:1024 --ulimit nproc=1000:1000 --network none";
    let head = format!("exec 2>/mnt/errors\nset -x\nGROUP=/{group}\nHOW='{limits} --cgroup-parent /{group}'\n");
    std::fs::write(file("script"), format!("{head}{script}")).unwrap();
    let mut enter = Command::new("unshare");
    enter.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]);
    let output = enter.arg(root).arg(scratch.path()).stdin(Stdio::null()).output().unwrap();
    let hierarchy = sys::cgroup::Hierarchy::whole(Path::new("/sys/fs/cgroup")).unwrap();
    let removed = hierarchy.group(&group).delete();
    let errors = std::fs::read_to_string(file("errors")).unwrap_or_default();
    let lines: Vec<&str> = errors.lines().collect();
    println!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
    println!("{}", String::from_utf8_lossy(&output.stderr));
    removed.unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn docker() {
    let start = "
mkdir /run/d
dockerd --data-root /run/d/data --exec-root /run/d/exec --pidfile /run/d/pid --host unix:///run/d/sock --bridge none \\
    --iptables=false --ip-masq=false --ip-forward=false --storage-driver vfs --exec-opt native.cgroupdriver=cgroupfs \\
    --add-runtime orlop=/mnt/runc --default-runtime orlop --oom-score-adjust 0 > /run/d/log 2>&1 < /dev/null &
export DOCKER_HOST=unix:///run/d/sock
# It has no other way to say that it is ready.
for try in $(seq 600); do docker version > /dev/null 2>&1 && break; sleep 0.1; done
docker import /mnt/bb.tar bb > /dev/null
CALL=docker; START=\"docker run $HOW\"; RUN=\"$START --rm\"; EXEC='docker exec'
";
    let said = lab("docker", &format!("{start}{WORK}\nkill %1; wait %1; tail -20 /run/d/log >&2"));
    assert_eq!(said, SAID);
}

fn podman() {
    let start = "
CALL='podman --runtime /mnt/runc --cgroup-manager cgroupfs --events-backend file --storage-driver vfs'
START=\"$CALL run $HOW\"; RUN=\"$START --rm\"; EXEC=\"$CALL exec\"
$CALL import /mnt/bb.tar bb > /dev/null 2>&1
";
    let said = lab("podman", &format!("{start}{WORK}"));
    assert_eq!(said, SAID);
}
