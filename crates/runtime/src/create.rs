//! Making and starting containers.

use std::path::{Component, Path};
use std::sync::Arc;

use cri::v1::{self, ContainerEventType as Kind};
use cri::{Error, v1::NamespaceMode};
use image::Image;
use nri::api::Event;

use crate::client::ClientError;
use crate::container::{Container, Phase};
use crate::core::{Core, blocking, failed, new_id, now};
use crate::launch::{self, Ready, namespace_options};
use crate::record::{ContainerRecord, End, Progress};
use crate::sandbox::{self, Sandbox};
use crate::selinux::Labels;
use crate::single::Outcome;
use crate::spec::ContainerSpec;
use crate::table::Entered;
use crate::{exec, exits, plugins};

/// What a container that could not be started has as its exit code and reason, as under containerd.
const START_ERROR: (i32, &str) = (128, "StartError");

/// Makes a container, or joins the making of one with its name.
pub(crate) async fn create(core: &Arc<Core>, request: v1::CreateContainerRequest) -> Result<String, Error> {
    let sandbox = core.table.sandbox(&request.pod_sandbox_id)?;
    must_be_ready(&sandbox)?;
    let config = request.config.ok_or_else(|| Error::InvalidArgument("the container's config is missing".into()))?;
    if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(Error::InvalidArgument("the container's metadata needs a name".into()));
    }
    check_log_path(&config.log_path)?;
    loop {
        let record =
            ContainerRecord { id: new_id(), created_at: now(), config: Some(config.clone()), ..Default::default() };
        let fresh = Container::new(&sandbox, record, Phase::Making);
        let container = match core.table.enter_container(&sandbox, fresh) {
            Entered::New(container) | Entered::There(container) => container,
        };
        if container.phase() == Phase::Making {
            let (core, sandbox, made) = (core.clone(), sandbox.clone(), container.clone());
            container.create.run(&core.tasks.clone(), || make(core, sandbox, made)).await?;
        }
        if !container.is_gone() {
            return Ok(container.id.clone());
        }
        // One that could not be taken away still has the name: that is tried again, and its failure is the answer.
        crate::stop::remove(core, &sandbox, &container).await?;
    }
}

/// A log is a file below the directory of its pod's logs, however it is called.
fn check_log_path(path: &str) -> Outcome {
    let is_name = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    if Path::new(path).components().all(is_name) {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!("log_path: {path:?} does not lie below the sandbox's log_directory")))
}

fn must_be_ready(sandbox: &Sandbox) -> Outcome {
    if sandbox.phase() == sandbox::Phase::Ready {
        return Ok(());
    }
    Err(Error::FailedPrecondition(format!("sandbox {} is not ready: its containers cannot begin any more", sandbox.id)))
}

async fn make(core: Arc<Core>, sandbox: Arc<Sandbox>, container: Arc<Container>) -> Outcome {
    if container.phase() != Phase::Making || container.is_gone() {
        return Ok(()); // Somebody else made it between the look and the call.
    }
    match build(&core, &sandbox, &container).await {
        Ok(()) => {
            core.publish(Kind::ContainerCreatedEvent, &container.id, &sandbox);
            plugins::tell(&core, Event::PostCreateContainer, &sandbox, &container).await;
            Ok(())
        }
        Err(error) => {
            exits::discard(&core, &sandbox, &container).await.unwrap_or_else(|undo| {
                tracing::warn!(container = container.id, error = %undo, "a container that could not be made left something");
            });
            Err(error)
        }
    }
}

