//! Ends of runs that come before the news of their starts.

use std::collections::HashMap;

use crate::adopt;

/// Runs that ended before anybody knew of their start, by id. Each event of the runtime tells of all containers of the
/// pod, so an earlier run of the same container may be told of again meanwhile.
#[derive(Debug, Default)]
pub(super) struct Early {
    ended: HashMap<String, cri::v1::ContainerStatus>,
}

impl Early {
    pub(super) fn note(&mut self, status: &cri::v1::ContainerStatus) {
        self.ended.insert(status.id.clone(), status.clone());
    }

    /// The end of a container's run, if it was heard. What was heard of other runs of it is of no use any more.
    pub(super) fn take(&mut self, container: &str, run: Option<&str>) -> Option<cri::v1::ContainerStatus> {
        let ended = run.and_then(|run| self.ended.remove(run));
        self.ended.retain(|_, status| adopt::name_of(status) != container);
        ended
    }
}

#[cfg(test)]
mod tests {
    use cri::v1::{ContainerMetadata, ContainerStatus};

    use super::*;

    #[test]
    fn the_end_of_a_run_is_not_covered_by_that_of_an_earlier_one() {
        let status = |id: &str, name: &str| {
            let metadata = Some(ContainerMetadata { name: name.into(), attempt: 0 });
            ContainerStatus { id: id.into(), metadata, ..ContainerStatus::default() }
        };
        let mut early = Early::default();
        for (id, name) in [("new", "a"), ("old", "a"), ("other", "b")] {
            early.note(&status(id, name));
        }
        assert_eq!(early.take("a", Some("new")).map(|status| status.id).as_deref(), Some("new"));
        assert_eq!(early.ended.keys().collect::<Vec<_>>(), ["other"], "nothing of that container stays");
        assert_eq!(early.take("b", None), None, "its start failed");
        assert!(early.ended.is_empty());
    }
}
