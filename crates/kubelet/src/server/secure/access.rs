//! What a request asks for, and the gate that lets it through or not.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cluster::percent;
use http::{Method, Request};

use super::identity::{self, User};
use super::{Authority, Refusal, SecureConfig};

/// For how long an answer of the authority holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holds {
    /// Who a token belongs to (`authentication.webhook.cacheTTL`).
    pub token: Duration,
    /// That somebody may do something (`authorization.webhook.cacheAuthorizedTTL`).
    pub allowed: Duration,
    /// That he may not (`authorization.webhook.cacheUnauthorizedTTL`).
    pub denied: Duration,
}

impl Default for Holds {
    /// Upstream's.
    fn default() -> Self {
        Self { token: Duration::from_secs(120), allowed: Duration::from_secs(300), denied: Duration::from_secs(30) }
    }
}

/// Most answers that are kept of each kind.
const ANSWERS_MAX: usize = 1024;

/// A verb on a subresource of the node, as a SubjectAccessReview asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Access {
    /// `get`, `create`, `update`, `patch` or `delete`.
    pub verb: &'static str,
    /// Name of the node.
    pub node: String,
    /// Subresource of `nodes`: `proxy`, `stats`, `metrics`, `log`, `pods`, `healthz`, `configz` …
    pub subresource: &'static str,
}

/// What has to be allowed for a request, one of these: the fine-grained permission first, `proxy` where there is one
/// besides (KEP-2862).
///
/// Who runs a program in a pod creates something, also where a WebSocket has to be opened by GET: leave to look (`get` on
/// `nodes/proxy`, which programs that collect metrics often have) is no leave to do that. `path` is the request's as it
/// came; it is decoded as where it is served, or `/%65xec` would be something else here than there.
fn wanted(method: &Method, path: &str, node: &str) -> Vec<Access> {
    let path = percent::decode(path);
    let first = path.split('/').find(|part| !part.is_empty()).unwrap_or_default();
    let verb = match *method {
        _ if matches!(first, "exec" | "attach" | "portForward" | "run" | "cri") => "create",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    };
    let subresources: &[&'static str] = match first {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "checkpoint" => &["checkpoint"],
        "statusz" => &["statusz"],
        // Flags say what the configuration says.
        "flagz" => &["configz"],
        "pods" | "runningpods" => &["pods", "proxy"],
        "healthz" => &["healthz", "proxy"],
        "configz" => &["configz", "proxy"],
        _ => &["proxy"],
    };
    subresources.iter().map(|subresource| Access { verb, node: node.to_owned(), subresource }).collect()
}

/// Decides about requests, and remembers what the authority said.
pub(super) struct Gate {
    config: SecureConfig,
    authority: Arc<dyn Authority>,
    users: Answers<String, Option<User>>,
    allowed: Answers<(User, Access), bool>,
}

impl Gate {
    pub(super) fn new(config: SecureConfig, authority: Arc<dyn Authority>) -> Self {
        Self { config, authority, users: Answers::default(), allowed: Answers::default() }
    }

    /// Lets a request through, or says why not. `known` is the user of the connection's certificate.
    pub(super) async fn pass<B>(&self, known: Option<User>, request: &Request<B>) -> Result<(), Refusal> {
        let user = self.user(known, request).await?;
        if self.config.always_allow {
            return Ok(());
        }
        let wanted = wanted(request.method(), request.uri().path(), &self.config.node);
        for access in &wanted {
            if self.may(&user, access).await? {
                return Ok(());
            }
        }
        let Some(Access { verb, node, subresource }) = wanted.last() else { return Err(Refusal::Unauthorized) };
        Err(Refusal::Forbidden(format!(
            "Forbidden (user={}, verb={verb}, resource=nodes, subresource={subresource}, name={node})",
            user.name
        )))
    }

    async fn user<B>(&self, known: Option<User>, request: &Request<B>) -> Result<User, Refusal> {
        if let Some(user) = known {
            return Ok(user);
        }
        match identity::bearer(request.headers()) {
            Some(token) if self.config.tokens => self.user_of(token).await?.ok_or(Refusal::Unauthorized),
            Some(_) => Err(Refusal::Unauthorized),
            None if self.config.anonymous => Ok(User::anonymous()),
            None => Err(Refusal::Unauthorized),
        }
    }

