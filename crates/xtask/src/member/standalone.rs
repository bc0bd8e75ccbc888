//! A kubelet without `--kubeconfig`, by upstream's name and flags: it runs the static pods of a directory.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use testkit::certificates::{self, Subject};
use testkit::{host, netns};

use super::{ADDRESS, SOON, points, wait};
use crate::conformance::served;
use crate::demo::Stage;
use crate::voyage::{http_text, leftovers};

/// The node's name.
const NODE: &str = "raft";
/// What the pod is called there.
const POD: &str = "ballast-raft";

const PODS: &str = "apiVersion: v1
kind: Pod
metadata: { name: ballast }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'echo LINE; mkdir /w; hostname > /w/index.html; exec httpd -f -p 8080 -h /w']
    ports: [{ containerPort: 8080, hostPort: 30080 }]
    readinessProbe: { httpGet: { path: /, port: 8080 }, periodSeconds: 1, timeoutSeconds: 30 }
";

/// A node that belongs to no cluster.
struct Raft {
    stage: Stage,
    authority: certificates::Pair,
    node: Child,
}

/// Runs the one point that there is, and returns 1.
///
/// # Errors
/// Something of it did not work; the node's log is printed before.
pub(crate) fn run(orlop: &Path) -> anyhow::Result<usize> {
    let stage = Stage::set_up(orlop, false)?;
    netns::add_address(IpAddr::V4(ADDRESS))?;
    // The name says whose flags they are.
    std::os::unix::fs::symlink(&stage.orlop, stage.dir.path().join("kubelet"))?;
    std::fs::create_dir(stage.dir.path().join("static"))?;
    let authority = certificates::authority(stage.dir.path(), "ca")?;
    asks_nobody(&stage, &authority)?;
    configure(
        &stage,
        &authority,
        "authentication: { webhook: { enabled: false }, x509: { clientCAFile: AUTHORITY } }\nauthorization: { mode: AlwaysAllow }\n",
    )?;
    let node = spawn(&stage)?;
    let mut raft = Raft { stage, authority, node };
    let done = raft.check();
    if done.is_err() {
        println!("$ cat orlop.log\n{}", std::fs::read_to_string(raft.file("orlop.log")).unwrap_or_default());
    }
    println!("ok   a kubelet without an API server: {}", done?);
    Ok(1)
}

/// A configuration by which an API server would be asked is refused.
fn asks_nobody(stage: &Stage, authority: &certificates::Pair) -> anyhow::Result<()> {
    configure(stage, authority, "")?;
    let refused = command(stage).output()?;
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    for field in ["authentication.webhook.enabled", "authorization.mode"] {
        ensure!(!refused.status.success() && told.contains(field), "without {field}: {}, {told}", refused.status);
    }
    Ok(())
}

fn configure(stage: &Stage, authority: &certificates::Pair, more: &str) -> anyhow::Result<()> {
    let text = format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nstaticPodPath: {}\n# A machine that builds and tests may have a \
         full disk.\nevictionHard: {{ memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1% }}\n\
         imageGCHighThresholdPercent: 99\nimageGCLowThresholdPercent: 98\n{}",
        stage.dir.path().join("static").display(),
        more.replace("AUTHORITY", &authority.certificate.display().to_string()),
    );
    Ok(std::fs::write(stage.dir.path().join("kubelet.yaml"), text)?)
}

fn command(stage: &Stage) -> Command {
    let mut kubelet = Command::new(stage.dir.path().join("kubelet"));
    kubelet.envs(stage.orlop().get_envs().filter_map(|(name, value)| Some((name, value?)))).env("ORLOP_LOG", "info");
    kubelet.arg("--config").arg(stage.dir.path().join("kubelet.yaml"));
    kubelet.args(["--hostname-override", NODE, "--node-ip"]).arg(ADDRESS.to_string()).stdin(Stdio::null());
    kubelet
}

fn spawn(stage: &Stage) -> anyhow::Result<Child> {
    let log = std::fs::File::options().create(true).append(true).open(stage.dir.path().join("orlop.log"))?;
    command(stage).stdout(log.try_clone()?).stderr(log).spawn().context("start the kubelet")
}

impl Raft {
    fn file(&self, name: &str) -> PathBuf {
        self.stage.dir.path().join(name)
    }

