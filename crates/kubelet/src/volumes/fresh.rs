//! Keeps volumes up to date while their pods run.

use std::sync::{Arc, Weak};

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::Pod;
use tokio::task::JoinSet;

use super::Volumes;
use super::plan::{self, Content};
use crate::context::uid_of;

/// What may change the content of volumes.
enum Changed {
    Object(Content, Key),
    Pod(Arc<Pod>),
    /// Some tokens are due.
    Tokens,
}

/// Refreshes the pods that use what changed, each on its own, until the volumes are dropped.
pub(super) async fn keep(volumes: Weak<Volumes>, store: Store) {
    let (mut config_maps, mut secrets, mut pods) =
        (store.config_maps().watch(), store.secrets().watch(), store.pods().watch());
    let mut running = JoinSet::new();
    loop {
        let change = tokio::select! {
            change = config_maps.next() => Changed::Object(Content::ConfigMap, change.key),
            change = secrets.next() => Changed::Object(Content::Secret, change.key),
            change = pods.next() => match change.object {
                Some(pod) => Changed::Pod(pod),
                None => continue,
            },
            () = token_due(&volumes) => Changed::Tokens,
            Some(_) = running.join_next() => continue,
        };
        let Some(volumes) = volumes.upgrade() else { return };
        for uid in volumes.affected(&change) {
            running.spawn(volumes.clone().refresh(uid));
        }
    }
}

/// Returns when a token is due. Tokens that come later are seen when something changes, which they do themselves.
async fn token_due(volumes: &Weak<Volumes>) {
    match volumes.upgrade().and_then(|volumes| volumes.tokens.next_due()) {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

impl Volumes {
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
            Changed::Tokens => self.tokens.take_due(),
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

    /// Writes the volumes of a pod whose content comes from the store again; what did not change stays untouched.
    async fn refresh(self: Arc<Self>, uid: String) {
        let Some(ground) = self.lock().get(&uid).cloned() else { return };
        let Some(pod) = ground.shown() else { return };
        let tokens = match self.tokens.issue(&pod).await {
            Ok(tokens) => tokens,
            Err(error) => {
                tracing::warn!(uid, %error, "cannot refresh a volume");
                return;
            }
        };
        let (volumes, shown) = (self.clone(), ground.clone());
        let refreshed = ground.alone(move || {
            // It may have changed while we waited.
            let Some(pod) = shown.shown() else { return Ok(Ok(())) };
            Ok(volumes.maker(pod, tokens).refresh())
        });
        if let Ok(Err(error)) = refreshed.await {
            // The old content stays; it is written when the object changes again.
            tracing::warn!(uid, %error, "cannot refresh a volume");
        }
        if ground.is_over() {
            self.tokens.forget(&uid);
        }
    }
}
