//! `kubelet_internal_checkpoint`, upstream's file of what devices were given out.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use plugin::device::ContainerAllocateResponse;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::table::{Allocation, Given};
use crate::resources::checkpoint::{self, Corrupt};

/// Its name, in the directory of device plugins.
pub(super) const NAME: &str = "kubelet_internal_checkpoint";

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: Data,
    checksum: u64,
}

/// Go knows lists and maps that are not there; its sum tells them from empty ones.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    pod_device_entries: Option<Vec<Entry>>,
    registered_devices: Option<BTreeMap<String, Option<Vec<String>>>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    #[serde(rename = "PodUID")]
    pod_uid: String,
    container_name: String,
    resource_name: String,
    #[serde(rename = "DeviceIDs")]
    device_ids: Option<BTreeMap<i64, Option<Vec<String>>>>,
    alloc_resp: Option<ByteString>,
}

/// The file for what is given out, and the devices of each resource that can be.
pub(super) fn write(given: &Given, registered: BTreeMap<String, Vec<String>>) -> Vec<u8> {
    let entries: Vec<Entry> = given.iter().flat_map(|(uid, pod)| entries_of(uid, pod)).collect();
    let data = Data {
        pod_device_entries: (!entries.is_empty()).then_some(entries),
        registered_devices: Some(registered.into_iter().map(|(name, ids)| (name, Some(ids))).collect()),
    };
    let checksum = checkpoint::sum(&spew(&data));
    serde_json::to_vec(&File { data, checksum }).expect("all keys are strings or numbers")
}

fn entries_of(uid: &str, pod: &BTreeMap<String, BTreeMap<String, Allocation>>) -> Vec<Entry> {
    let all = pod.iter().flat_map(|(container, resources)| resources.iter().map(move |one| (container, one)));
    let entry = |(container, (resource, allocation)): (&String, (&String, &Allocation))| {
        Some(Entry {
            pod_uid: uid.to_owned(),
            container_name: container.clone(),
            resource_name: resource.clone(),
            device_ids: Some(allocation.devices.iter().map(|(node, ids)| (*node, Some(ids.clone()))).collect()),
            // Without an answer it is not given out yet.
            alloc_resp: Some(ByteString(allocation.answer.as_ref()?.encode_to_vec())),
        })
    };
    all.filter_map(entry).collect()
}

/// What such a file says: what is given out, and the resources that plugins had registered.
pub(super) fn read(bytes: &[u8]) -> Result<(Given, Vec<String>), Corrupt> {
    let File { data, checksum } = serde_json::from_slice(bytes)?;
    checkpoint::verify(checksum, &spew(&data))?;
    let mut given = Given::new();
    for entry in data.pod_device_entries.into_iter().flatten() {
        let answer = entry.alloc_resp.map(|bytes| bytes.0).unwrap_or_default();
        let answer =
            ContainerAllocateResponse::decode(&*answer).map_err(|error| Corrupt::Content(error.to_string()))?;
        let devices = entry.device_ids.into_iter().flatten();
        let devices = devices.map(|(node, ids)| (node, ids.unwrap_or_default())).collect();
        let allocation = Allocation { devices, answer: Some(answer), is_confirmed: false };
        let resources = given.entry(entry.pod_uid).or_default().entry(entry.container_name).or_default();
        resources.insert(entry.resource_name, allocation);
    }
    Ok((given, data.registered_devices.into_iter().flatten().map(|(name, _)| name).collect()))
}

