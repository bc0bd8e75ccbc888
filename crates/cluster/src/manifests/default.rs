//! The defaults which the API server writes into an object it accepts.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::{
    DaemonSet, DaemonSetUpdateStrategy, Deployment, DeploymentStrategy, ReplicaSet, RollingUpdateDaemonSet,
    RollingUpdateDeployment, RollingUpdateStatefulSetStrategy, StatefulSet, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    ClientIPConfig, ConfigMap, Container, EnvVarSource, HTTPGetAction, Lifecycle, LifecycleHandler, Namespace,
    PersistentVolumeClaim, PersistentVolumeClaimSpec, Pod, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ProjectedVolumeSource, Secret, Service, ServiceAccount, ServiceSpec, SessionAffinityConfig, Volume,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Fills what the author left out. Idempotent.
pub(crate) trait SetDefaults {
    fn set_defaults(&mut self);
}

/// Sets an optional field that is absent.
fn or<T>(field: &mut Option<T>, default: T) {
    field.get_or_insert(default);
}

/// Sets an optional text that is absent or empty.
fn or_text(field: &mut Option<String>, default: &str) {
    if field.as_deref().unwrap_or("").is_empty() {
        *field = Some(default.into());
    }
}

/// Sets a number that is absent or zero.
fn or_number(field: &mut Option<i32>, default: i32) {
    if field.unwrap_or(0) == 0 {
        *field = Some(default);
    }
}

fn each<T>(items: &mut Option<Vec<T>>, mut change: impl FnMut(&mut T)) {
    items.iter_mut().flatten().for_each(&mut change);
}

impl SetDefaults for Pod {
    fn set_defaults(&mut self) {
        self.spec.get_or_insert_default().set_defaults();
    }
}

impl SetDefaults for PodTemplateSpec {
    fn set_defaults(&mut self) {
        self.spec.get_or_insert_default().set_defaults();
    }
}

impl SetDefaults for PodSpec {
    fn set_defaults(&mut self) {
        or_text(&mut self.dns_policy, "ClusterFirst");
        or_text(&mut self.restart_policy, "Always");
        or_text(&mut self.scheduler_name, "default-scheduler");
        or(&mut self.termination_grace_period_seconds, 30);
        or(&mut self.enable_service_links, true);
        or(&mut self.security_context, PodSecurityContext::default());
        self.default_service_account();
        each(&mut self.volumes, default_volume);
        let host_network = self.host_network == Some(true);
        for container in self.init_containers.iter_mut().flatten().chain(&mut self.containers) {
            default_container(container, host_network);
        }
        default_resources(&mut self.resources);
    }
}

trait DefaultServiceAccount {
    fn default_service_account(&mut self);
}

impl DefaultServiceAccount for PodSpec {
    /// `serviceAccount` is the deprecated spelling; the API keeps both in step, and admission fills in `default`.
    fn default_service_account(&mut self) {
        let given = self.service_account_name.take().or_else(|| self.service_account.take());
        let name = given.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".into());
        self.service_account_name = Some(name.clone());
        self.service_account = Some(name);
    }
}

fn default_container(container: &mut Container, host_network: bool) {
    or_text(&mut container.termination_message_path, "/dev/termination-log");
    or_text(&mut container.termination_message_policy, "File");
    let pull_policy = pull_policy(container.image.as_deref().unwrap_or(""));
    or_text(&mut container.image_pull_policy, pull_policy);
    each(&mut container.ports, |port| {
        or_text(&mut port.protocol, "TCP");
        if host_network {
            or_number(&mut port.host_port, port.container_port);
        }
    });
    each(&mut container.env, |env| env.value_from.as_mut().map_or((), default_env_source));
    let probes = [&mut container.liveness_probe, &mut container.readiness_probe, &mut container.startup_probe];
    probes.into_iter().flatten().for_each(default_probe);
    container.lifecycle.iter_mut().for_each(default_lifecycle);
    default_resources(&mut container.resources);
}

