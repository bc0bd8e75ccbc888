//! `orlop top`: what containers use, against their limits, and how long they were throttled.

use serde::{Deserialize, Serialize};

use super::client::Client;
use super::format::{Table, bytes, print, print_machine};
use crate::args::TopOptions;

/// One container's figures, as the node measures them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Usage {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) container: String,
    /// CPU over the last interval, in thousandths of a core.
    pub(crate) cpu_milli: u64,
    /// The limit in the same unit.
    pub(crate) cpu_limit_milli: Option<u64>,
    /// Share of the scheduler's periods in which the container was held back, in percent.
    pub(crate) throttled_percent: f64,
    /// Time it was held back since it started, in milliseconds.
    pub(crate) throttled_ms: u64,
    /// Working set in bytes.
    pub(crate) memory_bytes: u64,
    /// The limit in bytes.
    pub(crate) memory_limit_bytes: Option<u64>,
    /// Processes killed for want of memory.
    pub(crate) oom_kills: u64,
    /// Processes.
    pub(crate) processes: u64,
}

/// Prints the table once, or each second with `--watch`.
pub(crate) async fn run(client: &Client, options: &TopOptions) -> anyhow::Result<()> {
    loop {
        let query =
            if options.all_namespaces { String::new() } else { format!("?namespace={}", options.namespace.namespace) };
        let usages: Vec<Usage> = client.get(&format!("/orlop/v1/top{query}")).await?;
        if !print_machine(options.output.output, &usages)? {
            let clear = if options.watch { "\x1b[2J\x1b[H" } else { "" };
            print(&format!("{clear}{}", table(&usages, options.all_namespaces).render()));
        }
        if !options.watch {
            return Ok(());
        }
        // The node itself measures over one second before it answers: this loop is paced by it.
    }
}

fn table(usages: &[Usage], namespace: bool) -> Table {
    let mut heads = vec!["POD", "CONTAINER", "CPU", "LIMIT", "THROTTLED", "MEMORY", "LIMIT", "OOM KILLS", "PROCESSES"];
    if namespace {
        heads.insert(0, "NAMESPACE");
    }
    let mut table = Table::new(&heads);
    for usage in usages {
        let mut row = vec![
            usage.pod.clone(),
            usage.container.clone(),
            format!("{}m", usage.cpu_milli),
            usage.cpu_limit_milli.map_or("-".to_owned(), |limit| format!("{limit}m")),
            format!("{:.0}% ({:.1}s)", usage.throttled_percent, usage.throttled_ms as f64 / 1000.0),
            bytes(usage.memory_bytes),
            usage.memory_limit_bytes.map_or("-".to_owned(), bytes),
            usage.oom_kills.to_string(),
            usage.processes.to_string(),
        ];
        if namespace {
            row.insert(0, usage.namespace.clone());
        }
        table.push(row);
    }
    table
}
