//! Credentials for a pod's images: its `imagePullSecrets`, those of its ServiceAccount, then the node's own.

use std::sync::Arc;

use async_trait::async_trait;
use cluster::{Key, Store};
use cri::v1::AuthConfig;
use image::credentials::{Credentials, PullSecret};
use image::{Auth, Reference};
use k8s_openapi::api::core::v1::{Pod, Secret};

/// The keychain of a node.
pub(crate) struct Keychain {
    store: Store,
    credentials: Arc<Credentials>,
}

impl Keychain {
    pub(crate) fn new(store: Store, credentials: Arc<Credentials>) -> Self {
        Self { store, credentials }
    }

    /// The pod's secrets that are there; a missing one is upstream's `FailedToRetrieveImagePullSecret`, not a failure.
    fn secrets(&self, pod: &Pod) -> Vec<Arc<Secret>> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let spec = pod::spec::of(pod);
        let mut names: Vec<String> = spec.image_pull_secrets.iter().flatten().map(|one| one.name.clone()).collect();
        if names.is_empty() {
            let account = spec.service_account_name.as_deref().unwrap_or("default");
            let account = self.store.service_accounts().get(&Key::new(namespace, account));
            let secrets = account.iter().flat_map(|account| account.image_pull_secrets.iter().flatten());
            names.extend(secrets.map(|one| one.name.clone()));
        }
        names.iter().filter_map(|name| self.store.secrets().get(&Key::new(namespace, name))).collect()
    }
}

#[async_trait]
impl kubelet::Keychain for Keychain {
    async fn credentials(&self, pod: &Pod, image: &str) -> Vec<AuthConfig> {
        // The pull itself refuses a reference that is none.
        let Ok(reference) = image.parse::<Reference>() else { return Vec::new() };
        let secrets = self.secrets(pod);
        let secrets: Vec<PullSecret<'_>> = secrets.iter().filter_map(|secret| pull_secret(secret)).collect();
        self.credentials.lookup(&reference, &secrets).await.into_iter().map(auth_config).collect()
    }
}

fn pull_secret(secret: &Secret) -> Option<PullSecret<'_>> {
    let data = secret.data.as_ref()?;
    let new = data.get(".dockerconfigjson").map(|bytes| PullSecret::DockerConfigJson(&bytes.0));
    new.or_else(|| data.get(".dockercfg").map(|bytes| PullSecret::DockerCfg(&bytes.0)))
}

fn auth_config(auth: Auth) -> AuthConfig {
    match auth {
        Auth::Basic { username, password } => AuthConfig { username, password, ..AuthConfig::default() },
        Auth::IdentityToken(identity_token) => AuthConfig { identity_token, ..AuthConfig::default() },
        Auth::RegistryToken(registry_token) => AuthConfig { registry_token, ..AuthConfig::default() },
    }
}
