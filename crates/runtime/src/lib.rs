//! The container runtime: pod sandboxes, containers, streams, statistics; implements CRI.
