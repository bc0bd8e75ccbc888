//! The sandboxes on the operator's network. All of it blocks for as long as plugins take: call it on a thread that may.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sys::netlink::Writer;
use sys::netlink::route::{Link, LinkStats};
use sys::netns;

use super::config::NetworkList;
use super::orphans::{self, Work};
use super::{Addresses, Attached, Cni, INTERFACE, Subject};
use crate::bridge::{During as _, LOOPBACK};
use crate::node::{check_name, mac_text};
use crate::record::Records;
use crate::{AttachRequest, Attachment, Config, InterfaceStats, LiveSandbox, NetworkError, Owned, PortMapping, ports};

/// A sandbox as it is kept on disk. It outlives a boot: what plugins have allocated for it may do so, too.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<PortMapping>,
    attached: Attached,
}

/// A sandbox.
#[derive(Debug)]
struct Entry {
    kept: Kept,
    /// Its network namespace, until DEL.
    namespace: Option<OwnedFd>,
    /// It died without DEL.
    is_leftover: bool,
    /// Held while plugins work on it: ADD and DEL of one sandbox never overlap.
    turn: Arc<Mutex<()>>,
}

/// Who is on the operator's network.
#[derive(Debug)]
pub(crate) struct Sandboxes {
    pub(crate) cni: Arc<Cni>,
    host: OwnedFd,
    records: Records,
    /// Links to the namespaces, by the sandboxes' names: a path that stays the same when the daemon is another one, and
    /// leaves nothing mounted.
    netns_dir: PathBuf,
    /// Guards the set of sandboxes. Never held while a plugin works.
    entries: Mutex<HashMap<String, Entry>>,
}

impl Sandboxes {
    pub(crate) fn open(config: &Config) -> Result<Sandboxes, NetworkError> {
        let dir = config.cni_state_dir.display().to_string();
        Ok(Sandboxes {
            cni: Arc::new(Cni::new(config)),
            host: netns::current().during(&config.bridge, "opening the host's network namespace")?,
            records: Records::at(&config.cni_state_dir).during(&dir, "opening the directory of CNI attachments")?,
            netns_dir: config.run_dir.join("netns"),
            entries: Mutex::default(),
        })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Every section leaves the set whole at each step.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this sandbox is on the operator's network.
    pub(crate) fn has(&self, sandbox: &str) -> bool {
        self.entries().contains_key(sandbox)
    }

    /// Takes over the live ones, and finds those that are gone and must be deleted.
    pub(crate) fn adopt(&self, live: &mut Vec<LiveSandbox>) -> Result<(), NetworkError> {
        let records = self.records.load_all::<Kept>().during("CNI attachments", "reading the directory")?;
        let lives = |id: &str| live.iter().any(|other| other.sandbox_id == id);
        // What an ADD that was heard of has left running is meant to: a name server for the whole network, for one.
        let work = |(id, kept): &(String, Kept)| {
            let is_gone = kept.attached.is_complete() && !lives(id);
            if is_gone { Some(Work::After) } else { (!kept.attached.is_complete()).then_some(Work::All) }
        };
        let unfinished = records.iter().filter_map(|record| Some((record.0.as_str(), work(record)?)));
        end_plugins(&unfinished.collect());
        self.clear_links()?;
        for (sandbox, kept) in records {
            self.cni.expect();
            let place = live.iter().position(|other| other.sandbox_id == sandbox);
            let namespace = place.and_then(|place| live.swap_remove(place).netns);
            if let Some(namespace) = &namespace {
                self.link(&sandbox, namespace)?;
            }
            let entry = Entry { kept, namespace, is_leftover: place.is_none(), turn: Arc::default() };
            self.entries().insert(sandbox, entry);
        }
        Ok(())
    }

    /// Lets the plugins free what others have left. Before the first attach, and only when nothing waits to be deleted.
    pub(crate) fn collect_garbage(&self, network: &NetworkList) {
        let live: Vec<String> = self.entries().keys().cloned().collect();
        for error in self.on_host(|| self.cni.collect_garbage(network, &live)) {
            tracing::warn!(error = &error as &dyn std::error::Error, "CNI garbage collection");
        }
    }

    /// Sandboxes that are gone and could not be deleted yet.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        self.entries().iter().filter(|(_, entry)| entry.is_leftover).map(|(sandbox, _)| sandbox.clone()).collect()
    }

