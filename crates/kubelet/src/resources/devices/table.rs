//! What is known of devices, and who has which. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use plugin::device::{ContainerAllocateResponse, DevicePluginOptions};
use tokio::time::Instant;

use super::DeviceError;
use crate::resources::topology::{Hint, Hints, Mask};

/// How long the node keeps the resource of a plugin that has gone, with nothing to give of it.
pub(crate) const GRACE: Duration = Duration::from_secs(300);

/// The number under which devices are that belong to no NUMA node.
pub(crate) const NO_NODE: i64 = -1;

/// Ids of devices.
pub(crate) type Ids = BTreeSet<String>;

/// Ids of devices by NUMA node. A device that is near to several is with each.
pub(crate) type NodeIds = BTreeMap<i64, Vec<String>>;

/// A device, as its plugin described it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) is_healthy: bool,
    /// The NUMA nodes that it is near to.
    pub(crate) nodes: Vec<i64>,
}

impl Device {
    fn mask(&self) -> Mask {
        Mask::of(self.nodes.iter().filter_map(|node| usize::try_from(*node).ok()))
    }
}

/// A resource whose devices plugins manage.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resource {
    pub(crate) devices: BTreeMap<String, Device>,
    /// What the plugin that came last wants, also when it has gone; nothing where none has come yet.
    pub(super) options: DevicePluginOptions,
    /// Since when no plugin has been there.
    gone: Option<Instant>,
}

impl Resource {
    /// Devices that can be given out, if nobody has them.
    pub(super) fn usable(&self) -> Ids {
        let usable = self.devices.iter().filter(|(_, device)| self.gone.is_none() && device.is_healthy);
        usable.map(|(id, _)| id.clone()).collect()
    }

    /// NUMA nodes that devices are near to; of those that the machine has.
    fn nodes(&self, machine: Mask) -> Mask {
        self.devices.values().fold(Mask::default(), |nodes, device| nodes.or(device.mask())).and(machine)
    }
}

/// Devices of one resource that a container has.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Allocation {
    pub(crate) devices: NodeIds,
    /// What the plugin wants the container to get with them; none while it is being asked, or has to be asked again.
    pub(crate) answer: Option<ContainerAllocateResponse>,
    /// The plugin knows of it since the machine or the node agent has started.
    pub(crate) is_confirmed: bool,
}

impl Allocation {
    pub(crate) fn ids(&self) -> Ids {
        self.devices.values().flatten().cloned().collect()
    }

    /// The devices with the name of their resource and the NUMA nodes that they are near to.
    pub(super) fn near(&self, resource: &str) -> Vec<(String, String, Vec<i64>)> {
        let nodes = |id: &String| {
            let with = self.devices.iter().filter(|(node, ids)| **node != NO_NODE && ids.contains(id));
            with.map(|(node, _)| *node).collect()
        };
        self.ids().into_iter().map(|id| (resource.to_owned(), id.clone(), nodes(&id))).collect()
    }
}

/// Allocations by pod's uid, container and resource.
pub(crate) type Given = BTreeMap<String, BTreeMap<String, BTreeMap<String, Allocation>>>;

/// A container's need of one resource.
#[derive(Debug, Clone, Default)]
pub(crate) struct Need<'a> {
    pub(crate) uid: &'a str,
    pub(crate) container: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) count: usize,
    /// Devices that containers of the same pod had which have ended before this one begins.
    pub(crate) reusable: Ids,
    /// Where they should come from.
    pub(crate) affinity: Option<Mask>,
}

/// How a need can be met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The container has them already, and what its plugin wants with them.
    Has,
    /// By these.
    Take(Ids),
    /// The plugin may have a wish: which of these it would give, with those that are chosen already.
    Ask { available: Ids, chosen: Ids },
}

/// Capacity and allocatable of one resource.
pub(crate) type Amounts = (usize, usize);

#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) resources: BTreeMap<String, Resource>,
    /// Resources that were there once, of which the node says that it has none.
    retired: BTreeSet<String>,
    pub(crate) given: Given,
}

