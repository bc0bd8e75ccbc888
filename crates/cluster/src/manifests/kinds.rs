//! The kinds a manifest may hold, and the way from a document to an object.

use std::path::Path;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::decode::{FieldError, decode, nearest};
use super::default::SetDefaults;
use super::problem::{ObjectName, Problem, Severity};
use super::validate::{Errors, Validate};
use super::yaml::{Node, Value};
use crate::table::Object;
use crate::{Key, Store};

/// A kind that manifests may declare.
pub(crate) trait Kind: Object + Serialize + DeserializeOwned + SetDefaults + Validate {
    const NAMESPACED: bool;
    fn into_any(self) -> AnyObject;
}

macro_rules! kinds {
    ($($kind:ident $table:ident $namespaced:literal,)*) => {
        /// An object of any kind that manifests may declare.
        #[derive(Clone, Debug, PartialEq)]
        pub(crate) enum AnyObject { $($kind(Box<$kind>),)* }

        $(impl Kind for $kind {
            const NAMESPACED: bool = $namespaced;
            fn into_any(self) -> AnyObject { AnyObject::$kind(Box::new(self)) }
        })*

        const KINDS: &[&str] = &[$(stringify!($kind),)*];

        impl AnyObject {
            pub(crate) fn kind(&self) -> &'static str {
                match self { $(AnyObject::$kind(_) => stringify!($kind),)* }
            }

            #[cfg(test)]
            pub(crate) fn to_json(&self) -> serde_json::Value {
                match self { $(AnyObject::$kind(object) => serde_json::to_value(object).unwrap(),)* }
            }

            pub(crate) fn metadata(&self) -> &ObjectMeta {
                match self { $(AnyObject::$kind(object) => &object.metadata,)* }
            }

            pub(crate) fn metadata_mut(&mut self) -> &mut ObjectMeta {
                match self { $(AnyObject::$kind(object) => &mut object.metadata,)* }
            }

            /// Puts the object into its table.
            pub(crate) fn put(self, store: &Store) {
                match self { $(AnyObject::$kind(object) => drop(store.$table().put(*object)),)* }
            }

            /// What the store has under the same kind and name.
            pub(crate) fn known(&self, store: &Store) -> Option<AnyObject> {
                match self { $(AnyObject::$kind(object) => {
                    let known = store.$table().get(&Key::of(&object.metadata))?;
                    Some(AnyObject::$kind(Box::new($kind::clone(&known))))
                })* }
            }

            /// What must not change from the object of the store to this one.
            pub(crate) fn change_faults(&self, store: &Store) -> Vec<FieldError> {
                let mut errors = Errors::default();
                match self { $(AnyObject::$kind(object) => {
                    if let Some(old) = store.$table().get(&self.key()) {
                        object.validate_change(&old, &mut errors);
                    }
                })* }
                errors.into_vec()
            }
        }

        /// Takes an object out of its table.
        pub(crate) fn remove(kind: &str, key: &Key, store: &Store) {
            match kind {
                $(stringify!($kind) => drop(store.$table().remove(key)),)*
                _ => {}
            }
        }

        /// The name of a kind's table.
        pub(crate) fn table(kind: &str) -> Option<&'static str> {
            match kind {
                $(stringify!($kind) => Some(stringify!($table)),)*
                _ => None,
            }
        }

        /// Keys and metadata of everything that has a controller as its owner, with its kind.
        pub(crate) fn dependents(store: &Store) -> Vec<(&'static str, Key, ObjectMeta)> {
            let mut found = Vec::new();
            $(for object in store.$table().list() {
                if object.metadata.owner_references.as_ref().is_some_and(|owners| !owners.is_empty()) {
                    found.push((stringify!($kind), Key::of(&object.metadata), object.metadata.clone()));
                }
            })*
            found
        }

        /// The uids of all objects.
        pub(crate) fn uids(store: &Store) -> std::collections::HashSet<String> {
            let mut uids = std::collections::HashSet::new();
            $(uids.extend(store.$table().list().iter().filter_map(|object| object.metadata.uid.clone()));)*
            uids
        }

        /// The API version of a kind, and how to read it.
        fn reader(kind: &str) -> Option<(&'static str, fn(&Node, &str) -> Result<AnyObject, Vec<FieldError>>)> {
            match kind {
                $(stringify!($kind) => Some((<$kind as k8s_openapi::Resource>::API_VERSION, read::<$kind>)),)*
                _ => None,
            }
        }
    };
}