/// The text whose sum upstream takes.
fn spew(data: &Data) -> String {
    const NIL: &str = "<nil>";
    let ids = |ids: &Option<Vec<String>>| ids.as_ref().map_or_else(|| NIL.to_owned(), checkpoint::list);
    let entry = |entry: &Entry| {
        let devices = entry.device_ids.as_ref();
        let devices = devices.map(|devices| checkpoint::map(devices.iter().map(|(node, list)| (node, ids(list)))));
        let answer = entry.alloc_resp.as_ref().map(|bytes| checkpoint::list(&bytes.0));
        format!(
            "{{PodUID:(string){} ContainerName:(string){} ResourceName:(string){} \
             DeviceIDs:(checkpoint.DevicesPerNUMA){} AllocResp:([]uint8){}}}",
            entry.pod_uid,
            entry.container_name,
            entry.resource_name,
            devices.as_deref().unwrap_or(NIL),
            answer.as_deref().unwrap_or(NIL),
        )
    };
    let entries = data.pod_device_entries.as_ref().map(|entries| checkpoint::list(entries.iter().map(entry)));
    let registered = data.registered_devices.as_ref();
    let registered = registered.map(|all| checkpoint::map(all.iter().map(|(name, list)| (name, ids(list)))));
    format!(
        "(checkpoint.checkpointData){{PodDeviceEntries:([]checkpoint.PodDevicesEntry){} \
         RegisteredDevices:(map[string][]string){}}}",
        entries.as_deref().unwrap_or(NIL),
        registered.as_deref().unwrap_or(NIL),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_gos() {
        // What `k8s.io/utils/dump.ForHash` says of the same values, but for the name of the type.
        let data: Data = serde_json::from_str(
            r#"{"PodDeviceEntries":[{"PodUID":"u","ContainerName":"c","ResourceName":"r",
                "DeviceIDs":{"-1":["d1","d2"],"0":["x"]},"AllocResp":"CgNh/w=="}],
               "RegisteredDevices":{"r":["d1"],"q":[],"n":null}}"#,
        )
        .unwrap();
        let expected = "(checkpoint.checkpointData){PodDeviceEntries:([]checkpoint.PodDevicesEntry)[{PodUID:(string)u \
            ContainerName:(string)c ResourceName:(string)r DeviceIDs:(checkpoint.DevicesPerNUMA)map[-1:[d1 d2] 0:[x]] \
            AllocResp:([]uint8)[10 3 97 255]}] RegisteredDevices:(map[string][]string)map[n:<nil> q:[] r:[d1]]}";
        assert_eq!(spew(&data), expected);
    }

    #[test]
    fn what_is_written_is_read() {
        let answer = ContainerAllocateResponse { envs: [("A".into(), "b".into())].into(), ..Default::default() };
        let devices: BTreeMap<i64, Vec<String>> = [(-1, vec!["d".to_owned()])].into();
        let allocation = Allocation { devices, answer: Some(answer), is_confirmed: false };
        let mut given = Given::from([("u".into(), [("c".into(), [("r".into(), allocation.clone())].into())].into())]);
        let bytes = write(&given, [("r".to_owned(), vec!["d".to_owned()])].into());
        assert_eq!(read(&bytes).unwrap(), (given.clone(), vec!["r".to_owned()]));
        // What is being asked about is not given out yet.
        let asked = Allocation { answer: None, ..allocation };
        given.get_mut("u").unwrap().get_mut("c").unwrap().insert("other".into(), asked);
        assert_eq!(write(&given, [("r".to_owned(), vec!["d".to_owned()])].into()), bytes);
        assert!(matches!(read(&bytes.replace(b"\"d\"", b"\"e\"")), Err(Corrupt::Checksum { .. })));
        assert!(matches!(read(b"{}"), Err(Corrupt::Json(_))));
        let empty = write(&Given::new(), BTreeMap::new());
        assert_eq!(read(&empty).unwrap(), (Given::new(), vec![]));
    }

    trait Replace {
        fn replace(&self, from: &[u8], to: &[u8]) -> Vec<u8>;
    }

    impl Replace for Vec<u8> {
        fn replace(&self, from: &[u8], to: &[u8]) -> Vec<u8> {
            let text = String::from_utf8(self.clone()).unwrap();
            text.replace(std::str::from_utf8(from).unwrap(), std::str::from_utf8(to).unwrap()).into_bytes()
        }
    }
}
