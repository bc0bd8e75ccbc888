//! The DNS server as real processes: each test in a network namespace with nothing but loopback, which stands for the
//! host, with daemons that are killed, servers that are killed or hang, and resolvers that are silent.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "a test program")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use domain::base::iana::Rcode;
use domain::base::name::ParsedName;
use domain::base::{Message, MessageBuilder, Name, Rtype, Ttl};
use domain::rdata::{A, AllRecordData};
use network::AttachRequest;
use network::dns::{self, Config, DnsError, Endpoint, Server, Target, Upstreams, Zone};
use sys::netlink::{Socket, Writer};
use sys::zygote::{Helper, Helpers, Zygote};

const DNS: &str = "10.96.0.10:53";
const PATIENCE: Duration = Duration::from_secs(10);

struct Own;

impl Helpers for Own {
    const ALL: &'static [Helper] = &[dns::HELPER];
}

/// Forked before anything else; servers are forked from it.
static ZYGOTE: OnceLock<Arc<Zygote>> = OnceLock::new();

fn main() -> ExitCode {
    let missing = (!sys::rustix::process::geteuid().is_root()).then(|| "root".to_owned());
    if missing.is_none() {
        ZYGOTE.set(Arc::new(Zygote::start::<Own>().unwrap())).unwrap();
    }
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, word, run_dir, address] = &arguments[..]
        && word == "daemon"
    {
        daemon(Path::new(run_dir), address);
    }
    testkit::serial::main(
        &[
            ("names_resolve_over_udp_and_tcp", names),
            ("pods_and_host_are_answered_over_the_bridge", over_the_bridge),
            ("the_process_has_no_privileges_and_is_small", confined),
            ("a_killed_daemon_is_not_felt", killed_daemon),
            ("a_killed_server_is_replaced", killed_server),
            ("a_hanging_server_is_replaced", hanging_server),
            ("the_end_leaves_nothing", the_end),
            ("a_taken_port_is_an_error", taken_port),
            ("strangers_get_no_answer", strangers),
            ("other_names_are_asked_elsewhere", forwarding),
            ("silent_resolvers_are_passed_over", silent_resolvers),
            ("an_unreachable_world_is_said_at_once", unreachable),
            ("a_resolver_that_leads_back_makes_no_storm", circle),
            ("slow_connections_do_not_hold_up_others", slow_connections),
            ("queries_without_end_on_one_connection_are_answered", pipelined_queries),
        ],
        missing,
    )
}

/// Runs a test on a thread of its own in a private host namespace.
fn on_a_host(test: impl AsyncFnOnce(Host) + Send + 'static) {
    let run = move || {
        testkit::netns::enter_private().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Host { dir: tempfile::tempdir().unwrap() }));
    };
    std::thread::spawn(run).join().unwrap();
}

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn run_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("run")
    }

    fn config(&self, upstreams: &[SocketAddr]) -> Config {
        config(&self.run_dir(), Upstreams::Fixed(upstreams.to_vec()))
    }

    async fn server(&self, upstreams: &[SocketAddr]) -> Server {
        assign("10.96.0.10");
        Server::start(self.config(upstreams), ZYGOTE.get().unwrap().clone()).await.unwrap()
    }
}

/// A test that fails leaves no server behind.
impl Drop for Host {
    fn drop(&mut self) {
        for owned in dns::fsck(&self.run_dir()) {
            if let Some(pid) = owned.name.strip_prefix("orlop-dns ") {
                signal(pid.parse().unwrap(), 9);
            }
        }
    }
}

fn config(run_dir: &Path, upstreams: Upstreams) -> Config {
    Config { run_dir: run_dir.into(), addresses: vec![DNS.parse().unwrap()], clients: Vec::new(), upstreams }
}

fn assign(address: &str) {
    let mut setup = Writer::new();
    setup.add_address(1, address.parse().unwrap(), 32);
    Socket::route().unwrap().request(&setup).unwrap();
}