impl Table {
    /// Begins with what was given out before: those resources have no plugin yet.
    pub(crate) fn recall(given: Given, registered: impl IntoIterator<Item = String>, now: Instant) -> Self {
        let gone = |name| (name, Resource { gone: Some(now), ..Resource::default() });
        Self { resources: registered.into_iter().map(gone).collect(), retired: BTreeSet::new(), given }
    }

    /// A plugin has come; its devices are not known yet.
    pub(crate) fn came(&mut self, resource: &str, options: DevicePluginOptions) {
        self.resources.entry(resource.to_owned()).or_default().options = options;
        self.retired.remove(resource);
    }

    /// A plugin says which devices there are. Returns the pods that have one whose health is news.
    pub(crate) fn listed(&mut self, resource: &str, devices: BTreeMap<String, Device>) -> BTreeSet<String> {
        let known = self.resources.entry(resource.to_owned()).or_default();
        known.gone = None;
        let is_news = |(id, device): &(&String, &Device)| {
            known.devices.get(*id).is_none_or(|before| before.is_healthy != device.is_healthy)
        };
        let news: Ids = devices.iter().filter(is_news).map(|(id, _)| id.clone()).collect();
        known.devices = devices;
        let has = |containers: &BTreeMap<String, BTreeMap<String, Allocation>>| {
            let given = containers.values().filter_map(|resources| resources.get(resource));
            given.flat_map(|allocation| allocation.devices.values().flatten()).any(|id| news.contains(id))
        };
        self.given.iter().filter(|(_, containers)| has(containers)).map(|(uid, _)| uid.clone()).collect()
    }

    /// The last plugin of a resource has gone.
    pub(crate) fn went(&mut self, resource: &str, now: Instant) {
        if let Some(resource) = self.resources.get_mut(resource) {
            resource.gone = Some(now);
        }
    }

    /// What the node has of each resource. Those whose plugin has been gone for too long are forgotten, and told as none.
    pub(crate) fn amounts(&mut self, now: Instant) -> BTreeMap<String, Amounts> {
        let is_over = |resource: &Resource| resource.gone.is_some_and(|since| now.duration_since(since) > GRACE);
        let over = self.resources.extract_if(.., |_, resource| is_over(resource));
        self.retired.extend(over.map(|(name, _)| name));
        let present = self.resources.iter();
        let amounts = present.map(|(name, known)| (name.clone(), (known.devices.len(), known.usable().len())));
        amounts.chain(self.retired.iter().map(|name| (name.clone(), (0, 0)))).collect()
    }

    /// Whether plugins manage a resource, or have given some of it out.
    pub(crate) fn manages(&self, resource: &str) -> bool {
        let mut allocations = self.given.values().flat_map(BTreeMap::values);
        self.resources.contains_key(resource) || allocations.any(|resources| resources.contains_key(resource))
    }

    pub(crate) fn allocation(&self, uid: &str, container: &str, resource: &str) -> Option<&Allocation> {
        self.given.get(uid)?.get(container)?.get(resource)
    }

    /// Everything that is given out of a resource.
    fn in_use(&self, resource: &str) -> Ids {
        let containers = self.given.values().flat_map(BTreeMap::values);
        containers.filter_map(|resources| resources.get(resource)).flat_map(Allocation::ids).collect()
    }

