//! What the kernel says of a kill for want of memory (mm/oom_kill.c). Pure.
//!
//! ```text
//! oom-kill:constraint=CONSTRAINT_MEMCG,…,oom_memcg=/a,task_memcg=/a/b,task=tail,pid=7,uid=0
//! Memory cgroup out of memory: Killed process 7 (tail) total-vm:9kB, anon-rss:5kB, file-rss:4kB, shmem-rss:0kB, UID:0 …
//! ```
//!
//! Names of processes and of groups are partly a container's to choose; a name that looks like more says of nobody else
//! that he was killed.

use std::fmt;

/// A process that was killed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kill {
    pub(super) pid: u32,
    /// Its name.
    pub(super) process: String,
    /// The control group that it was in.
    group: String,
    /// The group whose limit was reached; none if the machine had no memory left.
    full: Option<String>,
    memory: Split,
}

/// The memory of a process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Split {
    anon: u64,
    file: u64,
    shmem: u64,
}

/// Puts the lines of a kill together. Of several processes that are killed at once, the first is the one that was chosen.
#[derive(Debug, Default)]
pub(super) struct Reader {
    chosen: Option<Chosen>,
}

#[derive(Debug)]
struct Chosen {
    pid: u32,
    process: String,
    group: String,
    full: Option<String>,
}

impl Reader {
    /// Takes the next record of the log: `priority,number,time,flags;text`, and lines with keys.
    pub(super) fn record(&mut self, record: &str) -> Option<Kill> {
        let (head, text) = record.split_once(';')?;
        self.said(head.split(',').next()?, text.lines().next()?)
    }

    /// Takes the next line of the whole log: `<priority>[time] text`, or without a time (`printk.time`).
    pub(super) fn line(&mut self, line: &str) -> Option<Kill> {
        let (priority, rest) = line.strip_prefix('<')?.split_once('>')?;
        let timed = rest.strip_prefix('[').and_then(|rest| rest.split_once("] "));
        self.said(priority, timed.map_or(rest, |(_, text)| text))
    }

    fn said(&mut self, priority: &str, line: &str) -> Option<Kill> {
        // Programs may write to the log, too, but not as the kernel, whose facility is 0.
        let priority: u32 = priority.parse().ok()?;
        if priority >= 8 {
            return None;
        }
        if let Some(chosen) = chosen(line) {
            self.chosen = Some(chosen);
            return None;
        }
        let memory = split(line)?;
        let Chosen { pid, process, group, full } = self.chosen.take()?;
        Some(Kill { pid, process, group, full, memory })
    }
}

fn chosen(line: &str) -> Option<Chosen> {
    let fields = line.strip_prefix("oom-kill:constraint=")?;
    let (before, rest) = fields.split_once(",task_memcg=")?;
    let (group, rest) = rest.split_once(",task=")?;
    let (rest, _uid) = rest.rsplit_once(",uid=")?;
    let (process, pid) = rest.rsplit_once(",pid=")?;
    let full = before.split_once(",oom_memcg=").map(|(_, group)| group.to_owned());
    Some(Chosen { pid: pid.parse().ok()?, process: process.to_owned(), group: group.to_owned(), full })
}

fn split(line: &str) -> Option<Split> {
    let (_, victim) = line.split_once("Killed process ")?;
    // Behind the name, which may hold anything.
    let (_, memory) = victim.rsplit_once(" total-vm:")?;
    let kib = |name: &str| -> Option<u64> {
        let (_, value) = memory.split_once(name)?;
        value.split_once("kB")?.0.parse().ok()
    };
    Some(Split { anon: kib("anon-rss:")?, file: kib("file-rss:")?, shmem: kib("shmem-rss:")? })
}

impl Kill {
    /// Whether the machine had no memory left, and not a group of processes.
    pub(super) fn is_of_machine(&self) -> bool {
        self.full.is_none()
    }

    /// Whether the process was in the groups of this container.
    pub(super) fn is_in(&self, container: &str) -> bool {
        self.group.split('/').any(|name| container_of(name) == container)
    }

    /// What may be the uid of the pod that the process was in: of several, the first that is one.
    pub(super) fn pods(&self) -> impl Iterator<Item = String> {
        self.group.split('/').filter_map(pod_of)
    }

    fn whose_limit(&self) -> &'static str {
        let Some(full) = &self.full else { return "the machine had no memory left" };
        let mut names = full.split('/').rev();
        if names.next().and_then(pod_of).is_some() {
            return "the pod had reached its limit";
        }
        if names.any(|name| pod_of(name).is_some()) {
            return "the container had reached its limit";
        }
        "all pods together had reached their limit"
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, process, memory: Split { anon, file, shmem }, .. } = self;
        let (rss, why) = (anon.saturating_add(*file).saturating_add(*shmem), self.whose_limit());
        write!(
            f,
            "Killed process {pid} ({process}) for want of memory, rss: {rss}kB, anon-rss: {anon}kB, file-rss: {file}kB, \
             shmem-rss: {shmem}kB: {why}"
        )
    }
}

