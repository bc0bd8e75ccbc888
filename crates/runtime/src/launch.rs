//! From a container's request to what its keeper needs to start it.
//!
//! All of this may wait for a file system that does not answer: it runs on a thread of its own, and costs its own
//! container only.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cri::v1::NamespaceMode;
use cri::{Error, v1};
use executor::LaunchPlan;
use executor::oci::NamespaceKind;
use image::{Image, RootfsOptions};
use keeper::protocol::{
    self, Blob, CgroupEntry, Drive, GetNamespace, Join, JoinFrom, Launch, Log, Request, Rotate, Stdio, WindowSize,
};
use sys::cgroup::{Cgroup, Entry};

use crate::container::Container;
use crate::core::{Core, failed, patient};
use crate::driver::{self, Bundle, Driver};
use crate::sandbox::Sandbox;
use crate::spec::{self, ContainerInput, ContainerSpec, ResolvedUser};
use crate::{files, logs, plugins};

/// Everything that a start needs, held from the container's making to its start.
#[derive(Debug)]
pub(crate) struct Ready {
    way: Way,
    root: OwnedFd,
    mounts: Vec<OwnedFd>,
    log: Option<(Log, OwnedFd)>,
}

/// Who starts it.
#[derive(Debug)]
enum Way {
    /// The keeper itself.
    Own(Box<LaunchPlan>),
    /// Another OCI runtime.
    Driven(Bundle),
}

impl Ready {
    /// The namespaces that it joins.
    fn joins(&self) -> &[NamespaceKind] {
        match &self.way {
            Way::Own(plan) => &plan.joins,
            Way::Driven(bundle) => &bundle.joins,
        }
    }
}

/// What making a container finds out.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) ready: Ready,
    pub(crate) spec: ContainerSpec,
    pub(crate) user: ResolvedUser,
    pub(crate) stop_signal: i32,
    pub(crate) stop_signal_name: v1::Signal,
}

/// Prepares a container: root file system, configuration, plan, mounts, control group.
pub(crate) async fn prepare(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
    config: v1::ContainerConfig,
    image: Arc<Image>,
    recorded: Option<ContainerSpec>,
) -> Result<Made, Error> {
    let (core, sandbox, container) = (core.clone(), sandbox.clone(), container.clone());
    let shared = namespace_of(&sandbox, protocol::NamespaceKind::Mount, None).await?;
    let users = match spec::sandbox_users(&sandbox.config)? {
        Some(_) => Some(namespace_of(&sandbox, protocol::NamespaceKind::User, None).await?),
        None => None,
    };
    let threads = tokio::runtime::Handle::current();
    patient(move || {
        let job = Job { core: &core, sandbox: &sandbox, container: &container, config: &config, threads };
        job.make(&image, shared.as_fd(), users, recorded)
    })
    .await?
}

struct Job<'a> {
    core: &'a Arc<Core>,
    sandbox: &'a Sandbox,
    container: &'a Container,
    config: &'a v1::ContainerConfig,
    /// Where what is asked of plugins is waited for.
    threads: tokio::runtime::Handle,
}

