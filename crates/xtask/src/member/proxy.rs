//! `orlop proxy` beside a node: a second machine, which is a network namespace with a way to the first, reaches Services by
//! a proxy of its own.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use testkit::control_plane::Options;
use testkit::{host, netns, pace};

use super::{ADDRESS, Fleet, NODE, SOON, wait};
use crate::voyage::http_text;

/// Where the two machines meet (RFC 5737).
const THIS_SIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(super) const THAT_SIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const LINK: &str = "berth0";
const HEALTHZ: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// A proxy on another machine of the fleet.
struct Beside {
    orlop: PathBuf,
    dir: PathBuf,
    kubeconfig: PathBuf,
    /// Of a user without rights.
    stranger: PathBuf,
    /// The Service that leads to the API server.
    service: SocketAddr,
}

/// The point.
pub(super) fn serves_alone(fleet: &mut Fleet) -> anyhow::Result<String> {
    let service = fleet.get("service kubernetes")?;
    let address: IpAddr = service["spec"]["clusterIP"].as_str().context("an address")?.parse()?;
    let dir = fleet.stage.dir.path().join("beside");
    std::fs::create_dir_all(&dir)?;
    let beside = Beside {
        orlop: fleet.stage.orlop.clone(),
        dir,
        kubeconfig: fleet.proxy_kubeconfig.clone(),
        stranger: fleet.bootstrap_kubeconfig.clone(),
        service: SocketAddr::new(address, 443),
    };
    let told = on_another_machine(fleet.plane.options(), || beside.check())?;
    let events = fleet.get("events --field-selector reason=Starting,involvedObject.kind=Node")?;
    let is_its_own = |event: &serde_json::Value| event["source"]["component"] == "kube-proxy";
    ensure!(events["items"].as_array().is_some_and(|all| all.iter().any(is_its_own)), "no event Starting: {events}");
    Ok(told)
}

/// Does `work` on a machine beside the first, which is a network namespace with a way there; each machine is the other's way to
/// pods that are not its own. Services have none: whoever leads to them has to be there.
pub(super) fn on_another_machine<T: Send>(
    options: &Options,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let (here, thread) = (std::process::id(), rustix::thread::gettid().as_raw_nonzero());
    let first = format!("/proc/{here}/task/{thread}/ns/net");
    let checked = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            netns::enter_private()?;
            ip(&["link", "add", "eth0", "type", "veth", "peer", "name", LINK, "netns", &first])?;
            ip(&["address", "add", &format!("{THAT_SIDE}/24"), "dev", "eth0"])?;
            ip(&["link", "set", "eth0", "up"])?;
            // The other end is up in a moment, and so is the way.
            wait("a way to the first machine", SOON, || {
                Ok(ip(&["route", "replace", &ADDRESS.to_string(), "via", &THIS_SIDE.to_string()]).ok())
            })?;
            ip(&["route", "replace", &options.pod_range, "via", &THIS_SIDE.to_string()])?;
            ip(&["route", "replace", &options.service_range, "dev", "eth0"])?;
            work()
        });
        wait("the link of the second machine", SOON, || Ok(ip(&["link", "set", LINK, "up"]).ok()))?;
        ip(&["address", "add", &format!("{THIS_SIDE}/24"), "dev", LINK])?;
        ip(&["route", "replace", &options.pod_range, "via", &THAT_SIDE.to_string()])?;
        work.join().map_err(|_| anyhow::anyhow!("the second machine's thread panicked"))?
    });
    // It goes with the other namespace; after a failure before that, too.
    let _ = ip(&["link", "delete", LINK]);
    checked
}

fn ip(words: &[&str]) -> anyhow::Result<()> {
    host::output(Command::new("ip").args(words)).map(drop)
}

impl Beside {
    fn check(&self) -> anyhow::Result<String> {
        self.refuses_what_is_wrong()?;
        ensure!(self.ask().is_err(), "{} answers without a proxy", self.service);
        let mut proxy = self.start(&["--kubeconfig", &self.kubeconfig.display().to_string()], "proxy.log")?;
        let worked = self.works(&mut proxy);
        // Ended already if all went well.
        let _ = proxy.kill();
        let _ = proxy.wait();
        worked.with_context(|| std::fs::read_to_string(self.dir.join("proxy.log")).unwrap_or_default())?;
        self.run(&["--cleanup"]).and_then(succeeded)?;
        ensure!(self.ask().is_err(), "{} still answers after --cleanup", self.service);
        Ok(format!("{} answers by a proxy of its own, also while it starts anew", self.service))
    }

