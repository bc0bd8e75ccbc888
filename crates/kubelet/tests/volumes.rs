//! Volumes with real mounts, in a mount namespace of each test's own.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cluster::{Source, SourceError, Store};
use k8s_openapi::api::core::v1::{Event, NodeStatus, Pod, PodStatus};
use kubelet::env::{Environment, Sources, of_container};
use kubelet::facts::NodeFacts;
use kubelet::paths::Paths;
use kubelet::volumes::{ATTACHED_WITHIN, CSI_CALL_WITHIN, PodVolumes, REPUBLISH_EVERY, Times, Volumes, VolumesConfig};
use serde_json::{Value, json};
use sys::mount::Propagation;
use sys::rustix::fs::inotify;

/// A source that only has a store.
struct Fixed(Store);

#[async_trait::async_trait]
impl Source for Fixed {
    fn store(&self) -> &Store {
        &self.0
    }
    async fn update_pod_status(&self, _: &str, _: PodStatus) -> Result<(), SourceError> {
        Ok(())
    }
    async fn delete_pod(&self, _: &str) -> Result<(), SourceError> {
        Ok(())
    }
    async fn request_deletion(&self, _: &str, _: Option<i64>) -> Result<(), SourceError> {
        Ok(())
    }
    async fn update_node_status(&self, _: &str, _: NodeStatus) -> Result<(), SourceError> {
        Ok(())
    }
    fn event(&self, _: Event) {}
}

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
    volumes: Arc<Volumes>,
}

impl Fixture {
    fn host(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn restart(&mut self) {
        self.volumes = start(self.dir.path(), &self.store);
    }
}

fn start(dir: &Path, store: &Store) -> Arc<Volumes> {
    let node = NodeFacts { name: "n".into(), ..NodeFacts::default() };
    let paths = Paths { root: dir.join("kubelet"), logs: dir.join("logs") };
    Volumes::new(
        VolumesConfig {
            paths,
            node,
            recursive_read_only: true,
            csi_call_within: CSI_CALL_WITHIN,
            attached_within: ATTACHED_WITHIN,
            republish_every: REPUBLISH_EVERY,
        },
        Arc::new(Fixed(store.clone())),
    )
}

/// Runs a test on a thread with mounts of its own; its runtime's threads inherit them.
fn with_mounts(test: impl AsyncFnOnce(Fixture) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if sys::process::leave(sys::process::namespace::MOUNT).is_err() {
            println!("skipped: needs CAP_SYS_ADMIN for a mount namespace");
            return;
        }
        sys::mount::set_propagation(Path::new("/"), Propagation::Private, true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Store::new();
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let volumes = start(dir.path(), &store);
            test(Fixture { dir, store, volumes }).await;
        });
    });
    thread.join().unwrap();
}

fn pod(spec: Value) -> Pod {
    serde_json::from_value(
        json!({"metadata": {"name": "p", "namespace": "shop", "uid": "u1", "labels": {"v": "1"}}, "spec": spec}),
    )
    .unwrap()
}

fn mounting(mounts: Value, volumes: Value) -> Pod {
    pod(json!({"containers": [{"name": "c", "volumeMounts": mounts}], "volumes": volumes}))
}

async fn mounts(volumes: &PodVolumes, pod: &Pod, environment: &Environment) -> Result<Vec<cri::v1::Mount>, String> {
    let container = &pod.spec.as_ref().unwrap().containers[0];
    volumes.mounts_for(container, environment).await.map_err(|error| error.to_string())
}

fn mounted_below(dir: &Path) -> usize {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table.lines().filter(|line| line.split(' ').nth(4).unwrap().starts_with(dir.to_str().unwrap())).count()
}

/// Waits until something is renamed in a directory: a new version of its files.
async fn renamed_in(dir: &Path, action: impl FnOnce()) {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, dir, inotify::WatchFlags::MOVED_TO).unwrap();
    action();
    let read = tokio::task::spawn_blocking(move || sys::rustix::io::read(&watch, &mut [0u8; 512]).unwrap());
    read.await.unwrap();
}

