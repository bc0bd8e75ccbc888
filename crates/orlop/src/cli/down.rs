//! `orlop down`: ends every pod and then the node.

use http::Method;

use super::client::Client;

/// Asks the node to end and waits until nothing of it is left.
pub(crate) async fn run(client: &Client) -> anyhow::Result<()> {
    client.call::<()>(Method::POST, "/orlop/v1/down").await
}
