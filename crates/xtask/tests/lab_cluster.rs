//! `lab cluster` as a contributor uses it: up in the background, a command inside, down. Needs root and what the control
//! plane is built with.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test starts the program under test")]
#![allow(clippy::print_stdout, reason = "a test says why it is skipped")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use testkit::{control_plane, go};

fn xtask(dir: &Path, words: &str) -> Command {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask.env("RUST_BACKTRACE", "0").args(["lab", "cluster", "--dir"]).arg(dir).args(words.split(' '));
    xtask
}

fn cluster(dir: &Path, words: &str) -> Output {
    xtask(dir, words).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Ends the lab also when the test fails.
struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        cluster(self.0, "down"); // says so when it is down already
    }
}

fn is_missing() -> bool {
    if !geteuid().is_root() {
        println!("skipped: needs root");
        return true;
    }
    let built = control_plane::build_with(&[go::KUBEADM]);
    built.inspect_err(|error| println!("skipped: needs go and the module proxy ({error:#})")).is_err()
}

#[test]
fn a_lab_is_entered_and_ended() {
    if is_missing() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("lab");
    let _down = Down(&dir);
    let guide = stdout(&cluster(&dir, "up --detach --node a"));
    assert!(guide.contains(&format!("{}/node-a.kubeconfig", dir.display())), "{guide}");
    let again = stderr(&cluster(&dir, "up"));
    assert!(again.contains("is up already"), "{again}");
    let namespaces = stdout(&cluster(&dir, "shell -- kubectl get namespaces -o name"));
    assert!(namespaces.contains("namespace/kube-system"), "{namespaces}");
    assert!(stdout(&cluster(&dir, "down")).contains("is down"));
    assert!(!dir.exists());
    assert!(stderr(&cluster(&dir, "shell")).contains("is not up"));
}

#[test]
fn one_in_the_foreground_ends_with_an_interrupt() {
    if is_missing() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("lab");
    let _down = Down(&dir);
    let mut up = xtask(&dir, "up").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(up.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("ends it, as Ctrl-C does")), "the guide ends with it");
    kill_process(Pid::from_child(&up), Signal::INT).unwrap();
    assert_eq!(lines.last().as_deref(), Some("ending the control plane"));
    assert!(up.wait().unwrap().success());
    assert!(!dir.exists());
}
