//! Rules for pods and pod templates.

use std::collections::{BTreeMap, HashSet};

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EnvFromSource, EnvVar, KeyToPath, LifecycleHandler, Pod, PodSpec, Probe,
    ResourceRequirements, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Errors, NameRule, Validate, check_metadata, names};
use crate::manifests::path::FieldPath;

impl Validate for Pod {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        if let Some(spec) = &self.spec {
            check_pod_spec(spec, &FieldPath::root().field("spec"), errors);
        }
    }
}

/// Which list a container stands in.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Init,
    Main,
}

pub(super) fn check_pod_spec(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    check_volumes(spec, path, errors);
    if spec.containers.is_empty() {
        errors.required(&path.field("containers"), "");
    }
    check_containers(spec, path, errors);
    check_host_ports(spec, path, errors);
    errors.one_of(&path.field("restartPolicy"), spec.restart_policy.as_deref(), &["Always", "OnFailure", "Never"]);
    const DNS: [&str; 4] = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    errors.one_of(&path.field("dnsPolicy"), spec.dns_policy.as_deref(), &DNS);
    check_dns_config(spec, path, errors);
    if let Some(seconds) = spec.active_deadline_seconds {
        errors.in_range(&path.field("activeDeadlineSeconds"), seconds, 1, i64::from(i32::MAX));
    }
    errors.not_negative(&path.field("terminationGracePeriodSeconds"), spec.termination_grace_period_seconds);
    check_pod_names(spec, path, errors);
    check_pod_security(spec, path, errors);
}

fn check_pod_names(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    for (field, value) in [("hostname", &spec.hostname), ("subdomain", &spec.subdomain)] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            errors.each_fault(&path.field(field), value, names::dns_label(value));
        }
    }
    if let Some(name) = &spec.service_account_name {
        errors.each_fault(&path.field("serviceAccountName"), name, names::dns_subdomain(name));
    }
    for (index, alias) in spec.host_aliases.iter().flatten().enumerate() {
        let path = path.field("hostAliases").index(index);
        if alias.ip.parse::<std::net::IpAddr>().is_err() {
            errors.invalid(
                &path.field("ip"),
                &alias.ip,
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            );
        }
        for (index, hostname) in alias.hostnames.iter().flatten().enumerate() {
            errors.each_fault(&path.field("hostnames").index(index), hostname, names::dns_subdomain(hostname));
        }
    }
}

fn check_pod_security(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    if spec.share_process_namespace == Some(true) && spec.host_pid == Some(true) {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.invalid(&path.field("shareProcessNamespace"), true, detail);
    }
    let Some(security) = &spec.security_context else { return };
    let path = path.field("securityContext");
    let ids =
        [("runAsUser", security.run_as_user), ("runAsGroup", security.run_as_group), ("fsGroup", security.fs_group)];
    for (field, id) in ids {
        check_id(&path.field(field), id, errors);
    }
    for (index, id) in security.supplemental_groups.iter().flatten().enumerate() {
        check_id(&path.field("supplementalGroups").index(index), Some(*id), errors);
    }
    errors.one_of(
        &path.field("fsGroupChangePolicy"),
        security.fs_group_change_policy.as_deref(),
        &["Always", "OnRootMismatch"],
    );
    let policies = ["Merge", "Strict"];
    errors.one_of(&path.field("supplementalGroupsPolicy"), security.supplemental_groups_policy.as_deref(), &policies);
    let mut seen = HashSet::new();
    for (index, sysctl) in security.sysctls.iter().flatten().enumerate() {
        let path = path.field("sysctls").index(index).field("name");
        if sysctl.name.is_empty() {
            errors.required(&path, "");
        } else if !seen.insert(&sysctl.name) {
            errors.duplicate(&path, &sysctl.name);
        }
    }
}

fn check_id(path: &FieldPath, id: Option<i64>, errors: &mut Errors) {
    if let Some(id) = id.filter(|id| !(0..=i64::from(i32::MAX)).contains(id)) {
        errors.invalid(path, id, "must be between 0 and 2147483647, inclusive");
    }
}