#[test]
fn an_edited_config_map_reaches_the_volume() {
    with_mounts(async |fixture| {
        let config_map = |value: &str| {
            serde_json::from_value(json!({"metadata": {"name": "cm", "namespace": "shop"}, "data": {"key": value}}))
                .unwrap()
        };
        let pod = mounting(
            json!([{"name": "v", "mountPath": "/etc/v"}, {"name": "d", "mountPath": "/etc/d"}]),
            json!([{"name": "v", "configMap": {"name": "cm"}},
                {"name": "d", "downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]),
        );
        let error = fixture.volumes.set_up(&pod).await.unwrap_err();
        assert_eq!(error.to_string(), r#"MountVolume.SetUp failed for volume "v" : configmap "cm" not found"#);
        assert!(error.cause.is_waiting());

        fixture.store.config_maps().put(config_map("old"));
        let volumes = fixture.volumes.set_up(&pod).await.unwrap();
        let made = mounts(&volumes, &pod, &Environment::default()).await.unwrap();
        assert!(made[0].readonly && made[0].host_path.ends_with("pods/u1/volumes/kubernetes.io~configmap/v"));
        let (dir, downward) = (Path::new(&made[0].host_path), Path::new(&made[1].host_path));
        assert_eq!(fs::read_to_string(dir.join("key")).unwrap(), "old");
        renamed_in(dir, || drop(fixture.store.config_maps().put(config_map("new")))).await;
        assert_eq!(fs::read_to_string(dir.join("key")).unwrap(), "new");

        let mut labelled = pod.clone();
        labelled.metadata.labels.as_mut().unwrap().insert("v".into(), "2".into());
        renamed_in(downward, || drop(fixture.store.pods().put(labelled))).await;
        assert_eq!(fs::read_to_string(downward.join("l")).unwrap(), "v=\"2\"");
    });
}

#[test]
fn each_volume_has_a_time_of_its_own() {
    with_mounts(async |fixture| {
        let pod = mounting(
            json!([{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/b"}]),
            json!([{"name": "a", "emptyDir": {}}, {"name": "b", "configMap": {"name": "cm"}}, {"name": "unused", "emptyDir": {}}]),
        );
        let times = Arc::<Times>::default();
        let error = fixture.volumes.set_up_timed(&pod, &times).await.unwrap_err();
        assert_eq!(error.volume, "b");
        assert!(times.of("b").is_some(), "also of one that cannot be had");
        let config_map = json!({"metadata": {"name": "cm", "namespace": "shop"}});
        fixture.store.config_maps().put(serde_json::from_value(config_map).unwrap());
        let (times, begun) = (Arc::<Times>::default(), std::time::Instant::now());
        fixture.volumes.set_up_timed(&pod, &times).await.unwrap();
        let all = begun.elapsed();
        let (a, b) = (times.of("a").unwrap(), times.of("b").unwrap());
        assert!(a + b <= all, "{a:?} and {b:?} of {all:?}: one after the other");
        assert_eq!(times.of("unused"), None);
    });
}

#[test]
fn a_volume_that_cannot_be_written_holds_up_no_other() {
    with_mounts(async |fixture| {
        let secret = |value: &str| {
            let metadata = json!({"name": "s", "namespace": "shop"});
            serde_json::from_value(json!({"metadata": metadata, "data": {"key": value}})).unwrap()
        };
        let config_map = |value: &str| {
            let metadata = json!({"name": "cm", "namespace": "shop"});
            serde_json::from_value(json!({"metadata": metadata, "data": {"key": value}})).unwrap()
        };
        let pod = mounting(
            json!([{"name": "s", "mountPath": "/s"}, {"name": "v", "mountPath": "/v"}]),
            json!([{"name": "s", "secret": {"secretName": "s"}}, {"name": "v", "configMap": {"name": "cm"}}]),
        );
        fixture.store.secrets().put(secret("b25l"));
        fixture.store.config_maps().put(config_map("one"));
        let volumes = fixture.volumes.set_up(&pod).await.unwrap();
        let made = mounts(&volumes, &pod, &Environment::default()).await.unwrap();
        let (first, second) = (Path::new(&made[0].host_path), Path::new(&made[1].host_path));
        // The one that is written first is not there any more.
        fixture.store.secrets().remove(&cluster::Key::new("shop", "s"));
        renamed_in(second, || drop(fixture.store.config_maps().put(config_map("two")))).await;
        assert_eq!(fs::read_to_string(second.join("key")).unwrap(), "two");
        assert_eq!(fs::read_to_string(first.join("key")).unwrap(), "one", "it keeps what it had");
    });
}

#[test]
fn secrets_are_in_memory_and_tear_down_leaves_nothing() {
    with_mounts(async |mut fixture| {
        fixture.store.secrets().put(
            serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "shop"}, "data": {"k": "Mw=="}}))
                .unwrap(),
        );
        let pod = mounting(
            json!([{"name": "s", "mountPath": "/s"}, {"name": "m", "mountPath": "/m", "subPath": "a/b"}, {"name": "e", "mountPath": "/e"}]),
            json!([{"name": "s", "secret": {"secretName": "s", "defaultMode": 256}},
                {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}, {"name": "e", "emptyDir": {}},
                {"name": "unused", "configMap": {"name": "not there"}}]),
        );
        let volumes = fixture.volumes.set_up(&pod).await.unwrap();
        let made = mounts(&volumes, &pod, &Environment::default()).await.unwrap();
        let key = Path::new(&made[0].host_path).join("k");
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o400);
        let memory = &volumes.host_paths()["m"];
        assert_eq!(fs::metadata(memory).unwrap().permissions().mode() & 0o7777, 0o1777);
        let statistics = sys::rustix::fs::statvfs(memory).unwrap();
        assert_eq!(statistics.f_blocks * statistics.f_frsize, 1 << 20);
        fs::write(Path::new(&made[1].host_path).join("x"), "kept").unwrap();
        assert_eq!(fs::read_to_string(memory.join("a/b/x")).unwrap(), "kept");
        assert_eq!(fs::metadata(&made[2].host_path).unwrap().permissions().mode() & 0o7777, 0o777);
        let before = mounted_below(fixture.dir.path());
        assert_eq!(before, 4, "secret, memory, sub-path, what containers write for the node");

        fixture.restart();
        let again = fixture.volumes.set_up(&pod).await.unwrap();
        mounts(&again, &pod, &Environment::default()).await.unwrap();
        assert_eq!(mounted_below(fixture.dir.path()), before, "a restart mounts nothing twice");
        assert_eq!(fs::read_to_string(memory.join("a/b/x")).unwrap(), "kept");

        assert_eq!(fixture.volumes.on_disk(), ["u1"]);
        fixture.volumes.tear_down("u1").await.unwrap();
        assert_eq!(mounted_below(fixture.dir.path()), 0);
        assert!(fixture.volumes.on_disk().is_empty());
        fixture.volumes.tear_down("u1").await.unwrap();
    });
}

#[test]
fn cve_2020_8557_what_containers_write_for_the_node_has_a_budget() {
    with_mounts(async |mut fixture| {
        let pod = mounting(json!([]), json!([]));
        fixture.volumes.set_up(&pod).await.unwrap();
        let paths = Paths { root: fixture.host("kubelet"), logs: fixture.host("logs") };
        let message = paths.termination_message("u1", "c", 0);
        fs::create_dir(message.parent().unwrap()).unwrap();
        fs::write(paths.hosts_file("u1"), vec![0; 900 << 10]).unwrap();
        let full = fs::write(&message, vec![0; 200 << 10]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);

        fs::write(&message, "said").unwrap();
        fixture.restart();
        fixture.volumes.set_up(&pod).await.unwrap();
        assert_eq!((mounted_below(fixture.dir.path()), fs::read_to_string(&message).unwrap().as_str()), (1, "said"));
        fixture.volumes.tear_down("u1").await.unwrap();
        assert_eq!(mounted_below(fixture.dir.path()), 0);

        // A pod of an earlier version keeps what it has.
        fs::create_dir_all(message.parent().unwrap()).unwrap();
        fixture.volumes.set_up(&pod).await.unwrap();
        assert_eq!(mounted_below(fixture.dir.path()), 0);
    });
}

#[test]
fn cve_2017_1002101_sub_paths_stay_in_their_volume() {
    with_mounts(async |fixture| {
        let data = fixture.host("data");
        fs::create_dir_all(data.join("inside")).unwrap();
        fs::create_dir_all(fixture.host("outside")).unwrap();
        symlink("inside", data.join("near")).unwrap();
        symlink(fixture.host("outside"), data.join("absolute")).unwrap();
        symlink("../outside", data.join("relative")).unwrap();
        let with = |mount: Value| {
            let mut mount = mount;
            mount["name"] = json!("h");
            mount["mountPath"] = json!("/h");
            let mut pod =
                mounting(json!([mount]), json!([{"name": "h", "hostPath": {"path": data, "type": "Directory"}}]));
            pod.spec.as_mut().unwrap().containers[0].env =
                serde_json::from_value(json!([{"name": "NAME", "value": "inside"}])).unwrap();
            pod
        };
        let volumes = fixture.volumes.set_up(&with(json!({}))).await.unwrap();
        let resolve = async |mount: Value| {
            let pod = with(mount);
            let node = NodeFacts::default();
            let sources =
                Sources { pod: &pod, ips: &[], node: &node, store: &fixture.store, volumes: &volumes.host_paths() };
            let environment = of_container(&pod.spec.as_ref().unwrap().containers[0], &sources).unwrap();
            mounts(&volumes, &pod, &environment).await.map(|mounts| PathBuf::from(&mounts[0].host_path))
        };
        let inside = fs::metadata(data.join("inside")).unwrap().ino();
        for mount in [json!({"subPath": "inside"}), json!({"subPath": "near"}), json!({"subPathExpr": "$(NAME)"})] {
            assert_eq!(fs::metadata(resolve(mount).await.unwrap()).unwrap().ino(), inside);
        }
        resolve(json!({"subPath": "new/deep"})).await.unwrap();
        assert!(data.join("new/deep").is_dir());
        for path in ["absolute", "relative", "absolute/x"] {
            let error = resolve(json!({"subPath": path})).await.unwrap_err();
            assert!(error.contains("leads out of the volume"), "{error}");
        }
        assert!(fs::read_dir(fixture.host("outside")).unwrap().next().is_none());
        for (mount, expect) in [
            (json!({"subPath": "../x"}), "'..'"),
            (json!({"subPath": "/x"}), "absolute"),
            (json!({"subPathExpr": "$(NONE)"}), "no variable NONE"),
            (json!({"recursiveReadOnly": "Enabled"}), "readOnly: true"),
        ] {
            let error = resolve(mount).await.unwrap_err();
            assert!(error.contains(expect), "{error}");
        }
    });
}

/// Somebody exchanges the directory and a link to the host while it is looked for: what was found is what is mounted.
#[test]
fn cve_2021_25741_a_sub_path_that_changes_while_it_is_mounted() {
    with_mounts(async |fixture| {
        let (data, outside) = (fixture.host("data"), fixture.host("outside"));
        fs::create_dir_all(data.join("sub")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("secret"), "the host's").unwrap();
        symlink(&outside, data.join("link")).unwrap();
        let pod = mounting(
            json!([{"name": "h", "mountPath": "/h", "subPath": "sub/deep"}]),
            json!([{"name": "h", "hostPath": {"path": data, "type": "Directory"}}]),
        );
        let volumes = fixture.volumes.set_up(&pod).await.unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let attacker = {
            let (over, sub, link) = (over.clone(), data.join("sub"), data.join("link"));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let exchange = sys::rustix::fs::RenameFlags::EXCHANGE;
                    let cwd = sys::rustix::fs::CWD;
                    sys::rustix::fs::renameat_with(cwd, &sub, cwd, &link, exchange).unwrap();
                }
            })
        };
        let mut made = 0;
        for _ in 0..100 {
            // It is refused while the link is there.
            if let Ok(found) = mounts(&volumes, &pod, &Environment::default()).await {
                let mounted = fs::read_dir(&found[0].host_path).unwrap();
                assert_eq!(mounted.count(), 0, "a directory of the volume, which is empty");
                made += 1;
            }
        }
        println!("{made} of 100 were mounted");
        over.store(true, Ordering::Relaxed);
        attacker.join().unwrap();
        let left: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["secret"], "nothing was made on the host");
    });
}

