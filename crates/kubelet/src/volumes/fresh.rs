//! Keeps volumes up to date while their pods run.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::Pod;
use tokio::task::{self, JoinSet};
use tokio::time::Instant;

use super::plan::{self, Content};
use super::trust;
use super::{Credentials, Volumes};
use crate::clock;
use crate::context::uid_of;

/// How often volumes are published again whose drivers want that (`requiresRepublish`), as upstream's pods are looked at.
pub const REPUBLISH_EVERY: Duration = Duration::from_secs(60);

/// The first rest of what has failed, which is doubled each time, and the longest.
const REST_FIRST: Duration = Duration::from_secs(1);
const REST_LONGEST: Duration = Duration::from_secs(60);

/// What may change the content of volumes.
enum Changed {
    Object(Content, Key),
    Pod(Arc<Pod>),
    /// Some tokens or certificates are due.
    Credentials,
    /// A ClusterTrustBundle.
    Trust,
    /// A certificate of the pod with this uid.
    Certificate(String),
    /// A claim, or the volume behind it.
    Claims,
    /// Volumes that are published again from time to time are due.
    Republish,
    /// What was changed while it was written, or has failed and rested.
    Again(Refresh),
}

/// Something to be done for the volumes of the pod with this uid.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Refresh {
    /// Content from the store is written.
    Content(String),
    /// Drivers are called.
    Drivers(String),
}

impl Refresh {
    async fn run(self, volumes: Arc<Volumes>) -> Outcome {
        match self {
            Self::Content(uid) => volumes.refresh(uid).await,
            Self::Drivers(uid) => {
                volumes.refresh_by_drivers(uid).await;
                Outcome::Done
            }
        }
    }
}

/// What became of something that was to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Something could not be done: it is tried again after a rest.
    Failed,
}

/// What is under way: each at most once, and wanted once more at most, however often the objects of a pod change.
#[derive(Debug, Default)]
struct Refreshes {
    running: JoinSet<Outcome>,
    by_task: HashMap<task::Id, Refresh>,
    /// Whether it is wanted once more.
    under_way: HashMap<Refresh, bool>,
}

/// One that is over.
#[derive(Debug)]
struct Over {
    refresh: Refresh,
    outcome: Outcome,
    /// It is wanted once more.
    again: bool,
}

impl Refreshes {
    fn want(&mut self, volumes: &Arc<Volumes>, refresh: Refresh) {
        if let Some(again) = self.under_way.get_mut(&refresh) {
            *again = true;
            return;
        }
        self.under_way.insert(refresh.clone(), false);
        let task = self.running.spawn(refresh.clone().run(volumes.clone()));
        self.by_task.insert(task.id(), refresh);
    }

    /// `None` when nothing is under way.
    async fn over(&mut self) -> Option<Over> {
        let (id, outcome) = match self.running.join_next_with_id().await? {
            Ok(ended) => ended,
            Err(error) => (error.id(), Outcome::Failed),
        };
        let refresh = self.by_task.remove(&id)?;
        let again = self.under_way.remove(&refresh) == Some(true);
        Some(Over { refresh, outcome, again })
    }
}

/// What has failed rests before it is tried again.
#[derive(Debug, Default)]
struct Resting {
    /// How long the next rest is.
    rests: HashMap<Refresh, Duration>,
    tasks: JoinSet<()>,
    by_task: HashMap<task::Id, Refresh>,
}

impl Resting {
    /// Takes in what became of it.
    fn ended(&mut self, refresh: &Refresh, outcome: Outcome) {
        if outcome == Outcome::Done {
            self.rests.remove(refresh);
        } else if !self.by_task.values().any(|resting| resting == refresh) {
            let next = self.rests.entry(refresh.clone()).or_insert(REST_FIRST);
            let task = self.tasks.spawn(tokio::time::sleep(*next));
            *next = (*next * 2).min(REST_LONGEST);
            self.by_task.insert(task.id(), refresh.clone());
        }
    }

