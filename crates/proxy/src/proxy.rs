//! The proxy of a node: start, look, stop.

use std::sync::Arc;

use cluster::Source;
use service::{Explanation, Name, Refusals};
use sys::netlink;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backend;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::sync::{Kernel, Request, Sync, Telemetry};
use crate::{Barrier, Config, Owned, Tallies};

/// Requests that wait for the loop; more of them wait with their senders.
const REQUESTS_MAX: usize = 64;

/// The service rules of a node. Dropping it stops the loop and leaves the rules in the kernel.
#[derive(Debug)]
pub struct Proxy {
    questions: Questions,
    telemetry: Telemetry,
    stop: DropGuard,
    task: JoinHandle<Kernel>,
}

impl Proxy {
    /// Starts the proxy in the calling thread's network namespace and on the current tokio runtime. The rules that an
    /// earlier one left stay in force until the source is synced; then they are replaced in one step.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: Config, source: Arc<dyn Source>) -> Result<Proxy, StartError> {
        let kernel = Kernel::open(&config)?;
        let stop = CancellationToken::new();
        let (requests, queue) = mpsc::channel(REQUESTS_MAX);
        let telemetry = Telemetry::new(&config);
        let task = tokio::spawn(Sync::new(config, source, kernel, queue, telemetry.clone(), stop.clone()).run());
        Ok(Proxy { questions: Questions { requests }, telemetry, stop: stop.drop_guard(), task })
    }

    /// Who answers questions about the rules.
    pub fn questions(&self) -> Questions {
        self.questions.clone()
    }

    /// Whether the rules keep up with the cluster.
    pub fn health(&self) -> Arc<Health> {
        self.telemetry.health.clone()
    }

    /// What the proxy counts.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.telemetry.metrics.clone()
    }

    /// Removes the rules of all modes from the calling thread's network namespace, whoever of us made them. What is not there
    /// is no error. Blocks; no proxy may run meanwhile.
    ///
    /// # Errors
    /// Everything that could not be removed.
    pub fn remove_all_modes(config: &Config) -> Result<(), Vec<RulesError>> {
        let failures = backend::remove_all_modes(config);
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    /// What the kubelet waits at before it stops a pod.
    pub fn barrier(&self) -> Barrier {
        Barrier { requests: self.questions.requests.clone() }
    }

    /// Returns when the kernel's rules say what the store said when this was called, or something newer.
    pub async fn settled(&self) {
        // The loop ends only with self.
        let _ = self.questions.ask(Request::Settled).await;
    }

    /// Everything the proxy owns in the kernel.
    ///
    /// # Errors
    /// The kernel refused to list.
    pub async fn fsck(&self) -> Result<Vec<Owned>, RulesError> {
        self.questions.ask(Request::Owned).await.unwrap_or_else(|| Ok(Vec::new()))
    }

    /// Ends the loop. The rules stay: a daemon that only restarts leaves them to its successor.
    pub async fn stop(self) {
        self.end().await;
    }

    /// Ends the loop and removes everything from the kernel. For `down`.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn cleanup(self) -> Result<(), RulesError> {
        let mut kernel = self.end().await;
        resumed(tokio::task::spawn_blocking(move || kernel.rules.remove()).await)
    }

    async fn end(self) -> Kernel {
        drop(self.stop);
        resumed(self.task.await)
    }
}

/// A handle that asks the loop about the rules. Clones are equal.
#[derive(Debug, Clone)]
pub struct Questions {
    requests: mpsc::Sender<Request>,
}

impl Questions {
    /// What a packet to a Service meets; none if there is no such Service here.
    pub async fn explain(&self, namespace: &str, name: &str) -> Option<Explanation> {
        let service = Name { namespace: namespace.into(), name: name.into() };
        self.ask(|answer| Request::Explain { service, answer }).await.flatten()
    }

    /// Ports of Services that this node must not lead anywhere.
    pub async fn refusals(&self) -> Refusals {
        self.tallies().await.refusals
    }

    /// What is counted of the rules that are in force.
    pub async fn tallies(&self) -> Tallies {
        self.ask(Request::Tallies).await.unwrap_or_default()
    }

    /// `None`: the loop has ended.
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (answer, wait) = oneshot::channel();
        self.requests.send(request(answer)).await.ok()?;
        wait.await.ok()
    }
}

