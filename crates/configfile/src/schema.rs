//! The table of fields.

use serde_json::Value;

use crate::{merge, spans};

/// A kind of document and all its fields.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Its `apiVersion`.
    pub api_version: &'static str,
    /// Its `kind`.
    pub kind: &'static str,
    /// Who reads it, as in "has no effect on this kubelet".
    pub reader: &'static str,
    /// All fields, in the order of the API.
    pub leaves: &'static [Leaf],
}

/// A field without fields of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// Its path, with dots.
    pub path: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// Upstream's default as a flag would have it; empty where unset.
    pub default: &'static str,
    /// The flag that sets it, without dashes; empty where there is none.
    pub flag: &'static str,
    /// Whether it has its effect.
    pub status: Status,
    /// What it means, for whoever looks for a flag; empty where there is none.
    pub about: &'static str,
}

/// How a field is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// Text.
    Text,
    /// Go's form of a time span: `1m30s`.
    Duration,
    /// A list of texts; `a,b` as a flag.
    List,
    /// Texts by name; `a=1,b=2` as a flag.
    Map,
    /// A structure of its own.
    Other,
    /// Written in more than one way.
    Any,
}

/// Whether a field has its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It has.
    Honoured,
    /// It has not yet; a value other than the default is warned about.
    NotYet,
    /// It never will, for this reason; a value other than the default is warned about.
    Never(&'static str),
}

/// One line of a table.
pub const fn leaf(path: &'static str, kind: Kind, default: &'static str, flag: &'static str, status: Status) -> Leaf {
    Leaf { path, kind, default, flag, status, about: "" }
}

impl Schema {
    /// The field that a flag sets.
    pub fn by_flag(&self, flag: &str) -> Option<&'static Leaf> {
        self.leaves.iter().find(|leaf| leaf.flag == flag && !flag.is_empty())
    }

    /// Tells of fields that there are not, and of values of the wrong kind: path and fault.
    pub(crate) fn check(&self, value: &Value, prefix: &str, tell: &mut impl FnMut(&str, &str)) {
        for (name, value) in value.as_object().into_iter().flatten() {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            if let Some(leaf) = self.leaves.iter().find(|leaf| leaf.path == path) {
                if !value.is_null() && !leaf.kind.fits(value) {
                    tell(&path, &format!("{value} is not {}", leaf.kind.described()));
                }
            } else if self.leaves.iter().any(|leaf| leaf.path.starts_with(&format!("{path}."))) {
                match value {
                    Value::Object(_) => self.check(value, &path, tell),
                    Value::Null => {}
                    _ => tell(&path, "has fields of its own"),
                }
            } else {
                let similar = self.leaves.iter().find(|leaf| leaf.path.eq_ignore_ascii_case(&path));
                let hint = similar.map_or_else(String::new, |leaf| format!("; {} is one", leaf.path));
                tell(&path, &format!("there is no such field{hint}"));
            }
        }
    }

    /// One line for each field that was set and is not honoured.
    pub fn warnings(&self, written: &Value) -> Vec<String> {
        self.leaves.iter().filter_map(|leaf| self.warning(leaf, written)).collect()
    }

    /// Nothing where it is as it would be anyway.
    fn warning(&self, leaf: &Leaf, written: &Value) -> Option<String> {
        let value = leaf.path.split('.').try_fold(written, |value, name| value.get(name))?;
        if leaf.is_default(value) {
            return None;
        }
        match leaf.status {
            Status::Honoured => None,
            Status::NotYet => Some(format!("{} = {value} has no effect on this {} yet", leaf.path, self.reader)),
            Status::Never(why) => Some(format!("{} = {value} has no effect on this {}: {why}", leaf.path, self.reader)),
        }
    }
}

impl Leaf {
    /// With what it means. That says its default where it is not upstream's.
    #[must_use]
    pub const fn says(self, about: &'static str) -> Self {
        Self { about, ..self }
    }

    /// The help of its flag.
    #[must_use]
    pub fn help(&self) -> String {
        let about = match self.status {
            Status::Honoured => self.about.to_owned(),
            Status::NotYet => "Has no effect yet".to_owned(),
            Status::Never(why) => format!("Has no effect: {why}"),
        };
        let default = match self.default {
            _ if about.contains("[default: ") => String::new(),
            "" => " [default: unset]".to_owned(),
            default => format!(" [default: {default}]"),
        };
        if self.path.starts_with("--") {
            format!("{about}{default}")
        } else {
            format!("{about}{default} [{}]", self.path)
        }
    }

    /// Unset, zero, or upstream's default.
    fn is_default(&self, value: &Value) -> bool {
        let default = (!self.default.is_empty()).then(|| merge::value_of(self.kind, self.default).ok()).flatten();
        match (self.kind, value) {
            (_, value) if is_nothing(value) => true,
            (Kind::Any, value) if value.as_f64() == Some(0.0) => true,
            (Kind::Duration, Value::String(text)) => {
                let span = spans::parse(text);
                span.is_some_and(|span| span.is_zero()) || span == spans::parse(self.default)
            }
            (_, Value::Bool(false)) | (_, Value::Number(_)) if default.is_none() => {
                *value == Value::Bool(false) || value.as_i64() == Some(0)
            }
            (_, value) => Some(value) == default.as_ref(),
        }
    }

    /// What upstream's default is worth; none where it is unset.
    ///
    /// # Errors
    /// The table is wrong.
    pub fn default_value(&self) -> Result<Option<Value>, String> {
        if self.default.is_empty() { Ok(None) } else { merge::value_of(self.kind, self.default).map(Some) }
    }
}

impl Kind {
    pub(crate) fn fits(self, value: &Value) -> bool {
        match self {
            Kind::Bool => value.is_boolean(),
            Kind::Integer => value.is_i64(),
            Kind::Number => value.is_number(),
            Kind::Text => value.is_string(),
            Kind::Duration => value.as_str().is_some_and(|text| spans::parse(text).is_some()),
            Kind::List => value.as_array().is_some_and(|items| items.iter().all(Value::is_string)),
            Kind::Map => value.is_object(),
            Kind::Other => value.is_object() || value.is_array(),
            Kind::Any => true,
        }
    }

    pub(crate) fn described(self) -> &'static str {
        match self {
            Kind::Bool => "true or false",
            Kind::Integer => "a whole number",
            Kind::Number => "a number",
            Kind::Text => "a text",
            Kind::Duration => "a time span as 1m30s",
            Kind::List => "a list of texts",
            Kind::Map => "a mapping",
            Kind::Other => "a structure",
            Kind::Any => "a value",
        }
    }
}

/// Structures of nothing but zeros are what kubeadm writes for whatever it leaves alone.
fn is_nothing(value: &Value) -> bool {
    let zero = |value: &Value| match value {
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "0" || spans::parse(text).is_some_and(|span| span.is_zero()),
        value => is_nothing(value),
    };
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(zero),
        _ => false,
    }
}
