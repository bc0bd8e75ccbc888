//! Which address is free: one pool over the pod subnets, used addresses are those of the sandboxes that live.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::NetworkError;

/// Addresses of the pods.
#[derive(Debug)]
pub(crate) struct Pool {
    ranges: Vec<Range>,
    used: HashSet<IpAddr>,
}

/// One subnet: the first address is the gateway's, the last of IPv4 its broadcast.
#[derive(Debug)]
struct Range {
    subnet: IpNet,
    first: u128,
    last: u128,
    /// Where the search goes on: an address comes back as late as possible, so that nobody's cache still knows it.
    next: u128,
}

impl Range {
    fn new(subnet: IpNet) -> Result<Range, NetworkError> {
        let network = number(subnet.network());
        let host_bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
        let size = 1u128.checked_shl(host_bits).unwrap_or(u128::MAX);
        let last = network + (size - 1) - u128::from(subnet.addr().is_ipv4());
        if size < 4 {
            return Err(NetworkError::Config(format!("pod subnet {subnet} has no room for pods; use /30 or larger")));
        }
        Ok(Range { subnet, first: network + 2, last, next: network + 2 })
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.subnet {
            IpNet::V4(_) => IpAddr::V4(u32::try_from(number).unwrap_or_default().into()),
            IpNet::V6(_) => IpAddr::V6(number.into()),
        }
    }

    fn gateway(&self) -> IpAddr {
        self.address(self.first - 1)
    }

    fn allocate(&mut self, used: &HashSet<IpAddr>) -> Option<IpAddr> {
        let candidates = (self.next..=self.last).chain(self.first..self.next);
        let free = candidates.take(used.len() + 1).find(|number| !used.contains(&self.address(*number)))?;
        self.next = if free == self.last { self.first } else { free + 1 };
        Some(self.address(free))
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

impl Pool {
    /// All addresses of the subnets are free.
    pub(crate) fn new(subnets: &[IpNet]) -> Result<Pool, NetworkError> {
        let ranges = subnets.iter().copied().map(Range::new).collect::<Result<Vec<_>, _>>()?;
        let families: HashSet<bool> = subnets.iter().map(|subnet| subnet.addr().is_ipv4()).collect();
        if ranges.is_empty() || families.len() != ranges.len() {
            return Err(NetworkError::Config("pod subnets: give one, or one of each address family".into()));
        }
        Ok(Pool { ranges, used: HashSet::new() })
    }

    /// The host's addresses on the bridge, with the prefix length of their subnets.
    pub(crate) fn gateways(&self) -> Vec<(IpAddr, u8)> {
        self.ranges.iter().map(|range| (range.gateway(), range.subnet.prefix_len())).collect()
    }

    /// One address of each family.
    pub(crate) fn allocate(&mut self) -> Result<Vec<IpAddr>, NetworkError> {
        let mut taken = Vec::with_capacity(self.ranges.len());
        for range in &mut self.ranges {
            let Some(address) = range.allocate(&self.used) else {
                let used = self.used.iter().filter(|address| range.subnet.contains(*address)).count();
                let full = NetworkError::Exhausted { subnet: range.subnet.to_string(), used };
                self.release(&taken);
                return Err(full);
            };
            self.used.insert(address);
            taken.push(address);
        }
        Ok(taken)
    }

    /// Marks addresses of a sandbox that was found alive.
    pub(crate) fn take(&mut self, addresses: &[IpAddr]) {
        self.used.extend(addresses);
    }

    /// Gives addresses back.
    pub(crate) fn release(&mut self, addresses: &[IpAddr]) {
        addresses.iter().for_each(|address| _ = self.used.remove(address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(subnets: &[&str]) -> Pool {
        Pool::new(&subnets.iter().map(|s| s.parse().unwrap()).collect::<Vec<_>>()).unwrap()
    }

    fn all(pool: &mut Pool) -> Vec<String> {
        std::iter::from_fn(|| pool.allocate().ok()).map(|ips| ips[0].to_string()).collect()
    }

    #[test]
    fn gives_every_address_but_network_gateway_and_broadcast() {
        let mut pool = pool(&["10.0.0.0/29"]);
        assert_eq!(pool.gateways(), [("10.0.0.1".parse().unwrap(), 29)]);
        assert_eq!(all(&mut pool), ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert!(matches!(pool.allocate(), Err(NetworkError::Exhausted { used: 5, .. })));
    }

    #[test]
    fn an_address_comes_back_late() {
        let mut pool = pool(&["10.0.0.0/29"]);
        let first = pool.allocate().unwrap();
        pool.release(&first);
        assert_eq!(all(&mut pool), ["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.2"]);
    }

    #[test]
    fn adopted_addresses_are_not_given_again() {
        let mut pool = pool(&["10.0.0.0/29", "fd00::/64"]);
        pool.take(&["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]);
        let ips: Vec<IpAddr> = vec!["10.0.0.3".parse().unwrap(), "fd00::3".parse().unwrap()];
        assert_eq!(pool.allocate().unwrap(), ips);
    }

    #[test]
    fn a_full_family_takes_nothing_from_the_other() {
        let mut pool = pool(&["10.0.0.0/16", "fd00::/126"]);
        pool.allocate().unwrap();
        pool.allocate().unwrap();
        assert!(matches!(pool.allocate(), Err(NetworkError::Exhausted { used: 2, .. })));
    }

    #[test]
    fn refuses_what_cannot_work() {
        for subnets in [&[][..], &["10.0.0.0/31"], &["10.0.0.0/24", "10.1.0.0/24"]] {
            let subnets: Vec<IpNet> = subnets.iter().map(|s| s.parse().unwrap()).collect();
            assert!(matches!(Pool::new(&subnets), Err(NetworkError::Config(_))), "{subnets:?}");
        }
    }
}
