//! How a session ended, as the client is told: `metav1.Status` on the error channel, or text in the older protocols.

use bytes::Bytes;
use cri::Error;
use serde::Serialize;

/// In which form a client wants to know the end of its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A `metav1.Status` in any case: from v4 on.
    Json,
    /// A message if it failed.
    Text,
}

/// How a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// Well; of an exec, with exit code 0.
    Success,
    /// The process that was exec'd had another exit code.
    ExitCode(i32),
    /// There was no session, or it could not be brought to its end.
    Failed { doing: &'static str, error: Error },
}

/// The fields of `metav1.Status` that clients look at.
#[derive(Serialize)]
struct Status<'a> {
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Details<'a> {
    causes: [Cause<'a>; 1],
}

#[derive(Serialize)]
struct Cause<'a> {
    reason: &'a str,
    message: String,
}

impl End {
    /// What is sent on the error channel, if anything.
    pub(super) fn encode(&self, format: Format) -> Option<Bytes> {
        match format {
            Format::Text => self.message().map(Bytes::from),
            Format::Json => {
                let message = self.message();
                // Strings and numbers can always be written as JSON.
                serde_json::to_vec(&self.status(message.as_deref())).ok().map(Bytes::from)
            }
        }
    }

    fn message(&self) -> Option<String> {
        match self {
            Self::Success => None,
            Self::ExitCode(code) => Some(format!("command terminated with non-zero exit code: {code}")),
            Self::Failed { doing, error } => Some(format!("Internal error occurred: error {doing} container: {error}")),
        }
    }

    fn status<'a>(&self, message: Option<&'a str>) -> Status<'a> {
        let (status, reason, code) = match self {
            Self::Success => ("Success", None, None),
            Self::ExitCode(_) => ("Failure", Some("NonZeroExitCode"), None),
            Self::Failed { .. } => ("Failure", Some("InternalError"), Some(500)),
        };
        let details = match self {
            Self::ExitCode(code) => Some(Details { causes: [Cause { reason: "ExitCode", message: code.to_string() }] }),
            _ => None,
        };
        Status { status, message, reason, details, code }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(end: &End, json: &str, text: Option<&str>) {
        assert_eq!(end.encode(Format::Json).unwrap(), json);
        assert_eq!(end.encode(Format::Text).as_deref(), text.map(str::as_bytes));
    }

    #[test]
    fn ends() {
        check(&End::Success, r#"{"status":"Success"}"#, None);
        check(
            &End::ExitCode(3),
            r#"{"status":"Failure","message":"command terminated with non-zero exit code: 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#,
            Some("command terminated with non-zero exit code: 3"),
        );
        let error = Error::FailedPrecondition("it is not running".to_owned());
        check(
            &End::Failed { doing: "executing command in", error },
            r#"{"status":"Failure","message":"Internal error occurred: error executing command in container: it is not running","reason":"InternalError","code":500}"#,
            Some("Internal error occurred: error executing command in container: it is not running"),
        );
    }
}
