//! All plugins of a node, and what the runtime asks and tells them.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use prost::Message as _;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, Container, ContainerUpdate, Event, PodSandbox};
use crate::connection::{Connection, Incoming};
use crate::merge::{Creation, Merge, Update};
use crate::plugin::{Name, Patience, Plugin, PluginError};

/// The number by which a plugin that was started finds its socket.
const SOCKET_NUMBER: i32 = 3;

/// How plugins come in. [`Config::default`] is as containerd 2 has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where plugins connect; nowhere if there is none.
    pub socket: Option<PathBuf>,
    /// Whether the runtime is of no use without that; else it says so and goes on.
    pub required: bool,
    /// Programs that are started with the runtime, each called as `10-name`.
    pub plugin_dir: PathBuf,
    /// Their configurations: `10-name.conf` or `name.conf`.
    pub plugin_config_dir: PathBuf,
    /// How long a plugin may take to register.
    pub registration_timeout: Duration,
    /// How long it may take to answer.
    pub request_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: Some("/var/run/nri/nri.sock".into()),
            required: false,
            plugin_dir: "/opt/nri/plugins".into(),
            plugin_config_dir: "/etc/nri/conf.d".into(),
            registration_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
        }
    }
}

/// The runtime, as plugins see it.
#[async_trait]
pub trait Host: Send + Sync {
    /// Its name and version.
    fn identity(&self) -> (String, String);

    /// All pods and containers of which plugins were told, or are being told now.
    async fn list(&self) -> (Vec<PodSandbox>, Vec<Container>);

    /// Changes the limits of containers; those that could not be changed.
    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate>;
}

