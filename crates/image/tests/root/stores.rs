//! The store when the disk is full, the daemon is killed, or there are two of them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use image::{Config, Error, GcPolicy, Images, Reference, Silent};
use sys::rustix::fs::{self, FileType, Mode, OFlags, inotify};
use sys::rustix::mount::{MountFlags, UnmountFlags};
use testkit::bad_network::{Answer, Proxy};
use testkit::image::Builder;
use testkit::serial::Test;

use crate::fixture::{Scene, file, noise, registry, run, sample};

pub(crate) const TESTS: &[Test] = &[
    ("a_full_disk_is_told_and_heals", a_full_disk_is_told_and_heals),
    ("who_looks_for_an_image_does_not_wait_for_the_disk", who_looks_for_an_image_does_not_wait_for_the_disk),
    ("a_full_disk_stops_a_load_of_a_compressed_archive", a_full_disk_stops_a_load_of_a_compressed_archive),
    ("a_daemon_killed_in_the_middle_of_a_pull_leaves_nothing", a_daemon_killed_in_the_middle_of_a_pull_leaves_nothing),
    (
        "a_daemon_killed_in_the_middle_of_a_sweep_leaves_nothing",
        a_daemon_killed_in_the_middle_of_a_sweep_leaves_nothing,
    ),
    ("two_daemons_do_not_share_a_store", two_daemons_do_not_share_a_store),
    ("a_sweep_takes_nothing_that_a_pull_counts_on", a_sweep_takes_nothing_that_a_pull_counts_on),
    ("a_pinned_image_outlives_every_collection", a_pinned_image_outlives_every_collection),
    ("layers_are_written_out_after_the_pull", layers_are_written_out_after_the_pull),
    ("layers_are_spread_over_the_disk", layers_are_spread_over_the_disk),
    ("damage_is_thrown_away_at_the_start", damage_is_thrown_away_at_the_start),
];

/// A file system of a few megabytes.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, size: &str) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let options = std::ffi::CString::new(format!("size={size},mode=700")).unwrap();
        sys::rustix::mount::mount("tmpfs", &at, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        Self(at)
    }

    fn used_bytes(&self) -> u64 {
        let facts = sys::rustix::fs::statvfs(&self.0).unwrap();
        (facts.f_blocks - facts.f_bfree) * facts.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = sys::rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn a_full_disk_is_told_and_heals() {
    let mut small = None;
    let scene = Scene::with(|config, _| small = Some(Small::mount(config.state_dir.clone(), "5m")));
    let small = small.unwrap();
    let registry = registry(&scene);
    registry.push(&sample(&scene, "sample"), "sample", "1").unwrap();
    let filler = scene.path("store/filler");
    std::fs::write(&filler, noise("filler", 3 << 20)).unwrap();
    run(async {
        let name = format!("{}/sample:1", registry.address());
        let error = scene.pull(&name).await.unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }) && error.may_pass(), "{error}");
        assert!(error.to_string().contains("no space left") && error.to_string().contains("free space"), "{error}");
        scene.images.settled().await;
        scene.sweep().await;
        assert!(small.used_bytes() < (3 << 20) + (256 << 10), "{} bytes are used", small.used_bytes());
        assert_eq!(scene.images.fsck().unwrap().len(), 1, "nothing but the filler");
        std::fs::remove_file(&filler).unwrap();
        scene.pull(&name).await.unwrap();
        scene.images.settled().await;
        scene.assert_clean();
        // With the image there is no room for records either.
        std::fs::write(&filler, noise("filler", 5 << 20)).unwrap_err();
        let error = scene.images.tag(&name, &"other:1".parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        std::fs::remove_file(&filler).unwrap();
        scene.images.tag(&name, &"other:1".parse().unwrap()).unwrap();
        assert_eq!(scene.images.get(&name).unwrap().repo_tags.len(), 2);
    });
}

