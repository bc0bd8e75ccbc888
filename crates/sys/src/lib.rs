//! Every system call, ioctl and netlink socket of orlop, behind typed wrappers; the only crate with `unsafe`.

pub mod caps;
pub mod cgroup;
pub mod confine;
mod device_filter;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod early;
pub mod error;
pub mod fdpass;
pub mod fork;
pub mod inotify;
pub mod kernel;
pub mod klog;
pub mod lock;
pub mod loops;
pub mod meter;
pub mod mntns;
pub mod mount;
pub mod netlink;
pub mod netns;
pub mod overlay;
pub mod path;
pub mod process;
pub mod program;
pub mod pty;
pub mod random;
pub mod schedule;
pub mod signals;
pub mod socket;
pub mod tree;
pub mod xattr;
pub mod xtables;
pub mod zygote;

pub use error::{Context, Error, Result};
pub use rustix;

/// Tests hold parsers to a bound of memory.
#[cfg(test)]
#[global_allocator]
static METER: meter::Meter = meter::Meter;
