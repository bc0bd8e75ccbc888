//! Both services of CRI as gRPC on one Unix socket, for node agents that are other programs: crictl, a foreign kubelet.
//!
//! ```text
//! socket ─► AnyAuthority ─► HTTP/2 ─► path ─┬─ /runtime.v1.RuntimeService/… ─► RuntimeService
//!                                           ├─ /runtime.v1.ImageService/…   ─► ImageService
//!                                           ├─ /containerd.services.…       ─► Tasks, for cAdvisor
//!                                           ╰─ any other                    ─► Unimplemented
//! ```
//!
//! A call whose client goes away is dropped where it waits, its `grpc-timeout` is the client's business alone: what
//! has to be finished nevertheless, the services finish.

mod authority;
mod containerd;
mod services;
mod socket;

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service as _;

use crate::v1::image_service_server::ImageServiceServer;
use crate::v1::runtime_service_server::RuntimeServiceServer;
use crate::{ImageService, RuntimeService};
use authority::AnyAuthority;
pub use containerd::{Process, Task, Tasks};
use services::Served;
pub use socket::{BindError, bind};

/// The longest message in either direction; what upstream's clients and runtimes allow.
pub const MESSAGE_MAX: usize = 16 << 20;

/// How long no connection is accepted after the kernel had no resources for one.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

type RuntimeServer = RuntimeServiceServer<Served<dyn RuntimeService>>;
type ImageServer = ImageServiceServer<Served<dyn ImageService>>;

/// The services, ready to answer.
#[derive(Clone)]
struct Services {
    runtime: RuntimeServer,
    images: ImageServer,
    tasks: Option<Arc<dyn Tasks>>,
}

/// Serves until `stop`, then no longer accepts connections nor calls, ends streams, and waits for the answers of the
/// calls that are under way. How long that may last is the caller's decision: dropping the future cuts off the rest.
/// The file of the socket is removed at the end.
pub async fn serve(
    listener: UnixListener,
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
    stop: CancellationToken,
) {
    serve_calls(listener, Services::new(runtime, images, None, &stop), stop).await;
}

/// As [`serve`]; whoever takes the runtime for containerd finds `tasks`.
pub async fn serve_with_tasks(
    listener: UnixListener,
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
    tasks: Arc<dyn Tasks>,
    stop: CancellationToken,
) {
    serve_calls(listener, Services::new(runtime, images, Some(tasks), &stop), stop).await;
}

/// As [`serve`], of another service: what is generated for one by `tonic` can be given here. The kubelet's own sockets, on
/// which plugins register, have the same clients as CRI and need the same patience with them.
pub async fn serve_calls<S: Calls>(listener: UnixListener, service: S, stop: CancellationToken) {
    let tasks = Connections::new();
    let _cut_off = tasks.cut_off.clone().drop_guard();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => tasks.spawn(connection(stream, service.clone(), tasks.clone(), stop.clone())),
            Err(error) => {
                tracing::warn!(%error, "a client could not connect");
                // The kernel has no event for descriptors or memory that become free.
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    socket::remove(&listener);
    drop(listener);
    tasks.tracker.close();
    tasks.tracker.wait().await;
}

impl Services {
    fn new(
        runtime: Arc<dyn RuntimeService>,
        images: Arc<dyn ImageService>,
        tasks: Option<Arc<dyn Tasks>>,
        stop: &CancellationToken,
    ) -> Self {
        let runtime = RuntimeServiceServer::new(Served { service: runtime, stop: stop.clone() });
        let images = ImageServiceServer::new(Served { service: images, stop: stop.clone() });
        Self {
            runtime: runtime.max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX),
            images: images.max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX),
            tasks,
        }
    }

    async fn route(mut self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        match (request.uri().path().split('/').nth(1), self.tasks) {
            (Some(RuntimeServer::NAME), _) => self.runtime.call(request).await,
            (Some(ImageServer::NAME), _) => self.images.call(request).await,
            (Some(name), Some(tasks)) if name.starts_with(containerd::PACKAGE) => {
                Ok(containerd::answer(tasks, request).await)
            }
            _ => {
                let message = format!("{} is no call of CRI v1", request.uri().path());
                Ok(tonic::Status::unimplemented(message).into_http())
            }
        }
    }
}

impl tower_service::Service<Request<Incoming>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        self.clone().route(request).boxed()
    }
}

/// What answers the calls of a connection.
pub trait Calls:
    tower_service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Calls for S where
    S: tower_service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// Speaks HTTP/2 with one client until it goes, or until all its calls are answered after `stop`.
async fn connection<S: Calls>(stream: UnixStream, service: S, tasks: Connections, stop: CancellationToken) {
    let io = TokioIo::new(AnyAuthority::new(stream));
    let answer = service_fn(move |request| service.clone().call(request));
    let connection =
        hyper::server::conn::http2::Builder::new(tasks).timer(TokioTimer::new()).serve_connection(io, answer);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = &error as &dyn std::error::Error, "a client's connection broke");
    }
}

/// The connections and their calls; all of them end when `cut_off` says so.
#[derive(Clone)]
struct Connections {
    tracker: TaskTracker,
    cut_off: CancellationToken,
}

impl Connections {
    fn new() -> Self {
        Self { tracker: TaskTracker::new(), cut_off: CancellationToken::new() }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let cut_off = self.cut_off.clone();
        self.tracker.spawn(async move { cut_off.run_until_cancelled(task).await });
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Connections {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}
