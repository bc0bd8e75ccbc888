//! Statistics of real containers, and which images count as in use.

use std::collections::HashMap;
use std::time::Duration;

use cri::server::{Process, Tasks as _};
use cri::{RuntimeService as _, v1};
use futures_util::TryStreamExt as _;
use runtime::ImagesInUse as _;
use testkit::serial::Test;

use crate::fixture::{IMAGE, Node, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("a_container_tells_what_it_uses", a_container_tells_what_it_uses),
    ("a_sandbox_tells_what_its_pod_uses", a_sandbox_tells_what_its_pod_uses),
    ("statistics_are_filtered", statistics_are_filtered),
    ("metrics_of_pods_and_containers", metrics_of_pods_and_containers),
    ("cadvisor_learns_whose_a_group_is", cadvisor_learns_whose_a_group_is),
    ("images_of_containers_are_in_use", images_of_containers_are_in_use),
];

async fn stats(node: &Node, container: &str) -> v1::ContainerStats {
    let request = v1::ContainerStatsRequest { container_id: container.to_owned() };
    node.runtime.container_stats(request).await.unwrap().stats.unwrap()
}

fn value(of: Option<v1::UInt64Value>) -> u64 {
    of.expect("a number").value
}

fn a_container_tells_what_it_uses() {
    on_a_node(|node| async {
        let script = "dd if=/dev/zero of=/written bs=1M count=2 2>/dev/null; echo ready; while :; do :; done";
        let pod = node.pod("busy", script).await;
        while !std::fs::read_to_string(node.status(&pod.container).await.log_path)
            .is_ok_and(|log| log.contains("ready"))
        {
            tokio::task::yield_now().await;
        }
        let first = stats(&node, &pod.container).await;
        let attributes = first.attributes.unwrap();
        assert_eq!((attributes.id.as_str(), attributes.labels["container"].as_str()), (pod.container.as_str(), "main"));
        let memory = first.memory.unwrap();
        assert!(value(memory.usage_bytes) > 0 && value(memory.working_set_bytes) > 0 && memory.timestamp > 0);
        let written = first.writable_layer.unwrap();
        assert!(value(written.used_bytes) >= 2 << 20 && value(written.inodes_used) >= 2, "{written:?}");
        assert!(written.fs_id.unwrap().mountpoint.ends_with("/images"));
        let before = first.cpu.unwrap();
        assert_eq!(before.usage_nano_cores, None, "a rate needs two looks");
        let unified = sys::cgroup::Hierarchy::detect().unwrap().is_unified();
        let has_pressure = unified && std::fs::read("/proc/pressure/cpu").is_ok();
        let measured = [before.psi.is_some(), memory.psi.is_some(), first.io.is_some()];
        assert_eq!(measured, [has_pressure; 3], "pressure is told where the kernel measures it");
        // Not a wait for anything: the interval that the rate is measured over.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let after = stats(&node, &pod.container).await.cpu.unwrap();
        assert!(value(after.usage_core_nano_seconds) > value(before.usage_core_nano_seconds));
        let rate = value(after.usage_nano_cores);
        assert!((50_000_000..1_200_000_000).contains(&rate), "a busy loop uses {rate} billionths of a core");
        node.stop_container(&pod.container, 0).await.unwrap();
        let ended = stats(&node, &pod.container).await;
        assert!(ended.cpu.is_none() && ended.memory.is_none());
        assert!(value(ended.writable_layer.unwrap().used_bytes) >= 2 << 20);
        node
    });
}

fn a_sandbox_tells_what_its_pod_uses() {
    on_a_node(|node| async {
        let pod = node.pod("pair", "sleep 1000").await;
        let second = node.create(&pod.sandbox, &pod.config, script_config("second", "sleep 1000")).await.unwrap();
        node.start_container(&second).await.unwrap();
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.sandbox.clone() };
        let stats = node.runtime.pod_sandbox_stats(request.clone()).await.unwrap().stats.unwrap();
        assert_eq!(stats.attributes.unwrap().metadata.unwrap().name, "pair");
        let linux = stats.linux.unwrap();
        let network = linux.network.unwrap();
        assert_eq!(network.default_interface.unwrap().name, "eth0");
        assert_eq!(value(linux.process.unwrap().process_count), 2);
        assert!(value(linux.memory.unwrap().usage_bytes) > 0 && value(linux.cpu.unwrap().usage_core_nano_seconds) > 0);
        let mut ids: Vec<_> = linux.containers.into_iter().map(|one| one.attributes.unwrap().id).collect();
        let mut expect = vec![pod.container.clone(), second];
        ids.sort();
        expect.sort();
        assert_eq!(ids, expect);
        node.stop_sandbox(&pod.sandbox).await.unwrap();
        let error = node.runtime.pod_sandbox_stats(request).await.unwrap_err();
        assert!(error.to_string().contains("not ready"), "{error}");
        node
    });
}

