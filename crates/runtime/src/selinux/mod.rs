//! SELinux: the labels of sandboxes and containers.
//!
//! ```text
//! contexts of the policy ─┐
//! options of the request ─┴─► Labels: process and files, of a level that no other pod has ─► records, configuration
//! ```
//! The level is free again when sandbox and containers that hold it have gone; a new daemon takes it from their records.

mod context;
mod levels;
pub(crate) mod relabel;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cri::v1::SeLinuxOption;

use context::Context;
use levels::{Lease, Levels};

use crate::record::RecordedLabels;

/// Where the packages of policies for containers have their contexts, before that of the policy itself.
const CONTAINERS: &str = "/usr/share/containers/selinux/contexts";
const CONFIG: &str = "/etc/selinux/config";
/// Takes a context and says whether the policy knows it.
const CHECK: &str = "/sys/fs/selinux/context";

/// The labels of a sandbox or a container.
#[derive(Debug, Clone)]
pub(crate) struct Labels {
    /// Of its processes.
    pub(crate) process: String,
    /// Of its files.
    pub(crate) file: String,
    /// Keeps the level from others.
    _level: Arc<Lease>,
}

impl Labels {
    /// As they are recorded.
    pub(crate) fn record(&self) -> RecordedLabels {
        RecordedLabels { process: self.process.clone(), file: self.file.clone() }
    }
}

/// The host's SELinux.
#[derive(Debug, Default)]
pub(crate) struct SeLinux {
    enabled: bool,
    defaults: Option<Defaults>,
    levels: Levels,
}

/// What the policy has for containers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Defaults {
    process: Context,
    file: Context,
}

/// Why there are no labels.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LabelError {
    /// It has not the form of one.
    #[error("the format of 'level' {0:?} is not correct: write it as s0:c1,c2")]
    Level(String),
    /// The policy knows nothing of containers.
    #[error(
        "the SELinux label {0} is not possible here: the host's policy has no contexts of containers; install container-selinux"
    )]
    NoContexts(String),
    /// The policy does not know it.
    #[error("the SELinux label {0} is not valid in the loaded policy: correct seLinuxOptions")]
    Unknown(String),
    /// All pairs of categories are held.
    #[error("no SELinux level is left: remove pods")]
    NoLevel,
}

impl From<LabelError> for cri::Error {
    fn from(error: LabelError) -> Self {
        match error {
            LabelError::Level(_) | LabelError::Unknown(_) => Self::InvalidArgument(error.to_string()),
            LabelError::NoContexts(_) => Self::FailedPrecondition(error.to_string()),
            LabelError::NoLevel => Self::ResourceExhausted(error.to_string()),
        }
    }
}

impl SeLinux {
    /// Of the running kernel.
    pub(crate) fn of_host() -> Self {
        let enabled = sys::kernel::has_selinux();
        let defaults = if enabled { defaults() } else { None };
        if enabled && defaults.is_none() {
            tracing::warn!(
                "SELinux does not confine containers: its policy has no contexts of them; install container-selinux"
            );
        }
        Self { enabled, defaults, levels: Levels::default() }
    }

    /// The labels of a sandbox; none on a host without SELinux, which takes no notice of options but their form.
    ///
    /// # Errors
    /// See [`LabelError`].
    pub(crate) fn of_sandbox(&self, options: Option<&SeLinuxOption>) -> Result<Option<Labels>, LabelError> {
        let options = options.cloned().unwrap_or_default();
        if !options.level.is_empty() && !context::is_level(&options.level) {
            return Err(LabelError::Level(options.level));
        }
        match &self.defaults {
            Some(defaults) => self.labels(defaults, &options).map(Some),
            None if self.enabled && options != SeLinuxOption::default() => {
                let SeLinuxOption { user, role, r#type: kind, level } = options;
                Err(LabelError::NoContexts(format!("{user}:{role}:{kind}:{level}")))
            }
            None => Ok(None),
        }
    }

    /// The labels of a container: those of its sandbox, unless it has options of its own.
    ///
    /// # Errors
    /// See [`LabelError`].
    pub(crate) fn of_container(
        &self,
        options: Option<&SeLinuxOption>,
        sandbox: Option<&Labels>,
    ) -> Result<Option<Labels>, LabelError> {
        match (options.filter(|options| **options != SeLinuxOption::default()), sandbox) {
            (None, Some(sandbox)) => Ok(Some(sandbox.clone())),
            (options, _) => self.of_sandbox(options),
        }
    }

    /// The labels of what was made by an earlier daemon, from its record.
    pub(crate) fn recorded(&self, record: Option<&RecordedLabels>) -> Option<Labels> {
        let RecordedLabels { process, file } = record?.clone();
        let level = Context::parse(&process)?.level;
        Some(Labels { process, file, _level: Arc::new(self.levels.hold(&level)) })
    }

    fn labels(&self, defaults: &Defaults, options: &SeLinuxOption) -> Result<Labels, LabelError> {
        let lease = match options.level.as_str() {
            "" if defaults.process.level.is_empty() => self.levels.hold(""),
            "" => self.levels.unique().ok_or(LabelError::NoLevel)?,
            level => self.levels.hold(level),
        };
        let with_level = SeLinuxOption { level: lease.level().to_owned(), ..options.clone() };
        // Role and type are those of processes; files have their own.
        let of_files = SeLinuxOption { role: String::new(), r#type: String::new(), ..with_level.clone() };
        let process = defaults.process.with(&with_level).to_string();
        let file = defaults.file.with(&of_files).to_string();
        if !self.knows(&process) || !self.knows(&file) {
            return Err(LabelError::Unknown(process));
        }
        Ok(Labels { process, file, _level: Arc::new(lease) })
    }

    /// What cannot be asked, the start of the container finds out.
    fn knows(&self, context: &str) -> bool {
        let asked = if self.enabled { fs::write(CHECK, context) } else { Ok(()) };
        asked.err().is_none_or(|error| error.kind() != io::ErrorKind::InvalidInput)
    }
}

fn defaults() -> Option<Defaults> {
    let of_policy = || {
        let config = fs::read_to_string(CONFIG).ok()?;
        let policy = value(&config, "SELINUXTYPE")?;
        Some(Path::new("/etc/selinux").join(policy).join("contexts/lxc_contexts"))
    };
    let read = |path: PathBuf| parse(&fs::read_to_string(path).ok()?);
    read(CONTAINERS.into()).or_else(|| read(of_policy()?))
}

/// Lines `key = "value"`, with comments that begin with `#` or `;`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let mut pairs = lines.filter_map(|line| line.split_once('='));
    pairs.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().trim_matches('"'))
}

