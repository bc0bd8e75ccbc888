//! TLS settings of registry hosts.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::hosts::Tls;

/// Reads the certificates that `settings` names; a fault names the file.
pub(crate) fn client_config(settings: &Tls) -> io::Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = verifier(settings, &provider)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    // rustls offers one pair; the first that can be read is it, as most files have one.
    match settings.clients.first() {
        None => Ok(builder.with_no_client_auth()),
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let key_file = key.as_deref().unwrap_or(certificate);
            let key = PrivateKeyDer::from_pem_file(key_file).map_err(|e| in_file(key_file, &e))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| in_file(certificate, &e))
        }
    }
}

fn verifier(settings: &Tls, provider: &Arc<CryptoProvider>) -> io::Result<Arc<dyn ServerCertVerifier>> {
    if settings.skip_verify {
        return Ok(Arc::new(Anything(Arc::clone(provider))));
    }
    let (roots, pinned) = roots(settings)?;
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
    Ok(Arc::new(Trusting { inner: inner.map_err(io::Error::other)?, pinned }))
}

fn roots(settings: &Tls) -> io::Result<(RootCertStore, Vec<CertificateDer<'static>>)> {
    let mut roots = RootCertStore::empty();
    // A host without a readable trust store still reaches registries whose authority hosts.toml names.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let mut pinned = Vec::new();
    for file in &settings.authorities {
        for certificate in certificates(file)? {
            roots.add(certificate.clone()).map_err(|e| in_file(file, &e))?;
            pinned.push(certificate);
        }
    }
    Ok((roots, pinned))
}

fn certificates(file: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let pem = fs::read(file).map_err(|e| in_file(file, &e))?;
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|e| in_file(file, &e))?;
    if found.is_empty() {
        return Err(in_file(file, &"it has no certificate"));
    }
    Ok(found)
}

fn in_file(file: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", file.display()))
}

/// The usual checks, and one more case: a server that shows the very certificate the operator has named as its
/// authority. webpki refuses it when it is marked as an authority; people make such certificates for one registry.
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

/// `skip_verify = true`, and loopback: whoever answers is believed. What it serves is still checked by digest.
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
