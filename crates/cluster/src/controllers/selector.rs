//! Label selectors.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

type Labels = BTreeMap<String, String>;

/// Whether the labels satisfy the selector. An empty selector matches everything.
pub fn matches(selector: &LabelSelector, labels: Option<&Labels>) -> bool {
    let empty = Labels::new();
    let labels = labels.unwrap_or(&empty);
    selector.match_labels.as_ref().is_none_or(|wanted| contains(wanted, labels))
        && selector.match_expressions.iter().flatten().all(|requirement| satisfies(requirement, labels))
}

/// Whether the selector demands nothing.
pub(crate) fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// Whether every wanted label is there: the selector of a Service.
pub(crate) fn contains(wanted: &Labels, labels: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn satisfies(requirement: &LabelSelectorRequirement, labels: &Labels) -> bool {
    let value = labels.get(&requirement.key);
    let listed = value.is_some_and(|value| requirement.values.iter().flatten().any(|wanted| wanted == value));
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn expressions() {
        let labels = Labels::from([("tier".into(), "web".into())]);
        let check = |selector: serde_json::Value, expect| {
            let selector: LabelSelector = serde_json::from_value(selector).unwrap();
            assert_eq!(matches(&selector, Some(&labels)), expect, "{selector:?}");
        };
        check(json!({}), true);
        check(json!({"matchLabels": {"tier": "web"}}), true);
        check(json!({"matchLabels": {"tier": "db"}}), false);
        check(json!({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["web", "db"]}]}), true);
        check(json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["web"]}]}), false);
        check(json!({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["web"]}]}), true);
        check(json!({"matchExpressions": [{"key": "x", "operator": "Exists"}]}), false);
        check(json!({"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}), true);
    }
}
