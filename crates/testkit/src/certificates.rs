//! Certificates for tests, made by `openssl`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::host::{self, Tool};

/// What makes them.
pub const TOOL: Tool = Tool::new("openssl", "openssl");

/// A certificate and its key, as PEM files.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Pair {
    fn at(dir: &Path, name: &str) -> Self {
        Self { certificate: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) }
    }
}

/// A certificate that is its own authority, for the address or name `host`: what people make for one registry.
///
/// # Errors
/// `openssl` is missing or too old.
pub fn self_signed(dir: &Path, name: &str, host: &str) -> anyhow::Result<Pair> {
    let pair = Pair::at(dir, name);
    let mut command = new_key(&pair, &Subject { name, ..Subject::default() });
    command.args(["-x509", "-days", "30", "-out"]).arg(&pair.certificate);
    command.args(["-addext", "basicConstraints=critical,CA:TRUE", "-addext", &alternative_names(&[host])]);
    host::run(&mut command)?;
    Ok(pair)
}

/// Whom a certificate speaks of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Subject<'a> {
    /// The common name: a user, for Kubernetes.
    pub name: &'a str,
    /// The organisations: the user's groups.
    pub organisations: &'a [&'a str],
    /// The addresses and names of a server.
    pub hosts: &'a [&'a str],
}

impl Subject<'_> {
    fn distinguished_name(&self) -> String {
        let organisations = self.organisations.iter().map(|organisation| format!("/O={organisation}"));
        organisations.chain([format!("/CN={}", self.name)]).collect()
    }
}

