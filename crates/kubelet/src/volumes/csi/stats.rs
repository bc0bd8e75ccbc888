//! How full volumes are, as their drivers tell.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use plugin::csi::NodeGetVolumeStatsRequest;
use plugin::csi::volume_usage::Unit;

use super::{Csi, CsiVolume};
use crate::context::uid_of;

/// Whoever reads the figures waits no longer than this for a driver.
const STATS_WITHIN: Duration = Duration::from_secs(5);

/// How full a volume of a pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStats {
    /// The volume's name in the pod.
    pub volume: String,
    /// Its claim, if it has one: namespace and name.
    pub claim: Option<(String, String)>,
    /// When it was asked.
    pub time: Timestamp,
    /// Bytes.
    pub bytes: Option<Usage>,
    /// Inodes.
    pub inodes: Option<Usage>,
}

/// An amount of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// What is free.
    pub available: i64,
    /// All that there is.
    pub total: i64,
    /// What is taken.
    pub used: i64,
}

impl Csi {
    /// The figures of these volumes of a pod, by their names in it. A driver that tells none, or not in time, is left out.
    pub(in super::super) async fn stats(&self, pod: &Pod, volumes: BTreeMap<String, CsiVolume>) -> Vec<VolumeStats> {
        let asked = volumes.iter().map(|(name, volume)| self.stats_of(pod, name, volume));
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }

    async fn stats_of(&self, pod: &Pod, name: &str, volume: &CsiVolume) -> Option<VolumeStats> {
        let driver = self.drivers.find(&volume.driver).filter(|driver| driver.abilities.tells_stats)?;
        let staging =
            volume.persistent().filter(|_| driver.abilities.stages).map(|_| volume.staging(&self.config.paths));
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.handle.clone(),
            volume_path: volume.target(&self.config.paths, uid_of(pod)).to_string_lossy().into_owned(),
            staging_target_path: staging.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        };
        let usages = tokio::time::timeout(STATS_WITHIN, driver.stats(request)).await.ok()?;
        let usages = usages.inspect_err(|error| tracing::debug!(%error, "no figures of a volume")).ok()?;
        let of = |unit: Unit| {
            let usage = usages.iter().find(|usage| usage.unit() == unit)?;
            Some(Usage { available: usage.available, total: usage.total, used: usage.used })
        };
        Some(VolumeStats {
            volume: name.to_owned(),
            claim: volume.persistent().map(|one| (one.claim.namespace().to_owned(), one.claim.name().to_owned())),
            time: Timestamp::now(),
            bytes: of(Unit::Bytes),
            inodes: of(Unit::Inodes),
        })
    }
}
