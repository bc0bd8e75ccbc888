//! IPVS: the kernel's load balancer leads connections, a table of nftables beside it does what it does not know.
//!
//! ```text
//! addresses on kube-ipvs0 ─► virtual services and servers ─► rules lead there ─► what left goes
//! ```
//!
//! In this order nothing leads to a service that is not there yet. IPVS has no transactions: a step that fails leaves the
//! ones before it, and everything is compared with the kernel anew.

mod sysctl;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command as Program, Stdio};
use std::time::{Duration, Instant};

use netfilter::ipvs::{self as plan, Observed, Steps, Turnover, VirtualTable};
use netfilter::services::{Addresses, Balancer, ServiceTable};
use service::{Change, Difference, Frontend, Network, NodePorts, Rules};
use sys::netlink;
use sys::netlink::ipvs::{Command, Ipvs, Settings, Timeouts, Virtual};
use sys::netns;
use sys::rustix::io::Errno;

use super::Backend;
use super::nftables::Nftables;
use crate::service_link::{IPVS as LINK, NodeAddresses, ServiceLink};
use crate::{Config, IpvsOptions, Owned, RulesError, StartError};

/// How many looks at the rules, each a question to the kernel, for one at addresses and servers, which takes listings.
const LOOKS_PER_KEEPING: u32 = 25;
/// Services whose servers are looked at each time: IPVS does not tell that somebody else has changed something, so all are
/// looked at by turns.
const SERVICES_PER_KEEPING: usize = 256;

/// Sockets in the host's network namespace, and what has been written there.
#[derive(Debug)]
pub(super) struct IpvsBackend {
    rules: Nftables,
    ipvs: Ipvs,
    link: ServiceLink,
    virtuals: VirtualTable,
    /// Which of this node's addresses have node ports.
    node_ports: NodePorts,
    /// Addresses that the kernel does not let this node have; tried again with every replacement. Their frontends are no
    /// virtual services.
    refused: BTreeSet<IpAddr>,
    /// How often to look after addresses and servers, which takes listings, and when it was done last.
    keep_up_every: Duration,
    kept_up: Option<Instant>,
    /// The service whose servers were looked at last.
    seen: Option<Virtual>,
}

impl IpvsBackend {
    /// Opens the sockets in the calling thread's namespace, checks that the kernel has all that is needed, and sets what
    /// IPVS needs set.
    pub(super) fn open(config: &Config) -> Result<IpvsBackend, StartError> {
        let options = &config.ipvs;
        let mut ipvs = Ipvs::open().map_err(|error| match error.errno {
            Errno::NOENT => StartError::NoIpvs(error),
            Errno::PERM => StartError::NotPermitted(error),
            _ => StartError::Kernel(error),
        })?;
        let rules = Nftables::open_with(config, Balancer::Ipvs)?;
        load(&options.scheduler);
        probe(&options.scheduler)?;
        sysctl::set(options.strict_arp)?;
        ipvs.set_timeouts(timeouts(options)).map_err(StartError::Kernel)?;
        let link = ServiceLink::open(LINK).map_err(StartError::Kernel)?;
        let virtuals = VirtualTable::new(plan::Config {
            scheduler: options.scheduler.clone(),
            excluded: options.exclude_cidrs.clone(),
        });
        Ok(IpvsBackend {
            rules,
            ipvs,
            link,
            virtuals,
            node_ports: NodePorts::All,
            refused: BTreeSet::new(),
            keep_up_every: config.look_every * LOOKS_PER_KEEPING,
            kept_up: None,
            seen: None,
        })
    }

    fn observe(&mut self) -> netlink::Result<Observed> {
        let mut services = Vec::new();
        for (service, settings) in self.ipvs.services()? {
            services.push((service, settings, self.ipvs.servers(&service)?));
        }
        let NodeAddresses { own, bound } = self.addresses()?;
        Ok(Observed { services, bound, own })
    }

    /// Addresses on which node ports answer, and those of Services.
    fn addresses(&mut self) -> netlink::Result<NodeAddresses> {
        let mut addresses = self.link.addresses()?;
        addresses.own.retain(|address| self.node_ports.include(*address));
        Ok(addresses)
    }

