//! Which of many events the API server gets, by upstream's rules. Pure.
//!
//! 1. More than ten events within ten minutes that differ in their message alone become one.
//! 2. The same event again counts up the one that is there.
//! 3. Of one source about one object: 25 at once, then one in five minutes.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use crate::api::config::Rate;
use crate::api::rate::Bucket;

/// As upstream: `maxLruCacheEntries`.
const REMEMBERED: usize = 4096;
/// As upstream: `defaultAggregateMaxEvents`, `defaultAggregateIntervalInSeconds`.
const SIMILAR_MAX: usize = 10;
const SIMILAR_WITHIN: Duration = Duration::from_secs(600);
/// As upstream: `defaultSpamBurst`, `defaultSpamQPS`.
const SPAM: Rate = Rate { per_second: 1.0 / 300.0, burst: 25 };

/// What is to be sent.
#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    /// A new event.
    Create(Box<Event>),
    /// The event of this name happened once more; the whole of it, should it be gone.
    CountUp(Box<Event>),
    /// Nothing: there are too many about this object.
    Drop,
}

/// What was sent lately.
#[derive(Debug)]
pub(super) struct Correlator {
    similar: Recent<Vec<String>, Similar>,
    counted: Recent<Vec<String>, Counted>,
    budgets: Recent<Vec<String>, Bucket>,
}

/// Messages of events that are otherwise alike.
#[derive(Debug)]
struct Similar {
    messages: BTreeSet<String>,
    last: Instant,
}

/// An event that the server has.
#[derive(Debug, Clone, PartialEq)]
struct Counted {
    name: String,
    count: i32,
    first: Timestamp,
}

impl Correlator {
    pub(super) fn new() -> Self {
        Self { similar: Recent::new(), counted: Recent::new(), budgets: Recent::new() }
    }

    /// Takes in an event that happened now. `name` is its name if it is a new one.
    pub(super) fn observe(&mut self, mut event: Event, name: String, wall: Timestamp, now: Instant) -> Decision {
        let source = source_of(&event);
        let kind = [source.clone(), kind_of(&event)].concat();
        let message = event.message.clone().unwrap_or_default();
        let mut identity = kind.clone();
        if self.are_too_many(&kind, &message, now) {
            event.message = Some(format!("(combined from similar events): {message}"));
        } else {
            identity.extend([message, event.involved_object.field_path.clone().unwrap_or_default()]);
        }
        let known = self.counted.get(&identity);
        let counted = match &known {
            Some(known) => Counted { count: known.count + 1, ..(*known).clone() },
            None => Counted { name, count: 1, first: wall },
        };
        let is_known = known.is_some();
        event.metadata.name = Some(counted.name.clone());
        event.count = Some(counted.count);
        event.first_timestamp = Some(Time(counted.first));
        event.last_timestamp = Some(Time(wall));
        self.counted.put(identity, counted);
        let budget = self.budgets.get_or_put(source, || Bucket::new(SPAM, now));
        match (budget.try_take(now), is_known) {
            (false, _) => Decision::Drop,
            (true, true) => Decision::CountUp(Box::new(event)),
            (true, false) => Decision::Create(Box::new(event)),
        }
    }

    fn are_too_many(&mut self, kind: &[String], message: &str, now: Instant) -> bool {
        let similar = self.similar.get_or_put(kind.to_vec(), || Similar { messages: BTreeSet::new(), last: now });
        if now.duration_since(similar.last) > SIMILAR_WITHIN {
            similar.messages.clear();
        }
        similar.last = now;
        similar.messages.insert(message.to_owned());
        let too_many = similar.messages.len() >= SIMILAR_MAX;
        if too_many {
            similar.messages.pop_first();
        }
        too_many
    }
}

/// Who speaks of what.
fn source_of(event: &Event) -> Vec<String> {
    let source = event.source.clone().unwrap_or_default();
    let ObjectReference { kind, namespace, name, uid, api_version, .. } = event.involved_object.clone();
    [source.component, source.host, kind, namespace, name, uid, api_version].map(Option::unwrap_or_default).into()
}

fn kind_of(event: &Event) -> Vec<String> {
    [event.type_.clone(), event.reason.clone()].map(Option::unwrap_or_default).into()
}