/// `Always` for the tag `latest` (also where no tag is written), `IfNotPresent` for any other tag and for digests.
pub(crate) fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.split_once(':') {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

fn default_env_source(source: &mut EnvVarSource) {
    if let Some(field) = &mut source.field_ref {
        or_text(&mut field.api_version, "v1");
    }
}

fn default_probe(probe: &mut Probe) {
    or_number(&mut probe.timeout_seconds, 1);
    or_number(&mut probe.period_seconds, 10);
    or_number(&mut probe.success_threshold, 1);
    or_number(&mut probe.failure_threshold, 3);
    probe.http_get.iter_mut().for_each(default_http_get);
    if let Some(grpc) = &mut probe.grpc {
        or(&mut grpc.service, String::new());
    }
}

fn default_http_get(http: &mut HTTPGetAction) {
    or_text(&mut http.path, "/");
    or_text(&mut http.scheme, "HTTP");
}

fn default_lifecycle(lifecycle: &mut Lifecycle) {
    let default_handler = |handler: &mut LifecycleHandler| handler.http_get.as_mut().map_or((), default_http_get);
    [&mut lifecycle.post_start, &mut lifecycle.pre_stop].into_iter().flatten().for_each(default_handler);
}

/// A limit without a request is also the request.
fn default_resources(resources: &mut Option<k8s_openapi::api::core::v1::ResourceRequirements>) {
    let Some(resources) = resources else { return };
    let Some(limits) = &resources.limits else { return };
    let requests = resources.requests.get_or_insert_default();
    for (name, limit) in limits {
        requests.entry(name.clone()).or_insert_with(|| limit.clone());
    }
}

fn default_volume(volume: &mut Volume) {
    const FILE_MODE: i32 = 0o644;
    if let Some(secret) = &mut volume.secret {
        or(&mut secret.default_mode, FILE_MODE);
    }
    if let Some(config_map) = &mut volume.config_map {
        or(&mut config_map.default_mode, FILE_MODE);
    }
    if let Some(downward) = &mut volume.downward_api {
        or(&mut downward.default_mode, FILE_MODE);
        each(&mut downward.items, |item| {
            item.field_ref.iter_mut().for_each(|field| or_text(&mut field.api_version, "v1"));
        });
    }
    if let Some(host_path) = &mut volume.host_path {
        or(&mut host_path.type_, String::new());
    }
    if let Some(image) = &mut volume.image {
        let policy = pull_policy(image.reference.as_deref().unwrap_or(""));
        or_text(&mut image.pull_policy, policy);
    }
    if let Some(projected) = &mut volume.projected {
        or(&mut projected.default_mode, FILE_MODE);
        default_projected(projected);
    }
    if is_without_source(volume) {
        volume.empty_dir = Some(Default::default());
    }
}

fn default_projected(projected: &mut ProjectedVolumeSource) {
    each(&mut projected.sources, |source| {
        if let Some(token) = &mut source.service_account_token {
            or(&mut token.expiration_seconds, 3600);
        }
        for item in source.downward_api.iter_mut().flat_map(|downward| downward.items.iter_mut().flatten()) {
            item.field_ref.iter_mut().for_each(|field| or_text(&mut field.api_version, "v1"));
        }
    });
}

/// The API reads a volume with nothing but a name as an emptyDir.
fn is_without_source(volume: &Volume) -> bool {
    *volume == Volume { name: volume.name.clone(), ..Volume::default() }
}

fn default_selector(selector: &mut LabelSelector, template: &PodTemplateSpec) {
    // apps/v1 demands a selector; podman and hand-written manifests often leave it out, and what is meant is never in doubt.
    if *selector == LabelSelector::default() {
        selector.match_labels = template.metadata.as_ref().and_then(|metadata| metadata.labels.clone());
    }
}

impl SetDefaults for Deployment {
    fn set_defaults(&mut self) {
        let spec = &mut self.spec;
        spec.template.set_defaults();
        default_selector(&mut spec.selector, &spec.template);
        or(&mut spec.replicas, 1);
        or(&mut spec.revision_history_limit, 10);
        or(&mut spec.progress_deadline_seconds, 600);
        default_deployment_strategy(spec.strategy.get_or_insert_default());
    }
}

fn default_deployment_strategy(strategy: &mut DeploymentStrategy) {
    or_text(&mut strategy.type_, "RollingUpdate");
    if strategy.type_.as_deref() == Some("RollingUpdate") {
        let rolling: &mut RollingUpdateDeployment = strategy.rolling_update.get_or_insert_default();
        or(&mut rolling.max_surge, IntOrString::String("25%".into()));
        or(&mut rolling.max_unavailable, IntOrString::String("25%".into()));
    }
}

impl SetDefaults for ReplicaSet {
    fn set_defaults(&mut self) {
        let spec = &mut self.spec;
        or(&mut spec.replicas, 1);
        if let Some(template) = &mut spec.template {
            template.set_defaults();
            default_selector(&mut spec.selector, template);
        }
    }
}

impl SetDefaults for DaemonSet {
    fn set_defaults(&mut self) {
        let spec = &mut self.spec;
        spec.template.set_defaults();
        default_selector(&mut spec.selector, &spec.template);
        or(&mut spec.revision_history_limit, 10);
        let strategy: &mut DaemonSetUpdateStrategy = spec.update_strategy.get_or_insert_default();
        or_text(&mut strategy.type_, "RollingUpdate");
        if strategy.type_.as_deref() == Some("RollingUpdate") {
            let rolling: &mut RollingUpdateDaemonSet = strategy.rolling_update.get_or_insert_default();
            or(&mut rolling.max_unavailable, IntOrString::Int(1));
            or(&mut rolling.max_surge, IntOrString::Int(0));
        }
    }
}

impl SetDefaults for StatefulSet {
    fn set_defaults(&mut self) {
        let spec = &mut self.spec;
        spec.template.set_defaults();
        default_selector(&mut spec.selector, &spec.template);
        or(&mut spec.replicas, 1);
        or(&mut spec.revision_history_limit, 10);
        or_text(&mut spec.pod_management_policy, "OrderedReady");
        let strategy: &mut StatefulSetUpdateStrategy = spec.update_strategy.get_or_insert_default();
        or_text(&mut strategy.type_, "RollingUpdate");
        if strategy.type_.as_deref() == Some("RollingUpdate") {
            let rolling: &mut RollingUpdateStatefulSetStrategy = strategy.rolling_update.get_or_insert_default();
            or(&mut rolling.partition, 0);
        }
        each(&mut spec.volume_claim_templates, SetDefaults::set_defaults);
    }
}

impl SetDefaults for Job {
    fn set_defaults(&mut self) {
        default_job(self.spec.get_or_insert_default());
    }
}

fn default_job(spec: &mut JobSpec) {
    // Without either, one pod is to succeed; with parallelism alone it is a work queue, so completions stays open.
    if spec.completions.is_none() && spec.parallelism.is_none() {
        spec.completions = Some(1);
    }
    or(&mut spec.parallelism, 1);
    or(&mut spec.backoff_limit, if spec.backoff_limit_per_index.is_some() { i32::MAX } else { 6 });
    or_text(&mut spec.completion_mode, "NonIndexed");
    or(&mut spec.suspend, false);
    or(&mut spec.manual_selector, false);
    or_text(
        &mut spec.pod_replacement_policy,
        if spec.pod_failure_policy.is_some() { "Failed" } else { "TerminatingOrFailed" },
    );
    spec.template.set_defaults();
}

impl SetDefaults for Service {
    fn set_defaults(&mut self) {
        default_service(self.spec.get_or_insert_default());
    }
}

fn default_service(spec: &mut ServiceSpec) {
    or_text(&mut spec.session_affinity, "None");
    or_text(&mut spec.type_, "ClusterIP");
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        let config: &mut SessionAffinityConfig = spec.session_affinity_config.get_or_insert_default();
        let client_ip: &mut ClientIPConfig = config.client_ip.get_or_insert_default();
        or(&mut client_ip.timeout_seconds, 10_800);
    }
    each(&mut spec.ports, |port| {
        or_text(&mut port.protocol, "TCP");
        let unset = matches!(&port.target_port, None | Some(IntOrString::Int(0)))
            || matches!(&port.target_port, Some(IntOrString::String(name)) if name.is_empty());
        if unset {
            port.target_port = Some(IntOrString::Int(port.port));
        }
    });
    let kind = spec.type_.as_deref().unwrap_or("");
    if matches!(kind, "NodePort" | "LoadBalancer") {
        or_text(&mut spec.external_traffic_policy, "Cluster");
    }
    if kind != "ExternalName" {
        or_text(&mut spec.internal_traffic_policy, "Cluster");
    }
    if kind == "LoadBalancer" {
        or(&mut spec.allocate_load_balancer_node_ports, true);
    }
}

