//! Kubeconfigs as kubeadm writes them: all they refer to is inside. JSON is YAML, too.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::certificates::Pair;

/// The user of a kubeconfig who shows a certificate.
pub(super) fn certificate(pair: &Pair) -> anyhow::Result<Value> {
    Ok(json!({
        "client-certificate-data": encoded(&pair.certificate)?,
        "client-key-data": encoded(&pair.key)?,
    }))
}

/// The user of a kubeconfig who shows a token.
pub(super) fn token(token: &str) -> Value {
    json!({ "token": token })
}

/// The kubeconfig of `user` for the API server at `address`.
pub(super) fn text(address: SocketAddr, authority: &Path, user: &Value) -> anyhow::Result<String> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "lab", "cluster": {
            "server": format!("https://{address}"), "certificate-authority-data": encoded(authority)?,
        } }],
        "users": [{ "name": "user", "user": user }],
        "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": "user" } }],
        "current-context": "lab",
    });
    Ok(serde_json::to_string_pretty(&config)?)
}

fn encoded(file: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    Ok(STANDARD.encode(bytes))
}
