use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cri::v1::security_profile::ProfileType;
use executor::oci::{IdMapping, Namespace, NamespaceKind};
use proptest::prelude::*;

use super::*;
use crate::record::RecordedLabels;
use crate::selinux::SeLinux;

/// What a configuration is made from; every test changes the part that it is about.
struct Case {
    config: v1::ContainerConfig,
    context: v1::LinuxContainerSecurityContext,
    resources: Option<v1::LinuxContainerResources>,
    sandbox: v1::PodSandboxConfig,
    options: v1::NamespaceOption,
    privileged_sandbox: bool,
    image: image::spec::ExecutionConfig,
    user: ResolvedUser,
    prepared: Prepared,
    files: SandboxFiles,
    namespaces: BTreeMap<NamespaceKind, String>,
    host: Host,
    labels: Option<Labels>,
}

impl Default for Case {
    fn default() -> Self {
        use NamespaceKind::{Ipc, Network, Pid, User, Uts};
        let namespaces = [Network, Ipc, Uts, Pid, User].map(|kind| (kind, format!("pod:{kind:?}")));
        Self {
            config: v1::ContainerConfig { command: vec!["/run".into()], ..v1::ContainerConfig::default() },
            context: v1::LinuxContainerSecurityContext::default(),
            resources: None,
            sandbox: v1::PodSandboxConfig { hostname: "pod".into(), ..v1::PodSandboxConfig::default() },
            options: v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() },
            privileged_sandbox: false,
            image: image::spec::ExecutionConfig::default(),
            user: ResolvedUser { uid: 0, gid: 0, groups: vec![0], home: "/root".into() },
            prepared: Prepared { hostname: "node".into(), ..Prepared::default() },
            files: SandboxFiles {
                hostname: Some("/run/s/hostname".into()),
                hosts: Some("/run/s/hosts".into()),
                resolv_conf: Some("/run/s/resolv.conf".into()),
                shm: Some("/run/s/shm".into()),
            },
            namespaces: namespaces.into(),
            host: Host {
                facts: HostFacts { capabilities: sys::caps::ALL, unified_cgroups: true, ..HostFacts::default() },
                hugetlb: true,
                ..Host::default()
            },
            labels: None,
        }
    }
}

