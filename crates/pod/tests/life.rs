//! Whole lives of pods: decide and apply in turn, with a node that does what it is told.

#![allow(clippy::unwrap_used, reason = "a test")]

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use pod::probe::{Answer, Kind, Outcome};
use pod::resize::{Allocation, Pending, Step};
use pod::status::{Host, compute};
use pod::{Action, Change, Record, Run, View, decide};
use serde_json::json;

/// A pod with a clock and a node that carries out every action at once.
struct World {
    pod: Pod,
    view: View,
    now: Timestamp,
    runs: u32,
    /// Everything that was done, as keys.
    log: Vec<String>,
    healthy: bool,
    /// Nobody listens in it yet.
    deaf: bool,
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        let pod = json!({ "metadata": { "name": "p", "namespace": "default", "uid": "u" }, "spec": spec });
        let pod = serde_json::from_value(pod).unwrap();
        Self {
            pod,
            view: View::default(),
            now: Timestamp::from_second(1_000_000).unwrap(),
            runs: 0,
            log: Vec::new(),
            healthy: true,
            deaf: false,
        }
    }

    fn apply(&mut self, change: Change) {
        self.view.apply(&self.pod, change, self.now);
    }

    /// Decides and does until nothing is left to do now.
    fn settle(&mut self) {
        for _ in 0..100 {
            let mut plan = decide(&self.pod, &self.view, self.now);
            if plan.reset {
                self.apply(Change::Reset);
                plan = decide(&self.pod, &self.view, self.now);
            }
            if plan.resize_done {
                self.apply(Change::ResizeDone);
            }
            if plan.actions.is_empty() {
                return;
            }
            for action in plan.actions {
                self.log.push(action.key());
                self.carry_out(action);
            }
        }
        panic!("it never settles: {:?}", self.log);
    }

    fn carry_out(&mut self, action: Action) {
        self.apply(Change::Begun(action.clone()));
        let result = match action.clone() {
            Action::MountVolumes => Change::VolumesReady,
            Action::CreateSandbox { .. } => Change::SandboxReady { id: "s".into(), addresses: vec!["10.0.0.2".into()] },
            Action::RemoveSandbox { .. } => Change::SandboxRemoved,
            Action::EnsureImage { container } => {
                Change::ImageReady { container, image: "i".into(), image_id: "sha256:i".into() }
            }
            Action::Start { container, .. } => {
                self.runs += 1;
                Change::Started { container, id: format!("run{}", self.runs), at: self.now }
            }
            Action::PostStart { container, id } => Change::PostStarted { container, id },
            Action::Probe { container, id, kind, early } => {
                let outcome = Some(if self.healthy { Outcome::Success } else { Outcome::Failure });
                let answer = Answer { asked: self.now, outcome, message: String::new(), refused: self.deaf };
                Change::Probed { container, id, kind, early, answer }
            }
            Action::Stop(stop) => exited(&stop.container, &stop.id, 143, self.now, self.now),
            Action::Resize { steps } => {
                for step in steps {
                    self.log.push(short(&step));
                    self.apply(Change::Resized(step));
                }
                Change::GroupResized(Allocation::of(&self.pod))
            }
            Action::LeaveServices => Change::LeftServices,
            Action::CleanUp => Change::Cleaned,
            Action::Purge => Change::Purged,
            Action::Forget => Change::Forgotten,
        };
        self.apply(result);
        self.apply(Change::Ended(action));
    }

    /// Goes to the next time at which something is due, at most `limit` seconds on, and settles.
    fn wait(&mut self, limit: i64) {
        let end = self.now + SignedDuration::from_secs(limit);
        while let Some(due) = decide(&self.pod, &self.view, self.now).next_due.filter(|due| *due <= end) {
            self.now = due;
            self.settle();
        }
        self.now = end;
        self.settle();
    }

    fn crash(&mut self, container: &str, code: i32) {
        let running = self.view.running(container).unwrap().clone();
        self.apply(exited(container, &running.id, code, running.started, self.now));
    }

    fn status(&self) -> PodStatus {
        compute(&self.pod, &self.view, &Host::default(), None, self.now)
    }

    fn ready(&self) -> bool {
        self.status()
            .conditions
            .unwrap()
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    }

    fn waiting(&self) -> Option<String> {
        self.status().container_statuses.unwrap()[0].state.clone()?.waiting?.reason
    }

    fn delete(&mut self) {
        self.pod.metadata.deletion_grace_period_seconds = Some(30);
        self.pod.metadata.deletion_timestamp = Some(Time(self.now + SignedDuration::from_secs(30)));
        self.apply(Change::Deleted);
    }
}

fn short(step: &Step) -> String {
    match step {
        Step::GroupMemory { .. } => "group memory".to_owned(),
        Step::GroupQuota => "group quota".to_owned(),
        Step::GroupShares => "group shares".to_owned(),
        Step::Container { name, resource, .. } => format!("container {name} {}", resource.name()),
    }
}

