//! Resizing of pods that run: what a pod wants, what its node has granted, and what is in force.
//!
//! ```text
//!   spec ──(does it fit?)──► Allocation ──steps──► control groups: in force
//! ```
//!
//! Only CPU and memory can be resized. A daemon works with the pod as it was granted ([`Allocation::given`]); what the
//! spec wants beyond that waits. What is in force is remembered only where it differs from what was granted.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;
use serde::{Deserialize, Serialize};

use crate::backoff::Backoff;
use crate::qos::QosClass;
use crate::quantity::Quantity;
use crate::resources::{self, List};
use crate::spec::{self, Role};
use crate::view::{Running, Sandbox, View};

/// What can be resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// Memory.
    Memory,
    /// CPU time.
    Cpu,
}

impl Resource {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
        }
    }
}

/// Requests and limits of CPU and memory, as they are written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpu_request: Option<Box<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpu_limit: Option<Box<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_request: Option<Box<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_limit: Option<Box<str>>,
}

impl Sizes {
    /// Those that are written.
    pub fn of(resources: Option<&ResourceRequirements>) -> Self {
        let read =
            |list: Option<&BTreeMap<String, Text>>, name: &str| list?.get(name).map(|text| text.0.as_str().into());
        let requests = resources.and_then(|resources| resources.requests.as_ref());
        let limits = resources.and_then(|resources| resources.limits.as_ref());
        Self {
            cpu_request: read(requests, "cpu"),
            cpu_limit: read(limits, "cpu"),
            memory_request: read(requests, "memory"),
            memory_limit: read(limits, "memory"),
        }
    }

    /// Those of a container, whose limits are the whole pod's where it has none of its own.
    fn effective(own: &Self, whole: &Self) -> Self {
        let mut sizes = own.clone();
        sizes.cpu_limit = sizes.cpu_limit.or_else(|| whole.cpu_limit.clone());
        sizes.memory_limit = sizes.memory_limit.or_else(|| whole.memory_limit.clone());
        sizes
    }

    /// Request and limit of a resource; nothing is zero.
    fn amounts(&self, resource: Resource) -> (i64, i64) {
        let read =
            |text: &Option<Box<str>>| text.as_deref().and_then(|text| Quantity::parse(text).ok()).unwrap_or_default();
        match resource {
            Resource::Cpu => (read(&self.cpu_request).milli(), read(&self.cpu_limit).milli()),
            Resource::Memory => (read(&self.memory_request).units(), read(&self.memory_limit).units()),
        }
    }

    /// Whether they mean the same, however they are written.
    pub fn is_same(&self, other: &Self) -> bool {
        [Resource::Cpu, Resource::Memory].iter().all(|resource| self.amounts(*resource) == other.amounts(*resource))
    }

    /// Takes one resource over from others.
    fn take(&mut self, resource: Resource, from: &Self) {
        match resource {
            Resource::Cpu => {
                self.cpu_request.clone_from(&from.cpu_request);
                self.cpu_limit.clone_from(&from.cpu_limit);
            }
            Resource::Memory => {
                self.memory_request.clone_from(&from.memory_request);
                self.memory_limit.clone_from(&from.memory_limit);
            }
        }
    }

    /// Writes them over those that `resources` has; others are added if `adding`, and removed if these have none.
    fn write(&self, resources: &mut Option<ResourceRequirements>, adding: bool) {
        if *self == Self::of(resources.as_ref()) {
            return;
        }
        let resources = resources.get_or_insert_default();
        let mut put = |list: fn(&mut ResourceRequirements) -> &mut Option<BTreeMap<String, Text>>,
                       name: &str,
                       text: &Option<Box<str>>| {
            let list = list(resources);
            match text {
                Some(text) if adding || list.as_ref().is_some_and(|list| list.contains_key(name)) => {
                    list.get_or_insert_default().insert(name.to_owned(), Text(text.to_string()));
                }
                None if adding => drop(list.as_mut().and_then(|list| list.remove(name))),
                _ => {}
            }
        };
        put(|resources| &mut resources.requests, "cpu", &self.cpu_request);
        put(|resources| &mut resources.requests, "memory", &self.memory_request);
        put(|resources| &mut resources.limits, "cpu", &self.cpu_limit);
        put(|resources| &mut resources.limits, "memory", &self.memory_limit);
    }

