//! The health of devices, as their drivers tell of it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use plugin::dra_health::{self as v1, HealthStatus};
use plugin::dra_health_v1alpha1 as v1alpha1;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::Shared;
use super::driver::Driver;

/// What is known of a device holds so long, unless its driver says otherwise (upstream's `DefaultHealthTimeout`).
const LASTS: Duration = Duration::from_secs(30);
/// It holds no longer than that, whatever its driver says: a driver may say any number.
const LASTS_MAX: Duration = Duration::from_secs(24 * 3600);
/// So many devices of one driver are remembered (upstream's `maxDevicesPerDriver`).
const DEVICES_MAX: usize = 16_384;
/// The longest message of a status (`ResourceHealthMessageMaxLength`).
const MESSAGE_MAX: usize = 1024;
/// Before a stream that has ended is begun again, as upstream.
const REST: Duration = Duration::from_secs(5);

/// What drivers call the service, the newest first.
const V1: &str = "v1.DRAResourceHealth";
const V1ALPHA1: &str = "v1alpha1.DRAResourceHealth";

/// A version of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V1Alpha1,
}

impl Version {
    /// The newest that a driver offers, if it tells of health at all.
    pub(super) fn choose(offered: &[String]) -> Option<Self> {
        let offers = |name: &str| offered.iter().any(|one| one == name);
        if offers(V1) { Some(Self::V1) } else { offers(V1ALPHA1).then_some(Self::V1Alpha1) }
    }
}

/// Pool and name of a device.
pub(super) type Device = (String, String);

/// How a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Health {
    pub(super) status: HealthStatus,
    pub(super) message: String,
}

#[derive(Debug, Clone)]
struct Told {
    health: Health,
    lasts: Duration,
    at: Instant,
}

impl Told {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.at) > self.lasts
    }
}

/// The devices of all drivers.
#[derive(Debug, Default)]
pub(super) struct Table {
    drivers: HashMap<String, HashMap<Device, Told>>,
}

impl Table {
    /// How a device is, as far as anybody has said so lately.
    pub(super) fn of(&self, driver: &str, pool: &str, device: &str, now: Instant) -> Health {
        let told = self.drivers.get(driver).and_then(|all| all.get(&(pool.to_owned(), device.to_owned())));
        let health = told.filter(|told| !told.is_over(now)).map(|told| told.health.clone());
        health.unwrap_or(Health { status: HealthStatus::Unknown, message: String::new() })
    }

    /// Takes in a report; the devices whose health has changed. Those of which nothing was heard for too long are forgotten.
    fn take(&mut self, driver: &str, report: Vec<v1::DeviceHealth>, now: Instant) -> BTreeSet<Device> {
        let known = self.drivers.entry(driver.to_owned()).or_default();
        let (mut changed, mut too_many) = (BTreeSet::new(), 0);
        for one in report {
            let device = one.device.clone().unwrap_or_default();
            let device = (device.pool_name, device.device_name);
            if !known.contains_key(&device) && known.len() >= DEVICES_MAX {
                too_many += 1;
                continue;
            }
            let lasts = u64::try_from(one.health_check_timeout_seconds).ok().filter(|seconds| *seconds > 0);
            let lasts = lasts.map_or(LASTS, |seconds| Duration::from_secs(seconds).min(LASTS_MAX));
            let told = Told { health: Health { status: one.health(), message: short(one.message) }, lasts, at: now };
            let before = known.insert(device.clone(), told.clone());
            if before.is_none_or(|before| before.is_over(now) || before.health != told.health) {
                changed.insert(device);
            }
        }
        if too_many > 0 {
            tracing::warn!(driver, too_many, "a driver tells of more devices than are remembered; not of these");
        }
        changed.extend(known.extract_if(|_, told| told.is_over(now)).map(|(device, _)| device));
        changed
    }

    /// When the first thing that a driver has told does not hold any more.
    fn ends(&self, driver: &str) -> Option<Instant> {
        self.drivers.get(driver)?.values().filter_map(|told| told.at.checked_add(told.lasts)).min()
    }

    /// Nothing holds any more that a driver has told.
    pub(super) fn clear(&mut self, driver: &str) -> BTreeSet<Device> {
        self.drivers.remove(driver).unwrap_or_default().into_keys().collect()
    }
}

/// At most so many bytes as a status takes, cut where a character ends.
fn short(mut message: String) -> String {
    if message.len() > MESSAGE_MAX {
        let end = (0..=MESSAGE_MAX - 3).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
        message.push_str("...");
    }
    message
}

/// Follows what a driver tells, as long as it is registered.
pub(super) async fn follow(shared: Arc<Shared>, driver: Arc<Driver>, version: Version) {
    loop {
        let ended = watch(&shared, &driver, version).await;
        let changed = shared.lock_health().clear(driver.name());
        shared.tell(driver.name(), &changed);
        match ended {
            // It offers the service and does not have it. If it gets it, it registers again.
            Err(status) if status.code() == Code::Unimplemented => return,
            Err(status) => {
                let endpoint = driver.endpoint();
                tracing::debug!(driver = driver.name(), endpoint = %endpoint.display(), %status, "the health of devices");
            }
            Ok(()) => {}
        }
        tokio::time::sleep(REST).await;
    }
}

