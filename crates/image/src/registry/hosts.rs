//! Which hosts serve a registry's images, from trees of `hosts.toml` files as containerd reads them
//! (containerd docs/hosts.md): `<tree>/<host>_<port>_/hosts.toml`, `<tree>/<host:port>/hosts.toml`, `<tree>/_default/hosts.toml`;
//! without a `hosts.toml`, `*.crt`, `*.cert` and `*.key` in that directory as Docker reads them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::Error;

/// A host that may be asked, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) transport: Transport,
    /// `name` or `name:port`, as in a URL.
    pub(crate) authority: String,
    /// What comes before `/<repository>/manifests/…`: `/v2`, unless overridden.
    pub(crate) path: String,
    pub(crate) capabilities: Capabilities,
    pub(crate) tls: Tls,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) dial_timeout: Option<Duration>,
}

/// How to talk to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    Tls,
    Plain,
    /// Loopback on a port of its own: TLS if the host speaks it, else plain.
    TlsOrPlain,
}

/// What a host is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Fetching what is named by a digest.
    pub(crate) pull: bool,
    /// Saying what digest a tag has.
    pub(crate) resolve: bool,
    /// Taking uploads.
    pub(crate) push: bool,
}

/// Certificates for a host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub(crate) struct Tls {
    pub(crate) skip_verify: bool,
    pub(crate) authorities: Vec<PathBuf>,
    /// Certificate and key; without a key file the certificate's has both.
    pub(crate) clients: Vec<(PathBuf, Option<PathBuf>)>,
}

const ALL: Capabilities = Capabilities { pull: true, resolve: true, push: true };
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// The hosts for `registry`, in the order in which they are asked.
pub(crate) fn hosts_for(registry: &str, trees: &[PathBuf]) -> Result<Vec<Host>, Error> {
    let found = trees.iter().flat_map(|tree| candidates(tree, registry)).find(|directory| directory.is_dir());
    match found {
        None => Ok(vec![default_host(registry)]),
        Some(directory) => read_directory(&directory, registry),
    }
}

fn candidates(tree: &Path, registry: &str) -> Vec<PathBuf> {
    let mut names = Vec::new();
    if let Some((name, port)) = registry.rsplit_once(':').filter(|(name, _)| !name.is_empty()) {
        names.push(format!("{name}_{port}_"));
    }
    names.extend([registry.to_owned(), "_default".to_owned()]);
    names.into_iter().map(|name| tree.join(name)).collect()
}

fn read_directory(directory: &Path, registry: &str) -> Result<Vec<Host>, Error> {
    let path = directory.join("hosts.toml");
    let faulty = |reason: String| Error::Configuration { path: path.clone(), reason };
    match fs::read_to_string(&path) {
        Ok(text) if !text.is_empty() => parse(&text, directory, registry).map_err(faulty),
        Ok(_) => with_certificate_files(directory, registry),
        Err(e) if e.kind() == io::ErrorKind::NotFound => with_certificate_files(directory, registry),
        Err(e) => Err(faulty(e.to_string())),
    }
}

/// The host of the reference itself.
pub(crate) fn default_host(registry: &str) -> Host {
    let authority = if registry == DOCKER_HUB { DOCKER_HUB_API } else { registry };
    let (transport, skip_verify) = match loopback_port(registry) {
        None => (Transport::Tls, false),
        Some(Some(80)) => (Transport::Plain, false),
        Some(None | Some(443)) => (Transport::Tls, true),
        Some(Some(_)) => (Transport::TlsOrPlain, true),
    };
    Host {
        transport,
        authority: authority.to_owned(),
        path: "/v2".into(),
        capabilities: ALL,
        tls: Tls { skip_verify, ..Tls::default() },
        headers: Vec::new(),
        dial_timeout: None,
    }
}

/// The port, if the host is the machine itself.
fn loopback_port(authority: &str) -> Option<Option<u16>> {
    let (name, port) = split_authority(authority);
    let address = name.trim_start_matches('[').trim_end_matches(']');
    let loopback = name == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    loopback.then_some(port)
}

/// Name and port of `name:port`, `[::1]:port`, `name`.
pub(crate) fn split_authority(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') && port.parse::<u16>().is_ok() => (name, port.parse().ok()),
        _ => (authority, None),
    }
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: HashMap<toml::Spanned<String>, Entry>,
    #[serde(flatten)]
    root: Entry,
}

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    capabilities: Vec<String>,
    ca: Option<OneOrMany<String>>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany<String>>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// A file with certificate and key, or a list of such files and of pairs.
#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    File(String),
    List(Vec<OneOrMany<String>>),
}