fn exited(container: &str, id: &str, exit_code: i32, started: Timestamp, finished: Timestamp) -> Change {
    let reason = if exit_code == 0 { "Completed" } else { "Error" };
    let run = Run {
        id: id.into(),
        exit_code,
        started: Some(started),
        finished: Some(finished),
        reason: reason.into(),
        ..Run::default()
    };
    Change::Exited { container: container.into(), run }
}

#[test]
fn a_pod_starts_and_is_deleted() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "image": "i" }] }));
    world.settle();
    assert_eq!(world.log, ["volumes", "sandbox", "image/a", "start/a"]);
    assert_eq!(world.status().phase.as_deref(), Some("Running"));
    assert!(world.ready());
    world.log.clear();
    world.delete();
    world.settle();
    assert_eq!(world.log, ["leave", "stop/a/run1", "purge", "forget"]);
    assert_eq!(world.status().phase.as_deref(), Some("Failed"), "143 is no success");
}

#[test]
fn init_containers_run_in_order_and_sidecars_beside() {
    let mut world = World::new(json!({
        "initContainers": [{ "name": "one" }, { "name": "side", "restartPolicy": "Always" }, { "name": "two" }],
        "containers": [{ "name": "a" }, { "name": "b" }],
    }));
    let starts =
        |world: &World| -> Vec<String> { world.log.iter().filter(|key| key.starts_with("start/")).cloned().collect() };
    world.settle();
    assert_eq!(starts(&world), ["start/one"]);
    world.crash("one", 0);
    world.settle();
    assert_eq!(starts(&world), ["start/one", "start/side", "start/two"]);
    assert_eq!(world.waiting().as_deref(), Some("PodInitializing"));
    world.crash("two", 0);
    world.settle();
    assert_eq!(starts(&world)[3..], ["start/a", "start/b"]);
    world.log.clear();
    world.delete();
    world.settle();
    let stops: Vec<_> =
        world.log.iter().filter(|key| key.starts_with("stop/")).map(|key| key.split('/').nth(1).unwrap()).collect();
    assert_eq!(stops, ["a", "b", "side"], "sidecars end after the others");
}

#[test]
fn a_pod_that_has_ended_never_runs_again() {
    let mut world = World::new(
        json!({ "restartPolicy": "Never", "initContainers": [{ "name": "i" }], "containers": [{ "name": "a" }] }),
    );
    world.settle();
    world.crash("i", 0);
    world.settle();
    world.crash("a", 3);
    world.settle();
    let ended = world.status();
    assert_eq!(ended.phase.as_deref(), Some("Failed"));
    // The machine was started anew: nobody but the source knows of the pod.
    world.pod.status = Some(ended.clone());
    world.view = View::default();
    world.log.clear();
    world.settle();
    assert_eq!(world.log, Vec::<String>::new());
    let now = compute(&world.pod, &world.view, &Host::default(), Some(&ended), world.now);
    assert_eq!((now.phase, now.container_statuses), (ended.phase, ended.container_statuses));
    assert_eq!(now.init_container_statuses, ended.init_container_statuses);
    let conditions = |status: Option<Vec<k8s_openapi::api::core::v1::PodCondition>>| -> Vec<_> {
        status
            .unwrap()
            .into_iter()
            .filter(|one| one.type_ != "PodReadyToStartContainers")
            .map(|one| (one.type_, one.status))
            .collect()
    };
    assert_eq!(conditions(now.conditions), conditions(ended.conditions));
}

#[test]
fn a_pod_that_was_never_started_ends_as_failed() {
    let mut world = World::new(json!({ "containers": [{ "name": "a" }] }));
    world.delete();
    world.settle();
    assert_eq!(world.log, ["purge", "forget"]);
    let status = world.status();
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(state.terminated.unwrap().reason.as_deref(), Some("ContainerStatusUnknown"));
}

#[test]
fn a_pod_that_ends_before_its_sandbox_gives_back_its_claims() {
    let mut world = World::new(json!({ "restartPolicy": "Never", "containers": [{ "name": "a" }] }));
    world.apply(Change::Begun(Action::CreateSandbox { attempt: 0 }));
    world.apply(Change::ClaimsBegun);
    world.apply(Change::ClaimsFailed { message: "no driver".into() });
    world.apply(Change::Ended(Action::CreateSandbox { attempt: 0 }));
    world.view.busy.insert("volumes".into());
    assert!(world.view.waits_for_objects());
    assert_eq!(decide(&world.pod, &world.view, world.now).actions.len(), 1, "the image: the sandbox rests");
    world.apply(Change::Retry);
    let actions = decide(&world.pod, &world.view, world.now).actions;
    assert!(actions.contains(&Action::CreateSandbox { attempt: 0 }), "a driver came: {actions:?}");
    world.view.busy.clear();
    world.apply(Change::Fail { reason: "Evicted".into(), message: String::new(), grace_s: None, disrupted: false });
    world.settle();
    assert_eq!(world.log, ["cleanup"]);
    assert_eq!(world.view.claims, pod::Setup::Absent);
}

