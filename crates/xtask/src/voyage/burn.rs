//! A busy container and its neighbour, on one processor: what each of them gets.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use testkit::pace;

use super::observe::{PodView, http};
use super::points::{PORT, ready_replicas, seconds_now};
use super::{Voyage, wait};

/// Processes that want a processor each. On the neighbour's, without limit and share, they would leave it a fifth.
const BURNERS: usize = 4;

/// How often the neighbour is alone and then not, in turn: what else happens on the machine meets both alike.
const TURNS: usize = 6;

/// While others use the machine as well, so many turns are taken at most.
const TURNS_MAX: usize = 24;

/// How much of its throughput the neighbour may lose, in percent.
const LOSS: f64 = 10.0;

/// 5. A busy container is held at its limit; the neighbour keeps its share, also of one processor for both.
pub(super) fn burn(voyage: &mut Voyage) -> anyhow::Result<String> {
    let pod = ready_replicas(voyage)?.remove(0);
    let seconds = pace::stretched(Duration::from_secs(300)).as_secs();
    for _ in 0..BURNERS {
        http("POST", (pod.address()?, PORT).into(), &format!("/burn?seconds={seconds}"))?;
    }
    let usage = wait("the busy container is throttled", Duration::from_secs(20), || {
        let usage = usage(voyage, pod.name())?;
        Ok((number(&usage, "throttledPercent") > 10.0).then_some(usage))
    })?;
    check_limited(&usage)?;
    signal(voyage, pod.name(), "STOP")?;
    for pod in ["neighbour", pod.name()] {
        pin(voyage, pod, "{max(os.sched_getaffinity(0))}")?;
    }
    let loss = loss_beside(voyage, &pod)?;
    signal(voyage, pod.name(), "KILL")?;
    let unprotected = loss_without_border(voyage)?;
    ensure!(
        unprotected > 3.0 * LOSS,
        "the neighbour lost {unprotected:.1} % to processes of its own: nobody competed for its processor"
    );
    for pod in ["neighbour", pod.name()] {
        pin(voyage, pod, "range(os.cpu_count())")?;
    }
    Ok(format!(
        "cpu {}m of {}m, throttled in {:.0} % of periods; the neighbour lost {:.1} %, and {unprotected:.0} % to as many of its own",
        usage["cpuMilli"],
        usage["cpuLimitMilli"],
        number(&usage, "throttledPercent"),
        loss.max(0.0)
    ))
}

/// Has all processes of a pod's container, and what they start from now on, run on these processors.
fn pin(voyage: &Voyage, pod: &str, processors: &str) -> anyhow::Result<()> {
    let program = format!(
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    os.sched_setaffinity(int(pid), {processors})"
    );
    voyage.orlop(&["exec", pod, "--", "python3", "-c", &program]).map(drop)
}

/// Its limit is 500m. What is measured over a second may have a scheduler's period of a tenth more in it.
fn check_limited(usage: &Value) -> anyhow::Result<()> {
    let (used, limit) = (number(usage, "cpuMilli"), number(usage, "cpuLimitMilli"));
    ensure!(limit == 500.0 && used < 1.2 * limit, "top says {usage} of the busy container");
    Ok(())
}

/// Sends a signal to the busy processes. The pattern does not find the shell that has it in its words.
fn signal(voyage: &Voyage, pod: &str, signal: &str) -> anyhow::Result<()> {
    let script = format!(
        "for one in /proc/[0-9]*; do grep -qs 'while Tru[e]' $one/cmdline && kill -{signal} ${{one#/proc/}}; done; true"
    );
    voyage.orlop(&["exec", pod, "--", "sh", "-c", &script]).map(drop)
}

/// How many percent of its share the neighbour loses to the busy processes, which rest now and at the end.
fn loss_beside(voyage: &Voyage, pod: &PodView) -> anyhow::Result<f64> {
    let (mut quiet, mut busy) = (Vec::new(), Vec::new());
    for turn in 1..=TURNS_MAX {
        quiet.extend(neighbour_shares(voyage)?);
        signal(voyage, pod.name(), "CONT")?;
        busy.extend(neighbour_shares(voyage)?);
        check_limited(&usage(voyage, pod.name())?)?;
        signal(voyage, pod.name(), "STOP")?;
        let loss = 100.0 * (1.0 - median(&busy) / median(&quiet));
        if turn >= TURNS && loss < LOSS {
            return Ok(loss);
        }
    }
    bail!("the neighbour lost too much: {:.0} beside the busy container, {:.0} alone", median(&busy), median(&quiet))
}

/// What `top` says of a pod with one container.
fn usage(voyage: &Voyage, pod: &str) -> anyhow::Result<Value> {
    let usages: Vec<Value> = serde_json::from_str(&voyage.orlop(&["top", "-o", "json"])?)?;
    usages.into_iter().find(|usage| usage["pod"] == pod).context("top does not show the pod")
}

fn number(usage: &Value, name: &str) -> f64 {
    usage[name].as_f64().unwrap_or(0.0)
}

/// How many percent the neighbour loses to as many processes in its own container, where no limit and no share is between
/// them: that it is the pods' border that keeps its throughput.
fn loss_without_border(voyage: &Voyage) -> anyhow::Result<f64> {
    let program = format!(
        "import os, time\nos.sched_setaffinity(0, os.sched_getaffinity(1))\nos.fork(); os.fork()\nprint(flush=True)\n\
         end = time.monotonic() + {}\nwhile time.monotonic() < end: pass",
        pace::stretched(Duration::from_secs(15)).as_secs()
    );
    let quiet = median(&neighbour_throughputs(voyage)?);
    let output = voyage.stage.dir.path().join("own-burners");
    let mut burners = voyage.beside(&["exec", "neighbour", "--", "python3", "-c", &program], &output)?;
    wait("the neighbour's own processes run", Duration::from_secs(10), || {
        Ok((std::fs::read(&output)?.len() == BURNERS).then_some(()))
    })?;
    let busy = median(&neighbour_throughputs(voyage)?);
    ensure!(burners.try_wait()?.is_none(), "the neighbour's own processes ended early");
    burners.wait()?;
    Ok(100.0 * (1.0 - busy / quiet))
}

/// What the neighbour has of the machine from now on. How much it gets done with its time is the host's matter where that is
/// shared by emulated processors: there its time counts.
fn neighbour_shares(voyage: &Voyage) -> anyhow::Result<Vec<f64>> {
    if pace::is_slow() {
        return Ok(vec![number(&usage(voyage, "neighbour")?, "cpuMilli")]);
    }
    neighbour_throughputs(voyage)
}

/// The neighbour's throughput in its next samples, of half a second each.
fn neighbour_throughputs(voyage: &Voyage) -> anyhow::Result<Vec<f64>> {
    const SAMPLES: usize = 3;
    let from = seconds_now();
    wait("the neighbour reports", Duration::from_secs(20), || {
        let text = voyage.orlop(&["logs", "neighbour", "--tail", "20"])?;
        // A sample that began before shows what was before, too.
        let samples = text.lines().filter_map(parse_sample).filter(|(time, _)| *time > from).skip(1);
        let rates: Vec<f64> = samples.map(|(_, rate)| rate).collect();
        Ok((rates.len() >= SAMPLES).then_some(rates))
    })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn parse_sample(line: &str) -> Option<(f64, f64)> {
    let (time, rate) = line.strip_prefix("time=")?.split_once(" rounds_per_second=")?;
    Some((time.parse().ok()?, rate.parse().ok()?))
}
