use super::*;
use serde_json::json;

fn config(root: &Path) -> Config {
    Config {
        paths: Paths { root: root.join("kubelet"), logs: root.join("logs") },
        cgroup_root: "node".into(),
        cgroup_driver: qos::Driver::Cgroupfs,
        node: NodeFacts { name: "n".into(), memory_bytes: 1 << 30, ..NodeFacts::default() },
        dns: ClusterDns { servers: vec!["10.96.0.10".into()], domain: "cluster.local".into() },
        host_dns: v1::DnsConfig::default(),
        seccomp_default: false,
        swap: Swap::WithMemory,
        shared_swap_bytes: 0,
        rules: qos::Rules { huge_pages: vec!["2MB".into(), "1GB".into()], ..qos::Rules::default() },
    }
}

fn pod(spec: serde_json::Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "labels": {"app": "web"}, "annotations": {"a": "b"}},
        "spec": spec,
    }))
    .unwrap()
}

fn generate(pod: &Pod, user: ImageUser) -> Result<v1::ContainerConfig, GenerateError> {
    with_request(pod, &user, container_config)
}

fn with_request<T>(pod: &Pod, user: &ImageUser, run: impl FnOnce(&Config, &Request<'_>) -> T) -> T {
    let root = tempfile::tempdir().unwrap();
    let (role, container) = spec::containers(pod).next().unwrap();
    let request = Request {
        pod,
        role,
        container,
        attempt: 2,
        image_ref: "sha256:abc",
        image_user: user,
        ips: &["10.85.0.9".into()],
        mounts: &[],
        volumes: &BTreeMap::new(),
        target: None,
        users: None,
        store: &Store::new(),
    };
    run(&config(root.path()), &request)
}

#[test]
fn the_hash_is_upstreams() {
    // The expected numbers were computed by upstream's HashContainer.
    for (name, image, expect) in
        [("web", "nginx<1>&", 0x1349_f19c), ("ai-service", "myrepo/ai-service:latest", 0x2369_abc1)]
    {
        let container = Container { name: name.into(), image: Some(image.into()), ..Container::default() };
        assert_eq!(container_hash(&container), expect);
    }
}

#[test]
fn a_sandbox() {
    let root = Path::new("/r");
    let pod = pod(json!({
        "hostname": "h", "subdomain": "s", "shareProcessNamespace": true,
        "securityContext": {"fsGroup": 7, "supplementalGroups": [8], "sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}]},
        "containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 8080, "protocol": "UDP"}],
            "resources": {"requests": {"cpu": "500m"}}}]}));
    let made = sandbox_config(&config(root), &pod, 3, None).unwrap();
    let metadata = made.metadata.unwrap();
    assert_eq!((metadata.name.as_str(), metadata.attempt), ("web", 3));
    assert_eq!((made.hostname.as_str(), made.log_directory.as_str()), ("h", "/r/logs/shop_web_u1"));
    assert_eq!(made.labels["app"], "web");
    assert_eq!(made.labels[label::POD_UID], "u1");
    assert_eq!(made.annotations["a"], "b");
    assert_eq!((made.port_mappings[0].host_port, made.port_mappings[0].protocol), (8080, 1));
    let linux = made.linux.unwrap();
    assert_eq!(linux.cgroup_parent, "/node/kubepods/burstable/podu1");
    assert_eq!(linux.sysctls["net.ipv4.tcp_syncookies"], "1");
    let security = linux.security_context.unwrap();
    assert_eq!(security.supplemental_groups, [7, 8]);
    assert_eq!(security.namespace_options.unwrap().pid, i32::from(v1::NamespaceMode::Pod));
}

