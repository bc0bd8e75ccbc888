//! The seven points. Each returns a sentence on what was seen.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use testkit::pace;

use super::observe::{Answer, PodView, http, resolve};
use super::{Voyage, leftovers, wait};

const REPLICAS: usize = 2;
const PORT: u16 = 8000;

/// The model loads for 35 s; probes come every 10 s; pulls and a busy machine take their time.
const LOADED: Duration = Duration::from_secs(180);

/// 1. Running but not Ready while the model loads; the startup probe holds the liveness probe back.
pub(super) fn loading(voyage: &mut Voyage) -> anyhow::Result<String> {
    let running = wait("both replicas run", LOADED, || {
        let pods = voyage.pods("ai-service-")?;
        Ok((pods.len() == REPLICAS && pods.iter().all(|pod| pod.phase() == "Running")).then_some(pods))
    })?;
    for pod in &running {
        ensure!(!pod.is_ready(), "{} is Ready although its model cannot be loaded yet", pod.name());
        ensure!(pod.container()["started"] == false, "{}: the startup probe has not succeeded yet", pod.name());
    }
    let begin = Instant::now();
    let ready = ready_replicas(voyage)?;
    for pod in &ready {
        ensure!(pod.restarts() == 0, "{} was restarted while it loaded", pod.name());
        let events = voyage.events(pod.name())?;
        let early = events.iter().find(|(reason, message)| reason == "Unhealthy" && message.starts_with("Liveness"));
        ensure!(early.is_none(), "{}: the liveness probe ran before the startup probe succeeded", pod.name());
    }
    Ok(format!("Ready {:.0} s after Running", begin.elapsed().as_secs_f64()))
}

fn ready_replicas(voyage: &Voyage) -> anyhow::Result<Vec<PodView>> {
    wait("both replicas are Ready", LOADED, || {
        let pods = voyage.pods("ai-service-")?;
        Ok((pods.len() == REPLICAS && pods.iter().all(PodView::is_ready)).then_some(pods))
    })
}

/// 2. The service's address and name, from the host and from a pod; settings; an edited ConfigMap.
pub(super) fn reachable(voyage: &mut Voyage) -> anyhow::Result<String> {
    let service = voyage.service_address("ai-service")?;
    let named = wait("the DNS server answers", Duration::from_secs(10), || {
        resolve(dns_server(service), "ai-service.default.svc.cluster.local").map(Some)
    })?;
    ensure!(named == service, "DNS says {named}, the service has {service}");
    let from_host = wait("both replicas answer the host", Duration::from_secs(20), || {
        let answered: BTreeSet<String> = (0..20).filter_map(|_| replica_behind(service).ok()).collect();
        Ok((answered.len() == REPLICAS).then_some(answered))
    })?;
    wait("both replicas answer the client", Duration::from_secs(30), || {
        let answered: BTreeSet<String> =
            voyage.answers()?.into_iter().filter_map(|answer| answer.result.ok()).collect();
        Ok((answered == from_host).then_some(()))
    })?;
    check_settings(&settings(service)?)?;
    let took = edit_config_map(voyage, service)?;
    Ok(format!("both replicas answer, the edited file arrived after {} ms", took.as_millis()))
}

/// The tenth address of the service range, as clusters have it.
fn dns_server(service: IpAddr) -> IpAddr {
    match service {
        IpAddr::V4(address) => IpAddr::from([address.octets()[0], address.octets()[1], 0, 10]),
        IpAddr::V6(_) => service,
    }
}

fn replica_behind(address: IpAddr) -> anyhow::Result<String> {
    let (status, answer) = http("GET", SocketAddr::new(address, PORT), "/predict")?;
    ensure!(status == 200, "/predict answered {status}");
    Ok(answer["pod"].as_str().context("/predict names no pod")?.to_owned())
}

fn settings(address: IpAddr) -> anyhow::Result<Value> {
    Ok(http("GET", SocketAddr::new(address, PORT), "/settings")?.1)
}

