//! Images from files, in all the forms that people have them in.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use image::{Error, Event, Image, Progress, Silent};
use serde_json::{Value, json};
use testkit::image::{Builder, Layout};
use testkit::serial::Test;

use crate::fixture::{Scene, file, run};

pub(crate) const TESTS: &[Test] = &[
    ("loads_a_layout_from_a_directory", loads_a_layout_from_a_directory),
    ("loads_a_layout_from_every_kind_of_archive", loads_a_layout_from_every_kind_of_archive),
    ("loads_from_a_pipe", loads_from_a_pipe),
    ("loads_what_docker_saved", loads_what_docker_saved),
    ("loads_docker_layers_that_somebody_compressed", loads_docker_layers_that_somebody_compressed),
    ("loads_several_images_with_several_names", loads_several_images_with_several_names),
    ("loads_the_platform_of_this_machine", loads_the_platform_of_this_machine),
    ("unpacks_no_layer_twice", unpacks_no_layer_twice),
    ("refuses_what_is_no_archive", refuses_what_is_no_archive),
    ("refuses_what_is_not_whole", refuses_what_is_not_whole),
    ("an_archive_leads_nowhere_else", an_archive_leads_nowhere_else),
];

const NAME: &str = "docker.io/library/sample:1";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Two layers, the second of which replaces a file of the first.
fn sample(scene: &Scene, name: &str) -> Layout {
    sample_with(Builder::new(scene.path(name)).unwrap(), name)
}

fn sample_with(mut builder: Builder, text: &str) -> Layout {
    builder.layer(|tar| file(tar, "etc/kept", "below")).unwrap();
    builder.layer(|tar| file(tar, "etc/text", text)).unwrap();
    let layout = builder.finish(json!({ "Cmd": ["/bin/sample"] })).unwrap();
    write_index(&layout, &[(&layout, json!({ "io.containerd.image.name": NAME }))]);
    layout
}

/// Writes an `index.json` into `layout` that names the manifests of `images`.
fn write_index(layout: &Layout, images: &[(&Layout, Value)]) {
    let manifests: Vec<Value> = images
        .iter()
        .map(|(image, annotations)| {
            let mut entry = descriptor(image);
            entry["annotations"] = annotations.clone();
            entry
        })
        .collect();
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    std::fs::write(layout.dir().join("index.json"), index.to_string()).unwrap();
}

fn descriptor(image: &Layout) -> Value {
    put_blob(image.dir(), MANIFEST, &image.manifest().unwrap().bytes)
}

fn put_blob(dir: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = image::Digest::of(bytes);
    std::fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

fn copy_blobs(from: &Layout, to: &Layout) {
    for entry in std::fs::read_dir(from.dir().join("blobs/sha256")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.dir().join("blobs/sha256").join(entry.file_name())).unwrap();
    }
}

fn tar_of(dir: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all(".", dir).unwrap();
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(bytes).read_to_end(&mut plain).unwrap();
    plain
}

