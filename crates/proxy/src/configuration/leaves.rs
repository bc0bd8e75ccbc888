//! Every field of `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1, Kubernetes 1.37): its kind, upstream's default,
//! its flag, and whether this proxy does what it says. A table, so that nothing that an operator writes is ignored in
//! silence.
//!
//! One default is not upstream's: `minSyncPeriod` is 1 s there, as a sync is expensive, and 5 ms here.

use configfile::Kind::{Any, Bool, Duration, Integer, List, Map, Number, Other, Text};
use configfile::Status::{Honoured, Never, NotYet};
use configfile::{Leaf, Status, leaf};

const WINDOWS: Status = Never("it is for Windows");
const ENCODING: Status = Never("objects are read as JSON, one by one");

/// All of them, in the order of the API.
#[rustfmt::skip]
pub const LEAVES: &[Leaf] = &[
    leaf("featureGates", Map, "", "feature-gates", Honoured),
    leaf("clientConnection.kubeconfig", Text, "", "kubeconfig", Honoured),
    leaf("clientConnection.acceptContentTypes", Text, "", "", ENCODING),
    leaf("clientConnection.contentType", Text, "application/vnd.kubernetes.protobuf", "kube-api-content-type", ENCODING),
    leaf("clientConnection.qps", Number, "5", "kube-api-qps", Honoured),
    leaf("clientConnection.burst", Integer, "10", "kube-api-burst", Honoured),
    leaf("logging.format", Text, "text", "logging-format", NotYet),
    leaf("logging.flushFrequency", Any, "5s", "log-flush-frequency", Never("every message is written at once")),
    leaf("logging.verbosity", Integer, "", "", Honoured),
    leaf("logging.vmodule", Any, "", "vmodule", Never("there are no Go files whose messages could be chosen")),
    leaf("logging.options", Other, "", "", NotYet),
    leaf("hostnameOverride", Text, "", "", Honoured),
    leaf("bindAddress", Text, "0.0.0.0", "bind-address", Honoured),
    leaf("healthzBindAddress", Text, "0.0.0.0:10256", "healthz-bind-address", Honoured),
    leaf("metricsBindAddress", Text, "127.0.0.1:10249", "metrics-bind-address", Honoured),
    leaf("bindAddressHardFail", Bool, "", "bind-address-hard-fail", Honoured),
    leaf("enableProfiling", Bool, "", "profiling", Never("Go's profiles need Go; take perf")),
    leaf("showHiddenMetricsForVersion", Text, "", "show-hidden-metrics-for-version", Never("no metric is hidden")),
    leaf("mode", Text, "", "proxy-mode", Honoured),
    leaf("iptables.masqueradeBit", Integer, "14", "iptables-masquerade-bit", Honoured),
    leaf("iptables.masqueradeAll", Bool, "", "masquerade-all", Honoured),
    leaf("iptables.localhostNodePorts", Bool, "true", "iptables-localhost-nodeports", Honoured),
    leaf("iptables.syncPeriod", Duration, "30s", "iptables-sync-period", Honoured),
    leaf("iptables.minSyncPeriod", Duration, "", "iptables-min-sync-period", Honoured),
    leaf("ipvs.syncPeriod", Duration, "30s", "ipvs-sync-period", Honoured),
    leaf("ipvs.minSyncPeriod", Duration, "", "ipvs-min-sync-period", Honoured),
    leaf("ipvs.scheduler", Text, "", "ipvs-scheduler", Honoured),
    leaf("ipvs.excludeCIDRs", List, "", "ipvs-exclude-cidrs", Honoured),
    leaf("ipvs.strictARP", Bool, "", "ipvs-strict-arp", Honoured),
    leaf("ipvs.tcpTimeout", Duration, "", "ipvs-tcp-timeout", Honoured),
    leaf("ipvs.tcpFinTimeout", Duration, "", "ipvs-tcpfin-timeout", Honoured),
    leaf("ipvs.udpTimeout", Duration, "", "ipvs-udp-timeout", Honoured),
    leaf("nftables.masqueradeBit", Integer, "14", "", Never("packets to masquerade are known without a mark")),
    leaf("nftables.masqueradeAll", Bool, "", "", Honoured),
    leaf("nftables.syncPeriod", Duration, "30s", "", Honoured),
    leaf("nftables.minSyncPeriod", Duration, "", "", Honoured),
    leaf("winkernel.networkName", Text, "", "", WINDOWS),
    leaf("winkernel.sourceVip", Text, "", "", WINDOWS),
    leaf("winkernel.enableDSR", Bool, "", "", WINDOWS),
    leaf("winkernel.rootHnsEndpointName", Text, "", "", WINDOWS),
    leaf("winkernel.forwardHealthCheckVip", Bool, "", "", WINDOWS),
    leaf("detectLocalMode", Text, "ClusterCIDR", "detect-local-mode", Honoured),
    leaf("detectLocal.bridgeInterface", Text, "", "pod-bridge-interface", Honoured),
    leaf("detectLocal.interfaceNamePrefix", Text, "", "pod-interface-name-prefix", Honoured),
    leaf("clusterCIDR", Text, "", "cluster-cidr", Honoured),
    leaf("nodePortAddresses", List, "", "nodeport-addresses", Honoured),
    leaf("oomScoreAdj", Integer, "-999", "oom-score-adj", Honoured),
    leaf("conntrack.maxPerCore", Integer, "32768", "conntrack-max-per-core", Honoured),
    leaf("conntrack.min", Integer, "131072", "conntrack-min", Honoured),
    leaf("conntrack.tcpEstablishedTimeout", Duration, "24h", "conntrack-tcp-timeout-established", Honoured),
    leaf("conntrack.tcpCloseWaitTimeout", Duration, "1h", "conntrack-tcp-timeout-close-wait", Honoured),
    leaf("conntrack.tcpBeLiberal", Bool, "", "conntrack-tcp-be-liberal", Honoured),
    leaf("conntrack.udpTimeout", Duration, "", "conntrack-udp-timeout", Honoured),
    leaf("conntrack.udpStreamTimeout", Duration, "", "conntrack-udp-timeout-stream", Honoured),
    leaf("configSyncPeriod", Duration, "15m", "config-sync-period", Never("objects are watched; there is nothing to read again")),
    leaf("portRange", Text, "", "", Never("it was for the userspace mode, which took ports of this host")),
    leaf("windowsRunAsService", Bool, "", "", WINDOWS),
];
