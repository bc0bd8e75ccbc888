//! What a node that does not run has on this machine: whatever is still there has no owner.
//!
//! A daemon that died leaves its pods on purpose: the next `orlop up` takes them over, and until then they are listed.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use netfilter::pods::PodTable;
use netfilter::services::ServiceTable;
use rustix::io::Errno;
use sys::cgroup::Hierarchy;
use sys::netlink::Socket;

use super::super::layout::Layout;
use super::super::lock::Lock;
use super::pod_directories;

/// What can be done about most of it.
const TAKEN_OVER: &str = "no daemon owns it; `orlop up` takes it over, and `orlop down` removes it";

/// Of a node that does not run.
pub(in crate::node) fn of_stopped(layout: &Layout) -> anyhow::Result<Vec<String>> {
    if Lock::is_taken(&layout.run_dir) {
        bail!("a node runs in {} but does not answer yet; try again", layout.run_dir.display());
    }
    let mut left = sandboxes(&layout.run_dir);
    left.extend(keepers(&layout.run_dir)?);
    left.extend(name_server(layout));
    left.extend(pod_directories(layout).into_iter().map(|(_, line)| format!("{line} ({TAKEN_OVER})")));
    left.extend(mounts(layout)?);
    left.extend(links(&layout.bridge)?);
    left.extend(tables(layout)?);
    left.extend(control_groups(layout)?);
    left.extend(files(&layout.run_dir));
    Ok(left)
}

fn sandboxes(run_dir: &Path) -> Vec<String> {
    entries(&run_dir.join("sandboxes")).map(|path| format!("sandbox {} ({TAKEN_OVER})", path.display())).collect()
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Keepers work in the directories of their sandboxes, also when these have been removed.
fn keepers(run_dir: &Path) -> anyhow::Result<Vec<String>> {
    let sandboxes = run_dir.join("sandboxes");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").context("list processes")? {
        let process = entry?.path();
        let (Some(pid), Ok(place)) = (process.file_name(), std::fs::read_link(process.join("cwd"))) else { continue };
        // It may end while it is looked at.
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        if name.trim() == "orlop-keeper" && place.starts_with(&sandboxes) {
            found.push(format!("process orlop-keeper {} ({TAKEN_OVER})", pid.display()));
        }
    }
    Ok(found)
}

fn name_server(layout: &Layout) -> Vec<String> {
    let line = |one: network::Owned| format!("{} {} ({TAKEN_OVER})", one.kind, one.name);
    network::dns::fsck(&layout.dns()).into_iter().map(line).collect()
}

/// Volumes of pods, what plugins have staged for them, and network namespaces with a name. An operator may have mounted disks
/// elsewhere.
fn mounts(layout: &Layout) -> anyhow::Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").context("list mounts")?;
    let places = [layout.run_dir.clone(), layout.kubelet_root.join("pods"), layout.kubelet_root.join("plugins")];
    let places = places.map(|place| std::fs::canonicalize(&place).unwrap_or(place));
    // The last first: it may be mounted in another.
    Ok(table.lines().rev().filter_map(|line| mount(line, &places)).collect())
}

/// The line for a mount below one of these places, from its line of the table (proc_pid_mountinfo(5)).
fn mount(line: &str, places: &[PathBuf]) -> Option<String> {
    let (fields, kind) = line.split_once(" - ")?;
    let point = fields.split(' ').nth(4)?;
    let is_below = |place: &PathBuf| Path::new(point).starts_with(place) && Path::new(point) != place;
    let what = if kind.starts_with("nsfs ") { "network namespace" } else { "mount" };
    places.iter().any(is_below).then(|| format!("{what} {point} (no daemon owns it; `umount {point}` removes it)"))
}

/// The bridge and its ports.
fn links(bridge: &str) -> anyhow::Result<Vec<String>> {
    let links = Socket::route().and_then(|mut socket| socket.links()).context("list network links")?;
    let Some(index) = links.iter().find(|link| link.name == bridge).map(|link| link.index) else {
        return Ok(Vec::new());
    };
    let ours = links.iter().filter(|link| link.index == index || link.master == index);
    Ok(ours.map(|link| format!("link {} ({TAKEN_OVER})", link.name)).collect())
}