/// Why plugins cannot connect.
#[derive(Debug, thiserror::Error)]
#[error("listening for NRI plugins on {}", path.display())]
pub struct StartError {
    /// The socket.
    pub path: PathBuf,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

/// The plugins of a node.
#[derive(Debug)]
pub struct Nri {
    config: Config,
    /// Guards the list, which is in the order in which they are asked.
    plugins: Mutex<Vec<Arc<Plugin>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Nri {
    /// Starts the plugins that are installed and listens for others, which come and go. One that does not do as it should
    /// is told of in the log, and is no error.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub async fn start(config: Config, host: Arc<dyn Host>) -> Result<Arc<Self>, StartError> {
        let listener = match config.socket.as_deref().map(listen).transpose() {
            Err(error) if !config.required => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no NRI plugin can connect");
                None
            }
            other => other?,
        };
        let nri = Arc::new(Self {
            config,
            plugins: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        for (path, name) in installed(&nri.config.plugin_dir) {
            nri.launch(&path, name, &host).await;
        }
        if let Some(listener) = listener {
            let served = nri.clone();
            nri.tasks.spawn(async move { served.serve(&listener, &host).await });
        }
        Ok(nri)
    }

    /// For a daemon that ends: lets the plugins go.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.plugins().iter().for_each(|plugin| plugin.connection.close());
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn plugins(&self) -> MutexGuard<'_, Vec<Arc<Plugin>>> {
        // Every section leaves it whole.
        self.plugins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Plugin>> {
        self.plugins().clone()
    }

    /// Whether there are none, and nothing has to be made for them.
    pub fn is_empty(&self) -> bool {
        self.plugins().is_empty()
    }

    /// Their names, in the order in which they are asked.
    pub fn names(&self) -> Vec<String> {
        self.plugins().iter().map(|plugin| plugin.title.clone()).collect()
    }

    async fn serve(self: Arc<Self>, listener: &UnixListener, host: &Arc<dyn Host>) {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, _)) => {
                    let (nri, host) = (self.clone(), host.clone());
                    self.tasks.spawn(async move { nri.take_part(socket, None, host, None).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "an NRI plugin cannot connect");
                    // Without descriptors the next one could not, either.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// Starts an installed plugin, and waits until it takes part or does not.
    async fn launch(self: &Arc<Self>, path: &Path, name: Name, host: &Arc<dyn Host>) {
        let (child, socket) = match start(path, &name) {
            Ok(started) => started,
            Err(error) => {
                tracing::warn!(plugin = %path.display(), %error, "an NRI plugin cannot be started");
                return;
            }
        };
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let (nri, host) = (self.clone(), host.clone());
        self.tasks.spawn(async move {
            let child = Launched(Some(child));
            nri.take_part(socket, Some(name), host, Some(ready)).await;
            drop(child);
        });
        let _ = is_ready.await; // It is dropped where the plugin does not take part.
    }

    /// A plugin's life on a connection.
    async fn take_part(
        self: Arc<Self>,
        socket: UnixStream,
        given: Option<Name>,
        host: Arc<dyn Host>,
        ready: Option<tokio::sync::oneshot::Sender<()>>,
    ) {
        let (connection, mut calls, work) = Connection::new(socket);
        self.tasks.spawn(work);
        let admitted = tokio::select! {
            () = self.stop.cancelled() => Err("the runtime ends".to_owned()),
            admitted = self.admit(connection.clone(), &mut calls, given, &host) => admitted,
        };
        let plugin = match admitted {
            Ok(plugin) => plugin,
            Err(error) => {
                tracing::warn!(error, "an NRI plugin does not take part");
                connection.close();
                return;
            }
        };
        tracing::info!(plugin = plugin.title, "an NRI plugin takes part");
        drop(ready);
        loop {
            let call = tokio::select! {
                () = connection.ended() => break,
                call = calls.recv() => call,
            };
            let Some(call) = call else { break };
            let answer = answer(&host, &call).await;
            connection.answer(call.stream, answer).await;
        }
        connection.close();
        self.plugins().retain(|one| !Arc::ptr_eq(one, &plugin));
        tracing::info!(plugin = plugin.title, "an NRI plugin has gone");
    }

    /// Enters it before it is synchronized: what happens meanwhile waits for its turn, so that it misses nothing.
    async fn admit(
        &self,
        connection: Arc<Connection>,
        calls: &mut tokio::sync::mpsc::Receiver<Incoming>,
        given: Option<Name>,
        host: &Arc<dyn Host>,
    ) -> Result<Arc<Plugin>, String> {
        let (name, version) = host.identity();
        let patience =
            Patience { registration: self.config.registration_timeout, request: self.config.request_timeout };
        let config = |name: &Name| configuration(&self.config.plugin_config_dir, name);
        let plugin = Plugin::admit(connection, calls, given, config, patience, (&name, &version)).await?;
        let plugin = Arc::new(plugin);
        let turn = plugin.turn().await;
        {
            let mut all = self.plugins();
            let at = all.partition_point(|one| one.name.index <= plugin.name.index);
            all.insert(at, plugin.clone());
        }
        let (pods, containers) = host.list().await;
        let updates = plugin.synchronize(pods, containers).await;
        drop(turn);
        match updates {
            Ok(updates) => {
                tell_failures(&plugin.title, &host.update(updates).await);
                Ok(plugin)
            }
            Err(error) => {
                self.plugins().retain(|one| !Arc::ptr_eq(one, &plugin));
                Err(format!("plugin {}: {error}", plugin.title))
            }
        }
    }

    /// Tells of an event that plugins answer nothing to.
    ///
    /// # Errors
    /// A plugin refuses.
    pub async fn tell(&self, event: Event, pod: PodSandbox, container: Option<Container>) -> Result<(), PluginError> {
        let about = api::StateChangeEvent { event: event.into(), pod: Some(pod), container };
        for plugin in self.all() {
            plugin.tell(event, &about).await?;
        }
        Ok(())
    }

    /// Tells of new limits for a whole pod.
    ///
    /// # Errors
    /// A plugin refuses.
    pub async fn update_pod(&self, request: &api::UpdatePodSandboxRequest) -> Result<(), PluginError> {
        for plugin in self.all() {
            plugin.ask::<api::Empty>(Event::UpdatePodSandbox, "UpdatePodSandbox", request).await?;
        }
        Ok(())
    }

    /// Asks what a container that is being made should be; each plugin sees it as those before it want it.
    ///
    /// # Errors
    /// A plugin refuses, or two want different things.
    pub async fn create_container(&self, pod: &PodSandbox, container: Container) -> Result<Creation, PluginError> {
        let pristine = container.clone();
        let mut merge = Merge::new(container);
        let all = self.all();
        for plugin in &all {
            let request =
                api::CreateContainerRequest { pod: Some(pod.clone()), container: Some(merge.container().clone()) };
            let answer = plugin.ask(Event::CreateContainer, "CreateContainer", &request).await?;
            if let Some(api::CreateContainerResponse { adjust, update, evict }) = answer {
                warn_of_evictions(plugin, &evict);
                merge.adjust(adjust.unwrap_or_default(), &plugin.title)?;
                merge.update_others(update, &plugin.title)?;
            }
        }
        let validators: Vec<&Arc<Plugin>> =
            all.iter().filter(|plugin| plugin.wants(Event::ValidateContainerAdjustment)).collect();
        if !validators.is_empty() {
            let instance = |plugin: &Arc<Plugin>| api::PluginInstance {
                name: plugin.name.base.clone(),
                index: plugin.name.index.clone(),
            };
            let request = api::ValidateContainerAdjustmentRequest {
                pod: Some(pod.clone()),
                container: Some(pristine),
                adjust: Some(merge.adjustment().clone()),
                update: merge.updates(),
                owners: Some(merge.owners()),
                plugins: all.iter().map(instance).collect(),
            };
            for plugin in validators {
                validate(plugin, &request).await?;
            }
        }
        Ok(merge.finish())
    }

    /// Asks what new limits of a container should be: of this one, and of others.
    ///
    /// # Errors
    /// As [`Nri::create_container`].
    pub async fn update_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: api::LinuxResources,
    ) -> Result<(api::LinuxResources, Vec<ContainerUpdate>), PluginError> {
        let mut update = Update::new(&container.id, resources);
        for plugin in self.all() {
            let request = api::UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: Some(update.resources()),
            };
            let answer = plugin.ask(Event::UpdateContainer, "UpdateContainer", &request).await?;
            if let Some(api::UpdateContainerResponse { update: wanted, evict }) = answer {
                warn_of_evictions(&plugin, &evict);
                update.apply(wanted, &plugin.title)?;
            }
        }
        Ok(update.finish())
    }

