//! Volumes of a CSI driver: mounted, kept over a restart, taken down; and a driver that hangs.

use std::collections::HashMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster::Source as _;
use plugin::csi::node_service_capability::rpc::Type as Ability;
use serde_json::{Value, json};
use testkit::csi::{Call, Driver, DriverConfig};
use testkit::serial::Test;

use crate::fixture::{LIMIT, Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("a_volume_of_a_driver_outlives_the_daemon", a_volume_of_a_driver_outlives_the_daemon),
    ("a_driver_that_hangs_holds_up_its_pods_only", a_driver_that_hangs_holds_up_its_pods_only),
    ("a_pod_brings_its_own_volume", a_pod_brings_its_own_volume),
    ("a_volume_is_used_when_it_is_attached", a_volume_is_used_when_it_is_attached),
    ("a_node_that_is_full_of_volumes_rejects_the_pod", a_node_that_is_full_of_volumes_rejects_the_pod),
    ("a_device_of_a_driver", a_device_of_a_driver),
    ("a_volume_of_another_zone_is_not_used", a_volume_of_another_zone_is_not_used),
    ("a_volume_is_published_again_with_tokens", a_volume_is_published_again_with_tokens),
    ("what_another_kubelet_has_published_is_taken_down", what_another_kubelet_has_published_is_taken_down),
    ("a_device_that_another_kubelet_has_mapped_is_taken_down", a_device_that_another_kubelet_has_mapped_is_taken_down),
];

const NAME: &str = "test.csi.example";

fn driver(node: &Node, abilities: &[Ability]) -> Driver {
    let config = DriverConfig {
        name: NAME.to_owned(),
        node_id: "here".to_owned(),
        volumes: node.path("driver"),
        abilities: abilities.to_vec(),
        topology: HashMap::new(),
        volumes_max: 0,
    };
    Driver::start(config, &node.path("kubelet")).unwrap()
}

/// What the cluster says of the driver.
fn describe(node: &Node, spec: Value) {
    let about = json!({ "metadata": { "name": NAME }, "spec": spec });
    node.desk.store().csi_drivers().put(serde_json::from_value(about).unwrap());
}

/// A claim called `data`, bound to a volume of the driver; `spec` is merged into the volume's.
fn bind(node: &Node, spec: Value) {
    let secret = json!({ "name": "key", "namespace": "default" });
    let mut merged = json!({
        "accessModes": ["ReadWriteOnce"], "capacity": { "storage": "1Gi" }, "mountOptions": ["noatime"],
        "claimRef": { "name": "data", "namespace": "default", "uid": "claim" },
        "csi": { "driver": NAME, "volumeHandle": "disk-1", "fsType": "ext4", "volumeAttributes": { "kind": "fast" },
            "nodeStageSecretRef": secret, "nodePublishSecretRef": secret } });
    merged.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    let store = node.desk.store();
    let volume = json!({ "metadata": { "name": "pv-1" }, "spec": merged });
    store.persistent_volumes().put(serde_json::from_value(volume).unwrap());
    let claim = json!({ "metadata": { "name": "data", "namespace": "default", "uid": "claim" },
        "spec": { "volumeName": "pv-1" }, "status": { "phase": "Bound", "capacity": { "storage": "1Gi" } } });
    store.persistent_volume_claims().put(serde_json::from_value(claim).unwrap());
    let secret = json!({ "metadata": { "name": "key", "namespace": "default" }, "data": { "token": "c2VjcmV0" } });
    store.secrets().put(serde_json::from_value(secret).unwrap());
}

/// Wants a pod that runs `script` with the volume at `/all`, and a part of it at `/data`, before it sleeps.
fn want(node: &Node, name: &str, script: &str, source: Value) {
    let mut volume = source;
    volume["name"] = json!("v");
    let mounts = json!([{ "name": "v", "mountPath": "/data", "subPath": "sub" }, { "name": "v", "mountPath": "/all" }]);
    let container = |name: &str, script: &str| {
        let command = json!(["sh", "-c", script]);
        json!({ "name": name, "image": node.image(), "command": command, "volumeMounts": mounts })
    };
    let spec = json!({
        "terminationGracePeriodSeconds": 1, "securityContext": { "fsGroup": 4321 }, "volumes": [volume],
        "initContainers": [container("i", script)], "containers": [container("c", "sleep 1000")] });
    node.want_spec(name, spec);
}