fn tables(layout: &Layout) -> anyhow::Result<Vec<String>> {
    let list = |family| match Socket::netfilter().and_then(|mut socket| socket.tables(family)) {
        // A kernel without nftables has no table either.
        Err(error) if matches!(error.errno, Errno::PROTONOSUPPORT | Errno::OPNOTSUPP | Errno::INVAL) => Ok(Vec::new()),
        other => other.context("list nftables tables"),
    };
    let ours = [(PodTable::FAMILY, &layout.pod_table), (ServiceTable::FAMILY, &layout.service_table)];
    let mut found = Vec::new();
    for (family, name) in ours {
        if list(family)?.contains(name) {
            found.push(format!("table {name} ({TAKEN_OVER})"));
        }
    }
    Ok(found)
}

fn control_groups(layout: &Layout) -> anyhow::Result<Vec<String>> {
    let hierarchy = Hierarchy::detect()?;
    let mut found = Vec::new();
    let pods = hierarchy.group(kubelet::qos::ROOT);
    // Another node of this machine, or another kubelet, has its pods in the same tree.
    if !pods.is_populated() {
        found.extend(pods.directories().into_iter().filter(|dir| dir.is_dir()));
    }
    // What has no pod's group for its parent has one in the group that is this node's alone.
    let own = hierarchy.group(&layout.group).directories();
    found.extend(own.iter().flat_map(|dir| entries(dir)).filter(|path| path.is_dir()));
    Ok(found.into_iter().map(|dir| format!("cgroup {} ({TAKEN_OVER})", dir.display())).collect())
}

