//! Names: a pod's host name, its `/etc/hosts`, and the resolver settings of its sandbox.

use std::fmt::Write as _;

use cri::v1::DnsConfig;
use k8s_openapi::api::core::v1::{HostAlias, Pod, PodDNSConfig};
use pod::spec;

/// The longest host name (sethostname(2): 64 bytes, of which upstream uses 63).
const HOSTNAME_MAX: usize = 63;
/// The longest name that the kernel takes; `setHostnameAsFQDN` must fit.
const KERNEL_NAME_MAX: usize = 64;
/// Limits of a resolver's settings (API validation).
const NAMESERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCH_LINE_MAX: usize = 2048;
const SEARCH_MAX: usize = 253;

/// The name service of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterDns {
    /// Addresses of the cluster's name servers; none: pods use the node's.
    pub servers: Vec<String>,
    /// The cluster's domain, as `cluster.local`.
    pub domain: String,
}

/// Why a pod has no valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a valid DNS name.
    #[error("pod {field} {value:?} is not a valid DNS {kind}")]
    Invalid {
        /// The field of the spec.
        field: &'static str,
        /// What it says.
        value: String,
        /// `label` or `subdomain`.
        kind: &'static str,
    },
    /// The full name is too long for the kernel.
    #[error("the fully qualified name {0:?} has more than 64 characters; shorten it or do without setHostnameAsFQDN")]
    TooLong(String),
}

/// A pod's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodName {
    /// The host name.
    pub host: String,
    /// `<subdomain>.<namespace>.svc.<cluster domain>`, empty without a subdomain.
    pub domain: String,
}

impl PodName {
    /// What `uname` shows in the pod.
    ///
    /// # Errors
    /// `setHostnameAsFQDN` with a name that the kernel does not take.
    pub fn for_kernel(&self, pod: &Pod) -> Result<String, NameError> {
        if spec::of(pod).set_hostname_as_fqdn != Some(true) || self.domain.is_empty() {
            return Ok(self.host.clone());
        }
        let full = format!("{}.{}", self.host, self.domain);
        if full.len() > KERNEL_NAME_MAX { Err(NameError::TooLong(full)) } else { Ok(full) }
    }
}

/// The names of a pod.
///
/// # Errors
/// A name that is no DNS name.
pub fn name_of(pod: &Pod, cluster_domain: &str) -> Result<PodName, NameError> {
    let spec = spec::of(pod);
    if let Some(name) = &spec.hostname_override {
        check("hostnameOverride", name, "subdomain", is_subdomain(name))?;
        return Ok(PodName { host: shortened(name), domain: String::new() });
    }
    let host = match spec.hostname.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => {
            check("hostname", name, "label", is_label(name))?;
            name
        }
        None => pod.metadata.name.as_deref().unwrap_or_default(),
    };
    let domain = match spec.subdomain.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => {
            check("subdomain", name, "label", is_label(name))?;
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            format!("{name}.{namespace}.svc.{cluster_domain}")
        }
        None => String::new(),
    };
    Ok(PodName { host: shortened(host), domain })
}

fn check(field: &'static str, value: &str, kind: &'static str, valid: bool) -> Result<(), NameError> {
    if valid { Ok(()) } else { Err(NameError::Invalid { field, value: value.to_owned(), kind }) }
}

/// RFC 1123 label.
fn is_label(name: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(inside) && !name.starts_with('-') && !name.ends_with('-')
}

fn is_subdomain(name: &str) -> bool {
    name.len() <= SEARCH_MAX && name.split('.').all(is_label)
}

/// Cut to what fits, not ending in a separator.
fn shortened(name: &str) -> String {
    let end = name.floor_char_boundary(HOSTNAME_MAX);
    if end == name.len() { name.to_owned() } else { name[..end].trim_end_matches(['-', '.']).to_owned() }
}

/// The content of `/etc/hosts` for a pod with a network of its own.
pub fn managed_file(ips: &[String], name: &PodName, aliases: &[HostAlias]) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        let full = if name.domain.is_empty() { String::new() } else { format!("{}.{}\t", name.host, name.domain) };
        line(&mut text, ip, &format!("{full}{}", name.host));
    }
    add_aliases(&mut text, aliases);
    text
}

/// The content of `/etc/hosts` for a pod in the host's network: the host's own, and the aliases.
pub fn host_network_file(host: &str, aliases: &[HostAlias]) -> String {
    let mut text = format!("# Kubernetes-managed hosts file (host network).\n{host}");
    add_aliases(&mut text, aliases);
    text
}

fn add_aliases(text: &mut String, aliases: &[HostAlias]) {
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        line(text, &alias.ip, &alias.hostnames.as_deref().unwrap_or_default().join("\t"));
    }
}

