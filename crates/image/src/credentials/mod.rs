//! Credentials for a pull: imagePullSecrets, docker `config.json`, credential-provider plugins.
//!
//! The kubelet side asks [`Credentials::lookup`] and tries each answer in order; then, if none works, an anonymous pull.

use std::path::PathBuf;

use crate::{Auth, Error, Reference};

/// Where a node finds credentials.
#[derive(Debug, Clone, Default)]
pub struct CredentialsConfig {
    /// docker `config.json` files, in order.
    pub docker_configs: Vec<PathBuf>,
    /// `CredentialProviderConfig` (`--image-credential-provider-config`).
    pub provider_config: Option<PathBuf>,
    /// Where the provider programs are (`--image-credential-provider-bin-dir`).
    pub provider_bin_dir: Option<PathBuf>,
}

/// The data of one imagePullSecret.
#[derive(Debug, Clone, Copy)]
pub enum PullSecret<'a> {
    /// `.dockerconfigjson` of a `kubernetes.io/dockerconfigjson` secret.
    DockerConfigJson(&'a [u8]),
    /// `.dockercfg` of a `kubernetes.io/dockercfg` secret.
    DockerCfg(&'a [u8]),
}

/// All sources of credentials of a node.
#[derive(Debug)]
pub struct Credentials {}

impl Credentials {
    /// Reads the provider configuration; all its faults are reported at once.
    pub fn new(_config: CredentialsConfig) -> Result<Self, Error> {
        Ok(Self {})
    }

    /// Credentials that match `image`, the pod's secrets first, then the node's files and plugins; each kind by the
    /// longest match. Malformed secrets are skipped: one must not keep the others from working.
    pub async fn lookup(&self, _image: &Reference, _secrets: &[PullSecret<'_>]) -> Vec<Auth> {
        Vec::new()
    }
}

/// What the node itself knows about `reference`, for pulls that bring no credentials.
pub(crate) async fn node_credentials(_config: &crate::Config, _reference: &Reference) -> Result<Option<Auth>, Error> {
    Ok(None)
}
