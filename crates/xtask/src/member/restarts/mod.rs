//! The restart list: what Kubernetes' pages say of a kubelet that is restarted, as moments in which the daemon is killed.
//!
//! Every moment has a pod of its own and a gate that holds it there: a file that a script waits for, a registry, a driver or
//! a plugin that does not answer. All are reached, then the daemon is killed, twice, and what had not ended is as it was.
//! Then one gate after the other opens, and each pod comes to what it would have come to without that.
//!
//! ```text
//! reach every moment ─► kill -9 ─► meanwhile ─► start ─► unmoved? ─► kill -9 ─► start ─► unmoved? ─► let go, one by one
//! ```

mod rows;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use testkit::bad_network::{Answer, Proxy};
use testkit::control_plane::{self, Part};
use testkit::csi::{Ability, Driver, DriverConfig};
use testkit::image::Builder;
use testkit::{go, registry};

use super::points::{condition, name};
use super::{Fleet, NODE, SOON, Setting};
use crate::voyage::wait;
use rows::{ROWS, Row};

/// A host that stands for the registry that does not answer.
const SLOW_REGISTRY: &str = "slow.example";
/// The driver of the volume that is not mounted yet.
const DRIVER: &str = "hull.csi.example";
/// Logs are rotated at this size, so that a pod can fill several while nobody looks.
const CONFIGURATION: &str = "containerLogMaxSize: 64Ki\ncontainerLogMaxFiles: 20\n";
/// The operator's network, whose plugin waits before it attaches one pod.
const NETWORK: &str = r#"{ "cniVersion": "1.0.0", "name": "sea", "plugins": [{ "type": "gate", "bridge": "cni0", "isGateway": true,
  "ipam": { "type": "host-local", "dataDir": "IPAM", "ranges": [[{ "subnet": "10.88.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } }] }"#;
/// That plugin: the reference's bridge behind a gate, and a book of who is attached that it keeps itself.
const PLUGIN: &str = r#"#!/bin/sh
input=$(cat)
case "$CNI_COMMAND $CNI_ARGS" in
ADD*K8S_POD_NAME=berth*)
    echo >> GATES/berth.reached
    while [ -d GATES ] && [ ! -e GATES/berth ]; do sleep 0.05; done;;
esac
case "$CNI_COMMAND" in
ADD) : > "BOOK/$CNI_CONTAINERID";;
DEL) rm -f "BOOK/$CNI_CONTAINERID";;
esac
printf %s "$input" | BRIDGE
"#;

/// Everything that holds the moments.
struct Scene {
    fleet: Fleet,
    /// The directory of the gates and of what pods note; theirs, too.
    gates: PathBuf,
    /// Who is attached, by the plugin's own book.
    book: PathBuf,
    /// What the registry was asked, and when it hangs.
    proxy: Proxy,
    is_hung: Receiver<()>,
    /// The digests of the image that is pulled: a small layer, a large one.
    layers: [String; 2],
    driver: Driver,
    /// The Node as it was before anything happened.
    node: Value,
}

/// Runs all rows. Returns how many there are.
///
/// # Errors
/// Some failed; they are printed, with what helps to understand it printed before.
pub(crate) fn run(orlop: &Path) -> anyhow::Result<usize> {
    let programs = control_plane::build()?;
    let plugins = [go::build(&go::BRIDGE)?, go::build(&go::HOST_LOCAL)?];
    let mut scene = Scene::start(orlop, &programs, &plugins)?;
    match scene.play() {
        Ok(()) => Ok(ROWS.len() + 1),
        Err(error) => {
            println!("FAIL restarts: {error:#}");
            scene.fleet.report();
            bail!("the restart list failed");
        }
    }
}

impl Scene {
    fn start(orlop: &Path, programs: &Path, plugins: &[PathBuf; 2]) -> anyhow::Result<Self> {
        let stage = crate::demo::Stage::set_up(orlop, false)?;
        let dir = stage.dir.path().to_owned();
        let [gates, book, cni, ipam] = ["gates", "book", "cni", "ipam"].map(|name| dir.join(name));
        for made in [&gates, &book, &cni] {
            std::fs::create_dir(made)?;
        }
        let paths = [("GATES", &gates), ("BOOK", &book), ("BRIDGE", &plugins[0]), ("IPAM", &ipam)];
        let fill = |text: &str| {
            paths.iter().fold(text.to_owned(), |text, (word, path)| text.replace(word, &path.display().to_string()))
        };
        std::fs::write(cni.join("sea.conflist"), fill(NETWORK))?;
        std::fs::write(cni.join("gate"), fill(PLUGIN))?;
        std::fs::set_permissions(cni.join("gate"), std::fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::symlink(&plugins[1], cni.join("host-local"))?;
        let layers = slow_image(&stage)?;
        let (hangs, is_hung) = std::sync::mpsc::channel();
        let (gate, large) = (gates.join("pulled"), layers[1].clone());
        let proxy = Proxy::start(stage.registry_address(), move |request| {
            let is_held = request.method == "GET" && request.path.contains(&large) && !gate.exists();
            if is_held { Answer::Hang(1 << 20, hangs.clone()) } else { Answer::Forward }
        });
        registry::write_hosts(&dir.join("certs.d"), SLOW_REGISTRY, proxy.address())?;
        let config = DriverConfig {
            name: DRIVER.to_owned(),
            node_id: "deck-1".to_owned(),
            volumes: dir.join("hull"),
            abilities: vec![Ability::StageUnstageVolume],
            topology: [].into(),
            volumes_max: 0,
        };
        let flag = |name: &str| format!("--{name}={}", cni.display());
        let flags = vec![flag("cni-conf-dir"), flag("cni-bin-dir")];
        let setting = Setting { flags, configuration: CONFIGURATION.to_owned(), ..Setting::default() };
        let fleet = Fleet::start(stage, programs, setting)?;
        let driver = Driver::start(config, &dir.join("state/kubelet"))?;
        driver.hang(Some("NodePublishVolume"));
        Ok(Self { fleet, gates, book, proxy, is_hung, layers, driver, node: Value::Null })
    }

    fn play(&mut self) -> anyhow::Result<()> {
        self.node = wait("the node is Ready", SOON, || {
            let node = self.fleet.get(&format!("node {NODE}"))?;
            Ok((condition(&node, "Ready") == Some("True")).then_some(node))
        })?;
        let begin = Instant::now();
        self.each("reach", |scene, row| (row.reach)(scene))?;
        println!("     all moments are reached ({:.1} s)", begin.elapsed().as_secs_f64());
        // No pod that wants it would be admitted any more.
        self.fleet.kubectl(&format!("label node {NODE} deck-"))?;
        let before = self.seen()?;
        self.lose_a_status()?;
        for kill in ["first", "second"] {
            self.kill()?;
            if kill == "first" {
                self.fleet.plane.resume(Part::ApiServer)?;
                self.each("meanwhile", |scene, row| row.meanwhile.map_or(Ok(()), |meanwhile| meanwhile(scene)))?;
            }
            self.fleet.start_again()?;
            self.unmoved(&before).with_context(|| format!("after the {kill} kill"))?;
        }
        println!("     killed twice, nothing has moved ({:.1} s)", begin.elapsed().as_secs_f64());
        let mut failed = 0;
        for (number, row) in (1..).zip(ROWS) {
            let begin = Instant::now();
            match (row.let_go)(self) {
                Ok(note) => println!("ok   {number}. {} ({:.1} s): {note}", row.title, begin.elapsed().as_secs_f64()),
                Err(error) => {
                    println!("FAIL {number}. {}: {error:#}", row.title);
                    failed += 1;
                }
            }
        }
        ensure!(failed == 0, "{failed} rows failed");
        let note = self.leaves()?;
        println!("ok   nothing is left: {note} ({:.1} s in all)", begin.elapsed().as_secs_f64());
        Ok(())
    }

    fn each(&mut self, what: &str, mut work: impl FnMut(&mut Self, &Row) -> anyhow::Result<()>) -> anyhow::Result<()> {
        ROWS.iter().try_for_each(|row| work(self, row).with_context(|| format!("{what}: {}", row.title)))
    }

    /// The last thing that happens before the daemon dies: a container ends, and the API server cannot be told.
    fn lose_a_status(&mut self) -> anyhow::Result<()> {
        self.fleet.plane.pause(Part::ApiServer)?;
        self.open("last-words")?;
        wait("the daemon knows that the pod has ended", SOON, || {
            let shown: Value = serde_json::from_str(&self.fleet.orlop(&["ps", "last-words", "-o", "json"])?)?;
            let pod = if shown.is_array() { &shown[0] } else { &shown };
            Ok((pod["status"]["phase"] == "Succeeded").then_some(()))
        })
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        self.fleet.node.kill()?;
        self.fleet.node.wait()?;
        ensure!(self.fleet.orlop(&["ps"]).is_err(), "somebody answers for a daemon that is dead");
        Ok(())
    }

    /// The new daemon is at work, and all that is held is as it was.
    fn unmoved(&self, before: &BTreeMap<String, Value>) -> anyhow::Result<()> {
        let (probes, leases) = (self.lines("steady.probes"), self.lease()?);
        wait("the new daemon answers", SOON, || self.fleet.orlop(&["ps"]).map(Some))?;
        wait("it renews the lease", SOON, || Ok((self.lease()? != leases).then_some(())))?;
        wait("it probes", SOON, || Ok((self.lines("steady.probes") > probes + 2).then_some(())))?;
        let after = self.seen()?;
        let moved = before.iter().filter_map(|(pod, before)| {
            let after = after.get(pod).unwrap_or(&Value::Null);
            (before != after).then(|| format!("pod {pod} has moved: {before}\n  became {after}"))
        });
        let moved: Vec<String> = moved.collect();
        ensure!(moved.is_empty(), "{}", moved.join("\n"));
        ensure!(
            ready_since(&self.fleet.get(&format!("node {NODE}"))?) == ready_since(&self.node),
            "the node was not Ready"
        );
        Ok(())
    }

    fn lease(&self) -> anyhow::Result<Value> {
        Ok(self.fleet.get(&format!("lease {NODE} -n kube-node-lease"))?["spec"]["renewTime"].clone())
    }

    /// What is known of each pod that is held, by its name.
    fn seen(&self) -> anyhow::Result<BTreeMap<String, Value>> {
        let pods = self.fleet.get("pods")?;
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        let is_held = |pod: &Value| !rows::MOVE.contains(&name(pod));
        Ok(pods.iter().filter(|pod| is_held(pod)).map(|pod| (name(pod).to_owned(), look(pod))).collect())
    }

    fn pod(&self, pod: &str) -> anyhow::Result<Value> {
        self.fleet.get(&format!("pod {pod}"))
    }

    /// Waits until a pod is as `holds` wants it.
    fn until(&self, pod: &str, what: &str, holds: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        wait(&format!("pod {pod}: {what}"), SOON, || Ok(Some(self.pod(pod)?).filter(|pod| holds(pod))))
    }

    fn until_ready(&self, pod: &str) -> anyhow::Result<Value> {
        self.until(pod, "is Ready", |pod| condition(pod, "Ready") == Some("True"))
    }

    fn until_gone(&self, pod: &str) -> anyhow::Result<()> {
        wait(&format!("pod {pod} is gone"), SOON, || {
            let found = self.fleet.kubectl(&format!("get pod {pod} --ignore-not-found -o name"))?;
            Ok(found.is_empty().then_some(()))
        })
    }

    /// Opens a gate.
    fn open(&self, gate: &str) -> anyhow::Result<()> {
        std::fs::write(self.gates.join(gate), "").with_context(|| format!("open gate {gate}"))
    }

    /// How many lines somebody has noted there.
    fn lines(&self, file: &str) -> usize {
        std::fs::read_to_string(self.gates.join(file)).map_or(0, |text| text.lines().count())
    }

    fn until_noted(&self, file: &str) -> anyhow::Result<()> {
        wait(&format!("{file} is noted"), SOON, || Ok((self.lines(file) > 0).then_some(())))
    }

    /// Applies objects.
    fn apply(&self, name: &str, objects: &[Value]) -> anyhow::Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        self.fleet.apply(&format!("{name}.json"), &list.to_string())
    }

    /// A pod with one container that runs a script; `container` and `spec` have what is special.
    fn want(&self, name: &str, script: &str, container: Value, spec: Value) -> anyhow::Result<()> {
        self.apply(name, &[self.manifest(name, script, container, spec)])
    }

    fn manifest(&self, name: &str, script: &str, container: Value, spec: Value) -> Value {
        let own = json!({ "name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script],
            "volumeMounts": [{ "name": "gates", "mountPath": "/g" }] });
        let gates = json!({ "name": "gates", "hostPath": { "path": self.gates } });
        let all = json!({ "terminationGracePeriodSeconds": 1, "nodeSelector": { "deck": "lower" }, "volumes": [gates],
            "containers": [merged(own, container)] });
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": "restarts" } },
            "spec": merged(all, spec) })
    }

    fn leaves(&mut self) -> anyhow::Result<String> {
        self.started_once()?;
        std::fs::remove_dir_all(super::static_pods(&self.fleet.stage))?;
        self.fleet.kubectl("delete pod,pvc,pv,csidriver --all --wait=true")?;
        wait("all pods are gone", SOON, || {
            let pods = self.fleet.get("pods -A")?;
            Ok(pods["items"].as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        ensure!(
            ready_since(&self.fleet.get(&format!("node {NODE}"))?) == ready_since(&self.node),
            "the node was not Ready"
        );
        let left = self.fleet.orlop(&["fsck"])?;
        ensure!(left.is_empty(), "fsck: {left}");
        self.fleet.stop_node()?;
        let dir = self.fleet.stage.dir.path();
        let addresses = names(&dir.join("ipam/sea"))?.into_iter().filter(|name| name.starts_with("10."));
        let links = String::from_utf8(testkit::host::output(std::process::Command::new("ip").args(["-o", "link"]))?)?;
        let veths = links.lines().filter(|line| line.contains("veth")).map(str::to_owned);
        let mut left: Vec<String> = addresses.chain(veths).chain(names(&self.book)?).collect();
        for place in ["state/cni", "run/network/netns", "run/sandboxes", "state/kubelet/pods"] {
            left.extend(names(&dir.join(place))?.into_iter().map(|name| format!("{place}/{name}")));
        }
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        Ok("no sandbox, namespace, interface, address or volume; fsck prints nothing".to_owned())
    }

    /// No container was started more often than it had to be, so far as events tell.
    fn started_once(&self) -> anyhow::Result<()> {
        let events = self.fleet.get("events")?;
        let mut starts: BTreeMap<(String, String), i64> = BTreeMap::new();
        for event in events["items"].as_array().into_iter().flatten().filter(|event| event["reason"] == "Started") {
            let about = &event["involvedObject"];
            let key = [&about["name"], &about["fieldPath"]].map(|text| text.as_str().unwrap_or_default().to_owned());
            *starts.entry(key.into()).or_default() += event["count"].as_i64().unwrap_or(1);
        }
        ensure!(!starts.is_empty(), "no start was told of");
        let often: Vec<_> = starts.iter().filter(|((pod, _), count)| **count > 1 && pod != rows::RESTARTED).collect();
        ensure!(often.is_empty(), "started more than once: {often:?}");
        Ok(())
    }
}

/// Puts an image with two layers into the registry, one of which takes its time. Returns their digests.
fn slow_image(stage: &crate::demo::Stage) -> anyhow::Result<[String; 2]> {
    let mut builder = Builder::new(stage.dir.path().join("slow"))?;
    testkit::image::busybox_layer(&mut builder)?;
    for (name, bytes) in [("small", 1 << 10), ("large", 3 << 20)] {
        let content = noise(bytes);
        builder.layer(|tar| {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            Ok(tar.append_data(&mut header, name, content.as_slice())?)
        })?;
    }
    let layout = builder.finish(json!({ "Cmd": ["sh"], "Env": ["PATH=/bin"] }))?;
    stage.push(&layout, "slow")?;
    let manifest: Value = serde_json::from_slice(&layout.manifest()?.bytes)?;
    let digest = |place: usize| manifest["layers"][place]["digest"].as_str().map(str::to_owned).context("a layer");
    Ok([digest(1)?, digest(2)?])
}

/// Bytes that do not compress.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..count / 8).flat_map(|_| next()).collect()
}

/// What must not change while a pod is held: its address, its conditions and since when, its containers and their states.
fn look(pod: &Value) -> Value {
    let status = &pod["status"];
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let conditions: Vec<_> =
        conditions.map(|one| json!([one["type"], one["status"], one["lastTransitionTime"]])).collect();
    let runs = [&status["initContainerStatuses"], &status["containerStatuses"]];
    let runs = runs.into_iter().filter_map(Value::as_array).flatten();
    let state = |run: &Value| run["state"].as_object().and_then(|state| state.keys().next().cloned());
    let runs = runs.map(|one| {
        json!([one["name"], one["containerID"], one["restartCount"], one["started"], one["ready"], state(one)])
    });
    json!({ "uid": pod["metadata"]["uid"], "ip": status["podIP"], "phase": status["phase"], "conditions": conditions,
        "containers": runs.collect::<Vec<_>>() })
}

fn ready_since(object: &Value) -> Option<Value> {
    let conditions = object["status"]["conditions"].as_array()?;
    Some(conditions.iter().find(|one| one["type"] == "Ready")?["lastTransitionTime"].clone())
}

/// The fields of `more` in the place of those of `object`; lists of volumes and mounts are joined.
fn merged(mut object: Value, more: Value) -> Value {
    let (Value::Object(fields), Value::Object(more)) = (&mut object, more) else { return object };
    for (field, value) in more {
        match (fields.get_mut(&field), value) {
            (Some(Value::Array(known)), Value::Array(value)) => known.extend(value),
            (_, value) => drop(fields.insert(field, value)),
        }
    }
    object
}

/// The names in a directory, which need not be there.
fn names(dir: &Path) -> anyhow::Result<Vec<String>> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
    }
}
