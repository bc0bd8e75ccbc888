//! A node for a test: the kubelet over the real runtime, with a registry to pull from.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cri::{ImageService, RuntimeService, v1};
use image::Images;
use k8s_openapi::api::core::v1::Pod;
use keeper::Zygote;
use kubelet::admission::Site;
use kubelet::facts::NodeFacts;
use kubelet::hosts::ClusterDns;
use kubelet::metrics::Metrics;
use kubelet::paths::Paths;
use kubelet::plugins::Registry;
use kubelet::qos::{Rules, Tree};
use kubelet::resources::claims::Patience;
use kubelet::resources::policies::Policies;
use kubelet::resources::{self, Resources};
use kubelet::volumes::{Volumes, VolumesConfig};
use kubelet::{Barrier, Credential, Kubelet, SiteNow, Verification, generate};
use network::Network;
use runtime::{ImageServer, Runtime};
use sys::rustix::fs::inotify;
use sys::rustix::process::Pid;
use testkit::image::Builder;
use testkit::registry;

use crate::desk::Desk;

/// Longer than anything here takes on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// So long a driver, of volumes or of claims, may take for a call: long enough for those that answer.
const CALL_WITHIN: Duration = Duration::from_secs(3);
/// How long a volume may take to be attached.
const ATTACHED_WITHIN: Duration = Duration::from_secs(3);

/// How often volumes are published again whose drivers want that.
const REPUBLISH_EVERY: Duration = Duration::from_millis(200);

/// So long a driver of claims may be away.
const DRIVER_AWAY: Duration = Duration::from_secs(2);

/// Namespaces in which a test can leave nothing behind.
pub(crate) fn enter_private() -> Result<(), String> {
    testkit::netns::enter_private().map_err(|error| format!("{error:#}"))?;
    sys::process::leave(sys::process::namespace::MOUNT).map_err(|error| error.to_string())?;
    sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true).map_err(|e| e.to_string())
}

/// What a node stands on: a directory in memory, and a registry with two images. Both go with it, and so do pods that a test
/// which failed has left.
struct Ground {
    dir: tempfile::TempDir,
    registry: registry::Registry,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let layout = testkit::image::busybox(&dir.path().join("layout")).unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let registry = registry::Registry::start(address, &dir.path().join("registry")).unwrap();
        for tag in ["1", "latest"] {
            registry.push(&layout, "busybox", tag).unwrap();
        }
        let mut other = Builder::new(dir.path().join("other")).unwrap();
        testkit::image::busybox_layer(&mut other).unwrap();
        let other = other.finish(serde_json::json!({ "Env": ["OTHER=1"] })).unwrap();
        registry.push(&other, "other", "1").unwrap();
        Self { dir, registry }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
        for class in ["kubepods", "kubepods/burstable", "kubepods/besteffort"].map(Path::new) {
            for directory in hierarchy.directories(class) {
                for group in names(&directory).into_iter().filter(|name| name.ends_with(&suffix(self.dir.path()))) {
                    let group = hierarchy.group(class.join(group));
                    while group.exists() {
                        group.kill().unwrap();
                        let _ = group.delete(); // Until the last of its processes has ended.
                    }
                }
            }
        }
    }
}

/// What the uids of a test's pods end with: they name control groups of this machine.
fn suffix(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().trim_start_matches('.').to_owned()
}

/// The logins that the desk has for pods.
struct Keys(Arc<Desk>);

#[async_trait::async_trait]
impl kubelet::Keychain for Keys {
    async fn credentials(&self, pod: &Pod, _: &str) -> Vec<Credential> {
        self.0.logins(pod.metadata.name.as_deref().unwrap_or_default())
    }
}

/// A node; its kubelet can be stopped and started again.
pub(crate) struct Node {
    pub(crate) desk: Arc<Desk>,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) images: Arc<ImageServer>,
    pub(crate) kubelet: Arc<Kubelet>,
    pub(crate) volumes: Arc<Volumes>,
    _plugins: Registry,
    pub(crate) groups: Tree,
    pub(crate) registry: Pid,
    image: String,
    other_image: String,
    dir: PathBuf,
    /// The group in which the pods' groups stand.
    cgroup_root: PathBuf,
}

