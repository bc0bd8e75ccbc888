//! Ports of the node: who has one that is wanted.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket};

/// How many clients wait to be taken, as the standard library has it.
const BACKLOG: u32 = 1024;

/// An address that nobody else has. Nobody is let in before it is [listened](Self::listen) on.
#[derive(Debug)]
pub(super) struct Reserved {
    socket: TcpSocket,
    address: SocketAddr,
    field: &'static str,
}

impl Reserved {
    /// Takes an address that `field` of the configuration names.
    ///
    /// # Errors
    /// The address cannot be had; who has it is named, if this process may know.
    pub(super) fn take(address: SocketAddr, field: &'static str) -> anyhow::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let bound = socket.and_then(|socket| bind(&socket, address).map(|()| socket));
        let socket = bound.with_context(|| trouble(address, field))?;
        Ok(Self { socket, address, field })
    }

    /// Lets clients in.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn listen(self) -> anyhow::Result<TcpListener> {
        // Connections have it from their listener, and those of this daemon may linger when the next one binds.
        let reusable = self.socket.set_reuseaddr(true);
        let listening = reusable.and_then(|()| self.socket.listen(BACKLOG));
        listening.with_context(|| trouble(self.address, self.field))
    }
}

/// Binds where nobody else is bound, who may not listen yet: with `SO_REUSEADDR` on both sides the kernel lets two do that,
/// and the later one to listen fails (socket(7)). It is needed where connections of a daemon that has ended linger, and is set
/// for that moment alone.
fn bind(socket: &TcpSocket, address: SocketAddr) -> io::Result<()> {
    match socket.bind(address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        done => return done,
    }
    socket.set_reuseaddr(true)?;
    let bound = socket.bind(address);
    socket.set_reuseaddr(false)?;
    bound
}

fn trouble(address: SocketAddr, field: &str) -> String {
    let holder = holder(address.port()).map(|holder| format!("{holder} listens there; ")).unwrap_or_default();
    format!("cannot listen on {address}: {holder}end the other kubelet, or change `{field}`")
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
        let any = "127.0.0.1:0".parse().unwrap();
        let first = Reserved::take(any, "port").unwrap().listen().unwrap();
        let error = Reserved::take(first.local_addr().unwrap(), "port").unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {}) listens there", std::process::id())), "{error}");
        assert!(error.contains("change `port`"), "{error}");
    }

    #[tokio::test]
    async fn what_is_reserved_nobody_else_can_reserve() {
        let first = Reserved::take("127.0.0.1:0".parse().unwrap(), "port").unwrap();
        let address = first.socket.local_addr().unwrap();
        let error = Reserved::take(address, "port").unwrap_err().to_string();
        assert!(error.contains("end the other kubelet, or change `port`"), "{error}");
        first.listen().unwrap();
    }

    #[tokio::test]
    async fn connections_that_linger_keep_nobody_away() {
        let listener = Reserved::take("127.0.0.1:0".parse().unwrap(), "port").unwrap().listen().unwrap();
        let address = listener.local_addr().unwrap();
        let client = tokio::net::TcpStream::connect(address).await.unwrap();
        // The side that ends the connection first keeps it for a minute (TIME_WAIT).
        drop(listener.accept().await.unwrap());
        drop(client);
        drop(listener);
        TcpSocket::new_v4().unwrap().bind(address).expect_err("a connection lingers");
        let next = Reserved::take(address, "port").unwrap();
        Reserved::take(address, "port").expect_err("the next one has it");
        next.listen().unwrap();
    }

    #[tokio::test]
    async fn who_only_reserves_lets_nobody_in() {
        let reserved = Reserved::take("127.0.0.1:0".parse().unwrap(), "port").unwrap();
        let address = reserved.socket.local_addr().unwrap();
        let refused = tokio::net::TcpStream::connect(address).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        let _listener = reserved.listen().unwrap();
        tokio::net::TcpStream::connect(address).await.unwrap();
    }
}
