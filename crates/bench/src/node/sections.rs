//! The sections of a run, in their order.

use std::time::Duration;

use crate::arguments::{NodeArguments, NodeSection};
use crate::measure::{Measure, Results};
use crate::processes::{Crew, Role};

use super::configs;
use super::watcher::Stage;
use super::work::{Extras, Work};

/// Pods that are not counted: the first one pulls the image.
const WARM_UP: usize = 3;
/// What a burst of work leaves to be done in the background is not idling.
const SETTLE: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(30);

/// Runs the wanted sections.
pub(super) fn run(crew: &Crew, work: &mut Work, arguments: &NodeArguments) -> anyhow::Result<Results> {
    let wants = |section: NodeSection| arguments.section.contains(&section);
    let mut results = Results::default();
    for _ in 0..WARM_UP {
        let (pods, _) = work.create(1, Stage::Ready, &Extras::default())?;
        work.delete(&pods)?;
    }
    if wants(NodeSection::Pod) {
        one_after_the_other(work, arguments.pods, &mut results)?;
    }
    if wants(NodeSection::Many) || wants(NodeSection::Idle) {
        many(crew, work, arguments.many, wants(NodeSection::Idle), &mut results)?;
    }
    if wants(NodeSection::Config) {
        eprintln!("  edits of ConfigMaps");
        configs::measure(work)?.iter().for_each(|took| results.add(Measure::ConfigMap, took.as_secs_f64()));
    }
    Ok(results)
}

fn one_after_the_other(work: &mut Work, count: usize, results: &mut Results) -> anyhow::Result<()> {
    eprintln!("  {count} pods one after the other");
    let mut pods = Vec::new();
    for _ in 0..count {
        let (one, took) = work.create(1, Stage::Running, &Extras::default())?;
        results.add_ms(Measure::PodRunning, took);
        pods.push(one);
    }
    eprintln!("  their end");
    for one in &pods {
        results.add_ms(Measure::PodGone, work.delete(one)?);
    }
    Ok(())
}

fn many(crew: &Crew, work: &mut Work, count: usize, idle: bool, results: &mut Results) -> anyhow::Result<()> {
    results.add(Measure::NodeEmpty, crew.memory_mb(Role::Daemon));
    eprintln!("  {count} pods at once");
    let (pods, took) = work.create(count, Stage::Ready, &Extras::default())?;
    results.add(Measure::PodsReady, took.as_secs_f64());
    if idle {
        eprintln!("  {} s of idling", IDLE.as_secs());
        std::thread::sleep(SETTLE);
        let meter = crew.meter();
        std::thread::sleep(IDLE);
        results.add(Measure::NodeIdleCpu, crew.percent_since(meter));
    }
    results.add(Measure::NodeFull, crew.memory_mb(Role::Daemon));
    #[expect(clippy::cast_precision_loss, reason = "a hundred")]
    results.add(Measure::PerPodOfNode, crew.memory_mb(Role::PerPod) / count as f64);
    work.delete(&pods).map(drop)
}