kinds! {
    Namespace namespaces false,
    ServiceAccount service_accounts true,
    ConfigMap config_maps true,
    Secret secrets true,
    PersistentVolumeClaim persistent_volume_claims true,
    Service services true,
    EndpointSlice endpoint_slices true,
    Pod pods true,
    ReplicaSet replica_sets true,
    Deployment deployments true,
    DaemonSet daemon_sets true,
    Job jobs true,
}

impl AnyObject {
    pub(crate) fn key(&self) -> Key {
        Key::of(self.metadata())
    }

    pub(crate) fn object_name(&self) -> ObjectName {
        let key = self.key();
        ObjectName { kind: self.kind().into(), namespace: key.namespace().into(), name: key.name().into() }
    }
}

/// An object and the place it was declared at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Declared {
    pub(crate) object: AnyObject,
    pub(crate) line: usize,
    /// The tree it was read from, for the lines of its fields.
    pub(crate) document: Node,
}

/// Decode, default, validate.
fn read<K: Kind>(document: &Node, namespace: &str) -> Result<AnyObject, Vec<FieldError>> {
    let mut object: K = decode(document)?;
    let metadata = object.metadata_mut();
    clear_system_fields(metadata);
    match K::NAMESPACED {
        true => _ = metadata.namespace.get_or_insert_with(|| namespace.into()),
        false => metadata.namespace = None,
    }
    object.set_defaults();
    let mut errors = Errors::default();
    object.validate(&mut errors);
    match errors.into_vec() {
        errors if errors.is_empty() => Ok(object.into_any()),
        errors => Err(errors),
    }
}

/// What `kubectl get -o yaml` prints beside the author's fields: the system's own, which a manifest does not decide.
fn clear_system_fields(metadata: &mut ObjectMeta) {
    metadata.uid = None;
    metadata.resource_version = None;
    metadata.generation = None;
    metadata.creation_timestamp = None;
    metadata.deletion_timestamp = None;
    metadata.deletion_grace_period_seconds = None;
    metadata.managed_fields = None;
    metadata.self_link = None;
    metadata.owner_references = None;
}

/// Reads the documents of one file: objects in order, and what is wrong with the rest.
pub(crate) fn read_file(file: &Path, text: &str, namespace: &str) -> (Vec<Declared>, Vec<Problem>) {
    let (mut objects, mut problems) = (Vec::new(), Vec::new());
    for document in super::yaml::parse(text) {
        match document {
            Ok(document) => read_document(file, document, namespace, &mut objects, &mut problems),
            Err(error) => problems.push(Problem {
                severity: Severity::Error,
                file: file.into(),
                line: error.line,
                object: None,
                field: None,
                message: error.message,
                remedy: None,
            }),
        }
    }
    (objects, problems)
}

fn read_document(
    file: &Path,
    document: Node,
    namespace: &str,
    objects: &mut Vec<Declared>,
    problems: &mut Vec<Problem>,
) {
    let kind = document.get("kind").and_then(Node::as_str).unwrap_or("");
    if kind == "List" || is_list_of_known(kind) {
        let items = document.get("items").map(|items| items.value.clone());
        if let Some(Value::Sequence(items)) = items {
            items.into_iter().for_each(|item| read_item(file, item, kind, namespace, objects, problems));
        }
        return;
    }
    match reader(kind) {
        None => problems.push(unknown_kind(file, &document, kind)),
        Some((api_version, read)) => {
            let version = wrong_version(file, &document, kind, api_version);
            let mut document = document;
            if version.is_some() {
                document.set_text("apiVersion", api_version);
            }
            problems.extend(version);
            match read(&document, namespace) {
                Ok(object) => objects.push(Declared { object, line: document.line, document }),
                Err(errors) => problems.extend(errors.into_iter().map(|error| to_problem(file, &document, error))),
            }
        }
    }
}

/// The items of a `PodList` need not repeat their kind.
fn read_item(
    file: &Path,
    mut item: Node,
    list: &str,
    namespace: &str,
    objects: &mut Vec<Declared>,
    problems: &mut Vec<Problem>,
) {
    let kind = list.trim_end_matches("List");
    if !kind.is_empty() && item.get("kind").is_none() {
        item.set_text("kind", kind);
        item.set_text("apiVersion", reader(kind).map_or("", |(version, _)| version));
    }
    read_document(file, item, namespace, objects, problems);
}

fn is_list_of_known(kind: &str) -> bool {
    kind.strip_suffix("List").is_some_and(|item| KINDS.contains(&item))
}

fn document_name(document: &Node) -> Option<ObjectName> {
    let text = |node: Option<&Node>| node.and_then(Node::as_str).unwrap_or("").to_owned();
    let kind = text(document.get("kind"));
    let metadata = document.get("metadata");
    let name = text(metadata.and_then(|metadata| metadata.get("name")));
    let namespace = text(metadata.and_then(|metadata| metadata.get("namespace")));
    (!kind.is_empty()).then_some(ObjectName { kind, namespace, name })
}