    /// How to meet a need. `preferred` is what the plugin wishes, none while it has not been asked; `asks` says that it wants
    /// to be.
    pub(crate) fn choose(&self, need: &Need<'_>, asks: bool, preferred: Option<&Ids>) -> Result<Choice, DeviceError> {
        let resource = need.resource.to_owned();
        let allocation = self.allocation(need.uid, need.container, need.resource);
        let has = allocation.map(Allocation::ids);
        if let Some(has) = &has
            && has.len() != need.count
        {
            return Err(DeviceError::Changed { resource, had: has.len(), wants: need.count });
        }
        let Some(known) = self.resources.get(need.resource) else { return Err(DeviceError::Unregistered { resource }) };
        let usable = known.usable();
        if usable.is_empty() {
            return Err(DeviceError::NoneHealthy { resource });
        }
        if let Some(has) = has {
            if !has.is_subset(&usable) {
                return Err(DeviceError::NoLongerHealthy { resource });
            }
            let is_answered = allocation.is_some_and(|allocation| allocation.answer.is_some());
            return Ok(if is_answered { Choice::Has } else { Choice::Take(has) });
        }
        let mut taken = Taken::of(need);
        if taken.from(&need.reusable) {
            return Ok(Choice::Take(taken.ids));
        }
        let available: Ids = usable.difference(&self.in_use(need.resource)).cloned().collect();
        if available.len() < taken.missing {
            return Err(DeviceError::TooFew { resource, requested: taken.missing, available: available.len() });
        }
        let parts = Parts::of(known, &available, need.affinity);
        let fits = taken.missing < parts.aligned.len();
        if !fits && taken.from(&parts.aligned) {
            return Ok(Choice::Take(taken.ids));
        }
        let pool = if fits { &parts.aligned } else { &available };
        match preferred {
            None if asks => {
                let offered = pool.union(&taken.ids).cloned().collect();
                return Ok(Choice::Ask { available: offered, chosen: taken.ids });
            }
            None => {}
            Some(preferred) if taken.from(&preferred.intersection(pool).cloned().collect()) => {
                return Ok(Choice::Take(taken.ids));
            }
            Some(_) => {}
        }
        for part in [&parts.aligned, &parts.elsewhere, &parts.nowhere] {
            if taken.from(part) {
                return Ok(Choice::Take(taken.ids));
            }
        }
        Err(DeviceError::TooFew { resource, requested: need.count, available: need.count - taken.missing })
    }

    /// Gives devices to a container; their plugin's answer is still to come.
    pub(crate) fn reserve(&mut self, need: &Need<'_>, ids: &Ids) {
        let known = self.resources.get(need.resource);
        let mut devices = NodeIds::new();
        for id in ids {
            let nodes = known.and_then(|known| known.devices.get(id)).map(|device| device.nodes.clone());
            let nodes = nodes.filter(|nodes| !nodes.is_empty()).unwrap_or_else(|| vec![NO_NODE]);
            nodes.into_iter().for_each(|node| devices.entry(node).or_default().push(id.clone()));
        }
        let containers = self.given.entry(need.uid.to_owned()).or_default();
        let allocation = Allocation { devices, answer: None, is_confirmed: true };
        containers.entry(need.container.to_owned()).or_default().insert(need.resource.to_owned(), allocation);
    }

    /// Devices that a running container says it has are its own again, unless somebody has one of them since; whether they
    /// are. What their plugin wants with them has to be asked again before the container starts anew.
    pub(crate) fn restore(&mut self, uid: &str, container: &str, resource: &str, devices: NodeIds) -> bool {
        let allocation = Allocation { devices, answer: None, is_confirmed: true };
        let is_known = self.allocation(uid, container, resource).is_some();
        if is_known || !allocation.ids().is_disjoint(&self.in_use(resource)) {
            return false;
        }
        let containers = self.given.entry(uid.to_owned()).or_default();
        containers.entry(container.to_owned()).or_default().insert(resource.to_owned(), allocation);
        true
    }

    /// The plugin has answered. A pod that was given up meanwhile gets nothing.
    pub(crate) fn settle(&mut self, need: &Need<'_>, answer: ContainerAllocateResponse) {
        let containers = self.given.get_mut(need.uid);
        let allocation = containers.and_then(|containers| containers.get_mut(need.container)?.get_mut(need.resource));
        if let Some(allocation) = allocation {
            allocation.answer = Some(answer);
        }
    }

    /// Takes back what was reserved for a need.
    pub(crate) fn cancel(&mut self, need: &Need<'_>) {
        if let Some(resources) = self.given.get_mut(need.uid).and_then(|pod| pod.get_mut(need.container)) {
            resources.remove(need.resource);
        }
    }

    /// Takes back all that a pod has; whether that was anything.
    pub(crate) fn release(&mut self, uid: &str) -> bool {
        self.given.remove(uid).is_some()
    }

