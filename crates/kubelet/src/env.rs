//! The environment of a container: values from everywhere, references between them, and names of services.

mod file;
mod services;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVar, EnvVarSource, Pod};

use crate::facts::{self, FactError, NodeFacts};

/// The longest string that execve(2) takes, its end included (`MAX_ARG_STRLEN`).
const STRING_MAX: usize = 128 * 1024;

/// The most that execve(2) takes of arguments and environment together, by the limit of stacks that nobody has raised.
const PROGRAM_MAX: usize = 2 * 1024 * 1024;

/// Why a container's environment cannot be made. The texts are those that kubectl users know from upstream.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// The ConfigMap or Secret is not there (yet); it heals when it appears.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name, in the pod's namespace.
        name: String,
    },
    /// It has no such key.
    #[error("couldn't find key {key} in {kind} {object}")]
    NoKey {
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// Namespace and name.
        object: Key,
        /// The key.
        key: String,
    },
    /// A field or resource that the downward API does not have.
    #[error(transparent)]
    Fact(#[from] FactError),
    /// The volume of a `fileKeyRef` is not in the pod.
    #[error("cannot find the volume {0:?} referenced by FileKeyRef")]
    NoVolume(String),
    /// The file of a `fileKeyRef` cannot be read.
    #[error("cannot read the environment file {path}")]
    Read {
        /// Inside the volume.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file of a `fileKeyRef` is not written as it should be.
    #[error("environment file {path} line {line}: {problem}")]
    Syntax {
        /// Inside the volume.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// The file of a `fileKeyRef` does not have the key.
    #[error("environment variable key {key:?} not found in file {path}")]
    NoFileKey {
        /// Inside the volume.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A variable that no program could be given.
    #[error("environment variable {0:?} is longer than 128 KiB, which no program can be given")]
    LongVariable(String),
    /// A part of `command` or `args` that no program could be given.
    #[error("a part of the command or its arguments is longer than 128 KiB, which no program can be given")]
    LongWord,
    /// More than a program can be given, all in all.
    #[error("environment, command and arguments are larger than 2 MiB together, which no program can be given")]
    TooLarge,
}

/// What [`expand`] made is longer than [`STRING_MAX`].
#[derive(Debug)]
struct TooLong;

/// What an environment is made from.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its addresses.
    pub ips: &'a [String],
    /// Its node.
    pub node: &'a NodeFacts,
    /// ConfigMaps, Secrets, Services.
    pub store: &'a Store,
    /// Where its volumes are on the node, by name.
    pub volumes: &'a BTreeMap<String, PathBuf>,
}

impl Sources<'_> {
    fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    fn key(&self, name: &str) -> Key {
        Key::new(self.namespace(), name)
    }
}

/// Variables in the order in which they were first set; setting one again changes its value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    variables: Vec<(String, Vec<u8>)>,
    /// Where each of them is: a ConfigMap may have fifty thousand.
    places: HashMap<String, usize>,
    /// What they take of a program's memory.
    bytes: usize,
}

impl Environment {
    /// Sets a variable while all together are within bounds: pods are small, but what they name again and again is not.
    fn set(&mut self, name: &str, value: impl Into<Vec<u8>>) -> Result<(), EnvError> {
        let value = value.into();
        self.bytes += string_bytes(name, &value);
        match self.places.get(name) {
            Some(place) => {
                let before = std::mem::replace(&mut self.variables[*place].1, value);
                self.bytes -= string_bytes(name, &before);
            }
            None => {
                self.places.insert(name.to_owned(), self.variables.len());
                self.variables.push((name.to_owned(), value));
            }
        }
        in_bounds(self.bytes)
    }

    /// Itself, if a program can be given every variable; one that was set again counts as it is now.
    fn checked(self) -> Result<Self, EnvError> {
        match self.variables.iter().find(|(name, value)| string_bytes(name, value) > STRING_MAX) {
            Some((name, _)) => Err(EnvError::LongVariable(name.clone())),
            None => Ok(self),
        }
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.places.get(name).map(|place| self.variables[*place].1.as_slice())
    }

