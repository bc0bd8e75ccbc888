//! `orlop version`: of the program, and of the node if one runs.

use kubelet::KUBERNETES;
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::format::{print, print_machine};
use crate::args::OutputOptions;

/// Versions of one side.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Version {
    /// Of orlop.
    pub(crate) orlop: String,
    /// The Kubernetes release whose API it speaks.
    pub(crate) kubernetes: String,
    /// Of the CRI.
    pub(crate) cri: String,
}

impl Version {
    /// Of this program.
    pub(crate) fn own() -> Self {
        Self { orlop: env!("CARGO_PKG_VERSION").to_owned(), kubernetes: KUBERNETES.to_owned(), cri: "v1".to_owned() }
    }
}

#[derive(Debug, Serialize)]
struct Both {
    client: Version,
    node: Option<Version>,
}

/// Prints both.
pub(crate) async fn run(client: &Client, options: &OutputOptions) -> anyhow::Result<()> {
    let node = client.get("/orlop/v1/version").await.ok();
    let both = Both { client: Version::own(), node };
    if print_machine(options.output, &both)? {
        return Ok(());
    }
    print(&line("client", &both.client));
    match &both.node {
        Some(node) => print(&line("node", node)),
        None => print(&format!("node: none answers on {}\n", client.socket().display())),
    }
    Ok(())
}

fn line(side: &str, version: &Version) -> String {
    format!("{side}: orlop {}, Kubernetes {}, CRI {}\n", version.orlop, version.kubernetes, version.cri)
}
