//! What the kernel's security modules are tested with, from packages of Debian that are unpacked and not installed: the
//! compiler of AppArmor's profiles, and a compiled policy of SELinux.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use testkit::{cache, debian, host};

/// The policy, but for the categories.
const POLICY: &str = include_str!("policy.cil");

/// How many categories there are, as in distributions' policies.
const CATEGORIES: u32 = 1024;

/// The newest version of binary policies that a kernel of 2018 reads.
const POLICY_VERSION: &str = "31";

/// The parser of profiles, and the compiler of policies.
const PACKAGES: [&str; 2] = ["apparmor", "secilc"];

/// Labels of containers, in the file that distributions have them in.
const CONTEXTS: &str =
    "process = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";

/// Unpacked packages and a compiled policy.
pub(crate) struct Security {
    /// Of the packages.
    root: PathBuf,
    policy: PathBuf,
}

impl Security {
    /// Fetched and compiled when the cache has none.
    pub(crate) fn fetch() -> anyhow::Result<Self> {
        let root = debian::unpacked("security-modules", &PACKAGES)?;
        let key = cache::key([POLICY.as_bytes(), POLICY_VERSION.as_bytes(), root.as_os_str().as_encoded_bytes()]);
        let policy = cache::entry("vm-policy", &key, |dir| compile_policy(&root, dir))?.join("policy");
        Ok(Self { root, policy })
    }

    /// Identifies it in cache keys of what is made with it.
    pub(super) fn key(&self) -> String {
        format!("{} {}", self.root.display(), self.policy.display())
    }

    /// Puts the parser and the policy below `root`.
    pub(super) fn install(&self, root: &Path) -> anyhow::Result<()> {
        let copy = |from: &Path, to: &str| {
            let to = root.join(to);
            std::fs::create_dir_all(to.parent().context("below the root")?)?;
            std::fs::copy(from, &to).map(drop).with_context(|| format!("copy {}", from.display()))
        };
        copy(&self.parser(), "usr/sbin/apparmor_parser")?;
        copy(&self.profiles().join(ABI), &format!("etc/apparmor.d/{ABI}"))?;
        copy(&self.policy, "etc/selinux/lab/policy")?;
        std::fs::create_dir_all(root.join("etc/selinux/lab/contexts"))?;
        std::fs::write(root.join("etc/selinux/lab/contexts/lxc_contexts"), CONTEXTS)?;
        Ok(std::fs::write(root.join("etc/selinux/config"), "SELINUX=enforcing\nSELINUXTYPE=lab\n")?)
    }

    /// A profile as kernels take it.
    pub(crate) fn compile(&self, profile: &Path) -> anyhow::Result<Vec<u8>> {
        let mut parser = Command::new(self.parser());
        parser.args(["--skip-kernel-load", "--skip-cache", "--quiet", "--stdout", "--base"]).arg(self.profiles());
        // What this kernel mediates, or that it has no AppArmor at all, makes no difference.
        parser.arg("--kernel-features").arg(self.profiles().join(ABI)).arg(profile);
        host::output(&mut parser)
    }

    /// The program; it needs nothing but the C library.
    fn parser(&self) -> PathBuf {
        self.root.join("usr/sbin/apparmor_parser")
    }

    /// What stands at `/etc/apparmor.d` where the package is installed.
    pub(crate) fn profiles(&self) -> PathBuf {
        self.root.join("etc/apparmor.d")
    }
}

/// The description of what kernels mediate that profiles are compiled for.
const ABI: &str = "abi/3.0";

fn compile_policy(root: &Path, dir: &Path) -> anyhow::Result<()> {
    let source = dir.join("policy.cil");
    std::fs::write(&source, format!("{POLICY}{}", categories()))?;
    let libraries = root.join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
    let mut compiler = Command::new(root.join("usr/bin/secilc"));
    compiler.env("LD_LIBRARY_PATH", libraries).args(["-c", POLICY_VERSION, "-f", "/dev/null", "-o"]);
    host::run(compiler.arg(dir.join("policy")).arg(source))
}

/// Their declarations, and which of them a level may have.
fn categories() -> String {
    let names: Vec<String> = (0..CATEGORIES).map(|number| format!("c{number}")).collect();
    let declared: String = names.iter().map(|name| format!("(category {name})\n")).collect();
    let last = CATEGORIES - 1;
    format!("{declared}(categoryorder ({}))\n(sensitivitycategory s0 (range c0 c{last}))\n", names.join(" "))
}
