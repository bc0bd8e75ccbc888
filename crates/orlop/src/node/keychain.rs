//! Credentials for a pod's images: its `imagePullSecrets`, those of its ServiceAccount, then the node's own and those that
//! providers give in the ServiceAccount's name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use cluster::{Key, Source, SourceError, Token};
use cri::v1::AuthConfig;
use image::credentials::{Credentials, Holder as Held, PullSecret, ServiceAccount};
use image::{Auth, Reference};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kubelet::{Credential, Holder, ObjectName};

/// The keychain of a node.
pub(crate) struct Keychain {
    source: Arc<dyn Source>,
    credentials: Arc<Credentials>,
    /// Tokens for providers, by the pod's uid and the audience, and until when they are given. Never held over an await.
    tokens: Mutex<HashMap<(String, String), (String, Timestamp)>>,
}

impl Keychain {
    pub(crate) fn new(source: Arc<dyn Source>, credentials: Arc<Credentials>) -> Self {
        Self { source, credentials, tokens: Mutex::default() }
    }

    /// The pod's service account, for the providers of an image that act in its name; none of a pod that has none, as static
    /// pods are. What cannot be had of it, those providers say.
    async fn account(&self, pod: &Pod, audiences: BTreeSet<&str>) -> Option<ServiceAccount> {
        let name = pod::spec::of(pod).service_account_name.as_deref().filter(|name| !name.is_empty())?;
        if audiences.is_empty() {
            return None;
        }
        let key = Key::new(pod.metadata.namespace.as_deref().unwrap_or("default"), name);
        let (uid, annotations, tokens) = self.facts(pod, &key, audiences).await.unwrap_or_else(|error| {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(account = %key, error, "a service account gets no credentials from providers");
            Facts::default()
        });
        let [namespace, name] = [key.namespace(), key.name()].map(str::to_owned);
        Some(ServiceAccount { namespace, name, uid, annotations, tokens })
    }

    /// Uid, annotations and tokens of a service account.
    async fn facts(&self, pod: &Pod, account: &Key, audiences: BTreeSet<&str>) -> Result<Facts, SourceError> {
        let found = self.source.service_account(account).await?;
        let mut tokens = BTreeMap::new();
        for audience in audiences {
            tokens.insert(audience.to_owned(), self.token(pod, account, audience).await?);
        }
        let annotations = found.metadata.annotations.clone().unwrap_or_default();
        Ok((found.metadata.uid.clone().unwrap_or_default(), annotations, tokens))
    }

    /// A token that is bound to the pod: one that has most of its time before it.
    async fn token(&self, pod: &Pod, account: &Key, audience: &str) -> Result<String, SourceError> {
        let place = (pod.metadata.uid.clone().unwrap_or_default(), audience.to_owned());
        let now = Timestamp::now();
        if let Some(known) = self.known(&place, now) {
            return Ok(known);
        }
        let Token { text, ends } = self.source.request_token(account, request(pod, audience)).await?;
        let until = now.checked_add(ends.duration_since(now) / 2).unwrap_or(now);
        let mut known = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(place, (text.clone(), until));
        Ok(text)
    }

    /// A token that was given before, and still may be.
    fn known(&self, place: &(String, String), now: Timestamp) -> Option<String> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, (_, until)| now < *until);
        tokens.get(place).map(|(token, _)| token.clone())
    }

    /// The pod's secrets that are there; a missing one is upstream's `FailedToRetrieveImagePullSecret`, not a failure.
    fn secrets(&self, pod: &Pod) -> Vec<Arc<Secret>> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let spec = pod::spec::of(pod);
        let mut names: Vec<String> = spec.image_pull_secrets.iter().flatten().map(|one| one.name.clone()).collect();
        if names.is_empty() {
            let account = spec.service_account_name.as_deref().unwrap_or("default");
            let account = self.source.store().service_accounts().get(&Key::new(namespace, account));
            let secrets = account.iter().flat_map(|account| account.image_pull_secrets.iter().flatten());
            names.extend(secrets.map(|one| one.name.clone()));
        }
        names.iter().filter_map(|name| self.source.store().secrets().get(&Key::new(namespace, name))).collect()
    }
}

