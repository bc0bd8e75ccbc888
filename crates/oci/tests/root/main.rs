//! Containers by runc's command line: this program is the runtime when it is called `runc`.

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
    if words.first().map(Path::new).and_then(Path::file_name).is_some_and(|name| name == "runc") {
        return oci::main(words);
    }
    let missing = (!sys::rustix::process::geteuid().is_root()).then(|| "root".to_owned());
    testkit::serial::main(
        &[lifecycle::TESTS, details::TESTS, compare::TESTS, modules::TESTS, rootless::TESTS, past::TESTS].concat(),
        missing,
    )
}