/// The hosts of the file in its order, then `server` (or the registry itself).
pub(crate) fn parse(text: &str, base: &Path, registry: &str) -> Result<Vec<Host>, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
    let mut entries: Vec<_> = file.host.into_iter().collect();
    entries.sort_by_key(|(url, _)| url.span().start);
    let mut hosts = Vec::new();
    for (url, entry) in entries {
        let url = url.into_inner();
        hosts.push(entry.onto(from_url(&url, entry.override_path)?, base).map_err(|e| format!("host {url:?}: {e}"))?);
    }
    let last = match &file.server {
        Some(url) => from_url(url, file.root.override_path)?,
        None => default_host(registry),
    };
    hosts.push(file.root.onto(last, base)?);
    Ok(hosts)
}

fn from_url(url: &str, override_path: bool) -> Result<Host, String> {
    let url = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let parsed: http::Uri = url.parse().map_err(|e| format!("{url:?} is not a URL: {e}"))?;
    let transport = match parsed.scheme_str() {
        Some("https") => Transport::Tls,
        Some("http") => Transport::Plain,
        other => return Err(format!("{url:?} has scheme {other:?}; expected http or https")),
    };
    let authority = parsed.authority().ok_or_else(|| format!("{url:?} names no host"))?.to_string();
    let path = parsed.path().trim_end_matches('/');
    let path = if override_path || path.ends_with("/v2") { path.to_owned() } else { format!("{path}/v2") };
    Ok(Host { transport, path, ..default_host(&authority).with(authority, Tls::default()) })
}

impl Host {
    fn with(self, authority: String, tls: Tls) -> Self {
        Self { authority, tls, ..self }
    }

    /// Whether this is not the registry that the reference names: then requests say for which one they are.
    pub(crate) fn is_mirror_of(&self, registry: &str) -> bool {
        self.authority != registry && !(registry == DOCKER_HUB && self.authority == DOCKER_HUB_API)
    }

    pub(crate) fn is_loopback(&self) -> bool {
        loopback_port(&self.authority).is_some()
    }
}

impl Entry {
    fn onto(&self, host: Host, base: &Path) -> Result<Host, String> {
        let explicit_tls = self.ca.is_some() || self.client.is_some() || self.skip_verify.is_some();
        // As containerd: certificates for an http host mean that https is tried first.
        let transport =
            if host.transport == Transport::Plain && explicit_tls { Transport::TlsOrPlain } else { host.transport };
        let tls = Tls {
            skip_verify: self.skip_verify.unwrap_or(host.tls.skip_verify),
            authorities: self.authorities(base),
            clients: self.clients(base)?,
        };
        let dial_timeout = self.dial_timeout.as_deref().map(crate::duration::parse).transpose()?;
        Ok(Host { transport, tls, capabilities: self.capabilities()?, headers: self.headers(), dial_timeout, ..host })
    }

    fn capabilities(&self) -> Result<Capabilities, String> {
        if self.capabilities.is_empty() {
            return Ok(ALL);
        }
        let mut capabilities = Capabilities { pull: false, resolve: false, push: false };
        for name in &self.capabilities {
            match name.to_ascii_lowercase().as_str() {
                "pull" => capabilities.pull = true,
                "resolve" => capabilities.resolve = true,
                "push" => capabilities.push = true,
                "referrers" => {}
                _ => return Err(format!("unknown capability {name:?}; known: pull, resolve, push, referrers")),
            }
        }
        Ok(capabilities)
    }

    fn authorities(&self, base: &Path) -> Vec<PathBuf> {
        match &self.ca {
            None => Vec::new(),
            Some(OneOrMany::One(file)) => vec![base.join(file)],
            Some(OneOrMany::Many(files)) => files.iter().map(|file| base.join(file)).collect(),
        }
    }

    fn clients(&self, base: &Path) -> Result<Vec<(PathBuf, Option<PathBuf>)>, String> {
        match &self.client {
            None => Ok(Vec::new()),
            Some(Client::File(both)) => Ok(vec![(base.join(both), None)]),
            Some(Client::List(items)) => items.iter().map(|item| client_pair(item, base)).collect(),
        }
    }

    fn headers(&self) -> Vec<(String, String)> {
        let values = |value: &OneOrMany<String>| match value {
            OneOrMany::One(one) => vec![one.clone()],
            OneOrMany::Many(many) => many.clone(),
        };
        self.header
            .iter()
            .flat_map(|(name, value)| values(value).into_iter().map(move |value| (name.clone(), value)))
            .collect()
    }
}

