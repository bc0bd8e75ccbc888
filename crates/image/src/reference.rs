//! Image references: `[host[:port]/]path[:tag][@digest]`, normalised as Docker and the kubelet do it.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

const DEFAULT_HOST: &str = "docker.io";
const LEGACY_DEFAULT_HOST: &str = "index.docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// A normalised image reference: `busybox` is `docker.io/library/busybox:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The text is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {text:?}: {reason}")]
pub struct InvalidReference {
    /// What was given.
    pub text: String,
    /// Which rule it breaks.
    pub reason: &'static str,
}

impl Reference {
    /// The registry, with its port if one was given: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository inside the registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag; `latest` if neither tag nor digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `host/path` without tag and digest.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// `host/path:tag`, if it is the tag that says which image it is: beside a digest it is a remark, and the tag may long be
    /// another image's.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().filter(|_| self.digest.is_none()).map(|tag| format!("{}/{}:{tag}", self.host, self.path))
    }

    /// `host/path@digest` for a digest that this reference was resolved to.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.host, self.path)
    }

    /// What the registry is asked for: the digest if there is one, else the tag.
    pub fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        parse(text).map_err(|reason| InvalidReference { text: text.to_owned(), reason })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|_| "what follows @ is not a digest")?)),
        None => (text, None),
    };
    let (name, tag) = split_tag(rest);
    let (host, path) = split_host(name);
    check_host(&host)?;
    check_path(&path)?;
    if host.len() + 1 + path.len() > NAME_BYTES_MAX {
        return Err("the repository name is longer than 255 bytes");
    }
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let tag = tag.map(str::to_owned).or_else(|| digest.is_none().then(|| DEFAULT_TAG.to_owned()));
    Ok(Reference { host, path, tag, digest })
}

/// A colon after the last slash starts a tag; one before it is a port.
fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    }
}

/// The first component is a host if it looks like one (a dot, a port, an upper-case letter, or `localhost`).
fn split_host(name: &str) -> (String, String) {
    let (host, path) = match name.split_once('/') {
        Some((first, path)) if looks_like_host(first) => (first, path),
        _ => (DEFAULT_HOST, name),
    };
    let host = if host == LEGACY_DEFAULT_HOST { DEFAULT_HOST } else { host };
    let official = host == DEFAULT_HOST && !path.contains('/');
    let path = if official { format!("{OFFICIAL_PREFIX}{path}") } else { path.to_owned() };
    (host.to_owned(), path)
}

fn looks_like_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = split_port(host)?;
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("the registry's port is not a number below 65536");
    }
    let bracketed = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let valid = match bracketed {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !name.is_empty() && name.split('.').all(is_host_label),
    };
    if valid { Ok(()) } else { Err("the registry's host name is malformed") }
}

fn split_port(host: &str) -> Result<(&str, Option<&str>), &'static str> {
    let after_address = host.rfind(']').map_or(0, |at| at + 1);
    match host[after_address..].split_once(':') {
        Some((gap, port)) => Ok((&host[..after_address + gap.len()], Some(port))),
        None => Ok((host, None)),
    }
}

fn is_host_label(label: &str) -> bool {
    let inner = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    inner && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository name must be lower case");
    }
    if path.split('/').all(is_path_component) {
        Ok(())
    } else {
        Err(
            "a component of the repository name is empty or has characters other than a-z, 0-9 and single separators . _ __ -",
        )
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let mut at = 0;
    loop {
        let word = bytes[at..].iter().take_while(|b| b.is_ascii_lowercase() || b.is_ascii_digit()).count();
        at += word;
        if word == 0 {
            return false;
        }
        if at == bytes.len() {
            return true;
        }
        let separator = bytes[at..].iter().take_while(|b| !b.is_ascii_alphanumeric()).count();
        let allowed = match &bytes[at..at + separator] {
            b"." | b"_" | b"__" => true,
            dashes => dashes.iter().all(|b| *b == b'-'),
        };
        if !allowed {
            return false;
        }
        at += separator;
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = tag.bytes().next().is_some_and(word) && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    match (valid, tag.len() <= TAG_BYTES_MAX) {
        (true, true) => Ok(()),
        (true, false) => Err("the tag is longer than 128 bytes"),
        (false, _) => Err("the tag has characters other than letters, digits, _ . -"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalises_as_docker_does() {
        let cases = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.37", "docker.io/library/busybox:1.37"),
            ("myrepo/ai-service", "docker.io/myrepo/ai-service:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("docker.io/a/b/c", "docker.io/a/b/c:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:v1", "localhost:5000/x:v1"),
            ("Reg/x", "Reg/x:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("a__b/c-d.e_f", "docker.io/a__b/c-d.e_f:latest"),
        ];
        for (text, expected) in cases {
            let parsed: Reference = text.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(parsed.to_string(), expected, "{text}");
            assert_eq!(parsed.to_string().parse::<Reference>().unwrap(), parsed, "round trip of {text}");
        }
    }

    #[test]
    fn a_digest_needs_no_tag_and_wins_over_one() {
        let digest_only: Reference = format!("busybox@{DIGEST}").parse().unwrap();
        assert_eq!((digest_only.tag(), digest_only.target()), (None, DIGEST.to_owned()));
        let both: Reference = format!("busybox:1@{DIGEST}").parse().unwrap();
        assert_eq!((both.tag(), both.target(), both.tagged()), (Some("1"), DIGEST.to_owned(), None));
    }

    #[test]
    fn refuses_malformed_names() {
        let cases = [
            "",
            "/",
            "Busybox",
            "a//b",
            "a/../b",
            "a.b.c/",
            "x:",
            "x:-a",
            "x@sha256:12",
            "x y",
            "host:99999/x",
            "-a.b/x",
            "a___b",
            "a/.b",
            "[::g]/x",
            "x:a/b:c/",
        ];
        for text in cases {
            assert!(text.parse::<Reference>().is_err(), "{text:?} must be refused");
        }
    }
}
