//! kubectl as a person uses it, on another machine than the node: terminals, logs that go on, and a node that is drained.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testkit::host;

use super::proxy::on_another_machine;
use super::{Fleet, NODE, SOON, points, wait};
use crate::voyage::terminal::{Screen, Terminal};

/// One that is looked into, one that waits for a word, and one that says more when it is told to.
const PODS: &str = "apiVersion: v1
kind: Pod
metadata: { name: inside, labels: { app: afar } }
spec:
  terminationGracePeriodSeconds: 1
  containers: [{ name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, infinity] }]
---
apiVersion: v1
kind: Pod
metadata: { name: screen, labels: { app: afar } }
spec:
  restartPolicy: Never
  containers: [{ name: c, image: busybox, imagePullPolicy: IfNotPresent, stdin: true, tty: true, command: [sh, -c, 'read word; echo seen-$word'] }]
---
apiVersion: v1
kind: Pod
metadata: { name: talker, labels: { app: afar } }
spec:
  restartPolicy: Never
  containers: [{ name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, 'echo one; until [ -e /go ]; do sleep 0.05; done; echo two'] }]
";

/// The point.
pub(super) fn used(fleet: &mut Fleet) -> anyhow::Result<String> {
    fleet.apply("afar", PODS)?;
    let fleet = &*fleet;
    on_another_machine(fleet.plane.options(), || {
        let kubectl = Kubectl { fleet };
        kubectl.run(&["wait", "--for=condition=Ready", "pod", "-l", "app=afar", "--timeout=120s"])?;
        kubectl.in_a_terminal()?;
        kubectl.attached()?;
        kubectl.follows()?;
        kubectl.copies()?;
        kubectl.debugs_a_copy()?;
        kubectl.debugs_the_node()?;
        kubectl.forwards_to_a_service()?;
        kubectl.run(&["delete", "pod", "-l", "app=afar", "--wait=false"])?;
        kubectl.run(&["wait", "--for=delete", "pod", "-l", "app=afar", "--timeout=120s"])?;
        kubectl.rolls_out()?;
        kubectl.drains()?;
        Ok("a terminal with its size, attach, logs -f, cp of a directory, debug of a node and of a copy, port-forward to a \
            Service, wait, rollout restart and undo, drain and uncordon"
            .to_owned())
    })
}

/// `kubectl` in the namespace of the calling thread.
struct Kubectl<'f> {
    fleet: &'f Fleet,
}

