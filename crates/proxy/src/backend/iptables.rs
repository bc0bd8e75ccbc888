//! iptables: the chains that upstream's kube-proxy makes, by the programs that operators use.
//!
//! ```text
//! open:     which programs ─► which address families ─► a trial in a network namespace of its own
//! replace:  iptables-save ─► text ─► iptables-restore     for each family
//! update:                    text ─► iptables-restore
//! is_there: the kernel is asked directly, no program is started
//! ```

mod programs;
mod watch;

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use netfilter::iptables::{self, Families, Remains, ServiceRules, Table, counters};
use service::{Difference, Frontend, Network, Rules};
use sys::netlink::{self, Socket};
use sys::netns;

use self::programs::{Family, Programs};
use self::watch::Watch;
use super::Backend;
use crate::configuration::NodePortAddress;
use crate::{Config, IptablesKind, Owned, RuleCounts, RulesError, StartError, Tallies};

/// The switch that lets packets to 127.0.0.0/8 be routed.
const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf/all/route_localnet";

/// How many scripts of a replacement wait for their turn: enough to keep the kernel busy, and no more, as each has some 500 KB.
const SCRIPTS_AHEAD: usize = 2;

/// Whether packets to 127.0.0.0/8 are routed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loopback {
    /// Node ports do not answer there.
    Unused,
    /// Not yet.
    Closed,
    Open,
}

/// Both address families, or IPv4 alone.
#[derive(Debug)]
pub(super) struct Iptables {
    programs: Programs,
    namespace: OwnedFd,
    rules: ServiceRules,
    loopback: Loopback,
    /// What was there when it was looked at last; whoever replaces it takes it.
    remains: Option<Families<Remains>>,
    watch: Watch,
    /// Where counters of rules are asked for, if the kernel has such.
    counters: Option<Socket>,
    last: Families<Written>,
}

/// The last write of one address family.
#[derive(Debug, Clone, Copy, Default)]
struct Written {
    /// Rules in `filter` and `nat`.
    rules: [usize; 2],
    /// None if nothing was to be written.
    took: Option<Duration>,
}

impl Written {
    /// What is written of the scripts that pass by.
    fn count(&mut self, script: &str) {
        for (rules, table) in self.rules.iter_mut().zip(COUNTED) {
            *rules += iptables::count_written([script], table);
        }
    }
}

/// Tables whose rules are counted.
const COUNTED: [Table; 2] = [Table::Filter, Table::Nat];

impl Iptables {
    /// Finds the programs, and tries in a network namespace of its own whether they and the kernel have all that rules need.
    pub(super) fn open(config: &Config) -> Result<Iptables, StartError> {
        let localhost_node_ports = opens_loopback(config);
        let counters = with_counters();
        let mut options = iptables::Config {
            network: Network::default(),
            masquerade_bit: config.iptables.masquerade_bit,
            localhost_node_ports,
            drop_invalid: !is_liberal(),
            counts: counters.is_some(),
            compares: true,
        };
        let mut programs = Programs::find(config.iptables.kind)?;
        programs.try_out(&mut options)?;
        Ok(Iptables {
            loopback: if localhost_node_ports { Loopback::Closed } else { Loopback::Unused },
            watch: Watch::new(programs.kind, programs.families())?,
            programs,
            namespace: netns::current().map_err(StartError::Namespace)?,
            counters: counters.filter(|_| options.counts),
            rules: ServiceRules::new(options),
            remains: None,
            last: Families::default(),
        })
    }

    /// What of ours is there. A table of ten thousand Services takes a while.
    fn look(&self) -> Result<Families<Remains>, RulesError> {
        let mut remains = Families::<Remains>::default();
        for family in self.programs.families() {
            let listing = self.inside(|| self.programs.save(*family, &[]))?;
            *remains.of_mut(family.is_ipv6()) = Remains::read(&listing, family.is_ipv6());
        }
        Ok(remains)
    }

