//! Which claims drivers have made ready, for which pods. Pure.
//!
//! ```text
//! begin ─► (NodePrepareResources) ─► take_devices ─► settle        one pod after the other joins a claim
//! release ─► (NodeUnprepareResources) ─► forget                     the last pod of a claim takes it with it
//! ```
//!
//! A pod is noted before a driver is asked for anything, so that whatever comes of it is undone with the pod.

use std::collections::{BTreeMap, BTreeSet};

use plugin::dra;

use super::ClaimError;

/// Namespace and name.
pub(super) type Name = (String, String);
/// The claims of a node's pods.
pub(super) type Claims = BTreeMap<Name, Claim>;
/// What is asked of each driver.
pub(super) type Batches = BTreeMap<String, Vec<dra::Claim>>;

/// The most devices that a driver may make ready for a claim. The cluster allocates 32 (`AllocationResultsMaxSize`).
const DEVICES_MAX: usize = 128;
/// The most CDI ids of these.
const CDI_MAX: usize = 1024;

const ALL: &str = "All";

/// A claim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) namespace: String,
    /// The pods that use it, by uid.
    pub(super) pods: BTreeSet<String>,
    /// What each driver has to do with it.
    pub(super) parts: BTreeMap<String, Part>,
    /// All drivers have made it ready since this daemon began.
    pub(super) is_prepared: bool,
    /// Drivers are being told that nobody needs it.
    pub(super) is_released: bool,
}

/// The part of a claim that one driver has devices for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) devices: Vec<Device>,
    /// Calls that the driver does not want.
    pub(super) skips: BTreeSet<String>,
}

/// A device, as its driver has made it ready.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) pool: String,
    pub(super) name: String,
    pub(super) share: Option<String>,
    /// The requests that it is for; none: for all.
    pub(super) requests: Vec<String>,
    pub(super) cdi: Vec<String>,
}

/// The two calls about claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Prepare,
    Unprepare,
}

impl Call {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prepare => "NodePrepareResources",
            Self::Unprepare => "NodeUnprepareResources",
        }
    }
}

impl Part {
    fn wants(&self, call: Call) -> bool {
        !self.skips.contains(ALL) && !self.skips.contains(call.name())
    }
}

impl Device {
    fn of(device: &dra::Device) -> Self {
        Self {
            pool: device.pool_name.clone(),
            name: device.device_name.clone(),
            share: device.share_id.clone(),
            requests: device.request_names.clone(),
            cdi: device.cdi_device_ids.clone(),
        }
    }

    /// Whether it is for a request; an empty one stands for all. Of `request/alternative` drivers know the first part.
    pub(super) fn is_for(&self, request: &str) -> bool {
        let request = request.split('/').next().unwrap_or(request);
        request.is_empty() || self.requests.is_empty() || self.requests.iter().any(|own| own == request)
    }
}

impl Claim {
    fn key(&self) -> Name {
        (self.namespace.clone(), self.name.clone())
    }

    /// The drivers that have to be called.
    pub(super) fn drivers(&self, call: Call) -> impl Iterator<Item = &String> {
        self.parts.iter().filter(move |(_, part)| part.wants(call)).map(|(driver, _)| driver)
    }

    fn message(&self) -> dra::Claim {
        dra::Claim { namespace: self.namespace.clone(), uid: self.uid.clone(), name: self.name.clone() }
    }

    fn add_to(&self, batches: &mut Batches, call: Call) {
        for driver in self.drivers(call) {
            batches.entry(driver.clone()).or_default().push(self.message());
        }
    }

    /// The devices for a request, with their drivers.
    pub(super) fn devices<'a>(&'a self, request: &'a str) -> impl Iterator<Item = (&'a str, &'a Device)> {
        let all = self.parts.iter().flat_map(|(driver, part)| part.devices.iter().map(|one| (driver.as_str(), one)));
        all.filter(move |(_, device)| device.is_for(request))
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    claims: Claims,
}

impl Table {
    pub(super) fn recall(claims: Claims) -> Self {
        Self { claims }
    }

