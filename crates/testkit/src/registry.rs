//! A real registry on loopback (Debian's `docker-registry`, the CNCF distribution), and a push over its API.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::daemon::{self, Nursery};
use crate::host::Tool;
use crate::image::Layout;
use crate::pace;

/// What the registry needs on the host.
pub const TOOL: Tool = Tool { program: "docker-registry", deb: "docker-registry", rpm: "docker-distribution" };

/// The one who may use a registry that asks for a login.
pub const USER: &str = "AWS";
/// The password of [`USER`].
pub const PASSWORD: &str = "secret-token";
/// `htpasswd -Bbn -C 5 AWS secret-token`
const HTPASSWD: &str = "AWS:$2y$05$hOV4aSLoAfsyhkAdM5dsgO1Qmrn12IlVwGAKt3gBtOCEL0Mz8a/5W\n";

/// How a registry treats its clients. One that wants more than the default takes no push: push to a plain one with the
/// same directory first.
#[derive(Debug, Clone, Default)]
pub struct Manner {
    /// It wants [`USER`] and [`PASSWORD`].
    pub login: bool,
    /// It speaks TLS, with this certificate and key.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// It wants a certificate of this authority.
    pub client_authority: Option<PathBuf>,
}

/// A running registry; it ends with this value.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    address: SocketAddr,
}

impl Registry {
    /// Starts a registry on `address` with its storage in `dir` and waits until it answers.
    ///
    /// # Errors
    /// The program is missing, the port is taken, or it does not answer within 20 s; its log is `dir/registry.log`.
    pub fn start(address: SocketAddr, dir: &Path) -> anyhow::Result<Self> {
        Self::start_with(address, dir, &Manner::default())
    }

