//! Credentials for a pull: imagePullSecrets, docker `config.json`, credential-provider plugins.
//!
//! The kubelet side asks [`Credentials::lookup`] and tries each answer in order; then, if none works, an anonymous pull.

mod config;
mod docker;
mod glob;
mod helper;
mod keyring;
mod program;
mod provider;
#[cfg(test)]
mod scripts;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use docker::DockerConfig;
use keyring::Keyring;
use provider::Provider;

use crate::{Auth, Error, Reference};

/// Where a node finds credentials.
#[derive(Debug, Clone, Default)]
pub struct CredentialsConfig {
    /// docker `config.json` files (a file called `.dockercfg` has the older form), in order. Those that are missing are
    /// passed over; all are read anew for each look-up.
    pub docker_configs: Vec<PathBuf>,
    /// Where the programs that `credHelpers` and `credsStore` name may be found. None: they are never run.
    pub credential_helper_dir: Option<PathBuf>,
    /// `CredentialProviderConfig` (`--image-credential-provider-config`): a file, or a directory of them.
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

/// Credentials that may open an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What the registry is shown.
    pub auth: Auth,
    /// Whose they are.
    pub holder: Holder,
}

/// Who may use credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Every pod of the node.
    Node,
    /// Who has this one of the pod's secrets.
    Secret(usize),
    /// Who has the pod's service account.
    ServiceAccount,
}

/// The service account of a pod, for providers that act in its name.
#[derive(Clone)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Tokens of it that are bound to the pod, by audience ([`Credentials::audiences`]).
    pub tokens: BTreeMap<String, String>,
}

/// All sources of credentials of a node.
#[derive(Debug)]
pub struct Credentials {
    docker_configs: Vec<PathBuf>,
    credential_helper_dir: Option<PathBuf>,
    providers: Vec<Provider>,
}

impl Credentials {
    /// Reads the provider configuration; all its faults are reported at once.
    pub fn new(config: CredentialsConfig) -> Result<Self, Error> {
        let providers = match &config.provider_config {
            Some(path) => config::read(path, config.provider_bin_dir.as_deref())?,
            None => Vec::new(),
        };
        Ok(Self {
            docker_configs: config.docker_configs,
            credential_helper_dir: config.credential_helper_dir,
            providers: providers.into_iter().map(Provider::new).collect(),
        })
    }

