//! Pulls from a real registry.

use testkit::image::Builder;

use crate::fixture::{Scene, file, registry, run};
use testkit::serial::Test;

pub(crate) const TESTS: &[Test] = &[
    ("pulls_busybox_and_mounts_it", pulls_busybox_and_mounts_it),
    ("pulls_again_without_layers", pulls_again_without_layers),
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