impl Node {
    async fn start(ground: &Ground, zygote: Zygote, cgroup_root: PathBuf) -> Self {
        let dir = ground.dir.path();
        let images = Images::open(image::Config::new(dir.join("images"))).unwrap();
        let mut network = network::Config::new(dir.join("run/network"));
        network.cni_conf_dir = dir.join("cni");
        network.cni_bin_dirs = vec![dir.join("cni")];
        network.cni_state_dir = dir.join("run/cni");
        let network = Network::new(network).unwrap();
        let config = runtime::Config::new(dir.join("state"), dir.join("run"));
        let parts = runtime::Parts { images: images.clone(), network, zygote };
        let runtime = Runtime::start(config, parts).await.unwrap();
        let images = Arc::new(ImageServer::new(images, runtime.clone()));
        let desk = Arc::new(Desk::new());
        let groups = groups(&cgroup_root);
        let started =
            start_kubelet_in(&cgroup_root, Chosen::default(), dir, &desk, runtime.clone(), images.clone()).await;
        let (kubelet, volumes, plugins) = (started.kubelet.into(), started.volumes, started.plugins);
        let registry = Pid::from_raw(i32::try_from(ground.registry.pid()).unwrap()).unwrap();
        let [image, other_image] = ["busybox", "other"].map(|name| format!("{}/{name}:1", ground.registry.address()));
        let (dir, _plugins) = (dir.to_owned(), plugins);
        Self {
            desk,
            runtime,
            images,
            kubelet,
            volumes,
            _plugins,
            groups,
            registry,
            image,
            other_image,
            dir,
            cgroup_root,
        }
    }

    /// Starts the kubelet anew, with another desk; returns the old one.
    pub(crate) async fn restart(&mut self, desk: Arc<Desk>) -> Arc<Desk> {
        self.restart_with(Policies::default(), desk).await
    }

    /// As [`Node::restart`], with policies of the resource managers.
    pub(crate) async fn restart_with(&mut self, policies: Policies, desk: Arc<Desk>) -> Arc<Desk> {
        self.restart_as(Chosen { policies, ..Chosen::default() }, desk).await
    }

    /// As [`Node::restart`], as a node that wants credentials for these images though they are there.
    pub(crate) async fn restart_verifying(&mut self, verification: Verification) {
        self.restart_as(Chosen { verification, ..Chosen::default() }, self.desk.clone()).await;
    }

    /// A registry with the same images that wants a login.
    pub(crate) fn locked_registry(&self) -> registry::Registry {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let manner = registry::Manner { login: true, ..registry::Manner::default() };
        registry::Registry::start_with(address, &self.dir.join("registry"), &manner).unwrap()
    }

    /// As [`Node::restart`], as a node whose Burstable containers share so much swap.
    pub(crate) async fn restart_swapping(&mut self, shared_swap_bytes: u64) {
        self.restart_as(Chosen { shared_swap_bytes, ..Chosen::default() }, self.desk.clone()).await;
    }

    /// As [`Node::restart`], beside service rules.
    pub(crate) async fn restart_beside(&mut self, barrier: Arc<dyn Barrier>, limit: Duration) {
        self.restart_as(Chosen { barrier: Some((barrier, limit)), ..Chosen::default() }, self.desk.clone()).await;
    }

    /// As [`Node::restart`], as a node that does not take every pod.
    pub(crate) async fn restart_at(&mut self, site: Site) {
        self.restart_at_for(site, self.desk.clone()).await;
    }

    /// As [`Node::restart_at`], with another desk.
    pub(crate) async fn restart_at_for(&mut self, site: Site, desk: Arc<Desk>) {
        self.restart_as(Chosen { site: Some(site), ..Chosen::default() }, desk).await;
    }