    /// Whether nothing is missing from what is listed. Where rules are only counted, somebody may have removed his own.
    fn is_listed(&mut self) -> Result<bool, RulesError> {
        let remains = self.look()?;
        let whole = self
            .programs
            .families()
            .iter()
            .all(|family| self.rules.is_whole(remains.of(family.is_ipv6()), family.is_ipv6()));
        if whole {
            self.watch.written(&self.rules)?;
        } else {
            // They are replaced next; looking takes longer than that.
            self.remains = Some(remains);
        }
        Ok(whole)
    }

    /// Replaces what there is of one address family. Texts are made while the kernel is at those before them.
    fn replace_family(&mut self, family: Family, remains: &Remains) -> Result<(), RulesError> {
        let (ipv6, lines_max) = (family.is_ipv6(), self.programs.lines_max());
        let Iptables { rules, programs, namespace, last, .. } = self;
        std::thread::scope(|scope| {
            let (sender, scripts) = mpsc::sync_channel(SCRIPTS_AHEAD);
            // Nobody takes them any more when one was refused, and that is told below.
            scope.spawn(move || rules.replacement(ipv6, remains, lines_max, |script| sender.send(script)));
            *last.of_mut(ipv6) = restore(programs, namespace.as_fd(), family, scripts.into_iter())?;
            Ok(())
        })
    }

    /// See [`run_inside`].
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T, RulesError> + Send) -> Result<T, RulesError> {
        run_inside(self.namespace.as_fd(), work)
    }
}

/// Programs inherit the namespace of the thread that starts them.
fn run_inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, RulesError> + Send,
) -> Result<T, RulesError> {
    netns::run_in(namespace, || Ok(work())).map_err(RulesError::Namespace)?
}

/// Carries scripts of one address family out as they come, and tells what they were.
fn restore(
    programs: &Programs,
    namespace: BorrowedFd<'_>,
    family: Family,
    scripts: impl Iterator<Item = String> + Send,
) -> Result<Written, RulesError> {
    let (mut written, begun) = (Written::default(), Instant::now());
    let mut scripts = scripts.filter(|script| !script.is_empty()).inspect(|script| written.count(script)).peekable();
    if scripts.peek().is_none() {
        return Ok(Written::default());
    }
    run_inside(namespace, || programs.restore_all(family, scripts))?;
    written.took = Some(begun.elapsed());
    Ok(written)
}

impl Backend for Iptables {
    fn place(&self) -> String {
        format!("{}, chains KUBE-*", self.programs)
    }

    fn replace(&mut self, rules: &Rules, network: &Network) -> Result<(), RulesError> {
        let remains = match self.remains.take() {
            Some(remains) => remains,
            None => self.look()?,
        };
        self.rules.set(rules, network);
        for family in self.programs.families() {
            self.replace_family(*family, remains.of(family.is_ipv6()))?;
        }
        self.watch.written(&self.rules)?;
        // Not before the rule that keeps others out.
        if self.loopback == Loopback::Closed {
            self.inside(|| {
                open_loopback();
                Ok(())
            })?;
            self.loopback = Loopback::Open;
        }
        Ok(())
    }

    fn update(&mut self, difference: &Difference) -> Result<(), RulesError> {
        // A chain that somebody has emptied would take the change, and nothing would tell any more that the rest is missing.
        if !self.watch.stands(&self.rules)? && !self.is_listed()? {
            return Err(RulesError::Removed);
        }
        let Families(scripts) = self.rules.update(difference);
        for (family, script) in self.programs.families().iter().zip(scripts) {
            let written = restore(&self.programs, self.namespace.as_fd(), *family, std::iter::once(script))?;
            *self.last.of_mut(family.is_ipv6()) = written;
        }
        self.watch.written(&self.rules)
    }

    fn is_there(&mut self) -> Result<bool, RulesError> {
        Ok(self.watch.is_untouched(&self.rules)? || self.is_listed()?)
    }

