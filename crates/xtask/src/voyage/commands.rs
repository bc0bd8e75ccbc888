//! The local command line against a whole node: what each command does and says, and the code it ends with.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::observe::{PodView, http_text};
use super::terminal::{Screen, Terminal};
use super::trials::sleeper;
use super::{Voyage, leftovers, wait};

const SOON: Duration = Duration::from_secs(30);

impl Voyage {
    /// `orlop ARGUMENTS` with this on its stdin, however it ends.
    fn output_of(&self, arguments: &[&str], input: &str) -> anyhow::Result<Output> {
        let mut command = self.stage.orlop();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start orlop")?;
        // Who does not read it has ended.
        let _ = child.stdin.take().context("stdin is piped")?.write_all(input.as_bytes());
        Ok(child.wait_with_output()?)
    }

    fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.orlop(&[arguments, &["-o", "json"]].concat())?)?)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fails unless every one of `words` is in `text`.
fn ensure_has(what: &str, text: &str, words: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<&&str> = words.iter().filter(|word| !text.contains(**word)).collect();
    ensure!(missing.is_empty(), "{what} misses {missing:?}:\n{text}");
    Ok(())
}

pub(super) fn logs(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("talker.yaml", "apiVersion: v1\nkind: Pod\nmetadata: { name: talker }\nspec:\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n  containers:\n  - { name: quiet, image: busybox, command: [sh, -c, 'until [ -e /w/go ]; do sleep 0.05; done'], volumeMounts: [{ name: w, mountPath: /w }] }\n  - { name: c, image: busybox, command: [sh, -c, 'echo one; echo two; until [ -e /w/go ]; do sleep 0.05; done; echo three'], volumeMounts: [{ name: w, mountPath: /w }] }\n  volumes: [{ name: w, emptyDir: {} }]\n")?;
    wait("the pod speaks", SOON, || Ok((voyage.orlop(&["logs", "talker", "-c", "c"])? == "one\ntwo\n").then_some(())))?;
    let said = times(&voyage.orlop(&["logs", "talker", "-c", "c", "--timestamps"])?)?;
    ensure!(said[0].1 == "one" && said[1].1 == "two" && said[0].0 <= said[1].0, "with times it is {said:?}");
    let pod: Value = voyage.json(&["ps", "talker"])?;
    let started: Timestamp =
        pod[0]["status"]["startTime"].as_str().context("the pod has no time of its start")?.parse()?;
    ensure!(said[0].0 >= started && said[1].0 <= Timestamp::now(), "{said:?} is not since {started}");
    let follower_log = voyage.stage.dir.path().join("follower");
    let mut follower = voyage.beside(&["logs", "-f", "talker", "-c", "c", "--tail", "1"], &follower_log)?;
    wait("the follower begins with the last line", SOON, || {
        Ok((std::fs::read_to_string(&follower_log)? == "two\n").then_some(()))
    })?;
    // What is younger than the others is told from them by whole seconds.
    wait("the lines are a while old", SOON, || {
        Ok((Timestamp::now().as_second() - said[1].0.as_second() > 4).then_some(()))
    })?;
    voyage.orlop(&["exec", "talker", "-c", "quiet", "--", "touch", "/w/go"])?;
    let ended = wait("the follower ends with its container", SOON, || Ok(follower.try_wait()?))?;
    let followed = std::fs::read_to_string(&follower_log)?;
    ensure!(ended.success() && followed == "two\nthree\n", "the follower has seen {followed:?} and ended with {ended}");
    for (flags, expect) in [
        (&[][..], "one\ntwo\nthree\n"),
        (&["--tail", "2"], "two\nthree\n"),
        (&["--tail", "0"], ""),
        (&["--tail", "-1"], "one\ntwo\nthree\n"),
        (&["--since", "1h"], "one\ntwo\nthree\n"),
        (&["--limit-bytes", "5"], "one\nt"),
    ] {
        let seen = voyage.orlop(&[&["logs", "talker", "-c", "c"], flags].concat())?;
        ensure!(seen == expect, "logs {flags:?} prints {seen:?}");
    }
    since_the_last(voyage)?;
    let previous = voyage.output_of(&["logs", "talker", "-c", "c", "--previous"], "")?;
    ensure!(!previous.status.success(), "a container that ran once has a log of a previous run");
    let nobody = voyage.output_of(&["logs", "talker", "-c", "nobody"], "")?;
    ensure!(nobody.status.code() == Some(1), "a container that is not there ends with {}", nobody.status);
    ensure_has("the error", &text(&nobody.stderr), &["nobody", "it has: quiet, c"])?;
    voyage.remove("talker.yaml")?;
    voyage.until_gone("talker")?;
    Ok("-f, --tail, --since, --timestamps, --limit-bytes and the container's name".to_owned())
}

