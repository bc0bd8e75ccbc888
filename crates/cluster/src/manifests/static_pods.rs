//! Static pods: manifests of a node that run there whatever an API server says.
//!
//! What a pod is called, and what makes it another one, is decided here as upstream's kubelet does. Its uid is made from the
//! same things and has the same form, but is another number: upstream hashes how Go prints its own types.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Toleration};
use k8s_openapi::jiff::Timestamp;

use super::decode::{FieldError, decode_known};
use super::default::SetDefaults;
use super::files::{Files, Names};
use super::kinds::to_problem;
use super::path::FieldPath;
use super::problem::{Problem, Said, Severity};
use super::validate::{Errors, Validate};
use super::yaml::{self, Node, Value};
use crate::Key;

/// Where a pod comes from: `file`, or `api`.
const SOURCE: &str = "kubernetes.io/config.source";
/// The uid that the pod has on its node.
const HASH: &str = "kubernetes.io/config.hash";
/// When the node saw it first.
const SEEN: &str = "kubernetes.io/config.seen";

/// Whether a pod comes from a file of its node.
pub(crate) fn is_static(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.and_then(|all| all.get(SOURCE)).is_some_and(|source| source != "api")
}

/// A pod that a file declares.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Declared {
    pub(crate) pod: Pod,
    pub(crate) file: PathBuf,
}

/// The static pods of a node.
pub(crate) struct StaticPods {
    files: Files,
    path: PathBuf,
    node: String,
    said: Said,
    /// What is declared, by the name on the API server. What a file said before it had faults stays in force.
    declared: BTreeMap<Key, Declared>,
}

impl StaticPods {
    /// The pods of a file or directory, which may appear later.
    pub(crate) fn open(path: &Path, node: &str) -> Result<Self, Box<Problem>> {
        let files = Files::open(&[path.to_owned()], Names::All)?;
        let mut pods = Self {
            files,
            path: path.to_owned(),
            node: node.to_owned(),
            said: Said::default(),
            declared: BTreeMap::new(),
        };
        pods.read();
        Ok(pods)
    }

    /// What is declared now.
    pub(crate) fn declared(&self) -> &BTreeMap<Key, Declared> {
        &self.declared
    }

    /// Waits until some file has changed, and reads them all. Cancel-safe, as [`Files::changed`] is.
    pub(crate) async fn changed(&mut self) {
        self.files.changed().await;
        self.read();
    }

    fn read(&mut self) {
        let mut scan = self.files.scan();
        if !self.path.exists() {
            // Many nodes have none; it is read as soon as it exists.
            scan.problems.clear();
            scan.unreadable.clear();
        }
        let before = std::mem::take(&mut self.declared);
        let mut faulty: Vec<PathBuf> = scan.unreadable.into_iter().collect();
        let mut problems = scan.problems;
        for (file, text) in &scan.files {
            let (pods, faults) = read_file(file, text, &self.node);
            if faults.iter().any(|fault| fault.severity == Severity::Error) {
                faulty.push(file.clone());
            }
            problems.extend(faults);
            pods.into_iter().for_each(|pod| problems.extend(self.declare(pod, file, &before)));
        }
        for (key, old) in before {
            if faulty.iter().any(|faulty| old.file.starts_with(faulty)) {
                self.declared.entry(key).or_insert(old);
            }
        }
        self.said.tell(&problems);
    }

    fn declare(&mut self, pod: Pod, file: &Path, before: &BTreeMap<Key, Declared>) -> Option<Problem> {
        let key = Key::of(&pod.metadata);
        if let Some(other) = self.declared.get(&key) {
            return Some(problem(
                file,
                format!("pod {key} is declared in {} too; that one counts", other.file.display()),
            ));
        }
        // The same as before was seen before.
        let same = before.get(&key).filter(|old| old.pod.metadata.uid == pod.metadata.uid && old.file == file);
        let declared = same.cloned().unwrap_or_else(|| Declared { pod, file: file.to_owned() });
        self.declared.insert(key, declared);
        None
    }
}

fn problem(file: &Path, message: String) -> Problem {
    Problem { severity: Severity::Error, file: file.into(), line: 0, object: None, field: None, message, remedy: None }
}

