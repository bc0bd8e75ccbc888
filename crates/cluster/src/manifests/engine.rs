//! The alone mode's control plane: manifests in, objects out, controllers in between.
//!
//! Everything is level-based. One task sleeps until a file, a table or a due time calls, then compares all that is
//! declared with all that is there, until nothing is left to change.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{
    ConfigMap, HostPathVolumeSource, LocalVolumeSource, Namespace, Node, PersistentVolume, PersistentVolumeClaim,
    PersistentVolumeSpec, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::files::Files;
use super::kinds::{self, AnyObject, Declared, read_file, to_problem};
use super::problem::{Problem, Said, Severity};
use super::source::{Manifests, fresh};
use crate::controllers::common::{controller_of, short_hash};
use crate::controllers::{Change, Plan, daemon_set, deployment, endpoints, job, replica_set, service};
use crate::source::{EventKind, event_about};
use crate::{Key, Store, Watch};

/// Passes in a row before something else gets a turn: controllers that feed each other settle within a few.
const PASSES_MAX: usize = 20;
/// When a claim that could not get its directory is looked at again.
const CLAIM_RETRY: SignedDuration = SignedDuration::from_secs(10);
/// After so many passes without rest something cannot be carried out (the disk is full): then it is tried this often.
const STUCK_RETRY: SignedDuration = SignedDuration::from_secs(1);
/// What a pod was declared as; another declaration replaces it.
const MANIFEST_HASH: &str = "orlop.dev/manifest-hash";

/// What is declared: objects by kind and key, with the file they come from.
type Declarations = BTreeMap<(String, Key), (PathBuf, Declared)>;

/// Which objects came from files: what disappears from these is removed, also after a restart.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Owned {
    objects: Vec<OwnedObject>,
}

/// Kind, namespace, name, and the file that declared it.
type OwnedObject = (String, String, String, PathBuf);

macro_rules! inputs {
    ($($table:ident: $kind:ty,)*) => {
        /// What the controllers look at: every table but Events, which tell what was done and ask for nothing.
        struct Inputs {
            $($table: Watch<$kind>,)*
        }

        impl Inputs {
            fn of(store: &Store) -> Self {
                Self { $($table: store.$table().watch(),)* }
            }

            /// The next look sees everything that is there now.
            fn forget(&mut self) {
                $(while self.$table.try_next().is_some() {})*
            }

            /// Waits until something has changed. Cancel-safe, for the next look is at everything.
            async fn changed(&mut self) {
                tokio::select! {
                    $(() = self.$table.changed() => {})*
                }
            }
        }
    };
}

inputs! {
    pods: Pod,
    services: Service,
    endpoint_slices: EndpointSlice,
    config_maps: ConfigMap,
    secrets: Secret,
    service_accounts: ServiceAccount,
    namespaces: Namespace,
    nodes: Node,
    persistent_volume_claims: PersistentVolumeClaim,
    persistent_volumes: PersistentVolume,
    deployments: Deployment,
    replica_sets: ReplicaSet,
    stateful_sets: StatefulSet,
    daemon_sets: DaemonSet,
    jobs: Job,
    cron_jobs: CronJob,
}

/// The task that reads and reconciles.
pub(super) struct Engine {
    owner: Arc<Manifests>,
    files: Files,
    declared: Declarations,
    said: Said,
    /// Failures of claims that have been told.
    told: Mutex<HashSet<String>>,
}

impl Engine {
    /// Reads what is declared, and lets all controllers act once.
    pub(super) fn start(owner: Arc<Manifests>, files: Files) -> Self {
        let declared = Declarations::new();
        let mut engine = Self { owner, files, declared, said: Said::default(), told: Mutex::default() };
        engine.read();
        engine.settle();
        engine
    }

