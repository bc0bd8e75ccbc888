//! Certificates come to their end: they are renewed before it, and the node says so where they were not.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use testkit::certificates::{self, Subject};
use testkit::{host, pace};

use super::{ADDRESS, Fleet, NODE, SOON, log_file, points, wait};

/// What of its life a certificate has behind it when the node gets it: it is due for renewal within half a minute.
const PAST: Duration = Duration::from_secs(100);
/// What it has before it.
const LEFT: Duration = Duration::from_secs(40);
/// In seconds: nothing that was made here holds for so long, what the cluster signs does.
const LONG: &str = "86400";

/// Both certificates of the node are about to end.
pub(super) fn renewed(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.stop_node()?;
    let ends = Times::now(PAST, LEFT)?;
    let client = link(fleet, "kubelet-client", &[], &ends)?;
    link(fleet, "kubelet-server", &[&ADDRESS.to_string()], &ends)?;
    let known = requests(fleet)?.len();
    fleet.start_again()?;
    wait("a new client certificate is there", SOON, || {
        holds_long(Command::new("openssl").args(["x509", "-in"]).arg(&client))
    })?;
    let pending = wait("a new serving certificate is asked for", SOON, || {
        let serving = requests(fleet)?
            .into_iter()
            .skip(known)
            .find(|one| one["spec"]["signerName"] == "kubernetes.io/kubelet-serving");
        Ok(serving)
    })?;
    fleet.kubectl(&format!("certificate approve {}", points::name(&pending)))?;
    let shown = format!(
        "openssl s_client -connect {ADDRESS}:10250 </dev/null 2>/dev/null | openssl x509 -noout -checkend {LONG}"
    );
    wait("the kubelet shows it", SOON, || Ok(Some(host::output(Command::new("sh").args(["-c", &shown]))?)))?;
    let asked = requests(fleet)?.into_iter().skip(known);
    let users: Vec<Value> = asked.map(|one| one["spec"]["username"].clone()).collect();
    ensure!(users.iter().all(|user| *user == format!("system:node:{NODE}")), "they were asked for by {users:?}");
    wait("the lease is renewed when the old one has ended", SOON, || Ok((renewal(fleet)? > ends.until).then_some(())))?;
    Ok(format!("client and server, asked for by the node itself in {} requests", users.len()))
}

/// The certificate of the node's kubeconfig ends, and somebody puts another in its place later.
pub(super) fn ended(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pods = points::ids(&fleet.pods("web")?);
    fleet.stop_node()?;
    let kubeconfig = fleet.stage.dir.path().join("kubelet.conf");
    let own = std::fs::read_to_string(&kubeconfig)?;
    let papers = fleet.stage.dir.path().join("papers.pem");
    let other = own.replace(&current(fleet, "kubelet-client").display().to_string(), &papers.display().to_string());
    ensure!(other.contains("papers.pem"), "the kubeconfig has no certificate of the node's: {own}");
    std::fs::write(&kubeconfig, other)?;
    put(fleet, &papers, &[], &Times::now(PAST, LEFT / 2)?)?;
    let said = said_so_far(fleet)?;
    fleet.start_again()?;
    says(fleet, said, "the lease cannot be renewed", &papers)?;
    let running = fleet.orlop(&["ps", "-A"])?;
    ensure!(pods.iter().all(|(name, _)| running.contains(name)), "pods are missing: {running}");
    is_back(fleet, &papers)?;
    // One that has ended before the node starts.
    fleet.stop_node()?;
    put(fleet, &papers, &[], &Times::past(PAST)?)?;
    let said = said_so_far(fleet)?;
    fleet.start_again()?;
    says(fleet, said, "the node cannot be registered", &papers)?;
    is_back(fleet, &papers)?;
    ensure!(points::ids(&fleet.pods("web")?) == pods, "containers were replaced");
    std::fs::write(&kubeconfig, own)?;
    Ok("it said which file to renew; pods went on, and it came back without a restart".to_owned())
}

/// How much the node has logged.
fn said_so_far(fleet: &Fleet) -> anyhow::Result<usize> {
    Ok(usize::try_from(std::fs::metadata(log_file(&fleet.stage))?.len())?)
}

/// Waits until the node says that something cannot be done, and which file to renew.
fn says(fleet: &Fleet, from: usize, what: &str, papers: &Path) -> anyhow::Result<()> {
    let remedy =
        format!("(the client certificate of {}): Unauthorized; renew them or correct the kubeconfig", papers.display());
    wait("the node says that its credentials have ended", SOON, || {
        let log = std::fs::read(log_file(&fleet.stage))?;
        let new = String::from_utf8_lossy(&log[from.min(log.len())..]).into_owned();
        Ok(new.lines().any(|line| line.contains(what) && line.contains(&remedy)).then_some(()))
    })
}