    /// As they are shown beside what was granted: only where the granted ones have something.
    pub(crate) fn shown(&self, granted: Option<&ResourceRequirements>) -> Option<ResourceRequirements> {
        let mut shown = granted.cloned();
        if shown.is_some() {
            self.write(&mut shown, false);
        }
        shown
    }

    /// A container with these instead of its own.
    pub fn given(&self, container: &Container) -> Container {
        let mut container = container.clone();
        self.write(&mut container.resources, true);
        container
    }
}

/// What a node has granted a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// The pod as a whole.
    #[serde(default)]
    whole: Sizes,
    /// Its containers, by name, in the order of the spec.
    #[serde(default)]
    containers: Vec<(Box<str>, Sizes)>,
}

impl Allocation {
    /// Everything that the pod asks for.
    pub fn of(pod: &Pod) -> Self {
        let sizes = |(_, one): (Role, &Container)| (one.name.as_str().into(), Sizes::of(one.resources.as_ref()));
        Self {
            whole: Sizes::of(spec::of(pod).resources.as_ref()),
            containers: spec::containers(pod).map(sizes).collect(),
        }
    }

    fn container(&self, name: &str) -> Option<&Sizes> {
        self.containers.iter().find_map(|(other, sizes)| (**other == *name).then_some(sizes))
    }

    /// Whether the pod wants nothing else.
    pub fn covers(&self, pod: &Pod) -> bool {
        self.covers_of(pod, Resource::Cpu) && self.covers_of(pod, Resource::Memory)
    }

    /// Whether the pod wants nothing else of one resource.
    pub fn covers_of(&self, pod: &Pod, resource: Resource) -> bool {
        let same = |granted: &Sizes, wanted: Option<&ResourceRequirements>| {
            granted.amounts(resource) == Sizes::of(wanted).amounts(resource)
        };
        let container = |one: &Container| self.container(&one.name).is_none_or(|own| same(own, one.resources.as_ref()));
        same(&self.whole, spec::of(pod).resources.as_ref()) && spec::containers(pod).all(|(_, one)| container(one))
    }

    /// The pod with what it was granted instead of what it wants; the same one where that is the same.
    pub fn given(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        if *self == Self::of(pod) {
            return pod.clone();
        }
        let mut pod = Pod::clone(pod);
        if let Some(spec) = &mut pod.spec {
            self.whole.write(&mut spec.resources, true);
            for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
                if let Some(granted) = self.container(&container.name) {
                    granted.write(&mut container.resources, true);
                }
            }
        }
        Arc::new(pod)
    }
}

/// How a resize goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Resize {
    /// What the pod wants is not granted.
    pub pending: Option<Pending>,
    /// What was granted is not in force everywhere.
    pub progress: Option<Progress>,
    /// When a step that failed may be tried again.
    pub backoff: Backoff,
}

/// A resize that is not granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Whether it never will be; else it is when there is room.
    pub infeasible: bool,
    /// Why.
    pub message: String,
    /// The generation of the pod that wants it.
    pub generation: Option<i64>,
}

impl Pending {
    /// As the API spells it.
    pub fn reason(&self) -> &'static str {
        if self.infeasible { "Infeasible" } else { "Deferred" }
    }
}

/// A resize that was granted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What went wrong with it last.
    pub error: Option<String>,
    /// The generation of the pod that wanted it.
    pub generation: Option<i64>,
}

