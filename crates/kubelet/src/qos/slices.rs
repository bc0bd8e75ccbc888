//! Groups that systemd makes: slices, whose names say where they are (systemd.slice(5)).
//!
//! ```text
//! kubepods.slice / kubepods-burstable.slice / kubepods-burstable-pod<uid, with _ for ->.slice / <the runtime's scopes>
//! ```
//!
//! systemd knows a slice's limits as properties, to which it returns when it writes them again; the group's files have the exact
//! values. A connection is made for each: pods come and go seldom, and an idle one would gather the news of all other units.

use std::path::{Path, PathBuf};

use sys::cgroup::{Cgroup, Hierarchy, Limits};
use systemd::{Manager, Property, Whose, of_group, property};

use super::GroupError;

/// The path of the slice that stands for a group, which is `kubepods/burstable/pod<uid>`.
pub(super) fn place(group: &Path) -> PathBuf {
    let mut name = String::new();
    let mut place = PathBuf::new();
    for part in group.iter().map(|part| part.to_string_lossy()) {
        if !name.is_empty() {
            name.push('-');
        }
        // What stands between the names of slices is in none of them.
        name.push_str(&part.replace('-', "_"));
        place.push(format!("{name}.slice"));
    }
    place
}

fn unit(group: &Cgroup) -> String {
    group.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn properties(hierarchy: &Hierarchy, limits: &Limits, manager: &Manager) -> sys::Result<Vec<Property>> {
    Ok(hierarchy.unit_properties(limits, manager.version)?.into_iter().map(property).collect())
}

/// Has systemd make a slice with limits; one that is there gets them.
pub(super) fn ensure(hierarchy: &Hierarchy, group: &Cgroup, limits: &Limits) -> Result<(), GroupError> {
    let mut manager = Manager::connect(Whose::System)?;
    let (unit, limits) = (unit(group), properties(hierarchy, limits, &manager)?);
    let described = ("Description".to_owned(), "orlop: pods".into());
    let all = [described].into_iter().chain(of_group()).chain(limits.iter().cloned()).collect();
    match manager.begin(&unit, all) {
        Err(error) if error.is_taken() => Ok(manager.change(&unit, limits)?),
        begun => Ok(begun?),
    }
}

/// Gives a slice other limits.
pub(super) fn change(hierarchy: &Hierarchy, group: &Cgroup, limits: &Limits) -> Result<(), GroupError> {
    let mut manager = Manager::connect(Whose::System)?;
    let limits = properties(hierarchy, limits, &manager)?;
    Ok(manager.change(&unit(group), limits)?)
}

/// Ends a slice, in which nothing runs any more.
pub(super) fn end(group: &Cgroup) -> Result<(), GroupError> {
    Ok(Manager::connect(Whose::System)?.end(&unit(group))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_where_slices_are() {
        let check = |group: &str, expect: &str| assert_eq!(place(Path::new(group)), Path::new(expect));
        check("kubepods", "kubepods.slice");
        check("kubepods/burstable", "kubepods.slice/kubepods-burstable.slice");
        check(
            "kubepods/besteffort/poda-b-c",
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b_c.slice",
        );
        check("my-node/kubepods", "my_node.slice/my_node-kubepods.slice");
        check("", "");
    }
}
