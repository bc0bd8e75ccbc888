//! Programs for tests.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes `path` an executable shell script. Another process writes it: a child that some other test forks meanwhile
/// would hold our descriptor open, and a file that is open for writing cannot be executed.
#[expect(clippy::disallowed_methods, reason = "a test")]
pub(super) fn install(path: &Path, script: &str) {
    let mut writer = Command::new("sh")
        .args(["-c", r#"cat > "$1" && chmod 755 "$1""#, "sh"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    writer.stdin.take().unwrap().write_all(format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success());
}
