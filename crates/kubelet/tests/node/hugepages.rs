//! Huge pages: who asks for some gets so many, on the file system that they are used by.

use std::path::Path;

use serde_json::json;
use testkit::serial::Test;

use crate::fixture::on_a_node;

pub(crate) const TESTS: &[Test] = &[("huge_pages_are_given_and_limited", huge_pages_are_given_and_limited)];

const SIZES: &str = "/sys/kernel/mm/hugepages";

/// Pages that the machine sets aside until this is dropped.
struct Pages {
    before: String,
}

impl Pages {
    /// Of 2 MiB; none where the machine has not the memory, or nobody counts them.
    fn set_aside(count: u32) -> Option<Self> {
        let file = Path::new(SIZES).join("hugepages-2048kB/nr_hugepages");
        let has_controller = sys::cgroup::Hierarchy::detect().unwrap().has_controller("hugetlb");
        let before = std::fs::read_to_string(&file).ok().filter(|_| has_controller)?;
        let pages = Self { before };
        std::fs::write(&file, count.to_string()).ok()?;
        let now: u32 = std::fs::read_to_string(&file).ok()?.trim().parse().ok()?;
        (now >= count).then_some(pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let file = Path::new(SIZES).join("hugepages-2048kB/nr_hugepages");
        std::fs::write(file, self.before.trim()).unwrap();
    }
}

fn huge_pages_are_given_and_limited() {
    on_a_node(async |node| {
        let Some(_pages) = Pages::set_aside(4) else {
            println!("skipped: needs the hugetlb controller, and memory for four huge pages");
            return node;
        };
        // Two of the four pages are its own; what is more, the kernel does not give it.
        let script = "fallocate -l 4M /pages/two && ! fallocate -l 2M /pages/third && touch /done; sleep 1000";
        let limits = json!({ "hugepages-2Mi": "4Mi", "memory": "64Mi", "cpu": "100m" });
        let probe = json!({ "exec": { "command": ["test", "-e", "/done"] }, "periodSeconds": 1 });
        let container = json!({ "name": "c", "image": node.image(), "command": ["sh", "-c", script],
            "resources": { "limits": limits }, "readinessProbe": probe,
            "volumeMounts": [{ "name": "pages", "mountPath": "/pages" }] });
        let volume = json!({ "name": "pages", "emptyDir": { "medium": "HugePages-2Mi" } });
        let spec = json!({ "terminationGracePeriodSeconds": 0, "containers": [container], "volumes": [volume] });
        node.want_spec("p", spec);
        node.desk.when("it has two pages and no third", |desk| desk.container("p")["ready"] == true).await;
        let group = node.groups.pod(&node.desk.pod("p").unwrap());
        let limits = ["hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"];
        let files = group.directories().into_iter().flat_map(|dir| limits.map(|name| dir.join(name)));
        let limits: Vec<String> = files.filter_map(|file| std::fs::read_to_string(file).ok()).collect();
        assert_eq!(limits.iter().map(|text| text.trim()).collect::<Vec<_>>(), ["4194304"], "of the pod's group");
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        node
    });
}
