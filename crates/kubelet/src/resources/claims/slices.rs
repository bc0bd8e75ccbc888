//! What drivers have said in ResourceSlices that this node has is taken back when the driver does not come back: pods that
//! wait for it could go to another node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::Source;
use tokio_util::task::AbortOnDropHandle;

use crate::context::chain;
use crate::retry::Rests;

/// How long a driver may be away: long enough for its restart (upstream's `defaultWipingDelay`).
pub const DRIVER_AWAY: Duration = Duration::from_secs(30);

/// Removes slices in good time.
pub(super) struct Slices {
    source: Arc<dyn Source>,
    delay: Duration,
    /// Removals that are due, by driver. Short sections only.
    due: Mutex<HashMap<String, AbortOnDropHandle<()>>>,
    _at_start: AbortOnDropHandle<()>,
}

impl Slices {
    /// When a node begins, no driver has registered: whatever was said of it before does not hold, as upstream has it.
    pub(super) fn new(source: Arc<dyn Source>, delay: Duration) -> Self {
        let at_start = tokio::spawn(remove(source.clone(), None));
        Self { source, delay, due: Mutex::default(), _at_start: AbortOnDropHandle::new(at_start) }
    }

    /// Whether a driver is there. Called whenever that may have changed.
    pub(super) fn tell(&self, driver: &str, is_there: bool) {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        if is_there {
            due.remove(driver);
        } else if !due.contains_key(driver) {
            let (source, delay, name) = (self.source.clone(), self.delay, driver.to_owned());
            let removal = tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                remove(source, Some(name)).await;
            });
            due.insert(driver.to_owned(), AbortOnDropHandle::new(removal));
        }
    }
}

async fn remove(source: Arc<dyn Source>, driver: Option<String>) {
    let mut rests = Rests::new();
    while let Err(error) = source.remove_resource_slices(driver.as_deref()).await {
        tracing::debug!(driver, error = chain(&error), "ResourceSlices are not removed yet; trying again");
        rests.rest().await;
    }
    if let Some(driver) = driver {
        tracing::info!(driver, "a DRA driver is away: its ResourceSlices of this node are removed");
    }
}