impl Case {
    fn make(self) -> Result<ContainerSpec, SpecError> {
        let own = v1::LinuxContainerSecurityContext { namespace_options: Some(self.options.clone()), ..self.context };
        let linux = v1::LinuxContainerConfig { resources: self.resources, security_context: Some(own) };
        let config = v1::ContainerConfig { linux: Some(linux), ..self.config };
        let context = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(self.options),
            privileged: self.privileged_sandbox,
            ..Default::default()
        };
        let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
        let made = container_spec(&ContainerInput {
            id: "c1",
            sandbox_id: "s1",
            config: &config,
            sandbox: &v1::PodSandboxConfig { linux: Some(linux), ..self.sandbox },
            image: &image::ImageConfig { config: self.image, ..Default::default() },
            user: &self.user,
            prepared: &self.prepared,
            files: &self.files,
            namespaces: &self.namespaces,
            cgroup_path: "pods/c1",
            host: &self.host,
            labels: self.labels.as_ref(),
        })?;
        // Whatever we make, the executor can plan, and as JSON it says the same.
        made.launch_plan("c", Path::new("/b"), &self.host.facts).unwrap_or_else(|error| panic!("{error}"));
        let json = serde_json::to_string(&made).unwrap();
        let read: ContainerSpec = serde_json::from_str(&json).unwrap();
        assert_eq!(read, ContainerSpec { warnings: Vec::new(), ..made.clone() });
        Ok(made)
    }

    fn oci(self) -> oci::Spec {
        self.make().unwrap_or_else(|error| panic!("{error}")).oci
    }

    fn process(self) -> oci::Process {
        self.oci().process.unwrap()
    }

    fn linux(self) -> oci::Linux {
        self.oci().linux.unwrap()
    }

    fn mounted(self, at: &str) -> Option<oci::Mount> {
        self.oci().mounts.into_iter().find(|mount| mount.destination == at)
    }

    #[track_caller]
    fn refused(self, part: &str) {
        let error = self.make().expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn arguments_come_from_request_and_image() {
    let check = |command: &[&str], args: &[&str], entrypoint: &[&str], cmd: &[&str], expect: &[&str]| {
        let mut case = Case::default();
        (case.config.command, case.config.args) = (strings(command), strings(args));
        (case.image.entrypoint, case.image.cmd) = (strings(entrypoint), strings(cmd));
        match case.make() {
            Ok(made) => assert_eq!(made.oci.process.unwrap().args, expect),
            Err(error) => assert!(matches!(error, SpecError::NoCommand) && expect.is_empty(), "{error}"),
        }
    };
    check(&[], &[], &["e"], &["c"], &["e", "c"]);
    check(&[], &["a"], &["e"], &["c"], &["e", "a"]);
    check(&["x"], &[], &["e"], &["c"], &["x"]);
    check(&["x"], &["a"], &["e"], &["c"], &["x", "a"]);
    check(&[], &[], &[], &["c"], &["c"]);
    check(&[], &["a"], &[], &["c"], &["a"]);
    check(&[], &[], &[""], &["c"], &["c"]);
    check(&[], &[], &[], &[], &[]);
}

fn variable(key: &str, value: &[u8]) -> v1::KeyValue {
    v1::KeyValue { key: key.into(), value: value.into() }
}

#[test]
fn the_environment_is_the_images_then_the_requests() {
    let mut case = Case::default();
    case.image.env = strings(&["PATH=/image", "A=image", "B=image", "EMPTY"]);
    case.config.envs = vec![variable("A", b"1"), variable("C", b"x=y"), variable("A", b"2"), variable("TERM", b"dumb")];
    case.config.tty = true;
    let expect = ["PATH=/image", "TERM=dumb", "HOSTNAME=pod", "A=2", "B=image", "C=x=y", "HOME=/root"];
    assert_eq!(case.process().env, expect);
}

#[test]
fn an_empty_environment_has_the_defaults() {
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let mut case = Case::default();
    case.sandbox.hostname.clear();
    case.config.envs = vec![variable("HOME", b"")];
    assert_eq!(case.process().env, [path, "HOSTNAME=node", "HOME=/root"]);
    let mut case = Case::default();
    case.image.env = strings(&["HOME=/elsewhere"]);
    assert_eq!(case.process().env, [path, "HOSTNAME=pod", "HOME=/elsewhere"]);
    let mut case = Case::default();
    case.config.envs = vec![variable("A=B", b"")];
    case.refused("no name of a variable");
}

#[test]
fn values_need_not_be_text() {
    let mut case = Case::default();
    case.config.envs = vec![variable("KEY", b"\xff\xfe"), variable("TERM", b"dumb")];
    let facts = case.host.facts.clone();
    let made = case.make().unwrap();
    let bytes = |list: &[CString]| list.iter().map(|one| one.as_bytes().to_vec()).collect::<Vec<_>>();
    let launched = bytes(&made.launch_plan("c", Path::new("/b"), &facts).unwrap().process.environment);
    assert!(launched.contains(&b"KEY=\xff\xfe".to_vec()), "{launched:?}");
    let executed = bytes(&made.exec_plan(&strings(&["/sh"]), true, &facts).unwrap().process.environment);
    assert!(executed.contains(&b"KEY=\xff\xfe".to_vec()), "{executed:?}");
    assert!(executed.contains(&b"TERM=xterm".to_vec()) && !executed.contains(&b"TERM=dumb".to_vec()), "{executed:?}");
    assert_eq!(made.raw_environment.len(), made.oci.process.unwrap().env.len());
}

#[test]
fn an_exec_is_the_containers_process_with_other_arguments() {
    let mut case =
        Case { user: ResolvedUser { uid: 5, gid: 6, groups: vec![6, 7], home: "/".into() }, ..Case::default() };
    case.config.working_dir = "/work".into();
    case.context.no_new_privs = true;
    let container = case.oci();
    let process = exec_process(&container, &strings(&["ls", "-l"]), true);
    assert_eq!((process.args.join(" "), process.terminal), ("ls -l".to_owned(), true));
    assert_eq!(process.env.last().map(String::as_str), Some("TERM=xterm"));
    let own = container.process.unwrap();
    assert_eq!((process.user, process.cwd, process.capabilities), (own.user, own.cwd, own.capabilities));
    assert!(process.no_new_privileges);
}

#[test]
fn the_working_directory_is_the_requests_or_the_images() {
    for (request, image, expect) in
        [("", "", Some("/")), ("", "/i", Some("/i")), ("/r", "/i", Some("/r")), ("r", "/i", None), ("", "i", None)]
    {
        let mut case = Case::default();
        case.config.working_dir = request.into();
        case.image.working_dir = image.into();
        match expect {
            Some(expect) => assert_eq!(case.process().cwd, expect),
            None => case.refused("is not an absolute path"),
        }
    }
}

#[test]
fn the_user_is_the_resolved_one() {
    let case = Case { user: ResolvedUser { uid: 5, gid: 6, groups: vec![6, 7], home: "/".into() }, ..Case::default() };
    let user = case.process().user;
    assert_eq!((user.uid, user.gid, user.additional_gids), (5, 6, vec![6, 7]));
}

const DEFAULTS: &str = "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID \
    SETPCAP SETUID SYS_CHROOT";

#[test]
fn capabilities_are_added_and_dropped() {
    let check = |add: &[&str], drop: &[&str], ambient: &[&str], expect: &str, raised: &str| {
        let mut case = Case::default();
        case.context.capabilities = Some(v1::Capability {
            add_capabilities: strings(add),
            drop_capabilities: strings(drop),
            add_ambient_capabilities: strings(ambient),
        });
        let sets = case.process().capabilities.unwrap();
        let names = |set: &[String]| {
            let mut names: Vec<_> = set.iter().map(|name| name.strip_prefix("CAP_").unwrap()).collect();
            names.sort_unstable();
            names.join(" ")
        };
        assert_eq!(names(&sets.bounding), expect, "+{add:?} -{drop:?}");
        assert_eq!((&sets.effective, &sets.permitted), (&sets.bounding, &sets.bounding));
        assert_eq!((names(&sets.ambient), names(&sets.inheritable)), (raised.to_owned(), raised.to_owned()));
    };
    let all = |without: &str| {
        let mut names = sys::caps::names(sys::caps::ALL);
        names.retain(|name| name != without);
        names.sort_unstable();
        names.iter().map(|name| name.strip_prefix("CAP_").unwrap()).collect::<Vec<_>>().join(" ")
    };
    check(&[], &[], &[], DEFAULTS, "");
    check(
        &["SYS_TIME", "CAP_BPF"],
        &["kill", "CAP_MKNOD"],
        &[],
        &{
            let mut names: Vec<_> = DEFAULTS.split(' ').filter(|name| !matches!(*name, "KILL" | "MKNOD")).collect();
            names.extend(["SYS_TIME", "BPF"]);
            names.sort_unstable();
            names.join(" ")
        },
        "",
    );
    check(&["NET_ADMIN"], &["ALL"], &[], "NET_ADMIN", "");
    check(&["ALL"], &["CHOWN"], &[], &all("CAP_CHOWN"), "");
    check(&["all"], &["all"], &[], "", "");
    check(&[], &["ALL"], &["NET_BIND_SERVICE"], "NET_BIND_SERVICE", "NET_BIND_SERVICE");
    let mut case = Case::default();
    case.context.capabilities = Some(v1::Capability { add_capabilities: strings(&["FLY"]), ..Default::default() });
    case.refused("\"FLY\" is no capability");
}

#[test]
fn all_means_what_the_node_has() {
    let mut case = Case::default();
    case.host.facts.capabilities = 1 << 5 | 1 << 21;
    case.context.capabilities = Some(v1::Capability { add_capabilities: strings(&["ALL"]), ..Default::default() });
    assert_eq!(case.process().capabilities.unwrap().bounding, ["CAP_KILL", "CAP_SYS_ADMIN"]);
}

fn privileged() -> Case {
    let mut case = Case { privileged_sandbox: true, ..Case::default() };
    case.context.privileged = true;
    case.context.masked_paths = strings(&["/proc/kcore"]);
    case.context.readonly_paths = strings(&["/proc/sys"]);
    case.context.seccomp = Some(v1::SecurityProfile::default());
    case
}

#[test]
fn a_privileged_container_is_confined_by_nothing() {
    let mut case = privileged();
    case.prepared.devices = vec![device("/dev/fuse", 10, 229)];
    let spec = case.oci();
    let (process, linux) = (spec.process.unwrap(), spec.linux.unwrap());
    assert_eq!(process.capabilities.unwrap().bounding.len(), sys::caps::names(sys::caps::ALL).len());
    assert!(linux.masked_paths.is_empty() && linux.readonly_paths.is_empty() && linux.seccomp.is_none());
    assert!(!linux.namespaces.iter().any(|one| one.kind == NamespaceKind::Cgroup));
    assert_eq!(linux.devices.len(), 1);
    let rules = linux.resources.unwrap().devices;
    assert!(rules.len() == 1 && rules[0].allow && rules[0].kind.is_empty(), "{rules:?}");
    let options = |at: &str| spec.mounts.iter().find(|mount| mount.destination == at).unwrap().options.clone();
    assert!(options("/sys").contains(&"rw".to_owned()));
    assert!(!options("/sys/fs/cgroup").contains(&"ro".to_owned()));
}

#[test]
fn a_privileged_container_needs_a_privileged_sandbox() {
    Case { privileged_sandbox: false, ..privileged() }.refused("not allowed in a sandbox that is not privileged");
}

#[test]
fn paths_are_covered_as_asked() {
    let mut case = Case::default();
    case.context.masked_paths = strings(&["/proc/kcore"]);
    case.context.readonly_paths = strings(&["/proc/sys"]);
    case.context.readonly_rootfs = true;
    let spec = case.oci();
    assert!(spec.root.unwrap().readonly);
    let linux = spec.linux.unwrap();
    assert_eq!((linux.masked_paths, linux.readonly_paths), (strings(&["/proc/kcore"]), strings(&["/proc/sys"])));
    let linux = Case::default().linux();
    assert!(linux.masked_paths.is_empty() && linux.readonly_paths.is_empty(), "there are no defaults of our own");
}

fn profile(kind: ProfileType, name: &str) -> Option<v1::SecurityProfile> {
    Some(v1::SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() })
}