impl SetDefaults for EndpointSlice {
    fn set_defaults(&mut self) {
        each(&mut self.ports, |port| {
            or(&mut port.name, String::new());
            or_text(&mut port.protocol, "TCP");
        });
    }
}

impl SetDefaults for Secret {
    fn set_defaults(&mut self) {
        or_text(&mut self.type_, "Opaque");
        let plain = self.string_data.take().unwrap_or_default();
        if !plain.is_empty() {
            let data = self.data.get_or_insert_default();
            data.extend(plain.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))));
        }
    }
}

impl SetDefaults for PersistentVolumeClaim {
    fn set_defaults(&mut self) {
        let spec: &mut PersistentVolumeClaimSpec = self.spec.get_or_insert_default();
        or_text(&mut spec.volume_mode, "Filesystem");
        // `podman kube play` takes claims without these; a directory honours any of them.
        or(&mut spec.access_modes, vec!["ReadWriteOnce".into()]);
        let requests = spec.resources.get_or_insert_default().requests.get_or_insert_default();
        requests.entry("storage".into()).or_insert_with(|| Quantity("1Gi".into()));
    }
}

impl SetDefaults for Namespace {
    fn set_defaults(&mut self) {
        let name = self.metadata.name.clone().unwrap_or_default();
        let labels: &mut BTreeMap<_, _> = self.metadata.labels.get_or_insert_default();
        labels.insert("kubernetes.io/metadata.name".into(), name);
    }
}

