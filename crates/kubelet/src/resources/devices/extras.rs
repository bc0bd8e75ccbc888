//! What a container gets with its devices.

use std::collections::BTreeMap;

use cri::v1;
use plugin::device::ContainerAllocateResponse;

use crate::resources::cpu::CpuSet;

/// Parts of a container's configuration that plugins ask for.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Extras {
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) devices: Vec<v1::Device>,
    pub(crate) mounts: Vec<v1::Mount>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) cdi: Vec<String>,
    /// The CPUs that it may use, unless that is all of them.
    pub(crate) cpus: Option<String>,
    /// They are its own: nothing else limits what it does with them.
    pub(crate) has_own_cpus: bool,
    /// The NUMA nodes that it takes its memory from, unless it does not matter.
    pub(crate) memory_nodes: Option<CpuSet>,
}

impl Extras {
    /// All that the plugins of one container answered. Where two of them want the same thing, the first one's stays.
    pub(super) fn of<'a>(answers: impl Iterator<Item = &'a ContainerAllocateResponse>) -> Self {
        let mut extras = Self::default();
        for answer in answers {
            extras.add(answer);
        }
        extras
    }

    fn add(&mut self, answer: &ContainerAllocateResponse) {
        for (key, value) in &answer.envs {
            self.envs.entry(key.clone()).or_insert_with(|| value.clone());
        }
        for (key, value) in &answer.annotations {
            self.annotations.entry(key.clone()).or_insert_with(|| value.clone());
        }
        for device in &answer.devices {
            if self.devices.iter().all(|known| known.container_path != device.container_path) {
                self.devices.push(v1::Device {
                    container_path: device.container_path.clone(),
                    host_path: device.host_path.clone(),
                    permissions: device.permissions.clone(),
                });
            }
        }
        for mount in &answer.mounts {
            if self.mounts.iter().all(|known| known.container_path != mount.container_path) {
                self.mounts.push(v1::Mount {
                    container_path: mount.container_path.clone(),
                    host_path: mount.host_path.clone(),
                    readonly: mount.read_only,
                    ..v1::Mount::default()
                });
            }
        }
        for device in &answer.cdi_devices {
            if !self.cdi.contains(&device.name) {
                self.cdi.push(device.name.clone());
            }
        }
    }

    /// Puts all but the mounts into the configuration of a container. What its pod says itself wins.
    pub(crate) fn apply(self, config: &mut v1::ContainerConfig) {
        let mut envs: Vec<v1::KeyValue> =
            self.envs.into_iter().map(|(key, value)| v1::KeyValue { key, value: value.into() }).collect();
        envs.retain(|own| config.envs.iter().all(|other| other.key != own.key));
        envs.append(&mut config.envs);
        config.envs = envs;
        config.devices.extend(self.devices);
        for (key, value) in self.annotations {
            config.annotations.entry(key).or_insert(value);
        }
        config.cdi_devices.extend(self.cdi.into_iter().map(|name| v1::CdiDevice { name }));
        let resources = config.linux.as_mut().and_then(|linux| linux.resources.as_mut());
        let Some(resources) = resources else { return };
        if let Some(nodes) = self.memory_nodes {
            resources.cpuset_mems = nodes.to_string();
        }
        if let Some(cpus) = self.cpus {
            resources.cpuset_cpus = cpus;
        }
        if self.has_own_cpus {
            resources.cpu_quota = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use plugin::device::{CdiDevice, DeviceSpec, Mount};

    use super::*;

    #[test]
    fn the_first_of_two_plugins_wins_and_the_pod_over_both() {
        let answer = |value: &str| ContainerAllocateResponse {
            envs: [("DEV".to_owned(), value.to_owned()), ("OWN".to_owned(), value.to_owned())].into(),
            mounts: vec![Mount { container_path: "/m".into(), host_path: value.into(), read_only: true }],
            devices: vec![DeviceSpec {
                container_path: "/dev/x".into(),
                host_path: value.into(),
                permissions: "rw".into(),
            }],
            annotations: [("a".to_owned(), value.to_owned())].into(),
            cdi_devices: vec![CdiDevice { name: "v.com/c=0".into() }],
        };
        let extras = Extras::of([answer("1"), answer("2")].iter());
        assert_eq!(extras.mounts.iter().map(|mount| mount.host_path.as_str()).collect::<Vec<_>>(), ["1"]);
        let mut config = v1::ContainerConfig {
            envs: vec![v1::KeyValue { key: "OWN".into(), value: "pod".into() }],
            ..v1::ContainerConfig::default()
        };
        extras.apply(&mut config);
        let envs: Vec<_> = config.envs.iter().map(|env| (env.key.as_str(), env.value.as_slice())).collect();
        assert_eq!(envs, [("DEV", b"1".as_slice()), ("OWN", b"pod".as_slice())]);
        assert_eq!((config.devices[0].host_path.as_str(), config.annotations["a"].as_str()), ("1", "1"));
        assert_eq!(config.cdi_devices.len(), 1);
    }
}
