//! The kubelet's `CredentialProviderConfig` (`--image-credential-provider-config`): a file, or a directory of files. All
//! faults are told at once.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::Error;

/// A program that gives out credentials for some registries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProviderConfig {
    pub(crate) name: String,
    pub(crate) match_images: Vec<String>,
    pub(crate) default_cache_duration: Duration,
    /// Of requests and answers.
    pub(crate) api_version: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// In whose name it is asked; none for the node's.
    pub(crate) token: Option<TokenAttributes>,
    pub(crate) program: PathBuf,
}

/// What a provider gets of a pod's service account (KEP-4412).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenAttributes {
    /// Whom the token is for.
    pub(crate) audience: String,
    /// Whether an answer holds for one token only, and not for all pods of the account.
    pub(crate) is_per_token: bool,
    /// Whether it is not asked for pods without a service account.
    pub(crate) is_required: bool,
    /// Annotations that the account must have; else it is not asked.
    pub(crate) required_keys: Vec<String>,
    /// Annotations that it gets, too.
    pub(crate) optional_keys: Vec<String>,
}

const CONFIG_GROUP: &str = "kubelet.config.k8s.io";
const PROVIDER_GROUP: &str = "credentialprovider.kubelet.k8s.io";
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];
const KIND: &str = "CredentialProviderConfig";
const EXTENSIONS: [&str; 3] = ["json", "yaml", "yml"];

/// Reads the providers, whose programs are in `bin_dir`.
pub(crate) fn read(path: &Path, bin_dir: Option<&Path>) -> Result<Vec<ProviderConfig>, Error> {
    let faulty = |reason: String| Error::Configuration { path: path.to_owned(), reason };
    let bin_dir = bin_dir.ok_or_else(|| faulty("it needs --image-credential-provider-bin-dir, too".into()))?;
    let mut reader = Reader { bin_dir, faults: Vec::new(), names: HashSet::new() };
    let mut providers = Vec::new();
    for file in files(path).map_err(faulty)? {
        let place = if file == path { String::new() } else { format!("{}: ", file.display()) };
        match fs::read_to_string(&file) {
            Ok(text) => providers.extend(reader.document(&place, &text)),
            Err(e) => reader.faults.push(format!("{place}{}", unreadable(&e))),
        }
    }
    match reader.faults.as_slice() {
        [] => Ok(providers),
        [one] => Err(faulty(one.clone())),
        several => Err(faulty(format!("{} faults:\n  {}", several.len(), several.join("\n  ")))),
    }
}

/// The file itself, or those in a directory by name.
fn files(path: &Path) -> Result<Vec<PathBuf>, String> {
    let is_dir = fs::metadata(path).map_err(|e| unreadable(&e))?.is_dir();
    if !is_dir {
        return Ok(vec![path.to_owned()]);
    }
    let entries = fs::read_dir(path).map_err(|e| unreadable(&e))?;
    let is_config = |file: &PathBuf| {
        file.is_file() && file.extension().is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known))
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_config).collect();
    files.sort();
    if files.is_empty() {
        return Err("it is a directory without .json, .yaml or .yml files".into());
    }
    Ok(files)
}

fn unreadable(error: &std::io::Error) -> String {
    format!("cannot be read: {error}; check that it is there and readable")
}

/// Goes through documents and collects what is wrong with them.
struct Reader<'a> {
    bin_dir: &'a Path,
    faults: Vec<String>,
    names: HashSet<String>,
}

