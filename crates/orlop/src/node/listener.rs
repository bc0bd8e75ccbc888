//! Ports of the node: who has one that is wanted.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use tokio::net::TcpListener;

/// Listens on an address that `field` of the configuration names.
///
/// # Errors
/// The address cannot be had; who has it is named, if this process may know.
pub(super) async fn listen(address: SocketAddr, field: &str) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.with_context(|| {
        let holder = holder(address.port()).map(|holder| format!("{holder} listens there; ")).unwrap_or_default();
        format!("cannot listen on {address}: {holder}end the other kubelet, or change `{field}`")
    })
}

/// The process that listens on a port of TCP in this network namespace: its program and its id.
fn holder(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let socket = tables.iter().flat_map(|table| table.lines()).find_map(|line| socket_of(line, port))?;
    let is_number = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let mut processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let process = processes
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_number) && has(path, &socket))?;
    let program = fs::read_to_string(process.join("comm")).ok()?;
    Some(format!("{} (pid {})", program.trim(), process.file_name()?.display()))
}

/// The link by which a process has the socket of this line (proc_pid_net(5)), if that listens on the port.
fn socket_of(line: &str, port: u16) -> Option<String> {
    /// `TCP_LISTEN`, as the kernel's tables have it.
    const LISTENS: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
    let (_, number) = local.rsplit_once(':')?;
    let is_it = u16::from_str_radix(number, 16) == Ok(port) && *state == LISTENS;
    is_it.then(|| format!("socket:[{inode}]"))
}

/// Whether a process has a descriptor that leads there.
fn has(process: &Path, link: &str) -> bool {
    let mut descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    descriptors.any(|descriptor| fs::read_link(descriptor.path()).is_ok_and(|to| to == Path::new(link)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_is_told_who_the_first_is() {
        let first = listen("127.0.0.1:0".parse().unwrap(), "port").await.unwrap();
        let error = listen(first.local_addr().unwrap(), "port").await.unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {}) listens there", std::process::id())), "{error}");
        assert!(error.contains("change `port`"), "{error}");
    }
}
