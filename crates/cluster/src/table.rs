//! One kind of object: the latest version of each, and watchers that learn which ones changed.
//!
//! A watcher holds the *set* of keys that changed since it looked, in the order they first changed. Its memory is
//! therefore bounded by the number of objects, however slow it is, and it always reads the latest version.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use k8s_openapi::Metadata;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::sync::{Notify, watch};

use crate::Key;

/// What a table can hold: any Kubernetes object.
pub trait Object: Metadata<Ty = ObjectMeta> + Clone + PartialEq + Send + Sync + 'static {}
impl<T: Metadata<Ty = ObjectMeta> + Clone + PartialEq + Send + Sync + 'static> Object for T {}

/// The objects of one kind. A handle: clones share the table.
pub struct Table<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    /// Guards the objects and the list of watchers together, so that a new watch misses nothing. Never held over `.await`.
    content: Mutex<Content<T>>,
    /// Shared by all tables of a store: the source of `metadata.resourceVersion`.
    version: Arc<Clock>,
    synced: watch::Sender<bool>,
}

/// Counts the changes of all tables of a store and wakes who waits for any of them.
#[derive(Debug)]
pub(crate) struct Clock(pub(crate) watch::Sender<u64>);

impl Default for Clock {
    fn default() -> Self {
        Clock(watch::Sender::new(0))
    }
}

impl Clock {
    fn tick(&self) -> u64 {
        let mut version = 0;
        self.0.send_modify(|latest| {
            *latest += 1;
            version = *latest;
        });
        version
    }
}

struct Content<T> {
    objects: BTreeMap<Key, Slot<T>>,
    watchers: Vec<Weak<Dirty<T>>>,
    /// Objects are dropped when all watchers have seen them.
    is_passing: bool,
}

/// What a table has of an object.
enum Slot<T> {
    Held(Arc<T>),
    /// It was dropped; this was its version.
    Seen(Option<Box<str>>),
}

impl<T> Slot<T> {
    fn held(&self) -> Option<&Arc<T>> {
        match self {
            Slot::Held(object) => Some(object),
            Slot::Seen(_) => None,
        }
    }
}

/// What one watcher has not seen yet.
struct Dirty<T> {
    /// Guards the keys. Always taken after the table's own lock, or alone.
    keys: Mutex<DirtyKeys<T>>,
    notify: Notify,
}

struct DirtyKeys<T> {
    order: VecDeque<Key>,
    /// With the last version of an object that is gone.
    present: HashMap<Key, Option<Arc<T>>>,
}

/// An object that differs from what the watcher last saw.
#[derive(Debug)]
pub struct Change<T> {
    /// Which object.
    pub key: Key,
    /// Its latest version, or `None` when it is gone.
    pub object: Option<Arc<T>>,
    /// The last version of one that is gone, which the watcher may not have seen; `None` when the table had dropped it.
    pub last: Option<Arc<T>>,
}

/// A subscription to a table; made by [`Table::watch`].
pub struct Watch<T> {
    table: Table<T>,
    dirty: Arc<Dirty<T>>,
}

impl<T: Object> Table<T> {
    pub(crate) fn new(version: Arc<Clock>) -> Self {
        let content = Mutex::new(Content { objects: BTreeMap::new(), watchers: Vec::new(), is_passing: false });
        Table { shared: Arc::new(Shared { content, version, synced: watch::Sender::new(false) }) }
    }

    /// Called by the source when the table holds all that it knew at the start.
    pub fn set_synced(&self) {
        self.shared.synced.send_replace(true);
    }

    /// Waits for [`Table::set_synced`]. Before that an empty table means "not known yet", not "nothing is desired". Tables
    /// that fill as pods need them are never synced: [`crate::Source::look_up`] is for those.
    pub async fn synced(&self) {
        let mut synced = self.shared.synced.subscribe();
        synced.wait_for(|synced| *synced).await.expect("the sender lives in the table, which self holds");
    }

    /// From now on each object is dropped when all watches that there are have seen it: for objects that are many and
    /// large, and of which the watchers keep what they need. The table goes on to know which there are; `get` and the
    /// lists no longer have those that were seen, and a watch that comes later does not hear of them.
    pub fn let_pass(&self) {
        self.lock().is_passing = true;
    }

    /// The latest version of an object.
    pub fn get(&self, key: &Key) -> Option<Arc<T>> {
        self.lock().objects.get(key)?.held().cloned()
    }

