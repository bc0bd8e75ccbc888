//! What of an object a node has no use for, and therefore does not keep.

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// `kubectl apply` keeps a copy of the whole object here.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// What a Service's annotations tell a proxy.
const SERVICE_ANNOTATIONS: [&str; 1] = ["service.beta.kubernetes.io/load-balancer-source-ranges"];

/// And its labels.
const SERVICE_LABELS: [&str; 1] = ["service.kubernetes.io/service-proxy-name"];
/// And those of a slice.
const SLICE_LABELS: [&str; 3] =
    ["kubernetes.io/service-name", "service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"];

/// When the cluster changed what a slice says: the way from there to a rule is measured.
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Removes the copy of itself.
pub(super) fn annotations(metadata: &mut ObjectMeta) {
    keep_annotations(metadata, |name| name != LAST_APPLIED);
}

/// Leaves of a Service what proxies and the environment of pods are made from.
pub(super) fn service(service: &mut Service) {
    keep_annotations(&mut service.metadata, |name| SERVICE_ANNOTATIONS.contains(&name));
    keep_labels(&mut service.metadata, |name| SERVICE_LABELS.contains(&name));
    history(&mut service.metadata);
    if let Some(spec) = &mut service.spec {
        spec.selector = None;
        spec.ip_families = None;
        spec.ip_family_policy = None;
        spec.cluster_ips.iter_mut().for_each(Vec::shrink_to_fit);
        spec.ports.iter_mut().for_each(Vec::shrink_to_fit);
    }
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    if balancer.is_none_or(|balancer| balancer.ingress.is_none()) {
        service.status = None;
    }
}

/// Leaves of an EndpointSlice what proxies are made from.
pub(super) fn slice(slice: &mut EndpointSlice) {
    keep_annotations(&mut slice.metadata, |name| name == TRIGGERED);
    keep_labels(&mut slice.metadata, |name| SLICE_LABELS.contains(&name));
    history(&mut slice.metadata);
    for endpoint in slice.endpoints.iter_mut().flatten() {
        endpoint.deprecated_topology = None;
        endpoint.hostname = None;
        if let Some(target) = &mut endpoint.target_ref {
            target.name = None;
            target.namespace = None;
            target.resource_version = None;
        }
    }
}

fn keep_annotations(metadata: &mut ObjectMeta, keep: impl Fn(&str) -> bool) {
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|name, _| keep(name));
        if annotations.is_empty() {
            metadata.annotations = None;
        }
    }
}

fn keep_labels(metadata: &mut ObjectMeta, keep: impl Fn(&str) -> bool) {
    if let Some(labels) = &mut metadata.labels {
        labels.retain(|name, _| keep(name));
        if labels.is_empty() {
            metadata.labels = None;
        }
    }
}

fn history(metadata: &mut ObjectMeta) {
    metadata.owner_references = None;
    metadata.finalizers = None;
    metadata.generate_name = None;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_go_and_the_rest_stays() {
        let mut metadata = ObjectMeta {
            annotations: Some([(LAST_APPLIED.to_owned(), "{}".to_owned()), ("a".to_owned(), "b".to_owned())].into()),
            ..ObjectMeta::default()
        };
        annotations(&mut metadata);
        assert_eq!(metadata.annotations.as_ref().unwrap().len(), 1);
        keep_annotations(&mut metadata, |_| false);
        assert_eq!(metadata.annotations, None);
    }
}
