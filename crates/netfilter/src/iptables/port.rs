//! What one port of a Service means in one address family: pure text.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use service::{Endpoint, Entry, Frontend, Kind, Name, Protocol, ServicePort, Target};

use super::names::{self, PortNames};
use super::{Config, Style, Table, counters, save};

/// One port of a Service in one address family: what chains are named after.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortKey {
    pub(super) ipv6: bool,
    protocol: Protocol,
    service: Name,
    name: Arc<str>,
}

impl PortKey {
    pub(super) fn of(frontend: &Frontend, entry: &Entry) -> PortKey {
        let ServicePort { service, name, .. } = &*entry.port;
        PortKey {
            ipv6: frontend.address.is_ipv6(),
            protocol: frontend.protocol,
            service: service.clone(),
            name: name.clone(),
        }
    }
}

/// A chain that rules of many ports stand in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shared {
    /// In the table `nat`: leads to chains of ports.
    Services,
    /// In the table `nat`: leads to chains of ports.
    NodePorts,
    /// In the table `filter`: refuses what goes to cluster IPs.
    FilterServices,
    /// In the table `filter`: refuses what goes to addresses for the outside.
    FilterExternal,
    /// In the table `filter`: lets load balancers ask.
    FilterNodePorts,
    /// In the table `filter`: drops what a load balancer does not admit.
    FilterFirewall,
}

impl Shared {
    const ALL: [Shared; 6] = [
        Shared::Services,
        Shared::NodePorts,
        Shared::FilterServices,
        Shared::FilterExternal,
        Shared::FilterNodePorts,
        Shared::FilterFirewall,
    ];

    /// Those of one table.
    pub(super) fn of(table: Table) -> impl Iterator<Item = Shared> {
        Shared::ALL.into_iter().filter(move |chain| chain.table() == table)
    }

    pub(super) fn table(self) -> Table {
        match self {
            Shared::Services | Shared::NodePorts => Table::Nat,
            Shared::FilterServices | Shared::FilterExternal | Shared::FilterNodePorts | Shared::FilterFirewall => {
                Table::Filter
            }
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Shared::Services | Shared::FilterServices => names::SERVICES,
            Shared::NodePorts | Shared::FilterNodePorts => names::NODE_PORTS,
            Shared::FilterExternal => names::EXTERNAL_SERVICES,
            Shared::FilterFirewall => names::FIREWALL,
        }
    }
}

/// Rules of one port, without the `-A CHAIN` in front.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PortRules {
    /// In chains that others use, too; the order among ports does not matter.
    pub(super) shared: BTreeSet<(Shared, String)>,
    /// Chains of this port alone, all in the table `nat`.
    pub(super) chains: BTreeMap<String, Vec<String>>,
}

impl PortRules {
    /// Rules for these entries of one port.
    pub(super) fn of(key: &PortKey, entries: &BTreeMap<Frontend, Entry>, config: &Config, style: Style) -> PortRules {
        let Some(entry) = entries.values().next() else { return PortRules::default() };
        let mut writer = Writer {
            text: sanitised(&entry.port),
            names: PortNames::new(&entry.port, key.protocol),
            protocol: names::lower(key.protocol),
            ipv6: key.ipv6,
            entries,
            config,
            style,
            rules: PortRules::default(),
        };
        writer.write(entry.port.health_check_port);
        writer.rules
    }

    /// How often each chain of the port is used: by its rules, and by those that jump to it, all of which are the port's.
    pub(super) fn uses(&self) -> BTreeMap<&str, usize> {
        let own = self.chains.iter().map(|(chain, rules)| (chain.as_str(), rules.len()));
        let mut uses: BTreeMap<&str, usize> = own.collect();
        let rules = self.chains.values().flatten().chain(self.shared.iter().map(|(_, rule)| rule));
        for to in rules.filter_map(|rule| save::target(rule)) {
            if let Some(count) = uses.get_mut(to) {
                *count += 1;
            }
        }
        uses
    }
}

