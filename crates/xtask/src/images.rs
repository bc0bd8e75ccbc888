//! The image of the example: a Debian root, packages from PyPI, and the application.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::json;
use testkit::host::Tool;
use testkit::image::{Builder, Layout};
use testkit::{cache, debian, host};

/// What building the example's image needs on the host.
pub(crate) const TOOLS: &[Tool] = &[
    debian::TOOL,
    Tool { program: "pip3", deb: "python3-pip", rpm: "python3-pip" },
    Tool { program: "/bin/busybox", deb: "busybox-static", rpm: "busybox" },
];

/// The wheels have to match the Python of [`debian::root`].
const PYTHON: &str = "3.11";
const SITE_PACKAGES: &str = "usr/local/lib/python3.11/dist-packages";

/// Bumped when a recipe changes, so that caches are made anew.
const RECIPE: &[u8] = b"1";

/// The example's image as an OCI layout, from the cache when its inputs have not changed.
pub(crate) fn ai_service() -> anyhow::Result<Layout> {
    let source = crate::workspace::root().join("examples/ai-service/image");
    let inputs = source_files(&source)?;
    let key = cache::key(std::iter::once(RECIPE).chain(inputs.iter().map(Vec::as_slice)));
    let dir = cache::entry("ai-service-image", &key, |dir| build(&source, dir))?;
    Ok(Layout::open(dir))
}

/// A busybox image as an OCI layout.
pub(crate) fn busybox() -> anyhow::Result<Layout> {
    let dir = cache::entry("busybox-image", &cache::key([RECIPE]), |dir| testkit::image::busybox(dir).map(drop))?;
    Ok(Layout::open(dir))
}

/// The image of the reference's sandboxes: a process that waits for ever and reaps.
pub(crate) fn pause() -> anyhow::Result<Layout> {
    testkit::suite::PAUSE.layout()
}

/// Bytes of files in the image whose pull is measured, before compression: 1.37 GiB.
const LARGE_BYTES: u64 = 1_471_026_000;

/// An image of three layers such as applications have: a Debian root with Python (many small files), and libraries of the
/// Rust toolchain (some large ones), as often as it takes.
pub(crate) fn large() -> anyhow::Result<Layout> {
    let sysroot = host::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let libraries = Path::new(String::from_utf8(sysroot)?.trim()).join("lib");
    let size = LARGE_BYTES.to_le_bytes();
    let key = cache::key([RECIPE, &size, libraries.as_os_str().as_encoded_bytes()]);
    let dir = cache::entry("large-image", &key, |dir| {
        let debian = debian_root()?;
        eprintln!("building an image of {} MB", LARGE_BYTES / 1_000_000);
        let mut builder = Builder::new(dir)?;
        builder.layer_from_dir(&debian, "")?;
        let rest = LARGE_BYTES.saturating_sub(files(&debian)?.iter().map(|(_, size)| size).sum());
        let (first, second) = halves(up_to(rest, copies(&libraries, rest)?));
        for half in [first, second] {
            builder.layer(|tar| {
                for (name, file, _) in half {
                    tar.append_path_with_name(&file, name)?;
                }
                Ok(())
            })?;
        }
        builder.finish(json!({ "Cmd": ["/bin/sh"] })).map(drop)
    })?;
    Ok(Layout::open(dir))
}

/// Files with their sizes.
type Files = Vec<(PathBuf, u64)>;

/// A file of an image: its name there, where its content is, its size.
type Entry = (PathBuf, PathBuf, u64);

/// The files below `dir`, in one directory of the image after the other until there are `bytes` of them.
fn copies(dir: &Path, bytes: u64) -> anyhow::Result<Vec<Entry>> {
    let files = files(dir)?;
    let total = files.iter().map(|(_, size)| size).sum::<u64>();
    ensure!(total > 0, "{} is empty", dir.display());
    let mut entries = Vec::new();
    for number in 0..bytes.div_ceil(total) {
        for (file, size) in &files {
            let name = Path::new("opt").join(number.to_string()).join(file.strip_prefix(dir)?);
            entries.push((name, file.clone(), *size));
        }
    }
    Ok(entries)
}

/// The first of `files` that are not larger than `bytes` together.
fn up_to(bytes: u64, files: Vec<Entry>) -> Vec<Entry> {
    let mut left = bytes;
    let mut fits = |size: u64| left.checked_sub(size).map(|rest| left = rest).is_some();
    files.into_iter().filter(|(_, _, size)| fits(*size)).collect()
}

/// Two parts with about the same number of bytes.
fn halves(files: Vec<Entry>) -> (Vec<Entry>, Vec<Entry>) {
    let (mut first, mut second, mut lead) = (Vec::new(), Vec::new(), 0_i64);
    for entry in files {
        let bytes = i64::try_from(entry.2).unwrap_or(i64::MAX);
        if lead <= 0 {
            first.push(entry);
            lead = lead.saturating_add(bytes);
        } else {
            second.push(entry);
            lead = lead.saturating_sub(bytes);
        }
    }
    (first, second)
}

/// Regular files below `dir` with their sizes, by path.
fn files(dir: &Path) -> anyhow::Result<Files> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
            let entry = entry?;
            let metadata = entry.metadata()?; // of a link itself
            if metadata.is_dir() {
                open.push(entry.path());
            } else if metadata.is_file() {
                found.push((entry.path(), metadata.len()));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn source_files(source: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut paths: Vec<_> = std::fs::read_dir(source)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<_>>()?;
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).with_context(|| format!("read {}", path.display()))).collect()
}

fn build(source: &Path, dir: &Path) -> anyhow::Result<()> {
    let debian = debian_root()?;
    eprintln!("fetching Python packages from PyPI");
    let packages = tempfile::tempdir()?;
    install_packages(&source.join("requirements.txt"), packages.path())?;
    eprintln!("building the image myrepo/ai-service:latest");
    let mut builder = Builder::new(dir)?;
    builder.layer_from_dir(&debian, "")?;
    builder.layer_from_dir(packages.path(), SITE_PACKAGES)?;
    builder.layer(|tar| {
        for name in ["app.py", "client.py", "neighbour.py"] {
            let text = std::fs::read_to_string(source.join(name))?;
            testkit::image::append_text(tar, &format!("app/{name}"), &text)?;
        }
        Ok(())
    })?;
    builder.finish(json!({
        "WorkingDir": "/app",
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"],
        "Cmd": ["python3", "-m", "uvicorn", "app:app", "--host", "0.0.0.0", "--port", "8000"],
        "ExposedPorts": { "8000/tcp": {} },
    }))?;
    Ok(())
}

/// A minimal Debian with Python, shared by all versions of the application.
fn debian_root() -> anyhow::Result<PathBuf> {
    debian::root(&["python3"])
}

fn install_packages(requirements: &Path, target: &Path) -> anyhow::Result<()> {
    let platform = format!("manylinux2014_{}", std::env::consts::ARCH);
    let mut pip = Command::new("pip3");
    pip.args(["install", "--quiet", "--no-compile", "--only-binary=:all:", "--implementation", "cp"]);
    pip.args(["--python-version", PYTHON, "--platform", &platform, "--target"]).arg(target);
    host::run(pip.arg("--requirement").arg(requirements))
}
