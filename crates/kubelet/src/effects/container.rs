//! Creating and starting a container, and its postStart hook.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use cri::v1;
use k8s_openapi::api::core::v1::Container;
use k8s_openapi::jiff::Timestamp;
use pod::{Change, Stop};

use super::{Job, PATIENCE, time};
use crate::env::{self, Environment, Sources};
use crate::generate::{self, ImageUser, Request};
use crate::probing;
use crate::threads::patient;
use crate::volumes::{Cause, VolumeError};

/// The waiting reason with which runtimes begin what they say of an image that cannot be mounted.
const IMAGE_VOLUME: &str = "ImageVolumeMountFailed";

/// Why a container was not started.
enum Failed {
    /// The waiting reason and the cause.
    For { reason: &'static str, message: String },
    /// Its image was removed after it was pulled.
    NoImage { message: String },
    /// A volume was not made, as nobody used it before this container was added to the pod.
    NoVolume { message: String },
    /// An image that one of its volumes shows was removed after it was pulled, or cannot be mounted.
    NoVolumeImage { message: String },
    /// Nobody wants it any more.
    Aborted,
}

impl Failed {
    /// The waiting reason; none where nobody wants the container any more.
    fn code(&self) -> &'static str {
        match self {
            Self::For { reason, .. } => reason,
            Self::NoImage { .. } => "CreateContainerError",
            Self::NoVolume { .. } => "CreateContainerConfigError",
            Self::NoVolumeImage { .. } => IMAGE_VOLUME,
            Self::Aborted => "",
        }
    }

    fn create(message: impl ToString) -> Self {
        Self::For { reason: "CreateContainerError", message: message.to_string() }
    }

    /// What the runtime says when it cannot create a container.
    fn of_creation(error: cri::Error) -> Self {
        let message = error.to_string();
        if matches!(error, cri::Error::NotFound { kind: "image", .. }) {
            return Self::NoImage { message };
        }
        match message.strip_prefix(IMAGE_VOLUME) {
            Some(cause) => Self::NoVolumeImage { message: cause.trim_start_matches(": ").to_owned() },
            None => Self::create(message),
        }
    }
}

impl From<generate::GenerateError> for Failed {
    fn from(error: generate::GenerateError) -> Self {
        Self::For { reason: error.reason(), message: error.to_string() }
    }
}

impl From<VolumeError> for Failed {
    fn from(VolumeError { volume, cause }: VolumeError) -> Self {
        let message = format!("volume mount {volume:?}: {cause}");
        if matches!(cause, Cause::Unmade { .. }) {
            return Self::NoVolume { message };
        }
        Self::For { reason: "CreateContainerConfigError", message }
    }
}

impl Job {
    pub(super) async fn start(&self, name: &str, attempt: u32) {
        let started = self.started(name, attempt).await;
        self.count_start(name, started.as_ref().err().map(Failed::code));
        match started {
            Ok((id, at)) => {
                self.change(Change::Started { container: name.to_owned(), id, at });
                self.remove_old_runs(name, attempt).await;
            }
            Err(Failed::For { reason, message }) => self.start_failed(name, reason, message),
            Err(Failed::NoImage { message }) => {
                self.start_failed(name, "CreateContainerError", message);
                self.change(Change::ImageMissing { container: name.to_owned() });
            }
            Err(Failed::NoVolume { message }) => {
                self.start_failed(name, "CreateContainerConfigError", message);
                self.change(Change::VolumesMissing);
            }
            Err(Failed::NoVolumeImage { message }) => {
                self.start_failed(name, IMAGE_VOLUME, message);
                self.change(Change::VolumesMissing);
            }
            Err(Failed::Aborted) => {}
        }
    }

    /// A start that was given up is none.
    fn count_start(&self, name: &str, failed: Option<&str>) {
        if let Some((role, _)) = pod::spec::container(&self.pod, name)
            && failed != Some("")
        {
            self.context.parts.metrics.container_started(role, failed);
        }
    }

    fn start_failed(&self, name: &str, reason: &str, message: String) {
        self.change(Change::StartFailed { container: name.to_owned(), reason: reason.to_owned(), message });
    }

