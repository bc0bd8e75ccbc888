//! Layers that mean harm: refused, or turned into something harmless inside the image; never a byte outside of it.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use image::{Digest, Error, Image, Silent};
use serde_json::json;
use testkit::image::Builder;
use testkit::serial::Test;

use crate::fixture::{Scene, run};

pub(crate) const TESTS: &[Test] = &[
    ("refuses_paths_that_lead_out", refuses_paths_that_lead_out),
    ("refuses_links_that_lead_out", refuses_links_that_lead_out),
    ("follows_links_inside_the_image_only", follows_links_inside_the_image_only),
    ("writes_through_no_link", writes_through_no_link),
    ("refuses_whiteouts_of_nothing", refuses_whiteouts_of_nothing),
    ("whiteouts_and_opaque_directories_stay_inside", whiteouts_and_opaque_directories_stay_inside),
    ("refuses_bombs", refuses_bombs),
    ("refuses_what_is_beyond_its_budget", refuses_what_is_beyond_its_budget),
    ("refuses_more_opaque_directories_than_can_be_told", refuses_more_opaque_directories_than_can_be_told),
    ("an_image_has_one_budget_for_all_its_layers", an_image_has_one_budget_for_all_its_layers),
    ("refuses_headers_that_make_no_sense", refuses_headers_that_make_no_sense),
    ("later_entries_win_or_are_refused", later_entries_win_or_are_refused),
    ("keeps_what_images_mean_and_no_more", keeps_what_images_mean_and_no_more),
    ("sparse_files_take_what_they_hold", sparse_files_take_what_they_hold),
    ("deep_trees_come_and_go", deep_trees_come_and_go),
    ("a_diff_id_that_is_not_the_layers_is_refused", a_diff_id_that_is_not_the_layers_is_refused),
];

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const BLOCK: usize = 512;

/// One member of an archive, header and data, as no honest writer would make it.
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    pub(super) kind: u8,
    pub(super) link: Vec<u8>,
    pub(super) data: Vec<u8>,
    /// What the size field says instead of the length of the data.
    pub(super) size: Option<[u8; 12]>,
    pub(super) device: (u8, u8),
    pub(super) mode: u32,
}

impl Member {
    pub(super) fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        Self { name: name.as_ref().to_vec(), kind, link: vec![], data: vec![], size: None, device: (0, 0), mode: 0o755 }
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        let mut header = vec![0; BLOCK];
        header[..self.name.len()].copy_from_slice(&self.name);
        header[100..108].copy_from_slice(format!("{:07o}\0", self.mode).as_bytes());
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(
            &self.size.unwrap_or_else(|| format!("{:011o}\0", self.data.len()).into_bytes().try_into().unwrap()),
        );
        header[136..148].copy_from_slice(b"00000000017\0");
        header[156] = self.kind;
        header[157..157 + self.link.len()].copy_from_slice(&self.link);
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[329..337].copy_from_slice(format!("{:07o}\0", self.device.0).as_bytes());
        header[337..345].copy_from_slice(format!("{:07o}\0", self.device.1).as_bytes());
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend(&self.data);
        header.resize(header.len().next_multiple_of(BLOCK), 0);
        header
    }
}

pub(super) fn file(name: &str, text: &str) -> Vec<u8> {
    Member { data: text.into(), ..Member::new(b'0', name) }.bytes()
}

pub(super) fn directory(name: &str) -> Vec<u8> {
    Member::new(b'5', name).bytes()
}

pub(super) fn symlink(name: &str, target: &str) -> Vec<u8> {
    Member { link: target.into(), ..Member::new(b'2', name) }.bytes()
}

pub(super) fn hard_link(name: &str, target: &str) -> Vec<u8> {
    Member { link: target.into(), ..Member::new(b'1', name) }.bytes()
}

fn node(kind: u8, name: &str, device: (u8, u8)) -> Vec<u8> {
    Member { device, ..Member::new(kind, name) }.bytes()
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        data.extend(format!("{length} {key}=").bytes());
        data.extend(*value);
        data.push(b'\n');
    }
    Member { data, ..Member::new(b'x', "pax") }.bytes()
}

fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), vec![0; 2 * BLOCK]].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Brings an image with these layers, the lowest first, into a store.
async fn take_in(scene: &Scene, layers: &[(Vec<u8>, Vec<u8>)]) -> Result<Arc<Image>, Error> {
    let dir = scene.path("layout");
    let _ = std::fs::remove_dir_all(&dir);
    let mut builder = Builder::new(&dir).unwrap();
    for (blob, plain) in layers {
        builder.raw_layer(PLAIN, blob, plain).unwrap();
    }
    let layout = builder.finish(json!({})).unwrap();
    Ok(scene.images.load(layout.dir(), &Silent).await?.remove(0))
}

pub(super) async fn take_in_plain(scene: &Scene, layers: &[&[Vec<u8>]]) -> Result<Arc<Image>, Error> {
    let layers: Vec<_> = layers.iter().map(|members| (archive(members), archive(members))).collect();
    take_in(scene, &layers).await
}

/// A layer of these members is refused with these words, and nothing of it is kept, here or anywhere.
async fn check_refused(scene: &Scene, members: &[Vec<u8>], words: &str) {
    let error = take_in_plain(scene, &[members]).await.expect_err(words);
    check_error(scene, &error, words).await;
}

async fn check_error(scene: &Scene, error: &Error, words: &str) {
    assert!(matches!(error, Error::MaliciousLayer { .. } | Error::CorruptLayer { .. }), "{words}: {error}");
    assert!(error.to_string().contains(words), "{words}: {error}");
    assert!(!error.may_pass());
    scene.assert_untouched().await;
    let outside: Vec<_> =
        std::fs::read_dir(scene.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(outside.iter().all(|name| name == "store" || name == "layout"), "{outside:?}");
}

/// The tree of an image's only layer, where the store has it.
fn tree(scene: &Scene, members: &[Vec<u8>]) -> PathBuf {
    scene.path("store/layers/sha256").join(Digest::of(&archive(members)).hex()).join("fs")
}

fn refuses_paths_that_lead_out() {
    let scene = Scene::new();
    run(async {
        for name in ["../evil", "a/../../evil", "..", "a/..", "./../evil"] {
            check_refused(&scene, &[file(name, "x")], "leads out of the image").await;
        }
        check_refused(&scene, &[file("/evil", "x")], "absolute path").await;
        check_refused(&scene, &[directory("/")], "absolute path").await;
        let long = [b"a/".repeat(3000), b"evil".to_vec()].concat();
        check_refused(&scene, &[pax(&[("path", &long)]), file("x", "x")], "too long").await;
        check_refused(&scene, &[pax(&[("path", &[b'a'; 256])]), file("x", "x")], "longer than 255").await;
        check_refused(&scene, &[pax(&[("path", b"../evil")]), file("x", "x")], "leads out of the image").await;
        check_refused(&scene, &[file("./", "x")], "replace the root").await;
        check_refused(&scene, &[symlink(".", "/")], "replace the root").await;
    });
}

fn refuses_links_that_lead_out() {
    let scene = Scene::new();
    std::fs::create_dir_all(scene.path("store")).unwrap();
    run(async {
        let up = symlink("up", "../../../..");
        check_refused(&scene, &[up.clone(), file("up/evil", "x")], "leads out of the image").await;
        check_refused(&scene, &[up.clone(), directory("up/evil")], "leads out of the image").await;
        check_refused(&scene, &[up.clone(), file("up/.wh.store", "")], "leads out of the image").await;
        check_refused(&scene, &[up.clone(), file("up/.wh..wh..opq", "")], "leads out of the image").await;
        check_refused(&scene, &[up.clone(), hard_link("h", "up/etc/passwd")], "which this layer does not have").await;
        check_refused(&scene, &[hard_link("h", "../../../../etc/passwd")], "leads out of the image").await;
        check_refused(&scene, &[hard_link("h", "/etc/passwd")], "which this layer does not have").await;
        check_refused(&scene, &[hard_link("h", "/proc/self/exe")], "which this layer does not have").await;
        check_refused(&scene, &[symlink("e", "/etc"), hard_link("h", "e/passwd")], "which this layer does not have")
            .await;
        check_refused(&scene, &[symlink("a", "b"), symlink("b", "a"), file("a/x", "x")], "symbolic link").await;
        check_refused(&scene, &[symlink("s", ""), file("x", "x")], "empty or overlong").await;
        let long = vec![b'l'; 5000];
        check_refused(&scene, &[pax(&[("linkpath", &long)]), symlink("s", "x")], "empty or overlong").await;
        check_refused(&scene, &[directory("d"), hard_link("h", "d")], "hard link to a directory").await;
        check_refused(&scene, &[file("f", "x"), hard_link("f", "f")], "hard link to itself").await;
        check_refused(&scene, &[hard_link("h", ".")], "root directory").await;
    });
}

fn follows_links_inside_the_image_only() {
    let scene = Scene::new();
    let canary = format!("orlop-test-{}", std::process::id());
    let members = [
        symlink("out", "/tmp"),
        file(&format!("out/{canary}"), "inside"),
        directory("real"),
        symlink("a", "real/../b"),
        directory("b"),
        file("a/x", "by a link"),
        symlink("p", "/proc/self/root"),
        file("p/y", "inside too"),
    ];
    run(async {
        let image = take_in_plain(&scene, &[&members]).await.unwrap();
        assert!(!std::path::Path::new("/tmp").join(&canary).exists());
        assert_eq!(scene.read(&image, &format!("tmp/{canary}")), "inside");
        assert_eq!(scene.read(&image, "b/x"), "by a link");
        assert_eq!(scene.read(&image, "proc/self/root/y"), "inside too");
    });
}

fn writes_through_no_link() {
    let scene = Scene::new();
    let target = scene.path("target");
    std::fs::write(&target, "untouched").unwrap();
    let outside = target.to_str().unwrap();
    let members = [
        symlink("s", outside),
        file("s", "a file now"),
        symlink("h", outside),
        hard_link("h2", "h"),
        file("h2", "another file"),
        symlink("d", "/etc"),
        directory("d"),
        file("d/x", "in a directory now"),
    ];
    run(async {
        let image = take_in_plain(&scene, &[&members]).await.unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "untouched");
        let tree = tree(&scene, &members);
        assert!(std::fs::symlink_metadata(tree.join("s")).unwrap().is_file());
        assert!(std::fs::symlink_metadata(tree.join("h")).unwrap().is_symlink());
        assert!(std::fs::symlink_metadata(tree.join("h2")).unwrap().is_file());
        assert!(std::fs::symlink_metadata(tree.join("d")).unwrap().is_dir());
        assert_eq!(scene.read(&image, "d/x"), "in a directory now");
    });
}

