//! What goes wrong between us and an API server, by what the caller can do about it.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;

use super::config::ConfigError;
use super::exec::ExecError;

/// Why an API server did not do what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// There is no way to the server.
    #[error("cannot reach the API server {server}: {reason}; check that it runs and that nothing blocks the way")]
    Unreachable {
        /// URL.
        server: String,
        /// The operating system's words.
        reason: String,
    },
    /// It shows a certificate that we do not believe, or does not believe ours.
    #[error("no trusted connection to the API server {server}: {reason}; {remedy}")]
    Untrusted {
        /// URL.
        server: String,
        /// The TLS library's words.
        reason: String,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// Certificates, keys or tokens that cannot be read.
    #[error(transparent)]
    Credentials(Arc<ConfigError>),
    /// The program that gives out credentials.
    #[error(transparent)]
    Plugin(ExecError),
    /// The connection broke or fell silent. The request may have been carried out.
    #[error("the API server {server} was lost: {reason}")]
    Lost {
        /// URL.
        server: String,
        /// What happened.
        reason: String,
    },
    /// It did not answer in time. The request may have been carried out.
    #[error("the API server {server} did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// URL.
        server: String,
        /// How long it had.
        limit: Duration,
    },
    /// 401: it does not know us.
    #[error(
        "the API server {server} does not accept our credentials ({who}): {message}; renew them or correct the kubeconfig"
    )]
    Unauthorized {
        /// URL.
        server: String,
        /// What we showed.
        who: String,
        /// The server's words.
        message: String,
    },
    /// 403: we may not.
    #[error("the API server refuses: {message}; check the rights of this user")]
    Forbidden {
        /// The server's words, which name user, verb and object.
        message: String,
    },
    /// 404.
    #[error("{message}")]
    NotFound {
        /// The server's words.
        message: String,
    },
    /// 409, on creation: it is there.
    #[error("{message}")]
    AlreadyExists {
        /// The server's words.
        message: String,
    },
    /// 409: somebody else was faster, or it is another object of the same name.
    #[error("{message}")]
    Conflict {
        /// The server's words.
        message: String,
    },
    /// 410: the version that was asked for is forgotten; only a new list helps.
    #[error("{message}")]
    Expired {
        /// The server's words.
        message: String,
    },
    /// 400, 422 and the rest of 4xx: the request itself is wrong, and stays so.
    #[error("the API server refuses the request ({code}): {message}")]
    Invalid {
        /// HTTP status.
        code: u16,
        /// The server's words.
        message: String,
    },
    /// 429: later.
    #[error("the API server is busy ({message})")]
    Throttled {
        /// The server's words.
        message: String,
        /// When, if it says so.
        retry_after: Option<Duration>,
    },
    /// 5xx.
    #[error("the API server failed ({code}): {message}")]
    Server {
        /// HTTP status.
        code: u16,
        /// `reason` of the answer: `Timeout`, `ServiceUnavailable`, …
        reason: String,
        /// The server's words.
        message: String,
        /// When to ask again, if it says so.
        retry_after: Option<Duration>,
    },
    /// The request does not fit into one.
    #[error("cannot ask the API server for {request}…: {reason}")]
    Unsendable {
        /// The beginning of its method and path.
        request: String,
        /// What is wrong.
        reason: String,
    },
    /// Its answer is not what was asked for.
    #[error("cannot read the API server's answer to {request}: {reason}")]
    Answer {
        /// Method and path.
        request: String,
        /// What is wrong.
        reason: String,
    },
}

impl ApiError {
    /// The error that an answer with a status of 400 and more stands for.
    pub(super) fn of_answer(code: u16, body: &[u8], retry_after: Option<Duration>) -> Self {
        let status: Status = serde_json::from_slice(body).unwrap_or_default();
        Self::of_status(code, status, String::from_utf8_lossy(&body[..body.len().min(500)]).trim(), retry_after)
    }

    /// As [`ApiError::of_answer`], for a `Status` object in a watch.
    pub(super) fn of_status(code: u16, status: Status, otherwise: &str, retry_after: Option<Duration>) -> Self {
        let reason = status.reason.unwrap_or_default();
        let message = status.message.filter(|message| !message.is_empty()).unwrap_or_else(|| otherwise.to_owned());
        let details = status.details.and_then(|details| details.retry_after_seconds);
        let told = details.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
        let retry_after = retry_after.or(told);
        match (code, reason.as_str()) {
            (401, _) => Self::Unauthorized { server: String::new(), who: String::new(), message },
            (403, _) => Self::Forbidden { message },
            (404, _) => Self::NotFound { message },
            (409, "AlreadyExists") => Self::AlreadyExists { message },
            (409, _) => Self::Conflict { message },
            (410, _) => Self::Expired { message },
            (429, _) => Self::Throttled { message, retry_after },
            (500.., _) => Self::Server { code, reason, message, retry_after },
            _ => Self::Invalid { code, message },
        }
    }

    /// The same error with what only the client knows.
    pub(super) fn at(self, url: &str, credentials: &str) -> Self {
        match self {
            Self::Unauthorized { message, .. } => {
                Self::Unauthorized { server: url.to_owned(), who: credentials.to_owned(), message }
            }
            other => other,
        }
    }

    /// Whether the same request may succeed later without anybody changing it or our rights.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Lost { .. }
            | Self::TimedOut { .. }
            | Self::Throttled { .. }
            | Self::Server { .. }
            | Self::Expired { .. }
            | Self::Plugin(_) => true,
            Self::Untrusted { .. }
            | Self::Credentials(_)
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::NotFound { .. }
            | Self::AlreadyExists { .. }
            | Self::Conflict { .. }
            | Self::Invalid { .. }
            | Self::Unsendable { .. }
            | Self::Answer { .. } => false,
        }
    }

    /// When the server wants to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Throttled { retry_after, .. } | Self::Server { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether the server has no such version (any more, or yet): after it was restored from a backup, its versions are
    /// smaller than those it gave out before.
    pub(super) fn is_expired(&self) -> bool {
        match self {
            Self::Expired { .. } => true,
            Self::Server { code: 504, message, .. } => message.contains("Too large resource version"),
            _ => false,
        }
    }
}

impl From<ConfigError> for ApiError {
    fn from(error: ConfigError) -> Self {
        Self::Credentials(Arc::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_sorted_by_what_helps() {
        let of = |code: u16, body: &str| ApiError::of_answer(code, body.as_bytes(), None);
        assert!(matches!(of(409, r#"{"reason":"AlreadyExists"}"#), ApiError::AlreadyExists { .. }));
        assert!(matches!(of(409, r#"{"reason":"Conflict"}"#), ApiError::Conflict { .. }));
        assert!(of(410, "{}").is_expired() && of(410, "{}").is_transient());
        assert!(of(504, r#"{"message":"Too large resource version: 9, current: 3"}"#).is_expired());
        assert!(!of(504, r#"{"message":"timed out"}"#).is_expired());
        let busy = of(429, r#"{"details":{"retryAfterSeconds":3}}"#);
        assert_eq!(busy.retry_after(), Some(Duration::from_secs(3)));
        assert_eq!(of(502, "<html>bad gateway").to_string(), "the API server failed (502): <html>bad gateway");
        let unknown = of(401, r#"{"message":"Unauthorized"}"#).at("https://h:6443", "the token of /t").to_string();
        assert!(unknown.contains("https://h:6443") && unknown.contains("/t") && unknown.contains("renew"), "{unknown}");
    }
}
