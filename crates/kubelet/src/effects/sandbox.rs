//! Making a pod's sandbox, and having ready what has to be before it.

use std::time::Instant;

use cri::v1;
use pod::Change;

use super::Job;
use crate::context::chain;
use crate::metrics::SandboxStart;
use crate::resources::Resources;
use crate::{generate, hosts, remains};

impl Job {
    pub(super) async fn create_sandbox(&self, attempt: u32) {
        if let Err(message) = self.prepare_claims().await {
            return self.change(Change::ClaimsFailed { message });
        }
        let config = &self.context.config.generate;
        for (reason, message) in hosts::dns_trouble(&self.pod, &config.dns, &config.host_dns) {
            self.context.warning(&self.pod, reason, message, None);
        }
        match self.made_sandbox(attempt).await {
            Ok((id, addresses)) => self.change(Change::SandboxReady { id, addresses }),
            Err(message) => self.change(Change::SandboxFailed { message }),
        }
    }

    /// Devices that drivers make ready may be what the sandbox itself needs, as network interfaces are.
    async fn prepare_claims(&self) -> Result<(), String> {
        if !Resources::has_claims(&self.pod) {
            return Ok(());
        }
        self.change(Change::ClaimsBegun);
        self.context.parts.resources.prepare_claims(&self.pod).await
    }

    async fn made_sandbox(&self, attempt: u32) -> Result<(String, Vec<String>), String> {
        let config = self.sandbox_config(attempt)?;
        let (groups, pod) = (self.context.parts.groups.clone(), self.pod.clone());
        let has_own_cpus = self.context.parts.resources.has_own_cpus(self.uid());
        let metrics = &self.context.parts.metrics;
        let begun = Instant::now();
        let grouped = tokio::task::spawn_blocking(move || groups.ensure_pod(&pod, has_own_cpus)).await;
        metrics.group_done("create", begun.elapsed());
        grouped.map_err(|error| error.to_string())?.map_err(|error| format!("the pod's control group: {error}"))?;
        let logs = config.log_directory.clone();
        tokio::fs::create_dir_all(&logs).await.map_err(|error| format!("log directory {logs}: {error}"))?;
        let class = pod::spec::of(&self.pod).runtime_class_name.as_deref().filter(|class| !class.is_empty());
        let handler = match class {
            Some(class) => self.context.parts.source.runtime_handler(class).await.map_err(|error| chain(&error))?,
            None => String::new(),
        };
        let runtime = &self.context.parts.runtime;
        self.shared.set_sandbox_config(config.clone());
        let own_users = pod::spec::of(&self.pod).host_users == Some(false);
        let begun = Instant::now();
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.clone() };
        let made = runtime.run_pod_sandbox(request).await;
        let (took, failed) = (begun.elapsed(), made.is_err());
        metrics.sandbox_started(SandboxStart { handler: &handler, own_users, took, failed });
        let id = made.map_err(|error| error.to_string())?.pod_sandbox_id;
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
        let status = runtime.pod_sandbox_status(request).await.map_err(|error| error.to_string())?.status;
        let is_ready = |status: &v1::PodSandboxStatus| status.state == v1::PodSandboxState::SandboxReady as i32;
        if !status.as_ref().is_some_and(is_ready) {
            // It was lost before anybody knew it, so nobody will tell of it again.
            remains::remove_sandbox(&self.context, &id).await?;
            return Err("the sandbox ended at once; see the node's log".to_owned());
        }
        Ok((id, status.as_ref().map(addresses).unwrap_or_default()))
    }

    /// The sandbox's configuration: that of its making, or the same again after a restart of the daemon.
    pub(super) fn sandbox_config(&self, attempt: u32) -> Result<v1::PodSandboxConfig, String> {
        let users = self.users().map_err(|error| error.to_string())?;
        generate::sandbox_config(&self.context.config.generate, &self.pod, attempt, users)
            .map_err(|error| error.to_string())
    }

    /// The ids of the pod's user namespace, if it has one of its own.
    pub(super) fn users(&self) -> std::io::Result<Option<generate::UserRange>> {
        let own = pod::spec::of(&self.pod).host_users == Some(false);
        own.then(|| self.context.users.of(self.uid())).transpose()
    }

    pub(super) async fn remove_sandbox(&self, id: &str) {
        match remains::remove_sandbox(&self.context, id).await {
            Ok(()) => self.change(Change::SandboxRemoved),
            Err(message) => self.change(Change::SandboxFailed { message }),
        }
    }
}

/// The addresses of a sandbox, the primary one first.
pub(crate) fn addresses(status: &v1::PodSandboxStatus) -> Vec<String> {
    let network = status.network.iter();
    let all = network.flat_map(|network| {
        [network.ip.clone()].into_iter().chain(network.additional_ips.iter().map(|one| one.ip.clone()))
    });
    all.filter(|ip| !ip.is_empty()).collect()
}