async fn build(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Outcome {
    let fail = |error: std::io::Error| failed("recording container", &container.id, &error);
    let (record, config) = {
        let record = container.record();
        (record.clone(), record.config.clone().unwrap_or_default())
    };
    check_target(sandbox, &config)?;
    check_mounts(core, sandbox, &config)?;
    let image = image_of(core, &config)?;
    sandbox.records.put_container(&record).map_err(fail)?;
    let made = launch::prepare(core, sandbox, container, config.clone(), image.clone(), None).await?;
    let json = serde_json::to_vec(&made.spec).map_err(|error| failed("recording container", &container.id, &error))?;
    sandbox.records.put_spec(&container.id, &json).map_err(fail)?;
    let resources = config.linux.as_ref().and_then(|linux| linux.resources.clone());
    let noted = container.update(|record| {
        record.progress = Progress::Made.into();
        record.image_id = image.id.to_string();
        record.image_ref = image_ref(&image);
        record.stop_signal = made.stop_signal.unsigned_abs();
        record.stop_signal_name = made.stop_signal_name.into();
        note_images(record, &made.spec);
        record.volume_images = made.spec.images.values().map(|mount| mount.image.clone()).collect();
        record.resources = resources;
        record.labels = container.labels().map(Labels::record);
        record.user = Some(v1::LinuxContainerUser {
            uid: made.user.uid.into(),
            gid: made.user.gid.into(),
            supplemental_groups: made.user.groups.iter().map(|group| i64::from(*group)).collect(),
        });
    });
    noted.map_err(fail)?;
    note_images(&mut container.record(), &made.spec); // An update leaves the configuration in memory as it is.
    container.live().ready = Some(made.ready);
    container.forget_request();
    // The sandbox may have been stopped, and with it this container, while its mounts were waited for.
    if !container.step(Phase::Making, Phase::Created) || container.is_gone() {
        return Err(Error::FailedPrecondition(format!("sandbox {} was stopped meanwhile", sandbox.id)));
    }
    Ok(())
}

/// Says in the mounts of images which images these are (KEP-5365).
fn note_images(record: &mut ContainerRecord, spec: &ContainerSpec) {
    for mount in record.config.iter_mut().flat_map(|config| &mut config.mounts) {
        let at = &mount.container_path;
        if let Some(image) = &mut mount.image {
            image.image_ref = spec.image_at(at).unwrap_or_default().to_owned();
        }
    }
}

/// Whether the sandbox's handler can make the mounts. The prefix is CRI's word for it (cri-api, `pkg/errors`).
fn check_mounts(core: &Core, sandbox: &Sandbox, config: &v1::ContainerConfig) -> Outcome {
    let handler = core.handlers.get(&sandbox.handler).filter(|handler| !handler.features.recursive_read_only_mounts);
    let mount = config.mounts.iter().find(|mount| mount.recursive_read_only);
    let (Some(_), Some(mount)) = (handler, mount) else { return Ok(()) };
    Err(Error::FailedPrecondition(format!(
        "RROUnsupported: the program of the runtime handler {:?} does not name recursive read-only mounts among its \
         features; {:?} may not ask for one: set recursiveReadOnly to IfPossible, or take another RuntimeClass",
        sandbox.handler, mount.container_path
    )))
}

fn check_target(sandbox: &Sandbox, config: &v1::ContainerConfig) -> Outcome {
    let options = namespace_options(config);
    if options.pid() != NamespaceMode::Target {
        return Ok(());
    }
    let target = sandbox.lock_containers().get(&options.target_id).cloned();
    match target.map(|target| target.phase()) {
        Some(Phase::Running) => Ok(()),
        Some(_) => Err(Error::FailedPrecondition(format!("the target container {} does not run", options.target_id))),
        None => Err(Error::InvalidArgument(format!("the sandbox has no target container {:?}", options.target_id))),
    }
}

/// The image, which has to be there: the client pulls before it creates.
fn image_of(core: &Core, config: &v1::ContainerConfig) -> Result<Arc<Image>, Error> {
    let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    core.images.get(name).ok_or_else(|| Error::NotFound { kind: "image", id: name.to_owned() })
}

/// `ContainerStatus.image_ref`: a name with digest if there is one.
fn image_ref(image: &Image) -> String {
    image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string())
}

/// Starts a container that was made.
pub(crate) async fn start(core: &Arc<Core>, id: &str) -> Outcome {
    let (sandbox, container) = core.table.container(id)?;
    let (core, begun) = (core.clone(), container.clone());
    container.start.run(&core.tasks.clone(), || begin(core, sandbox, begun)).await
}

