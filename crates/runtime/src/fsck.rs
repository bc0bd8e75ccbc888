//! What the runtime has on the host, with the owner of each; and the removal of all of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use cri::Error;
use futures_util::future::join_all;
use network::Owned;
use sys::cgroup::Cgroup;

use crate::core::{Core, blocking, failed};
use crate::single::Outcome;
use crate::stop;

/// Everything that belongs to the runtime.
pub(crate) async fn everything(core: &Arc<Core>) -> Result<Vec<Owned>, Error> {
    let mut owned = core.network.fsck().await.map_err(|error| Error::internal(&error))?;
    let shared = core.clone();
    owned.extend(blocking(move || local(&shared)).await?);
    Ok(owned)
}

fn local(core: &Core) -> Result<Vec<Owned>, Error> {
    let mut owned = directories(core)?;
    owned.extend(groups(core));
    owned.extend(roots(core));
    Ok(owned)
}

fn directories(core: &Core) -> Result<Vec<Owned>, Error> {
    let path = core.sandboxes_dir();
    let entries = std::fs::read_dir(&path).map_err(|error| failed("reading", &path.to_string_lossy(), &error))?;
    let known: BTreeSet<String> = core.table.every_sandbox().iter().map(|sandbox| sandbox.id.clone()).collect();
    let entry = |name: String| {
        let owner = known.contains(&name).then(|| format!("sandbox {name}"));
        Owned { kind: "sandbox", name: path.join(&name).to_string_lossy().into_owned(), owner }
    };
    Ok(entries.flatten().map(|one| entry(one.file_name().to_string_lossy().into_owned())).collect())
}

/// The groups of containers and keepers, wherever their pods' groups are, and all of the group that is ours alone.
fn groups(core: &Core) -> Vec<Owned> {
    let mut owned = Vec::new();
    for sandbox in core.table.every_sandbox() {
        let containers = sandbox.containers();
        let groups = containers.iter().map(|one| (one.group.clone(), format!("container {}", one.id)));
        let groups = groups.chain([(sandbox.keeper_group(), format!("sandbox {}", sandbox.id))]);
        owned.extend(groups.filter(|(group, _)| group.exists()).map(|(group, owner)| of_group(&group, Some(owner))));
    }
    owned.extend(leaked_groups(core).iter().map(|group| of_group(group, None)));
    owned
}

fn of_group(group: &Cgroup, owner: Option<String>) -> Owned {
    Owned { kind: "cgroup", name: group.path().to_string_lossy().into_owned(), owner }
}

/// Groups below the one that is ours alone, of sandboxes that there are no more.
pub(crate) fn leaked_groups(core: &Core) -> Vec<Cgroup> {
    let sandboxes = core.table.every_sandbox();
    let known: BTreeSet<&str> = sandboxes.iter().map(|sandbox| sandbox.id.as_str()).collect();
    let parent = core.hierarchy.group(&core.config.cgroup_parent);
    let mut names = BTreeSet::new();
    for directory in parent.directories() {
        let children = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let children = children.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir()));
        names.extend(children.map(|child| child.file_name().to_string_lossy().into_owned()));
    }
    names.iter().filter(|name| !known.contains(name.as_str())).map(|name| parent.child(name)).collect()
}

fn roots(core: &Core) -> Vec<Owned> {
    let owner = |id: &String| core.table.has_container(id).then(|| format!("container {id}"));
    core.images.rootfs_owners().into_iter().map(|id| Owned { kind: "rootfs", owner: owner(&id), name: id }).collect()
}

/// Removes every sandbox, then the network, and ends the streaming server.
pub(crate) async fn tear_down(core: &Arc<Core>) -> Outcome {
    let sandboxes = core.table.every_sandbox();
    let removals = sandboxes.iter().map(|sandbox| stop::remove_sandbox(core, &sandbox.id));
    let removed: Outcome = join_all(removals).await.into_iter().collect();
    let network = core.network.shutdown().await.map_err(|error| Error::internal(&error));
    let group = core.hierarchy.group(&core.config.cgroup_parent).delete();
    core.stop.cancel();
    core.bus.close();
    removed.and(network).and(group.map_err(|error| Error::internal(&error)))
}
