//! Named counters of the packet filter (nfacct), which rules of iptables count in.

use rustix::io::Errno;

use super::{ACK, CREATE, EXCL, Error, Result, Socket, Writer};

const SUBSYSTEM: u16 = 7 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
/// Family, version and resource: any, 0, 0.
const HEADER: [u8; 4] = [0; 4];

const NAME: u16 = 1;
const PACKETS: u16 = 2;

impl Socket {
    /// Makes a counter of packets unless it is there. Names have at most 31 bytes.
    ///
    /// # Errors
    /// The kernel refused, or has no such counters.
    pub fn ensure_counter(&mut self, name: &str) -> Result<()> {
        let mut request = Writer::new();
        request.message(NEW, ACK | CREATE | EXCL, &HEADER, |w| w.str(NAME, name));
        match self.request(&request) {
            Err(Error { errno: Errno::EXIST, .. }) => Ok(()),
            other => other,
        }
    }

    /// How many packets a counter has counted; none if it is not there.
    ///
    /// # Errors
    /// The kernel refused, or has no such counters.
    pub fn counted_packets(&mut self, name: &str) -> Result<Option<u64>> {
        let mut request = Writer::new();
        request.message(GET, ACK, &HEADER, |w| w.str(NAME, name));
        let mut packets = None;
        let listed = self.list(&request, |message| {
            packets = message.attributes(HEADER.len()).get(PACKETS).map(|packets| packets.be64());
        });
        match listed {
            Err(Error { errno: Errno::NOENT, .. }) => Ok(None),
            other => other.map(|()| packets),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_made_once_and_read() {
        let tried = crate::netns::create(|| {
            let mut socket = Socket::netfilter().map_err(std::io::Error::from)?;
            match socket.ensure_counter("orlop_test") {
                Err(Error { errno: Errno::INVAL | Errno::OPNOTSUPP, .. }) => return Ok(false),
                made => made.unwrap(),
            }
            socket.ensure_counter("orlop_test").unwrap();
            assert_eq!(socket.counted_packets("orlop_test"), Ok(Some(0)));
            assert_eq!(socket.counted_packets("orlop_none"), Ok(None));
            Ok(true)
        });
        match tried {
            Ok((_, true)) => {}
            Ok((_, false)) => println!("skipped: needs CONFIG_NETFILTER_NETLINK_ACCT"),
            Err(error) => println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error})"),
        }
    }
}
