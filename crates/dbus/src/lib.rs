//! As much of D-Bus as a node says: calls, their answers with descriptors, signals (D-Bus Specification 0.42, "Message
//! Protocol" and "Authentication Protocol"). A general client would be as large as the rest of the node agent.
//!
//! [`Session`] is the protocol without input and output: bytes go in, messages come out. [`Bus`] is the one for a program with
//! one thread; who has a runtime of tasks moves the bytes himself.

mod address;
mod blocking;
mod session;
mod value;
mod wire;

use std::io;

pub use address::Address;
pub use blocking::Bus;
pub use session::{Identity, Session};
pub use value::Value;
pub use wire::{Message, Method};

/// The bus itself.
pub const BUS: &str = "org.freedesktop.DBus";
/// Its object.
pub const BUS_PATH: &str = "/org/freedesktop/DBus";
/// Where all objects have their properties.
pub const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Why the bus does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The connection.
    #[error("the message bus cannot be talked to: {0}")]
    Io(#[from] io::Error),
    /// What came is no message, or none for us.
    #[error("the message bus says what cannot be understood: {0}")]
    Malformed(&'static str),
    /// The other side refused.
    #[error("{call}: {name}: {message}")]
    Refused {
        /// What was asked for.
        call: String,
        /// The error's name.
        name: String,
        /// Its text.
        message: String,
    },
}

impl BusError {
    /// Whether the other side refused with this error.
    pub fn is_named(&self, error: &str) -> bool {
        matches!(self, Self::Refused { name, .. } if name == error)
    }
}