    /// Goes on, until everything is to end.
    pub(super) async fn run(mut self) {
        let mut inputs = Inputs::of(&self.owner.store);
        let ending = self.owner.ending.clone();
        loop {
            inputs.forget();
            let due = self.settle();
            let wait = async {
                match due {
                    Some(due) => tokio::time::sleep(until(due)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = ending.cancelled() => return self.keep_endpoints().await,
                () = self.files.changed() => self.read(),
                () = inputs.changed() => {}
                () = wait => {}
            }
        }
    }

    /// While everything ends, services go on to lose the pods that end.
    async fn keep_endpoints(&self) {
        let mut inputs = Inputs::of(&self.owner.store);
        loop {
            inputs.forget();
            self.owner.carry_out(self.endpoints());
            inputs.changed().await;
        }
    }

    /// Reads the files and puts what they declare into the store.
    fn read(&mut self) {
        let scan = self.files.scan();
        let mut problems = scan.problems;
        let mut declared = Declarations::new();
        let mut faulty: HashSet<PathBuf> = scan.unreadable.iter().cloned().collect();
        for (path, text) in &scan.files {
            let (objects, faults) = read_file(path, text, &self.owner.config.namespace);
            if faults.iter().any(|fault| fault.severity == Severity::Error) {
                faulty.insert(path.clone());
            }
            problems.extend(faults);
            for object in objects {
                let key = (object.object.kind().to_owned(), object.object.key());
                if let Some((other, _)) = declared.get(&key) {
                    problems.push(declared_twice(path, &object, other));
                    continue;
                }
                declared.insert(key, (path.clone(), object));
            }
        }
        // Before the list: a deletion that nobody remembers would never come.
        let kept = self.remove_undeclared(&declared, &faulty);
        for (path, object) in declared.values() {
            problems.extend(self.declare(path, object));
        }
        self.declared = declared;
        self.save_owned(kept);
        self.tell(problems);
    }

    /// What was declared and no longer is goes, unless its file cannot be read now or has faults: that is answered. So is
    /// what could not be removed for good: the list of what is declared is the only thing that remembers it.
    fn remove_undeclared(&self, declared: &Declarations, faulty: &HashSet<PathBuf>) -> Vec<OwnedObject> {
        let before: Owned = crate::state::read(&self.owned_path()).unwrap_or_default();
        let mut kept = before.objects;
        kept.retain(|(kind, namespace, name, file)| {
            let key = Key::new(namespace, name);
            if declared.contains_key(&(kind.clone(), key.clone())) {
                return false;
            }
            let in_doubt = faulty.iter().any(|faulty| file.starts_with(faulty));
            in_doubt || !self.removed(kind, &key)
        });
        kept
    }

    /// Removes an object, or begins to, so that a daemon which is killed now knows it later; whether that is on disk.
    fn removed(&self, kind: &str, key: &Key) -> bool {
        match kind {
            "Pod" => self.owner.end_pod(key, None),
            kind => kinds::remove(kind, key, &self.owner.store),
        }
        let Some(table) = kinds::table(kind) else { return true };
        let written = self.owner.state.write_now(&self.owner.store, table, key);
        if let Err(error) = &written {
            tracing::error!(kind, %key, %error, "a removal is not saved, and is tried again when a manifest changes");
        }
        written.is_ok()
    }

    fn owned_path(&self) -> PathBuf {
        self.owner.config.state_dir.join("cluster").join("declared.json")
    }

    fn save_owned(&self, kept: Vec<OwnedObject>) {
        let objects = self.declared.iter().map(|((kind, key), (path, _))| {
            (kind.clone(), key.namespace().to_owned(), key.name().to_owned(), path.clone())
        });
        let owned = Owned { objects: objects.chain(kept).collect() };
        if let Err(error) = crate::state::write(&self.owned_path(), serde_json::to_vec(&owned)) {
            tracing::error!(%error, "what is declared is not saved: what is removed while no daemon runs would stay");
        }
    }

    /// Puts one declared object into the store; what is wrong with the change.
    fn declare(&self, path: &Path, declared: &Declared) -> Vec<Problem> {
        let store = &self.owner.store;
        let mut object = declared.object.clone();
        let hash = declaration_hash(&object);
        let Some(known) = object.known(store) else {
            annotate(&mut object, &hash);
            self.owner.create(object);
            return Vec::new();
        };
        if known.metadata().annotations.as_ref().and_then(|all| all.get(MANIFEST_HASH)) == Some(&hash)
            && !lost_data(&known)
        {
            return Vec::new();
        }
        if let (AnyObject::Pod(_) | AnyObject::Job(_), AnyObject::Pod(_) | AnyObject::Job(_)) = (&object, &known) {
            // Their specs cannot change: the old one goes, `recreate` makes the new one.
            match &known {
                AnyObject::Pod(pod) => self.owner.end_pod(&Key::of(&pod.metadata), None),
                other => kinds::remove(other.kind(), &other.key(), store),
            }
            return Vec::new();
        }
        let faults = object.change_faults(store);
        if !faults.is_empty() {
            return faults.into_iter().map(|fault| to_problem(path, &declared.document, fault)).collect();
        }
        annotate(&mut object, &hash);
        inherit(&mut object, known);
        object.put(store);
        Vec::new()
    }

    /// Declared objects that are not there, because their predecessors had to go first.
    fn recreate(&self) -> bool {
        let mut any = false;
        for (_, declared) in self.declared.values() {
            if declared.object.known(&self.owner.store).is_none() {
                let mut object = declared.object.clone();
                let hash = declaration_hash(&object);
                annotate(&mut object, &hash);
                self.owner.create(object);
                any = true;
            }
        }
        any
    }

    fn tell(&mut self, problems: Vec<Problem>) {
        self.said.tell(&problems);
        self.owner.problems.send_replace(problems);
    }

    /// Lets all controllers act until nothing changes; when the next one wants to be asked.
    fn settle(&self) -> Option<Timestamp> {
        for _ in 0..PASSES_MAX {
            if self.owner.ending.is_cancelled() {
                return None;
            }
            let recreated = self.recreate();
            let plan = self.plan();
            let due = plan.due;
            if !self.owner.carry_out(plan) && !recreated {
                return due;
            }
        }
        Timestamp::now().checked_add(STUCK_RETRY).ok()
    }

    fn plan(&self) -> Plan {
        let (store, now) = (&self.owner.store, Timestamp::now());
        let mut plan = self.collect_garbage();
        plan.merge(self.namespaces());
        plan.merge(service::reconcile(&store.services().list(), self.owner.config.services));
        plan.merge(self.claims());
        let (pods, sets) = (store.pods().list(), store.replica_sets().list());
        for one in store.deployments().list() {
            plan.merge(deployment::reconcile(&one, &sets, &pods, now));
        }
        for one in &sets {
            plan.merge(replica_set::reconcile(one, &pods, now));
        }
        if let Some(node) = store.nodes().list().first() {
            for one in store.daemon_sets().list() {
                plan.merge(daemon_set::reconcile(&one, &pods, node, now));
            }
        }
        for one in store.jobs().list() {
            plan.merge(job::reconcile(&one, &pods, now));
        }
        plan.merge(self.endpoints());
        plan
    }

    fn endpoints(&self) -> Plan {
        let store = &self.owner.store;
        let (pods, slices) = (store.pods().list(), store.endpoint_slices().list());
        let mut plan = Plan::default();
        for one in store.services().list() {
            plan.merge(endpoints::reconcile(&one, &pods, &slices));
        }
        plan
    }

    /// Objects whose controlling owner is gone.
    fn collect_garbage(&self) -> Plan {
        let mut plan = Plan::default();
        let dependents = kinds::dependents(&self.owner.store);
        if dependents.is_empty() {
            return plan;
        }
        let uids = kinds::uids(&self.owner.store);
        for (kind, key, metadata) in dependents {
            let orphaned = controller_of(&metadata).is_some_and(|owner| !uids.contains(&owner.uid));
            if orphaned && metadata.deletion_timestamp.is_none() {
                plan.push(match kind {
                    "Pod" => Change::EndPod { key, grace_s: None },
                    kind => Change::Remove(kind, key),
                });
            }
        }
        plan
    }

    /// Namespaces that objects are in, each with its service account.
    fn namespaces(&self) -> Plan {
        let (store, mut plan) = (&self.owner.store, Plan::default());
        let mut used: HashSet<String> = self.declared.keys().map(|(_, key)| key.namespace().to_owned()).collect();
        used.insert(self.owner.config.namespace.clone());
        used.extend(store.namespaces().keys().iter().map(|key| key.name().to_owned()));
        for name in used.into_iter().filter(|name| !name.is_empty()) {
            if store.namespaces().get(&Key::new("", &name)).is_none() {
                let labels = [("kubernetes.io/metadata.name".to_owned(), name.clone())].into();
                let metadata = ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..ObjectMeta::default() };
                plan.push(Change::Create(AnyObject::Namespace(Box::new(Namespace {
                    metadata,
                    ..Namespace::default()
                }))));
            }
            if store.service_accounts().get(&Key::new(&name, "default")).is_none() {
                let metadata =
                    ObjectMeta { name: Some("default".into()), namespace: Some(name), ..ObjectMeta::default() };
                let account = ServiceAccount { metadata, ..ServiceAccount::default() };
                plan.push(Change::Create(AnyObject::ServiceAccount(Box::new(account))));
            }
        }
        plan
    }

    /// Claims get a directory of the node each.
    fn claims(&self) -> Plan {
        let (store, mut plan) = (&self.owner.store, Plan::default());
        for claim in store.persistent_volume_claims().list() {
            let bound = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_ref()).is_some();
            if bound {
                continue;
            }
            match self.bind(&claim) {
                Ok(bound) => plan.push(Change::Replace(AnyObject::PersistentVolumeClaim(Box::new(bound)))),
                Err(error) => {
                    let text = format!("ProvisioningFailed {} {error}", Key::of(&claim.metadata));
                    let event =
                        event_about(&*claim, EventKind::Warning, "ProvisioningFailed", error.to_string(), "orlop");
                    // Told once: each telling would wake this engine again.
                    if self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(text) {
                        self.owner.record(event);
                    }
                    plan.wake_at(Timestamp::now().saturating_add(CLAIM_RETRY).unwrap_or(Timestamp::MAX));
                }
            }
        }
        plan
    }

