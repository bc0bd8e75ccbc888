//! Filters and calls that are not the machine's first: 32-bit x86, by its own programs and from 64-bit ones, and x32.

use serde_json::{Value, json};

use super::{Change, pair};
use crate::bundle::Bundle;

/// A way to make a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `int 0x80` of a 32-bit program.
    X86,
    /// The same of a 64-bit program.
    X86From64,
    /// `syscall`.
    X64,
    /// `syscall` with a number of x32.
    X32,
}

/// The bit of numbers of x32, whose other calls have those of x86-64.
const X32_BIT: u32 = 0x4000_0000;
const LENGTH_32: u32 = 52 + 32;
const LENGTH_64: u32 = 64 + 56;

/// A static program that makes one call and ends with the negated result. A first argument of `None` is the address of a path.
fn program(way: Way, number: u32, arguments: [Option<u32>; 3]) -> Vec<u8> {
    let (header, base) = if way == Way::X86 { (LENGTH_32, 0x0804_8000) } else { (LENGTH_64, 0x0040_0000) };
    // Twice: the address of what follows the code needs its length.
    let length = u32::try_from(code(way, number, arguments, 0).len()).unwrap();
    let code = code(way, number, arguments, base + header + length);
    let size = header + length + 16;
    let mut program = if way == Way::X86 { head_32(base, size) } else { head_64(base.into(), size.into()) };
    program.extend(code);
    program.extend(b"/tmp/made\0\0\0\0\0\0\0");
    program
}

fn code(way: Way, number: u32, arguments: [Option<u32>; 3], path: u32) -> Vec<u8> {
    let [a, b, c] = arguments.map(|argument| argument.unwrap_or(path).to_le_bytes());
    let number = if way == Way::X32 { number | X32_BIT } else { number };
    let mut code = vec![0xb8]; // mov eax, the number
    code.extend(number.to_le_bytes());
    // ebx, ecx, edx; or edi, esi, edx.
    let by_interrupt = matches!(way, Way::X86 | Way::X86From64);
    let registers = if by_interrupt { [0xbb, 0xb9, 0xba] } else { [0xbf, 0xbe, 0xba] };
    for (register, argument) in registers.into_iter().zip([a, b, c]) {
        code.push(register);
        code.extend(argument);
    }
    if by_interrupt {
        code.extend([0xcd, 0x80, 0xf7, 0xd8, 0x89, 0xc3, 0xb8, 1, 0, 0, 0, 0xcd, 0x80]); // int 0x80; neg eax; exit(eax)
    } else {
        code.extend([0x0f, 0x05, 0xf7, 0xd8, 0x89, 0xc7, 0xb8, 60, 0, 0, 0, 0x0f, 0x05]); // syscall; neg eax; exit(eax)
    }
    code
}

/// The ELF header and the one program header of a 32-bit program.
fn head_32(base: u32, size: u32) -> Vec<u8> {
    let mut head = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
    [base + LENGTH_32, 52, 0, 0].iter().for_each(|word| head.extend(word.to_le_bytes()));
    [52_u16, 32, 1, 0, 0, 0].iter().for_each(|half| head.extend(half.to_le_bytes()));
    [1, 0, base, base, size, size, 5, 0x1000].iter().for_each(|word| head.extend(word.to_le_bytes()));
    head
}

/// The same of a 64-bit program.
fn head_64(base: u64, size: u64) -> Vec<u8> {
    let mut head = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    [base + u64::from(LENGTH_64), 64, 0].iter().for_each(|word| head.extend(word.to_le_bytes()));
    head.extend([0; 4]);
    [64_u16, 56, 1, 0, 0, 0].iter().for_each(|half| head.extend(half.to_le_bytes()));
    head.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    [0, base, base, size, size, 0x1000].iter().for_each(|word: &u64| head.extend(word.to_le_bytes()));
    head
}

/// Calls by name, with their numbers of 32-bit x86 and of x86-64; `socketcall` is the former's alone.
fn programs() -> Vec<(String, Vec<u8>)> {
    let [some, mode] = [Some(0xffff_ffff), Some(0o755)];
    let calls = [
        ("mkdir", 39, Some(83), [None, mode, None]),
        ("personality", 136, Some(135), [some, None, None]),
        ("umask", 60, Some(95), [Some(0o22), None, None]),
        ("socket", 359, Some(41), [Some(1), Some(1), Some(0)]),
        // Its second argument is where the call's own are; none are there, which is another error than the filter's.
        ("socketcall", 102, None, [Some(1), Some(1), None]),
    ];
    let mut all = Vec::new();
    for (name, of_32, of_64, arguments) in calls {
        all.push((format!("x86-{name}"), program(Way::X86, of_32, arguments)));
        all.push((format!("x86-from-64-{name}"), program(Way::X86From64, of_32, arguments)));
        if let Some(number) = of_64 {
            all.push((format!("x64-{name}"), program(Way::X64, number, arguments)));
            all.push((format!("x32-{name}"), program(Way::X32, number, arguments)));
        }
    }
    all
}

