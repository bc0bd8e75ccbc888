//! The command lines of the control plane's programs.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::pki::{FRONT_PROXY, Pki};
use super::{API_PORT, Part};
use crate::certificates::Pair;

/// etcd's clients.
pub(super) const ETCD_PORT: u16 = 2379;
/// etcd's peers, of which there are none.
const ETCD_PEER_PORT: u16 = 2380;
/// The controller manager's health and metrics.
pub(super) const CONTROLLER_MANAGER_PORT: u16 = 10257;
/// The scheduler's health and metrics.
pub(super) const SCHEDULER_PORT: u16 = 10259;

/// What a cluster is like.
#[derive(Debug, Clone)]
pub struct Options {
    /// The address by which nodes and pods know the API server: one of the namespace's. With a loopback address nothing
    /// but the namespace itself reaches it, and the Service `kubernetes` has no endpoint.
    pub address: IpAddr,
    /// Where Services have their addresses.
    pub service_range: String,
    /// Where the controller manager takes the nodes' ranges for pods from.
    pub pod_range: String,
    /// More flags for a part; one that is given here wins over what stands there by default.
    pub extra: Vec<(Part, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            service_range: "10.96.0.0/16".to_owned(),
            pod_range: "10.244.0.0/16".to_owned(),
            extra: Vec::new(),
        }
    }
}

impl Options {
    /// The address of the Service `kubernetes`.
    ///
    /// # Errors
    /// The range of Services is none of IPv4.
    pub fn api_address(&self) -> anyhow::Result<Ipv4Addr> {
        self.service_address(1)
    }

    /// The address of the Service `kube-dns`.
    ///
    /// # Errors
    /// The range of Services is none of IPv4.
    pub fn dns_address(&self) -> anyhow::Result<Ipv4Addr> {
        self.service_address(10)
    }

    /// The address, if others than this network namespace can reach it.
    pub(super) fn reachable_address(&self) -> anyhow::Result<IpAddr> {
        if self.address.is_loopback() {
            bail!("nobody else reaches {}; give the control plane another address (Options::address)", self.address);
        }
        Ok(self.address)
    }

    /// The address number `index` of the (first) range of Services.
    fn service_address(&self, index: u32) -> anyhow::Result<Ipv4Addr> {
        let range = &self.service_range;
        let base = range.split('/').next().and_then(|base| base.parse::<Ipv4Addr>().ok());
        let base = base.with_context(|| format!("{range:?} is no range of IPv4 addresses"))?;
        Ok(Ipv4Addr::from(u32::from(base) + index))
    }
}

/// What the flags speak of.
pub(super) struct Place<'a> {
    pub(super) dir: &'a Path,
    pub(super) pki: &'a Pki,
    pub(super) options: &'a Options,
}

