//! `orlop ps`: pods as `kubectl get pods` shows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};

use super::client::Client;
use super::format::{Table, age, print, print_machine};
use super::{has_labels, parse_selector};
use crate::args::{Format, PsOptions};

/// Prints pods once, or on every change with `--watch`.
pub(crate) async fn run(client: &Client, options: &PsOptions) -> anyhow::Result<()> {
    let selector = parse_selector(options.selector.as_deref().unwrap_or(""))?;
    let format = options.output.output;
    let mut shown = BTreeMap::new();
    let mut changes = client.changes("pods").await?;
    loop {
        changes.next().await?;
        let pods = select(client, options, &selector).await?;
        if !options.watch {
            return show(&pods, options);
        }
        let now = Timestamp::now();
        for pod in &pods {
            let row = row(pod, options.all_namespaces, format == Format::Wide, now);
            let key = pod.metadata.uid.clone();
            let without_age: Vec<String> = row.iter().take(row.len() - 1).cloned().collect();
            if shown.insert(key, without_age.clone()).as_ref() != Some(&without_age) {
                let mut table = Table::default();
                table.push(row);
                print(&table.render());
            }
        }
    }
}

async fn select(client: &Client, options: &PsOptions, selector: &[(String, String)]) -> anyhow::Result<Vec<Pod>> {
    let namespace = (!options.all_namespaces).then_some(options.namespace.namespace.as_str());
    let mut pods: Vec<Pod> = client.objects("pods", namespace).await?;
    pods.retain(|pod| has_labels(pod, selector));
    if let Some(name) = &options.pod {
        pods.retain(|pod| pod.metadata.name.as_ref() == Some(name));
        anyhow::ensure!(!pods.is_empty(), "no pod {name:?} in namespace {:?}", options.namespace.namespace);
    }
    Ok(pods)
}

fn show(pods: &[Pod], options: &PsOptions) -> anyhow::Result<()> {
    let format = options.output.output;
    if format == Format::Name {
        pods.iter().for_each(|pod| print(&format!("pod/{}\n", pod.metadata.name.as_deref().unwrap_or_default())));
        return Ok(());
    }
    if print_machine(format, &pods)? {
        return Ok(());
    }
    if pods.is_empty() {
        eprintln!("No pods in namespace {:?}.", options.namespace.namespace);
        return Ok(());
    }
    let wide = format == Format::Wide;
    let mut heads = vec!["NAME", "READY", "STATUS", "RESTARTS", "IP", "AGE"];
    if options.all_namespaces {
        heads.insert(0, "NAMESPACE");
    }
    if wide {
        heads.insert(heads.len() - 1, "UID");
    }
    let mut table = Table::new(&heads);
    let now = Timestamp::now();
    pods.iter().for_each(|pod| table.push(row(pod, options.all_namespaces, wide, now)));
    print(&table.render());
    Ok(())
}

fn row(pod: &Pod, namespace: bool, wide: bool, now: Timestamp) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let total = pod.spec.as_ref().map_or(0, |spec| spec.containers.len());
    let ready = containers.iter().filter(|container| container.ready).count();
    let mut row = vec![
        text(&pod.metadata.name),
        format!("{ready}/{total}"),
        status_text(pod),
        restarts(&status, now),
        status.pod_ip.clone().unwrap_or_else(|| "<none>".to_owned()),
    ];
    if namespace {
        row.insert(0, text(&pod.metadata.namespace));
    }
    if wide {
        row.push(text(&pod.metadata.uid));
    }
    row.push(age(pod.metadata.creation_timestamp.as_ref().map(|time| time.0), now));
    row
}

/// Whether the pod's Ready condition is true.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The STATUS column: the most telling reason, by the rules of kubectl.
pub(crate) fn status_text(pod: &Pod) -> String {
    let Some(status) = &pod.status else { return "Pending".to_owned() };
    let phase = status.reason.clone().or_else(|| status.phase.clone()).unwrap_or_else(|| "Pending".to_owned());
    if pod.metadata.deletion_timestamp.is_some() && !matches!(phase.as_str(), "Succeeded" | "Failed") {
        return "Terminating".to_owned();
    }
    init_text(pod, status).or_else(|| container_text(status)).unwrap_or(phase)
}

fn init_text(pod: &Pod, status: &PodStatus) -> Option<String> {
    let statuses = status.init_container_statuses.as_deref().unwrap_or_default();
    let total = pod.spec.as_ref()?.init_containers.as_ref()?.len();
    statuses.iter().enumerate().find_map(|(index, container)| {
        let state = container.state.as_ref()?;
        if state.terminated.as_ref().is_some_and(|ended| ended.exit_code == 0) || container.started == Some(true) {
            return None;
        }
        let reason = state
            .terminated
            .as_ref()
            .map(|ended| ended.reason.clone().unwrap_or_else(|| format!("ExitCode:{}", ended.exit_code)));
        let waiting = state
            .waiting
            .as_ref()
            .and_then(|waiting| waiting.reason.clone())
            .filter(|reason| reason != "PodInitializing");
        Some(match reason.or(waiting) {
            Some(reason) => format!("Init:{reason}"),
            None => format!("Init:{index}/{total}"),
        })
    })
}

fn container_text(status: &PodStatus) -> Option<String> {
    let statuses = status.container_statuses.as_deref().unwrap_or_default();
    let reason = |container: &ContainerStatus| {
        let state = container.state.as_ref()?;
        if let Some(waiting) = &state.waiting {
            return waiting.reason.clone();
        }
        let ended = state.terminated.as_ref()?;
        Some(ended.reason.clone().unwrap_or_else(|| format!("ExitCode:{}", ended.exit_code)))
    };
    let running = statuses
        .iter()
        .any(|container| container.ready && container.state.as_ref().is_some_and(|state| state.running.is_some()));
    let text = statuses.iter().find_map(reason)?;
    Some(if text == "Completed" && running { "Running".to_owned() } else { text })
}

fn restarts(status: &PodStatus, now: Timestamp) -> String {
    let containers = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    let count: i32 = containers.clone().map(|container| container.restart_count).sum();
    let last = containers
        .filter_map(|container| container.last_state.as_ref()?.terminated.as_ref()?.finished_at.as_ref())
        .map(|time| time.0)
        .max();
    match last {
        Some(last) if count > 0 => format!("{count} ({} ago)", age(Some(last), now)),
        _ => count.to_string(),
    }
}
