//! What Services mean on this node: pure values, no clock, no kernel.
//!
//! ```text
//! Services, EndpointSlices, Node ─► Model ─► Rules: address and port ─► endpoints in slots
//!                                     └────► Difference: what a packet filter has to change
//! ```
//!
//! [`Model`] decodes objects one by one into compact facts and recomputes only what an object touches. The endpoints of an
//! address stand in *slots*, numbered from 0 without gaps, from which a packet filter draws one at random. A change keeps as
//! many slots as possible: who comes takes the place of who left, otherwise the last one moves there.
//!
//! Which endpoints take connections follows KEP-1669 (ending endpoints that still serve are better than none), KEP-2086
//! (traffic policies) and KEP-4444 (hints).

mod addresses;
mod choose;
mod claims;
mod explain;
mod facts;
mod model;
mod names;
mod network;
mod plan;
mod rules;
mod slots;
mod types;

pub use choose::LeftOut;
pub use explain::{EndpointExplanation, Explanation, Outcome, PortExplanation};
pub use facts::{Fault, Problem};
pub use model::{HealthCheck, Model};
pub use names::Name;
pub use network::{Local, Network, NodePorts};
pub use rules::{Change, Difference, Refusals, Rules, diff};
pub use types::{Endpoint, Entry, Frontend, Kind, Protocol, ServicePort, Target};
