//! What `kubeadm join` reads from a cluster, put there by kubeadm itself.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::ControlPlane;
use crate::{cache, certificates, go, host};

/// How a machine joins.
#[derive(Debug, Clone)]
pub struct Join {
    /// Where the API server is.
    pub address: SocketAddr,
    /// A bootstrap token.
    pub token: String,
    /// `sha256:…` of the authority's public key.
    pub authority: String,
}

impl Join {
    /// The arguments after `kubeadm join`.
    pub fn arguments(&self) -> Vec<String> {
        let Self { address, token, authority } = self;
        let words = [&address.to_string(), "--token", token, "--discovery-token-ca-cert-hash", authority];
        words.map(str::to_owned).to_vec()
    }
}

impl ControlPlane {
    /// Stores the configuration of the cluster and of its kubelets, and what a machine without credentials may learn. The
    /// programs come from [`super::build_with`] and [`go::KUBEADM`]; the controller manager has to run, as it signs for
    /// those who ask.
    ///
    /// # Errors
    /// The API server is away or on loopback, or kubeadm fails.
    pub fn prepare_join(&self) -> anyhow::Result<Join> {
        self.options.reachable_address()?;
        let token = self.bootstrap_token()?;
        let config = self.dir.join("kubeadm.yaml");
        std::fs::write(&config, self.kubeadm_config(&token)?)?;
        for phase in [&["upload-config", "all"][..], &["bootstrap-token"]] {
            let mut kubeadm = Command::new(self.programs.join(go::KUBEADM.name));
            kubeadm.args(["init", "phase"]).args(phase).arg("--config").arg(&config);
            host::run(kubeadm.arg("--kubeconfig").arg(self.admin_kubeconfig()?).env("HOME", &self.dir))?;
        }
        Ok(Join { address: self.address(), token, authority: self.authority_hash()? })
    }

    fn kubeadm_config(&self, token: &str) -> anyhow::Result<String> {
        let address = self.address();
        let init = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration",
            "bootstrapTokens": [{ "token": token }],
            "localAPIEndpoint": { "advertiseAddress": address.ip(), "bindPort": address.port() },
            // Nobody asks these; without a socket kubeadm looks for one.
            "nodeRegistration": { "name": "control-plane", "criSocket": "unix:///run/none.sock" },
        });
        let cluster = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration",
            "kubernetesVersion": go::kubernetes_version(),
            "controlPlaneEndpoint": address.to_string(),
            "certificatesDir": self.dir.join("pki"),
            "networking": {
                "serviceSubnet": self.options.service_range, "podSubnet": self.options.pod_range,
                "dnsDomain": "cluster.local",
            },
        });
        Ok(format!("{}\n---\n{}\n", serde_json::to_string(&init)?, serde_json::to_string(&cluster)?))
    }

    /// The hash of the authority's public key as kubeadm pins it (RFC 7469, section 2.4).
    fn authority_hash(&self) -> anyhow::Result<String> {
        let openssl = certificates::TOOL.program;
        let certificate = &self.pki.authority.certificate;
        let pem = host::output(Command::new(openssl).args(["x509", "-pubkey", "-noout", "-in"]).arg(certificate))?;
        let mut convert = Command::new(openssl);
        convert.args(["pkey", "-pubin", "-outform", "DER"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = convert.spawn().context("start openssl")?;
        child.stdin.take().context("stdin is piped")?.write_all(&pem)?;
        Ok(format!("sha256:{}", cache::hex(&Sha256::digest(child.wait_with_output()?.stdout))))
    }
}