/// A disk that hangs is as pipes are in the place of files: who opens one to write waits for a reader.
fn who_looks_for_an_image_does_not_wait_for_the_disk() {
    let scene = Scene::new();
    let registry = registry(&scene);
    registry.push(&sample(&scene, "sample"), "sample", "1").unwrap();
    let name = format!("{}/sample:1", registry.address());
    run(async {
        scene.pull(&name).await.unwrap();
        scene.images.settled().await;
    });
    let pipes: Vec<PathBuf> = (0..200).map(|number| scene.path(&format!("store/tmp/{number}"))).collect();
    for pipe in &pipes {
        fs::mknodat(fs::CWD, pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    std::thread::scope(|threads| {
        let (tell, told) = channel();
        let (images, name) = (&scene.images, &name);
        let tags = threads.spawn(move || {
            tell.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
            images.tag(name, &"other:1".parse().unwrap())
        });
        let status = Path::new("/proc").join(told.recv().unwrap()).join("status");
        while !std::fs::read_to_string(&status).unwrap().contains("State:\tS") {
            std::thread::yield_now();
        }
        assert_eq!(images.get(name).unwrap().repo_tags.len(), 1);
        assert_eq!(images.list().len(), 1);
        let read = |pipe: &PathBuf| fs::open(pipe, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let readers: Vec<_> = pipes.iter().map(read).collect();
        tags.join().unwrap().unwrap();
        drop(readers);
        assert_eq!(images.get("other:1").unwrap().repo_tags.len(), 2);
    });
}

fn a_full_disk_stops_a_load_of_a_compressed_archive() {
    let mut small = None;
    let scene = Scene::with(|config, _| small = Some(Small::mount(config.state_dir.clone(), "5m")));
    let _small = small;
    let layout = sample(&scene, "sample");
    let mut archive = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
    archive.append_dir_all(".", layout.dir()).unwrap();
    let path = scene.path("sample.tar.zst");
    std::fs::write(&path, archive.into_inner().unwrap().finish().unwrap()).unwrap();
    run(async {
        // The archive and the image are too much together; the directory needs no copy.
        let error = scene.images.load(&path, &Silent).await.unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        scene.images.settled().await;
        scene.sweep().await;
        scene.assert_untouched().await;
        scene.images.load(layout.dir(), &Silent).await.unwrap();
    });
}

/// A first argument that makes this program a daemon which pulls an image into a store.
const DAEMON: &str = "--pull-daemon";

/// One that makes it remove the image again, and so on.
const SWEEPER: &str = "--sweep-daemon";

/// Runs that daemon, if this process was started as one.
pub(crate) fn maybe_run_daemon() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().filter(|kind| [DAEMON, SWEEPER].contains(&kind.as_str()))?;
    let (state_dir, reference) = (arguments.next()?, arguments.next()?.parse::<Reference>().unwrap());
    let pulled = run(async {
        let images = open(Path::new(&state_dir));
        if kind == DAEMON {
            return images.pull(&reference, None, &Silent).await;
        }
        loop {
            images.pull(&reference, None, &Silent).await.unwrap();
            images.remove_unused(&HashSet::new()).await.unwrap();
        }
    });
    Some(if pulled.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn open(state_dir: &Path) -> Arc<Images> {
    let mut config = Config::new(state_dir);
    config.registry_config_dirs.clear();
    Images::open(config).unwrap()
}

fn workers_in(state_dir: &Path) -> usize {
    // A worker's root is its own; its mount table says which directory that is in its file system.
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let last_two = format!("/{}/{}", name(state_dir.parent().unwrap()), name(state_dir));
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let works_there = |path: PathBuf| {
        let command = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let worker = command.windows(21).any(|window| window == b"--image-unpack-worker");
        let maps = std::fs::read_to_string(path.join("mountinfo")).unwrap_or_default();
        worker && maps.contains(&last_two)
    };
    processes.filter(|entry| works_there(entry.path())).count()
}

#[expect(clippy::disallowed_methods, reason = "this very program")]
fn a_daemon_killed_in_the_middle_of_a_pull_leaves_nothing() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let layout = sample(&scene, "sample");
    registry.push(&layout, "sample", "1").unwrap();
    let digest = layout.blobs().unwrap().pop().unwrap().digest;
    let (reached, at_middle) = channel();
    let calls = AtomicU32::new(0);
    let proxy = Proxy::start(registry.address(), move |request| match request.path.contains(&digest) {
        true if calls.fetch_add(1, Ordering::SeqCst) == 0 => Answer::Hang(2 << 20, reached.clone()),
        _ => Answer::Forward,
    });
    let state_dir = scene.path("killed");
    let name = format!("{}/sample:1", proxy.address());
    let mut daemon = Command::new("/proc/self/exe").arg(DAEMON).arg(&state_dir).arg(&name).spawn().unwrap();
    at_middle.recv().unwrap();
    assert!(std::fs::read_dir(state_dir.join("tmp")).unwrap().count() > 0, "the large layer is on its way");
    assert!(workers_in(&state_dir) > 0);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut config = Config::new(&state_dir);
    config.registry_config_dirs.clear();
    run(async {
        let images = Images::open(config).unwrap();
        assert_eq!(std::fs::read_dir(state_dir.join("tmp")).unwrap().count(), 0);
        let left: Vec<_> = images.fsck().unwrap();
        assert!(left.iter().all(|unowned| unowned.reason.contains("garbage collection")), "{left:?}");
        images.remove_unused(&HashSet::new()).await.unwrap();
        assert_eq!(images.fsck().unwrap(), []);
        assert_eq!(images.usage(), image::Usage::default());
        while workers_in(&state_dir) > 0 {
            tokio::task::yield_now().await;
        }
        images.pull(&name.parse().unwrap(), None, &Silent).await.unwrap();
        images.settled().await;
        assert_eq!(images.fsck().unwrap(), []);
    });
}

/// Returns when so many layers were taken out of sight since.
fn removals(layers: &Path) -> impl FnOnce(usize) + use<> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, layers, inotify::WatchFlags::MOVED_FROM).unwrap();
    move |count| {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        for _ in 0..count {
            events.next().unwrap();
        }
    }
}

/// It is killed when it has taken out the first layer, the second one, and so on; or a little later.
#[expect(clippy::disallowed_methods, reason = "this very program")]
fn a_daemon_killed_in_the_middle_of_a_sweep_leaves_nothing() {
    const LAYERS: usize = 5;
    let scene = Scene::new();
    let registry = registry(&scene);
    let mut builder = Builder::new(scene.path("layout")).unwrap();
    for number in 0..LAYERS {
        builder.layer(|tar| file(tar, &number.to_string(), "x")).unwrap();
    }
    registry.push(&builder.finish(serde_json::json!({})).unwrap(), "sample", "1").unwrap();
    let name = format!("{}/sample:1", registry.address());
    for removed in 1..=LAYERS {
        let state_dir = scene.path(&format!("swept-{removed}"));
        run(async { drop(open(&state_dir)) });
        let reached = removals(&state_dir.join("layers/sha256"));
        let mut daemon = Command::new("/proc/self/exe").arg(SWEEPER).arg(&state_dir).arg(&name).spawn().unwrap();
        reached(removed);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        run(async {
            let images = open(&state_dir);
            assert_eq!(std::fs::read_dir(state_dir.join("tmp")).unwrap().count(), 0);
            let left = images.fsck().unwrap();
            assert!(left.iter().all(|unowned| unowned.reason.contains("garbage collection")), "{left:?}");
            // What is there is whole.
            for image in images.list() {
                images.mount_image(&image.id, "", None).unwrap();
            }
            images.pull(&name.parse().unwrap(), None, &Silent).await.unwrap();
            assert_eq!(images.list().len(), 1);
            images.remove_unused(&HashSet::new()).await.unwrap();
            assert_eq!((images.fsck().unwrap(), images.usage()), (Vec::new(), image::Usage::default()));
        });
    }
}

fn two_daemons_do_not_share_a_store() {
    let scene = Scene::new();
    let error = Images::open(Config::new(scene.path("store"))).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(error.to_string().contains("--state-dir"), "{error}");
}

fn a_sweep_takes_nothing_that_a_pull_counts_on() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let mut builder = Builder::new(scene.path("layout")).unwrap();
    for number in 0..4 {
        builder.layer(|tar| file(tar, &number.to_string(), "x")).unwrap();
    }
    registry.push(&builder.finish(serde_json::json!({})).unwrap(), "sample", "1").unwrap();
    let name = format!("{}/sample:1", registry.address());
    run(async {
        let images = Arc::clone(&scene.images);
        // It removes the image as soon as it is there, and between all steps of a pull whatever nobody counts on.
        let sweeping = tokio::spawn(async move {
            loop {
                images.remove_unused(&HashSet::new()).await.unwrap();
            }
        });
        for _ in 0..25 {
            scene.pull(&name).await.unwrap();
        }
        sweeping.abort();
        assert!(sweeping.await.unwrap_err().is_cancelled());
        scene.images.settled().await;
        scene.sweep().await;
        scene.assert_untouched().await;
    });
}