    /// What comes before the rules lead there.
    fn before(&mut self, steps: &Steps) -> netlink::Result<()> {
        if steps.cut > 0 {
            tracing::warn!(servers = steps.cut, "more servers end than can be waited for: connections to some are cut");
        }
        if let Some((_, error)) = self.link.add(&steps.bind)?.into_iter().next() {
            return Err(error); // a replacement does without it
        }
        self.ipvs.apply(&steps.make)
    }

    /// What goes when the rules no longer lead there.
    fn after(&mut self, steps: &Steps) -> netlink::Result<()> {
        self.ipvs.apply(&steps.unmake)?;
        self.link.delete(&steps.unbind)
    }

    /// Puts addresses of Services on the interface before anything relies on them, and remembers which the kernel refuses.
    fn take_addresses<'f>(
        &mut self,
        frontends: impl Iterator<Item = &'f Frontend>,
        there: &[&BTreeSet<IpAddr>],
    ) -> netlink::Result<BTreeSet<IpAddr>> {
        let explicit = frontends.filter(|frontend| !frontend.is_node_port()).map(|frontend| frontend.address);
        let new: BTreeSet<IpAddr> =
            explicit.filter(|address| !there.iter().any(|known| known.contains(address))).collect();
        let new: Vec<IpAddr> = new.into_iter().collect();
        let mut refused = BTreeSet::new();
        for (address, error) in self.link.add(&new)? {
            if !self.refused.contains(&address) {
                tracing::warn!(%address, %error, "the kernel refuses this address of a Service: it is not served");
            }
            refused.insert(address);
        }
        Ok(refused)
    }

    /// Carries out steps that change no rule.
    fn follow(&mut self, steps: &Steps, own: &Turnover) -> Result<(), RulesError> {
        if steps.is_empty() && *own == Turnover::default() {
            return Ok(());
        }
        self.before(steps)?;
        self.rules.update_with(&Difference::default(), |batch| {
            ServiceTable::change_addresses(batch, Addresses::Own, &own.gone, &own.come);
            ServiceTable::change_addresses(batch, Addresses::Vips, &steps.unbind, &steps.bind);
        })?;
        Ok(self.after(steps)?)
    }

    /// Takes in what changes without rules: addresses of this node, and connections that have ended. Returns whether
    /// everything is there that has been written.
    fn keep_up(&mut self) -> Result<bool, RulesError> {
        if !self.link.is_same()? {
            return Ok(false);
        }
        let NodeAddresses { own, bound } = self.addresses()?;
        if bound != *self.virtuals.bound() || !self.has_services()? {
            return Ok(false);
        }
        let (steps, turnover) = self.virtuals.set_own(own);
        self.follow(&steps, &turnover)?;
        for service in self.virtuals.draining() {
            let servers = self.ipvs.servers(&service)?;
            let steps = self.virtuals.settle(&service, &servers);
            self.follow(&steps, &Turnover::default())?;
        }
        Ok(true)
    }

    /// Whether the services whose turn it is are there with their servers.
    fn has_services(&mut self) -> netlink::Result<bool> {
        let some: Vec<Virtual> = self.virtuals.services_after(self.seen.as_ref()).take(SERVICES_PER_KEEPING).collect();
        for service in &some {
            if !self.virtuals.has_servers(service, &self.ipvs.servers(service)?) {
                return Ok(false);
            }
        }
        self.seen = some.last().filter(|_| some.len() == SERVICES_PER_KEEPING).copied();
        Ok(true)
    }
}

/// Removes what this mode has left beside the table of nftables, if it has. Its interface says so: a virtual service alone
/// may be anybody's. Connections that IPVS leads end with their service.
pub(super) fn remove_leftovers(config: &Config) -> Result<(), RulesError> {
    let mut link = ServiceLink::open(LINK)?;
    if !link.exists()? {
        return Ok(());
    }
    let mut ipvs = Ipvs::open()?;
    let services = ipvs.services()?.into_iter().map(|(service, _)| service);
    let is_excluded = |address| config.ipvs.exclude_cidrs.iter().any(|range| range.contains(&address));
    let ours = services.filter(|service| !is_excluded(service.address)).map(Command::DeleteService);
    ipvs.apply(&ours.collect::<Vec<_>>())?;
    Ok(link.remove()?)
}

