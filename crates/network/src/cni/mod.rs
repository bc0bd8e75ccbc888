//! The Container Network Interface: calling the plugins that the operator has configured (SPEC.md 1.1.0 of the CNI
//! project; versions 0.3.0 to 1.1.0).
//!
//! ```text
//! configuration ─► for each plugin: its part + name, version, capabilities' arguments, previous result ─► process
//! ADD forwards, DEL backwards with the configuration and the result of ADD, which are kept with the sandbox
//! ```

pub(crate) mod answer;
mod args;
pub(crate) mod config;
mod invoke;
mod janitor;
mod orphans;
mod sandboxes;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(crate) use answer::Addresses;
use answer::{addresses, failure};
use config::{NetworkList, Stamp, Version, type_of};
pub(crate) use janitor::Janitor;
pub(crate) use sandboxes::Sandboxes;

use crate::{AttachRequest, Config, NetworkError};

/// Name of the pods' interface.
pub(crate) const INTERFACE: &str = "eth0";
/// How long STATUS and GC of one plugin may take: nothing useful waits for them.
const QUICK: Duration = Duration::from_secs(10);
/// How old what STATUS said may be.
const STATUS_AGE: Duration = Duration::from_secs(10);

/// What plugins were told when a sandbox was attached, and what they answered: they are told the same when it is detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) network: NetworkList,
    arguments: String,
    capabilities: Map<String, Value>,
    /// The last plugin's result; `None` until ADD has succeeded.
    result: Option<Value>,
}

impl Attached {
    /// What plugins will be told.
    pub(crate) fn new(network: &NetworkList, request: &AttachRequest) -> Result<Attached, NetworkError> {
        let capabilities = args::capabilities(request).map_err(NetworkError::Config)?;
        Ok(Attached { network: network.clone(), arguments: args::generic(request), capabilities, result: None })
    }

    /// Whether ADD has succeeded.
    fn is_complete(&self) -> bool {
        self.result.is_some()
    }
}

/// One sandbox of a command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) sandbox: &'a str,
    /// Path of its namespace; `None` when that is gone.
    pub(crate) netns: Option<&'a Path>,
}

