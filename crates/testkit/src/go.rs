//! Programs of others, built once from their published Go modules into the cache. None of their code is ours.

use std::path::PathBuf;
use std::process::Command;

use crate::cache;
use crate::host::{self, Tool};

/// A Go program: module, version, and the package within it.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// What its file is called.
    pub name: &'static str,
    module: &'static str,
    version: &'static str,
    package: &'static str,
    tags: &'static str,
}

/// What orlop is measured against.
pub const REFERENCE: &[Program] = &[CONTAINERD, SHIM, RUNC, BRIDGE, HOST_LOCAL, LOOPBACK, PORTMAP];

/// containerd 2.4.
pub const CONTAINERD: Program = containerd("containerd", "cmd/containerd");
/// Its shim, found by its name beside it.
pub const SHIM: Program = containerd("containerd-shim-runc-v2", "cmd/containerd-shim-runc-v2");
/// runc 1.5.
pub const RUNC: Program =
    Program { name: "runc", module: "github.com/opencontainers/runc", version: "v1.5.2", package: "", tags: "seccomp" };
/// The CNI plugin for bridges, 1.9.
pub const BRIDGE: Program = plugin("bridge", "plugins/main/bridge");
/// The CNI plugin for addresses from files.
pub const HOST_LOCAL: Program = plugin("host-local", "plugins/ipam/host-local");
/// The CNI plugin for loopback.
pub const LOOPBACK: Program = plugin("loopback", "plugins/main/loopback");
/// The CNI plugin for host ports.
pub const PORTMAP: Program = plugin("portmap", "plugins/meta/portmap");

const fn containerd(name: &'static str, package: &'static str) -> Program {
    Program { name, module: "github.com/containerd/containerd/v2", version: "v2.4.2", package, tags: "" }
}

const fn plugin(name: &'static str, package: &'static str) -> Program {
    Program { name, module: "github.com/containernetworking/plugins", version: "v1.9.1", package, tags: "" }
}

/// What building needs on the host.
const TOOLS: &[Tool] = &[
    Tool { program: "go", deb: "golang", rpm: "golang" },
    Tool { program: "gcc", deb: "gcc", rpm: "gcc" },
    Tool { program: "/usr/include/seccomp.h", deb: "libseccomp-dev", rpm: "libseccomp-devel" },
];

/// The reference in a few words.
pub fn reference_name() -> String {
    let version = |program: Program| program.version.trim_start_matches('v');
    format!("containerd {} + runc {} + CNI bridge {}", version(CONTAINERD), version(RUNC), version(BRIDGE))
}

/// The program's path in the cache, built when it is not there. Programs of one module share a directory.
///
/// # Errors
/// No Go, no module proxy, or a build that fails; the message carries the end of its output.
pub fn build(program: &Program) -> anyhow::Result<PathBuf> {
    let key = cache::key([program.module.as_bytes(), program.version.as_bytes(), program.name.as_bytes()]);
    let entry = cache::entry(&format!("go-{}", program.name), &key, |dir| {
        host::install(TOOLS)?;
        eprintln!("building {} {} from its Go module", program.name, program.version);
        let source = tempfile::tempdir()?;
        let go = |arguments: &[&str]| {
            let mut go = Command::new("go");
            go.args(arguments).current_dir(source.path()).env("GOFLAGS", "-mod=mod").env("GOTOOLCHAIN", "auto");
            host::run(&mut go)
        };
        go(&["mod", "init", "lab.invalid/build"])?;
        go(&["get", &format!("{}@{}", program.module, program.version)])?;
        let package = [program.module, program.package].join("/");
        let output = dir.join(program.name);
        let output = output.display().to_string();
        go(&[
            "build",
            "-trimpath",
            "-tags",
            program.tags,
            "-ldflags",
            "-s -w",
            "-o",
            &output,
            package.trim_end_matches('/'),
        ])
    })?;
    Ok(entry.join(program.name))
}
