//! Manifests as people have them who run `podman kube play`: every kind and field that it honours is read here, too, and means
//! what it says. Podman's documentation lists them (`docs/kubernetes_support.md`).

use std::path::Path;

use serde_json::Value;

use super::kinds::read_file;

/// The objects of a file as JSON; none of its documents may be worth a word.
fn read(text: &str) -> Vec<Value> {
    let (objects, problems) = read_file(Path::new("play.yaml"), text, "default");
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems, Vec::<String>::new(), "{text}");
    objects.iter().map(|declared| declared.object.to_json()).collect()
}

/// `lines`, each below the one before it, indented by `depth` more than the first line of them has.
fn indented(lines: &str, depth: usize) -> String {
    lines.lines().map(|line| format!("{}{line}\n", " ".repeat(depth))).collect()
}

fn pod(spec: &str, container: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: play\nspec:\n{}  containers:\n  - name: main\n    image: quay.io/a/b:1\n{}",
        indented(spec, 2),
        indented(container, 4)
    )
}

/// Reads one object, and finds what its manifest has said at `pointer`.
fn check(text: &str, pointer: &str, expect: &str) {
    let objects = read(text);
    let [object] = &objects[..] else { panic!("{} objects in {text}", objects.len()) };
    let expect: Value = serde_json::from_str(expect).unwrap();
    assert_eq!(object.pointer(pointer), Some(&expect), "{pointer} of {object:#}");
}

#[test]
fn fields_of_pods() {
    for (spec, pointer, expect) in [
        ("initContainers: [{name: first, image: a, command: [x]}]", "/initContainers/0/name", "\"first\""),
        ("restartPolicy: Never", "/restartPolicy", "\"Never\""),
        ("restartPolicy: OnFailure", "/restartPolicy", "\"OnFailure\""),
        ("terminationGracePeriodSeconds: 3", "/terminationGracePeriodSeconds", "3"),
        ("hostname: harbour", "/hostname", "\"harbour\""),
        ("hostAliases: [{ip: 10.1.2.3, hostnames: [a, b.c]}]", "/hostAliases/0/hostnames", "[\"a\",\"b.c\"]"),
        ("dnsConfig: {nameservers: [1.1.1.1], searches: [x.y]}", "/dnsConfig/searches", "[\"x.y\"]"),
        ("dnsConfig: {options: [{name: ndots, value: '2'}, {name: edns0}]}", "/dnsConfig/options/0/value", "\"2\""),
        ("hostNetwork: true", "/hostNetwork", "true"),
        ("hostPID: true", "/hostPID", "true"),
        ("hostIPC: true", "/hostIPC", "true"),
        ("hostUsers: false", "/hostUsers", "false"),
        ("shareProcessNamespace: true", "/shareProcessNamespace", "true"),
        ("securityContext: {runAsUser: 7, runAsGroup: 8}", "/securityContext/runAsGroup", "8"),
        ("securityContext: {supplementalGroups: [1, 2]}", "/securityContext/supplementalGroups", "[1,2]"),
        (
            "securityContext: {seLinuxOptions: {user: u, role: r, type: t, level: 's0:c1'}}",
            "/securityContext/seLinuxOptions/level",
            "\"s0:c1\"",
        ),
        (
            "securityContext: {sysctls: [{name: net.ipv4.ping_group_range, value: '0 0'}]}",
            "/securityContext/sysctls/0/value",
            "\"0 0\"",
        ),
    ] {
        check(&pod(spec, ""), &format!("/spec{pointer}"), expect);
    }
}

#[test]
fn volumes() {
    for (volume, pointer, expect) in [
        ("emptyDir: {}", "/emptyDir", "{}"),
        ("emptyDir: {medium: Memory, sizeLimit: 64Mi}", "/emptyDir/medium", "\"Memory\""),
        ("hostPath: {path: /srv}", "/hostPath/path", "\"/srv\""),
        ("hostPath: {path: /srv, type: DirectoryOrCreate}", "/hostPath/type", "\"DirectoryOrCreate\""),
        ("hostPath: {path: /srv, type: Directory}", "/hostPath/type", "\"Directory\""),
        ("hostPath: {path: /srv/f, type: FileOrCreate}", "/hostPath/type", "\"FileOrCreate\""),
        ("hostPath: {path: /srv/f, type: File}", "/hostPath/type", "\"File\""),
        ("hostPath: {path: /run/s, type: Socket}", "/hostPath/type", "\"Socket\""),
        ("hostPath: {path: /dev/null, type: CharDevice}", "/hostPath/type", "\"CharDevice\""),
        ("hostPath: {path: /dev/vda, type: BlockDevice}", "/hostPath/type", "\"BlockDevice\""),
        ("persistentVolumeClaim: {claimName: data}", "/persistentVolumeClaim/claimName", "\"data\""),
        ("persistentVolumeClaim: {claimName: data, readOnly: true}", "/persistentVolumeClaim/readOnly", "true"),
        ("configMap: {name: m, items: [{key: k, path: p}]}", "/configMap/items/0/path", "\"p\""),
        ("configMap: {name: m, optional: true, defaultMode: 0600}", "/configMap/defaultMode", "384"),
        ("secret: {secretName: s, defaultMode: 0400}", "/secret/defaultMode", "256"),
        ("secret: {secretName: s, items: [{key: k, path: p, mode: 0440}]}", "/secret/items/0/mode", "288"),
        ("image: {reference: quay.io/a/data:1, pullPolicy: IfNotPresent}", "/image/reference", "\"quay.io/a/data:1\""),
    ] {
        let text = pod(&format!("volumes:\n- name: v\n  {volume}"), "volumeMounts: [{name: v, mountPath: /v}]");
        check(&text, &format!("/spec/volumes/0{pointer}"), expect);
    }
}