    /// What a start of the machine leaves of the pods that run: only what the kubelet has on record. It starts with
    /// [`Node::restart`] or another of those.
    pub(crate) async fn go_down(&self) {
        stopped(&self.kubelet).await;
        let listed = self.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
        for sandbox in listed.items {
            let pod_sandbox_id = sandbox.id;
            let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
            self.runtime.stop_pod_sandbox(request).await.unwrap();
            self.runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
        }
    }

    /// Stops the kubelet. It starts with [`Node::restart`] or another of those.
    pub(crate) async fn stop(&self) {
        stopped(&self.kubelet).await;
    }

    async fn restart_as(&mut self, chosen: Chosen, desk: Arc<Desk>) -> Arc<Desk> {
        stopped(&self.kubelet).await;
        let (runtime, images) = (self.runtime.clone(), self.images.clone());
        let started = start_kubelet_in(&self.cgroup_root, chosen, &self.dir, &desk, runtime, images).await;
        (self.kubelet, self.volumes, self._plugins) = (started.kubelet.into(), started.volumes, started.plugins);
        std::mem::replace(&mut self.desk, desk)
    }

    /// What happens in the runtime from now on.
    pub(crate) async fn events(&self) -> cri::Items<v1::ContainerEventResponse> {
        self.runtime.get_container_events(v1::GetEventsRequest::default()).await.unwrap()
    }

    /// The kubelet's places.
    pub(crate) fn paths(&self) -> Paths {
        paths(&self.dir)
    }

    /// The image in the registry.
    pub(crate) fn image(&self) -> &str {
        &self.image
    }

    /// The same image by the tag that is pulled always.
    pub(crate) fn latest_image(&self) -> String {
        format!("{}:latest", self.image.trim_end_matches(":1"))
    }

    /// A place of this node.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Another image with the same content.
    pub(crate) fn other_image(&self) -> &str {
        &self.other_image
    }

    /// Wants a pod with one container that runs `script`; `more` is merged into the container.
    pub(crate) fn want(&self, name: &str, script: &str, more: serde_json::Value) {
        let mut container = serde_json::json!({ "name": "c", "image": self.image, "command": ["sh", "-c", script] });
        container.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        self.want_spec(name, serde_json::json!({ "terminationGracePeriodSeconds": 1, "containers": [container] }));
    }

    pub(crate) fn want_spec(&self, name: &str, spec: serde_json::Value) {
        self.desk.want(name, &self.uid(name), spec);
    }

    /// A uid that no other test has.
    pub(crate) fn uid(&self, name: &str) -> String {
        format!("{name}-{}", suffix(&self.dir))
    }

    /// The containers that the runtime has of a pod.
    pub(crate) async fn containers(&self, pod: &str) -> Vec<v1::Container> {
        let labels = [("io.kubernetes.pod.name".to_owned(), pod.to_owned())];
        let filter = v1::ContainerFilter { label_selector: labels.into(), ..Default::default() };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        self.runtime.list_containers(request).await.unwrap().containers
    }

    /// Waits until a file or directory of the node is gone.
    pub(crate) async fn vanished(&self, path: &Path) {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, path.parent().unwrap(), inotify::WatchFlags::DELETE).unwrap();
        let path = path.to_owned();
        let gone = tokio::task::spawn_blocking(move || {
            while path.exists() {
                sys::rustix::io::read(&watch, &mut [0u8; 4096]).unwrap();
            }
        });
        tokio::time::timeout(LIMIT, gone).await.expect("it does not go").unwrap();
    }

    /// Waits until `holds`, which only a change of a file in `dir` can make it.
    pub(crate) async fn until(&self, dir: &Path, what: &str, holds: impl Fn() -> bool) {
        let mut watch = Changes::of(dir);
        let waited = tokio::time::timeout(LIMIT, async {
            while !holds() {
                watch = watch.next().await;
            }
        });
        assert!(waited.await.is_ok(), "waited in vain: {what}");
    }

    /// Waits until the container of a pod that runs has written this line: after it has set its traps, say.
    pub(crate) async fn said(&self, pod: &str, line: &str) {
        let dir = self.path("logs").join(format!("default_{pod}_{}/c", self.uid(pod)));
        let log = dir.join("0.log");
        let has_said = || std::fs::read_to_string(&log).is_ok_and(|log| log.lines().any(|said| said.ends_with(line)));
        self.until(&dir, &format!("{pod} says {line:?}"), has_said).await;
    }

    /// Deletes all pods, and checks that nothing of them is left.
    async fn down(self) {
        for pod in cluster::Source::store(&*self.desk).pods().list() {
            self.desk.delete(pod.metadata.name.as_deref().unwrap(), 0);
        }
        self.desk.when("all pods are gone", |desk| cluster::Source::store(desk).pods().is_empty()).await;
        for name in ["kubelet/pods", "logs", "records"] {
            assert_eq!(names(&self.path(name)), Vec::<String>::new(), "{name} is not empty");
        }
        stopped(&self.kubelet).await;
        self.runtime.shutdown().await.unwrap();
        let left = self.runtime.fsck().await.unwrap();
        assert!(left.is_empty(), "{left:?}");
        if !self.cgroup_root.as_os_str().is_empty() {
            sys::mount::detach(&self.path("kubelet")).unwrap();
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.dir.to_string_lossy().into_owned();
        assert!(!mounts.contains(&here), "a mount is left: {mounts}");
    }
}

