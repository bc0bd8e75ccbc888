//! Test images: directories become the layers of an OCI image layout.

use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::cache::hex;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// How a layout's index names the image that a descriptor stands for (OCI image layout, "Annotations").
const REFERENCE: &str = "org.opencontainers.image.ref.name";

/// An OCI image layout on disk, and one image of it.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
    /// Which image; the first without it.
    tag: Option<String>,
}

/// A blob of a layout.
#[derive(Debug)]
pub struct Blob {
    /// `sha256:…`.
    pub digest: String,
    /// Where it lies.
    pub path: PathBuf,
}

/// The manifest of a layout.
#[derive(Debug)]
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// Its bytes as they are hashed.
    pub bytes: Vec<u8>,
}

impl Layout {
    /// The layout in `dir`.
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), tag: None }
    }

    /// The same layout, speaking of the image `tag`.
    #[must_use]
    pub fn tagged(&self, tag: &str) -> Self {
        Self { tag: Some(tag.to_owned()), ..self.clone() }
    }

    /// The layout's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest that `index.json` names.
    ///
    /// # Errors
    /// The layout is incomplete, or has no such tag.
    pub fn manifest(&self) -> anyhow::Result<Manifest> {
        let index: Value = serde_json::from_slice(&std::fs::read(self.dir.join("index.json"))?)?;
        let is_meant = |entry: &&Value| self.tag.as_ref().is_none_or(|tag| entry["annotations"][REFERENCE] == **tag);
        let entry = index["manifests"].as_array().and_then(|entries| entries.iter().find(is_meant));
        let entry = entry.with_context(|| format!("{} has no image {:?}", self.dir.display(), self.tag))?;
        let digest = entry["digest"].as_str().context("index.json names no manifest")?;
        let media_type = entry["mediaType"].as_str().unwrap_or(MANIFEST).to_owned();
        Ok(Manifest { media_type, bytes: std::fs::read(self.blob_path(digest))? })
    }

    /// The configuration and the layers, in the order of the manifest.
    ///
    /// # Errors
    /// The layout is incomplete.
    pub fn blobs(&self) -> anyhow::Result<Vec<Blob>> {
        let manifest: Value = serde_json::from_slice(&self.manifest()?.bytes)?;
        let layers = manifest["layers"].as_array().context("the manifest has no layers")?;
        std::iter::once(&manifest["config"])
            .chain(layers)
            .map(|descriptor| {
                let digest = descriptor["digest"].as_str().context("a descriptor without digest")?.to_owned();
                Ok(Blob { path: self.blob_path(&digest), digest })
            })
            .collect()
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }
}

/// This machine, in Go's words.
pub fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// A layer that is being written.
pub type Layer<'a> = tar::Builder<&'a mut dyn Write>;

/// Builds a [`Layout`].
#[derive(Debug)]
pub struct Builder {
    dir: PathBuf,
    architecture: String,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
    manifests: Vec<Value>,
}

