//! What a pod needs next. Pure: no clock, no files, no locks; everything comes in as a value and goes out as one.
//!
//! ```text
//! Change ──View::apply──► View ──decide──► Plan { actions, next_due }      status::compute ──► PodStatus
//! ```
//!
//! [`View`] is what is known of a pod: what runs, what is under way, and the [`Record`] that outlives the daemon.
//! [`decide`] depends on the latest view only; asked again after its actions have been carried out, it returns nothing.

pub mod backoff;
mod change;
mod decide;
pub mod eviction;
pub mod probe;
pub mod qos;
pub mod quantity;
pub mod resize;
pub mod resources;
pub mod restart;
pub mod spec;
pub mod status;
mod view;

pub use change::{Change, Note, NoteKind};
pub use decide::{Action, Plan, Stop, decide};
pub use qos::QosClass;
pub use view::{ContainerRecord, ContainerView, Left, Outage, Record, Run, Running, Sandbox, Setup, View};
