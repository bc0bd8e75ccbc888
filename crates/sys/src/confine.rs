//! Confinement of a process that parses untrusted bytes: a root of its own, no network, few capabilities, few system calls.
//!
//! The order matters and is the caller's: [`enter_root`] while the capabilities for it are there, [`limit`], [`keep_capabilities`],
//! threads, and last [`allow_only`], which covers all threads.

use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

/// A set of capabilities.
pub type Capabilities = CapabilitySet;

/// No capability at all.
pub const NOTHING: Capabilities = CapabilitySet::empty();

/// The capabilities that writing a file tree with its owners, modes and devices takes.
pub const UNPACKING: Capabilities = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Makes the working directory the root of a new mount namespace in which nothing else exists, and gives the process
/// network and IPC namespaces of its own. Call it with one thread only.
pub fn enter_root() -> io::Result<()> {
    let fresh = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    // SAFETY: CLONE_FILES and CLONE_FS semantics are not relied upon by anybody: the caller has one thread.
    unsafe { rustix::thread::unshare_unsafe(fresh)? };
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let here = rustix::fs::open(".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let root = rustix::mount::open_tree(&here, "", flags)?;
    let from_to = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&root, "", here.as_fd(), "", from_to)?;
    rustix::process::fchdir(&root)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// What the confined process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Address space in bytes.
    pub memory_bytes_max: u64,
    /// Length of a file in bytes.
    pub file_bytes_max: u64,
    /// Open descriptors.
    pub open_files_max: u64,
}

/// Sets the limits, and that it leaves no core file.
pub fn limit(budget: Budget) -> io::Result<()> {
    let limits = [
        (Resource::As, budget.memory_bytes_max),
        (Resource::Fsize, budget.file_bytes_max),
        (Resource::Nofile, budget.open_files_max),
        (Resource::Core, 0),
    ];
    for (resource, most) in limits {
        rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    Ok(())
}

/// Gives up all capabilities but `keep` (of which only those that are there remain), for good.
pub fn keep_capabilities(keep: CapabilitySet) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    rustix::thread::clear_ambient_capability_set()?;
    let now = rustix::thread::capabilities(None)?;
    let kept = now.permitted & keep;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Lets a pipe hold more, so that its two ends wait for each other less often.
pub fn widen_pipe(pipe: impl AsFd, bytes: usize) -> io::Result<()> {
    rustix::pipe::fcntl_setpipe_size(pipe, bytes)?;
    Ok(())
}

/// Returns when nobody can read from `pipe` any more.
pub fn wait_until_unread(pipe: impl AsFd) {
    let mut polled = [PollFd::new(&pipe, PollFlags::empty())];
    // An error other than an interruption cannot be waited out either.
    while matches!(poll(&mut polled, None), Ok(0) | Err(Errno::INTR)) {}
}

/// From now on all threads of the process may make the system calls in `allowed` only; others fail with `EPERM`.
/// Nobody may map executable memory. Needs [`keep_capabilities`] first (no_new_privs).
pub fn allow_only(allowed: &[libc::c_long]) -> io::Result<()> {
    let mut program = compile(allowed);
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: `filter` points to `program`, which lives until the call returns; the kernel copies it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const filter,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

// Offsets in `struct seccomp_data`; arguments are 64 bits wide, the low half first on our architectures.
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
const PROTECTION_AT: u32 = 16 + 2 * 8;

const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// One comparison a call: the list is short and unpacking makes few calls for each megabyte.
fn compile(allowed: &[libc::c_long]) -> Vec<libc::sock_filter> {
    let mut program = vec![load(ARCH_AT), skip_if(AUDIT_ARCH, 1, 0), give(KILL), load(NUMBER_AT)];
    for call in allowed {
        let Ok(number) = u32::try_from(*call) else { continue };
        let checked = *call == libc::SYS_mmap || *call == libc::SYS_mprotect;
        if checked {
            program.push(skip_if(number, 0, 4));
            program.push(load(PROTECTION_AT));
            program.push(skip_if_any(libc::PROT_EXEC.unsigned_abs(), 1, 0));
            program.push(give(ALLOW));
            program.push(give(REFUSE));
        } else {
            program.push(skip_if(number, 0, 1));
            program.push(give(ALLOW));
        }
    }
    program.push(give(REFUSE));
    program
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: opcode(code), jt: 0, jf: 0, k }
}

fn opcode(code: u32) -> u16 {
    u16::try_from(code).expect("classic BPF opcodes are below 256")
}

fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn give(action: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
}

fn skip_if(value: u32, if_equal: u8, else_: u8) -> libc::sock_filter {
    libc::sock_filter { code: opcode(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K), jt: if_equal, jf: else_, k: value }
}

fn skip_if_any(bits: u32, if_set: u8, else_: u8) -> libc::sock_filter {
    libc::sock_filter { code: opcode(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K), jt: if_set, jf: else_, k: bits }
}

/// What reading a stream and writing a file tree takes, and what an allocator and threads take in any process.
pub fn unpacking_calls() -> Vec<libc::c_long> {
    let mut calls = COMMON_CALLS.to_vec();
    // The old spellings exist on x86-64 only; they are still in use there.
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_readlink, libc::SYS_poll]);
    calls
}

