//! The streaming server: exec, attach and port-forward sessions of CRI.
//!
//! A CRI call for a session is answered with a URL; the client connects there and upgrades the connection.
//!
//! ```text
//! Exec, Attach, PortForward ─► Tokens ─► URL ─► client
//! client ─► listener ─► token ─┬─ SPDY/3.1 ──┬─► remote command ─► Backend::exec, Backend::attach
//!                              └─ WebSocket ─┴─► port forward   ─► Backend::port_forward
//! ```

mod backend;
mod server;
mod tokens;

pub(crate) use backend::{Backend, Process, Session, Stdio, WindowSize};
pub(crate) use server::{Server, Via};
