//! What comes before the C library: a command of an OCI runtime that makes a process goes on as the sealed copy of its program
//! ([`crate::program::seal`]) before it has begun.
//!
//! A whole start of this program is 1 ms: it relocates itself, and the C library asks the processor for all that it can, each
//! question an exit from a virtual machine. `seal` alone would pay that twice for each container. A release begins at
//! `orlop_start` (`crates/orlop/build.rs`), which does the one system call in question and otherwise goes to where programs
//! begin. Whatever is not as it should be here is left to `seal`, which tells why.
//!
//! Nothing is relocated yet: no table of pointers may be read, and no function of the C library called. Bytes are read one by
//! one and as volatile, which keeps the compiler from doing just that.

use core::arch::{asm, global_asm};
use core::mem::MaybeUninit;

global_asm!(
    ".pushsection .text.orlop_start, \"ax\", @progbits",
    ".globl orlop_start",
    ".type orlop_start, @function",
    "orlop_start:",
    "mov rdi, rsp",
    "push rdx",
    "sub rsp, 8",
    "call {begin}",
    "add rsp, 8",
    "pop rdx",
    "jmp _start",
    ".size orlop_start, . - orlop_start",
    ".popsection",
    begin = sym begin,
);

const OWN: &[u8] = b"/proc/self/exe\0";
const PATH_BYTES_MAX: usize = 4096;
/// Where statfs(2) has the flags of a mount, in words.
const FLAGS: usize = 10;
const STATFS_WORDS: usize = 15;
/// stat(2) begins with device and inode, in words.
const STAT_WORDS: usize = 18;
const AT_FDCWD: u64 = (-100_i64).cast_unsigned();
const AT_SYMLINK_NOFOLLOW: u64 = 0x100;
const AT_EMPTY_PATH: u64 = 0x1000;

/// The program's words lie at `stack` as the kernel has put them: their number, their addresses, 0, the environment's, 0.
///
/// # Safety
/// `stack` is what the stack pointer was when the kernel started the program.
unsafe extern "C" fn begin(stack: *const usize) {
    // SAFETY: this is how the kernel starts a program.
    unsafe {
        let count = stack.read();
        let words = stack.add(1).cast::<*const u8>();
        if makes_a_process(words, count) {
            go_on_sealed(words, words.add(count + 1));
        }
    }
}

/// Whether the program is called as an OCI runtime, and for one of the commands that need it sealed.
///
/// # Safety
/// `words` are `count` strings that end with 0.
unsafe fn makes_a_process(words: *const *const u8, count: usize) -> bool {
    // SAFETY: as promised.
    unsafe {
        if count < 2 || !(is(words.add(1).read(), b"oci") || ends_with_runc(words.read())) {
            return false;
        }
        let mut at = 1;
        while at < count {
            let word = words.add(at).read();
            if is(word, b"create") || is(word, b"run") || is(word, b"exec") {
                return true;
            }
            at += 1;
        }
        false
    }
}

/// # Safety
/// `word` ends with 0.
#[inline(always)]
unsafe fn is(word: *const u8, text: &'static [u8]) -> bool {
    let mut at = 0;
    // SAFETY: no byte is read after the 0, which is in no text.
    unsafe {
        while at < text.len() {
            if word.add(at).read_volatile() != text.as_ptr().add(at).read_volatile() {
                return false;
            }
            at += 1;
        }
        word.add(at).read_volatile() == 0
    }
}

/// # Safety
/// `word` ends with 0.
unsafe fn ends_with_runc(word: *const u8) -> bool {
    let (mut name, mut at) = (word, word);
    // SAFETY: no byte is read after the 0.
    unsafe {
        loop {
            match at.read_volatile() {
                0 => return is(name, b"runc"),
                b'/' => name = at.add(1),
                _ => {}
            }
            at = at.add(1);
        }
    }
}

/// Executes this program again from a read-only copy of its mount that is in no namespace. Returns where that cannot be.
///
/// # Safety
/// Both are what execve(2) takes.
unsafe fn go_on_sealed(words: *const *const u8, environment: *const *const u8) {
    let mut about = MaybeUninit::<[u64; STATFS_WORDS]>::uninit();
    let mut path = MaybeUninit::<[u8; PATH_BYTES_MAX]>::uninit();
    let path = path.as_mut_ptr().cast::<u8>();
    // SAFETY: the calls write no more than there is room for, and read strings that end with 0 and a mount_attr.
    unsafe {
        let own = OWN.as_ptr() as u64;
        let told = call(libc::SYS_statfs, [own, about.as_mut_ptr() as u64, 0, 0, 0]);
        if told != 0 || about.as_ptr().cast::<u64>().add(FLAGS).read() & libc::ST_RDONLY != 0 {
            return;
        }
        let length = call(libc::SYS_readlink, [own, path as u64, PATH_BYTES_MAX as u64 - 1, 0, 0]);
        let Ok(length @ 1..) = usize::try_from(length) else { return };
        path.add(length).write(0);
        let mut slash = length;
        while slash > 0 && path.add(slash).read_volatile() != b'/' {
            slash -= 1;
        }
        if slash == 0 {
            return;
        }
        path.add(slash).write(0);
        let (name, empty) = (path.add(slash + 1) as u64, path.add(length) as u64);
        let flags = u64::from(libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC);
        let tree = call(libc::SYS_open_tree, [AT_FDCWD, path as u64, flags, 0, 0]);
        if tree < 0 {
            return;
        }
        let tree = tree.cast_unsigned();
        let sealed = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_RDONLY,
            attr_clr: 0,
            propagation: libc::MS_PRIVATE,
            userns_fd: 0,
        };
        let attributes = [tree, empty, AT_EMPTY_PATH, &raw const sealed as u64, size_of_val(&sealed) as u64];
        // Beneath what is mounted on the program's file there is another.
        if call(libc::SYS_mount_setattr, attributes) == 0
            && are_one([AT_FDCWD, own, 0], [tree, name, AT_SYMLINK_NOFOLLOW])
        {
            call(libc::SYS_execveat, [tree, name, words as u64, environment as u64, AT_SYMLINK_NOFOLLOW]);
        }
        call(libc::SYS_close, [tree, 0, 0, 0, 0]);
    }
}

/// Whether two names, each with its directory and flags, are of one file.
///
/// # Safety
/// They end with 0.
unsafe fn are_one(one: [u64; 3], other: [u64; 3]) -> bool {
    let mut files = [const { MaybeUninit::<[u64; STAT_WORDS]>::uninit() }; 2];
    // SAFETY: the calls fill what is read.
    unsafe {
        let [first, second] = [files[0].as_mut_ptr().cast::<u64>(), files[1].as_mut_ptr().cast::<u64>()];
        call(libc::SYS_newfstatat, [one[0], one[1], first as u64, one[2], 0]) == 0
            && call(libc::SYS_newfstatat, [other[0], other[1], second as u64, other[2], 0]) == 0
            && first.read() == second.read()
            && first.add(1).read() == second.add(1).read()
    }
}

/// A system call, without the C library's help; a negative number is an error.
///
/// # Safety
/// As for the call.
#[inline(always)]
unsafe fn call(number: i64, arguments: [u64; 5]) -> i64 {
    let [first, second, third, fourth, fifth] = arguments;
    let mut result = number;
    // SAFETY: as promised; the kernel changes these registers and no others.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") first, in("rsi") second, in("rdx") third, in("r10") fourth, in("r8") fifth,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}