impl Resize {
    /// Notes that a step failed; whether that is news.
    pub(crate) fn fail(&mut self, message: String, now: Timestamp) -> bool {
        self.backoff = self.backoff.after_failed_try(now, SignedDuration::from_secs(1), SignedDuration::from_secs(10));
        let progress = self.progress.get_or_insert_default();
        let is_new = progress.error.as_ref() != Some(&message);
        progress.error = Some(message);
        is_new
    }
}

/// One write. They are done in order, and none after one that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The memory limit of the pod's group.
    GroupMemory {
        /// The new limit in bytes, if it is below the one in force.
        lowered: Option<i64>,
    },
    /// The CPU limit of the pod's group.
    GroupQuota,
    /// The CPU share of the pod's group.
    GroupShares,
    /// A resource of a container that runs.
    Container {
        /// Its name.
        name: String,
        /// The run's id.
        id: String,
        /// Which.
        resource: Resource,
        /// What the container runs with from then on.
        sizes: Sizes,
        /// The new memory limit in bytes, if it is below the one in force.
        lowered: Option<i64>,
    },
}

/// The limits of a pod's group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Totals {
    memory: Option<i64>,
    quota: Option<i64>,
    shares: i64,
}

impl Totals {
    fn of(pod: &Pod) -> Self {
        let limit = |name, amount: fn(Quantity) -> i64| {
            let total = amount(resources::of_pod(pod, name, List::Limits));
            (total > 0 && resources::is_limited(pod, name)).then_some(total)
        };
        Self {
            memory: limit("memory", Quantity::units),
            quota: limit("cpu", Quantity::milli),
            shares: resources::of_pod(pod, "cpu", List::Requests).milli(),
        }
    }
}

/// A container that runs, with what is in force and what was granted.
struct Sized<'a> {
    container: &'a Container,
    running: &'a Running,
    have: Sizes,
    want: Sizes,
}

impl Sized<'_> {
    fn differs(&self, resource: Resource) -> bool {
        self.have.amounts(resource) != self.want.amounts(resource)
    }

    /// The resources that change and that the container wants to be restarted for.
    fn needs_restart(&self) -> bool {
        let policies = self.container.resize_policy.iter().flatten();
        let restarting = |resource: Resource| {
            policies.clone().any(|one| one.resource_name == resource.name() && one.restart_policy == "RestartContainer")
        };
        [Resource::Cpu, Resource::Memory].into_iter().any(|resource| self.differs(resource) && restarting(resource))
    }

    /// Memory is written before CPU time.
    fn step(&self, resource: Resource) -> Step {
        let mut sizes = self.have.clone();
        sizes.take(Resource::Memory, &self.want);
        sizes.take(resource, &self.want);
        let ((_, have), (_, want)) = (self.have.amounts(Resource::Memory), self.want.amounts(Resource::Memory));
        let lowered = (resource == Resource::Memory && want > 0 && (have == 0 || want < have)).then_some(want);
        Step::Container { name: self.container.name.clone(), id: self.running.id.clone(), resource, sizes, lowered }
    }

    /// Less is given up before more is taken.
    fn direction(&self, resource: Resource) -> Ordering {
        let ((old_request, old_limit), (request, limit)) = (self.have.amounts(resource), self.want.amounts(resource));
        limit.cmp(&old_limit).then(request.cmp(&old_request))
    }
}

/// The containers that run with something else than was granted.
fn unequal<'a>(pod: &'a Pod, view: &'a View) -> impl Iterator<Item = Sized<'a>> {
    let whole = Sizes::of(spec::of(pod).resources.as_ref());
    spec::containers(pod).filter_map(move |(_, container)| {
        let have = view.record.containers.get(&container.name)?.actuated.as_deref()?.clone();
        let running = view.running(&container.name)?;
        let want = Sizes::effective(&Sizes::of(container.resources.as_ref()), &whole);
        (!have.is_same(&want)).then_some(Sized { container, running, have, want })
    })
}

