//! The rows of the restart list.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::pace;

use super::{DRIVER, SLOW_REGISTRY, Scene, condition};
use crate::member::{NODE, SOON, manifests, static_pods};
use crate::voyage::wait;

/// A moment in which the daemon is killed.
pub(super) struct Row {
    /// What is under way then, or has happened before.
    pub(super) title: &'static str,
    /// Comes to the moment, which lasts until it is let go.
    pub(super) reach: fn(&mut Scene) -> anyhow::Result<()>,
    /// What happens while there is no daemon.
    pub(super) meanwhile: Option<fn(&mut Scene) -> anyhow::Result<()>>,
    /// Lets it go on, and checks what it comes to.
    pub(super) let_go: fn(&mut Scene) -> anyhow::Result<String>,
}

/// Pods that go on while there is no daemon: the next one has something to tell of them.
pub(super) const MOVE: [&str; 3] = [RESTARTED, "away-once", "last-words"];
/// The one that has to be restarted.
pub(super) const RESTARTED: &str = "away";

pub(super) const ROWS: &[Row] = &[
    row("readiness, liveness and startup", probes, probed),
    row("a startup probe that has not succeeded yet", boots, booted),
    Row { meanwhile: Some(half_a_write), ..row("a ConfigMap half written", settings, edited) },
    row("a static pod and its mirror", ballast, still_ballast),
    row("a pull", pulls, pulled),
    row("an init container", inits, initialized),
    row("CNI ADD", attaches, attached),
    row("a CSI volume half mounted", mounts, mounted),
    row("postStart", greets, greeted),
    row("preStop", bids_farewell, bade_farewell),
    row("a graceful deletion", ends, ended),
    Row { meanwhile: Some(say_much), ..row("log rotation", chats, chatted) },
    Row { meanwhile: Some(end_meanwhile), ..row("exits while the daemon is away", will_end, ended_meanwhile) },
    row("a status that was not written", speaks, last_words),
];

const fn row(
    title: &'static str,
    reach: fn(&mut Scene) -> anyhow::Result<()>,
    let_go: fn(&mut Scene) -> anyhow::Result<String>,
) -> Row {
    Row { title, reach, meanwhile: None, let_go }
}

/// What a script does until a gate opens.
fn until(gate: &str) -> String {
    format!("until [ -e /g/{gate} ]; do usleep 20000; done")
}

/// A probe or hook that runs a script.
fn exec(script: &str) -> Value {
    json!({ "exec": { "command": ["sh", "-c", script] } })
}

fn probe(script: &str) -> Value {
    super::merged(exec(script), json!({ "periodSeconds": 1, "timeoutSeconds": 20, "failureThreshold": 1000 }))
}

const IDLE: &str = "trap exit TERM; sleep 100000 & wait";

fn container(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]
}

fn is_running(pod: &Value) -> bool {
    container(pod)["state"]["running"].is_object()
}

/// That the container is the first of its kind.
fn is_first(pod: &Value) -> anyhow::Result<()> {
    ensure!(container(pod)["restartCount"] == 0, "it was restarted: {}", container(pod));
    Ok(())
}

fn probes(scene: &mut Scene) -> anyhow::Result<()> {
    let (liveness, startup) = (probe("exit 0"), probe("echo once >> /g/steady.startups"));
    let readiness = probe("echo once >> /g/steady.probes");
    let all = json!({ "readinessProbe": readiness, "livenessProbe": liveness, "startupProbe": startup });
    scene.want("steady", IDLE, all, json!({}))?;
    scene.want("unready", IDLE, json!({ "readinessProbe": probe("exit 1") }), json!({}))?;
    scene.until_ready("steady")?;
    scene.until("unready", "is known not to be ready", |pod| {
        is_running(pod) && condition(pod, "Ready") == Some("False")
    })?;
    Ok(())
}

fn probed(scene: &mut Scene) -> anyhow::Result<String> {
    let startups = scene.lines("steady.startups");
    ensure!(startups == 1, "the startup probe has run {startups} times");
    is_first(&scene.pod("steady")?)?;
    is_first(&scene.pod("unready")?)?;
    Ok("the ready pod was Ready all the time, the unready one never; what had started stays so".to_owned())
}

fn boots(scene: &mut Scene) -> anyhow::Result<()> {
    scene.want("booting", IDLE, json!({ "startupProbe": probe("[ -e /g/booting ]") }), json!({}))?;
    scene.until("booting", "runs and has not started", |pod| is_running(pod) && container(pod)["started"] == false)?;
    Ok(())
}

