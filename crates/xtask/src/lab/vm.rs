//! A virtual machine with Debian's cloud kernel: what the host's kernel lacks is tested there.
//!
//! The kernel comes from its package, unpacked and not installed. The initramfs holds busybox, a script and the test
//! programs (they are static); the script prints each program's output and its exit code on the serial console.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use testkit::cache;
use testkit::host::{self, Tool};

/// What to run in the machine.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Static programs to run inside, each without arguments; none means a shell
    programs: Vec<PathBuf>,
    /// Added to the kernel's command line
    #[arg(long, default_value = "")]
    append: String,
}

/// What the lab needs on the host.
pub(crate) const TOOLS: &[Tool] = &[
    Tool { program: "qemu-system-x86_64", deb: "qemu-system-x86", rpm: "qemu-system-x86-core" },
    Tool { program: "/bin/busybox", deb: "busybox-static", rpm: "busybox" },
    Tool::new("cpio", "cpio"),
    Tool::new("modinfo", "kmod"),
];

/// Modules that a node may need, in the order in which they are loaded.
const MODULES: &[&str] = &[
    "overlay",
    "veth",
    "bridge",
    "nf_tables",
    "nft_ct",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_fib_inet",
    "nft_reject_inet",
    "nft_redir",
    "nft_chain_nat",
    "nf_conntrack_netlink",
    "ip_vs",
    "ip_vs_rr",
    "dummy",
    "tun",
];

/// The line that says how a program in the machine ended.
const VERDICT: &str = "@@verdict ";

/// Longest run of all programs together.
const LIMIT: Duration = Duration::from_secs(900);

/// A program in the machine and how it ended.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) program: String,
    pub(crate) code: i32,
}

/// The command.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.programs.is_empty() {
        return shell(&options.append);
    }
    let verdicts = run_programs(&options.programs, &options.append, |line| println!("{line}"))?;
    let failed: Vec<&Verdict> = verdicts.iter().filter(|verdict| verdict.code != 0).collect();
    if failed.is_empty() {
        return Ok(());
    }
    bail!("failed in the machine: {failed:?}")
}

/// Boots, runs every program, gives each line of the console to `line`, and returns the verdicts.
///
/// # Errors
/// The machine does not boot, or does not end in time.
pub(crate) fn run_programs(
    programs: &[PathBuf],
    append: &str,
    mut line: impl FnMut(&str),
) -> anyhow::Result<Vec<Verdict>> {
    host::install(TOOLS)?;
    let kernel = Kernel::fetch()?;
    let scratch = tempfile::tempdir()?;
    let initramfs = kernel.initramfs(scratch.path(), programs)?;
    let mut machine =
        kernel.machine(&initramfs, append).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start qemu")?;
    let console = machine.stdout.take().context("stdout is piped")?;
    let watchdog = Watchdog::start(machine.id());
    let mut verdicts = Vec::new();
    for text in BufReader::new(console).split(b'\n') {
        let text = String::from_utf8_lossy(&text?).trim_end_matches('\r').to_owned();
        match text.strip_prefix(VERDICT).and_then(|rest| rest.split_once(' ')) {
            Some((code, program)) => {
                verdicts.push(Verdict { program: program.to_owned(), code: code.parse().unwrap_or(-1) })
            }
            None => line(&text),
        }
    }
    machine.wait()?;
    if watchdog.finish() {
        bail!("the machine did not end within {} s", LIMIT.as_secs());
    }
    if verdicts.len() != programs.len() {
        bail!("the machine ended after {} of {} programs; its console stands above", verdicts.len(), programs.len());
    }
    Ok(verdicts)
}

fn shell(append: &str) -> anyhow::Result<()> {
    host::install(TOOLS)?;
    let kernel = Kernel::fetch()?;
    let scratch = tempfile::tempdir()?;
    let initramfs = kernel.initramfs(scratch.path(), &[])?;
    crate::workspace::run(&mut kernel.machine(&initramfs, append))
}

/// Ends a machine that hangs.
struct Watchdog {
    done: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

impl Watchdog {
    fn start(pid: u32) -> Self {
        let (done, waiting) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let begin = Instant::now();
            let in_time = waiting.recv_timeout(LIMIT).is_ok() || begin.elapsed() < LIMIT;
            if let (false, Some(pid)) = (in_time, i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw)) {
                // It may have ended in this instant.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            !in_time
        });
        Self { done, thread }
    }

    /// Whether it had to act.
    fn finish(self) -> bool {
        drop(self.done);
        self.thread.join().unwrap_or(false)
    }
}

