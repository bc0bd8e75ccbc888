//! What several plugins want of one container, put together.
//!
//! Each plugin sees the container as those before it want it. What one has set another may not set as well, unless it removes
//! it first: then the two know of each other. A name that begins with a dash is one to remove (containerd/nri
//! `pkg/adaptation/result.go`).

use std::collections::BTreeMap;

use crate::api::{self, Container, ContainerAdjustment, ContainerUpdate, Field, LinuxResources};
use crate::plugin::PluginError;

/// What comes before the name of something that is to be removed.
const REMOVAL: char = '-';

/// The name of what is to be removed, if that is what a name says.
pub fn removal(name: &str) -> Option<&str> {
    name.strip_prefix(REMOVAL)
}

/// What a container that is being made should be, and what others should.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Creation {
    /// Changes to the container.
    pub adjust: ContainerAdjustment,
    /// Changes to others.
    pub updates: Vec<ContainerUpdate>,
}

/// Who has set what: container, field, and the entry of a field that has several.
#[derive(Debug, Default)]
struct Owners(BTreeMap<(String, i32, String), String>);

impl Owners {
    fn claim(&mut self, id: &str, field: Field, entry: &str, plugin: &str) -> Result<(), PluginError> {
        let key = (id.to_owned(), field as i32, entry.to_owned());
        match self.0.get(&key) {
            Some(owner) if owner != plugin => {
                let what = if entry.is_empty() {
                    format!("{field:?} of container {id}")
                } else {
                    format!("{field:?} {entry:?} of container {id}")
                };
                Err(PluginError::Conflict { first: owner.clone(), second: plugin.to_owned(), what })
            }
            _ => {
                self.0.insert(key, plugin.to_owned());
                Ok(())
            }
        }
    }

    fn clear(&mut self, id: &str, field: Field, entry: &str) {
        self.0.remove(&(id.to_owned(), field as i32, entry.to_owned()));
    }

    /// As plugins are told of it.
    fn told(&self) -> api::OwningPlugins {
        let mut all = api::OwningPlugins::default();
        for ((id, field, entry), plugin) in &self.0 {
            let owners = all.owners.entry(id.clone()).or_default();
            if entry.is_empty() {
                owners.simple.insert(*field, plugin.clone());
            } else {
                owners.compound.entry(*field).or_default().owners.insert(entry.clone(), plugin.clone());
            }
        }
        all
    }
}

/// The making of one container.
#[derive(Debug)]
pub(crate) struct Merge {
    container: Container,
    adjust: ContainerAdjustment,
    others: Update,
}

impl Merge {
    pub(crate) fn new(mut container: Container) -> Self {
        container.linux.get_or_insert_default();
        container.hooks.get_or_insert_default();
        let mut adjust = ContainerAdjustment::default();
        adjust.hooks.get_or_insert_default();
        adjust.linux.get_or_insert_default().resources.get_or_insert_default();
        Self { container, adjust, others: Update::new("", LinuxResources::default()) }
    }

    /// The container as plugins want it so far.
    pub(crate) fn container(&self) -> &Container {
        &self.container
    }

    pub(crate) fn adjustment(&self) -> &ContainerAdjustment {
        &self.adjust
    }

    pub(crate) fn updates(&self) -> Vec<ContainerUpdate> {
        self.others.others.values().cloned().collect()
    }

    pub(crate) fn owners(&self) -> api::OwningPlugins {
        self.others.owners.told()
    }

    pub(crate) fn finish(self) -> Creation {
        Creation { adjust: self.adjust, updates: self.others.others.into_values().collect() }
    }

    pub(crate) fn update_others(&mut self, updates: Vec<ContainerUpdate>, plugin: &str) -> Result<(), PluginError> {
        if updates.iter().any(|update| update.container_id == self.container.id) {
            let message = "it updates the container that is being made, which it can adjust".to_owned();
            return Err(PluginError::Refused { plugin: plugin.to_owned(), message });
        }
        self.others.apply(updates, plugin)
    }