    pub(super) fn claims(&self) -> &Claims {
        &self.claims
    }

    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<&Claim> {
        self.claims.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// The pods that use some claim.
    pub(super) fn pods(&self) -> BTreeSet<String> {
        self.claims.values().flat_map(|claim| claim.pods.iter().cloned()).collect()
    }

    /// Whether a pod uses some claim.
    pub(super) fn holds(&self, uid: &str) -> bool {
        self.claims.values().any(|claim| claim.pods.contains(uid))
    }

    /// Notes that a pod uses these claims; what drivers have to do before it can.
    ///
    /// # Errors
    /// A claim is on its way out, or another one of its name is.
    pub(super) fn begin(&mut self, uid: &str, wanted: &[Claim]) -> Result<Batches, ClaimError> {
        for new in wanted {
            let Some(known) = self.claims.get(&new.key()) else { continue };
            if known.uid != new.uid {
                return Err(ClaimError::Replaced { claim: new.name.clone(), old: known.uid.clone() });
            }
            if known.is_released {
                return Err(ClaimError::Released { claim: new.name.clone() });
            }
        }
        let mut batches = Batches::new();
        for new in wanted {
            let claim = self.claims.entry(new.key()).or_insert_with(|| new.clone());
            claim.pods.insert(uid.to_owned());
            if !claim.is_prepared {
                claim.add_to(&mut batches, Call::Prepare);
            }
        }
        Ok(batches)
    }

    /// Takes in what a driver has made of the claims of its batch: its answer replaces an earlier one.
    ///
    /// # Errors
    /// The first claim that it could not make ready, or did not tell of, or told too much of.
    pub(super) fn take_devices(
        &mut self,
        driver: &str,
        batch: &[dra::Claim],
        answer: &dra::NodePrepareResourcesResponse,
    ) -> Result<(), ClaimError> {
        check(batch, Call::Prepare, answer.claims.iter().map(|(uid, one)| (uid, &one.error)))?;
        for asked in batch {
            let Some(claim) = self.claims.get_mut(&(asked.namespace.clone(), asked.name.clone())) else { continue };
            let made = answer.claims.get(&asked.uid).filter(|_| claim.uid == asked.uid);
            if let (Some(part), Some(made)) = (claim.parts.get_mut(driver), made) {
                check_size(driver, asked, &made.devices)?;
                part.devices = made.devices.iter().map(Device::of).collect();
            }
        }
        Ok(())
    }

    /// All drivers have answered well.
    pub(super) fn settle(&mut self, wanted: &[Claim]) {
        for one in wanted {
            if let Some(claim) = self.claims.get_mut(&one.key()).filter(|claim| claim.uid == one.uid) {
                claim.is_prepared = true;
            }
        }
    }

    /// A pod needs its claims no more; what drivers have to undo, and of which claims. Claims that other pods use stay.
    pub(super) fn release(&mut self, uid: &str) -> (Batches, Vec<Name>) {
        let (mut batches, mut last) = (Batches::new(), Vec::new());
        for (name, claim) in self.claims.iter_mut().filter(|(_, claim)| claim.pods.contains(uid)) {
            if claim.pods.len() > 1 {
                claim.pods.remove(uid);
                continue;
            }
            claim.is_released = true;
            claim.add_to(&mut batches, Call::Unprepare);
            last.push(name.clone());
        }
        (batches, last)
    }

    /// Nothing of a claim is left with its drivers.
    pub(super) fn forget(&mut self, name: &Name) {
        self.claims.remove(name);
    }

    /// The pods that have a device.
    pub(super) fn users(&self, driver: &str, has: impl Fn(&Device) -> bool) -> BTreeSet<String> {
        let claims = self.claims.values();
        let users = claims.filter(|claim| claim.parts.get(driver).is_some_and(|part| part.devices.iter().any(&has)));
        users.flat_map(|claim| claim.pods.iter().cloned()).collect()
    }

    /// How many claims are ready, of each driver; under the empty name of all.
    pub(super) fn in_use(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::from([(String::new(), 0)]);
        for claim in self.claims.values().filter(|claim| claim.is_prepared) {
            for driver in claim.parts.keys().chain([&String::new()]) {
                *counts.entry(driver.clone()).or_default() += 1;
            }
        }
        counts
    }
}

/// All of it is kept, written, and given to the runtime.
fn check_size(driver: &str, claim: &dra::Claim, devices: &[dra::Device]) -> Result<(), ClaimError> {
    let ids = devices.iter().map(|device| device.cdi_device_ids.len()).sum();
    for (what, count, max) in [("devices", devices.len(), DEVICES_MAX), ("CDI ids", ids, CDI_MAX)] {
        if count > max {
            let (driver, claim) = (driver.to_owned(), claim.name.clone());
            return Err(ClaimError::TooMany { driver, call: Call::Prepare.name(), claim, what, count, max });
        }
    }
    Ok(())
}

/// Whether an answer tells of each claim that was asked about, of no other, and of no failure.
pub(super) fn check<'a>(
    batch: &[dra::Claim],
    call: Call,
    answers: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), ClaimError> {
    let mut count = 0;
    for (uid, error) in answers {
        let Some(asked) = batch.iter().find(|claim| claim.uid == *uid) else {
            return Err(ClaimError::Unknown { call: call.name(), uid: uid.clone() });
        };
        if !error.is_empty() {
            return Err(ClaimError::Failed { call: call.name(), claim: asked.name.clone(), cause: error.clone() });
        }
        count += 1;
    }
    match batch.len().saturating_sub(count) {
        0 => Ok(()),
        count => Err(ClaimError::Skipped { call: call.name(), count }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(name: &str, drivers: &[&str]) -> Claim {
        let parts = drivers.iter().map(|&driver| (driver.to_owned(), Part::default())).collect();
        let (name, namespace) = (name.to_owned(), "shop".to_owned());
        Claim { uid: format!("uid-{name}"), name, namespace, parts, ..Claim::default() }
    }

    fn answer(claims: &[(&str, &str)]) -> dra::NodePrepareResourcesResponse {
        let device = dra::Device {
            request_names: vec!["r".into()],
            pool_name: "p".into(),
            device_name: "d".into(),
            cdi_device_ids: vec!["v.com/c=d".into()],
            share_id: None,
        };
        let made =
            |error: &str| dra::NodePrepareResourceResponse { devices: vec![device.clone()], error: error.into() };
        let claims = claims.iter().map(|(uid, error)| ((*uid).to_owned(), made(error)));
        dra::NodePrepareResourcesResponse { claims: claims.collect() }
    }

    fn names(batches: &Batches) -> Vec<(&str, Vec<&str>)> {
        batches
            .iter()
            .map(|(driver, all)| (driver.as_str(), all.iter().map(|one| one.name.as_str()).collect()))
            .collect()
    }

    #[test]
    fn each_driver_hears_once_of_all_its_claims() {
        let mut table = Table::default();
        let wanted = [claim("a", &["one", "two"]), claim("b", &["two"])];
        let batches = table.begin("u", &wanted).unwrap();
        assert_eq!(names(&batches), [("one", vec!["a"]), ("two", vec!["a", "b"])]);
        assert!(table.holds("u"), "before anybody is asked");
        table.take_devices("one", &batches["one"], &answer(&[("uid-a", "")])).unwrap();
        let two = &batches["two"];
        let check = |table: &mut Table, given: &[(&str, &str)]| {
            table.take_devices("two", two, &answer(given)).map_err(|error| error.to_string())
        };
        let skipped = "NodePrepareResources skipped 1 ResourceClaims".to_owned();
        assert_eq!(check(&mut table, &[("uid-a", "")]), Err(skipped));
        let failed = "NodePrepareResources failed for ResourceClaim b: broken".to_owned();
        assert_eq!(check(&mut table, &[("uid-b", "broken")]), Err(failed));
        let unknown = "NodePrepareResources returned result for unknown claim UID uid-c".to_owned();
        assert_eq!(check(&mut table, &[("uid-c", "")]), Err(unknown));
        // Asked again, they answer again; nothing is there twice.
        assert_eq!(names(&table.begin("u", &wanted).unwrap()), names(&batches));
        check(&mut table, &[("uid-a", ""), ("uid-b", "")]).unwrap();
        check(&mut table, &[("uid-a", ""), ("uid-b", "")]).unwrap();
        table.settle(&wanted);
        let devices: Vec<_> = table.get("shop", "a").unwrap().devices("r").map(|(driver, _)| driver).collect();
        assert_eq!(devices, ["one", "two"]);
        assert_eq!(table.get("shop", "a").unwrap().devices("other").count(), 0);
        assert_eq!(table.get("shop", "a").unwrap().devices("r/alternative").count(), 2);
        assert!(table.begin("u", &wanted).unwrap().is_empty(), "they are ready");
        assert_eq!(table.in_use(), BTreeMap::from([("".into(), 2), ("one".into(), 1), ("two".into(), 2)]));
    }

    #[test]
    fn a_driver_makes_no_claim_too_large() {
        let mut table = Table::default();
        let batches = table.begin("u", &[claim("a", &["one"])]).unwrap();
        let mut take = |devices: usize, ids: usize| {
            let mut answer = answer(&[("uid-a", "")]);
            let made = answer.claims.get_mut("uid-a").unwrap();
            made.devices =
                vec![dra::Device { cdi_device_ids: vec!["v.com/c=d".into(); ids], ..made.devices[0].clone() }];
            made.devices.resize(devices, made.devices[0].clone());
            table.take_devices("one", &batches["one"], &answer).map_err(|error| error.to_string())
        };
        assert_eq!(take(DEVICES_MAX, CDI_MAX / DEVICES_MAX), Ok(()));
        let start = "DRA driver one: NodePrepareResources returned";
        let many = format!("{start} 129 devices for ResourceClaim a; at most 128 are taken");
        assert_eq!(take(DEVICES_MAX + 1, 1), Err(many));
        let many = format!("{start} 1025 CDI ids for ResourceClaim a; at most 1024 are taken");
        assert_eq!(take(1, CDI_MAX + 1), Err(many));
        assert_eq!(table.get("shop", "a").unwrap().devices("").count(), DEVICES_MAX, "what was taken before");
    }

    #[test]
    fn the_last_pod_of_a_claim_takes_it_with_it() {
        let mut table = Table::default();
        let wanted = [claim("a", &["one"])];
        table.begin("first", &wanted).unwrap();
        table.settle(&wanted);
        assert!(table.begin("second", &wanted).unwrap().is_empty());
        assert_eq!(table.release("first"), (Batches::new(), vec![]));
        let (batches, last) = table.release("second");
        assert_eq!((names(&batches), last.len()), (vec![("one", vec!["a"])], 1));
        assert!(matches!(table.begin("third", &wanted), Err(ClaimError::Released { .. })));
        let successor = [Claim { uid: "other".into(), ..wanted[0].clone() }];
        assert!(matches!(table.begin("third", &successor), Err(ClaimError::Replaced { .. })));
        assert_eq!(table.release("second").1.len(), 1, "until it is done it is tried again");
        table.forget(&last[0]);
        assert!(table.claims().is_empty() && !table.holds("second"));
        assert_eq!(table.release("second"), (Batches::new(), vec![]));
    }

    #[test]
    fn calls_that_a_driver_does_not_want_are_left_out() {
        let mut table = Table::default();
        let mut wanted = claim("a", &["all", "prepare", "none"]);
        for (driver, skip) in [("all", "All"), ("prepare", "NodePrepareResources")] {
            wanted.parts.get_mut(driver).unwrap().skips.insert(skip.to_owned());
        }
        assert_eq!(names(&table.begin("u", &[wanted]).unwrap()), [("none", vec!["a"])]);
        assert_eq!(names(&table.release("u").0), [("none", vec!["a"]), ("prepare", vec!["a"])]);
    }
}
