//! IPVS, the kernel's load balancer of layer 4: virtual services and their servers, over generic netlink.
//!
//! Names and numbers are those of `linux/ip_vs.h`; what the kernel reads of them is in net/netfilter/ipvs/ip_vs_ctl.c.
//! IPv4 and IPv6 are alike. Servers are reached by translation of addresses (`masquerading` in the kernel's words), the
//! only way that leaves them any port. Everything belongs to one network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::generic::{HEADER_BYTES, header};
use super::{ACK, Attributes, DUMP, Message, Result, Socket, Writer};

/// `IPVS_GENL_NAME`, `IPVS_GENL_VERSION`.
const FAMILY: &str = "IPVS";
const VERSION: u8 = 1;

const CMD_NEW_SERVICE: u8 = 1;
const CMD_SET_SERVICE: u8 = 2;
const CMD_DEL_SERVICE: u8 = 3;
const CMD_GET_SERVICE: u8 = 4;
const CMD_NEW_DEST: u8 = 5;
const CMD_SET_DEST: u8 = 6;
const CMD_DEL_DEST: u8 = 7;
const CMD_GET_DEST: u8 = 8;
const CMD_SET_CONFIG: u8 = 12;
const CMD_GET_CONFIG: u8 = 13;
const CMD_GET_INFO: u8 = 15;
const CMD_FLUSH: u8 = 17;

const ATTR_SERVICE: u16 = 1;
const ATTR_DEST: u16 = 2;
const ATTR_TIMEOUT_TCP: u16 = 4;
const ATTR_TIMEOUT_TCP_FIN: u16 = 5;
const ATTR_TIMEOUT_UDP: u16 = 6;

const SVC_AF: u16 = 1;
const SVC_PROTOCOL: u16 = 2;
const SVC_ADDR: u16 = 3;
const SVC_PORT: u16 = 4;
const SVC_FWMARK: u16 = 5;
const SVC_SCHED_NAME: u16 = 6;
const SVC_FLAGS: u16 = 7;
const SVC_TIMEOUT: u16 = 8;
const SVC_NETMASK: u16 = 9;

const DEST_ADDR: u16 = 1;
const DEST_PORT: u16 = 2;
const DEST_FWD_METHOD: u16 = 3;
const DEST_WEIGHT: u16 = 4;
const DEST_U_THRESH: u16 = 5;
const DEST_L_THRESH: u16 = 6;
const DEST_ACTIVE_CONNS: u16 = 7;
const DEST_INACT_CONNS: u16 = 8;
const DEST_PERSIST_CONNS: u16 = 9;
const DEST_ADDR_FAMILY: u16 = 11;

const INFO_VERSION: u16 = 1;
const INFO_CONN_TAB_SIZE: u16 = 2;

/// `IP_VS_CONN_F_MASQ`: translation of addresses.
const FORWARD_BY_TRANSLATION: u32 = 0;
/// Addresses of either family are sent as `union nf_inet_addr`.
const ADDRESS_BYTES: usize = 16;
/// Flags that the kernel sets itself (`IP_VS_SVC_F_HASHED`).
const FLAG_HASHED: u32 = 0x2;
/// Messages that are written out at once.
const COMMANDS_AT_ONCE: usize = 512;
/// How often a listing that never rests is read anew.
const READINGS: usize = 8;

/// A client gets the server that it had (`IP_VS_SVC_F_PERSISTENT`).
pub const PERSISTENT: u32 = 0x1;
/// For schedulers that hash: the client's port counts, too (`IP_VS_SVC_F_SCHED_SH_PORT`, `IP_VS_SVC_F_SCHED_MH_PORT`).
pub const HASH_PORT: u32 = 0x10;

/// Where clients of a virtual service connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Virtual {
    /// Its address.
    pub address: IpAddr,
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
    /// Its port.
    pub port: u16,
}

