//! The handlers that the operator has configured, and what each can do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cri::v1;
use futures_util::future::join_all;
use serde::Deserialize;

use super::{COMMAND_MAX, Driver};
use crate::config::HandlerConfig;
use crate::core::patient;
use crate::info;
use crate::program::{self, Call};

/// All of them, by name.
#[derive(Debug, Default)]
pub(crate) struct Handlers(BTreeMap<String, Handler>);

/// One of them.
#[derive(Debug, Clone)]
pub(crate) struct Handler {
    program: PathBuf,
    arguments: Vec<String>,
    pub(crate) features: v1::RuntimeHandlerFeatures,
}

/// What `features` answers (the specification's features.md), as far as CRI has words for it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Features {
    mount_options: Vec<String>,
    linux: LinuxFeatures,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LinuxFeatures {
    namespaces: Vec<String>,
}

impl Handlers {
    /// Asks each of them what it can do. One that gives no answer can do nothing beyond the ordinary.
    pub(crate) async fn ask(configured: &[HandlerConfig]) -> Self {
        let asked = configured.iter().map(|one| async {
            let features = features(one).await.unwrap_or_else(|error| {
                tracing::info!(handler = one.name, error, "a runtime does not tell its features");
                Features::default()
            });
            let features = v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: features.mount_options.iter().any(|option| option == "rro"),
                // Files are mapped before it sees them, so nothing more is asked of it.
                user_namespaces: info::has_user_namespaces()
                    && features.linux.namespaces.iter().any(|namespace| namespace == "user"),
            };
            let handler = Handler { program: one.path.clone(), arguments: one.arguments.clone(), features };
            (one.name.clone(), handler)
        });
        Self(join_all(asked).await.into_iter().collect())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Handler> {
        self.0.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Handler)> {
        self.0.iter()
    }
}

impl Handler {
    /// The runtime for a sandbox.
    pub(crate) fn driver(&self, place: &Path) -> Driver {
        Driver { program: self.program.clone(), arguments: self.arguments.clone(), place: place.to_owned() }
    }
}

async fn features(of: &HandlerConfig) -> Result<Features, String> {
    let call = Call {
        program: of.path.clone(),
        arguments: of.arguments.iter().cloned().chain(["features".to_owned()]).collect(),
        environment: vec![program::PATH.to_owned()],
        directory: "/".into(),
        input: Vec::new(),
        limit: COMMAND_MAX,
    };
    let output = patient(move || program::run(&call)).await.map_err(|error| error.to_string())?;
    let output = output.map_err(|error| error.to_string())?;
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}
