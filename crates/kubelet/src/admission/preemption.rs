//! Which pods make room for a critical one that does not fit, as upstream chooses them: as few Guaranteed pods as possible,
//! then as few Burstable, then as few of the others; of two that serve as well, the one that asks for less. Pure.

use k8s_openapi::api::core::v1::Pod;
use pod::QosClass;
use pod::spec;

use super::{Rejection, is_critical};
use crate::qos::{self, List};

/// Who makes room for a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Preemption {
    /// Their places among those that were asked about.
    pub pods: Vec<usize>,
    /// What the node is short of, the first of it; empty if nobody has to go.
    pub resource: String,
}

/// What is missing of a resource, in the unit in which it is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Want {
    pub(super) resource: String,
    pub(super) amount: i64,
}

/// Which of `others` go, so that nothing of `wants` is missing any more.
pub(super) fn choose(pod: &Pod, others: &[&Pod], wants: Vec<Want>) -> Result<Preemption, Rejection> {
    let Some(first) = wants.first() else { return Ok(Preemption::default()) };
    let resource = first.resource.clone();
    let pods = chosen(pod, others, &wants).map_err(|missing| {
        let missing: String =
            missing.iter().map(|want| format!("(res: {}, q: {}), ", want.resource, want.amount)).collect();
        let message = format!(
            "Unexpected error while attempting to recover from admission failure: preemption: error finding a set of pods to \
             preempt: no set of running pods found to reclaim resources: [{missing}]"
        );
        Rejection { reason: "UnexpectedAdmissionError".to_owned(), message }
    })?;
    Ok(Preemption { pods, resource })
}

/// Their places; or what would be missing though all went that may.
fn chosen(pod: &Pod, others: &[&Pod], wants: &[Want]) -> Result<Vec<usize>, Vec<Want>> {
    let of = |class| -> Vec<usize> {
        let may_go = |place: &usize| is_preemptable(pod, others[*place]) && QosClass::of(others[*place]) == class;
        (0..others.len()).filter(may_go).collect()
    };
    let [best_effort, burstable, guaranteed] =
        [QosClass::BestEffort, QosClass::Burstable, QosClass::Guaranteed].map(of);
    let without = |groups: &[&[usize]]| less(wants, groups.iter().copied().flatten().map(|place| others[*place]));
    let missing = without(&[&best_effort, &burstable, &guaranteed]);
    if !missing.is_empty() {
        return Err(missing);
    }
    let guaranteed = nearest(others, guaranteed, without(&[&best_effort, &burstable]));
    let burstable = nearest(others, burstable, without(&[&best_effort, &guaranteed]));
    let best_effort = nearest(others, best_effort, without(&[&burstable, &guaranteed]));
    Ok([best_effort, burstable, guaranteed].concat())
}

/// Of two pods, whether the first is worth more to the cluster.
fn is_preemptable(pod: &Pod, other: &Pod) -> bool {
    let more = spec::of(pod).priority.zip(spec::of(other).priority).is_some_and(|(own, other)| own > other);
    (is_critical(pod) && !is_critical(other)) || more
}

/// Of `pods` those that go until nothing is missing: each time the one that leaves the smallest part of what is wanted
/// unserved.
fn nearest(others: &[&Pod], mut pods: Vec<usize>, mut wants: Vec<Want>) -> Vec<usize> {
    let mut going = Vec::new();
    while !wants.is_empty() {
        let ask = |place: usize, resource| asked(others[place], resource);
        let mut best: Option<(usize, f64)> = None;
        for (at, place) in pods.iter().enumerate() {
            let distance = distance(others[*place], &wants);
            let is_nearer = best.is_none_or(|(before, least)| {
                let key = |at: usize| (ask(pods[at], "memory"), ask(pods[at], "cpu"));
                distance < least || (distance.total_cmp(&least).is_eq() && key(at) <= key(before))
            });
            if is_nearer {
                best = Some((at, distance));
            }
        }
        let Some((at, _)) = best else { break }; // The caller has seen to it that all together are enough.
        let place = pods.remove(at);
        wants = less(&wants, [others[place]].into_iter());
        going.push(place);
    }
    going
}

/// The parts of what is wanted that a pod leaves unserved, squared and added up: so every resource counts the same.
fn distance(pod: &Pod, wants: &[Want]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a share, to compare pods")]
    let part = |want: &Want| {
        let left = want.amount.saturating_sub(asked(pod, &want.resource)).max(0);
        left as f64 / want.amount as f64
    };
    wants.iter().map(|want| part(want).powi(2)).sum()
}

