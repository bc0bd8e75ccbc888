//! Every field of `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1, Kubernetes 1.37): its kind, upstream's default, its
//! flag, and whether this kubelet does what it says. A table, so that nothing that an operator writes is ignored in
//! silence.

use configfile::Kind::{Bool, Duration, Integer, List, Map, Number, Other, Text};
use configfile::Status::{Honoured, Never, NotYet};
use configfile::{Leaf, leaf};

/// All of them, in the order of the API.
#[rustfmt::skip]
pub const LEAVES: &[Leaf] = &[
    leaf("enableServer", Bool, "true", "enable-server", Honoured)
        .says("Serve the kubelet's API"),
    leaf("staticPodPath", Text, "", "pod-manifest-path", Honoured)
        .says("Directory of manifests that run as static pods; it is watched"),
    leaf("podLogsDir", Text, "/var/log/pods", "", Honoured),
    leaf("syncFrequency", Duration, "1m", "sync-frequency", Never("it waits for events, and for nothing by a timer")),
    leaf("fileCheckFrequency", Duration, "20s", "file-check-frequency", Never("files are watched")),
    leaf("httpCheckFrequency", Duration, "20s", "http-check-frequency", Honoured)
        .says("How often --manifest-url is asked"),
    leaf("staticPodURL", Text, "", "manifest-url", Honoured)
        .says("Server that gives manifests, which run as static pods"),
    leaf("staticPodURLHeader", Map, "", "manifest-url-header", Honoured)
        .says("Headers of requests to --manifest-url"),
    leaf("address", Text, "0.0.0.0", "address", Honoured)
        .says("Address on which the kubelet's API listens; 0.0.0.0 is all of them"),
    leaf("port", Integer, "10250", "port", Honoured)
        .says("Port of the kubelet's API"),
    leaf("readOnlyPort", Integer, "", "read-only-port", NotYet),
    leaf("tlsCertFile", Text, "", "tls-cert-file", Honoured)
        .says("Certificate of the kubelet's API, in PEM; without one it makes its own"),
    leaf("tlsPrivateKeyFile", Text, "", "tls-private-key-file", Honoured)
        .says("Key of --tls-cert-file, in PEM"),
    leaf("tlsCipherSuites", List, "", "tls-cipher-suites", NotYet),
    leaf("tlsCurvePreferences", Other, "", "", NotYet),
    leaf("tlsMinVersion", Text, "", "tls-min-version", NotYet),
    leaf("rotateCertificates", Bool, "", "rotate-certificates", Honoured)
        .says("Ask the cluster for another certificate before the node's own one ends"),
    leaf("serverTLSBootstrap", Bool, "", "rotate-server-certificates", Honoured)
        .says("Have the certificate of the kubelet's API signed by the cluster, and renewed"),
    leaf("authentication.anonymous.enabled", Bool, "false", "anonymous-auth", Honoured)
        .says("Take callers of the kubelet's API who do not say who they are for system:anonymous"),
    leaf("authentication.webhook.enabled", Bool, "true", "authentication-token-webhook", Honoured)
        .says("Ask the API server whose a caller's token is (TokenReview)"),
    leaf("authentication.webhook.cacheTTL", Duration, "2m", "authentication-token-webhook-cache-ttl", Honoured)
        .says("How long its answer holds"),
    leaf("authentication.x509.clientCAFile", Text, "", "client-ca-file", Honoured)
        .says("Authorities that sign callers' certificates, in PEM"),
    leaf("authorization.mode", Text, "Webhook", "authorization-mode", Honoured)
        .says("Who may call the kubelet's API: AlwaysAllow, or whom the API server lets (Webhook)"),
    leaf("authorization.webhook.cacheAuthorizedTTL", Duration, "5m", "authorization-webhook-cache-authorized-ttl", Honoured)
        .says("How long the API server's yes holds"),
    leaf("authorization.webhook.cacheUnauthorizedTTL", Duration, "30s", "authorization-webhook-cache-unauthorized-ttl", Honoured)
        .says("How long the API server's no holds"),
    leaf("registryPullQPS", Integer, "5", "registry-qps", NotYet),
    leaf("registryBurst", Integer, "10", "registry-burst", NotYet),
    leaf("imagePullCredentialsVerificationPolicy", Text, "NeverVerifyPreloadedImages", "", Honoured),
    leaf("preloadedImagesVerificationAllowlist", List, "", "", Honoured),
    leaf("eventRecordQPS", Integer, "50", "event-qps", Honoured)
        .says("Most events a second that are written to the API server; 0 is no limit"),
    leaf("eventBurst", Integer, "100", "event-burst", Honoured)
        .says("Most events at once, above --event-qps"),
    leaf("enableDebuggingHandlers", Bool, "true", "enable-debugging-handlers", Honoured)
        .says("Serve what reaches into pods: logs, exec, attach, port-forward"),
    leaf("enableContentionProfiling", Bool, "", "contention-profiling", NotYet),
    leaf("healthzPort", Integer, "10248", "healthz-port", Honoured)
        .says("Port of /healthz; 0 is none"),
    leaf("healthzBindAddress", Text, "127.0.0.1", "healthz-bind-address", Honoured)
        .says("Address of /healthz"),
    leaf("oomScoreAdj", Integer, "-999", "oom-score-adj", NotYet),
    leaf("clusterDomain", Text, "", "cluster-domain", Honoured)
        .says("DNS domain of the cluster, in which pods look for names"),
    leaf("clusterDNS", List, "", "cluster-dns", Honoured)
        .says("Name servers of pods with dnsPolicy ClusterFirst"),
    leaf("streamingConnectionIdleTimeout", Duration, "4h", "streaming-connection-idle-timeout", NotYet),
    leaf("nodeStatusUpdateFrequency", Duration, "10s", "node-status-update-frequency", Honoured)
        .says("How often the node's status is looked at; what has changed is written"),
    leaf("nodeStatusReportFrequency", Duration, "5m", "", Honoured),
    leaf("nodeLeaseDurationSeconds", Integer, "40", "", Honoured),
    leaf("imageMinimumGCAge", Duration, "2m", "minimum-image-ttl-duration", Honoured)
        .says("Age from which an unused image may be removed to free the disk"),
    leaf("imageMaximumGCAge", Duration, "", "", Honoured),
    leaf("imageGCHighThresholdPercent", Integer, "85", "image-gc-high-threshold", Honoured)
        .says("Percentage of the disk in use from which unused images are removed"),
    leaf("imageGCLowThresholdPercent", Integer, "80", "image-gc-low-threshold", Honoured)
        .says("Percentage of the disk in use down to which they are"),
    leaf("volumeStatsAggPeriod", Duration, "1m", "volume-stats-agg-period", Never("volumes are measured when somebody asks")),
    leaf("kubeletCgroups", Text, "", "kubelet-cgroups", NotYet),
    leaf("systemCgroups", Text, "", "system-cgroups", NotYet),
    leaf("cgroupRoot", Text, "", "cgroup-root", Honoured)
        .says("Control group that pods are below"),
    leaf("cgroupsPerQOS", Bool, "true", "cgroups-per-qos", NotYet),
    leaf("cgroupDriver", Text, "cgroupfs", "cgroup-driver", Honoured)
        .says("Whether this program makes control groups itself (cgroupfs) or asks systemd (systemd)"),
    leaf("cpuManagerPolicy", Text, "none", "cpu-manager-policy", Honoured)
        .says("Whether Guaranteed pods have their CPUs to themselves (static) or not (none)"),
    leaf("singleProcessOOMKill", Bool, "", "", Honoured),
    leaf("cpuManagerPolicyOptions", Map, "", "cpu-manager-policy-options", Honoured)
        .says("Options of the policy static: name=true,…"),
    leaf("cpuManagerReconcilePeriod", Duration, "10s", "cpu-manager-reconcile-period", NotYet),
    leaf("memoryManagerPolicy", Text, "None", "memory-manager-policy", Honoured)
        .says("Whether Guaranteed pods get memory of chosen NUMA nodes (Static) or not (None)"),
    leaf("topologyManagerPolicy", Text, "none", "topology-manager-policy", Honoured)
        .says("How near to each other CPUs, memory and devices have to be: none, best-effort, restricted, single-numa-node"),
    leaf("topologyManagerScope", Text, "container", "topology-manager-scope", Honoured)
        .says("Whether that counts for each container or for a whole pod: container, pod"),
    leaf("topologyManagerPolicyOptions", Map, "", "topology-manager-policy-options", Honoured)
        .says("Options of --topology-manager-policy: name=true,…"),
    leaf("qosReserved", Map, "", "qos-reserved", NotYet),
    leaf("runtimeRequestTimeout", Duration, "2m", "runtime-request-timeout", Honoured)
        .says("How long another runtime may take to answer"),
    leaf("hairpinMode", Text, "promiscuous-bridge", "hairpin-mode", NotYet),
    leaf("maxPods", Integer, "110", "max-pods", Honoured)
        .says("Most pods on the node"),
    leaf("podCIDR", Text, "", "pod-cidr", Honoured),
    leaf("podPidsLimit", Integer, "-1", "pod-max-pids", Honoured)
        .says("Most processes in a pod; -1 is no limit"),
    leaf("resolvConf", Text, "/etc/resolv.conf", "resolv-conf", Honoured)
        .says("Where the name servers of pods come from that do not ask the cluster's"),
    leaf("runOnce", Bool, "", "runonce", NotYet),
    leaf("cpuCFSQuota", Bool, "true", "cpu-cfs-quota", Honoured)
        .says("Hold containers to their limits of CPU"),
    leaf("cpuCFSQuotaPeriod", Duration, "100ms", "cpu-cfs-quota-period", Honoured)
        .says("Time over which a limit of CPU is counted"),
    leaf("nodeStatusMaxImages", Integer, "50", "node-status-max-images", Honoured)
        .says("Most images that the node's status lists; -1 is no limit"),
    leaf("maxOpenFiles", Integer, "1000000", "max-open-files", Honoured)
        .says("Most files that this program may have open"),
    leaf("contentType", Text, "application/vnd.kubernetes.protobuf", "kube-api-content-type", Never("it speaks JSON with the API server")),
    leaf("kubeAPIQPS", Integer, "50", "kube-api-qps", Honoured)
        .says("Most requests a second to the API server"),
    leaf("kubeAPIBurst", Integer, "100", "kube-api-burst", Honoured)
        .says("Most requests at once, above --kube-api-qps"),
    leaf("serializeImagePulls", Bool, "true", "serialize-image-pulls", Honoured)
        .says("Pull one image after the other [default: false; upstream's is true]"),
    leaf("maxParallelImagePulls", Integer, "", "", Honoured),
    leaf("evictionHard", Map, "", "eviction-hard", Honoured)
        .says("When pods are evicted at once: memory.available<100Mi,…"),
    leaf("evictionSoft", Map, "", "eviction-soft", Honoured)
        .says("When pods are evicted after a while: memory.available<300Mi,…"),
    leaf("evictionSoftGracePeriod", Map, "", "eviction-soft-grace-period", Honoured)
        .says("How long that is: memory.available=30s,…"),
    leaf("evictionPressureTransitionPeriod", Duration, "5m", "eviction-pressure-transition-period", Honoured)
        .says("How long the node says that it is short of something after it no longer is"),
    leaf("evictionMaxPodGracePeriod", Integer, "", "eviction-max-pod-grace-period", Honoured)
        .says("Most seconds that a pod gets to end when --eviction-soft is met"),
    leaf("evictionMinimumReclaim", Map, "", "eviction-minimum-reclaim", Honoured)
        .says("What is freed at least once it has begun: imagefs.available=2Gi,…"),
    leaf("mergeDefaultEvictionSettings", Bool, "false", "", Honoured),
    leaf("podsPerCore", Integer, "", "pods-per-core", Honoured)
        .says("Most pods for each CPU; 0 is no limit besides --max-pods"),
    leaf("enableControllerAttachDetach", Bool, "true", "enable-controller-attach-detach", NotYet),
    leaf("protectKernelDefaults", Bool, "", "protect-kernel-defaults", NotYet),
    leaf("makeIPTablesUtilChains", Bool, "true", "make-iptables-util-chains", NotYet),
    leaf("iptablesMasqueradeBit", Integer, "14", "", NotYet),
    leaf("iptablesDropBit", Integer, "15", "", NotYet),
    leaf("featureGates", Map, "", "feature-gates", NotYet),
    leaf("failSwapOn", Bool, "true", "fail-swap-on", Honoured)
        .says("Do not start on a machine that swaps [default: false; upstream's is true]"),
    leaf("memorySwap.swapBehavior", Text, "", "", Honoured),
    leaf("containerLogMaxSize", Text, "10Mi", "container-log-max-size", Honoured)
        .says("Size from which a container's log goes on in another file"),
    leaf("containerLogMaxFiles", Integer, "5", "container-log-max-files", Honoured)
        .says("Most files of a container's log"),
    leaf("containerLogMaxWorkers", Integer, "1", "", Honoured),
    leaf("containerLogMonitorInterval", Duration, "10s", "", Honoured),
    leaf("configMapAndSecretChangeDetectionStrategy", Text, "Watch", "", Never("every object that a pod needs is watched")),
    leaf("systemReserved", Map, "", "system-reserved", Honoured)
        .says("What of the machine pods do not get, for the system: cpu=500m,memory=1Gi,…"),
    leaf("kubeReserved", Map, "", "kube-reserved", Honoured)
        .says("What of the machine pods do not get, for the node's own programs: cpu=500m,memory=1Gi,…"),
    leaf("reservedSystemCPUs", Text, "", "reserved-cpus", Honoured)
        .says("CPUs that no pod has to itself: 0-1"),
    leaf("showHiddenMetricsForVersion", Text, "", "", NotYet),
    leaf("systemReservedCgroup", Text, "", "system-reserved-cgroup", Honoured)
        .says("Control group that is held to --system-reserved"),
    leaf("kubeReservedCgroup", Text, "", "kube-reserved-cgroup", Honoured)
        .says("Control group that is held to --kube-reserved"),
    leaf("enforceNodeAllocatable", List, "pods", "enforce-node-allocatable", Honoured)
        .says("Whom control groups hold to their part of the machine: none, or some of pods, system-reserved, kube-reserved"),
    leaf("allowedUnsafeSysctls", List, "", "allowed-unsafe-sysctls", Honoured)
        .says("Sysctls that pods may set though they are not safe: net.*,…"),
    leaf("defaultPodSysctls", Map, "", "", NotYet),
    leaf("volumePluginDir", Text, "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/", "volume-plugin-dir", NotYet),
    leaf("providerID", Text, "", "provider-id", Honoured)
        .says("What the cloud calls this machine (spec.providerID)"),
    leaf("kernelMemcgNotification", Bool, "", "kernel-memcg-notification", Never("pressure stall information wakes it")),
    leaf("logging", Other, "", "", NotYet),
    leaf("enableSystemLogHandler", Bool, "true", "", Honoured),
    leaf("enableSystemLogQuery", Bool, "", "", Honoured),
    leaf("shutdownGracePeriod", Duration, "", "", Honoured),
    leaf("shutdownGracePeriodCriticalPods", Duration, "", "", Honoured),
    leaf("shutdownGracePeriodByPodPriority", Other, "", "", Honoured),
    leaf("crashLoopBackOff.maxContainerRestartPeriod", Duration, "300s", "", NotYet),
    leaf("reservedMemory", Other, "", "reserved-memory", Honoured)
        .says("Memory of NUMA nodes that the policy Static gives to no pod: 0:memory=1Gi;1:memory=1Gi"),
    leaf("enableProfilingHandler", Bool, "true", "", NotYet),
    leaf("enableDebugFlagsHandler", Bool, "true", "", NotYet),
    leaf("seccompDefault", Bool, "false", "seccomp-default", Honoured)
        .says("Containers that ask for no seccomp profile get RuntimeDefault"),
    leaf("memoryThrottlingFactor", Number, "", "", Honoured),
    leaf("memoryReservationPolicy", Text, "None", "", Honoured),
    leaf("registerWithTaints", Other, "", "register-with-taints", Honoured)
        .says("Taints that the node is born with: key=value:effect,…"),
    leaf("registerNode", Bool, "true", "register-node", Honoured)
        .says("Make the Node in the API server"),
    leaf("tracing", Other, "", "", NotYet),
    leaf("localStorageCapacityIsolation", Bool, "true", "local-storage-capacity-isolation", Honoured)
        .says("Count what pods keep on the node's disk, and hold them to their limits"),
    leaf("containerRuntimeEndpoint", Text, "unix:///run/containerd/containerd.sock", "container-runtime-endpoint", Honoured)
        .says("Socket of another runtime: unix:///run/containerd/containerd.sock [default: this program is the runtime]"),
    leaf("imageServiceEndpoint", Text, "", "image-service-endpoint", Honoured)
        .says("Socket of its images, if that is another one"),
    leaf("failCgroupV1", Bool, "true", "fail-cgroupv1", NotYet),
    leaf("userNamespaces.idsPerPod", Integer, "65536", "", NotYet),
];

