//! Tells the service manager that started the daemon how far it is (sd_notify(3)): whatever is ordered after its unit begins when
//! it serves, and not when its program does.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// By this variable a service manager names its socket; where none does, nobody wants to know.
const SOCKET: &str = "NOTIFY_SOCKET";

/// Says that it serves.
pub(super) fn ready() {
    let Some(address) = std::env::var_os(SOCKET) else { return };
    if let Err(error) = send(&address, "READY=1") {
        tracing::warn!(?address, %error, "the service manager cannot be told that the daemon serves");
    }
}

/// An address that begins with "@" is a name without a file.
fn send(address: &OsStr, text: &str) -> io::Result<()> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_manager_hears_it_by_a_file_or_by_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("orlop-test-notify-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        let sockets = [UnixDatagram::bind(&path).unwrap(), UnixDatagram::bind_addr(&by_name).unwrap()];
        for (socket, address) in sockets.iter().zip([path.into_os_string(), format!("@{name}").into()]) {
            send(&address, "READY=1").unwrap();
            let mut heard = [0; 16];
            let length = socket.recv(&mut heard).unwrap();
            assert_eq!(&heard[..length], b"READY=1");
        }
        assert!(send(OsStr::new("/nowhere/notify"), "READY=1").is_err());
    }
}
