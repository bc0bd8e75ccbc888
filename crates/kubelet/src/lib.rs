//! The node agent: pod workers, volumes, probes, statuses; does what `pod` decided.