/// How a virtual service chooses servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of the scheduler, as `ipvsadm` has it: `rr`. At most 15 letters.
    pub scheduler: String,
    /// [`PERSISTENT`], [`HASH_PORT`].
    pub flags: u32,
    /// How long a persistent client is remembered, in seconds; the kernel counts in them.
    pub timeout_s: u32,
}

/// A server behind a virtual service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Server {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// What the kernel says of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerStatus {
    /// Which.
    pub server: Server,
    /// Its share of new connections; at 0 it gets none and keeps those it has.
    pub weight: u32,
    /// Connections that are established.
    pub active: u32,
    /// Connections in other states, as those that have been closed a while ago.
    pub inactive: u32,
    /// Clients that are remembered.
    pub persistent: u32,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Makes a virtual service. One that exists is refused with `EEXIST`; a scheduler that the kernel has not, with `ENOENT`.
    AddService(Virtual, Settings),
    /// Changes how a virtual service chooses.
    SetService(Virtual, Settings),
    /// Removes a virtual service with its servers. One that does not exist is refused with `ESRCH`.
    DeleteService(Virtual),
    /// Adds a server with a weight. One that exists is refused with `EEXIST`.
    AddServer(Virtual, Server, u32),
    /// Changes the weight of a server. One that does not exist is refused with `ENOENT`.
    SetServer(Virtual, Server, u32),
    /// Removes a server.
    DeleteServer(Virtual, Server),
    /// Removes all virtual services of the network namespace.
    Flush,
}

/// Idle times after which connections are forgotten, in seconds; 0 leaves what is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Of established TCP connections.
    pub tcp_s: u32,
    /// Of TCP connections after a FIN.
    pub tcp_fin_s: u32,
    /// Of UDP flows.
    pub udp_s: u32,
}

/// What the kernel says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Version: major, minor, patch.
    pub version: (u8, u8, u8),
    /// Buckets of the table of connections.
    pub table_size: u32,
}

/// IPVS of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Ipvs {
    socket: Socket,
    family: u16,
}

impl Ipvs {
    /// Opens it; the kernel loads its module when it is allowed to.
    ///
    /// # Errors
    /// `ENOENT`: the kernel has no IPVS.
    pub fn open() -> Result<Ipvs> {
        let mut socket = Socket::generic()?;
        let family = socket.family(FAMILY)?;
        Ok(Ipvs { socket, family })
    }

    /// What the kernel says of itself.
    ///
    /// # Errors
    /// The kernel refused (CAP_NET_ADMIN is needed, as for everything here).
    pub fn info(&mut self) -> Result<Info> {
        let mut info = Info { version: (0, 0, 0), table_size: 0 };
        let request = self.ask(CMD_GET_INFO, ACK, |_| ());
        self.socket.list(&request, |message| info = parse_info(message))?;
        Ok(info)
    }

    /// All virtual services; those of firewall marks are left out.
    ///
    /// The kernel counts its place in the table of all network namespaces (`ip_vs_genl_dump_services`), so a listing passes
    /// over some when others vanish meanwhile. It is read until two readings are alike; one that never rests is taken as it is.
    ///
    /// # Errors
    /// See [`Socket::collect`].
    pub fn services(&mut self) -> Result<Vec<(Virtual, Settings)>> {
        let mut services = self.read_services()?;
        for _ in 0..READINGS {
            let again = self.read_services()?;
            if again == services {
                break;
            }
            services = again;
        }
        Ok(services)
    }

    fn read_services(&mut self) -> Result<Vec<(Virtual, Settings)>> {
        let request = self.ask(CMD_GET_SERVICE, DUMP, |_| ());
        self.socket.collect(&request, parse_service)
    }

    /// The servers of a virtual service; none if it does not exist.
    ///
    /// # Errors
    /// See [`Socket::collect`].
    pub fn servers(&mut self, service: &Virtual) -> Result<Vec<ServerStatus>> {
        let request = self.ask(CMD_GET_DEST, DUMP, |w| w.nest(ATTR_SERVICE, |w| write_virtual(w, service)));
        self.socket.collect(&request, |message| parse_server(message, service))
    }

