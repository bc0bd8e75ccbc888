//! Certificates of pods (`podCertificate`): the key is made here, a signer of the cluster certifies it, and both are renewed
//! when the signer says so.
//!
//! ```text
//! wanted ─► key + PodCertificateRequest ─► pending ─► issued ─► fresh ─(beginRefreshAt)─► fresh, with a renewal pending
//! ```
//!
//! Keys are nowhere but in memory and in the pods' volumes; a daemon that starts anew asks for new ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::{Key, Source, SourceError};
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{PodCertificateRequest, PodCertificateRequestSpec};
use k8s_openapi::api::core::v1::{Pod, PodCertificateProjection};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SignatureAlgorithm};

use super::trust;
use crate::context::uid_of;

/// How long a pod that starts waits for its signer before it says so.
const ISSUED_WITHIN: Duration = Duration::from_secs(10);
/// A request that is gone, and that long ago, will not be answered (upstream).
const ABANDONED_AFTER: SignedDuration = SignedDuration::from_mins(10);
/// After a failure.
const RETRY: SignedDuration = SignedDuration::from_secs(10);

/// A projection: the volume's name, and its place among the volume's sources.
pub(super) type Wanted = (String, usize);

/// Certificates, as wanted.
pub(super) type Issued = BTreeMap<Wanted, Bundle>;

/// A key and its certificates, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bundle {
    pub(super) key: String,
    pub(super) chain: String,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A kind of key that this node does not make.
    #[error("keyType {0} is not supported by this node; use ECDSAP256, ECDSAP384 or ED25519")]
    KeyType(String),
    /// The key or its request.
    #[error("a key cannot be made: {0}")]
    Key(#[from] rcgen::Error),
    /// The signer will not have it; the pod would have to be made anew.
    #[error("PodCertificateRequest {request} was permanently {decision}: reason={reason:?} message={message:?}")]
    Refused {
        /// Its name.
        request: String,
        /// `denied` or `failed`.
        decision: &'static str,
        /// The signer's words.
        reason: String,
        /// The signer's words.
        message: String,
    },
    /// The signer has not answered.
    #[error("PodCertificateRequest {request} is not issued yet; signer {signer} has to answer it")]
    Pending {
        /// Its name.
        request: String,
        /// Who is asked.
        signer: String,
    },
    /// The node is not known yet.
    #[error("the node has no object in the cluster yet")]
    NoNode,
    /// The API server.
    #[error("{}", crate::context::chain(reason))]
    Source {
        /// Why.
        #[from]
        reason: SourceError,
    },
}

/// The certificates of a node's pods.
pub(super) struct Certificates {
    source: Arc<dyn Source>,
    node: String,
    /// By pod and projection. Never held over an await.
    kept: Mutex<HashMap<(String, Wanted), Kept>>,
}

/// What is known of a projection.
#[derive(Debug, Clone, Default)]
struct Kept {
    fresh: Option<Fresh>,
    pending: Option<Pending>,
    /// When somebody should see to it.
    look_at: Option<Timestamp>,
}

#[derive(Debug, Clone)]
struct Fresh {
    bundle: Bundle,
    refresh_at: Timestamp,
}

#[derive(Debug, Clone)]
struct Pending {
    key: String,
    request: Key,
    made: Timestamp,
}

/// What has become of a request.
enum Answer {
    Issued { chain: String, refresh_at: Timestamp },
    Refused { decision: &'static str, reason: String, message: String },
    Open,
    Gone,
}

/// The projections of a pod that want certificates.
pub(super) fn wanted(pod: &Pod) -> Vec<(Wanted, &PodCertificateProjection)> {
    let volumes = pod::spec::of(pod).volumes.iter().flatten();
    let projected = volumes.filter_map(|volume| Some((volume, volume.projected.as_ref()?.sources.as_ref()?)));
    let sources = projected.flat_map(|(volume, sources)| {
        sources.iter().enumerate().map(move |(index, source)| ((volume.name.clone(), index), source))
    });
    sources.filter_map(|(wanted, source)| Some((wanted, source.pod_certificate.as_ref()?))).collect()
}

impl Certificates {
    pub(super) fn new(source: Arc<dyn Source>, node: &str) -> Self {
        Self { source, node: node.to_owned(), kept: Mutex::default() }
    }

    /// The certificates of a pod: those that are known, new ones for those that are missing. One that is due is renewed
    /// beside it.
    ///
    /// # Errors
    /// The volume that lacks one, and why.
    pub(super) async fn issue(&self, pod: &Pod) -> Result<Issued, (String, CertificateError)> {
        let mut issued = Issued::new();
        for (wanted, projection) in wanted(pod) {
            let bundle = self.one(pod, &wanted, projection).await;
            let bundle = bundle.map_err(|error| (wanted.0.clone(), error))?;
            issued.insert(wanted, bundle);
        }
        Ok(issued)
    }

