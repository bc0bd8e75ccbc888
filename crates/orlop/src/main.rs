//! The program: argv, configuration, wiring and the local command line.

fn main() {}
