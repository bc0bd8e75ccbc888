//! Programs of others, built once from their published Go modules into the cache. None of their code is ours.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::cache;
use crate::host::{self, Tool};

/// A Go program: the module it is published in, and its package there.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// What its file is called.
    pub name: &'static str,
    module: Module,
    package: &'static str,
    kind: Kind,
    linkage: Linkage,
}

/// What is made of a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Its program.
    Command,
    /// Its tests, as a program.
    Tests,
    /// The same, of a package that has nothing else.
    TestsAlone,
    /// The program of another package, in the version that this one needs.
    Needed(&'static str),
    /// A program of the project itself, which uses the package: its source.
    Own(&'static str),
}

/// What a program needs where it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Linkage {
    /// The libraries of the machine that built it.
    Host,
    /// Nothing but a kernel, as in a test image.
    Static,
}

impl Program {
    const fn for_images(self) -> Self {
        Self { linkage: Linkage::Static, ..self }
    }
}

/// A published module, and what its programs are built with.
#[derive(Debug, Clone, Copy)]
struct Module {
    path: &'static str,
    version: &'static str,
    tags: &'static str,
    /// Modules that live in the same source tree and are published beside it: the module's own `go.mod` refers to
    /// directories, which do not count for who uses it, so a version has to be named for each.
    siblings: Siblings,
    /// Variables that the linker sets: what the program says its version is.
    stamps: &'static [(&'static str, &'static str)],
}

/// Names below `prefix`, all with one version.
#[derive(Debug, Clone, Copy)]
struct Siblings {
    prefix: &'static str,
    names: &'static [&'static str],
    version: &'static str,
}

impl Module {
    const fn new(path: &'static str, version: &'static str) -> Self {
        let siblings = Siblings { prefix: "", names: &[], version: "" };
        Self { path, version, tags: "", siblings, stamps: &[] }
    }

    const fn program(self, name: &'static str, package: &'static str) -> Program {
        Program { name, module: self, package, kind: Kind::Command, linkage: Linkage::Host }
    }

    fn short_version(&self) -> &'static str {
        self.version.trim_start_matches('v')
    }

    /// The main module that the program is built in, before `go get` adds what else is needed.
    fn go_mod(&self) -> String {
        let mut text = "module lab.invalid/build\n\ngo 1.26.0\n".to_owned();
        let Siblings { prefix, names, version } = self.siblings;
        for name in names {
            text += &format!("\nreplace {prefix}{name} => {prefix}{name} {version}\n");
        }
        text
    }

    fn linker_flags(&self) -> String {
        let stamp = |(variable, value): &(&str, &str)| format!(" -X {variable}={value}");
        std::iter::once("-s -w".to_owned()).chain(self.stamps.iter().map(stamp)).collect()
    }
}

/// What orlop is measured against.
pub const REFERENCE: &[Program] = &[CONTAINERD, SHIM, RUNC, BRIDGE, HOST_LOCAL, LOOPBACK, PORTMAP];

/// containerd 2.4.
pub const CONTAINERD: Program = CONTAINERD_MODULE.program("containerd", "cmd/containerd");
/// Its shim, found by its name beside it.
pub const SHIM: Program = CONTAINERD_MODULE.program("containerd-shim-runc-v2", "cmd/containerd-shim-runc-v2");
/// runc 1.5.
pub const RUNC: Program =
    Module { tags: "seccomp", ..Module::new("github.com/opencontainers/runc", "v1.5.2") }.program("runc", "");
/// The CNI plugin for bridges, 1.9.
pub const BRIDGE: Program = PLUGINS.program("bridge", "plugins/main/bridge");
/// The CNI plugin for addresses from files.
pub const HOST_LOCAL: Program = PLUGINS.program("host-local", "plugins/ipam/host-local");
/// The CNI plugin for loopback.
pub const LOOPBACK: Program = PLUGINS.program("loopback", "plugins/main/loopback");
/// The CNI plugin for host ports.
pub const PORTMAP: Program = PLUGINS.program("portmap", "plugins/meta/portmap");

/// What a cluster needs beside its nodes, and what speaks to it.
pub const CONTROL_PLANE: &[Program] = &[ETCD, KUBE_APISERVER, KUBECTL, KUBE_CONTROLLER_MANAGER, KUBE_SCHEDULER];

/// etcd 3.7.
pub const ETCD: Program = Module::new("go.etcd.io/etcd/server/v3", "v3.7.2").program("etcd", "");
/// The API server, 1.37.
pub const KUBE_APISERVER: Program = KUBERNETES.program("kube-apiserver", "cmd/kube-apiserver");
/// The client.
pub const KUBECTL: Program = KUBERNETES.program("kubectl", "cmd/kubectl");
/// The controllers: Deployments, endpoints, service accounts, certificates, garbage.
pub const KUBE_CONTROLLER_MANAGER: Program =
    KUBERNETES.program("kube-controller-manager", "cmd/kube-controller-manager");