fn check_dns_config(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    let path = path.field("dnsConfig");
    let servers = spec.dns_config.iter().flat_map(|config| config.nameservers.iter().flatten());
    let servers: Vec<_> = servers.collect();
    if spec.dns_policy.as_deref() == Some("None") && servers.is_empty() {
        let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        errors.required(&path.field("nameservers"), detail);
    }
    if servers.len() > 3 {
        errors.invalid(&path.field("nameservers"), &servers, "must not have more than 3 nameservers");
    }
    for (index, server) in servers.iter().enumerate() {
        if server.parse::<std::net::IpAddr>().is_err() {
            let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.invalid(&path.field("nameservers").index(index), server, detail);
        }
    }
    if spec.dns_config.as_ref().is_some_and(|config| config.searches.as_ref().is_some_and(|list| list.len() > 32)) {
        errors.invalid(&path.field("searches"), "…", "must not have more than 32 search paths");
    }
}

// Volumes

fn check_volumes(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (index, volume) in spec.volumes.iter().flatten().enumerate() {
        let path = path.field("volumes").index(index);
        if volume.name.is_empty() {
            errors.required(&path.field("name"), "");
        } else {
            errors.each_fault(&path.field("name"), &volume.name, names::dns_label(&volume.name));
        }
        if !seen.insert(&volume.name) {
            errors.duplicate(&path.field("name"), &volume.name);
        }
        check_volume_source(volume, &path, errors);
    }
}

/// The names of the sources that are set, in the API's spelling.
fn volume_sources(volume: &Volume) -> Vec<String> {
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(volume) else { return Vec::new() };
    fields.into_iter().map(|(name, _)| name).filter(|name| name != "name").collect()
}

/// What this node can mount; the rest needs a cluster's storage drivers.
const SOURCES: [&str; 9] = [
    "configMap",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "hostPath",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

fn check_volume_source(volume: &Volume, path: &FieldPath, errors: &mut Errors) {
    let sources = volume_sources(volume);
    for extra in sources.iter().skip(1) {
        errors.forbidden(&path.field(extra), "may not specify more than 1 volume type");
    }
    for source in sources.iter().filter(|source| !SOURCES.contains(&source.as_str())) {
        let detail = format!("this node alone mounts {}; a storage driver needs a cluster", SOURCES.join(", "));
        errors.forbidden(&path.field(source), &detail);
    }
    if let Some(host_path) = &volume.host_path {
        check_host_path(host_path.path.as_str(), host_path.type_.as_deref(), &path.field("hostPath"), errors);
    }
    if let Some(secret) = &volume.secret {
        let path = path.field("secret");
        required_text(secret.secret_name.as_deref(), &path.field("secretName"), errors);
        check_mode(secret.default_mode, &path.field("defaultMode"), errors);
        check_items(secret.items.iter().flatten(), &path, errors);
    }
    if let Some(config_map) = &volume.config_map {
        let path = path.field("configMap");
        required_text(Some(&config_map.name), &path.field("name"), errors);
        check_mode(config_map.default_mode, &path.field("defaultMode"), errors);
        check_items(config_map.items.iter().flatten(), &path, errors);
    }
    if let Some(claim) = &volume.persistent_volume_claim {
        required_text(Some(&claim.claim_name), &path.field("persistentVolumeClaim.claimName"), errors);
    }
    if let Some(image) = &volume.image {
        required_text(image.reference.as_deref(), &path.field("image.reference"), errors);
    }
    if let Some(limit) = volume.empty_dir.as_ref().and_then(|empty| empty.size_limit.as_ref()) {
        errors.quantity(&path.field("emptyDir.sizeLimit"), &limit.0);
    }
    check_projected(volume, path, errors);
}

fn check_projected(volume: &Volume, path: &FieldPath, errors: &mut Errors) {
    let Some(projected) = &volume.projected else { return };
    let path = path.field("projected");
    check_mode(projected.default_mode, &path.field("defaultMode"), errors);
    for (index, source) in projected.sources.iter().flatten().enumerate() {
        let path = path.field("sources").index(index);
        if let Some(secret) = &source.secret {
            required_text(Some(&secret.name), &path.field("secret.name"), errors);
            check_items(secret.items.iter().flatten(), &path.field("secret"), errors);
        }
        if let Some(config_map) = &source.config_map {
            required_text(Some(&config_map.name), &path.field("configMap.name"), errors);
            check_items(config_map.items.iter().flatten(), &path.field("configMap"), errors);
        }
    }
}

fn check_host_path(host_path: &str, kind: Option<&str>, path: &FieldPath, errors: &mut Errors) {
    required_text(Some(host_path), &path.field("path"), errors);
    no_backsteps(host_path, &path.field("path"), errors);
    const TYPES: [&str; 8] =
        ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
    errors.one_of(&path.field("type"), kind, &TYPES);
}

fn check_items<'a>(items: impl Iterator<Item = &'a KeyToPath>, path: &FieldPath, errors: &mut Errors) {
    for (index, item) in items.enumerate() {
        let path = path.field("items").index(index);
        required_text(Some(&item.key), &path.field("key"), errors);
        required_text(Some(&item.path), &path.field("path"), errors);
        relative(&item.path, &path.field("path"), errors);
        check_mode(item.mode, &path.field("mode"), errors);
    }
}

