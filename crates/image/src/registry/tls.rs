//! TLS settings of registry hosts.

use std::fs;
use std::io;
use std::path::Path;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::hosts::Tls;

/// Reads the certificates that `settings` names; a fault names the file.
pub(crate) fn client_config(settings: &Tls) -> io::Result<ClientConfig> {
    let builder = trust::client(verifier(settings)?).map_err(io::Error::other)?;
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

fn verifier(settings: &Tls) -> io::Result<trust::Verifier> {
    if settings.skip_verify {
        return Ok(trust::anything()); // What is served is still checked by digest.
    }
    let (roots, pinned) = roots(settings)?;
    trust::authorities(roots, pinned).map_err(io::Error::other)
}

fn roots(settings: &Tls) -> io::Result<(RootCertStore, Vec<CertificateDer<'static>>)> {
    // A host without a readable trust store still reaches registries whose authority hosts.toml names.
    let mut roots = trust::of_the_host();
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
    let text = fs::read(file).map_err(|e| in_file(file, &e))?;
    trust::certificates(&text).map_err(|error| match error {
        pem::Error::NoItemsFound => in_file(file, &"it has no certificate"),
        error => in_file(file, &error),
    })
}

fn in_file(file: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", file.display()))
}
