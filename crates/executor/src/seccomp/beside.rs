//! The default profile as libseccomp compiles it, which is what other runtimes load.

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

#[test]
fn the_default_profile_is_what_libseccomp_makes_of_it() {
    for bounding in [vec![], vec!["CAP_SYS_ADMIN".to_owned()]] {
        let profile = default_profile(&bounding);
        let (theirs, unknown) = match reference(&profile) {
            Ok(made) => made,
            Err(missing) => return println!("skipped: needs {missing}"),
        };
        let ours = compiled(&profile);
        let known = NATIVE.numbers.iter().filter(|(name, _)| !unknown.contains(*name));
        let (mut asked, mut differences) = (0, Vec::new());
        for (name, number) in known {
            for value in values(&profile, name) {
                let answer = |program| run(program, NATIVE.audit, *number, [value; 6]);
                let [own, other] = [answer(&ours), answer(&theirs)];
                asked += 1;
                // A call that came after the profile is one that the kernel has not got.
                let is_newer = own == ERRNO | ENOSYS && other == ERRNO | EPERM;
                if own != other && !is_newer {
                    differences.push(format!("{name}({value:#x}): {own:#x}, libseccomp {other:#x}"));
                }
            }
        }
        assert!(asked > 1000, "{asked}");
        assert_eq!(differences, Vec::<String>::new());
    }
}
