//! What control groups of version 2 can do for memory beyond a limit: end a container as a whole, slow one down before its
//! limit, and keep what pods ask for from reclaim (KEP-2570).

use k8s_openapi::api::core::v1::{Container, Pod};
use pod::resources::{List, is_limited, of_container, of_pod};
use pod::{QosClass, spec};

/// What the operator says about it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemoryRules {
    /// Whether of a container that exceeds its limit one process is killed, and not all (`singleProcessOOMKill`); all unless
    /// it is written.
    pub single_kill: Option<bool>,
    /// Where between what it asks for and its limit a container is slowed down (`memoryThrottlingFactor`): above 0, at most
    /// 1. Nowhere without.
    pub throttling_factor: Option<f64>,
    /// Whether what pods ask for is kept from reclaim (`memoryReservationPolicy: TieredReservation`): that of Guaranteed ones
    /// always, that of Burstable ones while there is other memory to take.
    pub reserves: bool,
}

/// Files of a group, and what goes into them.
pub(crate) type Files = Vec<(String, String)>;

const PAGE_BYTES: i64 = 4096;

impl MemoryRules {
    /// For a container, on a node that gives its pods so much memory.
    pub(crate) fn of_container(&self, pod: &Pod, container: &Container, allocatable_bytes: Option<i64>) -> Files {
        let amount = |list| of_container(container, "memory", list).map_or(0, |amount| amount.units());
        let (asked, limit) = (amount(List::Requests), amount(List::Limits));
        let kill = (self.single_kill != Some(true)).then(|| file("memory.oom.group", 1));
        let bounded_by_pod = limit == 0 && has_own_limit(pod);
        let limit = if limit == 0 { allocatable_bytes.unwrap_or(0) } else { limit };
        let high = self.high(asked, limit).filter(|_| !bounded_by_pod);
        kill.into_iter().chain(self.reserved(pod, asked)).chain([high_file(high)]).collect()
    }

    /// For the group of a pod.
    pub(crate) fn of_pod(&self, pod: &Pod) -> Files {
        let amount = |list| of_pod(pod, "memory", list).units();
        let asked = amount(List::Requests);
        let limit =
            Some(amount(List::Limits)).filter(|_| spec::of(pod).resources.is_some() && is_limited(pod, "memory"));
        let high = limit.and_then(|limit| self.high(asked, limit));
        self.reserved(pod, asked).into_iter().chain([high_file(high)]).collect()
    }

    /// For the groups of all pods and of the Burstable ones: protection counts only as far as the groups above have it, too.
    pub(crate) fn of_classes<'a>(&self, pods: impl Iterator<Item = &'a Pod>) -> [Files; 2] {
        let (mut guaranteed, mut burstable) = (0, 0);
        for pod in pods.filter(|_| self.reserves) {
            let asked = of_pod(pod, "memory", List::Requests).units();
            match QosClass::of(pod) {
                QosClass::Guaranteed => guaranteed += asked,
                QosClass::Burstable => burstable += asked,
                QosClass::BestEffort => {}
            }
        }
        let low = file("memory.low", burstable);
        [vec![file("memory.min", guaranteed + burstable), low.clone()], vec![low]]
    }

    /// Both are always written: a rule that is taken back, or a pod that is resized, leaves nothing of before.
    fn reserved(&self, pod: &Pod, asked: i64) -> [(String, String); 2] {
        let asked = if self.reserves { asked } else { 0 };
        let (min, low) = if QosClass::of(pod) == QosClass::Guaranteed { (asked, 0) } else { (0, asked) };
        [file("memory.min", min), file("memory.low", low)]
    }

    /// Who gets all that it asks for is not slowed down.
    fn high(&self, asked: i64, limit: i64) -> Option<i64> {
        let factor = self.throttling_factor.filter(|_| limit > asked)?;
        #[expect(clippy::cast_precision_loss, reason = "memory of machines is below 2^53 bytes")]
        let above = (limit - asked) as f64 * factor;
        #[expect(clippy::cast_possible_truncation, reason = "it is not above the limit")]
        let bytes = (asked + above as i64) / PAGE_BYTES * PAGE_BYTES;
        (bytes > asked).then_some(bytes)
    }
}