impl Job<'_> {
    fn make(
        &self,
        image: &Image,
        shared: BorrowedFd<'_>,
        users: Option<OwnedFd>,
        recorded: Option<ContainerSpec>,
    ) -> Result<Made, Error> {
        self.choose_labels()?;
        let labels = self.container.labels();
        let file_label = labels.map(|labels| labels.file.as_str());
        let copy = users.as_ref().map(OwnedFd::try_clone).transpose();
        let user_namespace = copy.map_err(|error| self.failed("mapping the users of", &error))?;
        let options =
            RootfsOptions { user_namespace, mount_label: file_label.map(str::to_owned), ..Default::default() };
        let rootfs = self.core.images.rootfs(&image.id, &self.container.id, options);
        let root = rootfs.map_err(|error| self.failed("mounting the root of", &error))?.mount;
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let user = spec::resolve_user(root.as_fd(), security, &image.config.config.user)?;
        let of_image = image.config.config.stop_signal.as_str();
        let stop_signal = spec::stop_signal(self.config, of_image)?;
        let stop_signal_name = spec::stop_signal_of_image(self.config, of_image);
        let mut spec = match recorded {
            Some(spec) => spec,
            None => self.spec(image, &user)?,
        };
        let bundle = self.sandbox.records.bundle(&self.container.id);
        let has_own_hooks = spec.oci.hooks.is_some() && self.sandbox.driver.is_none();
        if has_own_hooks {
            let put = driver::put_bundle_for_hooks(&bundle, &mut spec.oci);
            put.map_err(|error| self.failed("writing the bundle of", &error))?;
        }
        let plan = spec.launch_plan(&self.container.id, &bundle, &self.core.host.facts);
        let plan = plan.map_err(|error| Error::InvalidArgument(error.to_string()))?;
        let made = files::copies(self.sandbox, shared, file_label);
        let made = made.map_err(|error| self.failed("sharing memory and files with", &error))?;
        let mounts = spec.open_sources(&plan, made, users.as_ref().map(OwnedFd::as_fd), &self.core.images)?;
        let log = log_of(self.core, self.sandbox, self.config);
        let log = log.map_err(|error| self.failed("opening the log of", &error))?;
        let way = match &self.sandbox.driver {
            None => {
                self.make_group(&spec)?;
                Way::Own(Box::new(plan))
            }
            Some(driver) => Way::Driven(self.put_bundle(driver, &spec)?),
        };
        Ok(Made { ready: Ready { way, root, mounts, log }, spec, user, stop_signal, stop_signal_name })
    }

    /// Those of the pod or of its own; a container of an earlier daemon has them already.
    fn choose_labels(&self) -> Result<(), Error> {
        if self.container.labels().is_none() {
            let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
            let options = security.and_then(|security| security.selinux_options.as_ref());
            self.container.set_labels(self.core.selinux.of_container(options, self.sandbox.labels.as_ref())?);
        }
        Ok(())
    }

    /// The configuration, as plugins want it.
    fn spec(&self, image: &Image, user: &ResolvedUser) -> Result<ContainerSpec, Error> {
        let labels = self.container.labels();
        let file_label = labels.map(|labels| labels.file.as_str());
        let prepared = spec::prepare(self.config, &self.core.host, file_label)?;
        let files = files::of(self.sandbox);
        let mut spec = spec::container_spec(&ContainerInput {
            id: &self.container.id,
            sandbox_id: &self.sandbox.id,
            config: self.config,
            sandbox: &self.sandbox.config,
            image: &image.config,
            user,
            prepared: &prepared,
            files: &files,
            namespaces: &self.namespaces(),
            cgroup_path: &self.container.group.path().to_string_lossy(),
            host: &self.core.host,
            labels,
        })?;
        spec.resolve_images(&self.core.images)?;
        for warning in &spec.warnings {
            tracing::warn!(container = self.container.id, "{warning}");
        }
        self.threads.block_on(plugins::create(self.core, self.sandbox, self.container, &mut spec))?;
        Ok(spec)
    }

    fn failed(&self, step: &str, error: &(dyn std::error::Error + 'static)) -> Error {
        failed(&format!("{step} container"), &self.container.id, error)
    }

    /// The pod's namespaces that the container joins; the paths are for people who read the configuration.
    fn namespaces(&self) -> BTreeMap<NamespaceKind, String> {
        let (pod, own) = (self.sandbox.namespaces(), namespace_options(self.config));
        let keeper = self.sandbox.live().keeper_pid;
        let of_pod = |kind| (kind, format!("/proc/{keeper}/ns/{}", executor::namespaces::file_name(kind)));
        let mut joined = BTreeMap::new();
        if pod.network() != NamespaceMode::Node {
            joined.extend([of_pod(NamespaceKind::Network), of_pod(NamespaceKind::Uts)]);
        }
        if pod.ipc() != NamespaceMode::Node {
            joined.extend([of_pod(NamespaceKind::Ipc)]);
        }
        if pod.userns_options.is_some() {
            joined.extend([of_pod(NamespaceKind::User)]);
        }
        match own.pid() {
            NamespaceMode::Pod => joined.extend([of_pod(NamespaceKind::Pid)]),
            NamespaceMode::Target => {
                joined.extend([(NamespaceKind::Pid, format!("container:{}", own.target_id))]);
            }
            NamespaceMode::Container | NamespaceMode::Node => {}
        }
        joined
    }

    fn put_bundle(&self, driver: &Driver, spec: &ContainerSpec) -> Result<Bundle, Error> {
        if !spec.raw_environment.is_empty() {
            let handler = &self.sandbox.handler;
            let text = format!("variables that are not UTF-8 are not possible with the runtime handler {handler:?}");
            return Err(Error::InvalidArgument(text));
        }
        let group = &self.container.group;
        let path = group.path_for_others().map_err(|error| self.failed("finding the control group of", &error))?;
        let mut spec = spec.oci.clone();
        let base = match path {
            Some(path) => {
                spec.linux.get_or_insert_default().cgroups_path = path.to_string_lossy().into_owned();
                None
            }
            // It counts from where the runtime is itself.
            None => Some(self.core.hierarchy.group("")),
        };
        let bundle = driver.put_bundle(&self.container.id, spec, base, self.core.host.facts.capabilities);
        bundle.map_err(|error| self.failed("writing the bundle of", &error))
    }

    fn make_group(&self, spec: &ContainerSpec) -> Result<(), Error> {
        let resources = spec.oci.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
        let invalid = |error: executor::PlanError| Error::InvalidArgument(error.to_string());
        let (limits, devices) =
            (executor::limits(&resources).map_err(invalid)?, executor::device_rules(&resources).map_err(invalid)?);
        let group = &self.container.group;
        let made = group.create().and_then(|()| group.set(&limits)).and_then(|()| group.allow_devices(&devices));
        made.map_err(|error| self.failed("making the control group of", &error))
    }
}

