//! How to reach an API server and who to be there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::exec::ExecPlugin;
use super::kubeconfig;
use super::proxy::Proxy;

/// The service account of a pod, where the API server puts it.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Longer than the API server's own limit for requests that watch nothing would be no limit at all (60 s there).
const TIMEOUT: Duration = Duration::from_secs(30);
/// As client-go.
const SILENCE: Duration = Duration::from_secs(30);

/// Everything needed to talk to one API server as one user. Building it reads the kubeconfig, but neither the files that
/// it names nor the network.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the API server answers.
    pub server: Server,
    /// Whose certificates to believe.
    pub trust: Trust,
    /// The name to expect in the server's certificate; its host if there is none.
    pub server_name: Option<String>,
    /// The way there.
    pub proxy: Option<Proxy>,
    /// Who we are.
    pub identity: Identity,
    /// What the API server's audit log calls us.
    pub user_agent: String,
    /// How long any request but a watch may take.
    pub timeout: Duration,
    /// A connection that is silent for so long is asked whether it lives, and given up when it does not answer within half
    /// of that.
    pub silence: Duration,
    /// How many requests a second at most, if the operator wants a limit: the API server has its own (priority and
    /// fairness), and tells who has to wait.
    pub rate: Option<Rate>,
}

/// A limit for requests: upstream's `kubeAPIQPS` and `kubeAPIBurst`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Requests a second in the long run.
    pub per_second: f64,
    /// Requests at once after a rest.
    pub burst: u32,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file.
    #[error("cannot read {path}: {source}; check that the file is there and readable")]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A kubeconfig that is none.
    #[error("{path} is not a kubeconfig: {message}")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// The parser's words, with the line.
        message: String,
    },
    /// A field of a kubeconfig.
    #[error("{field} of {path} {message}")]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// Certificates or keys that are none.
    #[error("{what}: {message}")]
    Pem {
        /// File or field.
        what: String,
        /// What is wrong.
        message: String,
    },
    /// Not in a pod, or one without a service account.
    #[error("this process has no service account of a cluster ({what} is missing); pass --kubeconfig")]
    NotInCluster {
        /// The variable or file.
        what: &'static str,
    },
}

impl Config {
    /// This user at this server, with the defaults for the rest. Proxies come from the environment (`HTTPS_PROXY`,
    /// `NO_PROXY`), as for every client of Kubernetes.
    pub fn new(server: Server, trust: Trust, identity: Identity) -> Self {
        let proxy = Proxy::from_environment(&server, |name| std::env::var(name).ok());
        Self {
            server,
            trust,
            server_name: None,
            proxy,
            identity,
            user_agent: format!("orlop/{} (linux)", env!("CARGO_PKG_VERSION")),
            timeout: TIMEOUT,
            silence: SILENCE,
            rate: None,
        }
    }

    /// The current context of a kubeconfig file.
    ///
    /// # Errors
    /// A file that cannot be read, or a field that cannot be used.
    pub fn from_kubeconfig(path: &Path) -> Result<Self, ConfigError> {
        kubeconfig::read(path)
    }

    /// The service account of the pod that this process runs in, as kube-proxy does when it is a DaemonSet.
    ///
    /// # Errors
    /// What is missing of it.
    pub fn in_cluster() -> Result<Self, ConfigError> {
        let variable = |name: &'static str| std::env::var(name).map_err(|_| ConfigError::NotInCluster { what: name });
        let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
        let port = port.parse().map_err(|_| ConfigError::NotInCluster { what: "KUBERNETES_SERVICE_PORT" })?;
        let account = Path::new(SERVICE_ACCOUNT);
        if !account.join("token").exists() {
            return Err(ConfigError::NotInCluster { what: "/var/run/secrets/kubernetes.io/serviceaccount/token" });
        }
        let bearer = Some(Bearer::File(account.join("token")));
        let trust = Trust::Authorities(Pem::File(account.join("ca.crt")));
        Ok(Self::new(Server::new(&host, port), trust, Identity { bearer, ..Identity::default() }))
    }