    /// One has rested. `None` when none rests.
    async fn over(&mut self) -> Option<Refresh> {
        let id = match self.tasks.join_next_with_id().await? {
            Ok((id, ())) => id,
            Err(error) => error.id(),
        };
        self.by_task.remove(&id)
    }
}

/// Refreshes the pods that use what changed, each on its own, until the volumes are dropped.
pub(super) async fn keep(volumes: Weak<Volumes>, store: Store, republish_every: Duration) {
    let (mut config_maps, mut secrets, mut pods) =
        (store.config_maps().watch(), store.secrets().watch(), store.pods().watch());
    let (mut claims, mut behind) = (store.persistent_volume_claims().watch(), store.persistent_volumes().watch());
    let mut bundles = store.cluster_trust_bundles().watch();
    let mut certificates = store.pod_certificate_requests().watch();
    let (mut refreshes, mut resting) = (Refreshes::default(), Resting::default());
    let mut republish_at = Instant::now() + republish_every;
    loop {
        let change = tokio::select! {
            change = config_maps.next() => Changed::Object(Content::ConfigMap, change.key),
            change = secrets.next() => Changed::Object(Content::Secret, change.key),
            change = pods.next() => match change.object {
                Some(pod) => Changed::Pod(pod),
                None => continue,
            },
            _ = bundles.next() => Changed::Trust,
            change = certificates.next() => match change.object {
                Some(request) => Changed::Certificate(request.spec.pod_uid.clone()),
                None => continue,
            },
            _ = claims.next() => Changed::Claims,
            _ = behind.next() => Changed::Claims,
            () = credentials_due(&volumes) => Changed::Credentials,
            () = republish_due(&volumes, republish_at) => {
                republish_at = Instant::now() + republish_every;
                Changed::Republish
            }
            Some(Over { refresh, outcome, again }) = refreshes.over() => {
                resting.ended(&refresh, outcome);
                if !again {
                    continue;
                }
                Changed::Again(refresh)
            }
            Some(refresh) = resting.over() => Changed::Again(refresh),
        };
        let Some(volumes) = volumes.upgrade() else { return };
        let wanted: Vec<Refresh> = match change {
            Changed::Again(refresh) => vec![refresh],
            Changed::Claims | Changed::Republish => {
                volumes.with_drivers(&change).into_iter().map(Refresh::Drivers).collect()
            }
            change => volumes.affected(&change).into_iter().map(Refresh::Content).collect(),
        };
        wanted.into_iter().for_each(|refresh| refreshes.want(&volumes, refresh));
    }
}

/// Returns when a token or a certificate is due. Those that come later are seen when something changes, which they do
/// themselves.
async fn credentials_due(volumes: &Weak<Volumes>) {
    // Each time anew: a clock that is set makes other things due.
    loop {
        let next = volumes.upgrade().and_then(|volumes| {
            [volumes.tokens.next_due(), volumes.certificates.next_due()].into_iter().flatten().min()
        });
        match next.map(clock::until) {
            Some(Duration::ZERO) => return,
            Some(wait) => tokio::time::sleep(wait).await,
            None => std::future::pending().await,
        }
    }
}

/// Returns when volumes are to be published again; never while there are none that are.
async fn republish_due(volumes: &Weak<Volumes>, at: Instant) {
    match volumes.upgrade().is_some_and(|volumes| volumes.csi.republishes()) {
        true => tokio::time::sleep_until(at).await,
        false => std::future::pending().await,
    }
}

impl Volumes {
    /// The pods whose volumes of drivers may have something to be done.
    fn with_drivers(&self, change: &Changed) -> Vec<String> {
        if matches!(change, Changed::Republish) {
            return self.csi.republished();
        }
        let has_claims = |pod: &Pod| {
            let mut volumes = pod::spec::of(pod).volumes.iter().flatten();
            volumes.any(|volume| volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some())
        };
        let pods = self.lock();
        let shown = pods.iter().filter(|(_, ground)| ground.shown().is_some_and(|pod| has_claims(&pod)));
        shown.map(|(uid, _)| uid.clone()).collect()
    }

