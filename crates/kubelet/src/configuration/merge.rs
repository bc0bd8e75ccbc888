//! Layers of a configuration, one over the other.

use serde_json::{Map, Value};

use super::leaves::{Kind, LEAVES};
use super::{described, fits};

/// A JSON merge patch (RFC 7396).
pub(super) fn patch(target: &mut Value, patch: Value) {
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

/// Sets the field of a flag. `featureGates` are merged, all other mappings replaced, as upstream does.
pub(super) fn flag(target: &mut Value, flag: &str, text: &str) -> Result<(), String> {
    let leaf = LEAVES.iter().find(|leaf| leaf.flag == flag && !flag.is_empty()).ok_or("there is no such flag")?;
    let value = match leaf.path {
        "registerWithTaints" => serde_json::to_value(super::parse_taints(text)?).map_err(|error| error.to_string())?,
        _ => value_of(leaf.kind, text)?,
    };
    let mut place = target;
    for name in leaf.path.split('.') {
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        let Some(fields) = place.as_object_mut() else { return Err("a field is in the way".to_owned()) };
        place = fields.entry(name).or_insert(Value::Null);
    }
    match leaf.path {
        "featureGates" => patch(place, value),
        _ => *place = value,
    }
    Ok(())
}

/// The value that a flag's text means.
pub(super) fn value_of(kind: Kind, text: &str) -> Result<Value, String> {
    let value = match kind {
        Kind::Bool => text.parse().map(Value::Bool).ok(),
        Kind::Integer => text.parse::<i64>().map(Value::from).ok(),
        Kind::Number => text.parse::<f64>().map(Value::from).ok(),
        Kind::Text | Kind::Duration => Some(Value::String(text.to_owned())),
        Kind::List => Some(split(text).map(Value::from).collect()),
        Kind::Map => pairs(text),
        Kind::Other => None,
    };
    value.filter(|value| fits(kind, value)).ok_or_else(|| format!("not {}", described(kind)))
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
    fn flags_set_their_fields() {
        let mut value = json!({"featureGates": {"A": true}, "systemReserved": {"cpu": "1"}});
        for (name, text) in [
            ("anonymous-auth", "true"),
            ("feature-gates", "B=false"),
            ("system-reserved", "memory=1Gi"),
            ("eviction-hard", "memory.available<200Mi,nodefs.available<5%"),
            ("cluster-dns", "10.0.0.10,10.0.0.11"),
            ("register-with-taints", "dedicated=ai:NoSchedule,spot:NoExecute"),
        ] {
            flag(&mut value, name, text).unwrap();
        }
        assert_eq!(
            value,
            json!({
                "authentication": {"anonymous": {"enabled": true}},
                "featureGates": {"A": true, "B": false},
                "systemReserved": {"memory": "1Gi"},
                "evictionHard": {"memory.available": "200Mi", "nodefs.available": "5%"},
                "clusterDNS": ["10.0.0.10", "10.0.0.11"],
                "registerWithTaints": [
                    {"key": "dedicated", "value": "ai", "effect": "NoSchedule"},
                    {"key": "spot", "effect": "NoExecute"},
                ],
            })
        );
        assert_eq!(flag(&mut value, "max-pods", "x"), Err("not a whole number".to_owned()));
    }
}