/// The operator's plugins.
#[derive(Debug)]
pub(crate) struct Cni {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    limit: Duration,
    /// Guards the configuration as it was last read.
    known: Mutex<Known>,
    /// Guards what the plugins last said of themselves.
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Known {
    stamp: Option<(PathBuf, Stamp)>,
    /// Set as soon as there has been a configuration: if it vanishes, pods must not land on another network.
    network: Option<Result<Arc<NetworkList>, String>>,
}

#[derive(Debug, Default)]
struct Health {
    /// Whose plugins were asked.
    network: Option<Arc<NetworkList>>,
    /// They do not speak the configuration's version; asked once for each configuration.
    version_problem: Option<String>,
    /// They are not ready.
    status_problem: Option<String>,
    asked_at: Option<Instant>,
    asking: bool,
}

impl Health {
    /// Whether the plugins of `network` have been asked already.
    fn is_of(&self, network: &Arc<NetworkList>) -> bool {
        self.network.as_ref().is_some_and(|known| Arc::ptr_eq(known, network))
    }
}

/// Whether the operator has put a configuration into `dir`, which replaces the built-in bridge. One that cannot be used
/// counts as well: pods are told why.
pub fn is_configured(dir: &std::path::Path) -> bool {
    !matches!(config::find(dir), Ok(None))
}

impl Cni {
    pub(crate) fn new(config: &Config) -> Cni {
        Cni {
            conf_dir: config.cni_conf_dir.clone(),
            bin_dirs: config.cni_bin_dirs.clone(),
            limit: config.cni_limit,
            known: Mutex::default(),
            health: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Every section leaves it whole at each step.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network that the operator has configured, as the files are now; `None`: the built-in bridge.
    ///
    /// # Errors
    /// The configuration cannot be used: why, and what to do.
    pub(crate) fn network(&self) -> Result<Option<Arc<NetworkList>>, String> {
        let mut known = self.known();
        match config::find(&self.conf_dir) {
            Err(error) => {
                known.stamp = None;
                known.network = Some(Err(format!("cannot read {}: {error}", self.conf_dir.display())));
            }
            Ok(None) if known.network.is_none() => {}
            Ok(None) => {
                known.stamp = None;
                known.network = Some(Err(format!(
                    "the CNI configuration in {} has vanished; put it back, or restart orlop to use the built-in bridge",
                    self.conf_dir.display()
                )));
            }
            Ok(Some(found)) if known.stamp.as_ref() == Some(&found) => {}
            Ok(Some(found)) => {
                known.network = Some(config::load(&found.0).map(Arc::new).map_err(|error| error.to_string()));
                known.stamp = Some(found);
                tracing::info!(network = ?known.network.as_ref().map(|n| n.as_ref().map(|n| &n.name)), "CNI configuration");
            }
        }
        known.network.clone().transpose()
    }

    /// Remembers that CNI is in use although there may be no configuration now.
    pub(crate) fn expect(&self) {
        let mut known = self.known();
        if known.network.is_none() {
            known.network = Some(Err("the CNI configuration is missing".into()));
        }
    }

    /// Calls every plugin; the last one's result is kept in `attached`.
    pub(crate) fn add(&self, attached: &mut Attached, subject: Subject<'_>) -> Result<Addresses, NetworkError> {
        let mut previous: Option<Value> = None;
        for plugin in &attached.network.plugins {
            let call = Call { command: "ADD", list: &attached.network, plugin, limit: self.limit };
            let output = self.call(&call, &self.conf(&call, attached, previous.as_ref()), Some((attached, subject)))?;
            let result: Value = serde_json::from_slice(&output)
                .map_err(|error| call.failed(format!("its answer is no CNI result: {error}")))?;
            previous = Some(result);
        }
        let last = attached.network.plugins.last().map(type_of).unwrap_or_default().to_owned();
        let failed = |message| NetworkError::Plugin { plugin: last, command: "ADD", message };
        let result = previous.ok_or_else(|| NetworkError::Config("the network has no plugin".into()))?;
        let addresses = addresses(&result, INTERFACE).map_err(failed)?;
        attached.result = Some(result);
        Ok(addresses)
    }

    /// Calls every plugin, the last one first. Done twice it succeeds.
    pub(crate) fn del(&self, attached: &Attached, subject: Subject<'_>) -> Result<(), NetworkError> {
        // Since 0.4.0 they get the result of ADD.
        let previous = attached.result.as_ref().filter(|_| attached.network.version >= Version::V0_4_0);
        for plugin in attached.network.plugins.iter().rev() {
            let call = Call { command: "DEL", list: &attached.network, plugin, limit: self.limit };
            self.call(&call, &self.conf(&call, attached, previous), Some((attached, subject)))?;
        }
        Ok(())
    }

    /// Asks every plugin whether all is as it made it.
    pub(crate) fn check(&self, attached: &Attached, subject: Subject<'_>) -> Result<(), NetworkError> {
        if attached.network.disable_check || attached.network.version < Version::V0_4_0 {
            return Ok(());
        }
        for plugin in &attached.network.plugins {
            let call = Call { command: "CHECK", list: &attached.network, plugin, limit: self.limit };
            self.call(&call, &self.conf(&call, attached, attached.result.as_ref()), Some((attached, subject)))?;
        }
        Ok(())
    }

    /// Tells every plugin which sandboxes live, so that it frees what others have left. Never while one is attached or
    /// detached.
    pub(crate) fn collect_garbage(&self, network: &NetworkList, live: &[String]) -> Vec<NetworkError> {
        if network.disable_gc || network.version < Version::V1_1_0 {
            return Vec::new();
        }
        let valid: Value = live.iter().map(|id| json!({"containerID": id, "ifname": INTERFACE})).collect();
        let mut errors = Vec::new();
        for plugin in &network.plugins {
            let call = Call { command: "GC", list: network, plugin, limit: QUICK.min(self.limit) };
            let mut conf = call.conf();
            conf.insert("cni.dev/valid-attachments".into(), valid.clone());
            // The name in drafts of the specification, which plugins of that time read.
            conf.insert("cni.dev/attachments".into(), valid.clone());
            errors.extend(self.call(&call, &conf, None).err());
        }
        errors
    }

    /// Why pods cannot be attached, so far as it is known; asks the plugins now and then, without waiting for them.
    pub(crate) fn problem(self: &Arc<Cni>, network: &Arc<NetworkList>) -> Option<String> {
        if let Err(missing) = network.plugins.iter().try_for_each(|plugin| self.program(type_of(plugin)).map(drop)) {
            return Some(missing);
        }
        let mut health = self.health();
        let is_old = || health.asked_at.is_none_or(|then| then.elapsed() > STATUS_AGE);
        let is_due = !health.is_of(network) || network.version >= Version::V1_1_0 && is_old();
        if is_due && !health.asking {
            let (cni, network) = (self.clone(), network.clone());
            let ask = std::thread::Builder::new().name("cni-status".into()).spawn(move || cni.ask_health(network));
            match ask {
                Ok(_) => health.asking = true,
                Err(error) => tracing::warn!(%error, "cannot ask the CNI plugins for their status"),
            }
        }
        let known = health.is_of(network);
        health.version_problem.as_ref().or(health.status_problem.as_ref()).filter(|_| known).cloned()
    }

    fn ask_health(&self, network: Arc<NetworkList>) {
        let is_new = !self.health().is_of(&network);
        let version = is_new.then(|| network.plugins.iter().find_map(|plugin| self.ask_version(&network, plugin)));
        let status = network.plugins.iter().find_map(|plugin| self.ask_status(&network, plugin));
        let mut health = self.health();
        if let Some(version) = version {
            health.version_problem = version;
        }
        health.status_problem = status.map(|error| error.to_string());
        health.network = Some(network);
        health.asked_at = Some(Instant::now());
        health.asking = false;
    }

    /// What a plugin says against the configuration's version. One that does not answer is asked no further: ADD will
    /// tell.
    fn ask_version(&self, network: &NetworkList, plugin: &Map<String, Value>) -> Option<String> {
        let call = Call { command: "VERSION", list: network, plugin, limit: QUICK.min(self.limit) };
        let question = json!({"cniVersion": network.version.as_str()});
        let output = self.call(&call, question.as_object()?, None).ok()?;
        let answer: Value = serde_json::from_slice(&output).ok()?;
        let speaks: Vec<&str> = answer.get("supportedVersions")?.as_array()?.iter().filter_map(Value::as_str).collect();
        if speaks.contains(&network.version.as_str()) {
            return None;
        }
        let wanted = network.version.as_str();
        let reason = format!("speaks {}, not the configuration's cniVersion {wanted}", speaks.join(", "));
        Some(format!("the CNI plugin {} {reason}; change that, or install a newer plugin", type_of(plugin)))
    }

    fn ask_status(&self, network: &NetworkList, plugin: &Map<String, Value>) -> Option<NetworkError> {
        if network.version < Version::V1_1_0 {
            return None;
        }
        let call = Call { command: "STATUS", list: network, plugin, limit: QUICK.min(self.limit) };
        self.call(&call, &call.conf(), None).err()
    }

    /// The configuration of one plugin for one sandbox. (`capabilities` stays in it, as the reference leaves it.)
    fn conf(&self, call: &Call<'_>, attached: &Attached, previous: Option<&Value>) -> Map<String, Value> {
        let mut conf = call.conf();
        let declared = call.plugin.get("capabilities").and_then(Value::as_object);
        let is_declared = |key: &String| declared.is_some_and(|all| all.get(key) == Some(&Value::Bool(true)));
        let given: Map<String, Value> = attached
            .capabilities
            .iter()
            .filter(|(key, _)| is_declared(key))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        if !given.is_empty() {
            conf.insert("runtimeConfig".into(), Value::Object(given));
        }
        if let Some(previous) = previous {
            conf.insert("prevResult".into(), previous.clone());
        }
        conf
    }

    fn call(
        &self,
        call: &Call<'_>,
        conf: &Map<String, Value>,
        subject: Option<(&Attached, Subject<'_>)>,
    ) -> Result<Vec<u8>, NetworkError> {
        let program = self.program(type_of(call.plugin)).map_err(|missing| call.failed(missing))?;
        let mut environment = vec![("CNI_COMMAND", call.command.to_owned()), ("CNI_PATH", self.path())];
        if let Some((attached, subject)) = subject {
            environment.push(("CNI_CONTAINERID", subject.sandbox.to_owned()));
            environment.push(("CNI_IFNAME", INTERFACE.to_owned()));
            environment.push(("CNI_ARGS", attached.arguments.clone()));
            environment.push(("CNI_NETNS", subject.netns.map(|path| path.display().to_string()).unwrap_or_default()));
        }
        let input = serde_json::to_vec(conf).map_err(|error| call.failed(error.to_string()))?;
        let output =
            invoke::run(&program, &environment, &input, call.limit).map_err(|error| call.failed(error.to_string()))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(call.failed(failure(&output.describe(), &output.stdout, &output.stderr)))
    }

    fn path(&self) -> String {
        let dirs: Vec<String> = self.bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
        dirs.join(":")
    }

    fn program(&self, name: &str) -> Result<PathBuf, String> {
        let found = self.bin_dirs.iter().map(|dir| dir.join(name)).find(|path| path.is_file());
        found.ok_or_else(|| format!("the CNI plugin {name} is not in {}; install it there", self.path()))
    }
}

/// One command to one plugin.
struct Call<'a> {
    command: &'static str,
    list: &'a NetworkList,
    plugin: &'a Map<String, Value>,
    limit: Duration,
}

impl Call<'_> {
    /// The plugin's configuration with what every command adds.
    fn conf(&self) -> Map<String, Value> {
        let mut conf = self.plugin.clone();
        conf.insert("name".into(), json!(self.list.name));
        conf.insert("cniVersion".into(), json!(self.list.version.as_str()));
        conf
    }

    fn failed(&self, message: String) -> NetworkError {
        NetworkError::Plugin { plugin: type_of(self.plugin).to_owned(), command: self.command, message }
    }
}
