//! The workers of pods and who looks after them.

use std::path::PathBuf;
use std::sync::Arc;

use cluster::Source as _;
use cri::{RuntimeService as _, v1};
use futures_util::StreamExt as _;
use serde_json::json;
use testkit::serial::Test;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::desk::Desk;
use crate::fixture::{LIMIT, Node, on_a_node, start_kubelet, stopped};

pub(crate) const TESTS: &[Test] = &[
    ("a_worker_that_dies_is_followed_by_another", a_worker_that_dies_is_followed_by_another),
    ("who_begins_to_listen_is_ready_soon", who_begins_to_listen_is_ready_soon),
    ("a_stop_waits_for_no_runtime", a_stop_waits_for_no_runtime),
    ("a_start_that_is_given_up_leaves_nobody_at_work", a_start_that_is_given_up_leaves_nobody_at_work),
    ("one_container_begins_all_anew_whatever_the_daemon_does", one_container_begins_all_anew_whatever_the_daemon_does),
    ("what_is_optional_is_waited_for_until_it_is_known", what_is_optional_is_waited_for_until_it_is_known),
];

/// After this event nothing else happens to the pod or the node: only the end of the worker itself can be heard.
fn a_worker_that_dies_is_followed_by_another() {
    on_a_node(|node| async {
        let probe = json!({ "exec": { "command": ["false"] }, "periodSeconds": 1 });
        node.desk.die_of("Unhealthy");
        node.want("p", "sleep 1000", json!({ "readinessProbe": probe }));
        node.desk.running("p").await;
        node.desk.when("the next worker probes on", |desk| desk.told("p", "Unhealthy") > 0).await;
        let containers = node.containers("p").await;
        assert_eq!(containers.len(), 1, "{containers:?}");
        let status = node.desk.container("p");
        assert_eq!((&status["restartCount"], status["state"]["running"].is_object()), (&json!(0), true), "{status}");
        assert_eq!(node.kubelet.pod_count(), 1);
        node
    });
}

/// Its probe would ask again after ten minutes.
fn who_begins_to_listen_is_ready_soon() {
    on_a_node(|node| async {
        let probe = json!({ "tcpSocket": { "port": 8080 }, "periodSeconds": 600 });
        let script = "while ! [ -e /open ]; do sleep 0.05; done; exec httpd -f -p 8080";
        node.want("p", script, json!({ "readinessProbe": probe }));
        node.desk.when("nobody listens", |desk| desk.told("p", "Unhealthy") > 0).await;
        let containers = node.containers("p").await;
        let cmd = ["touch", "/open"].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id: containers[0].id.clone(), cmd, timeout: 0 };
        node.runtime.exec_sync(request).await.unwrap();
        node.desk.when("it is ready", |desk| desk.container("p")["ready"] == true).await;
        assert_eq!(node.desk.told("p", "Unhealthy"), 1, "what comes out of turn does not count");
        node
    });
}