impl Place<'_> {
    /// The command line of `part`, without the program.
    pub(super) fn flags(&self, part: Part) -> Vec<String> {
        let mut flags = match part {
            Part::Etcd => self.etcd(),
            Part::ApiServer => {
                [self.api_server(), self.api_server_identity(), self.service_accounts(), self.aggregation()].concat()
            }
            Part::ControllerManager => [self.component(part, CONTROLLER_MANAGER_PORT), self.controllers()].concat(),
            Part::Scheduler => self.component(part, SCHEDULER_PORT),
            Part::Dns => vec!["-conf".to_owned(), corefile(self.dir).display().to_string()],
        };
        flags.extend(self.options.extra.iter().filter(|(of, _)| *of == part).map(|(_, flag)| flag.clone()));
        flags
    }

    fn etcd(&self) -> Vec<String> {
        let clients = format!("http://127.0.0.1:{ETCD_PORT}");
        let peers = format!("http://127.0.0.1:{ETCD_PEER_PORT}");
        vec![
            "--name=lab".to_owned(),
            format!("--data-dir={}", self.dir.join("etcd").display()),
            format!("--listen-client-urls={clients}"),
            format!("--advertise-client-urls={clients}"),
            format!("--listen-peer-urls={peers}"),
            format!("--initial-advertise-peer-urls={peers}"),
            format!("--initial-cluster=lab={peers}"),
            // Nothing here needs to survive a loss of power, and every write of the API server would wait for the disk.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ]
    }

    fn api_server(&self) -> Vec<String> {
        let Options { address, service_range, .. } = self.options;
        let (bind, reconciler) = match address {
            loopback if loopback.is_loopback() => (address.to_string(), "none"),
            IpAddr::V4(_) => ("0.0.0.0".to_owned(), "lease"),
            IpAddr::V6(_) => ("::".to_owned(), "lease"),
        };
        vec![
            format!("--etcd-servers=http://127.0.0.1:{ETCD_PORT}"),
            format!("--bind-address={bind}"),
            format!("--secure-port={API_PORT}"),
            format!("--advertise-address={address}"),
            // Endpoints must not be loopback addresses.
            format!("--endpoint-reconciler-type={reconciler}"),
            format!("--service-cluster-ip-range={service_range}"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--enable-bootstrap-token-auth=true".to_owned(),
            "--allow-privileged=true".to_owned(),
        ]
    }

    fn api_server_identity(&self) -> Vec<String> {
        let Pki { authority, server, kubelet_client, .. } = self.pki;
        vec![
            file("client-ca-file", &authority.certificate),
            file("tls-cert-file", &server.certificate),
            file("tls-private-key-file", &server.key),
            file("kubelet-client-certificate", &kubelet_client.certificate),
            file("kubelet-client-key", &kubelet_client.key),
            "--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname".to_owned(),
        ]
    }

    /// By which API servers behind the API server know who calls.
    fn aggregation(&self) -> Vec<String> {
        let [authority, client] = &self.pki.front_proxy;
        vec![
            file("requestheader-client-ca-file", &authority.certificate),
            file("proxy-client-cert-file", &client.certificate),
            file("proxy-client-key-file", &client.key),
            format!("--requestheader-allowed-names={FRONT_PROXY}"),
            "--requestheader-username-headers=X-Remote-User".to_owned(),
            "--requestheader-group-headers=X-Remote-Group".to_owned(),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
        ]
    }

    fn service_accounts(&self) -> Vec<String> {
        let Pair { certificate, key } = &self.pki.service_accounts;
        vec![
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            file("service-account-key-file", certificate),
            file("service-account-signing-key-file", key),
        ]
    }

    /// What the controller manager and the scheduler have in common.
    fn component(&self, part: Part, port: u16) -> Vec<String> {
        let Pki { authority, server, .. } = self.pki;
        let kubeconfig = self.dir.join(format!("{}.kubeconfig", part.name()));
        vec![
            file("kubeconfig", &kubeconfig),
            file("authentication-kubeconfig", &kubeconfig),
            file("authorization-kubeconfig", &kubeconfig),
            file("client-ca-file", &authority.certificate),
            file("tls-cert-file", &server.certificate),
            file("tls-private-key-file", &server.key),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            // There is one of each: nobody to elect.
            "--leader-elect=false".to_owned(),
        ]
    }

    fn controllers(&self) -> Vec<String> {
        let Pki { authority, service_accounts, .. } = self.pki;
        let Options { service_range, pod_range, .. } = self.options;
        vec![
            "--controllers=*,bootstrap-signer-controller,token-cleaner-controller".to_owned(),
            "--use-service-account-credentials=true".to_owned(),
            file("root-ca-file", &authority.certificate),
            file("cluster-signing-cert-file", &authority.certificate),
            file("cluster-signing-key-file", &authority.key),
            file("service-account-private-key-file", &service_accounts.key),
            "--allocate-node-cidrs=true".to_owned(),
            format!("--cluster-cidr={pod_range}"),
            format!("--service-cluster-ip-range={service_range}"),
        ]
    }
}

/// What CoreDNS reads.
pub(super) fn corefile(dir: &Path) -> PathBuf {
    dir.join("Corefile")
}

fn file(flag: &str, path: &Path) -> String {
    format!("--{flag}={}", path.display())
}
