//! The image service against a real registry on loopback, in a network namespace of its own.
//!
//! A plain program without the usual harness, as it must be able to be the unpacking child.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use cri::{Error, ImageService as _, v1};
use futures_util::TryStreamExt as _;
use image::{Digest, GcPolicy, Images};
use runtime::{ImageServer, ImagesInUse};
use testkit::registry::Registry;

fn main() -> ExitCode {
    image::worker::maybe_run();
    let missing = testkit::netns::enter_private().err().map(|error| format!("root for a private network ({error:#})"));
    testkit::serial::main(
        &[
            ("an_image_has_one_id_everywhere", one_id),
            ("absent_images_are_no_errors_where_cri_says_so", absent),
            ("one_name_removes_all_and_mounted_images_stay", removal),
            ("garbage_collection_keeps_what_is_in_use", garbage),
            ("lists_are_filtered_and_streamed_once", lists),
        ],
        missing,
    )
}

/// What a runtime would say is in use.
#[derive(Default)]
struct InUse {
    roots: Mutex<HashSet<Digest>>,
    volumes: Mutex<HashMap<Digest, String>>,
}

impl ImagesInUse for InUse {
    fn roots(&self) -> HashSet<Digest> {
        self.roots.lock().unwrap().clone()
    }

    fn volumes(&self) -> HashMap<Digest, String> {
        self.volumes.lock().unwrap().clone()
    }
}

struct Scene {
    dir: tempfile::TempDir,
    registry: Registry,
    in_use: Arc<InUse>,
    server: ImageServer,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Nobody else is in this network namespace.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let registry = Registry::start(address, &dir.path().join("registry")).unwrap();
        let mut config = image::Config::new(dir.path().join("store"));
        config.registry_config_dirs = Vec::new();
        let in_use = Arc::new(InUse::default());
        let server = ImageServer::new(Images::open(config).unwrap(), in_use.clone());
        Self { dir, registry, in_use, server }
    }

    /// Pushes an image of one file, so that images differ by it.
    fn push(&self, repository: &str, tag: &str, user: &str) -> String {
        let layout = self.dir.path().join(format!("layout-{user}"));
        let mut builder = testkit::image::Builder::new(layout).unwrap();
        builder.layer(|tar| testkit::image::append_text(tar, "file", user)).unwrap();
        let config = serde_json::json!({ "User": user, "Labels": { "a": "b" } });
        self.registry.push(&builder.finish(config).unwrap(), repository, tag).unwrap();
        format!("{}/{repository}:{tag}", self.registry.address())
    }

    async fn pull(&self, name: &str) -> Result<String, Error> {
        let request = v1::PullImageRequest { image: spec(name), ..v1::PullImageRequest::default() };
        self.server.pull_image(request).await.map(|reply| reply.image_ref)
    }

    async fn status(&self, name: &str) -> Result<Option<v1::Image>, Error> {
        let request = v1::ImageStatusRequest { image: spec(name), verbose: false };
        self.server.image_status(request).await.map(|reply| reply.image)
    }

    async fn remove(&self, name: &str) -> Result<(), Error> {
        self.server.remove_image(v1::RemoveImageRequest { image: spec(name) }).await.map(drop)
    }

    async fn list(&self, name: &str) -> Vec<String> {
        let filter = Some(v1::ImageFilter { image: spec(name) });
        let reply = self.server.list_images(v1::ListImagesRequest { filter }).await.unwrap();
        reply.images.into_iter().map(|image| image.id).collect()
    }
}

#[expect(clippy::unnecessary_wraps, reason = "as the messages want it")]
fn spec(name: &str) -> Option<v1::ImageSpec> {
    Some(v1::ImageSpec { image: name.to_owned(), ..v1::ImageSpec::default() })
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test);
}

fn one_id() {
    let scene = Scene::new();
    let name = scene.push("library/one", "1", "1000:5");
    run(async {
        let id = scene.pull(&name).await.unwrap();
        assert!(id.starts_with("sha256:"), "{id}");
        let image = scene.status(&name).await.unwrap().unwrap();
        assert_eq!((image.id.as_str(), image.repo_tags.as_slice()), (id.as_str(), std::slice::from_ref(&name)));
        assert!(image.size > 0 && image.repo_digests.len() == 1);
        assert_eq!((image.uid, image.username.as_str()), (Some(v1::Int64Value { value: 1000 }), ""));
        for other in [&id, id.strip_prefix("sha256:").unwrap(), &image.repo_digests[0]] {
            assert_eq!(scene.status(other).await.unwrap().unwrap().id, id, "{other}");
        }
        assert_eq!(scene.pull(&name).await.unwrap(), id);
        let verbose = v1::ImageStatusRequest { image: spec(&name), verbose: true };
        let info = scene.server.image_status(verbose).await.unwrap().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        assert_eq!(info["imageSpec"]["config"]["Labels"]["a"], "b");
        assert_eq!(info["chainID"], info["imageSpec"]["rootfs"]["diff_ids"][0]);
        let usage = scene.server.image_fs_info(v1::ImageFsInfoRequest {}).await.unwrap();
        assert_eq!(usage.container_filesystems, usage.image_filesystems, "both are on one disk");
        let usage = &usage.image_filesystems[0];
        assert!(usage.timestamp > 0 && usage.used_bytes.unwrap().value > 0);
        assert_eq!(usage.fs_id.clone().unwrap().mountpoint, scene.dir.path().join("store").to_string_lossy());
    });
}

