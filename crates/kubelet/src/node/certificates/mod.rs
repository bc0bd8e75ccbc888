//! Certificates that the cluster signs for the node: asked for, kept in files, renewed in time.
//!
//! ```text
//! bootstrap token ─► request ─► approved, signed ─► kubelet-client-current.pem ─┐
//!                       ▲                                                       │ at 70–90 % of its time
//!                       └───────────────────────────────────────────────────────┘
//! ```

pub mod bootstrap;
mod files;
mod request;

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cluster::api::{Api, ApiError};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::clock;
use crate::metrics::Metrics;

pub use files::Files;

/// After a request that failed, or whose certificate is to be renewed at once: its time is short, or clocks differ.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(128);

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The node shows it to the API server.
    Client,
    /// The kubelet's API shows it to its callers.
    Serving,
}

/// Whose certificate it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The node's name.
    pub node: String,
    /// Names by which the kubelet is called.
    pub names: Vec<String>,
    /// Addresses by which it is called.
    pub addresses: Vec<IpAddr>,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Somebody decided against it, or the signer could not.
    #[error("the certificate signing request {name} was not granted: {reason}")]
    Refused {
        /// The request.
        name: String,
        /// The words of who decided.
        reason: String,
    },
    /// Nobody has decided.
    #[error(
        "nobody has approved the certificate signing request {name} within {} min; `kubectl certificate approve {name}` does",
        .within.as_secs() / 60
    )]
    Undecided {
        /// The request.
        name: String,
        /// How long it was waited for.
        within: Duration,
    },
    /// A key or request cannot be made.
    #[error("cannot make a certificate signing request")]
    Make(#[from] rcgen::Error),
    /// A file.
    #[error("cannot {step} {path}")]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// What was signed is no certificate.
    #[error("{path} holds no certificate with its key: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Gets a certificate and puts it into its files.
///
/// # Errors
/// It was not granted in time, or cannot be written.
pub async fn obtain(api: &Api, purpose: Purpose, holder: &Holder, files: &Files) -> Result<(), CertificateError> {
    let (certificate, key) = request::request(api, purpose, holder).await?;
    files.store(&certificate, &key, Timestamp::now())?;
    tracing::info!(file = %files.current().display(), "the cluster has signed a certificate");
    Ok(())
}

/// Sees to it that the files always have a certificate that is young enough. `changed` is called with each new one. Never
/// returns.
pub async fn keep(
    api: Api,
    purpose: Purpose,
    holder: Holder,
    files: Files,
    metrics: Arc<Metrics>,
    mut changed: impl FnMut() + Send,
) {
    let mut pause = RETRY_FIRST;
    loop {
        let due = files.validity().ok().map(|(begins, ends)| due(begins, ends, &files));
        if let Some(due) = due.filter(|due| *due > Timestamp::now()) {
            clock::sleep_until(due).await;
            pause = RETRY_FIRST;
        }
        match obtain(&api, purpose, &holder, &files).await {
            Ok(()) => changed(),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no new certificate; trying again");
                metrics.renewal_failed(purpose == Purpose::Client);
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// When a certificate is renewed: between 70 and 90 % of its time, each at a point of its own, so that the nodes of a
/// cluster do not come all at once.
fn due(begins: Timestamp, ends: Timestamp, files: &Files) -> Timestamp {
    let bytes = std::fs::read(files.current()).unwrap_or_default();
    let point = BuildHasherDefault::<DefaultHasher>::new().hash_one(bytes) % 2000;
    let time = ends.duration_since(begins);
    let share = i32::try_from(7000 + point).unwrap_or(8000);
    let age = time.checked_mul(share).map_or(SignedDuration::ZERO, |scaled| scaled / 10_000);
    begins.checked_add(age).unwrap_or(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewed_between_70_and_90_percent() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path(), Purpose::Client);
        let at = |second| Timestamp::from_second(second).unwrap();
        let due = due(at(1000), at(2000), &files);
        assert!((at(1700)..at(1900)).contains(&due), "{due}");
    }
}