    /// Credentials that match `image`, the pod's secrets first, then the node's files and plugins; each kind by the
    /// longest match. Malformed secrets are skipped: one must not keep the others from working.
    pub async fn lookup(
        &self,
        image: &Reference,
        secrets: &[PullSecret<'_>],
        account: Option<&ServiceAccount>,
    ) -> Vec<Found> {
        let mut of_node = Vec::new();
        for fault in of_files(&self.docker_configs, self.credential_helper_dir.as_deref(), image, &mut of_node).await {
            tracing::warn!(%image, error = %fault, "passed over a source of credentials");
        }
        let mut found = of_secrets(secrets).lookup(image);
        found.extend(of_node.into_iter().map(|auth| Found { auth, holder: Holder::Node }));
        found.extend(self.of_providers(image, account).await.lookup(image));
        without_repeats(found)
    }

    /// For whom providers of this image want tokens of the pod's service account.
    pub fn audiences(&self, image: &Reference) -> BTreeSet<&str> {
        self.providers.iter().filter_map(|provider| provider.audience(image)).collect()
    }

    /// All providers at the same time; who fails is passed over, as the others may have what is needed.
    async fn of_providers(&self, image: &Reference, account: Option<&ServiceAccount>) -> Keyring<Found> {
        let answers = self.providers.iter().map(|provider| provider.keyring(image, account));
        let answers = futures_util::future::join_all(answers).await;
        let mut keyring = Keyring::default();
        for (provider, answer) in self.providers.iter().zip(answers) {
            match answer {
                Ok((answer, holder)) => keyring.extend(answer.map(|auth| Found { auth, holder })),
                Err(error) => {
                    tracing::warn!(provider = provider.name(), %image, %error, "a credential provider has failed");
                }
            }
        }
        keyring
    }
}

/// What the node itself knows about `reference`, for pulls that bring no credentials: the best match.
pub(crate) async fn node_credentials(config: &crate::Config, reference: &Reference) -> Result<Option<Auth>, Error> {
    let mut found = Vec::new();
    let faults = of_files(&config.docker_configs, config.credential_helper_dir.as_deref(), reference, &mut found).await;
    match faults.into_iter().next() {
        Some(fault) if found.is_empty() => Err(fault),
        _ => Ok(found.into_iter().next()),
    }
}

fn of_secrets(secrets: &[PullSecret<'_>]) -> Keyring<Found> {
    let mut keyring = Keyring::default();
    for (number, secret) in secrets.iter().enumerate() {
        let read = match secret {
            PullSecret::DockerConfigJson(bytes) => docker::parse_config(bytes),
            PullSecret::DockerCfg(bytes) => docker::parse_dockercfg(bytes),
        };
        match read {
            Ok(config) => {
                for fault in &config.faults {
                    tracing::warn!(fault, "passed over an entry of an imagePullSecret");
                }
                keyring.extend(config.keyring.map(|auth| Found { auth, holder: Holder::Secret(number) }));
            }
            Err(fault) => tracing::warn!(fault, "passed over a malformed imagePullSecret"),
        }
    }
    keyring
}

/// Adds what the node's own files have for `image`: of all files together the longest match first, then what credential
/// helpers say. Returns what was wrong with files and helpers.
async fn of_files(
    files: &[PathBuf],
    helper_dir: Option<&Path>,
    image: &Reference,
    found: &mut Vec<Auth>,
) -> Vec<Error> {
    let mut faults = Vec::new();
    let mut keyring = Keyring::default();
    for path in files {
        let faulty = |reason: String| Error::Configuration { path: path.clone(), reason };
        let config = match read_file(path).await {
            Ok(Some(config)) => config,
            Ok(None) => continue,
            Err(reason) => {
                faults.push(faulty(reason));
                continue;
            }
        };
        faults.extend(config.faults.into_iter().map(faulty));
        if let Some(name) = helper::named(&config.helpers, config.store.as_deref(), image) {
            match of_helper(helper_dir, name, image).await {
                Ok(auth) => found.extend(auth),
                Err(reason) => faults.push(faulty(reason)),
            }
        }
        keyring.extend(config.keyring);
    }
    found.extend(keyring.lookup(image));
    faults
}

async fn of_helper(directory: Option<&Path>, name: &str, image: &Reference) -> Result<Option<Auth>, String> {
    match directory {
        Some(directory) => helper::ask(directory, name, image).await,
        None => Err(format!("it names the credential helper {name:?}, but no directory of helpers is configured")),
    }
}

async fn read_file(path: &Path) -> Result<Option<DockerConfig>, String> {
    let bytes = match tokio::fs::read(path).await {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| e.to_string())?,
    };
    let old = path.file_name().is_some_and(|name| name == ".dockercfg");
    let read = if old { docker::parse_dockercfg(&bytes) } else { docker::parse_config(&bytes) };
    read.map(Some)
}

/// The same login in several places is tried once.
fn without_repeats(mut found: Vec<Found>) -> Vec<Found> {
    let mut seen = std::collections::HashSet::new();
    found.retain(|one| seen.insert(one.auth.clone()));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(name: &str) -> Auth {
        Auth::Basic { username: name.to_owned(), password: "p".to_owned() }
    }

    fn entry(place: &str, name: &str) -> String {
        format!(r#""{place}": {{"username": "{name}", "password": "p"}}"#)
    }

    fn config(entries: &[String]) -> String {
        format!(r#"{{"auths": {{{}}}}}"#, entries.join(","))
    }

    #[tokio::test]
    async fn secrets_come_before_files_before_providers() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("config.json"), dir.path().join(".dockercfg"));
        std::fs::write(&first, config(&[entry("r.io", "file")])).unwrap();
        std::fs::write(&second, format!("{{{}}}", entry("r.io/team", "old-file"))).unwrap();
        scripts::install(
            &dir.path().join("provider"),
            r#"echo '{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "cacheKeyType": "Registry", "auth": {"r.io": {"username": "provider", "password": "p"},
                "r.io/": {"username": "file", "password": "p"}}}'"#,
        );
        let providers = dir.path().join("providers.yaml");
        std::fs::write(
            &providers,
            "{apiVersion: kubelet.config.k8s.io/v1, kind: CredentialProviderConfig, providers: [{name: provider, \
             matchImages: [r.io], defaultCacheDuration: 1m, apiVersion: credentialprovider.kubelet.k8s.io/v1}]}",
        )
        .unwrap();
        let credentials = Credentials::new(CredentialsConfig {
            docker_configs: vec![dir.path().join("missing"), first, second],
            provider_config: Some(providers),
            provider_bin_dir: Some(dir.path().to_owned()),
            ..CredentialsConfig::default()
        })
        .unwrap();
        let (new, old) = (config(&[entry("r.io", "short")]), format!("{{{}}}", entry("r.io/team", "long")));
        let secrets = [
            PullSecret::DockerConfigJson(b"malformed"),
            PullSecret::DockerConfigJson(new.as_bytes()),
            PullSecret::DockerCfg(old.as_bytes()),
        ];
        let image = "r.io/team/app:1".parse().unwrap();
        let found = credentials.lookup(&image, &secrets, None).await;
        let holders = [Holder::Secret(2), Holder::Secret(1), Holder::Node, Holder::Node, Holder::Node];
        let expected = ["long", "short", "old-file", "file", "provider"].map(basic).into_iter().zip(holders);
        assert!(found.into_iter().map(|Found { auth, holder }| (auth, holder)).eq(expected));
        assert_eq!(credentials.lookup(&"q.io/app".parse().unwrap(), &secrets, None).await, []);
    }

    #[tokio::test]
    async fn helpers_run_only_where_the_operator_says() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let text = r#"{"auths": {"r.io": {}}, "credHelpers": {"r.io": "test"}, "credsStore": "missing"}"#;
        std::fs::write(&file, text).unwrap();
        scripts::install(
            &dir.path().join("docker-credential-test"),
            r#"[ "$1 $(cat)" = "get r.io" ] && echo '{"ServerURL": "r.io", "Username": "<token>", "Secret": "it"}'"#,
        );
        scripts::install(
            &dir.path().join("docker-credential-missing"),
            "echo credentials not found in native keychain; exit 1",
        );
        let mut config = crate::Config::new(dir.path());
        config.docker_configs = vec![file.clone()];
        let image = "r.io/app".parse().unwrap();
        let error = node_credentials(&config, &image).await.unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("\"test\""), "{error}");
        config.credential_helper_dir = Some(dir.path().to_owned());
        assert_eq!(node_credentials(&config, &image).await.unwrap(), Some(Auth::IdentityToken("it".into())));
        assert_eq!(node_credentials(&config, &"q.io/app".parse().unwrap()).await.unwrap(), None);
        std::fs::write(&file, text.replace("test", "../evil")).unwrap();
        assert!(node_credentials(&config, &image).await.is_err());
    }
}
