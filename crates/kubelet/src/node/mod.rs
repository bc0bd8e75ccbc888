//! The node as the cluster sees it: its object, its conditions, its lease.

pub mod certificates;
pub mod csi_node;
pub mod describe;
pub mod disks;
pub mod eviction;
pub mod features;
pub mod machine;
pub mod membership;
pub mod news;
pub mod pressure;
pub mod shutdown;
