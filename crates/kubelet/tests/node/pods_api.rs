//! The Pods API: the node's pods for programs beside it.

use plugin::pods::pods_client::PodsClient;
use plugin::pods::{EventType, GetPodRequest, ListPodsRequest, WatchPodsEvent, WatchPodsRequest};
use serde_json::json;
use testkit::serial::Test;
use tonic::Streaming;

use crate::fixture::{LIMIT, on_a_node};

pub(crate) const TESTS: &[Test] = &[("programs_follow_the_nodes_pods", programs_follow_the_nodes_pods)];

/// Reads until an event is as wanted; the kinds of all of them.
async fn until(
    events: &mut Streaming<WatchPodsEvent>,
    wanted: impl Fn(&WatchPodsEvent) -> bool,
) -> (Vec<EventType>, WatchPodsEvent) {
    until_of(events, |_| true, wanted).await
}

/// The same of those that concern somebody.
async fn until_of(
    events: &mut Streaming<WatchPodsEvent>,
    concerns: impl Fn(&WatchPodsEvent) -> bool,
    wanted: impl Fn(&WatchPodsEvent) -> bool,
) -> (Vec<EventType>, WatchPodsEvent) {
    let mut kinds = Vec::new();
    let read = async {
        loop {
            let event = events.message().await.unwrap().expect("it goes on");
            if concerns(&event) {
                kinds.push(event.r#type());
            }
            if wanted(&event) {
                return event;
            }
        }
    };
    let last = tokio::time::timeout(LIMIT, read).await.expect("an event");
    (kinds, last)
}

/// Whether the bytes of a pod have this text in it.
fn has(pod: &[u8], text: &str) -> bool {
    pod.windows(text.len()).any(|window| window == text.as_bytes())
}

fn programs_follow_the_nodes_pods() {
    on_a_node(async |node| {
        node.want("first", "sleep 1000", json!({}));
        node.desk.running("first").await;
        let socket = node.path("kubelet/pods-api/pods-api.sock");
        let mut client = PodsClient::new(plugin::connect(&socket).unwrap());
        let mut events = client.watch_pods(WatchPodsRequest {}).await.unwrap().into_inner();
        let (kinds, _) = until(&mut events, |event| event.r#type() == EventType::InitialSyncComplete).await;
        assert_eq!(kinds, [EventType::Added, EventType::InitialSyncComplete]);
        node.want("second", "sleep 1000", json!({}));
        let uid = node.uid("second");
        let runs = |event: &WatchPodsEvent| has(&event.pod, &uid) && has(&event.pod, "Running");
        // The first one may have something to tell, too.
        let of_second = |event: &WatchPodsEvent| has(&event.pod, &uid);
        let (kinds, _) = until_of(&mut events, of_second, runs).await;
        assert_eq!(kinds[0], EventType::Added);
        assert!(kinds[1..].iter().all(|kind| *kind == EventType::Modified), "{kinds:?}");
        let listed = client.list_pods(ListPodsRequest {}).await.unwrap().into_inner().pods;
        assert_eq!(listed.len(), 2);
        let got = client.get_pod(GetPodRequest { pod_uid: uid.clone() }).await.unwrap().into_inner().pod;
        assert!(has(&got, "second") && has(&got, node.image()), "the spec, too");
        let missing = client.get_pod(GetPodRequest { pod_uid: "none".to_owned() }).await.unwrap_err();
        assert_eq!((missing.code(), missing.message()), (tonic::Code::NotFound, "pod with UID none not found"));
        node.desk.delete("second", 0);
        let (_, gone) = until(&mut events, |event| event.r#type() == EventType::Deleted).await;
        assert!(has(&gone.pod, &uid) && !has(&gone.pod, node.image()), "only who it was");
        // So many follow at a time, and who goes makes room.
        let mut others = Vec::new();
        for _ in 1..64 {
            others.push(client.watch_pods(WatchPodsRequest {}).await.unwrap());
        }
        let full = client.watch_pods(WatchPodsRequest {}).await.unwrap_err();
        assert_eq!(full.code(), tonic::Code::ResourceExhausted);
        drop(others);
        while client.watch_pods(WatchPodsRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
        // Who follows does not hold up the end of the node agent.
        node
    });
}
