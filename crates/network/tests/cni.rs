//! CNI with the reference plugins and with small ones of our own, each test in a network namespace of its own that
//! stands for the host.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use network::{
    AttachRequest, Attachment, Config, Dns, LiveSandbox, Mode, Network, NetworkError, PortMapping, Protocol,
};
use serde_json::{Value, json};
use sys::netlink::Socket;
use sys::netns;
use testkit::go;

const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test on a thread of its own in a private host namespace.
fn on_a_host(test: impl AsyncFnOnce(Host) + Send + 'static) {
    let run = move || {
        if let Err(error) = testkit::netns::enter_private() {
            println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Host::new()));
    };
    std::thread::spawn(run).join().unwrap();
}

struct Host {
    dir: tempfile::TempDir,
    here: OwnedFd,
}

impl Host {
    fn new() -> Host {
        let host = Host { dir: tempfile::tempdir().unwrap(), here: netns::current().unwrap() };
        for dir in ["net.d", "bin", "log"] {
            fs::create_dir(host.path(dir)).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> Config {
        let mut config = Config::new(self.path("network"));
        config.cni_conf_dir = self.path("net.d");
        config.cni_bin_dirs = vec![self.path("bin")];
        config.cni_state_dir = self.path("state");
        config.addresses = vec!["10.96.0.10".parse().unwrap()];
        config
    }

    async fn network(&self, live: Vec<LiveSandbox>) -> Arc<Network> {
        self.network_with(self.config(), live).await
    }

    async fn network_with(&self, config: Config, live: Vec<LiveSandbox>) -> Arc<Network> {
        let network = Network::new(config).unwrap();
        network.adopt(live).await.unwrap();
        network
    }

    fn conf(&self, file: &str, conf: &Value) {
        fs::write(self.path("net.d").join(file), conf.to_string()).unwrap();
    }

    /// A plugin that notes how it is called. `body` is shell; without more it answers with an address.
    fn plugin(&self, name: &str, body: &str) {
        let text = format!(
            r#"#!/bin/sh
log={log}
input=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID {name}" >> $log/calls
printf '%s' "$input" > "$log/{name}.$CNI_COMMAND.$CNI_CONTAINERID"
env > "$log/env.{name}.$CNI_COMMAND.$CNI_CONTAINERID"
{body}
if [ "$CNI_COMMAND" = ADD ]; then
    [ "$(stat -L -f -c %T "$CNI_NETNS")" = nsfs ] || exit 9
    echo '{{"cniVersion":"1.1.0","interfaces":[{{"name":"eth0","sandbox":"x"}}],
        "ips":[{{"address":"10.1.0.2/24","interface":0}}],"dns":{{"nameservers":["10.1.0.1"]}}}}'
fi
"#,
            log = self.path("log").display()
        );
        // Another test may fork while a file is open for writing, and the kernel starts no such program: write it aside.
        let (path, aside) = (self.path("bin").join(name), self.path("bin").join(format!(".{name}")));
        fs::write(&aside, text).unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&aside, &path).unwrap();
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("log/calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn input(&self, call: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path("log").join(call)).unwrap()).unwrap()
    }

    fn environment(&self, call: &str) -> String {
        fs::read_to_string(self.path("log").join(format!("env.{call}"))).unwrap()
    }

    /// Waits for what a thread of the network does by itself.
    fn wait(&self, what: &str, mut check: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !check() {
            assert!(begin.elapsed() < PATIENCE, "{what}: {:?}", self.calls());
            std::thread::yield_now();
        }
    }
}

fn request(id: &str) -> AttachRequest {
    AttachRequest {
        sandbox_id: id.to_owned(),
        namespace: "default".into(),
        name: format!("pod-{id}"),
        uid: format!("uid-{id}"),
        ..AttachRequest::default()
    }
}

fn live(attachments: &[(&str, &Attachment)]) -> Vec<LiveSandbox> {
    let one = |(id, attachment): &(&str, &Attachment)| LiveSandbox {
        sandbox_id: (*id).to_owned(),
        netns: Some(attachment.netns.try_clone().unwrap()),
    };
    attachments.iter().map(one).collect()
}

fn list(version: &str, plugins: &[&str]) -> Value {
    let plugins: Vec<Value> = plugins.iter().map(|kind| json!({"type": kind})).collect();
    json!({"cniVersion": version, "name": "net", "plugins": plugins})
}