    /// The pod's plugins are known to know of it: its containers run.
    pub(crate) fn confirm(&mut self, uid: &str) {
        let containers = self.given.get_mut(uid).into_iter().flat_map(BTreeMap::values_mut);
        containers.flat_map(BTreeMap::values_mut).for_each(|allocation| allocation.is_confirmed = true);
    }

    /// As [`Table::confirm`], of one need.
    pub(crate) fn confirm_one(&mut self, need: &Need<'_>) {
        let containers = self.given.get_mut(need.uid);
        let allocation = containers.and_then(|containers| containers.get_mut(need.container)?.get_mut(need.resource));
        if let Some(allocation) = allocation {
            allocation.is_confirmed = true;
        }
    }

    /// From which NUMA nodes a need can be met. `machine` are those that there are.
    pub(crate) fn hints(&self, need: &Need<'_>, machine: Mask) -> Hints {
        let Some(known) = self.resources.get(need.resource) else { return Hints::Indifferent };
        if known.devices.values().all(|device| device.nodes.is_empty()) {
            return Hints::Indifferent;
        }
        if let Some(has) = self.allocation(need.uid, need.container, need.resource).map(Allocation::ids) {
            let same = has.len() == need.count;
            return Hints::From(if same {
                hints_of(known, &has, &Ids::new(), need.count, machine)
            } else {
                Vec::new()
            });
        }
        let available: Ids = known.usable().difference(&self.in_use(need.resource)).cloned().collect();
        if available.union(&need.reusable).count() < need.count {
            return Hints::From(Vec::new());
        }
        Hints::From(hints_of(known, &available, &need.reusable, need.count, machine))
    }
}

fn hints_of(known: &Resource, available: &Ids, reusable: &Ids, count: usize, machine: Mask) -> Vec<Hint> {
    let own = known.nodes(machine);
    let sets = if own.count() == 0 { machine } else { own }.subsets();
    let mask = |id: &String| known.devices.get(id).map(Device::mask).unwrap_or_default();
    let all_in = |set: Mask| known.devices.values().filter(|device| device.mask().meets(set)).count();
    let fewest = sets.iter().filter(|set| all_in(**set) >= count).map(|set| set.count()).min();
    let meets = |set: &Mask| {
        let placed = reusable.iter().map(mask).filter(|mask| mask.count() > 0);
        let (fitting, misplaced): (Vec<Mask>, Vec<Mask>) = placed.partition(|mask| mask.meets(*set));
        misplaced.is_empty() && fitting.len() + available.iter().filter(|id| mask(id).meets(*set)).count() >= count
    };
    let hint = |set: Mask| Hint { affinity: Some(set), preferred: Some(set.count()) == fewest };
    sets.iter().copied().filter(meets).map(hint).collect()
}

/// Devices that are being chosen.
struct Taken {
    ids: Ids,
    missing: usize,
}

impl Taken {
    fn of(need: &Need<'_>) -> Self {
        Self { ids: Ids::new(), missing: need.count }
    }

    /// Takes from `pool` what is missing; whether nothing is missing then.
    fn from(&mut self, pool: &Ids) -> bool {
        let new: Vec<String> = pool.difference(&self.ids).take(self.missing).cloned().collect();
        self.missing -= new.len();
        self.ids.extend(new);
        self.missing == 0
    }
}

/// Available devices by whether they are where they should be.
#[derive(Default)]
struct Parts {
    aligned: Ids,
    elsewhere: Ids,
    /// They belong to no NUMA node, or it does not matter.
    nowhere: Ids,
}

