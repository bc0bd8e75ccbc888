//! The images by id and by name. Pure: what is on disk changes first, then this.

use std::collections::{BTreeMap, HashSet};

use crate::digest::Digest;
use crate::reference::Reference;
use crate::store::records::{Record, Stored};

/// All images of the store.
#[derive(Debug, Default)]
pub(crate) struct Index {
    by_id: BTreeMap<Digest, Stored>,
}

const PREFIX_DIGITS_MIN: usize = 6;

impl Index {
    pub(crate) fn new(stored: Vec<Stored>) -> Self {
        Self { by_id: stored.into_iter().map(|stored| (stored.record.id.clone(), stored)).collect() }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Stored> {
        self.by_id.values()
    }

    pub(crate) fn ids(&self) -> HashSet<Digest> {
        self.by_id.keys().cloned().collect()
    }

    pub(crate) fn by_id(&self, id: &Digest) -> Option<&Stored> {
        self.by_id.get(id)
    }

    /// By id, by name, or by the beginning of an id if only one image has it. A name wins over a beginning.
    pub(crate) fn find(&self, name: &str) -> Option<&Stored> {
        if let Ok(id) = name.parse::<Digest>() {
            return self.by_id(&id);
        }
        self.by_name(name).or_else(|| self.by_prefix(name))
    }

    fn by_name(&self, name: &str) -> Option<&Stored> {
        let reference: Reference = name.parse().ok()?;
        if let Some(digest) = reference.digest() {
            let named = reference.with_digest(digest);
            return self.all().find(|stored| stored.record.repo_digests.contains(&named));
        }
        let tagged = reference.tagged()?;
        self.all().find(|stored| stored.record.repo_tags.contains(&tagged))
    }

    fn by_prefix(&self, prefix: &str) -> Option<&Stored> {
        let prefix = prefix.strip_prefix("sha256:").unwrap_or(prefix);
        if prefix.len() < PREFIX_DIGITS_MIN {
            return None;
        }
        let mut matches = self.all().filter(|stored| stored.record.id.hex().starts_with(prefix));
        matches.next().filter(|_| matches.next().is_none())
    }

    pub(crate) fn insert(&mut self, stored: Stored) {
        self.by_id.insert(stored.record.id.clone(), stored);
    }

    pub(crate) fn remove(&mut self, id: &Digest) {
        self.by_id.remove(id);
    }

    /// The records of other images that have one of `record`'s tags, without it: a tag names one image.
    pub(crate) fn losing_tags(&self, record: &Record) -> Vec<Record> {
        let others = self
            .all()
            .filter(|stored| stored.record.id != record.id && !stored.record.repo_tags.is_disjoint(&record.repo_tags));
        others
            .map(|stored| Record { repo_tags: &stored.record.repo_tags - &record.repo_tags, ..stored.record.clone() })
            .collect()
    }

    /// `record` with what is known about the same image already. The layers are those of the newer manifest.
    pub(crate) fn merged(&self, mut record: Record) -> Record {
        let Some(known) = self.by_id(&record.id).map(|stored| &stored.record) else { return record };
        record.repo_tags.extend(known.repo_tags.iter().cloned());
        record.repo_digests.extend(known.repo_digests.iter().cloned());
        record.manifests.extend(known.manifests.iter().cloned());
        record.pinned |= known.pinned;
        record.stored_at_s = record.stored_at_s.min(known.stored_at_s);
        record
    }

    /// The record that has this tag or digest name, without it.
    pub(crate) fn without_name(&self, name: &str) -> Option<Record> {
        let named = |record: &Record| record.repo_tags.contains(name) || record.repo_digests.contains(name);
        let mut record = self.all().find(|stored| named(&stored.record))?.record.clone();
        if record.repo_tags.remove(name) && record.repo_tags.is_empty() {
            // The digest names came with the tag; without it nothing names the image for people any more.
            let reference: Reference = name.parse().ok()?;
            record.repo_digests.retain(|digest| !digest.starts_with(&format!("{}@", reference.repository())));
        }
        record.repo_digests.remove(name);
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Image;
    use std::sync::Arc;
    use std::time::SystemTime;

    fn record(id: &str, tags: &[&str], digests: &[&str]) -> Record {
        Record {
            id: Digest::of(id.as_bytes()),
            manifests: [].into(),
            layers: vec![],
            repo_tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            repo_digests: digests.iter().map(|name| (*name).to_owned()).collect(),
            pinned: false,
            stored_at_s: 1,
        }
    }

    fn stored(record: Record) -> Stored {
        let image = Image {
            id: record.id.clone(),
            repo_tags: vec![],
            repo_digests: vec![],
            size_bytes: 0,
            pinned: false,
            stored_at: SystemTime::UNIX_EPOCH,
            used_at: SystemTime::UNIX_EPOCH,
            config: Arc::default(),
        };
        Stored { record, image: Arc::new(image) }
    }

    #[test]
    fn finds_by_name_digest_id_and_prefix() {
        let digest = Digest::of(b"manifest");
        let named = format!("docker.io/library/a@{digest}");
        let index = Index::new(vec![
            stored(record("a", &["docker.io/library/a:latest"], &[&named])),
            stored(record("b", &["docker.io/library/b:1"], &[])),
        ]);
        let id = Digest::of(b"a");
        for name in ["a", "docker.io/library/a:latest", &format!("a@{digest}"), &id.to_string(), id.hex(), id.short()] {
            assert_eq!(index.find(name).map(|stored| &stored.record.id), Some(&id), "{name}");
        }
        for name in ["b", "a:2", &id.hex()[..5], &Digest::of(b"c").to_string()] {
            assert!(index.find(name).is_none(), "{name}");
        }
    }

    #[test]
    fn a_tag_moves_and_the_old_image_keeps_its_digest() {
        let index = Index::new(vec![stored(record("old", &["x:1"], &["x@d"]))]);
        let losing = index.losing_tags(&record("new", &["x:1"], &[]));
        assert_eq!(losing.len(), 1);
        assert!(losing[0].repo_tags.is_empty() && losing[0].repo_digests.contains("x@d"));
    }

    #[test]
    fn the_same_image_collects_names() {
        let index = Index::new(vec![stored(record("i", &["x:1"], &[]))]);
        let merged = index.merged(record("i", &["x:2"], &[]));
        assert_eq!(merged.repo_tags.len(), 2);
    }
}
