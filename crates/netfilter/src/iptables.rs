//! Services in the tables of iptables, as text for `iptables-restore --noflush`, with the chains, rules and comments that
//! upstream's kube-proxy writes.
//!
//! ```text
//! nat:  PREROUTING, OUTPUT ─► KUBE-SERVICES ─┬─ cluster IP ────────────────────────► SVC (or SVL)
//!                                            ├─ external IP, load balancer (► FW) ─► EXT
//!                                            └─► KUBE-NODEPORTS ───────────────────► EXT
//!       EXT ─► SVC, all endpoints, or SVL, those of this node ─► SEP, one endpoint ─► dnat
//!       POSTROUTING ─► KUBE-POSTROUTING: masquerades what KUBE-MARK-MASQ has marked
//! filter: INPUT, FORWARD, OUTPUT ─► KUBE-SERVICES, KUBE-EXTERNAL-SERVICES: refuses what is not translated
//!                                ─► KUBE-PROXY-FIREWALL: drops what a load balancer does not admit
//! ```
//!
//! A frontend is refused in one table and led somewhere in the other, and there is no transaction over both. So a change
//! first adds refusals, then leads elsewhere, then takes refusals away: what is translated meets no refusal.
//!
//! Rules of one port are a pure function of its entries ([`port`]). A change writes the chains of a port that differ, and
//! single rules in the chains that ports share: what it costs to make the text does not depend on how many Services there
//! are. (What it costs to carry it out does: the kernel's `ip_tables` take a table as a whole only.)

mod base;
mod form;
mod names;
mod port;
mod save;
mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::IpNet;
use service::{Change, Difference, Entry, Frontend, Local, Network, Rules};

use port::{PortKey, PortRules, Shared};
pub use save::Remains;

/// Chains in the table `mangle` that say which of the two kinds of iptables a node uses.
pub const HINTS: [&str; 3] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", CANARY];
/// A chain in each table that does nothing but be there.
pub const CANARY: &str = names::CANARY;
/// Counters of the kernel (nfacct) that rules count in, under upstream's names.
pub mod counters {
    /// Packets that were dropped because connection tracking takes them for invalid.
    pub const INVALID_DROPPED: &str = "ct_state_invalid_dropped_pkts";
    /// Packets that node ports took on loopback addresses.
    pub const LOOPBACK_ACCEPTED: &str = "localhost_nps_accepted_pkts";
    /// Both.
    pub const ALL: [&str; 2] = [INVALID_DROPPED, LOOPBACK_ACCEPTED];
}

/// With more endpoints than these in one address family ports are written in short, as upstream does it.
const FULL_ENDPOINTS_MAX: usize = 1000;

/// A table that rules of ours stand in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "they are what they are called")]
pub enum Table {
    Mangle,
    Filter,
    Nat,
}

impl Table {
    /// All of them.
    pub const ALL: [Table; 3] = [Table::Mangle, Table::Filter, Table::Nat];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Table::Mangle => "mangle",
            Table::Filter => "filter",
            Table::Nat => "nat",
        }
    }

    /// How many built-in chains it has.
    fn hooks(self) -> usize {
        match self {
            Table::Mangle => 5,
            Table::Filter => 3,
            Table::Nat => 4,
        }
    }

    fn named(name: &str) -> Option<Table> {
        Table::ALL.into_iter().find(|table| table.name() == name)
    }
}

/// How the rules are to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What is known of pods, Services and this node.
    pub network: Network,
    /// The bit of the packet's mark that says "masquerade", from 0 to 31.
    pub masquerade_bit: u8,
    /// Whether node ports answer on 127.0.0.0/8.
    pub localhost_node_ports: bool,
    /// Drop what connection tracking takes for invalid instead of letting it through untranslated.
    pub drop_invalid: bool,
    /// Whether the counters are there ([`counters`]).
    pub counts: bool,
    /// Whether rules can compare a packet's source with its destination (the match `bpf`). One rule then masquerades what
    /// endpoints send to themselves, and where there are many endpoints they have no chains of their own.
    pub compares: bool,
}