/// A name for comments. What a name may not contain would end the comment, or the line.
fn sanitised(port: &ServicePort) -> String {
    /// The kernel takes 255 bytes, and words of ours stand around the name.
    const BYTES_MAX: usize = 160;
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "-._:/".contains(c) { c } else { '_' };
    port.to_string().chars().take(BYTES_MAX).map(allowed).collect()
}

struct Writer<'a> {
    /// Namespace, name and port for comments.
    text: String,
    names: PortNames,
    protocol: &'static str,
    ipv6: bool,
    entries: &'a BTreeMap<Frontend, Entry>,
    config: &'a Config,
    style: Style,
    rules: PortRules,
}

impl<'a> Writer<'a> {
    fn write(&mut self, health_check_port: Option<u16>) {
        for (frontend, entry) in self.entries {
            match entry.kind {
                Kind::ClusterIp => self.write_cluster_ip(frontend, entry),
                Kind::NodePort | Kind::ExternalIp | Kind::LoadBalancer => self.write_external(frontend, entry),
            }
        }
        if let Some(port) = health_check_port {
            let rule = format!("-p tcp {} -m tcp --dport {port} -j ACCEPT", self.comment("health check node port"));
            self.share(Shared::FilterNodePorts, rule);
        }
        self.write_external_chain();
        self.write_firewall_chain();
        let (cluster, local) = (self.cluster().to_vec(), self.local().to_vec());
        self.write_balancer(self.names.cluster(), &cluster);
        self.write_balancer(self.names.local(), &local);
        if self.has_endpoint_chains() {
            let all: BTreeSet<Endpoint> = cluster.into_iter().chain(local).collect();
            all.iter().for_each(|endpoint| self.write_endpoint(endpoint));
        }
    }

    /// Whether there is a chain for each endpoint. What a client is to come back to is remembered there.
    fn has_endpoint_chains(&self) -> bool {
        self.style == Style::Full || !self.config.compares || self.affinity_s().is_some()
    }

    fn affinity_s(&self) -> Option<u32> {
        self.entries.values().next().and_then(|entry| entry.affinity_s)
    }

    fn share(&mut self, chain: Shared, rule: String) {
        self.rules.shared.insert((chain, rule));
    }

    fn append(&mut self, chain: String, rule: String) {
        self.rules.chains.entry(chain).or_default().push(rule);
    }

    /// A comment that names the port and says something about it.
    fn comment(&self, words: &str) -> String {
        format!("-m comment --comment \"{} {words}\"", self.text)
    }

    /// What goes to a frontend, with `words` where upstream has them, so that listings look the same.
    fn matching(&self, frontend: &Frontend, words: &str) -> String {
        let protocol = self.protocol;
        let address = match frontend.is_node_port() {
            true => String::new(),
            false => format!("-d {}/{} ", frontend.address, if self.ipv6 { 128 } else { 32 }),
        };
        format!("{address}-p {protocol} {words} -m {protocol} --dport {}", frontend.port)
    }

    fn write_cluster_ip(&mut self, frontend: &Frontend, entry: &Entry) {
        let chain = if entry.inside_local { self.names.local() } else { self.names.cluster() };
        if let Some((words, verdict)) = self.refusal(&entry.inside) {
            let rule = format!("{} -j {verdict}", self.matching(frontend, &words));
            return self.share(Shared::FilterServices, rule);
        }
        let matching = self.matching(frontend, &self.comment("cluster IP"));
        self.share(Shared::Services, format!("{matching} -j {chain}"));
        let mark = names::MARK_MASQ;
        if self.config.network.masquerade_all {
            self.append(chain, format!("{matching} -j {mark}"));
        } else if let Some((from_outside, mark)) = self.config.outside_match(self.ipv6) {
            self.append(chain, format!("{from_outside}{matching} -j {mark}"));
        }
    }

    /// What stands in place of endpoints: a comment and a verdict.
    fn refusal(&self, target: &Target) -> Option<(String, &'static str)> {
        match target {
            Target::Endpoints(_) => None,
            Target::Refuse => Some((self.comment("has no endpoints"), "REJECT")),
            Target::Drop => Some((self.comment("has no local endpoints"), "DROP")),
        }
    }

