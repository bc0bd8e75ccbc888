//! Plugins of the Node Resource Interface: one that the runtime starts, one that connects, both made with the published library.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use cri::{Error, RuntimeService as _, v1};
use testkit::serial::Test;

use crate::fixture::{Ground, Node, run, script_config, zygote};

pub(crate) const TESTS: &[Test] = &[("nri_plugins_see_and_adjust_pods", nri_plugins_see_and_adjust_pods)];

/// Where two plugins are, and what they write down.
struct Harbour {
    place: tempfile::TempDir,
    program: PathBuf,
}

/// A plugin that has connected by itself.
struct External(Child);

impl Drop for External {
    fn drop(&mut self) {
        let _ = self.0.kill(); // It may have ended.
        self.0.wait().unwrap();
    }
}

impl Harbour {
    fn new() -> Option<Self> {
        let program = testkit::go::build(&testkit::go::NRI_PLUGIN).ok()?;
        let place = tempfile::tempdir_in("/dev/shm").unwrap();
        for directory in ["plugins", "conf", "source"] {
            std::fs::create_dir(place.path().join(directory)).unwrap();
        }
        std::fs::write(place.path().join("source/file"), "brought\n").unwrap();
        symlink(&program, place.path().join("plugins/10-installed")).unwrap();
        for name in ["installed", "external"] {
            std::fs::write(place.path().join(format!("conf/{name}.conf")), place.path().join(name).to_str().unwrap())
                .unwrap();
        }
        Some(Self { place, program })
    }

    fn config(&self) -> nri::Config {
        nri::Config {
            socket: Some(self.place.path().join("nri.sock")),
            plugin_dir: self.place.path().join("plugins"),
            plugin_config_dir: self.place.path().join("conf"),
            registration_timeout: Duration::from_secs(60),
            ..nri::Config::default()
        }
    }

    #[allow(clippy::disallowed_methods, reason = "a test starts the plugin")]
    fn connect(&self) -> External {
        let mut command = Command::new(&self.program);
        command.arg("-socket").arg(self.place.path().join("nri.sock")).args(["-index", "20"]);
        External(command.env("NRI_PLUGIN_NAME", "external").spawn().unwrap())
    }

