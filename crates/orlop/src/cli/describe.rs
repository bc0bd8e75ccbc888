//! `orlop describe`: an object as YAML without noise, and its events.

use serde_json::Value;

use super::client::{Client, plural};
use super::events;
use super::format::print;
use crate::args::DescribeOptions;

/// Prints one object, or all of a kind.
pub(crate) async fn run(client: &Client, options: &DescribeOptions) -> anyhow::Result<()> {
    let (kind, name) = match (&options.name, options.kind.split_once('/')) {
        (Some(name), _) => (options.kind.as_str(), Some(name.as_str())),
        (None, Some((kind, name))) => (kind, Some(name)),
        (None, None) => (options.kind.as_str(), None),
    };
    let namespace = options.namespace.namespace.as_str();
    let mut objects: Vec<Value> = client.objects(&plural(kind), Some(namespace)).await?;
    objects.retain(|object| name.is_none_or(|name| object["metadata"]["name"] == name));
    anyhow::ensure!(!objects.is_empty(), "no {kind} {} in namespace {namespace:?}", name.unwrap_or("at all"));
    let all_events: Vec<k8s_openapi::api::core::v1::Event> = client.objects("events", Some(namespace)).await?;
    for object in &mut objects {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        hide(object, kind);
        print(&format!("{}\n", serde_saphyr::to_string(object)?.trim_end()));
        if plural(kind) == "services" {
            // A node that leaves Services to another proxy says so, and shows the rest.
            match client.get::<Option<String>>(&crate::proxy::explain_path(namespace, &name)).await {
                Ok(explained) => print(&format!("rules:\n{}", indent(&explained.unwrap_or_else(|| "none\n".into())))),
                Err(error) => print(&format!("rules: {error:#}\n")),
            }
        }
        let mut about: Vec<_> =
            all_events.iter().filter(|event| events::is_about(event, kind, &name)).cloned().collect();
        about.sort_by_key(events::last_seen);
        if about.is_empty() {
            print("events: none\n");
        } else {
            print(&format!("events:\n{}", indent(&events::table(&about, true).render())));
        }
    }
    Ok(())
}

/// Removes what is the machine's business, and the values of secrets.
fn hide(object: &mut Value, kind: &str) {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    if plural(kind) == "secrets" {
        for field in ["data", "stringData"] {
            for value in object[field].as_object_mut().into_iter().flat_map(|map| map.values_mut()) {
                *value = Value::String(format!("<{} bytes>", value.as_str().map_or(0, str::len)));
            }
        }
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
