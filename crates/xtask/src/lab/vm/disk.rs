//! What the machine boots from: an initramfs that finds the disk, the disk with a small distribution, and the jobs'
//! own disk. The machine writes to a throw-away layer above them.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use testkit::{cache, host};

use super::Job;
use super::kernel::Kernel;
use super::security::Security;

const START: &str = include_str!("start.sh");
const INIT: &str = include_str!("init.sh");

/// Modules without which the disk is not seen.
const DISK_MODULES: &[&str] = &["virtio_pci", "virtio_blk"];

/// Programs that tests start or compare with, taken from the host with their libraries; the node needs none of them.
const PROGRAMS: &[&str] = &["ip", "nft", "conntrack", "docker-registry", "stat", "ipcmk"];

/// What the C library looks names up in.
const NAMES: &[(&str, &str)] = &[
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost lab\n"),
    // `ipset` takes ports of protocols by name.
    ("etc/protocols", "icmp 1\ntcp 6\nudp 17\nipv6-icmp 58\nsctp 132\n"),
];

/// The host's shell, too: that of busybox takes its own commands before those in `PATH`.
const SHELL: &str = "/bin/sh";

/// Sizes of the sparse disks.
const SYSTEM_SIZE: &str = "8G";
const JOBS_SIZE: &str = "3G";

/// What is the same for every run.
pub(super) struct System {
    dir: PathBuf,
}

impl System {
    /// From the cache, unless the kernel, a script or a program of the host has changed.
    pub(super) fn make(kernel: &Kernel) -> anyhow::Result<Self> {
        let (programs, security) = (host_programs()?, Security::fetch()?);
        let mut parts = vec![kernel.key().into_bytes(), security.key().into_bytes(), START.into(), INIT.into()];
        parts.extend(NAMES.iter().flat_map(|(file, text)| [*file, *text]).map(Into::into));
        for file in programs.iter().chain([&busybox()?]) {
            parts.push(file.as_os_str().as_encoded_bytes().to_vec());
            parts.push(std::fs::read(file).with_context(|| format!("read {}", file.display()))?);
        }
        let key = cache::key(parts.iter().map(Vec::as_slice));
        let dir = cache::entry("vm-system", &key, |dir| {
            eprintln!("building the machine's disk");
            initramfs(kernel, &dir.join("initramfs.gz"))?;
            system_disk(kernel, &programs, &security, &dir.join("disk.ext4"))
        })?;
        Ok(Self { dir })
    }

    pub(super) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.gz")
    }

    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("disk.ext4")
    }
}

/// Below it on the jobs' disk lie libraries, which the machine puts into its own root.
const LIBRARIES: &str = "root";

/// A disk with the jobs' programs, without their debug sections, with libraries, and with the list that the machine works
/// through.
pub(super) fn jobs_disk(jobs: &[Job], scratch: &Path) -> anyhow::Result<PathBuf> {
    let root = scratch.join("jobs");
    std::fs::create_dir_all(&root)?;
    let (mut list, mut libraries) = (String::new(), BTreeSet::new());
    for job in jobs {
        for program in &job.programs {
            for program in executables(program)? {
                libraries.extend(self::libraries(&program));
            }
            let name = program.file_name().with_context(|| format!("{} is no program", program.display()))?;
            if program.is_dir() {
                host::run(Command::new("cp").arg("-rT").arg(program).arg(root.join(name)))?;
            } else {
                strip(program, &root.join(name))?;
            }
        }
        list.push_str(&format!("{}\t{}\n", job.name, job.command));
    }
    // Those are mapped while the machine would put them in place.
    let there = host_programs()?;
    for library in libraries.iter().filter(|library| !there.contains(library)) {
        copy_file(library, &root.join(LIBRARIES).join(library.strip_prefix("/")?))?;
    }
    std::fs::write(root.join("list"), list)?;
    let disk = scratch.join("jobs.ext4");
    make_disk(&root, &disk, JOBS_SIZE)?;
    Ok(disk)
}

