//! Answers that are lost, left over or late, in a network namespace of each test's own.

use std::net::{IpAddr, Ipv4Addr};

use super::*;

const LO: u32 = 1;
/// More than the kernel tells in one part of a list.
const ADDRESSES: u32 = 2000;

/// Runs a test with two sockets of one network namespace.
fn in_namespace(test: impl FnOnce(Socket, Socket) + Send) {
    let sockets = || Ok((Socket::route()?, Socket::route()?));
    match crate::netns::create(sockets) {
        Ok((_namespace, (one, other))) => test(one, other),
        Err(error) => println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error})"),
    }
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + number).into()
}

fn all_addresses() -> Writer {
    route::all(route::RTM_GETADDR, &[0; route::IFADDR_BYTES])
}

fn set_up_often(request: &mut Writer) {
    (0..CONFIRMED_AT_ONCE).for_each(|_| request.set_up(LO));
}

fn add_addresses(socket: &mut Socket, numbers: std::ops::Range<u32>) {
    let mut request = Writer::new();
    numbers.for_each(|number| request.add_address(LO, address(number), 32));
    socket.request(&request).unwrap();
}

/// Numbers of the addresses that were added, in order.
fn numbers(listed: &[(u32, IpAddr, u8)]) -> Vec<u32> {
    let number = |(_, address, _): &(u32, IpAddr, u8)| match address {
        IpAddr::V4(address) => address.to_bits().checked_sub(0x0a00_0000).filter(|number| *number < 0x0100_0000),
        IpAddr::V6(_) => None,
    };
    let mut numbers: Vec<u32> = listed.iter().filter_map(number).collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn confirmations_that_are_lost_are_told_and_those_left_over_confirm_nothing_else() {
    in_namespace(|mut socket, mut other| {
        // The kernel makes of it what fits at least: two or three confirmations.
        sockopt::set_socket_recv_buffer_size(&socket.fd, 1).unwrap();
        let mut all_done = Writer::new();
        set_up_often(&mut all_done);
        assert_eq!(socket.request(&all_done).unwrap_err().errno, Errno::NOBUFS);

        let mut refused = Writer::new();
        refused.delete_link(99);
        let error = socket.request(&refused).unwrap_err();
        assert_eq!((error.errno, error.sequence), (Errno::NODEV, 1));
        assert!(other.link("lo").unwrap().unwrap().up, "what was not confirmed was done");

        set_up_often(&mut refused);
        let error = socket.request(&refused).unwrap_err();
        assert_eq!((error.errno, error.sequence), (Errno::NODEV, 1), "a refusal that came counts for more than a loss");
        assert_eq!(socket.link("none"), Ok(None));
    });
}

#[test]
fn requests_of_any_number_are_confirmed_one_by_one() {
    in_namespace(|mut socket, _| {
        let mut request = Writer::new();
        (0..40).for_each(|_| set_up_often(&mut request));
        request.delete_link(99);
        let count = request.count();
        let error = socket.request(&request).unwrap_err();
        assert_eq!((error.errno, error.sequence), (Errno::NODEV, count));
    });
}

#[test]
fn a_list_that_changes_as_it_is_read_is_read_anew() {
    in_namespace(|mut socket, mut other| {
        add_addresses(&mut other, 1..ADDRESSES);
        let request = all_addresses();
        let mut seen = 0;
        let read = socket.collect(&request, |message| {
            seen += 1;
            if seen == 1 {
                add_addresses(&mut other, ADDRESSES..ADDRESSES + 1);
            }
            route::parse_address(message)
        });
        assert_eq!(numbers(&read.unwrap()), (1..=ADDRESSES).collect::<Vec<_>>());
        assert!(seen > ADDRESSES, "the first reading was one in vain: {seen} objects seen");

        let restless = socket.collect(&request, |message| {
            seen += 1;
            if seen.is_multiple_of(ADDRESSES / 4) {
                add_addresses(&mut other, ADDRESSES + seen..ADDRESSES + seen + 1);
            }
            route::parse_address(message)
        });
        assert_eq!(restless.unwrap_err().errno, Errno::INTR, "one that does not rest is given up");
    });
}

#[test]
fn a_list_that_nobody_has_read_is_in_nobodys_way() {
    in_namespace(|mut socket, mut other| {
        add_addresses(&mut other, 1..ADDRESSES);
        let mut begun = all_addresses();
        socket.number(&mut begun);
        socket.send(begun.bytes()).unwrap();
        assert_eq!(socket.link("lo").unwrap().unwrap().index, LO);
        assert_eq!(numbers(&socket.addresses().unwrap()).len(), ADDRESSES as usize - 1);
        add_addresses(&mut socket, ADDRESSES..ADDRESSES + 1);
    });
}
