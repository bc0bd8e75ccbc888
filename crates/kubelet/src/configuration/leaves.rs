//! Every field of `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1, Kubernetes 1.37): its kind, upstream's default, its
//! flag, and whether this kubelet does what it says. A table, so that nothing that an operator writes is ignored in
//! silence.

use self::Kind::{Bool, Duration, Integer, List, Map, Number, Other, Text};
use self::Status::{Honoured, NotYet};

/// How a field is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// Text.
    Text,
    /// Go's form of a time span: `1m30s`.
    Duration,
    /// A list of texts; `a,b` as a flag.
    List,
    /// Texts by name; `a=1,b=2` as a flag.
    Map,
    /// A structure of its own.
    Other,
}

/// Whether a field has its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It has.
    Honoured,
    /// It has not; a value other than the default is warned about.
    NotYet,
}

/// A field without fields of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// Its path, with dots.
    pub path: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// Upstream's default as a flag would have it; empty where unset.
    pub default: &'static str,
    /// The flag that sets it, without dashes; empty where there is none.
    pub flag: &'static str,
    /// Whether it has its effect.
    pub status: Status,
}

const fn leaf(path: &'static str, kind: Kind, default: &'static str, flag: &'static str, status: Status) -> Leaf {
    Leaf { path, kind, default, flag, status }
}