impl Kubectl<'_> {
    fn command(&self, words: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.fleet.plane.kubectl()?;
        command.args(words);
        Ok(command)
    }

    fn run(&self, words: &[&str]) -> anyhow::Result<String> {
        Ok(String::from_utf8(host::output(&mut self.command(words)?)?)?)
    }

    fn in_a_terminal(&self) -> anyhow::Result<()> {
        let terminal = Terminal::new()?;
        terminal.resize(24, 80)?;
        let mut shell = terminal.run(&mut self.command(&["exec", "-it", "inside", "--", "sh"])?)?;
        let mut screen = Screen::of(&terminal)?;
        let mut says = |line: &str, expect: &str| -> anyhow::Result<()> {
            terminal.enter(line)?;
            screen.wait_for(expect).with_context(|| format!("entered {line:?}"))
        };
        // What is entered is echoed: the answer has to be something else.
        says("test -t 0 && test -t 1 && echo is-$((6*7))\n", "is-42")?;
        says("until [ \"$(stty size)\" = '24 80' ]; do sleep 0.05; done; echo at-$((1+1))\n", "at-2")?;
        terminal.resize(50, 132)?;
        kill_process(Pid::from_child(&shell), Signal::WINCH)?;
        says("until [ \"$(stty size)\" = '50 132' ]; do sleep 0.05; done; echo grown-$((2+1))\n", "grown-3")?;
        terminal.enter("exit 9\n")?;
        let ended = wait("the shell ends", SOON, || Ok(shell.try_wait()?))?;
        ensure!(ended.code() == Some(9), "the shell ended with {ended}");
        Ok(())
    }

    fn attached(&self) -> anyhow::Result<()> {
        let terminal = Terminal::new()?;
        let mut attached = terminal.run(&mut self.command(&["attach", "-it", "screen"])?)?;
        let mut screen = Screen::of(&terminal)?;
        terminal.enter("land\n")?;
        screen.wait_for("seen-land")?;
        let ended = wait("attach ends with the container", SOON, || Ok(attached.try_wait()?))?;
        ensure!(ended.success(), "attach ended with {ended}");
        Ok(())
    }

    /// What comes later is shown, too, and the command ends with the container.
    fn follows(&self) -> anyhow::Result<()> {
        let mut logs =
            self.command(&["logs", "-f", "talker"])?.stdout(Stdio::piped()).spawn().context("start kubectl")?;
        let mut output = BufReader::new(logs.stdout.take().context("its output")?);
        let mut said = String::new();
        output.read_line(&mut said)?;
        self.run(&["exec", "talker", "--", "touch", "/go"])?;
        output.read_to_string(&mut said)?;
        let ended = logs.wait()?;
        ensure!(ended.success() && said == "one\ntwo\n", "logs -f ended with {ended}: {said:?}");
        Ok(())
    }

    /// A directory goes into a pod and comes back.
    fn copies(&self) -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let (hold, back) = (dir.path().join("hold"), dir.path().join("back"));
        std::fs::create_dir_all(hold.join("deep"))?;
        std::fs::write(hold.join("list"), "rope\n")?;
        std::fs::write(hold.join("deep/more"), "sail\n".repeat(100_000))?;
        self.run(&["cp", &hold.display().to_string(), "inside:/tmp/hold"])?;
        self.run(&["cp", "inside:/tmp/hold", &back.display().to_string()])?;
        for file in ["list", "deep/more"] {
            ensure!(std::fs::read(hold.join(file))? == std::fs::read(back.join(file))?, "{file} is another one");
        }
        Ok(())
    }

    /// A copy of a pod with one more container, which sees the other's processes.
    fn debugs_a_copy(&self) -> anyhow::Result<()> {
        let copy = ["debug", "inside", "--copy-to=twin", "--share-processes", "-c", "look", "--profile=general"];
        let image = ["--image=busybox", "--image-pull-policy=IfNotPresent", "--", "sleep", "1000"];
        self.run(&[&copy[..], &image].concat())?;
        self.run(&["wait", "--for=condition=Ready", "pod/twin", "--timeout=120s"])?;
        let seen = self.run(&["exec", "twin", "-c", "look", "--", "ps"])?;
        ensure!(seen.contains("sleep infinity") && seen.contains("sleep 1000"), "it sees {seen}");
        self.run(&["delete", "pod", "twin", "--grace-period=1"]).map(drop)
    }

    /// A pod on the node that sees its files.
    fn debugs_the_node(&self) -> anyhow::Result<()> {
        let node = format!("node/{NODE}");
        let script = format!("head -n1 /host{}", self.fleet.stage.dir.path().join("kubelet.yaml").display());
        let look = ["debug", &node, "--image=busybox", "--image-pull-policy=IfNotPresent", "--profile=general"];
        self.run(&[&look[..], &["--", "sh", "-c", &script]].concat())?;
        let pods = self.fleet.get("pods")?;
        let mut names = pods["items"].as_array().into_iter().flatten().map(points::name);
        let pod = names.find(|name| name.starts_with(&format!("node-debugger-{NODE}-"))).context("no pod for it")?;
        self.run(&["wait", "--for=jsonpath={.status.phase}=Succeeded", &format!("pod/{pod}"), "--timeout=120s"])?;
        let seen = self.run(&["logs", pod])?;
        ensure!(seen == "apiVersion: kubelet.config.k8s.io/v1beta1\n", "it saw {seen:?}");
        self.run(&["delete", "pod", pod]).map(drop)
    }

    fn forwards_to_a_service(&self) -> anyhow::Result<()> {
        let page = points::forwarded(self.command(&[])?, "svc/web", 80)?;
        let pods = self.fleet.pods("web")?;
        ensure!(pods.iter().any(|pod| points::name(pod) == page), "the Service's port answers {page:?}");
        Ok(())
    }

    /// All pods of the Deployment are replaced, and again by those of the version before.
    fn rolls_out(&self) -> anyhow::Result<()> {
        let template = || anyhow::Ok(self.fleet.get("deployment web")?["spec"]["template"].clone());
        let before = template()?;
        for (what, is_as_before) in [("restart", false), ("undo", true)] {
            self.run(&["rollout", what, "deployment/web"])?;
            self.run(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
            ensure!((template()? == before) == is_as_before, "after {what} its template is {}", template()?);
        }
        self.fleet.until_ready("web", 2).map(drop)
    }

    /// All pods leave the node, by evictions, and come back when they may.
    fn drains(&self) -> anyhow::Result<()> {
        let words = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"];
        let told = self.run(&[&["drain", NODE][..], &words].concat())?;
        ensure!(told.contains(&format!("node/{NODE} drained")), "drain says {told}");
        let left = self.fleet.orlop(&["ps"])?;
        ensure!(!left.contains("web-"), "a pod is left:\n{left}");
        let pods = self.fleet.pods("web")?;
        ensure!(pods.iter().all(|pod| pod["spec"]["nodeName"].is_null()), "a pod was put on a node that takes none");
        self.run(&["uncordon", NODE])?;
        wait("the pods are back", SOON, || {
            let pods = self.fleet.pods("web")?;
            let is_ready = |pod| points::condition(pod, "Ready") == Some("True");
            Ok((pods.len() == 2 && pods.iter().all(is_ready)).then_some(()))
        })
    }
}
