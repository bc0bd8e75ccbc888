//! TLS to an API server.

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{CertificateError, ClientConfig, RootCertStore};

use super::config::{ConfigError, Pem, Trust};

/// HTTP/2 if the server can; some load balancers in front of API servers cannot.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A certificate chain and its key, PEM, with the place they come from.
pub(super) struct ClientPair<'a> {
    pub(super) certificate: &'a [u8],
    pub(super) key: &'a [u8],
    pub(super) from: (String, String),
}

/// Settings that believe `trust` and show `pair`.
pub(super) fn client_config(trust: &Trust, pair: Option<ClientPair<'_>>) -> Result<ClientConfig, ConfigError> {
    let builder = trust::client(verifier(trust)?).map_err(|error| fault("TLS", &error))?;
    let mut config = match pair {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let chain = certificates(pair.certificate, &pair.from.0)?;
            let key = PrivateKeyDer::from_pem_slice(pair.key).map_err(|error| fault(&pair.from.1, &error))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| fault(&pair.from.0, &error))?
        }
    };
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
    Ok(config)
}

/// The name to expect in the server's certificate.
pub(super) fn server_name(host: &str) -> Result<ServerName<'static>, ConfigError> {
    ServerName::try_from(host.to_owned())
        .map_err(|error| fault(&format!("the name {host:?} of the API server"), &error))
}

/// What an operator can do about a failed handshake.
pub(super) fn remedy(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => "check the clocks of both machines, or renew the server's certificate",
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "use a name or address that its certificate has, or set tls-server-name in the kubeconfig",
        rustls::Error::InvalidCertificate(_) => {
            "check certificate-authority of the kubeconfig: it is not the one of this server"
        }
        rustls::Error::AlertReceived(_) => {
            "the server refuses our client certificate: renew it or correct the kubeconfig"
        }
        rustls::Error::InvalidMessage(_) => {
            "the server does not speak TLS: check scheme and port of the kubeconfig's server"
        }
        _ => "check that this is the API server",
    }
}

fn fault(what: &str, error: &dyn std::fmt::Display) -> ConfigError {
    ConfigError::Pem { what: what.to_owned(), message: error.to_string() }
}

fn certificates(text: &[u8], from: &str) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    trust::certificates(text).map_err(|error| match error {
        pem::Error::NoItemsFound => fault(from, &"there is no certificate in it"),
        error => fault(from, &error),
    })
}

fn verifier(trust: &Trust) -> Result<trust::Verifier, ConfigError> {
    let (roots, pinned, from) = match trust {
        Trust::Anything => return Ok(trust::anything()),
        Trust::Authorities(pem) => authorities(pem)?,
        Trust::Host => (trust::of_the_host(), Vec::new(), "the host's certificate authorities".to_owned()),
    };
    trust::authorities(roots, pinned).map_err(|error| fault(&from, &error))
}

fn authorities(pem: &Pem) -> Result<(RootCertStore, Vec<CertificateDer<'static>>, String), ConfigError> {
    let from = pem.to_string();
    let pinned = certificates(&pem.read()?, &from)?;
    let mut roots = RootCertStore::empty();
    for certificate in &pinned {
        roots.add(certificate.clone()).map_err(|error| fault(&from, &error))?;
    }
    Ok((roots, pinned, from))
}
