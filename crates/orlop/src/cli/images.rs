//! `orlop images`, `pull`, `load`, `rmi`.

use std::io::IsTerminal as _;
use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;
use cluster::percent::encode;
use http::Method;
use http_body_util::BodyExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::format::{Table, bytes, print, print_machine};
use crate::args::OutputOptions;

/// An image, as the node lists it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageRow {
    pub(crate) id: String,
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
    pub(crate) size_bytes: u64,
    pub(crate) pinned: bool,
}

/// A line of a pull's progress.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub(crate) enum PullLine {
    /// So many of so many bytes have come.
    Progress { done_bytes: u64, total_bytes: u64 },
    /// The image is there.
    Done { id: String },
    /// It could not be pulled.
    Failed { message: String },
}

/// Lists images.
pub(crate) async fn list(client: &Client, options: &OutputOptions) -> anyhow::Result<()> {
    let images: Vec<ImageRow> = client.get("/orlop/v1/images").await?;
    if print_machine(options.output, &images)? {
        return Ok(());
    }
    let mut table = Table::new(&["IMAGE", "ID", "SIZE", "PINNED"]);
    for image in &images {
        let nameless = ["<none>".to_owned()];
        let names = [&image.tags[..], &image.digests, &nameless].into_iter().find(|names| !names.is_empty());
        let id: String = image.id.trim_start_matches("sha256:").chars().take(12).collect();
        for name in names.unwrap_or_default() {
            table.push(vec![
                name.clone(),
                id.clone(),
                bytes(image.size_bytes),
                if image.pinned { "yes" } else { "" }.to_owned(),
            ]);
        }
    }
    if table.is_empty() {
        eprintln!("No images.");
    } else {
        print(&table.render());
    }
    Ok(())
}

/// Pulls an image, with a bar on a terminal.
pub(crate) async fn pull(client: &Client, image: &str) -> anyhow::Result<()> {
    let mut body = client
        .request(Method::POST, &format!("/orlop/v1/pull?image={}", encode(image)), Bytes::new())
        .await?
        .into_body();
    let bar = if std::io::stderr().is_terminal() { bar(image)? } else { ProgressBar::hidden() };
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.context("the node went away during the pull")?.into_data() else { continue };
        text.extend_from_slice(&data);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            match serde_json::from_slice(&line).context("the node's progress is of another version")? {
                PullLine::Progress { done_bytes, total_bytes } => {
                    bar.set_length(total_bytes);
                    bar.set_position(done_bytes);
                }
                PullLine::Done { id } => {
                    bar.finish_and_clear();
                    print(&format!("{id}\n"));
                    return Ok(());
                }
                PullLine::Failed { message } => {
                    bar.finish_and_clear();
                    anyhow::bail!("{message}");
                }
            }
        }
    }
    anyhow::bail!("the node ended the pull without a result; see its log")
}

fn bar(image: &str) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")?;
    Ok(ProgressBar::new(0).with_style(style).with_prefix(image.to_owned()))
}

/// Loads an archive or a layout.
pub(crate) async fn load(client: &Client, path: &Path) -> anyhow::Result<()> {
    let path = std::fs::canonicalize(path).with_context(|| format!("find {}", path.display()))?;
    let query = encode(&path.display().to_string());
    let loaded: Vec<String> = client.call(Method::POST, &format!("/orlop/v1/load?path={query}")).await?;
    loaded.iter().for_each(|name| print(&format!("Loaded {name}\n")));
    Ok(())
}

/// Removes an image.
pub(crate) async fn remove(client: &Client, image: &str) -> anyhow::Result<()> {
    let removed: Vec<String> =
        client.call(Method::DELETE, &format!("/orlop/v1/images?image={}", encode(image))).await?;
    removed.iter().for_each(|name| print(&format!("Removed {name}\n")));
    Ok(())
}
