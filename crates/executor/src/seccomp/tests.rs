use super::*;
use crate::oci::{Seccomp, Syscall, SyscallArg};

/// What the kernel's interpreter would answer (net/core/filter.c, `___bpf_prog_run` for classic programs).
pub(super) fn run(program: &[u8], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(architecture.to_ne_bytes());
    data.extend([0; 8]);
    arguments.iter().for_each(|argument| data.extend(argument.to_ne_bytes()));
    let (mut at, mut accumulator) = (0, 0_u32);
    loop {
        let raw = &program[at * 8..at * 8 + 8];
        let code = u16::from_ne_bytes([raw[0], raw[1]]);
        let constant = u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]);
        at += 1;
        let jump = |holds: bool| usize::from(if holds { raw[2] } else { raw[3] });
        match code {
            0x20 => {
                let from = constant as usize;
                accumulator = u32::from_ne_bytes(data[from..from + 4].try_into().unwrap());
            }
            0x54 => accumulator &= constant,
            0x05 => at += constant as usize,
            0x15 => at += jump(accumulator == constant),
            0x25 => at += jump(accumulator > constant),
            0x35 => at += jump(accumulator >= constant),
            0x06 => return constant,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn profile(syscalls: Vec<Syscall>) -> Seccomp {
    Seccomp { default_action: "SCMP_ACT_ERRNO".into(), syscalls, ..Seccomp::default() }
}

fn rule(name: &str, args: &[(u32, &str, u64, u64)]) -> Syscall {
    let arg = |(index, op, value, value_two): &(u32, &str, u64, u64)| SyscallArg {
        index: *index,
        value: *value,
        value_two: *value_two,
        op: format!("SCMP_CMP_{op}"),
    };
    let args = args.iter().map(arg).collect();
    Syscall { names: vec![name.into()], action: "SCMP_ACT_ALLOW".into(), args, ..Syscall::default() }
}

pub(super) fn compiled(profile: &Seccomp) -> Vec<u8> {
    compile(profile).unwrap().unwrap().program.0
}

fn number(name: &str) -> u32 {
    NATIVE.calls.numbers.iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn tables_are_sorted_by_name() {
    for table in [numbers::X86_64, numbers::X86, numbers::X32, numbers::AARCH64] {
        assert!(table.is_sorted_by_key(|(name, _)| *name));
    }
}

#[test]
fn the_default_profile_decides_every_known_call_as_written() {
    for bounding in [vec![], vec!["CAP_SYS_ADMIN".to_owned(), "CAP_BPF".to_owned()]] {
        let profile = default_profile(&bounding);
        let program = compiled(&profile);
        assert!(program.len() / 8 < 4096, "the kernel takes 4096 instructions");
        for (name, number) in NATIVE.calls.numbers {
            let rules: Vec<&Syscall> =
                profile.syscalls.iter().filter(|rule| rule.names.iter().any(|n| n == name)).collect();
            if rules.iter().any(|rule| !rule.args.is_empty()) {
                continue;
            }
            let want = match rules.first() {
                Some(rule) if rule.action == "SCMP_ACT_ALLOW" => ALLOW,
                Some(rule) => ERRNO | rule.errno_ret.unwrap_or(EPERM),
                None if *number > self::number("removexattrat") => ERRNO | ENOSYS,
                None => ERRNO | EPERM,
            };
            assert_eq!(run(&program, NATIVE.audit, *number, [0; 6]), want, "{name}");
        }
    }
}

#[test]
fn arguments_of_the_default_profile() {
    let program = compiled(&default_profile(&[]));
    let answer = |name: &str, first: u64| run(&program, NATIVE.audit, number(name), [first, 0, 0, 0, 0, 0]);
    assert_eq!(answer("clone", 0x0120_0011), ALLOW, "a fork");
    assert_eq!(answer("clone", 0x1000_0000), ERRNO | EPERM, "a user namespace");
    assert_eq!(answer("clone3", 0), ERRNO | ENOSYS);
    assert_eq!(answer("socket", 2), ALLOW);
    assert_eq!(answer("socket", 38), ERRNO | EPERM, "AF_ALG");
    assert_eq!(answer("socket", 40), ERRNO | EPERM, "AF_VSOCK");
    assert_eq!(answer("socket", 1 << 32 | 2), ERRNO | EPERM);
    assert_eq!(answer("personality", 0xffff_ffff), ALLOW);
    assert_eq!(answer("personality", 0x40_0000), ERRNO | EPERM);
}

#[test]
fn foreign_architectures_are_killed() {
    let program = compiled(&profile(vec![rule("read", &[])]));
    assert_eq!(run(&program, 0x28, number("read"), [0; 6]), KILL_THREAD);
    assert_eq!(run(&program, NATIVE.audit, number("read"), [0; 6]), ALLOW);
}

#[test]
fn comparisons_are_of_64_bits() {
    let big = 0x1_0000_0005_u64;
    let cases: [(&str, u64, &[u64], &[u64]); 6] = [
        ("EQ", 0, &[big], &[5, big + 1, big << 1]),
        ("NE", 0, &[5, 0], &[big]),
        ("LT", 0, &[0, big - 1, 0xffff_ffff], &[big, big + 1, u64::MAX]),
        ("LE", 0, &[0, big], &[big + 1, 0x2_0000_0000]),
        ("GT", 0, &[big + 1, u64::MAX, 0x2_0000_0000], &[big, 0, 0xffff_ffff]),
        ("GE", 0, &[big, u64::MAX], &[big - 1, 5, 6]),
    ];
    for (op, two, holds, fails) in cases {
        let program = compiled(&profile(vec![rule("read", &[(2, op, big, two)])]));
        let answer = |value| run(&program, NATIVE.audit, number("read"), [0, 0, value, 0, 0, 0]);
        holds.iter().for_each(|value| assert_eq!(answer(*value), ALLOW, "{op} {value:#x}"));
        fails.iter().for_each(|value| assert_eq!(answer(*value), ERRNO | EPERM, "{op} {value:#x}"));
    }
}

/// As the kernel reads them there: -1 of a profile is the -1 of the program.
#[test]
fn comparisons_of_32_bits() {
    let all = |op, value, two| Seccomp {
        architectures: ["X86", "X32"].map(|name| format!("SCMP_ARCH_{name}")).into(),
        ..profile(vec![rule("personality", &[(0, op, value, two)])])
    };
    let of = |numbers: &[(&str, u32)]| numbers.iter().find(|(name, _)| *name == "personality").unwrap().1;
    let (x86, x32) = (of(numbers::X86), of(numbers::X32) | X32_BIT);
    /// A comparison with two values, what it holds for, and what not.
    type Case = (&'static str, u64, u64, &'static [u64], &'static [u64]);
    let cases: [Case; 5] = [
        ("EQ", u64::MAX, 0, &[0xffff_ffff], &[0xffff_fffe, 0]),
        ("NE", 0xff_0000_0008, 0, &[7, 9], &[8]),
        ("MASKED_EQ", 0xffff_ffff_0000_00ff, 8, &[8, 0x108], &[9]),
        ("GT", 0x7fff_ffff, 0, &[0x8000_0000, 0xffff_ffff], &[0x7fff_ffff, 0]),
        ("LE", 0x1_0000_0005, 0, &[0, 5], &[6, 0xffff_ffff]),
    ];
    for (op, value, two, holds, fails) in cases {
        let program = compiled(&all(op, value, two));
        for (audit, number) in [(X86.audit, x86), (X86_64.audit, x32)] {
            let answer = |value| run(&program, audit, number, [value, 0, 0, 0, 0, 0]);
            holds.iter().for_each(|value| assert_eq!(answer(*value), ALLOW, "{op} {value:#x}"));
            fails.iter().for_each(|value| assert_eq!(answer(*value), ERRNO | EPERM, "{op} {value:#x}"));
        }
        // What x32 has above them does not count.
        let answer = run(&program, X86_64.audit, x32, [holds[0] | 1 << 40, 0, 0, 0, 0, 0]);
        assert_eq!(answer, ALLOW, "{op}");
    }
}

/// Who is kept from `socket` and `shmget` cannot have them by `socketcall` and `ipc`.
#[test]
fn calls_that_carry_others() {
    let refuse = |name: &str, args| Syscall { action: "SCMP_ACT_ERRNO".into(), ..rule(name, args) };
    let refused = Seccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        architectures: vec!["SCMP_ARCH_X86".into()],
        ..profile(vec![refuse("socket", &[(0, "EQ", 40, 0)]), refuse("shmget", &[]), refuse("send", &[])])
    };
    let program = compiled(&refused);
    let answer = |number, first| run(&program, X86.audit, number, [first, 7, 0, 0, 0, 0]);
    let (socketcall, ipc) = (102, 117);
    assert_eq!((answer(359, 40), answer(359, 2)), (ERRNO | EPERM, ALLOW), "socket itself");
    assert_eq!([1, 2, 9].map(|call| answer(socketcall, call)), [ERRNO | EPERM, ALLOW, ERRNO | EPERM]);
    assert_eq!([23, 24, 1 << 16 | 23].map(|call| answer(ipc, call)), [ERRNO | EPERM, ALLOW, ERRNO | EPERM]);
    // The whole call comes before what it carries.
    let all = profile(vec![rule("socketcall", &[]), rule("socket", &[])]);
    let program = compiled(&Seccomp { architectures: vec!["SCMP_ARCH_X86".into()], ..all });
    assert_eq!(run(&program, X86.audit, socketcall, [2, 0, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn conditions_on_different_arguments_hold_together_and_rules_are_alternatives() {
    let both = rule("read", &[(0, "EQ", 1, 0), (1, "MASKED_EQ", 0xff00, 0x1200)]);
    let program = compiled(&profile(vec![both, rule("read", &[(0, "EQ", 9, 0)])]));
    let answer = |a, b| run(&program, NATIVE.audit, number("read"), [a, b, 0, 0, 0, 0]);
    assert_eq!(answer(1, 0x12ff), ALLOW);
    assert_eq!(answer(1, 0x13ff), ERRNO | EPERM);
    assert_eq!(answer(2, 0x12ff), ERRNO | EPERM);
    assert_eq!(answer(9, 0), ALLOW);
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    let notify = Seccomp { default_action: "SCMP_ACT_NOTIFY".into(), ..Seccomp::default() };
    assert!(compile(&notify).is_err());
    for name in ["sendmsg", "write"] {
        let rule = Syscall { names: vec![name.into()], action: "SCMP_ACT_NOTIFY".into(), ..Syscall::default() };
        let notify = Seccomp { listener_path: "/run/x".into(), syscalls: vec![rule], ..Seccomp::default() };
        assert!(notifies(&notify).unwrap_err().to_string().contains(name));
    }
    assert!(compile(&profile(vec![rule("read", &[(7, "EQ", 0, 0)])])).is_err());
    let flag = Seccomp { flags: vec!["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV".into()], ..profile(vec![]) };
    assert!(compile(&flag).is_err());
}