/// Also when the daemon is another one than that which was told to keep it.
fn a_pinned_image_outlives_every_collection() {
    let scene = Scene::new();
    let registry = registry(&scene);
    let names = ["kept", "other"].map(|name| {
        registry.push(&sample(&scene, name), name, "1").unwrap();
        format!("{}/{name}:1", registry.address())
    });
    let everything = GcPolicy {
        high_threshold_percent: 0,
        low_threshold_percent: 0,
        minimum_age: Duration::ZERO,
        maximum_age: Some(Duration::ZERO),
    };
    let Scene { dir, images } = scene;
    let store = dir.path().join("store");
    run(async {
        for name in &names {
            images.pull_by_name(name.clone()).await;
        }
        let [kept, other] = names.each_ref().map(|name| images.get(name).unwrap().id.clone());
        images.pin(&names[0], true).unwrap();
        images.settled().await;
        drop(images);
        let images = Images::open(Config::new(&store)).unwrap();
        let reclaimed = images.collect_garbage(&everything, &HashSet::new()).await.unwrap();
        assert_eq!(reclaimed.images, [other]);
        assert_eq!(images.remove_unused(&HashSet::new()).await.unwrap().images, []);
        let left: Vec<_> = images.list().iter().map(|image| (image.id.clone(), image.pinned)).collect();
        assert_eq!(left, [(kept.clone(), true)]);
        let mount = images.mount_image(&kept, "", None).unwrap();
        let text = format!("/proc/self/fd/{}/etc/text", std::os::fd::AsRawFd::as_raw_fd(&mount));
        assert_eq!(std::fs::read_to_string(text).unwrap(), "kept");
        drop(mount);
        images.pin(&names[0], false).unwrap();
        let reclaimed = images.collect_garbage(&everything, &HashSet::new()).await.unwrap();
        assert_eq!(reclaimed.images, [kept]);
        images.settled().await;
        assert_eq!((images.fsck().unwrap(), images.usage()), (Vec::new(), image::Usage::default()));
    });
}