fn refuses_whiteouts_of_nothing() {
    let scene = Scene::new();
    run(async {
        for name in [".wh.", ".wh..", ".wh...", "a/.wh..", "a/.wh."] {
            check_refused(&scene, &[file(name, "")], "whiteout of nothing").await;
        }
        check_refused(&scene, &[file("a/../.wh.x", "")], "leads out of the image").await;
    });
}

fn whiteouts_and_opaque_directories_stay_inside() {
    let scene = Scene::new();
    let lower = [
        directory("d"),
        file("d/below", "1"),
        file("gone", "2"),
        directory("e"),
        file("e/below", "3"),
        file("kept", "4"),
        directory("f"),
        file("f/below", "5"),
    ];
    let upper = [
        file(".wh.gone", ""),
        symlink("link", "d"),
        file("link/.wh..wh..opq", ""),
        file("d/above", "6"),
        // A whiteout of what the same layer has hides what is below it only.
        file("e/above", "7"),
        file(".wh.e", ""),
        file(".wh..wh.aufs", "book-keeping"),
        // A directory in the place of a whiteout starts empty.
        file(".wh.f", ""),
        file("f/above", "8"),
        // What is not there below may be whited out as well.
        file("never/.wh.was", ""),
    ];
    run(async {
        let image = take_in_plain(&scene, &[&lower, &upper]).await.unwrap();
        let mount = scene.images.mount_image(&image.id, "", None).unwrap();
        use std::os::fd::AsRawFd as _;
        let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        let names = |path: &str| {
            let entries = std::fs::read_dir(root.join(path)).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("."), ["d", "e", "f", "kept", "link", "never"]);
        assert_eq!(names("d"), ["above"]);
        assert_eq!(names("e"), ["above"]);
        assert_eq!(names("f"), ["above"]);
        assert!(!root.join("never/was").exists());
    });
}

fn small_limits(scene_limits: impl Fn(&mut image::Limits)) -> Scene {
    Scene::with(|config, _| {
        config.limits.ratio_free_bytes = 1 << 20;
        scene_limits(&mut config.limits);
    })
}

