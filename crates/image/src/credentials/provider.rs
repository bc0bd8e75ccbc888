//! Credential providers: the kubelet's exec plugins (KEP-2133), such as Amazon's `ecr-credential-provider`.
//!
//! ```text
//! image ─► matchImages ─► cache: image, registry, global ─► program: request on stdin, answer on stdout ─► keyring
//! ```
//!
//! One with `tokenAttributes` is asked in the name of the pod's service account, and its answers are for that alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::config::{ProviderConfig, TokenAttributes};
use super::keyring::{Keyring, matches};
use super::program::Program;
use super::{Holder, ServiceAccount};
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
struct Cache(HashMap<(Scope, Asked), (Keyring, Instant)>);

/// In whose name an answer was given; empty for the node's.
type Asked = String;

/// As whom a provider is asked.
#[derive(Debug, PartialEq)]
enum Asking {
    /// Not at all: it wants a service account, or annotations of it, that the pod does not have.
    Not,
    Node,
    Account(InName),
}

/// What a provider is told of a service account.
#[derive(Clone, PartialEq)]
struct InName {
    token: String,
    annotations: BTreeMap<String, String>,
    /// For whom its answer holds.
    asked: Asked,
    /// Who asks the same at the same time.
    flight: String,
}

impl std::fmt::Debug for InName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InName").field("annotations", &self.annotations).finish_non_exhaustive()
    }
}

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
    #[serde(skip_serializing_if = "Option::is_none")]
    service_account_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_account_annotations: Option<&'a BTreeMap<String, String>>,
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

    /// The audience of the tokens that it wants of pods with this image.
    pub(crate) fn audience(&self, image: &Reference) -> Option<&str> {
        self.config.token.as_ref().filter(|_| self.is_for(image)).map(|token| token.audience.as_str())
    }

    fn is_for(&self, image: &Reference) -> bool {
        let repository = image.repository();
        self.config.match_images.iter().any(|place| matches(place, &repository))
    }

    /// What the provider has for `image`, and for whom that is; nothing if it is not meant for it.
    pub(crate) async fn keyring(
        &self,
        image: &Reference,
        account: Option<&ServiceAccount>,
    ) -> Result<(Keyring, Holder), Error> {
        let nothing = (Keyring::default(), Holder::Node);
        if !self.is_for(image) {
            return Ok(nothing);
        }
        let failed = |reason: String| Error::Credentials { provider: self.config.name.clone(), reason };
        let name = match asking(self.config.token.as_ref(), account).map_err(failed)? {
            Asking::Not => return Ok(nothing),
            Asking::Node => None,
            Asking::Account(name) => Some(name),
        };
        let holder = if name.is_some() { Holder::ServiceAccount } else { Holder::Node };
        let asked = name.as_ref().map(|name| name.asked.clone()).unwrap_or_default();
        if let Some(known) = self.cached(image, &asked) {
            return Ok((known, holder));
        }
        let flight = format!("{} {}", image.repository(), name.as_ref().map_or("", |name| name.flight.as_str()));
        let job = {
            let (program, config, cache) = (self.program.clone(), self.config.clone(), Arc::clone(&self.cache));
            let image = image.clone();
            move |_| async move { ask(&program, &config, &cache, &image, name.as_ref()).await }
        };
        Ok((self.flights.join(&flight, job, |_| {}).await.1?, holder))
    }

    fn cached(&self, image: &Reference, asked: &Asked) -> Option<Keyring> {
        self.cache.lock().expect("no panic while it is held").get(image, asked, Instant::now())
    }
}

/// As whom a provider is asked for a pod's image.
fn asking(wanted: Option<&TokenAttributes>, account: Option<&ServiceAccount>) -> Result<Asking, String> {
    let (wanted, account) = match (wanted, account) {
        (None, _) => return Ok(Asking::Node),
        (Some(wanted), None) if wanted.is_required => return Ok(Asking::Not),
        (Some(_), None) => return Ok(Asking::Node),
        (Some(wanted), Some(account)) => (wanted, account),
    };
    let ServiceAccount { namespace, name, uid, annotations, tokens } = account;
    if !wanted.required_keys.iter().all(|key| annotations.contains_key(key)) {
        return Ok(Asking::Not);
    }
    let keys = wanted.required_keys.iter().chain(&wanted.optional_keys);
    let given = |key: &String| annotations.get(key).map(|value| (key.clone(), value.clone()));
    let annotations: BTreeMap<String, String> = keys.filter_map(given).collect();
    let token = tokens.get(&wanted.audience);
    let token = token.ok_or_else(|| format!("there is no token of service account {namespace}/{name} for it"))?.clone();
    // The token's sum stands for it in what is kept.
    let flight = format!("{:?}", (Sha256::digest(&token), &annotations));
    let for_token = if wanted.is_per_token { flight.as_str() } else { "" };
    let asked = format!("{:?}", (namespace, name, uid, &annotations, for_token));
    Ok(Asking::Account(InName { token, annotations, asked, flight }))
}