impl Config {
    /// Upstream's defaults.
    pub fn new() -> Config {
        Config {
            network: Network::default(),
            masquerade_bit: 14,
            localhost_node_ports: true,
            drop_invalid: true,
            counts: false,
            compares: false,
        }
    }

    fn mark(&self) -> String {
        format!("{:#x}", 1u32 << (self.masquerade_bit & 31))
    }

    /// What lets a rule count, with the space behind it.
    fn counting(&self, counter: &str) -> String {
        if self.counts { format!("-m nfacct --nfacct-name {counter} ") } else { String::new() }
    }

    /// Whether node ports answer on loopback addresses. Those of IPv6 cannot be translated.
    fn opens_loopback(&self, ipv6: bool) -> bool {
        self.localhost_node_ports && !ipv6 && self.network.node_ports.include(Ipv4Addr::LOCALHOST.into())
    }

    fn pod_ranges(&self, ipv6: bool) -> Vec<IpNet> {
        let Local::Sources(ranges) = &self.network.local else { return Vec::new() };
        ranges.iter().filter(|range| range.addr().is_ipv6() == ipv6).copied().collect()
    }

    /// What begins a rule about what comes from a pod; one rule for each.
    fn pod_matches(&self, ipv6: bool) -> Vec<String> {
        match &self.network.local {
            Local::Sources(_) => self.pod_ranges(ipv6).iter().map(|range| format!("-s {range}")).collect(),
            Local::Bridge(name) => vec![format!("-i {name}")],
            Local::InterfacePrefix(prefix) => vec![format!("-i {prefix}+")],
        }
    }

    /// What begins a rule about what comes from no pod, and where it is to jump to be masqueraded. `None`: nobody knows
    /// what comes from a pod.
    fn outside_match(&self, ipv6: bool) -> Option<(String, &'static str)> {
        match self.pod_matches(ipv6).as_slice() {
            [] => None,
            [pods] => Some((format!("! {pods} "), names::MARK_MASQ)),
            _ => Some((String::new(), names::MARK_MASQ_OUTSIDE)),
        }
    }
}

impl Default for Config {
    fn default() -> Config {
        Config::new()
    }
}

/// How the rules of a port are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Style {
    /// As upstream does it where there are few endpoints.
    #[default]
    Full,
    /// Without comments about single endpoints and, if rules can compare ([`Config::compares`]), without chains of theirs: the
    /// kernel needs 11 µs for each rule and chain of a start, and walks through all of them with each change.
    Short,
}

/// A port of a Service, as it was written last.
#[derive(Debug, Clone, Default)]
struct Port {
    entries: BTreeMap<Frontend, Entry>,
    style: Style,
}

impl Port {
    fn rules(&self, key: &PortKey, config: &Config) -> PortRules {
        PortRules::of(key, &self.entries, config, self.style)
    }
}

/// Something for each address family: IPv4 first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Families<T>(pub [T; 2]);

impl<T> Families<T> {
    /// That of one family.
    pub fn of(&self, ipv6: bool) -> &T {
        &self.0[usize::from(ipv6)]
    }

    /// That of one family, to be changed.
    pub fn of_mut(&mut self, ipv6: bool) -> &mut T {
        &mut self.0[usize::from(ipv6)]
    }
}

/// Texts for `iptables-restore` and `ip6tables-restore`; empty where there is nothing to do.
pub type Scripts = Families<String>;

/// The rules: what has been written so far. A script is made for the tables as the one before left them: after one that
/// could not be carried out only a replacement helps.
#[derive(Debug)]
pub struct ServiceRules {
    config: Config,
    ports: BTreeMap<PortKey, Port>,
    endpoints: Families<usize>,
    sizes: Families<Size>,
}

