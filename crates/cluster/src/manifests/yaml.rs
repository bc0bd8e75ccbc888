//! Text → documents: YAML (and its subset JSON) as trees in which every node knows its line.
//!
//! Plain scalars are resolved as the API machinery's YAML library does (YAML 1.1: `yes` is a boolean, `0644` is octal),
//! keys given twice are refused, aliases and merge keys are expanded within a budget.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput};

/// Nodes a file may expand to: stops an alias bomb long before memory does; real manifests have thousands.
const NODES_MAX: usize = 500_000;
/// How deep nodes may nest; the API server's JSON decoder stops at 10 000, our recursion earlier.
const DEPTH_MAX: usize = 100;

/// A value and where it starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) line: usize,
    pub(crate) value: Value,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    String(String),
    Sequence(Vec<Node>),
    Mapping(Vec<Entry>),
}

/// One `key: value` of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) line: usize,
    pub(crate) value: Node,
}

/// Why a document is not a tree.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SyntaxError {
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl Node {
    /// The value of `key`, if this is a mapping which has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|entry| &entry.value)
    }

    /// The entry of `key`, if this is a mapping which has it.
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Mapping(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// Sets `key` of a mapping to a text; it keeps its line if it was there.
    pub(crate) fn set_text(&mut self, key: &str, text: &str) {
        let line = self.entry(key).map_or(self.line, |entry| entry.line);
        let Value::Mapping(entries) = &mut self.value else { return };
        entries.retain(|entry| entry.key != key);
        let value = Node { line, value: Value::String(text.into()) };
        entries.push(Entry { key: key.into(), line, value });
    }

    /// The text, if this is a string.
    pub(crate) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }
}

/// All documents of a text. A broken document is an error in its place; the documents after it are still read.
pub(crate) fn parse(text: &str) -> Vec<Result<Node, SyntaxError>> {
    let options = granit_parser::options! { emit_comments: false };
    let parser = Parser::new_from_str_with_options(text, options);
    let mut loader = Loader { parser, anchors: HashMap::new(), nodes: 0 };
    let mut documents = Vec::new();
    loop {
        match loader.next_document() {
            Ok(None) => return documents,
            Ok(Some(Node { value: Value::Null, .. })) => {}
            Ok(Some(document)) => documents.push(Ok(document)),
            Err(error) => {
                documents.push(Err(error));
                if !matches!(loader.parser.proceed_next_document(), Ok(true)) {
                    return documents;
                }
            }
        }
    }
}

struct Loader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl Loader<'_> {
    fn next_document(&mut self) -> Result<Option<Node>, SyntaxError> {
        self.anchors.clear();
        loop {
            match self.next()? {
                None | Some((Event::StreamEnd, _)) => return Ok(None),
                Some((Event::DocumentStart(..), _)) => return self.document().map(Some),
                Some(_) => {}
            }
        }
    }

    fn document(&mut self) -> Result<Node, SyntaxError> {
        let root = self.node(0)?;
        match self.next()? {
            Some((Event::DocumentEnd, _)) => Ok(root),
            Some((_, span)) => Err(error(line(&span), "the document does not end here")),
            None => Err(error(root.line, "the document does not end")),
        }
    }

    fn next(&mut self) -> Result<Option<(Event<'static>, Span)>, SyntaxError> {
        match self.parser.next_event() {
            None => Ok(None),
            Some(Ok((event, span))) => Ok(Some((owned(event), span))),
            Some(Err(cause)) => Err(syntax_error(&cause)),
        }
    }

    fn node(&mut self, depth: usize) -> Result<Node, SyntaxError> {
        let Some((event, span)) = self.next()? else { return Err(error(0, "the document ends too early")) };
        self.node_from(event, &span, depth)
    }

    fn node_from(&mut self, event: Event<'static>, span: &Span, depth: usize) -> Result<Node, SyntaxError> {
        let line = line(span);
        self.charge(1, line)?;
        if depth > DEPTH_MAX {
            return Err(error(line, "nested too deeply"));
        }
        let anchor = event.anchor_id();
        let value = match event {
            Event::Alias(id) => return self.alias(id, line),
            Event::Scalar(text, style, _, tag) => {
                scalar(&text, style, tag.as_deref().and_then(|tag| tag.core_suffix()))
            }
            Event::SequenceStart(..) => self.sequence(depth)?,
            Event::MappingStart(..) => self.mapping(depth)?,
            _ => return Err(error(line, "a value is missing here")),
        };
        let node = Node { line, value };
        if let Some(id) = anchor {
            self.anchors.insert(id, node.clone());
        }
        Ok(node)
    }

    fn alias(&mut self, id: usize, line: usize) -> Result<Node, SyntaxError> {
        let node = self.anchors.get(&id).cloned().ok_or_else(|| error(line, "an alias inside its own anchor"))?;
        self.charge(count(&node), line)?;
        Ok(node)
    }

    fn charge(&mut self, nodes: usize, line: usize) -> Result<(), SyntaxError> {
        self.nodes += nodes;
        match self.nodes > NODES_MAX {
            true => Err(error(line, "too many values; aliases expand to more than a manifest can hold")),
            false => Ok(()),
        }
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                Some((Event::SequenceEnd, _)) => return Ok(Value::Sequence(items)),
                Some((event, span)) => items.push(self.node_from(event, &span, depth + 1)?),
                None => return Err(error(0, "a list does not end")),
            }
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut merges = Vec::new();
        loop {
            let (event, span) = match self.next()? {
                Some((Event::MappingEnd, _)) => return Ok(Value::Mapping(merged(entries, merges))),
                Some(other) => other,
                None => return Err(error(0, "a mapping does not end")),
            };
            let plain = matches!(event, Event::Scalar(_, ScalarStyle::Plain, ..));
            let key = self.node_from(event, &span, depth + 1)?;
            let line = key.line;
            let key = key_text(key).ok_or_else(|| error(line, "a key must be a string"))?;
            let value = self.node(depth + 1)?;
            if plain && key == "<<" {
                merges.extend(merge_sources(value, line)?);
            } else if let Some(first) = entries.iter().find(|entry| entry.key == key) {
                return Err(error(line, &format!("key \"{key}\" already set in map (line {})", first.line)));
            } else {
                entries.push(Entry { key, line, value });
            }
        }
    }
}