fn booted(scene: &mut Scene) -> anyhow::Result<String> {
    scene.open("booting")?;
    is_first(&scene.until_ready("booting")?)?;
    Ok("it waited on, and is Ready now".to_owned())
}

fn settings(scene: &mut Scene) -> anyhow::Result<()> {
    let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "orders" }, "data": { "course": "north" } });
    let mount = json!({ "volumeMounts": [{ "name": "orders", "mountPath": "/orders" }] });
    let volume = json!({ "volumes": [{ "name": "orders", "configMap": { "name": "orders" } }] });
    scene.apply("orders", &[map, scene.manifest("helmsman", IDLE, mount, volume)])?;
    scene.until_ready("helmsman")?;
    Ok(())
}

fn orders(scene: &Scene) -> anyhow::Result<std::path::PathBuf> {
    let uid = scene.pod("helmsman")?["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    Ok(scene.fleet.stage.dir.path().join(format!("state/kubelet/pods/{uid}/volumes/kubernetes.io~configmap/orders")))
}

/// As if the daemon had been killed while it wrote another version.
fn half_a_write(scene: &mut Scene) -> anyhow::Result<()> {
    let (dir, half) = (orders(scene)?, "..2026_01_02_03_04_05.0000000001");
    std::fs::create_dir(dir.join(half))?;
    std::fs::write(dir.join(half).join("cour"), "so")?;
    std::os::unix::fs::symlink(half, dir.join("..data_tmp"))?;
    scene.fleet.kubectl_words(&["patch", "configmap", "orders", "-p", r#"{"data":{"course":"south"}}"#])?;
    Ok(())
}

fn edited(scene: &mut Scene) -> anyhow::Result<String> {
    wait("the other version arrives", SOON, || {
        Ok((scene.fleet.kubectl("exec helmsman -- cat /orders/course")? == "south").then_some(()))
    })?;
    let dir = orders(scene)?;
    // The version is there before the old ones go.
    wait("what was not finished goes", SOON, || {
        let versions = super::names(&dir)?.into_iter().filter(|name| name.starts_with("..2")).count();
        Ok((versions == 1 && !super::names(&dir)?.contains(&"..data_tmp".to_owned())).then_some(()))
    })?;
    is_first(&scene.pod("helmsman")?)?;
    Ok("what was edited meanwhile has arrived, what was half there has gone".to_owned())
}

fn ballast(scene: &mut Scene) -> anyhow::Result<()> {
    let dir = static_pods(&scene.fleet.stage);
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("ballast.yaml"), manifests::STATIC.replace("LINE", "one"))?;
    let mirror = format!("ballast-{NODE}");
    wait("the mirror is Ready", SOON, || Ok((condition(&scene.pod(&mirror)?, "Ready") == Some("True")).then_some(())))
}

fn still_ballast(scene: &mut Scene) -> anyhow::Result<String> {
    is_first(&scene.pod(&format!("ballast-{NODE}"))?)?;
    Ok("the same container, the same mirror".to_owned())
}

fn pulls(scene: &mut Scene) -> anyhow::Result<()> {
    let image = json!({ "image": format!("{SLOW_REGISTRY}/slow") });
    scene.want("puller", IDLE, image, json!({}))?;
    scene.is_hung.recv_timeout(pace::stretched(SOON)).context("the large layer was not asked for")?;
    let small = scene.layers[0].trim_start_matches("sha256:").to_owned();
    let place = scene.fleet.stage.dir.path().join("state");
    wait("the small layer is there", SOON, || Ok(is_stored(&place, &small).then_some(())))
}

/// Whether a layer is somewhere in a store.
fn is_stored(state: &std::path::Path, digest: &str) -> bool {
    let stores = std::fs::read_dir(state).into_iter().flatten().flatten();
    stores.map(|store| store.path().join("layers/sha256").join(digest)).any(|layer| layer.join("layer.json").exists())
}

fn pulled(scene: &mut Scene) -> anyhow::Result<String> {
    scene.open("pulled")?;
    scene.proxy.let_go();
    is_first(&scene.until_ready("puller")?)?;
    let asked = |digest: &String| {
        let seen = scene.proxy.seen();
        seen.iter().filter(|request| request.method == "GET" && request.path.contains(digest)).count()
    };
    let [small, large] = [asked(&scene.layers[0]), asked(&scene.layers[1])];
    ensure!(small == 1, "the layer that was there was fetched {small} times");
    Ok(format!("the layer that was there was fetched once, the other one in {large} tries"))
}

fn inits(scene: &mut Scene) -> anyhow::Result<()> {
    let init = |name: &str, then: &str| {
        let script = format!("echo once >> /g/{name}.runs; {then}");
        json!({ "name": name, "image": "busybox", "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script],
            "volumeMounts": [{ "name": "gates", "mountPath": "/g" }] })
    };
    let both = json!({ "initContainers": [init("first", "exit 0"), init("next", &until("inits"))] });
    scene.want("muster", IDLE, json!({}), both)?;
    scene.until_noted("next.runs")?;
    scene.until("muster", "its second init container runs", |pod| {
        pod["status"]["initContainerStatuses"][1]["state"]["running"].is_object()
    })?;
    Ok(())
}

fn initialized(scene: &mut Scene) -> anyhow::Result<String> {
    scene.open("inits")?;
    let pod = scene.until_ready("muster")?;
    let counts: Vec<_> = pod["status"]["initContainerStatuses"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|one| &one["restartCount"])
        .collect();
    ensure!(counts == [0, 0], "init containers were restarted: {counts:?}");
    let runs = ["first.runs", "next.runs"].map(|file| scene.lines(file));
    ensure!(runs == [1, 1], "they ran {runs:?} times");
    Ok("each of both ran once".to_owned())
}

fn attaches(scene: &mut Scene) -> anyhow::Result<()> {
    scene.want("berth", IDLE, json!({}), json!({}))?;
    scene.until_noted("berth.reached")
}

fn attached(scene: &mut Scene) -> anyhow::Result<String> {
    // The plugin was called anew by each daemon, and what the dead ones had called would go on now.
    wait("the plugin is at work again", SOON, || Ok((scene.lines("berth.reached") >= 3).then_some(())))?;
    scene.open("berth")?;
    is_first(&scene.until_ready("berth")?)?;
    let sandboxes = scene.fleet.stage.dir.path().join("run/sandboxes");
    wait("nobody is attached who has no sandbox", SOON, || {
        let attached = super::names(&scene.book)?;
        Ok(attached.iter().all(|id| sandboxes.join(id).exists()).then_some(()))
    })?;
    let (calls, book) = (scene.lines("berth.reached"), super::names(&scene.book)?.len());
    Ok(format!("called {calls} times, attached once; {book} in the plugin's book, all with a sandbox"))
}

fn mounts(scene: &mut Scene) -> anyhow::Result<()> {
    let meta = |kind: &str, version: &str, name: &str| json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name } });
    let size = json!({ "storage": "1Gi" });
    let driver = json!({ "spec": { "attachRequired": false, "podInfoOnMount": true, "fsGroupPolicy": "File" } });
    let csi = json!({ "driver": DRIVER, "volumeHandle": "hold-1", "fsType": "ext4" });
    let volume = json!({ "spec": { "accessModes": ["ReadWriteOnce"], "capacity": size, "storageClassName": "",
        "persistentVolumeReclaimPolicy": "Retain", "csi": csi } });
    let claim = json!({ "spec": { "accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": "hold",
        "resources": { "requests": size } } });
    let mount = json!({ "volumeMounts": [{ "name": "hold", "mountPath": "/hold" }] });
    let volumes = json!({ "volumes": [{ "name": "hold", "persistentVolumeClaim": { "claimName": "hold" } }] });
    scene.apply(
        "hold",
        &[
            super::merged(meta("CSIDriver", "storage.k8s.io/v1", DRIVER), driver),
            super::merged(meta("PersistentVolume", "v1", "hold"), volume),
            super::merged(meta("PersistentVolumeClaim", "v1", "hold"), claim),
            scene.manifest("stevedore", &format!("echo cargo > /hold/manifest; {IDLE}"), mount, volumes),
        ],
    )?;
    let called = || scene.driver.calls().borrow().iter().map(testkit::csi::Call::name).collect::<Vec<_>>();
    wait("the volume is staged", SOON, || Ok((called() == ["NodeStageVolume"]).then_some(())))
}

