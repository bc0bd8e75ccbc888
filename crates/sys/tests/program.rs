//! A program that seals itself. This one is started by its own tests, so it has no harness.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "a test program")]

use std::path::Path;
use std::process::{Command, ExitCode};

use sys::program::{own_seal, seal};

/// The first argument of a process that is the subject of a test.
const SUBJECT: &str = "subject";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(SUBJECT) {
        return subject(&arguments.collect::<Vec<_>>());
    }
    let root = sys::rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: needs root for mounts");
    }
    let own = std::env::current_exe().unwrap();
    in_memory(&own);
    if root {
        on_a_mount(&own);
        replaced(&own);
    }
    println!("test result: ok. {} passed; 0 failed; 0 ignored", if root { 3 } else { 1 });
    ExitCode::SUCCESS
}

/// Seals itself and tells what came of it, in itself and in a child that it starts from its own program.
fn subject(arguments: &[String]) -> ExitCode {
    let kind = arguments[0].as_str();
    if kind == "child" {
        print!("{:?}", own_seal().unwrap());
        return ExitCode::SUCCESS;
    }
    if own_seal().unwrap().is_none() {
        if kind == "bare" {
            sys::caps::set(&sys::caps::Sets::default()).unwrap();
        }
        if let Some(path) = arguments.get(1) {
            std::fs::remove_file(path).unwrap();
        }
    }
    if kind != "plain" {
        seal().unwrap();
    }
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    let place = std::fs::read_link("/proc/self/exe").unwrap();
    let child = Command::new("/proc/self/exe").args([SUBJECT, "child"]).output().unwrap().stdout;
    println!("{:?} {} {}", own_seal().unwrap(), name.trim(), place.display());
    println!("{}", String::from_utf8(child).unwrap());
    println!("{:?} {}", std::env::var("TOLD").ok(), std::fs::read_dir("/proc/self/fd").unwrap().count());
    ExitCode::SUCCESS
}

/// What the subject tells, by lines.
fn tell(program: &Path, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(program).arg(SUBJECT).args(arguments).env("TOLD", "kept").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.lines().map(str::to_owned).collect()
}

fn comm(program: &Path) -> String {
    program.file_name().unwrap().to_str().unwrap().chars().take(15).collect()
}

/// What is left in the copy, environment and descriptors: as much as where nothing is sealed.
fn check_kept(own: &Path, told: &str) {
    assert_eq!(told, tell(own, &["plain"])[2]);
    assert!(told.starts_with("Some(\"kept\")"), "{told}");
}

fn on_a_mount(own: &Path) {
    let told = tell(own, &["whole"]);
    // On the mount of the root it has the same name as before, on another the rest of it.
    let names = own.ancestors().skip(1).map(|mount| own.strip_prefix(mount).unwrap().display());
    let expected: Vec<String> = names.map(|name| format!("Some(Mount) {} /{name}", comm(own))).collect();
    assert!(expected.contains(&told[0]), "{told:?}");
    assert_eq!(told[1], "Some(Mount)");
    check_kept(own, &told[2]);
}

fn in_memory(own: &Path) {
    let told = tell(own, &["bare"]);
    assert_eq!(told[0], format!("Some(Memory) {} /memfd:orlop (deleted)", comm(own)));
    assert_eq!(told[1], "Some(Memory)");
    check_kept(own, &told[2]);
}

/// A program whose file is gone goes on as what it is.
fn replaced(own: &Path) {
    let scratch = tempfile::tempdir().unwrap();
    let copy = scratch.path().join("copy");
    std::fs::copy(own, &copy).unwrap();
    let told = tell(&copy, &["whole", copy.to_str().unwrap()]);
    assert_eq!(told[0], "Some(Memory) copy /memfd:orlop (deleted)");
}
