//! Where certificates are: upstream's names, so that either kubelet finds what the other has left.
//!
//! ```text
//! kubelet-client-2026-11-25-14-03-59.pem                certificate and key
//! kubelet-client-current.pem -> kubelet-client-…pem     replaced in one step
//! ```

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use k8s_openapi::jiff::Timestamp;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;

use super::{CertificateError, Purpose};

/// The files of one purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    dir: PathBuf,
    stem: &'static str,
}

impl Files {
    /// Those in `dir` (`--cert-dir`).
    pub fn new(dir: &Path, purpose: Purpose) -> Self {
        let stem = match purpose {
            Purpose::Client => "kubelet-client",
            Purpose::Serving => "kubelet-server",
        };
        Self { dir: dir.to_owned(), stem }
    }

    /// The certificate with its key that counts.
    pub fn current(&self) -> PathBuf {
        self.dir.join(format!("{}-current.pem", self.stem))
    }

    /// From when to when the certificate that counts holds.
    ///
    /// # Errors
    /// There is none, or none that can be used.
    pub fn validity(&self) -> Result<(Timestamp, Timestamp), CertificateError> {
        validity(&self.current())
    }

    /// Whether there is a certificate that holds now.
    pub fn is_usable(&self) -> bool {
        let now = Timestamp::now();
        self.validity().is_ok_and(|(begins, ends)| begins <= now && now < ends)
    }

    /// Puts a certificate with its key in the place of the one that counts. The one before stays beside it; older ones go.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub(super) fn store(&self, certificate: &str, key: &str, now: Timestamp) -> Result<(), CertificateError> {
        let before = fs::read_link(self.current()).ok();
        let name = format!("{}-{}.pem", self.stem, now.strftime("%Y-%m-%d-%H-%M-%S"));
        let path = self.dir.join(&name);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CertificateError::File { step: "write", path, source }
        };
        fs::create_dir_all(&self.dir).map_err(failed(&self.dir))?;
        write_private(&path, &format!("{}\n{key}", certificate.trim_end())).map_err(failed(&path))?;
        validity(&path)?;
        let next = self.dir.join(format!(".{}-current.pem", self.stem));
        let _ = fs::remove_file(&next); // Of a daemon that was killed here.
        symlink(&name, &next).and_then(|()| fs::rename(&next, self.current())).map_err(failed(&self.current()))?;
        self.remove_all_but(&[Some(Path::new(&name)), before.as_deref().and_then(Path::file_name).map(Path::new)]);
        Ok(())
    }

    fn remove_all_but(&self, kept: &[Option<&Path>]) {
        let current = self.current();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_ours = name.to_string_lossy().starts_with(&format!("{}-", self.stem)) && entry.path() != current;
            if is_ours && !kept.contains(&Some(Path::new(&name))) {
                let _ = fs::remove_file(entry.path()); // It holds nothing that is needed, and is in nobody's way.
            }
        }
    }
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// From when to when the first certificate of a file holds; the file has its key, too.
fn validity(path: &Path) -> Result<(Timestamp, Timestamp), CertificateError> {
    let content = |reason: String| CertificateError::Content { path: path.to_owned(), reason };
    let der = CertificateDer::from_pem_file(path).map_err(|error| content(error.to_string()))?;
    PrivateKeyDer::from_pem_file(path).map_err(|error| content(error.to_string()))?;
    let certificate = Certificate::from_der(&der).map_err(|error| content(error.to_string()))?;
    let validity = certificate.tbs_certificate().validity();
    let at = |time: &x509_cert::time::Time| {
        let second = i64::try_from(time.to_unix_duration().as_secs()).unwrap_or(i64::MAX);
        Timestamp::from_second(second).map_err(|error| content(error.to_string()))
    };
    Ok((at(&validity.not_before)?, at(&validity.not_after)?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair(years: (i32, i32)) -> (String, String) {
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) =
            (rcgen::date_time_ymd(years.0, 1, 1), rcgen::date_time_ymd(years.1, 1, 1));
        let key = KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn the_newest_counts_and_the_one_before_stays() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path(), Purpose::Client);
        assert!(!files.is_usable());
        for second in [0, 10, 20] {
            let (certificate, key) = pair((2020, 2100));
            files.store(&certificate, &key, Timestamp::from_second(second).unwrap()).unwrap();
        }
        assert!(files.is_usable());
        assert_eq!(fs::metadata(files.current()).unwrap().permissions().mode() & 0o777, 0o600);
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(
            names,
            [
                "kubelet-client-1970-01-01-00-00-10.pem",
                "kubelet-client-1970-01-01-00-00-20.pem",
                "kubelet-client-current.pem"
            ]
        );
    }

    #[test]
    fn what_has_ended_is_not_usable() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path(), Purpose::Serving);
        let (certificate, key) = pair((2020, 2021));
        files.store(&certificate, &key, Timestamp::now()).unwrap();
        assert!(!files.is_usable() && files.validity().is_ok());
        let broken = files.store("none", &key, Timestamp::now()).unwrap_err();
        assert!(broken.to_string().contains("holds no certificate"), "{broken}");
    }
}
