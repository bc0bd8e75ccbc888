//! What every client of an API server says on `/metrics`: its requests, and its version.

use cluster::api::Api;
use instruments::{Text, labels};

use super::node_status::KUBELET_VERSION;

/// As Go names it.
const PLATFORM: &str = if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" };

/// Writes both.
pub(crate) fn write(text: &mut Text, api: &Api) {
    const REQUESTS: &str = "rest_client_requests_total";
    let host = api.config().server.authority();
    text.family(REQUESTS, "counter", "Number of HTTP requests, partitioned by status code, method, and host.");
    for (method, status, count) in api.answers() {
        let code = status.map_or_else(|| "<error>".to_owned(), |status| status.to_string());
        text.sample(REQUESTS, &labels(&[("code", &code), ("host", &host), ("method", &method)]), count);
    }
    let help = "Request latency in seconds. Broken down by verb, and host.";
    api.durations().write(text, "rest_client_request_duration_seconds", help);
    text.family("kubernetes_build_info", "gauge", "A metric with a constant '1' value labeled by version.");
    let version = KUBELET_VERSION;
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let build = [("git_version", version), ("major", major), ("minor", minor), ("platform", PLATFORM)];
    text.sample("kubernetes_build_info", &labels(&build), 1);
}
