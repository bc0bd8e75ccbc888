//! The program: argv, configuration, wiring and the local command line.

mod args;
mod check;
mod cli;
mod node;
mod proxy;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use args::{Arguments, Command};
use cli::client::Client;

/// Exit code for a command that failed; usage errors end with 2 (clap's own).
const FAILED: u8 = 1;

fn main() -> ExitCode {
    // An unpacking child is this program too; it must not get further than here.
    image::worker::maybe_run();
    // A container's start is counted in milliseconds: nothing that the other commands need is made for it.
    if let Some(words) = runtime_words(std::env::args_os()) {
        return oci::main(words);
    }
    let arguments = Arguments::parse_from(words(std::env::args_os()));
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("orlop: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

/// The command line of an OCI runtime, if this is one: `orlop oci …`, or `runc …`.
fn runtime_words(given: impl Iterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut words: Vec<OsString> = given.collect();
    if words.first().map(Path::new).and_then(Path::file_name).is_some_and(|name| name == "runc") {
        return Some(words);
    }
    words.get(1).filter(|word| *word == "oci")?;
    words.splice(..2, ["orlop oci".into()]);
    Some(words)
}

/// The command line; by the name of an upstream program it is that program's.
fn words(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<OsString> = given.collect();
    let name = words.first().map(Path::new).and_then(Path::file_name).map(OsStr::to_owned);
    let role = match name.as_deref().and_then(OsStr::to_str) {
        Some("kubelet") => Some("node"),
        Some("kube-proxy") => Some("proxy"),
        _ => None,
    };
    if let Some(role) = role {
        words.insert(1, role.into());
    }
    words
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "orlop", &mut script);
            cli::format::print(&String::from_utf8_lossy(&script));
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(options) => check::run(&arguments.places, &options),
        Command::Up(options) => node::up::run(&arguments.places, &options),
        Command::Node(options) => node::join::run(&arguments.places, &options),
        Command::Proxy(options) => proxy::run(&arguments.places, &options),
        Command::Runtime(options) => node::runtime_only::run(&arguments.places, &options),
        Command::Fsck(options) => cli::fsck::run(&arguments.places, &options),
        Command::Oci { words } => Ok(oci::main(std::iter::once("orlop oci".into()).chain(words).collect())),
        command => {
            let client = Client::new(arguments.places.socket());
            cli::client::block_on(ask(&client, command))?
        }
    }
}

