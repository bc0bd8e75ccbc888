//! core/v1's objects from JSON to Kubernetes' protobuf, by a table of its messages.
//!
//! Names in JSON are those of the protobuf fields, but for messages that Go embeds: their fields are the outer object's in
//! JSON. What the table does not have is left out, as an older client would leave it out.

use jiff::Timestamp;
use serde_json::{Map, Value};

/// A message of Kubernetes.
#[derive(Debug)]
struct Message {
    name: &'static str,
    fields: &'static [Field],
}

#[derive(Debug)]
struct Field {
    number: u32,
    name: &'static str,
    shape: Shape,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    One,
    List,
    /// By texts.
    Map,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Bytes,
    Bool,
    Int,
    /// By its place in the table.
    Message(usize),
}

/// All messages that a pod is made of.
const MESSAGES: &[Message] = include!("generated/core.rs");

/// Fields of messages that Go embeds.
const EMBEDDED: [&str; 4] = ["volumeSource", "ephemeralContainerCommon", "handler", "localObjectReference"];

/// A pod as protobuf, from its JSON.
pub fn encode_pod(pod: &Value) -> Vec<u8> {
    let place = MESSAGES.iter().position(|message| message.name == "Pod");
    let mut out = Vec::new();
    message(place.expect("the table has it"), pod, &mut out);
    out
}

fn message(place: usize, value: &Value, out: &mut Vec<u8>) {
    match MESSAGES[place].name {
        "Time" => time(value, out),
        "Quantity" => text(1, value.as_str().unwrap_or_default(), out),
        "IntOrString" => int_or_string(value, out),
        "FieldsV1" => bytes(1, value.to_string().as_bytes(), out),
        _ => value.as_object().into_iter().for_each(|object| fields(place, object, out)),
    }
}

fn fields(place: usize, object: &Map<String, Value>, out: &mut Vec<u8>) {
    for field in MESSAGES[place].fields {
        if let (true, Kind::Message(inner)) = (EMBEDDED.contains(&field.name), field.kind) {
            let mut embedded = Vec::new();
            fields(inner, object, &mut embedded);
            if !embedded.is_empty() {
                bytes(field.number, &embedded, out);
            }
            continue;
        }
        match (field.shape, object.get(field.name)) {
            (_, None | Some(Value::Null)) => {}
            (Shape::One, Some(value)) => one(field.number, field.kind, value, out),
            (Shape::List, Some(list)) => {
                list.as_array().into_iter().flatten().for_each(|value| one(field.number, field.kind, value, out));
            }
            (Shape::Map, Some(map)) => {
                for (key, value) in map.as_object().into_iter().flatten() {
                    let mut entry = Vec::new();
                    text(1, key, &mut entry);
                    one(2, field.kind, value, &mut entry);
                    bytes(field.number, &entry, out);
                }
            }
        }
    }
}

fn one(number: u32, kind: Kind, value: &Value, out: &mut Vec<u8>) {
    match kind {
        Kind::Text | Kind::Bytes => text(number, value.as_str().unwrap_or_default(), out),
        Kind::Bool => int(number, value.as_bool().unwrap_or_default().into(), out),
        Kind::Int => int(number, value.as_i64().unwrap_or_default(), out),
        Kind::Message(place) => {
            let mut inner = Vec::new();
            message(place, value, &mut inner);
            bytes(number, &inner, out);
        }
    }
}

/// Seconds since 1970. Objects have no fractions of them.
fn time(value: &Value, out: &mut Vec<u8>) {
    let at: Option<Timestamp> = value.as_str().and_then(|text| text.parse().ok());
    if let Some(at) = at {
        int(1, at.as_second(), out);
        int(2, at.subsec_nanosecond().into(), out);
    }
}

fn int_or_string(value: &Value, out: &mut Vec<u8>) {
    match value.as_str() {
        Some(name) => {
            int(1, 1, out);
            text(3, name, out);
        }
        None => {
            int(1, 0, out);
            int(2, value.as_i64().unwrap_or_default(), out);
        }
    }
}

fn text(number: u32, text: &str, out: &mut Vec<u8>) {
    bytes(number, text.as_bytes(), out);
}

