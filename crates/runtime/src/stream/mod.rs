//! The streaming server: exec, attach and port-forward sessions of CRI.
//!
//! A CRI call for a session is answered with a URL; the client connects there and upgrades the connection.
//!
//! ```text
//! Exec, Attach, PortForward ─► Tokens ─► URL ─► client
//! client ─► listener ─► token ─► upgrade ─┬─ SPDY/3.1 ──┬─► command ─► Backend::exec, Backend::attach
//!                                         ╰─ WebSocket ─┴─► forward ─► Backend::port_forward
//! ```
//!
//! A session is one task: the connection's reader and writer, and what joins the channels between them with a process
//! or a pod's port. It ends with the process, with the client, or with the server, and takes its connection with it.

mod activity;
mod backend;
mod channel;
mod command;
mod descriptor;
mod forward;
mod frames;
#[cfg(test)]
mod fuzz;
mod seats;
mod server;
mod spdy;
mod status;
#[cfg(test)]
mod tests;
mod tokens;
mod upgrade;
mod websocket;

pub(crate) use backend::{Backend, Process, Session, Stdio, WindowSize};
pub(crate) use server::{Server, Via};
