//! What is written down of a pull: upstream's `ImagePullIntent` and `ImagePulledRecord` (kubelet.config.k8s.io/v1beta1).

use std::collections::BTreeMap;

use cri::v1::AuthConfig;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Access;
use crate::context::{Credential, Holder, ObjectName};

const VERSION: &str = "kubelet.config.k8s.io/v1beta1";
/// The version before, with the same fields.
const OLD_VERSION: &str = "kubelet.config.k8s.io/v1alpha1";
const INTENT: &str = "ImagePullIntent";
const RECORD: &str = "ImagePulledRecord";

/// So many secrets are noted of an image without a pull: upstream's number.
const NOTED_MAX: usize = 100;

/// An image that is being pulled.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PullIntent {
    kind: String,
    api_version: String,
    pub(super) image: String,
}

/// An image that was pulled.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PulledRecord {
    kind: String,
    api_version: String,
    last_updated_time: Time,
    /// The runtime's id.
    pub(super) image_ref: String,
    /// By what pods call it, without tag and digest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    credential_mapping: BTreeMap<String, Openers>,
}

/// What has opened an image.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Openers {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kubernetes_secrets: Vec<Secret>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kubernetes_service_accounts: Vec<ServiceAccount>,
    /// No login is needed, or every pod of the node has it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    node_pods_accessible: bool,
}

/// A secret, with the sum of the login that it held. In the order in which they are written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Secret {
    namespace: String,
    name: String,
    uid: String,
    credential_hash: String,
}

/// A service account in whose name a login was given. In the order in which they are written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceAccount {
    namespace: String,
    name: String,
    uid: String,
}

/// What an image was had with.
#[derive(Debug, Clone)]
pub(super) enum Login {
    /// None, or one of the node.
    Node,
    /// One of the pod's secrets.
    Secret(Secret),
    /// One in the name of the pod's service account.
    ServiceAccount(ServiceAccount),
}

impl PullIntent {
    pub(super) fn new(image: &str) -> Self {
        Self { kind: INTENT.to_owned(), api_version: VERSION.to_owned(), image: image.to_owned() }
    }

    pub(super) fn is_known(&self) -> bool {
        is_known(INTENT, &self.kind, &self.api_version)
    }
}

impl PulledRecord {
    /// Of an image that nobody may have yet.
    pub(super) fn new(id: &str) -> Self {
        Self {
            kind: RECORD.to_owned(),
            api_version: VERSION.to_owned(),
            last_updated_time: Time(Timestamp::now()),
            image_ref: id.to_owned(),
            credential_mapping: BTreeMap::new(),
        }
    }

    pub(super) fn is_known(&self) -> bool {
        is_known(RECORD, &self.kind, &self.api_version)
    }

    /// By whole seconds, which is what other kubelets write.
    pub(super) fn is_older_than(&self, time: Timestamp) -> bool {
        self.last_updated_time.0.as_second() < time.as_second()
    }

    pub(super) fn access(&self, name: &str) -> Access {
        match self.credential_mapping.get(name) {
            Some(openers) if openers.node_pods_accessible => Access::Everyone,
            Some(openers) if openers.is_held() => Access::Holders,
            _ => Access::Nobody,
        }
    }

    /// Whether a secret may be noted that was not pulled with.
    pub(super) fn has_room(&self, name: &str) -> bool {
        self.credential_mapping.get(name).is_none_or(|openers| openers.kubernetes_secrets.len() < NOTED_MAX)
    }

    /// The first of these logins that has opened the image before: a secret by what it holds, or as it has changed since; a
    /// service account whatever it was given.
    pub(super) fn opened_by(&self, name: &str, logins: impl IntoIterator<Item = Login>) -> Option<Login> {
        let known = self.credential_mapping.get(name)?;
        let has_room = self.has_room(name);
        let opens = |secret: &Secret| {
            known.kubernetes_secrets.iter().any(|known| {
                let is_same = !known.credential_hash.is_empty() && known.credential_hash == secret.credential_hash;
                is_same || (has_room && known.is_place_of(secret))
            })
        };
        logins.into_iter().find(|login| match login {
            Login::Node => false,
            Login::Secret(secret) => opens(secret),
            Login::ServiceAccount(account) => known.kubernetes_service_accounts.contains(account),
        })
    }

    /// Notes what the image was had with. Returns whether that is news.
    pub(super) fn admit(&mut self, name: &str, login: Login) -> bool {
        let openers = self.credential_mapping.entry(name.to_owned()).or_default();
        let is_news = !openers.node_pods_accessible
            && match login {
                Login::Node => {
                    *openers = Openers { node_pods_accessible: true, ..Openers::default() };
                    true
                }
                Login::Secret(secret) => openers.admit(secret),
                Login::ServiceAccount(account) => openers.admit_account(account),
            };
        if is_news {
            VERSION.clone_into(&mut self.api_version);
            self.last_updated_time = Time(Timestamp::now());
        }
        is_news
    }
}

