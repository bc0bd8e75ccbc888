//! IPVS in network namespaces of the tests' own. Kernels without it have nothing to be tested; the virtual machine's has it.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use sys::netlink::ipvs::{Command, Ipvs, PERSISTENT, Server, Settings, Timeouts, Virtual};
use sys::netlink::{Socket, Writer};
use sys::netns;
use sys::rustix;

/// The kernel keeps the services of all namespaces in one table, and a listing loses its place when that changes.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a test in a namespace of its own, if the kernel has IPVS.
fn with_ipvs(test: impl FnOnce(Ipvs) + Send) {
    // One that failed leaves nothing behind.
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = |found: Result<Ipvs, sys::netlink::Error>| match found {
        Ok(ipvs) => test(ipvs),
        Err(error) => println!("skipped: needs IPVS in the kernel ({error})"),
    };
    let ran = netns::create(|| {
        loopback_up()?;
        opened(Ipvs::open());
        Ok(())
    });
    if let Err(error) = ran {
        println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error})");
    }
}

/// Before the first address is there, the kernel takes all of them for broadcasts, to which no server is bound.
fn loopback_up() -> io::Result<()> {
    let mut setup = Writer::new();
    setup.set_up(1);
    Ok(Socket::route()?.request(&setup)?)
}

fn settings(scheduler: &str) -> Settings {
    Settings { scheduler: scheduler.to_owned(), flags: 0, timeout_s: 0 }
}

fn service(address: &str, protocol: u8) -> Virtual {
    Virtual { address: address.parse().unwrap(), protocol, port: 80 }
}

fn server(address: &str) -> Server {
    Server { address: address.parse::<IpAddr>().unwrap(), port: 8080 }
}

#[test]
fn services_and_servers_come_change_and_go() {
    with_ipvs(|mut ipvs| {
        assert!(ipvs.info().unwrap().version >= (1, 2, 1));
        for (address, one, other) in [("10.96.0.10", "10.0.0.1", "10.0.0.2"), ("fd00:96::10", "fd00::1", "fd00::2")] {
            let web = service(address, 6);
            let sticky = Settings { scheduler: "wlc".to_owned(), flags: PERSISTENT, timeout_s: 60 };
            ipvs.apply(&[
                Command::AddService(web, settings("rr")),
                Command::AddService(service(address, 17), settings("mh")),
                Command::AddServer(web, server(one), 1),
                Command::AddServer(web, server(other), 1),
            ])
            .unwrap();
            assert_eq!(ipvs.services().unwrap().len(), 2);
            ipvs.apply(&[
                Command::SetService(web, sticky.clone()),
                Command::SetServer(web, server(one), 0),
                Command::DeleteServer(web, server(other)),
            ])
            .unwrap();
            assert!(ipvs.services().unwrap().contains(&(web, sticky)));
            let servers = ipvs.servers(&web).unwrap();
            assert_eq!(servers.len(), 1);
            assert_eq!((servers[0].server, servers[0].weight, servers[0].active), (server(one), 0, 0));
            ipvs.apply(&[Command::DeleteService(web)]).unwrap();
            assert_eq!(ipvs.servers(&web).unwrap(), []);
            ipvs.apply(&[Command::Flush]).unwrap();
            assert_eq!(ipvs.services().unwrap(), []);
        }
    });
}

#[test]
fn what_is_refused_is_told_and_the_rest_is_done() {
    with_ipvs(|mut ipvs| {
        let web = service("10.96.0.10", 6);
        let errno = |result: Result<(), sys::netlink::Error>| result.unwrap_err().errno;
        assert_eq!(errno(ipvs.apply(&[Command::DeleteService(web)])), Errno::SRCH);
        assert_eq!(errno(ipvs.apply(&[Command::AddService(web, settings("orlop"))])), Errno::NOENT);
        let both = [
            Command::AddService(web, settings("rr")),
            Command::AddService(web, settings("rr")),
            Command::AddServer(web, server("10.0.0.1"), 1),
        ];
        assert_eq!(errno(ipvs.apply(&both)), Errno::EXIST);
        assert_eq!(ipvs.servers(&web).unwrap().len(), 1);
    });
}

#[test]
fn many_at_once_are_all_confirmed() {
    with_ipvs(|mut ipvs| {
        let web = |n: u32| Virtual { address: IpAddr::V4((0x0a60_0000 + n).into()), protocol: 6, port: 80 };
        let many: Vec<Command> = (1..=1500).map(|n| Command::AddService(web(n), settings("rr"))).collect();
        ipvs.apply(&many).unwrap();
        assert_eq!(ipvs.services().unwrap().len(), 1500);
    });
}

#[test]
fn idle_times_are_set_and_zero_leaves_them() {
    with_ipvs(|mut ipvs| {
        let before = ipvs.timeouts().unwrap();
        ipvs.set_timeouts(Timeouts { tcp_s: 1234, ..Timeouts::default() }).unwrap();
        assert_eq!(ipvs.timeouts().unwrap(), Timeouts { tcp_s: 1234, ..before });
    });
}

#[test]
fn a_namespace_has_its_own() {
    with_ipvs(|mut outer| {
        outer.apply(&[Command::AddService(service("10.96.0.10", 6), settings("rr"))]).unwrap();
        let inner = netns::create(|| Ok(Ipvs::open().map_err(io::Error::from)?.services()?)).unwrap().1;
        assert_eq!(inner, []);
    });
}