/// The runs that have to end because their containers want to be restarted with what was granted.
pub(crate) fn restarts<'a>(pod: &'a Pod, view: &'a View) -> impl Iterator<Item = (&'a Container, &'a Running)> {
    unequal(pod, view).filter(Sized::needs_restart).map(|one| (one.container, one.running))
}

/// What is to be written so that what was granted is in force. Where a pod grows its group does first; where it shrinks its
/// group does last.
pub(crate) fn steps(pod: &Pod, view: &View) -> Vec<Step> {
    if !matches!(view.sandbox, Sandbox::Ready { .. }) {
        return Vec::new();
    }
    let want = Totals::of(pod);
    let have = view.record.group.as_ref().map_or(want, |group| Totals::of(&group.given(&Arc::new(pod.clone()))));
    let unequal: Vec<Sized<'_>> = unequal(pod, view).collect();
    let containers = |resource: Resource| {
        let mut changing: Vec<&Sized<'_>> = unequal.iter().filter(|one| one.differs(resource)).collect();
        changing.sort_by_key(|one| one.direction(resource));
        changing.into_iter().map(|one| one.step(resource)).collect::<Vec<_>>()
    };
    // A limit that is new is a smaller one; one that is gone stays, as the kernel's groups have it.
    let grows = |have: Option<i64>, want: Option<i64>| have.zip(want).is_some_and(|(have, want)| want > have);
    let shrinks = |have: Option<i64>, want: Option<i64>| want.is_some() && have != want && !grows(have, want);
    let when = |holds: bool, step: Step| holds.then_some(step);
    let mut steps: Vec<Step> = Vec::new();
    steps.extend(when(grows(have.memory, want.memory), Step::GroupMemory { lowered: None }));
    steps.extend(containers(Resource::Memory));
    steps.extend(when(shrinks(have.memory, want.memory), Step::GroupMemory { lowered: want.memory }));
    steps.extend(when(grows(have.quota, want.quota), Step::GroupQuota));
    steps.extend(when(want.shares > have.shares, Step::GroupShares));
    steps.extend(containers(Resource::Cpu));
    steps.extend(when(want.shares < have.shares, Step::GroupShares));
    steps.extend(when(shrinks(have.quota, want.quota), Step::GroupQuota));
    steps
}

impl View {
    /// Takes in what was granted: `pod` is as it was granted before.
    pub(crate) fn allocate(&mut self, pod: &Pod, allocation: Allocation, generation: Option<i64>) {
        let old = self.record.allocated.take().map_or_else(|| Allocation::of(pod), |old| *old);
        for (name, sizes) in &old.containers {
            let have = Sizes::effective(sizes, &old.whole);
            let want = allocation.container(name).map(|sizes| Sizes::effective(sizes, &allocation.whole));
            if want.is_some_and(|want| !want.is_same(&have)) {
                self.record_of(name).actuated.get_or_insert_with(|| Box::new(have));
            }
        }
        self.record.group.get_or_insert_with(|| Box::new(old));
        self.record.allocated = Some(Box::new(allocation));
        let resize = self.record.resize.get_or_insert_default();
        **resize = Resize { progress: Some(Progress { error: None, generation }), ..Resize::default() };
    }

    /// One step is done.
    pub(crate) fn resized(&mut self, step: Step) {
        let Step::Container { name, id, sizes, .. } = step else { return };
        if self.running(&name).is_some_and(|running| running.id == id) {
            self.record_of(&name).actuated = Some(Box::new(sizes));
        }
    }

    /// Everything that was granted is in force.
    pub(crate) fn resize_done(&mut self) -> Option<Progress> {
        self.record.group = None;
        self.record.containers.values_mut().for_each(|container| container.actuated = None);
        let resize = self.record.resize.as_mut()?;
        let done = resize.progress.take();
        if resize.pending.is_none() {
            self.record.resize = None;
        }
        done
    }
}