/// The runtime of a node behind CRI's socket.
struct Remote {
    client: cri::Client,
    socket: PathBuf,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl Remote {
    async fn start(node: &Node) -> Self {
        let (socket, stop) = (node.path("cri.sock"), CancellationToken::new());
        let listener = cri::server::bind(&socket).await.unwrap();
        let served = cri::server::serve(listener, node.runtime.for_clients(), node.images.clone(), stop.clone());
        Self { client: cri::Client::new(&socket).unwrap(), server: tokio::spawn(served), socket, stop }
    }

    /// Takes the runtime away; who connects then gets no answer.
    async fn deafen(self) -> UnixListener {
        self.stop.cancel();
        self.server.await.unwrap();
        let _ = std::fs::remove_file(&self.socket); // The server may have done it.
        UnixListener::bind(&self.socket).unwrap()
    }
}

fn a_stop_waits_for_no_runtime() {
    on_a_node(|node| async {
        let remote = Remote::start(&node).await;
        let (desk, client) = (Arc::new(Desk::new()), Arc::new(remote.client.clone()));
        let mut life = desk.life();
        let kubelet = start_kubelet(&node.path("remote"), &desk, client.clone(), client).await;
        let mut events = remote.client.get_container_events(v1::GetEventsRequest::default()).await.unwrap();
        let deaf = remote.deafen().await;
        while events.next().await.is_some_and(|event| event.is_ok()) {}
        // Who asks again waits here.
        let _asking = tokio::time::timeout(LIMIT, deaf.accept()).await.unwrap().unwrap();
        // Pods come meanwhile, as ever. What this one refers to is not known, so that nothing is made for it.
        desk.know_nothing();
        desk.want("late", &node.uid("late"), json!({ "containers": [{ "name": "c", "image": node.image() }] }));
        desk.when("it is seen", |desk| desk.phase("late").as_deref() == Some("Pending")).await;
        stopped(&kubelet).await;
        drop((kubelet, desk));
        let _ = tokio::time::timeout(LIMIT, life.changed()).await.expect("somebody still works for the kubelet");
        node
    });
}

fn a_start_that_is_given_up_leaves_nobody_at_work() {
    on_a_node(|node| async {
        let client = Arc::new(cri::Client::new(&node.path("nobody.sock")).unwrap());
        let desk = Arc::new(Desk::new());
        let mut life = desk.life();
        let dir = node.path("remote");
        let start = start_kubelet(&dir, &desk, client.clone(), client);
        assert!(tokio::time::timeout(std::time::Duration::ZERO, start).await.is_err());
        drop(desk);
        let _ = tokio::time::timeout(LIMIT, life.changed()).await.expect("somebody still works for the kubelet");
        node
    });
}

/// The daemon is started anew while the init container runs for the second time, and the others wait for it.
fn one_container_begins_all_anew_whatever_the_daemon_does() {
    on_a_node(|mut node| async {
        let gate = node.path("gate");
        std::fs::create_dir(&gate).unwrap();
        let container = |name: &str, script: &str| {
            json!({"name": name, "image": node.image(), "command": ["sh", "-c", script],
                "volumeMounts": [{"name": "gate", "mountPath": "/g"}]})
        };
        let init = "test -e /g/first || { touch /g/first; exit 0; }; until test -e /g/open; do sleep 0.1; done";
        let mut source = container("source", "test -e /g/asked && exec sleep 1000; touch /g/asked; exit 42");
        source["restartPolicyRules"] =
            json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
        let spec = json!({
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
            "initContainers": [container("init", init)],
            "containers": [source, container("other", "exec sleep 1000")],
            "volumes": [{"name": "gate", "hostPath": {"path": gate}}],
        });
        node.want_spec("p", spec);
        let statuses = |desk: &Desk| {
            let status = serde_json::to_value(&desk.pod("p").unwrap().status).unwrap();
            [&status["initContainerStatuses"][0], &status["containerStatuses"][0], &status["containerStatuses"][1]]
                .map(|one| (one["restartCount"].as_i64(), one["state"]["running"].is_object()))
        };
        let (once_up, once_down) = ((Some(1), true), (Some(1), false));
        node.desk.when("init runs again", |desk| statuses(desk) == [once_up, once_down, once_down]).await;
        let desk = node.desk.clone();
        node.restart(desk).await;
        std::fs::write(gate.join("open"), "").unwrap();
        node.desk.when("the others run again", |desk| statuses(desk) == [once_down, once_up, once_up]).await;
        assert_eq!(node.desk.phase("p").as_deref(), Some("Running"));
        node
    });
}

fn what_is_optional_is_waited_for_until_it_is_known() {
    on_a_node(|node| async {
        node.desk.know_nothing();
        let variable =
            json!({"name": "V", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k", "optional": true}}});
        let script = "printf '%s %s' $V $(cat /v/k) > /dev/termination-log";
        let container = json!({"name": "c", "image": node.image(), "command": ["sh", "-c", script], "env": [variable],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let volume = json!({"name": "v", "configMap": {"name": "m", "optional": true}});
        node.want_spec("p", json!({"restartPolicy": "Never", "containers": [container], "volumes": [volume]}));
        node.desk.asked().await;
        let map = json!({"metadata": {"name": "m", "namespace": "default"}, "data": {"k": "known"}});
        node.desk.store().config_maps().put(serde_json::from_value(map).unwrap());
        node.desk.know_all();
        node.desk.when("it ends", |desk| desk.phase("p").as_deref() == Some("Succeeded")).await;
        assert_eq!(node.desk.container("p")["state"]["terminated"]["message"], "known known");
        node
    });
}
