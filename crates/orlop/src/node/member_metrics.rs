//! What a member says on `/metrics` beside its kubelet: its requests to the API server, its certificates, its version.

use cluster::api::Api;
use instruments::{Text, labels};
use k8s_openapi::jiff::Timestamp;
use kubelet::node::certificates::Files;
use kubelet::server::metrics::Collector;

use super::node_status::KUBELET_VERSION;

/// Where it comes from.
pub(super) struct MemberMetrics {
    pub(super) api: Api,
    /// Of the client, and of the server.
    pub(super) certificates: [Files; 2],
}

impl Collector for MemberMetrics {
    fn write(&self, text: &mut Text) {
        const REQUESTS: &str = "rest_client_requests_total";
        let host = self.api.config().server.authority();
        text.family(REQUESTS, "counter", "Number of HTTP requests, partitioned by status code, method, and host.");
        for (method, status, count) in self.api.answers() {
            let code = status.map_or_else(|| "<error>".to_owned(), |status| status.to_string());
            text.sample(REQUESTS, &labels(&[("code", &code), ("host", &host), ("method", &method)]), count);
        }
        let [client, server] = &self.certificates;
        let help = "Gauge of the TTL (time-to-live) of the Kubelet's client certificate. The value is in seconds until \
                    certificate expiry (negative if already expired).";
        write_ttl(text, "kubelet_certificate_manager_client_ttl_seconds", help, client);
        let help = "Gauge of the shortest TTL (time-to-live) of the Kubelet's serving certificate. The value is in seconds \
                    until certificate expiry (negative if already expired).";
        write_ttl(text, "kubelet_certificate_manager_server_ttl_seconds", help, server);
        text.family("kubernetes_build_info", "gauge", "A metric with a constant '1' value labeled by version.");
        let version = KUBELET_VERSION;
        let mut parts = version.trim_start_matches('v').split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let build = [("git_version", version), ("major", major), ("minor", minor), ("platform", PLATFORM)];
        text.sample("kubernetes_build_info", &labels(&build), 1);
    }
}

/// As Go names it.
const PLATFORM: &str = if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" };

/// How long a certificate holds; one that the node did not ask for is not there.
fn write_ttl(text: &mut Text, name: &str, help: &str, files: &Files) {
    if let Ok((_, ends)) = files.validity() {
        text.single(name, "gauge", help, ends.duration_since(Timestamp::now()).as_secs());
    }
}
