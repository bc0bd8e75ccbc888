//! Certificates that pods trust, from ClusterTrustBundles. Pure.

use std::collections::BTreeSet;

use cluster::{Key, Store, labels_match};
use k8s_openapi::api::core::v1::{ClusterTrustBundleProjection, Pod};

use super::Cause;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
/// RFC 7468.
const LINE: usize = 64;

/// Whether a pod's volumes show trust bundles.
pub(super) fn shows(pod: &Pod) -> bool {
    let volumes = pod::spec::of(pod).volumes.iter().flatten();
    let mut sources = volumes.flat_map(|volume| &volume.projected).flat_map(|source| source.sources.iter().flatten());
    sources.any(|source| source.cluster_trust_bundle.is_some())
}

/// The certificates that a projection selects, each once.
pub(super) fn bundle(source: &ClusterTrustBundleProjection, store: &Store) -> Result<Vec<u8>, Cause> {
    let is_optional = source.optional == Some(true);
    let missing = |name: &str| Cause::NotFound { kind: "clustertrustbundle", name: name.to_owned() };
    let texts: Vec<String> = match (&source.name, &source.signer_name) {
        (Some(name), _) => {
            let found = store.cluster_trust_bundles().get(&Key::cluster(name));
            if found.is_none() && !is_optional {
                return Err(missing(name));
            }
            found.into_iter().map(|found| found.spec.trust_bundle.clone()).collect()
        }
        (None, Some(signer)) => {
            // No selector selects nothing, an empty one everything.
            let selected = source.label_selector.as_ref().map(|selector| {
                let all = store.cluster_trust_bundles().list().into_iter();
                let all = all.filter(|one| one.spec.signer_name.as_ref() == Some(signer));
                all.filter(|one| labels_match(selector, one.metadata.labels.as_ref()))
                    .map(|one| one.spec.trust_bundle.clone())
                    .collect()
            });
            let selected: Vec<String> = selected.unwrap_or_default();
            if selected.is_empty() && !is_optional {
                return Err(missing(&format!("of signer {signer}")));
            }
            selected
        }
        (None, None) => return Err(Cause::Invalid("clusterTrustBundle needs a name or a signerName".to_owned())),
    };
    Ok(certificates(texts.iter().map(String::as_str)).into_bytes())
}

/// The certificates in PEM texts, each once, and nothing that stands around them.
pub(super) fn certificates<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut seen = BTreeSet::new();
    let mut out = String::new();
    for block in texts.into_iter().flat_map(blocks) {
        if !seen.insert(block.clone()) {
            continue;
        }
        out += BEGIN;
        for line in block.as_bytes().chunks(LINE) {
            out.push('\n');
            out += std::str::from_utf8(line).expect("base64 is ASCII");
        }
        out += "\n";
        out += END;
        out.push('\n');
    }
    out
}

/// The base64 of each certificate in a text.
fn blocks(text: &str) -> Vec<String> {
    let parts = text.split(BEGIN).skip(1).filter_map(|part| part.split(END).next());
    let parts = parts.map(|part| part.chars().filter(char::is_ascii).filter(|c| !c.is_whitespace()).collect());
    parts.filter(|block: &String| !block.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pem(body: &str) -> String {
        format!("{BEGIN}\n{body}\n{END}\n")
    }

    fn store() -> Store {
        let store = Store::new();
        let put = |name: &str, labels: Value, signer: Option<&str>, text: &str| {
            let spec = json!({"signerName": signer, "trustBundle": text});
            let object = json!({"metadata": {"name": name, "labels": labels}, "spec": spec});
            store.cluster_trust_bundles().put(serde_json::from_value(object).unwrap());
        };
        put("own", json!({}), None, &format!("subject: x\n{}{}", pem("QUJD"), pem("QUJD")));
        put("s:live", json!({"live": "yes"}), Some("s"), &format!("{}{}", pem("QUJD"), pem("REVG")));
        put("s:dead", json!({"live": "no"}), Some("s"), &pem("R0hJ"));
        put("t:live", json!({"live": "yes"}), Some("t"), &pem("SktM"));
        store
    }

    fn check(source: Value, expect: Result<&[&str], &str>) {
        let mut source = source;
        source["path"] = json!("p");
        let got = bundle(&serde_json::from_value(source).unwrap(), &store());
        let got = got.map(|bytes| String::from_utf8(bytes).unwrap()).map_err(|cause| cause.to_string());
        let expect = expect.map(|blocks| blocks.iter().map(|block| pem(block)).collect::<String>());
        assert_eq!(got, expect.map_err(str::to_owned));
    }

    #[test]
    fn what_a_projection_selects() {
        check(json!({"name": "own"}), Ok(&["QUJD"]));
        check(json!({"name": "none"}), Err("clustertrustbundle \"none\" not found"));
        check(json!({"name": "none", "optional": true}), Ok(&[]));
        check(json!({"signerName": "s", "labelSelector": {}}), Ok(&["R0hJ", "QUJD", "REVG"]));
        check(json!({"signerName": "s", "labelSelector": {"matchLabels": {"live": "yes"}}}), Ok(&["QUJD", "REVG"]));
        check(json!({"signerName": "s"}), Err("clustertrustbundle \"of signer s\" not found"));
        check(json!({"signerName": "u", "labelSelector": {}, "optional": true}), Ok(&[]));
        check(json!({}), Err("clusterTrustBundle needs a name or a signerName"));
    }

    #[test]
    fn long_lines_are_folded() {
        let body = "A".repeat(100);
        let folded = format!("{BEGIN}\n{}\n{}\n{END}\n", "A".repeat(64), "A".repeat(36));
        assert_eq!(certificates([pem(&body).as_str()]), folded);
    }
}
