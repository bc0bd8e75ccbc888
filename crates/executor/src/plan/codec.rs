//! The plan's types as bytes, see [`crate::wire`].

use sys::mount::Propagation;

use super::types::*;
use crate::oci::{IdMapping, NamespaceKind};
use crate::wire::{DecodeError, Wire, wire_enum, wire_struct};

wire_struct! {
    LaunchPlan {
        process, new_namespaces, joins, hostname, domainname, root, sources, sysctls, time_offsets, hooks, halts, gate,
        dies_with_parent, warnings,
    }
    ProcessPlan {
        programs, arguments, environment, cwd, uid, gid, groups, umask, capabilities, rlimits, no_new_privileges,
        oom_score_adj, seccomp, scheduler, io_priority, personality, cpus_first, cpus, apparmor, selinux, keyring,
        finds_home, owns_streams, terminal,
    }
    CapabilitySets { bounding, effective, permitted, inheritable, ambient }
    Rlimit { resource, soft, hard }
    SeccompPlan { program, flags, notifies }
    SchedulerPlan { policy, flags, nice, priority, runtime_ns, deadline_ns, period_ns }
    TimeOffset { clock, secs, nanosecs }
    HooksPlan { state, create_container, start_container }
    HookPlan { program, arguments, environment, timeout_s }
    RootPlan { mounts, devices, device_links, masked_paths, readonly_paths, readonly, propagation, entry, at, label }
    PropagationPlan { kind, recursive }
    MountPlan { target, what, is_file }
    FilesystemPlan { kind, options, attributes, copy_up }
    Source { path, target, recursive, set, clear, below, propagation, id_map }
    DeviceNode { path, kind, major, minor, mode, uid, gid }
    IdMapping { container_id, host_id, size }
}

wire_enum! {
    RootEntry { Pivot = 0, Chroot = 1 }
    Propagation { Private = 0, Slave = 1, Shared = 2, Unbindable = 3 }
    NamespaceKind { User = 0, Pid = 1, Network = 2, Mount = 3, Ipc = 4, Uts = 5, Cgroup = 6, Time = 7 }
}

impl Wire for Mounted {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Source(index) => (0u16, *index).put(out),
            Self::New(filesystem) => {
                1u16.put(out);
                filesystem.put(out);
            }
            Self::Devices(filesystem) => {
                2u16.put(out);
                filesystem.put(out);
            }
            Self::Own => 3u16.put(out),
        }
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        match u16::take(input)? {
            0 => u32::take(input).map(Self::Source),
            1 => FilesystemPlan::take(input).map(Self::New),
            2 => FilesystemPlan::take(input).map(Self::Devices),
            3 => Ok(Self::Own),
            other => Err(DecodeError::Unknown(other.into())),
        }
    }
}

/// One number, as it was when attributes below could only be set: all of them fit into its lower half.
impl Wire for Below {
    fn put(&self, out: &mut Vec<u8>) {
        (self.set | self.clear << 32).put(out);
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        let both = u64::take(input)?;
        Ok(Self { set: both & u64::from(u32::MAX), clear: both >> 32 })
    }
}

impl Wire for IdMap {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::None => 0u16.put(out),
            Self::Container { recursive } => (1u16, *recursive).put(out),
            Self::Own { uids, gids, recursive } => {
                (2u16, *recursive).put(out);
                uids.put(out);
                gids.put(out);
            }
        }
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        match u16::take(input)? {
            0 => Ok(Self::None),
            1 => Ok(Self::Container { recursive: bool::take(input)? }),
            2 => {
                let recursive = bool::take(input)?;
                Ok(Self::Own { uids: Wire::take(input)?, gids: Wire::take(input)?, recursive })
            }
            other => Err(DecodeError::Unknown(other.into())),
        }
    }
}

impl Wire for DeviceKind {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Character => 0u16.put(out),
            Self::Block => 1u16.put(out),
            Self::Fifo => 2u16.put(out),
            Self::Bound(index) => (3u16, *index).put(out),
        }
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        match u16::take(input)? {
            0 => Ok(Self::Character),
            1 => Ok(Self::Block),
            2 => Ok(Self::Fifo),
            3 => u32::take(input).map(Self::Bound),
            other => Err(DecodeError::Unknown(other.into())),
        }
    }
}

impl Wire for Warning {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::OomScoreAdj { wanted, got } => (0u16, (*wanted, *got)).put(out),
            Self::Capabilities(missing) => (1u16, *missing).put(out),
            Self::UnknownCapability(name) => {
                2u16.put(out);
                name.put(out);
            }
        }
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        match u16::take(input)? {
            0 => <(i32, i32)>::take(input).map(|(wanted, got)| Self::OomScoreAdj { wanted, got }),
            1 => u64::take(input).map(Self::Capabilities),
            2 => String::take(input).map(Self::UnknownCapability),
            other => Err(DecodeError::Unknown(other.into())),
        }
    }
}
