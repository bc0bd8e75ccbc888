//! `kubectl top`, by metrics-server as it is published: it scrapes the node's kubelet as the role of its manifest lets it.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use testkit::certificates::Subject;
use testkit::daemon::Daemon;
use testkit::go;

use super::{ADDRESS, Fleet, NODE, SOON, points, wait};

/// As whom it speaks to the API server and to kubelets.
const USER: &str = "system:metrics-server";
const PORT: u16 = 4443;

/// What it may do, and the way from the API server to it. It is no pod here, so its Service leads to the node.
const OBJECTS: &str = "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: { name: top }
rules:
- { apiGroups: [''], resources: [nodes/metrics], verbs: [get] }
- { apiGroups: [''], resources: [pods, nodes], verbs: [get, list, watch] }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: { name: top }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: top }
subjects: [{ apiGroup: rbac.authorization.k8s.io, kind: User, name: 'USER' }]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: { name: top-asks }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:auth-delegator' }
subjects: [{ apiGroup: rbac.authorization.k8s.io, kind: User, name: 'USER' }]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: top-reads, namespace: kube-system }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: extension-apiserver-authentication-reader }
subjects: [{ apiGroup: rbac.authorization.k8s.io, kind: User, name: 'USER' }]
---
apiVersion: v1
kind: Service
metadata: { name: top, namespace: kube-system }
spec: { ports: [{ name: https, port: 443 }] }
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: { name: top, namespace: kube-system, labels: { kubernetes.io/service-name: top } }
addressType: IPv4
ports: [{ name: https, port: PORT }]
endpoints: [{ addresses: [ADDRESS], conditions: { ready: true } }]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: { name: v1beta1.metrics.k8s.io }
spec:
  group: metrics.k8s.io
  version: v1beta1
  service: { name: top, namespace: kube-system }
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
";

/// The point.
pub(super) fn shown(fleet: &mut Fleet) -> anyhow::Result<String> {
    let objects = OBJECTS.replace("USER", USER).replace("PORT", &PORT.to_string());
    fleet.apply("top.yaml", &objects.replace("ADDRESS", &ADDRESS.to_string()))?;
    let mut server = server(fleet)?;
    server.start()?;
    let shown = shows(fleet, &mut server);
    if shown.is_err() {
        let log = std::fs::read_to_string(fleet.stage.dir.path().join("top.log")).unwrap_or_default();
        println!("$ cat top.log\n{log}");
    }
    // Without its server the group would be in the way of whoever asks for all resources.
    fleet.kubectl("delete apiservice v1beta1.metrics.k8s.io")?;
    fleet.kubectl("delete service top -n kube-system")?;
    server.stop(SOON)?;
    shown
}

fn server(fleet: &Fleet) -> anyhow::Result<Daemon> {
    let dir = fleet.stage.dir.path();
    let user = fleet.plane.user_kubeconfig(&Subject { name: USER, ..Subject::default() })?;
    let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
    let mut words =
        ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"].map(|name| flag(name, &user)).to_vec();
    words.extend([
        flag("kubelet-certificate-authority", &fleet.plane.authority().certificate),
        flag("cert-dir", &dir.join("top")),
        format!("--secure-port={PORT}"),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--kubelet-use-node-status-port".to_owned(),
        "--kubelet-request-timeout=5s".to_owned(),
        "--metric-resolution=10s".to_owned(),
    ]);
    // It was built before the network became private.
    let program = go::build(&go::METRICS_SERVER)?;
    Ok(Daemon::new(fleet.plane.nursery(), &program, words, dir.join("top.log")))
}

fn shows(fleet: &Fleet, server: &mut Daemon) -> anyhow::Result<String> {
    let node = wait("kubectl top node", SOON, || {
        server.check()?;
        Ok(Some(fleet.kubectl(&format!("top node {NODE} --no-headers"))?))
    })?;
    let columns: Vec<&str> = node.split_whitespace().collect();
    let [name, cpu, _, memory, _] = columns[..] else { anyhow::bail!("kubectl top node shows {node:?}") };
    ensure!(name == NODE && figure(cpu, "m")? > 0 && figure(memory, "Mi")? > 0, "kubectl top node shows {node:?}");
    let pods = fleet.pods("web")?;
    let names: Vec<&str> = pods.iter().map(points::name).collect();
    let lines = wait("kubectl top pod", SOON, || {
        let shown = fleet.kubectl("top pod -l app=web --containers --no-headers")?;
        let lines: Vec<String> = shown.lines().map(str::to_owned).collect();
        Ok((lines.len() == names.len()).then_some(lines))
    })?;
    for line in &lines {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [pod, container, cpu, memory] = columns[..] else { anyhow::bail!("kubectl top pod shows {line:?}") };
        figure(cpu, "m")?;
        figure(memory, "Mi")?;
        ensure!(names.contains(&pod) && container == "c", "kubectl top pod shows {line:?}");
    }
    // The table is in whole MiB, of which these pods have less than one.
    let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/default/pods/{}", names[0]);
    let metrics: Value = serde_json::from_str(&fleet.kubectl(&format!("get --raw {path}"))?)?;
    let used = &metrics["containers"][0]["usage"];
    let bytes = used["memory"].as_str().unwrap_or_default();
    ensure!(figure(bytes, "Ki")? > 0, "{} uses {used}", names[0]);
    Ok(format!("{name} uses {cpu} and {memory}, {} uses {bytes}", names[0]))
}

/// The number before a unit.
fn figure(text: &str, unit: &str) -> anyhow::Result<u64> {
    let number = text.strip_suffix(unit).and_then(|number| number.parse().ok());
    number.with_context(|| format!("{text:?} is no figure in {unit}"))
}