/// Which namespaces a container wants.
pub(crate) fn namespace_options(config: &v1::ContainerConfig) -> v1::NamespaceOption {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security.and_then(|security| security.namespace_options.clone()).unwrap_or_default()
}

/// The request to the keeper, and the descriptors that go with it.
pub(crate) async fn request(
    sandbox: &Sandbox,
    container: &Container,
    config: &v1::ContainerConfig,
    ready: Ready,
) -> Result<(Request, Vec<OwnedFd>), Error> {
    let (joins, namespaces) = joins(sandbox, ready.joins(), &namespace_options(config)).await?;
    let (log, directory) = ready.log.unzip();
    let (id, mounts) = (container.id.clone(), count(&ready.mounts));
    let stdio = Stdio {
        tty: config.tty.then_some(WindowSize { rows: 0, columns: 0 }),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
    };
    let (request, cgroups) = match (ready.way, &sandbox.driver) {
        (Way::Driven(bundle), Some(driver)) => {
            let commands = driver.create_and_start(&id, config.tty);
            let entered = match &bundle.base {
                Some(base) => enter(base),
                None => Ok((CgroupEntry::Stay, Vec::new())),
            };
            let (cgroup, files) = entered
                .map_err(|error| failed("entering the control group above that of container", &container.id, &error))?;
            let (volumes, cgroups) = (bundle.volumes, count(&files));
            let drive = Drive { id, commands, mounts, cgroup, cgroups, volumes, joins, stdio, log };
            (Request::Drive(drive), files)
        }
        (Way::Own(plan), _) => {
            let entered = enter(&container.group);
            let (cgroup, files) =
                entered.map_err(|error| failed("entering the control group of container", &container.id, &error))?;
            let (plan, cgroups) = (Blob(plan.encode()), count(&files));
            let launch = Launch { id, plan, root: true, mounts, cgroup, cgroups, joins, stdio, log };
            (Request::Launch(launch), files)
        }
        (Way::Driven(_), None) => unreachable!("a bundle was written for a driver"),
    };
    let fds = directory.into_iter().chain([ready.root]).chain(ready.mounts).chain(cgroups).chain(namespaces);
    Ok((request, fds.collect()))
}

fn count(fds: &[OwnedFd]) -> u16 {
    // The keeper takes 253 descriptors; more are refused when the request is encoded.
    u16::try_from(fds.len()).unwrap_or(u16::MAX)
}