/// Runs the program and remembers its answer as long as it says.
async fn ask(
    program: &Program,
    config: &ProviderConfig,
    cache: &Mutex<Cache>,
    image: &Reference,
    name: Option<&InName>,
) -> Result<Keyring, Error> {
    let failed = |reason: String| Error::Credentials { provider: config.name.clone(), reason };
    let repository = image.repository();
    let request = Request {
        kind: "CredentialProviderRequest",
        api_version: &config.api_version,
        image: &repository,
        service_account_token: name.map(|name| name.token.as_str()),
        service_account_annotations: name.map(|name| &name.annotations).filter(|annotations| !annotations.is_empty()),
    };
    let request = serde_json::to_vec(&request).map_err(|e| failed(e.to_string()))?;
    let answer = program.ask(&request).await.map_err(|e| failed(e.to_string()))?;
    let answer = read(&answer, config).map_err(failed)?;
    let is_per_token = config.token.as_ref().is_some_and(|token| token.is_per_token);
    if name.is_some_and(|name| !is_per_token && answer.gives_back(&name.token)) {
        let reason = "it gives the token back as the password, which needs cacheType Token: others would get it";
        return Err(failed(reason.to_owned()));
    }
    let scope = (answer.scope(image), name.map(|name| name.asked.clone()).unwrap_or_default());
    if !answer.duration.is_zero() {
        let now = Instant::now();
        cache.lock().expect("no panic while it is held").put(scope, answer.keyring.clone(), answer.duration, now);
    }
    Ok(answer.keyring)
}

/// An answer that makes sense.
struct Answer {
    keyring: Keyring,
    passwords: Vec<String>,
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

    /// Whether a token is one of its passwords.
    fn gives_back(&self, token: &str) -> bool {
        self.passwords.iter().any(|password| password == token)
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
    let (mut keyring, mut passwords) = (Keyring::default(), Vec::new());
    for (place, login) in answer.auth.unwrap_or_default() {
        passwords.push(login.password.clone());
        keyring.add(&place, Auth::Basic { username: login.username, password: login.password });
    }
    Ok(Answer { keyring, passwords, key_type, duration })
}

impl Cache {
    /// The narrowest answer that still holds.
    fn get(&self, image: &Reference, asked: &Asked, now: Instant) -> Option<Keyring> {
        let scopes = [Scope::Image(image.repository()), Scope::Registry(image.host().to_owned()), Scope::Global];
        let live = |scope: Scope| self.0.get(&(scope, asked.clone())).filter(|(_, end)| now < *end);
        scopes.into_iter().find_map(live).map(|(keyring, _)| keyring.clone())
    }

