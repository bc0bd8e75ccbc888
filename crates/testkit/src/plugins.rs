//! Plugins of a node, as real servers: what a kubelet finds in `plugins_registry`.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context as _;
use plugin::registration::registration_server::{Registration, RegistrationServer};
use plugin::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::{Request, Response, Status};

/// A server on a Unix socket, with a thread and a runtime of its own. It ends with this value, and its socket with it.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves one service on `socket`, which replaces what was there.
    ///
    /// # Errors
    /// The socket cannot be listened on.
    pub fn start<S>(socket: &Path, service: S) -> anyhow::Result<Self>
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        if let Some(directory) = socket.parent() {
            std::fs::create_dir_all(directory)?;
        }
        if let Err(error) = std::fs::remove_file(socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
        let listener = std::os::unix::net::UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("plugin".into()).spawn(move || {
            let served = async {
                let incoming = UnixListenerStream::new(UnixListener::from_std(listener)?);
                tokio::select! {
                    served = tonic::transport::Server::builder().serve_with_incoming(service, incoming) => served.map_err(std::io::Error::other),
                    // Calls that hang end, too.
                    _ = stopped => Ok(()),
                }
            };
            if let Err(error) = runtime.block_on(served) {
                eprintln!("a plugin of the test: {error}");
            }
        })?;
        Ok(Self { socket: socket.to_owned(), stop: Some(stop), thread: Some(thread) })
    }

    /// Ends as a process does that is killed: the socket stays.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok(); // What it panicked of is on stderr.
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
            std::fs::remove_file(&self.socket).ok(); // It may have been replaced or removed.
        }
    }
}

/// What a plugin says of itself, and what it is told.
#[derive(Debug, Clone)]
pub struct Registrar {
    info: PluginInfo,
    told: Arc<watch::Sender<Vec<RegistrationStatus>>>,
    hangs: Arc<Mutex<bool>>,
}

impl Registrar {
    /// A plugin of this kind and name that serves at `endpoint`.
    pub fn new(kind: &str, name: &str, endpoint: &Path, versions: &[&str]) -> Self {
        let info = PluginInfo {
            r#type: kind.to_owned(),
            name: name.to_owned(),
            endpoint: endpoint.to_string_lossy().into_owned(),
            supported_versions: versions.iter().map(|&version| version.to_owned()).collect(),
        };
        Self { info, told: Arc::new(watch::Sender::new(Vec::new())), hangs: Arc::default() }
    }

    /// Answers nothing from now on, or again.
    pub fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap_or_else(PoisonError::into_inner) = hangs;
    }

    /// What the node agent has told so far; changes with each news.
    pub fn told(&self) -> watch::Receiver<Vec<RegistrationStatus>> {
        self.told.subscribe()
    }

    /// Serves it on `socket`.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn serve(&self, socket: &Path) -> anyhow::Result<Server> {
        Server::start(socket, RegistrationServer::new(self.clone()))
    }
}

#[async_trait::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        if *self.hangs.lock().unwrap_or_else(PoisonError::into_inner) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        status: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        self.told.send_modify(|told| told.push(status.into_inner()));
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