    fn bind(&self, claim: &PersistentVolumeClaim) -> std::io::Result<PersistentVolumeClaim> {
        let key = Key::of(&claim.metadata);
        let volume = format!("pvc-{}", claim.metadata.uid.as_deref().unwrap_or_default());
        let path = self.owner.config.volumes_dir.join(format!("{}_{}", key.namespace(), key.name()));
        std::fs::create_dir_all(&path)?;
        let spec = claim.spec.clone().unwrap_or_default();
        let capacity = spec.resources.as_ref().and_then(|resources| resources.requests.clone());
        // Not a hostPath: it is for the pods that claim it, and so for their group.
        let local = LocalVolumeSource { path: path.display().to_string(), fs_type: None };
        let metadata = ObjectMeta { name: Some(volume.clone()), ..fresh() };
        self.owner.store.persistent_volumes().put(PersistentVolume {
            metadata,
            spec: Some(PersistentVolumeSpec {
                access_modes: spec.access_modes.clone(),
                capacity: capacity.clone(),
                local: Some(local),
                persistent_volume_reclaim_policy: Some("Retain".into()),
                ..PersistentVolumeSpec::default()
            }),
            ..PersistentVolume::default()
        });
        let mut bound = claim.clone();
        bound.spec.get_or_insert_default().volume_name = Some(volume);
        let status = bound.status.get_or_insert_default();
        status.phase = Some("Bound".into());
        status.capacity = capacity;
        Ok(bound)
    }
}

