//! Names of metrics: those that upstream's kubelet 1.37 registers and dashboards know, and why some of them are not told here.

/// In alphabetical order.
pub(crate) const OF_UPSTREAM: &str = "csi_node_storage_health_status csi_operations_seconds dra_grpc_operations_duration_seconds \
    dra_node_prepare_skips_total dra_node_unprepare_skips_total dra_operations_duration_seconds \
    force_cleaned_failed_volume_operation_errors_total force_cleaned_failed_volume_operations_total \
    kubelet_active_pods kubelet_admission_rejections_total \
    kubelet_certificate_manager_client_expiration_renew_errors kubelet_certificate_manager_server_ttl_seconds \
    kubelet_cgroup_manager_duration_seconds kubelet_cgroup_version kubelet_container_aligned_compute_resources_count \
    kubelet_container_aligned_compute_resources_failure_count kubelet_container_log_filesystem_used_bytes \
    kubelet_container_requested_resizes_total kubelet_containers_per_pod_count \
    kubelet_cpu_manager_allocation_per_numa kubelet_cpu_manager_exclusive_cpu_allocation_count \
    kubelet_cpu_manager_pinning_errors_total kubelet_cpu_manager_pinning_requests_total \
    kubelet_cpu_manager_shared_pool_size_millicores kubelet_cri_losing_support kubelet_desired_pods \
    kubelet_device_plugin_alloc_duration_seconds kubelet_device_plugin_registration_total \
    kubelet_evented_pleg_connection_error_count kubelet_evented_pleg_connection_latency_seconds \
    kubelet_evented_pleg_connection_success_count kubelet_eviction_stats_age_seconds kubelet_evictions \
    kubelet_first_network_pod_start_sli_duration_seconds kubelet_graceful_shutdown_end_time_seconds \
    kubelet_graceful_shutdown_start_time_seconds kubelet_http_inflight_requests \
    kubelet_http_requests_duration_seconds kubelet_http_requests_total kubelet_image_garbage_collected_total \
    kubelet_image_manager_ensure_image_requests_total kubelet_image_pull_duration_seconds \
    kubelet_image_volume_mounted_errors_total kubelet_image_volume_mounted_succeed_total \
    kubelet_image_volume_requested_total kubelet_imagemanager_image_mustpull_checks_total \
    kubelet_imagemanager_inmemory_pulledrecords_usage_percent \
    kubelet_imagemanager_inmemory_pullintents_usage_percent kubelet_imagemanager_ondisk_pulledrecords \
    kubelet_imagemanager_ondisk_pullintents kubelet_lifecycle_handler_http_fallbacks_total \
    kubelet_managed_ephemeral_containers kubelet_memory_manager_pinning_errors_total \
    kubelet_memory_manager_pinning_requests_total kubelet_memory_qos_node_memory_low_bytes \
    kubelet_memory_qos_node_memory_min_bytes kubelet_metrics_provider kubelet_mirror_pods kubelet_node_name \
    kubelet_node_startup_duration_seconds kubelet_node_startup_post_registration_duration_seconds \
    kubelet_node_startup_pre_kubelet_duration_seconds kubelet_node_startup_pre_registration_duration_seconds \
    kubelet_node_startup_registration_duration_seconds kubelet_orphan_pod_cleaned_volumes \
    kubelet_orphan_pod_cleaned_volumes_errors kubelet_orphaned_runtime_pods_total kubelet_pleg_discard_events \
    kubelet_pleg_last_seen_seconds kubelet_pleg_pod_relist_duration_seconds kubelet_pleg_relist_duration_seconds \
    kubelet_pleg_relist_interval_seconds kubelet_pod_certificate_states kubelet_pod_deferred_accepted_resizes_total \
    kubelet_pod_deferred_resize_duration_seconds kubelet_pod_in_progress_resizes \
    kubelet_pod_infeasible_resizes_total kubelet_pod_level_resources_admission_total kubelet_pod_pending_resizes \
    kubelet_pod_requests_get_total kubelet_pod_requests_list_total kubelet_pod_requests_total \
    kubelet_pod_requests_watch_total kubelet_pod_resize_duration_milliseconds \
    kubelet_pod_resources_endpoint_errors_get kubelet_pod_resources_endpoint_errors_get_allocatable \
    kubelet_pod_resources_endpoint_errors_list kubelet_pod_resources_endpoint_requests_get \
    kubelet_pod_resources_endpoint_requests_get_allocatable kubelet_pod_resources_endpoint_requests_list \
    kubelet_pod_resources_endpoint_requests_total kubelet_pod_start_duration_seconds \
    kubelet_pod_start_sli_duration_seconds kubelet_pod_start_total_duration_seconds \
    kubelet_pod_status_sync_duration_seconds kubelet_pod_watch_events_dropped_total \
    kubelet_pod_worker_duration_seconds kubelet_pod_worker_start_duration_seconds kubelet_preemptions \
    kubelet_resource_manager_allocation_errors_total kubelet_resource_manager_allocations_total \
    kubelet_resource_manager_container_assignments_total kubelet_restarted_pods_total \
    kubelet_run_podsandbox_duration_seconds kubelet_run_podsandbox_errors_total kubelet_running_containers \
    kubelet_running_pods kubelet_runtime_operations_duration_seconds kubelet_runtime_operations_errors_total \
    kubelet_runtime_operations_total kubelet_server_expiration_renew_errors \
    kubelet_sleep_action_terminated_early_total kubelet_started_containers_errors_total \
    kubelet_started_containers_total kubelet_started_host_process_containers_errors_total \
    kubelet_started_host_process_containers_total kubelet_started_pods_errors_total kubelet_started_pods_total \
    kubelet_started_user_namespaced_pods_errors_total kubelet_started_user_namespaced_pods_total \
    kubelet_terminated_containers_total kubelet_topology_manager_admission_duration_ms \
    kubelet_topology_manager_admission_errors_total kubelet_topology_manager_admission_requests_total \
    kubelet_volume_metric_collection_duration_seconds kubelet_volume_stats_available_bytes \
    kubelet_volume_stats_capacity_bytes kubelet_volume_stats_inodes kubelet_volume_stats_inodes_free \
    kubelet_volume_stats_inodes_used kubelet_volume_stats_used_bytes kubelet_websocket_streaming_requests_total \
    kubelet_working_pods prober_probe_duration_seconds prober_probe_total process_cpu_seconds_total process_open_fds \
    process_resident_memory_bytes reconstruct_volume_operations_errors_total reconstruct_volume_operations_total \
    storage_operation_duration_seconds volume_manager_selinux_container_errors_total \
    volume_manager_selinux_container_warnings_total volume_manager_selinux_pod_context_mismatch_errors_total \
    volume_manager_selinux_pod_context_mismatch_warnings_total \
    volume_manager_selinux_volume_context_mismatch_errors_total \
    volume_manager_selinux_volume_context_mismatch_warnings_total volume_manager_selinux_volumes_admitted_total \
    volume_manager_total_volumes volume_operation_total_seconds";

