//! Bundles of a busybox tree, and the runtime as its callers start it.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// A bundle and the state directory of its containers, both gone at the end; so are the containers.
pub(crate) struct Bundle {
    pub(crate) dir: tempfile::TempDir,
    /// Name of its container.
    pub(crate) id: String,
    program: PathBuf,
    name: &'static str,
    /// Who runs it; this user without one.
    user: Option<u32>,
}

impl Bundle {
    /// One whose process is a shell with this script. `name` is part of the container's.
    pub(crate) fn new(name: &str, script: &str) -> Self {
        Self::of(std::env::current_exe().unwrap(), "runc", name, script)
    }

    /// As [`Self::new`], for another program, called by another name.
    pub(crate) fn of(program: PathBuf, called: &'static str, name: &str, script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        testkit::image::busybox_root(&rootfs).unwrap();
        let id = format!("orlop-test-{name}-{}", std::process::id());
        let bundle = Self { dir, id, program, name: called, user: None };
        let mut made = bundle.runtime(&["spec", "--bundle", bundle.path().to_str().unwrap()]);
        assert!(made.status().unwrap().success());
        bundle.change(|spec| {
            spec["process"]["args"] = json!(["sh", "-c", script]);
            spec["process"]["terminal"] = json!(false);
            spec["linux"]["cgroupsPath"] = json!(format!("/{}", bundle.id));
        });
        bundle
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Makes it another user's, with a runtime that he may execute.
    pub(crate) fn give_to(&mut self, user: u32) {
        let program = self.path().join("runc");
        std::fs::copy(&self.program, &program).unwrap();
        let id = format!("{user}:{user}");
        assert!(Command::new("chown").args(["-R", &id]).arg(self.path()).status().unwrap().success());
        // As where it is installed, it belongs to root.
        std::os::unix::fs::chown(&program, Some(0), Some(0)).unwrap();
        (self.program, self.user) = (program, Some(user));
    }

    /// Changes its configuration.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Value)) {
        let path = self.path().join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut spec);
        std::fs::write(path, spec.to_string()).unwrap();
    }

    /// A command of the runtime.
    pub(crate) fn runtime(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg0(self.name).arg("--root").arg(self.path().join("state"));
        command.arg("--log").arg(self.path().join("log.json")).args(["--log-format", "json"]).args(words);
        command.stdin(Stdio::null());
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Runs the program in the bundle's directory with nothing but these words; its output.
    pub(crate) fn plainly(&self, words: &[&str]) -> Output {
        let mut command = Command::new(&self.program);
        command.arg0(self.name).args(words).current_dir(self.path()).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// Runs a command; its output.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        self.runtime(words).output().unwrap()
    }

    /// Runs a command that has to succeed; what it prints.
    pub(crate) fn done(&self, words: &[&str]) -> String {
        let output = self.output(words);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{words:?}: {}{text}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// Runs a command that has to fail: what it says on standard error, which is the last in the log, too.
    pub(crate) fn refused(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(!output.status.success(), "{words:?} is done");
        let text = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        let log = std::fs::read_to_string(self.path().join("log.json")).unwrap();
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!((last["level"].as_str(), last["msg"].as_str()), (Some("error"), Some(text.as_str())));
        text
    }

    /// `create`, with the bundle's own directory; the container's output goes to a file that [`Self::said`] reads.
    pub(crate) fn create(&self, options: &[&str]) {
        let status = self.creation(options).status().unwrap();
        let error = || std::fs::read_to_string(self.path().join("log.json")).unwrap_or_default();
        assert!(status.success(), "create: {}", error());
    }

    /// The command of [`Self::create`].
    pub(crate) fn creation(&self, options: &[&str]) -> Command {
        let said = std::fs::File::create(self.path().join("said")).unwrap();
        let mut command = self.runtime(&["create", "--bundle", self.path().to_str().unwrap()]);
        command.args(options).arg(&self.id).stdout(said.try_clone().unwrap()).stderr(said);
        command
    }

    /// What the container has said.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.path().join("said")).unwrap()
    }

    /// `run`: its exit code and output.
    pub(crate) fn run(&self) -> (Option<i32>, String) {
        let output = self.output(&["run", "--bundle", self.path().to_str().unwrap(), &self.id]);
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    pub(crate) fn state(&self) -> Value {
        serde_json::from_str(&self.done(&["state", &self.id])).unwrap()
    }

    pub(crate) fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    /// Waits until the container's process has ended; whoever it belongs to reaps it.
    pub(crate) fn wait(&self, pid: i32) {
        use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
        let Some(pid) = sys::rustix::process::Pid::from_raw(pid) else { return };
        let Ok(pidfd) = sys::process::pidfd_open(pid) else { return };
        let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&minute)).unwrap();
        assert_eq!(ready, 1, "it has not ended: {}", self.said());
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.state()["pid"].as_i64().unwrap()).unwrap()
    }

    /// Directories of its control group that are there.
    pub(crate) fn groups(&self) -> Vec<PathBuf> {
        let hierarchy = sys::cgroup::Hierarchy::whole(Path::new("/sys/fs/cgroup")).unwrap();
        hierarchy.directories(Path::new(&self.id)).into_iter().filter(|dir| dir.exists()).collect()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.output(&["delete", "--force", &self.id]);
    }
}