/// The scheduler.
pub const KUBE_SCHEDULER: Program = KUBERNETES.program("kube-scheduler", "cmd/kube-scheduler");
/// What makes a machine join a cluster.
pub const KUBEADM: Program = KUBERNETES.program("kubeadm", "cmd/kubeadm");
/// The name server of clusters, of the version that kubeadm 1.37 installs.
pub const COREDNS: Program = Module::new("github.com/coredns/coredns", "v1.14.6").program("coredns", "").for_images();

/// The node as upstream has it.
pub const REFERENCE_NODE: &[Program] = &[KUBELET, KUBE_PROXY];

/// The node agent, 1.37.
pub const KUBELET: Program = KUBERNETES.program("kubelet", "cmd/kubelet");
/// The service proxy.
pub const KUBE_PROXY: Program = KUBERNETES.program("kube-proxy", "cmd/kube-proxy");

/// Kubernetes' end-to-end tests, the published suite.
pub const E2E: Program = Program { kind: Kind::Tests, ..KUBERNETES.program("e2e.test", "test/e2e") };
/// What runs them side by side, in the version that they are written for.
pub const GINKGO: Program = Program { name: "ginkgo", kind: Kind::Needed("github.com/onsi/ginkgo/v2/ginkgo"), ..E2E };

/// The tests of container runtimes: critest.
pub const CRITEST: Program =
    Program { kind: Kind::TestsAlone, ..CRI_TOOLS.program("critest", "cmd/critest") }.for_images();
/// What operators speak to container runtimes with.
pub const CRICTL: Program = CRI_TOOLS.program("crictl", "cmd/crictl");

/// The program of most tests of the suites: a server, a client, a prober and more.
pub const AGNHOST: Program = test_image("agnhost", "test/images/agnhost");
/// Tells its effective user.
pub const NNP: Program = test_image("nnp", "test/images/nonewprivs");
/// Sends a packet that once made the kernel reset connections.
pub const REGRESSION_74839: Program = test_image("regression-issue-74839", "test/images/regression-issue-74839");
/// A device plugin without devices.
pub const SAMPLE_DEVICE_PLUGIN: Program = test_image("sampledeviceplugin", "test/images/sample-device-plugin");
/// A driver of claims for devices: each of its devices is a variable, by CDI.
pub const DRA_TEST_DRIVER: Program = KUBERNETES.program("test-driver", "test/e2e/dra/test-driver");
/// What `kubectl top` asks: an API server that scrapes kubelets.
pub const METRICS_SERVER: Program =
    Module::new("sigs.k8s.io/metrics-server", "v0.9.0").program("metrics-server", "cmd/metrics-server");
/// An API server to aggregate.
pub const SAMPLE_APISERVER: Program =
    Module::new("k8s.io/sample-apiserver", "v0.29.2").program("sample-apiserver", "").for_images();
/// etcd once more, for an image.
pub const ETCD_FOR_IMAGES: Program = ETCD.for_images();

/// A client of CRI in all ways in which Go programs name a socket.
pub const CRI_CALLER: Program = Program {
    kind: Kind::Own(include_str!("callers/main.go")),
    ..Module::new("k8s.io/cri-api", "v0.37.2").program("cri-caller", "pkg/apis/runtime/v1")
}
.for_images();

/// A plugin of the Node Resource Interface, by the library that plugins are made with.
pub const NRI_PLUGIN: Program = Program {
    kind: Kind::Own(include_str!("nri/main.go")),
    ..Module::new("github.com/containerd/nri", "v0.12.3").program("nri-plugin", "pkg/stub")
}
.for_images();

const fn test_image(name: &'static str, package: &'static str) -> Program {
    KUBERNETES.program(name, package).for_images()
}

const CONTAINERD_MODULE: Module = Module::new("github.com/containerd/containerd/v2", "v2.4.2");
const CRI_TOOLS: Module = Module::new("sigs.k8s.io/cri-tools", "v1.37.0");
const PLUGINS: Module = Module::new("github.com/containernetworking/plugins", "v1.9.1");

const KUBERNETES: Module = Module {
    siblings: Siblings { prefix: "k8s.io/", names: STAGING, version: "v0.37.2" },
    stamps: &[
        ("k8s.io/component-base/version.gitVersion", "v1.37.2"),
        ("k8s.io/component-base/version.gitMajor", "1"),
        ("k8s.io/component-base/version.gitMinor", "37"),
    ],
    ..Module::new("k8s.io/kubernetes", "v1.37.2")
};

/// The directories below `staging/src/k8s.io` of Kubernetes 1.37.
const STAGING: &[&str] = &[
    "api",
    "apiextensions-apiserver",
    "apimachinery",
    "apiserver",
    "cli-runtime",
    "client-go",
    "cloud-provider",
    "cluster-bootstrap",
    "code-generator",
    "component-base",
    "component-helpers",
    "controller-manager",
    "cri-api",
    "cri-client",
    "cri-streaming",
    "csi-translation-lib",
    "dynamic-resource-allocation",
    "endpointslice",
    "externaljwt",
    "kms",
    "kube-aggregator",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "metrics",
    "mount-utils",
    "pod-security-admission",
    "sample-apiserver",
    "sample-cli-plugin",
    "sample-controller",
    "streaming",
];

