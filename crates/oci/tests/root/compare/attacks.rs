//! Attacks that a bundle can carry, on this runtime and on runc: what came of each.

use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use super::{add_bind, pair};

/// What came of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came {
    /// There is no container.
    Refused,
    /// There is one, and nothing happened beyond it.
    Harmless,
    /// It reached what it should not.
    Harmed,
}
use Came::{Harmless, Refused};

/// An attack; `host` is a directory of the host with a file in which nothing may change.
struct Attack {
    name: &'static str,
    /// What the container's program does; what it must not reach it says.
    script: &'static str,
    /// Changes the root file system.
    image: fn(root: &Path, host: &Path),
    spec: fn(spec: &mut Value, host: &Path),
    /// What comes of it here, and with runc 1.5.2.
    came: (Came, Came),
}

pub(super) const SECRET: &str = "not for the container";

const ATTACKS: &[Attack] = &[
    Attack {
        name: "CVE-2019-19921",
        script: "true",
        image: |root, _| {
            std::fs::create_dir(root.join("real")).unwrap();
            link(root, "proc", Path::new("/real"));
        },
        spec: |_, _| {},
        came: (Refused, Refused),
    },
    Attack {
        name: "CVE-2023-27561",
        script: "true",
        image: |root, host| {
            std::fs::create_dir_all(host.join("proc/self")).unwrap();
            link(root, "proc", Path::new("/vol/proc"));
        },
        spec: |spec, host| {
            let volume = json!({ "destination": "/vol", "type": "bind", "source": host, "options": ["bind"] });
            spec["mounts"].as_array_mut().unwrap().insert(0, volume);
        },
        came: (Refused, Refused),
    },
    Attack {
        name: "CVE-2023-28642",
        script: "true",
        image: |root, _| {
            std::fs::create_dir(root.join("real")).unwrap();
            link(root, "sys", Path::new("/real"));
        },
        spec: |_, _| {},
        came: (Refused, Refused),
    },
    Attack {
        name: "CVE-2024-21626",
        script: "cat ../../../../../../../../../../../..$HOST/victim",
        image: |root, _| {
            (3..20)
                .for_each(|number| link(root, &format!("to{number}"), Path::new(&format!("/proc/self/fd/{number}"))));
        },
        spec: |spec, _| spec["process"]["cwd"] = json!("/to7"),
        came: (Refused, Refused),
    },
    Attack {
        name: "CVE-2025-31133",
        script: "cat /secret",
        image: |root, _| {
            std::fs::write(root.join("secret"), SECRET).unwrap();
            std::fs::create_dir_all(root.join("dev")).unwrap();
            link(root, "dev/null", Path::new("/secret"));
        },
        spec: |spec, _| {
            without_dev(spec);
            spec["linux"]["maskedPaths"].as_array_mut().unwrap().push(json!("/secret"));
        },
        came: (Harmless, Refused),
    },
    Attack {
        name: "CVE-2025-52881",
        script: "true",
        image: |_, _| {},
        spec: |spec, host| {
            spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_default_ttl": "17" });
            add_bind(spec, host.join("victim").to_str().unwrap(), "/proc/sys/net/ipv4/ip_default_ttl");
        },
        came: (Harmless, Refused),
    },
    Attack {
        name: "CVE-2026-41579",
        script: "true",
        image: |root, host| link(root, "dev", host),
        spec: |spec, _| without_dev(spec),
        came: (Harmless, Harmless),
    },
    Attack {
        name: "CVE-2026-41579, upwards",
        script: "true",
        image: |root, host| link(root, "dev", &upwards(host)),
        spec: |spec, _| without_dev(spec),
        came: (Harmless, Harmless),
    },
    Attack {
        name: "CVE-2026-88264",
        script: "true",
        image: |root, host| {
            std::fs::create_dir_all(root.join("dev")).unwrap();
            link(root, "dev/console", &upwards(&host.join("victim")));
        },
        spec: |spec, _| without_dev(spec),
        came: (Harmless, Harmless),
    },
    Attack {
        name: "CVE-2026-88265",
        script: "true",
        image: |root, host| {
            std::fs::create_dir_all(root.join("dev")).unwrap();
            ["null", "zero", "ptmx", "fd"].iter().for_each(|name| {
                link(root, &format!("dev/{name}"), &upwards(&host.join("victim")));
            });
        },
        spec: |spec, _| without_dev(spec),
        came: (Harmless, Harmless),
    },
    Attack {
        name: "CVE-2024-45310",
        script: "true",
        image: |root, host| link(&root.with_file_name("data"), "out", &upwards(host)),
        spec: |spec, _| {
            add_bind(spec, "@BUNDLE/data", "/vol");
            add_bind(spec, "@BUNDLE/data/inner", "/vol/out/made");
        },
        came: (Refused, Harmless),
    },
    Attack {
        name: "CVE-2019-16884",
        script: "true",
        image: |_, _| {},
        spec: |spec, host| add_bind(spec, host.to_str().unwrap(), "/proc"),
        came: (Harmless, Refused),
    },
    Attack {
        name: "CVE-2022-0811",
        script: "true",
        image: |_, _| {},
        spec: |spec, _| spec["linux"]["sysctl"] = json!({ "kernel.shm_rmid_forced": "1+kernel.core_pattern=|/x" }),
        came: (Refused, Refused),
    },
];

/// Puts a link in the place of a directory of an image.
fn link(root: &Path, name: &str, target: &Path) {
    let _ = std::fs::remove_dir_all(root.join(name)); // It need not be there.
    symlink(target, root.join(name)).unwrap();
}

/// A path that leads there also from deep inside of another tree.
pub(super) fn upwards(target: &Path) -> std::path::PathBuf {
    Path::new("../../../../../../../../../..").join(target.strip_prefix("/").unwrap())
}

pub(super) fn without_dev(spec: &mut Value) {
    let is_dev = |mount: &Value| mount["destination"].as_str().unwrap().starts_with("/dev");
    spec["mounts"].as_array_mut().unwrap().retain(|mount| !is_dev(mount));
}

/// Whether the host's directory is as it was.
pub(super) fn is_untouched(host: &Path) -> bool {
    let mut names: Vec<_> = host.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.retain(|name| name != "proc");
    let of_proc = host.join("proc").read_dir().map_or(1, Iterator::count);
    names == ["victim"] && of_proc == 1 && std::fs::read_to_string(host.join("victim")).unwrap() == SECRET
}

pub(super) fn all() {
    let mut all = Vec::new();
    for (number, Attack { name, script, image, spec, came }) in ATTACKS.iter().enumerate() {
        let host = tempfile::tempdir().unwrap();
        std::fs::write(host.path().join("victim"), SECRET).unwrap();
        let script = script.replace("$HOST", host.path().to_str().unwrap());
        let pair = pair(&format!("attack-{number}"), &script, |config| spec(config, host.path()));
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            image(&bundle.path().join("rootfs"), host.path());
            let (code, text) = bundle.run();
            match code {
                _ if text.contains(SECRET) || !is_untouched(host.path()) => Came::Harmed,
                Some(0) => Harmless,
                // A program that did not get what it wanted has run, too.
                Some(1) if text.contains("No such file") && !text.contains("container") => Harmless,
                _ => Refused,
            }
        });
        if (ours, theirs) != *came {
            all.push(format!("{name}: orlop {ours:?}, runc {theirs:?}"));
        }
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}
