//! The sandboxes on the built-in bridge. All of it blocks, none of it for longer than the kernel works.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use netfilter::pods::Forward;
use sys::netlink::route::Mac;

use crate::bridge::{Bridge, During as _, POD_INTERFACE, PodLink, veth_name};
use crate::ipam::Pool;
use crate::ports;
use crate::record::{Link, Record, Records};
use crate::slots::Slot;
use crate::{AttachRequest, Attachment, Config, InterfaceStats, NetworkError, Owned};

/// The built-in bridge and who is on it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) bridge: Bridge,
    records: Records,
    /// Guards addresses, slots and the set of sandboxes. Never held while the kernel works.
    state: Mutex<State>,
    /// Held while a slot is made, so that who takes the network down can wait for it.
    making: Mutex<()>,
}

#[derive(Debug)]
struct State {
    pool: Pool,
    slots: Vec<Slot>,
    /// Links of slots that are not whole yet.
    in_the_making: Vec<String>,
    sandboxes: HashMap<String, Record>,
    /// Sandboxes that were detached and whose links are not gone yet. Their addresses are taken until then.
    leaving: HashMap<String, Record>,
    slots_wanted: usize,
    open: bool,
}

impl State {
    fn forwards_without(&self, sandbox: &str) -> Vec<Forward> {
        let others = self.sandboxes.iter().filter(|(id, _)| *id != sandbox);
        others.flat_map(|(_, record)| ports::forwards(&record.ports, &record.ips)).collect()
    }
}

/// Where a sandbox's link comes from.
enum Place {
    Prepared(Slot),
    New(String, Vec<IpAddr>),
}

impl Place {
    fn link(&self) -> (&str, &[IpAddr]) {
        match self {
            Place::Prepared(slot) => (&slot.link.veth, &slot.link.ips),
            Place::New(veth, ips) => (veth, ips),
        }
    }
}