fn ask(netns: &OwnedFd, server: SocketAddr) -> io::Result<String> {
    let mut stream = netns::run_in(netns.as_fd(), || TcpStream::connect_timeout(&server, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn serve(netns: &OwnedFd, port: u16) {
    let listener = netns::run_in(netns.as_fd(), || TcpListener::bind(("0.0.0.0", port))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(b"hello");
        }
    });
}

fn links(kind: &str) -> usize {
    Socket::route().unwrap().links().unwrap().iter().filter(|link| link.kind == kind).count()
}

#[test]
fn the_reference_plugins_connect_pods_and_leave_nothing() {
    let mut programs = Vec::new();
    for program in [go::BRIDGE, go::HOST_LOCAL, go::PORTMAP] {
        match go::build(&program) {
            Ok(path) => programs.push((program.name, path)),
            Err(error) => {
                println!("skipped: needs go and the module proxy ({error:#})");
                return;
            }
        }
    }
    on_a_host(async move |host| {
        for (name, path) in programs {
            symlink(path, host.path("bin").join(name)).unwrap();
        }
        let data = host.path("ipam");
        host.conf(
            "10-net.conflist",
            &json!({"cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "cniVersion": "0.4.0", "name": "net", "plugins": [
                {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {
                    "type": "host-local", "dataDir": data, "routes": [{"dst": "0.0.0.0/0"}],
                    "ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00:1::/64"}]]}},
                {"type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables"},
            ]}),
        );
        let network = host.network(Vec::new()).await;
        assert_eq!(network.status().mode, Mode::Cni("net".into()));
        let a = network.attach(request("a")).await.unwrap();
        let ports = vec![PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 8080, host_ip: None }];
        let b = network.attach(AttachRequest { port_mappings: ports.clone(), ..request("b") }).await.unwrap();
        assert!(a.ips.len() == 2 && a.ips[0].is_ipv4() && a.interface == "eth0", "{a:?}");
        assert!(b.mtu.is_some() && b.mac.as_ref().is_some_and(|mac| mac.len() == 17), "{b:?}");
        serve(&b.netns, 80);
        assert_eq!(ask(&a.netns, (b.ips[0], 80).into()).unwrap(), "hello", "from pod to pod");
        assert_eq!(ask(&b.netns, ([127, 0, 0, 1], 80).into()).unwrap(), "hello", "loopback is up");
        assert_eq!(ask(&host.here, ([10, 1, 0, 1], 8080).into()).unwrap(), "hello", "through the host port");
        let clash = network.attach(AttachRequest { port_mappings: ports, ..request("c") }).await.unwrap_err();
        assert!(matches!(&clash, NetworkError::PortTaken { owner, .. } if owner == "b"), "{clash}");
        let stats = network.stats("b").await.unwrap();
        assert!(stats[0].name == "eth0" && stats[0].rx_packets > 0, "{stats:?}");
        assert_eq!(links("bridge"), 1, "only the plugin's own");

        // Another daemon: the same paths, the same configuration although the file has changed.
        let live = live(&[("a", &a), ("b", &b)]);
        drop(network);
        host.conf("10-net.conflist", &list("1.0.0", &["other"]));
        let network = host.network(live).await;
        for id in ["a", "b"] {
            network.check(id).await.unwrap();
        }
        let owned = network.fsck().await.unwrap();
        assert!(owned.iter().all(|owned| owned.owner.is_some()), "{owned:?}");
        network.detach("b").await.unwrap();
        network.detach("b").await.unwrap();
        ask(&host.here, ([10, 1, 0, 1], 8080).into()).expect_err("the host port is gone");
        network.detach("a").await.unwrap();
        assert_eq!(links("veth"), 0);
        let left: Vec<_> = fs::read_dir(data.join("net"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.parse::<IpAddr>().is_ok())
            .collect();
        assert!(left.is_empty(), "addresses are free again: {left:?}");
        network.shutdown().await.unwrap();
        assert_eq!(network.fsck().await.unwrap(), []);
    });
}

