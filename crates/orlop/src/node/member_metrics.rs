//! What a member says on `/metrics` beside its kubelet: its requests to the API server, its certificates, its version.

use cluster::api::Api;
use instruments::Text;
use k8s_openapi::jiff::Timestamp;
use kubelet::node::certificates::Files;
use kubelet::server::metrics::Collector;

use super::client_metrics;

/// Where it comes from.
pub(super) struct MemberMetrics {
    pub(super) api: Option<Api>,
    /// Of the client, and of the server.
    pub(super) certificates: [Files; 2],
}

impl Collector for MemberMetrics {
    fn write(&self, text: &mut Text) {
        if let Some(api) = &self.api {
            client_metrics::write(text, api);
        }
        let [client, server] = &self.certificates;
        let help = "Gauge of the TTL (time-to-live) of the Kubelet's client certificate. The value is in seconds until \
                    certificate expiry (negative if already expired).";
        write_ttl(text, "kubelet_certificate_manager_client_ttl_seconds", help, client);
        let help = "Gauge of the shortest TTL (time-to-live) of the Kubelet's serving certificate. The value is in seconds \
                    until certificate expiry (negative if already expired).";
        write_ttl(text, "kubelet_certificate_manager_server_ttl_seconds", help, server);
    }
}

/// How long a certificate holds; one that the node did not ask for is not there.
fn write_ttl(text: &mut Text, name: &str, help: &str, files: &Files) {
    if let Ok((_, ends)) = files.validity() {
        text.single(name, "gauge", help, ends.duration_since(Timestamp::now()).as_secs());
    }
}
