//! The CPU manager's static policy: containers of Guaranteed pods that ask for whole CPUs get them for themselves, all
//! others share the rest. Pure, but for the file.

pub(super) mod live;
mod saved;
mod set;
mod take;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use pod::{QosClass, spec};

use super::checkpoint;
use super::topology::{Hint, Hints, Machine, Mask};
use crate::qos::{self, List};
pub(super) use saved::NAME;
pub use set::{CpuSet, ParseError};

/// What the operator chose beside the policy (`cpuManagerPolicyOptions`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// `full-pcpus-only`: no core is shared by two containers.
    pub full_pcpus_only: bool,
    /// `distribute-cpus-across-numa`
    pub distribute_across_numa: bool,
    /// `align-by-socket`
    pub align_by_socket: bool,
    /// `distribute-cpus-across-cores`
    pub distribute_across_cores: bool,
    /// `strict-cpu-reservation`: reserved CPUs are no container's at all.
    pub strict_reservation: bool,
    /// `prefer-align-cpus-by-uncorecache`
    pub prefer_align_by_cache: bool,
}

impl Options {
    /// Reads what was written by name.
    ///
    /// # Errors
    /// What is unknown, or cannot be together.
    pub fn parse(written: &BTreeMap<String, String>) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, value) in written {
            let option = match name.as_str() {
                "full-pcpus-only" => &mut options.full_pcpus_only,
                "distribute-cpus-across-numa" => &mut options.distribute_across_numa,
                "align-by-socket" => &mut options.align_by_socket,
                "distribute-cpus-across-cores" => &mut options.distribute_across_cores,
                "strict-cpu-reservation" => &mut options.strict_reservation,
                "prefer-align-cpus-by-uncorecache" => &mut options.prefer_align_by_cache,
                _ => return Err(format!("there is no option {name:?}")),
            };
            *option = value.parse().map_err(|_| format!("{name}: {value:?} is neither true nor false"))?;
        }
        let cores = options.distribute_across_cores;
        for (other, name) in [
            (options.full_pcpus_only, "full-pcpus-only"),
            (options.distribute_across_numa, "distribute-cpus-across-numa"),
            (options.prefer_align_by_cache, "prefer-align-cpus-by-uncorecache"),
        ] {
            if cores && other {
                return Err(format!("{name} and distribute-cpus-across-cores cannot be used at the same time"));
            }
        }
        if options.prefer_align_by_cache && options.distribute_across_numa {
            return Err(
                "prefer-align-cpus-by-uncorecache and distribute-cpus-across-numa cannot be used at the same time"
                    .into(),
            );
        }
        Ok(options)
    }
}

/// Configuration of the static policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Static {
    /// Options.
    pub options: Options,
    /// CPUs that are kept for the system.
    pub reserved: Reserved,
}

/// CPUs that are kept for the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserved {
    /// These (`reservedSystemCPUs`).
    Named(CpuSet),
    /// So many.
    Count(usize),
}

impl Default for Reserved {
    fn default() -> Self {
        Self::Count(0)
    }
}

/// Why a container gets no CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CpuError {
    #[error("not enough cpus available to satisfy request: requested={requested}, available={available}")]
    TooFew { requested: usize, available: usize },
    #[error("SMT Alignment Error: requested {requested} cpus not multiple cpus per core = {per_core}")]
    BrokenCore { requested: usize, per_core: usize },
    #[error(
        "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = {available}, requested CPUs = \
         {requested}, CPUs per core = {per_core}"
    )]
    TooFewCores { requested: usize, available: usize, per_core: usize },
}

/// CPUs by pod's uid and container.
pub(crate) type Given = BTreeMap<String, BTreeMap<String, CpuSet>>;

/// Who has which CPUs.
#[derive(Debug)]
pub(crate) struct Cpus {
    machine: Arc<Machine>,
    options: Options,
    reserved: CpuSet,
    /// What all share who have none of their own.
    shared: CpuSet,
    given: Given,
}