#[test]
fn the_hosts_own_mounts_survive() {
    with_mounts(async |fixture| {
        let data = fixture.host("data");
        fs::create_dir_all(data.join("sub/tmp")).unwrap();
        let tmpfs = sys::mount::new_filesystem("tmpfs", &[], 0).unwrap();
        sys::mount::attach_at(std::os::fd::AsFd::as_fd(&tmpfs), &data.join("sub/tmp")).unwrap();
        sys::mount::set_propagation(&data.join("sub/tmp"), Propagation::Shared, false).unwrap();
        sys::mount::set_propagation(Path::new("/"), Propagation::Shared, true).unwrap();
        fs::write(data.join("sub/tmp/file"), "x").unwrap();
        let pod = mounting(
            json!([{"name": "h", "mountPath": "/h", "subPath": "sub"}]),
            json!([{"name": "h", "hostPath": {"path": data}}]),
        );
        let volumes = fixture.volumes.set_up(&pod).await.unwrap();
        let made = mounts(&volumes, &pod, &Environment::default()).await.unwrap();
        assert!(Path::new(&made[0].host_path).join("tmp/file").exists(), "what is mounted below is seen");
        fixture.volumes.tear_down("u1").await.unwrap();
        assert_eq!(fs::read_to_string(data.join("sub/tmp/file")).unwrap(), "x");
    });
}

