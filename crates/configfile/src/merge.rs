//! Values over values, and the values of flags.

use serde_json::{Map, Value};

use crate::Kind;

/// A JSON merge patch (RFC 7396).
pub(crate) fn patch(target: &mut Value, patch: Value) {
    let Value::Object(fields) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(target) = target.as_object_mut() else { return };
    for (name, value) in fields {
        match value {
            Value::Null => {
                target.remove(&name);
            }
            value => self::patch(target.entry(name).or_insert(Value::Null), value),
        }
    }
}

/// The value that a flag's text means.
pub(crate) fn value_of(kind: Kind, text: &str) -> Result<Value, String> {
    let value = match kind {
        Kind::Bool => text.parse().map(Value::Bool).ok(),
        Kind::Integer => text.parse::<i64>().map(Value::from).ok(),
        Kind::Number => text.parse::<f64>().map(Value::from).ok(),
        Kind::Text | Kind::Duration | Kind::Any => Some(Value::String(text.to_owned())),
        Kind::List => Some(split(text).map(Value::from).collect()),
        Kind::Map => pairs(text),
        Kind::Other => None,
    };
    value.filter(|value| kind.fits(value)).ok_or_else(|| format!("not {}", kind.described()))
}

fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// `name=value,…`; eviction thresholds are written `name<value`.
fn pairs(text: &str) -> Option<Value> {
    let pair = |item| {
        let (name, value) = str::split_once(item, ['=', '<'])?;
        let value = match value {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            text => Value::from(text),
        };
        Some((name.to_owned(), value))
    };
    split(text).map(pair).collect::<Option<Map<_, _>>>().map(Value::Object)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patches() {
        let mut value = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        patch(&mut value, json!({"a": {"b": null, "e": 3}, "d": [2]}));
        assert_eq!(value, json!({"a": {"c": 2, "e": 3}, "d": [2]}));
    }

    #[test]
    fn thresholds_are_pairs() {
        let value = value_of(Kind::Map, "memory.available<200Mi,nodefs.available<5%").unwrap();
        assert_eq!(value, json!({"memory.available": "200Mi", "nodefs.available": "5%"}));
        assert_eq!(value_of(Kind::Integer, "x"), Err("not a whole number".to_owned()));
    }
}
