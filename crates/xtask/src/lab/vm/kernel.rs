//! Debian's cloud kernel, unpacked from its package and not installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use testkit::{cache, host};

/// Bumped when what is made from the package changes.
const RECIPE: &[u8] = b"2";

/// An unpacked kernel package.
pub(super) struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// The cloud kernel of the host's Debian release, fetched when the cache has none.
    pub(super) fn fetch() -> anyhow::Result<Self> {
        let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        let key = cache::key([RECIPE, release.as_bytes()]);
        Ok(Self { dir: cache::entry("vm-kernel", &key, fetch)? })
    }

    /// Identifies the kernel in cache keys of what is made with it.
    pub(super) fn key(&self) -> String {
        self.dir.display().to_string()
    }

    /// The image to boot.
    pub(super) fn image(&self) -> anyhow::Result<PathBuf> {
        find(&self.dir.join("root/boot"), |name| name.starts_with("vmlinuz-"))
    }

    /// The directory that belongs at `/lib/modules`, holding one kernel's modules with their index.
    pub(super) fn modules(&self) -> PathBuf {
        self.dir.join("root/lib/modules")
    }

    /// The files of `modules` and of what they depend on, in the order in which they load.
    pub(super) fn load_order(&self, modules: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
        let dir = find(&self.modules(), |_| true)?;
        let index = std::fs::read_to_string(dir.join("modules.dep")).context("read modules.dep")?;
        let names = load_order(&index, modules)?;
        Ok(names.into_iter().map(|name| dir.join(name)).collect())
    }
}

fn fetch(dir: &Path) -> anyhow::Result<()> {
    let package = newest_package()?;
    eprintln!("fetching {package}");
    host::run(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(dir))?;
    let deb = find(dir, |name| name.ends_with(".deb"))?;
    let root = dir.join("root");
    host::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
    std::fs::remove_file(deb)?;
    let modules = find(&root.join("lib/modules"), |_| true)?;
    let version = modules.file_name().context("a kernel has a version")?;
    host::run(Command::new("depmod").arg("--basedir").arg(&root).arg(version))
}

/// The package that Debian's `linux-image-cloud-…` stands for.
fn newest_package() -> anyhow::Result<String> {
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("the lab takes its kernel from Debian's packages, and there is no apt-get here");
    }
    host::run(Command::new("apt-get").args(["update", "-qq"]))?;
    let depends =
        host::output(Command::new("apt-cache").args(["depends", &format!("linux-image-cloud-{architecture}")]))?;
    let depends = String::from_utf8(depends)?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(package.context("linux-image-cloud depends on no kernel")?.to_owned())
}

/// The only, or first, suitable entry of a directory.
pub(super) fn find(dir: &Path, wanted: impl Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let found = entries.flatten().find(|entry| entry.file_name().to_str().is_some_and(&wanted));
    Ok(found.with_context(|| format!("nothing suitable in {}", dir.display()))?.path())
}

/// What `modules.dep` says about `modules`: each line names a file and, the nearest first, all that it needs.
fn load_order<'a>(index: &'a str, modules: &[&str]) -> anyhow::Result<Vec<&'a str>> {
    let mut order: Vec<&str> = Vec::new();
    for module in modules {
        let (file, needs) = index
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| module_name(file) == *module)
            .with_context(|| format!("the kernel has no module {module}"))?;
        for file in needs.split_whitespace().rev().chain([file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    Ok(order)
}

/// The module in a file: `kernel/drivers/block/virtio_blk.ko.xz` is `virtio_blk`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or_default();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_loads_first() {
        let index = "k/a.ko: k/b-x.ko k/c.ko\nk/b-x.ko: k/c.ko\nk/c.ko:\n";
        assert_eq!(load_order(index, &["a"]).unwrap(), ["k/c.ko", "k/b-x.ko", "k/a.ko"]);
        assert_eq!(load_order(index, &["b_x", "a"]).unwrap(), ["k/c.ko", "k/b-x.ko", "k/a.ko"]);
        assert!(load_order(index, &["d"]).is_err());
    }
}
