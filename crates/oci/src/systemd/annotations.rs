//! Properties of a unit that annotations name: `org.systemd.property.<Name>`, each with a value as GVariant writes it
//! ("GVariant Text Format" in the GLib documentation). CRI-O and Podman have some for every container.

use std::collections::BTreeMap;

use dbus::Value;

use ::systemd::Property;

use crate::error::Error;

const PREFIX: &str = "org.systemd.property.";
/// What may be said so: how a container is ended, when it is begun, and what is told of it. Engines pass annotations on that the
/// authors of pods write, so nothing that reaches beyond the container is among them (CVE-2024-3154): no action of the host, no
/// other unit, no slice, no process, no limit.
const NAMES: [&str; 12] = [
    "After",
    "Before",
    "CollectMode",
    "DefaultDependencies",
    "Description",
    "Documentation",
    "FinalKillSignal",
    "KillSignal",
    "RuntimeMaxUSec",
    "SendSIGHUP",
    "SendSIGKILL",
    "TimeoutStopUSec",
];
/// No value that makes sense is longer.
const TEXT_MAX: usize = 4096;
/// Arrays and types in each other.
const DEPTH_MAX: u8 = 8;

/// Those of a configuration.
pub(super) fn properties(annotations: &BTreeMap<String, String>) -> Result<Vec<Property>, Error> {
    let named = annotations.iter().filter_map(|(key, text)| Some((key.strip_prefix(PREFIX)?, text)));
    named.map(|(name, text)| property(name, text)).collect()
}

fn property(name: &str, text: &str) -> Result<Property, Error> {
    let invalid = |why: &str| Error::Invalid(format!("annotation {PREFIX}{name}={text}: {why}"));
    // Documentation has times in seconds, properties have them in microseconds.
    let of_time = name.strip_suffix("Sec").filter(|rest| rest.ends_with(|letter: char| letter.is_ascii_lowercase()));
    let property = of_time.map_or_else(|| name.to_owned(), |rest| format!("{rest}USec"));
    if !NAMES.contains(&property.as_str()) {
        return Err(Error::Invalid(format!(
            "annotation {PREFIX}{name}: annotations may be those of a pod's author, who may set nothing but {}; remove it",
            NAMES.join(", ")
        )));
    }
    if text.len() > TEXT_MAX || text.contains('\0') {
        return Err(Error::Invalid(format!(
            "annotation {PREFIX}{name}: the value is longer than {TEXT_MAX} bytes, or has a zero byte"
        )));
    }
    let value = parse(text).ok_or_else(|| invalid("the value is not understood"))?;
    match of_time {
        None => Ok((property, value)),
        Some(_) => {
            let value = microseconds(&value).ok_or_else(|| invalid("the value is no number"))?;
            Ok((property, Value::U64(value)))
        }
    }
}

fn microseconds(value: &Value) -> Option<u64> {
    const SECOND: u64 = 1_000_000;
    let whole = match value {
        Value::F64(seconds) => {
            let duration = std::time::Duration::try_from_secs_f64(*seconds).ok()?;
            return u64::try_from(duration.as_micros()).ok();
        }
        Value::I16(number) => u64::try_from(*number).ok()?,
        Value::I32(number) => u64::try_from(*number).ok()?,
        Value::I64(number) => u64::try_from(*number).ok()?,
        Value::Byte(_) | Value::U16(_) | Value::U32(_) | Value::U64(_) => value.number().ok()?,
        _ => return None,
    };
    whole.checked_mul(SECOND)
}

/// Truths, numbers, texts, and arrays of them.
fn parse(text: &str) -> Option<Value> {
    let mut parser = Parser { rest: text.trim(), depth: 0 };
    let value = parser.value(None)?;
    parser.rest.trim().is_empty().then_some(value)
}

struct Parser<'a> {
    rest: &'a str,
    depth: u8,
}