    fn udp_frontends(&mut self) -> Result<Vec<Frontend>, RulesError> {
        let remains = self.look()?;
        let frontends = remains.0.iter().flat_map(|remains| remains.udp_frontends()).copied().collect();
        self.remains = Some(remains);
        Ok(frontends)
    }

    fn remove(&mut self) -> Result<(), RulesError> {
        self.inside(|| remove(&self.programs))
    }

    fn took(&self) -> Option<[Option<Duration>; 2]> {
        Some(self.last.0.map(|written| written.took))
    }

    fn tallies(&mut self) -> Tallies {
        let mut tallies = Tallies::default();
        for family in self.programs.families() {
            for (table, written) in COUNTED.into_iter().zip(self.last.of(family.is_ipv6()).rules) {
                let total = self.rules.count(table, family.is_ipv6());
                tallies.rules.push((table.name(), family.is_ipv6(), RuleCounts { total, written }));
            }
        }
        if let Some(socket) = &mut self.counters {
            let count = |name| socket.counted_packets(name).ok().flatten();
            [tallies.invalid_dropped, tallies.loopback_accepted] = counters::ALL.map(count);
        }
        tallies
    }

    fn owned(&mut self) -> Result<Vec<Owned>, RulesError> {
        let remains = self.look()?;
        let mut owned = Vec::new();
        for family in self.programs.families() {
            for (chain, is_known) in self.rules.chains(remains.of(family.is_ipv6()), family.is_ipv6()) {
                let owner = is_known.then(|| "services".to_owned());
                owned.push(Owned { kind: "chain", name: format!("{} {chain}", family.program()), owner });
            }
        }
        Ok(owned)
    }
}

/// Removes what this mode has left, if it has, but for rules of the kind that is in use. Nothing is started where there is
/// nothing.
pub(super) fn remove_leftovers(in_use: Option<IptablesKind>) -> Result<(), RulesError> {
    Programs::with_leftovers(in_use).iter().try_for_each(remove)
}

/// Removes what a proxy has made in the calling thread's namespace.
fn remove(programs: &Programs) -> Result<(), RulesError> {
    for family in programs.families() {
        let listing = programs.save(*family, &[])?;
        let scripts = iptables::removal(&Remains::read(&listing, family.is_ipv6()), programs.lines_max());
        programs.restore_all(*family, scripts.into_iter())?;
    }
    Ok(())
}

/// Makes the counters of rules in the calling thread's namespace; none if the kernel has no such.
fn with_counters() -> Option<Socket> {
    let made = || -> netlink::Result<Socket> {
        let mut socket = Socket::netfilter()?;
        counters::ALL.into_iter().try_for_each(|name| socket.ensure_counter(name))?;
        Ok(socket)
    };
    made().inspect_err(|error| tracing::info!(%error, "rules are not counted: the kernel has no nfacct")).ok()
}

/// Whether connection tracking takes segments outside of the window for valid.
fn is_liberal() -> bool {
    let value = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal");
    value.is_ok_and(|value| value.trim() != "0")
}

/// Whether node ports are to answer on 127.0.0.0/8: only then there is a rule that keeps others out.
fn opens_loopback(config: &Config) -> bool {
    let includes = |address: &NodePortAddress| match address {
        NodePortAddress::All | NodePortAddress::Localhost => true,
        NodePortAddress::Primary => false,
        NodePortAddress::Range(range) => range.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)),
    };
    config.iptables.localhost_node_ports && config.node_ports.iter().any(includes)
}

