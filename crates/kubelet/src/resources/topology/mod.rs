//! The topology manager: from what CPUs, memory and devices say about NUMA nodes to the nodes that a container gets. Pure.

mod machine;
mod mask;
mod merge;

pub use machine::{Machine, Node, Place};
pub use mask::Mask;
pub use merge::{Nodes, Policy, merge};

/// A set of NUMA nodes that a request can be met from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    /// The nodes; any, if none is named.
    pub affinity: Option<Mask>,
    /// No smaller set of nodes could meet the request.
    pub preferred: bool,
}

/// What is said about one resource of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hints {
    /// It does not matter where it comes from.
    Indifferent,
    /// It can come from each of these; from nowhere, if there is none.
    From(Vec<Hint>),
}

#[cfg(test)]
pub(crate) use machine::samples;