/// Written in any case, as what keeps memory from reclaim is.
fn high_file(bytes: Option<i64>) -> (String, String) {
    ("memory.high".to_owned(), bytes.map_or_else(|| "max".to_owned(), |bytes| bytes.to_string()))
}

fn file(name: &str, bytes: i64) -> (String, String) {
    (name.to_owned(), bytes.to_string())
}

/// Whether the pod as a whole has a limit, which its group keeps.
fn has_own_limit(pod: &Pod) -> bool {
    pod::resources::of_whole(pod, "memory", List::Limits).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const ALL: MemoryRules = MemoryRules { single_kill: None, throttling_factor: Some(0.9), reserves: true };

    fn pod_of(resources: &Value, whole: &Value) -> Pod {
        let spec = json!({"containers": [{"name": "c", "resources": resources}], "resources": whole});
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn shown(files: &[(String, String)]) -> String {
        files
            .iter()
            .map(|(name, value)| format!("{}={value}", name.trim_start_matches("memory.")))
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn check(rules: MemoryRules, resources: &Value, whole: &Value, of_container: &str, of_pod: &str) {
        let pod = pod_of(resources, whole);
        let files = rules.of_container(&pod, &spec::of(&pod).containers[0], Some(1 << 30));
        assert_eq!(
            (shown(&files).as_str(), shown(&rules.of_pod(&pod)).as_str()),
            (of_container, of_pod),
            "{resources} {whole}"
        );
    }

    #[test]
    fn files_by_what_is_asked_for() {
        const NONE: &str = "min=0 low=0 high=max";
        let burstable = json!({"requests": {"memory": "100Mi"}, "limits": {"memory": "200Mi"}});
        let guaranteed = json!({"limits": {"cpu": "1", "memory": "100Mi"}});
        let single = MemoryRules { single_kill: Some(true), ..MemoryRules::default() };
        check(MemoryRules::default(), &burstable, &Value::Null, "oom.group=1 min=0 low=0 high=max", NONE);
        check(single, &burstable, &Value::Null, NONE, NONE);
        check(
            ALL,
            &burstable,
            &Value::Null,
            "oom.group=1 min=0 low=104857600 high=199229440",
            "min=0 low=104857600 high=max",
        );
        let whole_of_guaranteed = "min=104857600 low=0 high=max";
        check(ALL, &guaranteed, &Value::Null, "oom.group=1 min=104857600 low=0 high=max", whole_of_guaranteed);
        check(ALL, &json!({}), &Value::Null, "oom.group=1 min=0 low=0 high=966365184", NONE);
        // The pod as a whole has the limit: its group keeps it.
        let whole = json!({"requests": {"memory": "100Mi"}, "limits": {"memory": "200Mi"}});
        let of_pod = "min=0 low=104857600 high=199229440";
        check(ALL, &json!({}), &whole, "oom.group=1 min=0 low=0 high=max", of_pod);
    }

    #[test]
    fn groups_above_have_what_their_pods_have_together() {
        let asking = |resources: Value| pod_of(&resources, &Value::Null);
        let pods = [
            asking(json!({"limits": {"cpu": "1", "memory": "3"}})),
            asking(json!({"requests": {"memory": "4"}})),
            asking(json!({})),
        ];
        let [all, burstable] = ALL.of_classes(pods.iter());
        assert_eq!((shown(&all).as_str(), shown(&burstable).as_str()), ("min=7 low=4", "low=4"));
        let [all, burstable] = MemoryRules::default().of_classes(pods.iter());
        assert_eq!((shown(&all).as_str(), shown(&burstable).as_str()), ("min=0 low=0", "low=0"));
    }
}