#[test]
fn volumes_belong_to_the_group() {
    with_mounts(async |fixture| {
        fixture.store.config_maps().put(
            serde_json::from_value(json!({"metadata": {"name": "cm", "namespace": "shop"}, "data": {"key": "1"}}))
                .unwrap(),
        );
        let pod = pod(json!({
            "securityContext": {"fsGroup": 4242},
            "containers": [{"name": "c", "volumeMounts": [{"name": "e", "mountPath": "/e"}, {"name": "c", "mountPath": "/c"}]}],
            "volumes": [{"name": "e", "emptyDir": {}}, {"name": "c", "configMap": {"name": "cm", "defaultMode": 256}}]}));
        let volumes = fixture.volumes.set_up(&pod).await.unwrap().host_paths();
        let of = |path: &Path| {
            let data = fs::metadata(path).unwrap();
            (data.gid(), data.permissions().mode() & 0o7777)
        };
        assert_eq!(of(&volumes["e"]), (4242, 0o2777));
        assert_eq!(of(&volumes["c"].join("key")), (4242, 0o440));
        let links: BTreeSet<_> =
            fs::read_dir(&volumes["c"]).unwrap().map(|entry| entry.unwrap().metadata().unwrap().gid()).collect();
        assert_eq!(links, [4242].into());
    });
}

