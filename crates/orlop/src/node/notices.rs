//! What `orlop up` prints while it runs in the foreground: each event as it happens.

use std::collections::HashMap;
use std::io::IsTerminal as _;

use cluster::Store;
use jiff::{Timestamp, tz::TimeZone};
use k8s_openapi::api::core::v1::Event;

use crate::cli::events::last_seen;
use crate::cli::format::print;

const YELLOW: &str = "\x1b[33m";
const PLAIN: &str = "\x1b[0m";

/// Prints events from now on until it is dropped; those of an earlier life have been seen.
pub(crate) async fn run(store: Store) {
    let coloured = std::io::stdout().is_terminal();
    let mut watch = store.events().watch();
    let began = Timestamp::now();
    let mut counts: HashMap<String, i32> = HashMap::new();
    loop {
        let Some(event) = watch.next().await.object else { continue };
        let (name, count) = (event.metadata.name.clone().unwrap_or_default(), event.count.unwrap_or(1));
        if last_seen(&event).is_some_and(|seen| seen < began) || counts.insert(name, count) == Some(count) {
            continue;
        }
        print(&line(&event, coloured));
        if counts.len() > store.events().len() * 2 + 64 {
            counts.retain(|name, _| store.events().keys().iter().any(|key| key.name() == name));
        }
    }
}

/// `14:03:07  pod/web-1  Unhealthy  Readiness probe failed: …`.
fn line(event: &Event, coloured: bool) -> String {
    let object = &event.involved_object;
    let kind = object.kind.as_deref().unwrap_or_default().to_ascii_lowercase();
    let time = last_seen(event).unwrap_or_else(Timestamp::now).to_zoned(TimeZone::system()).strftime("%H:%M:%S");
    let text = format!(
        "{time}  {kind}/{}  {}  {}",
        object.name.as_deref().unwrap_or_default(),
        event.reason.as_deref().unwrap_or_default(),
        event.message.as_deref().unwrap_or_default().trim().replace('\n', " ")
    );
    let warned = coloured && event.type_.as_deref() == Some("Warning");
    if warned { format!("{YELLOW}{text}{PLAIN}\n") } else { format!("{text}\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let event: Event = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "web"}, "type": "Warning",
            "reason": "Unhealthy", "message": "Readiness probe failed: a\nb\n", "lastTimestamp": "2026-01-02T03:04:05Z"
        }))
        .unwrap();
        let text = line(&event, false);
        assert!(text.ends_with("  pod/web  Unhealthy  Readiness probe failed: a b\n"), "{text}");
        assert!(line(&event, true).starts_with(YELLOW));
    }
}