impl Cpus {
    /// Nobody has anything yet.
    ///
    /// # Errors
    /// What cannot be reserved.
    pub(crate) fn new(machine: Arc<Machine>, config: &Static) -> Result<Self, String> {
        let all = machine.all();
        let reserved = match &config.reserved {
            Reserved::Named(named) if named.is_subset(&all) => named.clone(),
            Reserved::Named(named) => {
                return Err(format!("reservedSystemCPUs: {named} are not all among this machine's CPUs, {all}"));
            }
            Reserved::Count(count) => {
                take::take(&machine, &config.options, &all, *count).map_err(|error| error.to_string())?
            }
        };
        if reserved.is_empty() {
            return Err("the static policy needs CPUs for the system: set reservedSystemCPUs, or reserve some cpu by \
                        systemReserved or kubeReserved"
                .to_owned());
        }
        let options = config.options.clone();
        let mut cpus = Self { machine, options, reserved, shared: CpuSet::default(), given: Given::new() };
        cpus.shared = cpus.sharable();
        Ok(cpus)
    }

    /// Takes over what was given before, but for CPUs that are not there any more or that two have: their containers share.
    pub(crate) fn recall(&mut self, given: Given) {
        let all = self.machine.all();
        for (uid, containers) in given {
            let others: CpuSet = self.given.values().flat_map(BTreeMap::values).flat_map(CpuSet::iter).collect();
            // Containers of one pod may have the same: init containers are not there at the same time.
            let fits = |cpus: &CpuSet| cpus.is_subset(&all) && cpus.and(&others.or(&self.reserved)).is_empty();
            let (kept, lost): (BTreeMap<_, _>, BTreeMap<_, _>) =
                containers.into_iter().partition(|(_, cpus)| fits(cpus));
            for (container, cpus) in lost {
                tracing::warn!(uid, container, %cpus, "CPUs that a container had cannot be its own any more; it shares");
            }
            if !kept.is_empty() {
                self.given.insert(uid, kept);
            }
        }
        self.share();
    }

    /// All that could be shared, if nobody had any of his own.
    fn sharable(&self) -> CpuSet {
        let all = self.machine.all();
        if self.options.strict_reservation { all.without(&self.reserved) } else { all }
    }

    fn share(&mut self) {
        let own: CpuSet = self.given.values().flat_map(BTreeMap::values).flat_map(CpuSet::iter).collect();
        self.shared = self.sharable().without(&own);
    }

    /// What can be given away.
    fn available(&self) -> CpuSet {
        self.shared.without(&self.reserved)
    }

    /// All that could be given away, if nobody had anything.
    pub(crate) fn allocatable(&self) -> CpuSet {
        self.machine.all().without(&self.reserved)
    }

    /// Gives `count` CPUs to a container, from `affinity` as far as possible. It may have `reusable` ones of its pod.
    pub(crate) fn give(
        &mut self,
        (uid, container): (&str, &str),
        count: usize,
        affinity: Option<Mask>,
        reusable: &CpuSet,
    ) -> Result<(), CpuError> {
        if self.of(uid, container).is_some() {
            return Ok(());
        }
        self.keep_cores_whole(count)?;
        let free = self.available().or(reusable);
        let aligned = affinity.map(|nodes| self.aligned(nodes, &free)).unwrap_or_default();
        let first = take::take(&self.machine, &self.options, &aligned, count.min(aligned.len()))?;
        let rest = take::take(&self.machine, &self.options, &free.without(&first), count - first.len())?;
        let containers = self.given.entry(uid.to_owned()).or_default();
        containers.insert(container.to_owned(), first.or(&rest));
        self.share();
        Ok(())
    }

    /// A container runs on CPUs of its own, though nothing is written of it: it keeps them, if they are as many as it is to
    /// have and nobody else's. Returns whether it does.
    pub(crate) fn restore(&mut self, (uid, container): (&str, &str), count: usize, cpus: CpuSet) -> bool {
        let fits = self.of(uid, container).is_none() && cpus.len() == count && cpus.is_subset(&self.available());
        if fits {
            self.given.entry(uid.to_owned()).or_default().insert(container.to_owned(), cpus);
            self.share();
        }
        fits
    }

