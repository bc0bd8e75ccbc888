//! Tokens of service accounts, bound to their pods: asked for when a volume shows them, renewed before they end.
//!
//! They are nowhere but in memory and in the pods' volumes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use cluster::{Key, Source, SourceError, Token};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequestSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// What the API server gives if a pod says nothing (`expirationSeconds`).
const DEFAULT_SECONDS: i64 = 3600;
/// A token is renewed when a fifth of its time is left, and not older than this (upstream).
const AGE_MAX: SignedDuration = SignedDuration::from_hours(24);
/// After a failure.
const RETRY: SignedDuration = SignedDuration::from_secs(10);

/// A token that a pod's volumes show.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Wanted {
    /// Who it is for; none: the API server.
    pub(super) audience: Option<String>,
    /// How long it should hold.
    pub(super) seconds: i64,
    /// Who shows it.
    pub(super) shown_by: ShownBy,
}

/// Who shows a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum ShownBy {
    /// A projected volume, which is written anew when the token is.
    Volume,
    /// A CSI driver, which asks again when it wants to.
    Driver,
}

/// Tokens, as asked for.
pub(super) type Issued = BTreeMap<Wanted, String>;

/// The tokens of a node's pods.
pub(super) struct Tokens {
    source: Arc<dyn Source>,
    /// By pod and wish. Never held over an await.
    kept: Mutex<HashMap<(String, Wanted), Kept>>,
}

#[derive(Clone)]
struct Kept {
    token: String,
    ends: Timestamp,
    /// When it was asked for: before that time it is as if it were due, since the clock has been set back.
    since: Timestamp,
    renew_at: Timestamp,
    /// When somebody should see to it that it is renewed.
    look_at: Timestamp,
}

impl Kept {
    fn is_fresh(&self, now: Timestamp) -> bool {
        (self.since..self.renew_at).contains(&now)
    }
}

/// The tokens that the volumes of a pod show.
pub(super) fn wanted(pod: &Pod) -> BTreeSet<Wanted> {
    let volumes = pod::spec::of(pod).volumes.iter().flatten();
    let sources = volumes.filter_map(|volume| volume.projected.as_ref()).flat_map(|one| one.sources.iter().flatten());
    sources.filter_map(|source| source.service_account_token.as_ref()).map(Wanted::of).collect()
}

impl Wanted {
    pub(super) fn of(projection: &k8s_openapi::api::core::v1::ServiceAccountTokenProjection) -> Self {
        Self {
            audience: projection.audience.clone().filter(|audience| !audience.is_empty()),
            seconds: projection.expiration_seconds.unwrap_or(DEFAULT_SECONDS),
            shown_by: ShownBy::Volume,
        }
    }

    /// What a CSI driver asks for with each volume.
    pub(super) fn by_driver(request: &k8s_openapi::api::storage::v1::TokenRequest) -> Self {
        Self {
            audience: Some(request.audience.clone()).filter(|audience| !audience.is_empty()),
            seconds: request.expiration_seconds.unwrap_or(DEFAULT_SECONDS),
            shown_by: ShownBy::Driver,
        }
    }

    fn request(&self, pod: &Pod) -> TokenRequestSpec {
        TokenRequestSpec {
            audiences: Some(self.audience.iter().cloned().collect()),
            expiration_seconds: Some(self.seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
            ..TokenRequestSpec::default()
        }
    }
}

impl Tokens {
    pub(super) fn new(source: Arc<dyn Source>) -> Self {
        Self { source, kept: Mutex::default() }
    }

    /// The tokens of a pod: those that are known, and new ones for those that are missing or due. One that cannot be
    /// renewed is given as long as it holds.
    ///
    /// # Errors
    /// A token that there is none of.
    pub(super) async fn issue(&self, pod: &Pod) -> Result<Issued, SourceError> {
        let mut issued = Issued::new();
        for wanted in wanted(pod) {
            let (token, _) = self.with_end(pod, &wanted).await?;
            issued.insert(wanted, token);
        }
        Ok(issued)
    }