    /// Makes changes one after the other. Each is tried, also after one that failed.
    ///
    /// # Errors
    /// The first refusal.
    pub fn apply(&mut self, commands: &[Command]) -> Result<()> {
        let mut outcome = Ok(());
        for some in commands.chunks(COMMANDS_AT_ONCE) {
            let mut messages = Writer::new();
            some.iter().for_each(|command| write_command(&mut messages, self.family, command));
            outcome = outcome.and(self.socket.request(&messages));
        }
        outcome
    }

    /// Idle times in force.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn timeouts(&mut self) -> Result<Timeouts> {
        let mut timeouts = Timeouts::default();
        let request = self.ask(CMD_GET_CONFIG, ACK, |_| ());
        self.socket.list(&request, |message| timeouts = parse_timeouts(message))?;
        Ok(timeouts)
    }

    /// Sets idle times.
    ///
    /// # Errors
    /// `EINVAL`: more than the kernel can count (`IP_VS_ATTR` limits in `ip_vs_set_timeout`).
    pub fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<()> {
        let request = self.ask(CMD_SET_CONFIG, ACK, |w| {
            w.u32(ATTR_TIMEOUT_TCP, timeouts.tcp_s);
            w.u32(ATTR_TIMEOUT_TCP_FIN, timeouts.tcp_fin_s);
            w.u32(ATTR_TIMEOUT_UDP, timeouts.udp_s);
        });
        self.socket.request(&request)
    }

    fn ask(&self, command: u8, flags: u16, body: impl FnOnce(&mut Writer)) -> Writer {
        let mut request = Writer::new();
        request.message(self.family, flags, &header(command, VERSION), body);
        request
    }
}

fn write_command(messages: &mut Writer, family: u16, command: &Command) {
    let mut message = |number, body: &dyn Fn(&mut Writer)| {
        messages.message(family, ACK, &header(number, VERSION), |w| body(w));
    };
    match command {
        Command::AddService(service, settings) => {
            message(CMD_NEW_SERVICE, &|w| write_service(w, service, settings));
        }
        Command::SetService(service, settings) => {
            message(CMD_SET_SERVICE, &|w| write_service(w, service, settings));
        }
        Command::DeleteService(service) => {
            message(CMD_DEL_SERVICE, &|w| w.nest(ATTR_SERVICE, |w| write_virtual(w, service)));
        }
        Command::AddServer(service, server, weight) => {
            message(CMD_NEW_DEST, &|w| write_server(w, service, server, Some(*weight)));
        }
        Command::SetServer(service, server, weight) => {
            message(CMD_SET_DEST, &|w| write_server(w, service, server, Some(*weight)));
        }
        Command::DeleteServer(service, server) => {
            message(CMD_DEL_DEST, &|w| write_server(w, service, server, None));
        }
        Command::Flush => message(CMD_FLUSH, &|_| ()),
    }
}

