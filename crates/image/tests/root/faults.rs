//! Registries and networks at their worst: a clear error, nothing left behind, and what can heal heals.

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use image::{Digest, Error, Reference, Silent};
use serde_json::json;
use sys::rustix::process::{Pid, Signal};
use testkit::bad_network::{Answer, Proxy, Request};
use testkit::image::{Builder, Layout};
use testkit::registry::Registry;
use testkit::serial::Test;

use crate::fixture::{Scene, file, free_port, noise, registry, run, sample};

pub(crate) const TESTS: &[Test] = &[
    ("a_registry_that_is_down_is_told_at_once", a_registry_that_is_down_is_told_at_once),
    ("what_is_not_there_is_not_found", what_is_not_there_is_not_found),
    ("wrong_bytes_are_refused", wrong_bytes_are_refused),
    ("a_manifest_that_lies_about_sizes_is_refused", a_manifest_that_lies_about_sizes_is_refused),
    ("a_broken_download_goes_on_where_it_broke", a_broken_download_goes_on_where_it_broke),
    ("a_registry_without_ranges_is_read_again", a_registry_without_ranges_is_read_again),
    ("a_download_that_never_gets_on_is_given_up", a_download_that_never_gets_on_is_given_up),
    ("a_moment_of_weakness_is_waited_out", a_moment_of_weakness_is_waited_out),
    ("an_image_for_another_machine_is_refused", an_image_for_another_machine_is_refused),
    ("what_no_node_can_run_is_refused", what_no_node_can_run_is_refused),
    ("a_stopped_registry_delays_its_own_pull_only", a_stopped_registry_delays_its_own_pull_only),
    ("a_hung_registry_holds_up_no_layer_that_another_has", a_hung_registry_holds_up_no_layer_that_another_has),
    ("pulls_of_one_image_fetch_it_once", pulls_of_one_image_fetch_it_once),
    ("a_pull_that_nobody_wants_any_more_ends", a_pull_that_nobody_wants_any_more_ends),
    ("a_passenger_goes_on_when_the_pilot_leaves", a_passenger_goes_on_when_the_pilot_leaves),
];

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn name(address: impl std::fmt::Display) -> String {
    format!("{address}/sample:1")
}

/// A registry with the sample image.
fn stocked(scene: &Scene) -> (Registry, Layout) {
    let registry = registry(scene);
    let layout = sample(scene, "sample");
    registry.push(&layout, "sample", "1").unwrap();
    (registry, layout)
}

fn large_layer(layout: &Layout) -> (String, u64) {
    let blob = layout.blobs().unwrap().pop().unwrap();
    (blob.digest, std::fs::metadata(blob.path).unwrap().len())
}

fn a_registry_that_is_down_is_told_at_once() {
    let scene = Scene::new();
    let address = format!("127.0.0.1:{}", free_port());
    run(async {
        let started = Instant::now();
        let error = scene.pull(&name(&address)).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }) && error.may_pass(), "{error}");
        for part in [address.as_str(), "sample:1", "refused"] {
            assert!(error.to_string().contains(part), "{part} in {error}");
        }
        assert!(started.elapsed() < Duration::from_secs(10), "nobody answers: there is nothing to wait for");
        scene.assert_untouched().await;
    });
}

fn what_is_not_there_is_not_found() {
    let scene = Scene::new();
    let (registry, _) = stocked(&scene);
    let missing = Digest::of(b"nothing");
    run(async {
        for name in ["sample:2".to_owned(), "other:1".to_owned(), format!("sample@{missing}")] {
            let error = scene.pull(&format!("{}/{name}", registry.address())).await.unwrap_err();
            assert!(matches!(error, Error::NotFound { .. }) && !error.may_pass(), "{error}");
            assert!(error.to_string().contains(&name) && error.to_string().contains("imagePullSecret"), "{error}");
        }
        scene.assert_untouched().await;
    });
}

