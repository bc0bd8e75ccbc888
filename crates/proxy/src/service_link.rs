//! The interface that has the addresses of Services where this node has to have them itself. An address that the kernel
//! refuses costs no other.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sys::netlink::{self, Error, Socket, Writer};
use sys::rustix::io::Errno;

/// Locally administered; nobody sees it.
const MAC: [u8; 6] = [0x0a, 0x58, 0, 0, 0, 1];
/// Requests that are sent at once; if one of them is refused, each is sent by itself.
const REQUESTS_AT_ONCE: usize = 512;

/// The interface of the mode `ipvs`, named as upstream's: other programs know it by that.
pub(crate) const IPVS: &str = "kube-ipvs0";
/// The interface of the mode `userspace`.
pub(crate) const USERSPACE: &str = "orlop-services";

type Change = fn(&mut Writer, u32, IpAddr, u8);

/// An interface that holds addresses and does nothing else, and the socket that it is asked about with.
#[derive(Debug)]
pub(crate) struct ServiceLink {
    name: &'static str,
    route: Socket,
    /// As it was when it was last made sure of; 0 before.
    index: u32,
}

/// Addresses of this node.
#[derive(Debug, Default)]
pub(crate) struct NodeAddresses {
    /// Those of other interfaces on which node ports may answer.
    pub(crate) own: BTreeSet<IpAddr>,
    /// Those of the interface of the Services.
    pub(crate) bound: BTreeSet<IpAddr>,
}

impl ServiceLink {
    /// The interface of this name in the calling thread's network namespace, whether there is one yet or not.
    pub(crate) fn open(name: &'static str) -> netlink::Result<Self> {
        Ok(Self { name, route: Socket::route()?, index: 0 })
    }

    /// Makes sure that there is one, a dummy if it has to be made.
    ///
    /// # Errors
    /// OPNOTSUPP: the kernel has no such interfaces.
    pub(crate) fn make_dummy(&mut self) -> netlink::Result<()> {
        self.make(|request, name| request.create_dummy(name))
    }

    /// Makes sure that there is one, a bridge without ports if it has to be made: that does as little as a dummy.
    pub(crate) fn make_bridge(&mut self) -> netlink::Result<()> {
        self.make(|request, name| request.create_bridge(name, MAC, 1500))
    }

    fn make(&mut self, create: impl FnOnce(&mut Writer, &str)) -> netlink::Result<()> {
        if self.find()?.is_none() {
            let mut request = Writer::new();
            create(&mut request, self.name);
            self.route.request(&request)?;
        }
        self.index = self.find()?.unwrap_or(0);
        Ok(())
    }

    /// Whether it is there.
    pub(crate) fn exists(&mut self) -> netlink::Result<bool> {
        Ok(self.find()?.is_some())
    }

    /// Whether the one is there that was made sure of last, and not another of its name.
    pub(crate) fn is_same(&mut self) -> netlink::Result<bool> {
        Ok(self.find()? == Some(self.index))
    }

    fn find(&mut self) -> netlink::Result<Option<u32>> {
        Ok(self.route.link(self.name)?.map(|link| link.index))
    }

    /// What addresses this node has. Those on the interface of another mode go with that mode.
    pub(crate) fn addresses(&mut self) -> netlink::Result<NodeAddresses> {
        let other = if self.name == IPVS { USERSPACE } else { IPVS };
        let other = self.route.link(other)?.map(|link| link.index);
        let mut addresses = NodeAddresses::default();
        for (index, address, _) in self.route.addresses()? {
            if is_usable(address) && Some(index) != other {
                let place = if index == self.index { &mut addresses.bound } else { &mut addresses.own };
                place.insert(address);
            }
        }
        Ok(addresses)
    }

