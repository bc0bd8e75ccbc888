//! Stores, registries and images for the tests.

use std::collections::HashSet;
use std::future::Future;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{Auth, Config, Error, Image, Images, Reference, Silent, Usage};
use testkit::image::{Builder, Layout};
use testkit::registry::{Manner, Registry};

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

    pub(crate) async fn pull(&self, reference: &str) -> Result<Arc<Image>, Error> {
        self.images.pull(&reference.parse::<Reference>().unwrap(), None, &Silent).await
    }

    pub(crate) async fn pull_as(&self, reference: &str, auth: Auth) -> Result<Arc<Image>, Error> {
        self.images.pull(&reference.parse::<Reference>().unwrap(), Some(auth), &Silent).await
    }

    /// A pull that failed has left nothing, in the store or outside of it.
    pub(crate) async fn assert_untouched(&self) {
        self.images.settled().await;
        self.assert_clean();
        assert!(self.images.list().is_empty());
        assert_eq!(self.images.usage(), Usage::default());
    }

    /// The text of a file in an image, as a container sees it.
    pub(crate) fn read(&self, image: &Image, path: &str) -> String {
        String::from_utf8(self.read_bytes(image, path)).unwrap()
    }

    pub(crate) fn read_bytes(&self, image: &Image, path: &str) -> Vec<u8> {
        let mount = self.images.mount_image(&image.id, "", None).unwrap();
        std::fs::read(format!("/proc/self/fd/{}/{path}", mount.as_raw_fd())).unwrap()
    }

    /// Removes layers that only failed pulls and loads have brought.
    pub(crate) async fn sweep(&self) {
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
    registry_with(scene, &Manner::default())
}

/// A registry over what [`registry`] stores.
pub(crate) fn registry_with(scene: &Scene, manner: &Manner) -> Registry {
    Registry::start_with(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())), &scene.path("registry"), manner).unwrap()
}

/// An image with a small layer, and a large one that does not compress.
pub(crate) fn sample(scene: &Scene, name: &str) -> Layout {
    let mut builder = Builder::new(scene.path(name)).unwrap();
    builder.layer(|tar| file(tar, "etc/text", name)).unwrap();
    builder
        .layer(|tar| {
            let mut header = tar::Header::new_gnu();
            header.set_size(LARGE_BYTES as u64);
            header.set_mode(0o644);
            Ok(tar.append_data(&mut header, "large", noise(name, LARGE_BYTES).as_slice())?)
        })
        .unwrap();
    builder.finish(serde_json::json!({ "Cmd": [name] })).unwrap()
}

pub(crate) const LARGE_BYTES: usize = 3 << 20;

/// Bytes without pattern, the same for the same name.
pub(crate) fn noise(name: &str, length: usize) -> Vec<u8> {
    let mut state = name
        .bytes()
        .fold(0x9e37_79b9_7f4a_7c15_u64, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

pub(crate) fn file(tar: &mut tar::Builder<&mut dyn Write>, path: &str, text: &str) -> anyhow::Result<()> {
    testkit::image::append_text(tar, path, text)
}