fn address_family(address: IpAddr) -> u16 {
    u16::try_from(if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or(0)
}

/// `union nf_inet_addr`.
fn inet_address(address: IpAddr) -> [u8; ADDRESS_BYTES] {
    let mut bytes = [0; ADDRESS_BYTES];
    match address {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes.copy_from_slice(&v6.octets()),
    }
    bytes
}

/// What names a service.
fn write_virtual(w: &mut Writer, service: &Virtual) {
    w.u16(SVC_AF, address_family(service.address));
    w.u16(SVC_PROTOCOL, service.protocol.into());
    w.bytes_attr(SVC_ADDR, &inet_address(service.address));
    w.be16(SVC_PORT, service.port);
}

fn write_service(w: &mut Writer, service: &Virtual, settings: &Settings) {
    // `struct ip_vs_flags`: flags, and which of them are meant.
    let mut flags = [0; 8];
    flags[..4].copy_from_slice(&settings.flags.to_ne_bytes());
    flags[4..].copy_from_slice(&u32::MAX.to_ne_bytes());
    // Each client address by itself: a mask of IPv4, the length of a prefix of IPv6.
    let netmask = if service.address.is_ipv4() { u32::MAX } else { 128 };
    w.nest(ATTR_SERVICE, |w| {
        write_virtual(w, service);
        w.str(SVC_SCHED_NAME, &settings.scheduler);
        w.bytes_attr(SVC_FLAGS, &flags);
        w.u32(SVC_TIMEOUT, settings.timeout_s);
        w.u32(SVC_NETMASK, netmask);
    });
}

fn write_server(w: &mut Writer, service: &Virtual, server: &Server, weight: Option<u32>) {
    w.nest(ATTR_SERVICE, |w| write_virtual(w, service));
    w.nest(ATTR_DEST, |w| {
        w.bytes_attr(DEST_ADDR, &inet_address(server.address));
        w.be16(DEST_PORT, server.port);
        w.u16(DEST_ADDR_FAMILY, address_family(server.address));
        if let Some(weight) = weight {
            w.u32(DEST_FWD_METHOD, FORWARD_BY_TRANSLATION);
            w.u32(DEST_WEIGHT, weight);
            // No thresholds.
            w.u32(DEST_U_THRESH, 0);
            w.u32(DEST_L_THRESH, 0);
        }
    });
}

/// An address of the family that a number names.
fn parse_address(family: u16, value: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => value.first_chunk().map(|octets: &[u8; 4]| Ipv4Addr::from(*octets).into()),
        libc::AF_INET6 => value.first_chunk().map(|octets: &[u8; 16]| Ipv6Addr::from(*octets).into()),
        _ => None,
    }
}

fn number(attributes: &Attributes<'_>, kind: u16) -> u32 {
    attributes.get(kind).map_or(0, |attribute| attribute.u32())
}

pub(super) fn parse_service(message: &Message<'_>) -> Option<(Virtual, Settings)> {
    let service = message.attributes(HEADER_BYTES).get(ATTR_SERVICE)?.nested();
    if service.get(SVC_FWMARK).is_some() {
        return None;
    }
    let address = parse_address(service.get(SVC_AF)?.u16(), service.get(SVC_ADDR)?.value)?;
    let protocol = u8::try_from(service.get(SVC_PROTOCOL)?.u16()).ok()?;
    let settings = Settings {
        scheduler: service.get(SVC_SCHED_NAME)?.text(),
        flags: number(&service, SVC_FLAGS) & !FLAG_HASHED,
        timeout_s: number(&service, SVC_TIMEOUT),
    };
    Some((Virtual { address, protocol, port: service.get(SVC_PORT)?.be16() }, settings))
}

pub(super) fn parse_server(message: &Message<'_>, service: &Virtual) -> Option<ServerStatus> {
    let server = message.attributes(HEADER_BYTES).get(ATTR_DEST)?.nested();
    // Kernels before 3.18 do not tell the family: it is the service's then.
    let family = server.get(DEST_ADDR_FAMILY).map_or(address_family(service.address), |family| family.u16());
    let address = parse_address(family, server.get(DEST_ADDR)?.value)?;
    Some(ServerStatus {
        server: Server { address, port: server.get(DEST_PORT)?.be16() },
        weight: number(&server, DEST_WEIGHT),
        active: number(&server, DEST_ACTIVE_CONNS),
        inactive: number(&server, DEST_INACT_CONNS),
        persistent: number(&server, DEST_PERSIST_CONNS),
    })
}

