//! `orlop logs`: a container's log as the node reads it, across rotations.

use anyhow::Context as _;
use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;

use super::client::Client;
use super::format::parse_duration;
use super::{container_of, find_pod};
use crate::args::LogsOptions;

/// Prints the log; with `--follow` until the container ends.
pub(crate) async fn run(client: &Client, options: &LogsOptions) -> anyhow::Result<()> {
    let pod = find_pod(client, &options.pod.namespace.namespace, &options.pod.pod).await?;
    let container = container_of(&pod, options.container.as_deref())?;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let path = format!("/containerLogs/{}/{name}/{container}?{}", options.pod.namespace.namespace, query(options)?);
    let mut body = client.request(Method::GET, &path, Bytes::new()).await?.into_body();
    let mut stdout = std::io::stdout();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.context("the node went away")?.into_data() {
            let written =
                std::io::Write::write_all(&mut stdout, &data).and_then(|()| std::io::Write::flush(&mut stdout));
            if written.is_err() {
                return Ok(()); // the reader has seen enough
            }
        }
    }
    Ok(())
}

/// The query of upstream's kubelet API.
fn query(options: &LogsOptions) -> anyhow::Result<String> {
    let mut parts = vec![format!("follow={}", options.follow), format!("previous={}", options.previous)];
    parts.push(format!("timestamps={}", options.timestamps));
    if let Some(tail) = options.tail.filter(|tail| *tail >= 0) {
        parts.push(format!("tailLines={tail}"));
    }
    if let Some(since) = &options.since {
        parts.push(format!("sinceSeconds={}", parse_duration(since)?));
    }
    if let Some(limit) = options.limit_bytes {
        parts.push(format!("limitBytes={limit}"));
    }
    Ok(parts.join("&"))
}