    fn lines(&self, plugin: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.place.path().join(plugin)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until a plugin has written a line: it does so in its own time.
    async fn says(&self, plugin: &str, line: &str) {
        let begun = Instant::now();
        while !self.lines(plugin).iter().any(|one| one == line) {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{plugin} does not say {line:?}: {:?}",
                self.lines(plugin)
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn sandbox(
    node: &Node,
    name: &str,
    annotations: &[(&str, &str)],
) -> Result<(v1::PodSandboxConfig, String), Error> {
    let mut config = node.sandbox_config(name);
    config.annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let sandbox = node.run_sandbox(&config).await?;
    Ok((config, sandbox))
}

/// Parts of the configuration that a container has in the end, by a JSON pointer.
async fn configured(node: &Node, container: &str, pointer: &str) -> serde_json::Value {
    let request = v1::ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
    let info = node.runtime.container_status(request).await.unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    info["runtimeSpec"].pointer(pointer).cloned().unwrap_or_default()
}

/// What the kernel has: shares of version 1, or the weight that version 2 has for them.
async fn shares(node: &Node, container: &str) -> u64 {
    let request = v1::ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
    let info = node.runtime.container_status(request).await.unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    let group = sys::cgroup::Hierarchy::detect().unwrap().group(info["cgroup"].as_str().unwrap());
    let files = group.directories().into_iter().flat_map(|dir| [dir.join("cpu.shares"), dir.join("cpu.weight")]);
    files.filter_map(|file| std::fs::read_to_string(file).ok()).next().unwrap().trim().parse().unwrap()
}

fn nri_plugins_see_and_adjust_pods() {
    let Some(harbour) = Harbour::new() else {
        println!("skipped: needs Go for a plugin");
        return;
    };
    let ground = Ground::new();
    let zygote = zygote();
    run(async {
        let network = network::Config::new(ground.places.run.join("network"));
        let config = harbour.config();
        let node = Node::start_with(network, &ground.places, zygote, |own| own.nri = Some(config)).await;
        assert_eq!(node.runtime.plugins(), ["10-installed"]);
        assert_eq!(harbour.lines("installed"), ["configured by orlop, version: true", "synchronized 0 0"]);
        adjusts(&node, &harbour).await;
        let _external = joins(&node, &harbour).await;
        updates(&node, &harbour).await;
        refuses(&node).await;
        too_large(&node, "large", &["10-installed", "20-external"]).await;
        is_let_go(&node, &harbour).await;
        node.down().await;
    });
}

async fn adjusts(node: &Node, harbour: &Harbour) {
    let source = harbour.place.path().join("source");
    let annotations = [("adjust", "installed"), ("source", source.to_str().unwrap())];
    let (config, pod) = sandbox(node, "adjusted", &annotations).await.unwrap();
    let script = "echo $FROM_PLUGIN ${UNWANTED-gone}; cat /from-plugin/file; touch /from-plugin/x 2>&1 | grep -c Read-only; \
                  ulimit -n; head -c 3 /dev/from-plugin | wc -c";
    let mut request = script_config("main", script);
    request.envs.push(v1::KeyValue { key: "UNWANTED".to_owned(), value: b"there".to_vec() });
    // More than a plugin reads at once.
    request.envs.push(v1::KeyValue { key: "LONG".to_owned(), value: vec![b'x'; 40 << 10] });
    let container = node.create(&pod, &config, request).await.unwrap();
    assert_eq!(configured(node, &container, "/linux/resources/cpu/shares").await, 512);
    assert_eq!(configured(node, &container, "/linux/resources/memory/limit").await, 77 << 20);
    assert_eq!(configured(node, &container, "/annotations/by").await, "installed");
    node.start_container(&container).await.unwrap();
    node.exited(&container).await;
    let expected = ["installed gone", "brought", "1", "123", "3"].map(|line| format!("stdout F {line}"));
    assert_eq!(node.log("adjusted"), expected);
    let state = std::fs::read_to_string(source.join("hooked")).unwrap();
    assert!(state.contains(&container), "{state}");
    node.remove_container(&container).await.unwrap();
    node.stop_sandbox(&pod).await.unwrap();
    node.remove_sandbox(&pod).await.unwrap();
    let told = [
        "run pod adjusted 1",
        "create adjusted/main",
        "created adjusted/main by installed",
        "start adjusted/main",
        "started adjusted/main true",
        "stop adjusted/main",
        "remove adjusted/main",
        "stop pod adjusted",
        "remove pod adjusted",
    ];
    assert_eq!(harbour.lines("installed")[2..], told);
}

/// A second plugin is told of what there is, and the two may not want the same.
async fn joins(node: &Node, harbour: &Harbour) -> External {
    let pod = node.pod("before", "sleep 1000").await;
    let external = harbour.connect();
    harbour.says("external", "synchronized 1 1").await;
    assert_eq!(node.runtime.plugins(), ["10-installed", "20-external"]);
    let (config, both) = sandbox(node, "both", &[("adjust", "all"), ("source", "/")]).await.unwrap();
    let error = node.create(&both, &config, script_config("main", "true")).await.unwrap_err().to_string();
    assert!(error.contains("10-installed and 20-external both set"), "{error}");
    node.remove_sandbox(&both).await.unwrap();
    node.stop_container(&pod.container, 0).await.unwrap();
    harbour.says("external", "stop before/main").await;
    node.remove_sandbox(&pod.sandbox).await.unwrap();
    harbour.says("external", "remove pod before").await;
    external
}

async fn updates(node: &Node, harbour: &Harbour) {
    let (config, pod) = sandbox(node, "updated", &[("later", "external")]).await.unwrap();
    let container = node.create(&pod, &config, script_config("main", "sleep 1000")).await.unwrap();
    node.start_container(&container).await.unwrap();
    harbour.says("external", "unsolicited 0 <nil>").await;
    let unsolicited = shares(node, &container).await;
    let linux = Some(v1::LinuxContainerResources { cpu_shares: 4000, ..Default::default() });
    let request = v1::UpdateContainerResourcesRequest { container_id: container.clone(), linux, ..Default::default() };
    node.runtime.update_container_resources(request).await.unwrap();
    let updated = shares(node, &container).await;
    if !sys::cgroup::Hierarchy::detect().unwrap().is_unified() {
        assert_eq!((unsolicited, updated), (555, 777));
    }
    assert!(unsolicited < updated, "{unsolicited} {updated}");
    // The second sees what the first wants.
    harbour.says("external", "update updated/main 777").await;
    harbour.says("installed", "updated updated/main").await;
    node.remove_sandbox(&pod).await.unwrap();
}

async fn refuses(node: &Node) {
    let error = sandbox(node, "refused", &[("refuse", "pod")]).await.unwrap_err().to_string();
    assert!(error.contains("NRI plugin 10-installed: no room on deck"), "{error}");
    let (config, pod) = sandbox(node, "half", &[("refuse", "container")]).await.unwrap();
    let error = node.create(&pod, &config, script_config("main", "true")).await.unwrap_err().to_string();
    assert!(error.contains("NRI plugin 10-installed: not this one"), "{error}");
    node.remove_sandbox(&pod).await.unwrap();
}

/// What no message has room for is not made, and no plugin goes for it.
async fn too_large(node: &Node, name: &str, plugins: &[&str]) {
    let (config, pod) = sandbox(node, name, &[]).await.unwrap();
    for count in [32, 48] {
        let mut request = script_config("main", "true");
        let value = |number: usize| v1::KeyValue { key: format!("LONG{number}"), value: vec![b'x'; 100 << 10] };
        request.envs = (0..count).map(value).collect();
        let error = node.create(&pod, &config, request).await.unwrap_err().to_string();
        assert!(error.contains("NRI plugins can be told"), "{error}");
        assert_eq!(node.runtime.plugins(), plugins);
    }
    node.remove_sandbox(&pod).await.unwrap();
}

/// One that hangs, and one that dies: pods go on.
async fn is_let_go(node: &Node, harbour: &Harbour) {
    let (config, pod) = sandbox(node, "patient", &[("hang", "external")]).await.unwrap();
    let container = node.create(&pod, &config, script_config("main", "exit 4")).await.unwrap();
    assert_eq!(harbour.lines("external").last().map(String::as_str), Some("create patient/main"));
    assert_eq!(node.runtime.plugins(), ["10-installed"]);
    let pid = sys::rustix::process::Pid::from_raw(launched().unwrap()).unwrap();
    sys::rustix::process::kill_process(pid, sys::rustix::process::Signal::KILL).unwrap();
    let begun = Instant::now();
    while !node.runtime.plugins().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "a killed plugin still takes part");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    too_large(node, "unseen", &[]).await;
    node.start_container(&container).await.unwrap();
    assert_eq!(node.exited(&container).await.exit_code, 4);
    node.remove_sandbox(&pod).await.unwrap();
}

/// The process of the plugin that this one's runtime has started.
fn launched() -> Option<i32> {
    let own = std::process::id().to_string();
    let is_it = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        parent == Some(&own) && environment.split(|byte| *byte == 0).any(|one| one == b"NRI_PLUGIN_NAME=installed")
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_it)
}