#[test]
fn a_deletion_aborts_what_a_start_waits_for() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "image": "i" }] }));
    let begun = decide(&world.pod, &world.view, world.now).actions;
    begun.iter().for_each(|action| world.apply(Change::Begun(action.clone())));
    world.delete();
    let plan = decide(&world.pod, &world.view, world.now);
    assert_eq!(
        (plan.aborts.as_slice(), plan.actions.as_slice()),
        (&["image/a", "sandbox", "volumes"].map(String::from)[..], &[][..])
    );
    world.apply(Change::Ended(Action::EnsureImage { container: "a".into() }));
    world.apply(Change::Ended(Action::MountVolumes));
    assert_eq!(decide(&world.pod, &world.view, world.now).actions, [], "the sandbox may still appear");
    world.apply(Change::SandboxReady { id: "s".into(), addresses: Vec::new() });
    world.apply(Change::Ended(Action::CreateSandbox { attempt: 0 }));
    world.settle();
    assert_eq!(world.log, ["purge", "forget"]);
}

#[test]
fn an_image_that_goes_missing_is_pulled_again_after_a_rest() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "image": "i" }] }));
    world.apply(Change::VolumesReady);
    world.apply(Change::SandboxReady { id: "s".into(), addresses: Vec::new() });
    let missing = |world: &mut World| {
        world.apply(Change::ImageReady { container: "a".into(), image: "i".into(), image_id: "i".into() });
        let (reason, message) = ("CreateContainerError".into(), "it was removed".into());
        world.apply(Change::StartFailed { container: "a".into(), reason, message });
        world.apply(Change::ImageMissing { container: "a".into() });
    };
    missing(&mut world);
    for rest in [1, 2, 4, 8, 10] {
        world.settle();
        assert_eq!(world.waiting().as_deref(), Some("CreateContainerError"));
        world.now += SignedDuration::from_millis(rest * 1000 - 1);
        assert_eq!(decide(&world.pod, &world.view, world.now).actions, [], "{rest} s are not over");
        world.now += SignedDuration::from_millis(1);
        let actions = decide(&world.pod, &world.view, world.now).actions;
        assert_eq!(actions, [Action::EnsureImage { container: "a".into() }]);
        missing(&mut world);
    }
    world.wait(10);
    assert_eq!(world.log, ["image/a", "start/a"]);
    assert!(world.ready());
}

#[test]
fn a_crash_loop_waits_longer_each_time() {
    let mut world = World::new(json!({ "containers": [{ "name": "a" }] }));
    world.settle();
    world.crash("a", 1);
    world.settle();
    assert!(world.view.running("a").is_some(), "the first restart is at once");
    for delay in [10, 20, 40, 80, 160, 300, 300] {
        world.crash("a", 1);
        world.settle();
        assert_eq!(world.waiting().as_deref(), Some("CrashLoopBackOff"));
        world.wait(delay - 1);
        assert!(world.view.running("a").is_none(), "{delay} s are not over");
        world.wait(1);
        assert!(world.view.running("a").is_some(), "{delay} s are over");
    }
    assert_eq!(world.status().container_statuses.unwrap()[0].restart_count, 8);
}

#[test]
fn the_startup_probe_holds_liveness_back_and_liveness_restarts() {
    let mut world = World::new(json!({ "containers": [{
        "name": "a",
        "startupProbe": { "httpGet": { "path": "/healthz", "port": 8000 }, "failureThreshold": 30, "periodSeconds": 10 },
        "livenessProbe": { "httpGet": { "path": "/healthz", "port": 8000 }, "initialDelaySeconds": 5, "periodSeconds": 15 },
    }] }));
    world.healthy = false;
    world.settle();
    world.wait(100);
    assert!(world.log.iter().all(|key| !key.contains("Liveness")));
    assert!(!world.ready());
    world.healthy = true;
    world.wait(10);
    assert!(world.ready());
    world.healthy = false;
    world.wait(60);
    assert!(world.log.iter().any(|key| key.starts_with("stop/a")));
    assert_eq!(world.status().container_statuses.unwrap()[0].restart_count, 1);
}

#[test]
fn readiness_only_changes_readiness() {
    let mut world = World::new(
        json!({ "containers": [{ "name": "a", "readinessProbe": { "tcpSocket": { "port": 1 }, "periodSeconds": 1, "failureThreshold": 1 } }] }),
    );
    world.settle();
    world.wait(1);
    assert!(world.ready());
    world.healthy = false;
    world.wait(2);
    assert!(!world.ready());
    assert!(world.view.running("a").is_some());
}

