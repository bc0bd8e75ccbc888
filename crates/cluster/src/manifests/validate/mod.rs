//! The rules by which the API server refuses an object, with its wording, so that its documentation applies.

pub(crate) mod names;
mod pod;
mod service;
mod workload;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Secret, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::decode::{FieldError, nearest};
use super::path::FieldPath;
use crate::quantity::Nano;

/// What validates an object.
pub(crate) trait Validate {
    /// Adds what is wrong with the object; it has its defaults already.
    fn validate(&self, errors: &mut Errors);

    /// Adds what must not change from `old` to this.
    fn validate_change(&self, _old: &Self, _errors: &mut Errors)
    where
        Self: Sized,
    {
    }
}

/// The faults found so far.
#[derive(Debug, Default)]
pub(crate) struct Errors(Vec<FieldError>);

impl Errors {
    pub(crate) fn into_vec(self) -> Vec<FieldError> {
        self.0
    }

    fn push(&mut self, path: &FieldPath, message: String, remedy: Option<String>) {
        self.0.push(FieldError { path: path.clone(), line: None, message, remedy });
    }

    fn required(&mut self, path: &FieldPath, detail: &str) {
        self.push(path, join("Required value", detail), None);
    }

    fn invalid(&mut self, path: &FieldPath, value: impl std::fmt::Debug, detail: &str) {
        self.push(path, format!("Invalid value: {value:?}: {detail}"), None);
    }

    fn forbidden(&mut self, path: &FieldPath, detail: &str) {
        self.push(path, join("Forbidden", detail), None);
    }

    fn duplicate(&mut self, path: &FieldPath, value: impl std::fmt::Debug) {
        self.push(path, format!("Duplicate value: {value:?}"), None);
    }

    /// A reference to a name that is not among `known`.
    fn not_found(&mut self, path: &FieldPath, value: &str, known: &[&str]) {
        let remedy = nearest(value, known).map(|name| format!("did you mean {name:?}?"));
        self.push(path, format!("Not found: {value:?}"), remedy);
    }

    /// A text that must be one of `supported`.
    fn one_of(&mut self, path: &FieldPath, value: Option<&str>, supported: &[&str]) {
        let Some(value) = value.filter(|value| !supported.contains(value)) else { return };
        let list: Vec<_> = supported.iter().map(|text| format!("{text:?}")).collect();
        let remedy = nearest(value, supported).map(|name| format!("did you mean {name:?}?"));
        self.push(path, format!("Unsupported value: {value:?}: supported values: {}", list.join(", ")), remedy);
    }

    /// Reports each of `faults` as an invalid value.
    fn each_fault(&mut self, path: &FieldPath, value: &str, faults: Option<String>) {
        if let Some(fault) = faults {
            self.invalid(path, value, &fault);
        }
    }

    fn not_negative(&mut self, path: &FieldPath, value: Option<i64>) {
        if let Some(value) = value.filter(|value| *value < 0) {
            self.invalid(path, value, "must be greater than or equal to 0");
        }
    }

    fn in_range(&mut self, path: &FieldPath, value: i64, low: i64, high: i64) {
        if !(low..=high).contains(&value) {
            self.invalid(path, value, &format!("must be between {low} and {high}, inclusive"));
        }
    }

    fn quantity(&mut self, path: &FieldPath, text: &str) -> Option<Nano> {
        let parsed = Nano::parse(text);
        match parsed {
            None => self.invalid(path, text, QUANTITY),
            Some(value) if value < Nano(0) => self.invalid(path, text, "must be greater than or equal to 0"),
            Some(_) => {}
        }
        parsed
    }
}

const QUANTITY: &str = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

fn join(what: &str, detail: &str) -> String {
    match detail {
        "" => what.into(),
        _ => format!("{what}: {detail}"),
    }
}

/// Which rule the name of an object follows.
#[derive(Clone, Copy)]
enum NameRule {
    Subdomain,
    Label,
    ServiceLabel,
}

fn check_metadata(metadata: &ObjectMeta, rule: NameRule, errors: &mut Errors) {
    let path = FieldPath::root().field("metadata");
    let name = metadata.name.as_deref().unwrap_or("");
    if name.is_empty() {
        errors.required(&path.field("name"), "name or generateName is required");
    } else {
        let fault = match rule {
            NameRule::Subdomain => names::dns_subdomain(name),
            NameRule::Label => names::dns_label(name),
            NameRule::ServiceLabel => names::dns_1035_label(name),
        };
        errors.each_fault(&path.field("name"), name, fault);
    }
    if let Some(namespace) = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        errors.each_fault(&path.field("namespace"), namespace, names::dns_label(namespace));
    }
    check_labels_and_annotations(metadata, &path, errors);
}

fn check_labels_and_annotations(metadata: &ObjectMeta, path: &FieldPath, errors: &mut Errors) {
    check_labels(metadata.labels.iter().flatten(), &path.field("labels"), errors);
    for key in metadata.annotations.iter().flatten().map(|(key, _)| key) {
        errors.each_fault(&path.field("annotations"), key, names::qualified_name(&key.to_lowercase()));
    }
}

fn check_labels<'a>(labels: impl Iterator<Item = (&'a String, &'a String)>, path: &FieldPath, errors: &mut Errors) {
    for (key, value) in labels {
        errors.each_fault(path, key, names::qualified_name(key));
        errors.each_fault(&path.key(key), value, names::label_value(value));
    }
}

