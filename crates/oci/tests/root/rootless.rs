//! By a user who is not root and has no namespace of users.

use serde_json::json;

use crate::bundle::Bundle;

pub(crate) const TESTS: &[testkit::serial::Test] =
    &[("a_user_without_rights_has_containers_of_his_own", containers_of_a_user)];

/// Nobody, whom every system knows.
const USER: u32 = 65534;

fn containers_of_a_user() {
    let script =
        "id -u; cat /proc/self/uid_map | tr -s ' '; cat /proc/self/setgroups; touch /made && echo made; exit 6";
    let mut bundle = Bundle::new("rootless", script);
    bundle.change(|spec| {
        spec["root"]["readonly"] = json!(false);
        let linux = &mut spec["linux"];
        let namespaces = linux["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|one| one["type"] != "network");
        namespaces.push(json!({ "type": "user" }));
        linux["uidMappings"] = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
        linux["gidMappings"] = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
        for mount in spec["mounts"].as_array_mut().unwrap() {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "gid=5");
            }
            if mount["destination"] == "/sys" {
                *mount = json!({ "destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"] });
            }
        }
    });
    bundle.give_to(USER);
    assert_eq!(bundle.run(), (Some(6), format!("0\n 0 {USER} 1\ndeny\nmade\n")));
    assert_eq!(bundle.groups(), Vec::<std::path::PathBuf>::new(), "he may make none");

    bundle.change(|spec| spec["process"]["args"] = json!(["sh", "-c", "echo up; sleep 1000"]));
    bundle.create(&[]);
    assert_eq!(bundle.status(), "created");
    let pid = bundle.pid();
    bundle.done(&["start", &bundle.id]);
    assert_eq!(bundle.status(), "running");
    let inside = bundle.output(&[
        "exec",
        &bundle.id,
        "sh",
        "-c",
        "grep CapEff /proc/self/status; readlink /proc/1/ns/user; readlink /proc/self/ns/user; exit 7",
    ]);
    let said = String::from_utf8_lossy(&inside.stdout).into_owned();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((inside.status.code(), lines.len()), (Some(7), 3), "{said}");
    assert_eq!(lines[0], "CapEff:\t0000000020000420", "as the container's own");
    assert_eq!(lines[1], lines[2]);
    bundle.done(&["kill", &bundle.id, "KILL"]);
    bundle.wait(pid);
    assert_eq!(bundle.status(), "stopped");
    bundle.done(&["delete", &bundle.id]);

    // What he has not is refused, and nothing is left.
    bundle.change(|spec| spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|one| one["type"] != "user"));
    bundle.change(|spec| {
        spec["linux"].as_object_mut().unwrap().retain(|name, _| !name.ends_with("idMappings"));
    });
    let create = ["create", "--bundle", bundle.path().to_str().unwrap(), &bundle.id];
    assert!(bundle.refused(&create).contains("rootless container requires user namespaces"));
    assert_eq!(bundle.refused(&["state", &bundle.id]), "container does not exist");
}