/// What is still missing when these pods are gone.
fn less<'a>(wants: &[Want], pods: impl Iterator<Item = &'a Pod> + Clone) -> Vec<Want> {
    let left = wants.iter().map(|Want { resource, amount }| {
        let given = pods.clone().fold(0_i64, |sum, pod| sum.saturating_add(asked(pod, resource)));
        Want { resource: resource.clone(), amount: amount.saturating_sub(given) }
    });
    left.filter(|want| want.amount > 0).collect()
}

/// What a pod takes of a resource: CPUs in thousandths.
pub(super) fn asked(pod: &Pod, resource: &str) -> i64 {
    match resource {
        "pods" => 1,
        "cpu" => qos::of_pod(pod, resource, List::Requests).milli(),
        _ => qos::of_pod(pod, resource, List::Requests).units(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(priority: i32, resources: Value) -> Pod {
        let containers = json!([{"name": "c", "resources": resources}]);
        serde_json::from_value(json!({"spec": {"priority": priority, "containers": containers}})).unwrap()
    }

    fn burstable(cpu: &str, memory: &str) -> Pod {
        pod(0, json!({"requests": {"cpu": cpu, "memory": memory}}))
    }

    fn guaranteed(cpu: &str, memory: &str) -> Pod {
        pod(0, json!({"limits": {"cpu": cpu, "memory": memory}}))
    }

    /// `wants` as resource and amount; the places of who goes, sorted.
    fn check(others: &[Pod], wants: &[(&str, i64)], expect: Option<&[usize]>) {
        let critical = pod(2_000_000_000, json!({}));
        let wants = wants.iter().map(|(name, amount)| Want { resource: (*name).to_owned(), amount: *amount }).collect();
        let chosen = choose(&critical, &others.iter().collect::<Vec<_>>(), wants).map(|mut preemption| {
            preemption.pods.sort_unstable();
            preemption.pods
        });
        assert_eq!(chosen.as_deref().ok(), expect, "{chosen:?}");
    }

    #[test]
    fn guaranteed_pods_go_only_if_nothing_else_helps() {
        let others = [burstable("100m", "100Mi"), guaranteed("100m", "100Mi"), burstable("200m", "100Mi")];
        check(&others, &[("cpu", 250)], Some(&[0, 2]));
        check(&others, &[("cpu", 350)], Some(&[0, 1, 2]));
        check(&others, &[("cpu", 401)], None);
        // With a Guaranteed pod gone, one of the others may stay.
        let others = [burstable("100m", "1"), guaranteed("500m", "1"), burstable("100m", "1")];
        check(&others, &[("cpu", 600)], Some(&[1, 2]));
    }

    #[test]
    fn as_few_as_possible_and_of_these_the_smallest() {
        let others =
            [burstable("100m", "1"), burstable("300m", "300"), burstable("300m", "200"), burstable("2", "400")];
        check(&others, &[("cpu", 300)], Some(&[2]));
        check(&others, &[("cpu", 300), ("memory", 250)], Some(&[1]));
        check(&others, &[("cpu", 2050), ("memory", 350)], Some(&[0, 3]));
        check(&others, &[], Some(&[]));
    }

    #[test]
    fn places_are_given_back_by_the_least() {
        let others = [guaranteed("1", "1"), burstable("1", "1"), pod(0, json!({}))];
        check(&others, &[("pods", 1)], Some(&[2]));
        check(&others, &[("pods", 2)], Some(&[1, 2]));
        check(&others, &[("pods", 1), ("cpu", 500)], Some(&[1]));
    }

    #[test]
    fn critical_pods_stay_unless_they_are_of_lower_priority() {
        let system = |priority| pod(priority, json!({"requests": {"cpu": "1"}}));
        check(&[system(2_000_000_000)], &[("cpu", 1)], None);
        let node_critical = system(2_000_001_000);
        let wants = vec![Want { resource: "cpu".to_owned(), amount: 1 }];
        let chosen = choose(&node_critical, &[&system(2_000_000_000)], wants).unwrap();
        assert_eq!((chosen.pods, chosen.resource.as_str()), (vec![0], "cpu"));
    }

    #[test]
    fn a_rejection_says_what_is_missing() {
        let wants = vec![Want { resource: "cpu".to_owned(), amount: 500 }];
        let rejection = choose(&pod(2_000_000_000, json!({})), &[&burstable("100m", "1")], wants).unwrap_err();
        assert_eq!(rejection.reason, "UnexpectedAdmissionError");
        assert!(rejection.message.ends_with("reclaim resources: [(res: cpu, q: 400), ]"), "{}", rejection.message);
    }
}