/// Makes each call in a process of its own.
const CALLS: &str = "umask 22; for call in /calls/*; do $call 2>/dev/null; echo \"${call##*/} $?\"; \
    test -d /tmp/made && rmdir /tmp/made; done; echo done";

fn refuse(call: &str, op: &str, value: u64, value_two: u64) -> Value {
    let args = json!([{ "index": 0, "value": value, "valueTwo": value_two, "op": op }]);
    json!({ "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": 11, "args": args })
}

/// A name, the architectures that a filter names, and its rules.
type Case = (&'static str, &'static [&'static str], fn() -> Value);

const CASES: &[Case] = &[
    ("by-name", &["X86_64", "X86", "X32"], || json!([{ "names": ["mkdir", "socket"], "action": "SCMP_ACT_ERRNO" }])),
    ("x86-too", &["X86_64", "X86"], || json!([{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }])),
    ("x32-too", &["X86_64", "X32"], || json!([{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }])),
    ("x86-named-alone", &["X86"], || json!([{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }])),
    ("none-named", &[], || json!([{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }])),
    ("arguments", &["X86_64", "X86", "X32"], || {
        json!([refuse("personality", "SCMP_CMP_EQ", 0xffff_ffff, 0), refuse("umask", "SCMP_CMP_EQ", 0o22, 0)])
    }),
    ("arguments-of-64-bits", &["X86_64", "X86", "X32"], || {
        json!([refuse("personality", "SCMP_CMP_EQ", u64::MAX, 0), refuse("umask", "SCMP_CMP_GT", 1 << 32, 0)])
    }),
    ("arguments-masked", &["X86_64", "X86", "X32"], || {
        json!([
            refuse("personality", "SCMP_CMP_MASKED_EQ", 0xffff_ffff_0000_00ff, 0xff),
            refuse("umask", "SCMP_CMP_MASKED_EQ", 0x12, 0x12),
            refuse("socket", "SCMP_CMP_NE", 0x1_0000_0001, 0),
        ])
    }),
];

pub(super) fn all() {
    let mut all = Vec::new();
    for (name, architectures, rules) in CASES {
        let architectures: Vec<String> = architectures.iter().map(|one| format!("SCMP_ARCH_{one}")).collect();
        let filter = json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": rules() });
        let [ours, theirs] = run(name, |spec| spec["linux"]["seccomp"] = filter.clone());
        if ours != theirs {
            let differ = |(one, other): (&str, &str)| (one != other).then(|| format!("{name}: {one}, runc: {other}"));
            all.extend(ours.lines().zip(theirs.lines()).filter_map(differ));
        }
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

/// What both say of the calls.
fn run(name: &str, change: impl Fn(&mut Value)) -> [String; 2] {
    let writable: Change = |spec| spec["root"]["readonly"] = json!(false);
    let pair = pair(&format!("foreign-{name}"), CALLS, |spec| {
        writable(spec);
        change(spec);
    });
    pair.each_ref().map(|bundle| {
        furnish(bundle);
        let (code, text) = bundle.run();
        assert!(code == Some(0) && text.ends_with("done\n"), "{name}: {code:?} {text}");
        text
    })
}

fn furnish(bundle: &Bundle) {
    let dir = bundle.path().join("rootfs/calls");
    std::fs::create_dir(&dir).unwrap();
    for (name, program) in programs() {
        let path = dir.join(name);
        std::fs::write(&path, program).unwrap();
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
}

/// The programs do what their names say; without a filter, and where the kernel runs 32-bit ones.
pub(super) fn programs_work() {
    let [ours, theirs] = run("no-filter", |spec| drop(spec["linux"].as_object_mut().unwrap().remove("seccomp")));
    assert_eq!(ours, theirs);
    let code = |name: &str| {
        let line = ours.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap().parse::<u8>().unwrap()
    };
    if code("x86-umask") == 126 {
        return println!("skipped: needs a kernel that runs 32-bit programs (CONFIG_IA32_EMULATION)");
    }
    for way in ["x86", "x86-from-64", "x64"] {
        // A directory is made; the personality is the plain one; the old mask is 022; the descriptor is the next.
        let made = ["mkdir", "personality", "umask", "socket"].map(|call| code(&format!("{way}-{call}")));
        assert_eq!(made[0], 0, "{way}: {ours}");
        assert_eq!(made[2..], [0_u8.wrapping_sub(0o22), 0_u8.wrapping_sub(3)], "{way}: {ours}");
    }
    assert_eq!(code("x86-socketcall"), 14, "EFAULT");
}
