//! Typed values out of a merged configuration.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::spans;

/// Reads a merged configuration, whose leaves are of their kinds already, and collects what else is wrong with them.
#[derive(Debug)]
pub struct Reader<'a> {
    written: &'a Value,
    /// What is wrong, one line each.
    pub faults: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Of what was written.
    pub fn new(written: &'a Value) -> Reader<'a> {
        Reader { written, faults: Vec::new() }
    }

    /// A value as it was written; `null` is unset.
    pub fn get(&self, path: &str) -> Option<&'a Value> {
        path.split('.').try_fold(self.written, |value, name| value.get(name)).filter(|value| !value.is_null())
    }

    /// Notes what is wrong with a field.
    pub fn fault(&mut self, path: &str, fault: impl Display) {
        self.faults.push(format!("{path}: {fault}"));
    }

    /// A boolean.
    pub fn flag(&self, path: &str, default: bool) -> bool {
        self.get(path).and_then(Value::as_bool).unwrap_or(default)
    }

    /// A text; an empty one is unset.
    pub fn text(&self, path: &str) -> Option<String> {
        self.get(path).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
    }

    /// A file.
    pub fn file(&self, path: &str) -> Option<PathBuf> {
        self.text(path).map(PathBuf::from)
    }

    /// A list of texts.
    pub fn texts(&self, path: &str) -> Vec<String> {
        let items = self.get(path).and_then(Value::as_array).into_iter().flatten();
        items.filter_map(|item| item.as_str().map(str::to_owned)).collect()
    }

    /// A time span; zero is unset, as the API has it.
    pub fn span(&self, path: &str) -> Option<Duration> {
        self.text(path).and_then(|text| spans::parse(&text)).filter(|span| !span.is_zero())
    }

    /// A whole number in the range of its type.
    pub fn number<T: TryFrom<i64>>(&mut self, path: &str, default: T) -> T {
        let Some(written) = self.get(path).and_then(Value::as_i64) else { return default };
        T::try_from(written).unwrap_or_else(|_| {
            self.fault(path, format!("{written} is out of range"));
            default
        })
    }

    /// A whole number within bounds.
    pub fn bounded(&mut self, path: &str, default: i64, least: i64, most: i64) -> i64 {
        let written = self.get(path).and_then(Value::as_i64).unwrap_or(default);
        if !(least..=most).contains(&written) {
            self.fault(path, format!("{written} is not between {least} and {most}"));
        }
        written.clamp(least, most)
    }

    /// An IP address.
    pub fn address(&mut self, path: &str, default: &str) -> IpAddr {
        let text = self.text(path).unwrap_or_else(|| default.to_owned());
        text.parse().unwrap_or_else(|_| {
            self.fault(path, format!("{text:?} is not an IP address"));
            IpAddr::from([0, 0, 0, 0])
        })
    }
}
