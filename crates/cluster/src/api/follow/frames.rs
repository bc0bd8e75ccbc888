//! Bytes of a watch → events.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Status};

/// etcd takes objects of some MiB at most; a line that is longer is no event.
const LINE_BYTES_MAX: usize = 64 << 20;
/// What stays allocated for the next line.
const LINE_BYTES_KEPT: usize = 16 << 10;
/// Marks the bookmark that ends the initial events of a streamed list.
const LIST_END: &str = "k8s.io/initial-events-end";
const MANAGED_FIELDS: &[u8] = b"\"managedFields\":[";

/// Cuts what comes in into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
}

/// A line that does not end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

impl Lines {
    /// Hands over each line that is complete by now, until one is refused.
    pub(super) fn feed<E: From<TooLong>>(
        &mut self,
        piece: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = piece;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            if self.partial.is_empty() {
                take(line)?;
            } else {
                self.partial.extend_from_slice(line);
                let taken = take(&self.partial);
                self.partial.clear();
                self.partial.shrink_to(LINE_BYTES_KEPT);
                taken?;
            }
            rest = after;
        }
        if self.partial.len() + rest.len() > LINE_BYTES_MAX {
            return Err(TooLong.into());
        }
        self.partial.extend_from_slice(rest);
        Ok(())
    }
}

/// What a watch tells.
#[derive(Debug, PartialEq)]
pub(super) enum Event<T> {
    /// An object is there, new or changed.
    Put(T),
    /// An object is gone. Its metadata, as far as they tell which one, and in which version.
    Gone(Box<ObjectMeta>),
    /// Everything up to this version has been told. `ends_list`: and it is everything that is there.
    Bookmark { version: String, ends_list: bool },
    /// The watch is over.
    Failed(Box<Status>),
    /// An object that nobody can read. Its metadata, as for one that is gone.
    Unreadable { metadata: Box<ObjectMeta>, reason: String },
}

#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Named {
    metadata: ObjectMeta,
}

/// What an object is known by, whatever else its metadata say.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Identified {
    metadata: Identity,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Identity {
    namespace: Option<String>,
    name: Option<String>,
    resource_version: Option<String>,
}

/// Reads one line; none for a kind of event that we do not know.
pub(super) fn event<T: DeserializeOwned>(
    line: &[u8],
    scratch: &mut Vec<u8>,
) -> Result<Option<Event<T>>, serde_json::Error> {
    let frame: Frame<'_> = serde_json::from_slice(line)?;
    let object = frame.object.get().as_bytes();
    Ok(Some(match frame.kind {
        "ADDED" | "MODIFIED" => match serde_json::from_slice(without_managed_fields(object, scratch)) {
            Ok(object) => Event::Put(object),
            Err(error) => unreadable(object, &error),
        },
        "DELETED" => Event::Gone(identity(object)),
        "BOOKMARK" => {
            let Named { metadata } = serde_json::from_slice(object)?;
            let ends_list = metadata.annotations.is_some_and(|all| all.get(LIST_END).is_some_and(|end| end == "true"));
            Event::Bookmark { version: metadata.resource_version.unwrap_or_default(), ends_list }
        }
        "ERROR" => Event::Failed(serde_json::from_slice(object)?),
        _ => return Ok(None),
    }))
}

/// An object that does not fit its type, as far as it can be named.
pub(super) fn unreadable<T>(object: &[u8], error: &serde_json::Error) -> Event<T> {
    Event::Unreadable { metadata: identity(object), reason: error.to_string() }
}

/// An object whose name cannot be read either is nobody's.
fn identity(object: &[u8]) -> Box<ObjectMeta> {
    let Identified { metadata } = serde_json::from_slice(object).unwrap_or_default();
    let Identity { namespace, name, resource_version } = metadata;
    Box::new(ObjectMeta { namespace, name, resource_version, ..ObjectMeta::default() })
}

/// The object without its `managedFields`: often a third of it, and of use to nobody here. Cut out as bytes, it costs a
/// tenth of what decoding it would.
///
/// These bytes stand for nothing else: within a JSON string the quotes would be escaped.
fn without_managed_fields<'a>(object: &'a [u8], scratch: &'a mut Vec<u8>) -> &'a [u8] {
    let found = object.windows(MANAGED_FIELDS.len()).position(|window| window == MANAGED_FIELDS);
    let Some(begin) = found.filter(|begin| *begin > 0 && object[*begin - 1] != b'\\') else { return object };
    let Some(length) = array_length(&object[begin + MANAGED_FIELDS.len() - 1..]) else { return object };
    let end = begin + MANAGED_FIELDS.len() - 1 + length;
    // One of the commas around it goes as well.
    let (begin, end) = match (object[begin - 1], object.get(end)) {
        (b',', _) => (begin - 1, end),
        (_, Some(b',')) => (begin, end + 1),
        _ => (begin, end),
    };
    scratch.clear();
    scratch.extend_from_slice(&object[..begin]);
    scratch.extend_from_slice(&object[end..]);
    scratch
}

