//! Static pods: manifests of a node that run there whatever an API server says.
//!
//! What a pod is called, what its uid is, and what makes it another one, is decided here as upstream's kubelet does: a node
//! that changes from one to the other keeps its static pods.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Toleration};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;

use super::decode::{FieldError, decode_known};
use super::default::SetDefaults;
use super::files::{Files, Names};
use super::go_print;
use super::kinds::to_problem;
use super::path::FieldPath;
use super::problem::{Problem, Said, Severity};
use super::validate::{Errors, Validate};
use super::yaml::{self, Node, Value};
use crate::Key;

/// Where a pod comes from: `file`, `http`, or `api`.
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
    files: Option<Files>,
    path: PathBuf,
    page: Option<Page>,
    /// The document of the server has been read once, and had no fault.
    is_page_read: bool,
    node: String,
    said: Said,
    /// What is declared, by the name on the API server. What a file said before it had faults stays in force.
    declared: BTreeMap<Key, Declared>,
}

/// A document of a server: its URL, and what it is now.
type Page = (String, watch::Receiver<Option<String>>);

impl StaticPods {
    /// The pods of a file or directory, which may appear later, and of a server.
    pub(crate) fn open(path: Option<&Path>, page: Option<Page>, node: &str) -> Result<Self, Box<Problem>> {
        let mut pods = Self {
            files: path.map(|path| Files::open(&[path.to_owned()], Names::All)).transpose()?,
            path: path.unwrap_or(Path::new("")).to_owned(),
            page,
            is_page_read: false,
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

    /// Whether these are all that there were when the node started: a server that has not answered yet may have more.
    pub(crate) fn is_complete(&self) -> bool {
        self.page.is_none() || self.is_page_read
    }

    /// Waits until something has changed, and reads it all. Cancel-safe, as [`Files::changed`] is.
    pub(crate) async fn changed(&mut self) {
        let files = async {
            match &mut self.files {
                Some(files) => files.changed().await,
                None => std::future::pending().await,
            }
        };
        let page = async {
            if let Some((_, text)) = &mut self.page
                && text.changed().await.is_ok()
            {
                return;
            }
            // There is none, or who follows it has ended with the node.
            std::future::pending().await
        };
        tokio::select! {
            () = files => {}
            () = page => {}
        }
        self.read();
    }

    fn read(&mut self) {
        let mut scan = self.files.as_mut().map(Files::scan).unwrap_or_default();
        if !self.path.exists() {
            // Many nodes have none; it is read as soon as it exists.
            scan.problems.clear();
            scan.unreadable.clear();
        }
        let before = std::mem::take(&mut self.declared);
        let mut faulty: Vec<PathBuf> = scan.unreadable.into_iter().collect();
        let mut problems = scan.problems;
        let mut page_read = false;
        let files = scan.files.iter().map(|(file, text)| (file.clone(), Origin::File, text.to_string()));
        let page = self.page.as_mut().and_then(|(url, text)| {
            let text = text.borrow_and_update().clone()?;
            Some((PathBuf::from(&*url), Origin::Url, text))
        });
        for (file, origin, text) in files.chain(page) {
            let file = &file;
            let (pods, faults) = read_file(file, origin, &text, &self.node);
            let is_faulty = faults.iter().any(|fault| fault.severity == Severity::Error);
            if is_faulty {
                faulty.push(file.clone());
            }
            page_read |= origin == Origin::Url && !is_faulty;
            problems.extend(faults);
            pods.into_iter().for_each(|pod| problems.extend(self.declare(pod, file, &before)));
        }
        for (key, old) in before {
            if faulty.iter().any(|faulty| old.file.starts_with(faulty)) {
                self.declared.entry(key).or_insert(old);
            }
        }
        self.is_page_read |= page_read;
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

/// What kind of place a manifest comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    File,
    Url,
}

/// The pods of one file, and what is wrong with it.
fn read_file(file: &Path, origin: Origin, text: &str, node: &str) -> (Vec<Pod>, Vec<Problem>) {
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
                Ok(Read { pod, unknown, printed }) => {
                    let warning = |error| Problem { severity: Severity::Warning, ..to_problem(file, &document, error) };
                    problems.extend(unknown.into_iter().map(warning));
                    pods.push(of_node(pod, &document, &uid_of(&printed, origin, file, node), origin, node));
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

/// A pod as a file has it.
struct Read {
    pod: Pod,
    /// What nobody here knows.
    unknown: Vec<FieldError>,
    /// What its uid is made from.
    printed: String,
}

/// Decodes, defaults and validates.
fn read_pod(document: &Node) -> Result<Read, Vec<FieldError>> {
    let kind = document.get("kind").and_then(Node::as_str).unwrap_or_default();
    if kind != "Pod" {
        let message = format!("kind {kind:?} is no static pod");
        return Err(vec![fault("kind", message, Some("files here declare Pods; anything else needs a cluster"))]);
    }
    let (mut pod, unknown) = decode_known::<Pod>(document)?;
    let referring = references(&pod);
    let whole = pod.spec.as_ref().and_then(|spec| spec.resources.clone());
    pod.set_defaults();
    let spec = pod.spec.get_or_insert_default();
    (spec.service_account_name, spec.service_account) = (None, None);
    // Upstream's kubelet knows no defaults for a pod as a whole (`PodLevelResourcesFixDefaulting`).
    let defaulted = std::mem::replace(&mut spec.resources, whole);
    let printed = go_print::print(&pod);
    pod.spec.get_or_insert_default().resources = defaulted;
    pod.metadata.namespace.get_or_insert_with(|| "default".to_owned());
    let mut errors = Errors::default();
    pod.validate(&mut errors);
    let mut errors = errors.into_vec();
    errors.extend(referring);
    if errors.is_empty() { Ok(Read { pod, unknown, printed }) } else { Err(errors) }
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
fn of_node(mut pod: Pod, document: &Node, uid: &str, origin: Origin, node: &str) -> Pod {
    let written = document.get("metadata").and_then(|metadata| metadata.get("uid")).and_then(Node::as_str);
    pod.status = None;
    let metadata = &mut pod.metadata;
    (metadata.uid, metadata.resource_version, metadata.generation) = (None, None, None);
    (metadata.creation_timestamp, metadata.deletion_timestamp) = (None, None);
    (metadata.deletion_grace_period_seconds, metadata.managed_fields) = (None, None);
    (metadata.owner_references, metadata.self_link) = (None, None);
    let uid = written.filter(|uid| !uid.is_empty()).unwrap_or(uid).to_owned();
    let metadata = &mut pod.metadata;
    metadata.name = Some(format!("{}-{}", metadata.name.as_deref().unwrap_or_default(), node.to_lowercase()));
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(SOURCE.to_owned(), if origin == Origin::File { "file" } else { "http" }.to_owned());
    annotations.insert(HASH.to_owned(), uid.clone());
    annotations.insert(SEEN.to_owned(), Timestamp::now().to_string());
    metadata.uid = Some(uid);
    let spec = pod.spec.get_or_insert_default();
    spec.node_name = Some(node.to_owned());
    let toleration =
        Toleration { operator: Some("Exists".into()), effect: Some("NoExecute".into()), ..Toleration::default() };
    // As upstream: those of a server are not kept from being evicted.
    if origin == Origin::File {
        let tolerations = spec.tolerations.get_or_insert_default();
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
    pod
}

/// A uid that is another as soon as the pod, its file or its node is: 32 hexadecimal digits of FNV-1a.
fn uid_of(printed: &str, origin: Origin, file: &Path, node: &str) -> String {
    let file = file.display();
    let place = match origin {
        Origin::File => format!("host:{node}file:{file}"),
        Origin::Url => format!("url:{file}"),
    };
    format!("{:032x}", fnv1a(format!("{printed}{place}").as_bytes()))
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
        let (pods, problems) = read_file(Path::new("/m/etcd.yaml"), Origin::File, text, "Node1");
        (pods, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn hashes_are_fnv() {
        assert_eq!(fnv1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    /// The numbers are those of upstream's kubelet of 1.37.2 for these files.
    #[test]
    fn uids_are_upstreams() {
        for (text, expect) in [
            (POD, "d3c699677224d73e8767f7aeac8cde20"),
            (include_str!("samples/apiserver.yaml"), "b58fcc6be5a0da2045a8e474daab8b19"),
            (include_str!("samples/rich.yaml"), "9eb3ac34fb2749a49ae56a03b2978984"),
        ] {
            let (pods, problems) = read_file(Path::new("/m/pod.yaml"), Origin::File, text, "node1");
            assert_eq!(pods.len(), 1, "{problems:?}");
            let printed = read_pod(&yaml::parse(text).remove(0).unwrap()).unwrap().printed;
            assert_eq!(pods[0].metadata.uid.as_deref(), Some(expect), "{printed}");
        }
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

    #[tokio::test]
    async fn a_server_has_pods_too() {
        let (tell, told) = watch::channel(None);
        let mut pods = StaticPods::open(None, Some(("http://s/p".to_owned(), told)), "node1").unwrap();
        assert!(pods.declared().is_empty() && !pods.is_complete());
        tell.send_replace(Some("kind: [".to_owned()));
        pods.changed().await;
        assert!(!pods.is_complete(), "nobody can tell what is in it");
        let list =
            |items: &str| Some(format!("{{\"kind\": \"PodList\", \"apiVersion\": \"v1\", \"items\": [{items}]}}"));
        let pod = r#"{"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}}"#;
        tell.send_replace(list(pod));
        pods.changed().await;
        let found = &pods.declared()[&Key::new("default", "a-node1")].pod;
        assert_eq!(found.metadata.annotations.as_ref().unwrap()[SOURCE], "http");
        assert_eq!((is_static(found), found.spec.as_ref().unwrap().tolerations.clone()), (true, None));
        assert!(pods.is_complete());
        tell.send_replace(Some("kind: [".to_owned()));
        pods.changed().await;
        assert!(pods.declared().len() == 1 && pods.is_complete(), "what is wrong changes nothing");
        tell.send_replace(list(""));
        pods.changed().await;
        assert!(pods.declared().is_empty());
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
        let mut pods = StaticPods::open(Some(&path), None, "n").unwrap();
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
