//! Strict decoding: a tree of nodes → a typed object, with every unknown field reported by path and line.
//!
//! The API types announce their field names to the deserializer (`deserialize_struct`), so unknown fields are found
//! exactly, also inside lists and maps, and without a second copy of the schema.

use std::cell::RefCell;
use std::fmt::{self, Display};

use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};

use super::path::{FieldPath, Segment};
use super::yaml::{Entry, Node, Value};

/// Something wrong with one field.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FieldError {
    pub(crate) path: FieldPath,
    /// Known for faults of decoding; validation finds it by path.
    pub(crate) line: Option<usize>,
    pub(crate) message: String,
    pub(crate) remedy: Option<String>,
}

/// Decodes a document. `Err` lists everything found wrong; an object with unknown fields is not returned.
pub(crate) fn decode<T: de::DeserializeOwned>(document: &Node) -> Result<T, Vec<FieldError>> {
    match decode_known(document) {
        Ok((object, unknown)) if unknown.is_empty() => Ok(object),
        Ok((_, errors)) | Err(errors) => Err(errors),
    }
}

/// Decodes what is known of a document, as an API server does that is older than its author; the rest is listed.
pub(crate) fn decode_known<T: de::DeserializeOwned>(document: &Node) -> Result<(T, Vec<FieldError>), Vec<FieldError>> {
    let unknown = RefCell::new(Vec::new());
    let decoded = T::deserialize(NodeDeserializer { node: document, path: &Path::Root, unknown: &unknown });
    let mut errors = unknown.into_inner();
    match decoded {
        Ok(object) => Ok((object, errors)),
        Err(error) => {
            errors.push(error.into_field_error(document.line));
            Err(errors)
        }
    }
}

/// The path to the node being decoded, as a list on the stack: it costs nothing until there is an error.
enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn to_field_path(&self) -> FieldPath {
        match self {
            Path::Root => FieldPath::root(),
            Path::Field(parent, name) => parent.to_field_path().with(Segment::Field((*name).into())),
            Path::Key(parent, name) => parent.to_field_path().with(Segment::Key((*name).into())),
            Path::Index(parent, index) => parent.to_field_path().with(Segment::Index(*index)),
        }
    }
}

/// A type error; the innermost deserializer that sees it adds the place.
#[derive(Debug)]
struct DecodeError {
    place: Option<(FieldPath, usize)>,
    message: String,
    remedy: Option<String>,
}

impl DecodeError {
    fn at(mut self, path: &Path<'_>, line: usize) -> Self {
        self.place.get_or_insert_with(|| (path.to_field_path(), line));
        self
    }

    fn into_field_error(self, line: usize) -> FieldError {
        let (path, line) = self.place.unwrap_or((FieldPath::root(), line));
        FieldError { path, line: Some(line), message: self.message, remedy: self.remedy }
    }
}

impl Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for DecodeError {}

impl de::Error for DecodeError {
    fn custom<T: Display>(message: T) -> Self {
        DecodeError { place: None, message: message.to_string(), remedy: None }
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let found = describe(&unexpected);
        let expected = expected.to_string();
        let quotes = expected.contains("string")
            && matches!(
                unexpected,
                Unexpected::Bool(_) | Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_)
            );
        DecodeError {
            place: None,
            message: format!("must be {}, but is {found}", article(&expected)),
            remedy: quotes.then(|| "write the value in quotes".into()),
        }
    }
}

fn article(expected: &str) -> String {
    match expected.split(' ').next() {
        Some("a" | "an") => expected.into(),
        _ if expected.starts_with(['a', 'e', 'i', 'o', 'I', 'O', 'E', 'A']) => format!("an {expected}"),
        _ => format!("a {expected}"),
    }
}

fn describe(unexpected: &Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Bool(value) => format!("the boolean {value}"),
        Unexpected::Unsigned(value) => format!("the number {value}"),
        Unexpected::Signed(value) => format!("the number {value}"),
        Unexpected::Float(value) => format!("the number {value}"),
        Unexpected::Str(value) => format!("the string {value:?}"),
        Unexpected::Unit => "empty".into(),
        Unexpected::Seq => "a list".into(),
        Unexpected::Map => "a mapping".into(),
        other => other.to_string(),
    }
}

#[derive(Clone, Copy)]
struct NodeDeserializer<'a> {
    node: &'a Node,
    path: &'a Path<'a>,
    unknown: &'a RefCell<Vec<FieldError>>,
}

