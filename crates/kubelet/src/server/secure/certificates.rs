//! The serving certificate of the kubelet, and the authority of its callers' certificates.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, SanType};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read or written.
    #[error("cannot {step} {path}")]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{path} holds no {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// The cause.
        source: rustls::pki_types::pem::Error,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// Certificate, key or authority do not go together.
    #[error("certificate and key cannot be used")]
    Use(#[from] rustls::Error),
    /// The authority's certificates cannot be used.
    #[error("the certificates of {path} cannot verify clients")]
    Authority {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rustls::server::VerifierBuilderError,
    },
}

/// A certificate and its key, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The certificate, with those that lead to its authority.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// The pair in `dir` that upstream's kubelet makes for itself, `kubelet.crt` and `kubelet.key`; made if it is not there.
/// It is its own authority: callers cannot verify it, and API servers do not unless they are told to.
///
/// # Errors
/// `dir` cannot be written.
pub fn self_signed(dir: &Path, hostname: &str, addresses: &[IpAddr]) -> Result<Pair, CertificateError> {
    let pair = Pair { certificate: dir.join("kubelet.crt"), key: dir.join("kubelet.key") };
    if pair.certificate.exists() && pair.key.exists() {
        return Ok(pair);
    }
    let mut params = CertificateParams::new(vec![hostname.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, format!("{hostname}@orlop"));
    params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::File { step: "write", path, source }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    write_private(&pair.key, &key.serialize_pem()).map_err(failed(&pair.key))?;
    fs::write(&pair.certificate, certificate.pem()).map_err(failed(&pair.certificate))?;
    Ok(pair)
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// The certificate that the server shows at the moment: it may be replaced while the server runs.
#[derive(Debug)]
pub struct Shown(RwLock<Arc<CertifiedKey>>);

impl Shown {
    /// Shows this pair.
    ///
    /// # Errors
    /// Files that cannot be read or do not go together.
    pub fn new(pair: &Pair) -> Result<Arc<Self>, CertificateError> {
        Ok(Arc::new(Self(RwLock::new(certified(pair)?))))
    }

    /// Shows another pair from the next connection on.
    ///
    /// # Errors
    /// As [`Shown::new`]; the old one is shown on then.
    pub fn replace(&self, pair: &Pair) -> Result<(), CertificateError> {
        let certified = certified(pair)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = certified;
        Ok(())
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn certified(pair: &Pair) -> Result<Arc<CertifiedKey>, CertificateError> {
    let key = PrivateKeyDer::from_pem_file(&pair.key);
    let key = key.map_err(|source| content(&pair.key, "private key", source))?;
    let provider = rustls::crypto::ring::default_provider();
    Ok(Arc::new(CertifiedKey::from_der(certificates(&pair.certificate)?, key, &provider)?))
}

/// The server's side of TLS: `shown` serves, and clients may show certificates that lead to one of `client_ca`
/// (`authentication.x509.clientCAFile`).
///
/// # Errors
/// An authority that cannot be read.
pub fn server_config(
    shown: Arc<Shown>,
    client_ca: Option<&Path>,
) -> Result<Arc<rustls::ServerConfig>, CertificateError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        rustls::ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add_parsable_certificates(certificates(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).allow_unauthenticated();
            let verifier = verifier.build();
            let failed = |source| CertificateError::Authority { path: path.to_owned(), source };
            builder.with_client_cert_verifier(verifier.map_err(failed)?)
        }
    };
    let mut config = builder.with_cert_resolver(shown);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read =
        read.and_then(|all| if all.is_empty() { Err(rustls::pki_types::pem::Error::NoItemsFound) } else { Ok(all) });
    read.map_err(|source| content(path, "certificate", source))
}

fn content(path: &Path, what: &'static str, source: rustls::pki_types::pem::Error) -> CertificateError {
    match source {
        rustls::pki_types::pem::Error::Io(source) => {
            CertificateError::File { step: "read", path: path.to_owned(), source }
        }
        source => CertificateError::Content { path: path.to_owned(), what, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_pair_is_made_once_and_serves() {
        let dir = tempfile::tempdir().unwrap();
        let address = [IpAddr::from([192, 0, 2, 7])];
        let pair = self_signed(&dir.path().join("pki"), "n1", &address).unwrap();
        assert_eq!(fs::metadata(&pair.key).unwrap().permissions().mode() & 0o777, 0o600);
        let before = fs::read(&pair.certificate).unwrap();
        assert_eq!(self_signed(&dir.path().join("pki"), "n1", &address).unwrap(), pair);
        assert_eq!(fs::read(&pair.certificate).unwrap(), before);
        server_config(Shown::new(&pair).unwrap(), Some(&pair.certificate)).unwrap();
    }

    #[test]
    fn files_at_fault_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let pair = self_signed(dir.path(), "n1", &[]).unwrap();
        let shown = Shown::new(&pair).unwrap();
        let missing = server_config(shown.clone(), Some(Path::new("/not/there"))).unwrap_err();
        assert!(missing.to_string().contains("/not/there"), "{missing}");
        fs::write(&pair.certificate, "nothing").unwrap();
        let broken = shown.replace(&pair).unwrap_err();
        assert!(broken.to_string().contains("kubelet.crt holds no certificate"), "{broken}");
    }
}