fn check_mode(mode: Option<i32>, path: &FieldPath, errors: &mut Errors) {
    if let Some(mode) = mode.filter(|mode| !(0..=0o777).contains(mode)) {
        errors.invalid(path, mode, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

fn required_text(text: Option<&str>, path: &FieldPath, errors: &mut Errors) {
    if text.unwrap_or("").is_empty() {
        errors.required(path, "");
    }
}

fn no_backsteps(text: &str, path: &FieldPath, errors: &mut Errors) {
    if text.split('/').any(|part| part == "..") {
        errors.invalid(path, text, "must not contain '..'");
    }
}

fn relative(text: &str, path: &FieldPath, errors: &mut Errors) {
    if text.starts_with('/') {
        errors.invalid(path, text, "must be a relative path");
    }
    no_backsteps(text, path, errors);
}

// Containers

fn check_containers(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    let volumes: Vec<&str> = spec.volumes.iter().flatten().map(|volume| volume.name.as_str()).collect();
    let mut seen = HashSet::new();
    let init =
        spec.init_containers.iter().flatten().enumerate().map(|(index, container)| (Role::Init, index, container));
    let main = spec.containers.iter().enumerate().map(|(index, container)| (Role::Main, index, container));
    for (role, index, container) in init.chain(main) {
        let path = path.field(if role == Role::Init { "initContainers" } else { "containers" }).index(index);
        if !seen.insert(&container.name) && !container.name.is_empty() {
            errors.duplicate(&path.field("name"), &container.name);
        }
        check_container(container, role, &volumes, &path, errors);
        check_host_network_ports(spec, container, &path, errors);
    }
}

fn check_container(container: &Container, role: Role, volumes: &[&str], path: &FieldPath, errors: &mut Errors) {
    match container.name.as_str() {
        "" => errors.required(&path.field("name"), ""),
        name => errors.each_fault(&path.field("name"), name, names::dns_label(name)),
    }
    match container.image.as_deref().unwrap_or("") {
        "" => errors.required(&path.field("image"), ""),
        image if image != image.trim() => {
            errors.invalid(&path.field("image"), image, "must not have leading or trailing whitespace");
        }
        _ => {}
    }
    const PULL: [&str; 3] = ["Always", "IfNotPresent", "Never"];
    errors.one_of(&path.field("imagePullPolicy"), container.image_pull_policy.as_deref(), &PULL);
    const MESSAGE: [&str; 2] = ["FallbackToLogsOnError", "File"];
    errors.one_of(&path.field("terminationMessagePolicy"), container.termination_message_policy.as_deref(), &MESSAGE);
    check_ports(container.ports.iter().flatten(), &path.field("ports"), errors);
    check_env(container.env.iter().flatten(), &path.field("env"), errors);
    check_env_from(container.env_from.iter().flatten(), &path.field("envFrom"), errors);
    check_mounts(container.volume_mounts.iter().flatten(), volumes, &path.field("volumeMounts"), errors);
    if let Some(resources) = &container.resources {
        check_resources(resources, &path.field("resources"), errors);
    }
    if let Some(security) = &container.security_context {
        check_security(security, &path.field("securityContext"), errors);
    }
    check_restart_policy(container, role, path, errors);
    check_probes_and_hooks(container, role, path, errors);
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn check_restart_policy(container: &Container, role: Role, path: &FieldPath, errors: &mut Errors) {
    errors.one_of(&path.field("restartPolicy"), container.restart_policy.as_deref(), &["Always", "Never", "OnFailure"]);
    let rules = container.restart_policy_rules.iter().flatten().count();
    if rules > 0 && container.restart_policy.is_none() {
        errors.required(&path.field("restartPolicy"), "must specify restartPolicy when restart rules are used");
    }
    if rules > 0 && role == Role::Init && is_sidecar(container) {
        let detail = "restart rules are not allowed for init containers with restartPolicy Always";
        errors.forbidden(&path.field("restartPolicyRules"), detail);
    }
}

fn check_probes_and_hooks(container: &Container, role: Role, path: &FieldPath, errors: &mut Errors) {
    let probes = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    let plain_init = role == Role::Init && !is_sidecar(container);
    for (field, probe) in probes {
        let Some(probe) = probe else { continue };
        let path = path.field(field);
        if plain_init {
            errors.forbidden(&path, "may not be set for init containers without restartPolicy=Always");
        }
        check_probe(probe, field != "readinessProbe", container, &path, errors);
    }
    let Some(lifecycle) = &container.lifecycle else { return };
    if plain_init {
        errors.forbidden(&path.field("lifecycle"), "may not be set for init containers without restartPolicy=Always");
    }
    for (field, hook) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
        if let Some(hook) = hook {
            check_hook(hook, container, &path.field("lifecycle").field(field), errors);
        }
    }
}

fn check_probe(probe: &Probe, only_one_success: bool, container: &Container, path: &FieldPath, errors: &mut Errors) {
    let handlers = [probe.exec.is_some(), probe.http_get.is_some(), probe.tcp_socket.is_some(), probe.grpc.is_some()];
    check_handler_count(&handlers, path, errors);
    if let Some(http) = &probe.http_get {
        check_port_reference(&http.port, container, &path.field("httpGet.port"), errors);
        errors.one_of(&path.field("httpGet.scheme"), http.scheme.as_deref(), &["HTTP", "HTTPS"]);
    }
    if let Some(tcp) = &probe.tcp_socket {
        check_port_reference(&tcp.port, container, &path.field("tcpSocket.port"), errors);
    }
    if let Some(grpc) = &probe.grpc {
        errors.in_range(&path.field("grpc.port"), grpc.port.into(), 1, 65535);
    }
    if probe.exec.as_ref().is_some_and(|exec| exec.command.as_ref().is_none_or(Vec::is_empty)) {
        errors.required(&path.field("exec.command"), "");
    }
    let numbers = [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ];
    for (field, number) in numbers {
        errors.not_negative(&path.field(field), number.map(i64::from));
    }
    if let Some(threshold) = probe.success_threshold.filter(|threshold| only_one_success && *threshold > 1) {
        errors.invalid(&path.field("successThreshold"), threshold, "must be 1");
    }
    check_probe_grace(probe, only_one_success, path, errors);
}

fn check_probe_grace(probe: &Probe, may_have_grace: bool, path: &FieldPath, errors: &mut Errors) {
    let Some(grace) = probe.termination_grace_period_seconds else { return };
    let path = path.field("terminationGracePeriodSeconds");
    if !may_have_grace {
        errors.invalid(&path, grace, "must not be set for readinessProbes");
    } else if grace < 1 {
        errors.invalid(&path, grace, "must be greater than 0");
    }
}

fn check_handler_count(handlers: &[bool], path: &FieldPath, errors: &mut Errors) {
    match handlers.iter().filter(|set| **set).count() {
        1 => {}
        0 => errors.required(path, "must specify a handler type"),
        _ => errors.forbidden(path, "may not specify more than 1 handler type"),
    }
}

fn check_hook(hook: &LifecycleHandler, container: &Container, path: &FieldPath, errors: &mut Errors) {
    let handlers = [hook.exec.is_some(), hook.http_get.is_some(), hook.tcp_socket.is_some(), hook.sleep.is_some()];
    check_handler_count(&handlers, path, errors);
    if let Some(http) = &hook.http_get {
        check_port_reference(&http.port, container, &path.field("httpGet.port"), errors);
    }
    errors.not_negative(&path.field("sleep.seconds"), hook.sleep.as_ref().map(|sleep| sleep.seconds));
}

/// A named port is one of the container's; the API server leaves that to the kubelet, where it is only a failing probe.
fn check_port_reference(port: &IntOrString, container: &Container, path: &FieldPath, errors: &mut Errors) {
    match port {
        IntOrString::Int(number) => errors.in_range(path, (*number).into(), 1, 65535),
        IntOrString::String(name) => {
            let names: Vec<&str> = container.ports.iter().flatten().filter_map(|port| port.name.as_deref()).collect();
            if let Some(fault) = names::port_name(name) {
                errors.invalid(path, name, &fault);
            } else if !names.contains(&name.as_str()) {
                errors.not_found(path, name, &names);
            }
        }
    }
}

fn check_ports<'a>(ports: impl Iterator<Item = &'a ContainerPort>, path: &FieldPath, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (index, port) in ports.enumerate() {
        let path = path.index(index);
        if port.container_port == 0 {
            errors.required(&path.field("containerPort"), "");
        } else {
            errors.in_range(&path.field("containerPort"), port.container_port.into(), 1, 65535);
        }
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            errors.each_fault(&path.field("name"), name, names::port_name(name));
            if !seen.insert(name) {
                errors.duplicate(&path.field("name"), name);
            }
        }
        if let Some(host_port) = port.host_port.filter(|port| *port != 0) {
            errors.in_range(&path.field("hostPort"), host_port.into(), 1, 65535);
        }
        errors.one_of(&path.field("protocol"), port.protocol.as_deref(), &["SCTP", "TCP", "UDP"]);
    }
}

fn check_host_network_ports(spec: &PodSpec, container: &Container, path: &FieldPath, errors: &mut Errors) {
    if spec.host_network != Some(true) {
        return;
    }
    for (index, port) in container.ports.iter().flatten().enumerate() {
        if port.host_port.is_some_and(|host_port| host_port != port.container_port) {
            let detail = "must match `hostPort` when `hostNetwork` is true";
            errors.invalid(&path.field("ports").index(index).field("containerPort"), port.container_port, detail);
        }
    }
}

fn check_host_ports(spec: &PodSpec, path: &FieldPath, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (c, container) in spec.containers.iter().enumerate() {
        for (p, port) in container.ports.iter().flatten().enumerate() {
            let Some(host_port) = port.host_port.filter(|port| *port != 0) else { continue };
            let key = (port.protocol.clone(), port.host_ip.clone().unwrap_or_default(), host_port);
            if !seen.insert(key) {
                let protocol = port.protocol.as_deref().unwrap_or("TCP");
                let path = path.field("containers").index(c).field("ports").index(p).field("hostPort");
                errors.duplicate(&path, format!("{protocol}/{}/{host_port}", port.host_ip.as_deref().unwrap_or("")));
            }
        }
    }
}

fn check_env<'a>(env: impl Iterator<Item = &'a EnvVar>, path: &FieldPath, errors: &mut Errors) {
    for (index, variable) in env.enumerate() {
        let path = path.index(index);
        match variable.name.as_str() {
            "" => errors.required(&path.field("name"), ""),
            name => errors.each_fault(&path.field("name"), name, names::env_name(name)),
        }
        let Some(source) = &variable.value_from else { continue };
        let path = path.field("valueFrom");
        if variable.value.as_deref().is_some_and(|value| !value.is_empty()) {
            errors.invalid(&path, "", "may not be specified when `value` is not empty");
        }
        let sources = [
            source.field_ref.is_some(),
            source.resource_field_ref.is_some(),
            source.config_map_key_ref.is_some(),
            source.secret_key_ref.is_some(),
            source.file_key_ref.is_some(),
        ];
        exactly_one_source(&sources, &path, errors);
        if let Some(reference) = &source.config_map_key_ref {
            required_text(Some(&reference.key), &path.field("configMapKeyRef.key"), errors);
            required_text(Some(&reference.name), &path.field("configMapKeyRef.name"), errors);
        }
        if let Some(reference) = &source.secret_key_ref {
            required_text(Some(&reference.key), &path.field("secretKeyRef.key"), errors);
            required_text(Some(&reference.name), &path.field("secretKeyRef.name"), errors);
        }
        if let Some(reference) = &source.field_ref {
            check_downward_field(&reference.field_path, &path.field("fieldRef.fieldPath"), errors);
        }
    }
}