fn put(scene: &Scene, name: &str, bytes: &[u8]) -> PathBuf {
    let path = scene.path(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

async fn load(scene: &Scene, path: &Path) -> Result<Vec<Arc<Image>>, Error> {
    scene.images.load(path, &Silent).await
}

/// The one image of an archive is there, whole and pinned, and nothing is left over.
async fn check_loaded(scene: &Scene, path: &Path, text: &str) -> Arc<Image> {
    let loaded = load(scene, path).await.unwrap();
    let [image] = loaded.as_slice() else { panic!("{loaded:?}") };
    assert_eq!(image.repo_tags, [NAME], "{}", path.display());
    assert!(image.pinned);
    assert_eq!(image.config.config.cmd, ["/bin/sample"]);
    assert_eq!(scene.images.get("sample:1").unwrap().id, image.id);
    assert_eq!(scene.read(image, "etc/text"), text);
    assert_eq!(scene.read(image, "etc/kept"), "below");
    scene.images.settled().await;
    scene.assert_clean();
    Arc::clone(image)
}

fn loads_a_layout_from_a_directory() {
    let scene = Scene::new();
    let layout = sample(&scene, "layout");
    run(async {
        let image = check_loaded(&scene, layout.dir(), "layout").await;
        let manifest = image::Digest::of(&layout.manifest().unwrap().bytes);
        assert_eq!(image.repo_digests, [format!("docker.io/library/sample@{manifest}")]);
    });
}

fn loads_a_layout_from_every_kind_of_archive() {
    let layouts = tempfile::tempdir().unwrap();
    let layout = sample_with(Builder::new(layouts.path().join("layout")).unwrap(), "layout");
    let plain = tar_of(layout.dir());
    let forms = [
        ("plain.tar", plain.clone()),
        ("small.tar.gz", gzip(&plain)),
        ("small.tar.zst", zstd::encode_all(&plain[..], 1).unwrap()),
    ];
    for (name, bytes) in forms {
        let scene = Scene::new();
        let path = put(&scene, name, &bytes);
        run(check_loaded(&scene, &path, "layout"));
    }
}

fn loads_from_a_pipe() {
    let scene = Scene::new();
    let bytes = tar_of(sample(&scene, "layout").dir());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let feeder = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    use std::os::fd::AsRawFd as _;
    let path = PathBuf::from(format!("/proc/self/fd/{}", reader.as_raw_fd()));
    run(check_loaded(&scene, &path, "layout"));
    feeder.join().unwrap();
}

/// The files of a `docker save` archive of an image, in the form before OCI layouts: path and content.
fn docker_files(layout: &Layout, compressed: bool) -> BTreeMap<String, Vec<u8>> {
    let blobs = layout.blobs().unwrap();
    let read = |at: usize| std::fs::read(&blobs[at].path).unwrap();
    let layer = |at: usize| if compressed { read(at) } else { gunzip(&read(at)) };
    let config = format!("{}.json", blobs[0].digest.trim_start_matches("sha256:"));
    let manifest = json!([
        { "Config": config, "RepoTags": ["sample:1"], "Layers": ["aaa/layer.tar", "bbb/layer.tar"] },
    ]);
    [
        ("aaa/VERSION".to_owned(), b"1.0".to_vec()),
        ("aaa/layer.tar".to_owned(), layer(1)),
        ("bbb/layer.tar".to_owned(), layer(2)),
        (config, read(0)),
        ("manifest.json".to_owned(), manifest.to_string().into_bytes()),
        ("repositories".to_owned(), br#"{"sample":{"1":"bbb"}}"#.to_vec()),
    ]
    .into()
}

fn docker_archive(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn loads_what_docker_saved() {
    let layouts = tempfile::tempdir().unwrap();
    let layout = sample_with(Builder::new(layouts.path().join("layout")).unwrap(), "docker");
    let archive = docker_archive(&docker_files(&layout, false));
    for (name, bytes) in [("saved.tar", archive.clone()), ("saved.tar.gz", gzip(&archive))] {
        let scene = Scene::new();
        let path = put(&scene, name, &bytes);
        let image = run(check_loaded(&scene, &path, "docker"));
        assert_eq!(image.id.to_string(), layout.blobs().unwrap()[0].digest);
        assert!(image.repo_digests.is_empty(), "nobody has ever made a manifest of it");
    }
}

fn loads_docker_layers_that_somebody_compressed() {
    let scene = Scene::new();
    let layout = sample(&scene, "layout");
    let path = put(&scene, "saved.tar", &docker_archive(&docker_files(&layout, true)));
    run(check_loaded(&scene, &path, "layout"));
}

fn loads_several_images_with_several_names() {
    let scene = Scene::new();
    let (first, second) = (sample(&scene, "first"), sample(&scene, "second"));
    copy_blobs(&second, &first);
    write_index(
        &first,
        &[
            (&first, json!({ "io.containerd.image.name": "example.com/first:1" })),
            (&first, json!({ "org.opencontainers.image.ref.name": "example.com/first:2" })),
            (&second, json!({ "org.opencontainers.image.ref.name": "latest" })),
        ],
    );
    run(async {
        let loaded = load(&scene, first.dir()).await.unwrap();
        let tags: Vec<_> = loaded.iter().map(|image| image.repo_tags.clone()).collect();
        assert_eq!(tags, [vec!["example.com/first:1", "example.com/first:2"], vec![]], "a bare tag names nothing");
        assert_eq!(scene.read(&loaded[1], "etc/text"), "second");
        assert_eq!(scene.images.get(&loaded[1].id.to_string()).unwrap().id, loaded[1].id);
        scene.assert_clean();
    });
}

fn loads_the_platform_of_this_machine() {
    let scene = Scene::new();
    let own = sample(&scene, "own");
    let other = sample_with(Builder::new(scene.path("other")).unwrap().architecture("s390x"), "other");
    let machine = image::spec::Platform::host();
    let entry = |layout: &Layout, architecture: &str, variant: Option<&str>| {
        let mut entry = descriptor(layout);
        entry["platform"] = json!({ "os": "linux", "architecture": architecture, "variant": variant });
        entry
    };
    let mut attestation = descriptor(&own);
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    let inner = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [
        attestation, entry(&other, "s390x", None), entry(&own, &machine.architecture, machine.variant.as_deref()),
    ]});
    // As docker save does it: the index names images whose blobs are not in the archive.
    let mut outer = put_blob(own.dir(), INDEX, inner.to_string().as_bytes());
    outer["annotations"] = json!({ "io.containerd.image.name": NAME });
    let outer = json!({ "schemaVersion": 2, "manifests": [outer] });
    std::fs::write(own.dir().join("index.json"), outer.to_string()).unwrap();
    run(async {
        check_loaded(&scene, own.dir(), "own").await;
        let error = load(&scene, other.dir()).await.unwrap_err();
        assert!(matches!(error, Error::UnsupportedPlatform { .. }), "{error}");
        assert!(error.to_string().contains("linux/s390x"), "{error}");
        scene.assert_clean();
    });
}

/// What a load says about layers.
#[derive(Default)]
struct Layers(Mutex<Vec<String>>);

impl Progress for Layers {
    fn event(&self, event: Event<'_>) {
        let said = match event {
            Event::LayerExists { .. } => "exists",
            Event::LayerDone { .. } => "done",
            Event::Resolved { layers: 2, .. } => "resolved",
            _ => return,
        };
        self.0.lock().unwrap().push(said.to_owned());
    }
}

fn unpacks_no_layer_twice() {
    let scene = Scene::new();
    let layout = sample(&scene, "layout");
    run(async {
        let said = Layers::default();
        scene.images.load(layout.dir(), &said).await.unwrap();
        scene.images.load(layout.dir(), &said).await.unwrap();
        assert_eq!(*said.0.lock().unwrap(), ["resolved", "done", "done", "resolved", "exists", "exists"]);
    });
}

fn refuses_what_is_no_archive() {
    let scene = Scene::new();
    let empty_dir = scene.path("empty");
    std::fs::create_dir(&empty_dir).unwrap();
    let no_image = docker_archive(&[("manifest.json".to_owned(), b"[]".to_vec())].into());
    let ancient = docker_archive(&[("repositories".to_owned(), b"{}".to_vec())].into());
    let cases: [(PathBuf, &str); 8] = [
        (scene.path("missing"), "No such file"),
        (empty_dir, "neither an OCI layout"),
        (put(&scene, "zero", b""), "neither an OCI layout"),
        (put(&scene, "text", "no archive at all\n".repeat(100).as_bytes()), "no tar archive"),
        (put(&scene, "text.gz", &gzip(b"no archive at all, but compressed")), "no tar archive"),
        (put(&scene, "x.xz", &[0xfd, b'7', b'z', b'X', b'Z', 0, 0, 0]), "compressed with xz"),
        (put(&scene, "none.tar", &no_image), "names no image"),
        (put(&scene, "ancient.tar", &ancient), "before 1.10"),
    ];
    run(async {
        for (path, words) in &cases {
            let error = load(&scene, path).await.unwrap_err();
            let text = error.to_string();
            assert!(text.contains(words) && text.contains(path.to_str().unwrap()), "{text}");
        }
        scene.images.settled().await;
        scene.assert_clean();
    });
}

fn refuses_what_is_not_whole() {
    let scene = Scene::new();
    let whole = sample(&scene, "whole");
    let blobs = whole.blobs().unwrap();
    let archive = tar_of(whole.dir());
    let changed = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = scene.path(name);
        for blob in &blobs {
            let bytes = std::fs::read(&blob.path).unwrap();
            std::fs::create_dir_all(path.join("blobs/sha256")).unwrap();
            std::fs::write(path.join("blobs/sha256").join(blob.path.file_name().unwrap()), bytes).unwrap();
        }
        let manifest = whole.manifest().unwrap().bytes;
        put_blob(&path, MANIFEST, &manifest);
        for name in ["index.json", "oci-layout"] {
            std::fs::copy(whole.dir().join(name), path.join(name)).unwrap();
        }
        let layer = path.join("blobs/sha256").join(blobs[2].path.file_name().unwrap());
        let mut bytes = std::fs::read(&layer).unwrap();
        change(&mut bytes);
        if bytes.is_empty() {
            std::fs::remove_file(layer).unwrap()
        } else {
            std::fs::write(layer, bytes).unwrap()
        }
        path
    };
    let flipped = changed("flipped", &|bytes| *bytes.last_mut().unwrap() ^= 1);
    let missing = changed("missing", &Vec::clear);
    let short = changed("short", &|bytes| bytes.truncate(bytes.len() - 1));
    let mut files = docker_files(&whole, false);
    files.get_mut("bbb/layer.tar").unwrap()[600] ^= 1;
    let docker_flipped = put(&scene, "flipped.tar", &docker_archive(&files));
    files.remove("bbb/layer.tar");
    let docker_missing = put(&scene, "missing.tar", &docker_archive(&files));
    let cut = put(&scene, "cut.tar", &archive[..archive.len() / 2]);
    let cut_gz = put(&scene, "cut.tar.gz", &gzip(&archive)[..500]);
    run(async {
        for path in [flipped, docker_flipped] {
            let error = load(&scene, &path).await.unwrap_err();
            assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        for path in [missing, docker_missing] {
            let error = load(&scene, &path).await.unwrap_err().to_string();
            assert!(error.contains("which it does not have"), "{error}");
        }
        let error = load(&scene, &short).await.unwrap_err().to_string();
        assert!(error.contains("the manifest says"), "{error}");
        for path in [cut, cut_gz] {
            let error = load(&scene, &path).await.unwrap_err();
            assert!(matches!(error, Error::Archive { .. }), "{error}");
        }
        scene.images.settled().await;
        assert!(scene.images.list().is_empty());
        scene.sweep().await;
        scene.assert_clean();
    });
}

/// Names and links of an archive are looked up in the archive only; those of a directory end at its links.
fn an_archive_leads_nowhere_else() {
    let scene = Scene::new();
    let secret = put(&scene, "secret", b"{}");
    let up = docker_archive(
        &[("x".to_owned(), vec![]), ("manifest.json".to_owned(), br#"[{"Config":"../secret"}]"#.to_vec())].into(),
    );
    let mut linked = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    linked.append_link(&mut header, "manifest.json", &secret).unwrap();
    let dir = scene.path("dir");
    std::fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink(&secret, dir.join("manifest.json")).unwrap();
    let (up, linked) = (put(&scene, "up.tar", &up), put(&scene, "linked.tar", &linked.into_inner().unwrap()));
    run(async {
        for path in [up, linked, dir] {
            let error = load(&scene, &path).await.unwrap_err();
            assert!(matches!(error, Error::Archive { .. }), "{error}");
        }
    });
}