    /// A token of a pod, and when it ends; as [`Tokens::issue`] gives it.
    pub(super) async fn with_end(&self, pod: &Pod, wanted: &Wanted) -> Result<(String, Timestamp), SourceError> {
        let place = (pod.metadata.uid.clone().unwrap_or_default(), wanted.clone());
        let known = self.lock().get(&place).cloned();
        if let Some(known) = known.as_ref().filter(|known| known.is_fresh(Timestamp::now())) {
            return Ok((known.token.clone(), known.ends));
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let account = pod::spec::of(pod).service_account_name.as_deref().unwrap_or("default");
        let asked = self.source.request_token(&Key::new(namespace, account), wanted.request(pod)).await;
        let now = Timestamp::now();
        match (asked, known) {
            (Ok(issued), _) => {
                let kept = kept(issued, now);
                let given = (kept.token.clone(), kept.ends);
                self.lock().insert(place, kept);
                Ok(given)
            }
            (Err(error), Some(known)) if now < known.ends => {
                tracing::warn!(uid = place.0, %error, "a token cannot be renewed; the old one holds until {}", known.ends);
                let given = (known.token.clone(), known.ends);
                let renew_at = later(now, RETRY);
                self.lock().insert(place, Kept { since: now, renew_at, look_at: renew_at, ..known });
                Ok(given)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// When some token is due; none if there is none.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        let kept = self.lock();
        let shown = kept.iter().filter(|((_, wanted), _)| wanted.shown_by == ShownBy::Volume);
        let now = Timestamp::now();
        shown.map(|(_, kept)| if now < kept.since { now } else { kept.look_at }).min()
    }

    /// The pods whose tokens are due. They are due again later, should nobody renew them.
    pub(super) fn take_due(&self) -> Vec<String> {
        let now = Timestamp::now();
        let mut kept = self.lock();
        let due = kept.iter_mut().filter(|((_, wanted), _)| wanted.shown_by == ShownBy::Volume);
        let due = due.filter(|(_, kept)| kept.look_at <= now || now < kept.since);
        let mut pods: Vec<String> = due
            .map(|((uid, _), kept)| {
                kept.look_at = later(now, RETRY);
                if now < kept.since {
                    (kept.since, kept.renew_at) = (now, now);
                }
                uid.clone()
            })
            .collect();
        pods.sort();
        pods.dedup();
        pods
    }

    /// The pod is gone.
    pub(super) fn forget(&self, uid: &str) {
        self.lock().retain(|(pod, _), _| pod != uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, Wanted), Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kept(issued: Token, now: Timestamp) -> Kept {
    let Token { text: token, ends } = issued;
    let time = ends.duration_since(now);
    let age = (time - time / 5).min(AGE_MAX);
    let renew_at = later(now, age.max(RETRY));
    Kept { token, ends, since: now, renew_at, look_at: renew_at }
}

fn later(now: Timestamp, by: SignedDuration) -> Timestamp {
    now.checked_add(by).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_wish_once() {
        let token = |audience: &str, seconds: i64| json!({"serviceAccountToken": {"path": "t", "audience": audience, "expirationSeconds": seconds}});
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [], "volumes": [
            {"name": "a", "projected": {"sources": [token("", 3607), token("vault", 600)]}},
            {"name": "b", "projected": {"sources": [token("vault", 600), {"serviceAccountToken": {"path": "t"}}]}},
        ]}}))
        .unwrap();
        let wanted: Vec<_> = wanted(&pod).into_iter().map(|one| (one.audience, one.seconds)).collect();
        assert_eq!(wanted, [(None, 3600), (None, 3607), (Some("vault".to_owned()), 600)]);
    }

    #[test]
    fn a_token_is_renewed_when_a_fifth_of_its_time_is_left() {
        let now = Timestamp::UNIX_EPOCH;
        let of = |seconds: i64| {
            let ends = later(now, SignedDuration::from_secs(seconds));
            kept(Token { text: "t".into(), ends }, now).renew_at.as_second()
        };
        assert_eq!((of(3600), of(600)), (2880, 480));
        assert_eq!(of(10 * 24 * 3600), 24 * 3600, "never older than a day");
        assert_eq!(of(1), 10, "never at once");
    }

    #[test]
    fn a_clock_that_is_set_back_makes_tokens_due() {
        let now = later(Timestamp::UNIX_EPOCH, SignedDuration::from_hours(24));
        let kept = kept(Token { text: "t".into(), ends: later(now, SignedDuration::from_hours(1)) }, now);
        assert!(kept.is_fresh(now) && !kept.is_fresh(kept.renew_at));
        assert!(!kept.is_fresh(Timestamp::UNIX_EPOCH), "by its end it would hold for a day more");
    }
}
