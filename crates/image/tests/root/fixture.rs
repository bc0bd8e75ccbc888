//! Stores, registries and images for the tests.

use std::collections::HashSet;
use std::future::Future;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{Config, Digest, Error, Image, Images, Reference, RootfsOptions, Silent};
use testkit::registry::Registry;

/// A store in a temporary directory, and a directory for everything else that a test makes.
pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) images: Arc<Images>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self::with(|_, _| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Config, &Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("store"));
        config.registry_config_dirs = vec![dir.path().join("certs.d")];
        change(&mut config, dir.path());
        Self { images: Images::open(config).unwrap(), dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn hosts_toml(&self, registry: &str, text: &str) {
        let dir = self.path("certs.d").join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    /// Where the tree of a layer is.
    pub(crate) fn layer_tree(&self, layer: &Digest) -> PathBuf {
        self.path("store/layers/sha256").join(layer.hex()).join("fs")
    }

    pub(crate) async fn pull(&self, reference: &str) -> Result<Arc<Image>, Error> {
        self.images.pull(&reference.parse::<Reference>().unwrap(), None, &Silent).await
    }

    /// The text of a file in an image, as a container sees it.
    pub(crate) fn read(&self, image: &Image, path: &str) -> String {
        let rootfs = self.images.rootfs(&image.id, "reader", RootfsOptions::default()).unwrap();
        let text = std::fs::read_to_string(format!("/proc/self/fd/{}/{path}", rootfs.mount.as_raw_fd())).unwrap();
        drop(rootfs);
        text
    }

    /// Removes layers that only failed pulls and loads have brought.
    pub(crate) async fn sweep(&self) {
        self.images.release("reader").await.unwrap();
        self.images.remove_unused(&HashSet::new()).await.unwrap();
    }

    /// Nothing is left that nobody owns.
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.images.fsck().unwrap(), []);
    }
}

/// Runs an async test as the daemon would: on several threads.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

/// A port that was free a moment ago; nobody else is in this network namespace.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

pub(crate) fn registry(scene: &Scene) -> Registry {
    Registry::start(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())), &scene.path("registry")).unwrap()
}

pub(crate) fn file(tar: &mut tar::Builder<&mut dyn Write>, path: &str, text: &str) -> anyhow::Result<()> {
    testkit::image::append_text(tar, path, text)
}