/// The lines of a log with their times.
fn times(log: &str) -> anyhow::Result<Vec<(Timestamp, String)>> {
    log.lines()
        .map(|line| {
            let (time, rest) = line.split_once(' ').with_context(|| format!("a line without time: {line:?}"))?;
            Ok((time.parse()?, rest.to_owned()))
        })
        .collect()
}

/// `--since` cuts between the last line and those before it. It is counted from when the node is asked.
fn since_the_last(voyage: &Voyage) -> anyhow::Result<()> {
    wait("`logs --since` shows what came since, and nothing else", SOON, || {
        let said = times(&voyage.orlop(&["logs", "talker", "-c", "c", "--timestamps"])?)?;
        let old = Timestamp::now().as_second() - said.last().context("a line")?.0.as_second();
        let seen = voyage.orlop(&["logs", "talker", "-c", "c", "--since", &format!("{}s", old + 2)])?;
        Ok((seen == "three\n").then_some(()))
    })
}

pub(super) fn exec(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("inside.yaml", &sleeper("inside"))?;
    voyage.until("inside", "runs", |pod| pod.phase() == "Running")?;
    let output = voyage.output_of(&["exec", "inside", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], "")?;
    let seen = (output.status.code(), text(&output.stdout), text(&output.stderr));
    ensure!(seen == (Some(7), "out\n".to_owned(), "err\n".to_owned()), "exec ended as {seen:?}");
    let output = voyage.output_of(&["exec", "-i", "inside", "--", "tr", "a-z", "A-Z"], "ahoy\n")?;
    ensure!(output.status.success() && text(&output.stdout) == "AHOY\n", "with stdin it ended as {output:?}");
    let output = voyage.output_of(&["exec", "inside", "--", "no-such-program"], "")?;
    ensure!(!output.status.success(), "a program that is not there has run");
    ensure_has("the error", &text(&output.stderr), &["no-such-program"])?;
    let usage = voyage.output_of(&["exec", "inside"], "")?;
    ensure!(usage.status.code() == Some(2), "a usage error ends with {}", usage.status);
    in_a_terminal(voyage)?;
    voyage.remove("inside.yaml")?;
    voyage.until_gone("inside")?;
    Ok("streams, exit codes, and a terminal with its size".to_owned())
}

/// `exec -it` on a terminal: the program has one, too, of the same size, also when that changes; keys come as they are.
fn in_a_terminal(voyage: &Voyage) -> anyhow::Result<()> {
    let terminal = Terminal::new()?;
    terminal.resize(24, 80)?;
    let mut command = voyage.stage.orlop();
    command.args(["exec", "-it", "inside", "--", "sh"]);
    let mut shell = terminal.run(&mut command)?;
    let mut screen = Screen::of(&terminal)?;
    let mut says = |line: &str, expect: &str| -> anyhow::Result<()> {
        terminal.enter(line)?;
        screen.wait_for(expect).with_context(|| format!("entered {line:?}"))
    };
    // What is entered is echoed: the answer has to be something else.
    says("test -t 0 && test -t 1 && echo is-$((6*7))\n", "is-42")?;
    says("stty size; echo at-$((1+1))\n", "24 80")?;
    terminal.resize(50, 132)?;
    kill_process(Pid::from_child(&shell), Signal::WINCH)?;
    says("until [ \"$(stty size)\" = '50 132' ]; do sleep 0.05; done; echo grown-$((2+1))\n", "grown-3")?;
    // ^C is the program's matter and not ours.
    says("sh -c 'echo going-$((1+3)); exec sleep 1000'\n", "going-4")?;
    terminal.enter("\x03")?;
    says("echo back-$?\n", "back-130")?;
    terminal.enter("exit 9\n")?;
    let ended = wait("the shell ends", SOON, || Ok(shell.try_wait()?))?;
    ensure!(ended.code() == Some(9), "the shell ended with {ended}");
    Ok(())
}

