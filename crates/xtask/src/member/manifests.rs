//! What the fleet is told to run.

use std::path::Path;

use testkit::control_plane::ControlPlane;

/// The configuration of a node that joins with a token.
pub(super) fn joining_configuration(plane: &ControlPlane, static_pods: &Path) -> anyhow::Result<String> {
    let own = format!("rotateCertificates: true\nserverTLSBootstrap: true\nstaticPodPath: {}\n", static_pods.display());
    Ok(plane.kubelet_configuration()? + &own)
}

/// A pod that its node runs by itself.
pub(super) const STATIC: &str = "apiVersion: v1
kind: Pod
metadata: { name: ballast, labels: { app: ballast } }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - { name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, 'echo LINE; exec sleep 100000'] }
";

/// The operator's own runtime.
pub(super) const RUNTIMES: &str = "apiVersion: orlop/v1
kind: RuntimeConfiguration
runtimeHandlers:
- { name: runc, path: RUNC }
";

/// A class of pods that run by it, a pod of the class, and one of a class whose runtime the node does not have.
pub(super) const LIGHTER: &str = "apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: { name: lighter }
handler: runc
overhead: { podFixed: { cpu: 10m, memory: 16Mi } }
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: { name: hovercraft }
handler: skirt
---
apiVersion: v1
kind: Pod
metadata: { name: lighter, labels: { app: lighter } }
spec:
  runtimeClassName: lighter
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'echo afloat; exec sleep 100000']
    resources: { limits: { cpu: 50m, memory: 32Mi } }
    readinessProbe: { exec: { command: [cat, /proc/1/comm] }, periodSeconds: 1, timeoutSeconds: 30 }
---
apiVersion: v1
kind: Pod
metadata: { name: hovercraft, labels: { app: hovercraft } }
spec:
  runtimeClassName: hovercraft
  terminationGracePeriodSeconds: 1
  containers:
  - { name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, '100000'] }
";

/// A Deployment and its Service. Its pods end when they are told, as soon as each connection they have has its answer.
pub(super) const FERRY: &str = "apiVersion: v1
kind: Service
metadata: { name: ferry }
spec: { selector: { app: ferry }, ports: [{ port: 80, targetPort: 8080 }] }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: ferry }
spec:
  replicas: 3
  selector: { matchLabels: { app: ferry } }
  template:
    metadata: { labels: { app: ferry } }
    spec:
      containers:
      - name: c
        image: busybox
        imagePullPolicy: IfNotPresent
        command:
        - sh
        - -c
        - |
          ends() { while grep -Eqh ':1F90 [0-9A-F]*:[0-9A-F]* 0[13489]' /proc/net/tcp /proc/net/tcp6; do :; done; exit; }
          trap ends TERM
          mkdir -p /w
          echo aboard > /w/index.html
          httpd -f -p 8080 -h /w & wait
        readinessProbe: { httpGet: { path: /, port: 8080 }, periodSeconds: 1, timeoutSeconds: 30 }
        resources: { requests: { cpu: 10m, memory: 8Mi } }
";

/// A pod that shows a certificate of its own and those that it trusts.
pub(super) const PURSER: &str = "apiVersion: v1
kind: Pod
metadata: { name: purser, labels: { app: purser } }
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - name: papers
    projected:
      sources:
      - clusterTrustBundle: { name: flags, path: trust.pem }
      - podCertificate: { signerName: harbour.example/master, keyType: ECDSAP256, credentialBundlePath: papers.pem }
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, '100000']
    volumeMounts: [{ name: papers, mountPath: /papers }]
";

/// A CSI driver, a volume of it, its claim, and a pod that writes into it.
pub(super) const HOLD: &str = "apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: { name: hull.csi.example }
spec: { attachRequired: true, podInfoOnMount: true, fsGroupPolicy: File }
---
apiVersion: v1
kind: PersistentVolume
metadata: { name: hold }
spec:
  accessModes: [ReadWriteOnce]
  capacity: { storage: 1Gi }
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ''
  csi: { driver: hull.csi.example, volumeHandle: hold-1, fsType: ext4 }
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: { name: hold }
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ''
  volumeName: hold
  resources: { requests: { storage: 1Gi } }