/// A zone in which `web` has an address.
fn zone(address: &str) -> Zone {
    let mut zone = Zone::new("cluster.local").unwrap();
    let web = Target::Cluster { ips: vec![address.parse().unwrap()], ports: Vec::new() };
    zone.add_service("default", "web", &web).unwrap();
    zone.add_service("default", "out", &Target::External("www.example.com".into())).unwrap();
    let endpoint = |n: u8| Endpoint { ip: [10, 85, 0, n].into(), hostname: None, ports: Vec::new() };
    zone.add_service("default", "many", &Target::Headless((0..200).map(endpoint).collect())).unwrap();
    zone
}

fn question(name: &str) -> Vec<u8> {
    let name: Name<Vec<u8>> = name.parse().unwrap();
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(u16::from_ne_bytes(sys::random::bytes()));
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    builder.push((name, Rtype::A)).unwrap();
    builder.finish()
}

/// Code and answers of a reply.
fn show(reply: &[u8]) -> String {
    let message = Message::from_slice(reply).unwrap();
    let mut text = message.header().rcode().to_string();
    if message.header().tc() {
        text += " tc";
    }
    for record in message.answer().unwrap() {
        let record = record.unwrap();
        let record = record.to_any_record::<AllRecordData<_, ParsedName<_>>>().unwrap();
        text += &format!(" {}", record.data());
    }
    text
}

fn ask_within(name: &str, patience: Duration) -> std::io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(DNS)?;
    let question = question(name);
    socket.send(&question)?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer)?;
    assert_eq!(buffer[..2], question[..2]);
    Ok(show(&buffer[..length]))
}

fn ask(name: &str) -> String {
    ask_within(name, PATIENCE).unwrap()
}

fn ask_tcp(stream: &mut TcpStream, name: &str) -> String {
    stream.write_all(&prefixed(&question(name))).unwrap();
    read_reply(stream)
}

fn prefixed(question: &[u8]) -> Vec<u8> {
    [&u16::try_from(question.len()).unwrap().to_be_bytes()[..], question].concat()
}

fn read_reply(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut reply = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut reply).unwrap();
    show(&reply)
}

const WEB: &str = "web.default.svc.cluster.local";

fn names() {
    on_a_host(async |host| {
        let config = host.config(&[]);
        let server = Server::start(config, ZYGOTE.get().unwrap().clone()).await.expect("before the address is there");
        server.update(zone("10.96.0.7")).await.unwrap();
        assign("10.96.0.10");
        assert_eq!(ask(WEB), "NOERROR 10.96.0.7");
        assert_eq!(ask("x.default.svc.cluster.local"), "NXDOMAIN");
        assert_eq!(ask("many.default.svc.cluster.local"), "NOERROR tc");
        let mut stream = TcpStream::connect(DNS).unwrap();
        assert_eq!(ask_tcp(&mut stream, WEB), "NOERROR 10.96.0.7");
        assert_eq!(ask_tcp(&mut stream, "many.default.svc.cluster.local").split(' ').count(), 201);
        server.update(zone("10.96.0.8")).await.unwrap();
        assert_eq!(ask(WEB), "NOERROR 10.96.0.8");
        assert_eq!(ask_tcp(&mut stream, WEB), "NOERROR 10.96.0.8", "over the same connection");
        assert_eq!(ask("www.example.com"), "SERVFAIL", "nobody to ask");
        server.stop().await.unwrap();
    });
}

fn over_the_bridge() {
    on_a_host(async |host| {
        let mut pods = network::Config::new(host.dir.path().join("network"));
        pods.cni_conf_dir = host.dir.path().join("no-cni");
        pods.subnets.push("fd00:85::/64".parse().unwrap());
        let (v4, v6): (IpAddr, IpAddr) = ("10.96.0.10".parse().unwrap(), "fd00:96::a".parse().unwrap());
        pods.addresses = vec![v4, v6];
        let clients = pods.subnets.clone();
        let network = network::Network::new(pods).unwrap();
        network.adopt(Vec::new()).await.unwrap();
        let addresses = vec![SocketAddr::new(v4, 53), SocketAddr::new(v6, 53)];
        let config = Config { addresses, clients, ..host.config(&[]) };
        let server = Server::start(config, ZYGOTE.get().unwrap().clone()).await.unwrap();
        server.update(zone("10.96.0.7")).await.unwrap();
        let request = AttachRequest { sandbox_id: "pod".into(), ..AttachRequest::default() };
        let pod = network.attach(request).await.unwrap();
        for namespace in [pod.netns.try_clone().unwrap(), testkit::netns::current().unwrap()] {
            for server in [v4, v6] {
                let any: IpAddr = if server.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
                let from = || UdpSocket::bind((any, 0));
                let socket = sys::netns::run_in(namespace.as_fd(), from).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.connect((server, 53)).unwrap();
                socket.send(&question(WEB)).unwrap();
                let mut buffer = [0; 512];
                let length = socket.recv(&mut buffer).unwrap();
                assert_eq!(show(&buffer[..length]), "NOERROR 10.96.0.7", "of {server}");
            }
        }
        server.stop().await.unwrap();
        network.shutdown().await.unwrap();
    });
}

