//! System call filters: the specification's profile compiled to classic BPF.
//!
//! ```text
//! architecture? ─► number: binary search over ranges of equal verdicts ─► arguments, where a rule has them ─► verdict
//! ```
//! A call costs about nine instructions whatever the profile's length.

mod assembler;
mod carried;
mod numbers;
mod profile;

use std::collections::BTreeMap;

pub use profile::default_profile;

use self::assembler::{Assembler, Position};
use self::carried::Carrier;
use crate::oci;
use crate::plan::{PlanError, SeccompPlan};
use crate::wire::Bytes;

// Of linux/seccomp.h.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const USER_NOTIF: u32 = 0x7fc0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

const ENOSYS: u32 = 38;
const EPERM: u32 = 1;
/// The kernel takes no larger one (`MAX_ERRNO`).
const ERRNO_MAX: u32 = 4095;
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`.
const WAIT_KILLABLE: u32 = 32;
/// `__X32_SYSCALL_BIT`.
const X32_BIT: u32 = 0x4000_0000;

/// Compiles a profile; `None` when it allows everything.
///
/// # Errors
/// Unknown actions, architectures, operators or flags. System calls that this build does not know are left out, as the
/// specification's implementations do: a profile may be newer than they are.
pub fn compile(profile: &oci::Seccomp) -> Result<Option<SeccompPlan>, PlanError> {
    let notifies = notifies(profile)?;
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    if default == ALLOW && profile.syscalls.is_empty() {
        return Ok(None);
    }
    let mut program = Assembler::default();
    let foreign = program.verdict(KILL_THREAD);
    let mut next = foreign;
    for architecture in architectures(profile)?.iter().rev() {
        let body = architecture.body(profile, default, &mut program)?;
        next = program.if_equal(architecture.audit, body, next);
    }
    program.load(ARCHITECTURE_OFFSET);
    let (program, flags) = (Bytes(program.finish()), flags(&profile.flags)?);
    if flags & WAIT_KILLABLE != 0 && !notifies {
        return Err(PlanError::Seccomp(
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is about SCMP_ACT_NOTIFY alone".to_owned(),
        ));
    }
    Ok(Some(SeccompPlan { program, flags, notifies }))
}

/// Whether calls are reported to a listener.
fn notifies(profile: &oci::Seccomp) -> Result<bool, PlanError> {
    const NOTIFY: &str = "SCMP_ACT_NOTIFY";
    if profile.default_action == NOTIFY {
        return Err(PlanError::Seccomp(format!("{NOTIFY} as the default would stop the program before it begins")));
    }
    let mut reported = profile.syscalls.iter().filter(|rule| rule.action == NOTIFY).peekable();
    let notifies = reported.peek().is_some();
    if notifies && profile.listener_path.is_empty() {
        return Err(PlanError::Seccomp(format!("{NOTIFY} needs a listenerPath")));
    }
    // With the filter in force the descriptor for the listener goes out by the one, and the launch's last words by the other.
    let early = |name: &&String| ["sendmsg", "write"].contains(&name.as_str());
    if let Some(name) = reported.flat_map(|rule| &rule.names).find(early) {
        return Err(PlanError::Seccomp(format!("{name} cannot have {NOTIFY}: nobody would hear of it")));
    }
    Ok(notifies)
}

// Offsets in struct seccomp_data.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;

fn low_word(argument: u32) -> u32 {
    16 + 8 * argument
}

/// Verdict of an action.
fn action(name: &str, errno: Option<u32>) -> Result<u32, PlanError> {
    let errno = errno.unwrap_or(EPERM);
    if errno > ERRNO_MAX {
        return Err(PlanError::Seccomp(format!("error number {errno} is larger than {ERRNO_MAX}")));
    }
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_TRAP" => TRAP,
        "SCMP_ACT_ERRNO" => ERRNO | errno,
        "SCMP_ACT_TRACE" => TRACE | errno,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_NOTIFY" => USER_NOTIF,
        other => return Err(PlanError::Seccomp(format!("{other:?} is no action"))),
    })
}

fn flags(names: &[String]) -> Result<u32, PlanError> {
    names.iter().try_fold(0, |bits, name| match name.as_str() {
        // All threads: there is one.
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(bits),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(bits | 2),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(bits | 4),
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => Ok(bits | WAIT_KILLABLE),
        other => Err(PlanError::Seccomp(format!("{other:?} is no flag that can be honoured"))),
    })
}

/// A machine's way to make system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Architecture {
    /// `AUDIT_ARCH_…` of linux/audit.h.
    audit: u32,
    calls: Calls,
    /// Those of x32, where the profile allows it.
    x32: Option<Calls>,
}

/// The calls of an architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Calls {
    numbers: &'static [(&'static str, u32)],
    /// How wide their arguments are.
    width: Width,
    carriers: &'static [Carrier],
}

/// The width of arguments, in the filter's words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    /// One: a rule's values are cut to their lower half, so that -1 is -1.
    Narrow,
    Wide,
}

const X86_64: Architecture = Architecture { audit: 0xc000_003e, calls: Calls::wide(numbers::X86_64), x32: None };
const X86: Architecture = Architecture {
    audit: 0x4000_0003,
    calls: Calls { numbers: numbers::X86, width: Width::Narrow, carriers: carried::OF_X86 },
    x32: None,
};
const X32: Calls = Calls { numbers: numbers::X32, width: Width::Narrow, carriers: &[] };
const AARCH64: Architecture = Architecture { audit: 0xc000_00b7, calls: Calls::wide(numbers::AARCH64), x32: None };

impl Calls {
    const fn wide(numbers: &'static [(&'static str, u32)]) -> Self {
        Self { numbers, width: Width::Wide, carriers: &[] }
    }

    /// What a rule about a call is about: numbers, and the alternatives for each.
    fn rules(&self, name: &str, alternatives: &[Vec<Condition>]) -> Vec<(u32, Vec<Vec<Condition>>)> {
        let at = self.numbers.binary_search_by_key(&name, |(known, _)| known).ok();
        let own = at.map(|at| (self.numbers[at].1, alternatives.to_vec()));
        own.into_iter().chain(self.carriers.iter().filter_map(|one| one.rule(name, alternatives))).collect()
    }
}

#[cfg(target_arch = "x86_64")]
const NATIVE: Architecture = X86_64;
#[cfg(not(target_arch = "x86_64"))]
const NATIVE: Architecture = AARCH64;

/// Architectures that no kernel of this program has calls of, by the specification's names without their prefix.
const OTHERS: [&str; 19] = [
    "ARM",
    "LOONGARCH64",
    "M68K",
    "MIPS",
    "MIPS64",
    "MIPS64N32",
    "MIPSEL",
    "MIPSEL64",
    "MIPSEL64N32",
    "PPC",
    "PPC64",
    "PPC64LE",
    "S390",
    "S390X",
    "PARISC",
    "PARISC64",
    "RISCV64",
    "SH",
    "SHEB",
];

/// The architectures of a profile, the machine's own first even where it is not listed.
fn architectures(profile: &oci::Seccomp) -> Result<Vec<Architecture>, PlanError> {
    let mut found = vec![NATIVE];
    for name in &profile.architectures {
        let architecture = match name.as_str() {
            "SCMP_ARCH_X86_64" => X86_64,
            "SCMP_ARCH_X86" => X86,
            "SCMP_ARCH_AARCH64" => AARCH64,
            "SCMP_ARCH_X32" => {
                found.iter_mut().filter(|one| one.audit == X86_64.audit).for_each(|one| one.x32 = Some(X32));
                continue;
            }
            // Of other machines: nothing of them can run here.
            name if name.strip_prefix("SCMP_ARCH_").is_some_and(|name| OTHERS.contains(&name)) => continue,
            other => return Err(PlanError::Seccomp(format!("{other:?} is no architecture"))),
        };
        if !found.iter().any(|one| one.audit == architecture.audit) {
            found.push(architecture);
        }
    }
    Ok(found)
}

/// All rules of one system call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Rules {
    /// The verdict without a look at arguments.
    always: Option<u32>,
    /// Alternatives: all conditions of one hold, or the next is tried.
    conditional: Vec<(Vec<Condition>, u32)>,
}

impl Architecture {
    /// The number's test and everything behind it.
    fn body(&self, profile: &oci::Seccomp, default: u32, program: &mut Assembler) -> Result<Position, PlanError> {
        let mut ranges = ranges(profile, default, &self.calls, 0)?;
        if self.audit == X86_64.audit {
            ranges.retain(|(start, _)| *start < X32_BIT);
            match self.x32 {
                Some(calls) => ranges.extend(self::ranges(profile, default, &calls, X32_BIT)?),
                None => ranges.push((X32_BIT, Rules { always: Some(KILL_THREAD), ..Rules::default() })),
            }
        }
        let tree = tree(&ranges, default, program);
        Ok(program.load_before(NUMBER_OFFSET, tree))
    }
}

/// Ranges of numbers by their first, each with one meaning; from 0 without a gap.
fn ranges(profile: &oci::Seccomp, default: u32, calls: &Calls, bit: u32) -> Result<Vec<(u32, Rules)>, PlanError> {
    let by_number = by_number(profile, default, calls)?;
    let plain = |verdict| Rules { always: Some(verdict), ..Rules::default() };
    let mut ranges = Vec::new();
    let mut next = 0;
    for (number, rules) in &by_number {
        if *number > next {
            ranges.push((bit | next, plain(default)));
        }
        ranges.push((bit | *number, rules.clone()));
        next = number + 1;
    }
    // Calls that are newer than the profile: its author could not mean them. C libraries fall back on ENOSYS only.
    let newest = calls.numbers.iter().map(|(_, number)| *number).max().unwrap_or(0);
    let known = by_number.keys().max().copied().unwrap_or(0);
    if default & 0xffff_0000 == ERRNO && known > 0 {
        if next <= newest && known < newest {
            ranges.push((bit | next, plain(ERRNO | ENOSYS)));
        } else {
            ranges.push((bit | (newest.max(known) + 1), plain(ERRNO | ENOSYS)));
        }
    } else {
        ranges.push((bit | next, plain(default)));
    }
    ranges.dedup_by(|later, earlier| later.1 == earlier.1);
    Ok(ranges)
}

fn by_number(profile: &oci::Seccomp, default: u32, calls: &Calls) -> Result<BTreeMap<u32, Rules>, PlanError> {
    let mut all: BTreeMap<u32, Rules> = BTreeMap::new();
    for entry in &profile.syscalls {
        let verdict = action(&entry.action, entry.errno_ret)?;
        if verdict == default {
            continue;
        }
        let alternatives = alternatives(&entry.args, calls.width)?;
        for (number, alternatives) in entry.names.iter().flat_map(|name| calls.rules(name, &alternatives)) {
            let rules = all.entry(number).or_default();
            if alternatives.is_empty() {
                rules.always.get_or_insert(verdict);
            }
            rules.conditional.extend(alternatives.into_iter().map(|conditions| (conditions, verdict)));
        }
    }
    // What holds always needs no look at arguments.
    all.values_mut().filter(|rules| rules.always.is_some()).for_each(|rules| rules.conditional.clear());
    Ok(all)
}

/// A comparison of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    argument: u32,
    width: Width,
    test: Test,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    Masked { mask: u64, value: u64 },
}

/// The conditions of a rule: one alternative with all of them; one alternative each where two look at the same argument,
/// which is how the first runtimes read profiles and how profiles are written since.
fn alternatives(args: &[oci::SyscallArg], width: Width) -> Result<Vec<Vec<Condition>>, PlanError> {
    let conditions = args.iter().map(|arg| condition(arg, width)).collect::<Result<Vec<_>, _>>()?;
    let repeats = |one: &Condition| conditions.iter().filter(|other| other.argument == one.argument).count() > 1;
    Ok(match () {
        () if conditions.is_empty() => Vec::new(),
        () if conditions.iter().any(repeats) => conditions.into_iter().map(|one| vec![one]).collect(),
        () => vec![conditions],
    })
}

fn condition(arg: &oci::SyscallArg, width: Width) -> Result<Condition, PlanError> {
    if arg.index > 5 {
        return Err(PlanError::Seccomp(format!("argument {} does not exist: system calls have six", arg.index)));
    }
    let test = match arg.op.as_str() {
        "SCMP_CMP_EQ" => Test::Equal(arg.value),
        "SCMP_CMP_NE" => Test::NotEqual(arg.value),
        "SCMP_CMP_LT" => Test::Less(arg.value),
        "SCMP_CMP_LE" => Test::LessOrEqual(arg.value),
        "SCMP_CMP_GT" => Test::Greater(arg.value),
        "SCMP_CMP_GE" => Test::GreaterOrEqual(arg.value),
        "SCMP_CMP_MASKED_EQ" => Test::Masked { mask: arg.value, value: arg.value_two },
        other => return Err(PlanError::Seccomp(format!("{other:?} is no comparison"))),
    };
    Ok(Condition { argument: arg.index, width, test })
}

/// A binary search over `ranges`; the number is in the accumulator.
fn tree(ranges: &[(u32, Rules)], default: u32, program: &mut Assembler) -> Position {
    match ranges {
        [] => program.verdict(default),
        [(_, rules)] => leaf(rules, default, program),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let start = right[0].0;
            let right = tree(right, default, program);
            let left = tree(left, default, program);
            program.if_greater_or_equal(start, right, left)
        }
    }
}

fn leaf(rules: &Rules, default: u32, program: &mut Assembler) -> Position {
    if let Some(verdict) = rules.always {
        return program.verdict(verdict);
    }
    let mut next = program.verdict(default);
    for (conditions, verdict) in rules.conditional.iter().rev() {
        let mut holds = program.verdict(*verdict);
        for condition in conditions.iter().rev() {
            holds = test(*condition, holds, next, program);
        }
        next = holds;
    }
    next
}

/// One comparison, of 64 bits with words of 32 where the argument is so wide.
fn test(condition: Condition, yes: Position, no: Position, program: &mut Assembler) -> Position {
    let low = low_word(condition.argument);
    match condition.test {
        Test::Equal(value) => masked(condition, u64::MAX, value, yes, no, program),
        Test::NotEqual(value) => masked(condition, u64::MAX, value, no, yes, program),
        Test::Masked { mask, value } => masked(condition, mask, value, yes, no, program),
        Test::Greater(value) => {
            let last = program.if_greater(low_half(value), yes, no);
            let last = program.load_before(low, last);
            ordered(condition, value, yes, last, no, program)
        }
        Test::GreaterOrEqual(value) => {
            let last = program.if_greater_or_equal(low_half(value), yes, no);
            let last = program.load_before(low, last);
            ordered(condition, value, yes, last, no, program)
        }
        Test::Less(value) => {
            let opposite = Condition { test: Test::GreaterOrEqual(value), ..condition };
            test(opposite, no, yes, program)
        }
        Test::LessOrEqual(value) => test(Condition { test: Test::Greater(value), ..condition }, no, yes, program),
    }
}

/// The high word, if there is one, decides unless it is equal.
fn ordered(
    condition: Condition,
    value: u64,
    above: Position,
    equal: Position,
    below: Position,
    program: &mut Assembler,
) -> Position {
    if condition.width == Width::Narrow {
        return equal;
    }
    let not_above = program.if_equal(high_half(value), equal, below);
    let start = program.if_greater(high_half(value), above, not_above);
    program.load_before(low_word(condition.argument) + 4, start)
}

fn masked(
    condition: Condition,
    mask: u64,
    value: u64,
    yes: Position,
    no: Position,
    program: &mut Assembler,
) -> Position {
    let low = low_word(condition.argument);
    let last = program.if_equal(low_half(value), yes, no);
    let last = program.and_before(low_half(mask), last);
    let last = program.load_before(low, last);
    if condition.width == Width::Narrow {
        return last;
    }
    let first = program.if_equal(high_half(value), last, no);
    let first = program.and_before(high_half(mask), first);
    program.load_before(low + 4, first)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn low_half(value: u64) -> u32 {
    value as u32
}

fn high_half(value: u64) -> u32 {
    low_half(value >> 32)
}

#[cfg(test)]
mod beside;
#[cfg(test)]
mod tests;
