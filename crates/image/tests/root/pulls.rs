//! Pulls from a real registry.

use image::Digest;
use serde_json::{Value, json};
use testkit::image::Builder;
use testkit::serial::Test;

use crate::fixture::{Scene, file, registry, run, sample};

pub(crate) const TESTS: &[Test] = &[
    ("pulls_busybox_and_mounts_it", pulls_busybox_and_mounts_it),
    ("pulls_again_without_layers", pulls_again_without_layers),
    ("pulls_what_docker_pushed", pulls_what_docker_pushed),
    ("pulls_by_digest", pulls_by_digest),
    ("pulls_layers_of_every_compression", pulls_layers_of_every_compression),
];

fn pulls_busybox_and_mounts_it() {
    let scene = Scene::new();
    let registry = registry(&scene);
    registry.push(&testkit::image::busybox(&scene.path("layout")).unwrap(), "library/busybox", "1").unwrap();
    run(async {
        let name = format!("{}/library/busybox:1", registry.address());
        let image = scene.pull(&name).await.unwrap();
        assert_eq!(image.repo_tags, std::slice::from_ref(&name));
        assert_eq!(image.config.config.cmd, ["sh"]);
        let rootfs = scene.images.rootfs(&image.id, "c1", image::RootfsOptions::default()).unwrap();
        use std::os::fd::AsRawFd as _;
        let root = format!("/proc/self/fd/{}", rootfs.mount.as_raw_fd());
        assert!(std::fs::metadata(format!("{root}/bin/sh")).unwrap().len() > 100_000);
        std::fs::write(format!("{root}/tmp/hello"), "x").unwrap();
        assert_eq!(scene.images.writable_usage("c1").await.unwrap().inodes, 2);
        drop(rootfs);
        scene.images.release("c1").await.unwrap();
        scene.assert_clean();
    });
}

fn pulls_again_without_layers() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let mut builder = Builder::new(scene.path("layout")).unwrap();
    builder.layer(|tar| file(tar, "a", "1")).unwrap();
    registry.push(&builder.finish(serde_json::json!({})).unwrap(), "x", "1").unwrap();
    run(async {
        let name = format!("{}/x:1", registry.address());
        let first = scene.pull(&name).await.unwrap();
        let second = scene.pull(&name).await.unwrap();
        assert_eq!(first.id, second.id);
        assert!(scene.images.remove(&name).await.unwrap());
        assert!(!scene.images.remove(&name).await.unwrap());
        scene.assert_clean();
    });
}

/// The words of Docker's schema 2 for an image's parts.
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// By the manifest's name, and by a list of manifests for several platforms.
fn pulls_what_docker_pushed() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let mut entries = Vec::new();
    for (name, architecture) in [("foreign", "s390x"), ("own", testkit::image::architecture())] {
        let layout = sample(&scene, name);
        registry.push(&layout, "sample", name).unwrap();
        let mut manifest: Value = serde_json::from_slice(&layout.manifest().unwrap().bytes).unwrap();
        manifest["mediaType"] = DOCKER_MANIFEST.into();
        manifest["config"]["mediaType"] = DOCKER_CONFIG.into();
        for layer in manifest["layers"].as_array_mut().unwrap() {
            layer["mediaType"] = DOCKER_LAYER.into();
        }
        let bytes = manifest.to_string().into_bytes();
        registry.push_manifest("sample", name, DOCKER_MANIFEST, &bytes).unwrap();
        entries.push(json!({
            "mediaType": DOCKER_MANIFEST, "size": bytes.len(), "digest": Digest::of(&bytes).to_string(),
            "platform": { "architecture": architecture, "os": "linux" },
        }));
    }
    let own = entries[1]["digest"].as_str().unwrap().to_owned();
    let list = json!({ "schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": entries }).to_string().into_bytes();
    registry.push_manifest("sample", "list", DOCKER_LIST, &list).unwrap();
    run(async {
        for (tag, digest) in [("own", own), ("list", Digest::of(&list).to_string())] {
            let repository = format!("{}/sample", registry.address());
            let image = scene.pull(&format!("{repository}:{tag}")).await.unwrap();
            assert!(image.repo_digests.contains(&format!("{repository}@{digest}")), "{image:?}");
            assert_eq!(image.config.config.cmd, ["own"]);
            assert_eq!(scene.read(&image, "etc/text"), "own");
            assert!(scene.images.remove(&image.id.to_string()).await.unwrap());
        }
        scene.images.settled().await;
        scene.assert_untouched().await;
    });
}

/// With a name beside the digest, which then says nothing, and without.
fn pulls_by_digest() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let layout = sample(&scene, "pinned");
    registry.push(&layout, "sample", "1").unwrap();
    registry.push(&sample(&scene, "other"), "sample", "2").unwrap();
    let digest = Digest::of(&layout.manifest().unwrap().bytes);
    run(async {
        let repository = format!("{}/sample", registry.address());
        let pinned = format!("{repository}@{digest}");
        for name in [pinned.clone(), format!("{repository}:2@{digest}")] {
            let image = scene.pull(&name).await.unwrap();
            assert_eq!(image.repo_digests, std::slice::from_ref(&pinned), "{name}");
            assert_eq!(image.repo_tags, Vec::<String>::new(), "{name}");
            assert_eq!(scene.read(&image, "etc/text"), "pinned", "{name}");
            assert_eq!(scene.images.get(&pinned).unwrap().id, image.id);
            assert!(scene.images.remove(&image.id.to_string()).await.unwrap());
        }
        scene.images.settled().await;
        scene.assert_untouched().await;
    });
}

/// A layer that is not compressed, one by gzip and one by zstd, which come over one another.
fn pulls_layers_of_every_compression() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let mut builder = Builder::new(scene.path("layout")).unwrap();
    let plain = |name: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, text) in [("etc/last", name), (name, name)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    };
    let bytes = plain("none");
    builder.raw_layer("application/vnd.oci.image.layer.v1.tar", &bytes, &bytes).unwrap();
    builder.layer(|tar| file(tar, "gzip", "gzip")).unwrap();
    let bytes = plain("zstd");
    let packed = zstd::encode_all(&bytes[..], 0).unwrap();
    builder.raw_layer("application/vnd.oci.image.layer.v1.tar+zstd", &packed, &bytes).unwrap();
    registry.push(&builder.finish(json!({})).unwrap(), "mixed", "1").unwrap();
    run(async {
        let image = scene.pull(&format!("{}/mixed:1", registry.address())).await.unwrap();
        for name in ["none", "gzip", "zstd"] {
            assert_eq!(scene.read(&image, name), name);
        }
        assert_eq!(scene.read(&image, "etc/last"), "zstd");
        assert!(scene.images.remove(&image.id.to_string()).await.unwrap());
        scene.images.settled().await;
        scene.assert_untouched().await;
    });
}
