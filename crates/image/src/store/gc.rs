//! Garbage collection: which images go (upstream's rules), and the sweep of what no image and no container needs.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::Store;
use super::layers::TakenOut;
use crate::digest::Digest;
use crate::error::Error;
use crate::store::records::Stored;
use crate::{GcPolicy, Image, Unowned, Usage};

/// What to remove, and how much space must come back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// Gone whatever the disk looks like.
    pub(crate) overdue: Vec<Digest>,
    /// Candidates, the longest unused first; they go until enough bytes are free.
    pub(crate) candidates: Vec<Digest>,
    pub(crate) bytes_to_free: u64,
}

/// Decides as the kubelet does (pkg/kubelet/images/image_gc_manager.go): nothing below the high threshold, then down
/// to the low one, least recently used first; young, pinned and used images stay.
pub(crate) fn plan(
    images: &[&Image],
    policy: &GcPolicy,
    in_use: &HashSet<Digest>,
    space: (u64, u64),
    now: SystemTime,
) -> Plan {
    let (capacity, available) = space;
    let free: Vec<_> = images.iter().filter(|image| !image.pinned && !in_use.contains(&image.id)).collect();
    let age = |since: SystemTime| now.duration_since(since).unwrap_or(Duration::ZERO);
    let is_overdue = |image: &Image| policy.maximum_age.is_some_and(|most| age(image.used_at) > most);
    let overdue = free.iter().filter(|image| is_overdue(image)).map(|image| image.id.clone()).collect();

    let used_percent = 100 - available.saturating_mul(100).checked_div(capacity).unwrap_or(100).min(100);
    if used_percent < u64::from(policy.high_threshold_percent) {
        return Plan { overdue, ..Plan::default() };
    }
    let wanted = capacity / 100 * (100 - u64::from(policy.low_threshold_percent.min(100)));
    let mut candidates: Vec<_> =
        free.iter().filter(|image| !is_overdue(image) && age(image.stored_at) >= policy.minimum_age).collect();
    candidates.sort_by_key(|image| (image.used_at, image.stored_at));
    let candidates = candidates.into_iter().map(|image| image.id.clone()).collect();
    Plan { overdue, candidates, bytes_to_free: wanted.saturating_sub(available) }
}

/// Everything that must stay.
#[derive(Debug, Default)]
pub(crate) struct Marked {
    pub(crate) layers: HashSet<Digest>,
    pub(crate) blobs: HashSet<Digest>,
}

impl Marked {
    pub(crate) fn of<'a>(
        images: impl Iterator<Item = &'a Stored>,
        rootfs_layers: impl Iterator<Item = Digest>,
        reserved: impl Iterator<Item = Digest>,
    ) -> Self {
        let mut marked = Self::default();
        for stored in images {
            marked.layers.extend(stored.record.layers.iter().cloned());
            marked.blobs.insert(stored.record.id.clone());
            marked.blobs.extend(stored.record.manifests.iter().cloned());
        }
        marked.layers.extend(rootfs_layers);
        for digest in reserved {
            marked.layers.insert(digest.clone());
            marked.blobs.insert(digest);
        }
        marked
    }
}

impl Store {
    /// Takes what is not marked out of sight, which is quick; [`Store::remove_taken`] removes it.
    pub(crate) fn take_out_unmarked(&self, marked: &Marked) -> Result<Vec<TakenOut>, Error> {
        let mut taken = Vec::new();
        for layer in self.layers().iter().filter(|layer| !marked.layers.contains(layer)) {
            taken.extend(self.take_out_layer(layer)?);
        }
        for blob in self.blobs().iter().filter(|blob| !marked.blobs.contains(blob)) {
            let path = self.blob_path(blob);
            std::fs::remove_file(&path).map_err(|e| Error::store("remove", path, e))?;
        }
        Ok(taken)
    }

    /// Returns the bytes it took.
    pub(crate) fn remove_taken(&self, taken: Vec<TakenOut>) -> Result<u64, Error> {
        let mut freed = 0;
        for layer in taken {
            freed += layer.remove()?;
        }
        Ok(freed)
    }

