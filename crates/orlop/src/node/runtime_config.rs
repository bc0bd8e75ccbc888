//! `RuntimeConfiguration`: what only the container runtime has to be told.
//!
//! ```yaml
//! apiVersion: orlop/v1
//! kind: RuntimeConfiguration
//! runtimeHandlers:          # other OCI runtimes, by the `handler` of a RuntimeClass
//! - name: runc
//!   path: /usr/bin/runc
//!   arguments: []           # before each command
//! nri:                      # plugins of the Node Resource Interface, by the names and with the defaults of containerd
//!   disable: false
//!   socketPath: /var/run/nri/nri.sock
//!   pluginPath: /opt/nri/plugins
//!   pluginConfigPath: /etc/nri/conf.d
//!   pluginRegistrationTimeout: 5s
//!   pluginRequestTimeout: 2s
//!   disableConnections: false
//! deviceOwnershipFromSecurityContext: false   # devices belong to runAsUser and runAsGroup; as containerd's option of the name
//! ```

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use runtime::HandlerConfig;
use serde::Deserialize;
use serde_saphyr::UserMessageFormatter;

use super::layout::Layout;

/// Where it is looked for if nobody says otherwise; it need not be there.
const PATH: &str = "/etc/orlop/runtime.yaml";
const API_VERSION: &str = "orlop/v1";
const KIND: &str = "RuntimeConfiguration";
/// The handler that is this program itself.
const OWN: &str = "orlop";

/// The document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    api_version: String,
    kind: String,
    #[serde(default)]
    runtime_handlers: Vec<Handler>,
    #[serde(default)]
    nri: Nri,
    #[serde(default)]
    device_ownership_from_security_context: bool,
}

/// What is not written is as containerd has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Nri {
    disable: bool,
    socket_path: Option<PathBuf>,
    plugin_path: Option<PathBuf>,
    plugin_config_path: Option<PathBuf>,
    plugin_registration_timeout: Option<String>,
    plugin_request_timeout: Option<String>,
    disable_connections: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Handler {
    name: String,
    path: PathBuf,
    #[serde(default)]
    arguments: Vec<String>,
}

/// What it says.
#[derive(Debug, Clone, Default)]
pub(crate) struct RuntimeConfig {
    pub(crate) handlers: Vec<HandlerConfig>,
    pub(crate) device_ownership_from_security_context: bool,
    nri: Nri,
    registration_timeout: Option<Duration>,
    request_timeout: Option<Duration>,
}

impl RuntimeConfig {
    /// How plugins come in, if they do. The well-known places are those of the node with the well-known run directory:
    /// another one on the machine has its own.
    pub(crate) fn nri(&self, layout: &Layout) -> Option<nri::Config> {
        let Nri { disable: false, socket_path, plugin_path, plugin_config_path, disable_connections, .. } = &self.nri
        else {
            return None;
        };
        let mut config = nri::Config::default();
        if !layout.is_well_known() {
            config.socket = Some(layout.run_dir.join("nri.sock"));
            config.plugin_dir = layout.run_dir.join("nri/plugins");
        }
        config.required = socket_path.is_some();
        config.socket = socket_path.clone().or(config.socket).filter(|_| !disable_connections);
        config.plugin_dir = plugin_path.clone().unwrap_or(config.plugin_dir);
        config.plugin_config_dir = plugin_config_path.clone().unwrap_or(config.plugin_config_dir);
        config.registration_timeout = self.registration_timeout.unwrap_or(config.registration_timeout);
        config.request_timeout = self.request_timeout.unwrap_or(config.request_timeout);
        Some(config)
    }
}

/// Reads it, from where the operator said or from the well-known place.
///
/// # Errors
/// All that is wrong with it.
pub(crate) fn load(given: Option<&Path>) -> Result<RuntimeConfig, Vec<String>> {
    let path = given.unwrap_or(Path::new(PATH));
    let place = given.map_or_else(|| PATH.to_owned(), |path| format!("--runtime-config {}", path.display()));
    let fault = |text: String| vec![format!("{place}: {text}")];
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text).map_err(|faults| faults.into_iter().flat_map(fault).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && given.is_none() => Ok(RuntimeConfig::default()),
        Err(error) => Err(fault(format!("cannot be read: {error}; check that the file is there and readable"))),
    }
}