fn claim() -> Value {
    json!({ "persistentVolumeClaim": { "claimName": "data" } })
}

/// Waits until the driver has answered this call so often; returns all its calls.
async fn called(driver: &Driver, name: &str, times: usize) -> Vec<Call> {
    let mut calls = driver.calls();
    let done = calls.wait_for(|calls| calls.iter().filter(|call| call.name() == name).count() >= times);
    tokio::time::timeout(LIMIT, done).await.expect("the driver is called").unwrap().clone()
}

fn names(calls: &[Call]) -> Vec<&'static str> {
    calls.iter().map(Call::name).collect()
}

fn a_volume_of_a_driver_outlives_the_daemon() {
    on_a_node(|mut node| async {
        let driver = driver(&node, &[Ability::StageUnstageVolume, Ability::GetVolumeStats, Ability::ExpandVolume]);
        describe(&node, json!({ "attachRequired": false, "fsGroupPolicy": "File", "podInfoOnMount": true }));
        bind(&node, json!({}));
        want(&node, "one", "echo here > /data/file", claim());
        node.desk.running("one").await;
        let calls = called(&driver, "NodePublishVolume", 1).await;
        assert_eq!(names(&calls), ["NodeStageVolume", "NodePublishVolume"]);
        let [Call::Stage(stage), Call::Publish(publish)] = &calls[..] else { panic!("{calls:?}") };
        assert_eq!((stage.secrets["token"].as_str(), stage.volume_context["kind"].as_str()), ("secret", "fast"));
        assert_eq!(publish.volume_context["csi.storage.k8s.io/pod.name"], "one");
        assert_eq!(publish.staging_target_path, stage.staging_target_path);
        assert!(publish.target_path.ends_with("volumes/kubernetes.io~csi/pv-1/mount"), "{}", publish.target_path);
        let file = node.path("driver/disk-1/sub/file");
        assert_eq!(file.parent().unwrap().metadata().unwrap().gid(), 4321, "it is the pod's group's");
        want(&node, "two", "true", claim());
        node.desk.running("two").await;
        let before = node.containers("one").await;
        node.restart(node.desk.clone()).await;
        want(&node, "three", "true", claim());
        node.desk.running("three").await;
        assert_eq!(node.containers("one").await, before, "it runs on");
        let stats = node.volumes.stats(&node.desk.pod("one").unwrap()).await;
        let claim = Some(("default".to_owned(), "data".to_owned()));
        assert_eq!((stats[0].volume.as_str(), &stats[0].claim, stats[0].bytes.is_some()), ("v", &claim, true));
        // It has grown, which the node is to see while its pods run.
        bind(&node, json!({ "capacity": { "storage": "2Gi" } }));
        let calls = called(&driver, "NodeExpandVolume", 1).await;
        let Some(Call::Expand(expand)) = calls.iter().find(|call| call.name() == "NodeExpandVolume") else { panic!() };
        assert_eq!(expand.capacity_range.unwrap().required_bytes, 2 << 30);
        for name in ["one", "two"] {
            node.desk.delete(name, 0);
            node.desk.gone(name).await;
        }
        let calls = called(&driver, "NodeUnpublishVolume", 2).await;
        assert!(!names(&calls).contains(&"NodeUnstageVolume"), "another pod has it");
        node.desk.delete("three", 0);
        node.desk.gone("three").await;
        let calls = called(&driver, "NodeUnstageVolume", 1).await;
        assert_eq!(calls.last().map(Call::name), Some("NodeUnstageVolume"));
        assert!(!node.path("kubelet/plugins/kubernetes.io/csi/test.csi.example").read_dir().unwrap().any(|_| true));
        assert_eq!(fs::read_to_string(file).unwrap(), "here\n");
        node
    });
}

