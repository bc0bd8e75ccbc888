//! Profiles as libseccomp compiles them, which is what other runtimes load.

#![allow(clippy::disallowed_methods, reason = "it starts a compiler")]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use super::tests::{compiled, run};
use super::*;
use crate::oci::{Seccomp, SyscallArg};

const SOURCE: &str = include_str!("reference.c");

/// The filter, and the names that this libseccomp does not know.
fn reference(profile: &Seccomp) -> Result<(Vec<u8>, BTreeSet<String>), String> {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("reference.c"), dir.path().join("reference"));
    std::fs::write(&source, SOURCE).unwrap();
    let made = Command::new("cc").arg(&source).arg("-o").arg(&program).arg("-lseccomp").output();
    let made = made.map_err(|error| format!("cc ({error})"))?;
    if !made.status.success() {
        return Err(format!("libseccomp's headers ({})", String::from_utf8_lossy(&made.stderr).trim()));
    }
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    child.stdin.take().unwrap().write_all(lines(profile).as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    Ok((output.stdout, String::from_utf8(output.stderr).unwrap().lines().map(str::to_owned).collect()))
}

fn lines(profile: &Seccomp) -> String {
    let own = action(&profile.default_action, profile.default_errno_ret).unwrap();
    let mut text = format!("default {own}\n");
    for architecture in &profile.architectures {
        text += &format!("arch {}\n", architecture.trim_start_matches("SCMP_ARCH_").to_lowercase());
    }
    for rule in &profile.syscalls {
        let verdict = action(&rule.action, rule.errno_ret).unwrap();
        let conditions: String = rule.args.iter().map(condition).collect();
        // What a rule says that all calls meet anyway is no rule to libseccomp.
        for name in rule.names.iter().filter(|_| verdict != own) {
            text += &format!("rule {verdict} {name} {}{conditions}\n", rule.args.len());
        }
    }
    text
}

fn condition(arg: &SyscallArg) -> String {
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let at = operators.iter().position(|operator| arg.op.strip_prefix("SCMP_CMP_") == Some(operator)).unwrap();
    format!(" {} {} {} {}", arg.index, at + 1, arg.value, arg.value_two)
}

/// Values on both sides of what the rules ask for.
fn values(profile: &Seccomp, name: &str) -> BTreeSet<u64> {
    let rules = profile.syscalls.iter().filter(|rule| rule.names.iter().any(|known| known == name));
    let asked = rules.flat_map(|rule| &rule.args).flat_map(|arg| [arg.value, arg.value_two]);
    let around = asked.flat_map(|value| [value, value.wrapping_add(1), value.wrapping_sub(1), value | 1 << 32, !value]);
    around.chain([0, 1, u64::MAX]).collect()
}

/// A way to make calls: its name, the architecture's number, the calls, and the bit of their numbers.
const WAYS: [(&str, u32, Calls, u32); 3] =
    [("x86-64", X86_64.audit, X86_64.calls, 0), ("x86", X86.audit, X86.calls, 0), ("x32", X86_64.audit, X32, X32_BIT)];

/// Which of a way's calls libseccomp has of other ways alone.
const NOT_THERE: (&str, &str) = ("x32", "map_shadow_stack");

/// How many calls both filters were asked for, and for which they answer differently.
fn compare(profile: &Seccomp, theirs: &[u8], unknown: &BTreeSet<String>) -> (usize, Vec<String>) {
    let ours = compiled(profile);
    let (mut asked, mut differences) = (0, Vec::new());
    for (way, audit, calls, bit) in WAYS {
        let known = |name: &str| !unknown.contains(name) && (way, name) != NOT_THERE;
        for (name, number) in calls.numbers.iter().filter(|(name, _)| known(name)) {
            // What carries calls is told by their numbers which.
            let carries = ["socketcall", "ipc"].contains(name);
            let values = if carries { (0..30).collect() } else { values(profile, name) };
            for value in values {
                let value = if calls.width == Width::Narrow { value & 0xffff_ffff } else { value };
                let answer = |program| run(program, audit, bit | number, [value; 6]);
                let [own, other] = [answer(&ours), answer(theirs)];
                asked += 1;
                // A call that came after the profile is one that the kernel has not got.
                let is_newer = own == ERRNO | ENOSYS && other == ERRNO | EPERM;
                if own != other && !is_newer {
                    differences.push(format!("{way} {name}({value:#x}): {own:#x}, libseccomp {other:#x}"));
                }
            }
        }
    }
    (asked, differences)
}

#[cfg(target_arch = "x86_64")]
#[test]
fn profiles_are_what_libseccomp_makes_of_them() {
    let default = [vec![], vec!["CAP_SYS_ADMIN".to_owned()]].map(|bounding| default_profile(&bounding));
    for profile in default.into_iter().chain([refusals()]) {
        let (theirs, unknown) = match reference(&profile) {
            Ok(made) => made,
            Err(missing) => return println!("skipped: needs {missing}"),
        };
        let (asked, differences) = compare(&profile, &theirs, &unknown);
        assert!(asked > 1000, "{asked}");
        assert_eq!(differences, Vec::<String>::new());
    }
}

/// Calls that are refused for their arguments, and some that others carry.
fn refusals() -> Seccomp {
    let refuse = |name: &str, arg: Option<(u32, &str, u64, u64)>| {
        let arg = arg.map(|(index, op, value, value_two)| SyscallArg {
            index,
            op: format!("SCMP_CMP_{op}"),
            value,
            value_two,
        });
        let (names, args) = (vec![name.to_owned()], arg.into_iter().collect());
        crate::oci::Syscall { names, args, action: "SCMP_ACT_ERRNO".to_owned(), errno_ret: Some(5) }
    };
    Seccomp {
        default_action: "SCMP_ACT_ALLOW".to_owned(),
        architectures: ["X86_64", "X86", "X32"].map(|name| format!("SCMP_ARCH_{name}")).into(),
        syscalls: vec![
            refuse("personality", Some((0, "EQ", u64::MAX, 0))),
            refuse("umask", Some((0, "MASKED_EQ", 0xffff_ffff_0000_0007, 2))),
            refuse("alarm", Some((0, "GT", 0x7fff_ffff, 0))),
            refuse("nice", Some((0, "LE", 0x1_0000_0005, 0))),
            refuse("dup", Some((0, "NE", 3, 0))),
            refuse("socket", Some((0, "EQ", 40, 0))),
            refuse("bind", None),
            refuse("shmget", None),
            refuse("mkdir", None),
        ],
        ..Seccomp::default()
    }
}