/// The pods of one file, and what is wrong with it.
fn read_file(file: &Path, text: &str, node: &str) -> (Vec<Pod>, Vec<Problem>) {
    let (mut pods, mut problems) = (Vec::new(), Vec::new());
    for document in yaml::parse(text) {
        let documents = match document {
            Ok(document) => items(document),
            Err(error) => {
                problems.push(Problem { line: error.line, ..problem(file, error.message) });
                continue;
            }
        };
        for document in documents {
            match read_pod(&document) {
                Ok((pod, unknown)) => {
                    let warning = |error| Problem { severity: Severity::Warning, ..to_problem(file, &document, error) };
                    problems.extend(unknown.into_iter().map(warning));
                    pods.push(of_node(pod, &document, file, node));
                }
                Err(errors) => problems.extend(errors.into_iter().map(|error| to_problem(file, &document, error))),
            }
        }
    }
    (pods, problems)
}

/// A document, or those of a list.
fn items(document: Node) -> Vec<Node> {
    let is_list = matches!(document.get("kind").and_then(Node::as_str), Some("PodList" | "List"));
    let Some(Value::Sequence(items)) = document.get("items").filter(|_| is_list).map(|items| items.value.clone())
    else {
        return vec![document];
    };
    let of_pods = document.get("kind").and_then(Node::as_str) == Some("PodList");
    let kinded = |mut item: Node| {
        if of_pods && item.get("kind").is_none() {
            item.set_text("kind", "Pod");
        }
        item
    };
    items.into_iter().map(kinded).collect()
}

/// Decodes, defaults and validates; also what nobody here knows.
fn read_pod(document: &Node) -> Result<(Pod, Vec<FieldError>), Vec<FieldError>> {
    let kind = document.get("kind").and_then(Node::as_str).unwrap_or_default();
    if kind != "Pod" {
        let message = format!("kind {kind:?} is no static pod");
        return Err(vec![fault("kind", message, Some("files here declare Pods; anything else needs a cluster"))]);
    }
    let (mut pod, unknown) = decode_known::<Pod>(document)?;
    let referring = references(&pod);
    pod.metadata.namespace.get_or_insert_with(|| "default".to_owned());
    pod.set_defaults();
    let spec = pod.spec.get_or_insert_default();
    (spec.service_account_name, spec.service_account) = (None, None);
    let mut errors = Errors::default();
    pod.validate(&mut errors);
    let mut errors = errors.into_vec();
    errors.extend(referring);
    if errors.is_empty() { Ok((pod, unknown)) } else { Err(errors) }
}

fn fault(field: &'static str, message: String, remedy: Option<&str>) -> FieldError {
    let path = field.split('.').fold(FieldPath::root(), |path, name| path.field(name));
    FieldError { path, line: None, message, remedy: remedy.map(str::to_owned) }
}

/// A pod that runs before there is an API server cannot need anything from it.
fn references(pod: &Pod) -> Option<FieldError> {
    let spec = pod.spec.as_ref()?;
    let named = |name: &Option<String>| name.as_deref().is_some_and(|name| !name.is_empty());
    if named(&spec.service_account_name) || named(&spec.service_account) {
        return Some(fault("spec.serviceAccountName", "static pods may not reference serviceaccounts".into(), None));
    }
    let (what, name) = crate::api::first_reference(pod)?;
    Some(fault("spec", format!("static pods may not reference {what} ({name:?})"), None))
}

/// Gives a pod what makes it one of this node.
fn of_node(mut pod: Pod, document: &Node, file: &Path, node: &str) -> Pod {
    let written = document.get("metadata").and_then(|metadata| metadata.get("uid")).and_then(Node::as_str);
    pod.status = None;
    let metadata = &mut pod.metadata;
    (metadata.uid, metadata.resource_version, metadata.generation) = (None, None, None);
    (metadata.creation_timestamp, metadata.deletion_timestamp) = (None, None);
    (metadata.deletion_grace_period_seconds, metadata.managed_fields) = (None, None);
    (metadata.owner_references, metadata.self_link) = (None, None);
    let uid = written.filter(|uid| !uid.is_empty()).map_or_else(|| uid_of(&pod, file, node), str::to_owned);
    let metadata = &mut pod.metadata;
    metadata.name = Some(format!("{}-{}", metadata.name.as_deref().unwrap_or_default(), node.to_lowercase()));
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(SOURCE.to_owned(), "file".to_owned());
    annotations.insert(HASH.to_owned(), uid.clone());
    annotations.insert(SEEN.to_owned(), Timestamp::now().to_string());
    metadata.uid = Some(uid);
    let spec = pod.spec.get_or_insert_default();
    spec.node_name = Some(node.to_owned());
    let toleration =
        Toleration { operator: Some("Exists".into()), effect: Some("NoExecute".into()), ..Toleration::default() };
    let tolerations = spec.tolerations.get_or_insert_default();
    if !tolerations.contains(&toleration) {
        tolerations.push(toleration);
    }
    pod
}

