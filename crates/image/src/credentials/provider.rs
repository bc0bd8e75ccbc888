//! Credential providers: the kubelet's exec plugins (KEP-2133), such as Amazon's `ecr-credential-provider`.
//!
//! ```text
//! image ─► matchImages ─► cache: image, registry, global ─► program: request on stdin, answer on stdout ─► keyring
//! ```

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::config::ProviderConfig;
use super::keyring::{Keyring, matches};
use super::program::Program;
use crate::flights::Flights;
use crate::{Auth, Error, Reference};

/// Upstream's; a provider may try a slow service more than once.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A configured provider with what it has said so far.
#[derive(Debug)]
pub(crate) struct Provider {
    config: ProviderConfig,
    program: Program,
    cache: Arc<Mutex<Cache>>,
    /// Several pulls of one image ask once.
    flights: Flights<String, Keyring>,
}

/// Answers by what they hold for, with their ends.
#[derive(Debug, Default)]
struct Cache(HashMap<Scope, (Keyring, Instant)>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Scope {
    Image(String),
    Registry(String),
    Global,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'a str,
    api_version: &'a str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    cache_key_type: String,
    cache_duration: Option<String>,
    auth: Option<BTreeMap<String, Login>>,
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

impl Provider {
    pub(crate) fn new(config: ProviderConfig) -> Self {
        Self::with_time_limit(config, TIME_LIMIT)
    }

    pub(crate) fn with_time_limit(config: ProviderConfig, time_limit: Duration) -> Self {
        let program = Program {
            path: config.program.clone(),
            arguments: config.args.clone(),
            environment: config.env.clone(),
            time_limit,
        };
        Self { config, program, cache: Arc::default(), flights: Flights::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// What the provider has for `image`; nothing if it is not meant for it.
    pub(crate) async fn keyring(&self, image: &Reference) -> Result<Keyring, Error> {
        let repository = image.repository();
        if !self.config.match_images.iter().any(|place| matches(place, &repository)) {
            return Ok(Keyring::default());
        }
        if let Some(known) = self.cached(image) {
            return Ok(known);
        }
        let job = {
            let (program, config, cache) = (self.program.clone(), self.config.clone(), Arc::clone(&self.cache));
            let image = image.clone();
            move |_| async move { ask(&program, &config, &cache, &image).await }
        };
        self.flights.join(&repository, job, |_| {}).await.1
    }

    fn cached(&self, image: &Reference) -> Option<Keyring> {
        self.cache.lock().expect("no panic while it is held").get(image, Instant::now())
    }
}

/// Runs the program and remembers its answer as long as it says.
async fn ask(
    program: &Program,
    config: &ProviderConfig,
    cache: &Mutex<Cache>,
    image: &Reference,
) -> Result<Keyring, Error> {
    let failed = |reason: String| Error::Credentials { provider: config.name.clone(), reason };
    let repository = image.repository();
    let request = Request { kind: "CredentialProviderRequest", api_version: &config.api_version, image: &repository };
    let request = serde_json::to_vec(&request).map_err(|e| failed(e.to_string()))?;
    let answer = program.ask(&request).await.map_err(|e| failed(e.to_string()))?;
    let answer = read(&answer, config).map_err(failed)?;
    let scope = answer.scope(image);
    if !answer.duration.is_zero() {
        let now = Instant::now();
        cache.lock().expect("no panic while it is held").put(scope, answer.keyring.clone(), answer.duration, now);
    }
    Ok(answer.keyring)
}

/// An answer that makes sense.
struct Answer {
    keyring: Keyring,
    key_type: KeyType,
    duration: Duration,
}

enum KeyType {
    Image,
    Registry,
    Global,
}

impl Answer {
    fn scope(&self, image: &Reference) -> Scope {
        match self.key_type {
            KeyType::Image => Scope::Image(image.repository()),
            KeyType::Registry => Scope::Registry(image.host().to_owned()),
            KeyType::Global => Scope::Global,
        }
    }
}

/// Checks an answer. What is wrong with it is told without quoting it: it holds secrets.
fn read(answer: &[u8], config: &ProviderConfig) -> Result<Answer, String> {
    let answer: Response = serde_json::from_slice(answer)
        .map_err(|e| format!("its answer is malformed at line {} column {}", e.line(), e.column()))?;
    if answer.kind != "CredentialProviderResponse" {
        return Err(format!("it answers with kind {:?} instead of CredentialProviderResponse", answer.kind));
    }
    if answer.api_version != config.api_version {
        return Err(format!("it answers as {:?}, asked as {:?}", answer.api_version, config.api_version));
    }
    let key_type = match answer.cache_key_type.as_str() {
        "Image" => KeyType::Image,
        "Registry" => KeyType::Registry,
        "Global" => KeyType::Global,
        other => return Err(format!("it answers with cacheKeyType {other:?}; expected Image, Registry or Global")),
    };
    let duration = match &answer.cache_duration {
        None => config.default_cache_duration,
        Some(text) => crate::duration::parse(text).map_err(|reason| format!("its cacheDuration {reason}"))?,
    };
    let mut keyring = Keyring::default();
    for (place, login) in answer.auth.unwrap_or_default() {
        keyring.add(&place, Auth::Basic { username: login.username, password: login.password });
    }
    Ok(Answer { keyring, key_type, duration })
}

impl Cache {
    /// The narrowest answer that still holds.
    fn get(&self, image: &Reference, now: Instant) -> Option<Keyring> {
        let scopes = [Scope::Image(image.repository()), Scope::Registry(image.host().to_owned()), Scope::Global];
        let live = |scope: &Scope| self.0.get(scope).filter(|(_, end)| now < *end);
        scopes.iter().find_map(live).map(|(keyring, _)| keyring.clone())
    }

    fn put(&mut self, scope: Scope, keyring: Keyring, duration: Duration, now: Instant) {
        // What is over goes now: nobody may ask for it again.
        self.0.retain(|_, (_, end)| now < *end);
        // An end beyond what the clock can show is as good as none.
        let end = now.checked_add(duration).unwrap_or(now + Duration::from_secs(365 * 86_400));
        self.0.insert(scope, (keyring, end));
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripts;
    use super::*;
    use std::path::Path;

    const V1: &str = "credentialprovider.kubelet.k8s.io/v1";

    /// A provider that is a shell script; it notes each call in `calls`.
    fn provider(dir: &Path, script: &str, api_version: &str) -> Provider {
        let program = dir.join("provider");
        scripts::install(&program, &format!("echo call >> {}/calls\n{script}", dir.display()));
        let config = ProviderConfig {
            name: "provider".into(),
            match_images: vec!["*.r.io".into()],
            default_cache_duration: Duration::from_secs(3600),
            api_version: api_version.into(),
            args: vec!["get".into()],
            env: vec![("PROVIDER_USER".into(), "from-env".into())],
            program,
        };
        Provider::with_time_limit(config, Duration::from_secs(20))
    }

    fn answer(key_type: &str, duration: &str) -> String {
        format!(
            r#"cat <<END
{{"kind": "CredentialProviderResponse", "apiVersion": "{V1}", "cacheKeyType": "{key_type}", {duration}
  "auth": {{"*.r.io": {{"username": "$PROVIDER_USER", "password": "$1"}}}}}}
END"#
        )
    }

    fn calls(dir: &Path) -> usize {
        std::fs::read_to_string(dir.join("calls")).map_or(0, |text| text.lines().count())
    }

    async fn ask(provider: &Provider, image: &str) -> Vec<Auth> {
        let image: Reference = image.parse().unwrap();
        provider.keyring(&image).await.unwrap().lookup(&image)
    }

    fn login() -> [Auth; 1] {
        [Auth::Basic { username: "from-env".into(), password: "get".into() }]
    }

    #[tokio::test]
    async fn asks_in_the_words_of_each_version() {
        for version in ["v1", "v1beta1", "v1alpha1"] {
            let dir = tempfile::tempdir().unwrap();
            let version = format!("credentialprovider.kubelet.k8s.io/{version}");
            let script =
                format!("cat > {}/request\n{}", dir.path().display(), answer("Image", "").replace(V1, &version));
            let provider = provider(dir.path(), &script, &version);
            assert_eq!(ask(&provider, "a.r.io/team/app:1").await, login());
            let request: serde_json::Value =
                serde_json::from_slice(&std::fs::read(dir.path().join("request")).unwrap()).unwrap();
            let expected = serde_json::json!({
                "kind": "CredentialProviderRequest", "apiVersion": version, "image": "a.r.io/team/app",
            });
            assert_eq!(request, expected);
        }
    }

    #[tokio::test]
    async fn is_not_asked_for_what_it_is_not_for() {
        let dir = tempfile::tempdir().unwrap();
        let provider = provider(dir.path(), &answer("Image", ""), V1);
        assert_eq!(ask(&provider, "q.io/app").await, []);
        assert_eq!(calls(dir.path()), 0);
    }

    #[tokio::test]
    async fn remembers_as_it_is_told() {
        for (key_type, duration, same_image, same_registry, elsewhere) in [
            ("Image", "", 1, 2, 3),
            ("Registry", "", 1, 1, 2),
            ("Global", "", 1, 1, 1),
            ("Global", r#""cacheDuration": "10m","#, 1, 1, 1),
            ("Global", r#""cacheDuration": "0s","#, 2, 3, 4),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let provider = provider(dir.path(), &answer(key_type, duration), V1);
            ask(&provider, "a.r.io/x:1").await;
            for (image, expected) in [("a.r.io/x:2", same_image), ("a.r.io/y", same_registry), ("b.r.io/x", elsewhere)]
            {
                assert_eq!(ask(&provider, image).await, login());
                assert_eq!(calls(dir.path()), expected, "{key_type} {duration} {image}");
            }
        }
    }

    #[test]
    fn forgets_in_time() {
        let (mut cache, start) = (Cache::default(), Instant::now());
        let mut keyring = Keyring::default();
        keyring.add("a.r.io", Auth::RegistryToken("t".into()));
        let image: Reference = "a.r.io/x".parse().unwrap();
        cache.put(Scope::Registry("a.r.io".into()), keyring.clone(), Duration::from_secs(10), start);
        assert_eq!(cache.get(&image, start + Duration::from_secs(9)), Some(keyring.clone()));
        assert_eq!(cache.get(&image, start + Duration::from_secs(10)), None);
        cache.put(Scope::Global, keyring, Duration::MAX, start + Duration::from_secs(10));
        assert_eq!(cache.0.len(), 1, "what is over is gone");
    }

    #[tokio::test]
    async fn many_who_ask_at_once_are_answered_by_one_call() {
        let dir = tempfile::tempdir().unwrap();
        // It answers when all have asked: not before somebody has opened the other end of the pipe.
        let gate = dir.path().join("gate");
        let here = sys::tree::Dir::open(dir.path()).unwrap();
        here.create_node(b"gate", sys::tree::Node::Fifo, 0o600).unwrap();
        let script = format!("read _ < {}\n{}", gate.display(), answer("Image", r#""cacheDuration": "0s","#));
        let provider = provider(dir.path(), &script, V1);
        let asked = (0..8).map(|_| ask(&provider, "a.r.io/x"));
        let open = tokio::task::spawn_blocking(move || std::fs::write(gate, "go\n").unwrap());
        let answers = futures_util::future::join_all(asked).await;
        open.await.unwrap();
        assert!(answers.iter().all(|answer| *answer == login()));
        assert_eq!(calls(dir.path()), 1);
    }

    #[tokio::test]
    async fn a_bad_answer_is_told_without_its_secrets() {
        for (script, words) in [
            ("echo not json secret", "malformed"),
            ("echo '{}'", "kind"),
            (&answer("Image", "").replace(V1, "credentialprovider.kubelet.k8s.io/v1beta1"), "v1beta1"),
            (&answer("Secret", ""), "cacheKeyType"),
            (&answer("Image", r#""cacheDuration": "soon","#), "cacheDuration"),
            ("echo no role >&2; exit 1", "no role"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let provider = provider(dir.path(), script, V1);
            let error = provider.keyring(&"a.r.io/x".parse().unwrap()).await.unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn nothing_for_an_image_is_an_answer_too() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            r#"echo '{{"kind": "CredentialProviderResponse", "apiVersion": "{V1}", "cacheKeyType": "Image", "auth": null}}'"#
        );
        let provider = provider(dir.path(), &script, V1);
        assert_eq!(ask(&provider, "a.r.io/x").await, []);
    }
}