    /// The same server for somebody else: with a bootstrap token, say, or the certificate that it has brought.
    pub fn with_identity(&self, identity: Identity) -> Self {
        Self { identity, ..self.clone() }
    }

    /// The same, with another limit for the time of a request.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }
}

/// The address of an API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Whether TLS is spoken.
    pub tls: bool,
    /// Name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// What stands before every path: empty, or `/something` without a slash at its end.
    pub prefix: String,
}

impl Server {
    /// A server that speaks TLS.
    pub fn new(host: &str, port: u16) -> Self {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Server { tls: true, host, port, prefix: String::new() }
    }

    /// Reads a URL. A name without a scheme means TLS.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(url: &str) -> Result<Self, String> {
        if url.is_empty() {
            return Err("is empty; it must be the URL of the API server".into());
        }
        let full = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
        let uri: http::Uri = full.parse().map_err(|error| format!("is {url:?}, which is no URL: {error}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("is {url:?}; it must begin with https:// or http://")),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| format!("is {url:?}; it has no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Server { tls, host, port, prefix: uri.path().trim_end_matches('/').to_owned() })
    }

    /// `host:port`, an IPv6 address in brackets.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// As a URL.
impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.tls { "https" } else { "http" }, self.authority(), self.prefix)
    }
}

/// Whose certificates are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Those that these authorities have signed.
    Authorities(Pem),
    /// Those that the host believes.
    Host,
    /// Anybody's: whoever answers gets our credentials.
    Anything,
}

/// Certificates or a key.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// A file; when it changes, the new content counts.
    File(PathBuf),
    /// The content itself.
    Inline {
        /// Where it comes from, for messages.
        field: String,
        /// PEM.
        bytes: Vec<u8>,
    },
}

impl Pem {
    /// The content as it is now.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, ConfigError> {
        match self {
            Pem::File(path) => std::fs::read(path).map_err(|source| ConfigError::Read { path: path.clone(), source }),
            Pem::Inline { bytes, .. } => Ok(bytes.clone()),
        }
    }
}

/// File or field.
impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pem::File(path) => write!(f, "{}", path.display()),
            Pem::Inline { field, .. } => f.write_str(field),
        }
    }
}

/// The content may be a key.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pem({self})")
    }
}

/// Who we are. Nothing at all is `system:anonymous`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Client certificate and its key.
    pub certificate: Option<(Pem, Pem)>,
    /// What stands in the `Authorization` header.
    pub bearer: Option<Bearer>,
    /// A program that gives out either.
    pub exec: Option<ExecPlugin>,
}

impl Identity {
    /// Whoever has this token: a bootstrap token (`id.secret`), or one of a service account.
    pub fn token(token: &str) -> Self {
        Self { bearer: Some(Bearer::Token(Secret::new(token))), ..Self::default() }
    }

    /// Whoever this certificate names; certificate and key may be the same file.
    pub fn certificate(certificate: Pem, key: Pem) -> Self {
        Self { certificate: Some((certificate, key)), ..Self::default() }
    }
}

/// The content of the `Authorization` header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bearer {
    /// A token.
    Token(Secret),
    /// A file with a token; when it changes, the new one counts.
    File(PathBuf),
    /// Name and password as HTTP packs them (base64).
    Basic(Secret),
}

/// Text that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: &str) -> Self {
        Secret(text.to_owned())
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers() {
        let check = |url: &str, expect: &str| assert_eq!(Server::parse(url).unwrap().to_string(), expect, "{url}");
        check("https://10.0.0.1:6443", "https://10.0.0.1:6443");
        check("https://[fd00::1]:6443", "https://[fd00::1]:6443");
        check("https://[fd00::1]", "https://[fd00::1]:443");
        check("cp.example:8443", "https://cp.example:8443");
        check("http://127.0.0.1:8080/", "http://127.0.0.1:8080");
        check("https://lb/k8s/clusters/c-1/", "https://lb:443/k8s/clusters/c-1");
        assert!(Server::parse("unix:///run/x").is_err() && Server::parse("https://").is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let identity = Identity::token("s3cr3t");
        assert!(!format!("{identity:?}").contains("s3cr3t"));
    }
}