/// An authority that signs others' certificates.
///
/// # Errors
/// `openssl` is missing or too old.
pub fn authority(dir: &Path, name: &str) -> anyhow::Result<Pair> {
    let pair = Pair::at(dir, name);
    let mut command = new_key(&pair, &Subject { name, ..Subject::default() });
    command.args(["-x509", "-days", "30", "-out"]).arg(&pair.certificate);
    command.args(["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
    host::run(&mut command)?;
    Ok(pair)
}

/// A certificate for `host` that `authority` has signed; good for servers and clients.
///
/// # Errors
/// `openssl` is missing or too old.
pub fn signed(dir: &Path, name: &str, host: &str, authority: &Pair) -> anyhow::Result<Pair> {
    issue(dir, name, &Subject { name, hosts: &[host], ..Subject::default() }, authority)
}

/// A certificate in the files `file`.crt and .key that `authority` has signed; good for servers and clients.
///
/// # Errors
/// As [`signed`].
pub fn issue(dir: &Path, file: &str, subject: &Subject<'_>, authority: &Pair) -> anyhow::Result<Pair> {
    let pair = Pair::at(dir, file);
    let request = dir.join(format!("{file}.csr"));
    host::run(new_key(&pair, subject).arg("-out").arg(&request))?;
    let extensions = dir.join(format!("{file}.ext"));
    let mut text = "basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n".to_owned();
    if !subject.hosts.is_empty() {
        text += &format!("{}\n", alternative_names(subject.hosts));
    }
    std::fs::write(&extensions, text)?;
    let mut sign = Command::new(TOOL.program);
    sign.args(["x509", "-req", "-days", "30", "-CAcreateserial", "-in"]).arg(&request);
    sign.arg("-CA").arg(&authority.certificate).arg("-CAkey").arg(&authority.key);
    sign.arg("-extfile").arg(&extensions).arg("-out").arg(&pair.certificate);
    host::run(&mut sign)?;
    Ok(pair)
}

/// As [`issue`], from `from` until `until`, as openssl-ca(1) writes times (`date +%Y%m%d%H%M%SZ`).
///
/// # Errors
/// As [`signed`].
pub fn issue_for(
    dir: &Path,
    file: &str,
    subject: &Subject<'_>,
    [from, until]: [&str; 2],
    authority: &Pair,
) -> anyhow::Result<Pair> {
    let pair = Pair::at(dir, file);
    let at = |end: &str| dir.join(format!("{file}.{end}"));
    host::run(new_key(&pair, subject).arg("-out").arg(at("csr")))?;
    std::fs::write(at("index"), "")?;
    let mut text = format!(
        "[ca]\ndefault_ca=own\n[own]\ndatabase={}\nrand_serial=yes\ndefault_md=sha256\npolicy=any\nx509_extensions=leaf\n\
         unique_subject=no\nnew_certs_dir={}\n[any]\norganizationName=optional\ncommonName=supplied\n[leaf]\n\
         basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n",
        at("index").display(),
        dir.display(),
    );
    if !subject.hosts.is_empty() {
        text += &format!("{}\n", alternative_names(subject.hosts));
    }
    std::fs::write(at("cnf"), text)?;
    let mut sign = Command::new(TOOL.program);
    sign.args(["ca", "-batch", "-notext", "-preserveDN", "-startdate", from, "-enddate", until, "-config"]);
    sign.arg(at("cnf")).arg("-in").arg(at("csr")).arg("-cert").arg(&authority.certificate);
    sign.arg("-keyfile").arg(&authority.key).arg("-out").arg(&pair.certificate);
    host::run(&mut sign)?;
    Ok(pair)
}

/// A certificate for whoever made the request, which is DER in base64; for a day, with this alternative name. Returns the
/// certificate, and from when until when it holds, as RFC 3339 has it.
///
/// # Errors
/// `openssl` is missing or too old, or the request is none.
pub fn certify(dir: &Path, request: &str, host: &str, authority: &Pair) -> anyhow::Result<(String, [String; 2])> {
    let file = |end: &str| dir.join(format!("{host}.{end}"));
    std::fs::write(file("b64"), request)?;
    let mut decode = Command::new(TOOL.program);
    decode.args(["base64", "-d", "-A", "-in"]).arg(file("b64")).arg("-out").arg(file("der"));
    host::run(&mut decode)?;
    std::fs::write(file("ext"), format!("{}\n", alternative_names(&[host])))?;
    let mut sign = Command::new(TOOL.program);
    sign.args(["x509", "-req", "-inform", "DER", "-days", "1", "-CAcreateserial", "-in"]).arg(file("der"));
    sign.arg("-CA").arg(&authority.certificate).arg("-CAkey").arg(&authority.key);
    sign.arg("-extfile").arg(file("ext")).arg("-out").arg(file("crt"));
    host::run(&mut sign)?;
    let mut tell = Command::new(TOOL.program);
    tell.args(["x509", "-noout", "-startdate", "-enddate", "-dateopt", "iso_8601", "-in"]).arg(file("crt"));
    let told = String::from_utf8(host::output(&mut tell)?)?;
    let mut times = told.lines().filter_map(|line| Some(line.split_once('=')?.1.replacen(' ', "T", 1)));
    let mut time = || times.next().context("openssl tells when it begins and ends");
    Ok((std::fs::read_to_string(file("crt"))?, [time()?, time()?]))
}

fn new_key(pair: &Pair, subject: &Subject<'_>) -> Command {
    let mut command = Command::new(TOOL.program);
    command.args(["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj"]);
    command.arg(subject.distinguished_name()).arg("-keyout").arg(&pair.key);
    command
}

fn alternative_names(hosts: &[&str]) -> String {
    let kind = |host: &str| if host.parse::<std::net::IpAddr>().is_ok() { "IP" } else { "DNS" };
    let names: Vec<String> = hosts.iter().map(|host| format!("{}:{host}", kind(host))).collect();
    format!("subjectAltName={}", names.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_names_user_groups_and_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let authority = authority(dir.path(), "ca").unwrap();
        let subject = Subject {
            name: "system:node:a",
            organisations: &["system:nodes", "x"],
            hosts: &["127.0.0.1", "a.example"],
        };
        let pair = issue(dir.path(), "node", &subject, &authority).unwrap();
        let mut show = Command::new(TOOL.program);
        show.args(["x509", "-noout", "-subject", "-nameopt", "RFC2253", "-ext", "subjectAltName", "-in"])
            .arg(&pair.certificate);
        let text = String::from_utf8(host::output(&mut show).unwrap()).unwrap();
        assert!(text.contains("CN=system:node:a,O=x,O=system:nodes"), "{text}");
        assert!(text.contains("IP Address:127.0.0.1, DNS:a.example"), "{text}");
        let mut verify = Command::new(TOOL.program);
        host::run(verify.arg("verify").arg("-CAfile").arg(&authority.certificate).arg(&pair.certificate)).unwrap();
    }

    #[test]
    fn a_certificate_holds_for_as_long_as_it_is_to() {
        let dir = tempfile::tempdir().unwrap();
        let authority = authority(dir.path(), "ca").unwrap();
        let subject = Subject { name: "system:node:a", organisations: &["system:nodes"], hosts: &["127.0.0.1"] };
        let times = ["20260102030405Z", "20260102030505Z"];
        let pair = issue_for(dir.path(), "node", &subject, times, &authority).unwrap();
        let mut show = Command::new(TOOL.program);
        show.args(["x509", "-noout", "-subject", "-nameopt", "RFC2253", "-dates", "-ext", "subjectAltName", "-in"])
            .arg(&pair.certificate);
        let text = String::from_utf8(host::output(&mut show).unwrap()).unwrap();
        for part in ["CN=system:node:a,O=system:nodes", "Jan  2 03:04:05 2026", "Jan  2 03:05:05 2026", "127.0.0.1"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