/// All of them, in the order of the API.
#[rustfmt::skip]
pub const LEAVES: &[Leaf] = &[
    leaf("enableServer", Bool, "true", "enable-server", Honoured),
    leaf("staticPodPath", Text, "", "pod-manifest-path", Honoured),
    leaf("podLogsDir", Text, "/var/log/pods", "", NotYet),
    leaf("syncFrequency", Duration, "1m", "sync-frequency", NotYet),
    leaf("fileCheckFrequency", Duration, "20s", "file-check-frequency", NotYet),
    leaf("httpCheckFrequency", Duration, "20s", "http-check-frequency", NotYet),
    leaf("staticPodURL", Text, "", "manifest-url", NotYet),
    leaf("staticPodURLHeader", Map, "", "manifest-url-header", NotYet),
    leaf("address", Text, "0.0.0.0", "address", Honoured),
    leaf("port", Integer, "10250", "port", Honoured),
    leaf("readOnlyPort", Integer, "", "read-only-port", NotYet),
    leaf("tlsCertFile", Text, "", "tls-cert-file", Honoured),
    leaf("tlsPrivateKeyFile", Text, "", "tls-private-key-file", Honoured),
    leaf("tlsCipherSuites", List, "", "tls-cipher-suites", NotYet),
    leaf("tlsCurvePreferences", Other, "", "", NotYet),
    leaf("tlsMinVersion", Text, "", "tls-min-version", NotYet),
    leaf("rotateCertificates", Bool, "", "rotate-certificates", Honoured),
    leaf("serverTLSBootstrap", Bool, "", "rotate-server-certificates", Honoured),
    leaf("authentication.anonymous.enabled", Bool, "false", "anonymous-auth", Honoured),
    leaf("authentication.webhook.enabled", Bool, "true", "authentication-token-webhook", Honoured),
    leaf("authentication.webhook.cacheTTL", Duration, "2m", "authentication-token-webhook-cache-ttl", NotYet),
    leaf("authentication.x509.clientCAFile", Text, "", "client-ca-file", Honoured),
    leaf("authorization.mode", Text, "Webhook", "authorization-mode", Honoured),
    leaf("authorization.webhook.cacheAuthorizedTTL", Duration, "5m", "authorization-webhook-cache-authorized-ttl", NotYet),
    leaf("authorization.webhook.cacheUnauthorizedTTL", Duration, "30s", "authorization-webhook-cache-unauthorized-ttl", NotYet),
    leaf("registryPullQPS", Integer, "5", "registry-qps", NotYet),
    leaf("registryBurst", Integer, "10", "registry-burst", NotYet),
    leaf("imagePullCredentialsVerificationPolicy", Text, "NeverVerifyPreloadedImages", "", NotYet),
    leaf("preloadedImagesVerificationAllowlist", List, "", "", NotYet),
    leaf("eventRecordQPS", Integer, "50", "event-qps", Honoured),
    leaf("eventBurst", Integer, "100", "event-burst", Honoured),
    leaf("enableDebuggingHandlers", Bool, "true", "enable-debugging-handlers", NotYet),
    leaf("enableContentionProfiling", Bool, "", "contention-profiling", NotYet),
    leaf("healthzPort", Integer, "10248", "healthz-port", Honoured),
    leaf("healthzBindAddress", Text, "127.0.0.1", "healthz-bind-address", Honoured),
    leaf("oomScoreAdj", Integer, "-999", "oom-score-adj", NotYet),
    leaf("clusterDomain", Text, "", "cluster-domain", Honoured),
    leaf("clusterDNS", List, "", "cluster-dns", Honoured),
    leaf("streamingConnectionIdleTimeout", Duration, "4h", "streaming-connection-idle-timeout", NotYet),
    leaf("nodeStatusUpdateFrequency", Duration, "10s", "node-status-update-frequency", Honoured),
    leaf("nodeStatusReportFrequency", Duration, "5m", "", Honoured),
    leaf("nodeLeaseDurationSeconds", Integer, "40", "", Honoured),
    leaf("imageMinimumGCAge", Duration, "2m", "minimum-image-ttl-duration", Honoured),
    leaf("imageMaximumGCAge", Duration, "", "", Honoured),
    leaf("imageGCHighThresholdPercent", Integer, "85", "image-gc-high-threshold", Honoured),
    leaf("imageGCLowThresholdPercent", Integer, "80", "image-gc-low-threshold", Honoured),
    leaf("volumeStatsAggPeriod", Duration, "1m", "volume-stats-agg-period", NotYet),
    leaf("kubeletCgroups", Text, "", "kubelet-cgroups", NotYet),
    leaf("systemCgroups", Text, "", "system-cgroups", NotYet),
    leaf("cgroupRoot", Text, "", "cgroup-root", Honoured),
    leaf("cgroupsPerQOS", Bool, "true", "cgroups-per-qos", NotYet),
    leaf("cgroupDriver", Text, "cgroupfs", "cgroup-driver", NotYet),
    leaf("cpuManagerPolicy", Text, "none", "cpu-manager-policy", Honoured),
    leaf("singleProcessOOMKill", Bool, "", "", NotYet),
    leaf("cpuManagerPolicyOptions", Map, "", "cpu-manager-policy-options", Honoured),
    leaf("cpuManagerReconcilePeriod", Duration, "10s", "cpu-manager-reconcile-period", NotYet),
    leaf("memoryManagerPolicy", Text, "None", "memory-manager-policy", Honoured),
    leaf("topologyManagerPolicy", Text, "none", "topology-manager-policy", Honoured),
    leaf("topologyManagerScope", Text, "container", "topology-manager-scope", Honoured),
    leaf("topologyManagerPolicyOptions", Map, "", "topology-manager-policy-options", Honoured),
    leaf("qosReserved", Map, "", "qos-reserved", NotYet),
    leaf("runtimeRequestTimeout", Duration, "2m", "runtime-request-timeout", NotYet),
    leaf("hairpinMode", Text, "promiscuous-bridge", "hairpin-mode", NotYet),
    leaf("maxPods", Integer, "110", "max-pods", Honoured),
    leaf("podCIDR", Text, "", "pod-cidr", Honoured),
    leaf("podPidsLimit", Integer, "-1", "pod-max-pids", Honoured),
    leaf("resolvConf", Text, "/etc/resolv.conf", "resolv-conf", Honoured),
    leaf("runOnce", Bool, "", "runonce", NotYet),
    leaf("cpuCFSQuota", Bool, "true", "cpu-cfs-quota", NotYet),
    leaf("cpuCFSQuotaPeriod", Duration, "100ms", "cpu-cfs-quota-period", NotYet),
    leaf("nodeStatusMaxImages", Integer, "50", "node-status-max-images", Honoured),
    leaf("maxOpenFiles", Integer, "1000000", "max-open-files", NotYet),
    leaf("contentType", Text, "application/vnd.kubernetes.protobuf", "kube-api-content-type", NotYet),
    leaf("kubeAPIQPS", Integer, "50", "kube-api-qps", Honoured),
    leaf("kubeAPIBurst", Integer, "100", "kube-api-burst", Honoured),
    leaf("serializeImagePulls", Bool, "true", "serialize-image-pulls", NotYet),
    leaf("maxParallelImagePulls", Integer, "", "", NotYet),
    leaf("evictionHard", Map, "", "eviction-hard", Honoured),
    leaf("evictionSoft", Map, "", "eviction-soft", Honoured),
    leaf("evictionSoftGracePeriod", Map, "", "eviction-soft-grace-period", Honoured),
    leaf("evictionPressureTransitionPeriod", Duration, "5m", "eviction-pressure-transition-period", Honoured),
    leaf("evictionMaxPodGracePeriod", Integer, "", "eviction-max-pod-grace-period", Honoured),
    leaf("evictionMinimumReclaim", Map, "", "eviction-minimum-reclaim", Honoured),
    leaf("mergeDefaultEvictionSettings", Bool, "false", "", Honoured),
    leaf("podsPerCore", Integer, "", "pods-per-core", NotYet),
    leaf("enableControllerAttachDetach", Bool, "true", "enable-controller-attach-detach", NotYet),
    leaf("protectKernelDefaults", Bool, "", "protect-kernel-defaults", NotYet),
    leaf("makeIPTablesUtilChains", Bool, "true", "make-iptables-util-chains", NotYet),
    leaf("iptablesMasqueradeBit", Integer, "14", "", NotYet),
    leaf("iptablesDropBit", Integer, "15", "", NotYet),
    leaf("featureGates", Map, "", "feature-gates", NotYet),
    leaf("failSwapOn", Bool, "true", "fail-swap-on", NotYet),
    leaf("memorySwap.swapBehavior", Text, "", "", NotYet),
    leaf("containerLogMaxSize", Text, "10Mi", "container-log-max-size", Honoured),
    leaf("containerLogMaxFiles", Integer, "5", "container-log-max-files", Honoured),
    leaf("containerLogMaxWorkers", Integer, "1", "", NotYet),
    leaf("containerLogMonitorInterval", Duration, "10s", "", NotYet),
    leaf("configMapAndSecretChangeDetectionStrategy", Text, "Watch", "", NotYet),
    leaf("systemReserved", Map, "", "system-reserved", Honoured),
    leaf("kubeReserved", Map, "", "kube-reserved", Honoured),
    leaf("reservedSystemCPUs", Text, "", "reserved-cpus", Honoured),
    leaf("showHiddenMetricsForVersion", Text, "", "", NotYet),
    leaf("systemReservedCgroup", Text, "", "system-reserved-cgroup", NotYet),
    leaf("kubeReservedCgroup", Text, "", "kube-reserved-cgroup", NotYet),
    leaf("enforceNodeAllocatable", List, "pods", "enforce-node-allocatable", NotYet),
    leaf("allowedUnsafeSysctls", List, "", "allowed-unsafe-sysctls", Honoured),
    leaf("defaultPodSysctls", Map, "", "", NotYet),
    leaf("volumePluginDir", Text, "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/", "volume-plugin-dir", NotYet),
    leaf("providerID", Text, "", "provider-id", Honoured),
    leaf("kernelMemcgNotification", Bool, "", "kernel-memcg-notification", NotYet),
    leaf("logging", Other, "", "", NotYet),
    leaf("enableSystemLogHandler", Bool, "true", "", NotYet),
    leaf("enableSystemLogQuery", Bool, "", "", NotYet),
    leaf("shutdownGracePeriod", Duration, "", "", Honoured),
    leaf("shutdownGracePeriodCriticalPods", Duration, "", "", Honoured),
    leaf("shutdownGracePeriodByPodPriority", Other, "", "", Honoured),
    leaf("crashLoopBackOff.maxContainerRestartPeriod", Duration, "300s", "", NotYet),
    leaf("reservedMemory", Other, "", "reserved-memory", Honoured),
    leaf("enableProfilingHandler", Bool, "true", "", NotYet),
    leaf("enableDebugFlagsHandler", Bool, "true", "", NotYet),
    leaf("seccompDefault", Bool, "false", "", Honoured),
    leaf("memoryThrottlingFactor", Number, "", "", NotYet),
    leaf("memoryReservationPolicy", Text, "None", "", NotYet),
    leaf("registerWithTaints", Other, "", "register-with-taints", Honoured),
    leaf("registerNode", Bool, "true", "register-node", Honoured),
    leaf("tracing", Other, "", "", NotYet),
    leaf("localStorageCapacityIsolation", Bool, "true", "local-storage-capacity-isolation", Honoured),
    leaf("containerRuntimeEndpoint", Text, "unix:///run/containerd/containerd.sock", "container-runtime-endpoint", Honoured),
    leaf("imageServiceEndpoint", Text, "", "image-service-endpoint", Honoured),
    leaf("failCgroupV1", Bool, "true", "fail-cgroupv1", NotYet),
    leaf("userNamespaces.idsPerPod", Integer, "65536", "", NotYet),];