fn confined() {
    on_a_host(async |host| {
        let server = host.server(&[]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        assert_eq!(ask(WEB), "NOERROR 10.96.0.7");
        let pid = server.process().unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{status}"));
            line.trim_start_matches(':').split_whitespace().next().unwrap().to_owned()
        };
        assert_eq!(field("Uid"), "65534");
        assert_eq!(field("CapEff"), "0000000000000000");
        assert_eq!((field("NoNewPrivs"), field("Seccomp"), field("Threads")), ("1".into(), "2".into(), "1".into()));
        let memory = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        // Without the pages of the program's file: unoptimised code takes more of them, and they can be dropped.
        let own = memory.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).unwrap();
        let kib: u32 = own.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(kib <= 512, "{memory}");
        server.stop().await.unwrap();
    });
}

/// Another program with a daemon's life: it serves one address and waits to be killed.
fn daemon(run_dir: &Path, address: &str) -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = config(run_dir, Upstreams::Fixed(Vec::new()));
    runtime.block_on(async {
        let server = Server::start(config, ZYGOTE.get().unwrap().clone()).await.unwrap();
        println!("started {:?}", server.process());
        server.update(zone(address)).await.unwrap();
        println!("serves {}", server.process().unwrap());
        std::future::pending::<()>().await;
    });
    unreachable!("it waits for ever")
}