fn statistics_are_filtered() {
    on_a_node(|node| async {
        let (one, two) = (node.pod("one", "sleep 1000").await, node.pod("two", "sleep 1000").await);
        let containers = async |filter: v1::ContainerStatsFilter| {
            let request = v1::ListContainerStatsRequest { filter: Some(filter) };
            let stats = node.runtime.list_container_stats(request).await.unwrap().stats;
            stats.into_iter().map(|stats| stats.attributes.unwrap().id).collect::<Vec<_>>()
        };
        let by_pod = v1::ContainerStatsFilter { pod_sandbox_id: one.sandbox.clone(), ..Default::default() };
        assert_eq!(containers(by_pod).await, std::slice::from_ref(&one.container));
        let by_id = v1::ContainerStatsFilter { id: two.container[..12].to_owned(), ..Default::default() };
        assert_eq!(containers(by_id).await, std::slice::from_ref(&two.container));
        let label = |value: &str| HashMap::from([("container".to_owned(), value.to_owned())]);
        let by_label = v1::ContainerStatsFilter { label_selector: label("other"), ..Default::default() };
        assert!(containers(by_label).await.is_empty());
        let filter = v1::PodSandboxStatsFilter {
            label_selector: HashMap::from([("app".to_owned(), "two".to_owned())]),
            ..Default::default()
        };
        let stream = node.runtime.stream_pod_sandbox_stats(v1::StreamPodSandboxStatsRequest { filter: Some(filter) });
        let parts: Vec<_> = stream.await.unwrap().try_collect().await.unwrap();
        let ids: Vec<_> = parts.into_iter().flat_map(|part| part.pod_sandbox_stats).collect();
        assert_eq!(ids.len(), 1);
        assert_eq!(ids[0].attributes.clone().unwrap().id, two.sandbox);
        node
    });
}

fn metrics_of_pods_and_containers() {
    on_a_node(|node| async {
        let pod = node.pod("measured", "sleep 1000").await;
        let descriptors = node.runtime.list_metric_descriptors(v1::ListMetricDescriptorsRequest {}).await.unwrap();
        let all = node.runtime.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}).await.unwrap().pod_metrics;
        let [measured] = &all[..] else { panic!("{all:?}") };
        assert_eq!(measured.pod_sandbox_id, pod.sandbox);
        let of_container = &measured.container_metrics[0].metrics;
        for metric in measured.metrics.iter().chain(of_container) {
            let family = descriptors.descriptors.iter().find(|family| family.name == metric.name);
            let keys = &family.unwrap_or_else(|| panic!("{} has no descriptor", metric.name)).label_keys;
            assert_eq!(keys.len(), metric.label_values.len(), "{}", metric.name);
            let at = |key: &str| keys.iter().position(|label| label == key).unwrap();
            assert_eq!(metric.label_values[at("pod")], "measured");
        }
        let find = |name: &str| of_container.iter().find(|metric| metric.name == name).unwrap();
        assert_eq!(find("container_processes").value.unwrap().value, 1);
        assert!(find("container_file_descriptors").value.unwrap().value >= 3);
        assert_eq!(find("container_sockets").value.unwrap().value, 0);
        assert_eq!(find("container_threads_max").label_values.len(), 5, "no limit is one, too");
        assert!(find("container_memory_usage_bytes").value.unwrap().value > 0);
        assert_eq!(find("container_memory_rss").label_values[2..], ["main", &pod.container, IMAGE]);
        assert!(measured.metrics.iter().any(|metric| metric.name == "container_network_receive_bytes_total"));
        node
    });
}

/// What it makes of the answers is tried with upstream's kubelet itself, in the developers' tests of the whole node.
fn cadvisor_learns_whose_a_group_is() {
    on_a_node(|node| async {
        let config = node.sandbox_config("known");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let container = node.create(&sandbox, &config, script_config("main", "exit 3")).await.unwrap();
        let made = node.runtime.task(&container).unwrap();
        assert_eq!((made.process, made.sandbox.as_ref(), made.image.as_str()), (Process::None, Some(&sandbox), IMAGE));
        assert_eq!(made.labels["container"], "main");
        node.start_container(&container).await.unwrap();
        node.exited(&container).await;
        assert_eq!(node.runtime.task(&container).unwrap().process, Process::Ended(3));
        let task = node.runtime.task(&sandbox).unwrap();
        assert_eq!((task.sandbox, task.labels["app"].as_str()), (None, "known"));
        let Process::Runs(Some(keeper)) = task.process else { panic!("{:?}", task.process) };
        let interfaces = std::fs::read_to_string(format!("/proc/{keeper}/net/dev")).unwrap();
        assert!(interfaces.contains("eth0:"), "{interfaces}");
        assert_eq!(node.runtime.task(&sandbox[..12]), None, "only whole ids name a group");
        node.stop_sandbox(&sandbox).await.unwrap();
        assert_eq!(node.runtime.task(&sandbox).unwrap().process, Process::Ended(0));
        let mut config = node.sandbox_config("of-the-host");
        let linux = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        linux.namespace_options =
            Some(v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..Default::default() });
        let sandbox = node.run_sandbox(&config).await.unwrap();
        assert!(matches!(node.runtime.task(&sandbox).unwrap().process, Process::Runs(Some(_))));
        node
    });
}

fn images_of_containers_are_in_use() {
    on_a_node(|node| async {
        let image = node.images.get(IMAGE).unwrap().id.clone();
        assert!(node.runtime.roots().is_empty() && node.runtime.volumes().is_empty());
        let config = node.sandbox_config("volume");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let mount = v1::Mount {
            container_path: "/image".to_owned(),
            image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            readonly: true,
            ..Default::default()
        };
        let request = v1::ContainerConfig { mounts: vec![mount], ..script_config("main", "sleep 1000") };
        let container = node.create(&sandbox, &config, request).await.unwrap();
        assert!(node.runtime.roots().contains(&image));
        assert_eq!(node.runtime.volumes().get(&image), Some(&container));
        node.start_container(&container).await.unwrap();
        assert_eq!(node.runtime.volumes().get(&image), Some(&container));
        let look = "ls /image/bin/busybox; touch /image/new 2>/dev/null || echo ro";
        let seen = node.exec(&container, &["sh", "-c", look], 0).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&seen.stdout), "/image/bin/busybox\nro\n");
        node.stop_container(&container, 0).await.unwrap();
        assert!(node.runtime.volumes().is_empty() && node.runtime.roots().contains(&image));
        node.remove_container(&container).await.unwrap();
        assert!(node.runtime.roots().is_empty());
        node
    });
}
