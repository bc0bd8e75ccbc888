//! Debian as a store of programs: a root made by `debootstrap`, and its programs with the libraries they load.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::host::{self, Tool};
use crate::{cache, image};

/// What makes a root.
pub const TOOL: Tool = Tool::new("debootstrap", "debootstrap");

/// Debian 12.
const SUITE: &str = "bookworm";

/// Bumped when what is left out of a root changes.
const RECIPE: &str = "2";

/// A directory with a minimal Debian and `packages`.
///
/// # Errors
/// No debootstrap, or no mirror.
pub fn root(packages: &[&str]) -> anyhow::Result<PathBuf> {
    let key = cache::key([RECIPE, SUITE].iter().chain(packages).map(|part| part.as_bytes()));
    let entry = cache::entry("debian-root", &key, |dir| {
        host::install(&[TOOL])?;
        eprintln!("building a Debian root with debootstrap (about a minute)");
        let root = dir.join("root");
        let mut debootstrap = Command::new(TOOL.program);
        debootstrap.args(["--variant=minbase", &format!("--include={}", packages.join(",")), SUITE]).arg(&root);
        host::run(&mut debootstrap)?;
        for waste in ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"] {
            std::fs::remove_dir_all(root.join(waste)).with_context(|| format!("remove {waste}"))?;
        }
        Ok(())
    })?;
    Ok(entry.join("root"))
}

/// systemd with its message bus, for the system and for users, and Podman, which asks a runtime for its control groups.
const MANAGED: &[&str] = &["systemd", "dbus", "dbus-user-session", "libpam-systemd", "podman", "netavark", "uidmap"];

/// A directory with a Debian that systemd can run, for a container.
///
/// # Errors
/// As [`root`].
pub fn managed() -> anyhow::Result<PathBuf> {
    root(MANAGED)
}

/// The same as the file of a disk, for a virtual machine.
///
/// # Errors
/// As [`root`], or no mke2fs.
pub fn managed_disk() -> anyhow::Result<PathBuf> {
    const SIZE: &str = "400M";
    let root = managed()?;
    let key = cache::key([SIZE.as_bytes(), root.as_os_str().as_encoded_bytes()]);
    let entry = cache::entry("debian-disk", &key, |dir| {
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"]).arg(&root).arg(dir.join(MANAGED_DISK)).arg(SIZE);
        host::run(&mut make)
    })?;
    Ok(entry.join(MANAGED_DISK))
}

/// Docker and Podman, unpacked: what calls an OCI runtime.
///
/// # Errors
/// As [`unpacked`].
pub fn engines() -> anyhow::Result<PathBuf> {
    unpacked("callers", &["docker.io", "podman"])
}

/// crun, unpacked.
///
/// # Errors
/// As [`unpacked`].
pub fn crun() -> anyhow::Result<PathBuf> {
    unpacked("crun", &["crun"])
}

/// The name of that file.
pub const MANAGED_DISK: &str = "debian.ext4";

/// Takes packages apart, also those that are installed, with those that they need and this machine lacks. What some have in `/lib` is in `/usr/lib`.
const UNPACK: &str = "set -e
dir=$1
shift
mkdir -p $dir/archives/partial
apt-get update -qq
apt-get install -qq -y --reinstall --download-only --no-install-recommends -o Dir::Cache::archives=$dir/archives $* >&2
for package in $dir/archives/*.deb; do dpkg-deb -x $package $dir/root; done
for name in bin sbin lib; do
    if test -d $dir/root/$name; then
        mkdir -p $dir/root/usr/$name
        cp -a $dir/root/$name/. $dir/root/usr/$name
        rm -r $dir/root/$name
    fi
done
rm -r $dir/archives";

/// A directory with the files of packages that are not installed, and of those that they need.
///
/// # Errors
/// No apt-get, or no mirror.
pub fn unpacked(name: &str, packages: &[&str]) -> anyhow::Result<PathBuf> {
    let key = cache::key([UNPACK].iter().chain(packages).map(|part| part.as_bytes()));
    let entry = cache::entry(name, &key, |dir| {
        eprintln!("downloading {} (not installed)", packages.join(", "));
        let mut unpack = Command::new("sh");
        unpack.args(["-c", UNPACK, "sh"]).arg(dir).args(packages).env("DEBIAN_FRONTEND", "noninteractive");
        host::run(&mut unpack)
    })?;
    Ok(entry.join("root"))
}

/// Adds programs of `root` to a layer, each `(from, to)`, with all libraries that they load at their start.
///
/// # Errors
/// A program is not there, or those of the writer.
pub fn append_programs(
    tar: &mut tar::Builder<&mut dyn Write>,
    root: &Path,
    programs: &[(&str, &str)],
) -> anyhow::Result<()> {
    for (from, to) in programs {
        image::append_file(tar, to, 0o755, &root.join(from))?;
    }
    let files: Vec<&str> = programs.iter().map(|(from, _)| *from).collect();
    for library in libraries(root, &files)? {
        image::append_file(tar, &library, 0o755, &root.join(&library))?;
    }
    Ok(())
}

/// The libraries of `files` and what loads them, as paths below `root`.
fn libraries(root: &Path, files: &[&str]) -> anyhow::Result<BTreeSet<String>> {
    let mut ldd = Command::new("chroot");
    ldd.arg(root).arg("ldd").args(files.iter().map(|file| format!("/{file}")));
    Ok(parse_libraries(&String::from_utf8_lossy(&host::output(&mut ldd)?)))
}

fn parse_libraries(text: &str) -> BTreeSet<String> {
    let path = |line: &str| {
        let (file, _) = line.strip_prefix('\t')?.rsplit_once(" (")?;
        let file = file.rsplit_once(" => ").map_or(file, |(_, file)| file);
        file.strip_prefix('/').map(str::to_owned)
    };
    text.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_prints() {
        let text = "/usr/bin/a:\n\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7e)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7d)\n/usr/bin/b:\n\tlibc.so.6 => /lib/x/libc.so.6 (0x1)\n";
        let libraries: Vec<String> = parse_libraries(text).into_iter().collect();
        assert_eq!(libraries, ["lib/x/libc.so.6", "lib64/ld-linux-x86-64.so.2"]);
    }
}