    fn claim(&mut self, field: Field, entry: &str, plugin: &str) -> Result<(), PluginError> {
        self.others.owners.claim(&self.container.id, field, entry, plugin)
    }

    fn clear(&mut self, field: Field, entry: &str) {
        self.others.owners.clear(&self.container.id, field, entry);
    }

    /// Adds what a plugin wants.
    pub(crate) fn adjust(&mut self, wanted: ContainerAdjustment, plugin: &str) -> Result<(), PluginError> {
        self.annotations(wanted.annotations, plugin)?;
        self.mounts(wanted.mounts, plugin)?;
        self.environment(wanted.env, plugin)?;
        self.arguments(wanted.args, plugin)?;
        self.hooks(wanted.hooks.unwrap_or_default());
        for limit in wanted.rlimits {
            self.claim(Field::Rlimits, &limit.r#type, plugin)?;
            replace(&mut self.container.rlimits, limit.clone(), |one| one.r#type == limit.r#type);
            replace(&mut self.adjust.rlimits, limit.clone(), |one| one.r#type == limit.r#type);
        }
        for device in wanted.cdi_devices {
            self.claim(Field::CdiDevices, &device.name, plugin)?;
            self.container.cdi_devices.push(device.clone());
            self.adjust.cdi_devices.push(device);
        }
        self.linux(wanted.linux.unwrap_or_default(), plugin)
    }

    fn annotations(
        &mut self,
        wanted: impl IntoIterator<Item = (String, String)>,
        plugin: &str,
    ) -> Result<(), PluginError> {
        let (removed, set): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(name, _)| removal(name).is_some());
        for (name, _) in removed {
            let gone = removal(&name).unwrap_or_default();
            self.clear(Field::Annotations, gone);
            self.container.annotations.remove(gone);
            self.adjust.annotations.remove(gone);
            self.adjust.annotations.insert(name, String::new());
        }
        for (name, value) in set {
            self.claim(Field::Annotations, &name, plugin)?;
            self.container.annotations.insert(name.clone(), value.clone());
            self.adjust.annotations.insert(name, value);
        }
        Ok(())
    }

    fn mounts(&mut self, wanted: Vec<api::Mount>, plugin: &str) -> Result<(), PluginError> {
        let (removed, set): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|mount| removal(&mount.destination).is_some());
        for mount in removed {
            let gone = removal(&mount.destination).unwrap_or_default();
            self.clear(Field::Mounts, gone);
            self.container.mounts.retain(|one| one.destination != gone);
            self.adjust.mounts.retain(|one| one.destination != gone);
            self.adjust.mounts.push(mount);
        }
        for mount in set {
            self.claim(Field::Mounts, &mount.destination, plugin)?;
            replace(&mut self.container.mounts, mount.clone(), |one| one.destination == mount.destination);
            replace(&mut self.adjust.mounts, mount.clone(), |one| one.destination == mount.destination);
        }
        Ok(())
    }

    fn environment(&mut self, wanted: Vec<api::KeyValue>, plugin: &str) -> Result<(), PluginError> {
        let (removed, set): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|one| removal(&one.key).is_some());
        let is = |entry: &str, key: &str| entry.strip_prefix(key).is_some_and(|rest| rest.starts_with('='));
        for variable in removed {
            let gone = removal(&variable.key).unwrap_or_default().to_owned();
            self.clear(Field::Env, &gone);
            self.container.env.retain(|entry| !is(entry, &gone));
            self.adjust.env.retain(|one| one.key != gone);
            self.adjust.env.push(variable);
        }
        for variable in set {
            self.claim(Field::Env, &variable.key, plugin)?;
            let entry = format!("{}={}", variable.key, variable.value);
            replace(&mut self.container.env, entry, |entry| is(entry, &variable.key));
            replace(&mut self.adjust.env, variable.clone(), |one| one.key == variable.key);
        }
        Ok(())
    }