fn enter(group: &Cgroup) -> sys::Result<(CgroupEntry, Vec<OwnedFd>)> {
    Ok(match group.entry()? {
        Entry::Directory(directory) => (CgroupEntry::Directory, vec![directory]),
        Entry::Files(files) => (CgroupEntry::Files, files),
    })
}

/// The log file and its directory, made if it is missing; none where the client wants no log.
fn log_of(core: &Core, sandbox: &Sandbox, config: &v1::ContainerConfig) -> std::io::Result<Option<(Log, OwnedFd)>> {
    let Some(path) = log_path(sandbox, config) else { return Ok(None) };
    let Some(name) = Path::new(&path).file_name() else {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "the log path names no file"));
    };
    let limits = core.config.log_limits;
    let rotate = limits.map(|limits| Rotate { bytes_max: limits.bytes_max, files_max: limits.files_max });
    let log = Log { name: name.to_string_lossy().into_owned(), rotate };
    let directory = logs::open_directory(Path::new(&sandbox.config.log_directory), Path::new(&config.log_path))?;
    Ok(Some((log, directory)))
}

/// The full path of a container's log.
pub(crate) fn log_path(sandbox: &Sandbox, config: &v1::ContainerConfig) -> Option<String> {
    let wanted = !sandbox.config.log_directory.is_empty() && !config.log_path.is_empty();
    let path = || Path::new(&sandbox.config.log_directory).join(&config.log_path);
    wanted.then(|| path().to_string_lossy().into_owned())
}

/// The namespaces to join, and the descriptors of those that are not the pod's.
async fn joins(
    sandbox: &Sandbox,
    kinds: &[NamespaceKind],
    options: &v1::NamespaceOption,
) -> Result<(Vec<Join>, Vec<OwnedFd>), Error> {
    let (mut joins, mut fds) = (Vec::new(), Vec::new());
    for kind in kinds {
        let target = *kind == NamespaceKind::Pid && options.pid() == NamespaceMode::Target;
        if target {
            fds.push(namespace_of(sandbox, protocol::NamespaceKind::Pid, Some(&options.target_id)).await?);
        }
        let from = if target { JoinFrom::Fd } else { JoinFrom::Pod };
        joins.push(Join { kind: wire_kind(*kind)?, from });
    }
    Ok((joins, fds))
}

/// A namespace of the pod, or of one of its containers.
pub(crate) async fn namespace_of(
    sandbox: &Sandbox,
    kind: protocol::NamespaceKind,
    container: Option<&str>,
) -> Result<OwnedFd, Error> {
    let get = GetNamespace { kind, container: container.map(str::to_owned) };
    let asked = match sandbox.keeper() {
        Ok(keeper) => keeper.done(Request::GetNamespace(get), Vec::new()).await,
        Err(error) => Err(error),
    };
    let step = || format!("asking for the {kind:?} namespace of");
    let fds = match container {
        Some(id) => asked.map_err(|error| failed(&format!("{} container", step()), id, &error))?,
        None => asked.map_err(|error| failed(&format!("{} sandbox", step()), &sandbox.id, &error))?,
    };
    fds.into_iter().next().ok_or_else(|| Error::Internal("the keeper sent no namespace".to_owned()))
}

fn wire_kind(kind: NamespaceKind) -> Result<protocol::NamespaceKind, Error> {
    Ok(match kind {
        NamespaceKind::Network => protocol::NamespaceKind::Net,
        NamespaceKind::Uts => protocol::NamespaceKind::Uts,
        NamespaceKind::Ipc => protocol::NamespaceKind::Ipc,
        NamespaceKind::Pid => protocol::NamespaceKind::Pid,
        NamespaceKind::User => protocol::NamespaceKind::User,
        NamespaceKind::Mount => protocol::NamespaceKind::Mount,
        NamespaceKind::Cgroup => protocol::NamespaceKind::Cgroup,
        NamespaceKind::Time => {
            return Err(Error::InvalidArgument("a time namespace cannot be shared in a pod".to_owned()));
        }
    })
}