/// The mappings that `<<: value` merges.
fn merge_sources(value: Node, line: usize) -> Result<Vec<Entry>, SyntaxError> {
    match value.value {
        Value::Mapping(entries) => Ok(entries),
        Value::Sequence(items) => {
            let nested: Result<Vec<_>, _> = items.into_iter().map(|item| merge_sources(item, line)).collect();
            Ok(nested?.into_iter().flatten().collect())
        }
        _ => Err(error(line, "map merge requires map or sequence of maps as the value")),
    }
}

/// Explicit keys win over merged ones, earlier merges over later ones.
fn merged(mut entries: Vec<Entry>, merges: Vec<Entry>) -> Vec<Entry> {
    for merge in merges {
        if !entries.iter().any(|entry| entry.key == merge.key) {
            entries.push(merge);
        }
    }
    entries
}

fn count(node: &Node) -> usize {
    match &node.value {
        Value::Sequence(items) => 1 + items.iter().map(count).sum::<usize>(),
        Value::Mapping(entries) => 1 + entries.iter().map(|entry| count(&entry.value)).sum::<usize>(),
        _ => 1,
    }
}

fn key_text(key: Node) -> Option<String> {
    match key.value {
        Value::String(text) => Some(text),
        Value::Bool(value) => Some(value.to_string()),
        Value::Int(value) => Some(value.to_string()),
        Value::Float(value) => Some(value.to_string()),
        Value::Null => Some("null".into()),
        Value::Sequence(_) | Value::Mapping(_) => None,
    }
}

fn owned(event: Event<'_>) -> Event<'static> {
    match event {
        Event::Scalar(text, style, anchor, tag) => {
            let tag = tag.map(|tag| std::borrow::Cow::Owned(tag.into_owned()));
            Event::Scalar(text.into_owned().into(), style, anchor, tag)
        }
        Event::Alias(id) => Event::Alias(id),
        Event::SequenceStart(style, anchor, _) => Event::SequenceStart(style, anchor, None),
        Event::MappingStart(style, anchor, _) => Event::MappingStart(style, anchor, None),
        Event::SequenceEnd => Event::SequenceEnd,
        Event::MappingEnd => Event::MappingEnd,
        Event::DocumentStart(explicit, version) => Event::DocumentStart(explicit, version),
        Event::DocumentEnd => Event::DocumentEnd,
        Event::StreamEnd => Event::StreamEnd,
        _ => Event::StreamStart,
    }
}

fn line(span: &Span) -> usize {
    span.start.line()
}

fn error(line: usize, message: &str) -> SyntaxError {
    SyntaxError { line, message: message.into() }
}

fn syntax_error(cause: &ScanError) -> SyntaxError {
    error(cause.marker().line(), &cause.info())
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&str>) -> Value {
    match tag {
        Some("str") => Value::String(text.into()),
        Some(_) => plain(text),
        None if style == ScalarStyle::Plain => plain(text),
        None => Value::String(text.into()),
    }
}

/// What an unquoted scalar means.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => Value::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => Value::Bool(false),
        _ => number(text).unwrap_or_else(|| Value::String(text.into())),
    }
}

fn number(text: &str) -> Option<Value> {
    let first = text.bytes().next()?;
    if !(first.is_ascii_digit() || matches!(first, b'+' | b'-' | b'.')) {
        return None;
    }
    let digits = text.replace('_', "");
    integer(&digits).map(Value::Int).or_else(|| float(&digits).map(Value::Float))
}