    /// Gives it addresses; those that it has stay. Returns which the kernel refuses, and why.
    ///
    /// # Errors
    /// It is not about one address: the link is gone, nothing is permitted, or no answer came.
    pub(crate) fn add(&mut self, addresses: &[IpAddr]) -> netlink::Result<Vec<(IpAddr, Error)>> {
        change(&mut self.route, self.index, addresses, Writer::add_address)
    }

    /// Takes addresses from it. One that it does not have is gone already.
    ///
    /// # Errors
    /// The first refusal, after all have been tried.
    pub(crate) fn delete(&mut self, addresses: &[IpAddr]) -> netlink::Result<()> {
        let refused = change(&mut self.route, self.index, addresses, Writer::delete_address)?;
        let kept = refused.into_iter().find(|(_, error)| error.errno != Errno::ADDRNOTAVAIL);
        kept.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Removes it with its addresses, if it is there.
    pub(crate) fn remove(&mut self) -> netlink::Result<()> {
        let Some(index) = self.find()? else { return Ok(()) };
        let mut request = Writer::new();
        request.delete_link(index);
        self.route.request(&request)
    }

    /// For other questions about the network.
    pub(crate) fn socket(&mut self) -> &mut Socket {
        &mut self.route
    }
}

fn change(
    route: &mut Socket,
    link: u32,
    addresses: &[IpAddr],
    change: Change,
) -> netlink::Result<Vec<(IpAddr, Error)>> {
    let mut request = |some: &[IpAddr]| {
        let mut requests = Writer::new();
        some.iter().for_each(|address| change(&mut requests, link, *address, whole(*address)));
        route.request(&requests)
    };
    let mut refused = Vec::new();
    for some in addresses.chunks(REQUESTS_AT_ONCE) {
        if request(some).is_ok() {
            continue;
        }
        // The kernel tells only the first: each is asked for by itself, which changes nothing where it is done.
        for one in some {
            match request(std::slice::from_ref(one)) {
                Err(error) if is_about_all(error.errno) => return Err(error),
                Err(error) => refused.push((*one, error)),
                Ok(()) => {}
            }
        }
    }
    Ok(refused)
}

fn is_about_all(errno: Errno) -> bool {
    matches!(errno, Errno::NODEV | Errno::PERM | Errno::NOBUFS | Errno::NOMEM)
}

/// Whether node ports answer on it: not on loopback, nor where the same address is on every link.
fn is_usable(address: IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !address.is_loopback() && !link_local
}

/// The prefix that holds one address.
fn whole(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_is_refused_costs_no_other() {
        let run = || {
            if let Err(error) = testkit::netns::enter_private() {
                return eprintln!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            }
            let mut link = ServiceLink::open("services").unwrap();
            link.make_bridge().unwrap();
            assert!(link.exists().unwrap() && link.is_same().unwrap());
            // A whole chunk of good ones, and three that no link can have among the rest.
            let good: Vec<IpAddr> = (0..600).map(|n| Ipv4Addr::from_bits(0x0a60_0000 + n).into()).collect();
            let bad: Vec<IpAddr> = ["ff02::1", "::1", "::"].iter().map(|text| text.parse().unwrap()).collect();
            let all: Vec<IpAddr> = bad.iter().chain(&good).copied().collect();
            let refused = link.add(&all).unwrap();
            assert!(refused.iter().all(|(address, _)| bad.contains(address)), "{refused:?}");
            assert!(refused.iter().any(|(address, _)| *address == bad[0]), "multicast is refused");
            assert_eq!(link.addresses().unwrap().bound, good.iter().copied().collect());
            link.delete(&good[1..]).unwrap();
            link.delete(&good).unwrap();
            assert!(link.addresses().unwrap().bound.is_empty(), "what was gone already costs nothing either");
            link.remove().unwrap();
            link.remove().unwrap();
            assert!(!link.exists().unwrap());
            assert_eq!(link.add(&good).unwrap_err().errno, Errno::NODEV);
        };
        std::thread::spawn(run).join().unwrap();
    }
}