/// Changes a blob where the registry keeps it; its length stays.
fn damage(scene: &Scene, digest: &str) {
    let hex = digest.trim_start_matches("sha256:");
    let blobs = scene.path("registry/storage/docker/registry/v2/blobs/sha256");
    let path = blobs.join(&hex[..2]).join(hex).join("data");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x20;
    std::fs::write(path, bytes).unwrap();
}

fn wrong_bytes_are_refused() {
    for (object, part) in [("layer", 2), ("config", 0)] {
        let scene = Scene::new();
        let (registry, layout) = stocked(&scene);
        damage(&scene, &layout.blobs().unwrap()[part].digest);
        run(async {
            let error = scene.pull(&name(registry.address())).await.unwrap_err();
            let digest = layout.blobs().unwrap()[part].digest.clone();
            match &error {
                Error::DigestMismatch { object: what, expected, .. } => {
                    assert_eq!((*what, expected.to_string()), (object, digest));
                }
                other => panic!("{other}"),
            }
            assert!(error.to_string().contains(&registry.address().to_string()), "{error}");
            scene.sweep().await;
            scene.assert_untouched().await;
        });
    }
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let wrong = String::from_utf8(layout.manifest().unwrap().bytes).unwrap().replace("schemaVersion", "schemaversion");
    let proxy = Proxy::start(registry.address(), move |request| match request.path.contains("/manifests/") {
        true => Answer::Reply(200, vec![("Content-Type", MANIFEST.into())], wrong.clone().into_bytes()),
        false => Answer::Forward,
    });
    let pinned = format!("{}/sample@{}", proxy.address(), Digest::of(&layout.manifest().unwrap().bytes));
    run(async {
        let error = scene.pull(&pinned).await.unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { object: "manifest", .. }), "{error}");
        scene.assert_untouched().await;
    });
}

/// A manifest for the sample's layers, the last of them with another size.
fn resized(layout: &Layout, size: u64) -> Vec<u8> {
    let mut manifest: serde_json::Value = serde_json::from_slice(&layout.manifest().unwrap().bytes).unwrap();
    manifest["layers"][1]["size"] = json!(size);
    manifest.to_string().into_bytes()
}

fn a_manifest_that_lies_about_sizes_is_refused() {
    for (difference, words) in [(-1, "sends more than"), (1, "ended early")] {
        let scene = Scene::new();
        let (registry, layout) = stocked(&scene);
        let (_, size) = large_layer(&layout);
        let manifest = resized(&layout, size.checked_add_signed(difference).unwrap());
        let proxy = Proxy::start(registry.address(), move |request| match request.path.contains("/manifests/") {
            true => Answer::Reply(200, vec![("Content-Type", MANIFEST.into())], manifest.clone()),
            false => Answer::Forward,
        });
        run(async {
            let error = scene.pull(&name(proxy.address())).await.unwrap_err();
            let told = error.to_string();
            assert!(told.contains(words) || told.contains("416"), "{told}");
            scene.sweep().await;
            scene.assert_untouched().await;
        });
    }
}

fn is_layer(request: &Request, digest: &str) -> bool {
    request.method == "GET" && request.path.contains(digest)
}

fn ranges(proxy: &Proxy, digest: &str) -> Vec<Option<String>> {
    let layers = proxy.seen().into_iter().filter(|request| is_layer(request, digest));
    layers.map(|request| request.header("range").map(str::to_owned)).collect()
}

fn a_broken_download_goes_on_where_it_broke() {
    const PIECE: u64 = 1 << 20;
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (digest, size) = large_layer(&layout);
    let proxy = {
        let digest = digest.clone();
        Proxy::start(registry.address(), move |request| match is_layer(request, &digest) {
            true => Answer::Cut(PIECE),
            false => Answer::Forward,
        })
    };
    run(async {
        let image = scene.pull(&name(proxy.address())).await.unwrap();
        assert_eq!(scene.read_bytes(&image, "large"), noise("sample", crate::fixture::LARGE_BYTES));
        let asked = ranges(&proxy, &digest);
        let expected: Vec<Option<String>> = (0..size.div_ceil(PIECE))
            .map(|piece| Some(piece * PIECE).filter(|from| *from > 0).map(|from| format!("bytes={from}-")))
            .collect();
        assert_eq!(asked, expected, "each byte is fetched once");
        assert!(proxy.sent_bytes() < size + (64 << 10), "{} bytes for {size}", proxy.sent_bytes());
        scene.images.settled().await;
        scene.assert_clean();
    });
}