    /// An empty first word says that those of the plugins before are meant to go.
    fn arguments(&mut self, mut wanted: Vec<String>, plugin: &str) -> Result<(), PluginError> {
        if wanted.is_empty() {
            return Ok(());
        }
        if wanted[0].is_empty() {
            self.clear(Field::Args, "");
            wanted.remove(0);
        }
        self.claim(Field::Args, "", plugin)?;
        self.container.args.clone_from(&wanted);
        self.adjust.args = wanted;
        Ok(())
    }

    /// Those of all plugins are run.
    fn hooks(&mut self, wanted: api::Hooks) {
        for to in [&mut self.container.hooks, &mut self.adjust.hooks] {
            let to = to.get_or_insert_default();
            to.prestart.extend(wanted.prestart.iter().cloned());
            to.create_runtime.extend(wanted.create_runtime.iter().cloned());
            to.create_container.extend(wanted.create_container.iter().cloned());
            to.start_container.extend(wanted.start_container.iter().cloned());
            to.poststart.extend(wanted.poststart.iter().cloned());
            to.poststop.extend(wanted.poststop.iter().cloned());
        }
    }

    fn linux(&mut self, wanted: api::LinuxContainerAdjustment, plugin: &str) -> Result<(), PluginError> {
        self.devices(wanted.devices, plugin)?;
        self.namespaces(wanted.namespaces, plugin)?;
        self.sysctls(wanted.sysctl, plugin)?;
        if let Some(resources) = &wanted.resources {
            let id = self.container.id.clone();
            let to = self.adjust.linux.get_or_insert_default().resources.get_or_insert_default();
            merge_resources(&mut self.others.owners, &id, to, resources, plugin)?;
            let to = self.container.linux.get_or_insert_default().resources.get_or_insert_default();
            merge_resources(&mut Owners::default(), &id, to, resources, plugin)?;
            // Rules are a list that is read in order: each plugin's come after those before it, and nobody owns one.
            self.both(|adjust, linux| {
                adjust.resources.get_or_insert_default().devices.extend(resources.devices.iter().cloned());
                linux.resources.get_or_insert_default().devices.extend(resources.devices.iter().cloned());
            });
        }
        if !wanted.cgroups_path.is_empty() {
            self.claim(Field::CgroupsPath, "", plugin)?;
            self.both(|adjust, linux| {
                adjust.cgroups_path.clone_from(&wanted.cgroups_path);
                linux.cgroups_path.clone_from(&wanted.cgroups_path);
            });
        }
        for (name, device) in wanted.net_devices {
            self.claim(Field::LinuxNetDevices, &name, plugin)?;
            self.both(|adjust, _| drop(adjust.net_devices.insert(name.clone(), device.clone())));
        }
        if let Some(score) = wanted.oom_score_adj {
            self.claim(Field::OomScoreAdj, "", plugin)?;
            self.both(|adjust, linux| (adjust.oom_score_adj, linux.oom_score_adj) = (Some(score), Some(score)));
        }
        if let Some(priority) = wanted.io_priority {
            self.claim(Field::IoPriority, "", plugin)?;
            self.both(|adjust, linux| (adjust.io_priority, linux.io_priority) = (Some(priority), Some(priority)));
        }
        if let Some(policy) = wanted.seccomp_policy {
            self.claim(Field::SeccompPolicy, "", plugin)?;
            self.both(|adjust, linux| {
                (adjust.seccomp_policy, linux.seccomp_policy) = (Some(policy.clone()), Some(policy.clone()));
            });
        }
        if let Some(scheduler) = wanted.scheduler {
            self.claim(Field::LinuxSched, "", plugin)?;
            self.both(|adjust, linux| {
                (adjust.scheduler, linux.scheduler) = (Some(scheduler.clone()), Some(scheduler.clone()));
            });
        }
        if let Some(rdt) = wanted.rdt {
            self.claim(Field::RdtClosId, "", plugin)?;
            self.both(|adjust, _| adjust.rdt = Some(rdt.clone()));
        }
        if let Some(policy) = wanted.memory_policy {
            self.claim(Field::MemoryPolicy, "", plugin)?;
            self.both(|adjust, _| adjust.memory_policy = Some(policy.clone()));
        }
        Ok(())
    }