impl Reader<'_> {
    fn document(&mut self, place: &str, text: &str) -> Vec<ProviderConfig> {
        let mut document = match serde_saphyr::from_str::<Value>(text) {
            Ok(Value::Object(document)) => document,
            Ok(_) => return self.none(format!("{place}it is not an object with apiVersion and kind")),
            Err(e) => return self.none(format!("{place}{e}")),
        };
        let versions = VERSIONS.map(|version| format!("{CONFIG_GROUP}/{version}"));
        self.one_of(place, "apiVersion", document.remove("apiVersion"), &versions);
        self.one_of(place, "kind", document.remove("kind"), &[KIND.to_owned()]);
        let providers = document.remove("providers");
        self.unknown(place, &document);
        let items = match providers {
            Some(Value::Array(items)) if !items.is_empty() => items,
            Some(Value::Array(_)) | None => return self.none(format!("{place}providers: at least one is needed")),
            Some(_) => return self.none(format!("{place}providers: must be a list")),
        };
        let numbered = items.into_iter().enumerate();
        numbered.filter_map(|(at, item)| self.provider(&format!("{place}providers[{at}]"), item)).collect()
    }

    fn provider(&mut self, place: &str, item: Value) -> Option<ProviderConfig> {
        let Value::Object(mut fields) = item else {
            self.faults.push(format!("{place}: must be an object"));
            return None;
        };
        let mut field = |name: &str| (format!("{place}.{name}"), fields.remove(name));
        let name = self.name(field("name"));
        let match_images = self.match_images(field("matchImages"));
        let default_cache_duration = self.duration(field("defaultCacheDuration"));
        let (version_place, version) = field("apiVersion");
        let versions = VERSIONS.map(|version| format!("{PROVIDER_GROUP}/{version}"));
        let api_version = self.one_of("", &version_place, version, &versions);
        let args = self.strings(field("args"));
        let env = self.environment(field("env"));
        let (token_place, token) = field("tokenAttributes");
        let token = match token {
            None | Some(Value::Null) => Some(None),
            Some(token) => self.token_attributes(&token_place, token, api_version.as_deref()).map(Some),
        };
        self.unknown(&format!("{place}."), &fields);
        let name = name?;
        let program = self.bin_dir.join(&name);
        self.check_program(place, &program);
        Some(ProviderConfig {
            name,
            match_images: match_images?,
            default_cache_duration: default_cache_duration?,
            api_version: api_version?,
            args: args?,
            env: env?,
            token: token?,
            program,
        })
    }

    fn token_attributes(&mut self, place: &str, value: Value, api_version: Option<&str>) -> Option<TokenAttributes> {
        let Value::Object(mut fields) = value else { return self.none(format!("{place}: must be an object")) };
        let mut field = |name: &str| (format!("{place}.{name}"), fields.remove(name));
        let audience = self.text(field("serviceAccountTokenAudience"));
        let cache_type = field("cacheType").1;
        let cache_type = self.one_of(place, ".cacheType", cache_type, &["ServiceAccount", "Token"].map(str::to_owned));
        let is_required = self.boolean(field("requireServiceAccount"));
        let (keys_place, keys) = field("requiredServiceAccountAnnotationKeys");
        let required_keys = self.annotation_keys((keys_place.clone(), keys));
        let optional_keys = self.annotation_keys(field("optionalServiceAccountAnnotationKeys"));
        self.unknown(&format!("{place}."), &fields);
        if api_version.is_some_and(|version| !version.ends_with("/v1")) {
            self.faults.push(format!("{place}: only providers of {PROVIDER_GROUP}/v1 get tokens"));
        }
        let (required_keys, optional_keys) = (required_keys?, optional_keys?);
        if is_required == Some(false) && !required_keys.is_empty() {
            self.faults
                .push(format!("{keys_place}: keys are required of an account; write requireServiceAccount: true"));
        }
        if let Some(twice) = required_keys.iter().find(|key| optional_keys.contains(key)) {
            self.faults.push(format!("{place}: the annotation {twice:?} cannot be both required and optional"));
        }
        Some(TokenAttributes {
            audience: audience?,
            is_per_token: cache_type? == "Token",
            is_required: is_required?,
            required_keys,
            optional_keys,
        })
    }

    fn text(&mut self, (place, value): (String, Option<Value>)) -> Option<String> {
        match value {
            Some(Value::String(text)) if !text.is_empty() => Some(text),
            _ => self.none(format!("{place}: a text is needed")),
        }
    }

    fn boolean(&mut self, (place, value): (String, Option<Value>)) -> Option<bool> {
        value.and_then(|value| value.as_bool()).or_else(|| self.none(format!("{place}: write true or false")))
    }

    /// Keys of annotations, as the API server takes them.
    fn annotation_keys(&mut self, (place, value): (String, Option<Value>)) -> Option<Vec<String>> {
        let keys = self.strings((place.clone(), value))?;
        let mut seen = BTreeSet::new();
        let mut fault = |key: &String| {
            let is_new = seen.insert(key.clone());
            match is_annotation_key(key) {
                false => Some(format!("{place}: {key:?} is no key of an annotation")),
                true => (!is_new).then(|| format!("{place}: {key:?} is there twice")),
            }
        };
        let bad: Vec<String> = keys.iter().filter_map(&mut fault).collect();
        let is_good = bad.is_empty();
        self.faults.extend(bad);
        is_good.then_some(keys)
    }

    /// Notes a fault; for places that then have nothing to give.
    fn none<T: Default>(&mut self, fault: String) -> T {
        self.faults.push(fault);
        T::default()
    }

    fn unknown(&mut self, place: &str, left: &Map<String, Value>) {
        self.faults.extend(left.keys().map(|field| format!("{place}{field}: unknown field")));
    }

    fn one_of(&mut self, place: &str, field: &str, value: Option<Value>, known: &[String]) -> Option<String> {
        match value {
            Some(Value::String(text)) if known.contains(&text) => Some(text),
            Some(other) => self.none(format!("{place}{field}: is {other}; expected {}", known.join(" or "))),
            None => self.none(format!("{place}{field}: is missing; expected {}", known.join(" or "))),
        }
    }

    fn name(&mut self, (place, value): (String, Option<Value>)) -> Option<String> {
        let Some(Value::String(name)) = value else { return self.none(format!("{place}: a name is needed")) };
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', ' ']) {
            return self.none(format!("{place}: {name:?} is not the name of a program in the directory of providers"));
        }
        if !self.names.insert(name.clone()) {
            return self.none(format!("{place}: {name:?} is there twice"));
        }
        Some(name)
    }

    fn match_images(&mut self, (place, value): (String, Option<Value>)) -> Option<Vec<String>> {
        let patterns = self.strings((place.clone(), value))?;
        if patterns.is_empty() {
            return self.none(format!("{place}: at least one pattern is needed"));
        }
        let bad: Vec<String> = patterns
            .iter()
            .filter_map(|pattern| Some(format!("{place}: {pattern:?} {}", pattern_fault(pattern)?)))
            .collect();
        let good = bad.is_empty();
        self.faults.extend(bad);
        good.then_some(patterns)
    }

    fn duration(&mut self, (place, value): (String, Option<Value>)) -> Option<Duration> {
        match value {
            Some(Value::String(text)) => match crate::duration::parse(&text) {
                Ok(duration) => Some(duration),
                Err(reason) => self.none(format!("{place}: {reason}")),
            },
            Some(other) => self.none(format!("{place}: {other} is not a duration; write 12h")),
            None => self.none(format!("{place}: is missing; write 12h, or 0s to ask for each pull")),
        }
    }

    fn strings(&mut self, (place, value): (String, Option<Value>)) -> Option<Vec<String>> {
        let items = match value {
            None | Some(Value::Null) => return Some(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(_) => return self.none(format!("{place}: must be a list of strings")),
        };
        let strings: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
        strings.or_else(|| self.none(format!("{place}: must be a list of strings")))
    }

    fn environment(&mut self, (place, value): (String, Option<Value>)) -> Option<Vec<(String, String)>> {
        let items = match value {
            None | Some(Value::Null) => return Some(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(_) => return self.none(format!("{place}: must be a list of name and value")),
        };
        let variable = |item: &Value| {
            let fields = item.as_object().filter(|fields| fields.len() == 2)?;
            let text = |name: &str| fields.get(name)?.as_str().map(str::to_owned);
            let name = text("name").filter(|name| !name.is_empty() && !name.contains(['=', '\0']))?;
            Some((name, text("value").filter(|value| !value.contains('\0'))?))
        };
        let pairs: Vec<Option<(String, String)>> = items.iter().map(variable).collect();
        let bad = pairs.iter().enumerate().filter(|(_, pair)| pair.is_none());
        self.faults.extend(bad.map(|(at, _)| format!("{place}[{at}]: must have a name and a value, both strings")));
        pairs.into_iter().collect()
    }

    fn check_program(&mut self, place: &str, program: &Path) {
        let fault = match fs::metadata(program) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return,
            Ok(_) => "is not an executable file".to_owned(),
            Err(e) => format!("cannot be used: {e}"),
        };
        self.faults.push(format!("{place}.name: {} {fault}", program.display()));
    }
}

