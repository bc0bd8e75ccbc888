//! Events: the same one again is counted, and there are never more than a few.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::{Key, Store};

/// Events that are kept; the oldest go first.
const EVENTS_MAX: usize = 1000;

/// What makes two events the same.
type Identity = [Option<String>; 6];

/// The events of a store.
#[derive(Debug, Default)]
pub(crate) struct Events {
    known: HashMap<Identity, Key>,
    count: u64,
}

fn identity(event: &Event) -> Identity {
    let about = &event.involved_object;
    let text = [&about.uid, &about.field_path, &event.reason, &event.message, &event.type_, &about.name];
    text.map(Option::clone)
}

impl Events {
    /// Takes in what was saved.
    pub(crate) fn restored(store: &Store) -> Self {
        let all = store.events().list();
        let known = all.iter().map(|event| (identity(event), Key::of(&event.metadata))).collect();
        Self { known, count: u64::try_from(all.len()).unwrap_or(0) }
    }

    /// Records an event: a new one, or one more of a known one.
    pub(crate) fn record(&mut self, store: &Store, mut event: Event, now: Timestamp) {
        let identity = identity(&event);
        if let Some(key) = self.known.get(&identity) {
            let again = store.events().update(key, |event| {
                event.count = Some(event.count.unwrap_or(1) + 1);
                event.last_timestamp = Some(Time(now));
            });
            if again.is_some() {
                return;
            }
        }
        self.count += 1;
        let about = event.involved_object.name.clone().unwrap_or_default();
        let namespace = event.involved_object.namespace.clone().unwrap_or_else(|| "default".into());
        event.metadata.name = Some(format!("{about}.{:x}{:04x}", now.as_nanosecond(), self.count & 0xffff));
        event.metadata.namespace = Some(namespace);
        event.metadata.creation_timestamp = Some(Time(now));
        event.count = Some(1);
        event.first_timestamp = Some(Time(now));
        event.last_timestamp = Some(Time(now));
        self.known.insert(identity, Key::of(&event.metadata));
        store.events().put(event);
        if store.events().len() > EVENTS_MAX {
            self.drop_oldest(store);
        }
    }

    fn drop_oldest(&mut self, store: &Store) {
        let all = store.events().list();
        let oldest = all.iter().min_by_key(|event| event.last_timestamp.as_ref().map(|time| time.0));
        if let Some(oldest) = oldest {
            self.known.remove(&identity(oldest));
            store.events().remove(&Key::of(&oldest.metadata));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(message: &str) -> Event {
        Event { reason: Some("R".into()), message: Some(message.into()), ..Event::default() }
    }

    #[test]
    fn the_same_is_counted_and_the_oldest_go() {
        let (store, mut events) = (Store::new(), Events::default());
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        events.record(&store, event("a"), at(1));
        events.record(&store, event("a"), at(2));
        assert_eq!(store.events().list()[0].count, Some(2));
        for n in 0..EVENTS_MAX {
            events.record(&store, event(&format!("m{n}")), at(3 + i64::try_from(n).unwrap()));
        }
        assert_eq!(store.events().len(), EVENTS_MAX);
        assert!(store.events().list().iter().all(|event| event.message.as_deref() != Some("a")));
    }
}
