//! Lists and their filters.

use std::collections::HashMap;

use cri::v1;

use crate::core::Core;
use crate::status;

/// The sandboxes that a filter lets through.
pub(crate) fn sandboxes(core: &Core, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
    let filter = filter.unwrap_or_default();
    let wanted = |item: &v1::PodSandbox| {
        item.id.starts_with(&filter.id)
            && filter.state.as_ref().is_none_or(|wanted| wanted.state == item.state)
            && has_labels(&item.labels, &filter.label_selector)
    };
    let all = core.table.sandboxes().into_iter().map(|sandbox| status::sandbox_item(&sandbox));
    all.filter(wanted).collect()
}

/// The containers that a filter lets through.
pub(crate) fn containers(core: &Core, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
    let filter = filter.unwrap_or_default();
    let wanted = |item: &v1::Container| {
        item.id.starts_with(&filter.id)
            && item.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
            && filter.state.as_ref().is_none_or(|wanted| wanted.state == item.state)
            && has_labels(&item.labels, &filter.label_selector)
    };
    let all = core.table.containers();
    all.into_iter().map(|(sandbox, container)| status::container_item(&sandbox, &container)).filter(wanted).collect()
}

pub(crate) fn has_labels(labels: &HashMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