/// Beginnings of the names that are not told, and why.
pub(crate) const NOT_TOLD: &[(&str, &str)] = &[
    ("csi_node_storage_health_status", "an alpha feature of Kubernetes that is not there yet"),
    ("csi_operations_seconds", "calls of drivers are told as the time that making the volume took"),
    ("dra_node_prepare_skips_total", "every driver of a claim is asked"),
    ("dra_node_unprepare_skips_total", "every driver of a claim is asked"),
    ("force_cleaned_failed_volume_operation", "what is mounted is known from files, and not found out again"),
    ("kubelet_certificate_manager_server_ttl_seconds", "the program tells it, which has the files"),
    ("kubelet_container_aligned_compute_resources", "what is given out whole is not counted yet"),
    ("kubelet_container_log_filesystem_used_bytes", "/stats/summary has it"),
    ("kubelet_container_requested_resizes_total", "resizes are not counted yet: events tell of each"),
    ("kubelet_containers_per_pod_count", "parsers take a distribution whose name ends so for the count of another"),
    ("kubelet_cpu_manager_", "what is given out whole is not counted yet"),
    ("kubelet_cri_losing_support", "there is one version of CRI"),
    ("kubelet_device_plugin_", "what is given out whole is not counted yet"),
    ("kubelet_evented_pleg_", "nothing is listed again to find out what has happened"),
    ("kubelet_eviction_stats_age_seconds", "eviction measures when it decides"),
    (
        "kubelet_first_network_pod_start_sli_duration_seconds",
        "kubelet_pod_start_sli_duration_seconds has the first pod, too",
    ),
    ("kubelet_graceful_shutdown_", "who would ask is going down"),
    ("kubelet_http_inflight_requests", "answers are short, and sessions are their pods'"),
    ("kubelet_image_garbage_collected_total", "the log tells what a round has removed"),
    (
        "kubelet_image_manager_ensure_image_requests_total",
        "kubelet_runtime_operations_total has pull_image and image_status",
    ),
    ("kubelet_image_volume_", "storage_operation_duration_seconds has volumes of images"),
    ("kubelet_imagemanager_", "records of pulls are not counted yet"),
    ("kubelet_lifecycle_handler_http_fallbacks_total", "a hook that is to be asked by TLS is asked by nothing else"),
    ("kubelet_memory_manager_pinning_", "what is given out whole is not counted yet"),
    ("kubelet_memory_qos_", "memory.min and memory.low are in the files of the groups"),
    ("kubelet_metrics_provider", "the runtime provides them, whichever it is"),
    ("kubelet_node_startup_", "the node's conditions have the times"),
    ("kubelet_orphan_pod_cleaned_volumes", "volumes of pods that are gone are taken down as those of others"),
    ("kubelet_orphaned_runtime_pods_total", "what runs of no pod is removed when it is seen, and logged"),
    ("kubelet_pleg_", "nothing is listed again to find out what has happened"),
    ("kubelet_pod_certificate_states", "certificates of pods are not counted yet"),
    ("kubelet_pod_deferred_", "resizes are not counted yet: events tell of each"),
    ("kubelet_pod_in_progress_resizes", "resizes are not counted yet: events tell of each"),
    ("kubelet_pod_infeasible_resizes_total", "resizes are not counted yet: events tell of each"),
    ("kubelet_pod_level_resources_admission_total", "kubelet_admission_rejections_total has what is refused"),
    ("kubelet_pod_pending_resizes", "resizes are not counted yet: events tell of each"),
    ("kubelet_pod_requests_", "questions to the Pods API are not counted yet"),
    ("kubelet_pod_resize_duration_milliseconds", "resizes are not counted yet: events tell of each"),
    ("kubelet_pod_resources_endpoint_", "questions about resources are not counted yet"),
    (
        "kubelet_pod_status_sync_duration_seconds",
        "rest_client_request_duration_seconds has the requests that statuses are",
    ),
    ("kubelet_pod_watch_events_dropped_total", "who follows pods is told differences, and nothing is dropped"),
    ("kubelet_resource_manager_", "what is given out whole is not counted yet"),
    ("kubelet_restarted_pods_total", "a pod with another UID is another pod here"),
    ("kubelet_sleep_action_terminated_early_total", "the end of a hook is no event of its own"),
    ("kubelet_started_host_process_containers", "they are Windows'"),
    ("kubelet_topology_manager_", "what is given out whole is not counted yet"),
    (
        "kubelet_volume_metric_collection_duration_seconds",
        "volumes are measured when somebody asks, who sees how long it takes",
    ),
    ("kubelet_working_pods", "a worker is there exactly as long as its pod: kubelet_desired_pods"),
    ("reconstruct_volume_operations", "what is mounted is known from files, and not found out again"),
    ("volume_manager_selinux_", "pods with different labels for one volume are not looked for"),
    ("volume_operation_total_seconds", "storage_operation_duration_seconds has it"),
];