fn line(text: &mut String, ip: &str, names: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{ip}\t{names}");
}

/// Reads `resolv.conf`.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => config.servers.extend(words.next()),
            // The last one wins (resolv.conf(5)).
            Some("search" | "domain") => {
                let searches = words.filter(|word| word != ".").map(|word| word.trim_end_matches('.').to_owned());
                config.searches = searches.collect();
            }
            Some("options") => merge_options(&mut config.options, words),
            _ => {}
        }
    }
    config
}

/// The resolver settings of a pod's sandbox. `host` are the node's own.
pub fn dns_config(pod: &Pod, cluster: &ClusterDns, host: &DnsConfig) -> DnsConfig {
    bounded(wanted_dns_config(pod, cluster, host))
}

/// What of a pod's resolver settings cannot be as it should: reasons and messages of upstream's events.
pub fn dns_trouble(pod: &Pod, cluster: &ClusterDns, host: &DnsConfig) -> Vec<(&'static str, String)> {
    let wanted = wanted_dns_config(pod, cluster, host);
    let (servers, searches) = (wanted.servers.len(), wanted.searches.len());
    let had = bounded(wanted);
    let policy = spec::of(pod).dns_policy.as_deref().unwrap_or("ClusterFirst");
    let missing = (wants_cluster_dns(pod) && cluster.servers.is_empty()).then(|| {
        let message = format!(
            "kubelet does not have ClusterDNS IP configured and cannot create Pod using {policy:?} policy. Falling back to \
             \"Default\" policy."
        );
        ("MissingClusterDNS", message)
    });
    let cut = |what: &str, kept: &[String]| {
        let (kind, list) = match what {
            "nameserver" => ("Nameserver", "nameservers"),
            _ => ("Search Line", "search paths"),
        };
        let kept = kept.join(" ");
        let message =
            format!("{kind} limits were exceeded, some {list} have been omitted, the applied {what} line is: {kept}");
        ("DNSConfigForming", message)
    };
    let servers = (had.servers.len() < servers).then(|| cut("nameserver", &had.servers));
    let searches = (had.searches.len() < searches).then(|| cut("search", &had.searches));
    missing.into_iter().chain(servers).chain(searches).collect()
}

/// Whether the pod's names are looked up in the cluster first, where the cluster has a server.
fn wants_cluster_dns(pod: &Pod) -> bool {
    let spec = spec::of(pod);
    match spec.dns_policy.as_deref() {
        Some("None" | "Default") => false,
        Some("ClusterFirstWithHostNet") => true,
        _ => spec.host_network != Some(true),
    }
}

/// Whatever resolvers take.
fn wanted_dns_config(pod: &Pod, cluster: &ClusterDns, host: &DnsConfig) -> DnsConfig {
    let base = match spec::of(pod).dns_policy.as_deref() {
        Some("None") => DnsConfig::default(),
        _ if wants_cluster_dns(pod) && !cluster.servers.is_empty() => cluster_config(pod, cluster, host),
        _ => host.clone(),
    };
    with_own(base, spec::of(pod).dns_config.as_ref())
}