/// As upstream: a local volume is for who claims it, a hostPath is the node's.
#[test]
fn volumes_behind_claims_belong_to_the_group_if_they_are_local_and_not_read_only() {
    with_mounts(async |fixture| {
        for kind in ["local", "hostPath"] {
            let name = kind.to_lowercase();
            let path = fixture.dir.path().join(&name);
            fs::create_dir(&path).unwrap();
            let volume = json!({"metadata": {"name": name}, "spec": {kind: {"path": path}}});
            fixture.store.persistent_volumes().put(serde_json::from_value(volume).unwrap());
            let claim = json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"volumeName": name}});
            fixture.store.persistent_volume_claims().put(serde_json::from_value(claim).unwrap());
        }
        for (claim, read_only, given) in [("local", true, false), ("local", false, true), ("hostpath", false, false)] {
            let source = json!({"name": "v", "persistentVolumeClaim": {"claimName": claim, "readOnly": read_only}});
            let pod = pod(json!({
                "securityContext": {"fsGroup": 4242},
                "containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
                "volumes": [source]}));
            let volumes = fixture.volumes.set_up(&pod).await.unwrap().host_paths();
            assert_eq!(fs::metadata(&volumes["v"]).unwrap().gid() == 4242, given, "{claim} {read_only}");
            fixture.volumes.tear_down(pod.metadata.uid.as_deref().unwrap()).await.unwrap();
        }
    });
}