/// How much there is of ports' rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Size {
    /// In the chain KUBE-SERVICES of the table `nat`.
    services: usize,
    /// In that of the table `filter`.
    refusals: usize,
    /// In all chains of the table `filter` that ports share.
    filter: usize,
    /// In all chains of the table `nat`.
    nat: usize,
    /// Chains of ports.
    chains: usize,
}

impl Size {
    fn more(&mut self, rules: &PortRules) {
        let count = |shared| rules.shared.iter().filter(|(chain, _)| *chain == shared).count();
        self.services += count(Shared::Services);
        self.refusals += count(Shared::FilterServices);
        let filter = rules.shared.iter().filter(|(chain, _)| chain.table() == Table::Filter).count();
        self.filter += filter;
        self.nat += rules.shared.len() - filter + rules.chains.values().map(Vec::len).sum::<usize>();
        self.chains += rules.chains.len();
    }

    fn less(&mut self, rules: &PortRules) {
        let mut gone = Size::default();
        gone.more(rules);
        self.services -= gone.services;
        self.refusals -= gone.refusals;
        self.filter -= gone.filter;
        self.nat -= gone.nat;
        self.chains -= gone.chains;
    }
}

/// What the kernel has at least as long as nobody has removed anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Least {
    /// How often a chain is used, by its own rules and by rules that jump to it.
    pub uses: Vec<(Table, &'static str, usize)>,
    /// Entries of a table of `ip_tables`: rules, two for each chain, and what ends built-in chains and the table.
    pub entries: Vec<(Table, usize)>,
}

impl ServiceRules {
    /// Nothing has been written.
    pub fn new(config: Config) -> ServiceRules {
        ServiceRules { config, ports: BTreeMap::new(), endpoints: Families::default(), sizes: Families::default() }
    }

    /// From now on these rules are to be there, and what comes by differences. What is there of a proxy's is as it was:
    /// [`replacement`](Self::replacement) of each address family comes next.
    pub fn set(&mut self, rules: &Rules, network: &Network) {
        self.config.network.clone_from(network);
        self.ports.clear();
        self.endpoints = Families::default();
        self.sizes = Families::default();
        for (frontend, entry) in rules.iter() {
            self.ports.entry(PortKey::of(frontend, entry)).or_default().entries.insert(*frontend, entry.clone());
        }
        for (key, port) in &self.ports {
            *self.endpoints.of_mut(key.ipv6) += endpoints(&port.entries);
        }
        let styles = Families([false, true].map(|ipv6| self.style(ipv6)));
        self.ports.iter_mut().for_each(|(key, port)| port.style = *styles.of(key.ipv6));
    }

    /// Writes the rules of one address family in place of all that there is of a proxy's, in scripts that `take` gets one
    /// after the other. A script has about as many lines as `lines_max` says: `iptables-nft-restore` compares each line with
    /// all chains of its input. All chains of one port are in one script, and what leads to them is in the
    /// last one, so packets never meet a port half-written. `iptables-legacy-restore` writes a whole table each time and takes
    /// it at once. A port whose chains are all there as they should be is not written again: over rules that packets meet the
    /// kernel takes each script for a while.
    ///
    /// # Errors
    /// That of `take`, which then gets no more.
    pub fn replacement<E>(
        &mut self,
        ipv6: bool,
        remains: &Remains,
        lines_max: usize,
        mut take: impl FnMut(String) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut size = Size::default();
        let mut shared: BTreeSet<(Shared, String)> = BTreeSet::new();
        let mut stale: BTreeSet<&str> = remains.chains(Table::Nat).filter(|chain| names::is_of_port(chain)).collect();
        let mut nat = Section::default();
        for (chain, rule) in self.declared(&mut nat, Table::Nat, ipv6) {
            nat.append(chain, &rule);
        }
        for (key, port) in self.ports_of(ipv6) {
            let mut rules = port.rules(key, &self.config);
            size.more(&rules);
            shared.extend(std::mem::take(&mut rules.shared));
            for chain in rules.chains.keys() {
                stale.remove(chain.as_str());
            }
            if rules.chains.iter().all(|(chain, rules)| remains.has(chain, rules)) {
                continue;
            }
            rules.chains.iter().for_each(|(chain, rules)| nat.fill(chain, rules));
            if nat.lines >= lines_max {
                let mut script = String::new();
                std::mem::take(&mut nat).write(Table::Nat, &mut script);
                take(script)?;
            }
        }
        *self.sizes.of_mut(ipv6) = size;
        let mut stale: Vec<&str> = stale.into_iter().collect();
        if stale.len() <= lines_max {
            return take(self.last_script(ipv6, nat, &shared, &stale, remains));
        }
        // As many as these a proxy leaves that gives each endpoint a chain.
        take(self.last_script(ipv6, nat, &shared, &[], remains))?;
        removals(&mut stale, lines_max).try_for_each(take)
    }