impl<'a> NodeDeserializer<'a> {
    fn located<T>(self, result: Result<T, DecodeError>) -> Result<T, DecodeError> {
        result.map_err(|error| error.at(self.path, self.node.line))
    }

    fn visit_int<'de, V: Visitor<'de>>(value: i128, visitor: V) -> Result<V::Value, DecodeError> {
        match (i64::try_from(value), u64::try_from(value)) {
            (Ok(value), _) => visitor.visit_i64(value),
            (_, Ok(value)) => visitor.visit_u64(value),
            _ => Err(de::Error::custom(format!("the number {value} is out of range"))),
        }
    }

    fn visit_sequence<'de, V: Visitor<'de>>(self, items: &'a [Node], visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_seq(Items { parent: self, items: items.iter(), index: 0 })
    }

    fn visit_mapping<'de, V: Visitor<'de>>(
        self,
        entries: &'a [Entry],
        fields: Option<&'static [&'static str]>,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_map(Entries { parent: self, entries: entries.iter(), current: None, fields })
    }

    fn text_of_number(self) -> Option<String> {
        match self.node.value {
            Value::Int(value) => Some(value.to_string()),
            Value::Float(value) => Some(value.to_string()),
            _ => None,
        }
    }
}

impl<'de> Deserializer<'de> for NodeDeserializer<'_> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        let result = match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => Self::visit_int(*value, visitor),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::String(value) => visitor.visit_str(value),
            Value::Sequence(items) => self.visit_sequence(items, visitor),
            Value::Mapping(entries) => self.visit_mapping(entries, None, visitor),
        };
        self.located(result)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match &self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        // The API takes `cpu: 1` as well as `cpu: "1"`.
        match self.text_of_number().filter(|_| name == "Quantity") {
            Some(text) => self.located(visitor.visit_newtype_struct(text.into_deserializer())),
            None => self.located(visitor.visit_newtype_struct(self)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        let result = match &self.node.value {
            Value::Mapping(entries) => self.visit_mapping(entries, Some(fields), visitor),
            // `resources:` with nothing behind it means the empty object.
            Value::Null => self.visit_mapping(&[], Some(fields), visitor),
            _ => return self.deserialize_any(visitor).map_err(|error| mapping_expected(error, self)),
        };
        self.located(result)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The types call themselves by their Go names; an operator wants to hear "mapping".
fn mapping_expected(error: DecodeError, at: NodeDeserializer<'_>) -> DecodeError {
    let found = match &at.node.value {
        Value::Sequence(_) => "a list".into(),
        Value::String(text) => format!("the string {text:?}"),
        _ => return error,
    };
    DecodeError { message: format!("must be a mapping, but is {found}"), ..error }
}

struct Items<'a> {
    parent: NodeDeserializer<'a>,
    items: std::slice::Iter<'a, Node>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = DecodeError;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, DecodeError> {
        let Some(node) = self.items.next() else { return Ok(None) };
        let path = Path::Index(self.parent.path, self.index);
        self.index += 1;
        let item = NodeDeserializer { node, path: &path, unknown: self.parent.unknown };
        item.located(seed.deserialize(item)).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries<'a> {
    parent: NodeDeserializer<'a>,
    entries: std::slice::Iter<'a, Entry>,
    current: Option<&'a Entry>,
    /// The known fields of a struct; `None` for a map whose keys are data.
    fields: Option<&'static [&'static str]>,
}

impl<'a> Entries<'a> {
    fn report_unknown(&self, entry: &Entry, fields: &[&str]) {
        let path = Path::Field(self.parent.path, &entry.key).to_field_path();
        let message = format!("unknown field {:?}", path.to_string());
        let remedy = nearest(&entry.key, fields).map(|name| format!("did you mean {name:?}?"));
        self.parent.unknown.borrow_mut().push(FieldError { path, line: Some(entry.line), message, remedy });
    }