fn refuses_bombs() {
    let scene = small_limits(|_| {});
    let plain = archive(&[Member { data: vec![0; 64 << 20], ..Member::new(b'0', "zeros") }.bytes()]);
    let twice = {
        // A small archive whose extended header inflates instead of a file.
        let member = Member { data: vec![b'\n'; 64 << 20], ..Member::new(b'x', "pax") };
        archive(&[member.bytes()])
    };
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 19).unwrap();
    run(async {
        for blob in [gzip(&plain), zstd(&plain)] {
            let error = take_in(&scene, &[(blob, plain.clone())]).await.unwrap_err();
            check_error(&scene, &error, "decompression bomb").await;
        }
        for blob in [gzip(&twice), zstd(&twice)] {
            let error = take_in(&scene, &[(blob, twice.clone())]).await.unwrap_err();
            check_error(&scene, &error, "").await;
        }
        // Memory instead of disk: a window of a gigabyte.
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.set_parameter(zstd::stream::raw::CParameter::WindowLog(30)).unwrap();
        encoder.write_all(&plain).unwrap();
        let error = take_in(&scene, &[(encoder.finish().unwrap(), plain.clone())]).await.unwrap_err();
        check_error(&scene, &error, "").await;
    });
}

fn refuses_what_is_beyond_its_budget() {
    let scene = small_limits(|limits| {
        limits.entries_max = 50;
        limits.bytes_max = 1 << 20;
    });
    let many: Vec<_> = (0..51).map(|number| file(&number.to_string(), "")).collect();
    let large = Member { data: vec![7; (1 << 20) + 1], ..Member::new(b'0', "large") }.bytes();
    let pieces: Vec<_> = (0..5).map(|number| file(&number.to_string(), &"x".repeat(300_000))).collect();
    let claims = Member { size: Some(*b"77777777777\0"), ..Member::new(b'0', "claims") }.bytes();
    let deep: Vec<_> = (0..2).map(|number| file(&format!("{number}{}/f", "/d".repeat(40)), "")).collect();
    let holes = pax(&[("GNU.sparse.size", b"1099511627776"), ("GNU.sparse.map", b"0,1")]);
    run(async {
        check_refused(&scene, &many, "50 entries").await;
        check_refused(&scene, &deep, "50 entries").await;
        check_refused(&scene, &[large], "above 1048576 bytes").await;
        check_refused(&scene, &pieces, "above 1048576 bytes").await;
        check_refused(&scene, &[claims], "above 1048576 bytes").await;
        check_refused(&scene, &[holes, file("sparse", "x")], "above 1048576 bytes").await;
    });
}

/// 500 layers, each within the budget of one.
fn an_image_has_one_budget_for_all_its_layers() {
    let scene = small_limits(|limits| {
        limits.entries_max = 50;
        limits.bytes_max = 1 << 20;
    });
    let of = |name: &str, count: usize, bytes: usize| -> Vec<_> {
        (0..count).map(|number| file(&format!("{name}{number}"), &"x".repeat(bytes))).collect()
    };
    run(async {
        for (count, bytes, words) in [(30, 1, "60 inodes"), (2, 300_000, "bytes on disk")] {
            let error = take_in_plain(&scene, &[&of("a", count, bytes), &of("b", count, bytes)]).await.unwrap_err();
            assert!(matches!(error, Error::TooLarge { .. }) && error.to_string().contains(words), "{error}");
            scene.sweep().await;
            scene.assert_untouched().await;
        }
        take_in_plain(&scene, &[&of("a", 20, 1), &of("b", 20, 1)]).await.unwrap();
    });
    let scene = small_limits(|limits| {
        limits.ratio_max = 50;
        limits.ratio_free_bytes = 1 << 20;
    });
    let layer = |name: &str| {
        let plain = archive(&[file(name, &"x".repeat(900_000))]);
        (gzip(&plain), plain)
    };
    run(async {
        take_in(&scene, &[layer("a")]).await.unwrap();
        let error = take_in(&scene, &[layer("b"), layer("c")]).await.unwrap_err();
        assert!(error.to_string().contains("50 times"), "{error}");
    });
}