---
apiVersion: v1
kind: Pod
metadata: { name: stevedore, labels: { app: stevedore } }
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{ name: hold, persistentVolumeClaim: { claimName: hold } }]
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'echo cargo > /hold/manifest; exec sleep 100000']
    volumeMounts: [{ name: hold, mountPath: /hold }]
    readinessProbe: { exec: { command: [test, -s, /hold/manifest] }, periodSeconds: 1, timeoutSeconds: 30 }
";

/// A class of devices, a pod that claims one of it, and one that asks for it by a resource.
pub(super) const RIGGING: &str = "apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata: { name: winch }
spec:
  extendedResourceName: rigging.example/winch
  selectors: [{ cel: { expression: \"device.driver == 'rigging.dra.example'\" } }]
---
apiVersion: resource.k8s.io/v1
kind: ResourceClaimTemplate
metadata: { name: winch }
spec:
  spec:
    devices:
      requests: [{ name: pull, exactly: { deviceClassName: winch } }]
      config: [{ opaque: { driver: rigging.dra.example, parameters: { rope: hemp } } }]
---
apiVersion: v1
kind: Pod
metadata: { name: bosun, labels: { app: rigger } }
spec:
  terminationGracePeriodSeconds: 1
  resourceClaims: [{ name: winch, resourceClaimTemplateName: winch }]
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'test $user_rope = hemp && exec sleep 100000']
    resources: { claims: [{ name: winch }] }
---
apiVersion: v1
kind: Pod
metadata: { name: mate, labels: { app: rigger } }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'env | grep ^claim_.*=true$ && exec sleep 100000']
    resources: { limits: { rigging.example/winch: 1 } }
";

/// A pod whose start has parts that are over for good.
pub(super) const CREW: &str = "apiVersion: v1
kind: Pod
metadata: { name: crew, labels: { app: crew } }
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: { deck: lower }
  initContainers:
  - { name: muster, image: busybox, imagePullPolicy: IfNotPresent, command: [\"true\"] }
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, \"trap exit TERM; sleep 100000 & wait\"]
    startupProbe: { exec: { command: [sh, -c, \"echo one >> /startups\"] }, periodSeconds: 1, timeoutSeconds: 30 }
    readinessProbe: { exec: { command: [sh, -c, \"echo one >> /probes\"] }, periodSeconds: 1, timeoutSeconds: 30 }
";

/// A web server of two replicas, its settings and its Service.
pub(super) const WEB: &str = "apiVersion: v1
kind: ConfigMap
metadata: { name: settings }
data: { word: ahoy, line: one }
---
apiVersion: v1
kind: Secret
metadata: { name: hold }
stringData: { key: treasure }
---
apiVersion: v1
kind: Service
metadata: { name: web }
spec:
  selector: { app: web }
  ports: [{ port: 80, targetPort: 8080 }]
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  replicas: 2
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      terminationGracePeriodSeconds: 5
      nodeSelector: { deck: lower }
      containers:
      - name: c
        image: busybox
        imagePullPolicy: IfNotPresent
        command:
        - sh
        - -c
        - |
          trap exit TERM
          mkdir -p /w; hostname > /w/index.html
          echo \"listening as $(hostname)\"
          httpd -f -p 8080 -h /w &
          wait
        env:
        - { name: WORD, valueFrom: { configMapKeyRef: { name: settings, key: word } } }
        - { name: NODE, valueFrom: { fieldRef: { fieldPath: spec.nodeName } } }
        readinessProbe: { httpGet: { path: /, port: 8080 }, periodSeconds: 1, timeoutSeconds: 30 }
        resources: { requests: { cpu: 10m, memory: 16Mi }, limits: { memory: 64Mi } }
        volumeMounts:
        - { name: settings, mountPath: /settings }
        - { name: hold, mountPath: /hold }
      volumes:
      - { name: settings, configMap: { name: settings } }
      - { name: hold, secret: { secretName: hold, defaultMode: 256 } }
";

/// A pod that a test can make exit once it is ready: the first process of a pod ignores signals that it has no handler for.
pub(super) const RESTLESS: &str = "apiVersion: v1
kind: Pod
metadata: { name: restless, labels: { app: restless } }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - { name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, 'trap exit TERM; touch /heeds; sleep infinity & wait'], readinessProbe: { exec: { command: [test, -e, /heeds] }, periodSeconds: 1, timeoutSeconds: 30 } }
";
