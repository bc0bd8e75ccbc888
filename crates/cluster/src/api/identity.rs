//! Who we are at the moment: certificates and tokens change under a daemon that runs for months.
//!
//! Nothing here wakes up by itself. Whoever wants to send a request asks; if the last look at the files is some seconds
//! old, they are looked at first. New certificates count for new connections; connections that are open end as they come
//! to rest ([`super::connection`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderValue;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::config::{Bearer, Config, ConfigError, Pem, Trust};
use super::error::ApiError;
use super::exec::Credential;
use super::tls::{self, ClientPair};

/// How old a look at the files may be. A node asks at least every 10 s, for its lease.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A plugin's credentials are renewed this long before they end, as clocks differ and requests take time.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_secs(30);

/// What to show, and to whom.
#[derive(Clone)]
pub(super) struct Shown {
    /// None for a server that speaks no TLS.
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
    /// Counts the changes of `tls`.
    pub(super) generation: u64,
    pub(super) authorization: Option<HeaderValue>,
}

/// Keeps what is shown up to date.
pub(super) struct Keeper {
    config: Config,
    /// Held while files are read or the plugin runs: others need the outcome as well.
    current: Mutex<Option<Current>>,
}

struct Current {
    shown: Shown,
    stamps: Vec<Option<Stamp>>,
    looked: Instant,
    credential: Option<Credential>,
    /// The server has refused what a plugin gave.
    is_refused: bool,
}

/// What tells one version of a file from another; symbolic links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Keeper {
    pub(super) fn new(config: Config) -> Self {
        Self { config, current: Mutex::new(None) }
    }

    /// What to show now.
    pub(super) async fn shown(&self) -> Result<Shown, ApiError> {
        let mut current = self.current.lock().await;
        match &mut *current {
            Some(known) if !Self::is_due(known) => Ok(known.shown.clone()),
            Some(known) => match self.look(known).await {
                Ok(()) => Ok(known.shown.clone()),
                // Half-written files and a plugin that fails once must not end what still works.
                Err(error) if !known.is_refused && !ends_within(known.credential.as_ref(), SignedDuration::ZERO) => {
                    tracing::warn!(%error, "credentials cannot be renewed; the old ones are used");
                    known.looked = Instant::now();
                    Ok(known.shown.clone())
                }
                Err(error) => Err(error),
            },
            None => {
                let fresh = self.read(None, 0).await?;
                Ok(current.insert(fresh).shown.clone())
            }
        }
    }

    /// The server has answered 401: the next request looks at everything anew.
    pub(super) async fn refuse(&self, generation: u64) {
        if let Some(known) = &mut *self.current.lock().await
            && known.shown.generation == generation
        {
            known.is_refused = true;
        }
    }

    /// What we show, in words.
    pub(super) fn describe(&self) -> String {
        let identity = &self.config.identity;
        match (&identity.bearer, &identity.certificate, &identity.exec) {
            (Some(Bearer::File(path)), ..) => format!("the token of {}", path.display()),
            (Some(Bearer::Token(_)), ..) => "a token".into(),
            (Some(Bearer::Basic(_)), ..) => "name and password".into(),
            (None, Some((certificate, _)), _) => format!("the client certificate of {certificate}"),
            (None, None, Some(plugin)) => format!("what {} gives out", plugin.command.display()),
            (None, None, None) => "none".into(),
        }
    }

    fn is_due(known: &Current) -> bool {
        known.is_refused || known.looked.elapsed() >= LOOK_EVERY
    }

    /// Looks whether anything has changed, and reads it if so.
    async fn look(&self, known: &mut Current) -> Result<(), ApiError> {
        let renew = known.is_refused || ends_within(known.credential.as_ref(), RENEW_BEFORE);
        let credential = known.credential.clone().filter(|_| !renew);
        let same_files = stamps(self.files()).await == known.stamps;
        let same_credential = self.config.identity.exec.is_none() || credential.is_some();
        if same_files && same_credential {
            known.looked = Instant::now();
            known.is_refused = false;
            return Ok(());
        }
        *known = self.read(credential, known.shown.generation + 1).await?;
        Ok(())
    }

    async fn read(&self, credential: Option<Credential>, generation: u64) -> Result<Current, ApiError> {
        // Stamps first: what changes meanwhile is seen at the next look.
        let stamps = stamps(self.files()).await;
        let credential = match (&self.config.identity.exec, credential) {
            (Some(plugin), None) => Some(plugin.run().await.map_err(ApiError::Plugin)?),
            (_, credential) => credential,
        };
        let (config, given) = (self.config.clone(), credential.clone());
        let work = move || -> Result<_, ConfigError> {
            let tls = config.server.tls.then(|| tls_config(&config, given.as_ref())).transpose()?;
            Ok((tls.map(Arc::new), authorization(&config, given.as_ref())?))
        };
        let done = tokio::task::spawn_blocking(work).await;
        let (tls, authorization) = done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        let shown = Shown { tls, generation, authorization };
        Ok(Current { shown, stamps, looked: Instant::now(), credential, is_refused: false })
    }

    /// All files that the configuration names.
    fn files(&self) -> Vec<PathBuf> {
        let identity = &self.config.identity;
        let certificate = identity.certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
        let authority = match &self.config.trust {
            Trust::Authorities(pem) => Some(pem),
            Trust::Host | Trust::Anything => None,
        };
        let token = match &identity.bearer {
            Some(Bearer::File(path)) => Some(path.clone()),
            _ => None,
        };
        let path = |pem: &Pem| match pem {
            Pem::File(path) => Some(path.clone()),
            Pem::Inline { .. } => None,
        };
        certificate.chain(authority).filter_map(path).chain(token).collect()
    }
}