/// Lets packets to 127.0.0.0/8 be routed. The chain KUBE-FIREWALL keeps those of others out.
fn open_loopback() {
    let opened = match std::fs::read_to_string(ROUTE_LOCALNET) {
        Ok(value) if value.trim() == "1" => Ok(()),
        _ => std::fs::write(ROUTE_LOCALNET, "1"),
    };
    if let Err(error) = opened {
        tracing::warn!(
            %error,
            "node ports do not answer on 127.0.0.0/8: {ROUTE_LOCALNET} cannot be set; set it to 1, or \
             iptables.localhostNodePorts to false"
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use service::Model;

    use super::*;
    use crate::Mode;

    /// Two Services with all that chains of ports may have.
    fn model() -> Model {
        let mut model = Model::new("here");
        let (ips, outside) =
            (json!(["10.96.0.1", "fd00:96::1"]), json!([{ "ip": "192.0.2.7" }, { "ip": "2001:db8::7" }]));
        for (name, protocol, policy) in [("web", "TCP", "Cluster"), ("dns", "UDP", "Local")] {
            let service = json!({
                "metadata": { "namespace": "default", "name": name },
                "spec": {
                    "type": "LoadBalancer", "clusterIP": ips[0], "clusterIPs": ips, "externalTrafficPolicy": policy,
                    "sessionAffinity": "ClientIP", "loadBalancerSourceRanges": ["198.51.100.0/24", "2001:db8:1::/64"],
                    "ports": [{ "name": "p", "port": 80, "nodePort": 30080, "protocol": protocol }],
                },
                "status": { "loadBalancer": { "ingress": outside } },
            });
            model.set_service(&serde_json::from_value(service).unwrap());
            for (family, addresses) in
                [("IPv4", ["10.244.0.2", "10.244.1.3"]), ("IPv6", ["fd00:244::2", "fd00:244:1::3"])]
            {
                let endpoint = |(address, node)| json!({ "addresses": [address], "nodeName": node });
                let slice = json!({
                    "metadata": { "namespace": "default", "name": format!("{name}-{family}"),
                        "labels": { "kubernetes.io/service-name": name } },
                    "addressType": family, "ports": [{ "name": "p", "port": 8080, "protocol": protocol }],
                    "endpoints": addresses.into_iter().zip(["here", "there"]).map(endpoint).collect::<Vec<_>>(),
                });
                model.set_slice(&serde_json::from_value(slice).unwrap());
            }
        }
        model.update();
        model
    }

    #[test]
    fn what_is_there_as_it_should_be_is_not_written_again() {
        let model = model();
        for kind in [IptablesKind::Nft, IptablesKind::Legacy] {
            let mut config = Config::new("here");
            (config.mode, config.iptables.kind) = (Mode::Iptables, kind);
            let network = Network {
                local: service::Local::Sources(vec![
                    "10.244.0.0/16".parse().unwrap(),
                    "fd00:244::/32".parse().unwrap(),
                ]),
                ..Network::default()
            };
            let tried = netns::create(|| {
                let mut iptables = match Iptables::open(&config) {
                    Err(StartError::NoIptables) => return Ok(None),
                    opened => opened.unwrap(),
                };
                iptables.replace(model.rules(), &network).unwrap();
                let remains = iptables.look().unwrap();
                let written = |remains| {
                    let mut rules = ServiceRules::new(iptables::Config::new());
                    rules.replace(model.rules(), &network, &remains, usize::MAX).0.map(|scripts| scripts.concat())
                };
                let texts = [written(Families::default()), written(remains)];
                iptables.replace(model.rules(), &network).unwrap();
                assert!(iptables.is_there().unwrap());
                Ok(Some(texts))
            });
            let [first, again] = match tried {
                Ok((_, Some(texts))) => texts,
                Ok((_, None)) => return println!("skipped: needs iptables"),
                Err(error) => return println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error})"),
            };
            for chain in [":KUBE-SVC-", ":KUBE-SVL-", ":KUBE-EXT-", ":KUBE-FW-", ":KUBE-SEP-"] {
                for (first, again) in first.iter().zip(&again) {
                    assert!(first.contains(chain) && !again.contains(chain), "{kind:?} {chain}\n{again}");
                }
            }
        }
    }
}
