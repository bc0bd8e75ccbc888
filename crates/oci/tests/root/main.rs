//! Containers by runc's command line: this program is the runtime when it is called `runc`, and a container's when it is called
//! `notify`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts itself")]

mod bundle;
mod compare;
mod details;
mod lifecycle;
mod modules;
mod past;
mod rootless;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let called = |name: &str| words.first().map(Path::new).and_then(Path::file_name) == Some(name.as_ref());
    if called("runc") {
        return oci::main(words);
    }
    if called("notify") {
        return compare::notify(&words);
    }
    let missing = (!sys::rustix::process::geteuid().is_root()).then(|| "root".to_owned());
    testkit::serial::main(
        &[lifecycle::TESTS, details::TESTS, compare::TESTS, modules::TESTS, rootless::TESTS, past::TESTS].concat(),
        missing,
    )
}