fn a_driver_that_hangs_holds_up_its_pods_only() {
    on_a_node(|node| async {
        let driver = driver(&node, &[Ability::StageUnstageVolume]);
        describe(&node, json!({ "attachRequired": false }));
        bind(&node, json!({}));
        driver.hang(Some("NodeStageVolume"));
        want(&node, "waits", "true", claim());
        node.want("other", "sleep 1000", json!({}));
        node.desk.running("other").await;
        let says = |desk: &crate::desk::Desk, reason: &str, text: &str| {
            let events = desk.store().events().list();
            events.iter().any(|event| {
                event.reason.as_deref() == Some(reason)
                    && event.message.as_ref().is_some_and(|said| said.contains(text))
            })
        };
        let told = "CSI driver test.csi.example: NodeStageVolume: no answer within 3 s";
        node.desk.when("it is told who hangs", |desk| says(desk, "FailedMount", told)).await;
        driver.hang(None);
        node.desk.running("waits").await;
        driver.hang(Some("NodeUnpublishVolume"));
        node.desk.delete("waits", 0);
        let told = "CSI driver test.csi.example: NodeUnpublishVolume: no answer within 3 s";
        node.desk.when("it is told who hangs", |desk| says(desk, "FailedUnMount", told)).await;
        assert!(node.desk.pod("waits").is_some(), "the pod stays: another node may wait for its volume");
        node.desk.delete("other", 0);
        node.desk.gone("other").await;
        driver.hang(None);
        node.desk.gone("waits").await;
        called(&driver, "NodeUnstageVolume", 1).await;
        node
    });
}

fn a_pod_brings_its_own_volume() {
    on_a_node(|node| async {
        // A driver that comes when its pod already waits.
        want(&node, "p", "echo x > /all/file", json!({ "csi": { "driver": NAME, "volumeAttributes": { "a": "b" } } }));
        describe(
            &node,
            json!({ "attachRequired": false, "podInfoOnMount": true, "volumeLifecycleModes": ["Ephemeral"] }),
        );
        let driver = driver(&node, &[Ability::VolumeMountGroup]);
        node.desk.running("p").await;
        let calls = called(&driver, "NodePublishVolume", 1).await;
        let [Call::Publish(publish)] = &calls[..] else { panic!("{calls:?}") };
        assert_eq!(publish.volume_context["csi.storage.k8s.io/ephemeral"], "true");
        assert_eq!(publish.volume_context["a"], "b");
        let capability = publish.volume_capability.as_ref().unwrap();
        let Some(plugin::csi::volume_capability::AccessType::Mount(mount)) = &capability.access_type else { panic!() };
        assert_eq!(mount.volume_mount_group, "4321", "the driver sets the group");
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        assert_eq!(
            names(&called(&driver, "NodeUnpublishVolume", 1).await),
            ["NodePublishVolume", "NodeUnpublishVolume"]
        );
        node
    });
}

fn a_volume_is_used_when_it_is_attached() {
    on_a_node(|node| async {
        let driver = driver(&node, &[]);
        bind(&node, json!({}));
        want(&node, "p", "true", claim());
        let mut in_use = node.volumes.in_use();
        let volume = "kubernetes.io/csi/test.csi.example^disk-1".to_owned();
        let wanted = (volume.clone(), node.uid("p"));
        let announced = in_use.wait_for(|in_use| in_use.contains(&wanted));
        tokio::time::timeout(LIMIT, announced).await.expect("it is announced").unwrap();
        assert!(driver.calls().borrow().is_empty());
        // As kubelet and controller write it.
        let status = json!({ "volumesInUse": [volume], "volumesAttached": [{ "name": volume, "devicePath": "" }] });
        let attached = json!({ "metadata": { "name": "n" }, "status": status });
        node.desk.store().nodes().put(serde_json::from_value(attached).unwrap());
        node.desk.running("p").await;
        let calls = called(&driver, "NodePublishVolume", 1).await;
        let [Call::Publish(publish)] = &calls[..] else { panic!("{calls:?}") };
        assert_eq!(publish.publish_context["device"], "/dev/one");
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        assert!(in_use.borrow_and_update().is_empty(), "the controller may take it away");
        node
    });
}