    /// What comes after the chains of ports: the rest of `nat`, and the other tables.
    fn last_script(
        &self,
        ipv6: bool,
        nat: Section,
        shared: &BTreeSet<(Shared, String)>,
        stale: &[&str],
        remains: &Remains,
    ) -> String {
        let mut sections = BTreeMap::from([(Table::Nat, nat)]);
        let mut script = String::new();
        for table in Table::ALL {
            let mut section = sections.remove(&table).unwrap_or_default();
            if table != Table::Nat {
                for (chain, rule) in self.declared(&mut section, table, ipv6) {
                    section.append(chain, &rule);
                }
            }
            Shared::of(table).for_each(|chain| section.declare(chain.name()));
            for (chain, rule) in shared.iter().filter(|(chain, _)| chain.table() == table) {
                section.append(chain.name(), rule);
            }
            for (chain, rule) in base::last_rules(&self.config, table, ipv6) {
                section.append(chain.name(), &rule);
            }
            for jump in base::jumps(&self.config, table, ipv6).filter(|jump| !remains.has_jump(jump)) {
                section.insert(jump.from, &jump.rule());
            }
            if table == Table::Nat {
                stale.iter().for_each(|chain| section.drop(chain));
            }
            section.write(table, &mut script);
        }
        script
    }

    /// Both address families at once, as [`set`](Self::set) and [`replacement`](Self::replacement) make them.
    pub fn replace(
        &mut self,
        rules: &Rules,
        network: &Network,
        remains: &Families<Remains>,
        lines_max: usize,
    ) -> Families<Vec<String>> {
        self.set(rules, network);
        Families([false, true].map(|ipv6| {
            let mut scripts = Vec::new();
            let Ok(()) = self.replacement(ipv6, remains.of(ipv6), lines_max, |script| {
                scripts.push(script);
                Ok::<_, Infallible>(())
            });
            scripts
        }))
    }

    /// Declares chains of a table that have nothing of ports; returns their rules.
    fn declared(&self, section: &mut Section, table: Table, ipv6: bool) -> Vec<(&'static str, String)> {
        let of_ports = |chain: &str| Shared::of(table).any(|shared| shared.name() == chain);
        base::chains(&self.config, table, ipv6)
            .filter(|chain| !of_ports(chain))
            .for_each(|chain| section.declare(chain));
        base::first_rules(&self.config, table, ipv6)
    }