async fn begin(core: Arc<Core>, sandbox: Arc<Sandbox>, container: Arc<Container>) -> Outcome {
    must_be_ready(&sandbox)?;
    if !container.step(Phase::Created, Phase::Starting) {
        let state = if container.phase() == Phase::Exited { "has ended" } else { "runs already" };
        return Err(Error::FailedPrecondition(format!("container {} {state}", container.id)));
    }
    match launch(&core, &sandbox, &container).await {
        Ok(()) => {
            exits::started(&core, &sandbox, &container);
            plugins::tell(&core, Event::PostStartContainer, &sandbox, &container).await;
            Ok(())
        }
        Err(error) => {
            let (exit_code, reason) = START_ERROR;
            let message = error.to_string();
            let end = End { started_at: 0, finished_at: now(), exit_code, reason: reason.to_owned(), message };
            exits::ended(&core, &sandbox, &container, end);
            Err(error)
        }
    }
}

async fn launch(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Outcome {
    let fail = |error: &(dyn std::error::Error + 'static)| failed("starting container", &container.id, error);
    plugins::start(core, sandbox, container).await?;
    let config = container.record().config.clone().unwrap_or_default();
    let taken = container.live().ready.take();
    let ready = match taken {
        Some(ready) => ready,
        None => again(core, sandbox, container).await?,
    };
    let (request, fds) = launch::request(sandbox, container, &config, ready).await?;
    let keeper = sandbox.keeper().map_err(|error| fail(&error))?;
    let started = keeper.start(request, fds).await;
    let (started, _) = started.map_err(|error| match last_words(sandbox, container, &error) {
        Some(words) => Error::Internal(format!("starting container {}: {words}", container.id)),
        None => fail(&error),
    })?;
    if sandbox.driver.is_some() {
        must_be_in_group(container, started.process.pid).await?;
    }
    for warning in started.warnings {
        tracing::warn!(container = container.id, "{warning}");
    }
    let mut live = container.live();
    live.pid = Some(started.process.pid);
    live.started_at = i64::try_from(started.process.at.0).unwrap_or(i64::MAX);
    Ok(())
}

/// Another OCI runtime makes the control group. In one that this runtime does not know there are no limits of the pod's, no
/// figures, and nothing that would be killed with it.
async fn must_be_in_group(container: &Container, pid: u32) -> Outcome {
    let group = container.group.clone();
    let processes = blocking(move || group.processes_below()).await;
    let is_there = processes.iter().any(|process| u32::try_from(process.as_raw_nonzero().get()) == Ok(pid));
    // One that has ended is in none.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let has_ended = state.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']));
    if is_there || has_ended {
        return Ok(());
    }
    let text = format!(
        "the runtime has not put container {} into the control group {}, for which it was asked: it takes no path \
         relative to its own group; start orlop in a group that has the same name in all hierarchies, or use version 2",
        container.id,
        container.group.path().display()
    );
    Err(Error::FailedPrecondition(text))
}

/// Why another OCI runtime has not started a container; the keeper only knows that it failed.
fn last_words(sandbox: &Sandbox, container: &Container, error: &ClientError) -> Option<String> {
    let driver = sandbox.driver.as_ref().filter(|_| matches!(error, ClientError::Refused(_)))?;
    driver.last_words(&container.id, None)
}

/// Prepares a container that was made by an earlier daemon.
async fn again(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Result<Ready, Error> {
    let record = sandbox.records.container(&container.id);
    let record = record.map_err(|error| failed("reading the record of container", &container.id, &error))?;
    let image = core.images.get(&record.image_id);
    let image = image.ok_or_else(|| Error::NotFound { kind: "image", id: record.image_id.clone() })?;
    // What plugins have made of it stays.
    let spec = exec::spec_of(sandbox, container).await?;
    let config = record.config.unwrap_or_default();
    let made = launch::prepare(core, sandbox, container, config, image, Some(spec)).await?;
    Ok(made.ready)
}
