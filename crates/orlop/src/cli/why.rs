//! `orlop why`: what a pod waits for, and where the time of its start went.

use serde::{Deserialize, Serialize};

use super::client::Client;
use super::find_pod;
use super::format::{Table, print};
use crate::args::PodOptions;

/// The node's answer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Why {
    /// What it waits for now, with the cause; absent when it waits for nothing.
    pub(crate) waiting: Option<Wait>,
    /// The steps of its start, in the order in which they began.
    pub(crate) steps: Vec<Step>,
}

/// One wait.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Wait {
    /// What for, as `image pull` or `startup probe of ai-service`.
    pub(crate) step: String,
    /// Why, in one sentence with the remedy if there is one.
    pub(crate) cause: String,
    /// For how long already, in milliseconds.
    pub(crate) for_ms: u64,
}

/// One step of a start.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Step {
    pub(crate) name: String,
    /// Begin, in milliseconds after the pod was first seen.
    pub(crate) begin_ms: f64,
    /// Length in milliseconds; absent while it goes on.
    pub(crate) length_ms: Option<f64>,
}

/// Columns of the waterfall.
const WIDTH: f64 = 40.0;

/// Prints the answer.
pub(crate) async fn run(client: &Client, options: &PodOptions) -> anyhow::Result<()> {
    let pod = find_pod(client, &options.namespace.namespace, &options.pod).await?;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let why: Why = client.get(&format!("/orlop/v1/why/{}/{name}", options.namespace.namespace)).await?;
    match &why.waiting {
        Some(wait) => {
            print(&format!("{name} waits for {} ({:.1} s): {}\n", wait.step, wait.for_ms as f64 / 1000.0, wait.cause))
        }
        None => print(&format!("{name} waits for nothing: {}\n", super::ps::status_text(&pod))),
    }
    if !why.steps.is_empty() {
        print(&format!("\n{}", waterfall(&why.steps)));
    }
    Ok(())
}

fn waterfall(steps: &[Step]) -> String {
    let end = |step: &Step| step.begin_ms + step.length_ms.unwrap_or(0.0);
    let total = steps.iter().map(end).fold(1.0, f64::max);
    let mut table = Table::new(&["STEP", "BEGIN", "TOOK", ""]);
    for step in steps {
        let before = columns(step.begin_ms / total);
        let length = step.length_ms.map_or(1, |length| columns(length / total).max(1));
        let bar = format!("{}{}", " ".repeat(before), "#".repeat(length));
        let took = step.length_ms.map_or("…".to_owned(), |length| format!("{length:.1} ms"));
        table.push(vec![step.name.clone(), format!("+{:.1} ms", step.begin_ms), took, bar]);
    }
    table.render()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 40 columns")]
fn columns(share: f64) -> usize {
    (share.clamp(0.0, 1.0) * WIDTH) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waterfall_reads_left_to_right() {
        let step = |name: &str, begin_ms, length_ms| Step { name: name.into(), begin_ms, length_ms: Some(length_ms) };
        let text = waterfall(&[step("sandbox", 0.0, 5.0), step("start", 5.0, 5.0)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with(&"#".repeat(20)));
        assert!(lines[2].contains(&format!("{}{}", " ".repeat(20), "#".repeat(20))));
    }
}
