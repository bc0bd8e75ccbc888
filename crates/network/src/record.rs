//! What is known of each attached sandbox, one small file each in the run directory, for the daemon's next life.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::PortMapping;

const SUFFIX: &str = ".json";

/// A sandbox on the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The boot in which it was attached.
    pub(crate) boot: String,
    /// Its addresses.
    pub(crate) ips: Vec<IpAddr>,
    /// Its host ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ports: Vec<PortMapping>,
    /// How it is attached.
    #[serde(flatten)]
    pub(crate) link: Link,
}

/// How a sandbox is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Link {
    /// A port of the built-in bridge: the host's end of its veth pair.
    Veth(String),
}

/// The directory of the records.
#[derive(Debug)]
pub(crate) struct Records {
    dir: PathBuf,
    boot: String,
}

impl Records {
    /// Opens the directory, makes it if it is missing.
    pub(crate) fn open(dir: &Path) -> io::Result<Records> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        Records::at(dir)
    }

    /// The records in a directory that is made with the first of them.
    pub(crate) fn at(dir: &Path) -> io::Result<Records> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Records { dir: dir.to_owned(), boot })
    }

    /// A number that is another one after each boot.
    pub(crate) fn boot(&self) -> &str {
        &self.boot
    }

    /// Writes a record: a reader finds all of it or nothing. Not synced to disk, for after a power failure the sandbox is
    /// gone, too.
    pub(crate) fn save(&self, sandbox: &str, record: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(record)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let temporary = self.dir.join(format!(".{sandbox}{SUFFIX}"));
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        fs::rename(&temporary, self.path(sandbox))
    }

    /// Removes a record; one that is gone counts as removed.
    pub(crate) fn remove(&self, sandbox: &str) -> io::Result<()> {
        match fs::remove_file(self.path(sandbox)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// All records of this boot. One of another boot is removed: nothing it names exists any more.
    pub(crate) fn load(&self) -> io::Result<Vec<(String, Record)>> {
        let all: Vec<(String, Record)> = self.load_all()?;
        let (ours, old): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, record)| record.boot == self.boot);
        old.iter().try_for_each(|(sandbox, _)| self.remove(sandbox))?;
        Ok(ours)
    }

    /// All records. What cannot be read is removed, and what a daemon that was killed has not finished writing.
    pub(crate) fn load_all<T: DeserializeOwned>(&self) -> io::Result<Vec<(String, T)>> {
        let mut records = Vec::new();
        for name in self.names()?.iter().filter(|name| name.starts_with('.') && name.ends_with(SUFFIX)) {
            fs::remove_file(self.dir.join(name))?;
        }
        for sandbox in self.list()? {
            match self.read(&sandbox) {
                Ok(record) => records.push((sandbox, record)),
                Err(error) => {
                    tracing::warn!(sandbox, %error, "network record cannot be read, it is removed");
                    self.remove(&sandbox)?;
                }
            }
        }
        Ok(records)
    }

    /// Sandboxes that have a record.
    pub(crate) fn list(&self) -> io::Result<Vec<String>> {
        let names = self.names()?;
        let sandboxes = names.iter().filter_map(|name| name.strip_suffix(SUFFIX));
        Ok(sandboxes.filter(|sandbox| !sandbox.starts_with('.')).map(str::to_owned).collect())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    fn read<T: DeserializeOwned>(&self, sandbox: &str) -> io::Result<T> {
        Ok(serde_json::from_slice(&fs::read(self.path(sandbox))?)?)
    }

    fn path(&self, sandbox: &str) -> PathBuf {
        self.dir.join(format!("{sandbox}{SUFFIX}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Protocol;

    fn record(boot: &str) -> Record {
        let port = PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        Record {
            boot: boot.into(),
            ips: vec!["10.85.0.2".parse().unwrap()],
            ports: vec![port],
            link: Link::Veth("veth1".into()),
        }
    }

    #[test]
    fn only_records_of_this_boot_survive() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(&dir.path().join("network")).unwrap();
        let good = record(records.boot());
        records.save("good", &good).unwrap();
        records.save("old", &record("another boot")).unwrap();
        fs::write(records.path("torn"), "{").unwrap();
        let half = dir.path().join(format!("network/.half{SUFFIX}"));
        fs::write(&half, "{").unwrap();
        assert_eq!(records.load().unwrap(), [("good".to_owned(), good)]);
        assert!(!half.exists());
        assert_eq!(records.list().unwrap(), ["good"]);
        records.remove("good").unwrap();
        records.remove("good").unwrap();
        assert!(records.list().unwrap().is_empty());
    }

    /// Written by `cargo xtask past`: pods on the bridge, one of them with a host port.
    #[test]
    fn records_of_0_1_0_are_read() {
        let records = Records::at(&testkit::past::dir("0.1.0").join("run/network")).unwrap();
        let all: Vec<Record> = records.list().unwrap().iter().map(|sandbox| records.read(sandbox).unwrap()).collect();
        assert!(all.iter().all(|record| record.ips.len() == 1), "{all:?}");
        let ports: Vec<_> = all.iter().flat_map(|record| &record.ports).collect();
        assert_eq!(ports.iter().map(|port| (port.host_port, port.container_port)).collect::<Vec<_>>(), [(18080, 8080)]);
    }
}
