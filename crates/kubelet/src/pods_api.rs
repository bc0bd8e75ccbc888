//! The Pods API: programs beside the node agent ask here for the node's pods, and follow them, without an API server.
//!
//! Who follows is told the difference between the pods as it knows them and as they are, whenever a worker has taken a step:
//! one that is slow gets fewer versions of a pod, and never loses one pod.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use plugin::pods::pods_server::{Pods, PodsServer};
use plugin::pods::{
    EventType, GetPodRequest, GetPodResponse, ListPodsRequest, ListPodsResponse, WatchPodsEvent, WatchPodsRequest,
};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::context::uid_of;
use crate::worker::Workers;

/// The socket, in the kubelet's root.
const SOCKET: &str = "pods-api/pods-api.sock";
/// Messages that wait for who follows; then it is not looked for more.
const WAITING_MAX: usize = 16;
/// Who follows at a time; each looks at all pods after each step of a worker.
const FOLLOWERS_MAX: usize = 64;

/// A pod and its status, which may be newer than the source's.
#[derive(Debug, Clone)]
struct Known {
    pod: Arc<Pod>,
    status: Option<Arc<PodStatus>>,
}

impl Known {
    fn is(&self, other: &Self) -> bool {
        let same_status = match (&self.status, &other.status) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        };
        Arc::ptr_eq(&self.pod, &other.pod) && same_status
    }

    fn encode(&self) -> Vec<u8> {
        let mut pod = Pod::clone(&self.pod);
        if let Some(status) = &self.status {
            pod.status = Some(merged(pod.status.take(), status));
        }
        encode(&pod)
    }
}

/// What the kubelet says, with what others have said: conditions of their own, the names of claims.
fn merged(others: Option<PodStatus>, own: &PodStatus) -> PodStatus {
    let (others, mut own) = (others.unwrap_or_default(), own.clone());
    let conditions = own.conditions.get_or_insert_default();
    let theirs = others.conditions.unwrap_or_default().into_iter();
    let theirs: Vec<_> = theirs.filter(|one| conditions.iter().all(|known| known.type_ != one.type_)).collect();
    conditions.extend(theirs);
    PodStatus {
        resource_claim_statuses: others.resource_claim_statuses,
        extended_resource_claim_status: others.extended_resource_claim_status,
        nominated_node_name: others.nominated_node_name,
        ..own
    }
}

fn encode(pod: &Pod) -> Vec<u8> {
    plugin::encode_pod(&serde_json::to_value(pod).unwrap_or_default())
}

/// Of a pod that has gone: who it was.
fn encode_name(pod: &Pod) -> Vec<u8> {
    let ObjectMeta { name, namespace, uid, .. } = pod.metadata.clone();
    encode(&Pod { metadata: ObjectMeta { name, namespace, uid, ..ObjectMeta::default() }, ..Pod::default() })
}

/// Serves below the kubelet's `root`, until `stop`; the task has ended when nobody is served any more. `steps` changes
/// whenever a worker has taken a step.
///
/// # Errors
/// The socket cannot be made.
pub(crate) async fn serve(
    root: &Path,
    workers: Arc<Mutex<Workers>>,
    steps: watch::Receiver<()>,
    stop: CancellationToken,
) -> io::Result<JoinHandle<()>> {
    let listener = cri::server::bind(&root.join(SOCKET)).await.map_err(io::Error::other)?;
    let followers = TaskTracker::new();
    let room = Arc::new(Semaphore::new(FOLLOWERS_MAX));
    let service = PodsServer::new(Server { workers, steps, followers: followers.clone(), room, stop: stop.clone() });
    Ok(tokio::spawn(async move {
        cri::server::serve_calls(listener, service, stop).await;
        followers.close();
        followers.wait().await;
    }))
}

struct Server {
    workers: Arc<Mutex<Workers>>,
    steps: watch::Receiver<()>,
    followers: TaskTracker,
    /// For followers.
    room: Arc<Semaphore>,
    stop: CancellationToken,
}

/// All pods, by uid.
fn now(workers: &Mutex<Workers>) -> BTreeMap<String, Known> {
    let workers = workers.lock().unwrap_or_else(PoisonError::into_inner);
    let shown = workers.values().map(|worker| worker.shown.lock().unwrap_or_else(PoisonError::into_inner));
    let known = shown.map(|shown| Known { pod: shown.pod.clone(), status: shown.status.clone() });
    known.map(|known| (uid_of(&known.pod).to_owned(), known)).collect()
}

#[tonic::async_trait]
impl Pods for Server {
    type WatchPodsStream = ReceiverStream<Result<WatchPodsEvent, Status>>;

    async fn list_pods(&self, _: Request<ListPodsRequest>) -> Result<Response<ListPodsResponse>, Status> {
        let pods = now(&self.workers).values().map(Known::encode).collect();
        Ok(Response::new(ListPodsResponse { pods }))
    }

    async fn get_pod(&self, request: Request<GetPodRequest>) -> Result<Response<GetPodResponse>, Status> {
        let uid = request.into_inner().pod_uid;
        let known = now(&self.workers).remove(&uid);
        let known = known.ok_or_else(|| Status::not_found(format!("pod with UID {uid} not found")))?;
        Ok(Response::new(GetPodResponse { pod: known.encode() }))
    }

    async fn watch_pods(&self, _: Request<WatchPodsRequest>) -> Result<Response<Self::WatchPodsStream>, Status> {
        let room = self.room.clone().try_acquire_owned().map_err(|_| {
            let text = format!("{FOLLOWERS_MAX} clients follow the node's pods already; end one of them");
            Status::resource_exhausted(text)
        })?;
        let (events, stream) = mpsc::channel(WAITING_MAX);
        let (workers, mut steps, stop) = (self.workers.clone(), self.steps.clone(), self.stop.clone());
        // It ends with who follows, or with the node agent.
        self.followers.spawn(stop.run_until_cancelled_owned(async move {
            let _room = room;
            let mut known = BTreeMap::new();
            let mut is_first = true;
            // An error: nobody follows any more.
            while tell(&events, &mut known, now(&workers)).await.is_ok() {
                if std::mem::take(&mut is_first) {
                    let event = WatchPodsEvent { r#type: EventType::InitialSyncComplete.into(), pod: Vec::new() };
                    if events.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    changed = steps.changed() => if changed.is_err() { return },
                    () = events.closed() => return,
                }
            }
        }));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Tells who follows what has changed since.
async fn tell(
    events: &mpsc::Sender<Result<WatchPodsEvent, Status>>,
    known: &mut BTreeMap<String, Known>,
    now: BTreeMap<String, Known>,
) -> Result<(), mpsc::error::SendError<Result<WatchPodsEvent, Status>>> {
    let event = |kind: EventType, pod| Ok(WatchPodsEvent { r#type: kind.into(), pod });
    for (uid, pod) in &now {
        let kind = match known.get(uid) {
            Some(before) if before.is(pod) => continue,
            Some(_) => EventType::Modified,
            None => EventType::Added,
        };
        events.send(event(kind, pod.encode())).await?;
    }
    for (_, gone) in known.iter().filter(|(uid, _)| !now.contains_key(*uid)) {
        events.send(event(EventType::Deleted, encode_name(&gone.pod))).await?;
    }
    *known = now;
    Ok(())
}