    /// All objects, by namespace and name.
    pub fn list(&self) -> Vec<Arc<T>> {
        self.lock().objects.values().filter_map(Slot::held).cloned().collect()
    }

    /// All objects of one namespace, by name.
    pub fn list_namespace(&self, namespace: &str) -> Vec<Arc<T>> {
        let content = self.lock();
        let from = content.objects.range(Key::new(namespace, "")..);
        let inside = from.take_while(|(key, _)| key.namespace() == namespace);
        inside.filter_map(|(_, slot)| slot.held()).cloned().collect()
    }

    /// The keys of all objects, by namespace and name.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().objects.keys().cloned().collect()
    }

    /// The object with this uid.
    pub fn find_uid(&self, uid: &str) -> Option<Arc<T>> {
        let content = self.lock();
        let mut held = content.objects.values().filter_map(Slot::held);
        held.find(|object| object.metadata().uid.as_deref() == Some(uid)).cloned()
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.lock().objects.len()
    }

    /// Whether there is no object.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stores an object under the key of its metadata and sets its `resourceVersion`. An object that equals the stored
    /// one wakes nobody. Returns what the table holds now.
    pub fn put(&self, object: T) -> Arc<T> {
        let key = Key::of(object.metadata());
        self.lock().put(key, object, &self.shared.version)
    }

    /// Stores an object as somebody else keeps it, with the `resourceVersion` that it has there. An object that equals the
    /// stored one wakes nobody. Returns what the table holds now.
    pub fn mirror(&self, object: T) -> Arc<T> {
        let key = Key::of(object.metadata());
        self.lock().mirror(key, object, &self.shared.version)
    }

    /// As [`Table::mirror`], but only if there is no object of this name.
    pub(crate) fn mirror_new(&self, object: T) {
        let key = Key::of(object.metadata());
        let mut content = self.lock();
        if !content.objects.contains_key(&key) {
            content.mirror(key, object, &self.shared.version);
        }
    }

    /// Changes an object in place, atomically; `None` when there is no such object. `change` must not rename it.
    pub fn update(&self, key: &Key, change: impl FnOnce(&mut T)) -> Option<Arc<T>> {
        let mut content = self.lock();
        let mut object = T::clone(content.objects.get(key)?.held()?);
        change(&mut object);
        Some(content.put(key.clone(), object, &self.shared.version))
    }

    /// Removes an object and returns its last version, if the table has that.
    pub fn remove(&self, key: &Key) -> Option<Arc<T>> {
        let mut content = self.lock();
        let last = match content.objects.remove(key)? {
            Slot::Held(object) => Some(object),
            Slot::Seen(_) => None,
        };
        self.shared.version.tick();
        content.mark_dirty(key, last.as_ref());
        last
    }

    /// Subscribes: first every object that is there now, then every one that changes.
    pub fn watch(&self) -> Watch<T> {
        let mut content = self.lock();
        let held = content.objects.iter().filter(|(_, slot)| slot.held().is_some());
        let order: VecDeque<Key> = held.map(|(key, _)| key.clone()).collect();
        let present = order.iter().map(|key| (key.clone(), None)).collect();
        let dirty = Arc::new(Dirty { keys: Mutex::new(DirtyKeys { order, present }), notify: Notify::new() });
        content.watchers.push(Arc::downgrade(&dirty));
        Watch { table: self.clone(), dirty }
    }

    fn lock(&self) -> MutexGuard<'_, Content<T>> {
        // Every section leaves the content whole at each step, so a panicking holder spoils nothing.
        self.shared.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Object> Content<T> {
    fn put(&mut self, key: Key, mut object: T, version: &Clock) -> Arc<T> {
        if let Some(old) = self.objects.get(&key).and_then(Slot::held) {
            object.metadata_mut().resource_version.clone_from(&old.metadata().resource_version);
            if **old == object {
                return old.clone();
            }
        }
        object.metadata_mut().resource_version = Some(version.tick().to_string());
        self.insert(key, object)
    }

    fn mirror(&mut self, key: Key, object: T, version: &Clock) -> Arc<T> {
        match self.objects.get(&key) {
            Some(Slot::Held(old)) if **old == object => return old.clone(),
            Some(Slot::Seen(version)) if *version == version_of(&object) => return Arc::new(object),
            _ => {}
        }
        version.tick();
        self.insert(key, object)
    }

    fn insert(&mut self, key: Key, object: T) -> Arc<T> {
        let object = Arc::new(object);
        self.objects.insert(key.clone(), Slot::Held(object.clone()));
        self.mark_dirty(&key, None);
        object
    }

    /// The latest version for a watcher, who has it now.
    fn show(&mut self, key: &Key) -> Option<Arc<T>> {
        let slot = self.objects.get_mut(key)?;
        let object = slot.held().cloned()?;
        let waits =
            |watcher: &Weak<Dirty<T>>| watcher.upgrade().is_some_and(|dirty| dirty.lock().present.contains_key(key));
        if self.is_passing && !self.watchers.iter().any(waits) {
            *slot = Slot::Seen(version_of(&*object));
        }
        Some(object)
    }

    /// Of an object that is gone with its `last` version.
    fn mark_dirty(&mut self, key: &Key, last: Option<&Arc<T>>) {
        self.watchers.retain(|watcher| watcher.upgrade().is_some_and(|dirty| dirty.mark(key, last)));
    }
}