    /// Changes what is asked for, and the container as it is shown.
    fn both(&mut self, change: impl FnOnce(&mut api::LinuxContainerAdjustment, &mut api::LinuxContainer)) {
        change(self.adjust.linux.get_or_insert_default(), self.container.linux.get_or_insert_default());
    }

    fn devices(&mut self, wanted: Vec<api::LinuxDevice>, plugin: &str) -> Result<(), PluginError> {
        let (removed, set): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|one| removal(&one.path).is_some());
        for device in removed {
            let gone = removal(&device.path).unwrap_or_default().to_owned();
            self.clear(Field::Devices, &gone);
            self.both(|adjust, linux| {
                linux.devices.retain(|one| one.path != gone);
                adjust.devices.retain(|one| one.path != gone);
                adjust.devices.push(device);
            });
        }
        for device in set {
            self.claim(Field::Devices, &device.path, plugin)?;
            self.both(|adjust, linux| {
                replace(&mut linux.devices, device.clone(), |one| one.path == device.path);
                replace(&mut adjust.devices, device.clone(), |one| one.path == device.path);
            });
        }
        Ok(())
    }

    fn namespaces(&mut self, wanted: Vec<api::LinuxNamespace>, plugin: &str) -> Result<(), PluginError> {
        for namespace in wanted {
            let kind = removal(&namespace.r#type).unwrap_or(&namespace.r#type).to_owned();
            self.claim(Field::Namespace, &kind, plugin)?;
            self.both(|adjust, linux| {
                linux.namespaces.retain(|one| one.r#type != kind);
                if kind == namespace.r#type {
                    linux.namespaces.push(namespace.clone());
                }
                adjust.namespaces.push(namespace);
            });
        }
        Ok(())
    }

    fn sysctls(&mut self, wanted: impl IntoIterator<Item = (String, String)>, plugin: &str) -> Result<(), PluginError> {
        let (removed, set): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(name, _)| removal(name).is_some());
        for (name, _) in removed {
            let gone = removal(&name).unwrap_or_default().to_owned();
            self.clear(Field::Sysctl, &gone);
            self.both(|adjust, linux| {
                linux.sysctl.remove(&gone);
                adjust.sysctl.remove(&gone);
                adjust.sysctl.insert(name, String::new());
            });
        }
        for (name, value) in set {
            self.claim(Field::Sysctl, &name, plugin)?;
            self.both(|adjust, linux| {
                linux.sysctl.insert(name.clone(), value.clone());
                adjust.sysctl.insert(name, value);
            });
        }
        Ok(())
    }
}

/// New limits of one container, and of others.
#[derive(Debug)]
pub(crate) struct Update {
    id: String,
    owners: Owners,
    resources: LinuxResources,
    others: BTreeMap<String, ContainerUpdate>,
}

impl Update {
    pub(crate) fn new(id: &str, resources: LinuxResources) -> Self {
        Self { id: id.to_owned(), owners: Owners::default(), resources, others: BTreeMap::new() }
    }

    pub(crate) fn resources(&self) -> LinuxResources {
        self.resources.clone()
    }