fn layers_are_written_out_after_the_pull() {
    let scene = Scene::new();
    let registry = registry(&scene);
    registry.push(&sample(&scene, "sample"), "sample", "1").unwrap();
    let Scene { dir, images } = scene;
    let store = dir.path().join("store");
    let written_out = || -> Vec<bool> {
        let layers = std::fs::read_dir(store.join("layers/sha256")).unwrap();
        let facts = layers.map(|layer| std::fs::read(layer.unwrap().path().join("layer.json")).unwrap());
        facts.map(|facts| serde_json::from_slice::<serde_json::Value>(&facts).unwrap()["writtenOut"] == true).collect()
    };
    run(async {
        images.pull_by_name(format!("{}/sample:1", registry.address())).await;
        assert!(!written_out().is_empty() && !written_out().contains(&true), "the pull does not wait for the disk");
        // A daemon that ends meanwhile leaves it to the next one.
        drop(images);
        let mut config = Config::new(&store);
        config.registry_config_dirs.clear();
        let images = Images::open(config).unwrap();
        images.settled().await;
        assert!(!written_out().contains(&false));
        assert_eq!(images.list().len(), 1);
    });
}

fn layers_are_spread_over_the_disk() {
    use sys::rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let scene = Scene::new();
    let probe = scene.path("probe");
    std::fs::create_dir(&probe).unwrap();
    let supported = ioctl_setflags(std::fs::File::open(&probe).unwrap(), IFlags::TOPDIR).is_ok();
    let flags = ioctl_getflags(std::fs::File::open(scene.path("store/tmp")).unwrap());
    assert_eq!(flags.is_ok_and(|flags| flags.contains(IFlags::TOPDIR)), supported);
}

/// What a crash or a curious person may do to the files of the store.
fn damage_is_thrown_away_at_the_start() {
    let scene = Scene::new();
    let registry = registry(&scene);
    for (name, text) in [("one", "1"), ("two", "2"), ("three", "3")] {
        let mut builder = Builder::new(scene.path(name)).unwrap();
        builder.layer(|tar| file(tar, "f", text)).unwrap();
        registry.push(&builder.finish(serde_json::json!({ "Cmd": [name] })).unwrap(), name, "1").unwrap();
    }
    let name = |image: &str| format!("{}/{image}:1", registry.address());
    let Scene { dir, images } = scene;
    let store = dir.path().join("store");
    run(async {
        let pull = |image: &'static str| images.pull_by_name(name(image));
        let (one, two, three) = (pull("one").await, pull("two").await, pull("three").await);
        images.settled().await;
        // A record cut short, a configuration of other bytes, a layer without its description.
        std::fs::write(store.join("images").join(format!("{}.json", one.id.hex())), "{").unwrap();
        std::fs::write(store.join("blobs/sha256").join(two.id.hex()), "{}").unwrap();
        std::fs::write(store.join("tmp/left-over"), "x").unwrap();
        let kept = three.id.clone();
        drop((images, one, two, three));
        let mut config = Config::new(&store);
        config.registry_config_dirs.clear();
        let images = Images::open(config).unwrap();
        let ids: Vec<_> = images.list().iter().map(|image| image.id.clone()).collect();
        assert_eq!(ids, [kept]);
        images.remove_unused(&ids.into_iter().collect()).await.unwrap();
        assert_eq!(images.fsck().unwrap(), []);
        images.pull_by_name(name("one")).await;
    });
}

trait PullByName {
    async fn pull_by_name(&self, name: String) -> Arc<image::Image>;
}

impl PullByName for Arc<Images> {
    async fn pull_by_name(&self, name: String) -> Arc<image::Image> {
        self.pull(&name.parse().unwrap(), None, &Silent).await.unwrap()
    }
}
