use super::*;
use crate::oci::{Mount, Namespace, Process, Root, Spec};

fn spec() -> Spec {
    let namespaces = [NamespaceKind::Mount, NamespaceKind::Pid, NamespaceKind::Cgroup];
    let fresh = namespaces.map(|kind| Namespace { kind, path: String::new() });
    let joined = Namespace { kind: NamespaceKind::Network, path: "/proc/1/ns/net".to_owned() };
    Spec {
        process: Some(Process {
            args: vec!["sh".to_owned()],
            env: vec!["A=1".to_owned(), "PATH=/bin:/usr/bin/".to_owned(), "A=2".to_owned()],
            cwd: "/".to_owned(),
            ..Process::default()
        }),
        root: Some(Root { path: "rootfs".into(), readonly: true }),
        mounts: vec![mount("/proc", "proc", "proc", &["nosuid"]), mount("/dev", "tmpfs", "tmpfs", &["mode=755"])],
        linux: Some(oci::Linux { namespaces: fresh.into_iter().chain([joined]).collect(), ..oci::Linux::default() }),
        ..Spec::default()
    }
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|word| (*word).to_owned()).collect(),
        ..Mount::default()
    }
}

fn facts() -> HostFacts {
    HostFacts { capabilities: sys::caps::ALL, unified_cgroups: true, ..HostFacts::default() }
}

#[test]
fn programs_come_from_the_containers_path_and_the_last_of_equal_names_counts() {
    let plan = plan(&spec(), &facts()).unwrap();
    let texts = |list: &[std::ffi::CString]| -> Vec<String> {
        list.iter().map(|text| text.to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(&plan.process.programs), ["/bin/sh", "/usr/bin/sh"]);
    assert_eq!(texts(&plan.process.environment), ["PATH=/bin:/usr/bin/", "A=2"]);
}

#[test]
fn namespaces_are_made_or_joined() {
    let plan = plan(&spec(), &facts()).unwrap();
    assert_eq!(plan.new_namespaces, namespace::MOUNT | namespace::PID | namespace::CGROUP);
    assert_eq!(plan.joins, [NamespaceKind::Network]);
}

#[test]
fn capabilities_that_the_node_lacks_are_left_out_and_named() {
    let mut spec = spec();
    let names = vec!["CAP_SYS_ADMIN".to_owned(), "CAP_KILL".to_owned()];
    let sets = oci::Capabilities { bounding: names.clone(), permitted: names, ..oci::Capabilities::default() };
    spec.process.as_mut().unwrap().capabilities = Some(sets);
    let plan = plan(&spec, &HostFacts { capabilities: 1 << 5, ..facts() }).unwrap();
    assert_eq!(plan.process.capabilities.permitted, 1 << 5);
    assert_eq!(plan.warnings, [Warning::Capabilities(1 << 21)]);
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    let mut spec = spec();
    spec.mounts.push(mount("/a/../../etc", "bind", "/etc", &["rbind"]));
    assert!(plan(&spec, &facts()).unwrap_err().to_string().contains("/a/../../etc"));
}

#[test]
fn a_plan_survives_its_bytes() {
    let mut spec = spec();
    spec.mounts.push(mount("/data", "bind", "/srv/data", &["rbind", "ro", "rslave"]));
    let plan = plan(&spec, &facts()).unwrap();
    assert_eq!(LaunchPlan::decode(&plan.encode()).unwrap(), plan);
}

#[test]
fn a_host_name_needs_a_namespace() {
    let spec = Spec { hostname: "pod".to_owned(), ..spec() };
    assert!(plan(&spec, &facts()).unwrap_err().to_string().contains("UTS"));
}
