//! Clients of CRI with the gRPC of others: Go's, Java's, and that of C and C++, which Python calls.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::host::{self, Tool};
use crate::{cache, go};

/// gRPC for Python, as PyPI has it.
const GRPCIO: &str = "grpcio==1.85.3";
const PYTHON: Tool = Tool { program: "python3", deb: "python3-venv", rpm: "python3" };
const SCRIPT: &str = include_str!("caller.py");

const JAVA: [Tool; 2] = [
    Tool { program: "javac", deb: "default-jdk-headless", rpm: "java-latest-openjdk-devel" },
    Tool::new("mvn", "maven"),
];
/// Names gRPC for Java, as Maven's repository has it.
const PROJECT: &str = include_str!("pom.xml");
const CLASS: &str = include_str!("Caller.java");

/// The Go client, which takes the path of a socket; from the cache when it is there.
///
/// # Errors
/// As [`go::build`].
pub fn in_go() -> anyhow::Result<Command> {
    Ok(Command::new(go::build(&go::CRI_CALLER)?))
}

/// The Python client, likewise.
///
/// # Errors
/// No Python with `venv`, or no package index.
pub fn in_python() -> anyhow::Result<Command> {
    let key = cache::key([GRPCIO, SCRIPT].map(str::as_bytes));
    let dir = cache::entry("python-cri-caller", &key, |dir| {
        host::install(&[PYTHON])?;
        eprintln!("installing {GRPCIO} into a directory of its own");
        let venv = dir.join("venv");
        let made = host::run(Command::new(PYTHON.program).args(["-m", "venv"]).arg(&venv));
        made.context("Python's venv is needed (package python3-venv)")?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", GRPCIO];
        host::run(Command::new(python(&venv)).args(pip))?;
        Ok(std::fs::write(dir.join("caller.py"), SCRIPT)?)
    })?;
    let mut command = Command::new(python(&dir.join("venv")));
    command.arg(dir.join("caller.py"));
    Ok(command)
}

/// The Java client, likewise.
///
/// # Errors
/// No compiler for Java, or no repository of Maven's.
pub fn in_java() -> anyhow::Result<Command> {
    let key = cache::key([PROJECT, CLASS].map(str::as_bytes));
    let dir = cache::entry("java-cri-caller", &key, |dir| {
        host::install(&JAVA)?;
        std::fs::write(dir.join("pom.xml"), PROJECT)?;
        std::fs::write(dir.join("Caller.java"), CLASS)?;
        eprintln!("fetching gRPC for Java");
        let copy = ["--quiet", "--batch-mode", "dependency:copy-dependencies", "-DoutputDirectory=."];
        host::run(Command::new("mvn").args(copy).current_dir(dir))?;
        host::run(Command::new("javac").args(["-classpath", "*", "Caller.java"]).current_dir(dir))
    })?;
    let mut command = Command::new("java");
    command.arg("-classpath").arg(format!("{0}:{0}/*", dir.display())).arg("Caller");
    Ok(command)
}

/// The program of a `venv`, which finds its libraries wherever it has been moved.
fn python(venv: &Path) -> PathBuf {
    venv.join("bin/python")
}