pub(super) fn parse_info(message: &Message<'_>) -> Info {
    let attributes = message.attributes(HEADER_BYTES);
    let [_, major, minor, patch] = number(&attributes, INFO_VERSION).to_be_bytes();
    Info { version: (major, minor, patch), table_size: number(&attributes, INFO_CONN_TAB_SIZE) }
}

pub(super) fn parse_timeouts(message: &Message<'_>) -> Timeouts {
    let attributes = message.attributes(HEADER_BYTES);
    Timeouts {
        tcp_s: number(&attributes, ATTR_TIMEOUT_TCP),
        tcp_fin_s: number(&attributes, ATTR_TIMEOUT_TCP_FIN),
        udp_s: number(&attributes, ATTR_TIMEOUT_UDP),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Messages;
    use super::*;

    const V4: Virtual = Virtual { address: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), protocol: 6, port: 80 };

    fn encoded(command: &Command) -> Vec<u8> {
        let mut messages = Writer::new();
        write_command(&mut messages, 30, command);
        messages.bytes().to_vec()
    }

    fn v6() -> Virtual {
        Virtual { address: "fd00:96::10".parse().unwrap(), protocol: 17, port: 53 }
    }

    /// The message as the kernel would get it.
    #[track_caller]
    fn check(command: &Command, number: u8, look: impl FnOnce(&Message<'_>)) {
        let bytes = encoded(command);
        let message = Messages::new(&bytes).next().unwrap();
        assert_eq!((message.kind, message.flags, &message.payload[..4]), (30, 5, &[number, 1, 0, 0][..]));
        look(&message);
    }

    #[test]
    fn a_service_is_read_as_it_was_written() {
        let settings = Settings { scheduler: "mh".to_owned(), flags: PERSISTENT | HASH_PORT, timeout_s: 10_800 };
        for service in [V4, v6()] {
            check(&Command::AddService(service, settings.clone()), 1, |message| {
                assert_eq!(parse_service(message), Some((service, settings.clone())));
                let attributes = message.attributes(4).get(ATTR_SERVICE).unwrap().nested();
                assert_eq!(attributes.get(SVC_ADDR).unwrap().value.len(), 16);
                assert_eq!(attributes.get(SVC_PORT).unwrap().value, service.port.to_be_bytes());
                let mask = attributes.get(SVC_NETMASK).unwrap().u32();
                assert_eq!(mask, if service.address.is_ipv4() { u32::MAX } else { 128 });
            });
        }
    }

    #[test]
    fn a_server_is_read_as_it_was_written() {
        for (service, address) in [(V4, "10.0.0.7"), (v6(), "fd00::7")] {
            let server = Server { address: address.parse().unwrap(), port: 8080 };
            check(&Command::AddServer(service, server, 1), 5, |message| {
                let status = parse_server(message, &service).unwrap();
                assert_eq!((status.server, status.weight, status.active), (server, 1, 0));
                let named = message.attributes(4).get(ATTR_SERVICE).unwrap().nested();
                assert!(named.get(SVC_SCHED_NAME).is_none(), "a service is only named");
            });
            check(&Command::DeleteServer(service, server), 7, |message| {
                let attributes = message.attributes(4).get(ATTR_DEST).unwrap().nested();
                assert!(attributes.get(DEST_WEIGHT).is_none());
            });
        }
    }

    #[test]
    fn flags_of_the_kernels_own_are_not_shown() {
        let settings = Settings { scheduler: "rr".to_owned(), flags: FLAG_HASHED, timeout_s: 0 };
        check(&Command::SetService(V4, settings), 2, |message| {
            assert_eq!(parse_service(message).unwrap().1.flags, 0);
        });
    }

    #[test]
    fn a_removal_and_a_flush_say_no_more_than_they_must() {
        check(&Command::DeleteService(V4), 3, |message| {
            assert_eq!(message.attributes(4).get(ATTR_SERVICE).unwrap().nested().count(), 4);
        });
        check(&Command::Flush, 17, |message| assert_eq!(message.attributes(4).count(), 0));
    }
}
