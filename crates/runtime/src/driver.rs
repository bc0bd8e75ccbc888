//! Other OCI runtimes (runc, crun), which pods ask for by their RuntimeClass' handler.
//!
//! ```text
//! keeper ──► create, start, exec: what makes processes, which then are the keeper's
//! daemon ──► kill, update, delete, features
//! ```
//! The pod itself is as any other: its keeper, namespaces, network and shared files are made by this runtime, and the other
//! one gets a bundle for each container. What it knows of them lies in the sandbox's directory, too:
//!
//! ```text
//! <run-dir>/sandboxes/<id>/r/                the runtime's own states (`--root`)
//!                          b/<container>/    its bundle: config.json, log.json
//!                                     x…/    an exec: process.json, log.json
//! ```

mod bundle;
mod handlers;

use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use executor::oci;
use keeper::protocol::{CONSOLE, Commands, PID};

use crate::core::patient;
use crate::program::{self, Call, Output, ProgramError};
use crate::record::Records;

pub(crate) use bundle::{Bundle, put_bundle_for_hooks};
pub(crate) use handlers::{Handler, Handlers};

/// How long a command may take that waits for nothing but the kernel.
const COMMAND_MAX: Duration = Duration::from_secs(10);
/// Name in a sandbox's directory.
const STATES: &str = "r";
/// Names in a bundle.
const CONFIG: &str = "config.json";
const PROCESS: &str = "process.json";
const LOG: &str = "log.json";
/// Most that is read of a log, from its end (R6).
const LAST_MAX: u64 = 64 << 10;
/// How much of an exec's id is in its directory's name.
const EXEC_ID_LENGTH: usize = 16;

/// Another runtime, as it is used for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Driver {
    pub(crate) program: PathBuf,
    /// Arguments before each command.
    pub(crate) arguments: Vec<String>,
    /// The sandbox's directory.
    pub(crate) place: PathBuf,
}

/// Why another runtime did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriverError {
    /// It failed.
    #[error("{0}")]
    Runtime(String),
    /// It could not be run.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file for it cannot be written.
    #[error("writing {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No thread.
    #[error(transparent)]
    Cri(#[from] cri::Error),
}

impl Driver {
    /// A container's bundle.
    pub(crate) fn bundle(&self, container: &str) -> PathBuf {
        Records::new(self.place.clone()).bundle(container)
    }

    /// Makes a container and starts it.
    pub(crate) fn create_and_start(&self, container: &str, tty: bool) -> Commands {
        let bundle = self.bundle(container);
        let mut create = self.words(&bundle, &["create", "--bundle"]);
        create.extend([text(&bundle), "--pid-file".to_owned(), text(&bundle.join(PID))]);
        create.extend(console(tty));
        create.push(container.to_owned());
        let start = self.words(&bundle, &["start", container]);
        self.commands(vec![create, start], &bundle)
    }

    /// Starts a process in a container, as its file says.
    pub(crate) fn exec(&self, container: &str, session: &str, tty: bool) -> Commands {
        let place = self.exec_place(container, session);
        let mut exec = self.words(&place, &["exec", "--detach", "--process"]);
        exec.extend([text(&place.join(PROCESS)), "--pid-file".to_owned(), text(&place.join(PID))]);
        exec.extend(console(tty));
        exec.push(container.to_owned());
        self.commands(vec![exec], &place)
    }

    /// Writes what an exec runs.
    pub(crate) fn put_process(
        &self,
        container: &str,
        session: &str,
        process: &oci::Process,
    ) -> Result<(), DriverError> {
        let place = self.exec_place(container, session);
        let failed = |source| DriverError::File { path: place.clone(), source };
        fs::create_dir(&place).map_err(failed)?;
        put(&place.join(PROCESS), process)
    }

    /// Forgets an exec, whose process lives on if it does.
    pub(crate) fn forget_exec(&self, container: &str, session: &str) {
        let place = self.exec_place(container, session);
        if let Err(error) = fs::remove_dir_all(&place) {
            tracing::warn!(path = %place.display(), %error, "files of an exec stay until its container goes");
        }
    }

    /// What the runtime has said last of an exec, or of the container's start.
    pub(crate) fn last_words(&self, container: &str, session: Option<&str>) -> Option<String> {
        let place = session.map_or_else(|| self.bundle(container), |session| self.exec_place(container, session));
        last_words(&place)
    }

