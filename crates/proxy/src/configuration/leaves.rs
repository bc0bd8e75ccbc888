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
    leaf("featureGates", Map, "", "feature-gates", Honoured)
        .says("Features that are switched on or off: Name=true,…"),
    leaf("clientConnection.kubeconfig", Text, "", "kubeconfig", Honoured)
        .says("How to reach the API server, as which user"),
    leaf("clientConnection.acceptContentTypes", Text, "", "", ENCODING),
    leaf("clientConnection.contentType", Text, "application/vnd.kubernetes.protobuf", "kube-api-content-type", ENCODING),
    leaf("clientConnection.qps", Number, "5", "kube-api-qps", Honoured)
        .says("Most requests a second to the API server"),
    leaf("clientConnection.burst", Integer, "10", "kube-api-burst", Honoured)
        .says("Most requests at once, above --kube-api-qps"),
    leaf("logging.format", Text, "text", "logging-format", NotYet),
    leaf("logging.flushFrequency", Any, "5s", "log-flush-frequency", Never("every message is written at once")),
    leaf("logging.verbosity", Integer, "", "", Honoured),
    leaf("logging.vmodule", Any, "", "vmodule", Never("there are no Go files whose messages could be chosen")),
    leaf("logging.options", Other, "", "", NotYet),
    leaf("hostnameOverride", Text, "", "", Honoured),
    leaf("bindAddress", Text, "0.0.0.0", "bind-address", Honoured)
        .says("Address of this node; 0.0.0.0 and :: only choose the family, and the Node says the address"),
    leaf("healthzBindAddress", Text, "0.0.0.0:10256", "healthz-bind-address", Honoured)
        .says("Address and port of /healthz"),
    leaf("metricsBindAddress", Text, "127.0.0.1:10249", "metrics-bind-address", Honoured)
        .says("Address and port of /metrics"),
    leaf("bindAddressHardFail", Bool, "", "bind-address-hard-fail", Honoured)
        .says("End when one of them is taken, instead of going on without"),
    leaf("enableProfiling", Bool, "", "profiling", Never("Go's profiles need Go; take perf")),
    leaf("showHiddenMetricsForVersion", Text, "", "show-hidden-metrics-for-version", Never("no metric is hidden")),
    leaf("mode", Text, "", "proxy-mode", Honoured)
        .says("What serves Services: nftables, iptables, ipvs, userspace [default: nftables]"),
    leaf("iptables.masqueradeBit", Integer, "14", "iptables-masquerade-bit", Honoured)
        .says("Bit of a packet's mark that says that it is to be masqueraded"),
    leaf("iptables.masqueradeAll", Bool, "", "masquerade-all", Honoured)
        .says("Masquerade whatever goes to the address of a Service"),
    leaf("iptables.localhostNodePorts", Bool, "true", "iptables-localhost-nodeports", Honoured)
        .says("Let node ports answer on 127.0.0.1 in the mode iptables"),
    leaf("iptables.syncPeriod", Duration, "30s", "iptables-sync-period", Honoured)
        .says("How often all rules are written in the mode iptables though nothing has changed"),
    leaf("iptables.minSyncPeriod", Duration, "", "iptables-min-sync-period", Honoured)
        .says("Shortest time between two changes in the mode iptables"),
    leaf("ipvs.syncPeriod", Duration, "30s", "ipvs-sync-period", Honoured)
        .says("How often all rules are written in the mode ipvs though nothing has changed"),
    leaf("ipvs.minSyncPeriod", Duration, "", "ipvs-min-sync-period", Honoured)
        .says("Shortest time between two changes in the mode ipvs"),
    leaf("ipvs.scheduler", Text, "", "ipvs-scheduler", Honoured)
        .says("How IPVS chooses among endpoints: rr, wrr, lc, sh, …"),
    leaf("ipvs.excludeCIDRs", List, "", "ipvs-exclude-cidrs", Honoured)
        .says("Addresses of IPVS services that are somebody else's"),
    leaf("ipvs.strictARP", Bool, "", "ipvs-strict-arp", Honoured)
        .says("Let the node answer ARP for an address only where it has it"),
    leaf("ipvs.tcpTimeout", Duration, "", "ipvs-tcp-timeout", Honoured)
        .says("How long IPVS knows an idle TCP connection; 0 leaves it as it is"),
    leaf("ipvs.tcpFinTimeout", Duration, "", "ipvs-tcpfin-timeout", Honoured)
        .says("How long IPVS knows a TCP connection after its FIN; 0 leaves it as it is"),
    leaf("ipvs.udpTimeout", Duration, "", "ipvs-udp-timeout", Honoured)
        .says("How long IPVS knows an idle UDP flow; 0 leaves it as it is"),
    leaf("nftables.masqueradeBit", Integer, "14", "", Never("packets to masquerade are known without a mark")),
    leaf("nftables.masqueradeAll", Bool, "", "", Honoured),
    leaf("nftables.syncPeriod", Duration, "30s", "", Honoured),
    leaf("nftables.minSyncPeriod", Duration, "", "", Honoured),
    leaf("winkernel.networkName", Text, "", "", WINDOWS),
    leaf("winkernel.sourceVip", Text, "", "", WINDOWS),
    leaf("winkernel.enableDSR", Bool, "", "", WINDOWS),
    leaf("winkernel.rootHnsEndpointName", Text, "", "", WINDOWS),
    leaf("winkernel.forwardHealthCheckVip", Bool, "", "", WINDOWS),
    leaf("detectLocalMode", Text, "ClusterCIDR", "detect-local-mode", Honoured)
        .says("How packets of this node's pods are known: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix"),
    leaf("detectLocal.bridgeInterface", Text, "", "pod-bridge-interface", Honoured)
        .says("The bridge that they come from (BridgeInterface)"),
    leaf("detectLocal.interfaceNamePrefix", Text, "", "pod-interface-name-prefix", Honoured)
        .says("The beginning of the names of the interfaces that they come from (InterfaceNamePrefix)"),
    leaf("clusterCIDR", Text, "", "cluster-cidr", Honoured)
        .says("Addresses of the pods of all nodes (ClusterCIDR)"),
    leaf("nodePortAddresses", List, "", "nodeport-addresses", Honoured)
        .says("Addresses on which node ports answer: ranges, or primary"),
    leaf("oomScoreAdj", Integer, "-999", "oom-score-adj", Honoured)
        .says("How readily the kernel ends this program when memory is short, from -1000 to 1000"),
    leaf("conntrack.maxPerCore", Integer, "32768", "conntrack-max-per-core", Honoured)
        .says("Most tracked connections for each CPU; 0 leaves the kernel's limit"),
    leaf("conntrack.min", Integer, "131072", "conntrack-min", Honoured)
        .says("Most tracked connections on a node with few CPUs"),
    leaf("conntrack.tcpEstablishedTimeout", Duration, "24h", "conntrack-tcp-timeout-established", Honoured)
        .says("How long an idle TCP connection is tracked; 0 leaves it as it is"),
    leaf("conntrack.tcpCloseWaitTimeout", Duration, "1h", "conntrack-tcp-timeout-close-wait", Honoured)
        .says("How long a TCP connection is tracked that one side has closed; 0 leaves it as it is"),
    leaf("conntrack.tcpBeLiberal", Bool, "", "conntrack-tcp-be-liberal", Honoured)
        .says("Let packets pass that are outside of their connection's window"),
    leaf("conntrack.udpTimeout", Duration, "", "conntrack-udp-timeout", Honoured)
        .says("How long a UDP flow is tracked that nobody has answered; 0 leaves it as it is"),
    leaf("conntrack.udpStreamTimeout", Duration, "", "conntrack-udp-timeout-stream", Honoured)
        .says("How long a UDP flow is tracked that was answered; 0 leaves it as it is"),
    leaf("configSyncPeriod", Duration, "15m", "config-sync-period", Never("objects are watched; there is nothing to read again")),
    leaf("portRange", Text, "", "", Never("it was for the userspace mode, which took ports of this host")),
    leaf("windowsRunAsService", Bool, "", "", WINDOWS),
];