    async fn one(
        &self,
        pod: &Pod,
        wanted: &Wanted,
        projection: &PodCertificateProjection,
    ) -> Result<Bundle, CertificateError> {
        let place = (uid_of(pod).to_owned(), wanted.clone());
        let known = self.lock().get(&place).cloned().unwrap_or_default();
        let Some(fresh) = known.fresh.clone() else {
            return self.first(pod, &place, known.pending, projection).await;
        };
        if Timestamp::now() < fresh.refresh_at {
            return Ok(fresh.bundle);
        }
        match self.renewed(pod, &place, known.pending, projection).await {
            Ok(bundle) => Ok(bundle),
            Err(error) => {
                tracing::warn!(uid = place.0, volume = wanted.0, %error, "a pod's certificate cannot be renewed yet");
                Ok(fresh.bundle)
            }
        }
    }

    /// The first certificate of a projection, which is waited for a little.
    async fn first(
        &self,
        pod: &Pod,
        place: &(String, Wanted),
        pending: Option<Pending>,
        projection: &PodCertificateProjection,
    ) -> Result<Bundle, CertificateError> {
        let pending = self.pending(pod, place, pending, projection).await?;
        let mut changes = self.source.store().pod_certificate_requests().watch();
        let decided = async {
            loop {
                match self.answer(&pending) {
                    Answer::Open => drop(changes.next().await),
                    decided => return decided,
                }
            }
        };
        let answer = tokio::time::timeout(ISSUED_WITHIN, decided).await.unwrap_or(Answer::Open);
        self.take(place, pending, answer, projection)
    }

    /// A newer certificate, if there is one by now; else it is asked for.
    async fn renewed(
        &self,
        pod: &Pod,
        place: &(String, Wanted),
        pending: Option<Pending>,
        projection: &PodCertificateProjection,
    ) -> Result<Bundle, CertificateError> {
        self.look_later(place);
        let pending = self.pending(pod, place, pending, projection).await?;
        let answer = self.answer(&pending);
        self.take(place, pending, answer, projection)
    }

    /// The request that is under way, or a new one.
    async fn pending(
        &self,
        pod: &Pod,
        place: &(String, Wanted),
        pending: Option<Pending>,
        projection: &PodCertificateProjection,
    ) -> Result<Pending, CertificateError> {
        self.source.look_up_pod_certificates().await?;
        if let Some(pending) = pending.filter(|pending| !matches!(self.answer(pending), Answer::Gone)) {
            return Ok(pending);
        }
        let (key, stub) = key_and_request(&projection.key_type)?;
        let request = self.request(pod, projection, stub).await?;
        let made = self.source.request_pod_certificate(&request).await?;
        let pending = Pending { key, request: Key::of(&made.metadata), made: Timestamp::now() };
        self.lock().entry(place.clone()).or_default().pending = Some(pending.clone());
        Ok(pending)
    }

    async fn request(
        &self,
        pod: &Pod,
        projection: &PodCertificateProjection,
        stub: Vec<u8>,
    ) -> Result<PodCertificateRequest, CertificateError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let account = pod::spec::of(pod).service_account_name.as_deref().unwrap_or("default");
        let account_uid = self.source.service_account_uid(&Key::new(namespace, account)).await?;
        let node = self.source.store().nodes().get(&Key::cluster(&self.node));
        let node_uid = node.and_then(|node| node.metadata.uid.clone()).ok_or(CertificateError::NoNode)?;
        let pod_name = pod.metadata.name.clone().unwrap_or_default();
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            name: pod_name.clone(),
            uid: uid_of(pod).to_owned(),
            ..OwnerReference::default()
        };
        Ok(PodCertificateRequest {
            metadata: ObjectMeta {
                namespace: Some(namespace.to_owned()),
                generate_name: Some("req-".to_owned()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: PodCertificateRequestSpec {
                signer_name: projection.signer_name.clone(),
                pod_name,
                pod_uid: uid_of(pod).to_owned(),
                service_account_name: account.to_owned(),
                service_account_uid: account_uid,
                node_name: self.node.clone(),
                node_uid,
                max_expiration_seconds: projection.max_expiration_seconds,
                stub_pkc_s10_request: ByteString(stub),
                unverified_user_annotations: projection.user_annotations.clone(),
            },
            status: None,
        })
    }

    fn answer(&self, pending: &Pending) -> Answer {
        let Some(request) = self.source.store().pod_certificate_requests().get(&pending.request) else {
            // The table may not have heard of it yet.
            let is_old = Timestamp::now().duration_since(pending.made) > ABANDONED_AFTER;
            return if is_old { Answer::Gone } else { Answer::Open };
        };
        answer_in(&request)
    }

    /// Keeps what was answered.
    fn take(
        &self,
        place: &(String, Wanted),
        pending: Pending,
        answer: Answer,
        projection: &PodCertificateProjection,
    ) -> Result<Bundle, CertificateError> {
        let request = pending.request.to_string();
        match answer {
            Answer::Issued { chain, refresh_at } => {
                let bundle = Bundle { key: pending.key, chain };
                let fresh = Some(Fresh { bundle: bundle.clone(), refresh_at });
                self.lock().insert(place.clone(), Kept { fresh, pending: None, look_at: Some(refresh_at) });
                Ok(bundle)
            }
            Answer::Refused { decision, reason, message } => {
                Err(CertificateError::Refused { request, decision, reason, message })
            }
            Answer::Open | Answer::Gone => {
                Err(CertificateError::Pending { request, signer: projection.signer_name.clone() })
            }
        }
    }

    /// When some certificate is due; none if there is none.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        self.lock().values().filter_map(|kept| kept.look_at).min()
    }