fn check_settings(settings: &Value) -> anyhow::Result<()> {
    let expected = [
        ("/env/GREETING", "Ahoy"),
        ("/env/API_TOKEN", "not-a-real-token"),
        ("/env/CPU_LIMIT", "500"),
        ("/env/MEMORY_LIMIT", "201326592"),
        ("/files/~1etc~1ai~1secret~1token/text", "not-a-real-token"),
        ("/files/~1etc~1ai~1secret~1token/mode", "0o400"),
    ];
    for (pointer, value) in expected {
        let found = settings.pointer(pointer);
        ensure!(found.is_some_and(|found| found == value), "{pointer} is {found:?}, not {value:?}");
    }
    let labels = settings.pointer("/files/~1etc~1ai~1pod~1labels/text").and_then(Value::as_str).unwrap_or_default();
    ensure!(labels.contains("app=\"ai-service\""), "the downward API file has no label app: {labels:?}");
    Ok(())
}

fn edit_config_map(voyage: &Voyage, service: IpAddr) -> anyhow::Result<Duration> {
    let file = voyage.manifests.join("settings.yaml");
    let text = std::fs::read_to_string(&file)?;
    ensure!(text.contains("0.7"), "the example's ConfigMap has changed");
    let next = voyage.manifests.join(".settings.yaml.new");
    std::fs::write(&next, text.replace("0.7", "0.1"))?;
    let begin = Instant::now();
    std::fs::rename(&next, &file)?;
    wait("the edited ConfigMap reaches the file", Duration::from_secs(10), || {
        let settings = settings(service)?;
        let text =
            settings.pointer("/files/~1etc~1ai~1config~1model.json/text").and_then(Value::as_str).unwrap_or_default();
        Ok(text.contains("0.1").then(|| begin.elapsed()))
    })
}

/// 3. A deadlock: the endpoint leaves, no request fails after that, the container is restarted, events say why.
pub(super) fn deadlock(voyage: &mut Voyage) -> anyhow::Result<String> {
    let pod = ready_replicas(voyage)?.remove(0);
    let address = SocketAddr::new(pod.address()?, PORT);
    // It never answers: that is the point.
    let _ = http("POST", address, "/deadlock");
    wait("the deadlocked pod is not Ready", Duration::from_secs(60), || {
        Ok((!voyage.pod(pod.name())?.is_ready()).then_some(()))
    })?;
    let left = seconds_now();
    wait("the deadlocked container is restarted", Duration::from_secs(150), || {
        Ok((voyage.pod(pod.name())?.restarts() == 1).then_some(()))
    })?;
    let restarted = seconds_now();
    let failed = failures(&voyage.answers()?, left, restarted);
    ensure!(failed.is_empty(), "requests failed after the pod had left the service: {failed:?}");
    let events = voyage.events(pod.name())?;
    let has = |reason: &str, text: &str| events.iter().any(|(of, message)| of == reason && message.contains(text));
    ensure!(has("Unhealthy", "Liveness probe failed"), "no event says that the liveness probe failed: {events:?}");
    ensure!(has("Killing", "failed liveness probe"), "no event says why the container was killed: {events:?}");
    ready_replicas(voyage)?;
    Ok(format!("restarted {:.0} s after it left the service, no request failed", restarted - left))
}

fn seconds_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn failures(answers: &[Answer], from: f64, to: f64) -> Vec<Answer> {
    answers.iter().filter(|answer| answer.result.is_err() && answer.time > from && answer.time < to).cloned().collect()
}

