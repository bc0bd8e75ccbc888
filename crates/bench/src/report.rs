//! The table, and the document around it.

use std::collections::BTreeSet;

use crate::measure::{About, Measure, Outcome, Results, Samples};

const HEADER: [&str; 5] = ["", "orlop", "reference", "ratio", "promised"];

/// All tables, each below its title if it has one.
pub(crate) fn tables(orlop: &Outcome, reference: &Outcome, name: &str) -> String {
    let titles: BTreeSet<&String> = orlop.tables.keys().chain(reference.tables.keys()).collect();
    let nothing = Results::default();
    let tables = titles.into_iter().map(|title| {
        let [ours, theirs] = [orlop, reference].map(|outcome| outcome.tables.get(title).unwrap_or(&nothing));
        let table = table(ours, theirs, name);
        if title.is_empty() { table } else { format!("### {title}\n\n{table}") }
    });
    tables.collect::<Vec<_>>().join("\n")
}

/// A Markdown table which is also fit for a terminal. Medians, and the 90th percentile in brackets.
fn table(orlop: &Results, reference: &Results, name: &str) -> String {
    let measures: BTreeSet<Measure> = orlop.measures().chain(reference.measures()).collect();
    let mut rows = vec![HEADER.map(str::to_owned)];
    rows[0][2] = name.to_owned();
    rows.extend(measures.into_iter().map(|measure| row(&measure.about(), orlop.get(measure), reference.get(measure))));
    render(&rows)
}

fn row(about: &About, orlop: Option<&Samples>, reference: Option<&Samples>) -> [String; 5] {
    let ratio = orlop.zip(reference).map_or(String::new(), |(orlop, reference)| {
        let (theirs, ours) = (reference.median(), orlop.median());
        let ratio = if about.more_is_better { ours / theirs } else { theirs / ours };
        // Below what can be measured there is no ratio.
        if ratio.is_finite() { format!("{} ×", number(ratio)) } else { String::new() }
    });
    let title = if about.unit.is_empty() { about.title.to_owned() } else { format!("{}, {}", about.title, about.unit) };
    [title, shown(orlop), shown(reference), ratio, about.promise.to_owned()]
}