    fn put(&mut self, scope: (Scope, Asked), keyring: Keyring, duration: Duration, now: Instant) {
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
            token: None,
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
        let (keyring, holder) = provider.keyring(&image, None).await.unwrap();
        assert_eq!(holder, Holder::Node);
        keyring.lookup(&image)
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
        let (scope, node) = (Scope::Registry("a.r.io".into()), Asked::new());
        cache.put((scope, node.clone()), keyring.clone(), Duration::from_secs(10), start);
        assert_eq!(cache.get(&image, &node, start + Duration::from_secs(9)), Some(keyring.clone()));
        assert_eq!(cache.get(&image, &"somebody".to_owned(), start), None, "it is the node's");
        assert_eq!(cache.get(&image, &node, start + Duration::from_secs(10)), None);
        cache.put((Scope::Global, node), keyring, Duration::MAX, start + Duration::from_secs(10));
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
            let error = provider.keyring(&"a.r.io/x".parse().unwrap(), None).await.unwrap_err().to_string();
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

    fn wanted() -> TokenAttributes {
        TokenAttributes {
            audience: "registry".into(),
            is_per_token: false,
            is_required: true,
            required_keys: vec!["role".into()],
            optional_keys: vec!["team".into()],
        }
    }

    /// The account of a pod; `token` is what it has for the registry.
    fn account(name: &str, token: &str) -> ServiceAccount {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        ServiceAccount {
            namespace: "shop".into(),
            name: name.into(),
            uid: format!("uid-{name}"),
            annotations: [pair("role", "puller"), pair("other", "x")].into(),
            tokens: [pair("registry", token)].into(),
        }
    }

    /// One that acts for service accounts, and answers with what its request has said.
    fn for_accounts(dir: &Path, wanted: TokenAttributes) -> Provider {
        let answer = answer("Registry", "").replace("$1", "secret-of-$token");
        let script = format!(
            "cat > {0}/request\ntoken=$(sed -n 's/.*serviceAccountToken\":\"\\([^\"]*\\).*/\\1/p' {0}/request)\n{answer}",
            dir.display()
        );
        let mut provider = provider(dir, &script, V1);
        provider.config.token = Some(wanted);
        provider
    }

    fn request(dir: &Path) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("request")).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn asks_in_the_name_of_a_service_account() {
        let dir = tempfile::tempdir().unwrap();
        let provider = for_accounts(dir.path(), wanted());
        let image: Reference = "a.r.io/x".parse().unwrap();
        assert_eq!(
            (provider.audience(&image), provider.audience(&"q.io/x".parse().unwrap())),
            (Some("registry"), None)
        );
        let (keyring, holder) = provider.keyring(&image, Some(&account("builder", "t1"))).await.unwrap();
        let login = |password: &str| [Auth::Basic { username: "from-env".into(), password: password.into() }];
        assert_eq!(
            (keyring.lookup(&image).as_slice(), holder),
            (login("secret-of-t1").as_slice(), Holder::ServiceAccount)
        );
        let expected = serde_json::json!({
            "kind": "CredentialProviderRequest", "apiVersion": V1, "image": "a.r.io/x",
            "serviceAccountToken": "t1", "serviceAccountAnnotations": { "role": "puller" },
        });
        assert_eq!(request(dir.path()), expected);
        // The answer holds for the account, whatever its token is, and for nobody else.
        let (keyring, _) = provider.keyring(&image, Some(&account("builder", "t2"))).await.unwrap();
        assert_eq!((keyring.lookup(&image).as_slice(), calls(dir.path())), (login("secret-of-t1").as_slice(), 1));
        let (keyring, _) = provider.keyring(&image, Some(&account("other", "t3"))).await.unwrap();
        assert_eq!((keyring.lookup(&image).as_slice(), calls(dir.path())), (login("secret-of-t3").as_slice(), 2));
    }

    #[tokio::test]
    async fn an_answer_may_hold_for_one_token() {
        let dir = tempfile::tempdir().unwrap();
        let provider = for_accounts(dir.path(), TokenAttributes { is_per_token: true, ..wanted() });
        for (token, expected) in [("t1", 1), ("t1", 1), ("t2", 2)] {
            provider.keyring(&"a.r.io/x".parse().unwrap(), Some(&account("builder", token))).await.unwrap();
            assert_eq!(calls(dir.path()), expected, "{token}");
        }
    }

    #[tokio::test]
    async fn who_is_not_asked_in_a_name() {
        let image: Reference = "a.r.io/x".parse().unwrap();
        let check = async |wanted: TokenAttributes, account: Option<ServiceAccount>, expected: usize| {
            let dir = tempfile::tempdir().unwrap();
            let asked = for_accounts(dir.path(), wanted).keyring(&image, account.as_ref()).await;
            assert_eq!(calls(dir.path()), expected);
            asked.map(|(_, holder)| holder)
        };
        check(wanted(), None, 0).await.unwrap();
        let optional = TokenAttributes { is_required: false, required_keys: Vec::new(), ..wanted() };
        assert_eq!(check(optional, None, 1).await.unwrap(), Holder::Node);
        let plain = ServiceAccount { annotations: BTreeMap::new(), ..account("plain", "t") };
        check(wanted(), Some(plain), 0).await.unwrap();
        let without_token = ServiceAccount { tokens: BTreeMap::new(), ..account("builder", "t") };
        let error = check(wanted(), Some(without_token), 0).await.unwrap_err().to_string();
        assert!(error.contains("no token of service account shop/builder"), "{error}");
    }

    #[tokio::test]
    async fn a_token_that_is_given_back_is_not_kept_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut provider = provider(dir.path(), &answer("Image", "").replace("$1", "mirrored"), V1);
        provider.config.token = Some(wanted());
        let image: Reference = "a.r.io/x".parse().unwrap();
        let error = provider.keyring(&image, Some(&account("builder", "mirrored"))).await.unwrap_err().to_string();
        assert!(error.contains("cacheType Token") && !error.contains("mirrored"), "{error}");
        provider.config.token = Some(TokenAttributes { is_per_token: true, ..wanted() });
        provider.keyring(&image, Some(&account("builder", "mirrored"))).await.unwrap();
    }
}