fn a_registry_without_ranges_is_read_again() {
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (digest, _) = large_layer(&layout);
    let calls = AtomicU32::new(0);
    let proxy = {
        let digest = digest.clone();
        Proxy::start(registry.address(), move |request| match is_layer(request, &digest) {
            true => Answer::WholeCut([1 << 20, 2 << 20, u64::MAX][calls.fetch_add(1, Ordering::SeqCst) as usize]),
            false => Answer::Forward,
        })
    };
    run(async {
        let image = scene.pull(&name(proxy.address())).await.unwrap();
        assert_eq!(scene.read_bytes(&image, "large"), noise("sample", crate::fixture::LARGE_BYTES));
        assert_eq!(ranges(&proxy, &digest).len(), 3);
    });
}

fn a_download_that_never_gets_on_is_given_up() {
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (digest, size) = large_layer(&layout);
    let first = AtomicU32::new(0);
    let proxy = Proxy::start(registry.address(), move |request| match is_layer(request, &digest) {
        true => Answer::Cut(if first.fetch_add(1, Ordering::SeqCst) == 0 { 1000 } else { 0 }),
        false => Answer::Forward,
    });
    run(async {
        let error = scene.pull(&name(proxy.address())).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains(&format!("at byte 1000 of {size}")), "{error}");
        scene.sweep().await;
        scene.assert_untouched().await;
    });
}

fn a_moment_of_weakness_is_waited_out() {
    let scene = Scene::new();
    let (registry, _) = stocked(&scene);
    let calls = AtomicU32::new(0);
    let proxy = Proxy::start(registry.address(), move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Answer::Reply(503, vec![], vec![]),
        1 => Answer::Reply(429, vec![("Retry-After", "0".into())], vec![]),
        2 => Answer::Cut(0),
        _ => Answer::Forward,
    });
    run(async {
        scene.pull(&name(proxy.address())).await.unwrap();
    });
    let always = Proxy::start(registry.address(), |_| {
        Answer::Reply(500, vec![], br#"{"errors": [{"code": "UNKNOWN", "message": "disk on fire"}]}"#.to_vec())
    });
    run(async {
        let error = scene.pull(&name(always.address())).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains("disk on fire"), "{error}");
    });
}

fn an_image_for_another_machine_is_refused() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let mut builder = Builder::new(scene.path("other")).unwrap().architecture("s390x");
    builder.layer(|tar| file(tar, "a", "1")).unwrap();
    let layout = builder.finish(json!({})).unwrap();
    registry.push(&layout, "sample", "1").unwrap();
    let manifest = layout.manifest().unwrap().bytes;
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{
        "mediaType": MANIFEST, "digest": Digest::of(&manifest), "size": manifest.len(),
        "platform": { "os": "linux", "architecture": "s390x" },
    }]});
    let index = index.to_string().into_bytes();
    let proxy = Proxy::start(registry.address(), move |request| match request.path.ends_with("/manifests/1") {
        true => {
            Answer::Reply(200, vec![("Content-Type", "application/vnd.oci.image.index.v1+json".into())], index.clone())
        }
        false => Answer::Forward,
    });
    run(async {
        // Once by the index, once by the configuration alone.
        for address in [proxy.address(), registry.address()] {
            let error = scene.pull(&name(address)).await.unwrap_err();
            assert!(matches!(error, Error::UnsupportedPlatform { .. }) && !error.may_pass(), "{error}");
            assert!(error.to_string().contains("linux/s390x"), "{error}");
        }
        scene.assert_untouched().await;
    });
}

