//! Clients with the gRPC of others, which name the socket in ways of their own: Go's, Java's, and that of C and C++ by Python.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use cri::{Error, ImageService, Items, RuntimeService, server, v1};
use futures_util::{StreamExt as _, stream};
use testkit::{callers, host};
use tokio_util::sync::CancellationToken;

/// A runtime with two containers.
struct Fake;

fn containers() -> Vec<v1::Container> {
    ["one", "two"].map(|id| v1::Container { id: id.to_owned(), created_at: 7, ..Default::default() }).into()
}

#[async_trait::async_trait]
impl RuntimeService for Fake {
    async fn version(&self, _: v1::VersionRequest) -> Result<v1::VersionResponse, Error> {
        Ok(v1::VersionResponse {
            runtime_name: "fake".to_owned(),
            runtime_api_version: "v1".to_owned(),
            ..Default::default()
        })
    }

    async fn list_containers(&self, _: v1::ListContainersRequest) -> Result<v1::ListContainersResponse, Error> {
        Ok(v1::ListContainersResponse { containers: containers() })
    }

    async fn stream_containers(
        &self,
        _: v1::StreamContainersRequest,
    ) -> Result<Items<v1::StreamContainersResponse>, Error> {
        let answer = |container| Ok(v1::StreamContainersResponse { containers: vec![container] });
        Ok(stream::iter(containers()).map(answer).boxed())
    }

    async fn container_status(
        &self,
        request: v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, Error> {
        Err(Error::NotFound { kind: "container", id: request.container_id })
    }
}

impl ImageService for Fake {}

/// Runs `caller` against a server of a [`Fake`] and returns what it says, a line for each way to name the socket.
async fn answers(caller: anyhow::Result<Command>) -> Option<Vec<String>> {
    let mut caller = match caller {
        Ok(caller) => caller,
        Err(error) => {
            println!("skipped: needs a client of others ({error:#})");
            return None;
        }
    };
    let scratch = tempfile::tempdir().unwrap();
    let socket: PathBuf = scratch.path().join("cri.sock");
    let listener = server::bind(&socket).await.unwrap();
    let (fake, stop) = (Arc::new(Fake), CancellationToken::new());
    let served = tokio::spawn(server::serve(listener, fake.clone(), fake, stop.clone()));
    let path: &Path = &socket;
    caller.arg(path);
    let said = tokio::task::spawn_blocking(move || host::output(&mut caller)).await.unwrap().unwrap();
    stop.cancel();
    served.await.unwrap();
    Some(String::from_utf8(said).unwrap().lines().map(str::to_owned).collect())
}

fn check(answers: &[String], ways: &[&str], missing: &str) {
    let rest = format!("fake v1 containers=one,two streamed=one,two missing={missing}");
    let expected: Vec<String> = ways.iter().map(|way| format!("{way} {rest}")).collect();
    assert_eq!(answers, expected);
}

#[tokio::test]
async fn a_go_client_names_the_socket_as_it_likes() {
    let Some(answers) = answers(callers::in_go()).await else { return };
    check(&answers, &["address", "passed-through", "bare-path", "path-as-authority"], "NotFound");
}

#[tokio::test]
async fn a_python_client_names_the_socket_as_it_likes() {
    let Some(answers) = answers(callers::in_python()).await else { return };
    check(&answers, &["address", "short-address", "path-as-authority", "encoded-authority"], "NOT_FOUND");
}

#[tokio::test]
async fn a_java_client_names_the_socket_as_it_likes() {
    let Some(answers) = answers(callers::in_java()).await else { return };
    check(&answers, &["address", "short-address", "domain-socket", "path-as-authority"], "NOT_FOUND");
}