#[test]
fn system_calls_are_filtered_as_asked() {
    let filter = |seccomp: Option<v1::SecurityProfile>, old: &str| {
        let mut case = Case::default();
        case.context.seccomp = seccomp;
        #[expect(deprecated, reason = "older kubelets send it")]
        old.clone_into(&mut case.context.seccomp_profile_path);
        case.prepared.seccomp = Some(oci::Seccomp { default_action: "SCMP_ACT_LOG".into(), ..oci::Seccomp::default() });
        case.make().map(|made| made.oci.linux.unwrap().seccomp.map(|filter| filter.default_action))
    };
    let is = |found: Result<Option<String>, SpecError>, expect: Option<&str>| {
        assert_eq!(found.unwrap().as_deref(), expect);
    };
    is(filter(None, ""), None);
    is(filter(profile(ProfileType::Unconfined, ""), ""), None);
    is(filter(profile(ProfileType::RuntimeDefault, ""), ""), Some("SCMP_ACT_ERRNO"));
    is(filter(profile(ProfileType::Localhost, "/p"), ""), Some("SCMP_ACT_LOG"));
    is(filter(profile(ProfileType::Unconfined, ""), "runtime/default"), None);
    is(filter(None, "runtime/default"), Some("SCMP_ACT_ERRNO"));
    is(filter(None, "unconfined"), None);
    is(filter(None, "localhost//p"), Some("SCMP_ACT_LOG"));
    assert!(filter(None, "nonsense").is_err());
    assert!(filter(profile(ProfileType::Localhost, ""), "").is_err());
    assert!(filter(profile(ProfileType::RuntimeDefault, "/p"), "").is_err());
    assert!(filter(Some(v1::SecurityProfile { profile_type: 9, ..Default::default() }), "").is_err());
}