impl SetDefaults for ConfigMap {
    fn set_defaults(&mut self) {}
}

impl SetDefaults for ServiceAccount {
    fn set_defaults(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from<T: serde::de::DeserializeOwned + SetDefaults>(value: serde_json::Value) -> T {
        let mut object: T = serde_json::from_value(value).unwrap();
        object.set_defaults();
        object
    }

    #[test]
    fn a_bare_pod_gets_the_api_servers_defaults() {
        let pod: Pod = from(serde_json::json!({"spec": {
            "containers": [{"name": "c", "image": "a/b", "ports": [{"containerPort": 80}],
                "livenessProbe": {"httpGet": {"port": 80}},
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "100m"}}}],
            "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "x"}}],
        }}));
        let actual = serde_json::to_value(&pod).unwrap()["spec"].take();
        let expect = serde_json::json!({
            "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "schedulerName": "default-scheduler",
            "terminationGracePeriodSeconds": 30, "enableServiceLinks": true, "securityContext": {},
            "serviceAccount": "default", "serviceAccountName": "default",
            "volumes": [{"name": "v", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}}],
            "containers": [{"name": "c", "image": "a/b", "imagePullPolicy": "Always",
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "livenessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                    "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3},
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "100m", "memory": "1Gi"}}}],
        });
        assert_eq!(actual, expect);
        let mut again = pod.clone();
        again.set_defaults();
        assert_eq!(again, pod);
    }

    #[test]
    fn the_pull_policy_follows_the_tag() {
        let cases = [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.25", "IfNotPresent"),
            ("localhost:5000/nginx", "Always"),
            ("localhost:5000/nginx:1", "IfNotPresent"),
            ("nginx@sha256:0000", "IfNotPresent"),
            ("nginx:latest@sha256:0000", "IfNotPresent"),
        ];
        for (image, policy) in cases {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn a_deployment_rolls_by_quarters() {
        let deployment: Deployment =
            from(serde_json::json!({"spec": {"template": {"metadata": {"labels": {"app": "a"}}}}}));
        let spec = deployment.spec;
        let rolling = spec.strategy.unwrap().rolling_update.unwrap();
        assert_eq!(rolling.max_surge, Some(IntOrString::String("25%".into())));
        assert_eq!(spec.selector.match_labels.unwrap()["app"], "a");
        assert_eq!((spec.replicas, spec.revision_history_limit), (Some(1), Some(10)));
    }

    #[test]
    fn a_service_port_targets_itself() {
        let service: Service =
            from(serde_json::json!({"spec": {"ports": [{"port": 80}], "sessionAffinity": "ClientIP"}}));
        let spec = service.spec.unwrap();
        let port = &spec.ports.unwrap()[0];
        assert_eq!((port.target_port.clone(), port.protocol.as_deref()), (Some(IntOrString::Int(80)), Some("TCP")));
        assert_eq!(spec.session_affinity_config.unwrap().client_ip.unwrap().timeout_seconds, Some(10_800));
        assert_eq!(spec.type_.as_deref(), Some("ClusterIP"));
    }

    #[test]
    fn string_data_wins_over_data() {
        let secret: Secret = from(serde_json::json!({"data": {"a": "eA==", "b": "eA=="}, "stringData": {"a": "y"}}));
        let data = secret.data.unwrap();
        assert_eq!((data["a"].0.as_slice(), data["b"].0.as_slice()), (&b"y"[..], &b"x"[..]));
        assert!(secret.string_data.is_none());
    }
}