    /// CPUs in these nodes, or in the sockets that they are in.
    fn aligned(&self, nodes: Mask, free: &CpuSet) -> CpuSet {
        let sockets = self.sockets(nodes);
        let by_socket = self.options.align_by_socket;
        let fits = |place: &super::topology::Place| {
            if by_socket { sockets.contains(&place.socket) } else { nodes.contains(place.node) }
        };
        self.machine.cpus_where(fits).and(free)
    }

    fn sockets(&self, nodes: Mask) -> std::collections::BTreeSet<usize> {
        let within = self.machine.cpus.values().filter(|place| nodes.contains(place.node));
        within.map(|place| place.socket).collect()
    }

    fn keep_cores_whole(&self, requested: usize) -> Result<(), CpuError> {
        if !self.options.full_pcpus_only {
            return Ok(());
        }
        let per_core = self.machine.cpus_per_core();
        if !requested.is_multiple_of(per_core) {
            return Err(CpuError::BrokenCore { requested, per_core });
        }
        let cores: Vec<usize> =
            self.reserved.iter().filter_map(|cpu| Some(self.machine.cpus.get(&cpu)?.core)).collect();
        let available = self.shared.without(&self.machine.cpus_where(|place| cores.contains(&place.core))).len();
        if requested > available {
            return Err(CpuError::TooFewCores { requested, available, per_core });
        }
        Ok(())
    }

    /// From which NUMA nodes `count` CPUs can come.
    pub(crate) fn hints(&self, count: usize, reusable: &CpuSet) -> Hints {
        let available = self.available();
        let in_nodes = |cpus: &CpuSet, nodes: Mask| {
            cpus.iter().filter(|cpu| self.machine.cpus.get(cpu).is_some_and(|place| nodes.contains(place.node))).count()
        };
        let sets = self.machine.mask().subsets();
        let all = self.machine.all();
        let fewest = sets.iter().filter(|nodes| in_nodes(&all, **nodes) >= count).map(|nodes| nodes.count()).min();
        let fewest = fewest.unwrap_or_else(|| self.machine.mask().count());
        let fits = |nodes: &Mask| {
            in_nodes(reusable, *nodes) == reusable.len()
                && reusable.len() + in_nodes(&available.without(reusable), *nodes) >= count
        };
        let hint = |nodes: Mask| {
            let preferred =
                nodes.count() == fewest || (self.options.align_by_socket && self.fills_sockets(nodes, fewest));
            Hint { affinity: Some(nodes), preferred }
        };
        Hints::From(sets.into_iter().filter(fits).map(hint).collect())
    }

    /// Whether nodes are in no more sockets than the fewest nodes need.
    fn fills_sockets(&self, nodes: Mask, fewest: u32) -> bool {
        let per_socket = self.machine.node_count().checked_div(self.machine.socket_count()).unwrap_or(0);
        per_socket > 0 && self.sockets(nodes).len() == (fewest as usize).div_ceil(per_socket)
    }

    /// A container's own CPUs.
    pub(crate) fn of(&self, uid: &str, container: &str) -> Option<&CpuSet> {
        self.given.get(uid)?.get(container)
    }

    /// What a container may run on.
    pub(crate) fn usable(&self, uid: &str, container: &str) -> &CpuSet {
        self.of(uid, container).unwrap_or(&self.shared)
    }

    /// Whether a container of a pod has CPUs of its own.
    pub(crate) fn has_own(&self, uid: &str) -> bool {
        self.given.contains_key(uid)
    }

    /// Takes back what a pod has; whether that was anything.
    pub(crate) fn release(&mut self, uid: &str) -> bool {
        let had = self.given.remove(uid).is_some();
        self.share();
        had
    }

    /// The pods that have something.
    pub(crate) fn holders(&self) -> impl Iterator<Item = &String> {
        self.given.keys()
    }

