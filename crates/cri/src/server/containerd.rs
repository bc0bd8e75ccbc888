//! Three calls of containerd's own API, on the same socket: those by which cAdvisor, a part of upstream's kubelet, learns whose
//! a control group is and in whose network its pod is. It asks at containerd's address whoever answers there, and knows of no
//! way to ask a runtime whose name it does not know.
//!
//! The messages have the fields that it reads; protobuf lets one leave out the others
//! (containerd: `api/services/{containers,tasks,version}/v1`, `api/types/task`).

use std::collections::HashMap;
use std::future::{Ready, ready};
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use prost::Message;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic_prost::ProstCodec;

use crate::Error;

/// What the services of this API have in common in their names.
pub(super) const PACKAGE: &str = "containerd.services.";

const CONTAINER: &str = "/containerd.services.containers.v1.Containers/Get";
const TASK: &str = "/containerd.services.tasks.v1.Tasks/Get";
const VERSION: &str = "/containerd.services.version.v1.Version/Version";

/// The label that tells sandboxes, which have their pod's network, from containers.
const KIND: &str = "io.cri-containerd.kind";
/// What a container's configuration is called.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// A configuration that hides everything, variables with secrets above all, and can be read without looking twice.
const SPEC: &[u8] = br#"{"ociVersion":"1.3.0","process":{"user":{"uid":0,"gid":0},"cwd":"/","env":[]}}"#;

/// A sandbox or container as containerd knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// The image that it was made from.
    pub image: String,
    /// The sandbox that a container is in; a sandbox is in none.
    pub sandbox: Option<String>,
    /// When it was made, in nanoseconds since 1970.
    pub created_at: i64,
    /// Its first process; that of a sandbox is in the pod's network.
    pub process: Process,
}

/// The first process of a [`Task`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Process {
    /// There is none yet.
    #[default]
    None,
    /// It runs; of some there is no process id to tell.
    Runs(Option<u32>),
    /// It has ended with this code.
    Ended(i32),
}

/// Knows all of them.
pub trait Tasks: Send + Sync + 'static {
    /// The sandbox or container of exactly this id. One that is being made counts from before it has a control group, or
    /// cAdvisor takes that for nobody's once and for all.
    fn task(&self, id: &str) -> Option<Task>;
}

/// The answer to a call of this API.
pub(super) async fn answer(tasks: Arc<dyn Tasks>, request: Request<Incoming>) -> Response<Body> {
    let find = move |id: &str| tasks.task(id).ok_or_else(|| Error::NotFound { kind: "container", id: id.to_owned() });
    match request.uri().path() {
        CONTAINER => call(request, move |named: Named| find(&named.id).map(|task| container(named.id, task))).await,
        TASK => {
            call(request, move |named: Named| find(&named.id).and_then(|task| process(named.id, task.process))).await
        }
        VERSION => call(request, |_: Empty| Ok(version())).await,
        other => {
            let message = format!("{other} is containerd's, and this is another runtime; ask it by CRI");
            tonic::Status::unimplemented(message).into_http()
        }
    }
}

async fn call<M, R, F>(request: Request<Incoming>, answer: F) -> Response<Body>
where
    M: Message + Default + 'static,
    R: Message + Default + 'static,
    F: FnOnce(M) -> Result<R, Error> + Send,
{
    Grpc::new(ProstCodec::<R, M>::default()).unary(Call(Some(answer)), request).await
}

/// One call.
struct Call<F>(Option<F>);

impl<M, R, F: FnOnce(M) -> Result<R, Error>> UnaryService<M> for Call<F> {
    type Response = R;
    type Future = Ready<Result<tonic::Response<R>, tonic::Status>>;

    fn call(&mut self, request: tonic::Request<M>) -> Self::Future {
        let twice = || Error::Internal("a call is answered once".to_owned());
        let answered = self.0.take().ok_or_else(twice).and_then(|answer| answer(request.into_inner()));
        ready(answered.map(tonic::Response::new).map_err(Into::into))
    }
}

