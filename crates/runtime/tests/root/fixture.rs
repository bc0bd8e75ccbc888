//! A node for a test: store, network, zygote, runtime; and the requests that tests make.

use std::collections::HashMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cri::{Error, Items, RuntimeService as _, v1};
use futures_util::StreamExt as _;
use image::{Images, Silent};
use keeper::Zygote;
use network::Network;
use runtime::{Config, Parts, Runtime};
use testkit::registry::Registry;

/// The name of the image that all tests use.
pub(crate) const IMAGE: &str = "busybox.test/busybox:1";

/// Namespaces in which a test can leave nothing behind.
pub(crate) fn enter_private() -> Result<(), String> {
    testkit::netns::enter_private().map_err(|error| format!("{error:#}"))?;
    sys::process::leave(sys::process::namespace::MOUNT).map_err(|error| error.to_string())?;
    sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true).map_err(|e| e.to_string())
}

/// Where a node has its things. `run` is on a tmpfs, as `/run` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) state: PathBuf,
    pub(crate) run: PathBuf,
    pub(crate) logs: PathBuf,
    pub(crate) group: String,
}

/// A store with the image in it, made once for all tests.
fn store() -> &'static Path {
    static STORE: OnceLock<tempfile::TempDir> = OnceLock::new();
    STORE
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let layout = testkit::image::busybox(&dir.path().join("layout")).unwrap();
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
            let registry =
                Registry::start(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), &dir.path().join("registry")).unwrap();
            registry.push(&layout, "busybox", "1").unwrap();
            run(async {
                let images = Images::open(image::Config::new(dir.path().join("images"))).unwrap();
                let name = format!("{}/busybox:1", registry.address());
                images.pull(&name.parse().unwrap(), None, &Silent).await.unwrap();
                images.tag(&name, &IMAGE.parse().unwrap()).unwrap();
            });
            dir
        })
        .path()
}

/// Runs an async test as the daemon would: on several threads.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

/// A place for a node, removed at the end.
pub(crate) struct Ground {
    pub(crate) places: Places,
    _run: tempfile::TempDir,
}

impl Ground {
    pub(crate) fn new() -> Self {
        let run = tempfile::tempdir_in("/dev/shm").unwrap();
        let name = run.path().file_name().unwrap().to_string_lossy().trim_start_matches('.').to_owned();
        let places = Places {
            state: store().to_owned(),
            run: run.path().join("run"),
            logs: run.path().join("logs"),
            group: format!("orlop-test-{name}"),
        };
        Self { places, _run: run }
    }
}

impl Drop for Ground {
    /// A test that failed has left its pods.
    fn drop(&mut self) {
        let group = sys::cgroup::Hierarchy::detect().unwrap().group(&self.places.group);
        while group.exists() {
            group.kill().unwrap();
            let _ = group.delete(); // Until the last of its processes has ended.
        }
    }
}

/// A running node.
pub(crate) struct Node {
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) images: Arc<Images>,
    pub(crate) places: Places,
}

