//! What orlop writes into the kernel's packet filter: pure batches for nftables, one transaction each, text for
//! `iptables-restore`, and changes of IPVS.
//!
//! | table | made by | content |
//! |---|---|---|
//! | `orlop-net` | [`pods`] for `network` | masquerading of the built-in bridge, host ports |
//! | `orlop-proxy` | [`services`] for `proxy` | Services |
//! | `nat`, `filter` | [`iptables`] for `proxy` | Services, as upstream's mode iptables has them |
//!
//! Beside the second one, IPVS can lead the connections ([`ipvs`]).
//!
//! Nothing here starts the program `nft`, and only a whole replacement of iptables' chains looks at what the kernel has.

pub mod iptables;
pub mod ipvs;
mod key;
pub mod pods;
pub mod services;

pub use sys::netlink::nft::Batch;