impl Node {
    pub(crate) fn open(config: &Config) -> Result<Node, NetworkError> {
        let run_dir = config.run_dir.display().to_string();
        let pool = Pool::new(&config.subnets)?;
        Ok(Node {
            bridge: Bridge::open(config, pool.gateways())?,
            records: Records::open(&config.run_dir).during(&run_dir, "opening the run directory")?,
            state: Mutex::new(State {
                pool,
                slots: Vec::new(),
                in_the_making: Vec::new(),
                sandboxes: HashMap::new(),
                leaving: HashMap::new(),
                slots_wanted: config.prepared_slots,
                open: false,
            }),
            making: Mutex::new(()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every section leaves the state whole at each step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn gateways(&self) -> Vec<IpAddr> {
        self.state().pool.gateways().into_iter().map(|(address, _)| address).collect()
    }

    /// Takes over the live, removes what is left of the others, makes bridge and table. With `elsewhere` pods come to
    /// another network from now on: then there is only what those need that are here already.
    pub(crate) fn adopt(&self, live: &HashSet<String>, elsewhere: bool) -> Result<(), NetworkError> {
        let records = self.records.load().during("records", "reading the run directory")?;
        let (alive, dead): (Vec<_>, Vec<_>) = records.into_iter().partition(|(id, _)| live.contains(id.as_str()));
        for (sandbox, record) in dead {
            if let Err(error) = self.forget(&sandbox, &record) {
                tracing::warn!(
                    sandbox,
                    error = &error as &dyn std::error::Error,
                    "cannot remove a dead sandbox's network"
                );
            }
        }
        let is_needed = !elsewhere || !alive.is_empty();
        let forwards = self.take_over(alive);
        if is_needed {
            self.bridge.ensure(&forwards)?;
            self.sweep()?;
        } else {
            self.bridge.remove()?;
            self.bridge.serve_on_loopback()?;
        }
        self.state().open = true;
        if elsewhere { self.stop_preparing() } else { Ok(()) }
    }

    /// Gives up the prepared slots: pods come to another network from now on.
    pub(crate) fn stop_preparing(&self) -> Result<(), NetworkError> {
        self.state().slots_wanted = 0;
        self.drop_slots()
    }

    fn drop_slots(&self) -> Result<(), NetworkError> {
        let slots = std::mem::take(&mut self.state().slots);
        first_error(slots.into_iter().map(|slot| {
            let unplugged = self.bridge.unplug(&slot.link.veth, &slot.link.ips);
            self.state().pool.release(&slot.link.ips);
            unplugged
        }))
    }

    fn take_over(&self, alive: Vec<(String, Record)>) -> Vec<Forward> {
        let mut state = self.state();
        for (_, record) in &alive {
            state.pool.take(&record.ips);
        }
        state.sandboxes.extend(alive);
        state.forwards_without("")
    }

    /// Removes ports of the bridge that nobody owns: slots of an earlier life which the kernel has not freed yet.
    fn sweep(&self) -> Result<(), NetworkError> {
        let ports = self.owned_ports()?.into_iter();
        let unowned = ports.filter_map(|(port, owner)| owner.is_none().then_some(port));
        first_error(unowned.map(|port| self.bridge.unplug(&port, &[])))
    }

    fn owned_ports(&self) -> Result<Vec<(String, Option<String>)>, NetworkError> {
        // The links first: one that is made in between then has an owner, not the other way round.
        let ports = self.bridge.ports()?;
        let state = self.state();
        let owner = |port: &String| {
            let of_sandbox = |(id, record): (&String, &Record)| {
                let Link::Veth(veth) = &record.link;
                (veth == port).then(|| format!("sandbox {id}"))
            };
            let is_slot =
                || state.slots.iter().map(|slot| &slot.link.veth).chain(&state.in_the_making).any(|veth| veth == port);
            let slot = || is_slot().then(|| "prepared slot".to_owned());
            state.sandboxes.iter().chain(&state.leaving).find_map(of_sandbox).or_else(slot)
        };
        Ok(ports.into_iter().map(|port| (owner(&port), port)).map(|(owner, port)| (port, owner)).collect())
    }

    pub(crate) fn attach(&self, request: AttachRequest) -> Result<Attachment, NetworkError> {
        let sandbox = request.sandbox_id.clone();
        let place = self.reserve(&request)?;
        let attached = self.settle(&request, place).and_then(|(made, link)| {
            self.publish(&sandbox)?;
            Ok((made, link))
        });
        match attached {
            Ok((made, link)) => Ok(attachment(request.netns.or(made), link)),
            Err(error) => {
                if let Err(undo) = self.detach(&sandbox) {
                    tracing::warn!(sandbox, error = &undo as &dyn std::error::Error, "cannot undo a failed attach");
                }
                Err(error)
            }
        }
    }

    /// Decides address and link and enters the sandbox, so that nobody else gets its address or ports.
    fn reserve(&self, request: &AttachRequest) -> Result<Place, NetworkError> {
        let id = &request.sandbox_id;
        check_name(id)?;
        let mut state = self.state();
        if state.sandboxes.contains_key(id) || state.leaving.contains_key(id) {
            return Err(NetworkError::AlreadyAttached(id.clone()));
        }
        let taken = state.sandboxes.iter().map(|(id, record)| (id.as_str(), &record.ports[..]));
        ports::check(&request.port_mappings, taken, id)?;
        let slot = if request.netns.is_none() { state.slots.pop() } else { None };
        let place = match slot {
            Some(slot) => Place::Prepared(slot),
            None => Place::New(veth_name(), state.pool.allocate()?),
        };
        let (veth, ips) = place.link();
        let record = Record {
            boot: self.records.boot().to_owned(),
            ips: ips.to_vec(),
            ports: request.port_mappings.clone(),
            link: Link::Veth(veth.to_owned()),
        };
        state.sandboxes.insert(id.clone(), record);
        Ok(place)
    }

    /// Makes the link; the descriptor is that of a namespace made here.
    fn settle(&self, request: &AttachRequest, place: Place) -> Result<(Option<OwnedFd>, PodLink), NetworkError> {
        let sandbox = &request.sandbox_id;
        match (place, &request.netns) {
            (Place::Prepared(slot), _) => Ok((Some(slot.namespace), slot.link)),
            (Place::New(veth, ips), Some(theirs)) => {
                Ok((None, self.bridge.join_pod(sandbox, theirs.as_fd(), veth, ips)?))
            }
            (Place::New(veth, ips), None) => {
                let (namespace, link) = self.bridge.create_pod(sandbox, veth, ips)?;
                Ok((Some(namespace), link))
            }
        }
    }

    /// Opens the host ports and writes the record.
    fn publish(&self, sandbox: &str) -> Result<(), NetworkError> {
        let Some(record) = self.state().sandboxes.get(sandbox).cloned() else { return Ok(()) };
        self.records.save(sandbox, &record).during(sandbox, "writing the record")?;
        let forwards = ports::forwards(&record.ports, &record.ips);
        self.bridge.add_ports(sandbox, &forwards, || self.state().forwards_without(""))
    }

    /// Closes the host ports. The link, whose removal takes the kernel some RCU grace periods, follows with
    /// [`Node::clear`]; nobody is left who would use it.
    pub(crate) fn detach(&self, sandbox: &str) -> Result<(), NetworkError> {
        let Some(record) = self.state().sandboxes.get(sandbox).cloned() else { return Ok(()) };
        self.close_ports(sandbox, &record)?;
        let mut state = self.state();
        state.sandboxes.remove(sandbox);
        state.leaving.insert(sandbox.to_owned(), record);
        Ok(())
    }

    /// Removes the links of the sandboxes that were detached.
    ///
    /// # Errors
    /// The first that the kernel refused; it and those after it are tried again with the next call.
    pub(crate) fn clear(&self) -> Result<(), NetworkError> {
        let next = || self.state().leaving.iter().next().map(|(sandbox, record)| (sandbox.clone(), record.clone()));
        while let Some((sandbox, record)) = next() {
            self.remove_link(&sandbox, &record)?;
            let mut state = self.state();
            // Two may clear at once; the address is given back by one of them.
            if state.leaving.remove(&sandbox).is_some() {
                state.pool.release(&record.ips);
            }
        }
        Ok(())
    }

    /// Removes what a sandbox has in the kernel, and then its record.
    fn forget(&self, sandbox: &str, record: &Record) -> Result<(), NetworkError> {
        self.close_ports(sandbox, record)?;
        self.remove_link(sandbox, record)
    }

    fn close_ports(&self, sandbox: &str, record: &Record) -> Result<(), NetworkError> {
        let forwards = ports::forwards(&record.ports, &record.ips);
        self.bridge.remove_ports(sandbox, &forwards, || self.state().forwards_without(sandbox))
    }

    fn remove_link(&self, sandbox: &str, record: &Record) -> Result<(), NetworkError> {
        let Link::Veth(veth) = &record.link;
        self.bridge.unplug(veth, &record.ips)?;
        self.records.remove(sandbox).during(sandbox, "removing the record")
    }

    pub(crate) fn stats(&self, sandbox: &str) -> Result<Vec<InterfaceStats>, NetworkError> {
        let Some(record) = self.state().sandboxes.get(sandbox).cloned() else { return Ok(Vec::new()) };
        let Link::Veth(veth) = &record.link;
        Ok(self.bridge.stats(veth)?.into_iter().collect())
    }

    /// Whether fewer slots are ready than wanted.
    pub(crate) fn wants_slot(&self) -> bool {
        let state = self.state();
        state.open && state.slots.len() < state.slots_wanted
    }

    /// Makes a slot, if one is wanted.
    pub(crate) fn add_slot(&self) -> Result<(), NetworkError> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.wants_slot() {
            return Ok(());
        }
        let veth = veth_name();
        let ips = {
            let mut state = self.state();
            let ips = state.pool.allocate()?;
            state.in_the_making.push(veth.clone());
            ips
        };
        let kept = match self.bridge.create_pod("prepared slot", veth.clone(), ips.clone()) {
            Ok((namespace, link)) => self.keep_slot(Slot { namespace, link }),
            Err(error) => {
                self.state().pool.release(&ips);
                Err(error)
            }
        };
        self.state().in_the_making.retain(|other| *other != veth);
        kept
    }

    fn keep_slot(&self, slot: Slot) -> Result<(), NetworkError> {
        let mut state = self.state();
        if state.open && state.slots.len() < state.slots_wanted {
            state.slots.push(slot);
            return Ok(());
        }
        state.pool.release(&slot.link.ips);
        drop(state);
        self.bridge.unplug(&slot.link.veth, &slot.link.ips)
    }

    pub(crate) fn fsck(&self) -> Result<Vec<Owned>, NetworkError> {
        let (bridge, table) = self.bridge.exists()?;
        let mut owned = Vec::new();
        let ports = self.owned_ports()?;
        let state = self.state();
        let own = || state.open.then(|| "pod network".to_owned());
        if bridge {
            owned.push(Owned { kind: "link", name: self.bridge.name().to_owned(), owner: own() });
        }
        if table {
            owned.push(Owned { kind: "table", name: self.bridge.table().to_owned(), owner: own() });
        }
        for address in self.bridge.loopback_addresses()? {
            owned.push(Owned { kind: "address", name: format!("{address} on lo"), owner: own() });
        }
        owned.extend(ports.into_iter().map(|(name, owner)| Owned { kind: "link", name, owner }));
        for sandbox in self.records.list().during("records", "reading the run directory")? {
            let known = state.sandboxes.contains_key(&sandbox) || state.leaving.contains_key(&sandbox);
            let owner = known.then(|| format!("sandbox {sandbox}"));
            owned.push(Owned { kind: "record", name: sandbox, owner });
        }
        Ok(owned)
    }

    pub(crate) fn shutdown(&self) -> Result<(), NetworkError> {
        self.state().open = false;
        drop(self.making.lock().unwrap_or_else(PoisonError::into_inner));
        self.clear()?;
        self.drop_slots()?;
        self.bridge.remove()
    }
}

/// Takes all steps, also those after one that fails.
fn first_error(steps: impl Iterator<Item = Result<(), NetworkError>>) -> Result<(), NetworkError> {
    steps.fold(Ok(()), Result::and)
}

/// Refuses what would be no file name of its own.
pub(crate) fn check_name(sandbox: &str) -> Result<(), NetworkError> {
    if sandbox.is_empty() || sandbox.starts_with('.') || sandbox.contains('/') {
        return Err(NetworkError::Config(format!("{sandbox:?} cannot name a sandbox")));
    }
    Ok(())
}

/// A hardware address in its usual form.
pub(crate) fn mac_text(mac: Mac) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

fn attachment(netns: Option<OwnedFd>, link: PodLink) -> Attachment {
    Attachment {
        netns: netns.expect("a sandbox without a namespace of its own got one"),
        ips: link.ips,
        interface: POD_INTERFACE.to_owned(),
        mac: Some(mac_text(link.mac)),
        mtu: Some(link.mtu),
        dns: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_whose_link_cannot_go_keeps_no_address() {
        let dir = tempfile::tempdir().unwrap();
        let subnets = vec!["10.0.0.0/29".parse().unwrap()];
        let node = Node::open(&Config { subnets, ..Config::new(dir.path().to_owned()) }).unwrap();
        let addresses = || std::iter::from_fn(|| node.state().pool.allocate().ok()).collect::<Vec<_>>();
        // The kernel looks for no name that is so long.
        let veth = "veth".repeat(8);
        let slot = |ips| {
            let namespace = sys::netns::current().unwrap();
            Slot { namespace, link: PodLink { veth: veth.clone(), ips, mac: Mac::default(), mtu: 1500 } }
        };
        let slots: Vec<Slot> = addresses().into_iter().map(slot).collect();
        let count = slots.len();
        assert!(count > 1);
        node.state().slots = slots;
        assert!(node.drop_slots().is_err());
        assert_eq!(addresses().len(), count);
    }
}
