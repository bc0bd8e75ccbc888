//! All sandboxes and containers of the node, by id and by name.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cri::Error;

use crate::container::{self, Container};
use crate::sandbox::{self, Key, Sandbox};

/// Everything there is.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// Guards the maps; held for look-ups and changes of them, never for work on what they hold.
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    names: HashMap<Key, String>,
    containers: BTreeMap<String, Arc<Container>>,
}

/// Whether an object was there already.
#[derive(Debug)]
pub(crate) enum Entered<T> {
    /// It is new.
    New(T),
    /// There was one of its name.
    There(T),
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, All> {
        // Every section leaves the maps consistent at each step.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a sandbox, unless there is one of its name.
    pub(crate) fn enter_sandbox(&self, sandbox: Arc<Sandbox>) -> Entered<Arc<Sandbox>> {
        let mut all = self.lock();
        let key = sandbox::key(&sandbox.metadata());
        if let Some(there) = all.names.get(&key).and_then(|id| all.sandboxes.get(id)) {
            return Entered::There(there.clone());
        }
        all.names.insert(key, sandbox.id.clone());
        all.sandboxes.insert(sandbox.id.clone(), sandbox.clone());
        Entered::New(sandbox)
    }

    pub(crate) fn remove_sandbox(&self, sandbox: &Sandbox) {
        let mut all = self.lock();
        all.sandboxes.remove(&sandbox.id);
        all.names.retain(|_, id| *id != sandbox.id);
    }

    /// Enters a container, unless its sandbox has one of its name.
    pub(crate) fn enter_container(&self, sandbox: &Sandbox, container: Arc<Container>) -> Entered<Arc<Container>> {
        let mut all = self.lock();
        let mut siblings = sandbox.lock_containers();
        if let Some(there) = siblings.values().find(|one| one.name == container.name) {
            return Entered::There(there.clone());
        }
        siblings.insert(container.id.clone(), container.clone());
        all.containers.insert(container.id.clone(), container.clone());
        Entered::New(container)
    }

    pub(crate) fn remove_container(&self, container: &Container) {
        self.lock().containers.remove(&container.id);
        if let Some(sandbox) = container.sandbox.upgrade() {
            sandbox.lock_containers().remove(&container.id);
        }
    }

    /// The sandbox with this id, or the only one whose id begins with it.
    ///
    /// # Errors
    /// `NotFound`, or `InvalidArgument` when several begin with it.
    pub(crate) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        let all = self.lock();
        let found = by_prefix(&all.sandboxes, "sandbox", id)?;
        let heard_of = found.phase() != sandbox::Phase::Making;
        if heard_of { Ok(found) } else { Err(Error::NotFound { kind: "sandbox", id: id.to_owned() }) }
    }

    /// The container with this id, or the only one whose id begins with it, and its sandbox.
    ///
    /// # Errors
    /// As [`Table::sandbox`].
    pub(crate) fn container(&self, id: &str) -> Result<(Arc<Sandbox>, Arc<Container>), Error> {
        let not_found = || Error::NotFound { kind: "container", id: id.to_owned() };
        let found = by_prefix(&self.lock().containers, "container", id)?;
        if found.phase() == container::Phase::Making {
            return Err(not_found());
        }
        Ok((found.sandbox.upgrade().ok_or_else(not_found)?, found))
    }

    /// The sandbox or container of exactly this id, also while it is being made.
    pub(crate) fn every(&self, id: &str) -> Option<(Arc<Sandbox>, Option<Arc<Container>>)> {
        let all = self.lock();
        match all.containers.get(id) {
            Some(container) => Some((container.sandbox.upgrade()?, Some(container.clone()))),
            None => all.sandboxes.get(id).map(|sandbox| (sandbox.clone(), None)),
        }
    }

    pub(crate) fn has_container(&self, id: &str) -> bool {
        self.lock().containers.contains_key(id)
    }

    /// All sandboxes that a client has heard of.
    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        let all = self.every_sandbox();
        all.into_iter().filter(|sandbox| sandbox.phase() != sandbox::Phase::Making).collect()
    }

    /// All sandboxes, also those that are being made.
    pub(crate) fn every_sandbox(&self) -> Vec<Arc<Sandbox>> {
        self.lock().sandboxes.values().cloned().collect()
    }

    /// All containers that a client has heard of, with their sandboxes.
    pub(crate) fn containers(&self) -> Vec<(Arc<Sandbox>, Arc<Container>)> {
        let all: Vec<_> = self.lock().containers.values().cloned().collect();
        let known = all.into_iter().filter(|container| container.phase() != container::Phase::Making);
        known.filter_map(|container| Some((container.sandbox.upgrade()?, container))).collect()
    }
}

fn by_prefix<T>(map: &BTreeMap<String, Arc<T>>, kind: &'static str, id: &str) -> Result<Arc<T>, Error> {
    let not_found = || Error::NotFound { kind, id: id.to_owned() };
    if id.is_empty() {
        return Err(Error::InvalidArgument(format!("the id of the {kind} is missing")));
    }
    let mut found = map.range(id.to_owned()..).take_while(|(known, _)| known.starts_with(id));
    let (first, object) = found.next().ok_or_else(not_found)?;
    if first != id && found.next().is_some() {
        return Err(Error::InvalidArgument(format!("{kind} id {id:?} is ambiguous: give more of it")));
    }
    Ok(object.clone())
}