    /// All chains that there are to be, and their rules.
    fn whole(&self, ipv6: bool) -> BTreeMap<(Table, String), Vec<String>> {
        let mut whole: BTreeMap<(Table, String), Vec<String>> = BTreeMap::new();
        for table in Table::ALL {
            for chain in base::chains(&self.config, table, ipv6) {
                whole.insert((table, chain.to_owned()), Vec::new());
            }
        }
        let mut append = |table, chain: &str, rule| whole.entry((table, chain.to_owned())).or_default().push(rule);
        for table in Table::ALL {
            for (chain, rule) in base::first_rules(&self.config, table, ipv6) {
                append(table, chain, rule);
            }
        }
        for (key, port) in self.ports_of(ipv6) {
            let rules = port.rules(key, &self.config);
            for (chain, rule) in rules.shared {
                append(chain.table(), chain.name(), rule);
            }
            for (chain, rules) in rules.chains {
                rules.into_iter().for_each(|rule| append(Table::Nat, &chain, rule));
            }
        }
        for table in Table::ALL {
            for (chain, rule) in base::last_rules(&self.config, table, ipv6) {
                append(table, chain.name(), rule);
            }
        }
        whole
    }

    /// What the kernel has at least of what has been written.
    pub fn least(&self, ipv6: bool) -> Least {
        let size = self.sizes.of(ipv6);
        let last = |table| base::last_rules(&self.config, table, ipv6).len();
        let jumps = |table, to: &str| base::jumps(&self.config, table, ipv6).filter(|jump| jump.to == to).count();
        let mut uses: Vec<_> = Table::ALL.into_iter().map(|table| (table, CANARY, 0)).collect();
        let of_ports = [(Table::Nat, size.services), (Table::Filter, size.refusals)];
        let services = names::SERVICES;
        uses.extend(of_ports.map(|(table, count)| (table, services, count + last(table) + jumps(table, services))));
        let masquerading = base::first_rules(&self.config, Table::Nat, ipv6);
        let masquerading = masquerading.iter().filter(|(chain, _)| *chain == names::POSTROUTING).count();
        uses.push((Table::Nat, names::POSTROUTING, masquerading + jumps(Table::Nat, names::POSTROUTING)));
        let entries = Table::ALL.map(|table| {
            let (rules, chains) = match table {
                Table::Mangle => (0, 0),
                Table::Filter => (size.filter, 0),
                Table::Nat => (size.nat, size.chains),
            };
            let fixed = base::first_rules(&self.config, table, ipv6).len() + last(table);
            let jumps = base::jumps(&self.config, table, ipv6).count();
            let chains = chains + base::chains(&self.config, table, ipv6).count();
            (table, rules + fixed + jumps + 2 * chains + table.hooks() + 1)
        });
        Least { uses, entries: entries.to_vec() }
    }

    /// Whether chains of `filter` and `nat` are used as often as what has been written makes them: by their own rules, and by
    /// those that jump to them. `uses` tells how often one is.
    pub fn is_used(&self, ipv6: bool, uses: impl Fn(Table, &str) -> usize) -> bool {
        let mut shared = SharedUses::default();
        for table in [Table::Filter, Table::Nat] {
            base::chains(&self.config, table, ipv6).for_each(|chain| shared.declare(table, chain));
            let first = base::first_rules(&self.config, table, ipv6).into_iter();
            first.for_each(|(chain, rule)| shared.count(table, chain, &rule));
            let last = base::last_rules(&self.config, table, ipv6).into_iter();
            last.for_each(|(chain, rule)| shared.count(table, chain.name(), &rule));
            base::jumps(&self.config, table, ipv6).for_each(|jump| shared.count_jump(table, jump.to));
        }
        for (key, port) in self.ports_of(ipv6) {
            let rules = port.rules(key, &self.config);
            if rules.uses().iter().any(|(chain, least)| uses(Table::Nat, chain) < *least) {
                return false;
            }
            rules.shared.iter().for_each(|(chain, rule)| shared.count(chain.table(), chain.name(), rule));
            rules
                .chains
                .iter()
                .for_each(|(chain, rules)| rules.iter().for_each(|rule| shared.count(Table::Nat, chain, rule)));
        }
        shared.0.iter().all(|(table, chains)| chains.iter().all(|(chain, least)| uses(*table, chain) >= *least))
    }