impl Builder {
    /// A builder that writes into `dir`.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new(dir: impl Into<PathBuf>) -> anyhow::Result<Self> {
        let dir = dir.into();
        std::fs::create_dir_all(dir.join("blobs/sha256"))?;
        let architecture = architecture().to_owned();
        Ok(Self { dir, architecture, layers: Vec::new(), diff_ids: Vec::new(), manifests: Vec::new() })
    }

    /// Makes it an image for another machine than this one, in Go's words.
    #[must_use]
    pub fn architecture(self, architecture: &str) -> Self {
        Self { architecture: architecture.to_owned(), ..self }
    }

    /// Adds a layer of exactly these bytes, whatever they are; `plain` is what the configuration says they inflate to.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn raw_layer(&mut self, media_type: &str, blob: &[u8], plain: &[u8]) -> anyhow::Result<()> {
        let digest = hex(&Sha256::digest(blob));
        std::fs::write(self.dir.join("blobs/sha256").join(&digest), blob)?;
        let size = blob.len();
        self.layers.push(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size }));
        self.diff_ids.push(format!("sha256:{}", hex(&Sha256::digest(plain))));
        Ok(())
    }

    /// Adds the tree below `root` as a gzip layer, placed at `prefix` ("" is the root of the image).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn layer_from_dir(&mut self, root: &Path, prefix: &str) -> anyhow::Result<()> {
        self.layer(|tar| {
            tar.follow_symlinks(false);
            let prefix = if prefix.is_empty() { "." } else { prefix };
            Ok(tar.append_dir_all(prefix, root)?)
        })
    }

    /// Adds a gzip layer that `fill` writes.
    ///
    /// # Errors
    /// Those of `fill` and of the file system.
    pub fn layer(&mut self, fill: impl FnOnce(&mut Layer<'_>) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let scratch = tempfile::NamedTempFile::new_in(&self.dir)?;
        let mut plain = Hashing::new(GzEncoder::new(Hashing::new(scratch), Compression::fast()));
        {
            let mut tar = tar::Builder::new(&mut plain as &mut dyn Write);
            fill(&mut tar)?;
            tar.finish()?;
        }
        let (gzip, diff_id) = plain.finish();
        let (scratch, digest) = gzip.finish()?.finish();
        let size = scratch.as_file().metadata()?.len();
        scratch.persist(self.dir.join("blobs/sha256").join(&digest))?;
        self.layers.push(json!({ "mediaType": LAYER, "digest": format!("sha256:{digest}"), "size": size }));
        self.diff_ids.push(format!("sha256:{diff_id}"));
        Ok(())
    }

    /// Writes configuration, manifest and index. `config` is the OCI image configuration's `config` object.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn finish(mut self, config: Value) -> anyhow::Result<Layout> {
        let manifest = self.manifest(config)?;
        self.manifests.push(manifest);
        self.close()
    }

    /// Adds the image `tag`: all layers so far, with this configuration.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn tag(&mut self, tag: &str, config: Value) -> anyhow::Result<()> {
        let mut manifest = self.manifest(config)?;
        manifest["annotations"] = json!({ REFERENCE: tag });
        self.manifests.push(manifest);
        Ok(())
    }

    /// Writes the index of all images that were added.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn close(self) -> anyhow::Result<Layout> {
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        std::fs::write(self.dir.join("index.json"), serde_json::to_vec(&index)?)?;
        std::fs::write(self.dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Layout::open(self.dir))
    }

    /// Writes configuration and manifest and returns the latter's descriptor.
    fn manifest(&self, config: Value) -> anyhow::Result<Value> {
        let config = json!({
            "architecture": self.architecture, "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": self.diff_ids },
        });
        let config = self.descriptor(CONFIG, &config)?;
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": self.layers });
        self.descriptor(MANIFEST, &manifest)
    }

    fn descriptor(&self, media_type: &str, value: &Value) -> anyhow::Result<Value> {
        let bytes = serde_json::to_vec(value)?;
        let digest = hex(&Sha256::digest(&bytes));
        std::fs::write(self.dir.join("blobs/sha256").join(&digest), &bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() }))
    }
}

/// A writer that hashes what passes.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    fn finish(self) -> (W, String) {
        (self.inner, hex(&self.hash.finalize()))
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// An image with busybox and a hard link for each of its applets, and the users that the suites ask for.
///
/// # Errors
/// `busybox` (package busybox-static) is missing.
pub fn busybox(dir: &Path) -> anyhow::Result<Layout> {
    let mut builder = Builder::new(dir)?;
    busybox_layer(&mut builder)?;
    builder.finish(json!({ "Cmd": ["sh"], "Env": ["PATH=/bin"] }))
}