fn shown(samples: Option<&Samples>) -> String {
    let Some(samples) = samples else { return String::new() };
    match samples.count() {
        0..10 => number(samples.median()),
        _ => format!("{} ({})", number(samples.median()), number(samples.percentile(90))),
    }
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value {
        value if value >= 99.95 => format!("{value:.0}"),
        value if value >= 9.995 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

fn render(rows: &[[String; 5]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |cells: [String; 5]| format!("| {} |\n", cells.join(" | "));
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text += &line(std::array::from_fn(|column| padded(&row[column], widths[column], column > 0)));
        if index == 0 {
            text += &line(std::array::from_fn(|column| {
                let rule = "-".repeat(widths[column].saturating_sub(1));
                if column > 0 { format!("{rule}:") } else { format!("{rule}-") }
            }));
        }
    }
    text
}

fn padded(text: &str, width: usize, right: bool) -> String {
    let space = " ".repeat(width.saturating_sub(text.chars().count()));
    if right { format!("{space}{text}") } else { format!("{text}{space}") }
}

/// What a document says beside its table.
pub(crate) struct Text {
    title: &'static str,
    command: &'static str,
    manner: &'static str,
    notes: &'static str,
}

/// About container runtimes.
pub(crate) const RUNTIME: Text = Text {
    title: "Container runtime and images",
    command: "cargo xtask bench",
    manner: "Both sides do the same work through the same gRPC client on their CRI sockets, in turn, each in namespaces of its \
             own with a registry on loopback and a bridge network.",
    notes: "\
- **pod start** is from the request to the running process: one container of busybox, its own network, process, IPC, UTS and
  mount namespaces, the default seccomp profile, CPU and memory limits.
- **beside the application** is orlop's keeper, against the shim and the pause process; shared pages are divided among those
  who share them.
- **idle** is the CPU time of all processes of the runtime, over 30 s in which nothing happens.
- **an application that logs** writes lines of 63 letters; what it has written is the kernel's count for its process. The daemon is
  stopped by SIGSTOP. Its log is cut short from time to time, as somebody who rotates it would.
",
};

/// About nodes.
pub(crate) const NODE: Text = Text {
    title: "Node of a real API server",
    command: "cargo xtask bench node",
    manner: "Both sides get the same pods from a kube-apiserver, in turn, each with etcd, API server and registry in namespaces \
             of its own. What they do is seen by a watch.",
    notes: "\
- Pods have one container of busybox that ends at once on SIGTERM, a grace period of 5 s, no token of a service account, and
  are bound to the node when they are created. The time is from the request to the event of the watch.
- **daemons** are all processes that are not there for one pod; no service proxy runs on either side.
- **idle** is the CPU time of all processes of the node, over 30 s in which nothing happens.
- **ConfigMap** is from the request to what a process of the pod reads.
",
};

/// About service proxies.
pub(crate) const PROXY: Text = Text {
    title: "Service proxy",
    command: "cargo xtask bench proxy",
    manner: "Both sides are before the same Services and EndpointSlices of a kube-apiserver with etcd, in turn, each on a node \
             of its own: network namespaces for the node, its pods and a client, with no way out.",
    notes: "\
- Who asks is a pod; who answers is another one of the same node, by TCP. Both proxies have the configuration that they have by
  default, but that limits of the machine's connection tracking stay as they are.
- **created** and **deleted** are from the request to the API server to the first connection that is answered, or that is not.
  Endpoints are there before the Service, and more than a second passes after one change before the next.
- **RSS** is the proxy's own, without programs that it starts; **steady** is 20 s after the start, **peak** until the end.
- **endpoint changes** are 1,000 updates of EndpointSlices, 100 a second, with the time of the programs that the proxy starts.
- **connections** are 2,000 in turn, to 16 Services that lie all over the list.
- What is promised is promised for 10,000 Services with 10 endpoints each.
",
};

/// About rolling updates.
pub(crate) const ROLLOUT: Text = Text {
    title: "Rolling updates",
    command: "cargo xtask bench rollout",
    manner: "Both sides run the same Deployment of three pods under a whole control plane, in turn, and it is updated while \
             clients ask its Service.",
    notes: "\
- Each request has a connection of its own and 5 s; they are sent at their times, whether those before were answered or not.
- The pods have a readiness probe and no `preStop` hook. Their server stops to listen on SIGTERM, answers what it has accepted and
  ends.
",
};

/// A document about what was measured.
pub(crate) fn document(about: &Text, orlop: &Outcome, reference: &Outcome, name: &str) -> String {
    let Text { title, command, manner, notes } = about;
    format!(
        "# {title}\n\nMeasured on {} by\n\n    {command} --markdown FILE\n\n{manner} Medians, the 90th percentile in \
         brackets; the ratio says how many times less orlop takes (or more it does). Times depend on the machine and on what \
         else it does; ratios less so.\n\n{}\n{notes}",
        machine(),
        tables(orlop, reference, name)
    )
}

/// The machine in a few words.
fn machine() -> String {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory: f64 = value(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0.0);
    let version = if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" };
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let kernel = kernel.split('-').next().unwrap_or_default().to_owned();
    let model = value(&read("/proc/cpuinfo"), "model name");
    format!("{cpus} cores of {model}, {:.0} GiB, Linux {kernel}, control groups {version}", memory / 1024.0 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(measure: Measure, values: &[f64]) -> Results {
        let mut results = Results::default();
        values.iter().for_each(|value| results.add(measure, *value));
        results
    }

    #[test]
    fn sides_stand_beside_each_other() {
        let (orlop, reference) = (results(Measure::PodStart, &[12.0; 10]), results(Measure::PodStart, &[240.0; 10]));
        let text = table(&orlop, &reference, "containerd");
        let row = text.lines().nth(2).unwrap();
        assert!(row.contains("12.0 (12.0)") && row.contains("240 (240)") && row.contains("20.0 ×"), "{text}");
        assert_eq!(text.lines().map(|line| line.chars().count()).collect::<BTreeSet<_>>().len(), 1, "{text}");
    }

    #[test]
    fn more_pods_a_second_are_better() {
        let (orlop, reference) = (results(Measure::PodsPerSecond, &[60.0]), results(Measure::PodsPerSecond, &[6.0]));
        assert!(table(&orlop, &reference, "containerd").contains("10.0 ×"));
    }

    #[test]
    fn a_missing_side_leaves_its_column_empty() {
        let text = table(&results(Measure::Pull, &[2.5]), &Results::default(), "containerd");
        let cells: Vec<&str> = text.lines().nth(2).unwrap().split('|').map(str::trim).collect();
        assert_eq!(cells[2..5], ["2.50", "", ""], "{text}");
    }
}