/// The result of a task that nobody aborts; its panic goes on here.
pub(crate) fn resumed<T>(result: Result<T, tokio::task::JoinError>) -> T {
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Why rules could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RulesError {
    /// The kernel's answer.
    #[error(transparent)]
    Kernel(#[from] netlink::Error),
    /// A program of iptables did not do what it was started for.
    #[error("{program}: {words}{}", line.as_ref().map(|line| format!("; it is about: {line}")).unwrap_or_default())]
    Program {
        /// Where it is.
        program: String,
        /// What it said.
        words: String,
        /// The rule that it complained about.
        line: Option<String>,
    },
    /// Rules are missing that were written.
    #[error("somebody else has removed service rules")]
    Removed,
    /// The tables of iptables could not be asked.
    #[error("the tables of iptables cannot be looked at")]
    Tables(#[source] std::io::Error),
    /// The proxy's network namespace could not be entered.
    #[error("the network namespace of the service rules cannot be entered")]
    Namespace(#[source] std::io::Error),
}

/// Why the proxy could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The kernel has no nf_tables.
    #[error(
        "service rules need nf_tables in the kernel; load it (`modprobe nf_tables`) or boot a kernel with CONFIG_NF_TABLES"
    )]
    NoNftables(#[source] netlink::Error),
    /// The kernel lacks a part of nf_tables.
    #[error(
        "service rules need nf_tables of Linux 5.13 or later with CONFIG_NF_TABLES_INET and NFT_NAT, NFT_MASQ, NFT_NUMGEN, \
         NFT_FIB_INET, NFT_REJECT_INET and NFT_CT; load these modules or boot such a kernel"
    )]
    Unsupported(#[source] netlink::Error),
    /// The kernel has no IPVS.
    #[error(
        "proxy mode ipvs needs IPVS in the kernel; load it (`modprobe ip_vs`), boot a kernel with CONFIG_IP_VS, \
         CONFIG_IP_VS_PROTO_TCP, CONFIG_IP_VS_PROTO_UDP and CONFIG_IP_VS_NFCT, or take another mode"
    )]
    NoIpvs(#[source] netlink::Error),
    /// The kernel has no interface that could hold addresses.
    #[error(
        "proxy mode userspace needs an interface for addresses of Services; load one (`modprobe dummy` or `modprobe bridge`)"
    )]
    NoLink(#[source] netlink::Error),
    /// No threads for the mode userspace.
    #[error("cannot start the threads that carry connections; raise the limit of processes")]
    Threads(#[source] std::io::Error),
    /// The kernel has no such scheduler.
    #[error(
        "IPVS of this kernel has no scheduler \"{scheduler}\"; load it (`modprobe ip_vs_{scheduler}`) or take another, as rr"
    )]
    NoScheduler {
        /// Its name.
        scheduler: String,
        /// The kernel's answer.
        source: netlink::Error,
    },
    /// The kernel has no dummy interfaces.
    #[error("proxy mode ipvs needs dummy interfaces; load them (`modprobe dummy`) or boot a kernel with CONFIG_DUMMY")]
    NoDummy(#[source] netlink::Error),
    /// A setting of the kernel cannot be made.
    #[error("cannot set {name} below /proc/sys; set it on the host, or give the proxy a writable /proc/sys")]
    Setting {
        /// Its name.
        name: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The program may not change the packet filter.
    #[error("service rules need CAP_NET_ADMIN; run as root")]
    NotPermitted(#[source] netlink::Error),
    /// No programs of iptables.
    #[error(
        "the proxy mode iptables needs the programs iptables-restore and iptables-save of iptables 1.6.2 or later, in PATH or \
         in /usr/sbin; install the package iptables, or take the proxy mode nftables, which needs no program"
    )]
    NoIptables,
    /// Programs and kernel do not have all that rules need.
    #[error(
        "the proxy mode iptables cannot work on this host: rules need iptables 1.6.2 or later, and in the kernel \
         CONFIG_NETFILTER_XT_MATCH_{{ADDRTYPE,COMMENT,CONNTRACK,MARK,RECENT,STATISTIC}}, NETFILTER_XT_NAT and \
         NETFILTER_XT_TARGET_{{MARK,MASQUERADE}} with IP_NF_{{FILTER,MANGLE,NAT,TARGET_REJECT}} or NFT_COMPAT; load these \
         modules, or take the proxy mode nftables"
    )]
    IptablesUnusable(#[source] RulesError),
    /// Which kind of iptables this host uses could not be found out.
    #[error("cannot find out whether this host uses iptables-nft or iptables-legacy")]
    Iptables(#[source] RulesError),
    /// No network namespace for a trial.
    #[error("the proxy mode iptables needs CAP_SYS_ADMIN and CAP_NET_ADMIN; run as root")]
    IptablesNotPermitted(#[source] std::io::Error),
    /// A part of the kernel could not be used.
    #[error("cannot work in this network namespace")]
    Namespace(#[source] std::io::Error),
    /// Another answer of the kernel.
    #[error("cannot talk to the kernel about service rules")]
    Kernel(#[source] netlink::Error),
}