impl Openers {
    /// Whether somebody has something that opens it.
    fn is_held(&self) -> bool {
        !(self.kubernetes_secrets.is_empty() && self.kubernetes_service_accounts.is_empty())
    }

    fn admit_account(&mut self, account: ServiceAccount) -> bool {
        if self.kubernetes_service_accounts.contains(&account) {
            return false;
        }
        self.kubernetes_service_accounts.push(account);
        self.kubernetes_service_accounts.sort();
        true
    }

    fn admit(&mut self, secret: Secret) -> bool {
        if self.kubernetes_secrets.contains(&secret) {
            return false;
        }
        self.kubernetes_secrets.retain(|known| !known.is_place_of(&secret));
        self.kubernetes_secrets.push(secret);
        self.kubernetes_secrets.sort();
        true
    }
}

impl Secret {
    /// Whether the other is the same secret, whatever it holds.
    fn is_place_of(&self, other: &Self) -> bool {
        (&self.namespace, &self.name, &self.uid) == (&other.namespace, &other.name, &other.uid)
    }
}

fn is_known(expected: &str, kind: &str, version: &str) -> bool {
    kind == expected && [VERSION, OLD_VERSION].contains(&version)
}

/// What is written down of a login.
pub(super) fn login_of(credential: &Credential) -> Login {
    match credential.holder.clone() {
        Holder::Node => Login::Node,
        Holder::Secret(ObjectName { uid, namespace, name }) => {
            Login::Secret(Secret { namespace, name, uid, credential_hash: sum_of(&credential.auth) })
        }
        Holder::ServiceAccount(ObjectName { uid, namespace, name }) => {
            Login::ServiceAccount(ServiceAccount { namespace, name, uid })
        }
    }
}

/// The sum of a login: of the JSON that Go makes of it.
fn sum_of(auth: &AuthConfig) -> String {
    let fields = [
        ("username", &auth.username),
        ("password", &auth.password),
        ("auth", &auth.auth),
        ("serveraddress", &auth.server_address),
        ("identitytoken", &auth.identity_token),
        ("registrytoken", &auth.registry_token),
    ];
    let given = fields.iter().filter(|(_, value)| !value.is_empty());
    let text: Vec<String> = given.map(|(name, value)| format!("\"{name}\":{}", go_text(value))).collect();
    hex_sum(format!("{{{}}}", text.join(",")).as_bytes())
}

/// A text as `encoding/json` has it, which spares HTML.
fn go_text(text: &str) -> String {
    let mut plain = serde_json::Value::from(text).to_string();
    for (character, escape) in
        [("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u{2028}", "\\u2028"), ("\u{2029}", "\\u2029")]
    {
        plain = plain.replace(character, escape);
    }
    plain
}

pub(super) fn hex_sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As an upstream kubelet has written it.
    const WRITTEN: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","lastUpdatedTime":"2026-01-02T03:04:05Z","imageRef":"sha256:0123","credentialMapping":{"r.io/app":{"kubernetesSecrets":[{"uid":"u","namespace":"default","name":"login","credentialHash":"00"}],"kubernetesServiceAccounts":[{"uid":"s","namespace":"default","name":"builder"}]},"r.io/open":{"nodePodsAccessible":true}}}"#;

    #[test]
    fn records_of_upstream_are_read_and_kept() {
        let record: PulledRecord = serde_json::from_str(WRITTEN).unwrap();
        assert_eq!((record.access("r.io/app"), record.access("r.io/open")), (Access::Holders, Access::Everyone));
        let again: serde_json::Value = serde_json::to_value(&record).unwrap();
        let before: serde_json::Value = serde_json::from_str(WRITTEN).unwrap();
        assert_eq!(again, before);
        assert!(serde_json::from_str::<PulledRecord>(&WRITTEN.replace("uid", "guid")).is_err());
    }

    #[test]
    fn the_sum_of_a_login_is_upstreams() {
        let auth = AuthConfig { username: "u".into(), password: "a<b>&c\"".into(), ..AuthConfig::default() };
        let text = "{\"username\":\"u\",\"password\":\"a\\u003cb\\u003e\\u0026c\\\"\"}";
        assert_eq!(sum_of(&auth), hex_sum(text.as_bytes()));
        assert_eq!(hex_sum(b"").get(..8), Some("e3b0c442"));
    }
}