/// What is to be told of opaque directories would fill more than a report.
fn refuses_more_opaque_directories_than_can_be_told() {
    let scene = Scene::new();
    let deep = format!("{}/", "d".repeat(250)).repeat(15);
    let opaque = |number| {
        let path = format!("{deep}{number}/.wh..wh..opq");
        [pax(&[("path", path.as_bytes())]), file("opaque", "")].concat()
    };
    let members: Vec<_> = (0..3_000).map(opaque).collect();
    run(async {
        check_refused(&scene, &members, "opaque directories above 4194304 bytes").await;
    });
}

fn refuses_headers_that_make_no_sense() {
    let scene = Scene::new();
    let sized = |size: [u8; 12]| Member { size: Some(size), ..Member::new(b'0', "f") }.bytes();
    let mut flipped = file("f", "x");
    flipped[0] ^= 1;
    let attributes: Vec<(String, &[u8])> =
        (0..300).map(|number| (format!("SCHILY.xattr.user.{number}"), &b"v"[..])).collect();
    let attributes: Vec<(&str, &[u8])> = attributes.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    run(async {
        check_refused(&scene, &[sized([0xff; 12])], "negative").await;
        check_refused(
            &scene,
            &[sized([0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
            "too large",
        )
        .await;
        check_refused(&scene, &[sized(*b"-0000000001\0")], "octal").await;
        check_refused(&scene, &[pax(&[("size", b"-1")]), file("f", "x")], "bad number").await;
        check_refused(&scene, &[pax(&[("size", b"18446744073709551615")]), file("f", "x")], "impossible size").await;
        check_refused(&scene, &[pax(&[("path", &vec![b'a'; (1 << 20) + 1])]), file("f", "x")], "longer than 1 MiB")
            .await;
        check_refused(&scene, &[pax(&[("path", b"a\0b")]), file("f", "x")], "NUL").await;
        check_refused(&scene, &[pax(&[("uid", b"-1")]), file("f", "x")], "bad number").await;
        check_refused(&scene, &[pax(&attributes), file("f", "x")], "too many extended attributes").await;
        check_refused(
            &scene,
            &[pax(&[("GNU.sparse.map", b"4,2,0,2"), ("GNU.sparse.size", b"8")]), file("f", "abcd")],
            "map",
        )
        .await;
        check_refused(&scene, &[Member { data: b"99 path=x\n".to_vec(), ..Member::new(b'x', "p") }.bytes()], "PAX")
            .await;
        check_refused(&scene, &[flipped], "checksum").await;
        check_refused(&scene, &[Member::new(b'V', "volume").bytes()], "type").await;
        let cut = archive(&[file("f", &"x".repeat(2000))]);
        let error = take_in(&scene, &[(cut[..1000].to_vec(), cut[..1000].to_vec())]).await.unwrap_err();
        check_error(&scene, &error, "ends in the middle").await;
        let damaged = gzip(&archive(&[file("f", &"x".repeat(2000))]));
        let cut = damaged[..damaged.len() - 10].to_vec();
        let error = take_in(&scene, &[(cut, vec![])]).await.unwrap_err();
        check_error(&scene, &error, "").await;
    });
}

fn later_entries_win_or_are_refused() {
    let scene = Scene::new();
    run(async {
        check_refused(&scene, &[file("f", "x"), file("f/below", "x")], "parent that is not a directory").await;
        check_refused(&scene, &[node(b'6', "p", (0, 0)), file("p/below", "x")], "parent that is not a directory").await;
        let members = [
            file("f", "first"),
            file("f", "second"),
            directory("d"),
            file("d/x", "gone"),
            file("d", "a file now"),
            file("e", "a file"),
            directory("e"),
            file("e/x", "below"),
            file("one", "shared"),
            hard_link("two", "one"),
            file("one", "not shared any more"),
        ];
        let image = take_in_plain(&scene, &[&members]).await.unwrap();
        for (path, text) in
            [("f", "second"), ("d", "a file now"), ("e/x", "below"), ("two", "shared"), ("one", "not shared any more")]
        {
            assert_eq!(scene.read(&image, path), text, "{path}");
        }
    });
}

fn attributes_of(path: &std::path::Path) -> HashMap<String, Vec<u8>> {
    let file = std::fs::File::open(path).unwrap();
    let mut found = HashMap::new();
    for name in [
        "user.kept",
        "user.overlay.opaque",
        "user.overlay.redirect",
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.other",
        "security.capability",
        "security.selinux",
        "security.ima",
    ] {
        let mut value = vec![0; 256];
        if let Ok(length) = sys::rustix::fs::fgetxattr(&file, name, &mut value) {
            value.truncate(length);
            found.insert(name.to_owned(), value);
        }
    }
    found
}

fn keeps_what_images_mean_and_no_more() {
    let scene = Scene::new();
    // VFS_CAP_REVISION_2, effective, CAP_NET_RAW.
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let attributes = pax(&[
        ("SCHILY.xattr.user.kept", b"yes"),
        ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.other", b"x"),
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.security.selinux", b"unconfined"),
        ("SCHILY.xattr.security.ima", b"x"),
        ("uid", b"1234"),
        ("gid", b"5678"),
    ]);
    let members = [
        attributes,
        Member { mode: 0o4755, data: b"#!".to_vec(), ..Member::new(b'0', "setuid") }.bytes(),
        node(b'3', "null", (1, 3)),
        node(b'4', "disk", (8, 0)),
        node(b'6', "pipe", (0, 0)),
    ];
    run(async {
        take_in_plain(&scene, &[&members]).await.unwrap();
        let tree = tree(&scene, &members);
        let setuid = std::fs::metadata(tree.join("setuid")).unwrap();
        assert_eq!((setuid.uid(), setuid.gid(), setuid.permissions().mode() & 0o7777), (1234, 5678, 0o4755));
        let expected = [("user.kept", &b"yes"[..]), ("security.capability", capability)];
        let expected: HashMap<String, Vec<u8>> =
            expected.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect();
        assert_eq!(attributes_of(&tree.join("setuid")), expected);
        let kind = |name: &str| std::fs::symlink_metadata(tree.join(name)).unwrap();
        assert!(kind("null").file_type().is_char_device() && kind("null").rdev() == sys::rustix::fs::makedev(1, 3));
        assert!(kind("disk").file_type().is_block_device() && kind("pipe").file_type().is_fifo());
        // Nobody but root comes near them: setuid files and devices of an image are none on the host.
        let store = std::fs::metadata(scene.path("store")).unwrap();
        assert_eq!(store.permissions().mode() & 0o777, 0o700);
        // An image volume has neither.
        let image = scene.images.list().remove(0);
        let mount = scene.images.mount_image(&image.id, "", None).unwrap();
        use std::os::fd::AsRawFd as _;
        let through = format!("/proc/self/fd/{}/null", mount.as_raw_fd());
        assert!(std::fs::File::open(through).is_err(), "devices do not open through an image volume");
    });
}

fn sparse_files_take_what_they_hold() {
    let scene = Scene::new();
    let members = [
        pax(&[("GNU.sparse.size", b"1073741824"), ("GNU.sparse.map", b"0,3,1073741820,4")]),
        file("sparse", "onetail"),
        pax(&[("GNU.sparse.size", b"5000"), ("GNU.sparse.map", b"5000,0")]),
        file("empty", ""),
    ];
    run(async {
        let image = take_in_plain(&scene, &[&members]).await.unwrap();
        let meta = std::fs::metadata(tree(&scene, &members).join("sparse")).unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        assert!(image.size_bytes < 1 << 20);
        assert_eq!(scene.read(&image, "empty").len(), 5000);
    });
}

fn deep_trees_come_and_go() {
    let scene = Scene::new();
    let path = ["d/".repeat(1900), "leaf".to_owned()].concat();
    let members = [pax(&[("path", path.as_bytes())]), file("x", "deep")];
    run(async {
        let image = take_in_plain(&scene, &[&members]).await.unwrap();
        let rootfs = scene.images.rootfs(&image.id, "deep", image::RootfsOptions::default()).unwrap();
        drop(rootfs);
        scene.images.release("deep").await.unwrap();
        assert!(scene.images.remove(&image.id.to_string()).await.unwrap());
        scene.assert_untouched().await;
    });
}

fn a_diff_id_that_is_not_the_layers_is_refused() {
    let scene = Scene::new();
    let plain = archive(&[file("f", "x")]);
    run(async {
        let error = take_in(&scene, &[(gzip(&plain), b"something else".to_vec())]).await.unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { object: "uncompressed layer", .. }), "{error}");
        scene.sweep().await;
        scene.assert_untouched().await;
    });
}