    /// Sends a signal to a container's first process.
    pub(crate) async fn kill(&self, container: &str, signal: u32) -> Result<(), DriverError> {
        self.call(container, &["kill", container, &signal.to_string()], Vec::new()).await.map(drop)
    }

    /// Sets the limits of a container.
    pub(crate) async fn update(&self, container: &str, resources: &oci::Resources) -> Result<(), DriverError> {
        let json = serde_json::to_vec(resources).map_err(|error| DriverError::Runtime(error.to_string()))?;
        self.call(container, &["update", "--resources", "-", container], json).await.map(drop)
    }

    /// Lets the runtime forget a container, with all that is left of it. One that it does not know is none.
    pub(crate) async fn delete(&self, container: &str) -> Result<(), DriverError> {
        if !self.place.join(STATES).exists() || !self.bundle(container).exists() {
            return Ok(());
        }
        self.call(container, &["delete", "--force", container], Vec::new()).await.map(drop)
    }

    async fn call(&self, container: &str, words: &[&str], input: Vec<u8>) -> Result<Output, DriverError> {
        let place = self.bundle(container);
        let call = Call {
            program: self.program.clone(),
            arguments: self.words(&place, words),
            environment: vec![program::PATH.to_owned()],
            directory: self.place.clone(),
            input,
            limit: COMMAND_MAX,
        };
        let failed = patient(move || program::run(&call)).await?;
        failed.map_err(|error| match (&error, last_words(&place)) {
            (ProgramError::Failed { .. }, Some(words)) => DriverError::Runtime(words),
            _ => error.into(),
        })
    }

    fn words(&self, place: &Path, command: &[&str]) -> Vec<String> {
        let common =
            ["--root", &text(&self.place.join(STATES)), "--log", &text(&place.join(LOG)), "--log-format", "json"]
                .map(str::to_owned);
        self.arguments.iter().cloned().chain(common).chain(command.iter().map(|word| (*word).to_owned())).collect()
    }

    /// The keeper, whose working directory is the sandbox's, finds it by a path below that.
    fn commands(&self, words: Vec<Vec<String>>, directory: &Path) -> Commands {
        let directory = text(directory.strip_prefix(&self.place).unwrap_or(directory));
        Commands { program: text(&self.program), words, directory }
    }

    fn exec_place(&self, container: &str, session: &str) -> PathBuf {
        self.bundle(container).join(format!("x{}", session.get(..EXEC_ID_LENGTH).unwrap_or(session)))
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The socket is named as the command finds it from its own directory.
fn console(tty: bool) -> Vec<String> {
    if tty { vec!["--console-socket".to_owned(), CONSOLE.to_owned()] } else { Vec::new() }
}

/// Writes a value as JSON.
fn put(path: &Path, value: &impl serde::Serialize) -> Result<(), DriverError> {
    let failed = |source| DriverError::File { path: path.to_owned(), source };
    let json = serde_json::to_vec(value).map_err(|error| failed(error.into()))?;
    fs::write(path, json).map_err(failed)
}

/// The last error in a runtime's log: lines of JSON with `level` and `msg`.
fn last_words(place: &Path) -> Option<String> {
    let log = end_of(&place.join(LOG)).ok()?;
    let message = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let level = line.get("level")?.as_str()?;
        (level == "error" || level == "fatal").then(|| line.get("msg")?.as_str().map(|text| text.trim().to_owned()))?
    };
    log.lines().rev().find_map(message)
}

fn end_of(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_MAX)))?;
    let mut end = Vec::new();
    file.take(LAST_MAX).read_to_end(&mut end)?;
    // Where it begins within a line, or within a letter, that line is none of JSON.
    Ok(String::from_utf8_lossy(&end).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_log_is_read() {
        let place = tempfile::tempdir().unwrap();
        let words = |log: &str| {
            fs::write(place.path().join(LOG), log).unwrap();
            last_words(place.path())
        };
        let error = r#"{"level":"error","msg":" why "}"#;
        let filler = "{\"level\":\"info\",\"msg\":\"é\"}\n".repeat(4000);
        assert_eq!(words(error).as_deref(), Some("why"));
        assert_eq!(words(&format!("{filler}{error}\n{{")).as_deref(), Some("why"));
        assert!(filler.len() as u64 > LAST_MAX);
        assert_eq!(words(&format!("{error}\n{filler}")), None);
        assert_eq!(last_words(Path::new("/nowhere")), None);
    }
}