#[async_trait]
impl kubelet::Keychain for Keychain {
    async fn credentials(&self, pod: &Pod, image: &str) -> Vec<Credential> {
        // The pull itself refuses a reference that is none.
        let Ok(reference) = image.parse::<Reference>() else { return Vec::new() };
        let secrets = self.secrets(pod);
        let (names, secrets): (Vec<ObjectName>, Vec<PullSecret<'_>>) =
            secrets.iter().filter_map(|secret| Some((name_of(secret), pull_secret(secret)?))).unzip();
        let account = self.account(pod, self.credentials.audiences(&reference)).await;
        let found = self.credentials.lookup(&reference, &secrets, account.as_ref()).await.into_iter();
        let holder = |holder| match holder {
            Held::Node => Some(Holder::Node),
            Held::Secret(number) => names.get(number).cloned().map(Holder::Secret),
            Held::ServiceAccount => account.as_ref().map(object_of).map(Holder::ServiceAccount),
        };
        found
            .filter_map(|found| Some(Credential { auth: auth_config(found.auth), holder: holder(found.holder)? }))
            .collect()
    }
}

/// Uid, annotations, and tokens by audience.
type Facts = (String, BTreeMap<String, String>, BTreeMap<String, String>);

/// As upstream's kubelet asks: how long it holds is the API server's to say.
fn request(pod: &Pod, audience: &str) -> TokenRequestSpec {
    TokenRequestSpec {
        audiences: Some(vec![audience.to_owned()]),
        bound_object_ref: Some(BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
        }),
        ..TokenRequestSpec::default()
    }
}

fn object_of(account: &ServiceAccount) -> ObjectName {
    let ServiceAccount { namespace, name, uid, .. } = account.clone();
    ObjectName { uid, namespace, name }
}