#[test]
fn apparmor_profiles_are_chosen_or_refused() {
    use security::AppArmorRequest::{Default as Own, Loaded, Nothing};
    let asked = |apparmor: Option<v1::SecurityProfile>, old: &str, privileged: bool, enabled: bool| {
        let mut context = v1::LinuxContainerSecurityContext { apparmor, privileged, ..Default::default() };
        #[expect(deprecated, reason = "older kubelets send it")]
        old.clone_into(&mut context.apparmor_profile);
        security::apparmor_request(&context, enabled)
    };
    let default = || profile(ProfileType::RuntimeDefault, "");
    let loaded = || Loaded("mine".to_owned());
    for (apparmor, old, privileged, expect) in [
        (None, "", false, Own { asked: false }),
        (None, "", true, Nothing),
        (None, "runtime/default", false, Own { asked: true }),
        (None, "unconfined", false, Nothing),
        (None, "localhost/mine", false, loaded()),
        (default(), "localhost/mine", false, Own { asked: true }),
        (default(), "", true, Nothing),
        (profile(ProfileType::Unconfined, ""), "runtime/default", false, Nothing),
        (profile(ProfileType::Localhost, "mine"), "", true, loaded()),
        (profile(ProfileType::Localhost, "localhost/mine"), "", false, loaded()),
    ] {
        assert_eq!(asked(apparmor.clone(), old, privileged, true).unwrap(), expect, "{apparmor:?} {old} {privileged}");
        match (asked(apparmor, old, privileged, false), expect) {
            (Ok(Nothing), Nothing | Own { asked: false }) => {}
            (Err(error), _) => assert!(error.to_string().contains("apparmor is not enabled"), "{error}"),
            (found, expect) => panic!("{found:?} without AppArmor, where {expect:?} is asked for"),
        }
    }
    assert!(asked(profile(ProfileType::Localhost, ""), "", false, true).is_err());
    assert!(asked(None, "mine", false, true).is_err());
    let mut case = Case::default();
    case.prepared.apparmor = "mine".to_owned();
    case.host.facts.apparmor = true;
    assert_eq!(case.process().apparmor_profile, "mine");
}