fn a_node_that_is_full_of_volumes_rejects_the_pod() {
    on_a_node(|node| async {
        let _driver = driver(&node, &[]);
        describe(&node, json!({ "nodeAllocatableUpdatePeriodSeconds": 60 }));
        bind(&node, json!({}));
        node.desk.fill();
        want(&node, "p", "true", claim());
        node.desk.when("it is rejected", |desk| desk.phase("p").as_deref() == Some("Failed")).await;
        let status = node.desk.pod("p").unwrap().status.clone().unwrap();
        assert_eq!(status.reason.as_deref(), Some("VolumeAttachmentLimitExceeded"));
        let message = status.message.unwrap();
        let expect =
            "Pod was rejected: Node has reached its volume attachment limit, rejecting pod. unmounted volumes=[v]";
        assert!(message.starts_with(expect), "{message}");
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        node
    });
}

fn a_device_of_a_driver() {
    on_a_node(|node| async {
        let driver = driver(&node, &[]);
        describe(&node, json!({ "attachRequired": false }));
        bind(&node, json!({ "volumeMode": "Block" }));
        node.want_spec(
            "p",
            json!({
                "terminationGracePeriodSeconds": 1, "restartPolicy": "Never",
                "volumes": [{ "name": "v", "persistentVolumeClaim": { "claimName": "data" } }],
                "containers": [{ "name": "c", "image": node.image(), "volumeDevices": [{ "name": "v", "devicePath": "/dev/disk" }],
                    "command": ["sh", "-c", "test -c /dev/disk && head -c 3 /dev/disk | od -An -tx1 | grep -q '00 00 00'"] }]
            }),
        );
        called(&driver, "NodePublishVolume", 1).await;
        // Upstream's places, where its kubelet finds the device if the node is given to it.
        let (devices, uid) = (node.path("kubelet/plugins/kubernetes.io/csi/volumeDevices"), node.uid("p"));
        let link = node.path("kubelet/pods").join(&uid).join("volumeDevices/kubernetes.io~csi/pv-1");
        assert_eq!(fs::read_link(link).unwrap(), devices.join("publish/pv-1").join(&uid));
        let data = fs::read(devices.join("pv-1/data/vol_data.json")).unwrap();
        let data: Value = serde_json::from_slice(&data).unwrap();
        assert_eq!([&data["specVolID"], &data["volumeHandle"], &data["driverName"]], ["pv-1", "disk-1", NAME]);
        node.desk.when("it reads the device", |desk| desk.phase("p").as_deref() == Some("Succeeded")).await;
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        assert_eq!(
            names(&called(&driver, "NodeUnpublishVolume", 1).await),
            ["NodePublishVolume", "NodeUnpublishVolume"]
        );
        assert!(!devices.join("pv-1").exists() && !devices.join("publish/pv-1").exists());
        node
    });
}

fn a_volume_of_another_zone_is_not_used() {
    on_a_node(|node| async {
        let driver = driver(&node, &[]);
        describe(&node, json!({ "attachRequired": false }));
        let zone = json!([{ "key": "zone", "operator": "In", "values": ["b"] }]);
        bind(&node, json!({ "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": zone }] } } }));
        let move_to = |zone: &str| {
            let moved = json!({ "metadata": { "name": "n", "labels": { "zone": zone } } });
            node.desk.store().nodes().put(serde_json::from_value(moved).unwrap());
        };
        move_to("a");
        want(&node, "p", "true", claim());
        let told = "MountVolume.NodeAffinity check failed for volume \"v\" : no matching NodeSelectorTerms";
        let is_told =
            |desk: &crate::desk::Desk| desk.messages("p", "FailedMount").iter().any(|said| said.contains(told));
        node.desk.when("it is told why", is_told).await;
        assert!(driver.calls().borrow().is_empty());
        move_to("b");
        node.desk.running("p").await;
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        called(&driver, "NodeUnpublishVolume", 1).await;
        node
    });
}