/// What a daemon that ended by itself would have removed, or the next one takes.
fn files(run_dir: &Path) -> Vec<String> {
    let is_daemons = |path: &PathBuf| path.ends_with("lock") || path.extension().is_some_and(|end| end == "sock");
    entries(run_dir).filter(is_daemons).map(|path| format!("file {} ({TAKEN_OVER})", path.display())).collect()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests, which make with programs of others what is to be found")]
mod tests {
    use std::process::{Child, Command};

    use crate::args::Places;

    use super::*;

    fn layout(dir: &Path) -> Layout {
        let layout = Layout::new(&Places { state_dir: dir.join("state"), run_dir: dir.join("run") });
        std::fs::create_dir_all(layout.run_dir.join("sandboxes")).unwrap();
        layout
    }

    /// Namespaces of the calling thread alone; none without root.
    fn enter_private() -> bool {
        let entered = testkit::netns::enter_private().map_err(|error| format!("{error:#}")).and_then(|()| {
            sys::process::leave(sys::process::namespace::MOUNT).map_err(|error| error.to_string())?;
            sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true)
                .map_err(|error| error.to_string())
        });
        if let Err(error) = &entered {
            eprintln!("skipped: needs root for private namespaces ({error})");
        }
        entered.is_ok()
    }

    fn run(line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        testkit::host::run(Command::new(words[0]).args(&words[1..])).unwrap();
    }

    /// Asserts that exactly these words are told, each in a line of its own with what to do, and then nothing any more.
    fn check(layout: &Layout, expect: &[&str], remove: impl FnOnce()) {
        let mut left = of_stopped(layout).unwrap();
        left.retain(|line| !line.starts_with("cgroup "));
        assert_eq!(left.len(), expect.len(), "{left:?} for {expect:?}");
        for (line, words) in left.iter().zip(expect) {
            assert!(line.starts_with(words), "{line} for {words}");
            assert!(line.contains("no daemon owns it; `"), "{line} has no remedy");
        }
        remove();
        let left: Vec<_> =
            of_stopped(layout).unwrap().into_iter().filter(|line| !line.starts_with("cgroup ")).collect();
        assert_eq!(left, Vec::<String>::new());
    }

    #[test]
    fn files_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        for (path, what) in [
            (layout.run_dir.join("sandboxes/a"), "sandbox"),
            (layout.kubelet_root.join("pods/uid"), "pod directory"),
            (layout.run_dir.join("lock"), "file"),
            (layout.run_dir.join("orlop.sock"), "file"),
            (layout.run_dir.join("cri.sock"), "file"),
            (layout.dns().join("dns.sock"), "socket"),
        ] {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            if path.extension().is_some() || path.ends_with("lock") {
                std::fs::write(&path, "").unwrap();
            } else {
                std::fs::create_dir(&path).unwrap();
            }
            let remove = || {
                if path.is_dir() { std::fs::remove_dir(&path).unwrap() } else { std::fs::remove_file(&path).unwrap() }
            };
            check(&layout, &[&format!("{what} {} (", path.display())], remove);
        }
    }

    #[test]
    fn mounts_and_network_namespaces_are_told() {
        if !enter_private() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let volume = layout.kubelet_root.join("pods/uid/volumes/v");
        std::fs::create_dir_all(&volume).unwrap();
        run(&format!("mount -t tmpfs tmpfs {}", volume.display()));
        let pod = format!("pod directory {} (", layout.kubelet_root.join("pods/uid").display());
        check(&layout, &[&pod, &format!("mount {} (", volume.display())], || {
            run(&format!("umount {}", volume.display()));
            std::fs::remove_dir_all(layout.kubelet_root.join("pods/uid")).unwrap();
        });
        let namespace = layout.run_dir.join("network/netns/a");
        std::fs::create_dir_all(namespace.parent().unwrap()).unwrap();
        std::fs::write(&namespace, "").unwrap();
        run(&format!("mount --bind /proc/self/ns/net {}", namespace.display()));
        check(&layout, &[&format!("network namespace {} (", namespace.display())], || {
            run(&format!("umount {}", namespace.display()));
        });
        // A disk of the operator's.
        let disk = layout.state_dir.join("images");
        std::fs::create_dir_all(&disk).unwrap();
        run(&format!("mount -t tmpfs tmpfs {}", disk.display()));
        check(&layout, &[], || ());
    }

    #[test]
    fn links_and_tables_are_told() {
        if !enter_private() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        run("ip link add other0 type bridge");
        run("nft add table inet other");
        check(&layout, &[], || ());
        let bridge = &layout.bridge;
        run(&format!("ip link add {bridge} type bridge"));
        run("ip link add pod0 type veth peer name pod1");
        run(&format!("ip link set pod0 master {bridge}"));
        let mut left = of_stopped(&layout).unwrap();
        left.retain(|line| line.starts_with("link "));
        left.sort();
        let names: Vec<&str> = left.iter().filter_map(|line| line.split(' ').nth(1)).collect();
        assert_eq!(names, [bridge, "pod0"]);
        run("ip link delete pod0");
        check(&layout, &[&format!("link {bridge} (")], || run(&format!("ip link delete {bridge}")));
        for table in [&layout.pod_table, &layout.service_table] {
            run(&format!("nft add table inet {table}"));
            check(&layout, &[&format!("table {table} (")], || run(&format!("nft delete table inet {table}")));
        }
    }

    /// A process that ends with the test.
    struct Ending(Child);

    impl Drop for Ending {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn keepers_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let place = layout.run_dir.join("sandboxes/a");
        std::fs::create_dir(&place).unwrap();
        // By the name of its file the kernel calls a process.
        let program = dir.path().join("orlop-keeper");
        std::fs::copy(testkit::host::find("sleep").unwrap(), &program).unwrap();
        let keeper = Ending(Command::new(&program).arg("1000").current_dir(&place).spawn().unwrap());
        let process = format!("process orlop-keeper {} (", keeper.0.id());
        // Its directory may have gone.
        std::fs::remove_dir(&place).unwrap();
        check(&layout, &[&process], || drop(keeper));
    }

    #[test]
    fn only_what_lies_below_the_places_is_ours() {
        let places = [PathBuf::from("/run/orlop")];
        let line = |point: &str, kind: &str| mount(&format!("36 35 98:0 / {point} rw shared:1 - {kind} x rw"), &places);
        assert_eq!(line("/run/orlop", "tmpfs"), None);
        assert_eq!(line("/run/orlop-2/a", "tmpfs"), None);
        assert!(line("/run/orlop/a", "tmpfs").unwrap().starts_with("mount /run/orlop/a ("));
        assert!(line("/run/orlop/n", "nsfs").unwrap().starts_with("network namespace /run/orlop/n ("));
        assert_eq!(mount("nonsense", &places), None);
    }
}