#[test]
fn selinux_labels_are_given_or_left_out_aloud() {
    let with = |labelled: bool, privileged: bool| {
        let mut case = Case::default();
        case.context.selinux_options = Some(v1::SeLinuxOption { r#type: "spc_t".into(), ..Default::default() });
        (case.context.privileged, case.privileged_sandbox) = (privileged, privileged);
        case.host.facts.selinux = labelled;
        let record = RecordedLabels { process: "u:r:p:s0".into(), file: "u:o:f:s0".into() };
        case.labels = SeLinux::default().recorded(Some(&record).filter(|_| labelled));
        let made = case.make().unwrap();
        (made.oci.process.unwrap().selinux_label, made.oci.linux.unwrap().mount_label, made.warnings)
    };
    let (process, file, warnings) = with(true, false);
    assert_eq!((process.as_str(), file.as_str(), warnings.len()), ("u:r:p:s0", "u:o:f:s0", 0));
    let (process, file, warnings) = with(true, true);
    assert_eq!((process.as_str(), file.as_str(), warnings.len()), ("", "u:o:f:s0", 1));
    let (process, file, warnings) = with(false, false);
    assert_eq!((process.as_str(), file.as_str(), warnings.len()), ("", "", 1));
    assert!(warnings[0].contains("::spc_t:"), "{warnings:?}");
    assert!(Case::default().make().unwrap().warnings.is_empty());
}

#[test]
fn cdi_devices_by_annotation_are_refused() {
    let mut case = Case::default();
    case.config.annotations = [("cdi.k8s.io/x".to_owned(), "vendor.com/nic=1".to_owned())].into();
    case.refused("vendor.com/nic=1");
}

#[test]
fn what_cdi_devices_bring() {
    let mut case = Case::default();
    case.prepared.cdi.env = vec!["DEVICE=0".into()];
    case.prepared.cdi.gids = vec![44];
    case.prepared.cdi.mounts = vec![oci::Mount {
        destination: "/lib/vendor".into(),
        source: "/lib".into(),
        options: strings(&["bind", "ro"]),
        ..oci::Mount::default()
    }];
    let made = case.make().unwrap();
    let process = made.oci.process.unwrap();
    assert!(process.env.contains(&"DEVICE=0".to_owned()));
    assert!(process.user.additional_gids.contains(&44));
    assert!(made.oci.mounts.iter().any(|mount| mount.destination == "/lib/vendor"));
}

fn device(path: &str, major: u32, minor: u32) -> HostDevice {
    let node = oci::Device { path: path.into(), kind: "c".into(), major, minor, ..oci::Device::default() };
    HostDevice { host_path: "/dev/on-host".into(), node, access: "rw".into() }
}

#[test]
fn devices_are_made_and_allowed() {
    let mut case = Case::default();
    case.prepared.devices = vec![device("/dev/mine", 10, 200)];
    let linux = case.linux();
    assert_eq!(linux.devices[0].path, "/dev/mine");
    let rules = linux.resources.unwrap().devices;
    assert!(!rules[0].allow && rules[0].major.is_none(), "everything else is denied first");
    let rule = &rules[1];
    assert_eq!((rule.allow, rule.major, rule.minor, rule.access.as_str()), (true, Some(10), Some(200), "rw"));
}

fn in_user_namespace() -> Case {
    let mapping = vec![v1::IdMapping { host_id: 65536, container_id: 0, length: 65536 }];
    let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: mapping.clone(), gids: mapping };
    let mut case = Case::default();
    case.options.userns_options = Some(users);
    case
}

#[test]
fn a_user_namespace_is_joined_and_mounts_go_through_its_mapping() {
    let mut case = in_user_namespace();
    case.prepared.devices = vec![device("/dev/mine", 10, 200)];
    let mapping = vec![v1::IdMapping { host_id: 65536, container_id: 0, length: 65536 }];
    let mapped = v1::Mount { uid_mappings: mapping.clone(), gid_mappings: mapping, ..plain_mount("/data") };
    case.config.mounts = vec![mapped, plain_mount("/raw")];
    let spec = case.oci();
    let linux = spec.linux.unwrap();
    assert_eq!(linux.uid_mappings, [IdMapping { container_id: 0, host_id: 65536, size: 65536 }]);
    assert!(linux.namespaces.contains(&Namespace { kind: NamespaceKind::User, path: "pod:User".into() }));
    assert!(linux.devices.is_empty());
    let find = |at: &str| spec.mounts.iter().find(|mount| mount.destination == at).unwrap();
    let is_mapped = |at: &str| find(at).options.contains(&"idmap".to_owned());
    assert!(is_mapped("/data") && is_mapped("/etc/hosts") && !is_mapped("/raw") && !is_mapped("/dev/shm"));
    assert_eq!((find("/dev/mine").kind.as_str(), find("/dev/mine").source.as_str()), ("bind", "/dev/on-host"));
}

#[test]
fn mappings_that_differ_are_refused() {
    let mut case = in_user_namespace();
    let mapping = vec![v1::IdMapping { host_id: 1, container_id: 0, length: 1 }];
    case.config.mounts = vec![v1::Mount { uid_mappings: mapping, ..plain_mount("/data") }];
    case.refused("not those of the sandbox");
    let mut case = in_user_namespace();
    let mapping = case.options.userns_options.clone().unwrap().uids;
    case.options.userns_options.as_mut().unwrap().gids = [mapping.clone(), mapping].concat();
    case.refused("exactly one mapping");
}

#[test]
fn a_user_namespace_in_the_hosts_network_sees_the_hosts_sysfs() {
    let mut case = in_user_namespace();
    case.options.network = v1::NamespaceMode::Node.into();
    let sysfs = case.mounted("/sys").unwrap();
    assert_eq!((sysfs.kind.as_str(), sysfs.source.as_str()), ("bind", "/sys"));
    assert!(sysfs.options.contains(&"rro".to_owned()));
}

#[test]
fn namespaces_are_the_pods_the_hosts_or_the_containers_own() {
    use NamespaceKind::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    let check = |network, pid, ipc, expect: &[(NamespaceKind, &str)]| {
        let mut case = Case::default();
        (case.options.network, case.options.pid, case.options.ipc) = (network, pid, ipc);
        let found = case.linux().namespaces;
        let found: Vec<_> = found.iter().map(|one| (one.kind, one.path.as_str())).collect();
        assert_eq!(found, expect);
    };
    let (pod, container, node, target) = (0, 1, 2, 3);
    let pods = [(Mount, ""), (Network, "pod:Network"), (Uts, "pod:Uts"), (Ipc, "pod:Ipc")];
    check(pod, container, pod, &[&pods[..], &[(Pid, ""), (Cgroup, "")]].concat());
    check(pod, pod, pod, &[&pods[..], &[(Pid, "pod:Pid"), (Cgroup, "")]].concat());
    check(pod, target, pod, &[&pods[..], &[(Pid, "pod:Pid"), (Cgroup, "")]].concat());
    check(node, node, node, &[(Mount, ""), (Cgroup, "")]);
    let mut case = Case::default();
    case.namespaces.remove(&Pid);
    case.options.pid = pod;
    case.refused("the sandbox was not made with");
    let mut case = Case::default();
    case.options.ipc = container;
    case.refused("neither POD nor NODE");
}

fn plain_mount(at: &str) -> v1::Mount {
    v1::Mount { container_path: at.into(), host_path: format!("/host{at}"), ..v1::Mount::default() }
}

#[test]
fn default_mounts() {
    let spec = Case::default().oci();
    let found: Vec<_> = spec
        .mounts
        .iter()
        .map(|mount| (mount.destination.as_str(), mount.kind.as_str(), mount.source.as_str()))
        .collect();
    let expect = [
        ("/proc", "proc", "proc"),
        ("/dev", "tmpfs", "tmpfs"),
        ("/dev/pts", "devpts", "devpts"),
        ("/dev/mqueue", "mqueue", "mqueue"),
        ("/sys", "sysfs", "sysfs"),
        ("/sys/fs/cgroup", "cgroup", "cgroup"),
        ("/etc/hostname", "bind", "/run/s/hostname"),
        ("/etc/hosts", "bind", "/run/s/hosts"),
        ("/etc/resolv.conf", "bind", "/run/s/resolv.conf"),
        ("/dev/shm", "bind", "/run/s/shm"),
    ];
    assert_eq!(found, expect);
    let read_only = |spec: &oci::Spec| {
        let ro = spec.mounts.iter().filter(|mount| mount.options.contains(&"ro".to_owned()));
        ro.map(|mount| mount.destination.clone()).collect::<Vec<_>>()
    };
    assert_eq!(read_only(&spec), ["/sys", "/sys/fs/cgroup"]);
    let mut case = Case::default();
    case.context.readonly_rootfs = true;
    let expect = ["/sys", "/sys/fs/cgroup", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
    assert_eq!(read_only(&case.oci()), expect);
}

#[test]
fn shared_memory_is_the_hosts_the_pods_or_the_containers() {
    let mut case = Case::default();
    case.options.ipc = v1::NamespaceMode::Node.into();
    assert_eq!(case.mounted("/dev/shm").unwrap().source, "/dev/shm");
    let mut case = Case::default();
    case.files.shm = None;
    let own = case.mounted("/dev/shm").unwrap();
    assert_eq!(own.kind, "tmpfs");
    assert!(own.options.contains(&"size=65536k".to_owned()));
}

#[test]
fn mounts_of_the_request_replace_ours() {
    let mut case = Case::default();
    case.config.mounts = vec![plain_mount("/etc/hosts/"), plain_mount("/dev//shm"), plain_mount("/proc")];
    let spec = case.oci();
    for at in ["/etc/hosts", "/dev/shm", "/proc"] {
        let there: Vec<_> = spec
            .mounts
            .iter()
            .filter(|one| std::path::Path::new(&one.destination) == std::path::Path::new(at))
            .collect();
        assert_eq!(there.len(), 1, "{at}: {there:?}");
        assert!(there[0].source.starts_with("/host"), "{at}");
    }
}

#[test]
fn a_dev_of_the_request_stands_alone() {
    let mut case = Case::default();
    case.config.mounts = vec![plain_mount("/dev"), plain_mount("/dev/log")];
    let spec = case.oci();
    let below: Vec<_> = spec.mounts.iter().filter(|one| one.destination.starts_with("/dev")).collect();
    assert!(below.iter().all(|one| one.source.starts_with("/host")), "{below:?}");
}

#[test]
fn parents_are_mounted_before_their_children() {
    let mut case = Case::default();
    case.config.mounts = vec![plain_mount("/a/b/c"), plain_mount("/a"), plain_mount("/a/b/"), plain_mount("/z")];
    let spec = case.oci();
    let order: Vec<_> = spec.mounts.iter().map(|one| one.destination.as_str()).skip(6).collect();
    let place = |at: &str| order.iter().position(|one| *one == at).unwrap();
    assert!(place("/a") < place("/a/b/") && place("/a/b/") < place("/a/b/c"), "{order:?}");
}

fn options_of(wanted: v1::Mount) -> Result<Vec<String>, SpecError> {
    let mut case = Case::default();
    case.config.mounts = vec![wanted];
    let made = case.make()?;
    Ok(made.oci.mounts.into_iter().find(|mount| mount.destination == "/data").unwrap().options)
}

#[test]
fn options_of_mounts() {
    let propagation = |of: v1::MountPropagation| v1::Mount { propagation: of.into(), ..plain_mount("/data") };
    let ro = |recursive_read_only| v1::Mount { readonly: true, recursive_read_only, ..plain_mount("/data") };
    let check = |wanted: v1::Mount, expect: &[&str]| assert_eq!(options_of(wanted).unwrap(), expect);
    check(plain_mount("/data"), &["rbind", "rprivate"]);
    check(propagation(v1::MountPropagation::PropagationHostToContainer), &["rbind", "rslave"]);
    check(propagation(v1::MountPropagation::PropagationBidirectional), &["rbind", "rshared"]);
    check(ro(false), &["rbind", "rprivate", "ro"]);
    check(ro(true), &["rbind", "rprivate", "rro"]);
    let words = strings(&["noexec", "nosuid"]);
    check(v1::Mount { mount_options: words, ..plain_mount("/data") }, &["rbind", "rprivate", "noexec", "nosuid"]);
    let refused = |wanted: v1::Mount, part: &str| {
        let error = options_of(wanted).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(v1::Mount { propagation: 7, ..plain_mount("/data") }, "no propagation");
    refused(v1::Mount { mount_options: strings(&["suid"]), ..plain_mount("/data") }, "suid");
    refused(v1::Mount { readonly: false, ..ro(true) }, "conflicts");
    refused(v1::Mount { propagation: v1::MountPropagation::PropagationBidirectional.into(), ..ro(true) }, "private");
    refused(plain_mount("/"), "whole root");
    refused(plain_mount("//."), "whole root");
}

#[test]
fn images_are_mounted_by_name() {
    let mut case = Case::default();
    let image = |name: &str, sub: &str, at: &str| v1::Mount {
        container_path: at.into(),
        image: Some(v1::ImageSpec { image: name.into(), ..Default::default() }),
        image_sub_path: sub.into(),
        readonly: true,
        ..v1::Mount::default()
    };
    case.config.mounts = vec![image("one", "", "/one"), image("two", "sub/dir", "/two")];
    case.config.mounts[1].mount_options = strings(&["noexec"]);
    let made = case.make().unwrap();
    for (at, name, sub, option) in [("/one", "one", "", false), ("/two", "two", "sub/dir", true)] {
        let mount = made.oci.mounts.iter().find(|mount| mount.destination == at).unwrap();
        assert_eq!(made.images[&mount.source], ImageMount { image: name.into(), sub_path: sub.into() });
        assert_eq!(mount.options.contains(&"noexec".to_owned()), option, "{:?}", mount.options);
        assert_eq!(mount.options[..5], ["rbind", "rprivate", "ro", "nosuid", "nodev"]);
        assert_eq!(made.image_at(at), Some(name));
    }
    assert_eq!(made.image_at("/proc"), None);
    let mut writable = Case::default();
    writable.config.mounts = vec![v1::Mount { readonly: false, ..image("one", "", "/one") }];
    let error = writable.make().unwrap_err().to_string();
    assert!(error.contains("read-only"), "{error}");
}

#[test]
fn volumes_of_the_image_are_the_roots_own() {
    let mut case = Case::default();
    case.image.volumes = ["/data", "relative", "/taken"].map(str::to_owned).into();
    case.config.mounts = vec![plain_mount("/taken")];
    let spec = case.oci();
    let source = |at: &str| spec.mounts.iter().find(|mount| mount.destination == at).map(|mount| mount.source.as_str());
    assert_eq!((source("/data"), source("/relative"), source("/taken")), (Some(""), Some(""), Some("/host/taken")));
}

#[test]
fn limits_become_those_of_the_control_group() {
    let case = Case {
        resources: Some(v1::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 20,
            oom_score_adj: 900,
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
            unified: [("memory.high".to_owned(), "500".to_owned())].into(),
            memory_swap_limit_in_bytes: 0,
        }),
        ..Case::default()
    };
    let spec = case.oci();
    assert_eq!(spec.process.unwrap().oom_score_adj, Some(900));
    let linux = spec.linux.unwrap();
    assert_eq!(linux.cgroups_path, "pods/c1");
    let resources = linux.resources.unwrap();
    let limits = executor::limits(&resources).unwrap();
    assert_eq!(
        (limits.cpu_shares, limits.cpu_quota_us, limits.cpu_period_us),
        (Some(512), Some(50_000), Some(100_000))
    );
    assert_eq!((limits.memory_bytes, limits.memory_swap_bytes), (Some(1 << 20), Some(1 << 20)));
    assert_eq!((limits.cpuset_cpus.as_deref(), limits.cpuset_mems.as_deref()), (Some("0-1"), Some("0")));
    assert_eq!(limits.hugepages, [("2MB".to_owned(), 0)]);
    assert_eq!(limits.unified, [("memory.high".to_owned(), "500".to_owned())]);
}

#[test]
fn limits_that_are_not_asked_for_are_absent() {
    let resources = resources(&v1::LinuxContainerResources::default(), &Host::default()).unwrap();
    assert_eq!(executor::limits(&resources).unwrap(), sys::cgroup::Limits::default());
    assert_eq!(Case::default().process().oom_score_adj, Some(0));
}

#[test]
fn limits_that_cannot_be_are_refused() {
    let with = |change: fn(&mut v1::LinuxContainerResources, &mut Host)| {
        let mut case = Case::default();
        let mut resources = v1::LinuxContainerResources::default();
        change(&mut resources, &mut case.host);
        case.resources = Some(resources);
        case
    };
    with(|wanted, _| wanted.cpu_shares = -1).refused("cpu_shares");
    with(|wanted, _| wanted.cpu_period = -1).refused("cpu_period");
    with(|wanted, _| wanted.oom_score_adj = 1001).refused("oom_score_adj");
    with(|wanted, _| wanted.unified = [("../x".to_owned(), "1".to_owned())].into()).refused("unified");
    with(|wanted, host| {
        wanted.unified = [("memory.high".to_owned(), "1".to_owned())].into();
        host.facts.unified_cgroups = false;
    })
    .refused("version 2");
    let pages = |limit| vec![v1::HugepageLimit { page_size: "2MB".into(), limit }];
    let without = |limit| {
        let mut case = Case::default();
        case.host.hugetlb = false;
        case.resources = Some(v1::LinuxContainerResources { hugepage_limits: pages(limit), ..Default::default() });
        case
    };
    without(4096).refused("2MB huge pages");
    assert!(without(0).linux().resources.unwrap().hugepage_limits.is_empty());
}

#[test]
fn the_container_is_annotated_as_under_containerd() {
    let mut case = Case::default();
    case.sandbox.metadata =
        Some(v1::PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 0 });
    case.config.metadata = Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 });
    case.config.image =
        Some(v1::ImageSpec { image: "sha256:1".into(), user_specified_image: "i".into(), ..Default::default() });
    let notes = case.oci().annotations;
    for (name, value) in
        [("sandbox-id", "s1"), ("sandbox-namespace", "n"), ("container-name", "c"), ("image-name", "i")]
    {
        assert_eq!(notes[&format!("io.kubernetes.cri.{name}")], value);
    }
}