    /// All variables, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    /// A container's `command` and `args`, with `$(NAME)` replaced; `$$` is a dollar, and unknown names stay as they are.
    ///
    /// # Errors
    /// More than a program can be given, besides these variables.
    pub fn command_line(&self, container: &Container) -> Result<(Vec<String>, Vec<String>), EnvError> {
        let mut bytes = self.bytes;
        let mut expanded = |words: &Option<Vec<String>>| -> Result<Vec<String>, EnvError> {
            let words = words.iter().flatten().map(|word| {
                let word = self.expand(word)?;
                bytes += word.len() + 1;
                in_bounds(bytes).map(|()| word)
            });
            words.collect()
        };
        Ok((expanded(&container.command)?, expanded(&container.args)?))
    }

    fn expand(&self, word: &str) -> Result<String, EnvError> {
        let expanded = expand(word, |name| self.get(name)).map_err(|TooLong| EnvError::LongWord)?;
        Ok(String::from_utf8_lossy(&expanded).into_owned())
    }

    /// As with `command`, but an unknown name is an error (`subPathExpr`).
    ///
    /// # Errors
    /// What is wrong: the first name that is not set, or the length.
    pub fn expand_strictly(&self, text: &str) -> Result<String, String> {
        let mut unknown = None;
        let expanded = expand(text, |name| {
            let value = self.get(name);
            if value.is_none() {
                unknown.get_or_insert_with(|| name.to_owned());
            }
            value
        });
        match (unknown, expanded) {
            (Some(name), _) => Err(format!("the container has no variable {name}")),
            (None, Err(TooLong)) => Err("it becomes longer than 128 KiB".to_owned()),
            (None, Ok(expanded)) => Ok(String::from_utf8_lossy(&expanded).into_owned()),
        }
    }
}

/// The command of a probe. As upstream has it, `$(NAME)` is replaced by what the container's spec says itself: a variable whose
/// value comes from elsewhere is empty.
///
/// # Errors
/// [`EnvError::LongWord`]
pub(crate) fn expand_probe(command: &[String], container: &Container) -> Result<Vec<String>, EnvError> {
    let variables = container.env.iter().flatten();
    let values: HashMap<&str, &[u8]> =
        variables.map(|one| (one.name.as_str(), one.value.as_deref().unwrap_or_default().as_bytes())).collect();
    let expanded = command.iter().map(|word| {
        let expanded = expand(word, |name| values.get(name).copied()).map_err(|TooLong| EnvError::LongWord)?;
        Ok(String::from_utf8_lossy(&expanded).into_owned())
    });
    expanded.collect()
}

/// What a program is given of a variable: `NAME=value`, and an end.
fn string_bytes(name: &str, value: &[u8]) -> usize {
    name.len() + value.len() + 2
}

fn in_bounds(bytes: usize) -> Result<(), EnvError> {
    if bytes > PROGRAM_MAX { Err(EnvError::TooLarge) } else { Ok(()) }
}

/// Whether variables of a container come from files of its volumes.
pub fn reads_files(container: &Container) -> bool {
    let variables = container.env.iter().flatten();
    variables.filter_map(|variable| variable.value_from.as_ref()).any(|from| from.file_key_ref.is_some())
}

/// The environment of a container, service variables included.
///
/// # Errors
/// What is missing; [`EnvError`].
pub fn of_container(container: &Container, sources: &Sources<'_>) -> Result<Environment, EnvError> {
    let services = services::variables(sources);
    let mut environment = Environment::default();
    for source in container.env_from.iter().flatten() {
        add_all(&mut environment, source, sources)?;
    }
    for variable in container.env.iter().flatten() {
        if let Some(value) = value_of(variable, container, &environment, &services, sources)? {
            environment.set(&variable.name, value)?;
        }
    }
    for (name, value) in services {
        if environment.get(&name).is_none() {
            environment.set(&name, value)?;
        }
    }
    environment.checked()
}