/// In which order resizes are granted that wait: those that need no more than they have, then by priority, class, and how
/// long they wait.
pub fn rank(wanted: &Pod, granted: &Pod) -> impl Ord + use<> {
    let more =
        |name| resources::of_pod(wanted, name, List::Requests) > resources::of_pod(granted, name, List::Requests);
    let priority = spec::of(wanted).priority.unwrap_or(0);
    (more("cpu") || more("memory"), std::cmp::Reverse((priority, QosClass::of(wanted))))
}

/// What an event says of a pod's resources: as JSON, with the generation and an error if there is one.
pub fn summary(pod: &Pod, generation: Option<i64>, error: Option<&str>) -> String {
    let list = |containers: &[Container]| -> Vec<serde_json::Value> {
        let one = |one: &Container| serde_json::json!({"name": one.name, "resources": one.resources.clone().unwrap_or_default()});
        containers.iter().map(one).collect()
    };
    let (spec, mut fields) = (spec::of(pod), serde_json::Map::new());
    let init = list(spec.init_containers.as_deref().unwrap_or_default());
    if !init.is_empty() {
        fields.insert("initContainers".to_owned(), init.into());
    }
    fields.insert("containers".to_owned(), list(&spec.containers).into());
    fields.insert("generation".to_owned(), generation.unwrap_or_default().into());
    if let Some(error) = error {
        fields.insert("error".to_owned(), error.into());
    }
    serde_json::Value::Object(fields).to_string()
}

/// What a pod as a whole runs with, as its status shows it: what is written, and what follows from its containers.
pub(crate) fn whole_shown(pod: &Pod, view: &View) -> ResourceRequirements {
    let before = view.record.group.as_ref().map(|group| group.given(&Arc::new(pod.clone())));
    let pod = before.as_deref().unwrap_or(pod);
    let mut shown = spec::of(pod).resources.clone().unwrap_or_default();
    for resource in [Resource::Cpu, Resource::Memory] {
        let name = resource.name();
        let add = |list: &mut Option<BTreeMap<String, Text>>, amount: Quantity| {
            if !amount.is_zero() && list.as_ref().is_none_or(|list| !list.contains_key(name)) {
                list.get_or_insert_default().insert(name.to_owned(), Text(amount.written(resource)));
            }
        };
        add(&mut shown.requests, resources::of_pod(pod, name, List::Requests));
        if resources::is_limited(pod, name) {
            add(&mut shown.limits, resources::of_pod(pod, name, List::Limits));
        }
    }
    shown
}

/// All that a pod was granted to request (`status.allocatedResources`).
pub(crate) fn allocated_shown(pod: &Pod) -> BTreeMap<String, Text> {
    let lists = spec::containers(pod).filter_map(|(_, container)| container.resources.as_ref());
    let lists = lists.chain(spec::of(pod).resources.as_ref()).filter_map(|resources| resources.requests.as_ref());
    let names: std::collections::BTreeSet<&String> = lists.flat_map(BTreeMap::keys).collect();
    let amount = |name: &String| {
        let resource = if name == "cpu" { Resource::Cpu } else { Resource::Memory };
        let whole = spec::of(pod).resources.as_ref().and_then(|whole| whole.requests.as_ref()?.get(name));
        whole.cloned().unwrap_or_else(|| Text(resources::of_pod(pod, name, List::Requests).written(resource)))
    };
    names.into_iter().map(|name| (name.clone(), amount(name))).collect()
}

impl Quantity {
    /// As the API writes it: thousandths of a CPU, binary multiples of a byte.
    fn written(self, resource: Resource) -> String {
        let units = self.units();
        match resource {
            Resource::Cpu if self.milli() % 1000 != 0 => format!("{}m", self.milli()),
            Resource::Cpu => units.to_string(),
            Resource::Memory => {
                let suffixes = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
                let fits = suffixes.iter().find(|(shift, _)| units != 0 && units % (1 << shift) == 0);
                fits.map_or_else(|| units.to_string(), |(shift, suffix)| format!("{}{suffix}", units >> shift))
            }
        }
    }
}
