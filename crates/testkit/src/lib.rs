//! Fixtures of the tests and the labs: caches, host packages, network namespaces, registries, test images.
//!
//! Everything here may start programs and may be slow; nothing of it is part of the node.

#![allow(clippy::disallowed_methods, reason = "fixtures start programs")]
#![allow(clippy::print_stdout, reason = "a test program speaks on stdout")]

pub mod cache;
pub mod certificates;
pub mod go;
pub mod host;
pub mod image;
pub mod netns;
pub mod registry;
pub mod serial;