pub(crate) fn to_problem(file: &Path, document: &Node, error: FieldError) -> Problem {
    let field = error.path.to_string();
    Problem {
        severity: Severity::Error,
        file: file.into(),
        line: error.line.unwrap_or_else(|| error.path.line(document)),
        object: document_name(document),
        field: (!field.is_empty()).then_some(field),
        message: error.message,
        remedy: error.remedy,
    }
}

fn unknown_kind(file: &Path, document: &Node, kind: &str) -> Problem {
    let (message, remedy) = match (kind, nearest(kind, KINDS)) {
        ("", _) => ("Object 'Kind' is missing".into(), Some("write apiVersion and kind".into())),
        (_, Some(name)) => (format!("no such kind {kind:?}"), Some(format!("did you mean {name:?}?"))),
        (_, None) => {
            let remedy = format!("this node alone runs {}; anything else needs a cluster", KINDS.join(", "));
            (format!("kind {kind:?} is not run from manifests"), Some(remedy))
        }
    };
    let line = document.entry("kind").map_or(document.line, |entry| entry.line);
    let object = document_name(document);
    Problem { severity: Severity::Error, file: file.into(), line, object, field: Some("kind".into()), message, remedy }
}

/// Podman and old manifests spell other versions (`extensions/v1beta1`); the kind says enough.
fn wrong_version(file: &Path, document: &Node, kind: &str, expect: &str) -> Option<Problem> {
    let found = document.get("apiVersion").and_then(Node::as_str).unwrap_or("");
    (found != expect).then(|| Problem {
        severity: Severity::Warning,
        file: file.into(),
        line: document.entry("apiVersion").map_or(document.line, |entry| entry.line),
        object: document_name(document),
        field: Some("apiVersion".into()),
        message: match found {
            "" => format!("is missing; read as {expect}"),
            found => format!("{kind} is not of {found:?}; read as {expect}"),
        },
        remedy: Some(format!("write `apiVersion: {expect}`")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<String>, Vec<String>) {
        let (objects, problems) = read_file(Path::new("a.yaml"), text, "default");
        let objects = objects.iter().map(|declared| declared.object.object_name().to_string()).collect();
        (objects, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_bad_document_does_not_stop_the_good_ones() {
        let (objects, problems) = read(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\n\
             spec:\n  containers:\n  - name: c\n    imge: x\n---\nbroken: [\n---\nkind: Deploymnt\n---\n\
             apiVersion: v1\nkind: ConfigMap\nmetadata: {name: two}\n",
        );
        assert_eq!(objects, ["ConfigMap default/one", "ConfigMap default/two"]);
        assert_eq!(problems[0], "a.yaml:11: Pod p: unknown field \"spec.containers[0].imge\"; did you mean \"image\"?");
        assert!(problems[1].starts_with("a.yaml:14: ") || problems[1].starts_with("a.yaml:13: "), "{problems:?}");
        assert_eq!(problems[2], "a.yaml:15: Deploymnt: kind: no such kind \"Deploymnt\"; did you mean \"Deployment\"?");
        assert_eq!(problems.len(), 3);
    }

    #[test]
    fn lists_are_flattened() {
        let (objects, problems) = read(
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\n---\n\
             apiVersion: v1\nkind: SecretList\nitems:\n- {metadata: {name: b, namespace: x}}\n",
        );
        assert_eq!(
            (objects, problems),
            (vec!["ConfigMap default/a".into(), "Secret x/b".into()], Vec::<String>::new())
        );
    }

    #[test]
    fn validation_knows_the_line() {
        let (_, problems) = read(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: s\nspec:\n  ports:\n  - port: 80\n  - port: 81\n    name: b\n",
        );
        assert_eq!(problems, ["a.yaml:7: Service s: spec.ports[0].name: Required value"]);
    }

    #[test]
    fn an_old_version_is_read_with_a_warning() {
        let (objects, problems) = read("apiVersion: extensions/v1\nkind: ConfigMap\nmetadata: {name: a}\n");
        assert_eq!(objects.len(), 1);
        assert_eq!(
            problems,
            [
                "a.yaml:1: ConfigMap a: apiVersion: ConfigMap is not of \"extensions/v1\"; read as v1; write `apiVersion: v1`"
            ]
        );
    }

    #[test]
    fn json_is_read_too() {
        let (objects, problems) =
            read("{\"apiVersion\": \"v1\", \"kind\": \"ConfigMap\", \"metadata\": {\"name\": \"j\"}}");
        assert_eq!((objects.len(), problems.len()), (1, 0));
    }
}
