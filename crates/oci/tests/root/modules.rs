//! What a bundle says to AppArmor and SELinux, on a kernel that has the one or the other.

use std::os::fd::AsFd as _;

use serde_json::json;

use crate::bundle::Bundle;

pub(crate) const TESTS: &[testkit::serial::Test] = &[
    ("apparmor_confines_program_and_exec", apparmor),
    ("selinux_labels_processes_and_mounts", selinux),
    ("without_a_module_its_words_are_refused", without),
];

const LABELS: &str = "tr -d '\\0' </proc/self/attr/current";

/// Allows all but one file.
const PROFILE: &str = "abi <abi/3.0>,
profile orlop-test-bundle flags=(attach_disconnected) {
  file,
  capability,
  signal,
  deny /forbidden w,
}
";

fn apparmor() {
    if !sys::kernel::has_apparmor() || testkit::host::find("apparmor_parser").is_none() {
        println!("skipped: needs a kernel with AppArmor, and apparmor_parser");
        return;
    }
    let script = format!(
        "{LABELS}; echo x >/allowed && echo written; echo x >/forbidden || echo denied; touch /ready; sleep 1000"
    );
    let bundle = Bundle::new("apparmor", &script);
    let file = bundle.path().join("profile");
    std::fs::write(&file, PROFILE).unwrap();
    let load = |how: &str| {
        let mut parser = std::process::Command::new("apparmor_parser");
        assert!(parser.args(["--skip-cache", how]).arg(&file).status().unwrap().success());
    };
    load("--replace");
    bundle.change(|spec| {
        spec["process"]["apparmorProfile"] = json!("orlop-test-bundle");
        spec["root"]["readonly"] = json!(false);
        // A hook has a program of the image, and is confined like that.
        let script = format!("{LABELS} >/hook");
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] });
        spec["hooks"] = json!({ "startContainer": [hook] });
    });
    bundle.create(&[]);
    bundle.done(&["start", &bundle.id]);
    bundle.done(&["exec", &bundle.id, "sh", "-c", "until [ -e /ready ]; do usleep 1000; done"]);
    let forbidden = "echo x >/forbidden || echo denied";
    let text = bundle.done(&["exec", &bundle.id, "sh", "-c", &format!("{LABELS}; {forbidden} 2>/dev/null; cat /hook")]);
    assert_eq!(text.matches("orlop-test-bundle (enforce)").count(), 2, "{text}");
    assert!(text.contains("denied"), "{text}");
    let free = ["exec", "--apparmor", "unconfined", &bundle.id, "sh", "-c", LABELS];
    // A confined process cannot leave its profile, but this one comes from outside.
    assert_eq!(bundle.done(&free).trim(), "unconfined");
    let strict = ["exec", "--no-new-privs", &bundle.id, "sh", "-c", LABELS];
    assert_eq!(bundle.done(&strict).trim(), "orlop-test-bundle (enforce)");
    bundle.done(&["delete", "--force", &bundle.id]);
    let said = bundle.said();
    assert!(said.contains("orlop-test-bundle (enforce)") && said.contains("written"), "{said}");
    assert!(said.contains("Permission denied") && said.contains("denied"), "{said}");
    load("--remove");
    let text = bundle.refused(&["run", "--bundle", bundle.path().to_str().unwrap(), &bundle.id]);
    assert!(text.contains("orlop-test-bundle"), "{text}");
}

fn selinux() {
    if !sys::kernel::has_selinux() {
        println!("skipped: needs a kernel with SELinux");
        return;
    }
    let (process, file) = ("system_u:system_r:container_t:s0:c7,c8", "system_u:object_r:container_file_t:s0:c7,c8");
    let script = format!(
        "{LABELS}; echo; cat /proc/1/mountinfo; touch /proc/acpi/x 2>/dev/null; echo x >/dev/shm/x && cat /dev/shm/x"
    );
    let bundle = Bundle::new("selinux", &script);
    // Callers label the root; here by the file system's own labels.
    let root = sys::tree::Dir::open(&bundle.path().join("rootfs")).unwrap();
    let label = |place: std::os::fd::BorrowedFd<'_>| sys::xattr::set_place(place, c"security.selinux", file.as_bytes());
    root.for_each_below(|place, _| label(place)).unwrap();
    label(root.as_fd()).unwrap();
    bundle.change(|spec| {
        spec["process"]["selinuxLabel"] = json!(process);
        spec["linux"]["mountLabel"] = json!(file);
    });
    let (code, text) = bundle.run();
    assert_eq!(code, Some(0), "{text}");
    assert!(text.starts_with(process) && text.trim_end().ends_with("\nx"), "{text}");
    for at in [" / /dev ", " / /dev/pts ", " / /dev/shm "] {
        let line = text.lines().find(|line| line.contains(at)).unwrap();
        assert!(line.contains(&format!("context=\"{file}\"")), "{line}");
    }
    let line = text.lines().find(|line| line.contains(" /proc ")).unwrap();
    assert!(!line.contains("context="), "{line}");
    bundle.change(|spec| spec["process"]["selinuxLabel"] = json!("system_u:system_r:nosuch_t:s0"));
    let text = bundle.refused(&["run", "--bundle", bundle.path().to_str().unwrap(), &bundle.id]);
    assert!(text.contains("nosuch_t"), "{text}");
}

fn without() {
    let bundle = Bundle::new("without", "true");
    let refused = |field: &str, value: &str, part: &str| {
        bundle.change(|spec| spec["process"][field] = json!(value));
        let text = bundle.refused(&["run", "--bundle", bundle.path().to_str().unwrap(), &bundle.id]);
        assert!(text.contains(part), "{text}");
        bundle.change(|spec| spec["process"][field] = json!(""));
    };
    if !sys::kernel::has_apparmor() {
        refused("apparmorProfile", "x", "the kernel runs without AppArmor");
    }
    if !sys::kernel::has_selinux() {
        refused("selinuxLabel", "a:b:c", "the kernel runs without SELinux");
    }
    // Callers label mounts wherever they are.
    bundle.change(|spec| spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0:c7,c8"));
    if !sys::kernel::has_selinux() {
        assert_eq!(bundle.run().0, Some(0));
    }
}
