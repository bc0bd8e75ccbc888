//! The per-pod process that owns stdio, log files, reaping, exit records and exec; and its protocol.
