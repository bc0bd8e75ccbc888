//! CertificateSigningRequests.

use std::time::Duration;

use cluster::Key;
use cluster::api::Api;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use tokio::time::Instant;

use super::{CertificateError, Holder, Purpose};

/// How long somebody has for the decision, as upstream.
const WITHIN: Duration = Duration::from_secs(15 * 60);
/// How often to look. A request is made once in months, and mostly decided within a second.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Purpose {
    fn signer(self) -> &'static str {
        match self {
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving => "kubernetes.io/kubelet-serving",
        }
    }

    fn usages(self) -> [&'static str; 2] {
        match self {
            Self::Client => ["digital signature", "client auth"],
            Self::Serving => ["digital signature", "server auth"],
        }
    }
}

/// Makes a key and has it certified; returns certificate and key as PEM.
pub(super) async fn request(
    api: &Api,
    purpose: Purpose,
    holder: &Holder,
) -> Result<(String, String), CertificateError> {
    let key = KeyPair::generate()?;
    let pem = params(purpose, holder)?.serialize_request(&key)?.pem()?;
    let made = api.create(&object(purpose, &pem)).await?;
    let name = made.metadata.name.unwrap_or_default();
    Ok((decided(api, &name).await?, key.serialize_pem()))
}

fn params(purpose: Purpose, holder: &Holder) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{}", holder.node));
    if purpose == Purpose::Serving {
        for name in &holder.names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.subject_alt_names.extend(holder.addresses.iter().map(|address| SanType::IpAddress(*address)));
    }
    Ok(params)
}

fn object(purpose: Purpose, pem: &str) -> CertificateSigningRequest {
    CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.as_bytes().to_vec()),
            signer_name: purpose.signer().to_owned(),
            usages: Some(purpose.usages().map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    }
}

/// The certificate, when it has been signed.
async fn decided(api: &Api, name: &str) -> Result<String, CertificateError> {
    let begin = Instant::now();
    while begin.elapsed() < WITHIN {
        let request: CertificateSigningRequest = api.get(&Key::cluster(name)).await?;
        let status = request.status.unwrap_or_default();
        let against = status.conditions.iter().flatten().find(|one| one.type_ == "Denied" || one.type_ == "Failed");
        if let Some(against) = against {
            let reason = against.message.clone().or_else(|| against.reason.clone()).unwrap_or_default();
            return Err(CertificateError::Refused { name: name.to_owned(), reason });
        }
        if let Some(certificate) = status.certificate.filter(|certificate| !certificate.0.is_empty()) {
            return Ok(String::from_utf8_lossy(&certificate.0).into_owned());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Err(CertificateError::Undecided { name: name.to_owned(), within: WITHIN })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serving_requests_name_the_host_and_client_requests_do_not() {
        let holder = Holder {
            node: "n1".into(),
            names: vec!["host".into()],
            addresses: vec![std::net::IpAddr::from([192, 0, 2, 1])],
        };
        assert_eq!(params(Purpose::Serving, &holder).unwrap().subject_alt_names.len(), 2);
        let client = params(Purpose::Client, &holder).unwrap();
        assert!(client.subject_alt_names.is_empty(), "a signer of clients refuses names");
        let pem = client.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        let object = object(Purpose::Client, &pem);
        assert!(object.spec.request.0.starts_with(b"-----BEGIN CERTIFICATE REQUEST"));
        assert_eq!(object.spec.usages.unwrap(), ["digital signature", "client auth"]);
    }
}