async fn watch(shared: &Shared, driver: &Driver, version: Version) -> Result<(), Status> {
    let channel = driver.channel().map_err(|error| Status::unavailable(error.to_string()))?;
    let mut reports = Reports::begin(channel, version).await?;
    loop {
        let ends = shared.lock_health().ends(driver.name());
        let silence = async {
            match ends {
                Some(at) => tokio::time::sleep_until(at + Duration::from_millis(1)).await,
                None => std::future::pending().await,
            }
        };
        let report = tokio::select! {
            report = reports.next() => match report? {
                Some(report) => report,
                None => return Ok(()),
            },
            // What it said last does not hold any more, which nobody tells.
            () = silence => Vec::new(),
        };
        let changed = shared.lock_health().take(driver.name(), report, Instant::now());
        shared.tell(driver.name(), &changed);
    }
}

/// What a driver tells, in either version.
enum Reports {
    V1(Streaming<v1::NodeWatchResourcesResponse>),
    V1Alpha1(Streaming<v1alpha1::NodeWatchResourcesResponse>),
}

impl Reports {
    async fn begin(channel: Channel, version: Version) -> Result<Self, Status> {
        Ok(match version {
            Version::V1 => {
                let mut client = v1::dra_resource_health_client::DraResourceHealthClient::new(channel);
                Self::V1(client.node_watch_resources(v1::NodeWatchResourcesRequest {}).await?.into_inner())
            }
            Version::V1Alpha1 => {
                let mut client = v1alpha1::dra_resource_health_client::DraResourceHealthClient::new(channel);
                Self::V1Alpha1(client.node_watch_resources(v1alpha1::NodeWatchResourcesRequest {}).await?.into_inner())
            }
        })
    }

    /// Cancel-safe: nothing is lost of a message that has not come whole.
    async fn next(&mut self) -> Result<Option<Vec<v1::DeviceHealth>>, Status> {
        let older = |one: v1alpha1::DeviceHealth| v1::DeviceHealth {
            device: one
                .device
                .map(|device| v1::DeviceIdentifier { pool_name: device.pool_name, device_name: device.device_name }),
            health: one.health,
            last_updated_time: one.last_updated_time,
            health_check_timeout_seconds: one.health_check_timeout_seconds,
            message: one.message,
        };
        Ok(match self {
            Self::V1(stream) => stream.message().await?.map(|report| report.devices),
            Self::V1Alpha1(stream) => {
                stream.message().await?.map(|report| report.devices.into_iter().map(older).collect())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str, health: HealthStatus, timeout_s: i64) -> Vec<v1::DeviceHealth> {
        let device = Some(v1::DeviceIdentifier { pool_name: "p".into(), device_name: name.into() });
        let health = health.into();
        vec![v1::DeviceHealth {
            device,
            health,
            health_check_timeout_seconds: timeout_s,
            ..v1::DeviceHealth::default()
        }]
    }

    #[test]
    fn what_was_told_holds_for_a_time() {
        let (mut table, begin) = (Table::default(), Instant::now());
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let d = BTreeSet::from([("p".to_owned(), "d".to_owned())]);
        assert_eq!(table.take("v", report("d", HealthStatus::Healthy, 0), begin), d);
        assert!(table.take("v", report("d", HealthStatus::Healthy, 0), at(10)).is_empty());
        assert_eq!(table.of("v", "p", "d", at(40)).status, HealthStatus::Healthy);
        assert_eq!(table.of("v", "p", "d", at(41)).status, HealthStatus::Unknown);
        assert_eq!(table.ends("v"), Some(at(40)));
        assert_eq!(table.take("v", report("d", HealthStatus::Unhealthy, 100), at(20)), d);
        assert_eq!(table.of("v", "p", "d", at(119)).status, HealthStatus::Unhealthy);
        assert_eq!(table.take("v", Vec::new(), at(121)), d);
        assert_eq!(table.take("v", Vec::new(), at(122)), BTreeSet::new());
        assert_eq!(table.of("v", "p", "other", begin).status, HealthStatus::Unknown);
        table.take("v", report("d", HealthStatus::Healthy, 0), at(130));
        assert_eq!(table.clear("v"), d);
        assert_eq!((table.clear("v"), table.ends("v")), (BTreeSet::new(), None));
    }

    #[test]
    fn nothing_holds_for_ever() {
        let (mut table, begin) = (Table::default(), Instant::now());
        table.take("v", report("d", HealthStatus::Healthy, i64::MAX), begin);
        assert_eq!(table.ends("v"), Some(begin + LASTS_MAX));
        assert_eq!(table.of("v", "p", "d", begin + LASTS_MAX).status, HealthStatus::Healthy);
        let after = begin + LASTS_MAX + Duration::from_secs(1);
        assert_eq!(table.of("v", "p", "d", after).status, HealthStatus::Unknown);
    }

    #[test]
    fn messages_fit_into_a_status() {
        assert_eq!(short("a".repeat(1024)).len(), 1024);
        assert_eq!(short("a".repeat(1025)), "a".repeat(1021) + "...");
        assert_eq!(short("ä".repeat(600)), "ä".repeat(510) + "...");
    }

    #[test]
    fn versions() {
        let choose = |offered: &[&str]| Version::choose(&offered.iter().map(|&one| one.to_owned()).collect::<Vec<_>>());
        assert_eq!(choose(&["v1.DRAPlugin", "v1alpha1.DRAResourceHealth", "v1.DRAResourceHealth"]), Some(Version::V1));
        assert_eq!(choose(&["v1alpha1.DRAResourceHealth"]), Some(Version::V1Alpha1));
        assert_eq!(choose(&["v1.DRAPlugin"]), None);
    }
}