#[test]
fn fields_of_containers() {
    const VOLUME: &str = "volumes: [{name: v, emptyDir: {}}]";
    for (container, pointer, expect) in [
        ("imagePullPolicy: Never", "/imagePullPolicy", "\"Never\""),
        ("command: [/bin/app, --fast]", "/command", "[\"/bin/app\",\"--fast\"]"),
        ("args: [serve]", "/args", "[\"serve\"]"),
        ("workingDir: /srv", "/workingDir", "\"/srv\""),
        ("ports: [{containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}]", "/ports/0/hostIP", "\"127.0.0.1\""),
        ("ports: [{name: dns, containerPort: 53, protocol: UDP}]", "/ports/0/protocol", "\"UDP\""),
        ("ports: [{name: web, containerPort: 80}]", "/ports/0/name", "\"web\""),
        ("env: [{name: A, value: ''}, {name: B, value: b}]", "/env/1/value", "\"b\""),
        (
            "env: [{name: A, valueFrom: {configMapKeyRef: {name: m, key: k, optional: true}}}]",
            "/env/0/valueFrom/configMapKeyRef/optional",
            "true",
        ),
        (
            "env: [{name: A, valueFrom: {secretKeyRef: {name: s, key: k, optional: false}}}]",
            "/env/0/valueFrom/secretKeyRef/key",
            "\"k\"",
        ),
        (
            "env: [{name: A, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]",
            "/env/0/valueFrom/fieldRef/fieldPath",
            "\"metadata.name\"",
        ),
        (
            "env: [{name: A, valueFrom: {resourceFieldRef: {resource: limits.memory}}}]",
            "/env/0/valueFrom/resourceFieldRef/resource",
            "\"limits.memory\"",
        ),
        ("envFrom: [{configMapRef: {name: m, optional: true}}]", "/envFrom/0/configMapRef/optional", "true"),
        ("envFrom: [{secretRef: {name: s}}]", "/envFrom/0/secretRef/name", "\"s\""),
        ("volumeMounts: [{name: v, mountPath: /v, readOnly: true}]", "/volumeMounts/0/readOnly", "true"),
        ("volumeMounts: [{name: v, mountPath: /v, subPath: a/b}]", "/volumeMounts/0/subPath", "\"a/b\""),
        ("resources: {}", "/resources", "{}"),
        ("resources: {limits: {cpu: 1.5, memory: 64Mi}}", "/resources/limits/memory", "\"64Mi\""),
        ("resources: {requests: {cpu: 100m}}", "/resources/requests/cpu", "\"100m\""),
        ("livenessProbe: {exec: {command: [x]}, periodSeconds: 5}", "/livenessProbe/periodSeconds", "5"),
        ("livenessProbe: {httpGet: {path: /, port: 80}}", "/livenessProbe/httpGet/port", "80"),
        ("livenessProbe: {tcpSocket: {port: 80}}", "/livenessProbe/tcpSocket/port", "80"),
        ("lifecycle: {stopSignal: SIGUSR1}", "/lifecycle/stopSignal", "\"SIGUSR1\""),
        ("securityContext: {}", "/securityContext", "{}"),
        ("securityContext: {runAsUser: 7, runAsGroup: 8}", "/securityContext/runAsUser", "7"),
        ("securityContext: {readOnlyRootFilesystem: true}", "/securityContext/readOnlyRootFilesystem", "true"),
        ("securityContext: {procMount: Default}", "/securityContext/procMount", "\"Default\""),
        ("securityContext: {privileged: true}", "/securityContext/privileged", "true"),
        ("securityContext: {allowPrivilegeEscalation: false}", "/securityContext/allowPrivilegeEscalation", "false"),
        ("securityContext: {capabilities: {add: [NET_ADMIN]}}", "/securityContext/capabilities/add", "[\"NET_ADMIN\"]"),
        (
            "securityContext: {capabilities: {drop: [CAP_MKNOD, CAP_NET_RAW]}}",
            "/securityContext/capabilities/drop",
            "[\"CAP_MKNOD\",\"CAP_NET_RAW\"]",
        ),
        ("securityContext: {seLinuxOptions: {type: spc_t}}", "/securityContext/seLinuxOptions/type", "\"spc_t\""),
    ] {
        check(&pod(VOLUME, container), &format!("/spec/containers/0{pointer}"), expect);
    }
}