fn cluster_config(pod: &Pod, cluster: &ClusterDns, host: &DnsConfig) -> DnsConfig {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let domain = &cluster.domain;
    let own = [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
    let own = if domain.is_empty() { Vec::new() } else { own.to_vec() };
    DnsConfig {
        servers: cluster.servers.clone(),
        searches: distinct(own.into_iter().chain(host.searches.iter().cloned())),
        options: vec!["ndots:5".to_owned()],
    }
}

/// Adds the pod's own `dnsConfig`.
fn with_own(mut base: DnsConfig, own: Option<&PodDNSConfig>) -> DnsConfig {
    let Some(own) = own else { return base };
    base.servers = distinct(base.servers.into_iter().chain(own.nameservers.iter().flatten().cloned()));
    base.searches = distinct(base.searches.into_iter().chain(own.searches.iter().flatten().cloned()));
    let options = own.options.iter().flatten().map(|option| {
        let name = option.name.as_deref().unwrap_or_default();
        option
            .value
            .as_deref()
            .filter(|value| !value.is_empty())
            .map_or(name.to_owned(), |value| format!("{name}:{value}"))
    });
    merge_options(&mut base.options, options);
    base
}

/// Adds options; one with the same name is replaced in its place.
fn merge_options(options: &mut Vec<String>, more: impl Iterator<Item = String>) {
    let name = |option: &str| option.split(':').next().unwrap_or_default().to_owned();
    for option in more {
        match options.iter_mut().find(|old| name(old) == name(&option)) {
            Some(old) => *old = option,
            None => options.push(option),
        }
    }
}

fn distinct(values: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    values.filter(|value| seen.insert(value.clone())).collect()
}

/// Cut to what resolvers take.
fn bounded(mut config: DnsConfig) -> DnsConfig {
    config.servers.truncate(NAMESERVERS_MAX);
    config.searches.truncate(SEARCHES_MAX);
    config.searches.retain(|search| search.len() <= SEARCH_MAX);
    while config.searches.iter().map(|search| search.len() + 1).sum::<usize>() > SEARCH_LINE_MAX + 1 {
        config.searches.pop();
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        let mut spec = spec;
        spec["containers"] = json!([]);
        serde_json::from_value(json!({"metadata": {"name": "web-1", "namespace": "shop"}, "spec": spec})).unwrap()
    }

    #[test]
    fn names() {
        let full = name_of(&pod(json!({"hostname": "a", "subdomain": "sub", "setHostnameAsFQDN": true})), "c.local");
        let full = full.unwrap();
        assert_eq!((full.host.as_str(), full.domain.as_str()), ("a", "sub.shop.svc.c.local"));
        let fqdn = pod(json!({"setHostnameAsFQDN": true}));
        assert_eq!(full.for_kernel(&fqdn).as_deref(), Ok("a.sub.shop.svc.c.local"));
        assert_eq!(name_of(&pod(json!({})), "c.local").unwrap().host, "web-1");
        assert!(name_of(&pod(json!({"hostname": "A_b"})), "c.local").is_err());
        let long = name_of(&pod(json!({"subdomain": "s".repeat(63)})), "c.local").unwrap();
        assert!(matches!(long.for_kernel(&fqdn), Err(NameError::TooLong(_))));
        assert_eq!(shortened(&format!("{}-x", "a".repeat(62))), "a".repeat(62));
    }

    #[test]
    fn the_hosts_file() {
        let name = PodName { host: "web".into(), domain: "sub.shop.svc.c".into() };
        let aliases: Vec<HostAlias> =
            serde_json::from_value(json!([{"ip": "192.0.2.9", "hostnames": ["x", "y"]}])).unwrap();
        let text = managed_file(&["10.0.0.2".into()], &name, &aliases);
        let end = "10.0.0.2\tweb.sub.shop.svc.c\tweb\n\n# Entries added by HostAliases.\n192.0.2.9\tx\ty\n";
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n") && text.ends_with(end));
    }

    #[test]
    fn resolver_settings() {
        let host = parse_resolv_conf("# c\nnameserver 192.0.2.53\nsearch corp.example. .\noptions ndots:2 rotate\n");
        let cluster = ClusterDns { servers: vec!["10.96.0.10".into()], domain: "c.local".into() };
        let of = |spec| dns_config(&pod(spec), &cluster, &host);
        let first = of(json!({}));
        assert_eq!(first.servers, ["10.96.0.10"]);
        assert_eq!(first.searches, ["shop.svc.c.local", "svc.c.local", "c.local", "corp.example"]);
        assert_eq!(first.options, ["ndots:5"]);
        assert_eq!(of(json!({"dnsPolicy": "Default"})), host);
        assert_eq!(of(json!({"hostNetwork": true, "dnsPolicy": "ClusterFirst"})), host);
        let own = of(
            json!({"dnsConfig": {"nameservers": ["1.1.1.1"], "options": [{"name": "ndots", "value": "1"}, {"name": "edns0"}]}}),
        );
        assert_eq!((own.servers.len(), own.options), (2, vec!["ndots:1".to_owned(), "edns0".to_owned()]));
        let trouble = |cluster: &ClusterDns, spec| dns_trouble(&pod(spec), cluster, &host);
        assert!(trouble(&cluster, json!({})).is_empty());
        let nameservers = ["1.1.1.1", "1.1.1.2", "1.1.1.3"];
        let many = trouble(&cluster, json!({"dnsConfig": {"nameservers": nameservers}}));
        let expect = "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: \
                      10.96.0.10 1.1.1.1 1.1.1.2";
        assert_eq!(many, [("DNSConfigForming", expect.to_owned())]);
        let searches: Vec<String> = (0..40).map(|number| format!("s{number}")).collect();
        let many = trouble(&cluster, json!({"dnsConfig": {"searches": searches}}));
        assert!(many[0].1.starts_with("Search Line limits were exceeded, some search paths"), "{many:?}");
        let none = ClusterDns { servers: Vec::new(), ..cluster.clone() };
        assert_eq!(trouble(&none, json!({}))[0].0, "MissingClusterDNS");
        assert!(trouble(&none, json!({"dnsPolicy": "Default"})).is_empty());
        let none = of(json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"]}}));
        assert_eq!((none.servers, none.searches.len()), (vec!["1.1.1.1".to_owned()], 0));
    }
}