/// Adds the layer of [`busybox`], for images with another configuration.
///
/// # Errors
/// `busybox` (package busybox-static) is missing.
pub fn busybox_layer(builder: &mut Builder) -> anyhow::Result<()> {
    let program = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .context("busybox is not installed (package busybox-static)")?;
    let applets = crate::host::output(std::process::Command::new(program).arg("--list"))?;
    builder.layer(|tar| {
        for place in ["bin/", "etc/", "root/", "tmp/", "var/", "proc/", "sys/", "dev/"] {
            append_dir(tar, place, if place == "tmp/" { 0o1777 } else { 0o755 })?;
        }
        let mut file = std::fs::File::open(program)?;
        tar.append_file("bin/busybox", &mut file)?;
        for applet in String::from_utf8_lossy(&applets).lines().filter(|applet| *applet != "busybox") {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Link);
            header.set_mode(0o755);
            header.set_size(0);
            tar.append_link(&mut header, format!("bin/{applet}"), "bin/busybox")?;
        }
        append_text(tar, "etc/passwd", USERS)?;
        append_text(tar, "etc/group", GROUPS)
    })
}

/// The users of [`busybox_layer`].
pub const USERS: &str =
    "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
/// The groups of [`busybox_layer`].
pub const GROUPS: &str = "root:x:0:\nwww-data:x:33:\nnobody:x:65534:\n";

/// Adds `/pause`, the process of sandboxes: it waits for ever and reaps.
///
/// # Errors
/// `gcc` is missing.
pub fn pause_layer(builder: &mut Builder) -> anyhow::Result<()> {
    const SOURCE: &str = "#include <signal.h>\n#include <sys/wait.h>\n#include <unistd.h>\n\
        static void reap(int s) { while (waitpid(-1, 0, WNOHANG) > 0) {} }\n\
        static void end(int s) { _exit(0); }\n\
        int main(void) { signal(SIGCHLD, reap); signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }\n";
    let scratch = tempfile::tempdir()?;
    std::fs::write(scratch.path().join("pause.c"), SOURCE)?;
    let mut compile = std::process::Command::new("gcc");
    crate::host::run(compile.args(["-Os", "-static", "-s", "-o", "pause", "pause.c"]).current_dir(scratch.path()))?;
    builder.layer(|tar| append_file(tar, "pause", 0o755, &scratch.path().join("pause")))
}

/// Adds a small text file with mode 0644.
///
/// # Errors
/// Those of the writer.
pub fn append_text(tar: &mut Layer<'_>, path: &str, text: &str) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(text.len() as u64);
    Ok(tar.append_data(&mut header, path, BufReader::new(text.as_bytes()))?)
}

/// Adds a file of the host as `path`; the times are left out, so that the same content is the same layer.
///
/// # Errors
/// Those of the file and of the writer.
pub fn append_file(tar: &mut Layer<'_>, path: &str, mode: u32, from: &Path) -> anyhow::Result<()> {
    let file = std::fs::File::open(from).with_context(|| format!("open {}", from.display()))?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(file.metadata()?.len());
    Ok(tar.append_data(&mut header, path, file)?)
}

/// Adds a directory.
///
/// # Errors
/// Those of the writer.
pub fn append_dir(tar: &mut Layer<'_>, path: &str, mode: u32) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(mode);
    header.set_size(0);
    Ok(tar.append_data(&mut header, path, std::io::empty())?)
}

/// Adds a symbolic link to `target`.
///
/// # Errors
/// Those of the writer.
pub fn append_symlink(tar: &mut Layer<'_>, path: &str, target: &str) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_mode(0o777);
    header.set_size(0);
    Ok(tar.append_link(&mut header, path, target)?)
}

/// A root file system with busybox unpacked into `dir`, for tests of what stands below images.
///
/// # Errors
/// `busybox` (package busybox-static) is missing.
pub fn busybox_root(dir: &Path) -> anyhow::Result<()> {
    let program = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.exists())
        .context("busybox is not installed (package busybox-static)")?;
    for made in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(dir.join(made))?;
    }
    std::fs::copy(program, dir.join("bin/busybox"))?;
    let applets = std::process::Command::new(program).arg("--list").output()?.stdout;
    for applet in String::from_utf8_lossy(&applets).lines().filter(|applet| *applet != "busybox") {
        std::fs::hard_link(dir.join("bin/busybox"), dir.join("bin").join(applet))?;
    }
    Ok(())
}
