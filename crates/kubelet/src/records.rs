//! Records of pods on disk: what a restarted daemon has to know and the runtime cannot tell.

use std::fs;
use std::io;
use std::path::PathBuf;

use pod::Record;
use tokio_util::task::TaskTracker;

use crate::damaged;

/// How the name of a record ends until it is whole.
const NEW: &str = "new";

/// A directory with one JSON file for each pod, by uid.
#[derive(Debug)]
pub(crate) struct Records {
    dir: PathBuf,
    /// Those under way, whether or not somebody waits for them.
    writes: TaskTracker,
}

impl Records {
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            // A daemon was killed while it wrote it.
            if path.extension().is_some_and(|extension| extension == NEW) {
                fs::remove_file(path)?;
            }
        }
        Ok(Self { dir, writes: TaskTracker::new() })
    }

    fn path(&self, uid: &str) -> Option<PathBuf> {
        // A uid comes from the API: as a file's name it must not lead elsewhere.
        let plain = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        (plain && !uid.starts_with('.')).then(|| self.dir.join(format!("{uid}.json")))
    }

    /// The pods that have a record, by uid.
    pub(crate) fn uids(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned())).collect()
    }

    /// The record of a pod; one that is damaged is set aside: the pod then begins with what runtime and source know.
    pub(crate) fn load(&self, uid: &str) -> Option<Record> {
        let path = self.path(uid)?;
        let text = fs::read(&path).ok()?;
        serde_json::from_slice(&text).inspect_err(|error| damaged::set_aside(&path, error)).ok()
    }

    /// Replaces the record in one step. Nothing is synced: after a crash of the machine no run of it is left. It is done on a
    /// thread, as ext4 begins to write a file that takes another's place: of 3,000 records, beside a build, a third took more than
    /// a millisecond and the longest 62. Each pod has one owner, who waits for this before the next.
    pub(crate) async fn save(&self, uid: &str, record: &Record) -> io::Result<()> {
        let Some(path) = self.path(uid) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let (temporary, bytes) = (path.with_extension(NEW), serde_json::to_vec(record)?);
        let write = move || fs::write(&temporary, bytes).and_then(|()| fs::rename(temporary, path));
        self.writes.spawn_blocking(write).await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// What is being written, for whoever has to wait until that is over.
    pub(crate) fn writes(&self) -> TaskTracker {
        self.writes.clone()
    }

    pub(crate) fn remove(&self, uid: &str) {
        if let Some(path) = self.path(uid) {
            let _ = fs::remove_file(damaged::aside(&path)); // There hardly ever is one.
            let _ = fs::remove_file(path); // It may never have been written.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_record_survives_and_a_bad_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("records")).unwrap();
        let record = Record { sandbox_attempt: 3, ..Record::default() };
        records.save("a-1", &record).await.unwrap();
        assert_eq!((records.load("a-1"), records.uids()), (Some(record), vec!["a-1".to_owned()]));
        records.remove("a-1");
        assert_eq!(records.load("a-1"), None);
        assert!(records.save("../x", &Record::default()).await.is_err());
    }

    /// This runtime has one thread. A pipe without a reader stands for a disk that does not answer.
    #[tokio::test]
    async fn a_disk_that_does_not_answer_holds_up_no_other_pod() {
        use sys::rustix::fs::{CWD, FileType, Mode, mknodat};
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        let pipe = dir.path().join("a-1.new");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let others_go_on = receiver.recv_timeout(std::time::Duration::from_secs(60));
            (others_go_on.is_ok(), fs::read(pipe).unwrap())
        });
        let record = Record::default();
        let others = async {
            tokio::task::yield_now().await;
            records.save("b-2", &record).await.unwrap();
            sender.send(()).unwrap();
        };
        let (saved, ()) = tokio::join!(records.save("a-1", &record), others);
        saved.unwrap();
        assert_eq!(reader.join().unwrap(), (true, serde_json::to_vec(&record).unwrap()));
        assert_eq!(records.load("b-2"), Some(record));
    }

    /// Whoever stops the owner of a pod waits for what the owner had begun to write.
    #[tokio::test]
    async fn a_record_that_nobody_waits_for_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        let record = Record { sandbox_attempt: 3, ..Record::default() };
        tokio::select! {
            biased;
            _ = records.save("a-1", &record) => {}
            () = std::future::ready(()) => {}
        }
        let writes = records.writes();
        writes.close();
        writes.wait().await;
        assert_eq!(records.load("a-1"), Some(record));
    }

    #[test]
    fn half_a_record_goes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a-1.json"), serde_json::to_vec(&Record::default()).unwrap()).unwrap();
        fs::write(dir.path().join("a-1.new"), "{").unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        assert_eq!((records.load("a-1"), dir.path().join("a-1.new").exists()), (Some(Record::default()), false));
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_goes_with_the_pod() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        fs::write(dir.path().join("a-1.json"), "{").unwrap();
        assert_eq!((records.load("a-1"), records.uids()), (None, Vec::<String>::new()));
        assert!(dir.path().join("a-1.json.corrupt").exists());
        records.remove("a-1");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Written by `cargo xtask past`.
    #[test]
    fn records_of_0_1_0_are_read() {
        let records = Records::open(testkit::past::dir("0.1.0").join("state/pods")).unwrap();
        let uids = records.uids();
        assert_eq!(uids.len(), 3, "two that live and one that has ended");
        for uid in uids {
            let record = records.load(&uid).unwrap();
            assert!(record.started.is_some() && record.containers.contains_key("main"), "{record:?}");
        }
    }
}
