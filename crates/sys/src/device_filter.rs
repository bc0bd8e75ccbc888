//! The device program of a control group, version 2: rules compiled to eBPF and attached (bpf(2), `BPF_CGROUP_DEVICE`).

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::cgroup::DeviceRule;
use crate::error::{Context as _, Error, Result};

/// `struct bpf_insn`: opcode, registers, offset, immediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn bytes(self) -> [u8; 8] {
        let (offset, immediate) = (self.offset.to_ne_bytes(), self.immediate.to_ne_bytes());
        [self.code, self.registers, offset[0], offset[1], immediate[0], immediate[1], immediate[2], immediate[3]]
    }
}

// Opcodes of linux/bpf.h, spelled as class | operation | source.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xb4;
const COPY: u8 = 0xbc;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

// Of linux/bpf.h, enum bpf_cmd (`PROG_OPEN` is BPF_PROG_GET_FD_BY_ID), bpf_prog_type and bpf_attach_type.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_OPEN: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

/// The program: r2 = kind, r3 = access, r4 = major, r5 = minor; the last rule that matches decides, nothing is allowed
/// without one. `struct bpf_cgroup_dev_ctx` holds kind and access in one word, then major and minor.
fn compile(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(COPY, 3, 2, 0, 0),
        op(AND, 2, 0, 0, 0xffff),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(rule));
        // The kernel refuses a program with parts that nothing leads to.
        if matches_all(rule) {
            return program;
        }
    }
    program.extend([op(MOVE, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    program
}

/// Whether no request passes a rule by.
fn matches_all(rule: &DeviceRule) -> bool {
    let any_access = matches!(access_bits(rule), 0 | 7);
    !matches!(rule.kind, 'b' | 'c') && any_access && rule.major.is_none() && rule.minor.is_none()
}

fn access_bits(rule: &DeviceRule) -> i32 {
    rule.access.chars().fold(0, |bits, one| {
        bits | match one {
            'm' => 1,
            'r' => 2,
            'w' => 4,
            _ => 0,
        }
    })
}

fn compile_rule(rule: &DeviceRule) -> Vec<Instruction> {
    let access = access_bits(rule);
    let mut tests = Vec::new();
    match rule.kind {
        'b' => tests.push(op(JUMP_NOT_EQUAL, 2, 0, 0, 1)),
        'c' => tests.push(op(JUMP_NOT_EQUAL, 2, 0, 0, 2)),
        _ => {}
    }
    if access != 7 && access != 0 {
        // All requested accesses have to be among those of the rule.
        tests.extend([op(COPY, 1, 3, 0, 0), op(AND, 1, 0, 0, access), op(JUMP_NOT_EQUAL_REGISTER, 1, 3, 0, 0)]);
    }
    for (register, number) in [(4, rule.major), (5, rule.minor)] {
        if let Some(number) = number {
            tests.push(op(JUMP_NOT_EQUAL, register, 0, 0, number.cast_signed()));
        }
    }
    let verdict = [op(MOVE, 0, 0, 0, rule.allow.into()), op(EXIT, 0, 0, 0, 0)];
    let length = tests.len() + verdict.len();
    for (index, test) in tests.iter_mut().enumerate() {
        if matches!(test.code, JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER) {
            test.offset = i16::try_from(length - index - 1).unwrap_or(0);
        }
    }
    tests.into_iter().chain(verdict).collect()
}

#[repr(C)]
#[derive(Default)]
struct LoadArguments {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachArguments {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryArguments {
    target: u32,
    kind: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Default)]
struct OpenArguments {
    id: u32,
    next_id: u32,
    flags: u32,
}

/// What the kernel allows on one group (`BPF_CGROUP_MAX_PROGS`).
const PROGRAMS_MAX: usize = 64;

/// Attaches the program for `rules` to the group at `dir`, in place of those that it has; it lives as long as the group.
pub(crate) fn attach(dir: &Path, rules: &[DeviceRule]) -> Result<()> {
    let program = load(&compile(rules))?;
    let group = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during("open", dir.display())?;
    let earlier = attached(&group)?;
    // All programs of a group have to allow a device: between these calls more is forbidden, never more allowed.
    bpf(PROG_ATTACH, &mut placed(&group, &program, ALLOW_MULTI), "attach")?;
    earlier.iter().try_for_each(|old| bpf(PROG_DETACH, &mut placed(&group, old, 0), "detach").map(drop))
}

fn number(fd: &OwnedFd) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(0)
}

fn placed(group: &OwnedFd, program: &OwnedFd, flags: u32) -> AttachArguments {
    AttachArguments { target: number(group), program: number(program), kind: ATTACH_CGROUP_DEVICE, flags }
}

/// The device programs of the group itself.
fn attached(group: &OwnedFd) -> Result<Vec<OwnedFd>> {
    let mut ids = [0u32; PROGRAMS_MAX];
    let mut query = QueryArguments {
        target: number(group),
        kind: ATTACH_CGROUP_DEVICE,
        ids: ids.as_mut_ptr() as u64,
        count: u32::try_from(ids.len()).unwrap_or(0),
        ..QueryArguments::default()
    };
    bpf(PROG_QUERY, &mut query, "list")?;
    let found = ids.iter().take(usize::try_from(query.count).unwrap_or(0));
    found
        .map(|id| bpf(PROG_OPEN, &mut OpenArguments { id: *id, ..OpenArguments::default() }, "open").map(own))
        .collect()
}

fn load(program: &[Instruction]) -> Result<OwnedFd> {
    let bytes: Vec<u8> = program.iter().flat_map(|instruction| instruction.bytes()).collect();
    let mut arguments = LoadArguments {
        kind: TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).unwrap_or(0),
        instructions: bytes.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadArguments::default()
    };
    bpf(PROG_LOAD, &mut arguments, "load").map(own)
}

/// The descriptor that `PROG_LOAD` or `PROG_OPEN` has returned.
fn own(fd: libc::c_int) -> OwnedFd {
    // SAFETY: both callers pass what the kernel has just made for them; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn bpf<T>(command: libc::c_int, arguments: &mut T, subject: &str) -> Result<libc::c_int> {
    // SAFETY: `arguments` is one of the structs above with the length that is passed, and writable; what it points to
    // outlives the call and is as long as it says.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(arguments), size_of::<T>()) };
    if result >= 0 {
        return Ok(libc::c_int::try_from(result).unwrap_or(-1));
    }
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    Err(Error { call: "bpf", subject: format!("{subject} a device program"), errno })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program on one request; kinds 1 block, 2 character; access bits m 1, r 2, w 4.
    fn decide(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind | access << 16, major, minor];
        let mut registers = [0u32; 11];
        let mut at = 0;
        loop {
            let now = program[at];
            let (to, from) = (usize::from(now.registers & 15), usize::from(now.registers >> 4));
            let immediate = now.immediate.cast_unsigned();
            at += 1;
            match now.code {
                LOAD_WORD => registers[to] = context[usize::try_from(now.offset).unwrap() / 4],
                COPY => registers[to] = registers[from],
                MOVE => registers[to] = immediate,
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_NOT_EQUAL if registers[to] != immediate => at += usize::try_from(now.offset).unwrap(),
                JUMP_NOT_EQUAL_REGISTER if registers[to] != registers[from] => {
                    at += usize::try_from(now.offset).unwrap()
                }
                EXIT => return registers[0] == 1,
                _ => {}
            }
        }
    }

    fn rule(allow: bool, kind: char, major: Option<u32>, minor: Option<u32>, access: &str) -> DeviceRule {
        DeviceRule { allow, kind, major, minor, access: access.into() }
    }

    #[test]
    fn nothing_comes_after_a_rule_that_matches_all() {
        let everything = rule(true, 'a', None, None, "rwm");
        let one = rule(false, 'c', Some(1), Some(3), "rwm");
        let exits = |rules: &[DeviceRule]| compile(rules).iter().filter(|one| one.code == EXIT).count();
        assert_eq!((exits(&[one.clone(), everything.clone()]), exits(&[everything, one])), (1, 2));
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let program = compile(&[
            rule(false, 'a', None, None, "rwm"),
            rule(true, 'c', None, None, "m"),
            rule(true, 'c', Some(1), Some(3), "rwm"),
            rule(true, 'c', Some(5), None, "r"),
        ]);
        assert!(decide(&program, 2, 6, 1, 3), "/dev/null for reading and writing");
        assert!(!decide(&program, 1, 2, 8, 0), "no disk");
        assert!(decide(&program, 2, 1, 10, 200), "mknod of any character device");
        assert!(decide(&program, 2, 2, 5, 9));
        assert!(!decide(&program, 2, 6, 5, 9), "writing is not among what the rule allows");
    }
}