fn container(id: String, task: Task) -> GotContainer {
    let mut labels = task.labels;
    let kind = if task.sandbox.is_none() { "sandbox" } else { "container" };
    labels.insert(KIND.to_owned(), kind.to_owned());
    GotContainer {
        container: Some(Container {
            sandbox: task.sandbox.unwrap_or_else(|| id.clone()),
            id,
            labels,
            image: task.image,
            spec: Some(Any { type_url: SPEC_TYPE.to_owned(), value: SPEC.to_vec() }),
            created_at: Some(Timestamp {
                seconds: task.created_at.div_euclid(1_000_000_000),
                nanos: i32::try_from(task.created_at.rem_euclid(1_000_000_000)).unwrap_or_default(),
            }),
        }),
    }
}

/// Of one without a process there is no task: whoever asks asks again.
fn process(id: String, process: Process) -> Result<GotTask, Error> {
    let (status, pid, code) = match process {
        Process::None => return Err(Error::NotFound { kind: "task", id }),
        Process::Runs(pid) => (Status::Running, pid.unwrap_or_default(), 0),
        Process::Ended(code) => (Status::Stopped, 0, code),
    };
    let exit_status = u32::try_from(code).unwrap_or(u32::MAX);
    let process = TaskProcess { container_id: id.clone(), id, pid, status: status.into(), exit_status };
    Ok(GotTask { process: Some(process) })
}

fn version() -> GotVersion {
    GotVersion { version: format!("orlop {}", env!("CARGO_PKG_VERSION")) }
}

/// `GetContainerRequest`, `tasks.GetRequest`.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    id: String,
}

/// `google.protobuf.Empty`.
#[derive(Clone, PartialEq, Message)]
struct Empty {}

/// `GetContainerResponse`.
#[derive(Clone, PartialEq, Message)]
struct GotContainer {
    #[prost(message, optional, tag = "1")]
    container: Option<Container>,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(map = "string, string", tag = "2")]
    labels: HashMap<String, String>,
    #[prost(string, tag = "3")]
    image: String,
    #[prost(message, optional, tag = "5")]
    spec: Option<Any>,
    #[prost(message, optional, tag = "8")]
    created_at: Option<Timestamp>,
    #[prost(string, tag = "11")]
    sandbox: String,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Timestamp {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

/// `tasks.GetResponse`.
#[derive(Clone, PartialEq, Message)]
struct GotTask {
    #[prost(message, optional, tag = "1")]
    process: Option<TaskProcess>,
}

#[derive(Clone, PartialEq, Message)]
struct TaskProcess {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    id: String,
    #[prost(uint32, tag = "3")]
    pid: u32,
    #[prost(enumeration = "Status", tag = "4")]
    status: i32,
    #[prost(uint32, tag = "9")]
    exit_status: u32,
}

/// `containerd.v1.types.Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Status {
    Unknown = 0,
    Running = 2,
    Stopped = 3,
}

/// `VersionResponse`.
#[derive(Clone, PartialEq, Message)]
struct GotVersion {
    #[prost(string, tag = "1")]
    version: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_told_from_its_containers() {
        let labels = HashMap::from([("io.kubernetes.pod.name".to_owned(), "web".to_owned())]);
        let task = Task { labels, image: "i".into(), created_at: 3_000_000_007, ..Task::default() };
        let told = container("s".into(), task.clone()).container.unwrap();
        assert_eq!((told.labels[KIND].as_str(), told.sandbox.as_str()), ("sandbox", "s"));
        assert_eq!(told.labels["io.kubernetes.pod.name"], "web");
        assert_eq!(told.created_at, Some(Timestamp { seconds: 3, nanos: 7 }));
        let told = container("c".into(), Task { sandbox: Some("s".into()), ..task }).container.unwrap();
        assert_eq!((told.labels[KIND].as_str(), told.sandbox.as_str()), ("container", "s"));
    }

    #[test]
    fn there_is_a_task_from_the_first_process_on() {
        let told = |state| process("c".into(), state).map(|got| got.process.unwrap());
        assert_eq!(told(Process::None), Err(Error::NotFound { kind: "task", id: "c".into() }));
        let runs = told(Process::Runs(Some(7))).unwrap();
        assert_eq!((runs.pid, runs.status()), (7, Status::Running));
        assert_eq!(told(Process::Runs(None)).unwrap().pid, 0);
        let ended = told(Process::Ended(137)).unwrap();
        assert_eq!((ended.pid, ended.status(), ended.exit_status), (0, Status::Stopped, 137));
    }
}
