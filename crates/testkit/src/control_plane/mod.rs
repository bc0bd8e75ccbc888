//! A real control plane: etcd and kube-apiserver, and on request kube-controller-manager, kube-scheduler and CoreDNS, in the
//! calling thread's network namespace.
//!
//! ```text
//! directory/
//!   pki/               authority, servers' and users' certificates, the key of service accounts
//!   etcd/              etcd's data
//!   logs/PROGRAM.log
//!   USER.kubeconfig
//! ```
//!
//! Pods reach the API server only if [`Options::address`] is not loopback; then the Service `kubernetes` has an endpoint.

mod dns;
mod flags;
mod join;
mod kubeconfig;
mod pki;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use crate::api::Api;
use crate::certificates::{self, Subject};
use crate::daemon::{self, Daemon, Nursery};
use crate::front::Front;
use crate::go;
use crate::host::{self, Tool};

use pki::Pki;

pub use flags::Options;
pub use join::Join;

/// Where the API server listens; in a network namespace of its own nobody else does.
pub const API_PORT: u16 = 6443;

/// How long a part may take until it answers, on a machine that builds something else at the same time or is emulated.
const READY_LIMIT: Duration = Duration::from_secs(300);

/// How long a part may take to end by itself.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Whom service proxies are.
const PROXY_USER: &str = "system:kube-proxy";

const TOOLS: &[Tool] = &[certificates::TOOL, daemon::TOOL];

/// A program of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The store of all objects.
    Etcd,
    /// The API server.
    ApiServer,
    /// The controllers.
    ControllerManager,
    /// The scheduler.
    Scheduler,
    /// The name server; `programs` come from [`build_with`] and [`go::COREDNS`] then.
    Dns,
}

impl Part {
    /// All of them, in the order in which they start.
    pub const ALL: [Self; 5] = [Self::Etcd, Self::ApiServer, Self::ControllerManager, Self::Scheduler, Self::Dns];

    const fn program(self) -> go::Program {
        match self {
            Self::Etcd => go::ETCD,
            Self::ApiServer => go::KUBE_APISERVER,
            Self::ControllerManager => go::KUBE_CONTROLLER_MANAGER,
            Self::Scheduler => go::KUBE_SCHEDULER,
            Self::Dns => go::COREDNS,
        }
    }

    /// The name of its program, its log and its user.
    pub const fn name(self) -> &'static str {
        self.program().name
    }

    /// As whom it speaks to the API server.
    const fn user(self) -> Option<&'static str> {
        match self {
            Self::Etcd | Self::ApiServer => None,
            Self::ControllerManager => Some("system:kube-controller-manager"),
            Self::Scheduler => Some("system:kube-scheduler"),
            Self::Dns => Some(dns::USER),
        }
    }
}

/// A directory with the programs of a control plane and `kubectl`, built at the first call (about ten minutes of two
/// cores). Call it while the module proxy can be reached: before a private network namespace is entered.
///
/// # Errors
/// No Go, no module proxy, or a build that fails.
pub fn build() -> anyhow::Result<PathBuf> {
    build_with(&[])
}

/// As [`build`], with `more` programs beside them.
///
/// # Errors
/// As [`build`].
pub fn build_with(more: &[go::Program]) -> anyhow::Result<PathBuf> {
    host::install(TOOLS)?;
    go::build_all("control-plane", &[go::CONTROL_PLANE, more].concat())
}

/// A running control plane. It ends with this value, and with the process should that be killed.
///
/// It has a thread: whatever has to be forked from a process without others (a zygote) comes before.
#[derive(Debug)]
pub struct ControlPlane {
    programs: PathBuf,
    dir: PathBuf,
    options: Options,
    pki: Pki,
    api: Api,
    /// In the order of [`Part::ALL`]; fields drop in order, so the nursery goes last.
    parts: [Daemon; 5],
    nursery: Arc<Nursery>,
}