/// Types by their names before a value; `@` has the letter itself.
const TYPES: [(&str, &str); 10] = [
    ("boolean", "b"),
    ("byte", "y"),
    ("int16", "n"),
    ("uint16", "q"),
    ("int32", "i"),
    ("uint32", "u"),
    ("int64", "x"),
    ("uint64", "t"),
    ("double", "d"),
    ("string", "s"),
];

impl<'a> Parser<'a> {
    /// A value of the type `wanted`, or of the one that it has by itself.
    fn value(&mut self, wanted: Option<&str>) -> Option<Value> {
        self.depth += 1;
        let value = (self.depth <= DEPTH_MAX).then(|| self.value_here(wanted)).flatten();
        self.depth -= 1;
        value
    }

    fn value_here(&mut self, wanted: Option<&str>) -> Option<Value> {
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            quote @ ('\'' | '"') => {
                let text = self.quoted(quote)?;
                matches!(wanted, None | Some("s")).then_some(Value::Text(text))
            }
            '[' => self.array(wanted),
            '@' => {
                self.rest = &self.rest[1..];
                let signature = self.word();
                let of = signature.strip_prefix('a').unwrap_or(signature);
                let is_known = TYPES.iter().any(|(_, letter)| *letter == of);
                is_known.then(|| self.value(Some(signature))).flatten()
            }
            _ => {
                let word = self.word();
                match TYPES.iter().find(|(name, _)| *name == word) {
                    Some((_, signature)) => self.value(Some(signature)),
                    None => plain(word, wanted),
                }
            }
        }
    }

    /// Up to a space or what ends an element.
    fn word(&mut self) -> &'a str {
        let end = self.rest.find(|letter: char| letter.is_whitespace() || ",]'\"[".contains(letter));
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        word
    }

    fn quoted(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        let mut letters = self.rest.char_indices().skip(1);
        while let Some((at, letter)) = letters.next() {
            match letter {
                _ if letter == quote => {
                    self.rest = &self.rest[at + 1..];
                    return Some(text);
                }
                '\\' => text.push(match letters.next()?.1 {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    plain @ ('\\' | '\'' | '"') => plain,
                    _ => return None,
                }),
                other => text.push(other),
            }
        }
        None
    }

    /// Elements are of one type; where nothing says which, it is the first one's.
    fn array(&mut self, wanted: Option<&str>) -> Option<Value> {
        let mut of = match wanted {
            Some(signature) => Some(signature.strip_prefix('a')?.to_owned()),
            None => None,
        };
        self.rest = &self.rest[1..];
        let mut elements = Vec::new();
        loop {
            self.rest = self.rest.trim_start();
            if let Some(rest) = self.rest.strip_prefix(']') {
                self.rest = rest;
                return Some(Value::Array(of?, elements));
            }
            if !elements.is_empty() {
                self.rest = self.rest.strip_prefix(',')?;
            }
            let element = self.value(of.as_deref())?;
            of = Some(element.signature());
            elements.push(element);
        }
    }
}

/// What stands there without quotes.
fn plain(word: &str, wanted: Option<&str>) -> Option<Value> {
    Some(match (word, wanted) {
        ("true", None | Some("b")) => Value::Bool(true),
        ("false", None | Some("b")) => Value::Bool(false),
        (_, None) if word.contains('.') => Value::F64(word.parse().ok()?),
        (_, None | Some("i")) => Value::I32(integer(word)?),
        (_, Some("y")) => Value::Byte(integer(word)?),
        (_, Some("n")) => Value::I16(integer(word)?),
        (_, Some("q")) => Value::U16(integer(word)?),
        (_, Some("u")) => Value::U32(integer(word)?),
        (_, Some("x")) => Value::I64(integer(word)?),
        (_, Some("t")) => Value::U64(integer(word)?),
        (_, Some("d")) => Value::F64(word.parse().ok()?),
        _ => return None,
    })
}