    fn write_external(&mut self, frontend: &Frontend, entry: &Entry) {
        // Without endpoints nothing is translated; with endpoints elsewhere only those inside get to them, and what is not
        // translated then meets the filter.
        if let Some((mut words, verdict)) = self.refusal(entry.outside.as_ref().unwrap_or(&entry.inside)) {
            if frontend.is_node_port() {
                words.push_str(" -m addrtype --dst-type LOCAL");
            }
            self.share(Shared::FilterExternal, format!("{} -j {verdict}", self.matching(frontend, &words)));
        }
        if entry.inside.endpoints().is_empty() {
            return;
        }
        let firewall = self.names.firewall();
        let (chain, comment, to) = match entry.kind {
            Kind::NodePort => (Shared::NodePorts, format!("-m comment --comment {}", self.text), self.names.external()),
            Kind::LoadBalancer if entry.sources.is_some() => {
                let comment = self.comment(&format!("traffic not accepted by {firewall}"));
                self.share(Shared::FilterFirewall, format!("{} -j DROP", self.matching(frontend, &comment)));
                (Shared::Services, self.comment("loadbalancer IP"), firewall)
            }
            Kind::LoadBalancer => (Shared::Services, self.comment("loadbalancer IP"), self.names.external()),
            Kind::ExternalIp | Kind::ClusterIp => {
                (Shared::Services, self.comment("external IP"), self.names.external())
            }
        };
        let matching = self.matching(frontend, &comment);
        if entry.kind == Kind::NodePort && self.config.counts && self.config.opens_loopback(self.ipv6) {
            // It begins with what comes first in the order of rules, and so it stands before the other.
            let counting = self.config.counting(counters::LOOPBACK_ACCEPTED);
            self.share(chain, format!("-d 127.0.0.0/8 {matching} {counting}-j {to}"));
        }
        self.share(chain, format!("{matching} -j {to}"));
    }

    /// Entries for the outside that have endpoints somewhere.
    fn external(&self) -> impl Iterator<Item = &'a Entry> + use<'a> {
        let external = self.entries.values().filter(|entry| entry.is_external());
        external.filter(|entry| !entry.inside.endpoints().is_empty())
    }

    /// The short way for who is inside, and the way that the policy says for the others.
    fn write_external_chain(&mut self) {
        let Some(entry) = self.external().next() else { return };
        let (chain, cluster, mark) = (self.names.external(), self.names.cluster(), names::MARK_MASQ);
        let about =
            |before: &str, text: &str| format!("-m comment --comment \"{before} {text} external destinations\"");
        let Some(outside) = &entry.outside else {
            self.append(chain.clone(), format!("{} -j {mark}", about("masquerade traffic for", &self.text)));
            return self.append(chain, format!("-j {cluster}"));
        };
        let comment = about("pod traffic for", &self.text);
        for from_pod in self.config.pod_matches(self.ipv6) {
            self.append(chain.clone(), format!("{from_pod} {comment} -j {cluster}"));
        }
        let from_node = "-m addrtype --src-type LOCAL";
        let comment = about("masquerade LOCAL traffic for", &self.text);
        self.append(chain.clone(), format!("{comment} {from_node} -j {mark}"));
        let comment = about("route LOCAL traffic for", &self.text);
        self.append(chain.clone(), format!("{comment} {from_node} -j {cluster}"));
        if !outside.endpoints().is_empty() {
            self.append(chain, format!("-j {}", self.names.local()));
        }
    }

