//! The command line and what runtimes tell of themselves.

use std::collections::BTreeSet;

use serde_json::Value;

use super::runc;
use crate::bundle::Bundle;

/// A flag in a help text, and whether a value follows it.
#[derive(Debug, PartialEq, Eq)]
struct Flag {
    name: String,
    value: bool,
}

/// The flags of lines such as `   --bundle value, -b value  path to …`.
fn flags(help: &str) -> Vec<Flag> {
    let options = help.lines().filter_map(|line| line.strip_prefix("   -"));
    let named = options.filter_map(|line| line.split("  ").next()).map(|names| format!("-{names}"));
    let all: Vec<Flag> = named.flat_map(|names| names.split(", ").map(flag).collect::<Vec<_>>()).collect();
    all.into_iter().filter(|flag| !["--help", "-h", "--version", "-v"].contains(&flag.name.as_str())).collect()
}

fn flag(text: &str) -> Flag {
    let (name, value) = text.split_once(' ').map_or((text, false), |(name, _)| (name, true));
    Flag { name: name.to_owned(), value }
}

fn help(bundle: &Bundle, command: Option<&str>) -> String {
    let output = bundle.plainly(&command.into_iter().chain(["--help"]).collect::<Vec<_>>());
    String::from_utf8(output.stdout).unwrap()
}

/// Every command of runc's, and every flag that its help has, is known: what follows may be wrong, but not the flag.
pub(super) fn all() {
    let [ours, theirs] = [Bundle::new("flags", ""), Bundle::of(runc(), "runc", "flags-runc", "")];
    let text = help(&theirs, None);
    let commands = text.split_once("COMMANDS:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let commands: Vec<&str> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() > 15, "{commands:?}");
    let (mut asked, mut unknown) = (0, Vec::new());
    for command in std::iter::once(None).chain(commands.into_iter().filter(|name| *name != "help,").map(Some)) {
        for flag in flags(&help(&theirs, command)) {
            asked += 1;
            let value = flag.value.then_some("value");
            let words: Vec<&str> = command.into_iter().chain([flag.name.as_str()]).chain(value).collect();
            let said = String::from_utf8(ours.plainly(&words).stderr).unwrap();
            if ["unexpected argument", "unrecognized subcommand"].iter().any(|words| said.contains(words)) {
                unknown.push(words.join(" "));
            }
        }
    }
    assert!(asked > 100, "{asked}");
    assert_eq!(unknown, Vec::<String>::new());
    let said = String::from_utf8(ours.plainly(&["create", "--nothing"]).stderr).unwrap();
    assert!(said.contains("unexpected argument"), "{said}");
}

/// What runc tells of itself and this runtime does not, by where it stands, up to the first word in which it differs.
const NOT_HERE: &[&str] = &[
    // No container's calls are of these architectures on a machine that this program runs on.
    "linux.seccomp.archs ",
    // A file system's own, or without effect since Linux 5.15; no mount is changed after it was made.
    "mountOptions iversion",
    "mountOptions noiversion",
    "mountOptions mand",
    "mountOptions remount",
    // These are refused.
    "linux.intelRdt",
    "linux.memoryPolicy",
    "linux.netDevices",
    "annotations.",
    // Neither means anything here.
    "potentiallyUnsafeConfigAnnotations bundle",
    "potentiallyUnsafeConfigAnnotations org.criu.config",
];

/// What this runtime tells of itself and runc does not.
const HERE_ALONE: &[&str] = &[
    "annotations.org.opencontainers.runc.checkpoint.enabled",
    "linux.intelRdt.enabled false",
    "linux.netDevices.enabled false",
    // runc's libseccomp is older than the flag and the option.
    "linux.seccomp.supportedFlags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
    "mountOptions idmap",
    "mountOptions ridmap",
];

/// The values of a document, each behind the names that lead to it.
fn values(document: &Value, place: &str, all: &mut BTreeSet<String>) {
    match document {
        Value::Object(fields) => {
            for (name, value) in fields {
                let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
                values(value, &place, all);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| values(item, place, all)),
        Value::String(text) => drop(all.insert(format!("{place} {text}"))),
        other => drop(all.insert(format!("{place} {other}"))),
    }
}

pub(super) fn features() {
    let pair = [Bundle::new("features", ""), Bundle::of(runc(), "runc", "features-runc", "")];
    let [ours, theirs] = pair.map(|bundle| {
        let mut all = BTreeSet::new();
        values(&serde_json::from_str(&bundle.done(&["features"])).unwrap(), "", &mut all);
        all
    });
    let but = |some: &BTreeSet<String>, others: &BTreeSet<String>, known: &[&str]| -> Vec<String> {
        let differ = some.difference(others).filter(|value| !known.iter().any(|prefix| value.starts_with(prefix)));
        differ.cloned().collect()
    };
    assert_eq!(but(&theirs, &ours, NOT_HERE), Vec::<String>::new(), "runc alone");
    assert_eq!(but(&ours, &theirs, HERE_ALONE), Vec::<String>::new(), "orlop alone");
}
