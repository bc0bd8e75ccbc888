//! A user who is not root, and has no namespace of users that he is root in (as Podman gives its runtime one): before a
//! container is made, this process enters the one that the configuration describes. From there everything is as for a root who
//! may less.
//!
//! Other commands need no such thing: whoever has made a namespace of users may signal what is in it, and enter it.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;

use executor::oci::{IdMapping, Linux, NamespaceKind, Spec};
use sys::error::Context as _;
use sys::process::{self, Clone, namespace};

use crate::error::Error;
use crate::namespaces;

/// Enters the user namespace of `spec` with a mount namespace of its own, if this process may not make mounts as it is. What
/// is left of the configuration then.
pub(crate) fn enter(spec: &Spec) -> Result<Spec, Error> {
    let mut spec = spec.clone();
    if has_admin()? {
        return Ok(spec);
    }
    let none = || Error::Invalid("rootless container requires user namespaces".to_owned());
    let linux = spec.linux.as_mut().ok_or_else(none)?;
    let user = linux.namespaces.iter().position(|one| one.kind == NamespaceKind::User).ok_or_else(none)?;
    let path = linux.namespaces.remove(user).path;
    if path.is_empty() {
        make(linux)?;
    } else {
        process::join(namespaces::by_path(Path::new(&path))?.as_fd(), namespace::USER)?;
    }
    process::become_root()?;
    process::leave(namespace::MOUNT)?;
    linux.uid_mappings.clear();
    linux.gid_mappings.clear();
    Ok(spec)
}

/// Whether mounts can be made without further ado.
fn has_admin() -> sys::Result<bool> {
    let bit = sys::caps::number("CAP_SYS_ADMIN").map_or(0, |number| 1 << number);
    Ok(sys::caps::get()?.effective & bit != 0)
}

/// One id, his own, anybody may map. More are mapped by programs with the right to look into `/etc/subuid`.
fn make(linux: &Linux) -> Result<(), Error> {
    let own = |ranges: &[IdMapping], id: u32| matches!(ranges, [one] if one.size == 1 && one.host_id == id);
    let (uid, gid) = (sys::rustix::process::geteuid().as_raw(), sys::rustix::process::getegid().as_raw());
    if !own(&linux.uid_mappings, uid) || !own(&linux.gid_mappings, gid) {
        return by_programs(linux);
    }
    process::leave(namespace::USER)?;
    let write = |name: &str, text: String| {
        let path = format!("/proc/self/{name}");
        fs::write(&path, text).during("write", path)
    };
    // Who could leave groups could come to what they are kept from.
    write("setgroups", "deny".to_owned())?;
    write("uid_map", lines(&linux.uid_mappings))?;
    Ok(write("gid_map", lines(&linux.gid_mappings))?)
}

fn lines(ranges: &[IdMapping]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.container_id, range.host_id, range.size)).collect()
}

/// By `newuidmap` and `newgidmap`, which a child starts, as it stays outside of the namespace.
fn by_programs(linux: &Linux) -> Result<(), Error> {
    let (its, ours) = sys::rustix::pipe::pipe_with(sys::rustix::pipe::PipeFlags::CLOEXEC).during("pipe2", "")?;
    let parent = std::process::id().to_string();
    let mapped = process::spawn(&Clone { keep: Some(&[its.as_fd()]), ..Clone::default() }, || {
        // Without a word the parent has failed.
        if sys::rustix::io::read(&its, &mut [0]) != Ok(1) {
            return 1;
        }
        let both = [("newuidmap", &linux.uid_mappings), ("newgidmap", &linux.gid_mappings)];
        i32::from(!both.iter().all(|(program, ranges)| run(program, &parent, ranges)))
    })?;
    let left = process::leave(namespace::USER);
    if left.is_ok() {
        sys::rustix::io::write(&ours, b"!").during("write", "a pipe")?;
    }
    drop(ours);
    let exit = process::reap(mapped.pidfd.as_fd())?;
    left?;
    if exit.code() == 0 {
        return Ok(());
    }
    let text = "newuidmap and newgidmap (package uidmap) do not map the ids of uidMappings and gidMappings: they have to be \
                installed, and the ids to stand in /etc/subuid and /etc/subgid; or map this user and group alone";
    Err(Error::Invalid(text.to_owned()))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the system's own programs for it; a configuration with several ids asks for them"
)]
fn run(program: &str, pid: &str, ranges: &[IdMapping]) -> bool {
    let mut command = std::process::Command::new(program);
    command.arg(pid);
    for range in ranges {
        command.args([range.container_id, range.host_id, range.size].map(|number| number.to_string()));
    }
    command.status().is_ok_and(|status| status.success())
}