/// A program itself, or the files directly in a directory that may be executed.
fn executables(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !program.is_dir() {
        return Ok(vec![program.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(program).with_context(|| format!("read {}", program.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?; // of a link itself
        if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn strip(program: &Path, to: &Path) -> anyhow::Result<()> {
    let stripped = host::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(program));
    // A script has nothing to strip.
    stripped.or_else(|_| std::fs::copy(program, to).map(drop).with_context(|| format!("copy {}", program.display())))
}

fn initramfs(kernel: &Kernel, archive: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let root = scratch.path();
    for dir in ["bin", "dev", "proc", "disk", "modules"] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    std::fs::copy(busybox()?, root.join("bin/busybox")).context("copy busybox")?;
    let mut order = String::new();
    for file in kernel.load_order(DISK_MODULES)? {
        let name = plain_module(&file, &root.join("modules"))?;
        order.push_str(&format!("{name}\n"));
    }
    std::fs::write(root.join("modules/order"), order)?;
    write_program(&root.join("init"), START)?;
    let pack = "find . | cpio --quiet -o -H newc | gzip -1 > \"$0\"";
    host::run(Command::new("sh").args(["-c", pack]).arg(archive).current_dir(root))
}

/// Copies a module, decompressed: busybox's `insmod` takes it as it is. Returns its name.
fn plain_module(file: &Path, to: &Path) -> anyhow::Result<String> {
    let name = file.file_name().and_then(|name| name.to_str()).context("a module has a name")?;
    let Some(plain) = name.strip_suffix(".xz") else {
        std::fs::copy(file, to.join(name))?;
        return Ok(name.to_owned());
    };
    std::fs::write(to.join(plain), host::output(Command::new("xz").arg("-dc").arg(file))?)?;
    Ok(plain.to_owned())
}

fn system_disk(kernel: &Kernel, programs: &[PathBuf], security: &Security, disk: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let root = scratch.path();
    testkit::image::busybox_root(root)?;
    // It is a link to busybox, through which the copy below would go.
    std::fs::remove_file(root.join("bin/sh"))?;
    for dir in ["usr/sbin", "lib", "root", "run", "jobs", "var/lib", "var/log", "opt"] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    for file in programs {
        copy_below(file, root)?;
    }
    host::run(Command::new("cp").arg("-r").arg(kernel.modules()).arg(root.join("lib/modules")))?;
    security.install(root)?;
    write_program(&root.join("init"), INIT)?;
    for (file, text) in NAMES {
        std::fs::write(root.join(file), text)?;
    }
    make_disk(root, disk, SYSTEM_SIZE)
}

fn make_disk(root: &Path, disk: &Path, size: &str) -> anyhow::Result<()> {
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d"]).arg(root).arg(disk).arg(size);
    host::run(&mut make)
}

/// The programs, and the libraries that the host's loader would map for them.
fn host_programs() -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for program in PROGRAMS.iter().chain([&SHELL]) {
        let path = host::find(program).with_context(|| format!("{program} is not installed"))?;
        files.extend(libraries(&path));
        files.push(path);
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// What the loader would map for a program.
fn libraries(program: &Path) -> Vec<PathBuf> {
    // It fails for static programs, which need nothing.
    let told = host::output(Command::new("ldd").arg(program)).unwrap_or_default();
    String::from_utf8_lossy(&told).split_whitespace().filter_map(absolute).collect()
}

fn absolute(word: &str) -> Option<PathBuf> {
    word.starts_with('/').then(|| PathBuf::from(word.trim_end_matches(':')))
}

/// Programs go to `/usr/sbin`, before busybox's in `PATH`; libraries to where the loader looks for them.
fn copy_below(file: &Path, root: &Path) -> anyhow::Result<()> {
    let name = file.file_name().context("a file has a name")?;
    let is_program = PROGRAMS.iter().any(|program| name == *program);
    let to = if is_program { root.join("usr/sbin").join(name) } else { root.join(file.strip_prefix("/")?) };
    copy_file(file, &to)
}

/// Copies a file, also into a directory that is not there yet.
fn copy_file(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to.parent().context("below the root")?)?;
    std::fs::copy(from, to).map(drop).with_context(|| format!("copy {}", from.display()))
}

fn busybox() -> anyhow::Result<PathBuf> {
    host::find("busybox").context("busybox is not installed (package busybox-static)")
}

fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    Ok(std::fs::set_permissions(path, mode)?)
}