struct Daemon {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Daemon {
    fn start(run_dir: &Path, address: &str) -> Daemon {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.arg("daemon").arg(run_dir).arg(address).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Daemon { child, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn kill(self) {
        drop(self);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn killed_daemon() {
    on_a_host(async |host| {
        assign("10.96.0.10");
        let mut first = Daemon::start(&host.run_dir(), "10.96.0.1");
        assert_eq!(first.line(), "started None");
        let serves = first.line();
        let pid: u32 = serves.strip_prefix("serves ").unwrap().parse().unwrap();
        // A client that never ceases to ask, as applications do.
        let (asked, end) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stop, here) = (asked.clone(), end.clone(), testkit::netns::current().unwrap());
        let client = std::thread::spawn(move || {
            testkit::netns::enter(&here).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let answer = ask(WEB);
                assert!(answer == "NOERROR 10.96.0.1" || answer == "NOERROR 10.96.0.2", "{answer}");
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let more = || {
            let before = asked.load(Ordering::Relaxed);
            let begin = Instant::now();
            while asked.load(Ordering::Relaxed) < before + 200 {
                assert!(begin.elapsed() < PATIENCE && !client.is_finished(), "the client gets no answers");
                std::thread::yield_now();
            }
        };
        more();
        first.kill();
        more();
        let left = dns::fsck(&host.run_dir());
        assert!(left.iter().any(|owned| owned.name == format!("orlop-dns {pid}")), "{left:?}");

        let mut second = Daemon::start(&host.run_dir(), "10.96.0.2");
        assert_eq!(second.line(), format!("started Some({pid})"), "the process of the first daemon goes on");
        assert!(second.line().starts_with("serves "));
        assert_eq!(ask(WEB), "NOERROR 10.96.0.2");
        gone(pid);
        more();
        second.kill();
        more();
        end.store(true, Ordering::Relaxed);
        client.join().unwrap();
        assert_eq!(ask(WEB), "NOERROR 10.96.0.2");
        dns::stop(&host.run_dir()).await.unwrap();
        assert_eq!(dns::fsck(&host.run_dir()), []);
    });
}

/// Waits until a process has ended.
fn gone(pid: u32) {
    let begin = Instant::now();
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(begin.elapsed() < PATIENCE, "process {pid} is still there");
        std::thread::yield_now();
    }
}

fn signal(pid: u32, signal: i32) {
    let pid = sys::rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    sys::process::send_signal(sys::process::pidfd_open(pid).unwrap().as_fd(), signal).unwrap();
}

fn killed_server() {
    on_a_host(async |host| {
        let server = host.server(&[]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        let pid = server.process().unwrap();
        signal(pid, 9);
        // The query waits in the socket for the next process.
        let waits = tokio::task::spawn_blocking({
            let here = testkit::netns::current().unwrap();
            move || {
                testkit::netns::enter(&here).unwrap();
                ask(WEB)
            }
        });
        assert_eq!(waits.await.unwrap(), "NOERROR 10.96.0.7");
        assert_ne!(server.process(), Some(pid));
        server.stop().await.unwrap();
    });
}

fn hanging_server() {
    on_a_host(async |host| {
        let server = host.server(&[]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        let pid = server.process().unwrap();
        signal(pid, 19);
        server.update(zone("10.96.0.8")).await.expect("a new process takes over");
        gone(pid);
        assert_eq!(ask(WEB), "NOERROR 10.96.0.8");

        // A later daemon finds one that hangs.
        let pid = server.process().unwrap();
        drop(server);
        signal(pid, 19);
        let server = Server::start(host.config(&[]), ZYGOTE.get().unwrap().clone()).await.unwrap();
        gone(pid);
        server.update(zone("10.96.0.9")).await.unwrap();
        assert_eq!(ask(WEB), "NOERROR 10.96.0.9");
        server.stop().await.unwrap();
    });
}

fn the_end() {
    on_a_host(async |host| {
        let server = host.server(&[]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        let pid = server.process().unwrap();
        let owned = server.fsck();
        assert!(owned.len() == 2 && owned.iter().all(|owned| owned.owner.is_some()), "{owned:?}");
        assert!(dns::fsck(&host.run_dir()).iter().all(|owned| owned.owner.is_none()));
        server.stop().await.unwrap();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(dns::fsck(&host.run_dir()), []);
        assert_eq!(std::fs::read_dir(host.run_dir()).unwrap().count(), 0);
        assert!(server.stop().await.is_err() && server.update(zone("10.96.0.7")).await.is_err());
        dns::stop(&host.run_dir()).await.expect("again");
        UdpSocket::bind(DNS).expect("the port is free");
    });
}

fn taken_port() {
    on_a_host(async |host| {
        assign("10.96.0.10");
        let _other = UdpSocket::bind(DNS).unwrap();
        let error = Server::start(host.config(&[]), ZYGOTE.get().unwrap().clone()).await.unwrap_err();
        assert!(matches!(error, DnsError::Listen { transport: "udp", .. }), "{error}");
        let mut everywhere = host.config(&[]);
        everywhere.addresses = vec!["0.0.0.0:53".parse().unwrap()];
        let error = Server::start(everywhere, ZYGOTE.get().unwrap().clone()).await.unwrap_err();
        assert!(matches!(error, DnsError::Config(_)), "{error}");
    });
}

fn strangers() {
    on_a_host(async |host| {
        for address in ["10.96.0.10", "10.85.0.2", "192.0.2.1"] {
            assign(address);
        }
        let config = Config { clients: vec!["10.85.0.0/16".parse().unwrap()], ..host.config(&[]) };
        let server = Server::start(config, ZYGOTE.get().unwrap().clone()).await.unwrap();
        server.update(zone("10.96.0.7")).await.unwrap();
        let from = |source: &str| {
            let socket = UdpSocket::bind((source, 0)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(DNS).unwrap();
            socket.send(&question(WEB)).unwrap();
            socket
        };
        // Datagrams on one socket are read in order: when the last one is answered, the first has been read.
        let stranger = from("192.0.2.1");
        for known in ["10.85.0.2", "10.96.0.10"] {
            let socket = from(known);
            socket.set_nonblocking(false).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.recv(&mut [0; 512]).unwrap();
        }
        assert_eq!(stranger.recv(&mut [0; 512]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        server.stop().await.unwrap();
    });
}

/// A resolver on loopback. It answers `answer` to each query, over both transports, and counts them.
struct Resolver {
    address: SocketAddr,
    asked: Arc<AtomicU32>,
}

impl Resolver {
    fn start(ip: &str, answer: impl Fn(&Message<[u8]>, &str) -> Option<Vec<u8>> + Send + Sync + 'static) -> Resolver {
        let address = SocketAddr::new(ip.parse().unwrap(), 53);
        let (socket, listener) = (UdpSocket::bind(address).unwrap(), std::net::TcpListener::bind(address).unwrap());
        let asked = Arc::new(AtomicU32::new(0));
        let (count, answer) = (asked.clone(), Arc::new(answer));
        let by_stream = answer.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                count.fetch_add(1, Ordering::Relaxed);
                if let Some(reply) = answer(Message::from_slice(&buffer[..length]).unwrap(), "udp") {
                    socket.send_to(&reply, client).unwrap();
                }
            }
        });
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut query).unwrap();
                if let Some(reply) = by_stream(Message::from_slice(&query).unwrap(), "tcp") {
                    let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
                    stream.write_all(&[&length[..], &reply].concat()).unwrap();
                }
            }
        });
        Resolver { address, asked }
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::Relaxed)
    }
}

fn addresses(query: &Message<[u8]>, count: u8) -> Vec<u8> {
    let mut answer = MessageBuilder::new_vec().start_answer(query, Rcode::NOERROR).unwrap();
    let name = query.sole_question().unwrap().into_qname();
    for n in 0..count {
        answer.push((&name, Ttl::from_secs(60), A::from_octets(192, 0, 2, n))).unwrap();
    }
    answer.finish()
}

fn code(query: &Message<[u8]>, rcode: Rcode) -> Vec<u8> {
    MessageBuilder::new_vec().start_answer(query, rcode).unwrap().finish()
}

fn name_of(query: &Message<[u8]>) -> String {
    query.sole_question().unwrap().qname().to_string()
}

fn forwarding() {
    on_a_host(async |host| {
        let refuses = Resolver::start("127.0.0.2", |query, _| Some(code(query, Rcode::REFUSED)));
        let knows = Resolver::start("127.0.0.3", |query, transport| match name_of(query).as_str() {
            "www.example.com" => Some(addresses(query, 1)),
            "many.example.com" if transport == "tcp" => Some(addresses(query, 200)),
            "many.example.com" => {
                let mut answer = MessageBuilder::new_vec().start_answer(query, Rcode::NOERROR).unwrap();
                answer.header_mut().set_tc(true);
                Some(answer.finish())
            }
            _ => Some(code(query, Rcode::NXDOMAIN)),
        });
        let file = host.dir.path().join("resolv.conf");
        let list = |servers: &[&Resolver]| {
            let text: String = servers.iter().map(|server| format!("nameserver {}\n", server.address.ip())).collect();
            std::fs::write(&file, text).unwrap();
        };
        list(&[&refuses, &knows]);
        assign("10.96.0.10");
        let config = config(&host.run_dir(), Upstreams::File(file.clone()));
        let server = Server::start(config, ZYGOTE.get().unwrap().clone()).await.unwrap();
        server.update(zone("10.96.0.7")).await.unwrap();
        assert_eq!(ask("www.example.com"), "NOERROR 192.0.2.0");
        assert_eq!(ask("no.example.com"), "NXDOMAIN");
        assert_eq!(ask("out.default.svc.cluster.local"), "NOERROR www.example.com. 192.0.2.0");
        assert_eq!(ask("many.example.com"), "NOERROR tc");
        let mut stream = TcpStream::connect(DNS).unwrap();
        assert_eq!(ask_tcp(&mut stream, "many.example.com").split(' ').count(), 201);
        assert_eq!(ask_tcp(&mut stream, "out.default.svc.cluster.local"), "NOERROR www.example.com. 192.0.2.0");
        let before = (refuses.asked(), knows.asked());
        assert!(before.0 > 0 && before.1 > 0);
        assert_eq!(ask(WEB), "NOERROR 10.96.0.7");
        assert_eq!(ask("x.svc.cluster.local"), "NXDOMAIN");
        assert_eq!((refuses.asked(), knows.asked()), before, "the cluster's names are asked nowhere");
        // The file is looked at again within a second.
        list(&[&refuses]);
        let begin = Instant::now();
        while ask("www.example.com") != "REFUSED" {
            assert!(begin.elapsed() < PATIENCE, "the changed file is not read");
        }
        server.stop().await.unwrap();
    });
}

fn silent_resolvers() {
    on_a_host(async |host| {
        let silent = Resolver::start("127.0.0.2", |_, _| None);
        let knows = Resolver::start("127.0.0.3", |query, _| Some(addresses(query, 1)));
        let server = host.server(&[silent.address, knows.address]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        assert_eq!(ask("www.example.com"), "NOERROR 192.0.2.0");
        let begin = Instant::now();
        for n in 0..20 {
            assert_eq!(ask(&format!("n{n}.example.com")), "NOERROR 192.0.2.0");
        }
        assert_eq!(silent.asked(), 1, "it is not asked first again");
        assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
        server.stop().await.unwrap();
    });
}

fn unreachable() {
    on_a_host(async |host| {
        // One address where nobody listens, and one to which no way leads.
        let nowhere = ["127.0.0.2:53".parse().unwrap(), "192.0.2.1:53".parse().unwrap()];
        let server = host.server(&nowhere).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        let begin = Instant::now();
        assert_eq!(ask("www.example.com"), "SERVFAIL");
        assert_eq!(ask_tcp(&mut TcpStream::connect(DNS).unwrap(), "www.example.com"), "SERVFAIL");
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
        server.stop().await.unwrap();
    });
}

fn circle() {
    on_a_host(async |host| {
        // A stub that asks whoever it is configured to ask: us.
        let stub = Resolver::start("127.0.0.2", |query, _| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut again = query.as_slice().to_vec();
            again[..2].copy_from_slice(&sys::random::bytes::<2>());
            socket.send_to(&again, DNS).unwrap();
            None
        });
        let own: IpAddr = "10.96.0.10".parse().unwrap();
        let server = host.server(&[SocketAddr::new(own, 53), stub.address]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        assert_eq!(ask("www.example.com"), "SERVFAIL");
        assert!(stub.asked() <= 2, "asked {} times", stub.asked());
        server.stop().await.unwrap();
    });
}

fn slow_connections() {
    on_a_host(async |host| {
        let server = host.server(&[]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        let slow: Vec<TcpStream> = (0..40)
            .map(|_| {
                let mut stream = TcpStream::connect(DNS).unwrap();
                stream.write_all(&[0]).unwrap();
                stream
            })
            .collect();
        assert_eq!(ask(WEB), "NOERROR 10.96.0.7");
        // A client has so many connections; the others are closed.
        let closed = slow.iter().filter(|stream| {
            stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let end = std::io::Read::read(&mut &**stream, &mut [0; 1]);
            !matches!(end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
        });
        assert_eq!(closed.count(), 8);
        drop(slow);
        let begin = Instant::now();
        loop {
            let mut stream = TcpStream::connect(DNS).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let sent = stream.write_all(&prefixed(&question(WEB)));
            if sent.is_ok() && stream.read_exact(&mut [0; 2]).is_ok() {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "there is no room again");
        }
        server.stop().await.unwrap();
    });
}

/// The server's stack is as deep for the last of them as for the first.
fn pipelined_queries() {
    const COUNT: usize = 20_000;
    on_a_host(async |host| {
        let knows = Resolver::start("127.0.0.2", |query, _| Some(addresses(query, 1)));
        let server = host.server(&[knows.address]).await;
        server.update(zone("10.96.0.7")).await.unwrap();
        let mut stream = TcpStream::connect(DNS).unwrap();
        let mut all = prefixed(&question(WEB)).repeat(COUNT);
        // Nor does one that is asked elsewhere end the way of those after it.
        all.extend(prefixed(&question("www.example.com")));
        all.extend(prefixed(&question(WEB)));
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&all));
        for number in 0..COUNT {
            assert_eq!(read_reply(&mut stream), "NOERROR 10.96.0.7", "{number}");
        }
        assert_eq!(read_reply(&mut stream), "NOERROR 192.0.2.0");
        assert_eq!(read_reply(&mut stream), "NOERROR 10.96.0.7");
        writing.join().unwrap().unwrap();
        server.stop().await.unwrap();
    });
}