impl Parts {
    fn of(known: &Resource, available: &Ids, affinity: Option<Mask>) -> Self {
        let matters = known.devices.values().any(|device| !device.nodes.is_empty());
        let Some(affinity) = affinity.filter(|_| matters) else {
            return Self { nowhere: available.clone(), ..Self::default() };
        };
        let mut parts = Self::default();
        for id in available {
            let mask = known.devices.get(id).map(Device::mask).unwrap_or_default();
            let part = match mask.count() {
                0 => &mut parts.nowhere,
                _ if mask.meets(affinity) => &mut parts.aligned,
                _ => &mut parts.elsewhere,
            };
            part.insert(id.clone());
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: &str = "example.com/gpu";

    fn ids(ids: &[&str]) -> Ids {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    /// `a0+` is a healthy device `a0`, `b1-` a sick one; the digit is its NUMA node, `x` is none.
    fn table(devices: &[&str]) -> Table {
        let mut table = Table::default();
        table.came(R, DevicePluginOptions::default());
        let device = |text: &&str| {
            let node = text.chars().nth(1).and_then(|digit| digit.to_digit(10)).map(i64::from);
            (text[..2].to_owned(), Device { is_healthy: text.ends_with('+'), nodes: node.into_iter().collect() })
        };
        table.listed(R, devices.iter().map(device).collect());
        table
    }

    fn need(uid: &'static str, count: usize) -> Need<'static> {
        Need { uid, container: "c", resource: R, count, ..Need::default() }
    }

    fn error(table: &Table, need: &Need<'_>) -> String {
        table.choose(need, false, None).unwrap_err().to_string()
    }

    #[test]
    fn what_is_given_is_nobody_elses() {
        let mut table = table(&["ax+", "bx+", "cx-"]);
        let one = table.choose(&need("u1", 1), false, None).unwrap();
        assert_eq!(one, Choice::Take(ids(&["ax"])));
        table.reserve(&need("u1", 1), &ids(&["ax"]));
        assert_eq!(
            error(&table, &need("u2", 2)),
            "requested number of devices unavailable for example.com/gpu. Requested: 2, Available: 1"
        );
        table.settle(&need("u1", 1), ContainerAllocateResponse::default());
        assert_eq!(table.choose(&need("u1", 1), false, None).unwrap(), Choice::Has);
        assert!(error(&table, &need("u1", 2)).contains("changed its request"));
        table.release("u1");
        assert_eq!(table.choose(&need("u2", 2), false, None).unwrap(), Choice::Take(ids(&["ax", "bx"])));
    }

    #[test]
    fn what_runs_has_what_it_says_unless_that_is_anothers() {
        let mut table = table(&["ax+", "bx+"]);
        let of = |id: &str| NodeIds::from([(NO_NODE, vec![id.to_owned()])]);
        assert!(table.restore("u1", "c", R, of("ax")) && !table.restore("u1", "c", R, of("bx")));
        assert!(!table.restore("u2", "c", R, of("ax")), "it has one owner");
        assert_eq!(table.choose(&need("u3", 1), false, None).unwrap(), Choice::Take(ids(&["bx"])));
        // Its plugin knows nothing of it, perhaps: it is asked for the same ones.
        assert_eq!(table.choose(&need("u1", 1), false, None).unwrap(), Choice::Take(ids(&["ax"])));
        table.settle(&need("u1", 1), ContainerAllocateResponse::default());
        assert_eq!(table.choose(&need("u1", 1), false, None).unwrap(), Choice::Has);
    }

    #[test]
    fn devices_that_are_away() {
        let mut table = table(&["ax+"]);
        let unknown = Need { resource: "example.com/none", ..need("u", 1) };
        assert_eq!(error(&table, &unknown), "cannot allocate unregistered device example.com/none");
        table.reserve(&need("u", 1), &ids(&["ax"]));
        table.listed(R, [("ax".into(), Device { is_healthy: false, nodes: vec![] })].into());
        let none = "no healthy devices present; cannot allocate unhealthy devices example.com/gpu";
        assert_eq!(error(&table, &need("u", 1)), none);
        let devices =
            [("ax", false), ("bx", true)].map(|(id, is_healthy)| (id.into(), Device { is_healthy, nodes: vec![] }));
        table.listed(R, devices.into());
        assert!(error(&table, &need("u", 1)).starts_with("previously allocated devices are no longer healthy"));
    }

    #[test]
    fn a_plugin_that_goes_takes_its_devices_along_and_after_a_while_its_resource() {
        let now = Instant::now();
        let mut table = table(&["ax+", "bx-"]);
        assert_eq!(table.amounts(now)[R], (2, 1));
        table.went(R, now);
        assert_eq!(table.amounts(now + GRACE)[R], (2, 0));
        assert_eq!(table.amounts(now + GRACE + Duration::from_secs(1))[R], (0, 0));
        assert!(!table.manages(R));
        table.came(R, DevicePluginOptions::default());
        assert_eq!(table.listed(R, BTreeMap::new()), BTreeSet::new());
        assert_eq!(table.amounts(now)[R], (0, 0));
        assert!(table.manages(R));
    }

    #[test]
    fn only_pods_with_such_devices_hear_of_their_health() {
        let mut table = table(&["ax+", "bx+"]);
        table.reserve(&need("u1", 1), &ids(&["ax"]));
        table.reserve(&need("u2", 1), &ids(&["bx"]));
        let now =
            [("ax", true), ("bx", false)].map(|(id, is_healthy)| (id.into(), Device { is_healthy, nodes: vec![] }));
        assert_eq!(table.listed(R, now.clone().into()), ids(&["u2"]));
        assert_eq!(table.listed(R, now.into()), ids(&[]));
    }

    #[test]
    fn the_plugin_is_asked_about_what_is_in_the_right_place() {
        let table = table(&["a0+", "b0+", "c1+", "dx+"]);
        let check = |need: &Need<'_>, preferred: Option<&[&str]>, expect: Choice| {
            assert_eq!(table.choose(need, true, preferred.map(ids).as_ref()).unwrap(), expect);
        };
        let on_0 = |count| Need { affinity: Some(Mask::of([0])), ..need("u", count) };
        check(&on_0(1), None, Choice::Ask { available: ids(&["a0", "b0"]), chosen: ids(&[]) });
        check(&on_0(1), Some(&["b0"]), Choice::Take(ids(&["b0"])));
        check(&on_0(1), Some(&["c1"]), Choice::Take(ids(&["a0"])));
        // All that is there is taken; nothing is left to ask about.
        check(&on_0(2), None, Choice::Take(ids(&["a0", "b0"])));
        let rest = Choice::Ask { available: ids(&["a0", "b0", "c1", "dx"]), chosen: ids(&["a0", "b0"]) };
        check(&on_0(3), None, rest);
        check(&on_0(3), Some(&["dx"]), Choice::Take(ids(&["a0", "b0", "dx"])));
        check(&on_0(3), Some(&[]), Choice::Take(ids(&["a0", "b0", "c1"])));
        // What an init container had comes first.
        let again = Need { reusable: ids(&["c1"]), ..on_0(1) };
        check(&again, None, Choice::Take(ids(&["c1"])));
    }

    #[test]
    fn hints_of_devices() {
        let mut table = table(&["a0+", "b0+", "c1+", "d1-"]);
        let machine = Mask::of([0, 1, 2]);
        let check = |table: &Table, need: &Need<'_>, expect: &[(&[usize], bool)]| {
            let Hints::From(hints) = table.hints(need, machine) else { panic!("it matters") };
            let hints: Vec<(Vec<usize>, bool)> =
                hints.iter().map(|hint| (hint.affinity.unwrap().nodes().collect(), hint.preferred)).collect();
            let expect: Vec<(Vec<usize>, bool)> = expect.iter().map(|(nodes, best)| (nodes.to_vec(), *best)).collect();
            assert_eq!(hints, expect);
        };
        check(&table, &need("u", 1), &[(&[0], true), (&[1], true), (&[0, 1], false)]);
        check(&table, &need("u", 2), &[(&[0], true), (&[0, 1], false)]);
        check(&table, &need("u", 4), &[]);
        table.reserve(&need("u", 1), &ids(&["c1"]));
        check(&table, &need("u", 1), &[(&[1], true), (&[0, 1], false)]);
        check(&table, &Need { reusable: ids(&["c1"]), ..need("w", 2) }, &[(&[0, 1], false)]);
        let other = Need { resource: "example.com/other", ..need("u", 1) };
        assert_eq!(table.hints(&other, machine), Hints::Indifferent);
    }
}