    /// What the layers take.
    pub(crate) fn layers_usage(&self) -> Usage {
        let layers = self.layers().into_iter().filter_map(|blob| self.layer(&blob));
        layers.fold(Usage::default(), |sum, layer| Usage {
            bytes: sum.bytes + layer.bytes,
            inodes: sum.inodes + layer.inodes,
        })
    }

    /// What is there and belongs to nothing.
    pub(crate) fn unowned(&self, marked: &Marked, known_images: &HashSet<Digest>) -> Result<Vec<Unowned>, Error> {
        let mut found = Vec::new();
        let mut report =
            |path: std::path::PathBuf, reason| found.push(Unowned { bytes: bytes_of(&path), path, reason });
        for (kind, marks, reason) in [
            ("layers", &marked.layers, "a layer that no image and no container names; garbage collection removes it"),
            ("blobs", &marked.blobs, "a manifest or configuration that no image names; garbage collection removes it"),
        ] {
            for algorithm in ["sha256", "sha512"] {
                for (path, name) in self.entries(&format!("{kind}/{algorithm}"))? {
                    if !format!("{algorithm}:{name}").parse().is_ok_and(|digest: Digest| marks.contains(&digest)) {
                        report(path, reason);
                    }
                }
            }
        }
        for (path, name) in self.entries("images")? {
            let id = name.strip_suffix(".json").and_then(|hex| format!("sha256:{hex}").parse().ok());
            if !id.is_some_and(|id: Digest| known_images.contains(&id)) {
                report(path, "a record of an image that is not complete");
            }
        }
        for (path, _) in self.entries("tmp")? {
            if !self.is_live(&path) {
                report(path, "work in progress that nobody is doing");
            }
        }
        for (path, name) in self.entries("")? {
            if !matches!(name.as_str(), "lock" | "layers" | "images" | "blobs" | "rootfs" | "tmp") {
                report(path, "not made by the image store");
            }
        }
        Ok(found)
    }

    fn entries(&self, below: &str) -> Result<Vec<(std::path::PathBuf, String)>, Error> {
        let directory = self.root.join(below);
        let entries = std::fs::read_dir(&directory).map_err(|e| Error::store("list", &directory, e))?;
        Ok(entries.flatten().map(|entry| (entry.path(), entry.file_name().to_string_lossy().into_owned())).collect())
    }
}

fn bytes_of(path: &Path) -> u64 {
    let below = sys::tree::Dir::open(path).and_then(|dir| dir.totals());
    // What cannot be looked into is still reported.
    below.map_or_else(|_| std::fs::symlink_metadata(path).map_or(0, |meta| meta.len()), |totals| totals.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const DAY: u64 = 86_400;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn image(name: &str, used_s: u64, stored_s: u64, pinned: bool) -> Image {
        Image {
            id: Digest::of(name.as_bytes()),
            repo_tags: vec![],
            repo_digests: vec![],
            size_bytes: 10,
            pinned,
            stored_at: at(stored_s),
            used_at: at(used_s),
            config: Arc::default(),
        }
    }

    fn check(policy: &GcPolicy, available: u64, overdue: &[&str], candidates: &[&str], bytes: u64) {
        let images = [
            image("old", 5, 5, false),
            image("used", 1, 1, false),
            image("pinned", 1, 1, true),
            image("recent", 2 * DAY, 4, false),
            image("young", 3 * DAY - 10, 3 * DAY - 10, false),
        ];
        let in_use = HashSet::from([Digest::of(b"used")]);
        let plan = plan(&images.iter().collect::<Vec<_>>(), policy, &in_use, (1000, available), at(3 * DAY));
        let digests = |names: &[&str]| names.iter().map(|name| Digest::of(name.as_bytes())).collect::<Vec<_>>();
        assert_eq!((plan.overdue, plan.candidates, plan.bytes_to_free), (digests(overdue), digests(candidates), bytes));
    }

    #[test]
    fn follows_the_thresholds() {
        let policy = GcPolicy::default();
        check(&policy, 200, &[], &[], 0);
        check(&policy, 151, &[], &["old", "recent"], 49);
        check(&policy, 100, &[], &["old", "recent"], 100);
        let with_age = GcPolicy { maximum_age: Some(Duration::from_secs(DAY + DAY / 2)), ..policy };
        check(&with_age, 900, &["old"], &[], 0);
        check(&with_age, 0, &["old"], &["recent"], 200);
    }
}