fn check_data_keys<'a>(keys: impl Iterator<Item = &'a String>, path: &FieldPath, errors: &mut Errors) {
    for key in keys {
        errors.each_fault(&path.key(key), key, names::config_key(key));
    }
}

/// The API server's limit for the data of a ConfigMap or Secret.
const DATA_BYTES_MAX: usize = 1024 * 1024;

impl Validate for ConfigMap {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        let root = FieldPath::root();
        check_data_keys(self.data.iter().flatten().map(|(key, _)| key), &root.field("data"), errors);
        check_data_keys(self.binary_data.iter().flatten().map(|(key, _)| key), &root.field("binaryData"), errors);
        for key in self.binary_data.iter().flatten().map(|(key, _)| key) {
            if self.data.as_ref().is_some_and(|data| data.contains_key(key)) {
                errors.invalid(&root.field("data").key(key), key, "duplicate of key present in binaryData");
            }
        }
        let text: usize = self.data.iter().flatten().map(|(_, value)| value.len()).sum();
        let bytes: usize = self.binary_data.iter().flatten().map(|(_, value)| value.0.len()).sum();
        if text + bytes > DATA_BYTES_MAX {
            errors.push(&root, format!("Too long: must have at most {DATA_BYTES_MAX} bytes"), None);
        }
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        if old.immutable == Some(true) && (self.data != old.data || self.binary_data != old.binary_data) {
            errors.forbidden(&FieldPath::root().field("data"), "field is immutable when `immutable` is set");
        }
    }
}

impl Validate for Secret {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        let path = FieldPath::root().field("data");
        check_data_keys(self.data.iter().flatten().map(|(key, _)| key), &path, errors);
        let bytes: usize = self.data.iter().flatten().map(|(_, value)| value.0.len()).sum();
        if bytes > DATA_BYTES_MAX {
            errors.push(&path, format!("Too long: must have at most {DATA_BYTES_MAX} bytes"), None);
        }
        for key in required_secret_keys(self.type_.as_deref().unwrap_or("")) {
            if !self.data.as_ref().is_some_and(|data| data.contains_key(*key)) {
                errors.required(&path.key(key), "");
            }
        }
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        if old.immutable == Some(true) && self.data != old.data {
            errors.forbidden(&FieldPath::root().field("data"), "field is immutable when `immutable` is set");
        }
        if self.type_ != old.type_ {
            errors.invalid(&FieldPath::root().field("type"), self.type_.as_deref().unwrap_or(""), "field is immutable");
        }
    }
}

fn required_secret_keys(kind: &str) -> &'static [&'static str] {
    match kind {
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        _ => &[],
    }
}

impl Validate for ServiceAccount {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
    }
}

impl Validate for Namespace {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Label, errors);
    }
}

impl Validate for PersistentVolumeClaim {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        let path = FieldPath::root().field("spec");
        let Some(spec) = &self.spec else { return };
        const MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
        for (index, mode) in spec.access_modes.iter().flatten().enumerate() {
            errors.one_of(&path.field("accessModes").index(index), Some(mode), &MODES);
        }
        let requests = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        for (name, quantity) in requests.into_iter().flatten() {
            errors.quantity(&path.field("resources.requests").key(name), &quantity.0);
        }
        errors.one_of(&path.field("volumeMode"), spec.volume_mode.as_deref(), &["Block", "Filesystem"]);
        if spec.volume_mode.as_deref() == Some("Block") {
            errors.forbidden(&path.field("volumeMode"), "a claim is a directory on this node; use Filesystem");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::manifests::default::SetDefaults;

    /// The faults of an object given as JSON, after defaulting, as `field: message`.
    pub(crate) fn faults<T>(value: serde_json::Value) -> Vec<String>
    where
        T: serde::de::DeserializeOwned + SetDefaults + Validate,
    {
        let mut object: T = serde_json::from_value(value).unwrap();
        object.set_defaults();
        let mut errors = Errors::default();
        object.validate(&mut errors);
        errors.into_vec().iter().map(|error| format!("{}: {}", error.path, error.message)).collect()
    }

    #[test]
    fn a_secret_of_a_type_has_its_keys() {
        let faults = faults::<Secret>(serde_json::json!({
            "metadata": {"name": "s"}, "type": "kubernetes.io/tls", "stringData": {"tls.crt": "x", "a/b": ""}
        }));
        assert_eq!(faults.len(), 2);
        assert!(
            faults[0].starts_with("data[a/b]: Invalid value: \"a/b\": a valid config key must consist of"),
            "{faults:?}"
        );
        assert_eq!(faults[1], "data[tls.key]: Required value");
    }

    #[test]
    fn metadata_is_checked() {
        let faults = faults::<ConfigMap>(serde_json::json!({
            "metadata": {"name": "Big", "namespace": "a.b", "labels": {"x": "a b"}}
        }));
        assert!(
            faults[0]
                .starts_with("metadata.name: Invalid value: \"Big\": a lowercase RFC 1123 subdomain must consist of")
        );
        assert!(faults[1].starts_with("metadata.namespace: Invalid value: \"a.b\": a lowercase RFC 1123 label"));
        assert!(
            faults[2]
                .starts_with("metadata.labels[x]: Invalid value: \"a b\": a valid label must be an empty string or")
        );
    }
}