/// All keys of a ConfigMap or Secret.
fn add_all(environment: &mut Environment, from: &EnvFromSource, sources: &Sources<'_>) -> Result<(), EnvError> {
    let prefix = from.prefix.as_deref().unwrap_or_default();
    if let Some(wanted) = &from.config_map_ref {
        let found = sources.store.config_maps().get(&sources.key(&wanted.name));
        let Some(found) = present(found, "configmap", &wanted.name, wanted.optional)? else { return Ok(()) };
        for (key, value) in found.data.iter().flatten() {
            environment.set(&format!("{prefix}{key}"), value.as_bytes())?;
        }
    }
    if let Some(wanted) = &from.secret_ref {
        let found = sources.store.secrets().get(&sources.key(&wanted.name));
        let Some(found) = present(found, "secret", &wanted.name, wanted.optional)? else { return Ok(()) };
        for (key, value) in found.data.iter().flatten() {
            environment.set(&format!("{prefix}{key}"), value.0.as_slice())?;
        }
    }
    Ok(())
}

/// What is missing is an error unless it is optional.
fn present<T>(found: Option<T>, kind: &'static str, name: &str, optional: Option<bool>) -> Result<Option<T>, EnvError> {
    match found {
        None if optional != Some(true) => Err(EnvError::NotFound { kind, name: name.to_owned() }),
        found => Ok(found),
    }
}

/// The value of one variable; `None` when its source is optional and missing.
fn value_of(
    variable: &EnvVar,
    container: &Container,
    known: &Environment,
    services: &BTreeMap<String, String>,
    sources: &Sources<'_>,
) -> Result<Option<Vec<u8>>, EnvError> {
    if let Some(text) = variable.value.as_deref().filter(|text| !text.is_empty()) {
        let look_up = |name: &str| known.get(name).or_else(|| services.get(name).map(String::as_bytes));
        let value = expand(text, look_up).map_err(|TooLong| EnvError::LongVariable(variable.name.clone()))?;
        return Ok(Some(value));
    }
    match &variable.value_from {
        Some(from) => value_from(from, container, sources),
        None => Ok(Some(Vec::new())),
    }
}

fn value_from(from: &EnvVarSource, container: &Container, sources: &Sources<'_>) -> Result<Option<Vec<u8>>, EnvError> {
    if let Some(wanted) = &from.field_ref {
        return Ok(Some(facts::field(&wanted.field_path, sources.pod, sources.ips, sources.node)?.into_bytes()));
    }
    if let Some(wanted) = &from.resource_field_ref {
        return Ok(Some(facts::resource(wanted, sources.pod, Some(container), sources.node)?.into_bytes()));
    }
    if let Some(wanted) = &from.config_map_key_ref {
        let found = sources.store.config_maps().get(&sources.key(&wanted.name));
        let Some(found) = present(found, "configmap", &wanted.name, wanted.optional)? else { return Ok(None) };
        let value = found.data.as_ref().and_then(|data| data.get(&wanted.key)).map(|value| value.as_bytes().to_vec());
        return key_or(value, "ConfigMap", sources.key(&wanted.name), &wanted.key, wanted.optional);
    }
    if let Some(wanted) = &from.secret_key_ref {
        let found = sources.store.secrets().get(&sources.key(&wanted.name));
        let Some(found) = present(found, "secret", &wanted.name, wanted.optional)? else { return Ok(None) };
        let value = found.data.as_ref().and_then(|data| data.get(&wanted.key)).map(|value| value.0.clone());
        return key_or(value, "Secret", sources.key(&wanted.name), &wanted.key, wanted.optional);
    }
    match &from.file_key_ref {
        Some(wanted) => file::of_key(wanted, sources),
        None => Ok(Some(Vec::new())),
    }
}

fn key_or(
    value: Option<Vec<u8>>,
    kind: &'static str,
    object: Key,
    key: &str,
    optional: Option<bool>,
) -> Result<Option<Vec<u8>>, EnvError> {
    match value {
        None if optional != Some(true) => Err(EnvError::NoKey { kind, object, key: key.to_owned() }),
        value => Ok(value),
    }
}

