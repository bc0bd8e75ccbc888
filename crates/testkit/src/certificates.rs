//! Certificates for tests, made by `openssl`.

use std::path::{Path, PathBuf};
use std::process::Command;

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
    let mut command = new_key(&pair, name);
    command.args(["-x509", "-days", "30", "-out"]).arg(&pair.certificate);
    command.args(["-addext", "basicConstraints=critical,CA:TRUE", "-addext", &alternative_name(host)]);
    host::run(&mut command)?;
    Ok(pair)
}

/// A certificate for `host` that `authority` has signed; good for servers and clients.
///
/// # Errors
/// `openssl` is missing or too old.
pub fn signed(dir: &Path, name: &str, host: &str, authority: &Pair) -> anyhow::Result<Pair> {
    let pair = Pair::at(dir, name);
    let request = dir.join(format!("{name}.csr"));
    host::run(new_key(&pair, name).arg("-out").arg(&request))?;
    let extensions = dir.join(format!("{name}.ext"));
    let text =
        format!("basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n{}\n", alternative_name(host));
    std::fs::write(&extensions, text)?;
    let mut sign = Command::new(TOOL.program);
    sign.args(["x509", "-req", "-days", "30", "-CAcreateserial", "-in"]).arg(&request);
    sign.arg("-CA").arg(&authority.certificate).arg("-CAkey").arg(&authority.key);
    sign.arg("-extfile").arg(&extensions).arg("-out").arg(&pair.certificate);
    host::run(&mut sign)?;
    Ok(pair)
}

fn new_key(pair: &Pair, name: &str) -> Command {
    let mut command = Command::new(TOOL.program);
    command.args(["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj"]);
    command.arg(format!("/CN={name}")).arg("-keyout").arg(&pair.key);
    command
}

fn alternative_name(host: &str) -> String {
    let kind = if host.parse::<std::net::IpAddr>().is_ok() { "IP" } else { "DNS" };
    format!("subjectAltName={kind}:{host}")
}