/// 4. A leak: OOMKilled with exit code 137, a restart, then the back-off of 10 s.
pub(super) fn leak(voyage: &mut Voyage) -> anyhow::Result<String> {
    let name = ready_replicas(voyage)?.remove(1).name().to_owned();
    let start_leak = || -> anyhow::Result<()> {
        let address = SocketAddr::new(voyage.pod(&name)?.address()?, PORT);
        wait("the leak begins", Duration::from_secs(30), || http("POST", address, "/leak").map(Some)).map(drop)
    };
    let before = voyage.pod(&name)?.restarts();
    start_leak()?;
    let ended = wait("the leak is killed and restarted", Duration::from_secs(60), || {
        let pod = voyage.pod(&name)?;
        let running = pod.container()["state"]["running"].is_object();
        Ok((pod.restarts() == before + 1 && running).then(|| pod.container()["lastState"]["terminated"].clone()))
    })?;
    ensure!(ended["reason"] == "OOMKilled" && ended["exitCode"] == 137, "the container ended as {ended}");
    start_leak()?;
    let waiting = wait("the second leak ends in CrashLoopBackOff", Duration::from_secs(60), || {
        let waiting = voyage.pod(&name)?.container()["state"]["waiting"].clone();
        Ok((waiting["reason"] == "CrashLoopBackOff").then_some(waiting))
    })?;
    let began = Instant::now();
    ensure!(
        waiting["message"].as_str().is_some_and(|text| text.contains("back-off 10s")),
        "the back-off says {waiting}"
    );
    wait("the back-off ends", Duration::from_secs(40), || {
        Ok(voyage.pod(&name)?.container()["state"]["running"].is_object().then_some(()))
    })?;
    ready_replicas(voyage)?;
    Ok(format!("OOMKilled (137), then CrashLoopBackOff for {:.0} s", began.elapsed().as_secs_f64().round()))
}

/// 5. A busy container is held at its limit; the neighbour keeps its share.
///
/// On a machine that others use as well a round may show neither: several are tried, and one has to show both.
pub(super) fn burn(voyage: &mut Voyage) -> anyhow::Result<String> {
    const ROUNDS: usize = 5;
    let pod = ready_replicas(voyage)?.remove(0);
    let mut seen = Vec::new();
    for _ in 0..ROUNDS {
        match burning_round(voyage, &pod) {
            Ok((drop, text)) if drop < 10.0 => return Ok(format!("{text}; the neighbour lost {:.1} %", drop.max(0.0))),
            Ok((drop, text)) => seen.push(format!("{text}; the neighbour lost {drop:.1} %")),
            Err(error) => seen.push(format!("{error:#}")),
        }
    }
    bail!("no round of {ROUNDS} is good: {}", seen.join(" | "))
}

/// How many percent of its share the neighbour lost, and what `top` said of the busy container.
fn burning_round(voyage: &Voyage, pod: &PodView) -> anyhow::Result<(f64, String)> {
    let address = SocketAddr::new(pod.address()?, PORT);
    let seconds = pace::stretched(Duration::from_secs(12)).as_secs();
    let quiet = neighbour_share(voyage)?;
    http("POST", address, &format!("/burn?seconds={seconds}"))?;
    let usage = wait("the busy container is throttled", Duration::from_secs(8), || {
        let usage = usage(voyage, pod.name())?;
        Ok((number(&usage, "throttledPercent") > 10.0).then_some(usage))
    })?;
    let busy = neighbour_share(voyage)?;
    // It would count as quiet in the next round, and it takes the time for answers.
    wait("the container is at rest", Duration::from_secs(15), || {
        let usage = self::usage(voyage, pod.name())?;
        Ok((number(&usage, "cpuMilli") < number(&usage, "cpuLimitMilli") / 2.0).then_some(()))
    })?;
    let text = format!(
        "cpu {}m of {}m, throttled in {:.0} % of periods",
        usage["cpuMilli"],
        usage["cpuLimitMilli"],
        number(&usage, "throttledPercent")
    );
    Ok((100.0 * (1.0 - busy / quiet), text))
}

/// What `top` says of a pod with one container.
fn usage(voyage: &Voyage, pod: &str) -> anyhow::Result<Value> {
    let usages: Vec<Value> = serde_json::from_str(&voyage.orlop(&["top", "-o", "json"])?)?;
    usages.into_iter().find(|usage| usage["pod"] == pod).context("top does not show the pod")
}

fn number(usage: &Value, name: &str) -> f64 {
    usage[name].as_f64().unwrap_or(0.0)
}

/// What the neighbour has of the machine. How much it gets done with its time is the host's matter where that is shared by
/// emulated processors: there its time counts.
fn neighbour_share(voyage: &Voyage) -> anyhow::Result<f64> {
    if pace::is_slow() { Ok(number(&usage(voyage, "neighbour")?, "cpuMilli")) } else { neighbour_throughput(voyage) }
}

