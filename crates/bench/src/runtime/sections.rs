//! The sections of a run, in their order, each on what the one before has left.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::arguments::Section;
use crate::measure::{Measure, Results};
use crate::processes::{Crew, Role};

use super::work::{Pod, StartTimes, StopTimes, Work};

/// The image whose pull is measured.
pub(crate) const LARGE: &str = "docker.io/orlop/large:latest";

/// Pods that are started and stopped one after the other.
const PODS: usize = 40;
/// Starts that are not counted: page caches and lazily made things of both sides.
const WARM_UP: usize = 3;
const EXECS: usize = 100;
const MANY: usize = 100;
const IN_FLIGHT: usize = 10;
const PULLS: usize = 3;
/// What a burst of work leaves to be done in the background is not idling.
const SETTLE: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(30);

/// Runs the wanted sections.
pub(super) async fn run(crew: &Crew, work: &Work, wanted: &[Section]) -> anyhow::Result<Results> {
    let wants = |section: Section| wanted.contains(&section);
    let mut results = Results::default();
    results.add(Measure::DaemonEmpty, crew.memory_mb(Role::Daemon));
    if wants(Section::Pod) || wants(Section::Exec) || wants(Section::Stop) {
        one_after_the_other(work, wanted, &mut results).await?;
    }
    if wants(Section::Many) || wants(Section::Idle) {
        many(crew, work, wants(Section::Idle), &mut results).await?;
    }
    if wants(Section::Pull) {
        pull(work, &mut results).await?;
    }
    Ok(results)
}

async fn one_after_the_other(work: &Work, wanted: &[Section], results: &mut Results) -> anyhow::Result<()> {
    for _ in 0..WARM_UP {
        let (pod, _) = work.start().await?;
        work.stop(&pod).await?;
    }
    eprintln!("  {PODS} pods one after the other");
    let mut pods: Vec<Pod> = Vec::new();
    for _ in 0..PODS {
        let (pod, times) = work.start().await?;
        add_start(times, results);
        pods.push(pod);
    }
    if wanted.contains(&Section::Exec) {
        eprintln!("  {EXECS} programs one after the other");
        let pod = pods.first().context("pods have been started")?;
        for _ in 0..EXECS {
            results.add_ms(Measure::ExecSync, work.exec(pod).await?);
        }
    }
    eprintln!("  their end");
    for pod in &pods {
        add_stop(work.stop(pod).await?, results);
    }
    Ok(())
}

fn add_start(times: StartTimes, results: &mut Results) {
    results.add_ms(Measure::RunPodSandbox, times.sandbox);
    results.add_ms(Measure::CreateContainer, times.create);
    results.add_ms(Measure::StartContainer, times.start);
    results.add_ms(Measure::PodStart, times.sandbox + times.create + times.start);
}

fn add_stop(times: StopTimes, results: &mut Results) {
    results.add_ms(Measure::StopPodSandbox, times.stop);
    results.add_ms(Measure::RemovePodSandbox, times.remove);
    results.add_ms(Measure::PodStop, times.stop + times.remove);
}

async fn many(crew: &Crew, work: &Work, idle: bool, results: &mut Results) -> anyhow::Result<()> {
    eprintln!("  {MANY} pods at once");
    let begin = Instant::now();
    let pods = work.start_many(MANY, IN_FLIGHT).await?;
    #[expect(clippy::cast_precision_loss, reason = "a hundred")]
    results.add(Measure::PodsPerSecond, MANY as f64 / begin.elapsed().as_secs_f64());
    if idle {
        eprintln!("  {} s of idling", IDLE.as_secs());
        tokio::time::sleep(SETTLE).await;
        let meter = crew.meter();
        tokio::time::sleep(IDLE).await;
        results.add(Measure::IdleCpu, crew.percent_since(meter));
    }
    results.add(Measure::DaemonFull, crew.memory_mb(Role::Daemon));
    #[expect(clippy::cast_precision_loss, reason = "a hundred")]
    results.add(Measure::PerPod, crew.memory_mb(Role::PerPod) / MANY as f64);
    work.stop_many(&pods, IN_FLIGHT).await
}

async fn pull(work: &Work, results: &mut Results) -> anyhow::Result<()> {
    eprintln!("  {PULLS} pulls of the large image");
    for _ in 0..PULLS {
        results.add(Measure::Pull, work.pull(LARGE).await?.as_secs_f64());
        work.remove_image(LARGE).await?;
    }
    Ok(())
}