fn version_of<T: Object>(object: &T) -> Option<Box<str>> {
    object.metadata().resource_version.as_deref().map(Into::into)
}

impl<T> Dirty<T> {
    /// Returns true, so that it can end a `retain` of living watchers.
    fn mark(&self, key: &Key, last: Option<&Arc<T>>) -> bool {
        let mut keys = self.lock();
        if keys.present.insert(key.clone(), last.cloned()).is_none() {
            keys.order.push_back(key.clone());
        }
        self.notify.notify_one();
        true
    }

    fn pop(&self) -> Option<(Key, Option<Arc<T>>)> {
        let mut keys = self.lock();
        let key = keys.order.pop_front()?;
        let last = keys.present.remove(&key).flatten();
        Some((key, last))
    }

    fn lock(&self) -> MutexGuard<'_, DirtyKeys<T>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Object> Watch<T> {
    /// The next object that changed; waits for one. Cancel-safe: a dropped call loses no change.
    pub async fn next(&mut self) -> Change<T> {
        loop {
            if let Some(change) = self.try_next() {
                return change;
            }
            self.dirty.notify.notified().await;
        }
    }

    /// The next object that changed, if one is waiting.
    pub fn try_next(&mut self) -> Option<Change<T>> {
        // In this order, so that no other watcher takes the object away between the two.
        let mut content = self.table.lock();
        let (key, last) = self.dirty.pop()?;
        let object = content.show(&key);
        Some(Change { key, object, last })
    }