    /// How many rules a table has of ours, without those of chains that are not ours.
    pub fn count(&self, table: Table, ipv6: bool) -> usize {
        let of_ports = match table {
            Table::Mangle => 0,
            Table::Filter => self.sizes.of(ipv6).filter,
            Table::Nat => self.sizes.of(ipv6).nat,
        };
        let (first, last) = (base::first_rules(&self.config, table, ipv6), base::last_rules(&self.config, table, ipv6));
        of_ports + first.len() + last.len()
    }

    /// Whether nothing is missing from what has been written.
    pub fn is_whole(&self, remains: &Remains, ipv6: bool) -> bool {
        let whole = self.whole(ipv6);
        let mut chains = whole.iter();
        let mut jumps = Table::ALL.into_iter().flat_map(|table| base::jumps(&self.config, table, ipv6));
        chains.all(|((table, chain), rules)| remains.rules(*table, chain) >= Some(rules.len()))
            && jumps.all(|jump| remains.has_jump(jump))
    }

    /// The chains that ports share, and chains of ports that nobody knows: table and name, and whether it is known.
    pub fn chains(&self, remains: &Remains, ipv6: bool) -> Vec<(String, bool)> {
        let whole = self.whole(ipv6);
        let mut chains = Vec::new();
        for table in Table::ALL {
            for chain in remains.chains(table).filter(|chain| base::is_of_proxy(table, chain)) {
                let is_known = whole.contains_key(&(table, chain.to_owned()));
                if !(is_known && names::is_of_port(chain)) {
                    chains.push((format!("{} {chain}", table.name()), is_known));
                }
            }
        }
        chains
    }

    /// Carries out a difference from the rules that were written last.
    pub fn update(&mut self, difference: &Difference) -> Scripts {
        let mut touched = BTreeMap::new();
        for Change { frontend, old, new } in &difference.changes {
            for entry in old.iter().chain(new) {
                let key = PortKey::of(frontend, entry);
                let before = self.ports.get(&key);
                touched.entry(key).or_insert_with(|| before.cloned().unwrap_or_default());
            }
        }
        self.apply(difference);
        for (key, before) in &touched {
            let count = self.endpoints.of_mut(key.ipv6);
            *count =
                *count + self.ports.get(key).map_or(0, |port| endpoints(&port.entries)) - endpoints(&before.entries);
        }
        let mut edits = Families::<Edit>::default();
        for (key, before) in &touched {
            // What is not touched keeps its style.
            let style = self.style(key.ipv6);
            let old = before.rules(key, &self.config);
            let new = self.ports.get_mut(key).map_or_else(PortRules::default, |port| {
                port.style = style;
                port.rules(key, &self.config)
            });
            self.sizes.of_mut(key.ipv6).less(&old);
            self.sizes.of_mut(key.ipv6).more(&new);
            edits.of_mut(key.ipv6).add(old, new);
        }
        Families(edits.0.map(|edit| edit.script()))
    }

    fn apply(&mut self, difference: &Difference) {
        for Change { frontend, old, .. } in &difference.changes {
            let Some(key) = old.as_ref().map(|entry| PortKey::of(frontend, entry)) else { continue };
            let Some(port) = self.ports.get_mut(&key) else { continue };
            port.entries.remove(frontend);
            if port.entries.is_empty() {
                self.ports.remove(&key);
            }
        }
        for Change { frontend, new, .. } in &difference.changes {
            if let Some(entry) = new {
                self.ports.entry(PortKey::of(frontend, entry)).or_default().entries.insert(*frontend, entry.clone());
            }
        }
    }

    fn ports_of(&self, ipv6: bool) -> impl Iterator<Item = (&PortKey, &Port)> {
        self.ports.iter().filter(move |(key, _)| key.ipv6 == ipv6)
    }

    /// How ports are written from now on.
    fn style(&self, ipv6: bool) -> Style {
        if *self.endpoints.of(ipv6) > FULL_ENDPOINTS_MAX { Style::Short } else { Style::Full }
    }
}

