//! The points of the member's voyage.

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use testkit::certificates;
use testkit::control_plane::Part;
use testkit::csi::{Ability, Call, Driver, DriverConfig};
use testkit::daemon::Daemon;
use testkit::pace;

use super::{ADDRESS, Fleet, NODE, SOON, manifests, wait};
use crate::voyage::{http_text, keepers_in};

/// The node port of a Service whose endpoint is said to be elsewhere.
const AFAR: u16 = 30_099;

pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    let conditions = object["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == kind)?["status"].as_str()
}

fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready") == Some("True") && pod["metadata"]["deletionTimestamp"].is_null()
}

pub(super) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

fn container(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]
}

impl Fleet {
    /// Waits until so many pods of an application are Ready and no others are there.
    pub(super) fn until_ready(&self, app: &str, count: usize) -> anyhow::Result<Vec<Value>> {
        wait(&format!("{count} pods of {app} are Ready"), SOON, || {
            let pods = self.pods(app)?;
            Ok((pods.len() == count && pods.iter().all(is_ready)).then_some(pods))
        })
    }
}

pub(super) fn joins(fleet: &mut Fleet) -> anyhow::Result<String> {
    let node = wait("the node is Ready", SOON, || {
        let node = fleet.get(&format!("node {NODE}"))?;
        Ok((condition(&node, "Ready") == Some("True")).then_some(node))
    })?;
    for kind in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
        ensure!(condition(&node, kind) == Some("False"), "{kind} is {:?}", condition(&node, kind));
    }
    ensure!(node["metadata"]["labels"]["deck"] == "lower", "its label is missing");
    ensure!(node["status"]["allocatable"]["pods"] == "110", "it takes {} pods", node["status"]["allocatable"]["pods"]);
    let lease = fleet.get(&format!("lease {NODE} -n kube-node-lease"))?;
    ensure!(lease["spec"]["holderIdentity"] == NODE, "the lease is held by {}", lease["spec"]["holderIdentity"]);
    let owner = &lease["metadata"]["ownerReferences"][0];
    ensure!(owner["uid"] == node["metadata"]["uid"], "the lease is owned by {owner}");
    let info = &node["status"]["nodeInfo"];
    Ok(format!("{}, {}, pods in {}", info["kubeletVersion"], info["containerRuntimeVersion"], node["spec"]["podCIDR"]))
}

pub(super) fn certificates(fleet: &mut Fleet) -> anyhow::Result<String> {
    let requests = |fleet: &Fleet, signer: &str| -> anyhow::Result<Vec<Value>> {
        let list = fleet.get("csr")?;
        let all = list["items"].as_array().cloned().unwrap_or_default();
        Ok(all.into_iter().filter(|one| one["spec"]["signerName"] == signer).collect())
    };
    let client = requests(fleet, "kubernetes.io/kube-apiserver-client-kubelet")?;
    let user = client.first().and_then(|one| one["spec"]["username"].as_str()).unwrap_or_default();
    ensure!(user.starts_with("system:bootstrap:"), "the first certificate was asked for by {user:?}");
    let serving = wait("it asks for a serving certificate", SOON, || {
        Ok(requests(fleet, "kubernetes.io/kubelet-serving")?.first().cloned())
    })?;
    fleet.kubectl(&format!("certificate approve {}", name(&serving)))?;
    let authority = fleet.plane.authority().certificate.display().to_string();
    let health = format!("https://{}:10250/healthz", super::ADDRESS);
    wait("the kubelet shows it", SOON, || {
        let mut curl = std::process::Command::new("curl");
        curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", &authority, &health]);
        Ok((testkit::host::output(&mut curl)? == b"401").then_some(()))
    })?;
    let configuration = fleet.kubectl(&format!("get --raw /api/v1/nodes/{NODE}/proxy/configz"))?;
    ensure!(configuration.contains("serverTLSBootstrap"), "configz shows {configuration}");
    Ok("the node joined with a token; its serving certificate was approved and is shown".to_owned())
}

pub(super) fn runs(fleet: &mut Fleet) -> anyhow::Result<String> {
    let begin = Instant::now();
    fleet.apply("web.yaml", manifests::WEB)?;
    let pods = fleet.until_ready("web", 2)?;
    let took = begin.elapsed();
    let pod = name(&pods[0]);
    let run = |script: &str| fleet.kubectl_words(&["exec", pod, "--", "sh", "-c", script]);
    ensure!(run("echo $WORD $NODE")? == format!("ahoy {NODE}\n"), "the environment is {:?}", run("env")?);
    ensure!(run("cat /settings/line; stat -Lc %a /hold/key; cat /hold/key")? == "one400\ntreasure", "the files differ");
    // What every client library in a pod reads.
    let token = run("cat /var/run/secrets/kubernetes.io/serviceaccount/token")?;
    ensure!(token.matches('.').count() == 2, "no token but {token:?}");
    let namespace = run("cat /var/run/secrets/kubernetes.io/serviceaccount/namespace")?;
    ensure!(namespace == "default", "the namespace is {namespace:?}");
    let certificate = run("head -n1 /var/run/secrets/kubernetes.io/serviceaccount/ca.crt")?;
    ensure!(certificate.starts_with("-----BEGIN CERTIFICATE"), "the authority is {certificate:?}");
    ensure!(
        !run("echo $KUBERNETES_SERVICE_HOST")?.trim().is_empty(),
        "the API server's Service is not in the environment"
    );
    let status = &pods[0]["status"];
    ensure!(status["qosClass"] == "Burstable" && status["hostIP"] == super::ADDRESS.to_string(), "status: {status}");
    let events = fleet.kubectl_words(&["get", "events", "--field-selector", &format!("involvedObject.name={pod}")])?;
    for reason in ["Scheduled", "Started"] {
        ensure!(events.contains(reason), "no event {reason}: {events}");
    }
    Ok(format!("2 replicas Ready {} ms after kubectl apply", took.as_millis()))
}

