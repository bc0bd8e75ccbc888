//! `dra_manager_state`, upstream's file of the claims that drivers have made ready.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::table::{Claim, Claims, Device, Part};
use crate::resources::checkpoint::Corrupt;

/// Its name, in the kubelet's root.
pub(super) const NAME: &str = "dra_manager_state";
const KIND: &str = "DRACheckpoint";
const VERSION: &str = "checkpoint.dra.kubelet.k8s.io/v1";

/// The data are a text of their own, so that its sum does not depend on who writes it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: String,
    checksum: u32,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Data {
    kind: String,
    #[serde(rename = "apiVersion")]
    version: String,
    #[serde(rename = "ClaimInfoStateList")]
    claims: Option<Vec<Info>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Info {
    #[serde(rename = "ClaimUID")]
    uid: String,
    #[serde(rename = "ClaimName")]
    name: String,
    #[serde(rename = "Namespace")]
    namespace: String,
    #[serde(rename = "PodUIDs")]
    pods: Option<BTreeMap<String, Empty>>,
    #[serde(rename = "DriverState")]
    drivers: Option<BTreeMap<String, State>>,
}

/// What Go's sets have as values.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Empty {}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    #[serde(rename = "Devices")]
    devices: Option<Vec<SavedDevice>>,
    #[serde(rename = "skipNodeOperations", default, skip_serializing_if = "Vec::is_empty")]
    skips: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedDevice {
    #[serde(rename = "PoolName")]
    pool: String,
    #[serde(rename = "DeviceName")]
    name: String,
    #[serde(rename = "ShareID")]
    share: Option<String>,
    #[serde(rename = "RequestNames")]
    requests: Option<Vec<String>>,
    #[serde(rename = "CDIDeviceIDs")]
    cdi: Option<Vec<String>>,
}

pub(super) fn write(claims: &Claims) -> Vec<u8> {
    let claims = claims.values().map(Info::of).collect();
    let data = Data { kind: KIND.to_owned(), version: VERSION.to_owned(), claims: Some(claims) };
    let data = serde_json::to_string(&data).expect("all keys are strings");
    let checksum = sum(&data);
    serde_json::to_vec(&File { data, checksum }).expect("all keys are strings")
}

pub(super) fn read(bytes: &[u8]) -> Result<Claims, Corrupt> {
    let File { data, checksum } = serde_json::from_slice(bytes)?;
    let expected = sum(&data);
    if checksum != expected {
        return Err(Corrupt::Checksum { found: checksum.into(), expected: expected.into() });
    }
    let data: Data = serde_json::from_str(&data)?;
    if data.version != VERSION {
        return Err(Corrupt::Content(format!("its version is {:?}, and should be {VERSION:?}", data.version)));
    }
    let claims = data.claims.unwrap_or_default().into_iter().map(Claim::from);
    Ok(claims.map(|claim| ((claim.namespace.clone(), claim.name.clone()), claim)).collect())
}

/// Go's `crc32.ChecksumIEEE`.
fn sum(text: &str) -> u32 {
    let mut sum = flate2::Crc::new();
    sum.update(text.as_bytes());
    sum.sum()
}

impl Info {
    fn of(claim: &Claim) -> Self {
        let drivers = claim.parts.iter().map(|(name, part)| (name.clone(), State::of(part)));
        Self {
            uid: claim.uid.clone(),
            name: claim.name.clone(),
            namespace: claim.namespace.clone(),
            pods: Some(claim.pods.iter().map(|uid| (uid.clone(), Empty {})).collect()),
            drivers: Some(drivers.collect()),
        }
    }
}

impl From<Info> for Claim {
    fn from(info: Info) -> Self {
        let parts = info.drivers.unwrap_or_default().into_iter();
        let pods: BTreeSet<String> = info.pods.unwrap_or_default().into_keys().collect();
        Self {
            uid: info.uid,
            name: info.name,
            namespace: info.namespace,
            pods,
            parts: parts.map(|(name, state)| (name, state.into())).collect(),
            is_prepared: false,
            is_released: false,
        }
    }
}

impl State {
    fn of(part: &Part) -> Self {
        let device = |device: &Device| SavedDevice {
            pool: device.pool.clone(),
            name: device.name.clone(),
            share: device.share.clone(),
            requests: list(&device.requests),
            cdi: list(&device.cdi),
        };
        let devices: Vec<_> = part.devices.iter().map(device).collect();
        Self { devices: (!devices.is_empty()).then_some(devices), skips: part.skips.iter().cloned().collect() }
    }
}

/// Go has no value for an empty list that came over gRPC.
fn list(all: &[String]) -> Option<Vec<String>> {
    (!all.is_empty()).then(|| all.to_vec())
}

impl From<State> for Part {
    fn from(state: State) -> Self {
        let device = |saved: SavedDevice| Device {
            pool: saved.pool,
            name: saved.name,
            share: saved.share,
            requests: saved.requests.unwrap_or_default(),
            cdi: saved.cdi.unwrap_or_default(),
        };
        let devices = state.devices.unwrap_or_default().into_iter().map(device).collect();
        Self { devices, skips: state.skips.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As upstream's kubelet writes it, with its sums (upstream's own test of the file has the same).
    const UPSTREAM: &str = r#"{"Data":"{\"kind\":\"DRACheckpoint\",\"apiVersion\":\"checkpoint.dra.kubelet.k8s.io/v1\",\"ClaimInfoStateList\":[{\"ClaimUID\":\"067798be-454e-4be4-9047-1aa06aea63f7\",\"ClaimName\":\"example\",\"Namespace\":\"default\",\"PodUIDs\":{\"139cdb46-f989-4f17-9561-ca10cfb509a6\":{}},\"DriverState\":{\"test-driver.cdi.k8s.io\":{\"Devices\":[{\"PoolName\":\"worker-1\",\"DeviceName\":\"dev-1\",\"ShareID\":null,\"RequestNames\":[\"test request\"],\"CDIDeviceIDs\":[\"example.com/example=cdi-example\"]}]}}}]}","Checksum":2570581864}"#;

    #[test]
    fn upstreams_file_is_read_and_written_alike() {
        let claims = read(UPSTREAM.as_bytes()).unwrap();
        let claim = &claims[&("default".to_owned(), "example".to_owned())];
        assert_eq!(claim.parts["test-driver.cdi.k8s.io"].devices[0].cdi, ["example.com/example=cdi-example"]);
        assert_eq!(String::from_utf8(write(&claims)).unwrap(), UPSTREAM);
        assert!(matches!(read(UPSTREAM.replace("dev-1", "dev-2").as_bytes()), Err(Corrupt::Checksum { .. })));
        let data =
            r#"{"kind":"DRACheckpoint","apiVersion":"checkpoint.dra.kubelet.k8s.io/v1","ClaimInfoStateList":null}"#;
        let file = |data: &str| serde_json::to_vec(&File { data: data.to_owned(), checksum: sum(data) }).unwrap();
        assert_eq!(read(&file(data)).unwrap(), Claims::new());
        assert!(matches!(read(&file(&data.replace("/v1", "/v2"))), Err(Corrupt::Content(_))));
    }
}