fn mounted(scene: &mut Scene) -> anyhow::Result<String> {
    scene.driver.hang(None);
    is_first(&scene.until_ready("stevedore")?)?;
    let file = scene.fleet.stage.dir.path().join("hull/hold-1/manifest");
    wait("the pod has written to it", SOON, || {
        Ok((std::fs::read_to_string(&file).ok().as_deref() == Some("cargo\n")).then_some(()))
    })?;
    scene.fleet.kubectl("delete pod stevedore")?;
    let calls = scene.driver.calls().borrow().iter().map(testkit::csi::Call::name).collect::<Vec<_>>();
    let count = |name: &str| calls.iter().filter(|call| **call == name).count();
    ensure!(count("NodePublishVolume") == 1, "the driver was called: {calls:?}");
    ensure!(calls.last() == Some(&"NodeUnstageVolume"), "the pod went before its volume: {calls:?}");
    Ok(format!("mounted once, used and taken down; {} calls answered", calls.len()))
}

fn greets(scene: &mut Scene) -> anyhow::Result<()> {
    let hook = format!("echo once >> /g/greets.begun; {}; echo once >> /g/greets.done", until("greets"));
    scene.want("greets", IDLE, json!({ "lifecycle": { "postStart": exec(&hook) } }), json!({}))?;
    scene.until_noted("greets.begun")
}

