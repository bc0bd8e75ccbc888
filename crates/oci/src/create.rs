//! `create`: everything up to the program.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use executor::plan::RootEntry;
use executor::{HooksPlan, HostFacts, Inherited, LaunchFds, LaunchPlan, Launched, Starting, oci};
use sys::process;

use crate::args::CreateOptions;
use crate::cgroups::{self, Group, Origin};
use crate::console::{self, Callers, Terminal};
use crate::container::{Container, started_ticks, state_json};
use crate::context::Context;
use crate::error::Error;
use crate::notify::{self, Readiness};
use crate::record::{Place, Record};
use crate::spec::Bundle;
use crate::systemd::Unit;
use crate::{hooks, log, namespaces, rootless};

/// As long as hooks may take that have no limit of their own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// When the program begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    /// When `start` says so.
    Told,
    /// At once.
    AtOnce,
}

/// A container that has just been made.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) container: Container,
    pub(crate) launched: Launched,
    /// Where a program that began says that it is ready, if somebody wants to know.
    pub(crate) readiness: Option<Readiness>,
}

/// `create`.
pub(crate) fn run(context: &Context, options: &CreateOptions) -> Result<(), Error> {
    let bundle = Bundle::open(&options.bundle)?;
    make(context, options, bundle, true, Begin::Told).map(drop)
}

/// Makes the container of `bundle`. What fails leaves nothing behind.
pub(crate) fn make(
    context: &Context,
    options: &CreateOptions,
    mut bundle: Bundle,
    detached: bool,
    begin: Begin,
) -> Result<Created, Error> {
    let inherited = inherited(options.preserve_fds)?;
    let wanted = bundle.spec.process.as_ref().is_some_and(|process| process.terminal);
    let terminal = Terminal::choose(wanted, options.console_socket.is_some(), detached)?;
    let (console, pidfd) = (options.console_socket.as_deref(), options.pidfd_socket.as_deref());
    let callers = Callers::open(console, pidfd, options.pid_file.as_deref())?;
    // Hooks are run there, and relative paths of callers begin there.
    std::env::set_current_dir(&bundle.dir).map_err(Error::file("enter", &bundle.dir))?;

    let place = Place::of(&context.root, &options.id)?;
    place.make()?;
    let mut unfinished = Unfinished { place: Some(place.clone()), group: None };
    notify::prepare(&place, &mut bundle.spec)?;
    let readiness = if begin == Begin::AtOnce { Readiness::listen(&place)? } else { None };
    let group = cgroups::make(context, &options.id, &bundle.spec)?;
    let record = record(&options.id, &bundle, group.as_ref());
    unfinished.group = group;
    place.write(&record)?;

    let mut container = Container { place, record };
    let spec = rootless::enter(&bundle.spec)?;
    let mut plan = plan(context, options, &bundle, &spec, &unfinished, &container)?;
    plan.gate = begin == Begin::Told;
    let fds = LaunchFds { inherited, ..descriptors(&plan, &bundle, &spec, &unfinished, &container)? };
    let size = bundle.spec.process.as_ref().and_then(|process| process.console_size);
    let launch_error = |error| launch_error(error, &bundle);
    let streams = console::stdio(terminal, size)?;
    let starting = if is_taken_in(container.record.unit.as_ref()) {
        executor::start_outside(&plan, fds, streams)
    } else {
        executor::start(&plan, fds, streams)
    };
    let mut starting = starting.map_err(launch_error)?;
    if let Err(error) = take_in(&mut starting, container.record.unit.as_ref(), Path::new("")) {
        give_up(starting);
        return Err(error);
    }
    let launched = see_through(starting, &plan, &mut container)?.map_err(launch_error)?;
    if let Some(group) = &mut unfinished.group {
        group.holder = None;
    }
    let told = finish(&mut container, &launched, &callers, terminal);
    if let Err(error) = told {
        end(&launched);
        return Err(error);
    }
    unfinished.place = None;
    unfinished.group = None;
    Ok(Created { container, launched, readiness })
}

fn inherited(count: u32) -> Result<Inherited, Error> {
    // Those of socket activation are before those that the caller counts.
    Ok(Inherited::after_standard(activated().saturating_add(count))?)
}

/// How many descriptors a service manager has given to this process (sd_listen_fds(3)).
fn activated() -> u32 {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let ours = number("LISTEN_PID") == Some(std::process::id());
    number("LISTEN_FDS").filter(|_| ours).unwrap_or(0)
}

fn record(id: &str, bundle: &Bundle, group: Option<&Group>) -> Record {
    Record {
        id: id.to_owned(),
        bundle: bundle.dir.clone(),
        rootfs: bundle.rootfs.clone(),
        created: log::now(),
        pid: 0,
        started_ticks: 0,
        cgroup: group.map(|group| group.cgroup.places()).unwrap_or_default(),
        group_was_there: group.is_some_and(|group| group.origin == Origin::Other),
        unit: group.and_then(|group| group.unit.clone()),
        spec: bundle.spec.clone(),
    }
}