/// Volumes of claims that an older version has bound were hostPaths: those are the node's, and no pod's group gets them.
pub(super) fn renew_volumes(store: &Store) {
    for volume in store.persistent_volumes().list() {
        let Some(spec) = &volume.spec else { continue };
        let Some(HostPathVolumeSource { path, .. }) = spec.host_path.clone() else { continue };
        let local = Some(LocalVolumeSource { path, fs_type: None });
        let spec = PersistentVolumeSpec { host_path: None, local, ..spec.clone() };
        store.persistent_volumes().put(PersistentVolume { spec: Some(spec), ..PersistentVolume::clone(&volume) });
    }
}

fn until(due: Timestamp) -> Duration {
    Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO)
}

fn declared_twice(path: &Path, object: &Declared, other: &Path) -> Problem {
    Problem {
        severity: Severity::Error,
        file: path.into(),
        line: object.line,
        object: Some(object.object.object_name()),
        field: None,
        message: format!("is declared in {} too; that one counts", other.display()),
        remedy: Some("remove one of them".into()),
    }
}

/// What tells one declaration of an object from another.
fn declaration_hash(object: &AnyObject) -> String {
    short_hash(format!("{object:?}").as_bytes())
}

fn annotate(object: &mut AnyObject, hash: &str) {
    let annotations = object.metadata_mut().annotations.get_or_insert_default();
    annotations.insert(MANIFEST_HASH.to_owned(), hash.to_owned());
}

