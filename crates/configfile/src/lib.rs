//! Configuration of a component as upstream has it: a versioned document, drop-ins and flags become one checked value.
//!
//! ```text
//! Schema (a table of leaves)
//!    │
//! file, drop-ins, flags ─► Layers ─► one JSON value, each leaf of its kind ─► Reader ─► the component's own values
//!                            └─► warnings: what was written and has no effect
//! ```
//!
//! What an operator wrote is honoured, warned about by name, or refused: never ignored in silence.

mod layers;
mod merge;
mod reader;
mod schema;
pub mod spans;

pub use layers::{Faults, Layers};
pub use reader::Reader;
pub use schema::{Kind, Leaf, Schema, Status, leaf};
