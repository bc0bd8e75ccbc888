//! Fixtures of the tests and the labs: caches, host packages, network namespaces, registries, test images, and a real
//! control plane.
//!
//! Everything here may start programs and may be slow; nothing of it is part of the node.

#![allow(clippy::disallowed_methods, reason = "fixtures start programs")]
#![allow(clippy::print_stdout, reason = "a test program speaks on stdout")]

pub mod api;
pub mod bad_network;
pub mod cache;
pub mod callers;
pub mod certificates;
pub mod containerd;
pub mod control_plane;
pub mod csi;
pub mod daemon;
pub mod debian;
pub mod dra;
pub mod front;
pub mod go;
pub mod groups;
pub mod host;
pub mod image;
pub mod netns;
pub mod pace;
pub mod past;
pub mod plugins;
pub mod registry;
pub mod serial;
pub mod service_lab;
pub mod suite;
pub mod upstream;