#[test]
fn who_begins_to_listen_need_not_wait_for_the_next_turn() {
    let probe = json!({ "tcpSocket": { "port": 1 }, "periodSeconds": 600, "failureThreshold": 2 });
    let mut world =
        World::new(json!({ "containers": [{ "name": "a", "startupProbe": probe, "readinessProbe": probe }] }));
    (world.healthy, world.deaf) = (false, true);
    world.settle();
    world.wait(40);
    assert!(world.view.running("a").is_some(), "only the first failure counts");
    let looks = world.log.iter().filter(|key| key.contains("Startup")).count();
    assert!((10..50).contains(&looks), "{looks}");
    (world.healthy, world.deaf) = (true, false);
    world.wait(10);
    assert!(world.ready());
    // Once it was ready, turns alone count.
    (world.healthy, world.deaf) = (false, true);
    let before = world.log.len();
    world.wait(580);
    assert!(world.ready());
    assert_eq!(world.log.len(), before);
    world.wait(1200);
    assert!(!world.ready());
}

#[test]
fn what_liveness_finds_does_not_keep_readiness_waiting() {
    let probe = json!({ "tcpSocket": { "port": 1 }, "periodSeconds": 60, "failureThreshold": 9 });
    let mut world =
        World::new(json!({ "containers": [{ "name": "a", "livenessProbe": probe, "readinessProbe": probe }] }));
    (world.healthy, world.deaf) = (false, true);
    world.settle();
    world.wait(4);
    (world.healthy, world.deaf) = (true, false);
    world.wait(2);
    assert!(world.ready());
    assert_eq!(world.log.iter().filter(|key| key.contains("Liveness")).count(), 1, "it has its turns alone");
}

#[test]
fn a_job_pod_ends() {
    let mut world = World::new(json!({ "restartPolicy": "OnFailure", "containers": [{ "name": "a" }] }));
    world.settle();
    world.crash("a", 1);
    world.settle();
    world.crash("a", 0);
    world.settle();
    assert_eq!(world.status().phase.as_deref(), Some("Succeeded"));
    assert_eq!(world.log.last().map(String::as_str), Some("cleanup"));
}

#[test]
fn a_deadline_fails_the_pod() {
    let mut world = World::new(json!({ "activeDeadlineSeconds": 60, "containers": [{ "name": "a" }] }));
    world.settle();
    world.wait(59);
    assert_eq!(world.status().phase.as_deref(), Some("Running"));
    world.now += SignedDuration::from_secs(1);
    assert!(decide(&world.pod, &world.view, world.now).deadline_exceeded);
    world.apply(Change::Fail {
        reason: "DeadlineExceeded".into(),
        message: String::new(),
        grace_s: None,
        disrupted: false,
    });
    world.settle();
    assert_eq!(world.status().phase.as_deref(), Some("Failed"));
}

#[test]
fn a_lost_sandbox_is_made_anew_with_its_containers() {
    let mut world = World::new(json!({ "containers": [{ "name": "a" }] }));
    world.settle();
    world.crash("a", 137);
    world.apply(Change::SandboxLost);
    world.log.clear();
    world.settle();
    assert_eq!(world.log, ["sandbox", "image/a", "sandbox", "start/a"]);
}

#[test]
fn init_containers_run_again_in_a_new_sandbox() {
    let mut world = World::new(json!({ "initContainers": [{ "name": "rules" }], "containers": [{ "name": "a" }] }));
    world.settle();
    world.crash("rules", 0);
    world.settle();
    assert!(world.ready());
    world.crash("a", 137);
    world.apply(Change::SandboxLost);
    world.log.clear();
    world.settle();
    assert_eq!(world.log, ["sandbox", "image/a", "sandbox", "image/rules", "start/rules"]);
    assert_eq!(world.status().phase.as_deref(), Some("Pending"), "it is initialized again");
    world.crash("rules", 0);
    world.wait(10);
    assert!(world.ready());
    let restarts =
        |statuses: Option<Vec<k8s_openapi::api::core::v1::ContainerStatus>>| statuses.unwrap()[0].restart_count;
    assert_eq!((restarts(world.status().init_container_statuses), restarts(world.status().container_statuses)), (1, 1));
}

#[test]
fn a_pod_runs_when_all_of_it_has_begun() {
    let mut world = World::new(json!({ "containers": [{ "name": "a" }, { "name": "b" }] }));
    world.settle();
    assert_eq!(world.status().phase.as_deref(), Some("Running"));
    world.view.containers.remove("b");
    assert_eq!(world.status().phase.as_deref(), Some("Pending"));
}

#[test]
fn who_cannot_be_asked_is_neither_ill_nor_well() {
    let liveness = json!({ "exec": { "command": ["true"] }, "periodSeconds": 10, "failureThreshold": 1 });
    let mut world = World::new(json!({ "containers": [{ "name": "a", "livenessProbe": liveness }] }));
    world.settle();
    let id = world.view.running("a").unwrap().id.clone();
    let answer = Answer { asked: world.now, outcome: None, message: "gone".into(), refused: false };
    let (container, kind) = ("a".to_owned(), Kind::Liveness);
    let probed = Change::Probed { container, id, kind, early: false, answer };
    let notes = world.view.apply(&world.pod, probed, world.now);
    assert_eq!(notes[0].message, "Liveness probe errored and resulted in unknown state: gone");
    world.log.clear();
    world.wait(9);
    assert!(world.log.is_empty() && world.ready(), "{:?}", world.log);
    world.wait(1);
    assert_eq!(world.log.len(), 1, "it has its next turn: {:?}", world.log);
}

