//! Where a bus is (D-Bus Specification, "Server Addresses").

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::PathBuf;

/// Where a bus is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Path(PathBuf),
    /// One that is none.
    Abstract(Vec<u8>),
}

impl Address {
    /// Those of a text as `DBUS_SESSION_BUS_ADDRESS` has it that are sockets of this machine, in the order in which they are
    /// to be tried.
    pub fn parse(text: &str) -> Vec<Self> {
        text.split(';').filter_map(Self::parse_one).collect()
    }

    fn parse_one(text: &str) -> Option<Self> {
        let pairs = text.strip_prefix("unix:")?.split(',').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find_map(|(key, value)| match key {
            "path" => Some(Self::Path(std::ffi::OsString::from_vec(unescaped(value)?).into())),
            "abstract" => Some(Self::Abstract(unescaped(value)?)),
            _ => None,
        })
    }

    /// A connection to it.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Self::Path(path) => UnixStream::connect(path),
            Self::Abstract(name) => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?),
        }
    }
}

/// Bytes that are not letters, digits or `-_/.\*` are written `%xx`.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        if *first != b'%' {
            bytes.push(*first);
            rest = after;
            continue;
        }
        let digits = std::str::from_utf8(after.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &after[2..];
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_this_machine_are_found_in_addresses() {
        let path = |path: &str| Address::Path(path.into());
        assert_eq!(Address::parse("unix:path=/run/user/7/bus,guid=1"), [path("/run/user/7/bus")]);
        assert_eq!(
            Address::parse("tcp:host=x;unix:guid=1,abstract=/tmp/a;unix:path=/a%20b%2c"),
            [Address::Abstract(b"/tmp/a".to_vec()), path("/a b,")]
        );
        for none in ["", "unix:", "unix:path", "unix:path=%", "unix:path=%zz"] {
            assert_eq!(Address::parse(none), [], "{none}");
        }
    }
}
