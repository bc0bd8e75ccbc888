//! An upgrade in place: today's daemon on what a daemon of 0.1.0 has left, with a keeper of 0.1.0 that still runs.
//!
//! What was left is in `testkit/past`, written down by `cargo xtask past`. Its keeper is played by this program: it knows the
//! protocol's first version by heart, as bytes, and none of the code that speaks it today.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "a test program")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};

use cri::{ImageService as _, RuntimeService as _, v1};
use rustix::process::{Pid, Signal, kill_process};

fn main() -> ExitCode {
    let missing = enter_private().err().map(|error| format!("root for private namespaces ({error})"));
    testkit::serial::main(
        &[
            ("what_0_1_0_has_left_is_taken_over", taken_over),
            ("a_keeper_without_a_common_version_is_told", foreign_keeper),
            ("what_a_later_version_has_left_is_left_alone", later_version),
        ],
        missing,
    )
}

/// Namespaces in which a test can leave nothing behind.
fn enter_private() -> Result<(), String> {
    testkit::netns::enter_private().map_err(|error| format!("{error:#}"))?;
    sys::process::leave(sys::process::namespace::MOUNT).map_err(|error| error.to_string())?;
    sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true).map_err(|e| e.to_string())
}

/// A copy of what 0.1.0 has left, as if it had been in this boot.
fn ground() -> tempfile::TempDir {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let past = testkit::past::dir("0.1.0");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let record = past.join("run/network").read_dir().unwrap().next().unwrap().unwrap().path();
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let past_boot = record["boot"].as_str().unwrap();
    for name in ["run", "state"] {
        copy(&past.join(name), &scratch.path().join(name), past_boot.as_bytes(), boot.trim().as_bytes());
    }
    scratch
}

/// Copies a directory; one number of a boot takes the place of another, which is of the same length.
fn copy(from: &Path, to: &Path, before: &[u8], after: &[u8]) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to, before, after);
        } else {
            let mut bytes = std::fs::read(entry.path()).unwrap();
            let found = |(at, window)| (window == before).then_some(at);
            let places: Vec<usize> = bytes.windows(before.len()).enumerate().filter_map(found).collect();
            places.into_iter().for_each(|at| bytes[at..at + before.len()].copy_from_slice(after));
            std::fs::write(to, bytes).unwrap();
        }
    }
}

/// A daemon's process; it ends with the test.
struct Daemon {
    process: Child,
    socket: PathBuf,
}

