//! Credentials for a pod's images: its `imagePullSecrets`, those of its ServiceAccount, then the node's own.

use std::sync::Arc;

use async_trait::async_trait;
use cluster::{Key, Store};
use cri::v1::AuthConfig;
use image::credentials::{Credentials, Found, PullSecret};
use image::{Auth, Reference};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kubelet::{Credential, SecretName};

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
    async fn credentials(&self, pod: &Pod, image: &str) -> Vec<Credential> {
        // The pull itself refuses a reference that is none.
        let Ok(reference) = image.parse::<Reference>() else { return Vec::new() };
        let secrets = self.secrets(pod);
        let (names, secrets): (Vec<SecretName>, Vec<PullSecret<'_>>) =
            secrets.iter().filter_map(|secret| Some((name_of(secret), pull_secret(secret)?))).unzip();
        let found = self.credentials.lookup(&reference, &secrets).await.into_iter();
        let credential = |Found { auth, secret }: Found| Credential {
            auth: auth_config(auth),
            secret: secret.and_then(|number| names.get(number).cloned()),
        };
        found.map(credential).collect()
    }
}

fn name_of(secret: &Secret) -> SecretName {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let metadata = &secret.metadata;
    SecretName { uid: text(&metadata.uid), namespace: text(&metadata.namespace), name: text(&metadata.name) }
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

#[cfg(test)]
mod tests {
    use image::credentials::CredentialsConfig;
    use k8s_openapi::api::core::v1::ServiceAccount;
    use serde_json::{Value, json};

    use super::*;

    /// A secret with a login of its own name, and no password.
    fn secret(namespace: &str, name: &str) -> Secret {
        let config = json!({ "auths": { "r.io": { "username": name } } }).to_string();
        let metadata = json!({ "namespace": namespace, "name": name, "uid": format!("uid-{name}") });
        let mut secret: Secret = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        let content = k8s_openapi::ByteString(config.into_bytes());
        secret.data = Some([(".dockerconfigjson".to_owned(), content)].into());
        secret
    }

    /// The logins that a pod has for an image of r.io, with their secrets.
    async fn check(spec: Value, expected: &[&str]) {
        let store = Store::new();
        for name in ["own", "second", "accounts"] {
            store.secrets().put(secret("a", name));
        }
        store.secrets().put(secret("b", "strangers"));
        for (name, secrets) in [("default", json!([])), ("builder", json!([{ "name": "accounts" }]))] {
            let metadata = json!({ "namespace": "a", "name": name });
            let account = json!({ "metadata": metadata, "imagePullSecrets": secrets });
            store.service_accounts().put(serde_json::from_value::<ServiceAccount>(account).unwrap());
        }
        let credentials = Arc::new(Credentials::new(CredentialsConfig::default()).unwrap());
        let keychain = Keychain::new(store, credentials);
        let pod: Pod =
            serde_json::from_value(json!({ "metadata": { "namespace": "a", "name": "p" }, "spec": spec })).unwrap();
        let found = kubelet::Keychain::credentials(&keychain, &pod, "r.io/app:1").await;
        let found = found.into_iter().map(|credential| (credential.auth.username, credential.secret.unwrap()));
        let expected = expected.iter().map(|name| {
            let secret = SecretName { uid: format!("uid-{name}"), namespace: "a".into(), name: (*name).into() };
            ((*name).to_owned(), secret)
        });
        assert!(found.eq(expected), "{spec}");
        assert!(kubelet::Keychain::credentials(&keychain, &pod, "q.io/app:1").await.is_empty());
    }

    #[tokio::test]
    async fn a_pod_has_its_secrets_or_those_of_its_account() {
        let own = json!([{ "name": "second" }, { "name": "missing" }, { "name": "own" }]);
        check(
            json!({ "containers": [], "imagePullSecrets": own, "serviceAccountName": "builder" }),
            &["second", "own"],
        )
        .await;
        check(json!({ "containers": [], "serviceAccountName": "builder" }), &["accounts"]).await;
        check(json!({ "containers": [] }), &[]).await;
        check(json!({ "containers": [], "imagePullSecrets": [{ "name": "strangers" }] }), &[]).await;
    }
}