/// An unpacked kernel package.
struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// Fetches the newest cloud kernel that the package manager knows.
    fn fetch() -> anyhow::Result<Self> {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let depends =
            host::output(Command::new("apt-cache").args(["depends", &format!("linux-image-cloud-{architecture}")]))
                .context("the lab takes its kernel from Debian's packages")?;
        let depends = String::from_utf8(depends)?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .context("linux-image-cloud depends on no kernel")?
            .to_owned();
        let dir = cache::entry("vm-kernel", &cache::key([package.as_bytes()]), |dir| {
            eprintln!("fetching {package}");
            host::run(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(dir))?;
            let deb = std::fs::read_dir(dir)?
                .flatten()
                .find(|entry| entry.path().extension().is_some_and(|end| end == "deb"));
            let deb = deb.context("apt-get download left no package")?.path();
            host::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(dir.join("root")))?;
            Ok(std::fs::remove_file(deb)?)
        })?;
        Ok(Self { dir: dir.join("root") })
    }

    fn image(&self) -> anyhow::Result<PathBuf> {
        find(&self.dir.join("boot"), |name| name.starts_with("vmlinuz-"))
    }

    fn machine(&self, initramfs: &Path, append: &str) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "1024",
            "-nographic",
            "-no-reboot",
            "-nic",
            "none",
        ]);
        qemu.arg("-kernel").arg(self.image().unwrap_or_default()).arg("-initrd").arg(initramfs);
        qemu.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 cgroup_no_v1=all {append}"));
        qemu
    }

    /// Busybox, the modules, the script and the programs as a compressed cpio archive.
    fn initramfs(&self, scratch: &Path, programs: &[PathBuf]) -> anyhow::Result<PathBuf> {
        let root = scratch.join("root");
        for dir in ["bin", "proc", "sys", "dev", "tmp", "run", "etc", "var/lib", "var/log", "tests", "modules"] {
            std::fs::create_dir_all(root.join(dir))?;
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).context("copy /bin/busybox")?;
        let modules = self.copy_modules(&root.join("modules"))?;
        let mut names = Vec::new();
        for program in programs {
            let name = program.file_name().and_then(|name| name.to_str()).context("a program has a name")?;
            std::fs::copy(program, root.join("tests").join(name))
                .with_context(|| format!("copy {}", program.display()))?;
            names.push(name.to_owned());
        }
        write_init(&root.join("init"), &modules, &names)?;
        let archive = scratch.join("initramfs.gz");
        let pack = format!("find . | cpio --quiet -o -H newc | gzip -1 > {}", archive.display());
        host::run(Command::new("sh").args(["-c", &pack]).current_dir(&root))?;
        Ok(archive)
    }

    /// Copies the wanted modules with what they depend on; returns their file names in load order.
    fn copy_modules(&self, target: &Path) -> anyhow::Result<Vec<String>> {
        let base = find(&self.dir.join("lib/modules"), |_| true)?;
        let mut files = std::collections::BTreeMap::new();
        index_modules(&base, &mut files)?;
        let mut order = Vec::new();
        for name in MODULES {
            collect_module(name, &files, &mut order)?;
        }
        for name in &order {
            let file = &files[name];
            let to = target.join(format!("{name}.ko"));
            if file.extension().is_some_and(|end| end == "xz") {
                host::run(Command::new("sh").arg("-c").arg(format!("xz -dc {} > {}", file.display(), to.display())))?;
            } else {
                std::fs::copy(file, to)?;
            }
        }
        Ok(order)
    }
}

fn find(dir: &Path, wanted: impl Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let found = entries.flatten().find(|entry| entry.file_name().to_str().is_some_and(&wanted));
    Ok(found.with_context(|| format!("nothing suitable in {}", dir.display()))?.path())
}

/// Module files by module name (dashes are underscores in names).
fn index_modules(dir: &Path, files: &mut std::collections::BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            index_modules(&path, files)?;
        } else if let Some((name, _)) = entry.file_name().to_str().and_then(|name| name.split_once(".ko")) {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Appends `name` after the modules that `modinfo` says it depends on. What is built into the kernel is no module.
fn collect_module(
    name: &str,
    files: &std::collections::BTreeMap<String, PathBuf>,
    order: &mut Vec<String>,
) -> anyhow::Result<()> {
    let Some(file) = files.get(name) else { return Ok(()) };
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    let depends = host::output(Command::new("modinfo").args(["-F", "depends"]).arg(file))?;
    for needed in String::from_utf8(depends)?.trim().split(',').filter(|needed| !needed.is_empty()) {
        collect_module(&needed.replace('-', "_"), files, order)?;
    }
    order.push(name.to_owned());
    Ok(())
}

fn write_init(path: &Path, modules: &[String], programs: &[String]) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(path)?;
    writeln!(file, "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin HOME=/tmp")?;
    writeln!(file, "mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev")?;
    writeln!(
        file,
        "mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run"
    )?;
    writeln!(
        file,
        "mount -t tmpfs var /var/lib; mount -t cgroup2 cgroup /sys/fs/cgroup; mount -t securityfs sec /sys/kernel/security"
    )?;
    writeln!(file, "for m in {}; do insmod /modules/$m.ko || echo \"module $m: failed\"; done", modules.join(" "))?;
    // Programs run outside the root group: a group with processes hands no controllers down.
    writeln!(file, "mkdir /sys/fs/cgroup/lab; echo $$ > /sys/fs/cgroup/lab/cgroup.procs; ip link set lo up")?;
    if programs.is_empty() {
        writeln!(file, "setsid cttyhack sh")?;
    }
    for name in programs {
        writeln!(file, "cd /tmp; /tests/{name}; echo \"{VERDICT}$? {name}\"")?;
    }
    writeln!(file, "poweroff -f")?;
    let mut mode = file.metadata()?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
    Ok(file.set_permissions(mode)?)
}
