//! Whether a container that has ended is to run again.

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::spec::{self, Role};
use crate::view::{ContainerRecord, Run};

/// The action of a rule that begins all containers of the pod anew.
const RESTART_ALL: &str = "RestartAllContainers";

/// What follows the end of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It runs again, after the back-off.
    Restart,
    /// It has done its work.
    Done,
    /// It has failed for good.
    Failed,
}

/// As [`after_exit`], of a run that may have been ended to begin again with other resources or another image.
pub fn after_run(pod: &Pod, role: Role, container: &Container, record: Option<&ContainerRecord>, run: &Run) -> Verdict {
    if record.is_some_and(|record| record.replacing.as_ref() == Some(&run.id)) {
        return Verdict::Restart;
    }
    after_exit(pod, role, container, run.exit_code)
}

/// Applies the container's `restartPolicyRules`, its own `restartPolicy`, or the pod's.
pub fn after_exit(pod: &Pod, role: Role, container: &Container, exit_code: i32) -> Verdict {
    let succeeded = exit_code == 0;
    if role == Role::Ephemeral || (role == Role::Init && succeeded) {
        return Verdict::Done;
    }
    if matches!(matching_action(container, exit_code), Some("Restart" | RESTART_ALL)) {
        return Verdict::Restart;
    }
    let policy = container.restart_policy.as_deref().or(spec::of(pod).restart_policy.as_deref()).unwrap_or("Always");
    match (policy, succeeded) {
        ("Never", true) | ("OnFailure", true) => Verdict::Done,
        ("Never", false) => Verdict::Failed,
        _ => Verdict::Restart,
    }
}

/// Whether this end of a container begins the whole pod anew, in its sandbox (KEP-5532).
pub fn resets_pod(container: &Container, exit_code: i32) -> bool {
    matching_action(container, exit_code) == Some(RESTART_ALL)
}

/// Whether some end of some container would.
pub(crate) fn may_reset(pod: &Pod) -> bool {
    let mut rules = spec::containers(pod).flat_map(|(_, container)| container.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == RESTART_ALL)
}

/// The first rule whose exit codes match decides (KEP-5307).
fn matching_action(container: &Container, exit_code: i32) -> Option<&str> {
    let rules = container.restart_policy_rules.iter().flatten();
    let mut matching = rules.filter(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
            if codes.operator == "NotIn" { !listed } else { listed }
        })
    });
    matching.next().map(|rule| rule.action.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodSpec;

    fn check(policy: &str, role: Role, code: i32, expect: Verdict) {
        let pod =
            Pod { spec: Some(PodSpec { restart_policy: Some(policy.into()), ..PodSpec::default() }), ..Pod::default() };
        let restart_policy = (role == Role::Sidecar).then(|| "Always".to_owned());
        let container = Container { restart_policy, ..Container::default() };
        assert_eq!(after_exit(&pod, role, &container, code), expect, "{policy} {role:?} {code}");
    }

    #[test]
    fn policies() {
        check("Always", Role::Main, 0, Verdict::Restart);
        check("OnFailure", Role::Main, 0, Verdict::Done);
        check("OnFailure", Role::Main, 1, Verdict::Restart);
        check("Never", Role::Main, 0, Verdict::Done);
        check("Never", Role::Main, 1, Verdict::Failed);
        check("Always", Role::Init, 0, Verdict::Done);
        check("Always", Role::Init, 1, Verdict::Restart);
        check("Never", Role::Init, 1, Verdict::Failed);
        check("Never", Role::Sidecar, 1, Verdict::Restart);
        check("Always", Role::Ephemeral, 1, Verdict::Done);
    }
}
