//! What the machine is: read once, as it does not change while the daemon runs.

use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::api::core::v1::{NodeSwapStatus, NodeSystemInfo};
use pod::quantity::Quantity;

use crate::disk::Disk;
use crate::resources::cpu::CpuSet;

/// The machine.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Machine {
    /// Everything it has, by resource: `cpu`, `memory`, `ephemeral-storage`, `hugepages-<size>`.
    pub capacity: BTreeMap<String, Quantity>,
    /// Its kernel, system and identities.
    pub info: NodeSystemInfo,
}

impl Machine {
    /// This machine, with the kubelet's files below `root`. What cannot be read is missing.
    pub fn read(root: &Path) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let meminfo = text("/proc/meminfo");
        // The machine's, whatever this process may use of them.
        let online = text("/sys/devices/system/cpu/online").parse::<CpuSet>().map_or(0, |cpus| cpus.len());
        let own = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cpus = if online > 0 { online } else { own() };
        let mut capacity = BTreeMap::from([
            ("cpu".to_owned(), amount(cpus as u64)),
            ("memory".to_owned(), amount(kilobytes(&meminfo, "MemTotal") * 1024)),
        ]);
        if let Some(disk) = Disk::to_hold(root) {
            capacity.insert("ephemeral-storage".to_owned(), amount(disk.capacity));
        }
        capacity.extend(huge_pages(Path::new("/sys/kernel/mm/hugepages")));
        let swap = i64::try_from(kilobytes(&meminfo, "SwapTotal") * 1024).ok().filter(|bytes| *bytes > 0);
        let info = NodeSystemInfo {
            architecture: architecture().to_owned(),
            operating_system: "linux".to_owned(),
            os_image: os_image(&text("/etc/os-release")),
            kernel_version: text("/proc/sys/kernel/osrelease"),
            machine_id: text("/etc/machine-id"),
            system_uuid: system_uuid(&text("/sys/class/dmi/id/product_uuid"), &text("/etc/machine-id")),
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            swap: swap.map(|bytes| NodeSwapStatus { capacity: Some(bytes) }),
            ..NodeSystemInfo::default()
        };
        Self { capacity, info }
    }
}

/// As Go and the API name it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn amount(units: u64) -> Quantity {
    Quantity::from_units(i64::try_from(units).unwrap_or(i64::MAX))
}

/// A value of proc_meminfo(5), which counts in kB.
pub(crate) fn kilobytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Sizes of huge pages in bytes: the directories `hugepages-<n>kB` of the kernel.
pub(crate) fn huge_page_sizes(sizes: &Path) -> impl Iterator<Item = u64> {
    let names = std::fs::read_dir(sizes).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| {
        let kilobytes = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
        Some(kilobytes.parse::<u64>().ok()? * 1024)
    })
}

/// Huge pages by size, with what is reserved of each.
fn huge_pages(sizes: &Path) -> Vec<(String, Quantity)> {
    let reserved = |bytes: u64| {
        let file = sizes.join(format!("hugepages-{}kB/nr_hugepages", bytes / 1024));
        let pages: u64 = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        (format!("hugepages-{}", binary(bytes)), amount(pages * bytes))
    };
    huge_page_sizes(sizes).map(reserved).collect()
}

/// Bytes with the largest binary suffix that divides them, as quantities are written: `2Mi`.
pub(crate) fn binary(bytes: u64) -> String {
    let units = [("Gi", 30), ("Mi", 20), ("Ki", 10)];
    let fits = units.iter().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    fits.map_or_else(|| bytes.to_string(), |(suffix, shift)| format!("{}{suffix}", bytes >> shift))
}

/// `PRETTY_NAME` of os-release(5).
fn os_image(release: &str) -> String {
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".to_owned(), |name| name.trim_matches(['"', '\'']).to_owned())
}

/// The firmware's uuid; a machine without one is told apart by its machine id.
fn system_uuid(firmware: &str, machine_id: &str) -> String {
    if firmware.is_empty() { machine_id.to_owned() } else { firmware.to_ascii_lowercase() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_named() {
        assert_eq!(os_image("ID=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"), "Debian GNU/Linux 12");
        assert_eq!(os_image(""), "Linux");
    }

    #[test]
    fn this_machine() {
        let machine = Machine::read(Path::new("/var/lib/kubelet/not/there"));
        for resource in ["cpu", "memory", "ephemeral-storage"] {
            assert!(machine.capacity[resource].units() > 0, "{resource}");
        }
        assert!(!machine.info.boot_id.is_empty() && !machine.info.kernel_version.is_empty());
    }

    #[test]
    fn sizes_have_the_largest_suffix_that_divides_them() {
        for (bytes, expected) in [(0, "0"), (2 << 20, "2Mi"), (1 << 30, "1Gi"), (1536, "1536"), (64 << 10, "64Ki")] {
            assert_eq!(binary(bytes), expected);
        }
    }

    #[test]
    fn memory_is_read_by_its_whole_name() {
        let meminfo = "MemTotalX: 1 kB\nMemTotal:       16 kB\nMemFree: 1 kB\n";
        assert_eq!(kilobytes(meminfo, "MemTotal"), 16);
        assert_eq!(kilobytes(meminfo, "SwapTotal"), 0);
    }

    #[test]
    fn huge_pages_by_size() {
        let dir = tempfile::tempdir().unwrap();
        let size = dir.path().join("hugepages-2048kB");
        std::fs::create_dir(&size).unwrap();
        std::fs::write(size.join("nr_hugepages"), "3\n").unwrap();
        assert_eq!(huge_pages(dir.path()), [("hugepages-2Mi".to_owned(), Quantity::from_units(6 << 20))]);
    }
}
