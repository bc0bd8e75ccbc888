//! The comparison in the virtual machine, whose kernel has IPVS.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use testkit::go;
use testkit::host::{self, Tool};

use super::{IPTABLES, NFT, ProxyOptions};
use crate::lab::vm::End;
use crate::lab::vm::aboard::{self, Baggage};

/// What kube-proxy's mode ipvs works with beside iptables.
const IPSET: Tool = Tool::new("ipset", "ipset");

/// Where extensions of iptables may be on the host.
const EXTENSIONS: &[&str] =
    &["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/aarch64-linux-gnu/xtables", "/usr/lib64/xtables"];

/// Makes the comparison there, with the same arguments.
pub(super) fn run(options: &ProxyOptions, orlop: &Path) -> anyhow::Result<()> {
    host::install(&[IPTABLES, NFT, IPSET])?;
    let mut baggage = Baggage {
        programs: [go::CONTROL_PLANE, &[go::KUBE_PROXY]].concat(),
        tools: vec!["openssl", "setpriv", "ipset", "iptables", "iptables-save", "iptables-restore"],
        ..Baggage::default()
    };
    baggage.tools.extend(["ip6tables", "ip6tables-save", "ip6tables-restore"]);
    if let Some(extensions) = EXTENSIONS.iter().map(PathBuf::from).find(|directory| directory.is_dir()) {
        baggage.variables.push(("XTABLES_LIBDIR", "/jobs/xtables".to_owned()));
        baggage.files.push(extensions);
    }
    let arguments = format!("conformance proxy --output /run/proxies {}", options.arguments());
    let outcome = aboard::run("proxies", &arguments, orlop, baggage, |line| println!("vm: {line}"))?;
    ensure!(outcome.end == End::Code(0), "the two do not do the same in the machine: {:?}", outcome.end);
    Ok(())
}