/// What building needs on the host.
const TOOLS: &[Tool] = &[
    Tool { program: "go", deb: "golang", rpm: "golang" },
    Tool { program: "gcc", deb: "gcc", rpm: "gcc" },
    Tool { program: "/usr/include/seccomp.h", deb: "libseccomp-dev", rpm: "libseccomp-devel" },
];

/// The version of Kubernetes, as `v1.37.2`.
pub fn kubernetes_version() -> &'static str {
    KUBERNETES.version
}

/// The reference in a few words.
pub fn reference_name() -> String {
    let version = |program: Program| program.module.short_version();
    format!("containerd {} + runc {} + CNI bridge {}", version(CONTAINERD), version(RUNC), version(BRIDGE))
}

/// The reference's node in a few words.
pub fn reference_node_name() -> String {
    format!("kubelet {} + {}", KUBELET.module.short_version(), reference_name())
}

/// The program's path in the cache, built when it is not there.
///
/// # Errors
/// No Go, no module proxy, or a build that fails; the message carries the end of its output.
pub fn build(program: &Program) -> anyhow::Result<PathBuf> {
    let entry = cache::entry(&format!("go-{}", program.name), &key(program), |dir| {
        host::install(TOOLS)?;
        eprintln!("building {} {} from its Go module", program.name, program.module.version);
        build_into(dir, program)
    })?;
    Ok(entry.join(program.name))
}

/// A directory of the cache with all of `programs`, built when they are not there.
///
/// # Errors
/// As [`build`].
pub fn build_all(name: &str, programs: &[Program]) -> anyhow::Result<PathBuf> {
    let paths = programs.iter().map(build).collect::<anyhow::Result<Vec<_>>>()?;
    let key = cache::key(paths.iter().map(|path| path.as_os_str().as_encoded_bytes()));
    cache::entry(name, &key, |dir| {
        for path in &paths {
            symlink(path, dir.join(path.file_name().context("a program has a name")?))?;
        }
        Ok(())
    })
}

fn key(program: &Program) -> String {
    let Module { path, version, stamps, .. } = program.module;
    let stamps = stamps.iter().flat_map(|(variable, value)| [*variable, *value]);
    let linkage = (program.linkage == Linkage::Static).then_some("static");
    let source = if let Kind::Own(source) = program.kind { Some(source) } else { None };
    let words = [path, version, program.name].into_iter().chain(stamps).chain(linkage).chain(source);
    cache::key(words.map(str::as_bytes))
}

fn build_into(dir: &Path, program: &Program) -> anyhow::Result<()> {
    let Program { name, module, package, kind, linkage } = program;
    let source = tempfile::tempdir()?;
    std::fs::write(source.path().join("go.mod"), module.go_mod())?;
    let flags = format!("-mod=mod {}", std::env::var("GOFLAGS").unwrap_or_default());
    let go = |arguments: &[&str]| {
        let mut go = Command::new("go");
        go.args(arguments).current_dir(source.path()).env("GOFLAGS", &flags).env("GOTOOLCHAIN", "auto");
        if *linkage == Linkage::Static {
            go.env("CGO_ENABLED", "0");
        }
        host::run(&mut go)
    };
    let package = format!("{}/{package}", module.path);
    let package = package.trim_end_matches('/');
    let output = dir.join(name).display().to_string();
    // What has no package to import is got by its module.
    let wanted = if *kind == Kind::TestsAlone { module.path } else { package };
    go(&["get", &format!("{wanted}@{}", module.version)])?;
    if let Kind::Own(text) = kind {
        std::fs::write(source.path().join("main.go"), text)?;
    }
    let (make, package) = match kind {
        Kind::Command => (&["build"][..], package),
        Kind::Tests | Kind::TestsAlone => (&["test", "-c"][..], package),
        Kind::Needed(other) => (&["build"][..], *other),
        Kind::Own(_) => (&["build"][..], "."),
    };
    let flags = module.linker_flags();
    let how = ["-trimpath", "-tags", module.tags, "-ldflags", &flags, "-o", &output, package];
    go(&[make, &how].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_replaces_its_siblings_by_their_published_versions() {
        let text = KUBERNETES.go_mod();
        assert!(text.contains("\nreplace k8s.io/api => k8s.io/api v0.37.2\n"), "{text}");
        assert_eq!(text.matches("replace ").count(), 33, "{text}");
        assert_eq!(CONTAINERD_MODULE.go_mod().matches("replace").count(), 0);
    }

    #[test]
    fn programs_are_stamped_with_their_version() {
        assert_eq!(CONTAINERD_MODULE.linker_flags(), "-s -w");
        let flags = KUBERNETES.linker_flags();
        assert!(flags.contains(" -X k8s.io/component-base/version.gitVersion=v1.37.2 "), "{flags}");
        assert_ne!(key(&KUBELET), key(&KUBE_PROXY));
        assert_ne!(key(&ETCD), key(&ETCD_FOR_IMAGES));
    }
}