/// Flags of upstream's kubelet that stand for no field and have no effect here: taken, and warned about by name.
#[rustfmt::skip]
pub const FLAGS_WITHOUT_EFFECT: &[Leaf] = &[
    leaf("--exit-on-lock-contention", Bool, "false", "exit-on-lock-contention", NotYet),
    leaf("--experimental-allocatable-ignore-eviction", Bool, "false", "experimental-allocatable-ignore-eviction", NotYet),
    leaf("--experimental-mounter-path", Text, "", "experimental-mounter-path", Never("it mounts by system calls and not by a program")),
    leaf("--housekeeping-interval", Duration, "10s", "housekeeping-interval", Never("figures are read when somebody asks for them")),
    leaf("--lock-file", Text, "", "lock-file", Never("a lock in --run-dir keeps a second kubelet away")),
    leaf("--log-flush-frequency", Duration, "5s", "log-flush-frequency", Never("every line is written at once")),
    leaf("--log-json-info-buffer-size", Text, "0", "log-json-info-buffer-size", Never("every line is written at once")),
    leaf("--log-json-split-stream", Bool, "false", "log-json-split-stream", NotYet),
    leaf("--log-text-info-buffer-size", Text, "0", "log-text-info-buffer-size", Never("every line is written at once")),
    leaf("--log-text-split-stream", Bool, "false", "log-text-split-stream", NotYet),
    leaf("--logging-format", Text, "text", "logging-format", NotYet),
    leaf("--maximum-dead-containers", Integer, "-1", "maximum-dead-containers", Never("runs before the last are removed as the next one starts")),
    leaf("--maximum-dead-containers-per-container", Integer, "1", "maximum-dead-containers-per-container", Never("one run that has ended is kept of each container")),
    leaf("--minimum-container-ttl-duration", Duration, "0s", "minimum-container-ttl-duration", Never("runs before the last are removed as the next one starts")),
    leaf("--runtime-cgroups", Text, "", "runtime-cgroups", Never("the runtime is this very program; an external one stays where it is")),
    leaf("--vmodule", Text, "", "vmodule", NotYet),
];
