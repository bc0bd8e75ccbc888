//! Ids of the host for pods with a user namespace of their own (`hostUsers: false`, KEP-127).
//!
//! Each such pod gets a range of 65,536 ids that no other pod has. Which one is written to `pods/<uid>/userns` in
//! upstream's form, so that a restarted daemon, or another kubelet, finds it again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::damaged;
use crate::generate::UserRange;
use crate::paths::Paths;

/// Ids of a pod. The first range begins after the host's own ids.
const LENGTH: u32 = 65_536;
/// How many ranges there are: upstream's default for 110 pods and more, below 2^31.
const RANGES: u32 = 16_384;
const FILE: &str = "userns";

/// The ranges of all pods of a node.
#[derive(Debug)]
pub(crate) struct Users {
    paths: Paths,
    /// The number of each pod's range, by uid. Short sections, never over an await.
    ranges: Mutex<BTreeMap<String, u32>>,
}

/// The file's content, as upstream writes it.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

impl Users {
    /// Takes in what is written of pods that are on disk.
    pub(crate) fn open(paths: Paths) -> Self {
        let entries = fs::read_dir(paths.pods()).into_iter().flatten().flatten();
        let uids = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let ranges =
            uids.filter_map(|uid| Some((read(&paths, &uid)?, uid))).map(|(number, uid)| (uid, number)).collect();
        Self { paths, ranges: Mutex::new(ranges) }
    }

    /// The pod's range: the one it has, or a free one, written down before it is answered.
    ///
    /// # Errors
    /// The file cannot be written, or no range is left.
    pub(crate) fn of(&self, uid: &str) -> io::Result<UserRange> {
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = ranges.get(uid) {
            return Ok(range(*number));
        }
        let taken: std::collections::BTreeSet<u32> = ranges.values().copied().collect();
        let free = (1..RANGES).find(|number| !taken.contains(number));
        let number = free.ok_or_else(|| io::Error::other("every range of user ids is taken by a pod"))?;
        self.write(uid, range(number))?;
        ranges.insert(uid.to_owned(), number);
        Ok(range(number))
    }

    /// The pod runs with ids from `first` on. If nothing is written of that, it is now: nobody else may get them.
    pub(crate) fn restore(&self, uid: &str, first: u32) {
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        // The host's own ids are no range.
        if first == 0 || !first.is_multiple_of(LENGTH) || ranges.contains_key(uid) {
            return;
        }
        tracing::warn!(uid, first, "the ids that a pod has were not on record");
        ranges.insert(uid.to_owned(), first / LENGTH);
        if let Err(error) = self.write(uid, range(first / LENGTH)) {
            tracing::warn!(uid, %error, "the ids that a pod has cannot be written down");
        }
    }

    /// The pod is gone, with its directory.
    pub(crate) fn release(&self, uid: &str) {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    fn write(&self, uid: &str, range: UserRange) -> io::Result<()> {
        let mapping = Mapping { host_id: range.first, container_id: 0, length: range.length };
        let written = Written { uid_mappings: vec![mapping], gid_mappings: vec![mapping] };
        fs::create_dir_all(self.paths.pod(uid))?;
        fs::write(self.paths.pod(uid).join(FILE), serde_json::to_vec(&written)?)
    }
}

fn range(number: u32) -> UserRange {
    UserRange { first: number * LENGTH, length: LENGTH }
}

/// The number of the range that is written of a pod; one that is not ours is left alone. A file that is damaged is set
/// aside.
fn read(paths: &Paths, uid: &str) -> Option<u32> {
    let file = paths.pod(uid).join(FILE);
    let text = fs::read(&file).ok()?;
    let written: Written = serde_json::from_slice(&text).inspect_err(|error| damaged::set_aside(&file, error)).ok()?;
    let first = written.uid_mappings.first()?;
    (first.length == LENGTH && first.host_id % LENGTH == 0).then_some(first.host_id / LENGTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pod_keeps_a_range_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths { root: root.path().join("kubelet"), logs: root.path().join("logs") };
        let users = Users::open(paths.clone());
        let (a, b) = (users.of("a").unwrap(), users.of("b").unwrap());
        assert_eq!((a.first, b.first, a.length), (65_536, 131_072, 65_536));
        assert_eq!(users.of("a").unwrap(), a);

        // A damaged file is set aside; who runs has its ids still.
        fs::write(paths.pod("a").join(FILE), "{").unwrap();
        let damaged = Users::open(paths.clone());
        damaged.restore("a", a.first);
        damaged.restore("b", a.first);
        assert_eq!((damaged.of("b").unwrap(), damaged.of("a").unwrap()), (b, a));
        assert!(paths.pod("a").join("userns.corrupt").exists());

        let again = Users::open(paths.clone());
        assert_eq!(again.of("b").unwrap(), b);
        again.release("a");
        fs::remove_dir_all(paths.pod("a")).unwrap();
        assert_eq!(again.of("c").unwrap(), a);
    }
}