/// Decimal, or hexadecimal with `0x`.
fn integer<T: TryFrom<i128>>(word: &str) -> Option<T> {
    let (sign, digits) = word.strip_prefix('-').map_or((1, word), |digits| (-1, digits));
    let number = match digits.strip_prefix("0x") {
        Some(digits) => i128::from(u64::from_str_radix(digits, 16).ok()?),
        None => i128::from(digits.parse::<u64>().ok()?),
    };
    T::try_from(sign * number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_gvariant_writes_them() {
        for (text, expect) in [
            ("true", Value::Bool(true)),
            ("@b false", Value::Bool(false)),
            ("15", Value::I32(15)),
            ("-1", Value::I32(-1)),
            ("uint64 10000000", Value::U64(10_000_000)),
            ("byte 0x1f", Value::Byte(31)),
            ("int64 -5", Value::I64(-5)),
            ("1.5", Value::F64(1.5)),
            ("'inactive-or-failed'", "inactive-or-failed".into()),
            (r#"  "a \"b\" \\ 'c'" "#, r#"a "b" \ 'c'"#.into()),
            ("['crio.service', 'b.service']", Value::texts(["crio.service", "b.service"])),
            ("[]", Value::Bool(false)),
            ("@as []", Value::texts([])),
            ("[uint32 1, 2]", Value::Array("u".to_owned(), vec![Value::U32(1), Value::U32(2)])),
        ] {
            let found = parse(text);
            if text == "[]" {
                assert_eq!(found, None, "nobody knows of what");
            } else {
                assert_eq!(found, Some(expect), "{text}");
            }
        }
        let wrong =
            ["", "word", "'open", "[1", "[1 2]", "[1, 'a']", "byte 300", "1 2", "uint64 -1", "@", "@x 'a'", "@{sv} []"];
        let deep = ["[".repeat(4000), "@i ".repeat(1300), "int32 ".repeat(600)];
        for wrong in wrong.into_iter().map(str::to_owned).chain(deep) {
            assert_eq!(parse(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn cve_2024_3154_annotations_reach_nothing_beyond_their_container() {
        for (name, text) in [
            ("SuccessAction", "'poweroff-force'"),
            ("Conflicts", "['sshd.service']"),
            ("OnSuccess", "['other.service']"),
            ("Slice", "'system.slice'"),
            ("PIDs", "@au [1]"),
            ("ExecStartPre", "['/bin/true']"),
            ("DevicePolicy", "'auto'"),
            ("MemoryMax", "uint64 1"),
            ("KillSignal", "'\0'"),
        ] {
            let refused = properties(&BTreeMap::from([(format!("{PREFIX}{name}"), text.to_owned())])).unwrap_err();
            assert!(refused.to_string().contains(name), "{refused}");
        }
        let long = BTreeMap::from([(format!("{PREFIX}Description"), format!("'{}'", "x".repeat(TEXT_MAX)))]);
        assert!(properties(&long).is_err());
    }

    #[test]
    fn times_are_in_microseconds() {
        let of = |key: &str, text: &str| {
            let annotations = BTreeMap::from([(key.to_owned(), text.to_owned()), ("other".to_owned(), "x".to_owned())]);
            properties(&annotations)
        };
        let one = |key: &str, text: &str| of(key, text).unwrap().pop().unwrap();
        assert_eq!(
            one("org.systemd.property.TimeoutStopSec", "1.5"),
            ("TimeoutStopUSec".into(), Value::U64(1_500_000))
        );
        assert_eq!(one("org.systemd.property.TimeoutStopUSec", "uint64 7"), ("TimeoutStopUSec".into(), Value::U64(7)));
        assert_eq!(one("org.systemd.property.KillSignal", "37"), ("KillSignal".into(), Value::I32(37)));
        for (key, text) in
            [("TimeoutStopSec", "'a'"), ("a", "1"), ("Kill_Signal", "1"), ("KillSignal", "?"), ("TimeoutStopSec", "-1")]
        {
            let refused = of(&format!("org.systemd.property.{key}"), text);
            assert!(refused.is_err(), "{key}: {refused:?}");
        }
    }
}
