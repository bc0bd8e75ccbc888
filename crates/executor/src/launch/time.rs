//! A time namespace of the container's own.

use std::os::fd::AsFd as _;

use sys::process::{self, namespace};
use sys::rustix::fs::{Mode, OFlags};

use super::{InStep as _, LaunchError, Step};
use crate::plan::TimeOffset;

/// Makes one with these offsets and enters it. clone3(2) would enter it at once, and then the clocks are set for ever.
pub(super) fn enter_new(offsets: &[TimeOffset]) -> Result<(), LaunchError> {
    process::leave(namespace::TIME).step(Step::NewNamespace, "time")?;
    let lines: String = offsets.iter().map(|one| format!("{} {} {}\n", one.clock, one.secs, one.nanosecs)).collect();
    if !lines.is_empty() {
        std::fs::write("/proc/self/timens_offsets", &lines)
            .map_err(|error| LaunchError::io(Step::Time, &error, lines.trim_end()))?;
    }
    let path = "/proc/self/ns/time_for_children";
    let fresh = sys::rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| LaunchError::new(Step::Time, errno, path))?;
    process::join(fresh.as_fd(), namespace::TIME).step(Step::Time, path)
}
