//! Which resolvers the host uses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

const PORT: u16 = 53;
/// More than the C library reads; a longer list only makes failures slow.
const SERVERS_MAX: usize = 4;
/// systemd-resolved on this host.
const STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));

/// The name servers of a text in the format of resolv.conf(5). `index_of` tells the number of an interface.
pub(super) fn parse(text: &str, index_of: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let value = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().map(str::to_owned)).flatten()
    };
    text.lines().filter_map(value).filter_map(|server| address(&server, &index_of)).take(SERVERS_MAX).collect()
}

fn address(text: &str, index_of: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let Some((host, interface)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, PORT));
    };
    let host: Ipv6Addr = host.parse().ok()?;
    let scope = interface.parse().ok().or_else(|| index_of(interface))?;
    Some(SocketAddrV6::new(host, PORT, 0, scope).into())
}

/// Whether all of them are the local stub of systemd-resolved, whose own servers stand in another file.
pub(super) fn is_stub(servers: &[SocketAddr]) -> bool {
    !servers.is_empty() && servers.iter().all(|server| server.ip() == STUB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_resolvers_read() {
        let text = "# made by hand\nsearch example.com\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # second\n\
                    nameserver fe80::1%eth0\nnameserver fe80::2%gone\nnameserver x\nnameserver\noptions ndots:1\n";
        let servers = parse(text, |name| (name == "eth0").then_some(7));
        let shown: Vec<String> = servers.iter().map(SocketAddr::to_string).collect();
        assert_eq!(shown, ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%7]:53"]);
        assert_eq!(parse(&"nameserver 192.0.2.1\n".repeat(9), |_| None).len(), SERVERS_MAX);
    }

    #[test]
    fn the_stub_is_recognised() {
        let servers = |text| parse(text, |_| None);
        assert!(is_stub(&servers("nameserver 127.0.0.53\n")));
        assert!(!is_stub(&servers("nameserver 127.0.0.53\nnameserver 192.0.2.1\n")));
        assert!(!is_stub(&servers("")));
    }
}