fn tls_config(config: &Config, credential: Option<&Credential>) -> Result<rustls::ClientConfig, ConfigError> {
    if let Some((certificate, key)) = credential.and_then(|credential| credential.certificate.as_ref()) {
        let from = || "the certificate of the credential plugin".to_owned();
        return tls::client_config(&config.trust, Some(ClientPair { certificate, key, from: (from(), from()) }));
    }
    let Some((certificate, key)) = &config.identity.certificate else {
        return tls::client_config(&config.trust, None);
    };
    let from = (certificate.to_string(), key.to_string());
    let (certificate, key) = (certificate.read()?, key.read()?);
    tls::client_config(&config.trust, Some(ClientPair { certificate: &certificate, key: &key, from }))
}

fn authorization(config: &Config, credential: Option<&Credential>) -> Result<Option<HeaderValue>, ConfigError> {
    let given = credential.and_then(|credential| credential.token.as_ref());
    let (text, from) = match (given, &config.identity.bearer) {
        (Some(token), _) => (format!("Bearer {}", token.expose()), "the token of the credential plugin".to_owned()),
        (None, Some(Bearer::Token(token))) => (format!("Bearer {}", token.expose()), "the token".to_owned()),
        (None, Some(Bearer::Basic(pair))) => (format!("Basic {}", pair.expose()), "name and password".to_owned()),
        (None, Some(Bearer::File(path))) => (format!("Bearer {}", token_in(path)?), path.display().to_string()),
        (None, None) => return Ok(None),
    };
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| ConfigError::Pem { what: from, message: "it has characters that no token has".into() })?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn token_in(path: &Path) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    match text.trim() {
        "" => Err(ConfigError::Pem { what: path.display().to_string(), message: "there is no token in it".into() }),
        token => Ok(token.to_owned()),
    }
}

fn ends_within(credential: Option<&Credential>, time: SignedDuration) -> bool {
    let end = credential.and_then(|credential| credential.expires);
    end.is_some_and(|end| end.duration_since(Timestamp::now()) <= time)
}

/// The files may lie where reading them takes long.
async fn stamps(files: Vec<PathBuf>) -> Vec<Option<Stamp>> {
    if files.is_empty() {
        return Vec::new();
    }
    let look = move || files.iter().map(|path| stamp(path)).collect();
    tokio::task::spawn_blocking(look).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::metadata(path).ok()?;
    Some(Stamp { modified: metadata.modified().ok(), bytes: metadata.len(), inode: metadata.ino() })
}

#[cfg(test)]
mod tests {
    use super::super::config::{Identity, Server};
    use super::*;

    fn keeper(token: &Path) -> Keeper {
        let identity = Identity { bearer: Some(Bearer::File(token.into())), ..Identity::default() };
        Keeper::new(Config::new(Server::parse("http://127.0.0.1").unwrap(), Trust::Anything, identity))
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_token_counts_within_seconds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, "one\n").unwrap();
        let keeper = keeper(&path);
        let header = async || keeper.shown().await.map(|shown| shown.authorization.unwrap());
        assert_eq!(header().await.unwrap(), "Bearer one");
        std::fs::write(&path, "second").unwrap();
        assert_eq!(header().await.unwrap(), "Bearer one");
        tokio::time::advance(LOOK_EVERY).await;
        assert_eq!(header().await.unwrap(), "Bearer second");
        // A file that is being written keeps nobody from going on.
        std::fs::write(&path, "").unwrap();
        tokio::time::advance(LOOK_EVERY).await;
        assert_eq!(header().await.unwrap(), "Bearer second");
        std::fs::write(&path, "3").unwrap();
        keeper.refuse(keeper.shown().await.unwrap().generation).await;
        assert_eq!(header().await.unwrap(), "Bearer 3");
    }

    #[tokio::test]
    async fn what_is_missing_is_named() {
        let error = keeper(Path::new("/nowhere/token")).shown().await.err().unwrap().to_string();
        assert!(error.contains("/nowhere/token") && error.contains("check"), "{error}");
    }
}
