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
    let tests = [
        ("pods_outlive_the_unit_of_their_runtime", pods_outlive_their_runtime as fn()),
        ("pods_outlive_the_units_of_their_nodes", pods_outlive_their_nodes),
    ];
    testkit::serial::main(&tests, missing())
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
            "pull" => drop(pull(&client).await),
            "make" => make(&client).await,
            "look" => look(&client).await,
            _ => remove(&client).await,
        }
    });
    ExitCode::SUCCESS
}

/// Pulls the image from a registry that is there for that long.
async fn pull(client: &cri::Client) -> Option<v1::ImageSpec> {
    let mut builder = Builder::new("/lab/layout").unwrap();
    testkit::image::busybox_layer(&mut builder).unwrap();
    let layout = builder.finish(serde_json::json!({ "Env": ["PATH=/bin"] })).unwrap();
    let registry = Registry::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 5000)), Path::new("/lab/registry")).unwrap();
    registry.push(&layout, "busybox", "1").unwrap();
    let image = Some(v1::ImageSpec { image: format!("{}/busybox:1", registry.address()), ..Default::default() });
    client.pull_image(v1::PullImageRequest { image: image.clone(), ..Default::default() }).await.unwrap();
    image
}

async fn make(client: &cri::Client) {
    let image = pull(client).await;
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

/// What all scripts begin with.
const BEGIN: &str = r#"
cp /lab/runc /lab/client
export PATH=$PATH:/lab
mkdir -p /var/lib/orlop /var/log/pods
echo ORLOP_ARGS=--cni-conf-dir=/nowhere > /etc/default/orlop
mount -t tmpfs tmpfs /var/lib/orlop
main() { systemctl show $U -p MainPID --value; }
"#;

/// What happens to the runtime's unit. `systemctl start` returns when it answers, also while systemd waits to start it again.
const RUNTIME: &str = r#"
U=orlop-runtime.service
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

/// A node's configuration, and the API server of it that nobody is: its static pods run all the same.
const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: /etc/kubernetes/manifests
podCIDR: 10.88.0.0/16
evictionHard: { memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1% }
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
";
const KUBECONFIG: &str = "apiVersion: v1
kind: Config
clusters: [{ name: lab, cluster: { server: 'https://127.0.0.1:6443', insecure-skip-tls-verify: true } }]
users: [{ name: node, user: { token: nobody } }]
contexts: [{ name: lab, context: { cluster: lab, user: node } }]
current-context: lab
";
const POD: &str = "apiVersion: v1
kind: Pod
metadata: { name: pod }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - { name: main, image: '127.0.0.1:5000/busybox:1', imagePullPolicy: IfNotPresent, command: [sleep, '100000'] }
";

/// What happens to the units of nodes. The kubelet's has the driver of control groups that kubeadm writes.
const NODES: &str = r#"
busybox ip address add 10.99.0.1/32 dev lo
echo KUBELET_KUBEADM_ARGS=\"--node-ip=10.99.0.1\" > /var/lib/kubelet/kubeadm-flags.env
echo KUBELET_EXTRA_ARGS=\"--cni-conf-dir=/nowhere\" > /etc/default/kubelet
systemctl start orlop-runtime.service && client pull && echo pulled
systemctl stop orlop-runtime.service
echo ORLOP_ARGS=\"--cni-conf-dir=/nowhere --node-ip=10.99.0.1\" > /etc/default/orlop
show() { cat /lab/seen; }
up() { until client look > /lab/seen 2> /dev/null && test -s /lab/seen; do :; done; show; }
gone() { until client look > /lab/seen 2> /dev/null && ! test -s /lab/seen; do :; done; show; }
live() {
    U=$1.service
    cp /lab/pod.yaml /etc/kubernetes/manifests/
    systemctl start $U && echo $1 started
    up
    systemctl show $U -p KillMode -p Delegate -p TasksMax -p OOMScoreAdjust -p Restart
    before=$(main)
    kill -KILL $before
    until test $(main) != $before; do :; done
    systemctl start $U && echo killed; test $(main) != $before && echo another
    up
    systemctl restart $U && echo restarted
    up
    systemctl stop $U; systemctl is-active $U
    systemctl start $U && echo again
    up
    $2
    rm /etc/kubernetes/manifests/pod.yaml
    gone && echo gone
    systemctl stop $U; systemctl is-failed $U
    journalctl --no-pager -n 60 -u $U >&2
}
# Somebody wants to know when the node serves.
wait_for_ready() {
    mkdir /etc/systemd/system/$U.d
    printf '[Service]\nType=notify\nTimeoutStartSec=infinity\n' > /etc/systemd/system/$U.d/ready.conf
    systemctl daemon-reload
    systemctl restart $U && orlop ps > /dev/null && echo ready
    up
}
live orlop-node wait_for_ready
echo cgroupDriver: systemd >> /var/lib/kubelet/config.yaml
live kubelet true
"#;

/// A Debian with the program and its units.
fn lab() -> Lab {
    let lab = Lab::new();
    let put = |from: &Path, to: &str| {
        std::fs::copy(from, lab.inside(to)).unwrap();
        std::fs::set_permissions(lab.inside(to), std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    put(&program(), "/usr/bin/orlop");
    std::os::unix::fs::symlink("orlop", lab.inside("/usr/bin/kubelet")).unwrap();
    put(&testkit::host::find("docker-registry").unwrap(), "/usr/bin/docker-registry");
    put(&testkit::host::find("busybox").unwrap(), "/usr/bin/busybox");
    for (name, unit) in [
        ("orlop-runtime", include_str!("../../../packaging/orlop-runtime.service")),
        ("orlop-node", include_str!("../../../packaging/orlop-node.service")),
        ("kubelet", include_str!("../../../packaging/kubelet.service")),
    ] {
        std::fs::write(lab.inside(&format!("/etc/systemd/system/{name}.service")), unit).unwrap();
    }
    lab
}

/// Runs a script; what it says of a container, and the rest.
fn run(lab: &Lab, script: &str) -> (Vec<String>, Vec<String>) {
    let said = lab.run("units", &format!("{BEGIN}{script}"));
    said.lines().map(str::to_owned).partition(|line| line.starts_with("Container"))
}

fn pods_outlive_their_runtime() {
    let (lives, rest) = run(&lab(), RUNTIME);
    assert_eq!(rest, EXPECTED);
    assert_eq!(lives.len(), 5);
    is_one(&lives);
}

fn pods_outlive_their_nodes() {
    let lab = lab();
    let write = |file: &str, text: &str| {
        std::fs::create_dir_all(lab.inside(file).parent().unwrap()).unwrap();
        std::fs::write(lab.inside(file), text).unwrap();
    };
    write("/var/lib/kubelet/config.yaml", CONFIGURATION);
    write("/etc/kubernetes/kubelet.conf", KUBECONFIG);
    write("/lab/pod.yaml", POD);
    std::fs::create_dir(lab.inside("/etc/kubernetes/manifests")).unwrap();
    let (lives, rest) = run(&lab, NODES);
    let expected = [
        &["pulled"][..],
        &LIFE.map(|line| if line == "started" { "orlop-node started" } else { line }),
        &["ready", "gone", "inactive"],
        &LIFE.map(|line| if line == "started" { "kubelet started" } else { line }),
        &["gone", "inactive"],
    ];
    assert_eq!(rest, expected.concat());
    assert_eq!(lives.len(), 9);
    is_one(&lives[..5]);
    is_one(&lives[5..]);
}

/// It is the same container all the time.
fn is_one(lives: &[String]) {
    assert!(lives[0].starts_with("ContainerRunning ") && lives[0].ends_with(" inside"), "{lives:?}");
    assert!(lives.iter().all(|line| *line == lives[0]), "{lives:?}");
}

const LIFE: [&str; 11] = [
    "started",
    "Restart=always",
    "Delegate=yes",
    "TasksMax=infinity",
    "OOMScoreAdjust=-999",
    "KillMode=process",
    "killed",
    "another",
    "restarted",
    "inactive",
    "again",
];

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
