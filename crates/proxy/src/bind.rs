//! Addresses of Services on an interface of their own. One that the kernel refuses costs no other.

use std::net::IpAddr;

use sys::netlink::{self, Error, Socket, Writer};
use sys::rustix::io::Errno;

/// Requests that are sent at once: their confirmations have to fit into the socket's buffer.
const REQUESTS_AT_ONCE: usize = 512;

type Change = fn(&mut Writer, u32, IpAddr, u8);

/// Gives a link addresses; those that it has stay. Returns which the kernel refuses, and why.
///
/// # Errors
/// It is not about one address: the link is gone, nothing is permitted, or no answer came.
pub(crate) fn add(route: &mut Socket, link: u32, addresses: &[IpAddr]) -> netlink::Result<Vec<(IpAddr, Error)>> {
    change(route, link, addresses, Writer::add_address)
}

/// Takes addresses from a link. One that it does not have is gone already.
///
/// # Errors
/// The first refusal, after all have been tried.
pub(crate) fn delete(route: &mut Socket, link: u32, addresses: &[IpAddr]) -> netlink::Result<()> {
    let refused = change(route, link, addresses, Writer::delete_address)?;
    let kept = refused.into_iter().find(|(_, error)| error.errno != Errno::ADDRNOTAVAIL);
    kept.map_or(Ok(()), |(_, error)| Err(error))
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
            let mut route = Socket::route().unwrap();
            let mut bridge = Writer::new();
            bridge.create_bridge("services", [0x0a, 0x58, 0, 0, 0, 1], 1500);
            route.request(&bridge).unwrap();
            let link = route.link("services").unwrap().unwrap().index;
            // A whole chunk of good ones, and three that no link can have among the rest.
            let good: Vec<IpAddr> = (0..600).map(|n| Ipv4Addr::from_bits(0x0a60_0000 + n).into()).collect();
            let bad: Vec<IpAddr> = ["ff02::1", "::1", "::"].iter().map(|text| text.parse().unwrap()).collect();
            let all: Vec<IpAddr> = bad.iter().chain(&good).copied().collect();
            let refused = add(&mut route, link, &all).unwrap();
            let bound = |route: &mut Socket| {
                let all = route.addresses().unwrap().into_iter();
                all.filter(|(index, address, _)| *index == link && address.is_ipv4()).count()
            };
            assert!(refused.iter().all(|(address, _)| bad.contains(address)), "{refused:?}");
            assert!(refused.iter().any(|(address, _)| *address == bad[0]), "multicast is refused");
            assert_eq!(bound(&mut route), good.len());
            delete(&mut route, link, &good[1..]).unwrap();
            delete(&mut route, link, &good).unwrap();
            assert_eq!(bound(&mut route), 0, "what was gone already costs nothing either");
            assert_eq!(add(&mut route, link + 100, &good).unwrap_err().errno, Errno::NODEV);
        };
        std::thread::spawn(run).join().unwrap();
    }
}
