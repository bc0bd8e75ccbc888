//! `orlop events`, and events as `describe` shows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

use super::client::{Client, plural};
use super::format::{Table, age, print, print_machine};
use crate::args::EventsOptions;

/// Prints events once, or every new one with `--watch`.
pub(crate) async fn run(client: &Client, options: &EventsOptions) -> anyhow::Result<()> {
    let mut shown: BTreeMap<Option<String>, Option<i32>> = BTreeMap::new();
    let mut heads = true;
    let mut changes = client.changes("events").await?;
    loop {
        changes.next().await?;
        let mut fresh = select(client, options).await?;
        fresh.retain(|event| shown.insert(event.metadata.name.clone(), event.count) != Some(event.count));
        let is_news = heads || !fresh.is_empty();
        if is_news && !print_machine(options.output.output, &fresh)? {
            print(&table(&fresh, heads).render());
        }
        if !options.watch {
            return Ok(());
        }
        heads = false;
    }
}

async fn select(client: &Client, options: &EventsOptions) -> anyhow::Result<Vec<Event>> {
    let namespace = (!options.all_namespaces).then_some(options.namespace.namespace.as_str());
    let mut events: Vec<Event> = client.objects("events", namespace).await?;
    if let Some((kind, name)) = options.object.as_deref().map(super::split_kind) {
        events.retain(|event| is_about(event, kind, name));
    }
    events.sort_by_key(last_seen);
    Ok(events)
}

/// Whether the event is about this object; kinds as kubectl writes them.
pub(crate) fn is_about(event: &Event, kind: &str, name: &str) -> bool {
    let object = &event.involved_object;
    object.name.as_deref() == Some(name) && object.kind.as_deref().is_some_and(|of| plural(of) == plural(kind))
}

/// When the event happened last.
pub(crate) fn last_seen(event: &Event) -> Option<Timestamp> {
    let micro = event.event_time.as_ref().map(|time| time.0);
    event.last_timestamp.as_ref().map(|time| time.0).or(micro).or(event
        .metadata
        .creation_timestamp
        .as_ref()
        .map(|time| time.0))
}

/// Events as a table: when, how serious, why, about what, the message.
pub(crate) fn table(events: &[Event], heads: bool) -> Table {
    let mut table =
        if heads { Table::new(&["LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]) } else { Table::default() };
    let now = Timestamp::now();
    for event in events {
        let object = &event.involved_object;
        let kind = object.kind.clone().unwrap_or_default().to_ascii_lowercase();
        let count = event.count.filter(|count| *count > 1).map_or(String::new(), |count| format!(" (x{count})"));
        table.push(vec![
            format!("{}{count}", age(last_seen(event), now)),
            event.type_.clone().unwrap_or_default(),
            event.reason.clone().unwrap_or_default(),
            format!("{kind}/{}", object.name.clone().unwrap_or_default()),
            event.message.clone().unwrap_or_default().trim().replace('\n', " "),
        ]);
    }
    table
}
