//! crictl, as published, with what an operator types each day.

#![allow(clippy::disallowed_methods, reason = "it starts crictl")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use runtime::ImageServer;
use serde_json::json;
use testkit::serial::Test;
use tokio_util::sync::CancellationToken;

use crate::fixture::{IMAGE, on_a_node};

pub(crate) const TESTS: &[Test] = &[("crictl_manages_pods", manages_pods)];

/// crictl before a socket.
struct Crictl<'a> {
    program: &'a Path,
    socket: String,
}

impl Crictl<'_> {
    /// What it prints.
    async fn say(&self, words: &[&str]) -> String {
        let mut command = Command::new(self.program);
        command
            .args(["--runtime-endpoint", &self.socket, "--image-endpoint", &self.socket, "--timeout", "60s"])
            .args(words);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        assert!(output.status.success(), "{words:?}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }
}

fn manages_pods() {
    let program = match testkit::go::build(&testkit::go::CRICTL) {
        Ok(program) => program,
        Err(error) => return println!("skipped: needs go and the module proxy ({error:#})"),
    };
    on_a_node(|node| async {
        let scratch = tempfile::tempdir().unwrap();
        let file = |name: &str, text: serde_json::Value| {
            let path = scratch.path().join(name);
            std::fs::write(&path, text.to_string()).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let metadata = json!({ "name": "daily", "namespace": "default", "uid": "uid-daily", "attempt": 1 });
        let logs = node.places.logs.join("daily");
        let pod =
            file("pod.json", json!({ "metadata": metadata, "hostname": "daily", "log_directory": logs, "linux": {} }));
        let script = "echo to the log; exec sleep 1000";
        let container = json!({ "metadata": { "name": "main" }, "image": { "image": IMAGE }, "log_path": "main.log",
            "command": ["sh", "-c", script], "linux": {} });
        let container = file("container.json", container);

        let socket = scratch.path().join("cri.sock");
        let (listener, stop) = (cri::server::bind(&socket).await.unwrap(), CancellationToken::new());
        let images = Arc::new(ImageServer::new(node.images.clone(), node.runtime.clone()));
        let served = cri::server::serve(listener, node.runtime.for_clients(), images, stop.clone());
        let served = tokio::spawn(served);
        let crictl = Crictl { program: &program, socket: format!("unix://{}", socket.display()) };

        assert!(crictl.say(&["version"]).await.contains("RuntimeName:  orlop"));
        assert!(crictl.say(&["info"]).await.contains("RuntimeReady"));
        let sandbox = crictl.say(&["runp", &pod]).await;
        let id = crictl.say(&["create", &sandbox, &container, &pod]).await;
        crictl.say(&["start", &id]).await;
        assert_eq!(crictl.say(&["ps", "-q"]).await, id);
        assert_eq!(crictl.say(&["pods", "-q"]).await, sandbox);
        assert_eq!(crictl.say(&["exec", &id, "hostname"]).await, "daily");
        assert_eq!(crictl.say(&["exec", "--sync", &id, "hostname"]).await, "daily");
        assert_eq!(crictl.say(&["logs", &id]).await, "to the log");
        assert!(crictl.say(&["stats", &id]).await.contains(&id[..13]));
        assert!(crictl.say(&["statsp", &sandbox]).await.contains("daily"));
        assert!(crictl.say(&["inspect", &id]).await.contains("CONTAINER_RUNNING"));
        assert!(crictl.say(&["inspectp", &sandbox]).await.contains("SANDBOX_READY"));
        let images = crictl.say(&["images", "-q"]).await;
        let image = crictl.say(&["inspecti", "--output", "go-template", "--template", "{{.status.id}}", IMAGE]).await;
        assert!(images.lines().any(|id| id == image), "{image} is not in {images}");
        assert!(crictl.say(&["imagefsinfo"]).await.contains("usedBytes"));
        crictl.say(&["update", "--memory", "67108864", &id]).await;
        crictl.say(&["stop", "--timeout", "0", &id]).await;
        assert_eq!(crictl.say(&["ps", "-q"]).await, "");
        assert_eq!(crictl.say(&["ps", "-a", "-q"]).await, id);
        crictl.say(&["rm", &id]).await;
        crictl.say(&["stopp", &sandbox]).await;
        crictl.say(&["rmp", &sandbox]).await;
        assert_eq!(crictl.say(&["pods", "-q"]).await, "");

        stop.cancel();
        served.await.unwrap();
        node
    });
}