fn a_volume_is_published_again_with_tokens() {
    const KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";
    on_a_node(|node| async {
        let driver = driver(&node, &[Ability::StageUnstageVolume]);
        let about = |in_secrets: bool| {
            let tokens = json!([{ "audience": "vault", "expirationSeconds": 600 }]);
            json!({ "attachRequired": false, "requiresRepublish": true, "tokenRequests": tokens,
                "serviceAccountTokenInSecrets": in_secrets })
        };
        describe(&node, about(false));
        bind(&node, json!({}));
        want(&node, "p", "true", claim());
        node.desk.running("p").await;
        let calls = called(&driver, "NodePublishVolume", 3).await;
        assert_eq!(
            names(&calls)[..4],
            ["NodeStageVolume", "NodePublishVolume", "NodePublishVolume", "NodePublishVolume"]
        );
        for call in &calls[1..] {
            let Call::Publish(publish) = call else { panic!("{calls:?}") };
            let tokens: Value = serde_json::from_str(&publish.volume_context[KEY]).unwrap();
            assert_eq!(tokens["vault"]["token"], "default/default for vault");
            assert!(tokens["vault"]["expirationTimestamp"].is_string(), "{tokens}");
            assert_eq!(publish.secrets.keys().collect::<Vec<_>>(), ["token"]);
        }
        // What the cluster says of the driver now.
        describe(&node, about(true));
        let mut calls = driver.calls();
        let is_secret = |call: &Call| {
            let Call::Publish(publish) = call else { return false };
            publish.secrets.contains_key(KEY) && !publish.volume_context.contains_key(KEY)
        };
        let hidden = calls.wait_for(|calls| calls.iter().any(is_secret));
        tokio::time::timeout(LIMIT, hidden).await.expect("tokens are secrets").unwrap();
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        assert_eq!(
            names(&driver.calls().borrow()).iter().rev().take(2).collect::<Vec<_>>(),
            [&"NodeUnstageVolume", &"NodeUnpublishVolume"]
        );
        node
    });
}

/// A node that changes its kubelet: upstream's files are all that is known of the pod.
fn what_another_kubelet_has_published_is_taken_down() {
    on_a_node(|mut node| async {
        let driver = driver(&node, &[Ability::StageUnstageVolume]);
        let pod = node.path("kubelet/pods").join(node.uid("gone"));
        let published = pod.join("volumes/kubernetes.io~csi/pv-9");
        // The SHA-256 of the handle.
        let staged = "37ef3af1b41166f88a783287913407a36e6bfcae9c8f864027a03490967dde50";
        let staged = node.path("kubelet/plugins/kubernetes.io/csi").join(NAME).join(staged);
        let disk = node.path("driver/disk-9");
        fs::create_dir_all(&disk).unwrap();
        fs::write(disk.join("file"), "kept").unwrap();
        for mounted in [staged.join("globalmount"), published.join("mount")] {
            fs::create_dir_all(&mounted).unwrap();
            let tree = sys::mount::copy_tree(&disk, false).unwrap();
            sys::mount::attach_at(tree.as_fd(), &mounted).unwrap();
        }
        let data = json!({ "attachmentID": "csi-1", "driverName": NAME, "nodeName": "n", "seLinuxMountContext": "",
            "specVolID": "pv-9", "volumeHandle": "disk-9", "volumeLifecycleMode": "Persistent" });
        fs::write(published.join("vol_data.json"), data.to_string()).unwrap();
        let data = json!({ "driverName": NAME, "volumeHandle": "disk-9" });
        fs::write(staged.join("vol_data.json"), data.to_string()).unwrap();
        let desk = node.desk.clone();
        node.restart(desk).await;
        let calls = called(&driver, "NodeUnstageVolume", 1).await;
        let [Call::Unpublish(unpublish), Call::Unstage(unstage)] = &calls[..] else { panic!("{calls:?}") };
        assert_eq!((unpublish.volume_id.as_str(), unstage.volume_id.as_str()), ("disk-9", "disk-9"));
        assert_eq!(unpublish.target_path, published.join("mount").to_string_lossy());
        assert_eq!(unstage.staging_target_path, staged.join("globalmount").to_string_lossy());
        node.vanished(&pod).await;
        assert!(!staged.exists());
        assert_eq!(fs::read_to_string(disk.join("file")).unwrap(), "kept");
        node
    });
}