pub(super) fn serves(fleet: &mut Fleet) -> anyhow::Result<String> {
    let service = fleet.get("service web")?;
    let address: IpAddr = service["spec"]["clusterIP"].as_str().context("an address")?.parse()?;
    let mut seen = std::collections::BTreeSet::new();
    wait("both replicas answer", SOON, || {
        seen.insert(http_text("GET", SocketAddr::new(address, 80), "/")?.1.trim().to_owned());
        Ok((seen.len() == 2).then_some(()))
    })?;
    let pods = fleet.pods("web")?;
    let fetch = format!("wget -qO- http://{address}/");
    let page = fleet.kubectl_words(&["exec", name(&pods[0]), "--", "sh", "-c", &fetch])?;
    ensure!(seen.contains(page.trim()), "a pod gets {page:?} from the Service");
    serves_pods_as_its_own(fleet, &pods[0])?;
    Ok(format!("{address} leads to {}", seen.into_iter().collect::<Vec<_>>().join(" and ")))
}

/// A Service with `externalTrafficPolicy: Local` whose endpoint is said to be elsewhere: who comes from outside is not led
/// there, a pod of this node is, if the proxy knows the addresses that the cluster has given the node.
fn serves_pods_as_its_own(fleet: &Fleet, pod: &Value) -> anyhow::Result<()> {
    let endpoint = pod["status"]["podIP"].as_str().context("its address")?;
    fleet.apply("afar", &format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: afar }}\nspec:\n  type: NodePort\n  externalTrafficPolicy: Local\n  ports: [{{ name: p, port: 80, nodePort: {AFAR} }}]\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: afar, labels: {{ kubernetes.io/service-name: afar }} }}\naddressType: IPv4\nports: [{{ name: p, port: 8080 }}]\nendpoints: [{{ addresses: [{endpoint}], nodeName: elsewhere }}]\n"
    ))?;
    let fetch = format!("timeout 3 wget -qO- http://{ADDRESS}:{AFAR}/");
    wait("a pod of this node is led to an endpoint elsewhere", SOON, || {
        let page = fleet.kubectl_words(&["exec", name(pod), "--", "sh", "-c", &fetch])?;
        Ok((page.trim() == name(pod)).then_some(()))
    })?;
    fleet.kubectl_words(&["delete", "service,endpointslice", "afar"])?;
    Ok(())
}

pub(super) fn reaches_in(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pods = fleet.pods("web")?;
    let pod = name(&pods[0]);
    let log = fleet.kubectl(&format!("logs {pod}"))?;
    ensure!(log == format!("listening as {pod}\n"), "the log is {log:?}");
    let local = fleet.stage.dir.path().join("copied");
    fleet.kubectl_words(&["cp", &format!("{pod}:/w/index.html"), &local.display().to_string()])?;
    ensure!(std::fs::read_to_string(&local)?.trim() == pod, "the copy differs");
    let failed = fleet.kubectl_words(&["exec", pod, "--", "sh", "-c", "exit 7"]).err().context("exit 7 succeeded")?;
    ensure!(format!("{failed:#}").contains("exit code 7"), "{failed:#}");
    forwards(fleet.plane.kubectl()?, pod)?;
    let ours = fleet.orlop(&["ps", "-A"])?;
    ensure!(ours.contains(pod), "`orlop ps` does not know the pod: {ours}");
    Ok("logs, cp, exec and its exit code, port-forward".to_owned())
}

/// `kubectl port-forward` leads into the pod, which serves its name.
pub(super) fn forwards(kubectl: Command, pod: &str) -> anyhow::Result<()> {
    let page = forwarded(kubectl, pod, 8080)?;
    ensure!(page == pod, "the forwarded port answers {page:?}");
    Ok(())
}

/// The page that is behind a port of a pod, or of a Service, as `kubectl port-forward` leads there.
pub(super) fn forwarded(mut kubectl: Command, to: &str, port: u16) -> anyhow::Result<String> {
    let forward = kubectl.args(["port-forward", to, &format!(":{port}")]).stdout(Stdio::piped()).spawn();
    let mut forward = forward.context("start kubectl")?;
    let seen = (|| {
        let mut line = String::new();
        // It goes on to write there.
        let mut output = BufReader::new(forward.stdout.take().context("its output")?);
        output.read_line(&mut line)?;
        let port = line.split_whitespace().find_map(|word| word.strip_prefix("127.0.0.1:")?.parse::<u16>().ok());
        let port = port.with_context(|| format!("no port in {line:?}"))?;
        http_text("GET", SocketAddr::from(([127, 0, 0, 1], port)), "/")
    })();
    forward.kill()?;
    forward.wait()?;
    Ok(seen?.1.trim().to_owned())
}

pub(super) fn edits(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pods = fleet.pods("web")?;
    let pod = name(&pods[0]).to_owned();
    let begin = Instant::now();
    fleet.kubectl_words(&["patch", "configmap", "settings", "-p", "{\"data\":{\"line\":\"two\"}}"])?;
    wait("the file changes", SOON, || {
        let line = fleet.kubectl_words(&["exec", &pod, "--", "cat", "/settings/line"])?;
        Ok((line == "two").then_some(()))
    })?;
    Ok(format!("seen in the pod {} ms after the command began", begin.elapsed().as_millis()))
}

