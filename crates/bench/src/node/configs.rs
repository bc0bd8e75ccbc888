//! How long an edited ConfigMap takes into the pods that have it as a volume.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::processes;

use super::watcher::Stage;
use super::work::{Extras, Work};

/// Pods, each with a ConfigMap of its own.
const PODS: usize = 5;
/// How often all of them are edited. Between two edits each pod waits for the slowest, so that upstream's periodic looks
/// at volumes are at different points when the next edit comes.
const EDITS: usize = 3;
/// Upstream looks every 60 to 90 s, and its cache may be as old.
const LIMIT: Duration = Duration::from_secs(240);
/// How exactly the time is taken: the file is read this often.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A pod that has a ConfigMap as its volume.
struct Reader {
    config: String,
    /// The key's file, through the root directory of a process of the pod.
    file: PathBuf,
}

/// The time of each edit until each pod's process can read it.
pub(super) fn measure(work: &mut Work) -> anyhow::Result<Vec<Duration>> {
    let readers = (0..PODS).map(|number| Reader::start(work, number)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut times = Vec::new();
    for edit in 1..=EDITS {
        times.extend(one_edit(work, &readers, &format!("edit {edit}"))?);
    }
    Ok(times)
}

fn one_edit(work: &Work, readers: &[Reader], text: &str) -> anyhow::Result<Vec<Duration>> {
    let names: Vec<&str> = readers.iter().map(|reader| reader.config.as_str()).collect();
    let begin = work.edit_configs(&names, &json!({ "word": text }))?;
    let (mut waiting, mut times): (Vec<&Reader>, _) = (readers.iter().collect(), Vec::new());
    while !waiting.is_empty() {
        ensure!(begin.elapsed() < LIMIT, "{} pods have not got {text:?} after {} s", waiting.len(), LIMIT.as_secs());
        waiting.retain(|reader| {
            let has_come = std::fs::read_to_string(&reader.file).is_ok_and(|content| content == text);
            times.extend(has_come.then(|| begin.elapsed()));
            !has_come
        });
        std::thread::sleep(LOOK_EVERY); // observed from outside, as the application would
    }
    Ok(times)
}

impl Reader {
    fn start(work: &mut Work, number: usize) -> anyhow::Result<Self> {
        let config = format!("settings-{number}");
        work.create_config(&config, &json!({ "word": "before" }))?;
        let extras = Extras {
            volumes: vec![json!({ "name": "settings", "configMap": { "name": config } })],
            mounts: vec![json!({ "name": "settings", "mountPath": "/settings" })],
        };
        let (pods, _) = work.create(1, Stage::Running, &extras)?;
        let root = pods.first().and_then(|pod| processes::root_of(pod)).context("find the process of a pod")?;
        Ok(Self { config, file: root.join("settings/word") })
    }
}
