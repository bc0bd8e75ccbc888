//! Who a caller is.

use std::io;

use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::der::asn1::ObjectIdentifier;

/// `id-at-commonName` and `id-at-organizationName` (RFC 5280, appendix A.1).
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const ORGANIZATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.10");

/// The group of everybody who has shown credentials.
const AUTHENTICATED: &str = "system:authenticated";

/// A user of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct User {
    /// Name.
    pub name: String,
    /// Unique id, if the authority gave one.
    pub uid: Option<String>,
    /// Groups.
    pub groups: Vec<String>,
    /// What else the authority said.
    pub extra: Vec<(String, Vec<String>)>,
}

impl User {
    /// Somebody without credentials.
    pub fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..Self::default()
        }
    }
}

/// The user of a certificate whose chain has been verified: its common name, in the groups of its organisations.
pub(super) fn of_certificate(der: &[u8]) -> io::Result<User> {
    let broken = |error| io::Error::new(io::ErrorKind::InvalidData, format!("the client's certificate: {error}"));
    let certificate = Certificate::from_der(der).map_err(broken)?;
    let subject = certificate.tbs_certificate().subject();
    let values = |oid| {
        let attributes = subject.iter().filter(move |attribute| attribute.oid == oid);
        attributes.map(|attribute| String::from_utf8_lossy(attribute.value.value()).into_owned())
    };
    let name = values(COMMON_NAME).next().unwrap_or_default();
    if name.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the client's certificate has no common name"));
    }
    let groups = values(ORGANIZATION).chain([AUTHENTICATED.to_owned()]).collect();
    Ok(User { name, groups, ..User::default() })
}

/// The token of an `Authorization` header.
pub(super) fn bearer(headers: &http::HeaderMap) -> Option<&str> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim()).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn certificate(subject: &[(DnType, &str)]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        subject.iter().for_each(|(kind, value)| params.distinguished_name.push(kind.clone(), *value));
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_names_user_and_groups() {
        let der = certificate(&[(DnType::OrganizationName, "system:nodes"), (DnType::CommonName, "system:node:n1")]);
        let user = of_certificate(&der).unwrap();
        assert_eq!(user.name, "system:node:n1");
        assert_eq!(user.groups, ["system:nodes", AUTHENTICATED]);
    }

    #[test]
    fn a_certificate_of_nobody_is_refused() {
        assert!(of_certificate(&certificate(&[(DnType::OrganizationName, "system:masters")])).is_err());
        assert!(of_certificate(b"none").is_err());
    }

    #[test]
    fn tokens_are_bearers() {
        let with = |value: &str| http::HeaderMap::from_iter([(http::header::AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(bearer(&with("Bearer abc")), Some("abc"));
        assert_eq!(bearer(&with("bearer  abc")), Some("abc"));
        for none in ["Basic abc", "Bearer ", "Bearer"] {
            assert_eq!(bearer(&with(none)), None, "{none}");
        }
    }
}
