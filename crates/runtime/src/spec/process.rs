//! The process of a container: what it runs, where, and with which environment.

use std::ffi::CString;

use cri::v1;
use executor::oci;

use super::{ContainerInput, SpecError, security};

/// What programs with a terminal find in their environment, unless the image or the request says otherwise.
pub(super) const TERMINAL: &str = "TERM=xterm";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An entry `NAME=value`; values need not be UTF-8.
pub(super) type Entry = Vec<u8>;

pub(super) fn process(
    input: &ContainerInput<'_>,
    context: &v1::LinuxContainerSecurityContext,
    environment: &[Entry],
) -> Result<oci::Process, SpecError> {
    let config = input.config;
    let resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let user = input.user;
    Ok(oci::Process {
        terminal: config.tty,
        user: oci::User { uid: user.uid, gid: user.gid, additional_gids: groups(input), ..oci::User::default() },
        args: arguments(config, &input.image.config)?,
        env: environment.iter().map(|entry| String::from_utf8_lossy(entry).into_owned()).collect(),
        cwd: working_directory(config, &input.image.config)?,
        capabilities: Some(security::capabilities(context, &input.host.facts)?),
        no_new_privileges: context.no_new_privs,
        apparmor_profile: input.prepared.apparmor.clone(),
        selinux_label: security::process_label(input, context),
        oom_score_adj: Some(resources.map_or(Ok(0), oom_score_adj)?),
        ..oci::Process::default()
    })
}

/// A command replaces the image's entrypoint and its arguments; arguments alone replace the image's arguments.
fn arguments(config: &v1::ContainerConfig, image: &image::spec::ExecutionConfig) -> Result<Vec<String>, SpecError> {
    let no_entrypoint = matches!(&image.entrypoint[..], [only] if only.is_empty());
    let entrypoint: &[String] = if no_entrypoint { &[] } else { &image.entrypoint };
    let (program, args) = match (&config.command[..], &config.args[..]) {
        ([], []) => (entrypoint, &image.cmd[..]),
        ([], args) => (entrypoint, args),
        (command, args) => (command, args),
    };
    let all = [program, args].concat();
    if all.is_empty() { Err(SpecError::NoCommand) } else { Ok(all) }
}

fn working_directory(config: &v1::ContainerConfig, image: &image::spec::ExecutionConfig) -> Result<String, SpecError> {
    let (field, path) = match (&*config.working_dir, &*image.working_dir) {
        ("", "") => return Ok("/".to_owned()),
        ("", path) => ("the image's working directory", path),
        (path, _) => ("working_dir", path),
    };
    if path.starts_with('/') {
        return Ok(path.to_owned());
    }
    Err(SpecError::invalid(field, path, "is not an absolute path"))
}

/// Without a word it is 0: what is left out would be inherited from the keeper, which the kernel spares.
fn oom_score_adj(resources: &v1::LinuxContainerResources) -> Result<i32, SpecError> {
    let score = i32::try_from(resources.oom_score_adj).ok().filter(|score| (-1000..=1000).contains(score));
    score.ok_or_else(|| SpecError::invalid("oom_score_adj", resources.oom_score_adj, "is not between -1000 and 1000"))
}

/// The groups of the user, and those that its devices need.
fn groups(input: &ContainerInput<'_>) -> Vec<u32> {
    let mut groups = input.user.groups.clone();
    groups.extend(input.prepared.cdi.gids.iter().filter(|gid| !input.user.groups.contains(gid)));
    groups
}

/// The environment: defaults, then the image's, then the request's; the last of equal names counts and takes the place
/// of the first. `HOME` is the user's, unless somebody set it.
pub(super) fn environment(input: &ContainerInput<'_>) -> Result<Vec<Entry>, SpecError> {
    let config = input.config;
    let mut all = Variables::default();
    all.set(PATH.into());
    if config.tty {
        all.set(TERMINAL.into());
    }
    let hostname = Some(&input.sandbox.hostname).filter(|name| !name.is_empty()).unwrap_or(&input.prepared.hostname);
    all.set(format!("HOSTNAME={hostname}").into());
    for entry in &input.image.config.env {
        all.set(entry.clone().into());
    }
    for variable in &config.envs {
        if variable.key.is_empty() || variable.key.contains('=') {
            return Err(SpecError::invalid("envs.key", &variable.key, "is no name of a variable"));
        }
        all.set([variable.key.as_bytes(), b"=", &variable.value].concat());
    }
    for entry in &input.prepared.cdi.env {
        all.set(entry.clone().into());
    }
    // The user's home, as OCI runtimes set it.
    if !all.has_value(b"HOME") {
        all.set(format!("HOME={}", input.user.home).into());
    }
    Ok(all.entries)
}

#[derive(Default)]
struct Variables {
    entries: Vec<Entry>,
    by_name: std::collections::HashMap<Vec<u8>, usize>,
}

impl Variables {
    /// An entry without `=` is not a variable; images that have one mean "not set".
    fn set(&mut self, entry: Entry) {
        let Some(length) = entry.iter().position(|byte| *byte == b'=').filter(|length| *length > 0) else { return };
        match self.by_name.get(&entry[..length]) {
            Some(at) => self.entries[*at] = entry,
            None => {
                self.by_name.insert(entry[..length].to_vec(), self.entries.len());
                self.entries.push(entry);
            }
        }
    }

    fn has_value(&self, name: &[u8]) -> bool {
        self.by_name.get(name).is_some_and(|at| self.entries[*at].len() > name.len() + 1)
    }
}

/// The environment as bytes, where it is not text; empty where it is.
pub(super) fn raw(environment: &[Entry]) -> Result<Vec<CString>, SpecError> {
    if environment.iter().all(|entry| std::str::from_utf8(entry).is_ok()) {
        return Ok(Vec::new());
    }
    let convert = |entry: &Entry| {
        CString::new(entry.clone())
            .map_err(|_| SpecError::invalid("envs.value", String::from_utf8_lossy(entry), "has a zero byte inside"))
    };
    environment.iter().map(convert).collect()
}

/// The environment of an exec, which has a terminal or none of its own.
pub(super) fn exec_environment(own: &[CString], tty: bool) -> Vec<CString> {
    let is_terminal = |entry: &&CString| entry.as_bytes().starts_with(b"TERM=");
    let kept = own.iter().filter(|entry| !tty || !is_terminal(entry)).cloned();
    let terminal = tty.then(|| CString::new(TERMINAL).expect("a constant without zero bytes"));
    kept.chain(terminal).collect()
}