    /// The pods whose certificates are due. They are due again later, should nobody renew them.
    pub(super) fn take_due(&self) -> Vec<String> {
        let now = Timestamp::now();
        let mut kept = self.lock();
        let due = kept.iter_mut().filter(|(_, kept)| kept.look_at.is_some_and(|at| at <= now));
        let mut pods: Vec<String> = due
            .map(|((uid, _), kept)| {
                kept.look_at = Some(later(now, RETRY));
                uid.clone()
            })
            .collect();
        pods.sort();
        pods.dedup();
        pods
    }

    fn look_later(&self, place: &(String, Wanted)) {
        if let Some(kept) = self.lock().get_mut(place) {
            kept.look_at = Some(later(Timestamp::now(), RETRY));
        }
    }

    /// The pod is gone.
    pub(super) fn forget(&self, uid: &str) {
        self.lock().retain(|(pod, _), _| pod != uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, Wanted), Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer_in(request: &PodCertificateRequest) -> Answer {
    let Some(status) = &request.status else { return Answer::Open };
    for condition in status.conditions.iter().flatten() {
        let decision = match condition.type_.as_str() {
            "Issued" => {
                let chain = trust::certificates(status.certificate_chain.as_deref());
                let refresh_at = status.begin_refresh_at.as_ref().map_or(Timestamp::MAX, |time| time.0);
                return Answer::Issued { chain, refresh_at };
            }
            "Denied" => "denied",
            "Failed" => "failed",
            _ => continue,
        };
        let (reason, message) = (condition.reason.clone(), condition.message.clone());
        return Answer::Refused { decision, reason, message };
    }
    Answer::Open
}

/// A key in PKCS#8 PEM, and a request that proves to have it and says nothing else (DER).
fn key_and_request(kind: &str) -> Result<(String, Vec<u8>), CertificateError> {
    let algorithm: &SignatureAlgorithm = match kind {
        "ECDSAP256" => &rcgen::PKCS_ECDSA_P256_SHA256,
        "ECDSAP384" => &rcgen::PKCS_ECDSA_P384_SHA384,
        "ED25519" => &rcgen::PKCS_ED25519,
        // What certifies our keys, ring, makes no others.
        other => return Err(CertificateError::KeyType(other.to_owned())),
    };
    let key = KeyPair::generate_for(algorithm)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key)?;
    Ok((key.serialize_pem(), request.der().to_vec()))
}

fn later(now: Timestamp, by: SignedDuration) -> Timestamp {
    now.checked_add(by).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn keys_of_every_kind() {
        for kind in ["ECDSAP256", "ECDSAP384", "ED25519"] {
            let (key, request) = key_and_request(kind).unwrap();
            assert!(key.starts_with("-----BEGIN PRIVATE KEY-----"), "{kind}");
            assert_eq!(request[0], 0x30, "a DER sequence");
        }
        let error = key_and_request("RSA3072").unwrap_err().to_string();
        assert!(error.contains("RSA3072") && error.contains("ED25519"), "{error}");
    }

    #[test]
    fn answers() {
        let answer = |status: Value| {
            let object = json!({"metadata": {}, "spec": {"signerName": "s", "podName": "p", "podUID": "u", "serviceAccountName": "a",
                "serviceAccountUID": "au", "nodeName": "n", "nodeUID": "nu", "stubPKCS10Request": ""}, "status": status});
            answer_in(&serde_json::from_value(object).unwrap())
        };
        let condition = |kind: &str| json!([{"type": kind, "status": "True", "reason": "R", "message": "M", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        assert!(matches!(answer(json!({})), Answer::Open));
        assert!(matches!(answer(json!({"conditions": condition("Other")})), Answer::Open));
        let denied = answer(json!({"conditions": condition("Denied")}));
        assert!(matches!(denied, Answer::Refused { decision: "denied", ref reason, .. } if reason == "R"));
        let issued = answer(json!({"conditions": condition("Issued"), "beginRefreshAt": "2026-01-02T00:00:00Z",
            "certificateChain": "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----"}));
        let Answer::Issued { chain, refresh_at } = issued else { panic!() };
        assert_eq!((chain.lines().count(), refresh_at.to_string().as_str()), (3, "2026-01-02T00:00:00Z"));
    }

    #[test]
    fn each_source_has_its_place() {
        let certificate = json!({"podCertificate": {"signerName": "s", "keyType": "ED25519"}});
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [], "volumes": [
            {"name": "a", "projected": {"sources": [{"secret": {"name": "x"}}, certificate, certificate]}},
            {"name": "b", "emptyDir": {}}]}}))
        .unwrap();
        let places: Vec<Wanted> = wanted(&pod).into_iter().map(|(place, _)| place).collect();
        assert_eq!(places, [("a".to_owned(), 1), ("a".to_owned(), 2)]);
    }
}