fn name_of(secret: &Secret) -> ObjectName {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let metadata = &secret.metadata;
    ObjectName { uid: text(&metadata.uid), namespace: text(&metadata.namespace), name: text(&metadata.name) }
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
    use cluster::Store;
    use image::credentials::CredentialsConfig;
    use k8s_openapi::api::core::v1::{Event, NodeStatus, PodStatus, ServiceAccount};
    use k8s_openapi::jiff::SignedDuration;
    use serde_json::{Value, json};

    use super::*;

    /// Has tables, and gives tokens that hold for so long.
    struct Desk {
        store: Store,
        holds: SignedDuration,
        /// What was asked for.
        asked: Mutex<Vec<TokenRequestSpec>>,
    }

    impl Desk {
        fn new(store: Store, holds: SignedDuration) -> Arc<Self> {
            Arc::new(Self { store, holds, asked: Mutex::default() })
        }
    }

    #[async_trait]
    impl Source for Desk {
        fn store(&self) -> &Store {
            &self.store
        }
        async fn update_pod_status(&self, _: &str, _: PodStatus) -> Result<(), SourceError> {
            Ok(())
        }
        async fn delete_pod(&self, _: &str) -> Result<(), SourceError> {
            Ok(())
        }
        async fn request_deletion(&self, _: &str, _: Option<i64>) -> Result<(), SourceError> {
            Ok(())
        }
        async fn update_node_status(&self, _: &str, _: NodeStatus) -> Result<(), SourceError> {
            Ok(())
        }
        async fn request_token(&self, account: &Key, spec: TokenRequestSpec) -> Result<Token, SourceError> {
            let mut asked = self.asked.lock().unwrap();
            asked.push(spec);
            Ok(Token { text: format!("{account}-{}", asked.len()), ends: Timestamp::now() + self.holds })
        }
        fn event(&self, _: Event) {}
    }

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
        let keychain = Keychain::new(Desk::new(store, SignedDuration::ZERO), credentials);
        let pod: Pod =
            serde_json::from_value(json!({ "metadata": { "namespace": "a", "name": "p" }, "spec": spec })).unwrap();
        let found = kubelet::Keychain::credentials(&keychain, &pod, "r.io/app:1").await;
        let found = found.into_iter().map(|credential| (credential.auth.username, credential.holder));
        let expected = expected.iter().map(|name| {
            let secret = ObjectName { uid: format!("uid-{name}"), namespace: "a".into(), name: (*name).into() };
            ((*name).to_owned(), Holder::Secret(secret))
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

    /// Asks a provider for a pod of the service account `builder`, which answers with the token and the annotation that it got;
    /// twice, with tokens that hold for so long.
    async fn in_its_name(pod: &Pod, holds: SignedDuration) -> (Vec<Credential>, Vec<TokenRequestSpec>) {
        let dir = tempfile::tempdir().unwrap();
        let answer = r#"read -r request
            token=${request##*'"serviceAccountToken":"'}; role=${request##*'"example.com/role":"'}
            printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image",'
            printf '"cacheDuration":"0s","auth":{"r.io":{"username":"%s","password":"%s"}}}' "${role%%'"'*}" "${token%%'"'*}""#;
        let attributes = json!({ "serviceAccountTokenAudience": "registry", "cacheType": "Token", "requireServiceAccount": true,
            "requiredServiceAccountAnnotationKeys": ["example.com/role"] });
        let provider = json!({ "name": "sh", "args": ["-c", answer], "matchImages": ["r.io"], "defaultCacheDuration": "1m",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "tokenAttributes": attributes });
        let config = json!({ "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [provider] });
        let file = dir.path().join("providers.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let config = CredentialsConfig {
            provider_config: Some(file),
            provider_bin_dir: Some("/bin".into()),
            ..CredentialsConfig::default()
        };
        let store = Store::new();
        let metadata = json!({ "namespace": "a", "name": "builder", "uid": "u1", "annotations": { "example.com/role": "puller" } });
        store
            .service_accounts()
            .put(serde_json::from_value::<ServiceAccount>(json!({ "metadata": metadata })).unwrap());
        let desk = Desk::new(store, holds);
        let keychain = Keychain::new(desk.clone(), Arc::new(Credentials::new(config).unwrap()));
        kubelet::Keychain::credentials(&keychain, pod, "r.io/app:1").await;
        let found = kubelet::Keychain::credentials(&keychain, pod, "r.io/app:1").await;
        let asked = desk.asked.lock().unwrap().clone();
        (found, asked)
    }

    #[tokio::test]
    async fn a_provider_acts_in_the_name_of_the_pods_account() {
        let pod = |account: Option<&str>| -> Pod {
            let metadata = json!({ "namespace": "a", "name": "p", "uid": "pod-uid" });
            let spec = json!({ "containers": [], "serviceAccountName": account });
            serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap()
        };
        let (found, asked) = in_its_name(&pod(Some("builder")), SignedDuration::from_hours(1)).await;
        let logins: Vec<_> = found.iter().map(|one| (one.auth.username.as_str(), one.auth.password.as_str())).collect();
        assert_eq!(logins, [("puller", "a/builder-1")]);
        let account = ObjectName { uid: "u1".into(), namespace: "a".into(), name: "builder".into() };
        assert_eq!(found[0].holder, Holder::ServiceAccount(account), "what it opens is not for every pod");
        assert_eq!((asked.len(), asked[0].audiences.as_deref()), (1, Some(["registry".to_owned()].as_slice())));
        assert_eq!(asked[0].bound_object_ref.as_ref().unwrap().uid.as_deref(), Some("pod-uid"));
        let (found, asked) = in_its_name(&pod(Some("builder")), SignedDuration::ZERO).await;
        assert_eq!(
            (asked.len(), found[0].auth.password.as_str()),
            (2, "a/builder-2"),
            "one that has ended is not shown"
        );
        for nobody in [pod(None), pod(Some("")), pod(Some("missing"))] {
            let (found, asked) = in_its_name(&nobody, SignedDuration::from_hours(1)).await;
            assert!(found.is_empty() && asked.is_empty());
        }
    }
}
