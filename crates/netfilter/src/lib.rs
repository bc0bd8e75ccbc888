//! What orlop writes into the kernel's packet filter: pure batches for nftables, one transaction each, and changes of IPVS.
//!
//! | table | made by | content |
//! |---|---|---|
//! | `orlop-net` | [`pods`] for `network` | masquerading of the built-in bridge, host ports |
//! | `orlop-proxy` | [`services`] for `proxy` | Services |
//!
//! Beside the second one, IPVS can lead the connections ([`ipvs`]).
//!
//! Nothing here reads the kernel's rules to decide what to write, and nothing starts the program `nft`.

pub mod ipvs;
mod key;
pub mod pods;
pub mod services;

pub use sys::netlink::nft::Batch;
