//! Programs that give out credentials: the `exec` of a kubeconfig user.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use sys::rustix::process::Pid;

use super::config::Secret;

/// Which program, and what it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecPlugin {
    pub(super) command: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    /// The `apiVersion` that it speaks.
    pub(super) version: String,
    /// What it is told of the cluster.
    pub(super) cluster: Option<serde_json::Value>,
    /// How to install it.
    pub(super) hint: Option<String>,
}

/// What a program gave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Credential {
    pub(super) token: Option<Secret>,
    /// Certificate and key, PEM.
    pub(super) certificate: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) expires: Option<Timestamp>,
}

/// Why a program gave out nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ExecError {
    /// It cannot be started.
    #[error("cannot start the credential plugin {program}: {reason}{}", hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
    Start {
        /// Path.
        program: String,
        /// The cause.
        reason: String,
        /// How to install it, from the kubeconfig.
        hint: Option<String>,
    },
    /// It did not end in time.
    #[error("the credential plugin {program} did not end within {} s and was killed", TIME_LIMIT.as_secs())]
    TimedOut {
        /// Path.
        program: String,
    },
    /// It failed.
    #[error("the credential plugin {program} failed: {reason}; run it by hand to see what it needs")]
    Failed {
        /// Path.
        program: String,
        /// Its exit status or the operating system's words.
        reason: String,
    },
    /// Nobody can use what it said.
    #[error("the credential plugin {program} gave no usable credentials: {reason}")]
    Answer {
        /// Path.
        program: String,
        /// What is wrong.
        reason: String,
    },
}

const TIME_LIMIT: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: u64 = 1 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ExecCredential {
    api_version: Option<String>,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
    expiration_timestamp: Option<Timestamp>,
}

impl ExecPlugin {
    /// Runs the program to its end and reads what it says. Its complaints go to this process's standard error.
    pub(super) async fn run(&self) -> Result<Credential, ExecError> {
        let output = self.output().await?;
        self.read(&output)
    }

    fn program(&self) -> String {
        self.command.display().to_string()
    }

    async fn output(&self) -> Result<Vec<u8>, ExecError> {
        let start = |reason: String| ExecError::Start { program: self.program(), reason, hint: self.hint.clone() };
        let failed = |reason: String| ExecError::Failed { program: self.program(), reason };
        let plugin = self.clone();
        let child =
            tokio::task::spawn_blocking(move || plugin.spawn()).await.map_err(|error| start(error.to_string()))?;
        let child = child.map_err(|error| start(error.to_string()))?;
        let group = Pid::from_child(&child);
        let mut running = tokio::task::spawn_blocking(move || listen(child));
        match tokio::time::timeout(TIME_LIMIT, &mut running).await {
            Ok(ended) => ended.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string())),
            Err(_) => {
                // It has not been reaped, so the group is still its own. The thread then sees its end.
                let _ = sys::process::kill_group(group);
                Err(ExecError::TimedOut { program: self.program() })
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the operator has configured this program in the kubeconfig")]
    fn spawn(&self) -> io::Result<Child> {
        let told = serde_json::json!({
            "apiVersion": self.version, "kind": "ExecCredential",
            "spec": {"interactive": false, "cluster": self.cluster},
        });
        Command::new(&self.command)
            .args(&self.arguments)
            .envs(&self.environment)
            .env("KUBERNETES_EXEC_INFO", told.to_string())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
    }

    fn read(&self, output: &[u8]) -> Result<Credential, ExecError> {
        let fault = |reason: String| ExecError::Answer { program: self.program(), reason };
        let answer: ExecCredential = serde_json::from_slice(output).map_err(|error| fault(error.to_string()))?;
        if answer.api_version.as_deref() != Some(self.version.as_str()) {
            return Err(fault(format!("its apiVersion is not {}", self.version)));
        }
        let status = answer.status.ok_or_else(|| fault("it has no status".into()))?;
        let token = status.token.filter(|token| !token.is_empty()).map(|token| Secret::new(&token));
        let certificate = match (status.client_certificate_data, status.client_key_data) {
            (Some(certificate), Some(key)) => Some((certificate.into_bytes(), key.into_bytes())),
            (None, None) => None,
            _ => return Err(fault("it has only one of clientCertificateData and clientKeyData".into())),
        };
        if token.is_none() && certificate.is_none() {
            return Err(fault("it has neither a token nor a certificate".into()));
        }
        Ok(Credential { token, certificate, expires: status.expiration_timestamp })
    }
}

/// What the program says until it ends.
fn listen(mut child: Child) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    let read = match child.stdout.take() {
        Some(pipe) => pipe.take(ANSWER_BYTES_MAX).read_to_end(&mut output),
        None => Ok(0),
    };
    let status = child.wait()?;
    read?;
    if status.success() { Ok(output) } else { Err(io::Error::other(status.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ExecPlugin {
        ExecPlugin {
            command: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: [("WHO".to_owned(), "node".to_owned())].into(),
            version: "client.authentication.k8s.io/v1".into(),
            cluster: Some(serde_json::json!({"server": "https://h"})),
            hint: Some("install it with apt".into()),
        }
    }

    const HEAD: &str = "\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\"";

    #[tokio::test]
    async fn a_token_with_an_end() {
        let script = format!(
            "echo $KUBERNETES_EXEC_INFO | grep -q '\"server\":\"https://h\"' || exit 4\necho '{{{HEAD},\"status\":{{\"token\":\"'$WHO'\",\"expirationTimestamp\":\"2030-01-02T03:04:05Z\"}}}}'"
        );
        let credential = shell(&script).run().await.unwrap();
        assert_eq!(credential.token, Some(Secret::new("node")));
        assert_eq!(credential.expires, Some("2030-01-02T03:04:05Z".parse().unwrap()));
    }

    #[tokio::test]
    async fn what_goes_wrong_is_told() {
        let check = async |plugin: ExecPlugin, words: &str| {
            let error = plugin.run().await.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        check(shell("exit 3"), "exit status: 3").await;
        check(shell("echo no"), "no usable credentials").await;
        check(shell(&format!("echo '{{{HEAD}}}'")), "no status").await;
        check(shell(&format!("echo '{{{HEAD},\"status\":{{}}}}'")), "neither a token nor a certificate").await;
        check(ExecPlugin { command: "/nowhere/plugin".into(), ..shell("") }, "install it with apt").await;
    }
}
