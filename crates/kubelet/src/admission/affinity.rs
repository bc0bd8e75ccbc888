//! Node selectors and required node affinity, of pods and of PersistentVolumes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PersistentVolume, Pod};
use pod::spec;

use super::Site;

/// Whether the pod may be on this node, by its selector and by what its affinity requires.
pub(super) fn matches(pod: &Pod, site: &Site) -> bool {
    let spec = spec::of(pod);
    let selected = spec.node_selector.iter().flatten().all(|(name, value)| site.labels.get(name) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let holds = |term| holds(term, &site.labels, Some(&site.name));
    selected && required.is_none_or(|required| required.node_selector_terms.iter().any(holds))
}

/// Whether a volume can be used on a node with these labels. Upstream looks at no fields of the node.
pub(crate) fn has_volume(volume: &PersistentVolume, labels: &BTreeMap<String, String>) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required.as_ref());
    required.is_none_or(|required| required.node_selector_terms.iter().any(|term| holds(term, labels, None)))
}

/// All of a term's requirements; one without any matches nothing.
fn holds(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, name: Option<&str>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let labelled = expressions.iter().all(|one| is_met(one, labels.get(&one.key).map(String::as_str)));
    labelled && fields.iter().all(|one| one.key == "metadata.name" && is_met(one, name))
}

fn is_met(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = || value.is_some_and(|value| values.iter().any(|one| one == value));
    let compared = |holds: fn(&i64, &i64) -> bool| {
        let bound = values.first().and_then(|bound| bound.parse::<i64>().ok());
        let value = value.and_then(|value| value.parse::<i64>().ok());
        value.zip(bound).is_some_and(|(value, bound)| holds(&value, &bound))
    };
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared(i64::gt),
        "Lt" => compared(i64::lt),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn matched(terms: Value) -> bool {
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [], "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}}))
        .unwrap();
        let labels = [("zone".to_owned(), "a".to_owned()), ("cores".to_owned(), "8".to_owned())].into();
        matches(&pod, &Site { name: "n1".into(), labels, ..Site::default() })
    }

    #[test]
    fn requirements() {
        let one = |key: &str, operator: &str, values: &[&str]| {
            matched(json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]))
        };
        assert!(one("zone", "In", &["b", "a"]) && !one("zone", "In", &["b"]));
        assert!(one("zone", "NotIn", &["b"]) && one("none", "NotIn", &["b"]) && !one("zone", "NotIn", &["a"]));
        assert!(one("zone", "Exists", &[]) && !one("none", "Exists", &[]));
        assert!(one("none", "DoesNotExist", &[]) && !one("zone", "DoesNotExist", &[]));
        assert!(one("cores", "Gt", &["4"]) && !one("cores", "Gt", &["8"]) && one("cores", "Lt", &["9"]));
    }

    #[test]
    fn one_term_is_enough_and_an_empty_one_is_none() {
        let no = json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]});
        let yes = json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]});
        assert!(matched(json!([no, yes])));
        assert!(!matched(json!([no])) && !matched(json!([{}])));
    }

    #[test]
    fn volumes_are_where_they_say() {
        let labels = [("zone".to_owned(), "a".to_owned())].into();
        let fits = |spec: Value| {
            let volume = serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap();
            has_volume(&volume, &labels)
        };
        let in_zone = |zone: &str| {
            let zone = json!([{"key": "zone", "operator": "In", "values": [zone]}]);
            json!({"nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": zone}]}}})
        };
        assert!(fits(json!({})) && fits(json!({"nodeAffinity": {}})) && fits(in_zone("a")) && !fits(in_zone("b")));
        let field = json!([{"key": "metadata.name", "operator": "In", "values": ["n1"]}]);
        assert!(!fits(json!({"nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchFields": field}]}}})));
    }
}