impl ControlPlane {
    /// Starts etcd and the API server of `programs` (see [`build`]) with all they write in `dir`, and waits until the API
    /// server is ready: about four seconds.
    ///
    /// # Errors
    /// A port is taken, or a program fails; the message has the end of its log.
    pub fn start(programs: &Path, dir: &Path, options: Options) -> anyhow::Result<Self> {
        let logs = dir.join("logs");
        std::fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
        let pki = Pki::make(&dir.join("pki"), &options)?;
        let api = Api::new((options.address, API_PORT).into(), &pki.authority.certificate, Some(&pki.admin))?;
        let nursery = Arc::new(Nursery::new());
        let place = flags::Place { dir, pki: &pki, options: &options };
        let parts = Part::ALL.map(|part| {
            let log = logs.join(format!("{}.log", part.name()));
            Daemon::new(&nursery, &programs.join(part.name()), place.flags(part), log)
        });
        let (programs, dir) = (programs.to_owned(), dir.to_owned());
        let mut plane = Self { programs, dir, options, pki, api, parts, nursery };
        for part in [Part::Etcd, Part::ApiServer] {
            plane.run(part)?;
        }
        Ok(plane)
    }

    /// Starts `part` and waits until it is ready. Nothing happens when it is. For etcd and the API server this is the way
    /// back after [`ControlPlane::stop`] or [`ControlPlane::kill`]; the other parts begin with it.
    ///
    /// # Errors
    /// It fails; the message has the end of its log.
    pub fn run(&mut self, part: Part) -> anyhow::Result<()> {
        self.prepare(part)?;
        let probe = self.probe(part)?;
        let daemon = self.daemon(part);
        daemon.start()?;
        daemon.wait_ready(READY_LIMIT, probe)
    }

    /// Ends `part` as a rolling upgrade does (SIGTERM).
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn stop(&mut self, part: Part) -> anyhow::Result<()> {
        self.daemon(part).stop(STOP_LIMIT)
    }

