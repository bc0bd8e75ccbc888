//! The cluster's name server, beside the nodes and not on one of them: a Service without selector leads to it.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

use super::Options;
use crate::api::Api;

/// Where CoreDNS tells that it knows all Services.
pub(super) const READY_PORT: u16 = 8181;

/// Its user.
pub(super) const USER: &str = "system:coredns";

/// Writes what CoreDNS reads.
pub(super) fn write_config(file: &Path, kubeconfig: &Path, address: IpAddr) -> anyhow::Result<()> {
    let text = format!(
        ".:53 {{\n  bind {address}\n  errors\n  ready 127.0.0.1:{READY_PORT}\n  \
         kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    kubeconfig {}\n    pods insecure\n    ttl 30\n  }}\n  \
         cache 30\n  loadbalance\n}}\n",
        kubeconfig.display()
    );
    std::fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

/// Makes the Service `kube-dns`, as pods expect it, and grants the server what it has to see.
pub(super) fn ensure_objects(api: &Api, options: &Options) -> anyhow::Result<()> {
    let address = options.reachable_address()?;
    let rule = |group: &str, resources: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": ["list", "watch"] });
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": USER },
        "rules": [rule("", &["services", "pods", "namespaces"]), rule("discovery.k8s.io", &["endpointslices"])],
    });
    api.ensure("/apis/rbac.authorization.k8s.io/v1/clusterroles", &role)?;
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": USER },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER },
        "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER }],
    });
    api.ensure("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding)?;
    let port = |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "port": 53 });
    let ports = [port("dns", "UDP"), port("dns-tcp", "TCP")];
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "kube-dns", "labels": { "k8s-app": "kube-dns" } },
        "spec": { "clusterIP": options.dns_address()?, "ports": ports },
    });
    api.ensure("/api/v1/namespaces/kube-system/services", &service)?;
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": "kube-dns-lab", "labels": { "kubernetes.io/service-name": "kube-dns" } },
        "addressType": family, "ports": ports,
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
    });
    api.ensure("/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", &slice)
}