/// `OnRootMismatch`: whoever has given all of a volume to the group before needs no second walk through it.
#[test]
fn a_volume_whose_root_is_the_groups_is_not_walked_if_the_pod_says_so() {
    with_mounts(async |fixture| {
        let path = fixture.host("local");
        fs::create_dir(&path).unwrap();
        let volume = json!({"metadata": {"name": "pv"}, "spec": {"local": {"path": path}}});
        fixture.store.persistent_volumes().put(serde_json::from_value(volume).unwrap());
        let claim = json!({"metadata": {"name": "pvc", "namespace": "shop"}, "spec": {"volumeName": "pv"}});
        fixture.store.persistent_volume_claims().put(serde_json::from_value(claim).unwrap());
        let set_up = async |policy: &str| {
            let pod = pod(json!({
                "securityContext": {"fsGroup": 4242, "fsGroupChangePolicy": policy},
                "containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
                "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "pvc"}}]}));
            fixture.volumes.set_up(&pod).await.unwrap();
            fixture.volumes.tear_down("u1").await.unwrap();
        };
        let gid = |path: &Path| fs::metadata(path).unwrap().gid();
        let file = path.join("file");
        fs::write(&file, "").unwrap();
        set_up("OnRootMismatch").await;
        assert_eq!((gid(&path), gid(&file)), (4242, 4242), "the root was another's");
        std::os::unix::fs::chown(&file, None, Some(0)).unwrap();
        set_up("OnRootMismatch").await;
        assert_eq!(gid(&file), 0, "nobody has looked");
        set_up("Always").await;
        assert_eq!(gid(&file), 4242);
        std::os::unix::fs::chown(&file, None, Some(0)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o0775)).unwrap();
        set_up("OnRootMismatch").await;
        assert_eq!(gid(&file), 4242, "new files would not be the group's");
    });
}

/// Deeper than a stack is high, and than a process may have descriptors.
const DEPTH: usize = 20_000;

fn deepen(dir: &Path) {
    let mut at = sys::tree::Dir::open(dir).unwrap();
    for _ in 0..DEPTH {
        at.create_dir(b"d", 0o700).unwrap();
        at = at.open_real(b"d").unwrap();
    }
}

#[test]
fn what_a_pod_left_may_be_deep() {
    with_mounts(async |mut fixture| {
        let pod = pod(json!({
            "securityContext": {"fsGroup": 4242},
            "containers": [{"name": "c", "volumeMounts": [{"name": "e", "mountPath": "/e"}]}],
            "volumes": [{"name": "e", "emptyDir": {}}]}));
        let volumes = fixture.volumes.set_up(&pod).await.unwrap().host_paths();
        deepen(&volumes["e"]);
        fixture.restart();
        fixture.volumes.set_up(&pod).await.unwrap();
        assert_eq!(fs::metadata(volumes["e"].join("d/d/d/d/d")).unwrap().gid(), 4242);
        fixture.volumes.tear_down("u1").await.unwrap();
        assert!(fixture.volumes.on_disk().is_empty());
    });
}

#[test]
fn what_is_mounted_in_a_volume_is_not_the_pods() {
    with_mounts(async |fixture| {
        let (data, foreign) = (fixture.host("data"), fixture.host("foreign"));
        fs::create_dir_all(data.join("inner")).unwrap();
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("file"), "x").unwrap();
        let bind = || sys::mount::copy_tree(&foreign, false).unwrap();
        sys::mount::attach_at(std::os::fd::AsFd::as_fd(&bind()), &data.join("inner")).unwrap();
        fixture.store.persistent_volume_claims().put(
            serde_json::from_value(
                json!({"metadata": {"name": "data", "namespace": "shop"}, "spec": {"volumeName": "pv"}}),
            )
            .unwrap(),
        );
        fixture.store.persistent_volumes().put(
            serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": {"local": {"path": data}}})).unwrap(),
        );
        let pod = pod(json!({
            "securityContext": {"fsGroup": 4242},
            "containers": [{"name": "c", "volumeMounts": [{"name": "p", "mountPath": "/p"}, {"name": "e", "mountPath": "/e"}]}],
            "volumes": [{"name": "p", "persistentVolumeClaim": {"claimName": "data"}}, {"name": "e", "emptyDir": {}}]}));
        let volumes = fixture.volumes.set_up(&pod).await.unwrap().host_paths();
        assert_eq!(fs::metadata(&data).unwrap().gid(), 4242);
        assert_eq!(fs::metadata(foreign.join("file")).unwrap().gid(), 0, "a mount was entered");
        // As a privileged container with Bidirectional propagation leaves it: twice on one place, and one in the other.
        let place = volumes["e"].join("a/b");
        fs::create_dir_all(&place).unwrap();
        fs::create_dir(foreign.join("nested")).unwrap();
        for at in [place.clone(), place.clone(), place.join("nested")] {
            sys::mount::attach_at(std::os::fd::AsFd::as_fd(&bind()), &at).unwrap();
        }
        fixture.volumes.tear_down("u1").await.unwrap();
        assert_eq!(mounted_below(&volumes["e"]), 0);
        assert!(fixture.volumes.on_disk().is_empty() && foreign.join("file").exists());
    });
}

/// A file system whose server never answers, and the descriptor that ends it when it is closed.
fn hang(at: &Path) -> Option<fs::File> {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let server = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
    let fd = server.as_raw_fd().to_string();
    let options = [("fd", fd.as_str()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")];
    let mount = sys::mount::new_filesystem("fuse", &options.map(|(key, value)| (key, Some(value))), 0).ok()?;
    sys::mount::attach_at(mount.as_fd(), at).ok()?;
    Some(server)
}

#[test]
fn a_hung_path_delays_its_own_pod_only() {
    with_mounts(async |fixture| {
        let hung = fixture.host("hung");
        fs::create_dir(&hung).unwrap();
        let Some(server) = hang(&hung) else {
            println!("skipped: needs /dev/fuse");
            return;
        };
        let of = |uid: &str, path: &Path| {
            let mut pod = mounting(
                json!([{"name": "h", "mountPath": "/h"}]),
                json!([{"name": "h", "hostPath": {"path": path, "type": "Directory"}}]),
            );
            pod.metadata.uid = Some(uid.into());
            pod
        };
        let slow = tokio::spawn({
            let (volumes, pod) = (fixture.volumes.clone(), of("slow", &hung.join("x")));
            async move { volumes.set_up(&pod).await.map(drop).map_err(|error| error.to_string()) }
        });
        fixture.volumes.set_up(&of("other", fixture.dir.path())).await.unwrap();
        fixture.volumes.tear_down("other").await.unwrap();
        assert!(!slow.is_finished());
        drop(server);
        let error = slow.await.unwrap().unwrap_err();
        assert!(error.contains("hung/x"), "{error}");
        sys::mount::detach(&hung).unwrap();
    });
}

/// A directory that this machine exports to itself (NFS 4), by the kernel's server and without its programs: what they would
/// answer, which client is who and which directory is what, the kernel is told before it asks.
struct Exported {
    control: PathBuf,
    export: PathBuf,
}

impl Exported {
    /// In the calling thread's network namespace; none on a kernel without NFS.
    fn new(dir: &Path, export: &Path) -> Option<Self> {
        let control = dir.join("nfsd");
        fs::create_dir(&control).unwrap();
        let server = sys::mount::new_filesystem("nfsd", &[], 0).ok()?;
        sys::mount::attach_at(server.as_fd(), &control).unwrap();
        let exported = Self { control, export: export.to_owned() };
        exported.begin();
        Some(exported)
    }

    /// Answers from now on.
    fn begin(&self) {
        let Self { control, export } = self;
        let tell = |file: PathBuf, text: &str| {
            fs::write(&file, format!("{text}\n")).unwrap_or_else(|error| panic!("{}: {text}: {error}", file.display()));
        };
        tell(control.join("versions"), "-3 +4 +4.1 +4.2");
        // Nobody has files open from before: the least that it waits for them.
        tell(control.join("nfsv4leasetime"), "10");
        tell(control.join("nfsv4gracetime"), "10");
        tell(control.join("portlist"), "tcp 2049");
        // Long after this test (seconds since 1970).
        let until = i32::MAX;
        let cache = |name: &str| Path::new("/proc/thread-self/net/rpc").join(name).join("channel");
        tell(cache("auth.unix.ip"), &format!("nfsd 127.0.0.1 {until} here"));
        // Any port, asynchronous, no subtree check, with a number: linux/nfsd/export.h.
        let flags = 0x2 | 0x10 | 0x400 | 0x2000;
        tell(cache("nfsd.export"), &format!("here {} {until} {flags} 65534 65534 0", export.display()));
        tell(cache("nfsd.fh"), &format!("here 1 \\x00000000 {until} {}", export.display()));
        tell(control.join("threads"), "2");
    }

    /// Answers nobody any more.
    fn end(&self) {
        fs::write(self.control.join("threads"), "0").unwrap();
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        self.end();
        sys::mount::detach(&self.control).unwrap();
    }
}

#[test]
fn a_directory_of_an_nfs_server() {
    with_mounts(async |mut fixture| {
        testkit::netns::enter_private().unwrap();
        let export = fixture.host("export");
        fs::create_dir(&export).unwrap();
        fs::write(export.join("file"), "from afar").unwrap();
        let uses = json!([{"name": "v", "mountPath": "/v"}]);
        let volume = |read_only: bool| json!({"server": "127.0.0.1", "path": "/", "readOnly": read_only});
        let Some(server) = Exported::new(fixture.dir.path(), &export) else {
            let refused = fixture.volumes.set_up(&mounting(uses, json!([{"name": "v", "nfs": volume(true)}]))).await;
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains("modprobe nfs"), "{refused}");
            return println!("skipped: needs a kernel with NFS for more than its refusal");
        };
        let pod = mounting(uses.clone(), json!([{"name": "v", "nfs": volume(true)}]));
        let made = fixture.volumes.set_up(&pod).await.unwrap();
        let place = fixture.host("kubelet/pods/u1/volumes/kubernetes.io~nfs/v");
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "from afar");
        assert_eq!(fs::write(place.join("new"), "").unwrap_err().raw_os_error(), Some(30), "it is read-only");
        let shown = mounts(&made, &pod, &Environment::default()).await.unwrap();
        assert!(shown[0].readonly && Path::new(&shown[0].host_path) == place);
        // Nothing is mounted again, also not by the next daemon.
        fixture.restart();
        fixture.volumes.set_up(&pod).await.unwrap();
        assert_eq!(mounted_below(&place), 1);
        fixture.volumes.tear_down("u1").await.unwrap();
        assert!(!place.exists() && export.join("file").exists());
        // By a claim, with options; and one that the server does not have.
        let store = &fixture.store;
        let spec = json!({"nfs": {"server": "127.0.0.1", "path": "/"}, "mountOptions": ["nfsvers=4.1", "noatime"]});
        let about = json!({"metadata": {"name": "pv1"}, "spec": spec});
        store.persistent_volumes().put(serde_json::from_value(about).unwrap());
        let about = json!({"metadata": {"name": "data", "namespace": "shop"}, "spec": {"volumeName": "pv1"}});
        store.persistent_volume_claims().put(serde_json::from_value(about).unwrap());
        let claim = json!([{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]);
        fixture.volumes.set_up(&mounting(uses.clone(), claim)).await.unwrap();
        let place = fixture.host("kubelet/pods/u1/volumes/kubernetes.io~nfs/pv1");
        fs::write(place.join("new"), "written").unwrap();
        assert_eq!(fs::read_to_string(export.join("new")).unwrap(), "written");
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.contains("kubernetes.io~nfs/pv1")).unwrap();
        assert!(line.contains("vers=4.1") && line.contains("noatime"), "{line}");
        fixture.volumes.tear_down("u1").await.unwrap();
        let missing = json!({"server": "127.0.0.1", "path": "/none"});
        let refused = fixture.volumes.set_up(&mounting(uses, json!([{"name": "v", "nfs": missing}]))).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("the server has no such directory"), "{refused}");
        fixture.volumes.tear_down("u1").await.unwrap();
        drop(server);
    });
}

