//! Bad input and faults on a whole node, with small pods: what goes wrong says why, heals by itself where it can, and
//! costs nobody else anything.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testkit::pace;

use super::observe::{PodView, http_text};
use super::{Point, Voyage, commands, leftovers, wait};

/// All trials, in order; the last but one ends the node.
pub(super) const TRIALS: &[Point] = &[
    ("a bad document is named with file, line and field; good ones run", bad_document),
    ("a missing ConfigMap holds one container and heals", missing_config_map),
    ("init containers, a sidecar, a Job", init_and_job),
    ("host ports, node ports, exec, cp and logs of a previous run", reach_in),
    ("a user namespace maps the pod's root away", user_namespace),
    ("limits stand in the container's control group; who exceeds them is ended", limits),
    ("an image that is not there is told with its registry's answer", missing_image),
    ("a registry that hangs delays its own pod only", hung_registry),
    ("a killed keeper is noticed and its pod started again", killed_keeper),
    ("a second daemon on the same directories is refused", second_daemon),
    ("logs are followed, cut and dated", commands::logs),
    ("exec passes streams, exit codes and a terminal", commands::exec),
    ("attach joins a container's first process", commands::attach),
    ("cp copies in both directions", commands::copy),
    ("port-forward leads to a pod", commands::port_forward),
    ("ps, get, describe, events, top and why say what is", commands::shown),
    ("images are pulled, listed, loaded and removed", commands::images),
    ("version, completion and check", commands::without_node),
    ("a changed Deployment rolls without an outage", rolling_update),
    ("down ends everything and leaves nothing", down),
    ("up takes manifests from stdin and detaches", commands::from_stdin),
];

const SOON: Duration = Duration::from_secs(30);

impl Voyage {
    pub(super) fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        // As editors do it: the watcher never sees half a file.
        let next = self.manifests.join(format!(".{name}.new"));
        std::fs::write(&next, text)?;
        std::fs::rename(next, self.manifests.join(name)).with_context(|| format!("write {name}"))
    }

    pub(super) fn remove(&self, name: &str) -> anyhow::Result<()> {
        std::fs::remove_file(self.manifests.join(name)).with_context(|| format!("remove {name}"))
    }

    /// Waits until the pod is as `holds` wants it.
    pub(super) fn until(&self, pod: &str, what: &str, holds: impl Fn(&PodView) -> bool) -> anyhow::Result<PodView> {
        wait(&format!("pod {pod}: {what}"), SOON, || {
            Ok(self.pods("")?.into_iter().find(|one| one.name() == pod && holds(one)))
        })
    }

    pub(super) fn until_gone(&self, prefix: &str) -> anyhow::Result<()> {
        wait(&format!("pods {prefix}* are gone"), SOON, || Ok(self.pods(prefix)?.is_empty().then_some(())))
    }

    fn until_event(&self, pod: &str, reason: &str, text: &str) -> anyhow::Result<String> {
        wait(&format!("an event {reason} of {pod} with {text:?}"), SOON, || {
            let events = self.events(pod)?;
            Ok(events
                .into_iter()
                .find(|(of, message)| of == reason && message.contains(text))
                .map(|(_, message)| message))
        })
    }

    fn log(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.stage.dir.path().join("orlop.log"))?)
    }
}

pub(super) fn sleeper(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{ name: c, image: busybox, command: [sleep, infinity] }}\n"
    )
}

fn bad_document(voyage: &mut Voyage) -> anyhow::Result<String> {
    let text = format!(
        "{}---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: bad }}\nspec:\n  containers:\n  - name: c\n    image: busybox\n    comand: [\"true\"]\n",
        sleeper("good")
    );
    voyage.write("mixed.yaml", &text)?;
    voyage.until("good", "runs", |pod| pod.phase() == "Running")?;
    let line = text.lines().position(|line| line.contains("comand")).context("the fault")? + 1;
    let told = wait("the fault is told", SOON, || {
        Ok(voyage.log()?.lines().find(|text| text.contains("comand")).map(str::to_owned))
    })?;
    ensure!(told.contains(&format!("mixed.yaml:{line}")), "line {line} is not named: {told}");
    ensure!(voyage.pods("bad")?.is_empty(), "the bad document runs");
    voyage.remove("mixed.yaml")?;
    voyage.until_gone("good")?;
    Ok(format!("mixed.yaml:{line} was named, the good document ran"))
}