fn greeted(scene: &mut Scene) -> anyhow::Result<String> {
    let before = scene.pod("greets")?;
    scene.open("greets")?;
    let after = scene.until_ready("greets")?;
    is_first(&after)?;
    ensure!(
        container(&before)["containerID"] == container(&after)["containerID"] || !is_running(&before),
        "another container"
    );
    let done = scene.lines("greets.done");
    ensure!(done == 1, "the hook came to its end {done} times");
    Ok(format!(
        "the hook was begun {} times, as Kubernetes says it may be, and ended once",
        scene.lines("greets.begun")
    ))
}

/// A container that notes that it was asked to end, and whether its hook was over then.
fn heeds(name: &str) -> String {
    format!(
        "trap 'echo after $(cat /g/{name}.hook 2>/dev/null | wc -l) >> /g/{name}.term; {}; exit 0' TERM; \
         : > /g/{name}.heeds; while :; do usleep 20000; done",
        until(name)
    )
}

fn ending(scene: &Scene, name: &str, hook: &str) -> anyhow::Result<()> {
    let container =
        json!({ "lifecycle": { "preStop": exec(hook) }, "readinessProbe": probe(&format!("[ -e /g/{name}.heeds ]")) });
    scene.want(name, &heeds(name), container, json!({ "terminationGracePeriodSeconds": 600 }))?;
    scene.until_ready(name)?;
    scene.fleet.kubectl(&format!("delete pod {name} --wait=false")).map(drop)
}

fn bids_farewell(scene: &mut Scene) -> anyhow::Result<()> {
    let hook = format!("echo once >> /g/farewell.begun; {}; echo once >> /g/farewell.hook", until("farewell"));
    ending(scene, "farewell", &hook)?;
    scene.until_noted("farewell.begun")
}

fn bade_farewell(scene: &mut Scene) -> anyhow::Result<String> {
    ensure!(scene.lines("farewell.term") == 0, "it was asked to end before its hook was over");
    scene.open("farewell")?;
    scene.until_gone("farewell")?;
    let term = std::fs::read_to_string(scene.gates.join("farewell.term"))?;
    ensure!(
        term == "after 1\n",
        "it was asked to end {term:?}, its hook should have ended once before that, and it once"
    );
    Ok(format!("begun {} times, then the container was asked to end, once", scene.lines("farewell.begun")))
}

fn ends(scene: &mut Scene) -> anyhow::Result<()> {
    ending(scene, "leaving", "echo once >> /g/leaving.hook")?;
    scene.until_noted("leaving.term")?;
    // That both are over is on record a moment after they are.
    let dir = scene.fleet.stage.dir.path().to_owned();
    let pod = scene.pod("leaving")?;
    let id = container(&pod)["containerID"].as_str().and_then(|id| id.rsplit('/').next()).context("an id")?.to_owned();
    wait("it is on record", SOON, || {
        let sandboxes = std::fs::read_dir(dir.join("run/sandboxes"))?.flatten();
        let mut records =
            sandboxes.filter_map(|sandbox| std::fs::read(sandbox.path().join("containers").join(&id)).ok());
        // A container's record ends with that it was asked: field 14, true.
        Ok(records.any(|record| record.ends_with(&[14 << 3, 1])).then_some(()))
    })
}

fn ended(scene: &mut Scene) -> anyhow::Result<String> {
    scene.open("leaving")?;
    scene.until_gone("leaving")?;
    let (hooks, term) = (scene.lines("leaving.hook"), std::fs::read_to_string(scene.gates.join("leaving.term"))?);
    ensure!(hooks == 1 && term == "after 1\n", "its hook ran {hooks} times, and it was asked to end {term:?}");
    Ok("its preStop hook ran once, and it was asked to end once".to_owned())
}

