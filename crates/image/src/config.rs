//! What the operator decides about images, and the credentials a caller brings.

use std::path::PathBuf;

use crate::spec::Platform;

/// How the image store is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the store lives: `/var/lib/orlop/images`.
    pub state_dir: PathBuf,
    /// Trees of `hosts.toml` files; the first that has a directory for a registry wins.
    pub registry_config_dirs: Vec<PathBuf>,
    /// The node's own docker `config.json` files, asked when a pull brings no credentials.
    pub docker_configs: Vec<PathBuf>,
    /// Where the programs that `credHelpers` and `credsStore` name may be found. None: they are never run.
    pub credential_helper_dir: Option<PathBuf>,
    /// The machine to choose images for.
    pub platform: Platform,
    /// Layers of one pull that are fetched and unpacked at the same time.
    pub parallel_layers: usize,
    /// Budgets of a layer.
    pub limits: Limits,
}

impl Config {
    /// The defaults, with the store in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            registry_config_dirs: vec!["/etc/orlop/certs.d".into(), "/etc/containerd/certs.d".into()],
            docker_configs: Vec::new(),
            credential_helper_dir: None,
            platform: Platform::host(),
            parallel_layers: 3,
            limits: Limits::default(),
        }
    }
}

/// What one layer may cost (R6). A layer that wants more is refused with its entry's name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Files, directories and links.
    pub entries_max: u64,
    /// Bytes of all its files together, uncompressed.
    pub bytes_max: u64,
    /// Uncompressed bytes for each compressed one, counted once a layer has passed `ratio_free_bytes`.
    pub ratio_max: u64,
    /// Below this uncompressed size the ratio is not looked at.
    pub ratio_free_bytes: u64,
    /// Bytes of a path in the archive.
    pub path_bytes_max: usize,
    /// Address space of the unpacking process in bytes.
    pub memory_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries_max: 4_000_000,
            bytes_max: 256 << 30,
            ratio_max: 200,
            ratio_free_bytes: 2 << 30,
            path_bytes_max: 4096,
            memory_bytes_max: 512 << 20,
        }
    }
}

/// Credentials of one request, as CRI's `AuthConfig` carries them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Auth {
    /// User name and password; sent to the registry itself or to its token server.
    Basic {
        /// User name.
        username: String,
        /// Password or access token.
        password: String,
    },
    /// An OAuth2 refresh token, exchanged at the registry's token server.
    IdentityToken(String),
    /// A bearer token for the registry itself.
    RegistryToken(String),
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Basic { username, .. } => write!(f, "Basic({username}, …)"),
            Self::IdentityToken(_) => f.write_str("IdentityToken(…)"),
            Self::RegistryToken(_) => f.write_str("RegistryToken(…)"),
        }
    }
}