    /// Adds what a plugin wants.
    pub(crate) fn apply(&mut self, wanted: Vec<ContainerUpdate>, plugin: &str) -> Result<(), PluginError> {
        for update in wanted {
            let id = update.container_id.clone();
            let Some(resources) = update.linux.and_then(|linux| linux.resources) else { continue };
            if id == self.id {
                merge_resources(&mut self.owners, &id, &mut self.resources, &resources, plugin)?;
                continue;
            }
            let known = self.others.entry(id.clone()).or_insert_with(|| ContainerUpdate {
                container_id: id.clone(),
                ignore_failure: true,
                ..ContainerUpdate::default()
            });
            known.ignore_failure &= update.ignore_failure;
            let to = known.linux.get_or_insert_default().resources.get_or_insert_default();
            merge_resources(&mut self.owners, &id, to, &resources, plugin)?;
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> (LinuxResources, Vec<ContainerUpdate>) {
        (self.resources, self.others.into_values().collect())
    }
}

/// Takes what `from` sets. Rules of devices are for containers that are made, see [`Merge::linux`].
fn merge_resources(
    owners: &mut Owners,
    id: &str,
    to: &mut LinuxResources,
    from: &LinuxResources,
    plugin: &str,
) -> Result<(), PluginError> {
    let mut claim = |field, entry: &str| owners.claim(id, field, entry, plugin);
    macro_rules! set {
        ($($field:ident: $from:expr => $to:expr;)*) => {$(
            if $from.is_some() {
                claim(Field::$field, "")?;
                $to.clone_from(&$from);
            }
        )*};
    }
    if let Some(memory) = &from.memory {
        let to = to.memory.get_or_insert_default();
        set! {
            MemLimit: memory.limit => to.limit;
            MemReservation: memory.reservation => to.reservation;
            MemSwapLimit: memory.swap => to.swap;
            MemKernelLimit: memory.kernel => to.kernel;
            MemTcpLimit: memory.kernel_tcp => to.kernel_tcp;
            MemSwappiness: memory.swappiness => to.swappiness;
            MemDisableOomKiller: memory.disable_oom_killer => to.disable_oom_killer;
            MemUseHierarchy: memory.use_hierarchy => to.use_hierarchy;
        }
    }
    if let Some(cpu) = &from.cpu {
        let to = to.cpu.get_or_insert_default();
        set! {
            CpuShares: cpu.shares => to.shares;
            CpuQuota: cpu.quota => to.quota;
            CpuPeriod: cpu.period => to.period;
            CpuRealtimeRuntime: cpu.realtime_runtime => to.realtime_runtime;
            CpuRealtimePeriod: cpu.realtime_period => to.realtime_period;
        }
        if !cpu.cpus.is_empty() {
            claim(Field::CpuSetCpUs, "")?;
            to.cpus.clone_from(&cpu.cpus);
        }
        if !cpu.mems.is_empty() {
            claim(Field::CpuSetMems, "")?;
            to.mems.clone_from(&cpu.mems);
        }
    }
    set! {
        PidsLimit: from.pids => to.pids;
        BlockioClass: from.blockio_class => to.blockio_class;
        RdtClass: from.rdt_class => to.rdt_class;
    }
    for limit in &from.hugepage_limits {
        claim(Field::HugepageLimits, &limit.page_size)?;
        replace(&mut to.hugepage_limits, limit.clone(), |one| one.page_size == limit.page_size);
    }
    for (name, value) in &from.unified {
        claim(Field::CgroupsUnified, name)?;
        to.unified.insert(name.clone(), value.clone());
    }
    Ok(())
}

/// Puts `new` where what it replaces is, or at the end.
fn replace<T>(list: &mut Vec<T>, new: T, is_same: impl Fn(&T) -> bool) {
    match list.iter().position(is_same) {
        Some(at) => list[at] = new,
        None => list.push(new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(key: &str, value: &str) -> api::KeyValue {
        api::KeyValue { key: key.to_owned(), value: value.to_owned() }
    }

    fn environment(wanted: &[(&str, &str)]) -> ContainerAdjustment {
        ContainerAdjustment {
            env: wanted.iter().map(|(key, value)| variable(key, value)).collect(),
            ..ContainerAdjustment::default()
        }
    }

    fn container() -> Container {
        Container { id: "c".into(), env: vec!["A=1".into(), "AB=2".into()], ..Container::default() }
    }

    #[test]
    fn each_sees_what_those_before_it_want() {
        let mut merge = Merge::new(container());
        merge.adjust(environment(&[("A", "one"), ("NEW", "x")]), "10-a").unwrap();
        assert_eq!(merge.container().env, ["A=one", "AB=2", "NEW=x"]);
        let error = merge.adjust(environment(&[("A", "two")]), "20-b").unwrap_err();
        assert_eq!(
            error.to_string().split(';').next(),
            Some("NRI plugins 10-a and 20-b both set Env \"A\" of container c")
        );
        // Who removes it first means it.
        merge.adjust(environment(&[("-A", ""), ("A", "two")]), "20-b").unwrap();
        let adjust = merge.finish().adjust;
        assert_eq!(adjust.env, [variable("NEW", "x"), variable("-A", ""), variable("A", "two")]);
    }

    #[test]
    fn arguments_are_of_one_plugin() {
        let words = |words: &[&str]| ContainerAdjustment {
            args: words.iter().map(|word| (*word).to_owned()).collect(),
            ..ContainerAdjustment::default()
        };
        let mut merge = Merge::new(container());
        merge.adjust(words(&["sleep"]), "10-a").unwrap();
        assert!(merge.adjust(words(&["true"]), "20-b").is_err());
        merge.adjust(words(&["", "true"]), "20-b").unwrap();
        assert_eq!(merge.finish().adjust.args, ["true"]);
    }

    #[test]
    fn rules_of_devices_are_of_all_plugins() {
        let rule = |access: &str| api::LinuxDeviceCgroup { access: access.to_owned(), ..Default::default() };
        let rules = |access: &str| {
            let resources = Some(LinuxResources { devices: vec![rule(access)], ..LinuxResources::default() });
            let linux = Some(api::LinuxContainerAdjustment { resources, ..Default::default() });
            ContainerAdjustment { linux, ..ContainerAdjustment::default() }
        };
        let mut merge = Merge::new(container());
        merge.adjust(rules("r"), "10-a").unwrap();
        merge.adjust(rules("w"), "20-b").unwrap();
        let expect = [rule("r"), rule("w")];
        assert_eq!(merge.container().linux.as_ref().unwrap().resources.as_ref().unwrap().devices, expect);
        assert_eq!(merge.finish().adjust.linux.unwrap().resources.unwrap().devices, expect);
    }

    fn shares(id: &str, value: u64, ignore_failure: bool) -> ContainerUpdate {
        let cpu = api::LinuxCpu { shares: Some(api::OptionalUInt64 { value }), ..api::LinuxCpu::default() };
        let resources = Some(LinuxResources { cpu: Some(cpu), ..LinuxResources::default() });
        ContainerUpdate {
            container_id: id.to_owned(),
            linux: Some(api::LinuxContainerUpdate { resources }),
            ignore_failure,
        }
    }

    #[test]
    fn others_are_updated_by_one_plugin_each() {
        let mut update = Update::new("c", LinuxResources::default());
        update.apply(vec![shares("c", 5, false), shares("d", 6, true)], "10-a").unwrap();
        assert!(update.apply(vec![shares("d", 7, true)], "20-b").is_err());
        let (own, others) = update.finish();
        assert_eq!(own.cpu.unwrap().shares.unwrap().value, 5);
        assert_eq!(others, [shares("d", 6, true)]);
        let mut merge = Merge::new(container());
        assert!(merge.update_others(vec![shares("c", 5, false)], "10-a").is_err());
    }

    #[test]
    fn owners_are_told() {
        let mut merge = Merge::new(container());
        merge.adjust(environment(&[("A", "one")]), "10-a").unwrap();
        let owners = merge.owners();
        let fields = &owners.owners["c"];
        assert_eq!(fields.compound[&(Field::Env as i32)].owners["A"], "10-a");
        assert!(fields.simple.is_empty());
    }
}