/// The commands that ask a running node.
async fn ask(client: &Client, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ps(options) => cli::ps::run(client, &options).await?,
        Command::Logs(options) => cli::logs::run(client, &options).await?,
        Command::Exec(options) => return cli::streams::exec(client, &options).await,
        Command::Attach(options) => return cli::streams::attach(client, &options).await,
        Command::Cp(options) => cli::streams::cp(client, &options).await?,
        Command::PortForward(options) => cli::streams::port_forward(client, &options).await?,
        Command::Get(options) => cli::get::run(client, &options).await?,
        Command::Describe(options) => cli::describe::run(client, &options).await?,
        Command::Events(options) => cli::events::run(client, &options).await?,
        Command::Top(options) => cli::top::run(client, &options).await?,
        Command::Why(options) => cli::why::run(client, &options).await?,
        Command::Images(options) => cli::images::list(client, &options).await?,
        Command::Pull(options) => cli::images::pull(client, &options.image).await?,
        Command::Load { path } => cli::images::load(client, &path).await?,
        Command::Rmi(options) => cli::images::remove(client, &options.image).await?,
        Command::Version(options) => cli::version::run(client, &options).await?,
        Command::Down => cli::down::run(client).await?,
        Command::Up(_)
        | Command::Node(_)
        | Command::Proxy(_)
        | Command::Runtime(_)
        | Command::Fsck(_)
        | Command::Oci { .. }
        | Command::Check(_)
        | Command::Completion { .. } => {
            anyhow::bail!("not a question to a running node")
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn by_the_name_of_runc_it_is_an_oci_runtime() {
        let words = |line: &[&str]| runtime_words(line.iter().map(OsString::from));
        let of = |line: &[&str]| Some(line.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(words(&["/usr/bin/runc", "state", "a"]), of(&["/usr/bin/runc", "state", "a"]));
        assert_eq!(words(&["orlop", "oci", "state", "a"]), of(&["orlop oci", "state", "a"]));
        assert_eq!(words(&["orlop", "ps", "oci"]), None);
    }

    #[test]
    fn as_kubelet_by_name_or_by_command_it_takes_the_kubelets_flags() {
        let flags = [
            "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf",
            "--kubeconfig=/etc/kubernetes/kubelet.conf",
            "--config=/var/lib/kubelet/config.yaml",
            "--container-runtime-endpoint=unix:///run/orlop/cri.sock",
            "--node-labels=a=b,c=d",
            "--fail-swap-on=false",
            "--register-with-taints=x=y:NoSchedule",
            "--v=4",
        ];
        for program in [&["/usr/bin/kubelet"][..], &["/usr/bin/orlop", "kubelet"], &["/usr/bin/orlop", "node"]] {
            let line = program.iter().chain(&flags).map(OsString::from);
            let Command::Node(options) = Arguments::parse_from(words(line)).command else { panic!("not a node") };
            assert_eq!(options.node_labels, ["a=b", "c=d"]);
            assert_eq!(options.log_level(), tracing::Level::DEBUG);
            let given: Vec<_> = options.configuration.given.iter().map(|(flag, _)| flag.as_str()).collect();
            assert_eq!(given, ["fail-swap-on", "register-with-taints", "container-runtime-endpoint"]);
        }
    }

    /// Of upstream's kubelet 1.37, as `cmd/kubelet/app/options` and the libraries that it registers have them; without `--help`.
    const FLAGS_OF_UPSTREAM: &str = "address allowed-unsafe-sysctls anonymous-auth authentication-token-webhook \
         authentication-token-webhook-cache-ttl authorization-mode authorization-webhook-cache-authorized-ttl \
         authorization-webhook-cache-unauthorized-ttl bootstrap-kubeconfig cert-dir cgroup-driver cgroup-root \
         cgroups-per-qos client-ca-file cloud-provider cluster-dns cluster-domain config config-dir \
         container-log-max-files container-log-max-size container-runtime-endpoint contention-profiling cpu-cfs-quota \
         cpu-cfs-quota-period cpu-manager-policy cpu-manager-policy-options cpu-manager-reconcile-period \
         enable-controller-attach-detach enable-debugging-handlers enable-server enforce-node-allocatable event-burst \
         event-qps eviction-hard eviction-max-pod-grace-period eviction-minimum-reclaim \
         eviction-pressure-transition-period eviction-soft eviction-soft-grace-period exit-on-lock-contention \
         experimental-allocatable-ignore-eviction experimental-mounter-path fail-cgroupv1 fail-swap-on feature-gates \
         file-check-frequency hairpin-mode healthz-bind-address healthz-port hostname-override housekeeping-interval \
         http-check-frequency image-credential-provider-bin-dir image-credential-provider-config \
         image-gc-high-threshold image-gc-low-threshold image-service-endpoint kernel-memcg-notification \
         kube-api-burst kube-api-content-type kube-api-qps kube-reserved kube-reserved-cgroup kubeconfig \
         kubelet-cgroups local-storage-capacity-isolation lock-file log-flush-frequency log-json-info-buffer-size \
         log-json-split-stream log-text-info-buffer-size log-text-split-stream logging-format \
         make-iptables-util-chains manifest-url manifest-url-header max-open-files max-pods maximum-dead-containers \
         maximum-dead-containers-per-container memory-manager-policy minimum-container-ttl-duration \
         minimum-image-ttl-duration node-ip node-labels node-status-max-images node-status-update-frequency \
         oom-score-adj pod-cidr pod-manifest-path pod-max-pids pods-per-core port protect-kernel-defaults provider-id \
         qos-reserved read-only-port register-node register-with-taints registry-burst registry-qps reserved-cpus \
         reserved-memory resolv-conf root-dir rotate-certificates rotate-server-certificates runonce runtime-cgroups \
         runtime-request-timeout seccomp-default serialize-image-pulls streaming-connection-idle-timeout \
         sync-frequency system-cgroups system-reserved system-reserved-cgroup tls-cert-file tls-cipher-suites \
         tls-min-version tls-private-key-file topology-manager-policy topology-manager-policy-options \
         topology-manager-scope v version vmodule volume-plugin-dir volume-stats-agg-period";

    #[test]
    fn every_flag_of_upstreams_kubelet_is_taken_and_no_other() {
        let upstream: BTreeSet<&str> = FLAGS_OF_UPSTREAM.split_whitespace().collect();
        assert_eq!(upstream.len(), 130);
        let value = |flag: &str| match flag {
            "node-ip" => "192.0.2.1",
            "cloud-provider" => "external",
            "seccomp-default" | "exit-on-lock-contention" => "true",
            _ => "1",
        };
        let given = upstream.iter().filter(|flag| **flag != "version").map(|flag| format!("--{flag}={}", value(flag)));
        let line = ["/usr/bin/kubelet".to_owned()].into_iter().chain(given);
        let arguments = Arguments::parse_from(words(line.map(OsString::from)));
        let Command::Node(options) = arguments.command else { panic!("not a node") };
        assert_eq!((options.cloud_provider.as_str(), options.verbosity), ("external", Some(1)));
        assert_eq!(options.root_dir.as_deref(), Some(Path::new("1")));
        let shown = options.flags();
        assert_eq!(
            (shown["root-dir"].as_str(), shown["max-pods"].as_str(), shown["lock-file"].as_str()),
            ("1", "1", "1")
        );
        let missing = upstream.iter().filter(|flag| **flag != "version" && !shown.contains_key(**flag));
        assert_eq!(missing.collect::<Vec<_>>(), [&""; 0], "not in /flagz");
        let fields = kubelet::configuration::LEAVES.iter().chain(kubelet::configuration::FLAGS_WITHOUT_EFFECT);
        for leaf in fields.filter(|leaf| !leaf.flag.is_empty()) {
            assert!(upstream.contains(leaf.flag), "upstream has no --{}", leaf.flag);
        }
        let made_up = ["kubelet", "--kubeconfig=1", "--network-plugin=cni"].map(OsString::from);
        let refused = Arguments::try_parse_from(words(made_up.into_iter())).unwrap_err();
        assert_eq!(refused.kind(), clap::error::ErrorKind::UnknownArgument);
    }

    #[test]
    fn help_says_what_each_field_means() {
        use configfile::Status;
        for leaf in kubelet::configuration::LEAVES.iter().chain(::proxy::configuration::LEAVES) {
            let is_told = leaf.flag.is_empty() || leaf.flag == "pod-cidr" || leaf.status != Status::Honoured;
            assert!(is_told != leaf.about.starts_with(char::is_uppercase), "--{}: {:?}", leaf.flag, leaf.about);
        }
        let help = Arguments::try_parse_from(["orlop", "node", "--help"]).unwrap_err().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for said in [
            "--max-pods <VALUE> Most pods on the node [default: 110] [maxPods]",
            "[default: false; upstream's is true] [failSwapOn]",
            "--read-only-port <VALUE> Has no effect yet [default: unset] [readOnlyPort]",
            "--sync-frequency <VALUE> Has no effect: it waits for events, and for nothing by a timer [default: 1m] [syncFrequency]",
            "--vmodule <VALUE> Has no effect yet [default: unset]",
        ] {
            assert!(help.contains(said), "{said} is not in {help}");
        }
    }

    #[test]
    fn the_version_is_what_kubeadm_looks_for() {
        let by_command = ["node", "kubelet"].map(|role| ["orlop", role, "--version"]);
        for line in [&["/usr/bin/kubelet", "--version"][..], &by_command[0], &by_command[1]] {
            let told = Arguments::try_parse_from(words(line.iter().map(OsString::from))).unwrap_err();
            assert_eq!(told.kind(), clap::error::ErrorKind::DisplayVersion);
            assert_eq!(told.to_string(), "Kubernetes v1.37.2\n");
        }
    }

    #[test]
    fn by_the_name_of_kube_proxy_the_flags_are_its() {
        let line = [
            "/usr/local/bin/kube-proxy",
            "--kubeconfig=/var/lib/kube-proxy/kubeconfig",
            "--hostname-override=n1",
            "--proxy-mode=nftables",
            "--cluster-cidr=10.244.0.0/16",
            "--oom-score-adj=-998",
            "--masquerade-all",
            "--nodeport-addresses=primary,10.0.0.0/8",
            "--v=2",
        ];
        let arguments = Arguments::parse_from(words(line.iter().map(OsString::from)));
        let Command::Proxy(options) = arguments.command else { panic!("not a proxy") };
        let given: Vec<_> = options.configuration.given.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(options.hostname_override.as_deref(), Some("n1"));
        for value in ["nftables", "-998", "true", "primary,10.0.0.0/8"] {
            assert!(given.contains(&value), "{value}: {given:?}");
        }
    }
}
