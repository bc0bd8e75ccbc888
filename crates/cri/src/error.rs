//! Why a CRI call failed, by what the caller can do about it.

/// The failure of a CRI call. [`Error::code`] is the one place where it becomes a gRPC status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such sandbox, container or image.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// `sandbox`, `container`, `image`, …
        kind: &'static str,
        /// What was asked for.
        id: String,
    },
    /// It is not to be found in any of the places that were asked; the message names them and what may help.
    #[error("{0}")]
    NotFoundAnywhere(String),
    /// The request cannot be honoured as written; a retry will not help.
    #[error("{0}")]
    InvalidArgument(String),
    /// The object exists in another shape.
    #[error("{0}")]
    AlreadyExists(String),
    /// The object is not in the state that the call needs.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The time the caller gave is over.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// A service that this call needs is away; a retry may help.
    #[error("{0}")]
    Unavailable(String),
    /// A budget is spent.
    #[error("{0}")]
    ResourceExhausted(String),
    /// Credentials are missing or refused.
    #[error("{0}")]
    PermissionDenied(String),
    /// The call is not part of this runtime.
    #[error("{call} is not implemented by this runtime")]
    Unimplemented {
        /// The CRI name of the call.
        call: &'static str,
    },
    /// Anything else; the message names step, object and cause.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// The gRPC status code of this failure.
    pub fn code(&self) -> tonic::Code {
        match self {
            Self::NotFound { .. } | Self::NotFoundAnywhere(_) => tonic::Code::NotFound,
            Self::InvalidArgument(_) => tonic::Code::InvalidArgument,
            Self::AlreadyExists(_) => tonic::Code::AlreadyExists,
            Self::FailedPrecondition(_) => tonic::Code::FailedPrecondition,
            Self::DeadlineExceeded(_) => tonic::Code::DeadlineExceeded,
            Self::Unavailable(_) => tonic::Code::Unavailable,
            Self::ResourceExhausted(_) => tonic::Code::ResourceExhausted,
            Self::PermissionDenied(_) => tonic::Code::PermissionDenied,
            Self::Unimplemented { .. } => tonic::Code::Unimplemented,
            Self::Internal(_) => tonic::Code::Internal,
        }
    }

    /// An internal failure with its whole chain of causes in one line.
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        Self::Internal(text)
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
