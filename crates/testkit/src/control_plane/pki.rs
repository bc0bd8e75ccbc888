//! The certificates of a control plane, as kubeadm lays them out.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::Options;
use crate::certificates::{self, Pair, Subject};

/// As whom the API server speaks to those behind it.
pub(super) const FRONT_PROXY: &str = "front-proxy-client";

/// Who is certified from the beginning.
#[derive(Debug)]
pub(super) struct Pki {
    dir: PathBuf,
    pub(super) authority: Pair,
    /// For all servers of the control plane.
    pub(super) server: Pair,
    /// The API server towards kubelets.
    pub(super) kubelet_client: Pair,
    /// Whose word API servers behind the API server take for who calls, and by which the API server gives it.
    pub(super) front_proxy: [Pair; 2],
    /// A user with all rights.
    pub(super) admin: Pair,
    /// Signs the tokens of service accounts; the certificate is the way to publish its public key.
    pub(super) service_accounts: Pair,
}

impl Pki {
    /// Makes all of them in `dir`.
    pub(super) fn make(dir: &Path, options: &Options) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let authority = certificates::authority(dir, "ca")?;
        let issue = |file: &str, subject: &Subject<'_>| certificates::issue(dir, file, subject, &authority);
        let (address, service) = (options.address.to_string(), options.api_address()?.to_string());
        let hosts = [
            "127.0.0.1",
            &address,
            &service,
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let front_authority = certificates::authority(dir, "front-proxy-ca")?;
        let front_client = Subject { name: FRONT_PROXY, ..Subject::default() };
        let front_client = certificates::issue(dir, FRONT_PROXY, &front_client, &front_authority)?;
        let masters = |name| Subject { name, organisations: &["system:masters"], hosts: &[] };
        Ok(Self {
            server: issue("apiserver", &Subject { name: "kube-apiserver", organisations: &[], hosts: &hosts })?,
            kubelet_client: issue("apiserver-kubelet-client", &masters("kube-apiserver-kubelet-client"))?,
            admin: issue("admin", &masters("kubernetes-admin"))?,
            service_accounts: certificates::authority(dir, "sa")?,
            front_proxy: [front_authority, front_client],
            dir: dir.to_owned(),
            authority,
        })
    }

    /// The certificate of another user, made anew at each call.
    pub(super) fn user(&self, subject: &Subject<'_>) -> anyhow::Result<Pair> {
        certificates::issue(&self.dir, &file_name(subject.name), subject, &self.authority)
    }
}

/// What the files of the user `name` are called.
pub(super) fn file_name(name: &str) -> String {
    name.trim_start_matches("system:").replace([':', '/'], "-")
}