/// Programs that use its share wait for the server, and nobody else does: not even the removal of their pod.
#[test]
fn an_nfs_server_that_falls_silent_delays_its_users_only() {
    with_mounts(async |fixture| {
        testkit::netns::enter_private().unwrap();
        let export = fixture.host("export");
        fs::create_dir(&export).unwrap();
        fs::write(export.join("file"), "from afar").unwrap();
        let Some(server) = Exported::new(fixture.dir.path(), &export) else {
            return println!("skipped: needs a kernel with NFS");
        };
        let of = |uid: &str, source: Value| {
            let mut volume = source;
            volume["name"] = json!("v");
            let mut pod = mounting(json!([{"name": "v", "mountPath": "/v"}]), json!([volume]));
            pod.metadata.uid = Some(uid.into());
            pod
        };
        let share = json!({"nfs": {"server": "127.0.0.1", "path": "/"}});
        fixture.volumes.set_up(&of("user", share)).await.unwrap();
        let place = fixture.host("kubelet/pods/user/volumes/kubernetes.io~nfs/v");
        let root = fs::File::open(&place).unwrap();
        server.end();
        let reader = std::thread::spawn(move || {
            fs::read_to_string(format!("/proc/self/fd/{}/file", std::os::fd::AsRawFd::as_raw_fd(&root)))
        });
        fixture.volumes.set_up(&of("other", json!({"emptyDir": {}}))).await.unwrap();
        fixture.volumes.tear_down("other").await.unwrap();
        fixture.volumes.tear_down("user").await.unwrap();
        assert!(!place.exists() && !reader.is_finished());
        server.begin();
        assert_eq!(reader.join().unwrap().unwrap(), "from afar");
        drop(server);
    });
}