    /// Tells that a container was stopped; what plugins want changed of others now.
    ///
    /// # Errors
    /// As [`Nri::create_container`].
    pub async fn stop_container(
        &self,
        pod: PodSandbox,
        container: Container,
    ) -> Result<Vec<ContainerUpdate>, PluginError> {
        let mut update = Update::new("", api::LinuxResources::default());
        let request = api::StopContainerRequest { pod: Some(pod), container: Some(container) };
        for plugin in self.all() {
            let answer = plugin.ask(Event::StopContainer, "StopContainer", &request).await?;
            if let Some(api::StopContainerResponse { update: wanted }) = answer {
                update.apply(wanted, &plugin.title)?;
            }
        }
        Ok(update.finish().1)
    }
}

async fn validate(plugin: &Plugin, request: &api::ValidateContainerAdjustmentRequest) -> Result<(), PluginError> {
    let method = "ValidateContainerAdjustment";
    let answer = plugin.ask(Event::ValidateContainerAdjustment, method, request).await?;
    match answer {
        Some(api::ValidateContainerAdjustmentResponse { reject: true, reason }) => {
            Err(PluginError::Refused { plugin: plugin.title.clone(), message: reason })
        }
        _ => Ok(()),
    }
}

/// containerd does none of them, either.
fn warn_of_evictions(plugin: &Plugin, evictions: &[api::ContainerEviction]) {
    for eviction in evictions {
        let (container, reason) = (&eviction.container_id, &eviction.reason);
        tracing::warn!(
            plugin = plugin.title,
            container,
            reason,
            "an NRI plugin wants a container evicted, which is not done"
        );
    }
}

/// Tells of containers that could not be changed as a plugin wants it.
fn tell_failures(plugin: &str, failed: &[ContainerUpdate]) {
    for one in failed.iter().filter(|one| !one.ignore_failure) {
        tracing::warn!(plugin, container = one.container_id, "a container cannot be changed as an NRI plugin wants it");
    }
}

async fn answer(host: &Arc<dyn Host>, call: &Incoming) -> Result<Vec<u8>, String> {
    match call.method.as_str() {
        "UpdateContainers" => {
            let request = api::UpdateContainersRequest::decode(call.payload.as_slice()).map_err(|e| e.to_string())?;
            if !request.evict.is_empty() {
                return Err("containers are not evicted for plugins".to_owned());
            }
            let failed = host.update(request.update).await;
            let response = api::UpdateContainersResponse { failed };
            Ok(response.encode_to_vec())
        }
        "RegisterPlugin" => Err("it is registered already".to_owned()),
        other => Err(format!("there is no call {other}")),
    }
}

fn listen(path: &Path) -> Result<UnixListener, StartError> {
    let failed = |source| StartError { path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    if StdStream::connect(path).is_ok() {
        return Err(failed(io::Error::new(io::ErrorKind::AddrInUse, "another runtime listens there")));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// The programs in the directory that are called as plugins are, in their order.
fn installed(directory: &Path) -> Vec<(PathBuf, Name)> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_program = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
    };
    let mut found: Vec<(PathBuf, Name)> = entries
        .map(|entry| entry.path())
        .filter(|path| is_program(path))
        .filter_map(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).and_then(Name::parse);
            if name.is_none() {
                tracing::warn!(path = %path.display(), "an NRI plugin is called as 10-name; this one is left out");
            }
            name.map(|name| (path, name))
        })
        .collect();
    found.sort_by(|one, other| one.0.cmp(&other.0));
    found
}

fn configuration(directory: &Path, name: &Name) -> Result<String, String> {
    for file in [format!("{name}.conf"), format!("{}.conf", name.base)] {
        let path = directory.join(file);
        match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other.map_err(|error| format!("{}: {error}", path.display())),
        }
    }
    Ok(String::new())
}

/// A plugin that the runtime has started ends with its connection.
struct Launched(Option<Child>);

impl Drop for Launched {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        let _ = child.kill(); // It may have ended.
        // One that waits for a device does not end at once: a thread of its own waits. If no thread can be had, the zombie
        // goes with this process.
        let _ = std::thread::Builder::new().name("reap-nri-plugin".into()).spawn(move || child.wait());
    }
}

fn start(path: &Path, name: &Name) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    #[allow(clippy::disallowed_methods, reason = "the operator has installed it (R3)")]
    let mut command = Command::new(path);
    command.env_clear().env("NRI_PLUGIN_NAME", &name.base).env("NRI_PLUGIN_IDX", &name.index);
    command.env("NRI_PLUGIN_SOCKET", SOCKET_NUMBER.to_string()).current_dir("/");
    sys::program::give(&mut command, theirs.into(), SOCKET_NUMBER);
    let child = command.stdin(std::process::Stdio::null()).spawn()?;
    Ok((child, UnixStream::from_std(ours)?))
}
