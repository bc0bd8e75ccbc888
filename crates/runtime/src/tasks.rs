//! What cAdvisor is told of sandboxes and containers, see [`cri::server::Tasks`].

use cri::server::{Process, Task, Tasks};

use crate::container::{Container, Phase};
use crate::runtime::Runtime;
use crate::sandbox::{self, Sandbox};

/// What stands where containerd's sandboxes have the image of their first process. Who shows pods as a whole leaves out what
/// has no image.
const KEEPER: &str = "orlop/keeper";

impl Tasks for Runtime {
    fn task(&self, id: &str) -> Option<Task> {
        let (sandbox, container) = self.core().table.every(id)?;
        Some(match container {
            Some(container) => of_container(&sandbox, &container),
            None => of_sandbox(&sandbox),
        })
    }
}

fn of_sandbox(sandbox: &Sandbox) -> Task {
    let (phase, keeper) = {
        let live = sandbox.live();
        (live.phase, live.keeper_pid)
    };
    let process = match phase {
        sandbox::Phase::NotReady | sandbox::Phase::Gone => Process::Ended(0),
        _ if keeper == 0 => Process::None,
        _ => Process::Runs(Some(keeper).filter(|keeper| sandbox.host_network() || has_own_network(*keeper))),
    };
    Task {
        labels: sandbox.config.labels.clone(),
        image: KEEPER.to_owned(),
        sandbox: None,
        created_at: sandbox.created_at,
        process,
    }
}

/// Keepers of an earlier release are in the host's network, and those whose containers another runtime makes: the host's
/// interfaces must not be shown as the pod's.
fn has_own_network(keeper: u32) -> bool {
    let network = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    network(&keeper.to_string()) != network("self")
}

fn of_container(sandbox: &Sandbox, container: &Container) -> Task {
    let record = container.record().clone();
    let process = match (container.phase(), container.live().pid) {
        (Phase::Exited, _) => Process::Ended(record.end.map_or(0, |end| end.exit_code)),
        (_, Some(pid)) => Process::Runs(Some(pid)),
        (_, None) => Process::None,
    };
    let config = record.config.unwrap_or_default();
    let image = config.image.unwrap_or_default();
    Task {
        labels: config.labels,
        image: if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image },
        sandbox: Some(sandbox.id.clone()),
        created_at: record.created_at,
        process,
    }
}