#[test]
fn other_kinds() {
    const TEMPLATE: &str =
        "  template:\n    metadata: {labels: {app: x}}\n    spec: {containers: [{name: c, image: a}]}\n";
    let workload = |kind: &str, version: &str, spec: &str| {
        format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: w}}\nspec:\n{}{TEMPLATE}", indented(spec, 2))
    };
    let claim = |spec: &str| format!("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: data}}\n{spec}");
    let selector = "selector: {matchLabels: {app: x}}";
    for (text, pointer, expect) in [
        (workload("Deployment", "apps/v1", &format!("replicas: 3\n{selector}")), "/spec/replicas", "3"),
        // What is selected follows from the template.
        (workload("Deployment", "apps/v1", "replicas: 1"), "/spec/selector/matchLabels/app", "\"x\""),
        (workload("DaemonSet", "apps/v1", selector), "/spec/selector/matchLabels/app", "\"x\""),
        (
            workload("Job", "batch/v1", "completions: 1").replace("spec: {con", "spec: {restartPolicy: Never, con"),
            "/spec/template/spec/restartPolicy",
            "\"Never\"",
        ),
        (claim("spec: {accessModes: [ReadWriteMany]}"), "/spec/accessModes", "[\"ReadWriteMany\"]"),
        (claim("spec: {storageClassName: x}"), "/spec/storageClassName", "\"x\""),
        (claim("spec: {resources: {requests: {storage: 5Gi}}}"), "/spec/resources/requests/storage", "\"5Gi\""),
        (claim(""), "/metadata/name", "\"data\""),
        (
            claim("").replace("{name: data}", "{name: data, annotations: {volume.podman.io/uid: '1000'}}"),
            "/metadata/annotations/volume.podman.io~1uid",
            "\"1000\"",
        ),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: b}".into(), "/data/a", "\"b\""),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\nbinaryData: {a: YQ==}".into(),
            "/binaryData/a",
            "\"YQ==\"",
        ),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {a: YQ==}".into(), "/data/a", "\"YQ==\""),
        (
            "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ntype: Opaque\nstringData: {a: a}".into(),
            "/data/a",
            "\"YQ==\"",
        ),
    ] {
        check(&text, pointer, expect);
    }
}

/// As `podman kube generate` writes them: comments, times and statuses of its own, and empty maps where nothing is said.
#[test]
fn what_podman_itself_writes() {
    let text = "# Save it, and create it with kubectl.\n#\n# Created with podman-5.4.0\n---\napiVersion: v1\nkind: Pod\nmetadata:\n  \
        annotations:\n    io.kubernetes.cri-o.SandboxID/db: 0123456789abcdef\n    \
        io.podman.annotations.autoremove/db: \"FALSE\"\n    bind-mount-options: /srv/db:Z\n  \
        creationTimestamp: \"2025-03-01T10:00:00Z\"\n  labels:\n    app: db\n  name: db-pod\nspec:\n  containers:\n  - args:\n    \
        - postgres\n    env:\n    - name: TERM\n      value: xterm\n    image: docker.io/library/postgres:17\n    name: db\n    \
        ports:\n    - containerPort: 5432\n      hostPort: 5432\n    resources: {}\n    securityContext: {}\n    volumeMounts:\n    \
        - mountPath: /var/lib/postgresql/data\n      name: db-data-pvc\n  hostname: db-pod\n  volumes:\n  - name: db-data-pvc\n    \
        persistentVolumeClaim:\n      claimName: db-data\nstatus: {}\n---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata:\n  \
        annotations:\n    volume.podman.io/driver: local\n  creationTimestamp: \"2025-03-01T10:00:00Z\"\n  name: db-data\nspec:\n  \
        accessModes:\n  - ReadWriteOnce\n  resources:\n    requests:\n      storage: 1Gi\nstatus: {}\n---\napiVersion: v1\n\
        kind: Service\nmetadata:\n  creationTimestamp: \"2025-03-01T10:00:00Z\"\n  labels:\n    app: db\n  name: db-pod\nspec:\n  \
        ports:\n  - name: \"5432\"\n    nodePort: 31433\n    port: 5432\n    targetPort: 5432\n  selector:\n    app: db\n  \
        type: NodePort\nstatus:\n  loadBalancer: {}\n";
    let kinds: Vec<String> = read(text).iter().map(|object| object["kind"].to_string()).collect();
    assert_eq!(kinds, ["\"Pod\"", "\"PersistentVolumeClaim\"", "\"Service\""]);
}
