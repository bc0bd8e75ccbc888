//! Published attacks that begin with an image's layers or with the directory that images are unpacked in. Each test has the
//! number of the first that went this way.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use testkit::serial::Test;

use crate::fixture::{Scene, run};
use crate::malicious::{Member, directory, file, hard_link, symlink, take_in_plain};

pub(crate) const TESTS: &[Test] = &[
    ("cve_2025_47290_a_link_of_one_layer_leads_no_other_out", between_layers),
    ("cve_2021_32760_no_mode_of_a_file_of_the_host_is_changed", modes),
    ("cve_2021_41103_nobody_else_enters_the_store", store_is_closed),
];

/// A directory of the host with a file that only root may read.
fn host(scene: &Scene) -> PathBuf {
    let dir = scene.path("host");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("victim"), "the host's").unwrap();
    for path in [&dir.join("victim"), &dir] {
        fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap();
    }
    dir
}

fn assert_untouched(host: &Path) {
    let names: Vec<_> = fs::read_dir(host).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["victim"]);
    assert_eq!(fs::read_to_string(host.join("victim")).unwrap(), "the host's");
    for path in [&host.join("victim"), host] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o700, "{}", path.display());
    }
}

/// Links to the host, by their names in the image: absolute, and up through whatever the image is unpacked in.
fn links(host: &Path) -> Vec<(String, String)> {
    let up = "../".repeat(20);
    let targets = [host.display().to_string(), format!("{up}{}", host.display())];
    (0..).map(|number| format!("link{number}")).zip(targets).collect()
}

/// What the upper layer has below a name was to be written where the lower layer's link leads, once that was in place.
fn between_layers() {
    let scene = Scene::new();
    let host = host(&scene);
    let links = links(&host);
    let lower: Vec<_> = links.iter().map(|(name, target)| symlink(name, target)).collect();
    let upper: Vec<_> = links
        .iter()
        .flat_map(|(name, _)| {
            [
                file(&format!("{name}/new"), "x"),
                file(&format!("{name}/.wh.victim"), ""),
                file(&format!("{name}/victim"), "x"),
            ]
        })
        .collect();
    run(async {
        let image = take_in_plain(&scene, &[&lower, &upper]).await.unwrap();
        assert_untouched(&host);
        for (name, _) in &links {
            assert_eq!(scene.read(&image, &format!("{name}/new")), "x", "a directory of the upper layer's own");
        }
        assert_untouched(&host);
    });
}

/// Modes are set by what was opened, never by a name that may be a link.
fn modes() {
    let scene = Scene::new();
    let host = host(&scene);
    for (number, (_, target)) in links(&host).into_iter().enumerate() {
        let victim = format!("{target}/victim");
        let open = |kind, name: &str, link: &str| {
            Member { mode: 0o7777, link: link.into(), ..Member::new(kind, name) }.bytes()
        };
        let members = [
            symlink("file", &victim),
            hard_link("same", "file"),
            open(b'1', "again", "file"),
            open(b'2', "open", &victim),
            symlink("dir", &target),
            open(b'5', "dir", ""),
            symlink("other", &target),
            directory("deep"),
            open(b'0', "file", ""),
        ];
        run(async {
            // Refused or not, it is the image's own file whose mode changes.
            let taken = take_in_plain(&scene, &[&members]).await;
            assert!(taken.is_ok(), "{number}: {taken:?}");
            assert_untouched(&host);
        });
    }
}

/// Whoever may walk into it could run what an image has set-user-id programs of.
fn store_is_closed() {
    let scene = Scene::with(|config, _| {
        fs::create_dir_all(config.state_dir.join("layers")).unwrap();
        for path in [&config.state_dir.join("layers"), &config.state_dir] {
            fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        }
    });
    let setuid = Member { mode: 0o4755, ..Member::new(b'0', "program") }.bytes();
    run(async {
        take_in_plain(&scene, &[&[setuid]]).await.unwrap();
    });
    let mode = fs::metadata(scene.path("store")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o700);
}