/// What a server of one thread takes that was given its sockets: network, epoll, reading files, and the allocator.
pub fn serving_calls() -> Vec<libc::c_long> {
    let mut calls = SERVING_CALLS.to_vec();
    // The old spelling exists on x86-64 only; its libc still uses it.
    #[cfg(target_arch = "x86_64")]
    calls.push(libc::SYS_epoll_wait);
    calls
}

const SERVING_CALLS: &[libc::c_long] = &[
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

const COMMON_CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_futex,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
    libc::SYS_fsetxattr,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_readlinkat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fchdir,
    libc::SYS_fcntl,
    libc::SYS_ppoll,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program over `(arch, number, third argument)` as the kernel would.
    fn run(program: &[libc::sock_filter], arch: u32, number: u32, protection: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match u32::from(step.code) & 0x07 {
                libc::BPF_LD => {
                    accumulator = match step.k {
                        NUMBER_AT => number,
                        ARCH_AT => arch,
                        _ => protection,
                    }
                }
                libc::BPF_RET => return step.k,
                _ => {
                    let equal = u32::from(step.code) & 0xf0 == libc::BPF_JEQ;
                    let taken = if equal { accumulator == step.k } else { accumulator & step.k != 0 };
                    at += usize::from(if taken { step.jt } else { step.jf });
                }
            }
        }
    }

    fn number(call: libc::c_long) -> u32 {
        u32::try_from(call).unwrap()
    }

    #[test]
    fn allows_what_unpacking_takes_and_nothing_else() {
        let program = compile(&unpacking_calls());
        for call in unpacking_calls() {
            assert_eq!(run(&program, AUDIT_ARCH, number(call), 0), ALLOW, "call {call}");
        }
        for call in [
            libc::SYS_socket,
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_clone3,
            libc::SYS_chroot,
        ] {
            assert_eq!(run(&program, AUDIT_ARCH, number(call), 0), REFUSE, "call {call}");
        }
        assert_eq!(run(&program, 0x4000_0003, 1, 0), KILL, "a foreign architecture");
    }

    #[test]
    fn a_server_starts_no_program() {
        let program = compile(&serving_calls());
        assert_eq!(run(&program, AUDIT_ARCH, number(libc::SYS_sendto), 0), ALLOW);
        for call in [libc::SYS_execve, libc::SYS_execveat, libc::SYS_clone, libc::SYS_ptrace, libc::SYS_unlinkat] {
            assert_eq!(run(&program, AUDIT_ARCH, number(call), 0), REFUSE, "call {call}");
        }
    }

    #[test]
    fn maps_no_executable_memory() {
        let program = compile(&unpacking_calls());
        let executable = (libc::PROT_READ | libc::PROT_EXEC).unsigned_abs();
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert_eq!(run(&program, AUDIT_ARCH, number(call), executable), REFUSE);
            assert_eq!(run(&program, AUDIT_ARCH, number(call), libc::PROT_READ.unsigned_abs()), ALLOW);
        }
    }
}
