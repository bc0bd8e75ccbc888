//! Writing what a pod was granted while it runs.

use cri::v1;
use pod::Change;
use pod::resize::{Allocation, Sizes, Step};

use super::Job;
use crate::generate;
use crate::qos::Part;

impl Job {
    /// Does the steps in order. The first that fails ends it; what is left is tried again.
    pub(super) async fn resize(&self, steps: &[Step]) {
        if let Err(message) = self.resized(steps).await {
            self.change(Change::ResizeFailed { message });
        }
    }

    async fn resized(&self, steps: &[Step]) -> Result<(), String> {
        self.check_usage(steps).await?;
        for step in steps {
            match step {
                Step::GroupMemory { .. } => self.write_group(Part::Memory).await?,
                Step::GroupQuota => self.write_group(Part::Quota).await?,
                Step::GroupShares => self.write_group(Part::Shares).await?,
                Step::Container { name, id, sizes, .. } => self.write_container(name, id, sizes).await?,
            }
            self.change(Change::Resized(step.clone()));
        }
        self.change(Change::GroupResized(Allocation::of(&self.pod)));
        Ok(())
    }

    /// A limit below what is used would have the kernel kill: it is not written.
    async fn check_usage(&self, steps: &[Step]) -> Result<(), String> {
        let mut faults = Vec::new();
        for step in steps {
            match step {
                Step::GroupMemory { lowered: Some(limit) } => {
                    let group = self.context.parts.groups.pod(&self.pod);
                    let usage = group.stats().memory.usage_bytes;
                    if is_below(*limit, usage) {
                        faults.push(format!(
                            "attempting to set pod memory limit ({limit}) below current usage ({usage})"
                        ));
                    }
                }
                Step::Container { name, id, lowered: Some(limit), .. } => match self.memory_of(id).await {
                    Some(usage) if !is_below(*limit, usage) => {}
                    Some(usage) => faults.push(format!(
                        "attempting to set container {name:?} memory limit ({limit}) below current usage ({usage})"
                    )),
                    None => faults.push(format!("missing container {name:?} memory usage")),
                },
                _ => {}
            }
        }
        match faults.as_slice() {
            [] => Ok(()),
            [fault] => Err(format!("cannot decrease memory limits: {fault}")),
            faults => Err(format!("cannot decrease memory limits: [{}]", faults.join(", "))),
        }
    }

    /// What a container uses, as its runtime has it.
    async fn memory_of(&self, id: &str) -> Option<u64> {
        let request = v1::ContainerStatsRequest { container_id: id.to_owned() };
        let stats = self.context.parts.runtime.container_stats(request).await.ok()?.stats?;
        stats.memory?.usage_bytes.map(|usage| usage.value)
    }

    async fn write_group(&self, part: Part) -> Result<(), String> {
        let (groups, pod) = (self.context.parts.groups.clone(), self.pod.clone());
        let begun = std::time::Instant::now();
        let written = tokio::task::spawn_blocking(move || groups.resize_pod(&pod, part)).await;
        self.context.parts.metrics.group_done("update", begun.elapsed());
        written.map_err(|error| error.to_string())?.map_err(|error| format!("the pod's control group: {error}"))
    }

    async fn write_container(&self, name: &str, id: &str, sizes: &Sizes) -> Result<(), String> {
        let Some((role, container)) = pod::spec::container(&self.pod, name) else { return Ok(()) };
        let mut resources =
            generate::resources(&self.context.config.generate, &self.pod, role, &sizes.given(&container));
        if self.context.parts.resources.container_has_own_cpus(crate::context::uid_of(&self.pod), name) {
            resources.cpu_quota = -1; // As it was started: no limit beside the CPUs themselves.
        }
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..v1::UpdateContainerResourcesRequest::default()
        };
        let updated = self.context.parts.runtime.update_container_resources(request).await;
        updated.map(drop).map_err(|error| format!("container {name:?}: {error}"))
    }
}

fn is_below(limit: i64, usage: u64) -> bool {
    u64::try_from(limit).is_ok_and(|limit| usage >= limit)
}