    /// Waits until at least one change waits, then forgets all that do: for a reader who looks at the whole table.
    /// Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            if self.dirty.pop().is_some() {
                while self.dirty.pop().is_some() {}
                return;
            }
            self.dirty.notify.notified().await;
        }
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Table { shared: self.shared.clone() }
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table<{}>", std::any::type_name::<T>())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::core::v1::ConfigMap;
    use proptest::prelude::*;

    use super::*;

    fn table() -> Table<ConfigMap> {
        Table::new(Arc::default())
    }

    fn config_map(name: &str, value: u8) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("default".into());
        object.metadata.name = Some(name.into());
        object.data = Some(BTreeMap::from([("value".into(), value.to_string())]));
        object
    }

    fn value(object: &ConfigMap) -> &str {
        &object.data.as_ref().unwrap()["value"]
    }

    #[tokio::test]
    async fn a_watch_starts_with_what_is_there_and_coalesces() {
        let table = table();
        table.put(config_map("a", 1));
        let mut watch = table.watch();
        table.put(config_map("b", 1));
        table.put(config_map("a", 2));
        table.put(config_map("a", 3));
        let first = watch.next().await;
        assert_eq!((first.key.name(), value(&first.object.unwrap())), ("a", "3"));
        assert_eq!(watch.next().await.key.name(), "b");
        assert!(watch.try_next().is_none());
        table.remove(&Key::new("default", "a"));
        let gone = watch.next().await;
        assert!(gone.key.name() == "a" && gone.object.is_none());
    }

    #[tokio::test]
    async fn of_what_is_gone_the_last_version_is_shown_also_if_nobody_saw_it() {
        let table = table();
        table.put(config_map("a", 1));
        let mut watch = table.watch();
        assert!(watch.next().await.last.is_none());
        table.put(config_map("a", 2));
        table.remove(&Key::new("default", "a"));
        let gone = watch.next().await;
        assert!(gone.object.is_none());
        assert_eq!(value(&gone.last.unwrap()), "2");
        table.put(config_map("a", 3));
        table.remove(&Key::new("default", "a"));
        table.put(config_map("a", 4));
        let back = watch.next().await;
        assert_eq!((value(&back.object.unwrap()), back.last), ("4", None));
    }

    #[tokio::test]
    async fn an_equal_object_wakes_nobody() {
        let table = table();
        let first = table.put(config_map("a", 1));
        let mut watch = table.watch();
        watch.changed().await;
        let again = table.put(config_map("a", 1));
        assert!(Arc::ptr_eq(&first, &again));
        assert!(watch.try_next().is_none());
    }

    #[tokio::test]
    async fn a_mirrored_object_keeps_its_version() {
        let table = table();
        let mut object = config_map("a", 1);
        object.metadata.resource_version = Some("77".into());
        table.mirror(object.clone());
        let mut watch = table.watch();
        assert_eq!(watch.next().await.object.unwrap().metadata.resource_version.as_deref(), Some("77"));
        table.mirror(object.clone());
        assert!(watch.try_next().is_none());
        object.metadata.resource_version = Some("78".into());
        table.mirror(object);
        assert!(watch.try_next().is_some());
    }

    #[test]
    fn what_passes_is_shown_once_and_dropped() {
        let table = table();
        table.let_pass();
        let (mut one, mut two) = (table.watch(), table.watch());
        let versioned = |name: &str, version: &str| {
            let mut object = config_map(name, 1);
            object.metadata.resource_version = Some(version.into());
            object
        };
        table.mirror(versioned("a", "5"));
        assert!(one.try_next().unwrap().object.is_some());
        assert!(table.get(&Key::new("default", "a")).is_some(), "the other has not seen it");
        let weak = Arc::downgrade(&two.try_next().unwrap().object.unwrap());
        assert!(weak.upgrade().is_none() && table.list().is_empty() && table.len() == 1);
        table.mirror(versioned("a", "5"));
        assert!(one.try_next().is_none() && table.watch().try_next().is_none(), "the same version is no news");
        table.mirror(versioned("a", "6"));
        assert!(one.try_next().unwrap().object.is_some());
        table.remove(&Key::new("default", "a"));
        assert!(one.try_next().unwrap().object.is_none() && two.try_next().unwrap().object.is_none());
        assert!(table.is_empty());
    }

    #[tokio::test]
    async fn a_waiting_watch_is_woken() {
        let table = table();
        let mut watch = table.watch();
        let waiter = tokio::spawn(async move { watch.next().await.key });
        tokio::task::yield_now().await;
        table.put(config_map("a", 1));
        assert_eq!(waiter.await.unwrap(), Key::new("default", "a"));
    }

    #[test]
    fn a_dropped_watch_is_forgotten() {
        let table = table();
        drop(table.watch());
        table.put(config_map("a", 1));
        assert!(table.lock().watchers.is_empty());
    }

    #[test]
    fn namespaces_are_listed_apart() {
        let table = table();
        for (namespace, name) in [("a", "x"), ("ab", "y"), ("b", "z")] {
            let mut object = config_map(name, 0);
            object.metadata.namespace = Some(namespace.into());
            table.put(object);
        }
        let names: Vec<_> = table.list_namespace("a").iter().map(|o| o.metadata.name.clone().unwrap()).collect();
        assert_eq!(names, ["x"]);
    }

    proptest! {
        /// Whoever applies the changes of a watch ends with the content of the table, however late it reads them.
        #[test]
        fn a_watcher_converges(operations in proptest::collection::vec((0u8..5, proptest::option::of(0u8..4), any::<bool>()), 0..60)) {
            let table = table();
            let mut watch = table.watch();
            let mut seen: BTreeMap<Key, Arc<ConfigMap>> = BTreeMap::new();
            let mut read = |watch: &mut Watch<ConfigMap>| {
                while let Some(change) = watch.try_next() {
                    match change.object {
                        Some(object) => { seen.insert(change.key, object); }
                        None => { seen.remove(&change.key); }
                    }
                }
                seen.values().cloned().collect::<Vec<_>>()
            };
            for (name, value, reads) in operations {
                let name = format!("o{name}");
                match value {
                    Some(value) => { table.put(config_map(&name, value)); }
                    None => { table.remove(&Key::new("default", &name)); }
                }
                prop_assert!(watch.dirty.lock().order.len() <= 5);
                if reads { read(&mut watch); }
            }
            prop_assert_eq!(read(&mut watch), table.list());
        }
    }
}