pub(super) fn attach(voyage: &mut Voyage) -> anyhow::Result<String> {
    let pod = |name: &str, more: &str, command: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{ name: c, image: busybox, {more}, command: [sh, -c, '{command}'] }}\n"
        )
    };
    voyage.write("listener.yaml", &pod("listener", "stdin: true, stdinOnce: true", "tr a-z A-Z; echo bye"))?;
    voyage.until("listener", "runs", |pod| pod.phase() == "Running")?;
    let output = voyage.output_of(&["attach", "-i", "listener"], "ahoy\nmate\n")?;
    ensure!(output.status.success(), "attach ended with {}: {}", output.status, text(&output.stderr));
    // Its end is the end of the container's stdin, which was to be opened once.
    voyage.until("listener", "has read to the end", |pod| pod.phase() == "Succeeded")?;
    let said = "AHOY\nMATE\nbye\n";
    let logged = voyage.orlop(&["logs", "listener"])?;
    ensure!(text(&output.stdout) == said && logged == said, "attach shows {output:?}, the log has {logged:?}");
    voyage.write("screen.yaml", &pod("screen", "stdin: true, tty: true", "read word; echo seen-$word"))?;
    voyage.until("screen", "runs", |pod| pod.phase() == "Running")?;
    let terminal = Terminal::new()?;
    let mut command = voyage.stage.orlop();
    command.args(["attach", "-it", "screen"]);
    let mut attached = terminal.run(&mut command)?;
    let mut screen = Screen::of(&terminal)?;
    terminal.enter("land\n")?;
    screen.wait_for("seen-land")?;
    let ended = wait("attach ends with the container", SOON, || Ok(attached.try_wait()?))?;
    ensure!(ended.success(), "attach ended with {ended}");
    voyage.until("screen", "has ended", |pod| pod.phase() == "Succeeded")?;
    for name in ["listener", "screen"] {
        voyage.remove(&format!("{name}.yaml"))?;
        voyage.until_gone(name)?;
    }
    Ok("the first process's streams, with and without a terminal".to_owned())
}