/// A qualified name, in any case: a name of 63 characters at most, after a DNS subdomain if there is a slash.
fn is_annotation_key(key: &str) -> bool {
    let (domain, name) = key.split_once('/').map_or((None, key), |(domain, name)| (Some(domain), name));
    let is_word = |text: &str, inner: &[u8]| {
        let ends = [text.bytes().next(), text.bytes().next_back()];
        ends.iter().all(|end| end.is_some_and(|end| end.is_ascii_alphanumeric()))
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || inner.contains(&byte))
    };
    let is_domain = |text: &str| text.len() <= 253 && text.split('.').all(|label| is_word(label, b"-"));
    domain.is_none_or(is_domain) && name.len() <= 63 && is_word(name, b"-_.")
}

/// Why a pattern can match no image.
fn pattern_fault(pattern: &str) -> Option<&'static str> {
    let host = pattern.split('/').next().unwrap_or_default();
    if pattern.contains("://") {
        return Some("has a scheme; images have none");
    }
    if host.is_empty() {
        return Some("names no host");
    }
    if pattern.contains(char::is_whitespace) || pattern.contains(['?', '#', '@']) {
        return Some("has characters that no image name has");
    }
    let port = host.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map(|(_, port)| port);
    port.is_some_and(|port| port.parse::<u16>().is_err()).then_some("has a port that is no number below 65536")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene(tempfile::TempDir);

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let bin = dir.path().join("bin");
            fs::create_dir(&bin).unwrap();
            for (name, mode) in [("ecr-credential-provider", 0o755), ("other", 0o755), ("plain", 0o644)] {
                fs::write(bin.join(name), "").unwrap();
                fs::set_permissions(bin.join(name), fs::Permissions::from_mode(mode)).unwrap();
            }
            Self(dir)
        }

        fn read(&self, text: &str) -> Result<Vec<ProviderConfig>, String> {
            let path = self.0.path().join("config.yaml");
            fs::write(&path, text).unwrap();
            read(&path, Some(&self.0.path().join("bin"))).map_err(|e| e.to_string())
        }
    }

    const GOOD: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages: ["*.dkr.ecr.*.amazonaws.com", "registry.example:8080/path"]
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get-credentials, -v=3]
    env:
      - name: AWS_PROFILE
        value: node