    async fn started(&self, name: &str, attempt: u32) -> Result<(String, Timestamp), Failed> {
        let (role, container) =
            pod::spec::container(&self.pod, name).ok_or_else(|| Failed::create("it is no longer in the pod"))?;
        let sandbox = self.sandbox.clone().ok_or_else(|| Failed::create("the sandbox has gone"))?;
        let config = self.wanted(Duration::ZERO, self.container_config(role, &container, attempt)).await?;
        let resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let cpus = resources.map(|resources| resources.cpuset_cpus.clone()).filter(|cpus| !cpus.is_empty());
        let id = self.wanted(PATIENCE, self.create(&sandbox, config, name, attempt)).await?;
        self.context.parts.resources.made(self.uid(), name, &id, cpus);
        self.context.normal(&self.pod, "Created", "Container created".to_owned(), Some(name));
        self.wanted(PATIENCE, self.begin(&id)).await?;
        self.context.normal(&self.pod, "Started", "Container started".to_owned(), Some(name));
        let request = v1::ContainerStatusRequest { container_id: id.clone(), verbose: false };
        let status = self.context.parts.runtime.container_status(request).await.ok().and_then(|answer| answer.status);
        let at = status.and_then(|status| time(status.started_at)).unwrap_or_else(Timestamp::now);
        Ok((id, at))
    }

    /// A step of a start. One that is given up leaves what goes with the sandbox.
    async fn wanted<T>(&self, patience: Duration, step: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        self.unless_aborted(patience, step).await.unwrap_or(Err(Failed::Aborted))
    }

    /// Starts a container that was made. One that runs has been started by a daemon that died before it knew.
    async fn begin(&self, id: &str) -> Result<(), Failed> {
        let runtime = &self.context.parts.runtime;
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        let Err(error) = runtime.start_container(request).await else { return Ok(()) };
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let status = runtime.container_status(request).await.ok().and_then(|answer| answer.status);
        if status.is_some_and(|status| status.state == v1::ContainerState::ContainerRunning as i32) {
            return Ok(());
        }
        // It stays for nothing: the next try makes another.
        let _ = runtime.remove_container(v1::RemoveContainerRequest { container_id: id.to_owned() }).await;
        Err(Failed::For { reason: "RunContainerError", message: error.to_string() })
    }

    async fn container_config(
        &self,
        role: pod::spec::Role,
        container: &Container,
        attempt: u32,
    ) -> Result<v1::ContainerConfig, Failed> {
        if let (Some(target), None) = (pod::spec::target(&self.pod, &container.name), &self.target) {
            let message = format!("unable to find target container {target:?}: it does not run");
            return Err(Failed::For { reason: "CreateContainerConfigError", message });
        }
        let unready = |message| Failed::For { reason: "CreateContainerConfigError", message };
        let mut extras = self.context.parts.resources.prepare(&self.pod, container).await.map_err(unready)?;
        let image = self.image.clone().unwrap_or_default();
        let user = self.image_user(&image).await?;
        let volumes = self.shared.volumes();
        let paths = volumes.as_ref().map(|volumes| volumes.host_paths()).unwrap_or_default();
        let environment = self.environment(container, &paths).await?;
        let mut mounts = std::mem::take(&mut extras.mounts);
        if let Some(volumes) = &volumes {
            mounts.extend(volumes.mounts_for(container, &environment).await?);
        }
        let devices = volumes.as_ref().map(|volumes| volumes.devices_for(container)).transpose()?.unwrap_or_default();
        let request = Request {
            pod: &self.pod,
            role,
            container,
            attempt,
            image_ref: &image,
            image_user: &user,
            ips: &self.addresses,
            mounts: &mounts,
            volumes: &paths,
            target: self.target.as_deref(),
            users: self.users().map_err(Failed::create)?,
            store: self.context.parts.source.store(),
        };
        let config = &self.context.config.generate;
        generate::prepare_files(config, &request)?;
        let mut made = generate::container_config_with(config, &request, &environment)?;
        extras.apply(&mut made);
        made.devices.extend(devices);
        Ok(made)
    }

    /// What the container's environment is. Files of volumes, which it may come from, may be on a file system that does not
    /// answer: they are read on a thread of their own.
    async fn environment(
        &self,
        container: &Container,
        volumes: &BTreeMap<String, PathBuf>,
    ) -> Result<Environment, Failed> {
        // Also of a container that starts again: its ConfigMaps may be others since, and this daemon younger.
        let unknown = |message| Failed::For { reason: "CreateContainerConfigError", message };
        self.look_up().await.map_err(unknown)?;
        let made = if env::reads_files(container) {
            let (job, container, volumes) = (self.clone(), container.clone(), volumes.clone());
            patient(move || env::of_container(&container, &job.sources(&volumes))).await.map_err(Failed::create)?
        } else {
            env::of_container(container, &self.sources(volumes))
        };
        made.map_err(|error| generate::GenerateError::from(error).into())
    }