/// The images, as soon as what a node of before has left running in this process lets go of them: a daemon's end would.
async fn opened(places: &Places) -> Arc<Images> {
    let opened = async {
        loop {
            match Images::open(image::Config::new(places.state.join("images"))) {
                Err(image::Error::Locked { .. }) => tokio::task::yield_now().await,
                other => return other.unwrap(),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), opened).await.expect("somebody keeps the images")
}

impl Node {
    pub(crate) async fn start(places: &Places, zygote: Zygote) -> Self {
        Self::start_on(network::Config::new(places.run.join("network")), places, zygote).await
    }

    /// With another network.
    pub(crate) async fn start_on(network: network::Config, places: &Places, zygote: Zygote) -> Self {
        Self::start_with(network, places, zygote, |_| {}).await
    }

    /// With another configuration.
    pub(crate) async fn start_with(
        network: network::Config,
        places: &Places,
        zygote: Zygote,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let images = opened(places).await;
        let network = Network::new(network).unwrap();
        let mut config = Config::new(&places.state, &places.run);
        config.cgroup_parent = places.group.clone().into();
        change(&mut config);
        let parts = Parts { images: images.clone(), network, zygote };
        let runtime = Runtime::start(config, parts).await.unwrap();
        Self { runtime, images, places: places.clone() }
    }

    pub(crate) fn sandbox_config(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.places.logs.join(name).to_string_lossy().into_owned(),
            labels: HashMap::from([("app".to_owned(), name.to_owned())]),
            ..Default::default()
        }
    }

    pub(crate) async fn run_sandbox(&self, config: &v1::PodSandboxConfig) -> Result<String, Error> {
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        self.runtime.run_pod_sandbox(request).await.map(|response| response.pod_sandbox_id)
    }

    pub(crate) async fn create(
        &self,
        pod_sandbox_id: &str,
        sandbox: &v1::PodSandboxConfig,
        config: v1::ContainerConfig,
    ) -> Result<String, Error> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod_sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        self.runtime.create_container(request).await.map(|response| response.container_id)
    }

    pub(crate) async fn start_container(&self, container_id: &str) -> Result<(), Error> {
        let request = v1::StartContainerRequest { container_id: container_id.to_owned() };
        self.runtime.start_container(request).await.map(drop)
    }

    /// A pod with one container that runs `script`.
    pub(crate) async fn pod(&self, name: &str, script: &str) -> Pod {
        let config = self.sandbox_config(name);
        let sandbox = self.run_sandbox(&config).await.unwrap();
        let container = self.create(&sandbox, &config, script_config("main", script)).await.unwrap();
        self.start_container(&container).await.unwrap();
        Pod { config, sandbox, container }
    }

    pub(crate) async fn stop_container(&self, container_id: &str, timeout: i64) -> Result<(), Error> {
        let request = v1::StopContainerRequest { container_id: container_id.to_owned(), timeout };
        self.runtime.stop_container(request).await.map(drop)
    }

    pub(crate) async fn remove_container(&self, container_id: &str) -> Result<(), Error> {
        let request = v1::RemoveContainerRequest { container_id: container_id.to_owned() };
        self.runtime.remove_container(request).await.map(drop)
    }

    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.stop_pod_sandbox(request).await.map(drop)
    }

    pub(crate) async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.remove_pod_sandbox(request).await.map(drop)
    }

    pub(crate) async fn status(&self, container_id: &str) -> v1::ContainerStatus {
        let request = v1::ContainerStatusRequest { container_id: container_id.to_owned(), verbose: false };
        self.runtime.container_status(request).await.unwrap().status.unwrap()
    }

    pub(crate) async fn sandbox_status(&self, id: &str) -> v1::PodSandboxStatus {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        self.runtime.pod_sandbox_status(request).await.unwrap().status.unwrap()
    }

    pub(crate) async fn exec(
        &self,
        container_id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<v1::ExecSyncResponse, Error> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        self.runtime.exec_sync(v1::ExecSyncRequest { container_id: container_id.to_owned(), cmd, timeout }).await
    }

    pub(crate) async fn events(&self) -> Items<v1::ContainerEventResponse> {
        self.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap()
    }

    /// Waits for the end of a container, by its event.
    pub(crate) async fn exited(&self, container_id: &str) -> v1::ContainerStatus {
        let mut events = self.events().await;
        loop {
            let status = self.status(container_id).await;
            if status.state() == v1::ContainerState::ContainerExited {
                return status;
            }
            events.next().await.unwrap().unwrap();
        }
    }

    /// The lines of a pod's log, without their times.
    pub(crate) fn log(&self, pod: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.places.logs.join(pod).join("main/0.log")).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    /// Removes everything and checks that nothing is left.
    pub(crate) async fn down(self) {
        for owned in self.runtime.fsck().await.unwrap() {
            assert!(owned.owner.is_some(), "{owned:?} belongs to nobody");
        }
        self.runtime.shutdown().await.unwrap();
        let left = self.runtime.fsck().await.unwrap();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(groups(&self.places.group), Vec::<PathBuf>::new());
        assert_eq!(self.images.rootfs_owners(), Vec::<String>::new());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.places.run.to_string_lossy().into_owned();
        assert!(!mounts.contains(&here), "a mount is left: {mounts}");
    }
}

/// The control groups that begin with a name.
pub(crate) fn groups(name: &str) -> Vec<PathBuf> {
    let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
    let mut found = hierarchy.directories(Path::new(name));
    found.retain(|directory| directory.exists());
    found
}

/// A pod with one container.
pub(crate) struct Pod {
    pub(crate) config: v1::PodSandboxConfig,
    pub(crate) sandbox: String,
    pub(crate) container: String,
}

/// A container that runs a script.
pub(crate) fn script_config(name: &str, script: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        log_path: format!("{name}/0.log"),
        labels: HashMap::from([("container".to_owned(), name.to_owned())]),
        ..Default::default()
    }
}

/// A zygote. The kernel takes a thread off the list a moment after it was joined, and tells nobody when.
pub(crate) fn zygote() -> Zygote {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while std::fs::read_dir("/proc/self/task").unwrap().count() > 1 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    Zygote::start().unwrap()
}

/// Runs a test on a fresh node and checks that it leaves nothing.
pub(crate) fn on_a_node<F: Future<Output = Node>>(test: impl FnOnce(Node) -> F) {
    let ground = Ground::new();
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        test(node).await.down().await;
    });
}