fn exactly_one_source(sources: &[bool], path: &FieldPath, errors: &mut Errors) {
    match sources.iter().filter(|set| **set).count() {
        1 => {}
        0 => errors.invalid(
            path,
            "",
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`",
        ),
        _ => errors.invalid(path, "", "may not have more than one field specified at a time"),
    }
}

fn check_downward_field(field: &str, path: &FieldPath, errors: &mut Errors) {
    const FIELDS: [&str; 9] = [
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "spec.serviceAccountName",
        "status.hostIP",
        "status.hostIPs",
        "status.podIP",
        "status.podIPs",
    ];
    let subscript =
        |prefix: &str| field.strip_prefix(prefix).is_some_and(|rest| rest.starts_with("['") && rest.ends_with("']"));
    match field {
        "" => errors.required(path, ""),
        _ if subscript("metadata.labels") || subscript("metadata.annotations") => {}
        _ => errors.one_of(path, Some(field), &FIELDS),
    }
}

fn check_env_from<'a>(sources: impl Iterator<Item = &'a EnvFromSource>, path: &FieldPath, errors: &mut Errors) {
    for (index, source) in sources.enumerate() {
        let path = path.index(index);
        match (&source.config_map_ref, &source.secret_ref) {
            (Some(reference), None) => required_text(Some(&reference.name), &path.field("configMapRef.name"), errors),
            (None, Some(reference)) => required_text(Some(&reference.name), &path.field("secretRef.name"), errors),
            (None, None) => errors.invalid(&path, "", "must specify one of: `configMapRef` or `secretRef`"),
            (Some(_), Some(_)) => errors.invalid(&path, "", "may not have more than one field specified at a time"),
        }
    }
}

fn check_mounts<'a>(
    mounts: impl Iterator<Item = &'a VolumeMount>,
    volumes: &[&str],
    path: &FieldPath,
    errors: &mut Errors,
) {
    let mut seen = HashSet::new();
    for (index, mount) in mounts.enumerate() {
        let path = path.index(index);
        match mount.name.as_str() {
            "" => errors.required(&path.field("name"), ""),
            name if !volumes.contains(&name) => errors.not_found(&path.field("name"), name, volumes),
            _ => {}
        }
        required_text(Some(&mount.mount_path), &path.field("mountPath"), errors);
        if !mount.mount_path.is_empty() && !seen.insert(&mount.mount_path) {
            errors.invalid(&path.field("mountPath"), &mount.mount_path, "must be unique");
        }
        let (sub_path, expression) =
            (mount.sub_path.as_deref().unwrap_or(""), mount.sub_path_expr.as_deref().unwrap_or(""));
        relative(sub_path, &path.field("subPath"), errors);
        relative(expression, &path.field("subPathExpr"), errors);
        if !sub_path.is_empty() && !expression.is_empty() {
            errors.invalid(&path.field("subPathExpr"), expression, "subPathExpr and subPath are mutually exclusive");
        }
        const PROPAGATION: [&str; 3] = ["Bidirectional", "HostToContainer", "None"];
        errors.one_of(&path.field("mountPropagation"), mount.mount_propagation.as_deref(), &PROPAGATION);
        const RECURSIVE: [&str; 3] = ["Disabled", "Enabled", "IfPossible"];
        errors.one_of(&path.field("recursiveReadOnly"), mount.recursive_read_only.as_deref(), &RECURSIVE);
    }
}

pub(super) fn check_resources(resources: &ResourceRequirements, path: &FieldPath, errors: &mut Errors) {
    let empty = BTreeMap::new();
    let limits = resources.limits.as_ref().unwrap_or(&empty);
    check_resource_list(limits, &path.field("limits"), errors);
    let requests = resources.requests.as_ref().unwrap_or(&empty);
    check_resource_list(requests, &path.field("requests"), errors);
    for (name, request) in requests {
        let Some(limit) = limits.get(name) else { continue };
        let (Some(asked), Some(allowed)) =
            (crate::quantity::Nano::parse(&request.0), crate::quantity::Nano::parse(&limit.0))
        else {
            continue;
        };
        if asked > allowed {
            let detail = format!("must be less than or equal to {name} limit of {}", limit.0);
            errors.invalid(&path.field("requests"), &request.0, &detail);
        }
    }
}

fn check_resource_list(list: &BTreeMap<String, Quantity>, path: &FieldPath, errors: &mut Errors) {
    const STANDARD: [&str; 3] = ["cpu", "ephemeral-storage", "memory"];
    for (name, quantity) in list {
        let path = path.key(name);
        let known = STANDARD.contains(&name.as_str()) || name.starts_with("hugepages-");
        if !known && !name.contains('/') {
            let remedy = super::nearest(name, &STANDARD).map(|name| format!("did you mean {name:?}?"));
            errors.push(&path, format!("Invalid value: {name:?}: must be a standard resource for containers"), remedy);
        }
        let Some(value) = errors.quantity(&path, &quantity.0) else { continue };
        if name != "cpu" && name != "memory" && name != "ephemeral-storage" && !value.is_whole() {
            errors.invalid(&path, &quantity.0, "must be an integer");
        }
    }
}

fn check_security(security: &SecurityContext, path: &FieldPath, errors: &mut Errors) {
    check_id(&path.field("runAsUser"), security.run_as_user, errors);
    check_id(&path.field("runAsGroup"), security.run_as_group, errors);
    errors.one_of(&path.field("procMount"), security.proc_mount.as_deref(), &["Default", "Unmasked"]);
    if security.allow_privilege_escalation == Some(false) {
        let path = path.field("allowPrivilegeEscalation");
        if security.privileged == Some(true) {
            errors.invalid(&path, false, "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
        }
        let added = security.capabilities.iter().flat_map(|capabilities| capabilities.add.iter().flatten());
        if added.into_iter().any(|name| name == "CAP_SYS_ADMIN" || name == "SYS_ADMIN") {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.invalid(&path, false, detail);
        }
    }
    let Some(seccomp) = &security.seccomp_profile else { return };
    let path = path.field("seccompProfile");
    errors.one_of(&path.field("type"), Some(&seccomp.type_), &["Localhost", "RuntimeDefault", "Unconfined"]);
    if seccomp.type_ == "Localhost" && seccomp.localhost_profile.is_none() {
        errors.required(&path.field("localhostProfile"), "must be set when seccomp type is Localhost");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::faults;
    use super::*;

    /// Checks a pod with one good container, changed by `container`, beside `spec`.
    #[track_caller]
    fn check(spec: serde_json::Value, container: serde_json::Value, expect: &[&str]) {
        let mut base = json!({"name": "c", "image": "i"});
        base.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [base]}});
        pod["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        assert_eq!(faults::<Pod>(pod), expect);
    }

    #[test]
    fn a_good_pod_has_no_fault() {
        check(
            json!({"volumes": [{"name": "v", "emptyDir": {}}], "hostAliases": [{"ip": "::1", "hostnames": ["a.b"]}]}),
            json!({
                "ports": [{"name": "http", "containerPort": 8000}],
                "livenessProbe": {"httpGet": {"port": "http"}},
                "readinessProbe": {"tcpSocket": {"port": 1}, "successThreshold": 2},
                "env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['x']"}}}],
                "volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "a/b"}],
                "resources": {"requests": {"cpu": "0.5"}, "limits": {"cpu": "500m", "nvidia.com/gpu": 1}}
            }),
            &[],
        );
    }

    #[test]
    fn a_pod_needs_containers() {
        assert_eq!(faults::<Pod>(json!({"metadata": {"name": "p"}})), ["spec.containers: Required value"]);
    }

    #[test]
    fn names_of_containers() {
        check(
            json!({"initContainers": [{"name": "c", "image": "i"}]}),
            json!({}),
            &["spec.containers[0].name: Duplicate value: \"c\""],
        );
        check(
            json!({}),
            json!({"name": "", "image": ""}),
            &["spec.containers[0].name: Required value", "spec.containers[0].image: Required value"],
        );
    }

    #[test]
    fn enumerations() {
        check(
            json!({"restartPolicy": "always"}),
            json!({"imagePullPolicy": "Alway"}),
            &[
                "spec.containers[0].imagePullPolicy: Unsupported value: \"Alway\": supported values: \"Always\", \"IfNotPresent\", \"Never\"",
                "spec.restartPolicy: Unsupported value: \"always\": supported values: \"Always\", \"OnFailure\", \"Never\"",
            ],
        );
    }

    #[test]
    fn probes_have_exactly_one_handler() {
        check(
            json!({}),
            json!({"livenessProbe": {}}),
            &["spec.containers[0].livenessProbe: Required value: must specify a handler type"],
        );
        check(
            json!({}),
            json!({"startupProbe": {"httpGet": {"port": 1}, "tcpSocket": {"port": 1}, "successThreshold": 2}}),
            &[
                "spec.containers[0].startupProbe: Forbidden: may not specify more than 1 handler type",
                "spec.containers[0].startupProbe.successThreshold: Invalid value: 2: must be 1",
            ],
        );
        check(
            json!({}),
            json!({"ports": [{"name": "http", "containerPort": 1}], "livenessProbe": {"httpGet": {"port": "htpp"}}}),
            &["spec.containers[0].livenessProbe.httpGet.port: Not found: \"htpp\""],
        );
    }

    #[test]
    fn mounts_refer_to_volumes() {
        check(
            json!({"volumes": [{"name": "data"}]}),
            json!({"volumeMounts": [{"name": "dat", "mountPath": "/a"}, {"name": "data", "mountPath": "/a", "subPath": "../x"}]}),
            &[
                "spec.containers[0].volumeMounts[0].name: Not found: \"dat\"",
                "spec.containers[0].volumeMounts[1].mountPath: Invalid value: \"/a\": must be unique",
                "spec.containers[0].volumeMounts[1].subPath: Invalid value: \"../x\": must not contain '..'",
            ],
        );
    }

    #[test]
    fn requests_fit_their_limits() {
        check(
            json!({}),
            json!({"resources": {"requests": {"cpu": "2", "memroy": "1"}, "limits": {"cpu": "1500m", "memory": "1 Gi"}}}),
            &[
                "spec.containers[0].resources.limits[memory]: Invalid value: \"1 Gi\": quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
                "spec.containers[0].resources.requests[memory]: Invalid value: \"1 Gi\": quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
                "spec.containers[0].resources.requests[memroy]: Invalid value: \"memroy\": must be a standard resource for containers",
                "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1500m",
            ],
        );
    }

    #[test]
    fn volumes_have_one_source_that_exists_here() {
        check(
            json!({"volumes": [
                {"name": "a", "emptyDir": {}, "secret": {"secretName": "s"}},
                {"name": "a", "configMap": {"name": "", "defaultMode": 4096}},
                {"name": "n", "nfs": {"server": "s", "path": "/"}},
            ]}),
            json!({}),
            &[
                "spec.volumes[0].secret: Forbidden: may not specify more than 1 volume type",
                "spec.volumes[1].name: Duplicate value: \"a\"",
                "spec.volumes[1].configMap.name: Required value",
                "spec.volumes[1].configMap.defaultMode: Invalid value: 4096: must be a number between 0 and 0777 (octal), both inclusive",
                "spec.volumes[2].nfs: Forbidden: this node alone mounts configMap, downwardAPI, emptyDir, ephemeral, hostPath, image, persistentVolumeClaim, projected, secret; a storage driver needs a cluster",
            ],
        );
    }

    #[test]
    fn env_has_one_value() {
        check(
            json!({}),
            json!({"env": [{"name": "a=b", "value": "1"}, {"name": "B", "value": "x", "valueFrom": {}}], "envFrom": [{}]}),
            &[
                "spec.containers[0].env[0].name: Invalid value: \"a=b\": a valid environment variable name must consist only of printable ASCII characters other than '='",
                "spec.containers[0].env[1].valueFrom: Invalid value: \"\": may not be specified when `value` is not empty",
                "spec.containers[0].env[1].valueFrom: Invalid value: \"\": must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`",
                "spec.containers[0].envFrom[0]: Invalid value: \"\": must specify one of: `configMapRef` or `secretRef`",
            ],
        );
    }
}