fn missing_config_map(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("needs.yaml", "apiVersion: v1\nkind: Pod\nmetadata: { name: needs }\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: c\n    image: busybox\n    command: [sh, -c, 'echo $WORD; sleep infinity']\n    env:\n    - name: WORD\n      valueFrom: { configMapKeyRef: { name: later, key: word } }\n")?;
    let waiting = voyage.until("needs", "waits for its ConfigMap", |pod| {
        pod.container()["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    })?;
    let message = waiting.container()["state"]["waiting"]["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message.contains("later"), "the message does not name it: {message:?}");
    let begun = Instant::now();
    voyage.write("later.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: later }\ndata: { word: ahoy }\n")?;
    voyage.until("needs", "runs", |pod| pod.phase() == "Running")?;
    let healed = begun.elapsed();
    wait("the value arrived", SOON, || Ok((voyage.orlop(&["logs", "needs"])? == "ahoy\n").then_some(())))?;
    voyage.remove("needs.yaml")?;
    voyage.remove("later.yaml")?;
    voyage.until_gone("needs")?;
    Ok(format!("{message:?}; healed {} ms after it appeared", healed.as_millis()))
}

fn init_and_job(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("job.yaml", "apiVersion: batch/v1\nkind: Job\nmetadata: { name: sum }\nspec:\n  backoffLimit: 1\n  template:\n    spec:\n      restartPolicy: Never\n      initContainers:\n      - { name: beside, image: busybox, restartPolicy: Always, command: [sh, -c, 'trap exit TERM; echo up > /w/beside; sleep infinity & wait'], volumeMounts: [{ name: w, mountPath: /w }] }\n      - { name: first, image: busybox, command: [sh, -c, 'until [ -e /w/beside ]; do sleep 0.05; done; echo 2 > /w/a'], volumeMounts: [{ name: w, mountPath: /w }] }\n      containers:\n      - { name: c, image: busybox, command: [sh, -c, 'echo $(( $(cat /w/a) + 40 ))'], volumeMounts: [{ name: w, mountPath: /w }] }\n      volumes:\n      - { name: w, emptyDir: { medium: Memory } }\n")?;
    let done = wait("the job's pod succeeds", SOON, || {
        Ok(voyage.pods("sum-")?.into_iter().find(|pod| pod.phase() == "Succeeded"))
    })?;
    let log = voyage.orlop(&["logs", done.name(), "-c", "c"])?;
    ensure!(log == "42\n", "the job says {log:?}");
    wait("the job is complete", SOON, || {
        let jobs: Vec<serde_json::Value> = serde_json::from_str(&voyage.orlop(&["get", "jobs", "sum", "-o", "json"])?)?;
        Ok((jobs[0]["status"]["succeeded"] == 1).then_some(()))
    })?;
    voyage.remove("job.yaml")?;
    voyage.until_gone("sum-")?;
    Ok("init containers ran in order beside a sidecar, the job is complete".to_owned())
}

fn reach_in(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("web.yaml", "apiVersion: v1\nkind: Pod\nmetadata: { name: web, labels: { app: web } }\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: c\n    image: busybox\n    command: [sh, -c, 'echo run; mkdir -p /w; echo page > /w/index.html; httpd -f -p 8080 -h /w & wait']\n    ports: [{ containerPort: 8080, hostPort: 18080 }]\n    readinessProbe: { tcpSocket: { port: 8080 }, periodSeconds: 1 }\n---\napiVersion: v1\nkind: Service\nmetadata: { name: web }\nspec:\n  type: NodePort\n  selector: { app: web }\n  ports: [{ port: 80, targetPort: 8080, nodePort: 30080 }]\n")?;
    voyage.until("web", "is Ready", PodView::is_ready)?;
    let gateway: IpAddr = "10.85.0.1".parse()?;
    for port in [18080, 30080] {
        let page = wait("the page", SOON, || http_text("GET", SocketAddr::new(gateway, port), "/").map(Some))?.1;
        ensure!(page == "page\n", "port {port} answers {page:?}");
    }
    let service = voyage.orlop(&["describe", "service", "web"])?;
    ensure!(
        service.contains(" tracked") && !service.contains(" 0 connections tracked"),
        "the connection to the node port is not told:\n{service}"
    );
    let local = voyage.stage.dir.path().join("copied");
    voyage.orlop(&["cp", "web:/w/index.html", &local.display().to_string()])?;
    ensure!(std::fs::read_to_string(&local)? == "page\n", "cp out gave something else");
    voyage.orlop(&["cp", &local.display().to_string(), "web:/w/other.html"])?;
    let seen = voyage.orlop(&["exec", "web", "--", "cat", "/w/other.html"])?;
    ensure!(seen == "page\n", "cp in gave {seen:?}");
    voyage.orlop(&["exec", "web", "--", "sh", "-c", "kill $(pidof httpd)"])?;
    voyage.until("web", "was restarted", |pod| pod.restarts() == 1)?;
    let previous = voyage.orlop(&["logs", "web", "--previous"])?;
    ensure!(previous == "run\n", "the previous run's log is {previous:?}");
    voyage.remove("web.yaml")?;
    voyage.until_gone("web")?;
    Ok("host port 18080 and node port 30080 answer; cp, exec and logs --previous agree".to_owned())
}

fn user_namespace(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("mapped.yaml", "apiVersion: v1\nkind: Pod\nmetadata: { name: mapped }\nspec:\n  hostUsers: false\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: c\n    image: busybox\n    command: [sh, -c, 'id -u; cat /proc/self/uid_map; touch /v/mine && ls -ln /v | tail -1; sleep infinity']\n    volumeMounts: [{ name: v, mountPath: /v }]\n  volumes: [{ name: v, emptyDir: {} }]\n")?;
    if !maps_users(voyage)? {
        let told = voyage.until_event("mapped", "FailedCreatePodSandBox", "user namespaces are not possible")?;
        voyage.remove("mapped.yaml")?;
        voyage.until_gone("mapped")?;
        return Ok(told);
    }
    voyage.until("mapped", "runs", |pod| pod.phase() == "Running")?;
    let log = wait("the pod speaks", SOON, || {
        let log = voyage.orlop(&["logs", "mapped"])?;
        Ok((log.lines().count() >= 3).then_some(log))
    })?;
    let words: Vec<&str> = log.split_whitespace().collect();
    ensure!(words[0] == "0" && words[1] == "0" && words[2] != "0", "root is not mapped away: {log:?}");
    voyage.remove("mapped.yaml")?;
    voyage.until_gone("mapped")?;
    Ok(format!("root inside is {} outside", words[2]))
}

/// Files of a container's control group, and what stands in them for the limits below; by version.
const GIVEN: [&[(&str, &str)]; 2] = [
    &[("cpu/cpu.cfs_quota_us", "50000"), ("memory/memory.limit_in_bytes", "33554432")],
    &[
        ("cpu.max", "50000 100000"),
        ("memory.max", "33554432"),
        ("memory.high", "max"),
        ("memory.swap.max", "0"),
        ("memory.oom.group", "1"),
    ],
];

/// On version 2 a container that needs too much ends as a whole, whoever of its processes it was; version 1 knows processes
/// only.
fn limits(voyage: &mut Voyage) -> anyhow::Result<String> {
    let is_unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let limited = "imagePullPolicy: IfNotPresent, resources: { limits: { cpu: 500m, memory: 32Mi } }, command:";
    voyage.write("limited.yaml", &sleeper("limited").replace("command:", limited))?;
    voyage.until("limited", "runs", |pod| pod.phase() == "Running")?;
    for (file, expect) in GIVEN[usize::from(is_unified)] {
        let found = voyage.orlop(&["exec", "limited", "--", "cat", &format!("/sys/fs/cgroup/{file}")])?;
        ensure!(found.trim() == *expect, "{file} is {found:?}, not {expect}");
    }
    // It looks for the end of a line that has none.
    let greedy = voyage.orlop(&["exec", "limited", "--", "tail", "/dev/zero"]);
    ensure!(greedy.is_err(), "a process has more memory than its container may have");
    if is_unified {
        let pod = voyage.until("limited", "runs again", |pod| pod.phase() == "Running" && pod.restarts() == 1)?;
        let ended = &pod.container()["lastState"]["terminated"];
        ensure!(ended["reason"] == "OOMKilled" && ended["exitCode"] == 137, "the container ended as {ended}");
    } else {
        ensure!(voyage.pod("limited")?.restarts() == 0, "the container was ended for one of its processes");
    }
    voyage.remove("limited.yaml")?;
    voyage.until_gone("limited")?;
    Ok(format!("of version {}", 1 + u8::from(is_unified)))
}

/// By what `orlop check` says of this machine; it ends with 1 where something else is missing.
fn maps_users(voyage: &Voyage) -> anyhow::Result<bool> {
    let checked = voyage.stage.orlop().args(["check", "--output", "json"]).output()?;
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&checked.stdout)?;
    let found =
        findings.iter().find(|finding| finding["what"] == "user namespaces").context("it says nothing of them")?;
    Ok(found["verdict"] == "ok")
}

fn missing_image(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("none.yaml", "apiVersion: v1\nkind: Pod\nmetadata: { name: none }\nspec:\n  terminationGracePeriodSeconds: 1\n  containers: [{ name: c, image: 'nobody/nothing:1' }]\n")?;
    let message = voyage.until_event("none", "Failed", "nobody/nothing:1")?;
    ensure!(message.contains("127.0.0.1:5000 answered"), "the mirror's answer is not told: {message}");
    voyage.until("none", "rests", |pod| pod.container()["state"]["waiting"]["reason"] == "ImagePullBackOff")?;
    voyage.remove("none.yaml")?;
    voyage.until_gone("none")?;
    Ok(message)
}

/// How often the start of a pod is measured, with and without somebody who waits for the registry.
const STARTS: usize = 5;

/// How many times as long as otherwise it may take: both are some tens of milliseconds on a machine that others use, too.
const SLOWER: f64 = 4.0;

fn hung_registry(voyage: &mut Voyage) -> anyhow::Result<String> {
    let usual = median_start(voyage)?;
    let registry = Pid::from_raw(i32::try_from(voyage.stage.registry_pid())?).context("the registry's process")?;
    kill_process(registry, Signal::STOP)?;
    let result = beside_a_hung_pull(voyage);
    kill_process(registry, Signal::CONT)?;
    let took = result?;
    voyage.until("stuck", "runs when the registry is back", |pod| pod.phase() == "Running")?;
    voyage.remove("stuck.yaml")?;
    voyage.until_gone("stuck")?;
    let ratio = took.as_secs_f64() / usual.as_secs_f64();
    ensure!(ratio < SLOWER, "another pod started in {took:?}, and in {usual:?} while nobody waited for the registry");
    Ok(format!("another pod started in {} ms, otherwise in {} ms", took.as_millis(), usual.as_millis()))
}

fn beside_a_hung_pull(voyage: &Voyage) -> anyhow::Result<Duration> {
    voyage.write(
        "stuck.yaml",
        &sleeper("stuck").replace("image: busybox,", "image: busybox, imagePullPolicy: Always,"),
    )?;
    voyage.until_event("stuck", "Pulling", "busybox")?;
    let took = median_start(voyage)?;
    ensure!(voyage.pod("stuck")?.phase() == "Pending", "the pull did not hang");
    Ok(took)
}

/// From the manifest's appearance until the pod runs, whose image is there.
fn median_start(voyage: &Voyage) -> anyhow::Result<Duration> {
    let text = sleeper("quick").replace("image: busybox,", "image: busybox, imagePullPolicy: IfNotPresent,");
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        let begun = Instant::now();
        voyage.write("quick.yaml", &text)?;
        voyage.until("quick", "runs", |pod| pod.phase() == "Running")?;
        starts.push(begun.elapsed());
        voyage.remove("quick.yaml")?;
        voyage.until_gone("quick")?;
    }
    starts.sort();
    Ok(starts[starts.len() / 2])
}

fn killed_keeper(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("kept.yaml", &sleeper("kept"))?;
    let before = voyage.until("kept", "runs", |pod| pod.phase() == "Running")?;
    let keepers = super::keepers_in(voyage.stage.dir.path())?;
    ensure!(keepers.len() == 1, "one keeper was expected: {keepers:?}");
    kill_process(keepers[0], Signal::KILL)?;
    let after = voyage.until("kept", "runs again", |pod| pod.phase() == "Running" && pod.restarts() == 1)?;
    ensure!(after.container()["containerID"] != before.container()["containerID"], "it is the same container");
    voyage.remove("kept.yaml")?;
    voyage.until_gone("kept")?;
    Ok("the container was reported lost and runs again".to_owned())
}

fn second_daemon(voyage: &mut Voyage) -> anyhow::Result<String> {
    let output = voyage.stage.orlop().arg("up").arg(&voyage.manifests).output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "a second daemon started");
    ensure!(error.contains(&format!("pid {}", voyage.up.id())), "it does not say who runs: {error}");
    Ok(error.trim().to_owned())
}

fn rolling_update(voyage: &mut Voyage) -> anyhow::Result<String> {
    let manifest = |word: &str| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{ name: roll }}\nspec:\n  replicas: 2\n  selector: {{ matchLabels: {{ app: roll }} }}\n  template:\n    metadata: {{ labels: {{ app: roll }} }}\n    spec:\n      terminationGracePeriodSeconds: 2\n      containers:\n      - name: c\n        image: busybox\n        command: [sh, -c, 'mkdir -p /w; echo {word} > /w/index.html; exec httpd -f -p 8080 -h /w']\n        readinessProbe: {{ tcpSocket: {{ port: 8080 }}, periodSeconds: 1, timeoutSeconds: 30 }}\n---\napiVersion: v1\nkind: Service\nmetadata: {{ name: roll }}\nspec: {{ selector: {{ app: roll }}, ports: [{{ port: 80, targetPort: 8080 }}] }}\n"
        )
    };
    voyage.write("roll.yaml", &manifest("one"))?;
    wait("both replicas are Ready", SOON, || {
        let pods = voyage.pods("roll-")?;
        Ok((pods.len() == 2 && pods.iter().all(PodView::is_ready)).then_some(()))
    })?;
    let address = SocketAddr::new(voyage.service_address("roll")?, 80);
    wait("the service answers", SOON, || http_text("GET", address, "/").map(Some))?;
    voyage.write("roll.yaml", &manifest("two"))?;
    let (mut asked, mut failed) = (0_u32, Vec::new());
    let begun = Instant::now();
    loop {
        asked += 1;
        if let Err(error) = http_text("GET", address, "/") {
            failed.push(format!("{error:#}"));
        }
        let pods = voyage.pods("roll-")?;
        let settled = pods.len() == 2 && pods.iter().all(PodView::is_ready);
        if settled && (0..20).all(|_| http_text("GET", address, "/").is_ok_and(|(_, page)| page == "two\n")) {
            break;
        }
        if begun.elapsed() > pace::stretched(SOON * 2) {
            bail!("the new version is not there after {} s", begun.elapsed().as_secs());
        }
    }
    ensure!(failed.is_empty(), "{} of {asked} requests failed: {}", failed.len(), failed[0]);
    voyage.remove("roll.yaml")?;
    voyage.until_gone("roll-")?;
    Ok(format!("{asked} requests while it rolled, none failed"))
}

fn down(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("last.yaml", &sleeper("last"))?;
    voyage.until("last", "runs", |pod| pod.phase() == "Running")?;
    voyage.orlop(&["down"])?;
    let status = wait("orlop up ends", SOON, || Ok(voyage.up.try_wait()?))?;
    ensure!(status.success(), "orlop up ended with {status}");
    let fsck = voyage.orlop(&["fsck"])?;
    ensure!(fsck.is_empty(), "orlop fsck prints:\n{fsck}");
    let left = leftovers::since(&voyage.before, voyage.stage.dir.path())?;
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok("nothing is left".to_owned())
}
