//! Whether a container that has ended is to run again.

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::spec::{self, Role};
use crate::view::{ContainerRecord, Run};

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

/// As [`after_exit`], of a run that may have been ended to begin again with other resources.
pub fn after_run(pod: &Pod, role: Role, container: &Container, record: Option<&ContainerRecord>, run: &Run) -> Verdict {
    if record.is_some_and(|record| record.resizing.as_ref() == Some(&run.id)) {
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
    if rule_restarts(container, exit_code) {
        return Verdict::Restart;
    }
    let policy = container.restart_policy.as_deref().or(spec::of(pod).restart_policy.as_deref()).unwrap_or("Always");
    match (policy, succeeded) {
        ("Never", true) | ("OnFailure", true) => Verdict::Done,
        ("Never", false) => Verdict::Failed,
        _ => Verdict::Restart,
    }
}

/// The first rule whose exit codes match decides (KEP-5307).
fn rule_restarts(container: &Container, exit_code: i32) -> bool {
    let rules = container.restart_policy_rules.iter().flatten();
    let mut matching = rules.filter(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
            if codes.operator == "NotIn" { !listed } else { listed }
        })
    });
    matching.next().is_some_and(|rule| rule.action == "Restart")
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
