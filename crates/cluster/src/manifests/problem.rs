//! What is wrong with a manifest, for people to read.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

/// A fault of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// The file; `-` is standard input.
    pub file: PathBuf,
    /// The line, from 1; 0 when the whole file is meant.
    pub line: usize,
    /// Which object, as far as it is known.
    pub object: Option<ObjectName>,
    /// The path of the field, as the API server spells it (`spec.containers[0].image`).
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do about it, where that is known.
    pub remedy: Option<String>,
}

/// How much a problem matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The document is in force, but perhaps not as its author meant.
    Warning,
    /// The document is not in force; what it said before, if anything, still is.
    Error,
}

/// Kind and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The kind, as manifests spell it.
    pub kind: String,
    /// The namespace; empty for a cluster-scoped object.
    pub namespace: String,
    /// The name.
    pub name: String,
}

/// `Deployment default/web`.
impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.namespace.as_str(), self.name.as_str()) {
            (_, "") => f.write_str(&self.kind),
            ("", name) => write!(f, "{} {name}", self.kind),
            (namespace, name) => write!(f, "{} {namespace}/{name}", self.kind),
        }
    }
}

/// `web.yaml:12: Deployment default/web: spec.replicas: Invalid value: …; remedy`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        // The message about an unknown field names the field already.
        if let Some(field) = self.field.as_ref().filter(|field| !self.message.contains(&format!("{field:?}"))) {
            write!(f, ": {field}")?;
        }
        write!(f, ": {}", self.message)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// Problems that have been logged: each is, once, for as long as it lasts.
#[derive(Debug, Default)]
pub(crate) struct Said(HashSet<String>);

impl Said {
    /// Logs those of `problems`, which are all that there are now, that are new.
    pub(crate) fn tell(&mut self, problems: &[Problem]) {
        for problem in problems {
            let text = problem.to_string();
            match problem.severity {
                _ if self.0.contains(&text) => {}
                Severity::Error => tracing::error!("{text}"),
                Severity::Warning => tracing::warn!("{text}"),
            }
        }
        self.0 = problems.iter().map(ToString::to_string).collect();
    }
}
