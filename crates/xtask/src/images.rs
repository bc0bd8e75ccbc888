//! The image of the example: a Debian root, packages from PyPI, and the application.

use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use serde_json::json;
use testkit::host::Tool;
use testkit::image::{Builder, Layout};
use testkit::{cache, host};

/// What building the example's image needs on the host.
pub(crate) const TOOLS: &[Tool] = &[
    Tool::new("debootstrap", "debootstrap"),
    Tool { program: "pip3", deb: "python3-pip", rpm: "python3-pip" },
    Tool { program: "/bin/busybox", deb: "busybox-static", rpm: "busybox" },
];

/// Debian 12 carries Python 3.11; the wheels have to match.
const SUITE: &str = "bookworm";
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
fn debian_root() -> anyhow::Result<std::path::PathBuf> {
    let key = cache::key([RECIPE, SUITE.as_bytes()]);
    let entry = cache::entry("debian-root", &key, |dir| {
        eprintln!("building a Debian root with debootstrap (about a minute)");
        let root = dir.join("root");
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", "--include=python3", SUITE]).arg(&root);
        host::run(&mut debootstrap)?;
        for waste in ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"] {
            std::fs::remove_dir_all(root.join(waste)).with_context(|| format!("remove {waste}"))?;
        }
        Ok(())
    })?;
    Ok(entry.join("root"))
}

fn install_packages(requirements: &Path, target: &Path) -> anyhow::Result<()> {
    let platform = format!("manylinux2014_{}", std::env::consts::ARCH);
    let mut pip = Command::new("pip3");
    pip.args(["install", "--quiet", "--no-compile", "--only-binary=:all:", "--implementation", "cp"]);
    pip.args(["--python-version", PYTHON, "--platform", &platform, "--target"]).arg(target);
    host::run(pip.arg("--requirement").arg(requirements))
}