#[test]
fn stop_signals() {
    let check = |wanted: v1::Signal, image: &str, expect: Option<i32>| {
        let config = v1::ContainerConfig { stop_signal: wanted.into(), ..v1::ContainerConfig::default() };
        assert_eq!(stop_signal(&config, image).ok(), expect, "{wanted:?} {image}");
    };
    let none = v1::Signal::RuntimeDefault;
    check(none, "", Some(15));
    check(none, "SIGQUIT", Some(3));
    check(none, "usr1", Some(10));
    check(none, "37", Some(37));
    check(none, "SIGRTMIN+3", Some(37));
    check(none, "RTMAX-1", Some(63));
    check(none, "SIGRTMIN+99", None);
    check(none, "0", None);
    check(none, "SIGNONE", None);
    check(v1::Signal::Sigint, "SIGQUIT", Some(2));
    check(v1::Signal::Sigrtminplus1, "", Some(35));
    for value in 1..=65 {
        let Ok(signal) = v1::Signal::try_from(value) else { panic!("{value} is a signal of CRI") };
        let config = v1::ContainerConfig { stop_signal: value, ..v1::ContainerConfig::default() };
        assert!(stop_signal(&config, "").is_ok(), "{signal:?}");
        assert_eq!(stop_signal_of_image(&config, "SIGHUP"), signal);
    }
    let config = v1::ContainerConfig::default();
    assert_eq!(stop_signal_of_image(&config, "SIGRTMIN+3"), v1::Signal::Sigrtminplus3);
    assert_eq!(stop_signal_of_image(&config, ""), v1::Signal::RuntimeDefault);
}