    /// Has the drivers do what is to be done for the volumes of a pod.
    async fn refresh_by_drivers(self: Arc<Self>, uid: String) {
        let Some(ground) = self.lock().get(&uid).cloned() else { return };
        let Some(pod) = ground.shown() else { return };
        let Ok(volumes) = self.maker(pod.clone(), Credentials::default()).csi_volumes() else { return };
        for (name, volume) in &volumes {
            if let Err(cause) = self.csi.refresh(&pod, volume, &ground, &self.tokens).await {
                // It is tried again when something changes, or when it is due again.
                tracing::warn!(uid, volume = name, %cause, "a volume cannot be kept up to date");
            }
        }
    }

    /// The pods whose volumes are there and may show what changed.
    fn affected(&self, change: &Changed) -> Vec<String> {
        match change {
            Changed::Object(content, key) => {
                let pods = self.lock();
                let shown = pods.iter().filter_map(|(uid, ground)| Some((uid, ground.shown()?)));
                let affected = shown.filter(|(_, pod)| plan::uses(pod, *content, key));
                affected.map(|(uid, _)| uid.clone()).collect()
            }
            Changed::Pod(pod) => self.has_changed(pod).then(|| uid_of(pod).to_owned()).into_iter().collect(),
            Changed::Credentials => {
                let mut due = self.tokens.take_due();
                due.extend(
                    self.certificates.take_due().into_iter().filter(|uid| !due.contains(uid)).collect::<Vec<_>>(),
                );
                due
            }
            Changed::Trust => {
                let pods = self.lock();
                let shown = pods.iter().filter(|(_, ground)| ground.shown().is_some_and(|pod| trust::shows(&pod)));
                shown.map(|(uid, _)| uid.clone()).collect()
            }
            Changed::Certificate(uid) => vec![uid.clone()],
            Changed::Claims | Changed::Republish | Changed::Again(_) => Vec::new(),
        }
    }

    /// Whether this version of a pod may want other volumes than are there. Most only have another status.
    fn has_changed(&self, pod: &Arc<Pod>) -> bool {
        let Some(ground) = self.lock().get(uid_of(pod)).cloned() else { return false };
        let Some(before) = ground.shown() else { return false };
        let (new, old) = (&pod.metadata, &before.metadata);
        if new.labels == old.labels && new.annotations == old.annotations && pod.spec == before.spec {
            return false;
        }
        ground.show(pod.clone());
        true
    }

    /// Writes the volumes of a pod whose content comes from the store again; what did not change stays untouched. One that
    /// cannot be written keeps its old content and holds up no other.
    async fn refresh(self: Arc<Self>, uid: String) -> Outcome {
        let Some(ground) = self.lock().get(&uid).cloned() else { return Outcome::Done };
        let Some(pod) = ground.shown() else { return Outcome::Done };
        let credentials = self.credentials(&pod).await;
        let mut failed = credentials.as_ref().err().map(ToString::to_string).into_iter().collect::<Vec<_>>();
        // Without them those volumes fail that show some.
        let credentials = credentials.unwrap_or_default();
        let (volumes, shown) = (self.clone(), ground.clone());
        let refreshed = ground.alone(move || {
            // It may have changed while we waited.
            Ok(shown.shown().map(|pod| volumes.maker(pod, credentials).refresh()).unwrap_or_default())
        });
        failed.extend(refreshed.await.unwrap_or_default().iter().map(ToString::to_string));
        if ground.is_over() {
            self.tokens.forget(&uid);
            self.certificates.forget(&uid);
            return Outcome::Done;
        }
        failed.iter().for_each(|error| tracing::warn!(uid, error, "cannot refresh a volume; it is tried again"));
        if failed.is_empty() { Outcome::Done } else { Outcome::Failed }
    }
}