#[test]
fn plugins_are_told_what_the_specification_says() {
    on_a_host(async |host| {
        host.plugin("first", "");
        host.plugin("second", "");
        host.conf(
            "10.conflist",
            &json!({"cniVersion": "1.1.0", "name": "net", "plugins": [
                {"type": "first", "key": [1, {"deep": null}], "capabilities": {"dns": true, "portMappings": false}},
                {"type": "second", "capabilities": {"portMappings": true, "bandwidth": true, "ips": true}},
            ]}),
        );
        let network = host.network(Vec::new()).await;
        let attached = network
            .attach(AttachRequest {
                port_mappings: vec![PortMapping {
                    protocol: Protocol::Udp,
                    container_port: 53,
                    host_port: 5353,
                    host_ip: None,
                }],
                annotations: [("kubernetes.io/egress-bandwidth".into(), "1M".into())].into(),
                dns: Dns { nameservers: vec!["10.96.0.10".into()], ..Dns::default() },
                ..request("a")
            })
            .await
            .unwrap();
        assert_eq!(attached.ips, ["10.1.0.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(attached.dns.as_ref().unwrap().nameservers, ["10.1.0.1"]);
        network.check("a").await.unwrap();
        let alive = live(&[("a", &attached)]);
        drop(network);
        let network = host.network(alive).await;
        network.detach("a").await.unwrap();
        let expected = [
            "GC  first",
            "GC  second",
            "ADD a first",
            "ADD a second",
            "CHECK a first",
            "CHECK a second",
            "GC  first",
            "GC  second",
            "DEL a second",
            "DEL a first",
        ];
        assert_eq!(host.calls(), expected);

        let first = host.input("first.ADD.a");
        assert_eq!((&first["name"], &first["cniVersion"]), (&json!("net"), &json!("1.1.0")));
        assert_eq!(first["key"], json!([1, {"deep": null}]), "passed on as it is");
        assert_eq!(first["runtimeConfig"]["dns"]["servers"], json!(["10.96.0.10"]));
        assert!(first["runtimeConfig"].get("portMappings").is_none() && first.get("prevResult").is_none(), "{first}");
        let second = host.input("second.ADD.a");
        assert_eq!(second["prevResult"]["ips"][0]["address"], "10.1.0.2/24");
        assert_eq!(second["runtimeConfig"]["portMappings"][0]["hostPort"], 5353);
        assert_eq!(second["runtimeConfig"]["bandwidth"]["egressRate"], 1_000_000);
        for call in ["first.DEL.a", "second.DEL.a", "first.CHECK.a"] {
            assert_eq!(host.input(call)["prevResult"], second["prevResult"], "{call}: the result of the last ADD");
        }
        assert_eq!(
            host.input("first.GC.")["cni.dev/valid-attachments"],
            json!([{"containerID": "a", "ifname": "eth0"}])
        );

        let environment = host.environment("first.ADD.a");
        let netns = host.path("network/netns/a");
        for expected in [
            "CNI_COMMAND=ADD".to_owned(),
            "CNI_CONTAINERID=a".to_owned(),
            "CNI_IFNAME=eth0".to_owned(),
            format!("CNI_NETNS={}", netns.display()),
            format!("CNI_PATH={}", host.path("bin").display()),
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-a;K8S_POD_INFRA_CONTAINER_ID=a;K8S_POD_UID=uid-a"
                .to_owned(),
        ] {
            assert!(environment.lines().any(|line| line == expected), "{expected} is not in\n{environment}");
        }
        assert!(!environment.contains("CARGO"), "nothing of the daemon's environment:\n{environment}");
        assert!(host.environment("first.DEL.a").contains(&format!("CNI_NETNS={}", netns.display())));
        network.shutdown().await.unwrap();
        assert_eq!(network.fsck().await.unwrap(), []);
    });
}

#[test]
fn a_sandbox_that_died_is_deleted_also_after_a_reboot() {
    on_a_host(async |host| {
        host.plugin("one", "");
        host.conf("10.conflist", &list("0.4.0", &["one"]));
        let network = host.network(Vec::new()).await;
        network.attach(request("a")).await.unwrap();
        drop(network);
        // Of the run directory nothing survives a boot.
        fs::remove_dir_all(host.path("network")).unwrap();
        host.plugin("one", "[ \"$CNI_COMMAND\" = DEL ] && { echo '{\"code\":11,\"msg\":\"not yet\"}'; exit 1; }");
        let network = host.network(Vec::new()).await;
        host.wait("DEL is called", || host.calls().contains(&"DEL a one".to_owned()));
        let leak = network.fsck().await.unwrap().into_iter().find(|owned| owned.kind == "record").unwrap();
        assert_eq!((leak.name.as_str(), leak.owner), ("a", None), "shown for as long as it is not deleted");
        drop(network);

        host.plugin("one", "");
        let network = host.network(Vec::new()).await;
        host.wait("the record goes", || fs::read_dir(host.path("state")).unwrap().count() == 0);
        assert!(host.environment("one.DEL.a").lines().any(|line| line == "CNI_NETNS="), "its namespace is gone");
        assert_eq!(host.input("one.DEL.a")["prevResult"]["ips"][0]["address"], "10.1.0.2/24");
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_hung_plugin_costs_its_own_pod_only() {
    on_a_host(async |host| {
        host.plugin("one", "case $CNI_COMMAND$CNI_ARGS in ADD*pod-slow*) sleep 1000 & wait;; esac");
        host.conf("10.conflist", &list("1.0.0", &["one"]));
        let config = Config { cni_limit: Duration::from_secs(3), ..host.config() };
        let network = host.network_with(config, Vec::new()).await;
        let begin = Instant::now();
        let slow = tokio::spawn({
            let network = network.clone();
            async move { network.attach(request("slow")).await.map_err(|error| (begin.elapsed(), error.to_string())) }
        });
        let mut others = 0;
        while !slow.is_finished() || others == 0 {
            network.attach(request("b")).await.unwrap();
            network.detach("b").await.unwrap();
            others += 1;
        }
        assert!(others > 1, "others are attached meanwhile");
        let (took, error) = slow.await.unwrap().unwrap_err();
        assert!(error.starts_with("CNI plugin one (ADD): it did not end within 3 s"), "{error}");
        assert!(took >= Duration::from_secs(3), "{took:?}");
        assert!(host.calls().contains(&"DEL slow one".to_owned()), "DEL after a failed ADD");
        assert_eq!(fs::read_dir(host.path("state")).unwrap().count(), 0);
        network.shutdown().await.unwrap();
        assert_eq!(network.fsck().await.unwrap(), []);
    });
}

#[test]
fn failures_name_plugin_and_reason_and_leave_nothing() {
    on_a_host(async |host| {
        host.plugin("first", "");
        host.conf("10.conflist", &list("1.0.0", &["first", "second"]));
        let network = host.network(Vec::new()).await;
        let missing = network.status().problem.unwrap();
        assert!(missing.starts_with("the CNI plugin second is not in "), "{missing}");
        let add = |body: &str| format!("[ $CNI_COMMAND = ADD ] && {{ {body}; }}");
        for (body, expected) in [
            (
                add(r#"echo '{"code":7,"msg":"bad range","details":"10.0.0.0/33"}'; exit 1"#),
                "CNI plugin second (ADD): bad range; 10.0.0.0/33 (code 7)",
            ),
            (add("echo oops >&2; exit 2"), "CNI plugin second (ADD): exit status 2: oops"),
            (add("echo garbage; exit 0"), "CNI plugin second (ADD): its answer is no CNI result: expected value"),
            (add("echo '{}'; exit 0"), "CNI plugin second (ADD): it gave the pod no address on eth0"),
            (add("cat /dev/zero"), "CNI plugin second (ADD): it wrote more than 1048576 bytes"),
            (add("kill -9 $$"), "CNI plugin second (ADD): killed by signal 9 without a message"),
        ] {
            host.plugin("second", &body);
            let error = network.attach(request("a")).await.unwrap_err().to_string();
            assert!(error.starts_with(expected), "{body}: {error}");
            assert_eq!(host.calls()[host.calls().len() - 2..], ["DEL a second", "DEL a first"], "{body}");
            assert_eq!(fs::read_dir(host.path("state")).unwrap().count(), 0);
        }
        let bandwidth = AttachRequest {
            annotations: [("kubernetes.io/ingress-bandwidth".into(), "much".into())].into(),
            ..request("a")
        };
        let error = network.attach(bandwidth).await.unwrap_err();
        assert!(matches!(error, NetworkError::Config(_)), "{error}");

        // A failed DEL keeps the sandbox, so that it can be tried again.
        host.plugin("second", "[ $CNI_COMMAND = DEL ] && exit 1");
        network.attach(request("a")).await.unwrap();
        network.detach("a").await.unwrap_err();
        assert!(matches!(network.attach(request("a")).await, Err(NetworkError::AlreadyAttached(_))));
        host.plugin("second", "");
        network.detach("a").await.unwrap();
        network.attach(request("a")).await.unwrap();
        network.detach("a").await.unwrap();
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_broken_configuration_is_said_and_heals() {
    on_a_host(async |host| {
        host.plugin("one", "");
        fs::write(host.path("net.d/10-broken.conflist"), "{").unwrap();
        host.conf("20-good.conflist", &list("1.0.0", &["one"]));
        let network = host.network(Vec::new()).await;
        let status = network.status();
        assert_eq!(status.mode, Mode::Cni(String::new()));
        assert!(status.problem.as_ref().is_some_and(|text| text.contains("10-broken.conflist")), "{status:?}");
        let error = network.attach(request("a")).await.unwrap_err();
        assert!(error.to_string().contains("10-broken.conflist"), "{error}");
        assert_eq!((host.calls().len(), links("bridge")), (0, 0), "neither the next file nor the built-in bridge");

        fs::remove_file(host.path("net.d/10-broken.conflist")).unwrap();
        assert_eq!(network.status().problem, None);
        network.attach(request("a")).await.unwrap();
        fs::remove_file(host.path("net.d/20-good.conflist")).unwrap();
        let vanished = network.status().problem.unwrap();
        assert!(vanished.contains("has vanished"), "{vanished}");
        network.attach(request("b")).await.expect_err("no pod lands on another network");
        network.detach("a").await.expect("with the configuration of its ADD");
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_plugin_that_is_not_ready_is_no_network() {
    on_a_host(async |host| {
        let status = r#"[ $CNI_COMMAND = STATUS ] && { echo '{"code":50,"msg":"no daemon"}'; exit 1; }"#;
        host.plugin("one", status);
        host.conf("10.conflist", &list("1.1.0", &["one"]));
        let network = host.network(Vec::new()).await;
        host.wait("STATUS is asked", || network.status().problem.is_some());
        assert_eq!(network.status().problem.unwrap(), "CNI plugin one (STATUS): no daemon (code 50)");
        assert!(host.input("one.STATUS.").get("runtimeConfig").is_none());
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_plugin_that_speaks_another_version_is_named() {
    on_a_host(async |host| {
        let version = r#"[ $CNI_COMMAND = VERSION ] && echo '{"supportedVersions":["0.3.1","0.4.0"]}'"#;
        host.plugin("one", version);
        host.conf("10.conf", &json!({"cniVersion": "1.0.0", "name": "net", "type": "one"}));
        let network = host.network(Vec::new()).await;
        host.wait("VERSION is asked", || network.status().problem.is_some());
        let problem = network.status().problem.unwrap();
        assert!(problem.contains("one speaks 0.3.1, 0.4.0, not the configuration's cniVersion 1.0.0"), "{problem}");
        host.conf("10.conf", &json!({"cniVersion": "0.4.0", "name": "net", "type": "one"}));
        host.wait("it is asked again", || network.status().problem.is_none() && host.calls().len() == 2);
        assert_eq!(host.calls(), ["VERSION  one", "VERSION  one"], "no more often");
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_node_without_a_name_server_has_nothing_on_loopback() {
    on_a_host(async |host| {
        host.plugin("mini", "");
        host.conf("10-net.conflist", &list("1.1.0", &["mini"]));
        let config = Config { addresses: Vec::new(), ..host.config() };
        let network = host.network_with(config, Vec::new()).await;
        assert_eq!(network.status().mode, Mode::Cni("net".into()));
        network.attach(request("a")).await.unwrap();
        network.detach("a").await.unwrap();
    });
}

#[test]
fn a_configuration_that_appears_takes_over_from_the_bridge() {
    on_a_host(async |host| {
        host.plugin("one", "");
        let network = host.network(Vec::new()).await;
        assert_eq!(network.status().mode, Mode::Bridge);
        let bridged = network.attach(request("bridged")).await.unwrap();
        host.wait("slots are prepared", || links("veth") > 1);
        host.conf("10.conflist", &list("1.0.0", &["one"]));
        let plugged = network.attach(request("plugged")).await.unwrap();
        assert_eq!(host.calls(), ["ADD plugged one"]);
        host.wait("slots are given up", || links("veth") == 1);
        let alive = live(&[("bridged", &bridged), ("plugged", &plugged)]);
        drop(network);

        let network = host.network(alive).await;
        assert_eq!((links("bridge"), links("veth")), (1, 1), "the bridge stays for those who are on it");
        let owned = network.fsck().await.unwrap();
        assert!(owned.iter().all(|owned| owned.owner.is_some()), "{owned:?}");
        for id in ["bridged", "plugged"] {
            network.detach(id).await.unwrap();
        }
        assert_eq!((links("veth"), host.calls().last().unwrap().as_str()), (0, "DEL plugged one"));
        drop(network);
        let network = host.network(Vec::new()).await;
        assert_eq!(links("bridge"), 0, "nobody needs it any more");
        let address: IpAddr = "10.96.0.10".parse().unwrap();
        let has_address = || Socket::route().unwrap().addresses().unwrap().iter().any(|(_, ip, _)| *ip == address);
        assert!(has_address(), "the name server's address is on loopback now");
        network.shutdown().await.unwrap();
        assert!(!has_address());
        assert_eq!(network.fsck().await.unwrap(), []);
    });
}
