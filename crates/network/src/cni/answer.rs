//! What plugins answer: results and errors.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::Dns;

/// The parts of a result that we read. Versions 0.3.0 to 1.1.0 differ only in what we do not.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Success {
    interfaces: Vec<Interface>,
    ips: Vec<Ip>,
    dns: Dns,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Interface {
    name: String,
    sandbox: String,
}

#[derive(Debug, Deserialize)]
struct Ip {
    address: IpNet,
    #[serde(default)]
    interface: Option<usize>,
}

/// What a pod has after all plugins have been called.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// IPv4 first, as with containerd; otherwise in the plugins' order.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) dns: Option<Dns>,
}

/// Reads the result of the last plugin.
///
/// # Errors
/// It is none, or the pod has no address on `interface`.
pub(crate) fn addresses(result: &Value, interface: &str) -> Result<Addresses, String> {
    let mut result = result.clone();
    if let Value::Object(fields) = &mut result {
        fields.retain(|_, value| !value.is_null()); // Go writes an empty list in this way.
    }
    let success: Success =
        serde_json::from_value(result).map_err(|error| format!("its answer is no CNI result: {error}"))?;
    let is_ours = |ip: &Ip| match ip.interface {
        None => true,
        Some(index) => {
            success.interfaces.get(index).is_some_and(|other| other.name == interface && !other.sandbox.is_empty())
        }
    };
    let mut ips: Vec<IpAddr> = success.ips.iter().filter(|ip| is_ours(ip)).map(|ip| ip.address.addr()).collect();
    ips.sort_by_key(IpAddr::is_ipv6);
    if ips.is_empty() {
        return Err(format!("it gave the pod no address on {interface}"));
    }
    Ok(Addresses { ips, dns: (success.dns != Dns::default()).then_some(success.dns) })
}

/// A plugin's account of its failure.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Failure {
    code: u32,
    msg: String,
    details: String,
}

/// What a plugin that failed said, in one line.
pub(crate) fn failure(status: &str, stdout: &[u8], stderr: &[u8]) -> String {
    let said: Option<Failure> = serde_json::from_slice(stdout).ok();
    if let Some(Failure { code, msg, details }) = said.filter(|failure| !failure.msg.is_empty()) {
        let details = if details.is_empty() { details } else { format!("; {details}") };
        return format!("{msg}{details} (code {code})");
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match [text(stderr), text(stdout)].into_iter().find(|text| !text.is_empty()) {
        Some(text) => format!("{status}: {}", tail(&text)),
        None => format!("{status} without a message"),
    }
}

/// The end of a text, where programs say why they ended.
fn tail(text: &str) -> &str {
    const MOST: usize = 1024;
    let from = text.len().saturating_sub(MOST);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[from..]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ips(result: Value) -> Result<Vec<String>, String> {
        addresses(&result, "eth0").map(|found| found.ips.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn addresses_of_every_version() {
        let interfaces = json!([{"name": "br0"}, {"name": "eth0", "sandbox": "/x"}, {"name": "net1", "sandbox": "/x"}]);
        let old = json!({"cniVersion": "0.3.1", "interfaces": interfaces, "ips": [
            {"version": "4", "address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 1}]});
        assert_eq!(ips(old).unwrap(), ["10.0.0.2"]);
        let dual = json!({"cniVersion": "1.1.0", "interfaces": interfaces, "ips": [
            {"address": "fd00::2/64", "interface": 1}, {"address": "10.0.0.2/24", "interface": 1},
            {"address": "10.9.0.2/24", "interface": 2}, {"address": "10.0.0.1/24", "interface": 0}]});
        assert_eq!(ips(dual).unwrap(), ["10.0.0.2", "fd00::2"], "IPv4 first, eth0 only");
        assert_eq!(ips(json!({"interfaces": null, "ips": [{"address": "10.0.0.2/24"}]})).unwrap(), ["10.0.0.2"]);
    }

    #[test]
    fn what_is_no_result_is_said() {
        assert_eq!(ips(json!({})).unwrap_err(), "it gave the pod no address on eth0");
        assert!(ips(json!({"ips": [{"address": "x"}]})).unwrap_err().starts_with("its answer is no CNI result"));
        assert!(ips(json!({"ips": [{"address": "10.0.0.2/24", "interface": 7}]})).is_err());
        assert!(ips(json!("text")).is_err());
    }

    #[test]
    fn failures_are_told_in_the_plugins_words() {
        let json = br#"{"cniVersion":"1.0.0","code":11,"msg":"no addresses","details":"range is full"}"#;
        assert_eq!(failure("exit status 1", json, b"log"), "no addresses; range is full (code 11)");
        assert_eq!(failure("exit status 1", b"", b" panic: x\n"), "exit status 1: panic: x");
        assert_eq!(failure("signal 9", b"{}", b""), "signal 9: {}");
        assert_eq!(failure("exit status 1", b"", b""), "exit status 1 without a message");
        assert!(failure("x", b"", "ä".repeat(5000).as_bytes()).len() < 1100);
    }
}
