//! What a node may leave behind, by the kernel's own lists: independent of `orlop fsck`.

use std::path::Path;
use std::process::Command;

use testkit::host::output;

/// What of [`find`] was not there `before`: others may have left something on this machine, too.
pub(crate) fn since(before: &[String], stage: &Path) -> anyhow::Result<Vec<String>> {
    let mut left = find(stage)?;
    left.retain(|one| !before.contains(one));
    Ok(left)
}

/// Every mount, control group, network interface, nft table, process and runtime file that is there.
pub(crate) fn find(stage: &Path) -> anyhow::Result<Vec<String>> {
    let mut left = mounts(stage)?;
    left.extend(interfaces()?);
    left.extend(tables()?);
    left.extend(processes(stage)?);
    left.extend(control_groups()?);
    left.extend(files(stage));
    Ok(left)
}

/// After a run that has failed: ends the keepers and takes down the mounts that are left of it, so that its directory can go.
/// What does not go is told.
pub(crate) fn clear(stage: &Path) {
    for keeper in super::keepers_in(stage).unwrap_or_default() {
        let _ = rustix::process::kill_process(keeper, rustix::process::Signal::KILL); // It may just have ended.
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    let mut points: Vec<&Path> = points.filter(|point| point.starts_with(stage)).collect();
    // The last first: it may be mounted in another.
    points.reverse();
    for point in points {
        if let Err(error) = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH) {
            println!("{} stays mounted: {error}", point.display());
        }
    }
}

fn mounts(stage: &Path) -> anyhow::Result<Vec<String>> {
    let stage = stage.display().to_string();
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let ours = |line: &&str| line.contains(&stage) || line.contains("orlop") || line.contains("kubernetes.io~");
    Ok(table.lines().filter(ours).map(|line| format!("mount {line}")).collect())
}

/// The network interfaces here, but for loopback.
pub(crate) fn interfaces() -> anyhow::Result<Vec<String>> {
    let text = String::from_utf8(output(Command::new("ip").args(["-o", "link"]))?)?;
    Ok(text.lines().filter(|line| !line.contains(" lo:")).map(|line| format!("interface {line}")).collect())
}

fn tables() -> anyhow::Result<Vec<String>> {
    let text = String::from_utf8(output(Command::new("nft").args(["list", "tables"]))?)?;
    Ok(text.lines().map(|line| format!("nft {line}")).collect())
}

fn processes(stage: &Path) -> anyhow::Result<Vec<String>> {
    let stage = stage.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let read =
            |name: &str| std::fs::read(path.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
        // A process may end while it is looked at.
        let (Ok(command), Ok(environment)) = (read("cmdline"), read("environ")) else { continue };
        let serves = command.contains("docker-registry");
        if command.contains("orlop-keeper") || (environment.contains(&stage) && !serves) {
            found.push(format!("process {} {command}", path.display()));
        }
    }
    Ok(found)
}

/// The groups of pods where a node started from here may make them: in each hierarchy below this process's own group or one
/// above it. Elsewhere they are those of other nodes.
fn control_groups() -> anyhow::Result<Vec<String>> {
    control_groups_named("kubepods")
}

/// As [`control_groups`], for a group of this name and all below it.
pub(crate) fn control_groups_named(name: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for line in std::fs::read_to_string("/proc/self/cgroup")?.lines() {
        let (controllers, own) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':')).unwrap_or_default();
        let controllers = controllers.strip_prefix("name=").unwrap_or(controllers);
        let hierarchies = if controllers.is_empty() { vec!["", "unified"] } else { vec![controllers] };
        for hierarchy in hierarchies {
            let root = Path::new("/sys/fs/cgroup").join(hierarchy);
            for above in Path::new(own.trim_start_matches('/')).ancestors() {
                list_directories(&root.join(above).join(name), &mut found);
            }
        }
    }
    Ok(found)
}

fn list_directories(dir: &Path, found: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    found.push(format!("cgroup {}", dir.display()));
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        list_directories(&entry.path(), found);
    }
}

fn files(stage: &Path) -> Vec<String> {
    let entries = |dir: &str| std::fs::read_dir(stage.join(dir)).into_iter().flatten().flatten();
    let run = entries("run").map(|entry| format!("file {}", entry.path().display()));
    let pods = entries("state/kubelet/pods").map(|entry| format!("file {}", entry.path().display()));
    run.chain(pods).collect()
}