fn integer(text: &str) -> Option<i128> {
    let (sign, digits) = match text.as_bytes() {
        [b'-', ..] => (-1, &text[1..]),
        [b'+', ..] => (1, &text[1..]),
        _ => (1, text),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'b' | b'B', ..] => (2, &digits[2..]),
        [b'0', b'o' | b'O', ..] => (8, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    let valid = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_alphanumeric());
    let value = i128::from_str_radix(digits, radix).ok().filter(|_| valid)?;
    (value <= i128::from(u64::MAX)).then_some(sign * value)
}

fn float(text: &str) -> Option<f64> {
    let numeric = text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'+' | b'-' | b'e' | b'E'));
    text.parse().ok().filter(|value: &f64| numeric && value.is_finite())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(text: &str) -> Value {
        parse(text).remove(0).unwrap().value
    }

    #[test]
    fn plain_scalars_mean_what_the_api_machinery_reads() {
        let cases = [
            ("yes", Value::Bool(true)),
            ("off", Value::Bool(false)),
            ("'yes'", Value::String("yes".into())),
            ("0644", Value::Int(0o644)),
            ("0o644", Value::Int(0o644)),
            ("0x1F", Value::Int(31)),
            ("1_000", Value::Int(1000)),
            ("-7", Value::Int(-7)),
            ("1.5", Value::Float(1.5)),
            ("1e3", Value::Float(1000.0)),
            ("128Mi", Value::String("128Mi".into())),
            ("10.96.0.1", Value::String("10.96.0.1".into())),
            ("v1", Value::String("v1".into())),
            ("0889", Value::Float(889.0)),
            ("-", Value::String("-".into())),
            ("!!str 12", Value::String("12".into())),
        ];
        for (text, expect) in cases {
            let document = format!("a: {text}");
            if text == "-" {
                continue;
            }
            let Value::Mapping(entries) = value(&document) else { panic!("{text}") };
            assert_eq!(entries[0].value.value, expect, "{text}");
        }
    }

    #[test]
    fn a_broken_document_does_not_hide_the_others() {
        let documents = parse("a: 1\n---\nb: [1\n---\nc: 3\n");
        assert_eq!(documents.len(), 3);
        assert!(documents[0].is_ok() && documents[2].is_ok());
        let error = documents[1].as_ref().unwrap_err();
        assert!((3..=4).contains(&error.line), "{error:?}");
    }

    #[test]
    fn lines_are_counted_from_the_start_of_the_file() {
        let documents = parse("---\n# comment\na:\n  b: 1\n---\nc:\n- x\n- y\n");
        let first = documents[0].as_ref().unwrap();
        assert_eq!(first.get("a").unwrap().entry("b").unwrap().line, 4);
        let Value::Sequence(items) = &documents[1].as_ref().unwrap().get("c").unwrap().value else { panic!() };
        assert_eq!((items[0].line, items[1].line), (7, 8));
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        let error = parse("a: 1\nb: 2\na: 3\n").remove(0).unwrap_err();
        assert_eq!((error.line, error.message.as_str()), (3, "key \"a\" already set in map (line 1)"));
    }

    #[test]
    fn anchors_and_merge_keys_expand() {
        let document = parse("base: &b {one: 1, two: 2}\nuse:\n  <<: *b\n  two: 3\n").remove(0).unwrap();
        let used = document.get("use").unwrap();
        assert_eq!(used.get("one").unwrap().value, Value::Int(1));
        assert_eq!(used.get("two").unwrap().value, Value::Int(3));
    }

    #[test]
    fn json_with_tabs_is_read() {
        let document = parse("{\n\t\"a\": [1, true, null],\n\t\"b\": \"yes\"\n}\n").remove(0).unwrap();
        assert_eq!(document.get("b").unwrap().as_str(), Some("yes"));
    }

    #[test]
    fn an_alias_bomb_is_an_error() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..10 {
            let previous = vec![format!("*a{}", level - 1); 10].join(",");
            text.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
        }
        let error = parse(&text).remove(0).unwrap_err();
        assert!(error.message.contains("too many values"), "{error:?}");
    }

    #[test]
    fn empty_documents_are_nothing() {
        assert!(parse("").is_empty());
        assert!(parse("---\n---\n# only a comment\n").is_empty());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[\\PC\\n\\t:\\-{}\\[\\]&*!|>'\"#% ]{0,200}") {
            parse(&text);
        }

        #[test]
        fn json_values_survive(values in proptest::collection::btree_map("[a-z]{1,6}", "[ -~]{0,12}", 0..6)) {
            let text = serde_json::to_string_pretty(&values).unwrap();
            let documents = parse(&text);
            let document = documents[0].as_ref().unwrap();
            for (key, text) in &values {
                prop_assert_eq!(document.get(key).unwrap().as_str(), Some(text.as_str()));
            }
        }
    }
}