    fn child_path(&self, entry: &'a Entry) -> Path<'a> {
        match self.fields {
            Some(_) => Path::Field(self.parent.path, &entry.key),
            None => Path::Key(self.parent.path, &entry.key),
        }
    }
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = DecodeError;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, DecodeError> {
        loop {
            let Some(entry) = self.entries.next() else { return Ok(None) };
            if let Some(fields) = self.fields.filter(|fields| !fields.contains(&entry.key.as_str())) {
                self.report_unknown(entry, fields);
                continue;
            }
            self.current = Some(entry);
            let result: Result<_, DecodeError> = seed.deserialize(entry.key.as_str().into_deserializer());
            return result.map(Some).map_err(|error| error.at(&self.child_path(entry), entry.line));
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, DecodeError> {
        let Some(entry) = self.current.take() else { return Err(de::Error::custom("a value without a key")) };
        let path = self.child_path(entry);
        let value = NodeDeserializer { node: &entry.value, path: &path, unknown: self.parent.unknown };
        seed.deserialize(value).map_err(|error| error.at(&path, entry.line))
    }
}

/// The candidate that differs least from `word`, if it differs little enough to be a slip.
pub(crate) fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let limit = 1 + word.len() / 4;
    let scored =
        candidates.iter().map(|candidate| (distance(&word.to_lowercase(), &candidate.to_lowercase()), *candidate));
    scored.filter(|(distance, _)| *distance <= limit).min().map(|(_, candidate)| candidate)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Pod, Secret};

    use super::*;
    use crate::manifests::yaml::parse;

    fn errors(text: &str) -> Vec<(String, usize, String, Option<String>)> {
        let document = parse(text).remove(0).unwrap();
        let errors = decode::<Pod>(&document).expect_err("must not decode");
        errors.into_iter().map(|e| (e.path.to_string(), e.line.unwrap(), e.message, e.remedy)).collect()
    }

    #[test]
    fn a_correct_pod_decodes() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, creationTimestamp: null, labels: {x: 'y'}}\n\
                    spec:\n  containers:\n  - name: c\n    image: i\n    resources: {limits: {cpu: 1, memory: 1.5Gi}}\n\
                    \x20   ports: [{containerPort: 80}]\nstatus: {}\n";
        let pod: Pod = decode(&parse(text).remove(0).unwrap()).unwrap();
        let container = &pod.spec.unwrap().containers[0];
        let limits = container.resources.as_ref().unwrap().limits.as_ref().unwrap();
        assert_eq!((limits["cpu"].0.as_str(), limits["memory"].0.as_str()), ("1", "1.5Gi"));
        assert_eq!(container.ports.as_ref().unwrap()[0].container_port, 80);
    }

    #[test]
    fn all_unknown_fields_are_found_with_their_lines() {
        let found = errors(
            "kind: Pod\nspec:\n  containers:\n  - name: c\n    imagePullPolcy: Always\n  restartpolicy: No\nzzz: 1\n",
        );
        let expect = [
            ("spec.containers[0].imagePullPolcy", 5, Some("did you mean \"imagePullPolicy\"?")),
            ("spec.restartpolicy", 6, Some("did you mean \"restartPolicy\"?")),
            ("zzz", 7, None),
        ];
        for (found, expect) in found.iter().zip(expect) {
            assert_eq!((found.0.as_str(), found.1, found.3.as_deref()), expect);
            assert_eq!(found.2, format!("unknown field {:?}", expect.0));
        }
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn a_wrong_type_names_field_and_line() {
        let found = errors("spec:\n  containers:\n  - name: c\n    env:\n    - name: A\n      value: 8080\n");
        assert_eq!(found[0].0, "spec.containers[0].env[0].value");
        assert_eq!(found[0].1, 6);
        assert_eq!(found[0].2, "must be a string, but is the number 8080");
        assert_eq!(found[0].3.as_deref(), Some("write the value in quotes"));

        let found = errors("metadata:\n  labels:\n    on-call: yes\n");
        assert_eq!((found[0].0.as_str(), found[0].1), ("metadata.labels[on-call]", 3));

        let found = errors("spec:\n  containers: {name: c}\n");
        assert_eq!((found[0].0.as_str(), found[0].1), ("spec.containers", 2));

        let found = errors("spec:\n  containers:\n  - c\n");
        assert_eq!(found[0].2, "must be a mapping, but is the string \"c\"");

        let found = errors("spec:\n  terminationGracePeriodSeconds: 1.5\n");
        assert_eq!(found[0].0, "spec.terminationGracePeriodSeconds");
    }

    #[test]
    fn bytes_must_be_base64() {
        let decode_secret =
            |value: &str| decode::<Secret>(&parse(&format!("data:\n  k: {value}\n")).remove(0).unwrap());
        assert_eq!(decode_secret("aGk=").unwrap().data.unwrap()["k"].0, b"hi");
        let error = decode_secret("'*'").unwrap_err().remove(0);
        assert_eq!((error.path.to_string().as_str(), error.line), ("data[k]", Some(2)));
    }
}
