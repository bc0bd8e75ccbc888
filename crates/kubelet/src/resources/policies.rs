//! What the operator wants of the managers.

use super::cpu::Static;
use super::memory;
use super::topology::Policy;

/// Where alignment is looked for (`topologyManagerScope`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scope {
    /// Each container by itself.
    #[default]
    Container,
    /// All containers of a pod together.
    Pod,
}

/// NUMA nodes up to which alignment is looked for by default: all their combinations are compared.
pub const NODES_MAX: usize = 8;

/// The topology manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// `topologyManagerPolicy`
    pub policy: Policy,
    /// `topologyManagerScope`
    pub scope: Scope,
    /// Of as many nodes those that are near to each other (`prefer-closest-numa-nodes`).
    pub closest: bool,
    /// The most nodes that a machine may have (`max-allowable-numa-nodes`).
    pub nodes_max: usize,
}

impl Default for Topology {
    fn default() -> Self {
        Self { policy: Policy::None, scope: Scope::Container, closest: false, nodes_max: NODES_MAX }
    }
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policies {
    /// CPUs of their own for some containers (`cpuManagerPolicy: static`).
    pub cpu: Option<Static>,
    /// Memory from certain NUMA nodes for some containers (`memoryManagerPolicy: Static`).
    pub memory: Option<memory::Static>,
    /// Alignment of what containers get.
    pub topology: Topology,
}