/// A loop device, as `losetup` makes it; gone with this.
struct Loop(PathBuf);

impl Loop {
    #[expect(clippy::disallowed_methods, reason = "a test")]
    fn of(file: &Path) -> Self {
        testkit::host::run(Command::new("losetup").arg("-f").arg(file)).unwrap();
        let [device] = &sys::loops::of_file(file).unwrap()[..] else { panic!("no device of {}", file.display()) };
        Self(device.clone())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        sys::loops::detach(&self.0).unwrap();
    }
}

/// As [`what_another_kubelet_has_published_is_taken_down`], of devices: upstream binds them to places of its own, too, and
/// attaches loop devices to those.
fn a_device_that_another_kubelet_has_mapped_is_taken_down() {
    on_a_node(|mut node| async {
        if !Path::new("/dev/loop-control").exists() {
            println!("skipped: needs loop devices");
            return node;
        }
        let (file, plugins) = (node.path("disk"), node.path("kubelet/plugins"));
        fs::write(&file, [0; 4096]).unwrap();
        let disk = Loop::of(&file);
        let driver = driver(&node, &[Ability::StageUnstageVolume]);
        let uid = node.uid("gone");
        let pod = node.path("kubelet/pods").join(&uid);
        let (devices, local) =
            (plugins.join("kubernetes.io/csi/volumeDevices"), plugins.join("kubernetes.io~local-volume/volumeDevices"));
        let (published, mapped) = (devices.join("publish/pv-9").join(&uid), devices.join("pv-9/dev").join(&uid));
        let of_local = local.join("pv-8").join(&uid);
        for device in [&published, &mapped, &of_local] {
            fs::create_dir_all(device.parent().unwrap()).unwrap();
            fs::write(device, "").unwrap();
            let tree = sys::mount::copy_tree(&disk.0, false).unwrap();
            sys::mount::attach_at(tree.as_fd(), device).unwrap();
        }
        let held = [&mapped, &of_local].map(|device| Loop::of(device));
        fs::create_dir_all(devices.join("staging/pv-9")).unwrap();
        fs::create_dir_all(devices.join("pv-9/data")).unwrap();
        let data = json!({ "attachmentID": "csi-1", "driverName": NAME, "nodeName": "n", "specVolID": "pv-9",
            "volumeHandle": "disk-9" });
        fs::write(devices.join("pv-9/data/vol_data.json"), data.to_string()).unwrap();
        for (plugin, name, device) in [("csi", "pv-9", &published), ("local-volume", "pv-8", &disk.0)] {
            let links = pod.join("volumeDevices").join(format!("kubernetes.io~{plugin}"));
            fs::create_dir_all(&links).unwrap();
            std::os::unix::fs::symlink(device, links.join(name)).unwrap();
        }
        let desk = node.desk.clone();
        node.restart(desk).await;
        let calls = called(&driver, "NodeUnstageVolume", 1).await;
        let [Call::Unpublish(unpublish), Call::Unstage(unstage)] = &calls[..] else { panic!("{calls:?}") };
        assert_eq!((unpublish.volume_id.as_str(), unstage.volume_id.as_str()), ("disk-9", "disk-9"));
        assert_eq!(unpublish.target_path, published.to_string_lossy());
        assert_eq!(unstage.staging_target_path, devices.join("staging/pv-9").to_string_lossy());
        node.vanished(&pod).await;
        assert_eq!(fs::read_dir(devices.join("publish")).unwrap().count(), 0);
        assert!(!devices.join("pv-9").exists() && !devices.join("staging/pv-9").exists());
        assert_eq!(fs::read_dir(local).unwrap().count(), 0);
        for Loop(device) in &held {
            let name = device.file_name().unwrap();
            assert!(!Path::new("/sys/block").join(name).join("loop").exists(), "{device:?} has a file");
        }
        node
    });
}
