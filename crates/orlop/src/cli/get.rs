//! `orlop get`: any kind of object, as JSON, YAML or a short table.

use serde_json::Value;

use super::client::{Client, plural};
use super::format::{Table, age, print, print_machine};
use crate::args::{Format, GetOptions};

/// Prints objects of a kind.
pub(crate) async fn run(client: &Client, options: &GetOptions) -> anyhow::Result<()> {
    let namespace = (!options.all_namespaces).then_some(options.namespace.namespace.as_str());
    let mut objects: Vec<Value> = client.objects(&plural(&options.kind), namespace).await?;
    if let Some(name) = &options.name {
        objects.retain(|object| object["metadata"]["name"] == **name);
        anyhow::ensure!(
            !objects.is_empty(),
            "no {} {name:?} in namespace {:?}",
            options.kind,
            options.namespace.namespace
        );
    }
    if options.output.output == Format::Name {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name = |one: &Value| format!("{}/{}\n", text(&one["kind"]).to_lowercase(), text(&one["metadata"]["name"]));
        print(&objects.iter().map(name).collect::<String>());
        return Ok(());
    }
    if print_machine(options.output.output, &objects)? {
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "SUMMARY", "AGE"]);
    for object in &objects {
        let created = object["metadata"]["creationTimestamp"].as_str().and_then(|text| text.parse().ok());
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        table.push(vec![name, summary(object), age(created, jiff::Timestamp::now())]);
    }
    if table.is_empty() {
        eprintln!("No {} in namespace {:?}.", plural(&options.kind), options.namespace.namespace);
    } else {
        print(&table.render());
    }
    Ok(())
}

/// What one wants to know of an object at a glance.
fn summary(object: &Value) -> String {
    let text = |pointer: &str| {
        object.pointer(pointer).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    };
    let count = |pointer: &str| object.pointer(pointer).and_then(Value::as_object).map(serde_json::Map::len);
    if let Some(address) = text("/spec/clusterIP") {
        let ports = object["spec"]["ports"].as_array().cloned().unwrap_or_default();
        let ports: Vec<String> = ports
            .iter()
            .map(|port| format!("{}/{}", port["port"], port["protocol"].as_str().unwrap_or("TCP")))
            .collect();
        return format!("{address} {}", ports.join(","));
    }
    if let Some(replicas) = text("/spec/replicas") {
        return format!("{}/{replicas} ready", text("/status/readyReplicas").unwrap_or_else(|| "0".to_owned()));
    }
    match (count("/data"), text("/status/phase")) {
        (Some(keys), _) => format!("{keys} keys"),
        (None, Some(phase)) => phase,
        (None, None) => String::new(),
    }
}