/// The id in the name of a container's group: systemd has `runtime-<id>.scope`.
fn container_of(name: &str) -> &str {
    let Some(scope) = name.strip_suffix(".scope") else { return name };
    scope.rsplit_once('-').map_or(scope, |(_, id)| id)
}

/// The uid in the name of a pod's group: `pod<uid>`, or systemd's `…-pod<uid>.slice`, which has no dashes of its own.
fn pod_of(name: &str) -> Option<String> {
    match name.strip_suffix(".slice") {
        Some(slice) => slice.split_once("-pod").map(|(_, uid)| uid.replace('_', "-")),
        None => name.strip_prefix("pod").map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: &str = "total-vm:265120kB, anon-rss:16256kB, file-rss:1620kB, shmem-rss:8kB, UID:0 pgtables:80kB \
        oom_score_adj:0";

    fn read(records: &[String]) -> Vec<Kill> {
        let mut reader = Reader::default();
        records.iter().filter_map(|record| reader.record(record)).collect()
    }

    fn killed(groups: &str, task: &str) -> [String; 2] {
        [
            format!(
                "6,1,1,-;oom-kill:constraint=C,nodemask=(null),cpuset=x,mems_allowed=0,{groups},task={task},pid=7,uid=0\n"
            ),
            format!("3,2,1,-;Memory cgroup out of memory: Killed process 7 ({task}) {MEMORY}\n SUBSYSTEM=x\n"),
        ]
    }

    #[test]
    fn a_kill_names_its_victim() {
        let pod = "/kubepods/burstable/pod1-2";
        for (groups, container, why) in [
            (format!("oom_memcg={pod}/abc,task_memcg={pod}/abc/inner"), "abc", "the container had reached its limit"),
            (format!("oom_memcg={pod},task_memcg={pod}/abc"), "abc", "the pod had reached its limit"),
            (format!("oom_memcg=/kubepods,task_memcg={pod}/abc"), "abc", "all pods together had reached their limit"),
            (format!("global_oom,task_memcg={pod}/abc"), "abc", "the machine had no memory left"),
            (
                "oom_memcg=/kubepods.slice/kubepods-pod1_2.slice/cri-containerd-abc.scope,\
                 task_memcg=/kubepods.slice/kubepods-pod1_2.slice/cri-containerd-abc.scope"
                    .to_owned(),
                "abc",
                "the container had reached its limit",
            ),
        ] {
            let kills = read(&killed(&groups, "tail"));
            let [kill] = kills.as_slice() else { panic!("{groups}: {kills:?}") };
            assert!(kill.is_in(container) && !kill.is_in("ab"), "{kill:?}");
            assert!(kill.pods().eq(["1-2"]), "{kill:?}");
            assert_eq!(kill.is_of_machine(), groups.starts_with("global"));
            let text = kill.to_string();
            let memory = "rss: 17884kB, anon-rss: 16256kB, file-rss: 1620kB, shmem-rss: 8kB";
            assert_eq!(text, format!("Killed process 7 (tail) for want of memory, {memory}: {why}"));
        }
    }

    #[test]
    fn a_name_is_nothing_but_a_name() {
        let group = "/kubepods/pod1/abc";
        let groups = format!("oom_memcg={group},task_memcg={group}");
        for task in ["a,pid=1,uid=2", "a) total-vm:0kB", "x,task=y"] {
            let kills = read(&killed(&groups, task));
            let [kill] = kills.as_slice() else { panic!("{task}: {kills:?}") };
            assert!((kill.pid, kill.memory.anon) == (7, 16256) && kill.pods().eq(["1"]), "{kill:?}");
        }
    }

    #[test]
    fn the_whole_log_says_the_same() {
        let [first, second] = killed("global_oom,task_memcg=/a", "tail");
        let text = |record: &str| record.split_once(';').unwrap().1.lines().next().unwrap().to_owned();
        let (first_text, second_text) = (text(&first), text(&second));
        let kills = read(&[first, second]);
        for time in ["", "[    7.000001] ", "[    7.000001][   T12] "] {
            let mut reader = Reader::default();
            let lines = [format!("<6>{time}{first_text}"), format!("<3>{time}{second_text}")];
            assert_eq!(lines.iter().filter_map(|line| reader.line(line)).collect::<Vec<_>>(), kills, "{time}");
        }
        let mut reader = Reader::default();
        assert_eq!(reader.line(&format!("<14>{first_text}")), None);
        assert_eq!(reader.line(&format!("<3>{second_text}")), None);
    }

    #[test]
    fn what_others_write_is_no_kill() {
        let [first, second] = killed("global_oom,task_memcg=/", "init");
        let as_program = |record: &str| format!("14{}", &record[1..]);
        assert_eq!(read(&[as_program(&first), second.clone()]), []);
        assert_eq!(read(&[first.clone(), as_program(&second)]), []);
        // Those that go with the chosen one.
        assert_eq!(read(&[first, second.clone(), second]).len(), 1);
    }
}