    /// Keeps in `dir` what is given.
    pub(crate) fn save(&self, dir: &Path) {
        let path = dir.join(NAME);
        if let Err(error) = checkpoint::save(&path, &saved::write(&self.shared, &self.given)) {
            tracing::error!(path = %path.display(), %error, "which containers have CPUs of their own cannot be kept");
        }
    }

    /// What was kept in `dir`.
    pub(crate) fn load(dir: &Path) -> Given {
        checkpoint::load(&dir.join(NAME), saved::read).unwrap_or_default()
    }
}

/// How many CPUs a container is to have for itself.
pub(crate) fn whole_cpus(pod: &Pod, container: &Container) -> usize {
    // Resources of a pod as a whole are shared by its containers.
    let whole = spec::of(pod).resources.is_none() && QosClass::of(pod) == QosClass::Guaranteed;
    let milli = qos::of_container(container, "cpu", List::Requests).map_or(0, |amount| amount.milli());
    let count = usize::try_from(milli / 1000).unwrap_or(0);
    if whole && milli % 1000 == 0 { count } else { 0 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resources::topology::samples::machine;

    fn cpus(machine: Machine, options: Options, reserved: &str) -> Cpus {
        Cpus::new(Arc::new(machine), &Static { options, reserved: Reserved::Named(reserved.parse().unwrap()) }).unwrap()
    }

    fn give(cpus: &mut Cpus, uid: &str, count: usize, nodes: &[usize]) -> Result<String, CpuError> {
        let affinity = (!nodes.is_empty()).then(|| Mask::of(nodes.iter().copied()));
        cpus.give((uid, "c"), count, affinity, &CpuSet::default())?;
        Ok(cpus.of(uid, "c").unwrap().to_string())
    }

    #[test]
    fn who_runs_on_cpus_of_its_own_keeps_them() {
        let mut cpus = cpus(machine(1, 1, 4, 1, 0), Options::default(), "0");
        let mut restore = |uid, count, own: &str| cpus.restore((uid, "c"), count, own.parse().unwrap());
        assert!(restore("a", 2, "1-2"));
        assert!(!restore("a", 1, "3"), "it has some");
        assert!(!restore("b", 2, "2-3") && !restore("b", 1, "0"), "they are others'");
        assert!(!restore("b", 1, "1,3") && !restore("b", 2, "3"), "they are not as many");
        assert_eq!(cpus.shared.to_string(), "0,3");
    }

    #[test]
    fn what_is_given_leaves_the_shared_pool_and_comes_back() {
        let mut cpus = cpus(machine(1, 1, 4, 2, 0), Options::default(), "0");
        assert_eq!(cpus.usable("u", "c").to_string(), "0-7");
        assert_eq!(give(&mut cpus, "u", 2, &[]).unwrap(), "1,5");
        assert_eq!(
            (cpus.usable("u", "c").to_string(), cpus.usable("v", "c").to_string()),
            ("1,5".into(), "0,2-4,6-7".into())
        );
        assert_eq!(give(&mut cpus, "v", 6, &[]), Err(CpuError::TooFew { requested: 6, available: 5 }));
        assert!(!cpus.has_own("v"));
        assert!(cpus.release("u") && !cpus.release("u"));
        assert_eq!(cpus.usable("v", "c").to_string(), "0-7");
    }

    #[test]
    fn reserved_cpus_are_shared_unless_that_is_forbidden() {
        let strict = Options { strict_reservation: true, ..Options::default() };
        let mut cpus = cpus(machine(1, 1, 4, 1, 0), strict, "0");
        assert_eq!(cpus.usable("u", "c").to_string(), "1-3");
        assert_eq!(give(&mut cpus, "u", 3, &[]).unwrap(), "1-3");
        let counted = Static { reserved: Reserved::Count(2), ..Static::default() };
        let counted = Cpus::new(Arc::new(machine(1, 1, 4, 2, 0)), &counted).unwrap();
        assert_eq!(counted.allocatable().to_string(), "1-3,5-7");
        for reserved in [Reserved::Count(0), Reserved::Named("9".parse().unwrap())] {
            assert!(Cpus::new(Arc::new(machine(1, 1, 4, 2, 0)), &Static { reserved, ..Static::default() }).is_err());
        }
    }

    #[test]
    fn cores_stay_whole() {
        let whole = Options { full_pcpus_only: true, ..Options::default() };
        let mut cpus = cpus(machine(1, 1, 4, 2, 0), whole, "0");
        let error = give(&mut cpus, "u", 1, &[]).unwrap_err().to_string();
        assert_eq!(error, "SMT Alignment Error: requested 1 cpus not multiple cpus per core = 2");
        let too_few = CpuError::TooFewCores { requested: 8, available: 6, per_core: 2 };
        assert_eq!(give(&mut cpus, "u", 8, &[]), Err(too_few));
        assert_eq!(give(&mut cpus, "u", 2, &[]).unwrap(), "1,5");
    }

    #[test]
    fn nodes_are_respected() {
        let mut cpus = cpus(machine(2, 1, 2, 1, 0), Options::default(), "0");
        let hint = |nodes: &[usize], preferred| Hint { affinity: Some(Mask::of(nodes.iter().copied())), preferred };
        assert_eq!(cpus.hints(2, &CpuSet::default()), Hints::From(vec![hint(&[1], true), hint(&[0, 1], false)]));
        assert_eq!(give(&mut cpus, "u", 1, &[1]).unwrap(), "2");
        assert_eq!(give(&mut cpus, "v", 2, &[1]).unwrap(), "1,3");
        assert_eq!(cpus.hints(1, &CpuSet::default()), Hints::From(vec![]));
        let reusable = "2".parse().unwrap();
        assert_eq!(cpus.hints(1, &reusable), Hints::From(vec![hint(&[1], true), hint(&[0, 1], false)]));
    }

    #[test]
    fn what_two_have_or_nobody_can_have_is_shared() {
        let mut cpus = cpus(machine(1, 1, 4, 1, 0), Options::default(), "0");
        let given = |pairs: &[(&str, &str)]| -> Given {
            let of = |cpus: &str| [("c".to_owned(), cpus.parse().unwrap())].into();
            pairs.iter().map(|(uid, cpus)| ((*uid).to_owned(), of(cpus))).collect()
        };
        cpus.recall(given(&[("a", "1"), ("b", "1-2"), ("c", "3,9"), ("d", "0"), ("e", "3")]));
        assert_eq!(cpus.given, given(&[("a", "1"), ("e", "3")]));
        assert_eq!(cpus.shared.to_string(), "0,2");
    }

    #[test]
    fn whole_cpus_are_for_guaranteed_pods() {
        let pod = |resources: serde_json::Value| -> Pod {
            let spec = json!({"containers": [{"name": "c", "resources": resources}]});
            serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
        };
        for (resources, expect) in [
            (json!({"limits": {"cpu": "2", "memory": "1Gi"}}), 2),
            (json!({"limits": {"cpu": "1500m", "memory": "1Gi"}}), 0),
            (json!({"requests": {"cpu": "2"}, "limits": {"cpu": "2"}}), 0),
            (json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "1Gi"}}), 0),
        ] {
            let pod = pod(resources);
            assert_eq!(whole_cpus(&pod, &pod.spec.as_ref().unwrap().containers[0]), expect, "{pod:?}");
        }
    }

    #[test]
    fn options_that_cannot_be() {
        let parse = |pairs: &[(&str, &str)]| {
            Options::parse(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
        };
        assert!(parse(&[("full-pcpus-only", "true"), ("strict-cpu-reservation", "false")]).unwrap().full_pcpus_only);
        assert!(parse(&[("full-pcpus", "true")]).is_err());
        assert!(parse(&[("full-pcpus-only", "yes")]).is_err());
        assert!(parse(&[("full-pcpus-only", "true"), ("distribute-cpus-across-cores", "true")]).is_err());
    }
}