/// Puts a certificate that holds in place of the one that has ended, and waits for the node.
fn is_back(fleet: &Fleet, papers: &Path) -> anyhow::Result<()> {
    let before = renewal(fleet)?;
    put(fleet, papers, &[], &Times::now(PAST, Duration::from_secs(30 * 24 * 3600))?)?;
    wait("the lease is renewed again", SOON, || Ok((renewal(fleet)? > before).then_some(())))?;
    wait("the node is Ready", SOON, || {
        let node = fleet.get(&format!("node {NODE}"))?;
        Ok((points::condition(&node, "Ready") == Some("True")).then_some(()))
    })
}

/// From when until when a certificate holds.
struct Times {
    /// As openssl-ca(1) has them.
    span: [String; 2],
    /// The end, as the API has times.
    until: String,
}

impl Times {
    fn now(past: Duration, left: Duration) -> anyhow::Result<Self> {
        let now = SystemTime::now();
        Self::of(now - pace::stretched(past), now + pace::stretched(left))
    }

    /// Those of one that has just ended.
    fn past(past: Duration) -> anyhow::Result<Self> {
        let now = SystemTime::now();
        Self::of(now - pace::stretched(past), now - Duration::from_secs(1))
    }

    fn of(from: SystemTime, until: SystemTime) -> anyhow::Result<Self> {
        let compact = "+%Y%m%d%H%M%SZ";
        Ok(Self { span: [date(from, compact)?, date(until, compact)?], until: date(until, "+%Y-%m-%dT%H:%M:%SZ")? })
    }
}

fn date(time: SystemTime, format: &str) -> anyhow::Result<String> {
    let second = format!("@{}", time.duration_since(UNIX_EPOCH)?.as_secs());
    let told = host::output(Command::new("date").args(["-u", "-d", &second, format]))?;
    Ok(String::from_utf8(told)?.trim().to_owned())
}

/// Where the node has the certificate that counts.
fn current(fleet: &Fleet, stem: &str) -> PathBuf {
    fleet.stage.dir.path().join(format!("state/kubelet/pki/{stem}-current.pem"))
}

/// Puts a certificate of the node, and its key, in the place of the one that counts.
fn link(fleet: &Fleet, stem: &str, hosts: &[&str], times: &Times) -> anyhow::Result<PathBuf> {
    let current = current(fleet, stem);
    let short = current.with_file_name(format!("{stem}-short.pem"));
    put(fleet, &short, hosts, times)?;
    std::fs::remove_file(&current)?;
    std::os::unix::fs::symlink(short.file_name().context("a name")?, &current)?;
    Ok(current)
}

/// Writes a certificate of the node, and its key, to `file` in one step.
fn put(fleet: &Fleet, file: &Path, hosts: &[&str], times: &Times) -> anyhow::Result<()> {
    let (dir, user) = (tempfile::tempdir()?, format!("system:node:{NODE}"));
    let subject = Subject { name: &user, organisations: &["system:nodes"], hosts };
    let [from, until] = &times.span;
    let pair = certificates::issue_for(dir.path(), "node", &subject, [from, until], fleet.plane.authority())?;
    let next = file.with_extension("next");
    std::fs::write(&next, std::fs::read_to_string(pair.certificate)? + &std::fs::read_to_string(pair.key)?)?;
    Ok(std::fs::rename(next, file)?)
}

/// Something once the certificate that `openssl x509` reads holds for long.
fn holds_long(openssl: &mut Command) -> anyhow::Result<Option<Vec<u8>>> {
    Ok(Some(host::output(openssl.args(["-noout", "-checkend", LONG]))?))
}

/// The requests for certificates, in the order in which they came.
fn requests(fleet: &Fleet) -> anyhow::Result<Vec<Value>> {
    let mut all = fleet.get("csr")?["items"].as_array().cloned().unwrap_or_default();
    all.sort_by_key(|one| one["metadata"]["creationTimestamp"].to_string());
    Ok(all)
}

/// When the node's lease was renewed.
fn renewal(fleet: &Fleet) -> anyhow::Result<String> {
    let lease = fleet.get(&format!("lease {NODE} -n kube-node-lease"))?;
    Ok(lease["spec"]["renewTime"].as_str().unwrap_or_default().to_owned())
}