impl Daemon {
    fn command(scratch: &Path) -> (Command, PathBuf) {
        let socket = scratch.join("cri.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_orlop"));
        command.arg("runtime").arg("--listen").arg(format!("unix://{}", socket.display()));
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--cni-conf-dir", "no-cni")] {
            command.arg(flag).arg(scratch.join(name));
        }
        (command, socket)
    }

    /// Starts it and waits until it serves.
    fn start(scratch: &Path) -> Self {
        let (mut command, socket) = Self::command(scratch);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let daemon = Self { process, socket };
        assert!(line.contains("CRI on"), "{line}");
        daemon
    }

    /// What one says that does not start.
    fn refusal(scratch: &Path) -> String {
        let output = Self::command(scratch).0.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        kill_process(Pid::from_raw(self.process.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
        self.process.wait().unwrap();
    }
}

/// The sandbox whose keeper still runs.
fn living(scratch: &Path) -> PathBuf {
    let sandboxes = scratch.join("run/sandboxes").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let is_named = |path: &PathBuf| {
        let record = std::fs::read(path.join("sandbox")).unwrap();
        record.windows(5).any(|window| window == b"stays")
    };
    let found: Vec<PathBuf> = sandboxes.filter(is_named).collect();
    let [living] = &found[..] else { panic!("{found:?}") };
    living.clone()
}

/// A keeper of 0.1.0, which keeps one container. Its own process and that of the container are `sleeper`.
struct Keeper {
    welcome: Vec<u8>,
    snapshot: Vec<u8>,
    container: Vec<u8>,
    /// What it was asked for, by the number of the kind.
    asked: Arc<Mutex<Vec<u16>>>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Keeper {
    /// From the record that it keeps for the time after it: what it would say of itself.
    fn of(sandbox: &Path, sleeper: u32) -> Self {
        let record = std::fs::read(sandbox.join("keeper.state")).unwrap();
        let mut snapshot = record.strip_prefix(b"orlop-keeper\x01\0").unwrap().to_vec();
        // version u16, sandbox, pid u32, boot id, started u64
        let pid = 2 + 4 + u32_at(&snapshot, 2) as usize;
        let welcome_len = pid + 4 + 4 + u32_at(&snapshot, pid + 4) as usize + 8;
        // reaper (none: a byte), number of containers, and of the first one: id, pid u32, ...
        assert_eq!((snapshot[welcome_len], u32_at(&snapshot, welcome_len + 1)), (0, 1));
        let id = welcome_len + 1 + 4;
        let id_end = id + 4 + u32_at(&snapshot, id) as usize;
        for at in [pid, id_end] {
            snapshot[at..at + 4].copy_from_slice(&sleeper.to_le_bytes());
        }
        let (welcome, container) = (snapshot[..welcome_len].to_vec(), snapshot[id..id_end].to_vec());
        Self { welcome, snapshot, container, asked: Arc::default() }
    }

    /// Answers one daemon until it goes or has the keeper end.
    fn serve(&self, mut socket: UnixStream) {
        let mut header = [0; 12];
        while socket.read_exact(&mut header).is_ok() {
            let mut body = vec![0; u32_at(&header, 0) as usize];
            socket.read_exact(&mut body).unwrap();
            let (kind, number) = (u16::from_le_bytes([header[4], header[5]]), u32_at(&header, 8));
            self.asked.lock().unwrap().push(kind);
            match kind {
                0x01 => {
                    // The oldest and the newest version that the daemon speaks.
                    let (oldest, newest) =
                        (u16::from_le_bytes([body[0], body[1]]), u16::from_le_bytes([body[2], body[3]]));
                    assert!(oldest <= 1 && newest >= 1, "{oldest} to {newest}");
                    reply(&mut socket, 0x101, number, &self.welcome);
                }
                0x02 => reply(&mut socket, 0x102, number, &self.snapshot),
                0x05 => {
                    reply(&mut socket, 0x104, number, &[]);
                    // The daemon asked for SIGKILL: exit code, signal, time.
                    let exit =
                        [&self.container[..], &137_u32.to_le_bytes(), &9_u32.to_le_bytes(), &7_u64.to_le_bytes()];
                    reply(&mut socket, 0x201, 0, &exit.concat());
                }
                0x0a => with_namespace(&socket, number),
                0x0c => {
                    reply(&mut socket, 0x104, number, &[]);
                    return;
                }
                0x0b | 0x07 => reply(&mut socket, 0x104, number, &[]),
                other => panic!("a daemon has no reason to ask for {other:#x}"),
            }
        }
    }
}

/// A keeper's socket. By a descriptor of its directory, whose path may be longer than the 107 bytes of an address.
fn listen_in(sandbox: &Path) -> UnixListener {
    let directory = std::fs::File::open(sandbox).unwrap();
    UnixListener::bind(format!("/proc/self/fd/{}/keeper.sock", directory.as_raw_fd())).unwrap()
}

fn frame(kind: u16, fds: u16, number: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [&length.to_le_bytes()[..], &kind.to_le_bytes(), &fds.to_le_bytes(), &number.to_le_bytes(), body].concat()
}

fn reply(socket: &mut UnixStream, kind: u16, number: u32, body: &[u8]) {
    socket.write_all(&frame(kind, 0, number, body)).unwrap();
}

fn with_namespace(socket: &UnixStream, number: u32) {
    let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
    sys::fdpass::send(socket.as_fd(), &frame(0x104, 1, number, &[]), &[namespace.as_fd()]).unwrap();
}

/// A process that stands for those of the pod.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill(); // The daemon may have ended it with its pod.
        self.0.wait().unwrap();
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

fn taken_over() {
    let scratch = ground();
    let sandbox = living(scratch.path());
    let sleeper = Sleeper::new();
    let keeper = Keeper::of(&sandbox, sleeper.0.id());
    let asked = Arc::clone(&keeper.asked);
    let listener = listen_in(&sandbox);
    let played = std::thread::spawn(move || keeper.serve(listener.accept().unwrap().0));
    let daemon = Daemon::start(scratch.path());
    run(async { inspect(&cri::Client::new(&daemon.socket).unwrap()).await });
    played.join().unwrap();
    let asked = asked.lock().unwrap().clone();
    assert_eq!(asked[..2], [0x01, 0x02], "hello, and what there is");
    assert!(asked.contains(&0x05) && asked.last() == Some(&0x0c), "{asked:x?}");
}

/// What a kubelet sees of it, and does with it.
async fn inspect(client: &cri::Client) {
    let sandboxes = client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().items;
    let named = |name: &str| sandboxes.iter().find(|one| one.metadata.as_ref().unwrap().name == name).unwrap();
    let (stays, bridged, ended) = (named("stays"), named("bridged"), named("ended"));
    assert_eq!(stays.state(), v1::PodSandboxState::SandboxReady);
    assert_eq!(stays.labels["app"], "past");
    for sandbox in [bridged, ended] {
        assert_eq!(sandbox.state(), v1::PodSandboxState::SandboxNotready, "its keeper has ended");
    }
    let containers = client.list_containers(v1::ListContainersRequest::default()).await.unwrap().containers;
    assert_eq!(containers.len(), 3);
    let container =
        |sandbox: &v1::PodSandbox| containers.iter().find(|one| one.pod_sandbox_id == sandbox.id).unwrap().id.clone();
    let status = async |container_id: String| {
        let request = v1::ContainerStatusRequest { container_id, verbose: false };
        client.container_status(request).await.unwrap().status.unwrap()
    };
    let over = status(container(ended)).await;
    assert_eq!((over.state(), over.exit_code, over.reason.as_str()), (v1::ContainerState::ContainerExited, 7, "Error"));
    let unseen = status(container(bridged)).await;
    assert_eq!((unseen.state(), unseen.exit_code), (v1::ContainerState::ContainerExited, 137));
    let main = container(stays);
    let running = status(main.clone()).await;
    assert_eq!(running.state(), v1::ContainerState::ContainerRunning);
    assert!(running.started_at > 0 && running.image_ref.contains("busybox"), "{running:?}");
    let images = client.list_images(v1::ListImagesRequest::default()).await.unwrap().images;
    assert!(images.iter().any(|image| image.repo_tags == ["docker.io/library/busybox:latest"]), "{images:?}");

    client.stop_container(v1::StopContainerRequest { container_id: main.clone(), timeout: 0 }).await.unwrap();
    assert_eq!(status(main).await.exit_code, 137);
    for sandbox in [stays, bridged, ended] {
        let pod_sandbox_id = sandbox.id.clone();
        client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await.unwrap();
        client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
    }
}

/// A keeper that speaks other versions alone: its pod lives, so no daemon may take it for ended and begin it again.
fn foreign_keeper() {
    let scratch = ground();
    // As if its version wrote another number.
    let formats = ["state", "run"].map(|dir| scratch.path().join(dir).join("format"));
    formats.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    let listener = listen_in(&living(scratch.path()));
    let played = std::thread::spawn(move || {
        let mut socket = listener.accept().unwrap().0;
        let mut header = [0; 12];
        socket.read_exact(&mut header).unwrap();
        // Reason 1, no step, no error number, and the text.
        let detail = b"this keeper speaks versions 7 to 9";
        let length = u32::try_from(detail.len()).unwrap();
        let body = [&[1, 0, 0, 0, 0][..], &0_i32.to_le_bytes(), &length.to_le_bytes(), detail].concat();
        reply(&mut socket, 0x1ff, u32_at(&header, 8), &body);
        socket.read_to_end(&mut Vec::new()).unwrap();
    });
    let refusal = Daemon::refusal(scratch.path());
    played.join().unwrap();
    for words in ["pod default/stays runs", "versions 7 to 9", "Start that version again", "drain the node"] {
        assert!(refusal.to_lowercase().contains(&words.to_lowercase()), "{words}: {refusal}");
    }
    assert!(living(scratch.path()).join("sandbox").exists(), "its records are there");
    assert!(!formats.iter().any(|file| file.exists()), "what could not be taken over is as its version knows it");
}

fn later_version() {
    for dir in ["state", "run"] {
        let scratch = ground();
        std::fs::write(scratch.path().join(dir).join("format"), "1000\norlop 99.0.0\n").unwrap();
        let refusal = Daemon::refusal(scratch.path());
        for words in ["format 1000", "start orlop 99.0.0 again"] {
            assert!(refusal.contains(words), "{words}: {refusal}");
        }
        assert!(living(scratch.path()).join("sandbox").exists(), "its records are there");
    }
}
