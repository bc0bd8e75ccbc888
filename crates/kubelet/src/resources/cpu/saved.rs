//! `cpu_manager_state`, upstream's file of who has which CPUs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{CpuSet, Given};
use crate::resources::checkpoint::{self, Corrupt};

/// Its name, in the kubelet's root.
pub(in crate::resources) const NAME: &str = "cpu_manager_state";
const POLICY: &str = "static";

/// The fields that all versions have, and a text of them which newer ones read instead.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(flatten)]
    fields: Fields,
    #[serde(default)]
    checksum: u64,
    #[serde(default)]
    data: String,
    #[serde(default)]
    data_checksum: u64,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Fields {
    policy_name: String,
    default_cpu_set: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    entries: BTreeMap<String, BTreeMap<String, String>>,
}

impl Fields {
    /// The text whose sum older versions take.
    fn spew(&self) -> String {
        let entries = self.entries.iter().map(|(uid, pod)| (uid, checkpoint::map(pod)));
        format!(
            "(*state.CPUManagerCheckpoint){{PolicyName:(string){} DefaultCPUSet:(string){} \
             Entries:(map[string]map[string]string){} Checksum:(checksum.Checksum)0}}",
            self.policy_name,
            self.default_cpu_set,
            checkpoint::map(entries),
        )
    }
}

pub(super) fn write(shared: &CpuSet, given: &Given) -> Vec<u8> {
    let texts =
        |pod: &BTreeMap<String, CpuSet>| pod.iter().map(|(name, cpus)| (name.clone(), cpus.to_string())).collect();
    let entries = given.iter().map(|(uid, pod)| (uid.clone(), texts(pod))).collect();
    let fields = Fields { policy_name: POLICY.to_owned(), default_cpu_set: shared.to_string(), entries };
    let data = serde_json::to_string(&fields).expect("all keys are strings");
    let (checksum, data_checksum) = (checkpoint::sum(&fields.spew()), sum_of_text(&data));
    serde_json::to_vec(&File { fields, checksum, data, data_checksum }).expect("all keys are strings")
}

fn sum_of_text(text: &str) -> u64 {
    checkpoint::sum(&format!("(string){text}"))
}

/// What is given, as such a file says. One of another policy says nothing.
pub(super) fn read(bytes: &[u8]) -> Result<Given, Corrupt> {
    let file: File = serde_json::from_slice(bytes)?;
    let fields = if file.data.is_empty() {
        // Very old files have no sum.
        if file.checksum != 0 {
            checkpoint::verify(file.checksum, &file.fields.spew())?;
        }
        file.fields
    } else {
        checkpoint::verify(file.data_checksum, &format!("(string){}", file.data))?;
        serde_json::from_str(&file.data)?
    };
    if fields.policy_name != POLICY {
        return Ok(Given::new());
    }
    let set = |(name, text): (String, String)| {
        text.parse().map(|cpus| (name, cpus)).map_err(|error: super::ParseError| Corrupt::Content(error.to_string()))
    };
    let pod = |(uid, pod): (String, BTreeMap<String, String>)| {
        pod.into_iter().map(set).collect::<Result<_, _>>().map(|containers| (uid, containers))
    };
    fields.entries.into_iter().map(pod).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Given {
        let pod = |pairs: &[(&str, &str)]| -> BTreeMap<String, CpuSet> {
            pairs.iter().map(|(name, cpus)| ((*name).to_owned(), cpus.parse().unwrap())).collect()
        };
        [("u1".to_owned(), pod(&[("c", "5")])), ("u2".to_owned(), pod(&[("a", "4"), ("c", "1")]))].into()
    }

    #[test]
    fn the_text_is_gos() {
        let fields: Fields = serde_json::from_str(
            r#"{"policyName":"static","defaultCpuSet":"0,2-3","entries":{"u2":{"c":"1","a":"4"},"u1":{"c":"5"}}}"#,
        )
        .unwrap();
        // What `k8s.io/utils/dump.ForHash` says, with upstream's names of the types.
        let expected = "(*state.CPUManagerCheckpoint){PolicyName:(string)static DefaultCPUSet:(string)0,2-3 \
            Entries:(map[string]map[string]string)map[u1:map[c:5] u2:map[a:4 c:1]] Checksum:(checksum.Checksum)0}";
        assert_eq!(fields.spew(), expected);
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = write(&"0,2-3".parse().unwrap(), &given());
        assert_eq!(read(&bytes).unwrap(), given());
        let text = String::from_utf8(bytes).unwrap();
        let changed = text.replace("\\\"c\\\":\\\"5\\\"", "\\\"c\\\":\\\"6\\\"");
        assert_ne!(changed, text);
        assert!(matches!(read(changed.as_bytes()), Err(Corrupt::Checksum { .. })));
        // An older kubelet's file has the fields alone.
        let mut old: serde_json::Value = serde_json::from_str(&text).unwrap();
        old.as_object_mut().unwrap().retain(|name, _| !name.starts_with("data"));
        assert_eq!(read(old.to_string().as_bytes()).unwrap(), given());
        old["defaultCpuSet"] = "0".into();
        assert!(read(old.to_string().as_bytes()).is_err());
        let none = r#"{"policyName":"none","defaultCpuSet":"","checksum":0}"#;
        assert_eq!(read(none.as_bytes()).unwrap(), Given::new());
    }
}