#[test]
fn the_grace_period_is_counted_by_the_nodes_clock() {
    let mut world = World::new(json!({ "containers": [{ "name": "a" }] }));
    world.settle();
    // The API server's clock is behind by as much as the pod has.
    world.pod.metadata.deletion_grace_period_seconds = Some(30);
    world.pod.metadata.deletion_timestamp = Some(Time(world.now));
    world.apply(Change::Deleted);
    let grace = |world: &World| {
        let stops = decide(&world.pod, &world.view, world.now).actions.into_iter().filter_map(|action| match action {
            Action::Stop(stop) => Some(stop.grace_s),
            _ => None,
        });
        stops.collect::<Vec<_>>()
    };
    world.apply(Change::LeftServices);
    assert_eq!(grace(&world), [30]);
    world.now += SignedDuration::from_secs(10);
    world.apply(Change::Deleted);
    assert_eq!(grace(&world), [20], "being told again begins nothing anew");
}

#[test]
fn deciding_again_does_nothing_more() {
    let mut world =
        World::new(json!({ "containers": [{ "name": "a", "livenessProbe": { "exec": { "command": ["true"] } } }] }));
    world.settle();
    world.wait(35);
    assert!(decide(&world.pod, &world.view, world.now).actions.is_empty());
    let probes = world.log.iter().filter(|key| key.ends_with(Kind::Liveness.as_str())).count();
    assert_eq!(probes, 4, "one at the start, then every ten seconds");
}

#[test]
fn an_ephemeral_container_runs_once_and_counts_for_nothing() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "image": "i" }] }));
    world.settle();
    world.log.clear();
    world.pod.spec.as_mut().unwrap().ephemeral_containers =
        Some(serde_json::from_value(json!([{ "name": "look", "image": "i", "targetContainerName": "a" }])).unwrap());
    world.settle();
    assert_eq!(world.log, ["image/look", "start/look"]);
    let look = |world: &World| world.status().ephemeral_container_statuses.unwrap().remove(0);
    assert!(look(&world).state.unwrap().running.is_some());
    world.crash("look", 1);
    world.wait(1000);
    assert_eq!(world.log, ["image/look", "start/look"], "it never runs again");
    assert_eq!(look(&world).state.unwrap().terminated.unwrap().exit_code, 1);
    assert!(world.ready());
    assert_eq!(world.status().phase.as_deref(), Some("Running"));
    assert_eq!(world.status().container_statuses.unwrap().len(), 1);
}

#[test]
fn a_pod_that_is_over_ends_who_looks_into_it() {
    let mut world = World::new(json!({
        "restartPolicy": "Never", "containers": [{ "name": "a" }], "ephemeralContainers": [{ "name": "look" }] }));
    world.settle();
    world.crash("a", 0);
    assert_eq!(world.status().phase.as_deref(), Some("Running"), "something of it still runs");
    world.settle();
    assert_eq!(world.status().phase.as_deref(), Some("Succeeded"));
}

fn resources(cpu: &str, memory: &str) -> serde_json::Value {
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "cpu": cpu, "memory": memory } })
}

impl World {
    /// The pod wants these resources for its containers, and gets them.
    fn resize(&mut self, wanted: &[(&str, &str)]) {
        let mut pod = self.pod.clone();
        for (container, (cpu, memory)) in pod.spec.as_mut().unwrap().containers.iter_mut().zip(wanted) {
            container.resources = serde_json::from_value(resources(cpu, memory)).unwrap();
        }
        let allocation = Allocation::of(&pod);
        assert!(!Allocation::of(&self.pod).covers(&pod) && allocation.covers(&pod));
        self.apply(Change::Allocated { allocation, generation: Some(2), summary: String::new() });
        self.pod = pod;
    }

    fn steps(&self) -> Vec<String> {
        let is_step = |key: &&String| key.starts_with("group ") || key.starts_with("container ");
        self.log.iter().filter(is_step).cloned().collect()
    }

    fn condition(&self, kind: &str) -> Option<(String, Option<String>)> {
        let conditions = self.status().conditions.unwrap();
        let found = conditions.into_iter().find(|condition| condition.type_ == kind);
        found.map(|condition| (condition.status, condition.reason))
    }
}