/// Replaces `$(NAME)` by `look_up`'s answer; unknown names stay as they are, `$$` becomes `$`. It ends where no program could
/// be given more: values that name the one before twice, one after the other, would fill the memory of any machine.
fn expand<'a>(text: &str, mut look_up: impl FnMut(&str) -> Option<&'a [u8]>) -> Result<Vec<u8>, TooLong> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        push(&mut out, &rest.as_bytes()[..at])?;
        let after = &rest[at + 1..];
        if let Some(more) = after.strip_prefix('$') {
            push(&mut out, b"$")?;
            rest = more;
        } else if let Some((name, more)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match look_up(name) {
                Some(value) => push(&mut out, value)?,
                None => push(&mut out, format!("$({name})").as_bytes())?,
            }
            rest = more;
        } else {
            push(&mut out, b"$")?;
            rest = after;
        }
    }
    push(&mut out, rest.as_bytes())?;
    Ok(out)
}

fn push(out: &mut Vec<u8>, part: &[u8]) -> Result<(), TooLong> {
    // One byte is for the end.
    if part.len() >= STRING_MAX - out.len() {
        return Err(TooLong);
    }
    out.extend_from_slice(part);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_probe_knows_what_the_spec_says_itself() {
        let source = json!({ "configMapKeyRef": { "name": "cm", "key": "a" } });
        let env = json!([{ "name": "PORT", "value": "50051" }, { "name": "A", "valueFrom": source }]);
        let container = serde_json::from_value(json!({ "name": "c", "env": env })).unwrap();
        let command = ["-addr=:$(PORT)", "[$(A)]", "$(NONE) $$(PORT)"].map(str::to_owned);
        let expanded = expand_probe(&command, &container).unwrap();
        assert_eq!(expanded, ["-addr=:50051", "[]", "$(NONE) $(PORT)"]);
    }

    fn environment(container: serde_json::Value) -> Result<Environment, EnvError> {
        let store = Store::new();
        store.config_maps().put(
            serde_json::from_value(
                json!({"metadata": {"name": "cm", "namespace": "shop"}, "data": {"a": "1", "b": "2"}}),
            )
            .unwrap(),
        );
        for (name, bytes) in [("large", 100_000), ("huge", 200_000)] {
            let data = json!({name: "x".repeat(bytes)});
            let object = json!({"metadata": {"name": name, "namespace": "shop"}, "data": data});
            store.config_maps().put(serde_json::from_value(object).unwrap());
        }
        store.secrets().put(
            serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "shop"}, "data": {"k": "/w=="}}))
                .unwrap(),
        );
        store.services().put(
            serde_json::from_value(json!({"metadata": {"name": "my-db", "namespace": "shop"},
                "spec": {"clusterIP": "10.96.0.5", "ports": [{"name": "sql-a", "port": 5432, "protocol": "TCP"}]}}))
            .unwrap(),
        );
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "shop", "labels": {"x": "y"}},
            "spec": {"containers": [container]}}))
            .unwrap();
        let node = NodeFacts::default();
        let sources =
            Sources { pod: &pod, ips: &["10.0.0.1".into()], node: &node, store: &store, volumes: &BTreeMap::new() };
        of_container(&pod.spec.as_ref().unwrap().containers[0], &sources)
    }

    fn text(environment: &Environment, name: &str) -> Option<String> {
        environment.get(name).map(|value| String::from_utf8_lossy(value).into_owned())
    }

    #[test]
    fn values_from_everywhere() {
        let made = environment(json!({"name": "c",
            "envFrom": [{"prefix": "CM_", "configMapRef": {"name": "cm"}}, {"configMapRef": {"name": "no", "optional": true}}],
            "env": [
                {"name": "PLAIN", "value": "$(CM_a)-$(NONE)-$$(CM_a)-$(MY_DB_SERVICE_PORT)"},
                {"name": "NEXT", "value": "[$(PLAIN)]"},
                {"name": "CM_b", "value": "own"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['x']"}}},
                {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                {"name": "O", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "z", "optional": true}}},
            ]}))
        .unwrap();
        assert_eq!(text(&made, "PLAIN").as_deref(), Some("1-$(NONE)-$(CM_a)-5432"));
        assert_eq!(text(&made, "NEXT").as_deref(), Some("[1-$(NONE)-$(CM_a)-5432]"));
        assert_eq!(text(&made, "CM_b").as_deref(), Some("own"));
        assert_eq!((text(&made, "IP").as_deref(), text(&made, "X").as_deref()), (Some("10.0.0.1"), Some("y")));
        assert_eq!(made.get("S"), Some([0xff].as_slice()));
        assert_eq!(made.get("O"), None);
        for (name, value) in [
            ("MY_DB_SERVICE_HOST", "10.96.0.5"),
            ("MY_DB_SERVICE_PORT_SQL_A", "5432"),
            ("MY_DB_PORT", "tcp://10.96.0.5:5432"),
            ("MY_DB_PORT_5432_TCP_ADDR", "10.96.0.5"),
        ] {
            assert_eq!(text(&made, name).as_deref(), Some(value));
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let failure = |env| environment(json!({"name": "c", "env": [env]})).unwrap_err().to_string();
        let from = |from: serde_json::Value| json!({"name": "A", "valueFrom": from});
        assert_eq!(
            failure(from(json!({"configMapKeyRef": {"name": "no", "key": "k"}}))),
            r#"configmap "no" not found"#
        );
        assert_eq!(failure(from(json!({"secretKeyRef": {"name": "no", "key": "k"}}))), r#"secret "no" not found"#);
        assert_eq!(
            failure(from(json!({"configMapKeyRef": {"name": "cm", "key": "k"}}))),
            "couldn't find key k in ConfigMap shop/cm"
        );
    }

    #[test]
    fn expansion() {
        let mut environment = Environment::default();
        environment.set("A", "1").unwrap();
        for (input, expect) in
            [("$(A)", "1"), ("$$(A)", "$(A)"), ("$$$(A)", "$1"), ("$(B)", "$(B)"), ("$(A", "$(A"), ("$A$", "$A$")]
        {
            assert_eq!(environment.expand(input).unwrap(), expect);
        }
        assert_eq!(environment.expand_strictly("$(A)/$(B)"), Err("the container has no variable B".into()));
    }

    fn doubling(times: usize) -> Vec<serde_json::Value> {
        let twice = (1..=times).map(|n| json!({"name": format!("A{n}"), "value": format!("$(A{0})$(A{0})", n - 1)}));
        std::iter::once(json!({"name": "A0", "value": "0123456789abcdef"})).chain(twice).collect()
    }

    #[test]
    fn values_that_double_each_other_end_where_no_program_takes_more() {
        let made = environment(json!({"name": "c", "env": doubling(12)})).unwrap();
        assert_eq!(made.get("A12").map(<[u8]>::len), Some(64 * 1024));
        assert!(matches!(environment(json!({"name": "c", "env": doubling(20)})),
            Err(EnvError::LongVariable(name)) if name == "A13"));
        let of = |command: &[&str], args: &[&str]| {
            let container = serde_json::from_value(json!({"name": "c", "command": command, "args": args})).unwrap();
            made.command_line(&container)
        };
        let (command, args) = of(&["$(A12)"], &["$(A12)", "$(A1)"]).unwrap();
        assert_eq!((command.len(), args.len(), args[1].len()), (1, 2, 32));
        assert!(matches!(of(&["$(A12)$(A12)"], &[]), Err(EnvError::LongWord)));
        assert!(matches!(of(&["sh"], &["$(A12)$(A12)"]), Err(EnvError::LongWord)));
        assert!(matches!(of(&["$(A12)"; 15], &["$(A12)"; 15]), Err(EnvError::TooLarge)));
        assert!(made.expand_strictly("$(A12)$(A12)").unwrap_err().contains("128 KiB"));
    }

    #[test]
    fn a_small_pod_has_no_large_environment_by_naming_an_object_often() {
        let often = |times: usize| -> Vec<_> {
            (0..times).map(|n| json!({"prefix": format!("P{n}_"), "configMapRef": {"name": "large"}})).collect()
        };
        assert!(environment(json!({"name": "c", "envFrom": often(20)})).is_ok());
        assert!(matches!(environment(json!({"name": "c", "envFrom": often(22)})), Err(EnvError::TooLarge)));
        let huge = json!([{"configMapRef": {"name": "huge"}}]);
        let failure = environment(json!({"name": "c", "envFrom": huge})).unwrap_err();
        assert!(matches!(failure, EnvError::LongVariable(name) if name == "huge"));
        let again = json!([{"name": "huge", "value": "small"}]);
        assert!(environment(json!({"name": "c", "envFrom": huge, "env": again})).is_ok());
    }
}
