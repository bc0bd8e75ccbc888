//! What 0.1.0 has kept for a boot without API server, as `cargo xtask past` has written it down: it is read by all that come
//! after it.

use serde_json::json;

use super::*;

const UID: &str = "7f1d1b1c-0000-4000-8000-000000000000";
const NAME: &str = "web";

fn vault(dir: &Path) -> Vault {
    let config = SealConfig { dir: dir.join("sealed"), key: dir.join("sealed.key"), patience: Duration::ZERO };
    Vault::open(&config).unwrap()
}

fn object<T: DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).unwrap()
}

/// Of each kind one.
fn write(vault: &Vault) {
    let named = |name: &str| json!({"name": name, "namespace": "shop", "resourceVersion": "7"});
    let bundle = Bundle {
        pod: object(json!({
            "metadata": {"name": NAME, "namespace": "shop", "uid": UID},
            "spec": {"nodeName": "node-1", "containers": [{"name": "main", "image": "busybox:1"}]},
        })),
        config_maps: vec![object(json!({"metadata": named("settings"), "data": {"key": "value"}}))],
        secrets: vec![object(json!({"metadata": named("password"), "data": {"key": "dmFsdWU="}}))],
        claims: vec![object(json!({"metadata": named("claim"), "spec": {"volumeName": "volume"}}))],
        volumes: vec![object(json!({"metadata": {"name": "volume"}, "spec": {"hostPath": {"path": "/data"}}}))],
    };
    let ends = "2026-11-26T12:00:00Z".parse().unwrap();
    let tokens = BTreeMap::from([("asked".to_owned(), SealedToken { text: "token".to_owned(), ends })]);
    let services: Vec<Service> = vec![object(json!({"metadata": named("web"), "spec": {"clusterIP": "10.96.0.7"}}))];
    vault.write(POD, UID, &bundle).unwrap();
    vault.write(TOKEN, UID, &tokens).unwrap();
    vault.write(SERVICE, "shop", &services).unwrap();
    vault.write(NODE, "node-1", &object::<Node>(json!({"metadata": {"name": "node-1"}}))).unwrap();
    let driver = json!({"metadata": {"name": "csi.example.org"}, "spec": {"attachRequired": false}});
    vault.write(DRIVER, "csi.example.org", &object::<CSIDriver>(driver)).unwrap();
}

/// A copy: what cannot be read is removed.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() { copy(&from, &to) } else { std::fs::copy(&from, &to).map(drop).unwrap() }
    }
}

#[test]
fn what_0_1_0_has_kept_is_read() {
    if let Some(dir) = testkit::past::wanted() {
        write(&vault(&dir.join("state")));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    copy(&testkit::past::dir("0.1.0").join("state"), dir.path());
    let vault = vault(dir.path());
    let Kept { bundles, services, nodes, drivers } = vault.load();
    let [bundle] = &bundles[..] else { panic!("{} pods", bundles.len()) };
    assert_eq!((Key::of(&bundle.pod.metadata).name(), bundle.pod.metadata.uid.as_deref()), (NAME, Some(UID)));
    assert_eq!(bundle.config_maps[0].data.as_ref().unwrap()["key"], "value");
    assert_eq!(bundle.secrets[0].data.as_ref().unwrap()["key"].0, b"value");
    assert_eq!(bundle.claims[0].spec.as_ref().unwrap().volume_name.as_deref(), Some("volume"));
    assert_eq!(bundle.volumes[0].metadata.name.as_deref(), Some("volume"));
    assert_eq!(services[0].spec.as_ref().unwrap().cluster_ip.as_deref(), Some("10.96.0.7"));
    assert_eq!(nodes[0].metadata.name.as_deref(), Some("node-1"));
    assert_eq!(drivers[0].spec.attach_required, Some(false));
    let token = Tokens::load(&vault).get(UID, "asked").unwrap();
    assert_eq!((token.text.as_str(), token.ends.to_string().as_str()), ("token", "2026-11-26T12:00:00Z"));
}
