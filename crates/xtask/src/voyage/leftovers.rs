//! What a node may leave behind, by the kernel's own lists: independent of `orlop fsck`.

use std::path::Path;
use std::process::Command;

use testkit::host::output;

/// Every mount, control group, network interface, nft table, process and runtime file that is still there.
pub(super) fn find(stage: &Path) -> anyhow::Result<Vec<String>> {
    let mut left = mounts(stage)?;
    left.extend(interfaces()?);
    left.extend(tables()?);
    left.extend(processes(stage)?);
    left.extend(control_groups());
    left.extend(files(stage));
    Ok(left)
}

fn mounts(stage: &Path) -> anyhow::Result<Vec<String>> {
    let stage = stage.display().to_string();
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let ours = |line: &&str| line.contains(&stage) || line.contains("orlop") || line.contains("kubernetes.io~");
    Ok(table.lines().filter(ours).map(|line| format!("mount {line}")).collect())
}

fn interfaces() -> anyhow::Result<Vec<String>> {
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

fn control_groups() -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name() == "kubepods" {
                    found.push(format!("cgroup {}", entry.path().display()));
                } else {
                    open.push(entry.path());
                }
            }
        }
    }
    found
}

fn files(stage: &Path) -> Vec<String> {
    let entries = |dir: &str| std::fs::read_dir(stage.join(dir)).into_iter().flatten().flatten();
    let run = entries("run").map(|entry| format!("file {}", entry.path().display()));
    let pods = entries("state/kubelet/pods").map(|entry| format!("file {}", entry.path().display()));
    run.chain(pods).collect()
}