fn bytes(number: u32, bytes: &[u8], out: &mut Vec<u8>) {
    varint(u64::from(number) << 3 | 2, out);
    varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn int(number: u32, value: i64, out: &mut Vec<u8>) {
    varint(u64::from(number) << 3, out);
    varint(value.cast_unsigned(), out);
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One pod with most of what a pod can have, as Go's types write it as JSON and as protobuf.
    const JSON: &str = include_str!("testdata/pod.json");
    const PROTOBUF: &[u8] = include_bytes!("testdata/pod.pb");

    /// Reads by the same table what others have written by theirs.
    struct Reader<'a>(&'a [u8]);

    impl<'a> Reader<'a> {
        fn varint(&mut self) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let (first, rest) = self.0.split_first().unwrap();
                self.0 = rest;
                value |= u64::from(first & 0x7f) << shift;
                shift += 7;
                if first & 0x80 == 0 {
                    return value;
                }
            }
        }

        fn bytes(&mut self) -> &'a [u8] {
            let length = usize::try_from(self.varint()).unwrap();
            let (bytes, rest) = self.0.split_at(length);
            self.0 = rest;
            bytes
        }
    }

    fn read(place: usize, bytes: &[u8]) -> Value {
        let Message { name, fields } = MESSAGES[place];
        let (mut reader, mut object) = (Reader(bytes), Map::new());
        while !reader.0.is_empty() {
            let tag = reader.varint();
            let field = fields.iter().find(|field| u64::from(field.number) == tag >> 3);
            let field = field.unwrap_or_else(|| panic!("{name} has no field {}", tag >> 3));
            let value = match (tag & 7, field.kind) {
                (0, Kind::Bool) => Value::Bool(reader.varint() == 1),
                (0, Kind::Int) => reader.varint().cast_signed().into(),
                (2, kind) => value_of(field.shape, kind, reader.bytes()),
                (wire, kind) => panic!("{name}.{}: {kind:?} as {wire}", field.name),
            };
            match (field.shape, value) {
                (Shape::List, value) => {
                    let list = object.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
                    list.as_array_mut().unwrap().push(value);
                }
                (Shape::Map, Value::Object(entry)) => {
                    let map = object.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
                    map.as_object_mut().unwrap().extend(entry);
                }
                (_, Value::Object(inner)) if EMBEDDED.contains(&field.name) => object.extend(inner),
                (_, value) => drop(object.insert(field.name.to_owned(), value)),
            }
        }
        let int = |name: &str| object.get(name).and_then(Value::as_i64).unwrap_or_default();
        match name {
            "Time" if object.is_empty() => Value::Null,
            "Time" => Timestamp::from_second(int("seconds")).unwrap().to_string().into(),
            "Quantity" => object["string"].clone(),
            "IntOrString" if int("type") == 0 => int("intVal").into(),
            "IntOrString" => object["strVal"].clone(),
            "FieldsV1" => serde_json::from_str(object["Raw"].as_str().unwrap()).unwrap(),
            _ => Value::Object(object),
        }
    }

    fn value_of(shape: Shape, kind: Kind, bytes: &[u8]) -> Value {
        if shape == Shape::Map {
            let mut reader = Reader(bytes);
            assert_eq!(reader.varint(), 1 << 3 | 2);
            let key = String::from_utf8(reader.bytes().to_vec()).unwrap();
            assert_eq!(reader.varint(), 2 << 3 | 2);
            return Value::Object([(key, value_of(Shape::One, kind, reader.bytes()))].into_iter().collect());
        }
        match kind {
            Kind::Message(place) => read(place, bytes),
            _ => String::from_utf8(bytes.to_vec()).unwrap().into(),
        }
    }

    /// Without what says as much as if it were not there.
    fn plain(value: Value) -> Value {
        let is_plain = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Number(number) => number.as_i64() != Some(0),
            Value::String(text) => !text.is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(object) => !object.is_empty(),
            Value::Bool(true) => true,
        };
        match value {
            Value::Object(object) => {
                let fields = object.into_iter().map(|(name, value)| (name, plain(value)));
                Value::Object(fields.filter(|(_, value)| is_plain(value)).collect())
            }
            Value::Array(list) => Value::Array(list.into_iter().map(plain).collect()),
            other => other,
        }
    }

    #[test]
    fn a_pod_is_written_as_go_writes_it() {
        let place = MESSAGES.iter().position(|message| message.name == "Pod").unwrap();
        let json: Value = serde_json::from_str(JSON).unwrap();
        let mut expect = plain(json.clone());
        // They are no part of the message.
        for field in ["kind", "apiVersion"] {
            expect.as_object_mut().unwrap().remove(field);
        }
        assert_eq!(plain(read(place, PROTOBUF)), expect, "the table is right");
        let written = encode_pod(&json);
        assert_eq!(plain(read(place, &written)), expect);
        assert!(written.len() <= PROTOBUF.len(), "Go writes empty texts, too");
    }
}