/// The test is driver and attacher; what binds and attaches is Kubernetes' own.
pub(super) fn volumes(fleet: &mut Fleet) -> anyhow::Result<String> {
    let (name, root) = ("hull.csi.example", fleet.stage.dir.path().join("state/kubelet"));
    let config = DriverConfig {
        name: name.to_owned(),
        node_id: "deck-1".to_owned(),
        volumes: fleet.stage.dir.path().join("hull"),
        abilities: vec![Ability::StageUnstageVolume, Ability::GetVolumeStats],
        topology: [("hull.csi.example/deck".to_owned(), "lower".to_owned())].into(),
        volumes_max: 7,
    };
    let driver = Driver::start(config, &root)?;
    fleet.apply("hold.yaml", manifests::HOLD)?;
    let attachment = wait("the controller wants the volume attached", SOON, || {
        let all = fleet.get("volumeattachments")?;
        Ok(all["items"].as_array().and_then(|all| all.first()).map(name_of))
    })?;
    let status = r#"{"status":{"attached":true,"attachmentMetadata":{"berth":"7"}}}"#;
    let patch = ["patch", "volumeattachment", &attachment, "--subresource=status", "--type=merge", "-p", status];
    fleet.kubectl_words(&patch)?;
    fleet.until_ready("stevedore", 1)?;
    let published = driver.calls().borrow().clone();
    let [Call::Stage(_), Call::Publish(publish)] = &published[..] else {
        bail!("the driver was called: {published:?}")
    };
    ensure!(publish.publish_context.get("berth").is_some_and(|berth| berth == "7"), "published with {publish:?}");
    ensure!(std::fs::read_to_string(fleet.stage.dir.path().join("hull/hold-1/manifest"))? == "cargo\n", "the file");
    let known = fleet.get(&format!("csinode {NODE}"))?["spec"]["drivers"][0].clone();
    let topology = serde_json::json!(["hull.csi.example/deck"]);
    ensure!(known["nodeID"] == "deck-1" && known["topologyKeys"] == topology, "the cluster knows of {known}");
    ensure!(known["allocatable"]["count"] == 7, "the cluster knows of {known}");
    let node = fleet.get(&format!("node {NODE}"))?;
    ensure!(node["metadata"]["labels"]["hull.csi.example/deck"] == "lower", "the node has no label of the driver");
    let summary = fleet.kubectl(&format!("get --raw /api/v1/nodes/{NODE}/proxy/stats/summary"))?;
    ensure!(summary.contains(r#""pvcRef":{"name":"hold","namespace":"default"}"#), "no figures: {summary}");
    fleet.kubectl("delete pod stevedore")?;
    let last = driver.calls().borrow().last().map(Call::name);
    ensure!(last == Some("NodeUnstageVolume"), "the pod went before its volume: {last:?}");
    wait("the controller takes the volume away", SOON, || {
        let all = fleet.get("volumeattachments")?;
        Ok(all["items"].as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    fleet.kubectl("delete pvc,pv,csidriver --all --wait=false")?;
    Ok("by Kubernetes' attach/detach controller and a driver over gRPC".to_owned())
}

/// The driver is the one of Kubernetes' own tests, made with the helper that vendors use; the claims are the scheduler's.
pub(super) fn claims(fleet: &mut Fleet) -> anyhow::Result<String> {
    const DRIVER: &str = "rigging.dra.example";
    let root = fleet.stage.dir.path().join("state/kubelet");
    let flag = |name: &str, value: &std::path::Path| format!("--{name}={}", value.display());
    let words = ["kubelet-plugin".to_owned(), format!("--drivername={DRIVER}"), format!("--node-name={NODE}")];
    let places = [
        flag("kubeconfig", &fleet.plane.admin_kubeconfig()?),
        flag("plugin-registration-path", &root.join("plugins_registry")),
        flag("datadir", &root.join("plugins")),
        flag("cdi-dir", std::path::Path::new(DESCRIPTIONS)),
    ];
    // As an operator's manifest makes it for the driver.
    std::fs::create_dir_all(root.join("plugins").join(DRIVER))?;
    let (words, log) = ([&words[..], &places].concat(), fleet.stage.dir.path().join("rigging.log"));
    // It was built before the network became private.
    let program = testkit::go::build(&testkit::go::DRA_TEST_DRIVER)?;
    let mut driver = Daemon::new(fleet.plane.nursery(), &program, words, log);
    driver.start()?;
    let slices = |fleet: &Fleet| -> anyhow::Result<usize> {
        let all = fleet.get("resourceslices")?;
        let own = all["items"].as_array().into_iter().flatten();
        Ok(own.filter(|slice| slice["spec"]["driver"] == DRIVER && slice["spec"]["nodeName"] == NODE).count())
    };
    wait("the driver tells of its devices", SOON, || {
        driver.check()?;
        Ok((slices(fleet)? > 0).then_some(()))
    })?;
    fleet.apply("rigging.yaml", manifests::RIGGING)?;
    let pods = fleet.until_ready("rigger", 2)?;
    let bosun = pods.iter().find(|pod| name(pod) == "bosun").context("the pod")?;
    let told = &container(bosun)["allocatedResourcesStatus"][0];
    let device = told["resources"][0]["resourceID"].as_str().unwrap_or_default();
    ensure!(told["name"] == "claim:winch" && device.starts_with(DRIVER), "its status tells of {told}");
    ensure!(described(DRIVER)? == 2, "{} descriptions", described(DRIVER)?);
    let claims = |fleet: &Fleet| anyhow::Ok(fleet.get("resourceclaims")?["items"].as_array().map_or(0, Vec::len));
    ensure!(claims(fleet)? == 2, "the cluster has {} claims", claims(fleet)?);
    fleet.kubectl("delete pod bosun mate")?;
    ensure!(described(DRIVER)? == 0, "a pod went before its devices");
    wait("the claims go", SOON, || Ok((claims(fleet)? == 0).then_some(())))?;
    fleet.kubectl("delete deviceclass,resourceclaimtemplate --all")?;
    driver.stop(SOON)?;
    Ok("by a template and by a resource, through CDI; given back before the pods went".to_owned())
}

/// Where the driver describes its devices for CDI.
const DESCRIPTIONS: &str = "/var/run/cdi";

/// How many devices a driver describes now.
fn described(driver: &str) -> anyhow::Result<usize> {
    let files = std::fs::read_dir(DESCRIPTIONS)?.collect::<Result<Vec<_>, _>>()?;
    Ok(files.iter().filter(|file| file.file_name().to_string_lossy().starts_with(driver)).count())
}

/// The test is the signer.
pub(super) fn certified(fleet: &mut Fleet) -> anyhow::Result<String> {
    let dir = fleet.stage.dir.path().to_owned();
    let authority = certificates::authority(&dir, "harbour")?;
    let root = std::fs::read_to_string(&authority.certificate)?;
    let bundle = |text: &str| {
        let spec = serde_json::json!({ "trustBundle": text });
        let kind = serde_json::json!({ "apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle",
            "metadata": { "name": "flags" }, "spec": spec });
        kind.to_string()
    };
    fleet.apply("purser.yaml", manifests::PURSER)?;
    let request = wait("the node asks for a certificate", SOON, || {
        let all = fleet.get("podcertificaterequests")?;
        Ok(all["items"].as_array().and_then(|all| all.first()).cloned())
    })?;
    ensure!(request["spec"]["podName"] == "purser" && request["spec"]["nodeName"] == NODE, "it asks {request}");
    let stub = request["spec"]["stubPKCS10Request"].as_str().context("a request")?;
    let (chain, [from, until]) = certificates::certify(&dir, stub, "purser.example", &authority)?;
    let mut later = std::process::Command::new("date");
    later.args(["-u", "-d", &format!("{from} + 1 hour"), "+%Y-%m-%dT%H:%M:%SZ"]);
    let refresh = String::from_utf8(testkit::host::output(&mut later)?)?;
    let issued = serde_json::json!([{ "type": "Issued", "status": "True", "reason": "Known", "message": "as the test wants it",
        "lastTransitionTime": from }]);
    let status = serde_json::json!({ "status": { "certificateChain": chain, "notBefore": from, "notAfter": until,
        "beginRefreshAt": refresh.trim(), "conditions": issued } });
    let (name, status) = (name(&request), status.to_string());
    let patch = ["patch", "podcertificaterequest", name, "--subresource=status", "--type=merge", "-p", &status];
    fleet.kubectl_words(&patch)?;
    fleet.apply("flags.json", &bundle(&format!("a comment\n{root}")))?;
    fleet.until_ready("purser", 1)?;
    let shown = |file: &str| fleet.kubectl(&format!("exec purser -- cat /papers/{file}"));
    let papers = shown("papers.pem")?;
    ensure!(papers.starts_with("-----BEGIN PRIVATE KEY-----") && papers.ends_with(&chain), "it shows {papers}");
    ensure!(shown("trust.pem")? == root, "it trusts {}", shown("trust.pem")?);
    let other = std::fs::read_to_string(certificates::authority(&dir, "roads")?.certificate)?;
    let both = format!("{other}{root}");
    fleet.apply("flags.json", &bundle(&both))?;
    wait("the other bundle arrives", SOON, || Ok((shown("trust.pem")? == both).then_some(())))?;
    fleet.kubectl("delete pod purser --wait=false")?;
    Ok("key and chain in one file, its trust bundle, and that edited".to_owned())
}

/// Whether control groups are of version 2: only these know of pressure.
fn is_unified() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn name_of(object: &Value) -> String {
    name(object).to_owned()
}

pub(super) fn deletes(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pods = fleet.pods("web")?;
    let pod = name(&pods[0]).to_owned();
    let begin = Instant::now();
    fleet.kubectl(&format!("delete pod {pod}"))?; // waits until the object is gone
    let took = begin.elapsed();
    ensure!(took < pace::stretched(Duration::from_secs(5)), "the application exits at once, yet the pod took {took:?}");
    let pods = fleet.until_ready("web", 2)?;
    ensure!(pods.iter().all(|other| name(other) != pod), "it came back");
    Ok(format!("gone after {} ms, replaced", took.as_millis()))
}

pub(super) fn static_pod(fleet: &mut Fleet) -> anyhow::Result<String> {
    let dir = super::static_pods(&fleet.stage);
    std::fs::create_dir(&dir)?;
    let file = dir.join("ballast.yaml");
    std::fs::write(&file, manifests::STATIC.replace("LINE", "one"))?;
    std::fs::write(dir.join("broken.yaml"), "kind: Pod\nspec: [\n")?;
    let pod = format!("ballast-{NODE}");
    let first = fleet.until_ready("ballast", 1)?;
    ensure!(name(&first[0]) == pod, "it is called {}", name(&first[0]));
    ensure!(fleet.kubectl(&format!("logs {pod}"))? == "one\n", "the mirror leads to another log");
    let id = container(&first[0])["containerID"].clone();
    fleet.kubectl(&format!("delete pod {pod} --wait=false"))?;
    wait("the mirror comes back", SOON, || {
        let mirrors = fleet.pods("ballast")?;
        let is_new = |mirror: &Value| mirror["metadata"]["uid"] != first[0]["metadata"]["uid"];
        let back = mirrors.into_iter().find(|mirror| is_new(mirror) && is_ready(mirror));
        Ok(back.filter(|mirror| container(mirror)["containerID"] == id))
    })?;
    std::fs::write(&file, manifests::STATIC.replace("LINE", "two"))?;
    wait("the new version runs", SOON, || {
        // Between two mirrors there is none.
        let log = fleet.kubectl(&format!("logs {pod}")).unwrap_or_default();
        Ok((log == "two\n").then_some(()))
    })?;
    std::fs::remove_dir_all(&dir)?;
    wait("the mirror goes", SOON, || Ok(fleet.pods("ballast")?.is_empty().then_some(())))?;
    let left = fleet.orlop(&["ps", "-A"])?;
    ensure!(!left.contains(&pod), "it is still there: {left}");
    Ok("beside a broken file; its mirror was deleted and came back, it was edited and removed".to_owned())
}

pub(super) fn debugs(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pods = fleet.pods("web")?;
    let pod = name(&pods[0]).to_owned();
    let target = container(&pods[0])["name"].as_str().context("a name")?.to_owned();
    let look =
        ["debug", &pod, "--image=busybox", "--image-pull-policy=IfNotPresent", "-c", "look", "--profile=general"];
    let look = [&look[..], &["--target", &target, "--", "sh", "-c", "cat /proc/1/comm; hostname"]].concat();
    fleet.kubectl_words(&look)?;
    let status = wait("it has ended", SOON, || {
        let status = fleet.get(&format!("pod {pod}"))?["status"].take();
        let ended = !status["ephemeralContainerStatuses"][0]["state"]["terminated"].is_null();
        Ok(ended.then_some(status))
    })?;
    ensure!(status["ephemeralContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0, "it failed: {status}");
    let seen = fleet.kubectl(&format!("logs {pod} -c look"))?;
    let other = fleet.kubectl_words(&["exec", &pod, "--", "cat", "/proc/1/comm"])?;
    ensure!(seen == format!("{other}{pod}\n"), "it saw {seen:?}, not {other:?}");
    let pods = fleet.until_ready("web", 2)?;
    ensure!(pods.iter().any(|other| name(other) == pod), "the pod did not stay");
    Ok(format!("it saw {} as process 1, and ended", other.trim()))
}

pub(super) fn resizes(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pods = fleet.pods("web")?;
    let (pod, container_name) = (name(&pods[0]).to_owned(), container(&pods[0])["name"].clone());
    let before = ids(&pods[..1]);
    let wanted = serde_json::json!({ "requests": { "cpu": "20m" }, "limits": { "memory": "128Mi" } });
    let patch =
        serde_json::json!({"spec": {"containers": [{"name": container_name, "resources": wanted}]}}).to_string();
    fleet.kubectl_words(&["patch", "pod", &pod, "--subresource", "resize", "-p", &patch])?;
    wait("it has what it wants", SOON, || {
        let pod = fleet.get(&format!("pod {pod}"))?;
        let resources = &container(&pod)["resources"];
        let has = resources["requests"]["cpu"] == "20m" && resources["limits"]["memory"] == "128Mi";
        Ok((has && condition(&pod, "PodResizeInProgress").is_none()).then_some(()))
    })?;
    ensure!(ids(&[fleet.get(&format!("pod {pod}"))?]) == before, "its container was replaced");
    let limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || true";
    let limit = fleet.kubectl_words(&["exec", &pod, "--", "sh", "-c", limit])?;
    ensure!(limit.trim() == "134217728", "the kernel has {limit:?}");
    Ok("another CPU request, another memory limit, the same container".to_owned())
}

pub(super) fn ids(pods: &[Value]) -> Vec<(String, String)> {
    let mut ids: Vec<_> =
        pods.iter().map(|pod| (name(pod).to_owned(), container(pod)["containerID"].to_string())).collect();
    ids.sort();
    ids
}

/// What would show that a daemon went and another came: of pods their sandboxes, containers and readiness, of the node its
/// readiness, and what was told of either.
fn seen(fleet: &Fleet) -> anyhow::Result<Value> {
    const TOLD: [&str; 8] =
        ["Pulling", "Pulled", "Created", "Started", "Killing", "Unhealthy", "NodeNotReady", "SandboxChanged"];
    let since = |object: &Value| {
        let conditions = object["status"]["conditions"].as_array()?;
        Some(conditions.iter().find(|one| one["type"] == "Ready")?["lastTransitionTime"].clone())
    };
    let pods = [fleet.pods("web")?, fleet.pods("crew")?].concat();
    let mut pods: Vec<Value> = pods
        .iter()
        .map(|pod| {
            let status = &pod["status"];
            let runs = [&status["initContainerStatuses"], &status["containerStatuses"]];
            let runs = runs.into_iter().filter_map(Value::as_array).flatten();
            let runs: Vec<_> = runs.map(|one| (one["containerID"].clone(), one["restartCount"].clone())).collect();
            serde_json::json!([name(pod), status["podIP"], status["phase"], since(pod), runs])
        })
        .collect();
    pods.sort_by_key(ToString::to_string);
    let events = fleet.get("events -A")?;
    let events = events["items"].as_array().into_iter().flatten();
    let ours = |one: &&Value| {
        let about = one["involvedObject"]["name"].as_str().unwrap_or_default();
        about.starts_with("web-") || about == "crew" || about == NODE
    };
    let told = events.filter(ours).filter(|one| one["reason"].as_str().is_some_and(|reason| TOLD.contains(&reason)));
    let told: i64 = told.map(|one| one["count"].as_i64().unwrap_or(1)).sum();
    Ok(serde_json::json!({ "pods": pods, "node": since(&fleet.get(&format!("node {NODE}"))?), "events": told }))
}

/// What Kubernetes documents of a restart of the kubelet, none of which is felt here: the node stays Ready, pods stay Ready
/// and are not admitted anew, nothing is pulled or begun again, init containers and startup probes are over for good.
pub(super) fn killed_daemon(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.apply("crew.yaml", manifests::CREW)?;
    fleet.until_ready("crew", 1)?;
    let lines = |fleet: &Fleet, file: &str| -> anyhow::Result<usize> {
        Ok(fleet.kubectl(&format!("exec crew -c c -- cat {file}"))?.lines().count())
    };
    let renewed = |fleet: &Fleet| -> anyhow::Result<Value> {
        Ok(fleet.get(&format!("lease {NODE} -n kube-node-lease"))?["spec"]["renewTime"].clone())
    };
    // No pod that wants it would be admitted now.
    fleet.kubectl(&format!("label node {NODE} deck-"))?;
    let (before, startups) = (seen(fleet)?, lines(fleet, "/startups")?);
    fleet.node.kill()?;
    fleet.node.wait()?;
    let (answers, lease) = (fleet.orlop(&["ps"]).is_ok(), renewed(fleet)?);
    ensure!(!answers, "somebody answers for a daemon that is dead");
    fleet.start_again()?;
    wait("the new daemon answers", SOON, || fleet.orlop(&["ps"]).map(Some))?;
    wait("it renews the lease", SOON, || Ok((renewed(fleet)? != lease).then_some(())))?;
    let probed = lines(fleet, "/probes")?;
    wait("it probes", SOON, || Ok((lines(fleet, "/probes")? > probed + 1).then_some(())))?;
    let after = seen(fleet)?;
    ensure!(before == after, "it was felt: {before} became {after}");
    ensure!(startups == lines(fleet, "/startups")?, "the startup probe ran again");
    let pods = fleet.until_ready("web", 2)?;
    let node = fleet.get(&format!("node {NODE}"))?;
    ensure!(condition(&node, "Ready") == Some("True"), "the node is not Ready");
    fleet.kubectl(&format!("label node {NODE} deck=lower"))?;
    fleet.kubectl("delete pod crew --wait=false")?;
    Ok(format!("{} containers went on, Ready all the time, though nobody would admit them now", pods.len() + 1))
}

pub(super) fn api_server_away(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.apply("restless.yaml", manifests::RESTLESS)?;
    let pods = fleet.until_ready("restless", 1)?;
    let before = ids(&fleet.pods("web")?);
    ensure!(container(&pods[0])["restartCount"] == 0, "it was restarted");
    fleet.plane.kill(Part::ApiServer)?;
    // Its end may come before its answer: it goes with the container.
    let _ = fleet.orlop(&["exec", "restless", "--", "kill", "1"]);
    wait("the container runs again", SOON, || {
        let shown: Value = serde_json::from_str(&fleet.orlop(&["ps", "restless", "-o", "json"])?)?;
        let pod = if shown.is_array() { &shown[0] } else { &shown };
        let status = container(pod);
        Ok((status["restartCount"] == 1 && !status["state"]["running"].is_null()).then_some(()))
    })?;
    fleet.plane.run(Part::ApiServer)?;
    let begin = Instant::now();
    wait("the API server learns of it", SOON, || {
        let pods = fleet.pods("restless")?;
        Ok(pods.iter().all(|pod| container(pod)["restartCount"] == 1 && is_ready(pod)).then_some(()))
    })?;
    let pods = fleet.until_ready("web", 2)?;
    ensure!(ids(&pods) == before, "containers were replaced");
    Ok(format!("a restart was counted without it; known {} ms after it came back", begin.elapsed().as_millis()))
}

/// As after a power failure: nothing runs any more, and there is no API server to say what should.
pub(super) fn boots_alone(fleet: &mut Fleet) -> anyhow::Result<String> {
    let mut before = [fleet.until_ready("restless", 1)?, fleet.until_ready("web", 2)?].concat();
    fleet.plane.kill(Part::ApiServer)?;
    fleet.node.kill()?;
    fleet.node.wait()?;
    for keeper in keepers_in(fleet.stage.dir.path())? {
        // Its containers go with it; one may have ended by itself.
        let _ = rustix::process::kill_process(keeper, rustix::process::Signal::KILL);
    }
    let begin = Instant::now();
    fleet.start_again()?;
    let runs_again = |fleet: &Fleet, pod: &Value| {
        // The daemon answers when it has given up waiting for the API server.
        let shown = fleet.orlop(&["ps", name(pod), "-o", "json"]).ok()?;
        let shown: Value = serde_json::from_str(&shown).ok()?;
        let status = container(if shown.is_array() { &shown[0] } else { &shown });
        let restarts = status["restartCount"].as_i64()? - container(pod)["restartCount"].as_i64()?;
        (status["state"]["running"].is_object() && restarts == 1).then_some(())
    };
    for pod in &before {
        wait(&format!("{} runs again", name(pod)), SOON, || Ok(runs_again(fleet, pod)))?;
    }
    let took = begin.elapsed();
    fleet.plane.run(Part::ApiServer)?;
    // Who has lost the server for so long rests for up to a minute before it asks again; those that boot do not.
    for part in [Part::ControllerManager, Part::Scheduler] {
        fleet.plane.kill(part)?;
        fleet.plane.run(part)?;
    }
    wait("the node is Ready", SOON, || {
        let node = fleet.get(&format!("node {NODE}"))?;
        Ok((condition(&node, "Ready") == Some("True")).then_some(()))
    })?;
    let mut after = [fleet.until_ready("restless", 1)?, fleet.until_ready("web", 2)?].concat();
    let uid = |pod: &mut Value| pod["metadata"]["uid"].take().to_string();
    let [mut before, mut after]: [Vec<String>; 2] =
        [&mut before, &mut after].map(|pods| pods.iter_mut().map(uid).collect());
    before.sort();
    after.sort();
    ensure!(before == after, "other pods run: {after:?} instead of {before:?}");
    Ok(format!("3 pods ran again {:.1} s after the start", took.as_secs_f64()))
}

pub(super) fn strangers(fleet: &mut Fleet) -> anyhow::Result<String> {
    // The API server is a caller with rights; this is its own way to the kubelet.
    let summary = fleet.kubectl(&format!("get --raw /api/v1/nodes/{NODE}/proxy/stats/summary"))?;
    let summary: Value = serde_json::from_str(&summary)?;
    ensure!(summary["node"]["nodeName"] == NODE, "the summary is of {}", summary["node"]["nodeName"]);
    let pressure = &summary["pods"][0]["containers"][0]["memory"]["psi"]["some"]["total"];
    ensure!(pressure.is_u64() || !is_unified(), "nothing of pressure on control groups version 2: {summary}");
    for (page, line) in [("statusz", "Binary version: 1.37.2"), ("flagz", "cloud-provider=")] {
        let text = fleet.kubectl(&format!("get --raw /api/v1/nodes/{NODE}/proxy/{page}"))?;
        ensure!(text.lines().any(|found| found == line), "/{page} has no line {line:?}: {text}");
    }
    let kubelet = format!("https://{}:10250/pods", super::ADDRESS);
    let curl = |more: &[&str]| {
        let mut command = std::process::Command::new("curl");
        command.args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", &kubelet]).args(more);
        testkit::host::output(&mut command)
    };
    ensure!(curl(&[])? == b"401", "without credentials: {:?}", String::from_utf8(curl(&[])?));
    let token = fleet.kubectl("create token default")?;
    let header = format!("Authorization: Bearer {}", token.trim());
    ensure!(curl(&["-H", &header])? == b"403", "without rights: {:?}", String::from_utf8(curl(&["-H", &header])?));
    fleet.kubectl(
        "create clusterrolebinding reader --clusterrole=system:kubelet-api-admin --serviceaccount=default:reader",
    )?;
    fleet.kubectl("create serviceaccount reader")?;
    let token = fleet.kubectl("create token reader")?;
    let header = format!("Authorization: Bearer {}", token.trim());
    ensure!(curl(&["-H", &header])? == b"200", "with rights: {:?}", String::from_utf8(curl(&["-H", &header])?));
    let health = http_text("GET", SocketAddr::from(([127, 0, 0, 1], 10248)), "/healthz")?;
    ensure!(health.1 == "ok", "healthz says {:?}", health.1);
    Ok("401 without credentials, 403 without rights, 200 with them".to_owned())
}

pub(super) fn measures(fleet: &mut Fleet) -> anyhow::Result<String> {
    const WANTED: [(&str, &[&str]); 4] = [
        (
            "metrics",
            &[
                "kubelet_node_name{",
                "kubelet_running_pods ",
                "kubelet_running_containers{container_state=\"running\"}",
                "kubelet_pod_start_duration_seconds_count ",
                "kubelet_pod_worker_duration_seconds_bucket{",
                "kubelet_started_pods_total ",
                "kubelet_started_containers_total{container_type=\"container\"}",
                "kubelet_cgroup_manager_duration_seconds_count{operation_type=\"create\"}",
                "kubelet_pod_worker_start_duration_seconds_count ",
                "volume_manager_total_volumes{plugin_name=",
                "rest_client_request_duration_seconds_bucket{host=",
                "kubelet_runtime_operations_total{operation_type=\"run_podsandbox\"}",
                "kubelet_runtime_operations_duration_seconds_bucket{",
                "storage_operation_duration_seconds_count{",
                "kubelet_certificate_manager_client_ttl_seconds ",
                "rest_client_requests_total{code=\"200\"",
                "process_resident_memory_bytes ",
                "kubernetes_build_info{",
            ],
        ),
        (
            "metrics/cadvisor",
            &[
                "container_cpu_usage_seconds_total{container=\"c\"",
                "container_memory_working_set_bytes{container=\"c\"",
                "container_network_receive_bytes_total{",
                "machine_memory_bytes{",
            ],
        ),
        (
            "metrics/resource",
            &["node_cpu_usage_seconds_total ", "pod_memory_working_set_bytes{", "container_start_time_seconds{"],
        ),
        ("metrics/probes", &["prober_probe_total{", "prober_probe_duration_seconds_bucket{"]),
    ];
    let mut lines = 0;
    for (path, wanted) in WANTED {
        let text = fleet.kubectl(&format!("get --raw /api/v1/nodes/{NODE}/proxy/{path}"))?;
        for beginning in wanted {
            let found = text.lines().any(|line| line.starts_with(beginning));
            ensure!(found, "{path} has no {beginning}\n{text}");
        }
        let waited = "container_pressure_memory_waiting_seconds_total{container=\"c\"";
        let wants_pressure = path == "metrics/cadvisor" && is_unified();
        ensure!(!wants_pressure || text.contains(waited), "{path} has no {waited}\n{text}");
        lines += text.lines().count();
    }
    Ok(format!("{lines} lines on four paths"))
}

pub(super) fn other_runtime(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.apply("lighter.yaml", manifests::LIGHTER)?;
    let pods = fleet.until_ready("lighter", 1)?;
    ensure!(pods[0]["spec"]["overhead"]["memory"] == "16Mi", "it has no overhead: {}", pods[0]["spec"]["overhead"]);
    let seen = fleet.kubectl_words(&["exec", "lighter", "--", "sh", "-c", "cat /proc/1/comm; hostname"])?;
    ensure!(seen == "sleep\nlighter\n", "exec: {seen:?}");
    ensure!(fleet.kubectl("logs lighter")? == "afloat\n", "its log is another one");
    let handlers = fleet.get(&format!("node {NODE}"))?["status"]["runtimeHandlers"].take();
    let has_runc = handlers.as_array().is_some_and(|all| all.iter().any(|handler| handler["name"] == "runc"));
    ensure!(has_runc, "the node does not tell of its handler: {handlers}");
    let told = wait("the other pod's trouble is told", SOON, || {
        let events = fleet.get("events --field-selector involvedObject.name=hovercraft")?;
        let events = events["items"].as_array().cloned().unwrap_or_default();
        let told = events.iter().filter(|event| event["reason"] == "FailedCreatePodSandBox");
        Ok(told.filter_map(|event| event["message"].as_str().map(str::to_owned)).next())
    })?;
    ensure!(told.contains("no runtime for \"skirt\" is configured"), "event: {told}");
    fleet.kubectl("delete pod lighter hovercraft --wait=true")?;
    Ok("with its overhead, logs, exec and a probe; a class without a runtime is told of".to_owned())
}

pub(super) fn rejects(fleet: &mut Fleet) -> anyhow::Result<String> {
    let pod = |name: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n  nodeName: {NODE}\n{more}\n  containers:\n  - \
             {{ name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, infinity], resources: {{ requests: {{ cpu: \
             CPU }} }} }}\n"
        )
    };
    for (name, more, cpu, reason) in [
        ("greedy", "", "1000", "OutOfcpu"),
        ("elsewhere", "  nodeSelector: { deck: upper }", "1m", "NodeAffinity"),
        (
            "unsafe",
            "  securityContext: { sysctls: [{ name: kernel.msgmax, value: '65536' }] }",
            "1m",
            "SysctlForbidden",
        ),
    ] {
        fleet.apply(&format!("{name}.yaml"), &pod(name, more).replace("CPU", cpu))?;
        let status = wait(&format!("{name} is rejected"), SOON, || {
            let pod = fleet.get(&format!("pod {name}"))?;
            Ok((pod["status"]["phase"] == "Failed").then(|| pod["status"].clone()))
        })?;
        ensure!(status["reason"] == reason, "{name} was rejected for {}: {}", status["reason"], status["message"]);
    }
    Ok("too many CPUs, another node's selector, an unsafe sysctl".to_owned())
}

pub(super) fn evicts(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.stop_node()?;
    // Less than this is always left.
    fleet.start_again_with(&["--eviction-hard", "memory.available<99%"])?;
    let status = wait("the pod without a request is evicted", SOON, || {
        let pods = fleet.pods("restless")?;
        let status = pods.first().map(|pod| pod["status"].clone()).unwrap_or_default();
        Ok((status["phase"] == "Failed").then_some(status))
    })?;
    ensure!(status["reason"] == "Evicted", "it ended for {}: {}", status["reason"], status["message"]);
    ensure!(
        condition(&serde_json::json!({ "status": status }), "DisruptionTarget") == Some("True"),
        "status: {status}"
    );
    let node = fleet.get(&format!("node {NODE}"))?;
    ensure!(condition(&node, "MemoryPressure") == Some("True"), "the node says nothing of it");
    ensure!(fleet.pods("web")?.iter().all(is_ready), "who asked for memory had to go as well");
    fleet.stop_node()?;
    fleet.start_again()?;
    wait("the new daemon answers", SOON, || fleet.orlop(&["ps"]).map(Some))?;
    Ok(status["message"].as_str().unwrap_or_default().trim().to_owned())
}

pub(super) fn leaves(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.kubectl("delete deployment,service,pod --all --wait=true")?;
    wait("all pods are gone", SOON, || {
        let pods = fleet.get("pods -A")?;
        Ok(pods["items"].as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    let left = fleet.orlop(&["fsck"])?;
    ensure!(left.is_empty(), "left: {left}");
    fleet.stop_node()?;
    Ok("pods, then the daemon; fsck prints nothing".to_owned())
}