/// How often the chains are used that ports share.
#[derive(Debug, Default)]
struct SharedUses(BTreeMap<Table, BTreeMap<&'static str, usize>>);

impl SharedUses {
    fn declare(&mut self, table: Table, chain: &'static str) {
        self.0.entry(table).or_default().entry(chain).or_default();
    }

    /// A rule, which may stand in a chain of one port.
    fn count(&mut self, table: Table, chain: &str, rule: &str) {
        self.count_jump(table, chain);
        if let Some(to) = save::target(rule) {
            self.count_jump(table, to);
        }
    }

    fn count_jump(&mut self, table: Table, to: &str) {
        if let Some(count) = self.0.get_mut(&table).and_then(|chains| chains.get_mut(to)) {
            *count += 1;
        }
    }
}

/// How many rules scripts add to a table.
pub fn count_written<'s>(scripts: impl IntoIterator<Item = &'s str>, table: Table) -> usize {
    let (mut of, mut count) = (None, 0);
    for line in scripts.into_iter().flat_map(str::lines) {
        if let Some(name) = line.strip_prefix('*') {
            of = Table::named(name);
        } else if of == Some(table) && (line.starts_with("-A ") || line.starts_with("-I ")) {
            count += 1;
        }
    }
    count
}

/// Scripts that use all that rules may need, but for SCTP, which few Services need and not every kernel has. They are for
/// tables of a network namespace that nobody uses.
pub fn trial(config: &Config) -> Families<Vec<String>> {
    let mut rules = Rules::default();
    rules.apply(Difference { changes: trial::changes() });
    ServiceRules::new(config.clone()).replace(&rules, &config.network, &Families::default(), usize::MAX)
}

/// Removes from one address family what there is of a proxy's, in scripts of about so many lines. What protects the loopback
/// addresses stays: the kubelet owns it, and `route_localnet` may still be set.
pub fn removal(remains: &Remains, lines_max: usize) -> Vec<String> {
    /// Chains of ports lead to these, and the second one to the first.
    const MARKS: [&str; 2] = [names::MARK_MASQ, names::MARK_MASQ_OUTSIDE];
    let mut scripts = Vec::new();
    let mut script = String::new();
    for table in Table::ALL {
        let mut section = Section::default();
        for (from, rule) in remains.jumps(table) {
            if save::target(rule).is_some_and(|to| base::is_of_proxy(table, to)) {
                section.delete(from, rule);
            }
        }
        let shared = remains.chains(table).filter(|chain| base::is_shared_of_proxy(table, chain));
        shared.filter(|chain| !MARKS.contains(chain)).for_each(|chain| section.drop(chain));
        section.write(table, &mut script);
    }
    scripts.extend(Some(script).filter(|script| !script.is_empty()));
    let mut of_ports: Vec<&str> = remains.chains(Table::Nat).filter(|chain| names::is_of_port(chain)).collect();
    scripts.extend(removals(&mut of_ports, lines_max));
    let mut marks: Vec<&str> = remains.chains(Table::Nat).filter(|chain| MARKS.contains(chain)).collect();
    marks.reverse();
    scripts.extend(removal_of(&marks));
    scripts
}

/// Removes chains of ports to which nothing leads but each other, in scripts of so many.
fn removals<'a>(chains: &'a mut [&str], lines_max: usize) -> impl Iterator<Item = String> + use<'a> {
    // Who leads to others goes before them.
    chains.sort_by_key(|chain| names::rank(chain));
    chains.chunks(lines_max).filter_map(removal_of)
}

/// Removes chains of the table `nat`, if there are some.
fn removal_of(chains: &[&str]) -> Option<String> {
    let (mut section, mut script) = (Section::default(), String::new());
    chains.iter().for_each(|chain| section.drop(chain));
    section.write(Table::Nat, &mut script);
    (!script.is_empty()).then_some(script)
}