    fn check(&mut self) -> anyhow::Result<String> {
        let manifest = self.file("static/ballast.yaml");
        std::fs::write(&manifest, PODS.replace("LINE", "one"))?;
        let first = self.until_ready("one")?;
        let page = http_text("GET", SocketAddr::from((ADDRESS, 30_080)), "/")?.1;
        ensure!(page.trim() == POD, "its port on the node answers {page:?}");
        let health = http_text("GET", SocketAddr::from(([127, 0, 0, 1], 10_248)), "/healthz")?.1;
        ensure!(health == "ok", "healthz says {health:?}");
        self.knows_callers()?;
        self.node.kill()?;
        self.node.wait()?;
        self.node = spawn(&self.stage)?;
        ensure!(self.until_ready("one")? == first, "another daemon has replaced its container");
        std::fs::write(&manifest, PODS.replace("LINE", "two"))?;
        ensure!(self.until_ready("two")? != first, "its new version is the old container");
        std::fs::remove_file(&manifest)?;
        wait("the pod goes with its file", SOON, || Ok((!self.orlop(&["ps", "-A"])?.contains(POD)).then_some(())))?;
        let left = self.orlop(&["fsck"])?;
        ensure!(left.is_empty(), "left: {left}");
        self.stop()?;
        Ok("a static pod runs with its port, its logs and its probe, by a second daemon, edited and removed; callers need certificates".to_owned())
    }

    /// Waits until the pod is Ready and has said `line`; its container.
    fn until_ready(&self, line: &str) -> anyhow::Result<Value> {
        wait(&format!("the pod that says {line} is Ready"), SOON, || {
            let shown: Value = serde_json::from_str(&self.orlop(&["ps", POD, "-o", "json"])?)?;
            let pod = if shown.is_array() { &shown[0] } else { &shown };
            let is_it =
                points::condition(pod, "Ready") == Some("True") && self.orlop(&["logs", POD])? == format!("{line}\n");
            Ok(is_it.then(|| pod["status"]["containerStatuses"][0]["containerID"].clone()))
        })
    }

    /// The kubelet's API knows who has a certificate of its authority, and nobody else.
    fn knows_callers(&self) -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let pair = certificates::issue(
            dir.path(),
            "captain",
            &Subject { name: "captain", ..Subject::default() },
            &self.authority,
        )?;
        let pods = |more: &[&str]| {
            let mut curl = Command::new("curl");
            curl.args(["-sk", "-w", "%{http_code}", &format!("https://{ADDRESS}:10250/pods")]).args(more);
            host::output(&mut curl).map(|page| String::from_utf8_lossy(&page).into_owned())
        };
        let (certificate, key) = (pair.certificate.display().to_string(), pair.key.display().to_string());
        let known = pods(&["--cert", &certificate, "--key", &key])?;
        ensure!(known.contains(POD) && known.ends_with("200"), "who has a certificate gets {known}");
        for stranger in [&[][..], &["-H", "Authorization: Bearer x"]] {
            let told = pods(stranger)?;
            ensure!(told.ends_with("401"), "a stranger gets {told}");
        }
        Ok(())
    }

    /// The output of `orlop ARGUMENTS`, which asks the node itself.
    fn orlop(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Ok(String::from_utf8(host::output(self.stage.orlop().args(arguments))?)?)
    }

    /// SIGTERM to the daemon, and its end.
    fn stop(&mut self) -> anyhow::Result<()> {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.node), rustix::process::Signal::TERM)?;
        let ended = wait("the daemon ends", SOON, || Ok(self.node.try_wait()?))?;
        ensure!(ended.success(), "the daemon ended with {ended}");
        Ok(())
    }
}

impl Drop for Raft {
    fn drop(&mut self) {
        // Only after a failure is there something to end, and that has been reported already.
        if self.node.try_wait().is_ok_and(|ended| ended.is_some())
            && served::fsck(&self.stage).is_ok_and(|left| left.is_empty())
        {
            return;
        }
        let _ = std::fs::remove_file(self.file("static/ballast.yaml"));
        let _ =
            wait("the pod goes with its file", SOON, || Ok((!self.orlop(&["ps", "-A"])?.contains(POD)).then_some(())));
        let _ = self.node.kill();
        let _ = self.node.wait();
        leftovers::clear(self.stage.dir.path());
    }
}