fn parse(text: &str) -> Result<RuntimeConfig, Vec<String>> {
    let document: Document =
        serde_saphyr::from_str(text).map_err(|error| vec![error.render_with_formatter(&UserMessageFormatter)])?;
    let mut faults = Vec::new();
    if (document.api_version.as_str(), document.kind.as_str()) != (API_VERSION, KIND) {
        faults.push(format!("it is no {KIND} of {API_VERSION}"));
    }
    let mut names = BTreeSet::new();
    for handler in &document.runtime_handlers {
        faults.extend(fault_of(handler).map(|fault| format!("runtimeHandlers {:?}: {fault}", handler.name)));
        if !names.insert(&handler.name) {
            faults.push(format!("runtimeHandlers {:?}: there are two of the name", handler.name));
        }
    }
    let nri = document.nri;
    for path in [&nri.socket_path, &nri.plugin_path, &nri.plugin_config_path].into_iter().flatten() {
        if !path.is_absolute() {
            faults.push(format!("nri: {} is no absolute path", path.display()));
        }
    }
    let mut span = |name: &str, text: &Option<String>| {
        let text = text.as_deref()?;
        let span = configfile::spans::parse(text).filter(|span| !span.is_zero());
        if span.is_none() {
            faults.push(format!("nri.{name}: {text:?} is not a time span as 2s"));
        }
        span
    };
    let registration_timeout = span("pluginRegistrationTimeout", &nri.plugin_registration_timeout);
    let request_timeout = span("pluginRequestTimeout", &nri.plugin_request_timeout);
    if !faults.is_empty() {
        return Err(faults);
    }
    let handlers = document.runtime_handlers.into_iter();
    let handler = |Handler { name, path, arguments }| HandlerConfig { name, path, arguments };
    Ok(RuntimeConfig {
        handlers: handlers.map(handler).collect(),
        device_ownership_from_security_context: document.device_ownership_from_security_context,
        nri,
        registration_timeout,
        request_timeout,
    })
}

fn fault_of(handler: &Handler) -> Option<String> {
    // What the API takes as the handler of a RuntimeClass (a DNS label).
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let name = handler.name.as_bytes();
    let is_label = (1..=63).contains(&name.len())
        && name.iter().all(|byte| letter(*byte) || *byte == b'-')
        && letter(name[0])
        && letter(name[name.len() - 1]);
    if !is_label {
        return Some("a handler is named by lower-case letters, digits and dashes".to_owned());
    }
    if handler.name == OWN {
        return Some("it is this program's own; give the other runtime another name".to_owned());
    }
    if !handler.path.is_absolute() {
        return Some(format!("{} is no absolute path", handler.path.display()));
    }
    match std::fs::metadata(&handler.path) {
        Ok(facts) if facts.is_file() && facts.permissions().mode() & 0o111 != 0 => None,
        Ok(_) => Some(format!("{} is no program", handler.path.display())),
        Err(error) => Some(format!("{}: {error}", handler.path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_named_and_there() {
        let head = "apiVersion: orlop/v1\nkind: RuntimeConfiguration\n";
        let config =
            parse(&format!("{head}runtimeHandlers:\n- {{name: sh, path: /bin/sh, arguments: [-x]}}\n")).unwrap();
        let expected = HandlerConfig { name: "sh".into(), path: "/bin/sh".into(), arguments: vec!["-x".into()] };
        assert_eq!(config.handlers, [expected]);
        assert!(parse(head).unwrap().handlers.is_empty());
        let owned = |text: &str| parse(&format!("{head}{text}")).unwrap().device_ownership_from_security_context;
        assert!(!owned("") && owned("deviceOwnershipFromSecurityContext: true\n"));
        let faults = parse(&format!(
            "{head}runtimeHandlers:\n- {{name: orlop, path: /bin/sh}}\n- {{name: A, path: /bin/sh}}\n- {{name: a, path: /no}}\n\
             - {{name: a, path: bin/sh}}\n"
        ))
        .unwrap_err();
        assert_eq!(faults.len(), 5, "{faults:?}");
        let nri = |text: &str| parse(&format!("{head}nri: {text}\n"));
        let layout = |run: &str| Layout::new(&crate::args::Places { state_dir: "/s".into(), run_dir: run.into() });
        let config = nri("{pluginRequestTimeout: 300ms}").unwrap();
        let (known, other) = (config.nri(&layout("/run/orlop")).unwrap(), config.nri(&layout("/r")).unwrap());
        assert_eq!((known.request_timeout, known.required), (Duration::from_millis(300), false));
        assert_eq!(known.socket, Some("/var/run/nri/nri.sock".into()));
        assert_eq!(other.socket, Some("/r/nri.sock".into()));
        assert!(nri("{disable: true}").unwrap().nri(&layout("/r")).is_none());
        assert_eq!(nri("{pluginPath: x, pluginRequestTimeout: soon}").unwrap_err().len(), 2);
        assert!(parse("apiVersion: v1\nkind: Pod\n").is_err());
        assert!(parse(&format!("{head}handlers: []\n")).unwrap_err()[0].contains("handlers"));
    }
}
