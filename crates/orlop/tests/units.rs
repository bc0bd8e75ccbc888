//! The units of `packaging/` under a real systemd, which is the first process of a container of Debian.
//!
//! Version 1 of control groups is tested on a host that has it, version 2 in the virtual machine.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts itself")]

#[path = "../../oci/tests/systemd/debian.rs"]
#[expect(dead_code, reason = "its other tests need more")]
mod debian;

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cri::{ImageService as _, RuntimeService as _, v1};
use debian::Lab;
use testkit::image::Builder;
use testkit::registry::Registry;

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    match words.first().map(Path::new).and_then(Path::file_name).and_then(|name| name.to_str()) {
        Some("runc") => return oci::main(words),
        Some("client") => return client(&words[1].to_string_lossy()),
        _ => {}
    }
    testkit::serial::main(&[("pods_outlive_the_unit_of_their_runtime", pods_outlive_their_unit as fn())], missing())
}

fn missing() -> Option<String> {
    if !sys::rustix::process::geteuid().is_root() {
        return Some("root".to_owned());
    }
    debian::fetch().err().map(|error| format!("a Debian with systemd: {error:#}"))
}

/// The node's program; on another machine than the one it was built on, the one in the PATH.
fn program() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_orlop"));
    if built.exists() { built } else { testkit::host::find("orlop").unwrap() }
}

/// What the program does inside: one thing to the runtime on its usual socket.
fn client(what: &str) -> ExitCode {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let client = cri::Client::new(Path::new("/run/orlop/cri.sock")).unwrap();
        match what {
            "make" => make(&client).await,
            "look" => look(&client).await,
            _ => remove(&client).await,
        }
    });
    ExitCode::SUCCESS
}

async fn make(client: &cri::Client) {
    let mut builder = Builder::new("/lab/layout").unwrap();
    testkit::image::busybox_layer(&mut builder).unwrap();
    let layout = builder.finish(serde_json::json!({ "Env": ["PATH=/bin"] })).unwrap();
    let registry = Registry::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 5000)), Path::new("/lab/registry")).unwrap();
    registry.push(&layout, "busybox", "1").unwrap();
    let image = Some(v1::ImageSpec { image: format!("{}/busybox:1", registry.address()), ..Default::default() });
    client.pull_image(v1::PullImageRequest { image: image.clone(), ..Default::default() }).await.unwrap();
    let metadata = v1::PodSandboxMetadata { name: "pod".into(), uid: "uid".into(), ..Default::default() };
    let sandbox = v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    let request = v1::RunPodSandboxRequest { config: Some(sandbox.clone()), ..Default::default() };
    let pod_sandbox_id = client.run_pod_sandbox(request).await.unwrap().pod_sandbox_id;
    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "main".into(), ..Default::default() }),
        image,
        command: ["sleep", "100000"].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let request = v1::CreateContainerRequest { pod_sandbox_id, config: Some(config), sandbox_config: Some(sandbox) };
    let container_id = client.create_container(request).await.unwrap().container_id;
    client.start_container(v1::StartContainerRequest { container_id }).await.unwrap();
}

/// Prints what there is, and how a command in it ends.
async fn look(client: &cri::Client) {
    let all = client.list_containers(v1::ListContainersRequest::default()).await.unwrap().containers;
    for container in all {
        let request = v1::ContainerStatusRequest { container_id: container.id.clone(), ..Default::default() };
        let status = client.container_status(request).await.unwrap().status.unwrap();
        let cmd = ["echo", "inside"].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id: container.id, cmd, timeout: 0 };
        let said = client.exec_sync(request).await.unwrap().stdout;
        println!("{:?} {} {}", status.state(), status.started_at, String::from_utf8(said).unwrap().trim());
    }
}

async fn remove(client: &cri::Client) {
    for sandbox in client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().items {
        let pod_sandbox_id = sandbox.id;
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        client.stop_pod_sandbox(request).await.unwrap();
        client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
    }
}

/// What happens to the unit. `systemctl start` returns when it answers, also while systemd waits to start it again.
const SCRIPT: &str = r#"
cp /lab/runc /lab/client
export PATH=$PATH:/lab
mkdir -p /var/lib/orlop /var/log/pods
echo ORLOP_ARGS=--cni-conf-dir=/nowhere > /etc/default/orlop
mount -t tmpfs tmpfs /var/lib/orlop
U=orlop-runtime.service
main() { systemctl show $U -p MainPID --value; }
systemd-analyze verify /etc/systemd/system/orlop-*.service /etc/systemd/system/kubelet.service 2>&1 | grep -e orlop -e kubelet
systemctl start $U && echo started
systemctl show $U -p KillMode -p Delegate -p TasksMax -p OOMScoreAdjust -p Restart
readlink /run/containerd/containerd.sock
client make && echo made
client look
before=$(main)
kill -KILL $before
until test $(main) != $before; do :; done
systemctl start $U && echo killed; test $(main) != $before && echo another
client look
systemctl restart $U && echo restarted
client look
systemctl daemon-reload && systemctl daemon-reexec && echo reloaded
client look
systemctl stop $U; systemctl is-active $U
systemctl start $U && echo again
client look
client remove && echo removed
client look
systemctl stop $U
systemctl is-failed $U
journalctl --no-pager -n 60 -u $U >&2
"#;

fn pods_outlive_their_unit() {
    let lab = Lab::new();
    let put = |from: &Path, to: &str| {
        std::fs::copy(from, lab.inside(to)).unwrap();
        std::fs::set_permissions(lab.inside(to), std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    put(&program(), "/usr/bin/orlop");
    put(&program(), "/usr/bin/kubelet");
    put(&testkit::host::find("docker-registry").unwrap(), "/usr/bin/docker-registry");
    put(&testkit::host::find("busybox").unwrap(), "/usr/bin/busybox");
    for (name, unit) in [
        ("orlop-runtime", include_str!("../../../packaging/orlop-runtime.service")),
        ("orlop-node", include_str!("../../../packaging/orlop-node.service")),
        ("kubelet", include_str!("../../../packaging/kubelet.service")),
    ] {
        std::fs::write(lab.inside(&format!("/etc/systemd/system/{name}.service")), unit).unwrap();
    }
    let said = lab.run("units", SCRIPT);
    let lives: Vec<&str> = said.lines().filter(|line| line.starts_with("Container")).collect();
    let rest: Vec<&str> = said.lines().filter(|line| !line.starts_with("Container")).collect();
    assert_eq!(rest, EXPECTED, "{said}");
    assert_eq!(lives.len(), 5, "{said}");
    assert!(lives[0].starts_with("ContainerRunning ") && lives[0].ends_with(" inside"), "{said}");
    assert!(lives.iter().all(|line| *line == lives[0]), "it is the same container all the time:\n{said}");
}

const EXPECTED: [&str; 16] = [
    "started",
    "Restart=always",
    "Delegate=yes",
    "TasksMax=infinity",
    "OOMScoreAdjust=-999",
    "KillMode=process",
    "/run/orlop/cri.sock",
    "made",
    "killed",
    "another",
    "restarted",
    "reloaded",
    "inactive",
    "again",
    "removed",
    "inactive",
];