#[test]
fn a_group_grows_before_its_containers_and_shrinks_after_them() {
    let container = |name: &str| json!({ "name": name, "resources": resources("100m", "100Mi") });
    let mut world = World::new(json!({ "containers": [container("a"), container("b"), container("c")] }));
    world.settle();
    world.log.clear();
    world.resize(&[("200m", "200Mi"), ("300m", "50Mi"), ("100m", "100Mi")]);
    assert_eq!(world.condition("PodResizeInProgress"), Some(("True".into(), None)));
    let before = world.status();
    let shown = before.container_statuses.unwrap()[0].clone();
    assert_eq!(serde_json::to_value(shown.resources).unwrap(), resources("100m", "100Mi"), "what is in force");
    assert_eq!(shown.allocated_resources.unwrap()["cpu"].0, "200m", "what was granted");
    assert_eq!(before.resources.unwrap().limits.unwrap()["memory"].0, "300Mi");
    world.settle();
    let grown = [
        "group memory",
        "container b memory",
        "container a memory",
        "group quota",
        "group shares",
        "container a cpu",
        "container b cpu",
    ];
    assert_eq!(world.steps(), grown);
    assert_eq!(world.condition("PodResizeInProgress"), None);
    let shown = world.status();
    assert_eq!(shown.resources.unwrap().limits.unwrap()["memory"].0, "350Mi");
    assert_eq!(shown.allocated_resources.unwrap()["cpu"].0, "600m");
    world.log.clear();
    world.resize(&[("100m", "100Mi"), ("300m", "50Mi"), ("100m", "100Mi")]);
    world.settle();
    assert_eq!(world.steps(), ["container a memory", "group memory", "container a cpu", "group shares", "group quota"]);
    assert_eq!(world.status().container_statuses.unwrap()[0].restart_count, 0);
}

#[test]
fn a_container_that_wants_it_is_restarted_for_a_resize_at_once_and_always() {
    let policy = json!([{ "resourceName": "memory", "restartPolicy": "RestartContainer" }]);
    let container = json!({ "name": "a", "resources": resources("100m", "100Mi"), "resizePolicy": policy });
    let mut world = World::new(json!({ "restartPolicy": "OnFailure", "containers": [container] }));
    world.settle();
    for (round, memory) in ["200Mi", "300Mi", "150Mi"].into_iter().enumerate() {
        world.log.clear();
        world.resize(&[("100m", memory)]);
        world.settle();
        let stop = format!("stop/a/run{}", round + 1);
        assert_eq!(world.log, [&stop, "resize", "group memory", "image/a", "start/a"]);
        let status = world.status();
        let status = &status.container_statuses.unwrap()[0];
        assert_eq!(status.restart_count, i32::try_from(round).unwrap() + 1, "without a back-off");
        assert_eq!(serde_json::to_value(&status.resources).unwrap(), resources("100m", memory));
    }
    world.log.clear();
    world.resize(&[("200m", "150Mi")]);
    world.settle();
    assert_eq!(world.steps(), ["group quota", "group shares", "container a cpu"], "the other resource needs none");
}

#[test]
fn a_resize_that_fails_is_told_and_tried_again() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "resources": resources("1", "100Mi") }] }));
    world.settle();
    world.resize(&[("1", "50Mi")]);
    let tried = |world: &World| decide(&world.pod, &world.view, world.now).actions;
    assert_eq!(tried(&world).len(), 1);
    world.apply(Change::ResizeFailed { message: "in use".into() });
    assert_eq!(world.condition("PodResizeInProgress"), Some(("True".into(), Some("Error".into()))));
    assert_eq!(tried(&world), []);
    world.wait(20);
    assert_eq!(world.condition("PodResizeInProgress"), None);
    let pending = Pending { infeasible: false, message: "no room".into(), generation: Some(3) };
    world.apply(Change::ResizePending { pending, summary: String::new() });
    assert_eq!(world.condition("PodResizePending"), Some(("True".into(), Some("Deferred".into()))));
    world.apply(Change::ResizeReverted);
    assert_eq!(world.condition("PodResizePending"), None);
}

#[test]
fn limits_of_the_whole_pod_are_those_of_containers_without() {
    let mut world = World::new(json!({
        "resources": resources("1", "100Mi"), "containers": [{ "name": "a" }, { "name": "b", "resources": resources("100m", "10Mi") }] }));
    world.settle();
    world.log.clear();
    let mut pod = world.pod.clone();
    pod.spec.as_mut().unwrap().resources = serde_json::from_value(resources("2", "200Mi")).unwrap();
    let allocation = Allocation::of(&pod);
    world.apply(Change::Allocated { allocation, generation: None, summary: String::new() });
    world.pod = pod;
    world.settle();
    assert_eq!(world.steps(), ["group memory", "container a memory", "group quota", "group shares", "container a cpu"]);
    let status = world.status();
    assert_eq!(serde_json::to_value(status.resources).unwrap(), resources("2", "200Mi"));
    assert_eq!(status.container_statuses.unwrap()[0].resources, None, "it has none of its own");
}