/// A uid that is another as soon as the pod, its file or its node is: 32 hexadecimal digits of FNV-1a.
fn uid_of(pod: &Pod, file: &Path, node: &str) -> String {
    let content = serde_json::to_string(pod).unwrap_or_default();
    format!("{:032x}", fnv1a(format!("{content}host:{node}file:{}", file.display()).as_bytes()))
}

fn fnv1a(bytes: &[u8]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: etcd, namespace: kube-system, creationTimestamp: null}\n\
                       spec:\n  containers:\n  - name: c\n    image: i:1\nstatus: {}\n";

    fn read(text: &str) -> (Vec<Pod>, Vec<String>) {
        let (pods, problems) = read_file(Path::new("/m/etcd.yaml"), text, "Node1");
        (pods, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn hashes_are_fnv() {
        assert_eq!(fnv1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn a_pod_becomes_one_of_its_node() {
        let (pods, problems) = read(POD);
        assert_eq!((pods.len(), problems), (1, Vec::new()));
        let pod = &pods[0];
        assert!(is_static(pod));
        assert_eq!(Key::of(&pod.metadata), Key::new("kube-system", "etcd-node1"));
        let uid = pod.metadata.uid.clone().unwrap();
        assert_eq!((uid.len(), pod.metadata.annotations.as_ref().unwrap().get(HASH)), (32, Some(&uid)));
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.tolerations.as_ref().unwrap().len(), 1);
        assert_eq!((spec.service_account_name.as_ref(), spec.node_name.as_deref()), (None, Some("Node1")));
        assert_eq!(read(POD).0[0].metadata.uid, Some(uid.clone()), "the same is the same");
        assert_ne!(read(&POD.replace("i:1", "i:2")).0[0].metadata.uid, Some(uid));
        let own = POD.replace("name: etcd,", "name: etcd, uid: mine,");
        assert_eq!(read(&own).0[0].metadata.uid.as_deref(), Some("mine"));
    }

    #[test]
    fn what_is_wrong_is_told_by_line() {
        let (pods, problems) = read(&format!("{POD}  new: 1\n"));
        assert_eq!(pods.len(), 0, "a status that is no mapping: {problems:?}");
        let (pods, problems) = read(&POD.replace("image: i:1", "image: i:1\n    newField: 1"));
        assert_eq!((pods.len(), problems.len()), (1, 1), "what is newer than this node is left out");
        assert!(problems[0].starts_with("/m/etcd.yaml:8: Pod kube-system/etcd: unknown field"), "{problems:?}");
        let (_, problems) = read(&POD.replace("spec:", "spec:\n  serviceAccountName: x"));
        assert!(problems[0].starts_with("/m/etcd.yaml:5: ") && problems[0].contains("serviceaccounts"), "{problems:?}");
        let (_, problems) = read(&POD.replace("    image", "    envFrom: [{secretRef: {name: s}}]\n    image"));
        assert!(problems[0].contains("static pods may not reference secrets (\"s\")"), "{problems:?}");
        let (_, problems) = read("apiVersion: v1\nkind: Service\nmetadata: {name: a}\n");
        assert!(problems[0].starts_with("/m/etcd.yaml:2: Service a: kind: kind \"Service\""), "{problems:?}");
    }

    #[tokio::test]
    async fn a_fault_leaves_what_ran_and_the_other_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifests");
        let mut pods = StaticPods::open(&path, "n").unwrap();
        assert!(pods.declared().is_empty(), "it need not be there");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("a"), POD).unwrap();
        std::fs::write(path.join("b"), POD.replace("etcd", "other")).unwrap();
        while pods.declared().len() < 2 {
            pods.changed().await;
        }
        let before = pods.declared().clone();
        std::fs::write(path.join("a"), "kind: [").unwrap();
        std::fs::write(path.join("c"), POD.replace("etcd", "third")).unwrap();
        while pods.declared().len() < 3 {
            pods.changed().await;
        }
        assert!(before.iter().all(|(key, one)| pods.declared().get(key) == Some(one)));
        std::fs::remove_file(path.join("a")).unwrap();
        while pods.declared().len() > 2 {
            pods.changed().await;
        }
        assert!(pods.declared().get(&Key::new("kube-system", "etcd-n")).is_none());
    }
}