fn what_no_node_can_run_is_refused() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let layer = |media_type: &str| {
        let dir = scene.path("artifact");
        let mut builder = Builder::new(&dir).unwrap();
        builder.raw_layer(media_type, b"x", b"x").unwrap();
        let manifest = builder.finish(json!({})).unwrap().manifest().unwrap().bytes;
        (MANIFEST, manifest)
    };
    let cases = [
        layer("application/vnd.cncf.helm.chart.content.v1.tar+gzip+encrypted"),
        layer("application/json"),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", br#"{"schemaVersion": 1}"#.to_vec()),
        (MANIFEST, b"{}".to_vec()),
        (MANIFEST, b"not JSON".to_vec()),
        ("text/html", b"<html>".to_vec()),
        (MANIFEST, vec![b' '; (4 << 20) + 1]),
    ];
    run(async {
        for (media_type, bytes) in cases {
            let proxy = Proxy::start(registry.address(), move |_| {
                Answer::Reply(200, vec![("Content-Type", media_type.into())], bytes.clone())
            });
            let error = scene.pull(&name(proxy.address())).await.unwrap_err();
            let expected = matches!(
                error,
                Error::UnsupportedMediaType { .. } | Error::Malformed { .. } | Error::Unavailable { .. }
            );
            assert!(expected, "{media_type}: {error}");
        }
        scene.assert_untouched().await;
    });
}

fn signal(registry: &Registry, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(registry.pid()).unwrap()).unwrap();
    sys::rustix::process::kill_process(pid, signal).unwrap();
}

fn a_stopped_registry_delays_its_own_pull_only() {
    let scene = Scene::new();
    let (good, layout) = stocked(&scene);
    let hung = Registry::start(([127, 0, 0, 1], free_port()).into(), &scene.path("hung")).unwrap();
    hung.push(&sample(&scene, "hung-sample"), "sample", "1").unwrap();
    good.push(&layout, "sample", "2").unwrap();
    signal(&hung, Signal::STOP);
    run(async {
        let images = Arc::clone(&scene.images);
        let reference: Reference = name(hung.address()).parse().unwrap();
        let waiting = tokio::spawn(async move { images.pull(&reference, None, &Silent).await });
        scene.pull(&name(good.address())).await.unwrap();
        scene.pull(&format!("{}/sample:2", good.address())).await.unwrap();
        assert!(!waiting.is_finished(), "a stopped program does not answer");
        signal(&hung, Signal::CONT);
        waiting.await.unwrap().unwrap();
        scene.images.settled().await;
        scene.assert_clean();
    });
}

fn a_hung_registry_holds_up_no_layer_that_another_has() {
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (proxy, at) = hanging_proxy(&registry, large_layer(&layout).0);
    run(async {
        let hung = hanging_pull(&scene, &proxy, at).await;
        scene.pull(&name(registry.address())).await.unwrap();
        assert!(!hung.is_finished());
        hung.abort();
        let _ = hung.await;
        scene.images.settled().await;
        scene.assert_clean();
    });
}

/// A proxy that tells when it is asked for a layer, and goes on with each such request when it is told to.
fn waiting_proxy(registry: &Registry, layer: &str) -> (Proxy, Receiver<()>, Sender<()>) {
    let (reached, at_layer) = channel();
    let (go, wait) = channel::<()>();
    let (wait, layer) = (std::sync::Mutex::new(wait), layer.to_owned());
    let proxy = Proxy::start(registry.address(), move |request| {
        if is_layer(request, &layer) {
            let _ = reached.send(()); // As a rule only the first is waited for.
            wait.lock().unwrap().recv().unwrap();
        }
        Answer::Forward
    });
    (proxy, at_layer, go)
}