#[test]
fn what_begins_during_a_resize_is_resized_too() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "resources": resources("1", "100Mi") }] }));
    let sandbox = Action::CreateSandbox { attempt: 0 };
    world.apply(Change::Begun(sandbox.clone()));
    world.resize(&[("2", "100Mi")]);
    assert!(!decide(&world.pod, &world.view, world.now).resize_done);
    world.apply(Change::SandboxReady { id: "s".into(), addresses: Vec::new() });
    world.apply(Change::Ended(sandbox));
    world.settle();
    assert_eq!(world.steps(), ["group quota", "group shares"], "it was made for less");
    assert_eq!(world.condition("PodResizeInProgress"), None);
}

#[test]
fn an_init_container_is_resized_while_it_runs() {
    let container = |name: &str, cpu: &str| json!({ "name": name, "resources": resources(cpu, "100Mi") });
    let mut world = World::new(json!({ "initContainers": [container("i", "1")], "containers": [container("a", "1")] }));
    world.settle();
    world.log.clear();
    let mut pod = world.pod.clone();
    pod.spec.as_mut().unwrap().init_containers = serde_json::from_value(json!([container("i", "2")])).unwrap();
    world.apply(Change::Allocated { allocation: Allocation::of(&pod), generation: None, summary: String::new() });
    world.pod = pod;
    world.settle();
    assert_eq!(world.steps(), ["group quota", "group shares", "container i cpu"]);
    let shown = world.status().init_container_statuses.unwrap().remove(0);
    assert_eq!(serde_json::to_value(shown.resources).unwrap(), resources("2", "100Mi"));
}

#[test]
fn what_was_granted_outlives_the_daemon() {
    let mut world = World::new(json!({ "containers": [{ "name": "a", "resources": resources("1", "100Mi") }] }));
    world.settle();
    world.resize(&[("2", "100Mi")]);
    let record = serde_json::to_string(&world.view.record).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&record).unwrap(), world.view.record);
    let granted = world.view.record.allocated.as_ref().unwrap();
    let mut wanted = world.pod.clone();
    wanted.spec.as_mut().unwrap().containers[0].resources = serde_json::from_value(resources("3", "100Mi")).unwrap();
    let given = granted.given(&std::sync::Arc::new(wanted));
    assert_eq!(given.spec, world.pod.spec);
}

fn resetting(spec_of_source: serde_json::Value) -> World {
    let rules = json!([{ "action": "RestartAllContainers", "exitCodes": { "operator": "In", "values": [42] } }]);
    let mut source = json!({ "name": "source", "image": "i", "restartPolicyRules": rules });
    source.as_object_mut().unwrap().extend(spec_of_source.as_object().unwrap().clone());
    World::new(json!({
        "restartPolicy": "Never",
        "initContainers": [
            { "name": "init", "image": "i" },
            { "name": "sidecar", "image": "i", "restartPolicy": "Always" },
        ],
        "containers": [source, { "name": "other", "image": "i" }],
    }))
}

fn begins(world: &mut World) {
    world.settle();
    world.crash("init", 0);
    world.settle();
}

fn restarts(world: &World) -> Vec<(String, i32)> {
    let status = world.status();
    let all =
        status.init_container_statuses.into_iter().flatten().chain(status.container_statuses.into_iter().flatten());
    all.map(|status| (status.name, status.restart_count)).collect()
}

fn condition(world: &World, kind: &str) -> Option<String> {
    world.status().conditions.unwrap().into_iter().find(|one| one.type_ == kind).map(|one| one.status)
}

#[test]
fn one_container_begins_all_anew() {
    let mut world = resetting(json!({ "restartPolicy": "Never" }));
    begins(&mut world);
    assert_eq!(condition(&world, "AllContainersRestarting").as_deref(), Some("False"));
    world.log.clear();
    world.crash("source", 42);
    assert_eq!(condition(&world, "AllContainersRestarting").as_deref(), Some("True"));
    assert_eq!(world.waiting().as_deref(), Some("RestartingAllContainers"));
    world.settle();
    assert_eq!(world.log[..2], ["stop/sidecar/run2", "stop/other/run4"], "{:?}", world.log);
    assert!(world.log.contains(&"start/init".to_owned()) && !world.log.contains(&"start/other".to_owned()));
    world.crash("init", 0);
    world.settle();
    let once = ["init", "sidecar", "source", "other"].map(|name| (name.to_owned(), 1));
    assert_eq!(restarts(&world), once);
    assert_eq!(condition(&world, "AllContainersRestarting").as_deref(), Some("False"));
    let status = world.status();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let init = &status.init_container_statuses.unwrap()[0];
    assert!(init.last_state.as_ref().unwrap().terminated.is_some(), "what became of its first run is told, too");
    let last = status.container_statuses.unwrap()[1].last_state.clone().unwrap().terminated.unwrap();
    assert_eq!(last.exit_code, 143, "what became of the run that was ended is told");
}