impl Backend for IpvsBackend {
    fn place(&self) -> String {
        format!("IPVS and {}", self.rules.place())
    }

    fn replace(&mut self, rules: &Rules, network: &Network) -> Result<(), RulesError> {
        self.node_ports.clone_from(&network.node_ports);
        self.link.make_dummy()?;
        let observed = self.observe()?;
        let needed = rules.iter().filter(|(_, entry)| plan::needs_address(entry)).map(|(one, _)| one);
        self.refused = self.take_addresses(needed, &[&observed.bound, &observed.own])?;
        let steps = self.virtuals.replace(&without(rules, &self.refused), observed);
        self.before(&steps)?;
        let all = |addresses: &BTreeSet<IpAddr>| addresses.iter().copied().collect::<Vec<_>>();
        let (own, bound) = (all(self.virtuals.own()), all(self.virtuals.bound()));
        self.rules.replace_with(rules, network, |batch| {
            ServiceTable::change_addresses(batch, Addresses::Own, &[], &own);
            ServiceTable::change_addresses(batch, Addresses::Vips, &[], &bound);
        })?;
        Ok(self.after(&steps)?)
    }

    fn update(&mut self, difference: &Difference) -> Result<(), RulesError> {
        let there = [self.virtuals.bound().clone(), self.virtuals.own().clone(), self.refused.clone()];
        let needs = |change: &&Change| change.new.as_ref().is_some_and(plan::needs_address);
        let come = difference.changes.iter().filter(needs).map(|change| &change.frontend);
        let refused = self.take_addresses(come, &there.each_ref())?;
        self.refused.extend(refused);
        let steps = self.virtuals.update(&narrowed(difference, &self.refused));
        self.before(&steps)?;
        self.rules.update_with(difference, |batch| {
            ServiceTable::change_addresses(batch, Addresses::Vips, &steps.unbind, &steps.bind);
        })?;
        Ok(self.after(&steps)?)
    }

    fn is_there(&mut self) -> Result<bool, RulesError> {
        if !self.rules.is_there()? {
            return Ok(false);
        }
        if self.kept_up.is_some_and(|at| at.elapsed() < self.keep_up_every) {
            return Ok(true);
        }
        self.kept_up = Some(Instant::now());
        self.keep_up().or_else(|error| {
            tracing::warn!(%error, "IPVS could not be brought up to date; it is compared with the rules anew");
            Ok(false)
        })
    }

    fn udp_frontends(&mut self) -> Result<Vec<Frontend>, RulesError> {
        self.rules.udp_frontends()
    }

    fn remove(&mut self) -> Result<(), RulesError> {
        let observed = self.observe()?;
        self.ipvs.apply(&self.virtuals.remove(&observed))?;
        self.link.remove()?;
        self.rules.remove()
    }

    fn owned(&mut self) -> Result<Vec<Owned>, RulesError> {
        let mut owned = self.rules.owned()?;
        let services = || Some("services".to_owned());
        if self.link.exists()? {
            owned.push(Owned { kind: "link", name: LINK.to_owned(), owner: services() });
        }
        let virtuals = self.ipvs.services()?;
        owned.extend(virtuals.iter().filter(|(one, _)| self.virtuals.is_ours(one)).map(|(one, _)| Owned {
            kind: "virtual service",
            name: name(one),
            owner: self.virtuals.is_known(one).then(services).flatten(),
        }));
        Ok(owned)
    }
}

/// Has the scheduler's module loaded. The kernel would do it when a service asks for it, but under a lock for which network
/// namespaces wait on their way out, and the modules of `lblc` and `lblcr` wait for those: nobody would ever go on (Linux 6.1).
fn load(scheduler: &str) {
    let module = format!("ip_vs_{scheduler}");
    if Path::new("/sys/module").join(&module).exists() {
        return;
    }
    #[expect(clippy::disallowed_methods, reason = "where a module is, and what it needs, this program knows alone")]
    let loaded = Program::new("modprobe").args(["-q", &module]).stdin(Stdio::null()).status();
    if let Err(error) = loaded {
        // A kernel without modules has no need of it; another loads it itself.
        tracing::debug!(module, %error, "cannot start modprobe");
    }
}