proptest! {
    /// Whatever names and values come, each name is there once, with the value that came last.
    #[test]
    fn the_last_of_equal_names_counts(
        image in proptest::collection::vec(("[A-C]", "[a-z=]{0,3}"), 0..6),
        request in proptest::collection::vec(("[A-D]", proptest::collection::vec(1u8.., 0..3)), 0..6),
    ) {
        let mut case = Case::default();
        case.image.env = image.iter().map(|(name, value)| format!("{name}={value}")).collect();
        case.config.envs = request.iter().map(|(name, value)| variable(name, value)).collect();
        let facts = case.host.facts.clone();
        let plan = case.make().unwrap().launch_plan("c", Path::new("/b"), &facts).unwrap();
        let image = image.iter().map(|(name, value)| (name, value.as_bytes()));
        let all: Vec<_> = image.chain(request.iter().map(|(name, value)| (name, value.as_slice()))).collect();
        for name in ["A", "B", "C", "D"] {
            let prefix = format!("{name}=");
            let found: Vec<_> =
                plan.process.environment.iter().filter_map(|one| one.as_bytes().strip_prefix(prefix.as_bytes())).collect();
            let last = all.iter().rev().find(|(other, _)| *other == name).map(|(_, value)| *value);
            prop_assert_eq!(found, Vec::from_iter(last));
        }
    }

    /// Mounts come parents first, whatever the order of the request, and none of its mounts is lost.
    #[test]
    fn mounts_come_parents_first(paths in proptest::collection::vec("(/[ab]){1,4}/?", 0..8)) {
        let mut case = Case::default();
        case.config.mounts = paths.iter().map(|path| plain_mount(path)).collect();
        let mounts = case.oci().mounts;
        let ours: Vec<_> = mounts.iter().filter(|one| one.source.starts_with("/host")).collect();
        prop_assert_eq!(ours.len(), paths.len());
        for (at, one) in ours.iter().enumerate() {
            let path = std::path::Path::new(&one.destination);
            for earlier in &ours[..at] {
                let earlier = std::path::Path::new(&earlier.destination);
                prop_assert!(earlier == path || !earlier.starts_with(path), "{:?} before {:?}", earlier, path);
            }
        }
    }

    /// Files of users come from images: whatever they hold, resolving ends in numbers or an error.
    #[test]
    fn any_file_of_users_is_read(passwd in "[a-c:0-9,#+ \n]{0,80}", user in "[a-c0-9:]{0,5}") {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        for name in ["passwd", "group"] {
            std::fs::write(dir.path().join("etc").join(name), std::ffi::OsStr::new(&passwd).as_bytes()).unwrap();
        }
        let root = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        if let Ok(found) = resolve_user(std::os::fd::AsFd::as_fd(&root), None, &user) {
            prop_assert!(found.groups.contains(&found.gid) && found.groups.is_sorted());
        }
    }
}