/// The neighbour's median throughput over its next six samples of half a second.
fn neighbour_throughput(voyage: &Voyage) -> anyhow::Result<f64> {
    const SAMPLES: usize = 6;
    let from = seconds_now();
    wait("the neighbour reports", Duration::from_secs(20), || {
        let text = voyage.orlop(&["logs", "neighbour", "--tail", "20"])?;
        let mut rates: Vec<f64> =
            text.lines().filter_map(parse_sample).filter(|(time, _)| *time > from).map(|(_, rate)| rate).collect();
        rates.sort_by(f64::total_cmp);
        Ok((rates.len() >= SAMPLES).then(|| rates[rates.len() / 2]))
    })
}

fn parse_sample(line: &str) -> Option<(f64, f64)> {
    let (time, rate) = line.strip_prefix("time=")?.split_once(" rounds_per_second=")?;
    Some((time.parse().ok()?, rate.parse().ok()?))
}

/// 6. The daemon is killed in the middle of all this.
pub(super) fn killed_daemon(voyage: &mut Voyage) -> anyhow::Result<String> {
    let identity = |voyage: &Voyage| -> anyhow::Result<Vec<(String, String, u64)>> {
        let pods = voyage.pods("")?;
        Ok(pods
            .iter()
            .map(|pod| (pod.name().to_owned(), pod.container()["containerID"].to_string(), pod.restarts()))
            .collect())
    };
    ready_replicas(voyage)?;
    let before = identity(voyage)?;
    let killed = seconds_now();
    voyage.up.kill()?;
    voyage.up.wait()?;
    // Requests go on without a daemon: wait for a few seconds of answers that only kernel rules carried.
    std::thread::sleep(Duration::from_secs(3));
    voyage.start_again()?;
    wait("the daemon answers again", Duration::from_secs(30), || Ok((identity(voyage)? == before).then_some(())))?;
    let back = seconds_now();
    wait("the client goes on", Duration::from_secs(10), || {
        Ok(voyage.answers()?.last().is_some_and(|last| last.time > back + 1.0).then_some(()))
    })?;
    let answers = voyage.answers()?;
    let gap = answers.windows(2).find(|pair| pair[1].number != pair[0].number + 1);
    ensure!(gap.is_none(), "log lines are lost or doubled: {gap:?}");
    let failed = failures(&answers, killed, seconds_now());
    ensure!(failed.is_empty(), "requests failed: {failed:?}");
    let pods = ready_replicas(voyage)?;
    ensure!(identity(voyage)? == before, "a container was restarted: {before:?} became {:?}", identity(voyage)?);
    ensure!(pods.iter().all(PodView::is_ready), "a pod lost its readiness");
    Ok(format!("{} containers untouched, {} log lines without a gap", before.len(), answers.len()))
}

/// 7. Ctrl-C: preStop, SIGTERM, and nothing left.
pub(super) fn interrupt(voyage: &mut Voyage) -> anyhow::Result<String> {
    let pod = ready_replicas(voyage)?.remove(0);
    let log = voyage.stage.dir.path().join("last-words.log");
    let mut follower = voyage.beside(&["logs", "-f", "--tail", "1", pod.name()], &log)?;
    wait("the follower is connected", Duration::from_secs(10), || {
        Ok((std::fs::metadata(&log)?.len() > 0).then_some(()))
    })?;
    let pid = i32::try_from(voyage.up.id())?;
    let pid = rustix::process::Pid::from_raw(pid).context("a process id")?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let status = wait("orlop up ends", Duration::from_secs(60), || Ok(voyage.up.try_wait()?))?;
    ensure!(status.success(), "orlop up ended with {status}");
    let _ = follower.kill(); // it has ended with the node, or will now
    follower.wait()?;
    let words = std::fs::read_to_string(&log)?;
    for expected in ["preStop", "Shutting down"] {
        ensure!(words.contains(expected), "the pod's last words miss {expected:?}: {words:?}");
    }
    let fsck = voyage.orlop(&["fsck"])?;
    ensure!(fsck.is_empty(), "orlop fsck prints:\n{fsck}");
    let left = leftovers::since(&voyage.before, voyage.stage.dir.path())?;
    if !left.is_empty() {
        bail!("left behind:\n  {}", left.join("\n  "));
    }
    Ok("preStop and SIGTERM were seen, nothing is left".to_owned())
}