/// Bytes of the array at the start of `text`.
fn array_length(text: &[u8]) -> Option<usize> {
    let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
    for (at, byte) in text.iter().enumerate() {
        match (in_string, is_escaped, byte) {
            (true, true, _) => is_escaped = false,
            (true, false, b'\\') => is_escaped = true,
            (true, false, b'"') => in_string = false,
            (true, false, _) => {}
            (false, _, b'"') => in_string = true,
            (false, _, b'[' | b'{') => depth += 1,
            (false, _, b']' | b'}') => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            (false, ..) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use proptest::prelude::*;

    use super::*;

    fn read_line(line: &str) -> Event<ConfigMap> {
        event(line.as_bytes(), &mut Vec::new()).unwrap().unwrap()
    }

    #[test]
    fn events() {
        let Event::Put(map) = read_line(
            r#"{"type":"ADDED","object":{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"a","resourceVersion":"7","managedFields":[{"manager":"x]\"","fieldsV1":{"f:a":[]}}]},"data":{"k":"\"managedFields\":["}}}"#,
        ) else {
            panic!("no object")
        };
        assert_eq!((map.metadata.name.as_deref(), map.metadata.managed_fields), (Some("a"), None));
        assert_eq!(map.data.unwrap()["k"], "\"managedFields\":[");
        let end = r#"{"type":"BOOKMARK","object":{"kind":"ConfigMap","apiVersion":"v1","metadata":{"resourceVersion":"9","annotations":{"k8s.io/initial-events-end":"true"}}}}"#;
        assert_eq!(read_line(end), Event::Bookmark { version: "9".into(), ends_list: true });
        let gone = r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old","code":410}}"#;
        assert!(matches!(read_line(gone), Event::Failed(status) if status.code == Some(410)));
        let is_b = |metadata: &ObjectMeta| metadata.name.as_deref() == Some("b");
        let bad = r#"{"name":"b","creationTimestamp":"yesterday","labels":7}"#;
        for object in [r#"{"metadata":{"name":"b"},"data":7}"#.to_owned(), format!(r#"{{"metadata":{bad}}}"#)] {
            let changed = read_line(&format!(r#"{{"type":"MODIFIED","object":{object}}}"#));
            assert!(matches!(changed, Event::Unreadable { metadata, .. } if is_b(&metadata)), "{object}");
            let gone = read_line(&format!(r#"{{"type":"DELETED","object":{object}}}"#));
            assert!(matches!(gone, Event::Gone(metadata) if is_b(&metadata)), "{object}");
        }
        assert!(event::<ConfigMap>(br#"{"type":"NEWS","object":{}}"#, &mut Vec::new()).unwrap().is_none());
        assert!(event::<ConfigMap>(b"<html>", &mut Vec::new()).is_err());
    }

    #[test]
    fn managed_fields_are_cut_out_wherever_they_stand() {
        let check = |before: &str, after: &str| {
            let mut scratch = Vec::new();
            assert_eq!(std::str::from_utf8(without_managed_fields(before.as_bytes(), &mut scratch)).unwrap(), after);
        };
        check(r#"{"a":1,"managedFields":[[{}],"]"],"b":2}"#, r#"{"a":1,"b":2}"#);
        check(r#"{"managedFields":[],"b":2}"#, r#"{"b":2}"#);
        check(r#"{"managedFields":[1]}"#, "{}");
        check(r#"{"a":"\"managedFields\":["}"#, r#"{"a":"\"managedFields\":["}"#);
        check(r#"{"managedFields":["#, r#"{"managedFields":["#);
    }

    proptest! {
        /// However the bytes are cut, the lines are the same.
        #[test]
        fn lines_do_not_depend_on_pieces(text in "[ab\n]{0,60}", cuts in proptest::collection::vec(0usize..60, 0..8)) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < text.len()).collect();
            cuts.sort_unstable();
            cuts.push(text.len());
            let (mut lines, mut seen, mut from) = (Lines::default(), Vec::new(), 0);
            for cut in cuts {
                let piece = &text.as_bytes()[from..cut];
                lines.feed::<TooLong>(piece, |line| { seen.push(String::from_utf8(line.to_vec()).unwrap()); Ok(()) }).unwrap();
                from = cut;
            }
            let mut expected: Vec<String> = text.split('\n').map(str::to_owned).collect();
            prop_assert_eq!(String::from_utf8(lines.partial).unwrap(), expected.pop().unwrap());
            prop_assert_eq!(seen, expected);
        }
    }
}