    /// As [`Registry::start`], with manners.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn start_with(address: SocketAddr, dir: &Path, manner: &Manner) -> anyhow::Result<Self> {
        Self::begin(address, dir, manner, Command::new(TOOL.program), |mut command| command.spawn())
    }

    /// As [`Registry::start`], in the network namespace of `nursery`; it ends with that, too.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn start_in(nursery: &Nursery, address: SocketAddr, dir: &Path) -> anyhow::Result<Self> {
        Self::begin(address, dir, &Manner::default(), daemon::bound(TOOL.program), |command| nursery.spawn(command))
    }

    fn begin(
        address: SocketAddr,
        dir: &Path,
        manner: &Manner,
        mut command: Command,
        spawn: impl FnOnce(Command) -> std::io::Result<Child>,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("htpasswd"), HTPASSWD)?;
        let config = dir.join(format!("{}.yml", address.port()));
        std::fs::write(&config, config_text(address, dir, manner))?;
        let log = dir.join("registry.log");
        command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(&log)?);
        let mut registry = Self { child: spawn(command).context("start docker-registry")?, address };
        registry.wait_ready(manner).with_context(|| format!("registry log: {}", log.display()))?;
        Ok(registry)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process id, for tests that stop it for a while.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_ready(&mut self, manner: &Manner) -> anyhow::Result<()> {
        let deadline = Instant::now() + pace::stretched(Duration::from_secs(20));
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("docker-registry ended at once: {status}");
            }
            if self.answers(manner) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("docker-registry does not answer on {}", self.address);
            }
            std::thread::sleep(Duration::from_millis(20)); // a foreign program: it has no readiness event
        }
    }

    fn answers(&self, manner: &Manner) -> bool {
        if manner.tls.is_some() {
            return TcpStream::connect(self.address).is_ok();
        }
        let expected = if manner.login { 401 } else { 200 };
        request(self.address, "GET", "/v2/", &[], Body::Empty).is_ok_and(|reply| reply.status == expected)
    }

    /// Pushes every manifest of `layout` as `repository:tag`.
    ///
    /// # Errors
    /// Those of the layout's files and of the registry.
    pub fn push(&self, layout: &Layout, repository: &str, tag: &str) -> anyhow::Result<()> {
        for blob in layout.blobs()? {
            self.push_blob(repository, &blob.digest, &blob.path)?;
        }
        let manifest = layout.manifest()?;
        self.push_manifest(repository, tag, &manifest.media_type, &manifest.bytes)
    }

    /// Pushes a manifest, of whatever kind, whose parts are there.
    ///
    /// # Errors
    /// The registry does not want it.
    pub fn push_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let kind = [("Content-Type", media_type)];
        request(self.address, "PUT", &path, &kind, Body::Bytes(bytes))?.expect(201, &path)
    }

    fn push_blob(&self, repository: &str, digest: &str, file: &Path) -> anyhow::Result<()> {
        let path = format!("/v2/{repository}/blobs/{digest}");
        if request(self.address, "HEAD", &path, &[], Body::Empty)?.status == 200 {
            return Ok(());
        }
        let start = format!("/v2/{repository}/blobs/uploads/");
        let reply = request(self.address, "POST", &start, &[], Body::Empty)?;
        let location = reply.location.clone().context("the registry named no upload location")?;
        reply.expect(202, &start)?;
        let path =
            location.split_once("://").map_or(location.as_str(), |(_, rest)| &rest[rest.find('/').unwrap_or(0)..]);
        let path = format!("{path}{}digest={digest}", if path.contains('?') { '&' } else { '?' });
        let kind = [("Content-Type", "application/octet-stream")];
        request(self.address, "PUT", &path, &kind, Body::File(file.to_owned()))?.expect(201, &path)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes `dir/host/hosts.toml`: the plain registry at `mirror` answers for `host`.
///
/// # Errors
/// Those of the file system.
pub fn write_hosts(dir: &Path, host: &str, mirror: SocketAddr) -> anyhow::Result<()> {
    let place = dir.join(host);
    std::fs::create_dir_all(&place).with_context(|| format!("create {}", place.display()))?;
    let text = format!("[host.\"http://{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    std::fs::write(place.join("hosts.toml"), text).with_context(|| format!("write {}/hosts.toml", place.display()))
}

fn config_text(address: SocketAddr, dir: &Path, manner: &Manner) -> String {
    let mut text = format!(
        "version: 0.1\nlog: {{ level: warn }}\nstorage:\n  filesystem: {{ rootdirectory: {0}/storage }}\n  \
         delete: {{ enabled: true }}\nhttp:\n  addr: {address}\n",
        dir.display()
    );
    if let Some((certificate, key)) = &manner.tls {
        text += &format!("  tls:\n    certificate: {}\n    key: {}\n", certificate.display(), key.display());
    }
    if let Some(authority) = &manner.client_authority {
        text += &format!("    clientcas: [{}]\n", authority.display());
    }
    if manner.login {
        text += &format!("auth:\n  htpasswd: {{ realm: test, path: {}/htpasswd }}\n", dir.display());
    }
    text
}

enum Body<'a> {
    Empty,
    Bytes(&'a [u8]),
    File(PathBuf),
}

struct Reply {
    status: u16,
    location: Option<String>,
    text: String,
}

impl Reply {
    fn expect(&self, status: u16, path: &str) -> anyhow::Result<()> {
        if self.status == status {
            return Ok(());
        }
        bail!("{path}: the registry answered {} instead of {status}: {}", self.status, self.text)
    }
}

/// One HTTP/1.1 exchange on a connection of its own.
fn request(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Body<'_>,
) -> anyhow::Result<Reply> {
    let mut stream = TcpStream::connect_timeout(&to, pace::stretched(Duration::from_secs(5)))
        .with_context(|| format!("connect to {to}"))?;
    let length = match &body {
        Body::Empty => 0,
        Body::Bytes(bytes) => bytes.len() as u64,
        Body::File(path) => std::fs::metadata(path)?.len(),
    };
    let mut head =
        format!("{method} {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    match body {
        Body::Empty => {}
        Body::Bytes(bytes) => stream.write_all(bytes)?,
        Body::File(path) => drop(std::io::copy(&mut std::fs::File::open(path)?, &mut stream)?),
    }
    read_reply(stream)
}

fn read_reply(stream: TcpStream) -> anyhow::Result<Reply> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status =
        line.split(' ').nth(1).and_then(|code| code.parse().ok()).with_context(|| format!("not HTTP: {line:?}"))?;
    let mut location = None;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let header = line.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(": ")
            && name.eq_ignore_ascii_case("location")
        {
            location = Some(value.to_owned());
        }
    }
    let mut text = String::new();
    reader.take(4096).read_to_string(&mut text)?;
    Ok(Reply { status, location, text })
}
