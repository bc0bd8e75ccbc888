//! The seven points. Each returns a sentence on what was seen.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::observe::{Answer, PodView, http, resolve};
use super::{Voyage, leftovers, wait};

const REPLICAS: usize = 2;
pub(super) const PORT: u16 = 8000;

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

pub(super) fn ready_replicas(voyage: &Voyage) -> anyhow::Result<Vec<PodView>> {
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
    let pods = ready_replicas(voyage)?;
    let (pod, other) = (&pods[0], &pods[1]);
    // It never answers: that is the point.
    let _ = http("POST", SocketAddr::new(pod.address()?, PORT), "/deadlock");
    wait("the deadlocked pod is not Ready", Duration::from_secs(60), || {
        Ok((!voyage.pod(pod.name())?.is_ready()).then_some(()))
    })?;
    let left = seconds_now();
    let restarted = wait("the deadlocked container runs again", Duration::from_secs(150), || {
        let pod = voyage.pod(pod.name())?;
        Ok((pod.restarts() > 0 && pod.is_running()).then_some(pod))
    })?;
    let took = seconds_now() - left;
    ensure!(restarted.restarts() == 1 && !restarted.is_ready(), "it runs again as {}", restarted.container());
    let ended = restarted.last_end();
    ensure!(ended["exitCode"] == 137, "it hangs and can only be killed, but ended as {ended}");
    check_deadlock_events(&voyage.events(pod.name())?)?;
    ready_replicas(voyage)?;
    let back = seconds_now();
    let answers = wait("the restarted replica answers the client", Duration::from_secs(30), || {
        let answers = voyage.answers()?;
        let is_back = |answer: &Answer| answer.time > back && answer.result.as_deref() == Ok(pod.name());
        Ok(answers.iter().any(is_back).then_some(answers))
    })?;
    let failed = failures(&answers, left, seconds_now());
    ensure!(failed.is_empty(), "requests failed after the pod had left the service: {failed:?}");
    let alone = answered(&answers, left, left + took);
    ensure!(!alone.is_empty(), "the client asked nothing while the pod was away");
    let wrong = alone.iter().find(|answer| answer.result.as_deref() != Ok(other.name()));
    ensure!(wrong.is_none(), "not {} answered while {} was away: {wrong:?}", other.name(), pod.name());
    Ok(format!("restarted {took:.0} s after it left the service, none of {} requests failed", alone.len()))
}

/// What became of the pod, in the order in which it has to have happened.
fn check_deadlock_events(events: &[(String, String)]) -> anyhow::Result<()> {
    const STORY: [(&str, &str); 3] = [
        ("Unhealthy", "Readiness probe failed"),
        ("Unhealthy", "Liveness probe failed"),
        ("Killing", "failed liveness probe, will be restarted"),
    ];
    let mut rest = events.iter();
    for (reason, text) in STORY {
        let is_told = rest.any(|(of, message)| of == reason && message.contains(text));
        ensure!(is_told, "no event {reason} with {text:?}, or not in this order: {events:?}");
    }
    Ok(())
}

pub(super) fn seconds_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Of requests that began in this time.
fn answered(answers: &[Answer], from: f64, to: f64) -> Vec<Answer> {
    answers.iter().filter(|answer| answer.time > from && answer.time < to).cloned().collect()
}

pub(super) fn failures(answers: &[Answer], from: f64, to: f64) -> Vec<Answer> {
    answered(answers, from, to).into_iter().filter(|answer| answer.result.is_err()).collect()
}

/// 4. A leak: OOMKilled with exit code 137, a restart at once, then back-offs of 10 s and of 20 s.
pub(super) fn leak(voyage: &mut Voyage) -> anyhow::Result<String> {
    let pod = ready_replicas(voyage)?.remove(1);
    start_leak(voyage, pod.name())?;
    restarted_after_leak(voyage, &pod, 1)?;
    for (count, back_off) in [(2, 10), (3, 20)] {
        start_leak(voyage, pod.name())?;
        let waiting = wait("the next leak ends in CrashLoopBackOff", Duration::from_secs(60), || {
            let waiting = voyage.pod(pod.name())?.container()["state"]["waiting"].clone();
            Ok((waiting["reason"] == "CrashLoopBackOff").then_some(waiting))
        })?;
        let message = waiting["message"].as_str().unwrap_or_default();
        ensure!(message.contains(&format!("back-off {back_off}s restarting")), "the back-off says {waiting}");
        let rested = restarted_after_leak(voyage, &pod, count)?;
        // Upstream counts from the end of the run before; both times are told in whole seconds.
        ensure!(rested >= back_off, "it waited {rested} s and not {back_off}");
    }
    let events = voyage.events(pod.name())?;
    let is_told = |(reason, message): &(String, String)| {
        reason == "BackOff" && message.starts_with("Back-off restarting failed container")
    };
    ensure!(events.iter().any(is_told), "no event tells of the back-off: {events:?}");
    ready_replicas(voyage)?;
    Ok("OOMKilled (137) three times: restarted at once, after 10 s, and after 20 s".to_owned())
}

fn start_leak(voyage: &Voyage, pod: &str) -> anyhow::Result<()> {
    let address = SocketAddr::new(voyage.pod(pod)?.address()?, PORT);
    wait("the leak begins", LOADED, || http("POST", address, "/leak").map(Some)).map(drop)
}

/// Waits for the restart after the leak with this number, and returns how many seconds the container rested before it.
fn restarted_after_leak(voyage: &Voyage, before: &PodView, count: u64) -> anyhow::Result<i64> {
    let pod = wait("the leak is killed and restarted", Duration::from_secs(90), || {
        let pod = voyage.pod(before.name())?;
        Ok((pod.restarts() > before.restarts() + count - 1 && pod.is_running()).then_some(pod))
    })?;
    ensure!(pod.restarts() == before.restarts() + count, "leak {count} has led to {} restarts", pod.restarts());
    let ended = pod.last_end();
    ensure!(ended["reason"] == "OOMKilled" && ended["exitCode"] == 137, "the container ended as {ended}");
    let time = |value: &Value| -> anyhow::Result<jiff::Timestamp> {
        Ok(value.as_str().context("a container's state has no time")?.parse()?)
    };
    let started = time(&pod.container()["state"]["running"]["startedAt"])?;
    Ok(started.as_second() - time(&ended["finishedAt"])?.as_second())
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
