//! Why a container's configuration cannot be made.

use std::path::PathBuf;

/// Why a request cannot become a configuration, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// A field has a value that cannot be; a retry will not help.
    #[error("{field}: {value:?} {problem}")]
    Invalid {
        /// The CRI name of the field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it, and the remedy.
        problem: String,
    },
    /// Neither the request nor the image says what to run.
    #[error("no command specified: set the container's command, or an entrypoint in the image")]
    NoCommand,
    /// The request is sound, but this node cannot honour it.
    #[error("{feature} is not possible here: {reason}")]
    Unsupported {
        /// What was asked for.
        feature: String,
        /// Why not, and the remedy.
        reason: &'static str,
    },
    /// The kernel has no AppArmor profile of that name. The beginning is upstream's.
    #[error("apparmor profile not found {0}: load it with `apparmor_parser --replace FILE`, or set another")]
    NoProfile(String),
    /// The image has no user or group of that name.
    #[error("unable to find {kind} {name}: no matching entries in the image's {file}")]
    Unknown {
        /// `user` or `group`.
        kind: &'static str,
        /// The name.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// A file of the image or of the operator is not what it should be.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and how.
        reason: String,
    },
    /// The host refused a step.
    #[error("cannot {step} {}", path.display())]
    Host {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A mount's source could not be opened.
    #[error(transparent)]
    Source(#[from] executor::prepare::PrepareError),
    /// An image volume could not be mounted. The prefix is upstream's: kubelets make it the container's waiting reason.
    #[error("ImageVolumeMountFailed: {image}")]
    ImageVolume {
        /// The image.
        image: String,
        /// Why not.
        #[source]
        source: Box<image::Error>,
    },
}

impl SpecError {
    pub(crate) fn invalid(field: &'static str, value: impl ToString, problem: impl Into<String>) -> Self {
        Self::Invalid { field, value: value.to_string(), problem: problem.into() }
    }

    pub(super) fn host(step: &'static str, path: impl Into<PathBuf>, source: impl Into<std::io::Error>) -> Self {
        Self::Host { step, path: path.into(), source: source.into() }
    }
}

impl From<SpecError> for cri::Error {
    fn from(error: SpecError) -> Self {
        match &error {
            SpecError::Invalid { .. } | SpecError::NoCommand | SpecError::Unknown { .. } => {
                Self::InvalidArgument(error.to_string())
            }
            SpecError::Unsupported { .. } | SpecError::Malformed { .. } | SpecError::NoProfile(_) => {
                Self::FailedPrecondition(error.to_string())
            }
            _ => Self::internal(&error),
        }
    }
}
