//! TLS to an API server.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

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
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = verifier(trust, &provider)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| fault("TLS", &error))?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
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

fn certificates(pem: &[u8], from: &str) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| fault(from, &error))?;
    if found.is_empty() {
        return Err(fault(from, &"there is no certificate in it"));
    }
    Ok(found)
}

fn verifier(trust: &Trust, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, ConfigError> {
    let (roots, pinned, from) = match trust {
        Trust::Anything => return Ok(Arc::new(Anything(provider.clone()))),
        Trust::Authorities(pem) => authorities(pem)?,
        Trust::Host => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            (roots, Vec::new(), "the host's certificate authorities".to_owned())
        }
    };
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let inner = inner.map_err(|error| fault(&from, &error))?;
    Ok(Arc::new(Trusting { inner, pinned }))
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

/// The usual checks, and one more case: a server that shows the very certificate the kubeconfig names as its authority.
/// webpki refuses it when it is marked as an authority; small clusters are made so, and Go's clients accept them.
#[derive(Debug)]
struct Trusting {
    inner: Arc<WebPkiServerVerifier>,
    pinned: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.inner.verify_server_cert(leaf, chain, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(_)))
                if self.pinned.iter().any(|known| known == leaf) =>
            {
                rustls::client::verify_server_name(&ParsedCertificate::try_from(leaf)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// `insecure-skip-tls-verify: true`: whoever answers is believed.
#[derive(Debug)]
struct Anything(Arc<CryptoProvider>);

impl ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
