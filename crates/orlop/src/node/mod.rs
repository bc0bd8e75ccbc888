//! A running node: its parts, their wiring, and the socket on which it answers.

pub(crate) mod api;
pub(crate) mod objects;