/// Changes of the files in a directory.
struct Changes(sys::rustix::fd::OwnedFd);

impl Changes {
    fn of(dir: &Path) -> Self {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let written = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&watch, dir, inotify::WatchFlags::MOVED_TO | written).unwrap();
        Self(watch)
    }

    async fn next(self) -> Self {
        let read = tokio::task::spawn_blocking(move || {
            sys::rustix::io::read(&self.0, &mut [0u8; 4096]).unwrap();
            self
        });
        read.await.unwrap()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn paths(dir: &Path) -> Paths {
    Paths { root: dir.join("kubelet"), logs: dir.join("logs") }
}

/// The tree of the pods' groups in another group.
fn groups(root: &Path) -> Tree {
    let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
    hierarchy.group(root).create().unwrap();
    let groups = Tree::new(hierarchy, Rules::of_machine()).below(root);
    groups.ensure_roots(1000, None).unwrap();
    groups
}

/// A kubelet over any runtime.
pub(crate) async fn start_kubelet(
    dir: &Path,
    desk: &Arc<Desk>,
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
) -> Kubelet {
    start_kubelet_in(Path::new(""), Chosen::default(), dir, desk, runtime, images).await.kubelet
}

/// What an operator and a cluster may want of a node.
#[derive(Default)]
struct Chosen {
    policies: Policies,
    site: Option<Site>,
    pulls_max: Option<usize>,
    verification: Verification,
    shared_swap_bytes: u64,
    /// Service rules, and how long they are waited for.
    barrier: Option<(Arc<dyn Barrier>, Duration)>,
}

/// A node that stays as it is.
struct Fixed(Site);

impl SiteNow for Fixed {
    fn now(&self) -> Site {
        self.0.clone()
    }
}

struct Started {
    kubelet: Kubelet,
    volumes: Arc<Volumes>,
    plugins: Registry,
}

async fn start_kubelet_in(
    cgroup_root: &Path,
    Chosen { policies, site, pulls_max, verification, shared_swap_bytes, barrier }: Chosen,
    dir: &Path,
    desk: &Arc<Desk>,
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
) -> Started {
    let paths = paths(dir);
    let patience = Patience { call_within: CALL_WITHIN, away: DRIVER_AWAY };
    let given = resources::Config { policies, patience, ..resources::Config::plain(paths.root.clone()) };
    let metrics: Arc<Metrics> = Arc::default();
    let resources = Resources::start(&given, runtime.clone(), desk.clone(), metrics.clone()).await.unwrap();
    let node = NodeFacts { name: "n".to_owned(), memory_bytes: 1 << 30, ..NodeFacts::default() };
    let groups = groups(cgroup_root);
    let volumes = VolumesConfig {
        paths: paths.clone(),
        node: node.clone(),
        recursive_read_only: true,
        csi_call_within: CALL_WITHIN,
        attached_within: ATTACHED_WITHIN,
        republish_every: REPUBLISH_EVERY,
    };
    let volumes = Volumes::new(volumes, desk.clone());
    let [devices, claims] = resources.handlers();
    let handlers = vec![volumes.driver_handler(None), devices, claims];
    let plugins = Registry::start(&paths.plugins_registry(), handlers).unwrap();
    let dns = ClusterDns { servers: Vec::new(), domain: "cluster.local".to_owned() };
    let (barrier, barrier_timeout) = barrier.unwrap_or_else(|| (Arc::new(kubelet::NoBarrier), Duration::ZERO));
    let config = kubelet::Config {
        generate: generate::Config {
            cgroup_root: cgroup_root.to_owned(),
            shared_swap_bytes,
            ..generate::Config::of_machine(paths, node, dns, None, &groups)
        },
        records_dir: dir.join("records"),
        barrier_timeout,
        runtime_name: "orlop".to_owned(),
        pulls_max,
        verification,
    };
    let parts = kubelet::Parts {
        source: desk.clone(),
        runtime,
        images,
        volumes: volumes.clone(),
        barrier,
        keychain: Arc::new(Keys(desk.clone())),
        groups,
        resources,
        site: site.map(|site| Arc::new(Fixed(site)) as _),
        metrics,
    };
    let kubelet = Kubelet::start(config, parts).await.unwrap();
    Started { kubelet, volumes, plugins }
}

/// Stops a kubelet, which may not take long.
pub(crate) async fn stopped(kubelet: &Kubelet) {
    tokio::time::timeout(Duration::from_secs(20), kubelet.stop()).await.expect("the kubelet does not stop");
}

/// Runs an async test as the daemon would: on several threads.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

/// A zygote. The kernel takes a thread off the list a moment after it was joined, and tells nobody when.
fn zygote() -> Zygote {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while std::fs::read_dir("/proc/self/task").unwrap().count() > 1 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    Zygote::start().unwrap()
}

/// Runs a test on a fresh node and checks that it leaves nothing.
pub(crate) fn on_a_node<F: Future<Output = Node>>(test: impl FnOnce(Node) -> F) {
    run_on(&Ground::new(), Path::new(""), test);
}

/// As [`on_a_node`], on a node whose kubelet has a small disk, and whose pods have a group of their own.
pub(crate) fn on_a_small_node<F: Future<Output = Node>>(options: &[(&str, &str)], test: impl FnOnce(Node) -> F) {
    let ground = Ground::new();
    let disk = ground.dir.path().join("kubelet");
    std::fs::create_dir(&disk).unwrap();
    let options: Vec<_> = options.iter().map(|(key, value)| (*key, Some(*value))).collect();
    let mount = sys::mount::new_filesystem("tmpfs", &options, 0).unwrap();
    sys::mount::attach_at(mount.as_fd(), &disk).unwrap();
    drop(mount);
    let name = format!("small-{}", suffix(ground.dir.path()));
    let root = Path::new(&name);
    let _groups = Groups(root.to_owned());
    run_on(&ground, root, test);
}

/// Groups of a test, which go with it; also what runs in them after a test that failed.
struct Groups(PathBuf);

impl Drop for Groups {
    fn drop(&mut self) {
        let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
        let root = hierarchy.group(&self.0);
        while root.exists() {
            root.kill().unwrap();
            hierarchy.directories(&self.0).iter().for_each(|directory| remove_groups(directory));
        }
    }
}

/// Removes a directory of groups, the innermost first; one that is busy stays until its last process has ended.
fn remove_groups(directory: &Path) {
    let children = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let children = children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.for_each(|entry| remove_groups(&entry.path()));
    let _ = std::fs::remove_dir(directory); // It is tried again.
}

fn run_on<F: Future<Output = Node>>(ground: &Ground, cgroup_root: &Path, test: impl FnOnce(Node) -> F) {
    let zygote = zygote();
    run(async {
        let node = Node::start(ground, zygote, cgroup_root.to_owned()).await;
        test(node).await.down().await;
    });
}