#[test]
fn who_begins_all_anew_again_and_again_waits() {
    let mut world = resetting(json!({ "restartPolicy": "Never" }));
    let rules = world.pod.spec.as_ref().unwrap().containers[0].restart_policy_rules.clone();
    world.pod.spec.as_mut().unwrap().containers[1].restart_policy_rules = rules;
    begins(&mut world);
    world.crash("source", 42);
    begins(&mut world);
    assert!(world.view.running("source").is_some() && world.view.running("other").is_some());
    world.crash("other", 42);
    world.settle();
    assert!(world.view.containers.values().all(|view| view.running.is_none()), "also if they take turns");
    assert_eq!(world.waiting().as_deref(), Some("RestartingAllContainers"));
    world.now += SignedDuration::from_secs(10);
    begins(&mut world);
    assert!(world.view.running("source").is_some() && world.view.running("other").is_some());
}

#[test]
fn other_codes_end_as_the_policy_says() {
    let mut world = resetting(json!({ "restartPolicy": "Never" }));
    begins(&mut world);
    world.crash("source", 1);
    world.crash("other", 42);
    world.settle();
    assert_eq!(world.status().phase.as_deref(), Some("Failed"), "only a rule's own container begins all anew");
}

#[test]
fn a_sidecar_that_crashes_holds_back_no_main_that_has_begun_once() {
    let mut world = resetting(json!({ "restartPolicy": "Always" }));
    begins(&mut world);
    for _ in 0..2 {
        world.crash("sidecar", 1);
        world.settle();
    }
    assert!(world.view.running("sidecar").is_none(), "it waits");
    world.crash("source", 1);
    world.settle();
    assert!(world.view.running("source").is_some());
}

fn set_image(world: &mut World, image: &str) {
    world.pod.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
}

#[test]
fn another_image_is_another_run_at_once_and_always() {
    let mut world = World::new(json!({ "restartPolicy": "Never", "containers": [{ "name": "c", "image": "i" }] }));
    world.settle();
    world.log.clear();
    set_image(&mut world, "other");
    world.settle();
    assert_eq!(world.log, ["stop/c/run1", "image/c", "start/c"]);
    assert_eq!(world.status().container_statuses.unwrap()[0].restart_count, 1);
    world.crash("c", 1);
    set_image(&mut world, "third");
    world.settle();
    assert_eq!(world.status().phase.as_deref(), Some("Failed"), "what has ended stays so");
}

#[test]
fn another_image_waits_for_no_failures_of_the_one_before() {
    let mut world = World::new(json!({ "containers": [{ "name": "c", "image": "i" }] }));
    world.settle();
    for _ in 0..2 {
        world.crash("c", 1);
        world.settle();
    }
    assert_eq!(world.waiting().as_deref(), Some("CrashLoopBackOff"));
    set_image(&mut world, "other");
    world.settle();
    assert!(world.view.running("c").is_some());
    world.crash("c", 1);
    world.settle();
    assert!(world.view.running("c").is_some(), "its first failure costs nothing");
}

#[test]
fn the_pull_of_an_image_that_nobody_wants_any_more_is_given_up() {
    let mut world = World::new(json!({ "containers": [{ "name": "c", "image": "nowhere" }] }));
    let pull = Action::EnsureImage { container: "c".to_owned() };
    assert!(decide(&world.pod, &world.view, world.now).actions.contains(&pull));
    world.apply(Change::Begun(pull.clone()));
    set_image(&mut world, "i");
    assert_eq!(decide(&world.pod, &world.view, world.now).aborts, ["image/c"]);
    let (reason, message) = ("ErrImagePull".to_owned(), "gone".to_owned());
    world.apply(Change::ImageFailed { container: "c".to_owned(), reason, message });
    world.apply(Change::Ended(pull));
    world.settle();
    assert!(world.view.running("c").is_some());
}

#[test]
fn nothing_starts_with_an_image_that_its_container_has_no_more() {
    let mut world = World::new(json!({
        "initContainers": [{ "name": "init", "image": "i" }],
        "containers": [{ "name": "c", "image": "i" }],
    }));
    world.settle();
    set_image(&mut world, "other");
    let pull = Action::EnsureImage { container: "c".to_owned() };
    assert!(decide(&world.pod, &world.view, world.now).actions.contains(&pull));
    world.apply(Change::Begun(pull));
    world.crash("init", 0);
    let plan = decide(&world.pod, &world.view, world.now);
    assert!(!plan.actions.iter().any(|action| action.key() == "start/c"), "{:?}", plan.actions);
}

#[test]
fn an_init_container_goes_on_with_the_image_that_it_began_with() {
    let mut world = World::new(json!({
        "initContainers": [{ "name": "init", "image": "i" }],
        "containers": [{ "name": "c", "image": "i" }],
    }));
    world.settle();
    world.pod.spec.as_mut().unwrap().init_containers.as_mut().unwrap()[0].image = Some("other".to_owned());
    world.log.clear();
    world.settle();
    assert_eq!(world.log, [""; 0]);
}