    pub(crate) fn attach(&self, mut request: AttachRequest, network: &NetworkList) -> Result<Attachment, NetworkError> {
        let sandbox = request.sandbox_id.clone();
        let turn = Arc::new(Mutex::new(()));
        let connected = {
            // Before anybody can know the sandbox: a detach waits for this attach.
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = self.enter(&request, network, turn.clone())?;
            self.connect(&sandbox, request.netns.take(), kept)
        };
        match connected {
            Ok(attachment) => Ok(attachment),
            Err(error) => {
                // The specification asks for DEL after a failed ADD, too. If that fails, a later detach or daemon goes on.
                if let Err(undo) = self.detach(&sandbox) {
                    tracing::warn!(sandbox, error = &undo as &dyn std::error::Error, "cannot undo a failed attach");
                }
                Err(error)
            }
        }
    }

    fn enter(
        &self,
        request: &AttachRequest,
        network: &NetworkList,
        turn: Arc<Mutex<()>>,
    ) -> Result<Kept, NetworkError> {
        let sandbox = &request.sandbox_id;
        check_name(sandbox)?;
        let kept = Kept { ports: request.port_mappings.clone(), attached: Attached::new(network, request)? };
        let mut entries = self.entries();
        if entries.contains_key(sandbox) {
            return Err(NetworkError::AlreadyAttached(sandbox.clone()));
        }
        let taken = entries.iter().map(|(id, entry)| (id.as_str(), &entry.kept.ports[..]));
        ports::check(&request.port_mappings, taken, sandbox)?;
        let entry = Entry { kept: kept.clone(), namespace: None, is_leftover: false, turn };
        entries.insert(sandbox.clone(), entry);
        Ok(kept)
    }

    fn connect(&self, sandbox: &str, given: Option<OwnedFd>, mut kept: Kept) -> Result<Attachment, NetworkError> {
        // Before the first plugin is called: if the daemon dies in between, DEL is due.
        self.records.save(sandbox, &kept).during(sandbox, "writing the record")?;
        let namespace = match given {
            Some(namespace) => namespace,
            None => netns::create(|| Ok(())).during(sandbox, "making a network namespace")?.0,
        };
        let mut inside = netns::route_socket(namespace.as_fd()).during(sandbox, "entering the network namespace")?;
        let mut setup = Writer::new();
        setup.set_up(LOOPBACK);
        inside.request(&setup).during(sandbox, "setting up loopback")?;
        let own = namespace.try_clone().during(sandbox, "copying a descriptor")?;
        let path = self.link(sandbox, &own)?;
        self.change(sandbox, |entry| entry.namespace = Some(own));

        let subject = Subject { sandbox, netns: Some(&path) };
        let Addresses { ips, dns } = self.on_host(|| self.cni.add(&mut kept.attached, subject))?;
        self.records.save(sandbox, &kept).during(sandbox, "writing the record")?;
        self.change(sandbox, |entry| entry.kept = kept);
        let link = inside.link(INTERFACE).during(sandbox, "reading the interface")?;
        Ok(attachment(namespace, ips, dns, link))
    }

    fn change(&self, sandbox: &str, how: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().get_mut(sandbox) {
            how(entry);
        }
    }

    /// Calls DEL and forgets the sandbox; it stays known when a plugin fails.
    pub(crate) fn detach(&self, sandbox: &str) -> Result<(), NetworkError> {
        let Some(turn) = self.turn(sandbox) else { return Ok(()) };
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have detached it meanwhile.
        let Some((attached, path)) = self.find(sandbox) else { return Ok(()) };
        let subject = Subject { sandbox, netns: path.as_deref() };
        self.on_host(|| self.cni.del(&attached, subject))?;
        self.unlink(sandbox)?;
        self.records.remove(sandbox).during(sandbox, "removing the record")?;
        self.entries().remove(sandbox);
        Ok(())
    }

    /// Calls CHECK.
    pub(crate) fn check(&self, sandbox: &str) -> Result<(), NetworkError> {
        let Some(turn) = self.turn(sandbox) else { return Ok(()) };
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((attached, path)) = self.find(sandbox) else { return Ok(()) };
        self.on_host(|| self.cni.check(&attached, Subject { sandbox, netns: path.as_deref() }))
    }