/// What was saved of it is only who it is: the data has to come from the manifest again.
fn lost_data(known: &AnyObject) -> bool {
    match known {
        AnyObject::ConfigMap(map) => map.data.is_none() && map.binary_data.is_none(),
        AnyObject::Secret(secret) => secret.data.is_none(),
        _ => false,
    }
}

/// What an object keeps when its declaration changes: who it is, what controllers gave it, its status.
fn inherit(object: &mut AnyObject, known: AnyObject) {
    let old = known.metadata().clone();
    let metadata = object.metadata_mut();
    metadata.uid = old.uid;
    metadata.creation_timestamp = old.creation_timestamp;
    metadata.generation = old.generation.map(|generation| generation + 1);
    let given = old.annotations.into_iter().flatten().filter(|(key, _)| key.starts_with("deployment.kubernetes.io/"));
    metadata.annotations.get_or_insert_default().extend(given);
    match (object, known) {
        (AnyObject::Deployment(new), AnyObject::Deployment(old)) => new.status = old.status,
        (AnyObject::DaemonSet(new), AnyObject::DaemonSet(old)) => new.status = old.status,
        (AnyObject::ReplicaSet(new), AnyObject::ReplicaSet(old)) => new.status = old.status,
        (AnyObject::Namespace(new), AnyObject::Namespace(old)) => new.status = old.status,
        (AnyObject::PersistentVolumeClaim(new), AnyObject::PersistentVolumeClaim(old)) => {
            new.status = old.status;
            let bound = old.spec.and_then(|spec| spec.volume_name);
            new.spec.get_or_insert_default().volume_name = bound;
        }
        (AnyObject::Service(new), AnyObject::Service(old)) => inherit_service(new, &old),
        _ => {}
    }
}