"#;

    #[test]
    fn reads_a_file_and_a_directory() {
        let scene = Scene::new();
        let providers = scene.read(GOOD).unwrap();
        assert_eq!(
            providers,
            [ProviderConfig {
                name: "ecr-credential-provider".into(),
                match_images: vec!["*.dkr.ecr.*.amazonaws.com".into(), "registry.example:8080/path".into()],
                default_cache_duration: Duration::from_secs(43_200),
                api_version: "credentialprovider.kubelet.k8s.io/v1".into(),
                args: vec!["get-credentials".into(), "-v=3".into()],
                env: vec![("AWS_PROFILE".into(), "node".into())],
                token: None,
                program: scene.0.path().join("bin/ecr-credential-provider"),
            }]
        );
        let dir = scene.0.path().join("conf.d");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("b.yaml"), GOOD).unwrap();
        fs::write(dir.join("a.yml"), GOOD.replace("ecr-credential-provider", "other")).unwrap();
        fs::write(dir.join("readme.txt"), "not this").unwrap();
        let bin = scene.0.path().join("bin");
        let names: Vec<_> = read(&dir, Some(&bin)).unwrap().into_iter().map(|provider| provider.name).collect();
        assert_eq!(names, ["other", "ecr-credential-provider"]);
        fs::write(dir.join("c.json"), r#"{"kind": "Secret"}"#).unwrap();
        fs::write(dir.join("d.yaml"), GOOD).unwrap();
        let error = read(&dir, Some(&bin)).unwrap_err().to_string();
        for part in [
            "c.json: apiVersion: is missing",
            "c.json: kind: is \"Secret\"",
            "c.json: providers",
            "d.yaml: providers[0].name",
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
        assert!(read(&dir, None).unwrap_err().to_string().contains("--image-credential-provider-bin-dir"));
    }

    #[test]
    fn providers_may_act_for_service_accounts() {
        let scene = Scene::new();
        let with = |fields: &str| {
            let of = fields.replace('\n', "\n      ");
            scene.read(&format!("{GOOD}    tokenAttributes:\n      {of}\n"))
        };
        let own = "serviceAccountTokenAudience: registry\ncacheType: Token\nrequireServiceAccount: true";
        let keys =
            "requiredServiceAccountAnnotationKeys: [example.com/role]\noptionalServiceAccountAnnotationKeys: [Team]";
        let read = with(&format!("{own}\n{keys}")).unwrap().remove(0).token.unwrap();
        let expected = TokenAttributes {
            audience: "registry".into(),
            is_per_token: true,
            is_required: true,
            required_keys: vec!["example.com/role".into()],
            optional_keys: vec!["Team".into()],
        };
        assert_eq!(read, expected);
        for (written, fault) in [
            (own.replace("Token\n", "Image\n"), "cacheType: is \"Image\"; expected ServiceAccount or Token"),
            (
                own.replace("true", "false") + "\nrequiredServiceAccountAnnotationKeys: [a]",
                "requireServiceAccount: true",
            ),
            (format!("{own}\noptionalServiceAccountAnnotationKeys: [a, a]"), "\"a\" is there twice"),
            (format!("{own}\noptionalServiceAccountAnnotationKeys: [a/b/c]"), "is no key of an annotation"),
            (format!("{own}\n{}", keys.replace("Team", "example.com/role")), "both required and optional"),
            (format!("{own}\naudience: x"), "tokenAttributes.audience: unknown field"),
        ] {
            let error = with(&written).unwrap_err();
            assert!(error.contains(fault), "{fault}\nis not in\n{error}");
        }
        let old = format!("{GOOD}    tokenAttributes:\n      {}\n", own.replace('\n', "\n      "));
        let error = scene
            .read(&old.replace("credentialprovider.kubelet.k8s.io/v1", "credentialprovider.kubelet.k8s.io/v1beta1"));
        assert!(error.unwrap_err().contains("only providers of credentialprovider.kubelet.k8s.io/v1 get tokens"));
    }

    #[test]
    fn tells_all_faults_at_once() {
        let faults = Scene::new().read(
            r#"
apiVersion: kubelet.config.k8s.io/v2
kind: CredentialProviderConfig
provider: []
providers:
  - name: missing
    matchImages: ["https://x.io", "x.io:port", "/path"]
    defaultCacheDuration: 12
    apiVersion: v1
    args: get
    env: [{name: A}]
    cacheDuration: 1h
  - name: ../plain
    matchImages: []
  - name: plain
    matchImages: [x.io]
    defaultCacheDuration: -1s
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    tokenAttributes: {}
  - name: plain
  - nothing
"#,
        );
        let faults = faults.unwrap_err();
        for fault in [
            "apiVersion: is \"kubelet.config.k8s.io/v2\"; expected kubelet.config.k8s.io/v1",
            "provider: unknown field",
            "providers[0].matchImages: \"https://x.io\" has a scheme",
            "providers[0].matchImages: \"x.io:port\" has a port",
            "providers[0].matchImages: \"/path\" names no host",
            "providers[0].defaultCacheDuration: 12 is not a duration",
            "providers[0].apiVersion: is \"v1\"",
            "providers[0].args: must be a list",
            "providers[0].env[0]: must have a name and a value",
            "providers[0].cacheDuration: unknown field",
            "bin/missing cannot be used",
            "providers[1].name: \"../plain\" is not the name",
            "providers[1].matchImages: at least one",
            "providers[1].defaultCacheDuration: is missing",
            "providers[1].apiVersion: is missing",
            "providers[2].defaultCacheDuration: \"-1s\"",
            "providers[2].tokenAttributes.serviceAccountTokenAudience: a text is needed",
            "providers[2].tokenAttributes.cacheType: is missing; expected ServiceAccount or Token",
            "providers[2].tokenAttributes.requireServiceAccount: write true or false",
            "bin/plain is not an executable file",
            "providers[3].name: \"plain\" is there twice",
            "providers[4]: must be an object",
        ] {
            assert!(faults.contains(fault), "{fault}\nis not in\n{faults}");
        }
    }

    #[test]
    fn no_document_is_no_panic() {
        for text in ["", "[]", "a: [", "\t", "providers: {}\nkind: 1"] {
            assert!(Scene::new().read(text).is_err(), "{text:?}");
        }
    }
}
