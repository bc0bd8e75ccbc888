//! `exec`: a further process in a container.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use executor::{ExecFds, ExecOptions as PlanOptions, HostFacts, Inherited, Launched, oci};
use sys::cgroup::{Cgroup, Entry};
use sys::signals::Signals;

use crate::args::ExecOptions;
use crate::console::{self, Callers, Terminal};
use crate::container::{Container, Status};
use crate::context::Context;
use crate::create::{self, PATIENCE};
use crate::error::Error;
use crate::foreground::{self, Relay};
use crate::{seccomp, spec};

pub(crate) fn run(context: &Context, options: &ExecOptions) -> Result<ExitCode, Error> {
    let inherited = Inherited::after_standard(options.preserve_fds)?;
    let container = Container::load(context, &options.id)?;
    check(&container, options)?;
    let process = process(&container, options)?;
    let socket = options.console_socket.as_deref();
    let terminal = Terminal::choose(process.terminal, socket.is_some(), options.detach)?;
    let callers = Callers::open(socket, options.pidfd_socket.as_deref(), options.pid_file.as_deref())?;
    if options.detach {
        start(&container, options, &process, inherited, terminal, &callers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let signals = Signals::catch().map_err(Error::file("open", "signalfd"))?;
    let mut launched = start(&container, options, &process, inherited, terminal, &callers)?;
    let relay = create::take_terminal(&mut launched).map(Relay::new).transpose()?;
    foreground::attend(&launched.child, signals, relay, None).map(foreground::exit_code)
}

fn check(container: &Container, options: &ExecOptions) -> Result<(), Error> {
    let refused = |text: &str| Err(Error::State(text.to_owned()));
    match container.status() {
        Status::Stopped => refused("cannot exec in a stopped container"),
        Status::Paused if !options.ignore_paused => {
            refused("cannot exec in a paused container (use --ignore-paused to override)")
        }
        _ => Ok(()),
    }
}

fn start(
    container: &Container,
    options: &ExecOptions,
    process: &oci::Process,
    inherited: Inherited,
    terminal: Terminal,
    callers: &Callers,
) -> Result<Launched, Error> {
    let plan_options = PlanOptions { container: &container.record.spec, facts: &facts_for(container)? };
    let mut plan = executor::exec_plan(process, plan_options)?;
    plan.dies_with_parent = false;
    plan.process.owns_streams = true;
    plan.process.finds_home = true;
    let stopped = || Error::State("cannot exec in a stopped container".to_owned());
    let target = container.process().ok_or_else(stopped)?;
    let (cgroup, below) = entry(container, &options.cgroup)?;
    let fds = ExecFds { target: target.as_fd(), cgroup, inherited };
    let failed = |error| Error::Exec { error, program: process.args.first().cloned().unwrap_or_default() };
    let streams = console::stdio(terminal, process.console_size)?;
    let starting = if create::is_taken_in(container.record.unit.as_ref()) {
        executor::start_exec_outside(&plan, fds, streams)
    } else {
        executor::start_exec(&plan, fds, streams)
    };
    let mut starting = starting.map_err(failed)?;
    if let Err(error) = create::take_in(&mut starting, container.record.unit.as_ref(), &below) {
        create::give_up(starting);
        return Err(error);
    }
    let launched = starting.wait(PATIENCE).map_err(failed)?;
    tell(container, &launched, terminal, callers).inspect_err(|_| end(launched.child.pidfd.as_fd()))?;
    Ok(launched)
}

/// Whoever enters a user namespace of his has all capabilities there, also one who has none here.
fn facts_for(container: &Container) -> Result<HostFacts, Error> {
    let mut facts = HostFacts::read()?;
    let mut namespaces = container.record.spec.linux.iter().flat_map(|linux| &linux.namespaces);
    if namespaces.any(|one| one.kind == oci::NamespaceKind::User) {
        facts.capabilities = sys::caps::bounding();
    }
    Ok(facts)
}

fn tell(container: &Container, launched: &Launched, terminal: Terminal, callers: &Callers) -> Result<(), Error> {
    if let (Terminal::Caller, Some(master)) = (terminal, &launched.terminal) {
        callers.give_terminal(master)?;
    }
    if let Some(listener) = &launched.listener {
        seccomp::hand_over(container, listener)?;
    }
    callers.tell(launched.child.pid.as_raw_nonzero().get(), launched.child.pidfd.as_fd())
}

fn end(pidfd: BorrowedFd<'_>) {
    let _ = sys::process::send_signal(pidfd, 9); // It may have ended.
}

/// The group that the process begins in: the container's, or one that the container has made below it. Where it is put there,
/// its path from there.
fn entry(container: &Container, below: &[String]) -> Result<(Option<Entry>, PathBuf), Error> {
    let Some(whole) = container.group() else { return Ok((None, PathBuf::new())) };
    let group = below_group(&whole, below)?;
    if !create::is_taken_in(container.record.unit.as_ref()) {
        return Ok((Some(group.entry()?), PathBuf::new()));
    }
    // A user's systemd has one tree.
    let mut paths = group.directories().into_iter().zip(whole.directories());
    let path = paths.find_map(|(dir, whole)| dir.strip_prefix(whole).map(PathBuf::from).ok());
    Ok((None, path.unwrap_or_default()))
}

/// `path`, or `controller:path` for each of version 1's trees; what is not named stays at the container's own group.
fn below_group(group: &Cgroup, below: &[String]) -> Result<Cgroup, Error> {
    let mut places = group.places();
    for word in below {
        let (controllers, path) = word.split_once(':').unwrap_or(("", word));
        let path = path.trim_start_matches('/');
        if std::path::Path::new(path).components().any(|part| part == std::path::Component::ParentDir) {
            return Err(Error::Invalid(format!("invalid --cgroup argument: {word} (leads above the container's)")));
        }
        for controller in controllers.split(',') {
            let own = |names: &str| names.split(',').any(|name| name == controller || controllers.is_empty());
            let place = places.iter_mut().find(|(names, _)| own(names));
            let (_, dir) = place
                .ok_or_else(|| Error::Invalid(format!("invalid --cgroup argument: {word} (no such controller)")))?;
            *dir = dir.join(path);
        }
    }
    Ok(Cgroup::at(places))
}

/// The process to start: of a file, or the container's own with what the options change.
fn process(container: &Container, options: &ExecOptions) -> Result<oci::Process, Error> {
    let own = container.record.spec.process.clone().unwrap_or_default();
    let process = match &options.process {
        Some(path) => {
            let bytes = std::fs::read(path).map_err(Error::file("read", path))?;
            spec::parse(&bytes).map_err(Error::json(path))?
        }
        None => changed(spec::read(&container.record.bundle)?.process.unwrap_or_default(), options)?,
    };
    Ok(filled(process, own))
}

fn changed(mut process: oci::Process, options: &ExecOptions) -> Result<oci::Process, Error> {
    if options.command.is_empty() {
        return Err(Error::Invalid("exec args cannot be empty".to_owned()));
    }
    process.args.clone_from(&options.command);
    process.terminal = options.tty;
    process.env.extend(options.env.iter().cloned());
    process.no_new_privileges |= options.no_new_privs;
    let set = |to: &mut String, option: &Option<String>| option.iter().for_each(|value| to.clone_from(value));
    set(&mut process.cwd, &options.cwd);
    set(&mut process.apparmor_profile, &options.apparmor);
    set(&mut process.selinux_label, &options.process_label);
    if let Some(user) = &options.user {
        let (uid, gid) = parse_user(user)?;
        process.user.uid = uid;
        process.user.gid = gid.unwrap_or(process.user.gid);
    }
    process.user.additional_gids.extend(&options.additional_gids);
    let sets = process.capabilities.get_or_insert_default();
    for name in &options.cap {
        sets.bounding.push(name.clone());
        sets.effective.push(name.clone());
        sets.permitted.push(name.clone());
        // Ambient ones have to be inheritable.
        if !sets.inheritable.is_empty() {
            sets.ambient.push(name.clone());
        }
    }
    Ok(process)
}

fn parse_user(text: &str) -> Result<(u32, Option<u32>), Error> {
    let number = |what: &str, text: &str| {
        text.parse::<u32>().map_err(|_| Error::Invalid(format!("bad {what}: {text:?} is not a number")))
    };
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number("uid", uid)?, Some(number("gid", gid)?))),
        None => Ok((number("uid", text)?, None)),
    }
}