/// Tries in a network namespace that is thrown away whether the kernel has the scheduler and the kind of interface.
fn probe(scheduler: &str) -> Result<(), StartError> {
    let address = IpAddr::from([192, 0, 2, 1]);
    let service = Virtual { address, protocol: service::Protocol::Tcp.number(), port: 1 };
    let settings = Settings { scheduler: scheduler.to_owned(), flags: 0, timeout_s: 0 };
    let tried = netns::create(|| {
        let linked = ServiceLink::open(LINK).and_then(|mut link| link.make_dummy());
        let added = Ipvs::open().and_then(|mut ipvs| ipvs.apply(&[Command::AddService(service, settings)]));
        Ok((linked, added))
    });
    // Who may not make a namespace finds out as it goes.
    let Ok((_, (linked, added))) = tried else { return Ok(()) };
    linked.map_err(|error| match error.errno {
        Errno::OPNOTSUPP => StartError::NoDummy(error),
        _ => StartError::Kernel(error),
    })?;
    added.map_err(|source| match source.errno {
        Errno::NOENT => StartError::NoScheduler { scheduler: scheduler.to_owned(), source },
        _ => StartError::Kernel(source),
    })
}

fn timeouts(options: &IpvsOptions) -> Timeouts {
    let seconds = |time: std::time::Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    Timeouts {
        tcp_s: seconds(options.tcp_timeout),
        tcp_fin_s: seconds(options.tcp_fin_timeout),
        udp_s: seconds(options.udp_timeout),
    }
}

/// Rules without the frontends of addresses that cannot be had.
fn without<'r>(rules: &'r Rules, refused: &BTreeSet<IpAddr>) -> Cow<'r, Rules> {
    let gone = rules.iter().filter(|(frontend, _)| refused.contains(&frontend.address));
    let changes: Vec<Change> =
        gone.map(|(frontend, entry)| Change { frontend: *frontend, old: Some(entry.clone()), new: None }).collect();
    if changes.is_empty() {
        return Cow::Borrowed(rules);
    }
    let mut rules = rules.clone();
    rules.apply(Difference { changes });
    Cow::Owned(rules)
}

/// A difference that brings no frontends of addresses that cannot be had.
fn narrowed<'d>(difference: &'d Difference, refused: &BTreeSet<IpAddr>) -> Cow<'d, Difference> {
    if refused.is_empty() {
        return Cow::Borrowed(difference);
    }
    let mut difference = difference.clone();
    difference.changes.retain(|change| change.new.is_none() || !refused.contains(&change.frontend.address));
    Cow::Owned(difference)
}

fn name(service: &Virtual) -> String {
    format!("{} protocol {}", std::net::SocketAddr::new(service.address, service.port), service.protocol)
}

#[cfg(test)]
mod tests {
    use service::Protocol;

    use super::super::userspace::tests::entry;
    use super::*;

    #[test]
    fn frontends_of_refused_addresses_are_left_out() {
        let at = |address: [u8; 4]| Frontend { address: address.into(), protocol: Protocol::Tcp, port: 80 };
        let change = |frontend| Change { frontend, old: None, new: Some(entry(&[([10, 0, 0, 1], 80).into()])) };
        let (good, bad) = (at([10, 96, 0, 1]), at([10, 96, 0, 2]));
        let difference = Difference { changes: vec![change(good), change(bad)] };
        let mut rules = Rules::default();
        rules.apply(difference.clone());
        let refused = BTreeSet::from([bad.address]);
        assert_eq!(without(&rules, &refused).iter().map(|(one, _)| *one).collect::<Vec<_>>(), [good]);
        assert_eq!(*without(&rules, &BTreeSet::new()), rules);
        assert_eq!(narrowed(&difference, &refused).changes, [change(good)]);
        let gone = Difference { changes: vec![Change { new: None, ..change(bad) }] };
        assert_eq!(*narrowed(&gone, &refused), gone, "what goes may go");
    }
}