fn pulls_of_one_image_fetch_it_once() {
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (digest, _) = large_layer(&layout);
    // The layer comes when all pulls have begun.
    let (proxy, at_layer, go) = waiting_proxy(&registry, &digest);
    run(async {
        let pulls: Vec<_> = (0..6)
            .map(|_| {
                let (images, reference) = (Arc::clone(&scene.images), name(proxy.address()).parse().unwrap());
                tokio::spawn(async move { images.pull(&reference, None, &Silent).await })
            })
            .collect();
        tokio::task::spawn_blocking(move || at_layer.recv().unwrap()).await.unwrap();
        // The others need the first layer and the configuration before they come to the large one.
        let asked_for_configs = || proxy.seen().iter().filter(|request| request.is_blob()).count();
        while asked_for_configs() < 6 + 2 {
            tokio::task::yield_now().await;
        }
        go.send(()).unwrap();
        for pull in pulls {
            pull.await.unwrap().unwrap();
        }
        assert_eq!(ranges(&proxy, &digest).len(), 1);
        scene.images.settled().await;
        scene.assert_clean();
    });
}

/// The pull of an image whose large layer hangs in the middle, once it does.
async fn hanging_pull(scene: &Scene, proxy: &Proxy, at: Receiver<()>) -> tokio::task::JoinHandle<()> {
    let (images, reference): (_, Reference) = (Arc::clone(&scene.images), name(proxy.address()).parse().unwrap());
    let pull = tokio::spawn(async move { drop(images.pull(&reference, None, &Silent).await) });
    tokio::task::spawn_blocking(move || at.recv().unwrap()).await.unwrap();
    pull
}

fn hanging_proxy(registry: &Registry, digest: String) -> (Proxy, Receiver<()>) {
    let (reached, at) = channel();
    let calls = AtomicU32::new(0);
    let proxy = Proxy::start(registry.address(), move |request| match is_layer(request, &digest) {
        true if calls.fetch_add(1, Ordering::SeqCst) == 0 => Answer::Hang(1 << 20, reached.clone()),
        _ => Answer::Forward,
    });
    (proxy, at)
}

/// Children of this process that unpack, by their command lines.
fn unpacking_children() -> usize {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let is_child = |path: std::path::PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        let after_name = stat.rsplit(") ").next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
        let mut line = String::new();
        let _ = std::fs::File::open(path.join("cmdline")).and_then(|mut file| file.read_to_string(&mut line));
        after_name == own && line.contains("--image-unpack-worker")
    };
    processes.filter(|entry| is_child(entry.path())).count()
}

fn a_pull_that_nobody_wants_any_more_ends() {
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (proxy, at) = hanging_proxy(&registry, large_layer(&layout).0);
    run(async {
        let pull = hanging_pull(&scene, &proxy, at).await;
        assert!(unpacking_children() > 0);
        pull.abort();
        assert!(pull.await.unwrap_err().is_cancelled());
        scene.images.settled().await;
        while unpacking_children() > 0 {
            tokio::task::yield_now().await;
        }
        scene.sweep().await;
        scene.assert_untouched().await;
        // The proxy has hung once; the second try goes through.
        scene.pull(&name(proxy.address())).await.unwrap();
    });
}

fn a_passenger_goes_on_when_the_pilot_leaves() {
    let scene = Scene::new();
    let (registry, layout) = stocked(&scene);
    let (proxy, at, go) = waiting_proxy(&registry, &large_layer(&layout).0);
    run(async {
        let pilot = hanging_pull(&scene, &proxy, at).await;
        let (images, reference): (_, Reference) = (Arc::clone(&scene.images), name(proxy.address()).parse().unwrap());
        let passenger = tokio::spawn(async move { images.pull(&reference, None, &Silent).await });
        // Aboard is who has found the other layer in the store and asks for nothing more.
        let configs =
            || proxy.seen().iter().filter(|request| request.path.contains(&layout.blobs().unwrap()[0].digest)).count();
        while configs() < 2 {
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
        pilot.abort();
        let _ = pilot.await;
        go.send(()).unwrap();
        // If it was not yet aboard it fetches the layer itself.
        let _ = go.send(());
        passenger.await.unwrap().unwrap();
        scene.images.settled().await;
        scene.assert_clean();
    });
}