fn client_pair(pair: &OneOrMany<String>, base: &Path) -> Result<(PathBuf, Option<PathBuf>), String> {
    match pair {
        OneOrMany::One(both) => Ok((base.join(both), None)),
        OneOrMany::Many(files) => match files.as_slice() {
            [certificate, key] if key.is_empty() => Ok((base.join(certificate), None)),
            [certificate, key] => Ok((base.join(certificate), Some(base.join(key)))),
            _ => Err("a client pair must be [certificate, key]".into()),
        },
    }
}

fn with_certificate_files(directory: &Path, registry: &str) -> Result<Vec<Host>, Error> {
    let entries = fs::read_dir(directory)
        .map_err(|e| Error::Configuration { path: directory.to_owned(), reason: e.to_string() })?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort();
    let mut host = default_host(registry);
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.tls.authorities.push(file),
            Some("cert") => {
                let key = Some(file.with_extension("key")).filter(|key| key.exists());
                host.tls.clients.push((file, key));
            }
            _ => {}
        }
    }
    Ok(vec![host])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_follow_the_registry() {
        let check = |registry: &str, transport, authority: &str| {
            let host = default_host(registry);
            assert_eq!(
                (host.transport, host.authority.as_str(), host.path.as_str()),
                (transport, authority, "/v2"),
                "{registry}"
            );
        };
        check("docker.io", Transport::Tls, "registry-1.docker.io");
        check("quay.io", Transport::Tls, "quay.io");
        check("localhost:5000", Transport::TlsOrPlain, "localhost:5000");
        check("127.0.0.1:80", Transport::Plain, "127.0.0.1:80");
        check("[::1]:5000", Transport::TlsOrPlain, "[::1]:5000");
        check("localhost", Transport::Tls, "localhost");
    }

    #[test]
    fn reads_hosts_in_the_order_of_the_file() {
        let text = r#"
            server = "https://real.example"
            [host."http://z.example:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://a.example/prefix"]
              ca = "a.crt"
              client = [["a.cert", "a.key"], "both.pem"]
              skip_verify = true
              dial_timeout = "1m30s"
              [host."https://a.example/prefix".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."https://b.example/api"]
              override_path = true
              capabilities = ["pull"]
        "#;
        let hosts = parse(text, Path::new("/base"), "docker.io").unwrap();
        let names: Vec<_> = hosts.iter().map(|host| (host.authority.as_str(), host.path.as_str())).collect();
        assert_eq!(
            names,
            [("z.example:5000", "/v2"), ("a.example", "/prefix/v2"), ("b.example", "/api"), ("real.example", "/v2")]
        );
        assert_eq!(hosts[0].transport, Transport::Plain);
        assert_eq!(hosts[0].capabilities, Capabilities { pull: true, resolve: true, push: false });
        assert_eq!(hosts[1].tls.authorities, [PathBuf::from("/base/a.crt")]);
        assert_eq!(
            hosts[1].tls.clients,
            [("/base/a.cert".into(), Some("/base/a.key".into())), (PathBuf::from("/base/both.pem"), None)]
        );
        assert!(hosts[1].tls.skip_verify);
        assert_eq!(hosts[1].dial_timeout, Some(Duration::from_secs(90)));
        let headers =
            [("x-one", "1"), ("x-two", "2"), ("x-two", "3")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(hosts[1].headers, headers);
        assert_eq!(hosts[3].capabilities, ALL);
    }

    #[test]
    fn names_the_fault() {
        for (text, part) in [
            ("[host.\"x\"]\ncapabilities = [\"fly\"]", "fly"),
            ("server = \"ftp://x\"", "ftp"),
            ("server = 1", "server"),
            ("[host.\"http://h\"]\ndial_timeout = \"3\"", "duration"),
        ] {
            let error = parse(text, Path::new("/"), "docker.io").unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn finds_the_directory_of_a_registry() {
        let trees = tempfile::tempdir().unwrap();
        let write = |directory: &str, text: &str| {
            let directory = trees.path().join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("hosts.toml"), text).unwrap();
        };
        write("local_5000_", "server = \"http://one\"");
        write("_default", "server = \"http://two\"");
        fs::create_dir(trees.path().join("certs.example")).unwrap();
        fs::write(trees.path().join("certs.example/ca.crt"), "").unwrap();
        let check = |registry: &str, expected: &str| {
            let hosts = hosts_for(registry, &["/nowhere".into(), trees.path().to_owned()]).unwrap();
            assert_eq!(hosts.last().unwrap().authority, expected, "{registry}");
        };
        check("local:5000", "one");
        check("quay.io", "two");
        check("certs.example", "certs.example");
        assert_eq!(hosts_for("certs.example", &[trees.path().to_owned()]).unwrap()[0].tls.authorities.len(), 1);
    }
}