fn absent() {
    let scene = Scene::new();
    let address = scene.registry.address();
    run(async {
        for name in ["nowhere", "sha256:aaaaaa", "0123456789abcdef"] {
            assert_eq!(scene.status(name).await.unwrap(), None, "{name}");
            scene.remove(name).await.unwrap();
        }
        assert!(matches!(scene.status("Not A Name").await, Err(Error::InvalidArgument(_))));
        assert!(matches!(scene.status("").await, Err(Error::InvalidArgument(_))));
        assert!(matches!(scene.pull("Not A Name").await, Err(Error::InvalidArgument(_))));
        let missing = scene.pull(&format!("{address}/missing:1")).await;
        assert!(matches!(&missing, Err(Error::NotFoundAnywhere(text)) if text.contains("missing")), "{missing:?}");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let away = scene.pull(&format!("127.0.0.1:{port}/x:1")).await;
        let prefixed = |text: &str| text.starts_with("RegistryUnavailable: ");
        assert!(matches!(&away, Err(Error::Unavailable(text)) if prefixed(text)), "{away:?}");
    });
}

fn removal() {
    let scene = Scene::new();
    let (first, second) = (scene.push("r/a", "1", "1"), scene.push("r/b", "2", "1"));
    run(async {
        let id = scene.pull(&first).await.unwrap();
        assert_eq!(scene.pull(&second).await.unwrap(), id, "the same image under another name");
        scene.in_use.volumes.lock().unwrap().insert(id.parse().unwrap(), "c1".to_owned());
        let refused = scene.remove(&first).await.unwrap_err();
        assert!(refused.to_string().contains("container c1"), "{refused}");
        scene.in_use.volumes.lock().unwrap().clear();
        scene.remove(&first).await.unwrap();
        assert_eq!((scene.status(&first).await.unwrap(), scene.status(&second).await.unwrap()), (None, None));
        scene.remove(&first).await.unwrap();
    });
}

fn garbage() {
    let scene = Scene::new();
    let names = ["1", "2", "3"].map(|user| scene.push(&format!("g/{user}"), "1", user));
    run(async {
        let mut ids = Vec::new();
        for name in &names {
            ids.push(scene.pull(name).await.unwrap());
        }
        scene.in_use.roots.lock().unwrap().insert(ids[0].parse().unwrap());
        scene.in_use.volumes.lock().unwrap().insert(ids[1].parse().unwrap(), "c1".to_owned());
        let everything = GcPolicy {
            high_threshold_percent: 0,
            low_threshold_percent: 0,
            minimum_age: std::time::Duration::ZERO,
            maximum_age: None,
        };
        let reclaimed = scene.server.collect_garbage(&everything).await.unwrap();
        assert_eq!(reclaimed.images.iter().map(Digest::to_string).collect::<Vec<_>>(), ids[2..]);
        scene.in_use.roots.lock().unwrap().clear();
        let reclaimed = scene.server.remove_unused().await.unwrap();
        assert_eq!(reclaimed.images.iter().map(Digest::to_string).collect::<Vec<_>>(), ids[..1]);
        assert_eq!(scene.list("").await, ids[1..2]);
    });
}

fn lists() {
    let scene = Scene::new();
    let names = ["1", "2"].map(|user| scene.push(&format!("l/app{user}"), "v1", user));
    run(async {
        let mut ids = Vec::new();
        for name in &names {
            ids.push(scene.pull(name).await.unwrap());
        }
        let repository = names[0].strip_suffix(":v1").unwrap();
        assert_eq!(scene.list(&names[1]).await, ids[1..]);
        assert_eq!(scene.list(repository).await, ids[..1], "a name without tag stands for all of them");
        assert_eq!(scene.list(&ids[0]).await, ids[..1]);
        assert!(scene.list("other").await.is_empty());
        let stream = scene.server.stream_images(v1::StreamImagesRequest::default()).await.unwrap();
        let batches: Vec<_> = stream.try_collect().await.unwrap();
        let mut streamed: Vec<_> = batches.into_iter().flat_map(|batch| batch.images).map(|image| image.id).collect();
        streamed.sort();
        ids.sort();
        assert_eq!(streamed, ids);
    });
}