    fn sources<'a>(&'a self, volumes: &'a BTreeMap<String, PathBuf>) -> Sources<'a> {
        Sources {
            pod: &self.pod,
            ips: &self.addresses,
            node: &self.context.config.generate.node,
            store: self.context.parts.source.store(),
            volumes,
        }
    }

    async fn image_user(&self, image: &str) -> Result<ImageUser, Failed> {
        let spec = v1::ImageSpec { image: image.to_owned(), ..v1::ImageSpec::default() };
        let request = v1::ImageStatusRequest { image: Some(spec), verbose: false };
        let answer = self.context.parts.images.image_status(request).await.map_err(Failed::create)?;
        let missing = || Failed::NoImage { message: format!("image {image} was removed") };
        answer.image.as_ref().map(ImageUser::of).ok_or_else(missing)
    }

    /// Creates the container. One of the same attempt is what a daemon that died in between left: it never ran.
    async fn create(
        &self,
        sandbox: &str,
        config: v1::ContainerConfig,
        name: &str,
        attempt: u32,
    ) -> Result<String, Failed> {
        let mut sandbox_config = match self.shared.sandbox_config() {
            Some(config) => config,
            None => self.sandbox_config(0).map_err(Failed::create)?,
        };
        // A privileged container may have been added to a pod that had none.
        let security = sandbox_config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.into_iter().for_each(|security| security.privileged |= generate::is_privileged(&self.pod));
        let runtime = &self.context.parts.runtime;
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        match runtime.create_container(request.clone()).await {
            Ok(answer) => Ok(answer.container_id),
            Err(cri::Error::AlreadyExists(_)) => {
                self.remove_runs(sandbox, name, |other| other == attempt).await?;
                let created = runtime.create_container(request).await;
                created.map(|answer| answer.container_id).map_err(Failed::of_creation)
            }
            Err(error) => Err(Failed::of_creation(error)),
        }
    }

    /// Of a container's runs the newest and the one before it stay, for its log and its state; the others go with their
    /// root file systems and log files.
    async fn remove_old_runs(&self, name: &str, newest: u32) {
        let Some(sandbox) = &self.sandbox else { return };
        // What is left goes after the next start, or with the pod.
        if let Err(Failed::For { message, .. }) = self.remove_runs(sandbox, name, |attempt| attempt + 1 < newest).await
        {
            tracing::warn!(container = name, message, "an old run cannot be removed");
        }
    }

    /// Removes runs of a container, chosen by their attempts.
    async fn remove_runs(&self, sandbox: &str, name: &str, chosen: impl Fn(u32) -> bool) -> Result<(), Failed> {
        let runtime = &self.context.parts.runtime;
        let filter = v1::ContainerFilter { pod_sandbox_id: sandbox.to_owned(), ..v1::ContainerFilter::default() };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        for run in runtime.list_containers(request).await.map_err(Failed::create)?.containers {
            if run.metadata.is_some_and(|metadata| metadata.name == name && chosen(metadata.attempt)) {
                let request = v1::RemoveContainerRequest { container_id: run.id };
                runtime.remove_container(request).await.map_err(Failed::create)?;
            }
        }
        Ok(())
    }

    pub(super) async fn post_start(&self, name: &str, id: &str) {
        let Some((_, container)) = pod::spec::container(&self.pod, name) else { return };
        let handler = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        let Some(handler) = handler else { return };
        let runtime = &*self.context.parts.runtime;
        match probing::hook(runtime, self.target(&container, id), handler, None).await {
            Ok(()) => self.change(Change::PostStarted { container: name.to_owned(), id: id.to_owned() }),
            Err(message) => {
                self.context.warning(
                    &self.pod,
                    "FailedPostStartHook",
                    format!("PostStartHook failed: {message}"),
                    Some(name),
                );
                let reason = "FailedPostStartHook".to_owned();
                let grace_s = pod::spec::grace_s(&self.pod);
                self.stop(&Stop { container: name.to_owned(), id: id.to_owned(), grace_s, reason, replaces: false })
                    .await;
            }
        }
    }
}