/// A map that forgets what was not used for the longest time.
#[derive(Debug)]
struct Recent<K, V> {
    entries: HashMap<K, (u64, V)>,
    uses: u64,
}

impl<K: Eq + Hash + Clone, V> Recent<K, V> {
    fn new() -> Self {
        Self { entries: HashMap::new(), uses: 0 }
    }

    fn get(&mut self, key: &K) -> Option<&V> {
        self.uses += 1;
        let (used, value) = self.entries.get_mut(key)?;
        *used = self.uses;
        Some(value)
    }

    fn put(&mut self, key: K, value: V) {
        self.uses += 1;
        self.entries.insert(key, (self.uses, value));
        self.forget();
    }

    fn get_or_put(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        self.uses += 1;
        if !self.entries.contains_key(&key) {
            self.put(key.clone(), make());
        }
        let (used, value) =
            self.entries.get_mut(&key).expect("it was put a line before, and the newest is not forgotten");
        *used = self.uses;
        value
    }

    /// Half of them at once, so that it costs little per event.
    fn forget(&mut self) {
        if self.entries.len() <= REMEMBERED {
            return;
        }
        let mut uses: Vec<u64> = self.entries.values().map(|(used, _)| *used).collect();
        let (_, middle, _) = uses.select_nth_unstable(REMEMBERED / 2);
        let middle = *middle;
        self.entries.retain(|_, (used, _)| *used > middle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lab {
        correlator: Correlator,
        names: u32,
    }

    impl Lab {
        fn new() -> Self {
            Lab { correlator: Correlator::new(), names: 0 }
        }

        /// What becomes of an event about `pod`: its name, count and message.
        fn observe(&mut self, pod: &str, message: &str) -> Option<(String, i32, String)> {
            let involved_object = ObjectReference { name: Some(pod.into()), ..ObjectReference::default() };
            let event = Event {
                involved_object,
                reason: Some("BackOff".into()),
                message: Some(message.into()),
                ..Event::default()
            };
            self.names += 1;
            let name = format!("e{}", self.names);
            match self.correlator.observe(event, name, Timestamp::from_second(9).unwrap(), Instant::now()) {
                Decision::Create(event) | Decision::CountUp(event) => {
                    Some((event.metadata.name?, event.count?, event.message?))
                }
                Decision::Drop => None,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_again_counts_up() {
        let mut lab = Lab::new();
        assert_eq!(lab.observe("p", "m").unwrap(), ("e1".into(), 1, "m".into()));
        assert_eq!(lab.observe("p", "m").unwrap(), ("e1".into(), 2, "m".into()));
        assert_eq!(lab.observe("q", "m").unwrap(), ("e3".into(), 1, "m".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn similar_ones_become_one() {
        let mut lab = Lab::new();
        for n in 0..9 {
            assert_eq!(lab.observe("p", &format!("m{n}")).unwrap().1, 1);
        }
        let combined = lab.observe("p", "m9").unwrap();
        assert_eq!((combined.1, combined.2.as_str()), (1, "(combined from similar events): m9"));
        let again = lab.observe("p", "m10").unwrap();
        assert_eq!((again.0, again.1), (combined.0, 2));
        tokio::time::advance(SIMILAR_WITHIN + Duration::from_secs(1)).await;
        assert_eq!(lab.observe("p", "m11").unwrap().2, "m11");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_talks_too_much_is_not_heard() {
        let mut lab = Lab::new();
        assert_eq!((0..100).filter(|_| lab.observe("p", "m").is_some()).count(), 25);
        assert!(lab.observe("q", "m").is_some());
        tokio::time::advance(Duration::from_secs(301)).await;
        // What was not told is counted.
        assert_eq!(lab.observe("p", "m").unwrap().1, 101);
        assert!(lab.observe("p", "m").is_none());
    }

    #[test]
    fn memory_is_bounded() {
        let mut recent = Recent::new();
        for n in 0..20_000 {
            recent.put(n, ());
            assert!(recent.entries.len() <= REMEMBERED);
        }
        assert!(recent.get(&19_999).is_some() && recent.get(&0).is_none());
    }
}