    /// Ends `part` as a crash does (SIGKILL): its port refuses from now on.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn kill(&mut self, part: Part) -> anyhow::Result<()> {
        self.daemon(part).kill()
    }

    /// Freezes `part`: it holds its connections, takes new ones and answers nothing.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn pause(&mut self, part: Part) -> anyhow::Result<()> {
        self.daemon(part).pause()
    }

    /// Lets `part` go on after [`ControlPlane::pause`].
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn resume(&mut self, part: Part) -> anyhow::Result<()> {
        self.daemon(part).resume()
    }

    /// Whether all parts that were started still run.
    ///
    /// # Errors
    /// One has ended by itself; the message has the end of its log.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.parts.iter_mut().try_for_each(Daemon::check)
    }

    /// A client with all rights.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// A client with the rights of `subject`.
    ///
    /// # Errors
    /// `openssl` fails.
    pub fn api_as(&self, subject: &Subject<'_>) -> anyhow::Result<Api> {
        let pair = self.pki.user(subject)?;
        Api::new(self.address(), &self.pki.authority.certificate, Some(&pair))
    }

    /// Where the API server listens.
    pub fn address(&self) -> SocketAddr {
        (self.options.address, API_PORT).into()
    }

    /// What it was started with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The authority that servers and users are certified by.
    pub fn authority(&self) -> &certificates::Pair {
        &self.pki.authority
    }

    /// Where more programs can be started that live in the same network and end with this process.
    pub fn nursery(&self) -> &Arc<Nursery> {
        &self.nursery
    }

    /// The process id of `part` while it runs.
    pub fn pid(&self, part: Part) -> Option<u32> {
        self.parts[part as usize].pid()
    }

    /// `kubectl` with all rights.
    ///
    /// # Errors
    /// The kubeconfig cannot be written.
    pub fn kubectl(&self) -> anyhow::Result<std::process::Command> {
        let mut kubectl = std::process::Command::new(self.programs.join(go::KUBECTL.name));
        kubectl.env("KUBECONFIG", self.admin_kubeconfig()?).env("HOME", &self.dir);
        Ok(kubectl)
    }

    /// A kubeconfig with all rights.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn admin_kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.write_kubeconfig("admin", &kubeconfig::certificate(&self.pki.admin)?)
    }

    /// The kubeconfig of the node `name`: what the node authorizer grants to it.
    ///
    /// # Errors
    /// `openssl` fails, or it cannot be written.
    pub fn node_kubeconfig(&self, name: &str) -> anyhow::Result<PathBuf> {
        let user = format!("system:node:{name}");
        self.user_kubeconfig(&Subject { name: &user, organisations: &["system:nodes"], hosts: &[] })
    }

    /// The kubeconfig of service proxies.
    ///
    /// # Errors
    /// `openssl` fails, or it cannot be written.
    pub fn proxy_kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.user_kubeconfig(&Subject { name: PROXY_USER, ..Subject::default() })
    }

    /// A relay before the API server that takes whoever asks for a service proxy, and the kubeconfig that leads there.
    ///
    /// # Errors
    /// `openssl` fails, or the kubeconfig cannot be written.
    pub fn proxy_front(&self) -> anyhow::Result<(Front, PathBuf)> {
        let server = self.api_as(&Subject { name: PROXY_USER, ..Subject::default() })?;
        let front = Front::start(self.options.address, &self.pki.server, server)?;
        let file = self.write_kubeconfig_for(front.address(), "front", &kubeconfig::token("anybody"))?;
        Ok((front, file))
    }

    /// The kubeconfig of any user.
    ///
    /// # Errors
    /// `openssl` fails, or it cannot be written.
    pub fn user_kubeconfig(&self, subject: &Subject<'_>) -> anyhow::Result<PathBuf> {
        let pair = self.pki.user(subject)?;
        self.write_kubeconfig(&pki::file_name(subject.name), &kubeconfig::certificate(&pair)?)
    }

    /// The KubeletConfiguration of a node that trusts this control plane.
    ///
    /// # Errors
    /// The range of Services has no address for DNS.
    pub fn kubelet_configuration(&self) -> anyhow::Result<String> {
        let (authority, dns) = (self.pki.authority.certificate.display(), self.options.dns_address()?);
        Ok(format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {{ enabled: false }}
  webhook: {{ enabled: true }}
  x509: {{ clientCAFile: {authority} }}
authorization: {{ mode: Webhook }}
# A machine that builds and tests may have a full disk.
evictionHard: {{ memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1% }}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
clusterDNS: [{dns}]
clusterDomain: cluster.local
"
        ))
    }

    /// A kubeconfig with a bootstrap token: its owner may ask for a node's client certificate, which the controller manager
    /// approves and signs when it runs.
    ///
    /// # Errors
    /// The API server is away.
    pub fn bootstrap_kubeconfig(&self) -> anyhow::Result<PathBuf> {
        let token = self.bootstrap_token()?;
        self.write_kubeconfig("bootstrap", &kubeconfig::token(&token))
    }

    /// A bootstrap token with what kubeadm grants to those who have one. The same token each time.
    ///
    /// # Errors
    /// The API server is away.
    pub fn bootstrap_token(&self) -> anyhow::Result<String> {
        const ID: &str = "lab000";
        const SECRET: &str = "0123456789abcdef";
        const GROUP: &str = "system:bootstrappers:kubeadm:default-node-token";
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
            "metadata": { "name": format!("bootstrap-token-{ID}"), "namespace": "kube-system" },
            "stringData": {
                "token-id": ID, "token-secret": SECRET, "auth-extra-groups": GROUP,
                "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
            },
        });
        self.api.ensure("/api/v1/namespaces/kube-system/secrets", &secret)?;
        const REQUESTS: &str = "system:certificates.k8s.io:certificatesigningrequests";
        self.grant("kubeadm:kubelet-bootstrap", "system:node-bootstrapper", GROUP)?;
        self.grant("kubeadm:node-autoapprove-bootstrap", &format!("{REQUESTS}:nodeclient"), GROUP)?;
        let rotation = format!("{REQUESTS}:selfnodeclient");
        self.grant("kubeadm:node-autoapprove-certificate-rotation", &rotation, "system:nodes")?;
        Ok(format!("{ID}.{SECRET}"))
    }

    /// Grants a cluster role to a group.
    ///
    /// # Errors
    /// The API server is away.
    pub fn grant(&self, binding: &str, role: &str, group: &str) -> anyhow::Result<()> {
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": binding },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group }],
        });
        self.api.ensure("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding)
    }

    /// Makes `namespace` ready for pods: the namespace, its service account `default` and the ConfigMap with the authority,
    /// which the controller manager would make if it ran. What is there stays as it is.
    ///
    /// # Errors
    /// The API server is away.
    pub fn ensure_namespace(&self, namespace: &str) -> anyhow::Result<()> {
        let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } });
        self.api.ensure("/api/v1/namespaces", &object)?;
        let below = |kind: &str| format!("/api/v1/namespaces/{namespace}/{kind}");
        let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "default" } });
        self.api.ensure(&below("serviceaccounts"), &account)?;
        let authority = std::fs::read_to_string(&self.pki.authority.certificate)?;
        let authority = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "kube-root-ca.crt" },
            "data": { "ca.crt": authority },
        });
        self.api.ensure(&below("configmaps"), &authority)
    }

    /// Writes what `part` reads.
    fn prepare(&self, part: Part) -> anyhow::Result<()> {
        let Some(user) = part.user() else { return Ok(()) };
        let pair = self.pki.user(&Subject { name: user, ..Subject::default() })?;
        let kubeconfig = self.write_kubeconfig(part.name(), &kubeconfig::certificate(&pair)?)?;
        if part == Part::Dns {
            dns::ensure_objects(&self.api, &self.options)?;
            dns::write_config(&flags::corefile(&self.dir), &kubeconfig, self.options.address)?;
        }
        Ok(())
    }

    fn write_kubeconfig(&self, name: &str, user: &serde_json::Value) -> anyhow::Result<PathBuf> {
        self.write_kubeconfig_for(self.address(), name, user)
    }

    fn write_kubeconfig_for(
        &self,
        server: SocketAddr,
        name: &str,
        user: &serde_json::Value,
    ) -> anyhow::Result<PathBuf> {
        let file = self.dir.join(format!("{name}.kubeconfig"));
        let text = kubeconfig::text(server, &self.pki.authority.certificate, user)?;
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        Ok(file)
    }

    fn daemon(&mut self, part: Part) -> &mut Daemon {
        &mut self.parts[part as usize]
    }

    /// Whether `part` answers.
    fn probe(&self, part: Part) -> anyhow::Result<impl FnMut() -> bool + use<>> {
        let secure = |address| Api::new(address, &self.pki.authority.certificate, Some(&self.pki.admin));
        let here = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let health = match part {
            Part::Etcd => Health::Accepts(here(flags::ETCD_PORT)),
            Part::ApiServer => Health::Secure(self.api.clone(), "/readyz"),
            Part::ControllerManager => Health::Secure(secure(here(flags::CONTROLLER_MANAGER_PORT))?, "/healthz"),
            Part::Scheduler => Health::Secure(secure(here(flags::SCHEDULER_PORT))?, "/healthz"),
            Part::Dns => Health::Names(here(dns::READY_PORT), (self.options.address, 53).into()),
        };
        Ok(move || health.is_good())
    }
}

/// How a part is asked whether it is ready.
enum Health {
    /// It accepts connections.
    Accepts(SocketAddr),
    /// It answers "200 OK" over TLS.
    Secure(Api, &'static str),
    /// It says that it knows all names, and then accepts questions: it says so a little too early.
    Names(SocketAddr, SocketAddr),
}

impl Health {
    fn is_good(&self) -> bool {
        match self {
            Self::Accepts(address) => TcpStream::connect(address).is_ok(),
            Self::Secure(api, path) => api.request("GET", path, None).is_ok_and(|reply| reply.status == 200),
            Self::Names(ready, questions) => {
                plain_status(*ready, "/ready").is_ok_and(|status| status == 200)
                    && TcpStream::connect(questions).is_ok()
            }
        }
    }
}

fn plain_status(address: SocketAddr, path: &str) -> anyhow::Result<u16> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.split(' ').nth(1).context("not HTTP")?.parse()?)
}
