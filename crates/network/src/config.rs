//! What the operator configures about pod networks.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

/// Configuration of a [`Network`](crate::Network). [`Config::new`] has the defaults of a node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory on tmpfs for the records of live sandboxes; made if missing, mode 0700.
    pub run_dir: PathBuf,
    /// Where CNI configurations are looked for; one valid file there switches the built-in bridge off.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugins are looked for, in this order.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Directory that outlives a boot, for what CNI plugins are told again when a sandbox ends: what they have allocated
    /// may outlive a boot, too. Made when it is needed, mode 0700.
    pub cni_state_dir: PathBuf,
    /// How long one call of a CNI plugin may take.
    pub cni_limit: Duration,
    /// Name of the built-in bridge, at most 15 bytes.
    pub bridge: String,
    /// Pod subnets of the built-in bridge, at most one of each family; the first address of each is the bridge's.
    pub subnets: Vec<IpNet>,
    /// Where the pods of all nodes are: what a pod sends there keeps its address.
    pub cluster: Vec<IpNet>,
    /// Further addresses of the host on the bridge: that of the pods' name server.
    pub addresses: Vec<IpAddr>,
    /// Ranges that the host itself reaches by the bridge: the addresses of Services. Without a route there the kernel
    /// would refuse a connection before the packet filter can translate it, on a host without a default route.
    pub routed: Vec<IpNet>,
    /// MTU of the pods' interfaces; `None` takes that of the interface with the default route, else 1500.
    pub mtu: Option<u32>,
    /// Network namespaces kept ready for the next pods.
    pub prepared_slots: usize,
    /// Name of the nftables table with masquerading and host ports.
    pub table: String,
}

impl Config {
    /// The defaults, with all state below `run_dir`.
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, 85, 0, 0), 16);
        Config {
            run_dir: run_dir.into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
            cni_state_dir: "/var/lib/orlop/cni".into(),
            cni_limit: Duration::from_secs(60),
            bridge: "orlop0".into(),
            subnets: vec![subnet.into()],
            cluster: Vec::new(),
            addresses: Vec::new(),
            routed: Vec::new(),
            mtu: None,
            prepared_slots: 4,
            table: "orlop-net".into(),
        }
    }
}