/// How many endpoints a port has.
fn endpoints(entries: &BTreeMap<Frontend, Entry>) -> usize {
    let sides = entries.values().flat_map(|entry| [Some(&entry.inside), entry.outside.as_ref()]);
    sides.flatten().map(|target| target.endpoints().len()).max().unwrap_or(0)
}

/// What leads from some rules of ports to others, in one address family.
#[derive(Debug, Default)]
struct Edit {
    gone: BTreeSet<(Shared, String)>,
    come: BTreeSet<(Shared, String)>,
    chains: BTreeMap<String, Vec<String>>,
    dropped: BTreeSet<String>,
}

impl Edit {
    fn add(&mut self, old: PortRules, new: PortRules) {
        self.gone.extend(old.shared.difference(&new.shared).cloned());
        self.come.extend(new.shared.difference(&old.shared).cloned());
        self.dropped.extend(old.chains.keys().filter(|chain| !new.chains.contains_key(*chain)).cloned());
        let differs = |(chain, rules): &(String, Vec<String>)| old.chains.get(chain) != Some(rules);
        self.chains.extend(new.chains.into_iter().filter(differs));
    }

    fn script(self) -> String {
        let (mut refuse, mut nat, mut admit) = (Section::default(), Section::default(), Section::default());
        for (chain, rule) in self.come.iter().rev() {
            // In front: the last rule of a chain must stay the last one. In the end the first of these stands first.
            let section = if chain.table() == Table::Nat { &mut nat } else { &mut refuse };
            section.insert(chain.name(), rule);
        }
        for (chain, rule) in &self.gone {
            let section = if chain.table() == Table::Nat { &mut nat } else { &mut admit };
            section.delete(chain.name(), rule);
        }
        for (chain, rules) in &self.chains {
            nat.fill(chain, rules);
        }
        self.dropped.iter().for_each(|chain| nat.drop(chain));
        let mut script = String::new();
        refuse.write(Table::Filter, &mut script);
        nat.write(Table::Nat, &mut script);
        admit.write(Table::Filter, &mut script);
        script
    }
}

/// What happens to one table.
#[derive(Debug, Default)]
struct Section {
    lines: usize,
    declarations: String,
    rules: String,
    drops: String,
}

/// Writing into a text does not fail.
const WRITTEN: &str = "a text takes all";

impl Section {
    /// A chain that is there and empty, before rules come into it.
    fn declare(&mut self, chain: &str) {
        self.lines += 1;
        writeln!(self.declarations, ":{chain} - [0:0]").expect(WRITTEN);
    }

    /// A chain with exactly these rules.
    fn fill(&mut self, chain: &str, rules: &[String]) {
        self.declare(chain);
        rules.iter().for_each(|rule| self.append(chain, rule));
    }

    fn append(&mut self, chain: &str, rule: &str) {
        self.lines += 1;
        writeln!(self.rules, "-A {chain} {rule}").expect(WRITTEN);
    }

    fn insert(&mut self, chain: &str, rule: &str) {
        writeln!(self.rules, "-I {chain} {rule}").expect(WRITTEN);
    }

    fn delete(&mut self, chain: &str, rule: &str) {
        writeln!(self.rules, "-D {chain} {rule}").expect(WRITTEN);
    }

    /// Removes a chain, after everything that refers to it.
    fn drop(&mut self, chain: &str) {
        self.declare(chain);
        writeln!(self.drops, "-X {chain}").expect(WRITTEN);
    }

    fn write(self, table: Table, script: &mut String) {
        let Section { declarations, rules, drops, .. } = self;
        if !(declarations.is_empty() && rules.is_empty()) {
            write!(script, "*{}\n{declarations}{rules}{drops}COMMIT\n", table.name()).expect(WRITTEN);
        }
    }
}

#[cfg(test)]
mod tests;