    fn turn(&self, sandbox: &str) -> Option<Arc<Mutex<()>>> {
        self.entries().get(sandbox).map(|entry| entry.turn.clone())
    }

    fn find(&self, sandbox: &str) -> Option<(Attached, Option<PathBuf>)> {
        let entries = self.entries();
        let entry = entries.get(sandbox)?;
        let path = entry.namespace.is_some().then(|| self.netns_dir.join(sandbox));
        Some((entry.kept.attached.clone(), path))
    }

    pub(crate) fn stats(&self, sandbox: &str) -> Result<Vec<InterfaceStats>, NetworkError> {
        let namespace = self.entries().get(sandbox).and_then(|entry| entry.namespace.as_ref()?.try_clone().ok());
        let Some(namespace) = namespace else { return Ok(Vec::new()) };
        let read = || {
            let mut inside = netns::route_socket(namespace.as_fd())?;
            Ok::<_, io::Error>(inside.links()?)
        };
        let links = read().during(sandbox, "reading counters")?;
        Ok(links.into_iter().filter(|link| !link.loopback).map(|link| counters(link.name, link.stats)).collect())
    }

    pub(crate) fn fsck(&self) -> Result<Vec<Owned>, NetworkError> {
        let mut owned = Vec::new();
        let entries = self.entries();
        let living: HashSet<&str> =
            entries.iter().filter(|(_, entry)| !entry.is_leftover).map(|(sandbox, _)| sandbox.as_str()).collect();
        let owner = |sandbox: &str| living.contains(sandbox).then(|| format!("sandbox {sandbox}"));
        for sandbox in self.records.list().during("CNI attachments", "reading the directory")? {
            owned.push(Owned { kind: "record", owner: owner(&sandbox), name: sandbox });
        }
        for sandbox in self.links().during("namespaces", "reading the directory")? {
            owned.push(Owned { kind: "netns", owner: owner(&sandbox), name: sandbox });
        }
        Ok(owned)
    }

    /// Runs what starts plugins in the host's network namespace, whichever the calling thread is in.
    fn on_host<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(self.host.as_fd(), || Ok(work()))
            .expect("the namespace that was open all the time can be entered")
    }

    /// Makes the path of a namespace.
    fn link(&self, sandbox: &str, namespace: &OwnedFd) -> Result<PathBuf, NetworkError> {
        self.unlink(sandbox)?;
        let path = self.netns_dir.join(sandbox);
        let target = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        let make = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.netns_dir)?;
            symlink(&target, &path)
        };
        make().during(sandbox, "making the path of the namespace")?;
        Ok(path)
    }

    fn unlink(&self, sandbox: &str) -> Result<(), NetworkError> {
        remove_link(&self.netns_dir.join(sandbox)).during(sandbox, "removing the path of the namespace")
    }

    fn links(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.netns_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// Removes all paths: they name descriptors of an earlier daemon.
    fn clear_links(&self) -> Result<(), NetworkError> {
        let clear = || self.links()?.iter().try_for_each(|sandbox| remove_link(&self.netns_dir.join(sandbox)));
        clear().during("namespaces", "removing old paths")
    }
}

/// Ends the plugins that an earlier daemon has left at work on sandboxes for which DEL is due: it would come too early.
fn end_plugins(sandboxes: &HashMap<&str, Work>) {
    if sandboxes.is_empty() {
        return;
    }
    match orphans::end(sandboxes) {
        Ok(0) => {}
        Ok(count) => tracing::warn!(count, "processes of CNI plugins that an earlier daemon had started were ended"),
        Err(error) => tracing::warn!(%error, "CNI plugins that an earlier daemon has started may still be at work"),
    }
}

fn remove_link(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn attachment(netns: OwnedFd, ips: Vec<IpAddr>, dns: Option<crate::Dns>, link: Option<Link>) -> Attachment {
    Attachment {
        netns,
        ips,
        interface: INTERFACE.to_owned(),
        mac: link.as_ref().and_then(|link| link.mac).map(mac_text),
        mtu: link.map(|link| link.mtu),
        dns,
    }
}

fn counters(name: String, stats: LinkStats) -> InterfaceStats {
    InterfaceStats {
        name,
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
    }
}
