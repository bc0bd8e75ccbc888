//! Specifications of others, and plans that a keeper is sent.

use fuzz::Target;

use crate::oci::Spec;
use crate::{ExecOptions, ExecPlan, HostFacts, LaunchPlan};

const fn target(name: &'static str, words: &'static [&'static str]) -> Target {
    Target { name, root: env!("CARGO_MANIFEST_DIR"), words, memory_max: 32 << 20, meter: sys::meter::peak_of }
}

/// The kind of a message, without what it is about.
fn words(error: &impl std::fmt::Display) -> String {
    error.to_string().chars().filter(|one| one.is_ascii_lowercase() || *one == ' ').take(100).collect()
}

fn facts() -> HostFacts {
    HostFacts {
        capabilities: u64::MAX,
        unified_cgroups: false,
        cgroup_hierarchies: vec![("pids".to_owned(), vec!["pids".to_owned()])],
        root_is_initramfs: false,
        in_user_namespace: false,
        apparmor: true,
        selinux: false,
    }
}

const WORDS: &[&str] = &[
    "null",
    "{}",
    "[]",
    "-1",
    "18446744073709551615",
    "\"/../..\"",
    "\"\\u0000\"",
    "\"SCMP_ACT_NOTIFY\"",
    "\"op\":\"SCMP_CMP_MASKED_EQ\"",
    "\"rbind\",\"rprivate\"",
    "\"type\":\"bind\"",
];

/// What is planned survives the way to the keeper.
#[test]
fn fuzz_oci_config() {
    let facts = facts();
    target("oci_config", WORDS).run(|input| {
        let spec: Spec = match serde_json::from_slice(input) {
            Ok(spec) => spec,
            Err(error) => return (words(&error), None, None),
        };
        let _ = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref()).map(crate::device_rules);
        let exec = spec.process.as_ref().map(|process| {
            let plan = crate::exec_plan(process, ExecOptions { container: &spec, facts: &facts });
            plan.map(|plan| assert!(ExecPlan::decode(&plan.encode()).is_ok())).map_err(|error| words(&error))
        });
        let planned = crate::plan(&spec, &facts);
        if let Ok(plan) = &planned {
            assert!(LaunchPlan::decode(&plan.encode()).as_ref() == Ok(plan));
        }
        (String::new(), Some(planned.map(|plan| plan.sources.len()).map_err(|error| words(&error))), exec)
    });
}

#[test]
fn fuzz_launch_plan() {
    target("launch_plan", &["\u{0}\u{0}\u{0}\u{0}", "\u{1}", "/proc"]).run(|input| {
        let launch = LaunchPlan::decode(input).map(|plan| plan.sources.len());
        let exec = ExecPlan::decode(input).is_ok();
        (launch.map_err(|error| std::mem::discriminant(&error)), exec)
    });
}
