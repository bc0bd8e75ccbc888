//! Container runtimes over their CRI sockets.

mod bundle;
mod log;
mod sections;
mod side;
mod work;

use std::path::Path;

use anyhow::Context as _;

use crate::arguments::{RuntimeArguments, Section, SideName};
use crate::inside::IMAGE;
use crate::measure::Results;

use side::Side;
use work::Work;

pub(crate) use sections::LARGE;

/// Measures one side; called by [`crate::inside`].
pub(crate) fn run(name: SideName, arguments: &RuntimeArguments, scratch: &Path) -> anyhow::Result<Results> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(name, arguments, scratch))
}

async fn measure(name: SideName, arguments: &RuntimeArguments, scratch: &Path) -> anyhow::Result<Results> {
    let mut side = Side::start(name, &arguments.common, scratch)?;
    let cgroup_parent = scratch.file_name().and_then(|name| name.to_str()).context("the run has a name")?.to_owned();
    let work = Work::new(side.client()?, cgroup_parent, scratch.join("logs"));
    let measured = async {
        side.wait_ready(&work).await?;
        work.pull(IMAGE).await?;
        let mut results = sections::run(side.crew(), &work, &arguments.section).await?;
        if arguments.section.contains(&Section::Log) {
            log::run(&side, &work, &mut results).await?;
        }
        if arguments.section.contains(&Section::Bundle) {
            bundle::run(name, &arguments.common, scratch, &mut results)?;
        }
        anyhow::Ok(results)
    };
    match measured.await {
        Ok(results) => side.stop().map(|()| results),
        Err(error) => Err(error).with_context(|| format!("{}; its log ends with:\n{}", name.word(), side.log_tail())),
    }
}