fn inherit_service(new: &mut Service, old: &Service) {
    let (Some(new), Some(old)) = (&mut new.spec, &old.spec) else { return };
    if new.cluster_ip.is_none() && new.type_.as_deref() != Some("ExternalName") {
        new.cluster_ip.clone_from(&old.cluster_ip);
        new.cluster_ips.clone_from(&old.cluster_ips);
    }
    let known: HashMap<i32, Option<i32>> = old.ports.iter().flatten().map(|port| (port.port, port.node_port)).collect();
    let exposed = matches!(new.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
    for port in new.ports.iter_mut().flatten().filter(|port| exposed && port.node_port.is_none()) {
        port.node_port = known.get(&port.port).copied().flatten();
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeStatus;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::controllers::common::is_terminating;
    use crate::controllers::service::Range;
    use crate::manifests::ManifestsConfig;
    use crate::source::Source as _;
    use crate::state::Saver;

    fn config(root: &Path) -> ManifestsConfig {
        ManifestsConfig {
            paths: vec![root.join("manifests")],
            state_dir: root.join("state"),
            volumes_dir: root.join("volumes"),
            node_name: "n1".into(),
            services: Range { network: std::net::Ipv4Addr::new(10, 96, 0, 0), prefix: 16 },
            namespace: "default".into(),
        }
    }

    #[tokio::test]
    async fn what_a_faulty_file_declared_is_removed_when_the_file_goes() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "web.yaml", WEB);
        let manifests = Manifests::start(config(root.path())).unwrap();
        let mut problems = manifests.problems();
        write(root.path(), "web.yaml", "kind: [");
        problems.wait_for(|problems| !problems.is_empty()).await.unwrap();
        assert_eq!(manifests.store.deployments().len(), 1);
        std::fs::remove_file(root.path().join("manifests/web.yaml")).unwrap();
        when(&manifests, |store| store.deployments().is_empty()).await;
    }

    const WEB: &str = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  replicas: 2\n  selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n    spec: {containers: [{name: c, image: i}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {a: b}, ports: [{port: 80}]}\n";

    fn write(root: &Path, name: &str, text: &str) {
        std::fs::create_dir_all(root.join("manifests")).unwrap();
        std::fs::write(root.join("manifests").join(name), text).unwrap();
    }

    fn uids(manifests: &Manifests) -> Vec<String> {
        let mut uids: Vec<String> =
            manifests.store.pods().list().iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
        uids.sort();
        uids
    }

    async fn when(manifests: &Manifests, holds: impl Fn(&Store) -> bool) {
        let mut changes = manifests.store.changes();
        while !holds(&manifests.store) {
            tokio::time::timeout(Duration::from_secs(20), changes.changed()).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_deployment_runs_and_a_restart_gives_the_same_uids() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "web.yaml", WEB);
        let manifests = Manifests::start(config(root.path())).unwrap();
        assert_eq!(manifests.store.pods().len(), 2);
        let before = uids(&manifests);
        let ip = |manifests: &Manifests| manifests.store.services().list()[0].spec.clone().unwrap().cluster_ip.unwrap();
        let address = ip(&manifests);
        when(&manifests, |store| store.replica_sets().list().iter().all(|set| set.status.is_some())).await;
        Saver::new(manifests.state.clone(), &manifests.store).flush().await;
        drop(manifests);
        let again = Manifests::start(config(root.path())).unwrap();
        assert_eq!(uids(&again), before);
        assert_eq!(ip(&again), address);
    }

    /// Lets every task that is awake have its turns; on one thread nothing else happens meanwhile.
    async fn settled() {
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
    }

    const CLAIM: &str = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: data}\nspec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}\n";

    #[tokio::test]
    async fn events_do_not_wake_the_controllers() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "claim.yaml", CLAIM);
        // No directory can be made in a file, so the claim is looked at again whenever the controllers are awake.
        std::fs::write(root.path().join("volumes"), "").unwrap();
        let manifests = Manifests::start(config(root.path())).unwrap();
        settled().await;
        std::fs::remove_file(root.path().join("volumes")).unwrap();
        let bound = || !manifests.store.persistent_volumes().is_empty();
        let node = manifests.store.nodes().list()[0].clone();
        manifests.event(event_about(&*node, EventKind::Normal, "Told", "told", "test"));
        settled().await;
        assert!(!bound(), "an event woke them");
        manifests
            .update_node_status("n1", NodeStatus { phase: Some("Running".into()), ..Default::default() })
            .await
            .unwrap();
        settled().await;
        assert!(bound(), "a change of the node did not");
    }

    /// As 0.1.0 wrote them.
    #[tokio::test]
    async fn volumes_of_claims_that_an_older_version_has_bound_become_local() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "claim.yaml", CLAIM);
        let manifests = Manifests::start(config(root.path())).unwrap();
        let is_bound =
            |claim: &PersistentVolumeClaim| claim.spec.as_ref().is_some_and(|spec| spec.volume_name.is_some());
        when(&manifests, |store| store.persistent_volume_claims().list().iter().any(|claim| is_bound(claim))).await;
        let volume = manifests.store.persistent_volumes().list()[0].clone();
        let path = volume.spec.as_ref().unwrap().local.as_ref().unwrap().path.clone();
        let mut older = PersistentVolume::clone(&volume);
        let spec = older.spec.as_mut().unwrap();
        spec.host_path = Some(HostPathVolumeSource { path: path.clone(), type_: Some("Directory".into()) });
        spec.local = None;
        manifests.store.persistent_volumes().put(older);
        Saver::new(manifests.state.clone(), &manifests.store).flush().await;
        let left = killed(root.path());
        write(left.path(), "claim.yaml", CLAIM);
        let again = Manifests::start(config(left.path())).unwrap();
        let claims = again.store.persistent_volume_claims().list();
        let bound = claims[0].spec.as_ref().unwrap().volume_name.clone();
        let volumes = again.store.persistent_volumes().list();
        assert_eq!((volumes.len(), bound), (1, volume.metadata.name.clone()), "it is bound anew");
        let now = volumes[0].spec.as_ref().unwrap();
        assert!(now.host_path.is_none() && now.local.as_ref().unwrap().path == path, "{now:?}");
        assert_eq!(volumes[0].metadata.uid, volume.metadata.uid);
    }

    /// What a daemon that is killed at this moment leaves.
    fn killed(root: &Path) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        let mut directories = vec![PathBuf::from("state")];
        while let Some(below) = directories.pop() {
            std::fs::create_dir(copy.path().join(&below)).unwrap();
            for entry in std::fs::read_dir(root.join(&below)).unwrap() {
                let path = below.join(entry.unwrap().file_name());
                match root.join(&path).is_dir() {
                    true => directories.push(path),
                    false => drop(std::fs::copy(root.join(&path), copy.path().join(&path)).unwrap()),
                }
            }
        }
        std::fs::create_dir(copy.path().join("manifests")).unwrap();
        copy
    }

    #[tokio::test]
    async fn a_removal_outlives_the_daemon_that_is_killed_in_it() {
        const BOTH: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: i}]}\n---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: robot}\n";
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "p.yaml", BOTH);
        // Of a daemon whose tasks have not had a turn yet, only the start has run.
        let start = || {
            let manifests = Manifests::start(config(root.path())).unwrap();
            manifests.tasks.lock().unwrap().iter().for_each(JoinHandle::abort);
            manifests
        };
        let manifests = start();
        Saver::new(manifests.state.clone(), &manifests.store).flush().await;
        std::fs::remove_file(root.path().join("manifests/p.yaml")).unwrap();
        start();
        let left = killed(root.path());
        let again = Manifests::start(config(left.path())).unwrap();
        assert!(again.store.pods().list().iter().all(|pod| is_terminating(pod)), "the pod lives on");
        assert!(again.store.service_accounts().get(&Key::new("default", "robot")).is_none(), "the account is back");
    }

    #[tokio::test]
    async fn what_disappears_from_the_files_ends() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "web.yaml", WEB);
        let manifests = Manifests::start(config(root.path())).unwrap();
        std::fs::remove_file(root.path().join("manifests/web.yaml")).unwrap();
        when(&manifests, |store| store.pods().list().iter().all(|pod| is_terminating(pod))).await;
        assert!(manifests.store.services().is_empty() && manifests.store.deployments().is_empty());
    }

    /// Ready, serving and terminating of all endpoints.
    fn conditions(store: &Store) -> Vec<[bool; 3]> {
        let slices = store.endpoint_slices().list();
        let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
        let conditions = endpoints.map(|endpoint| endpoint.conditions.clone().unwrap());
        conditions.map(|one| [one.ready, one.serving, one.terminating].map(Option::unwrap)).collect()
    }

    #[tokio::test]
    async fn readiness_and_endings_reach_the_endpoints() {
        const READY: [bool; 3] = [true, true, false];
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "web.yaml", WEB);
        let manifests = Manifests::start(config(root.path())).unwrap();
        let uids = uids(&manifests);
        let set_ready = async |n: usize, ready: &str| {
            let status = serde_json::json!({"phase": "Running", "podIP": format!("10.85.0.{}", n + 2),
                "conditions": [{"type": "Ready", "status": ready}]});
            manifests.update_pod_status(&uids[n], serde_json::from_value(status).unwrap()).await.unwrap();
        };
        set_ready(0, "True").await;
        set_ready(1, "True").await;
        when(&manifests, |store| conditions(store) == [READY, READY]).await;
        set_ready(0, "False").await;
        when(&manifests, |store| conditions(store) == [[false, false, false], READY]).await;
        set_ready(0, "True").await;
        when(&manifests, |store| conditions(store) == [READY, READY]).await;
        manifests.request_deletion(&uids[1], None).await.unwrap();
        when(&manifests, |store| conditions(store)[1] == [false, true, true]).await;
        manifests.delete_pod(&uids[1]).await.unwrap();
        when(&manifests, |store| conditions(store) == [READY]).await;
    }

    #[tokio::test]
    async fn a_changed_pod_is_replaced_and_a_bad_file_keeps_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        let pod = |image: &str| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [{{name: c, image: {image}}}]}}\n"
            )
        };
        write(root.path(), "p.yaml", &pod("one"));
        let manifests = Manifests::start(config(root.path())).unwrap();
        let first = uids(&manifests);
        write(root.path(), "p.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containrs: []}\n");
        let mut problems = manifests.problems();
        problems.wait_for(|problems| !problems.is_empty()).await.unwrap();
        assert_eq!(uids(&manifests), first);
        assert!(!is_terminating(&manifests.store.pods().list()[0]));
        write(root.path(), "p.yaml", &pod("two"));
        when(&manifests, |store| store.pods().list().iter().all(|pod| is_terminating(pod))).await;
        manifests.delete_pod(&first[0]).await.unwrap();
        when(&manifests, |store| store.pods().len() == 1).await;
        assert_ne!(uids(&manifests), first);
    }
}