fn plan(
    context: &Context,
    options: &CreateOptions,
    bundle: &Bundle,
    spec: &oci::Spec,
    unfinished: &Unfinished,
    container: &Container,
) -> Result<LaunchPlan, Error> {
    let mut spec = spec.clone();
    let hooks = container.hooks();
    let has_hooks =
        [&hooks.prestart, &hooks.create_runtime, &hooks.create_container].iter().any(|hooks| !hooks.is_empty());
    if let Some(root) = &mut spec.root {
        // Hooks look for the root at its path of the host. Where there are none it goes where any user may look.
        root.path = if has_hooks { bundle.rootfs.clone() } else { "rootfs".into() };
    }
    if let (count @ 1.., Some(process)) = (activated(), &mut spec.process) {
        process.env.extend([format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()]);
    }
    cgroups::show_own_group(&mut spec, unfinished.group.as_ref().map(|group| &group.cgroup));
    let mut plan = executor::plan(&spec, &HostFacts::read()?)?;
    for warning in &plan.warnings {
        context.log.warning(&warning.to_string());
    }
    plan.dies_with_parent = false;
    plan.halts = !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty();
    plan.hooks = HooksPlan {
        state: state_json(&container.record),
        create_container: executor::hook_plans(&hooks.create_container)?,
        start_container: executor::hook_plans(&hooks.start_container)?,
    };
    plan.process.keyring = (!options.no_new_keyring).then(|| format!("_ses.{}", options.id));
    plan.process.owns_streams = true;
    plan.process.finds_home = true;
    if options.no_pivot
        && let Some(root) = &mut plan.root
    {
        root.entry = RootEntry::Chroot;
    }
    Ok(plan)
}

fn descriptors(
    plan: &LaunchPlan,
    bundle: &Bundle,
    spec: &oci::Spec,
    unfinished: &Unfinished,
    container: &Container,
) -> Result<LaunchFds, Error> {
    let linux = spec.linux.clone().unwrap_or_default();
    let namespaces = namespaces::open(&linux)?;
    let user = namespaces::user(&namespaces);
    let mounts = executor::prepare::open_sources(plan, user).map_err(Error::Source)?;
    let rootfs = plan.root.as_ref().map(|_| sys::mount::copy_tree(&bundle.rootfs, true)).transpose()?;
    let group = unfinished.group.as_ref();
    let cgroup = match group {
        Some(group) if !is_taken_in(group.unit.as_ref()) => Some(group.cgroup.entry()?),
        _ => None,
    };
    let gate = plan.gate.then(|| container.place.listen()).transpose()?;
    Ok(LaunchFds { rootfs, mounts, namespaces, cgroup, gate, inherited: Inherited::default() })
}

/// Whether a new process cannot begin in its unit's group by itself.
pub(crate) fn is_taken_in(unit: Option<&Unit>) -> bool {
    unit.is_some_and(Unit::takes_in)
}

/// Has a new process put into its unit's group, or the one `below` it, where that has to be done.
pub(crate) fn take_in(starting: &mut Starting, unit: Option<&Unit>, below: &Path) -> Result<(), Error> {
    let Some(unit) = unit.filter(|unit| unit.takes_in()) else { return Ok(()) };
    // One that failed says so later.
    let Some(child) = starting.wait_outside(PATIENCE) else { return Ok(()) };
    unit.attach(below, child.pid)?;
    // It may have ended.
    let _ = starting.go_on();
    Ok(())
}

/// Ends a process that has not come to its program.
pub(crate) fn give_up(starting: Starting) {
    let outcome = starting.give_up(sys::rustix::io::Errno::CANCELED);
    outcome.rest.iter().for_each(end_child);
}

/// Runs the hooks of this process's namespaces when the container's are there, then waits for the process to be ready.
fn see_through(
    mut starting: Starting,
    plan: &LaunchPlan,
    container: &mut Container,
) -> Result<Result<Launched, executor::LaunchError>, Error> {
    if plan.halts && starting.wait_for_halt(PATIENCE) {
        let run = note(container, starting.child().pid.as_raw_nonzero().get()).and_then(|()| runtime_hooks(container));
        if let Err(error) = run {
            give_up(starting);
            return Err(error);
        }
        if let Err(error) = starting.go_on() {
            return Ok(Err(error));
        }
    }
    Ok(starting.wait(PATIENCE))
}

fn runtime_hooks(container: &Container) -> Result<(), Error> {
    let (hooks, state, pid) = (container.hooks(), container.state(), container.record.pid);
    hooks::run("prestart", &hooks.prestart, &state, pid, "creating")?;
    hooks::run("createRuntime", &hooks.create_runtime, &state, pid, "creating")
}

/// Writes down which process it is.
fn note(container: &mut Container, pid: i32) -> Result<(), Error> {
    container.record.pid = pid;
    container.record.started_ticks = started_ticks(pid).unwrap_or(0);
    container.place.write(&container.record)
}

fn finish(container: &mut Container, launched: &Launched, callers: &Callers, terminal: Terminal) -> Result<(), Error> {
    let pid = launched.child.pid.as_raw_nonzero().get();
    note(container, pid)?;
    if let (Terminal::Caller, Some(master)) = (terminal, &launched.terminal) {
        callers.give_terminal(master)?;
    }
    callers.tell(pid, launched.child.pidfd.as_fd())
}

fn launch_error(error: executor::LaunchError, bundle: &Bundle) -> Error {
    let process = bundle.spec.process.as_ref();
    Error::Launch { error, program: process.and_then(|process| process.args.first()).cloned().unwrap_or_default() }
}

fn end(launched: &Launched) {
    end_child(&launched.child);
}

fn end_child(child: &process::Child) {
    let _ = process::send_signal(child.pidfd.as_fd(), 9); // It may have ended.
    let _ = process::reap(child.pidfd.as_fd());
}

/// What a failed creation leaves nothing of.
#[derive(Debug)]
struct Unfinished {
    place: Option<Place>,
    group: Option<Group>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // The error that led here is the one to tell; what could not be removed `delete --force` removes.
        if let Some(group) = &mut self.group {
            group.holder = None;
            let _ = crate::delete::remove_group(&group.cgroup, group.origin, group.unit.as_ref());
        }
        if let Some(place) = &self.place {
            let _ = place.remove();
        }
    }
}

/// The descriptor of a terminal's master that nobody was given.
pub(crate) fn take_terminal(launched: &mut Launched) -> Option<OwnedFd> {
    launched.terminal.take()
}