/// What a process does not say for itself is as in the container's own.
fn filled(mut process: oci::Process, own: oci::Process) -> oci::Process {
    let or = |value: String, other: String| if value.is_empty() { other } else { value };
    process.apparmor_profile = or(process.apparmor_profile, own.apparmor_profile);
    process.selinux_label = or(process.selinux_label, own.selinux_label);
    process.capabilities = process.capabilities.or(own.capabilities);
    process.oom_score_adj = process.oom_score_adj.or(own.oom_score_adj);
    process.exec_cpu_affinity = process.exec_cpu_affinity.or(own.exec_cpu_affinity);
    if process.rlimits.is_empty() {
        process.rlimits = own.rlimits;
    }
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_a_number_and_maybe_a_group() {
        assert_eq!(parse_user("1").unwrap(), (1, None));
        assert_eq!(parse_user("1:2").unwrap(), (1, Some(2)));
        assert!(parse_user("root").unwrap_err().to_string().contains("bad uid"));
    }

    #[test]
    fn a_group_below_is_found_by_its_controllers() {
        let v1 = Cgroup::at(vec![("cpu,cpuacct".into(), "/c".into()), ("memory".into(), "/m".into())]);
        let below = below_group(&v1, &["cpu:a".to_owned()]).unwrap().places();
        assert_eq!(below, [("cpu,cpuacct".into(), "/c/a".into()), ("memory".into(), "/m".into())]);
        let v2 = Cgroup::at(vec![(String::new(), "/x".into())]);
        assert_eq!(below_group(&v2, &["/a/b".to_owned()]).unwrap().places(), [(String::new(), "/x/a/b".into())]);
        assert!(below_group(&v2, &["../other".to_owned()]).is_err());
        assert!(below_group(&v1, &["pids:a".to_owned()]).is_err());
    }
}