    /// Whom the load balancer admits. The others are not translated, and dropped for it by [`Shared::FilterFirewall`].
    fn write_firewall_chain(&mut self) {
        let limited: Vec<&Arc<[IpNet]>> = self.external().filter_map(|entry| entry.sources.as_ref()).collect();
        if limited.is_empty() {
            return;
        }
        let (chain, external) = (self.names.firewall(), self.names.external());
        let admitted: BTreeSet<IpNet> = limited.into_iter().flat_map(|sources| sources.iter().copied()).collect();
        let comment = self.comment("loadbalancer IP");
        for range in admitted {
            self.append(chain.clone(), format!("-s {range} {comment} -j {external}"));
        }
        let text = &self.text;
        let rest = format!("-m comment --comment \"other traffic to {text} will be dropped by {}\"", names::FIREWALL);
        self.append(chain, rest);
    }

    /// Endpoints that the traffic policy Cluster leads to.
    fn cluster(&self) -> &'a [Endpoint] {
        let entry = self.entries.values().find(|entry| !entry.inside_local);
        entry.map_or(&[], |entry| entry.inside.endpoints())
    }

    /// Endpoints that the traffic policy Local leads to.
    fn local(&self) -> &'a [Endpoint] {
        let local = self.entries.values().find_map(|entry| match &entry.outside {
            Some(outside) => Some(outside),
            None => entry.inside_local.then_some(&entry.inside),
        });
        local.map_or(&[], Target::endpoints)
    }

    /// Draws one of the endpoints.
    fn write_balancer(&mut self, chain: String, endpoints: &[Endpoint]) {
        // Slots change places when others leave; in this order the rules of those that stay are the same.
        let mut endpoints = endpoints.to_vec();
        endpoints.sort_unstable();
        if !self.has_endpoint_chains() {
            let protocol = self.protocol;
            for (before, endpoint) in endpoints.iter().enumerate() {
                let (draw, to) = (draw(endpoints.len() - before), translate(protocol, endpoint));
                self.append(chain.clone(), format!("-p {protocol} {draw}{to}"));
            }
            return;
        }
        let named: Vec<(String, String)> =
            endpoints.iter().map(|one| (self.names.endpoint(one), self.leads_to(one))).collect();
        if let Some(seconds) = self.affinity_s() {
            for (name, comment) in &named {
                let known = format!("-m recent --rcheck --seconds {seconds} --reap --name {name}");
                self.append(chain.clone(), format!("{comment}{known} -j {name}"));
            }
        }
        for (before, (name, comment)) in named.iter().enumerate() {
            let draw = draw(named.len() - before);
            self.append(chain.clone(), format!("{comment}{draw}-j {name}"));
        }
    }

    fn leads_to(&self, endpoint: &Endpoint) -> String {
        match self.style {
            Style::Full => format!("{} ", self.comment(&format!("-> {}", names::place(endpoint)))),
            Style::Short => String::new(),
        }
    }

    fn write_endpoint(&mut self, endpoint: &Endpoint) {
        let chain = self.names.endpoint(endpoint);
        let comment = match self.style {
            Style::Full => format!("-m comment --comment {} ", self.text),
            Style::Short => String::new(),
        };
        let address = endpoint.address;
        let length = if self.ipv6 { 128 } else { 32 };
        self.append(chain.clone(), format!("-s {address}/{length} {comment}-j {}", names::MARK_MASQ));
        let remember = match self.affinity_s() {
            Some(_) => format!("-m recent --set --name {chain} "),
            None => String::new(),
        };
        let protocol = self.protocol;
        self.append(chain, format!("-p {protocol} {comment}{remember}{}", translate(protocol, endpoint)));
    }
}

/// The end of a rule that leads to an endpoint.
fn translate(protocol: &str, endpoint: &Endpoint) -> String {
    format!("-m {protocol} -j DNAT --to-destination {}", names::place(endpoint))
}

/// What lets a rule take its share where `left` endpoints are left, with the space behind it.
fn draw(left: usize) -> String {
    match left {
        1 => String::new(),
        left => format!("-m statistic --mode random --probability {} ", probability(left)),
    }
}

/// The share of the first of `left`.
fn probability(left: usize) -> String {
    // Ten digits are more than the kernel's 31 bits tell apart.
    #[expect(clippy::cast_precision_loss, reason = "no Service has 2^52 endpoints")]
    let share = 1.0 / left as f64;
    format!("{share:.10}")
}