#[test]
fn a_container() {
    let pod = pod(json!({
        "terminationGracePeriodSeconds": 5,
        "securityContext": {"runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{
            "name": "c", "image": "nginx", "command": ["sh", "-c"], "args": ["echo $(A)"], "env": [{"name": "A", "value": "1"}],
            "ports": [{"containerPort": 80}],
            "securityContext": {"runAsGroup": 5, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}},
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi", "hugepages-2Mi": "4Mi"}}}]}));
    let made = generate(&pod, ImageUser::Id(0)).unwrap();
    assert_eq!((made.command, made.args), (vec!["sh".to_owned(), "-c".to_owned()], vec!["echo 1".to_owned()]));
    assert_eq!(made.log_path, "c/2.log");
    assert_eq!(made.annotations[annotation::RESTART_COUNT], "2");
    assert_eq!(made.annotations[annotation::TERMINATION_GRACE_PERIOD], "5");
    assert_eq!(made.annotations[annotation::PORTS], r#"[{"containerPort":80}]"#);
    let paths: Vec<_> = made.mounts.iter().map(|mount| mount.container_path.as_str()).collect();
    assert_eq!(paths, ["/etc/hosts", "/dev/termination-log"]);
    let linux = made.linux.unwrap();
    let resources = linux.resources.unwrap();
    assert_eq!((resources.cpu_shares, resources.cpu_quota, resources.cpu_period), (102, 50_000, 100_000));
    assert_eq!((resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes), (128 << 20, 128 << 20));
    assert_eq!(resources.oom_score_adj, 938);
    let pages: Vec<_> = resources.hugepage_limits.iter().map(|page| page.limit).collect();
    assert_eq!(pages, [4 << 20, 0]);
    let security = linux.security_context.unwrap();
    assert_eq!((security.run_as_user.unwrap().value, security.run_as_group.unwrap().value), (1000, 5));
    assert!(security.no_new_privs && security.masked_paths.contains(&"/proc/kcore".to_owned()));
    assert_eq!(security.seccomp.unwrap().profile_type, 0);
    assert_eq!(security.capabilities.unwrap().drop_capabilities, ["ALL"]);
}

#[test]
fn non_root_is_held_against_the_image() {
    let with = |user: serde_json::Value| {
        pod(json!({"containers": [{"name": "c", "securityContext": {"runAsNonRoot": true, "runAsUser": user}}]}))
    };
    let failure = |pod: &Pod, user| generate(pod, user).map_err(|error| (error.reason(), error.to_string()));
    let none = with(json!(null));
    assert!(generate(&with(json!(5)), ImageUser::Id(0)).is_ok());
    assert!(generate(&none, ImageUser::Id(33)).is_ok());
    let (reason, text) = failure(&none, ImageUser::Id(0)).unwrap_err();
    assert_eq!(reason, "CreateContainerConfigError");
    assert_eq!(text, r#"container has runAsNonRoot and image will run as root (pod: "web_shop(u1)", container: c)"#);
    assert!(failure(&none, ImageUser::Name("www".into())).unwrap_err().1.contains("non-numeric user (www)"));
    assert!(failure(&with(json!(0)), ImageUser::Id(1)).unwrap_err().1.contains("runAsUser breaks non-root policy"));
}

#[test]
fn what_no_program_can_be_given_is_an_error_of_the_container() {
    let twice = (1..=20).map(|n| json!({"name": format!("A{n}"), "value": format!("$(A{0})$(A{0})", n - 1)}));
    let env: Vec<_> = std::iter::once(json!({"name": "A0", "value": "0123456789abcdef"})).chain(twice).collect();
    let fails = |container: serde_json::Value| {
        let error = generate(&pod(json!({"containers": [container]})), ImageUser::Id(0)).unwrap_err();
        assert_eq!(error.reason(), "CreateContainerConfigError");
        assert!(error.to_string().contains("128 KiB, which no program can be given"), "{error}");
    };
    fails(json!({"name": "c", "env": env}));
    fails(json!({"name": "c", "env": env[..13], "args": ["$(A12)$(A12)"]}));
}

#[test]
fn files_are_made_and_kept() {
    let pod = pod(json!({"hostAliases": [{"ip": "192.0.2.1", "hostnames": ["x"]}], "containers": [{"name": "c"}]}));
    with_request(&pod, &ImageUser::Id(0), |config, request| {
        prepare_files(config, request).unwrap();
        let hosts = fs::read_to_string(config.paths.hosts_file("u1")).unwrap();
        assert!(hosts.contains("10.85.0.9\tweb\n") && hosts.ends_with("192.0.2.1\tx\n"));
        let message = config.paths.termination_message("u1", "c", 2);
        fs::write(&message, "said").unwrap();
        let earlier = [0, 1].map(|attempt| config.paths.termination_message("u1", "c", attempt));
        earlier.iter().for_each(|path| fs::write(path, "").unwrap());
        prepare_files(config, request).unwrap();
        assert_eq!(fs::read_to_string(&message).unwrap(), "said");
        assert_eq!(earlier.map(|path| path.exists()), [false, true]);
        assert!(config.paths.logs.join("shop_web_u1/c").is_dir());
    });
}

#[test]
fn burstable_containers_share_swap_by_what_they_ask_for() {
    let root = tempfile::tempdir().unwrap();
    let config = Config { swap: Swap::Alone, shared_swap_bytes: 1 << 29, ..config(root.path()) };
    let swap = |priority: i32, resources: serde_json::Value| {
        let pod =
            pod(json!({"priority": priority, "containers": [{"name": "c", "resources": resources}, {"name": "d"}]}));
        let (role, container) = spec::containers(&pod).next().unwrap();
        super::resources(&config, &pod, role, container).unified[SWAP_MAX].clone()
    };
    let asking = json!({"requests": {"memory": "256Mi"}});
    assert_eq!(swap(0, asking.clone()), (128 << 20).to_string());
    assert_eq!(swap(2_000_000_000, asking), "0", "it is critical");
    for bounded in [json!({}), json!({"limits": {"memory": "256Mi"}}), json!({"requests": {"memory": "2Gi"}})] {
        assert_eq!(swap(0, bounded.clone()), "0", "{bounded}");
    }
}