    async fn user_of(&self, token: &str) -> Result<Option<User>, Refusal> {
        if let Some(user) = self.users.get(&token.to_owned()) {
            return Ok(user);
        }
        let user = self.authority.user_of(token).await.map_err(|error| Refusal::Unknown(error.to_string()))?;
        self.users.put(token.to_owned(), user.clone(), self.config.holds.token);
        Ok(user)
    }

    async fn may(&self, user: &User, access: &Access) -> Result<bool, Refusal> {
        let key = (user.clone(), access.clone());
        if let Some(allowed) = self.allowed.get(&key) {
            return Ok(allowed);
        }
        let allowed = self.authority.allows(user, access).await.map_err(|error| Refusal::Unknown(error.to_string()))?;
        self.allowed.put(key, allowed, if allowed { self.config.holds.allowed } else { self.config.holds.denied });
        Ok(allowed)
    }
}

/// Answers that hold for a time, a bounded number of them.
struct Answers<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K, V> Default for Answers<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq, V: Clone> Answers<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(key).filter(|(_, until)| *until > Instant::now()).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, holds: Duration) {
        let now = Instant::now();
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= ANSWERS_MAX {
            answers.retain(|_, (_, until)| *until > now);
        }
        if answers.len() >= ANSWERS_MAX {
            answers.clear(); // Asking again is all that it costs.
        }
        answers.insert(key, (value, now + holds));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_by_path() {
        let of = |method, path| -> Vec<(&str, &str)> {
            wanted(&method, path, "n1").into_iter().map(|access| (access.verb, access.subresource)).collect()
        };
        assert_eq!(of(Method::GET, "/stats/summary"), [("get", "stats")]);
        assert_eq!(of(Method::GET, "/metrics/cadvisor"), [("get", "metrics")]);
        assert_eq!(of(Method::GET, "/pods"), [("get", "pods"), ("get", "proxy")]);
        assert_eq!(of(Method::POST, "/exec/a/b/c"), [("create", "proxy")]);
        assert_eq!(of(Method::GET, "/containerLogs/a/b/c"), [("get", "proxy")]);
        assert_eq!(of(Method::GET, "/healthz"), [("get", "healthz"), ("get", "proxy")]);
        assert_eq!(of(Method::GET, "/logs/"), [("get", "log")]);
        assert_eq!(of(Method::GET, "/statusz"), [("get", "statusz")]);
        assert_eq!(of(Method::GET, "/flagz"), [("get", "configz")]);
        assert_eq!(of(Method::GET, "/configz"), [("get", "configz"), ("get", "proxy")]);
    }

    /// KEP-2862 has the hole, which has no number: GET opens WebSockets, and what they carry.
    #[test]
    fn leave_to_look_is_no_leave_to_run() {
        for path in [
            "/exec/a/b/c?command=sh",
            "//exec//a/b/c",
            "/%65xec/a/b/c?command=sh",
            "/%2Fexec/a/b/c",
            "/%2f/%65%78%65%63%2Fa/b/c",
            "/exec%2Fa/b/c",
            "/attach/a/b/c",
            "/%61ttach/a/b/c",
            "/portForward/a/b",
            "/port%46orward/a/b",
            "/run/a/b/c",
        ] {
            for method in [Method::GET, Method::POST, Method::HEAD] {
                let uri: http::Uri = path.parse().unwrap();
                let access = wanted(&method, uri.path(), "n1");
                assert!(access.iter().all(|access| access.verb == "create"), "{method} {path}: {access:?}");
            }
        }
    }

    #[test]
    fn answers_are_bounded_and_end() {
        let answers = Answers::default();
        for number in 0..3 * ANSWERS_MAX {
            answers.put(number, true, Holds::default().allowed);
        }
        assert!(answers.0.lock().unwrap().len() <= ANSWERS_MAX);
        answers.put(1, true, Duration::ZERO);
        assert_eq!(answers.get(&1), None);
    }
}