fn parse(text: &str) -> Option<Defaults> {
    let context = |key| Context::parse(value(text, key)?);
    Some(Defaults { process: context("process")?, file: context("file")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXTS: &str = "# of containers\nprocess = \"system_u:system_r:container_t:s0\"\n\
        file = \"system_u:object_r:container_file_t:s0\"\nro_file=\"x\"\n";

    fn host() -> SeLinux {
        SeLinux { enabled: false, defaults: parse(CONTEXTS), levels: Levels::default() }
    }

    fn options(user: &str, kind: &str, level: &str) -> SeLinuxOption {
        SeLinuxOption { user: user.into(), r#type: kind.into(), level: level.into(), ..Default::default() }
    }

    #[test]
    fn labels_are_the_policys_with_what_is_asked_for() {
        let host = host();
        let labels = host.of_sandbox(Some(&options("u", "my_t", "s0:c4,c5"))).unwrap().unwrap();
        assert_eq!(labels.process, "u:system_r:my_t:s0:c4,c5");
        assert_eq!(labels.file, "u:object_r:container_file_t:s0:c4,c5");
        let (first, second) = (host.of_sandbox(None).unwrap().unwrap(), host.of_sandbox(None).unwrap().unwrap());
        assert!(first.process.starts_with("system_u:system_r:container_t:s0:c"), "{}", first.process);
        assert_ne!(first.process, second.process);
        assert!(host.of_sandbox(Some(&options("", "", "s0,c4"))).is_err());
        assert!(parse("process = \"a:b:c\"").is_none());
    }

    #[test]
    fn containers_are_labelled_as_their_pod_unless_they_ask() {
        let host = host();
        let pod = host.of_sandbox(None).unwrap().unwrap();
        let same = host.of_container(Some(&SeLinuxOption::default()), Some(&pod)).unwrap().unwrap();
        assert_eq!((same.process, same.file), (pod.process.clone(), pod.file.clone()));
        let other = host.of_container(Some(&options("", "my_t", "")), Some(&pod)).unwrap().unwrap();
        assert!(
            other.process.contains(":my_t:s0:c") && !pod.process.ends_with(other.process.rsplit(':').next().unwrap())
        );
    }

    #[test]
    fn levels_come_from_records_and_are_free_with_the_last() {
        let host = host();
        let pod = host.of_sandbox(None).unwrap().unwrap();
        let record = pod.record();
        let container = host.of_container(None, Some(&pod)).unwrap();
        drop(pod);
        let again = host.recorded(Some(&record)).unwrap();
        let level = record.process.rsplit_once(":s0").unwrap().1.to_owned();
        let held = || format!("{:?}", host.levels).contains(&level);
        drop(container);
        assert!(held());
        drop(again);
        assert!(!held());
        assert!(host.recorded(None).is_none() && host.recorded(Some(&RecordedLabels::default())).is_none());
    }

    #[test]
    fn a_host_without_selinux_takes_no_notice() {
        let host = SeLinux::default();
        assert!(host.of_sandbox(Some(&options("", "spc_t", ""))).unwrap().is_none());
        assert!(host.of_container(None, None).unwrap().is_none());
        let strange = SeLinux { enabled: true, ..SeLinux::default() };
        assert!(strange.of_sandbox(None).unwrap().is_none());
        let error = strange.of_sandbox(Some(&options("", "spc_t", ""))).unwrap_err().to_string();
        assert!(error.contains("container-selinux"), "{error}");
    }
}