fn chats(scene: &mut Scene) -> anyhow::Result<()> {
    let script = format!(
        "i=0; say() {{ echo \"$i all is well aboard, the sea is calm, the wind is fair\"; i=$((i+1)); }}; \
         say; {}; while [ $i -lt 4000 ]; do say; done; : > /g/chatty.said; while :; do say; usleep 100000; done",
        until("chatty")
    );
    scene.want("chatty", &script, json!({}), json!({}))?;
    scene.until_ready("chatty")?;
    Ok(())
}

/// Several logs are filled while there is nobody but the keeper.
fn say_much(scene: &mut Scene) -> anyhow::Result<()> {
    scene.open("chatty")?;
    wait("all is said", SOON, || Ok(scene.gates.join("chatty.said").exists().then_some(())))
}

fn chatted(scene: &mut Scene) -> anyhow::Result<String> {
    let log = scene.fleet.kubectl("logs chatty")?;
    let numbers: Vec<usize> = log.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    ensure!(numbers.len() >= 4000, "only {} lines are there", numbers.len());
    let gap = numbers.iter().enumerate().find(|(place, number)| place != *number);
    ensure!(gap.is_none() && numbers.len() == log.lines().count(), "lines are lost, doubled or torn at {gap:?}");
    is_first(&scene.pod("chatty")?)?;
    Ok(format!("{} lines over several files, none lost or doubled", numbers.len()))
}

fn will_end(scene: &mut Scene) -> anyhow::Result<()> {
    let once = |code: u8| format!(": {}; {}; exit {code}", marker(scene), until("away"));
    let first_only = "echo once >> /g/away.runs; [ $(wc -l < /g/away.runs) = 1 ] || exec sleep 100000";
    scene.want(RESTARTED, &format!("{first_only}; {}", once(7)), json!({}), json!({}))?;
    scene.want("away-once", &once(3), json!({}), json!({ "restartPolicy": "Never" }))?;
    for pod in [RESTARTED, "away-once"] {
        scene.until(pod, "runs", is_running)?;
    }
    Ok(())
}

/// What is in the command line of those that end while there is no daemon, and of no other process on this machine.
fn marker(scene: &Scene) -> String {
    let stage = scene.fleet.stage.dir.path().file_name().unwrap_or_default();
    format!("away-{}", stage.to_string_lossy())
}

fn end_meanwhile(scene: &mut Scene) -> anyhow::Result<()> {
    let marker = marker(scene).into_bytes();
    let running = || {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let commands = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
        commands.filter(|command| command.windows(marker.len()).any(|part| part == marker)).count()
    };
    ensure!(running() > 0, "nobody runs who could end");
    scene.open("away")?;
    wait("both end", SOON, || Ok((running() == 0).then_some(())))
}

fn ended_meanwhile(scene: &mut Scene) -> anyhow::Result<String> {
    let again = scene.until(RESTARTED, "runs again", |pod| is_running(pod) && container(pod)["restartCount"] != 0)?;
    let (count, code) = (&container(&again)["restartCount"], &container(&again)["lastState"]["terminated"]["exitCode"]);
    ensure!(*count == 1 && *code == 7, "restarted {count} times, and ended with {code}");
    ensure!(scene.lines("away.runs") == 2, "it ran {} times", scene.lines("away.runs"));
    let once = scene.until("away-once", "has failed", |pod| pod["status"]["phase"] == "Failed")?;
    let code = &container(&once)["state"]["terminated"]["exitCode"];
    ensure!(*code == 3, "it ended with {code}");
    is_first(&once)?;
    Ok("their exit codes are known; one was started again, once".to_owned())
}

fn speaks(scene: &mut Scene) -> anyhow::Result<()> {
    let script = format!("echo once >> /g/last-words.runs; {}", until("last-words"));
    scene.want("last-words", &script, json!({}), json!({ "restartPolicy": "Never" }))?;
    scene.until_noted("last-words.runs")?;
    scene.until("last-words", "runs", is_running)?;
    Ok(())
}

fn last_words(scene: &mut Scene) -> anyhow::Result<String> {
    let pod = scene.until("last-words", "has succeeded", |pod| pod["status"]["phase"] == "Succeeded")?;
    is_first(&pod)?;
    ensure!(scene.lines("last-words.runs") == 1, "it ran {} times", scene.lines("last-words.runs"));
    Ok("the API server has learned how it ended".to_owned())
}