    fn works(&self, proxy: &mut Child) -> anyhow::Result<()> {
        wait("the Service answers", SOON, || Ok(self.ask().is_ok().then_some(())))?;
        let mut open = TcpStream::connect(self.service)?;
        self.tells_of_itself()?;
        let nobody = SocketAddr::new(self.service.ip(), 9);
        let refused = TcpStream::connect_timeout(&nobody, SOON).err().context("a port that no Service has answers")?;
        ensure!(refused.kind() == std::io::ErrorKind::ConnectionRefused, "{nobody}: {refused}");
        // Killed, and started again: neither old nor new connections notice.
        proxy.kill()?;
        proxy.wait()?;
        self.ask().context("while no proxy runs")?;
        *proxy = self.start(&["--kubeconfig", &self.kubeconfig.display().to_string()], "proxy.log")?;
        wait("the second proxy is well", SOON, || Ok((http_text("GET", HEALTHZ, "/healthz")?.0 == 200).then_some(())))?;
        ensure!(greeting(&mut open)?.contains("HTTPS"), "the connection that was open is broken");
        self.ask().context("after a restart")?;
        let pid = i32::try_from(proxy.id()).ok().and_then(rustix::process::Pid::from_raw).context("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let ended = wait("the proxy ends", SOON, || Ok(proxy.try_wait()?))?;
        ensure!(ended.success(), "the proxy ended with {ended}");
        self.ask().context("the rules outlive the proxy")
    }

    /// What dashboards and probes ask, and what operators do.
    fn tells_of_itself(&self) -> anyhow::Result<()> {
        // The kernel has the rules a moment before it is told that they are of now.
        let healthz = wait("/healthz has IPv4", SOON, || {
            let (status, text) = http_text("GET", HEALTHZ, "/healthz")?;
            Ok((status == 200 && text.contains("\"IPv4\"")).then_some(text))
        })?;
        ensure!(healthz.contains("\"nodeEligible\":true"), "/healthz is {healthz}");
        ensure!(http_text("GET", HEALTHZ, "/livez")?.0 == 200, "/livez");
        ensure!(http_text("GET", METRICS, "/proxyMode")?.1 == "nftables", "/proxyMode");
        let configuration = http_text("GET", METRICS, "/configz")?.1;
        ensure!(configuration.contains("\"maxPerCore\":0"), "/configz is {configuration}");
        let metrics = http_text("GET", METRICS, "/metrics")?.1;
        for needle in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_proxy_healthz_total{code=\"200\"}",
            "rest_client_requests_total{code=\"200\"",
            "process_resident_memory_bytes",
        ] {
            ensure!(metrics.contains(needle), "/metrics lacks {needle}");
        }
        let told = self.run(&["--explain", "default/kubernetes"]).and_then(succeeded)?;
        ensure!(told.contains(&format!("{}/TCP (cluster IP): to 1 endpoint", self.service)), "--explain says {told}");
        Ok(())
    }

    /// Each wrong input is named, with what would be right.
    fn refuses_what_is_wrong(&self) -> anyhow::Result<()> {
        let file = self.dir.join("wrong.conf");
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        std::fs::write(&file, format!("{head}proxyMode: nftables\nconntrack: {{min: many}}\n"))?;
        let file = file.display().to_string();
        for (words, needles) in [
            (&["--kubeconfig", "/nowhere"][..], &["/nowhere"][..]),
            (&[], &["--kubeconfig"]),
            (&["--proxy-mode", "kernelspace"], &["kernelspace", "nftables"]),
            (&["--detect-local-mode", "BridgeInterface"], &["detectLocal.bridgeInterface"]),
            (&["--config", &file], &["proxyMode: there is no such field", "conntrack.min"]),
        ] {
            let output = self.run(words)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(1), "{words:?} ended with {}: {said}", output.status);
            for needle in needles {
                ensure!(said.contains(needle), "{words:?} says {said:?} and nothing of {needle:?}");
            }
        }
        let mut stranger = self.start(&["--kubeconfig", &self.stranger.display().to_string()], "stranger.log")?;
        let told = wait("who has no rights is told", SOON, || {
            let log = std::fs::read_to_string(self.dir.join("stranger.log"))?;
            Ok(log.contains("check the rights of this user").then_some(()))
        });
        stranger.kill()?;
        stranger.wait()?;
        told
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.orlop);
        command.env("ORLOP_RUN_DIR", self.dir.join("run")).env("ORLOP_STATE_DIR", self.dir.join("state"));
        // The table of connections is the machine's, not the namespace's.
        command.args(["proxy", "--hostname-override", NODE, "--conntrack-max-per-core", "0"]).args(words);
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> anyhow::Result<Output> {
        self.command(words).output().context("start orlop proxy")
    }

    fn start(&self, words: &[&str], log: &str) -> anyhow::Result<Child> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join(log))?;
        let mut command = self.command(words);
        command.stdout(log.try_clone()?).stderr(log).spawn().context("start orlop proxy")
    }

    /// The API server behind the Service says something.
    fn ask(&self) -> anyhow::Result<()> {
        let limit = pace::stretched(Duration::from_secs(3));
        let mut stream = TcpStream::connect_timeout(&self.service, limit)?;
        let said = greeting(&mut stream)?;
        ensure!(said.contains("HTTPS"), "it says {said:?}");
        Ok(())
    }
}

/// What a server that wants TLS says to who speaks plainly.
fn greeting(stream: &mut TcpStream) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(pace::stretched(Duration::from_secs(10))))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

fn succeeded(output: Output) -> anyhow::Result<String> {
    if !output.status.success() {
        bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}