pub(super) fn copy(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("box.yaml", &sleeper("box"))?;
    voyage.until("box", "runs", |pod| pod.phase() == "Running")?;
    let dir = voyage.stage.dir.path().join("cp");
    std::fs::create_dir_all(dir.join("there/deep"))?;
    let large: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[0] ^ number.to_le_bytes()[1]).collect();
    std::fs::write(dir.join("there/deep/large"), &large)?;
    std::fs::write(dir.join("there/run"), "#!/bin/sh\necho ran\n")?;
    std::fs::set_permissions(dir.join("there/run"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    voyage.orlop(&["cp", &dir.join("there").display().to_string(), "default/box:/tmp/here"])?;
    ensure!(voyage.orlop(&["exec", "box", "--", "/tmp/here/run"])? == "ran\n", "what was copied has lost its mode");
    voyage.orlop(&["cp", "-c", "c", "box:/tmp/here", &dir.join("back").display().to_string()])?;
    ensure!(std::fs::read(dir.join("back/deep/large"))? == large, "what came back is something else");
    std::fs::create_dir(dir.join("into"))?;
    voyage.orlop(&["cp", "box:/tmp/here/run", &dir.join("into").display().to_string()])?;
    ensure!(dir.join("into/run").is_file(), "a file was not copied into the directory that is there");
    let missing = voyage.output_of(&["cp", "box:/tmp/nowhere", &dir.join("x").display().to_string()], "")?;
    ensure!(missing.status.code() == Some(1), "what is not there was copied: {}", missing.status);
    ensure!(!dir.join("x").exists(), "what is not there has left a file");
    voyage.remove("box.yaml")?;
    voyage.until_gone("box")?;
    Ok("directories and files, in and out, with their modes".to_owned())
}

pub(super) fn port_forward(voyage: &mut Voyage) -> anyhow::Result<String> {
    voyage.write("page.yaml", "apiVersion: v1\nkind: Pod\nmetadata: { name: page, labels: { app: page } }\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: c\n    image: busybox\n    command: [sh, -c, 'mkdir -p /w; head -c 300000 /dev/zero | tr \"\\0\" x > /w/index.html; exec httpd -f -p 8080 -h /w']\n    readinessProbe: { tcpSocket: { port: 8080 }, periodSeconds: 1 }\n---\napiVersion: v1\nkind: Service\nmetadata: { name: page }\nspec: { selector: { app: page }, ports: [{ port: 80, targetPort: 8080 }] }\n")?;
    voyage.until("page", "is Ready", PodView::is_ready)?;
    for what in ["page", "service/page"] {
        let mut forward = voyage.stage.orlop();
        let mut forward = forward
            .args(["port-forward", what, ":8080", ":9"])
            .stderr(Stdio::piped())
            .spawn()
            .context("start orlop")?;
        let outcome = through(&mut forward);
        forward.kill()?;
        forward.wait()?;
        outcome.with_context(|| format!("port-forward {what}"))?;
    }
    voyage.remove("page.yaml")?;
    voyage.until_gone("page")?;
    Ok("two connections at once, and a port where nobody listens".to_owned())
}

fn through(forward: &mut Child) -> anyhow::Result<()> {
    let mut lines = BufReader::new(forward.stderr.take().context("stderr is piped")?).lines();
    let mut local = [SocketAddr::from(([0, 0, 0, 0], 0)); 2];
    for (place, remote) in local.iter_mut().zip([8080, 9]) {
        let line = lines.next().context("it says nothing")??;
        let told = line.strip_prefix("Forwarding from ").and_then(|rest| rest.strip_suffix(&format!(" -> {remote}")));
        *place = told.with_context(|| format!("it says {line:?}"))?.parse()?;
    }
    let pages = std::thread::scope(|scope| -> anyhow::Result<Vec<_>> {
        let asked = [(); 2].map(|()| scope.spawn(|| http_text("GET", local[0], "/")));
        asked.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })?;
    let is_whole = |(status, page): &(u16, String)| *status == 200 && page.len() == 300_000;
    ensure!(pages.iter().all(is_whole), "the pages are not whole");
    let mut nobody = std::net::TcpStream::connect(local[1])?;
    ensure!(nobody.read(&mut [0])? == 0, "somebody answers at port 9");
    let line = lines.next().context("it says nothing of port 9")??;
    ensure_has("the error", &line, &["port 9:", "refused"])?;
    // One connection that failed is not the end of the others.
    ensure!(is_whole(&http_text("GET", local[0], "/")?), "the page is not whole");
    Ok(())
}

pub(super) fn shown(voyage: &mut Voyage) -> anyhow::Result<String> {
    let limited = "image: busybox, resources: { limits: { cpu: 250m, memory: 32Mi } },";
    voyage.write("shown.yaml", &format!("{}---\napiVersion: v1\nkind: Secret\nmetadata: {{ name: hidden }}\nstringData: {{ word: abracadabra }}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: held, labels: {{ app: held }} }}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers: [{{ name: c, image: busybox, envFrom: [{{ configMapRef: {{ name: nowhere }} }}] }}]\n", sleeper("shown").replace("image: busybox,", limited)))?;
    voyage.until("shown", "runs", |pod| pod.phase() == "Running")?;
    voyage
        .until("held", "waits", |pod| pod.container()["state"]["waiting"]["reason"] == "CreateContainerConfigError")?;
    listed(voyage)?;
    described(voyage)?;
    let top = voyage.orlop(&["top"])?;
    let row = top.lines().find(|line| line.starts_with("shown")).context("top does not show the pod")?;
    ensure_has("top", &format!("{}{row}", top.lines().next().unwrap_or_default()), &["THROTTLED", "250m", "32Mi"])?;
    let usages = voyage.json(&["top"])?;
    let usage = usages.as_array().into_iter().flatten().find(|usage| usage["pod"] == "shown").context("not in JSON")?;
    ensure!(usage["memoryBytes"].as_u64() > Some(0) && usage["processes"] == 1, "top says {usage}");
    ensure_has("why", &voyage.orlop(&["why", "held"])?, &["held waits for", "nowhere"])?;
    let why = voyage.orlop(&["why", "shown"])?;
    ensure_has("why", &why, &["shown waits for nothing: Running", "STEP", "sandbox", "image of c", "start of c", "#"])?;
    voyage.remove("shown.yaml")?;
    for pod in ["shown", "held"] {
        voyage.until_gone(pod)?;
    }
    Ok("ps, get, describe, events, top and why".to_owned())
}

/// `ps` and `get`, in every format.
fn listed(voyage: &Voyage) -> anyhow::Result<()> {
    let table = voyage.orlop(&["ps"])?;
    ensure_has(
        "ps",
        &table,
        &["NAME", "READY", "RESTARTS", "shown", "1/1", "held", "0/1", "CreateContainerConfigError"],
    )?;
    let uid = voyage.json(&["ps", "shown"])?[0]["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    ensure_has("ps -o wide", &voyage.orlop(&["ps", "-o", "wide"])?, &["UID", &uid])?;
    ensure_has("ps -o yaml", &voyage.orlop(&["ps", "shown", "-o", "yaml"])?, &["phase: Running", &uid])?;
    ensure!(voyage.orlop(&["ps", "-l", "app=held", "-o", "name"])? == "pod/held\n", "ps -l selects others");
    ensure_has("ps -A", &voyage.orlop(&["ps", "-A"])?, &["NAMESPACE", "default"])?;
    ensure_has("get -o yaml", &voyage.orlop(&["get", "pods", "shown", "-o", "yaml"])?, &[&uid])?;
    let nobody = voyage.output_of(&["ps", "nobody"], "")?;
    ensure!(nobody.status.code() == Some(1), "a pod that is not there ends with {}", nobody.status);
    ensure_has("the error", &text(&nobody.stderr), &["no pod \"nobody\""])
}

fn described(voyage: &Voyage) -> anyhow::Result<()> {
    let pod = voyage.orlop(&["describe", "pod", "shown"])?;
    ensure_has(
        "describe",
        &pod,
        &["name: shown", "phase: Running", "events:", "Scheduled", "Pulled", "Created", "Started"],
    )?;
    let secret = voyage.orlop(&["describe", "secret/hidden"])?;
    ensure_has("describe", &secret, &["word", "bytes>", "events: none"])?;
    ensure!(!secret.contains("abracadabra") && !secret.contains("YWJyYWNhZGFicmE"), "it tells the secret:\n{secret}");
    let missing = voyage.output_of(&["describe", "pod", "nobody"], "")?;
    ensure!(missing.status.code() == Some(1), "what is not there is described: {}", missing.status);
    ensure_has("events", &voyage.orlop(&["events"])?, &["LAST SEEN", "REASON", "pod/shown", "pod/held"])?;
    let of_one = voyage.json(&["events", "--for", "pod/held"])?;
    let of_one = of_one.as_array().context("a list of events")?;
    ensure!(!of_one.is_empty(), "there are no events of the pod");
    let others = of_one.iter().find(|event| event["involvedObject"]["name"] != "held");
    ensure!(others.is_none(), "events of others: {others:?}");
    Ok(())
}

pub(super) fn images(voyage: &mut Voyage) -> anyhow::Result<String> {
    const NAME: &str = "docker.io/library/other:latest";
    let tags = |voyage: &Voyage| -> anyhow::Result<String> { Ok(voyage.json(&["images"])?.to_string()) };
    // A mark of its own makes it an image of its own.
    let dir = voyage.stage.dir.path().join("other-image");
    let mut builder = testkit::image::Builder::new(&dir)?;
    testkit::image::busybox_layer(&mut builder)?;
    let other = builder.finish(serde_json::json!({ "Cmd": ["true"], "Labels": { "of": "trials" } }))?;
    voyage.stage.push(&other, "library/other")?;
    let pulled = voyage.orlop(&["pull", "other"])?;
    ensure!(pulled.starts_with("sha256:") && pulled.lines().count() == 1, "pull prints {pulled:?}");
    let table = voyage.orlop(&["images"])?;
    let row = table.lines().find(|line| line.starts_with(NAME)).with_context(|| format!("images prints\n{table}"))?;
    ensure!(row.contains(&pulled["sha256:".len()..][..12]), "the row is {row:?}, the image {pulled}");
    let removed = voyage.orlop(&["rmi", "other"])?;
    ensure_has("rmi", &removed, &["Removed "])?;
    ensure!(!tags(voyage)?.contains(NAME), "the image is there after it was removed");
    let again = voyage.output_of(&["rmi", "other"], "")?;
    ensure!(again.status.code() == Some(1), "what is not there was removed: {}", again.status);
    for path in [dir.clone(), archive_of(&dir)?] {
        let loaded = voyage.orlop(&["load", &path.display().to_string()])?;
        let name = loaded.trim().strip_prefix("Loaded ").with_context(|| format!("load prints {loaded:?}"))?;
        ensure!(tags(voyage)?.contains(pulled.trim()), "{} was loaded as something else", path.display());
        voyage.orlop(&["rmi", name])?;
        ensure!(!tags(voyage)?.contains(pulled.trim()), "the image is there after {name} was removed");
    }
    let missing = voyage.output_of(&["pull", "nobody/nothing"], "")?;
    ensure!(missing.status.code() == Some(1), "what is not there was pulled: {}", missing.status);
    ensure_has("the error", &text(&missing.stderr), &["nobody/nothing", "127.0.0.1:5000"])?;
    Ok("pull, images, rmi, load of a layout and of an archive".to_owned())
}

/// The layout as one file.
fn archive_of(dir: &Path) -> anyhow::Result<std::path::PathBuf> {
    let path = dir.with_extension("tar");
    let mut archive = tar::Builder::new(std::fs::File::create(&path)?);
    archive.append_dir_all(".", dir)?;
    archive.finish()?;
    Ok(path)
}

pub(super) fn without_node(voyage: &mut Voyage) -> anyhow::Result<String> {
    let version = voyage.json(&["version"])?;
    ensure!(version["node"].is_object() && version["node"] == version["client"], "versions: {version}");
    let own = version["client"]["orlop"].as_str().context("a version")?;
    let lines = voyage.orlop(&["version"])?;
    ensure_has("version", &lines, &[&format!("client: orlop {own},"), &format!("node: orlop {own},")])?;
    for shell in ["bash", "zsh", "fish"] {
        let script = voyage.orlop(&["completion", shell])?;
        ensure_has(&format!("completion {shell}"), &script, &["orlop", "port-forward", "describe", "timestamps"])?;
    }
    let checked = voyage.output_of(&["check", "-o", "json"], "")?;
    let findings: Vec<Value> = serde_json::from_slice(&checked.stdout)?;
    let table = voyage.output_of(&["check"], "")?;
    let is_fatal = findings.iter().any(|finding| finding["verdict"] == "missing");
    for output in [&checked, &table] {
        ensure!(output.status.code() == Some(i32::from(is_fatal)), "check ended with {}: {findings:?}", output.status);
    }
    for finding in &findings {
        let (what, remedy) =
            (finding["what"].as_str().unwrap_or_default(), finding["remedy"].as_str().unwrap_or_default());
        ensure_has("check", &text(&table.stdout), &[what, remedy])?;
        ensure!(remedy.is_empty() == (finding["verdict"] == "ok"), "{finding} has to have a remedy, or none");
    }
    Ok(format!("version, completion, and check of {} things", findings.len()))
}

/// After [`super::trials`]' node has ended: another one, detached, that has its manifests from stdin.
pub(super) fn from_stdin(voyage: &mut Voyage) -> anyhow::Result<String> {
    let up = voyage.output_of(&["up", "--detach", "-"], &format!("{}---\n{}", sleeper("first"), sleeper("second")));
    let outcome = up.and_then(|up| {
        ensure!(up.status.success(), "orlop up ended with {}: {}", up.status, text(&up.stderr));
        ensure_has("up --detach", &text(&up.stdout), &["the node runs (pid", "`orlop down` ends it"])?;
        for pod in ["first", "second"] {
            voyage.until(pod, "runs", |pod| pod.phase() == "Running")?;
        }
        Ok(())
    });
    let down = voyage.output_of(&["down"], "")?;
    outcome?;
    ensure!(down.status.success(), "orlop down ended with {}: {}", down.status, text(&down.stderr));
    // The node ends a moment after it has told that everything else has.
    wait("nothing is left behind", SOON, || {
        let left = leftovers::since(&voyage.before, voyage.stage.dir.path())?;
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        Ok(Some(()))
    })?;
    let nobody = voyage.output_of(&["ps"], "")?;
    ensure!(nobody.status.code() == Some(1), "without a node `ps` ends with {}", nobody.status);
    ensure_has("the error", &text(&nobody.stderr), &["orlop up"])?;
    Ok("two pods ran, nothing is left".to_owned())
}
