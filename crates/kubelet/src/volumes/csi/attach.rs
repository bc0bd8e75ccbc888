//! The handshake with the attach/detach controller: a volume that has to be attached is announced as in use, and used when
//! the node's status says that it is attached.

use std::collections::HashMap;
use std::time::Duration;

use cluster::Key;
use k8s_openapi::api::core::v1::{NodeStatus, Pod};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};

use super::super::Cause;
use super::{Csi, CsiVolume};
use crate::context::uid_of;

/// How long a pod waits before it says that its volume is not attached. Attaching a disk takes clouds some seconds.
pub const ATTACHED_WITHIN: Duration = Duration::from_secs(60);
/// gRPC's code for what a driver's controller says that has attached as many volumes to the node as it can.
const RESOURCE_EXHAUSTED: i32 = 8;

impl Csi {
    /// Waits until the volume is attached to this node, if it needs to be. Returns what the driver's controller has to say to
    /// its node plugin.
    pub(super) async fn attached(
        &self,
        pod: &Pod,
        volume: &CsiVolume,
        about: Option<&CSIDriver>,
    ) -> Result<HashMap<String, String>, Cause> {
        // Who says nothing wants it (upstream's default, also without an object).
        let is_needed = about.is_none_or(|about| about.spec.attach_required != Some(false));
        if volume.persistent().is_none() || !is_needed {
            return Ok(HashMap::new());
        }
        let name = volume.unique_name();
        self.in_use.send_if_modified(|in_use| in_use.insert((name.clone(), uid_of(pod).to_owned())));
        let late = tokio::time::timeout(self.config.attached_within, self.is_on_node(&name)).await.is_err();
        let attachment = self.source.volume_attachment(&volume.attachment(&self.config.node.name)).await;
        if late {
            let (volume, driver) = (volume.name.clone(), volume.driver.clone());
            let is_full = attachment.is_ok_and(|attachment| is_exhausted(about, &attachment));
            return Err(if is_full { Cause::Exhausted { volume, driver } } else { Cause::Detached { volume, driver } });
        }
        let attachment = attachment.map_err(|reason| Cause::Source { reason })?;
        let told = attachment.status.and_then(|status| status.attachment_metadata).unwrap_or_default();
        Ok(told.into_iter().collect())
    }

    /// Waits until the node's status has the volume both among those in use, which the controller respects, and among those
    /// attached.
    async fn is_on_node(&self, volume: &str) {
        let (nodes, own) = (self.source.store().nodes(), Key::cluster(&self.config.node.name));
        let mut changes = nodes.watch();
        loop {
            let node = nodes.get(&own);
            let status = node.as_ref().and_then(|node| node.status.as_ref());
            if status.is_some_and(|status| has(status, volume)) {
                return;
            }
            changes.next().await;
        }
    }
}

/// Whether the node has as many volumes of the driver as it can have. Only a driver whose count of them is kept up to date
/// (KEP-4876) is believed.
fn is_exhausted(about: Option<&CSIDriver>, attachment: &VolumeAttachment) -> bool {
    let period = about.and_then(|about| about.spec.node_allocatable_update_period_seconds);
    let error = attachment.status.as_ref().and_then(|status| status.attach_error.as_ref());
    period.is_some_and(|seconds| seconds > 0) && error.is_some_and(|error| error.error_code == Some(RESOURCE_EXHAUSTED))
}

fn has(status: &NodeStatus, volume: &str) -> bool {
    let mut attached = status.volumes_attached.iter().flatten();
    let mut in_use = status.volumes_in_use.iter().flatten();
    attached.any(|one| one.name == volume) && in_use.any(|one| one == volume)
}
