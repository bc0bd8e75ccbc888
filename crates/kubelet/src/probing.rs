//! Asking a container: HTTP, TCP, gRPC and exec, for probes and lifecycle hooks.

mod grpc;
mod http;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use cri::service::RuntimeService;
use cri::v1::ExecSyncRequest;
use k8s_openapi::api::core::v1::{Container, GRPCAction, HTTPGetAction, LifecycleHandler, Probe, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use pod::probe::{Answer, Outcome};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::env;

/// Longest text of a failure that goes into an event.
const TEXT_MAX: usize = 1024;

/// Whom a question is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) container: &'a Container,
    pub(crate) id: &'a str,
    /// The pod's address, if it has one already.
    pub(crate) address: Option<&'a str>,
}

/// A question that could not be put is put so often, as by upstream's prober.
const TRIES: usize = 3;

/// Why a question has no good answer.
#[derive(Debug)]
struct Fault {
    text: String,
    /// Nobody listens there.
    refused: bool,
    /// It could not be put at all: that tells nothing of the container.
    unasked: bool,
}

impl Fault {
    fn unasked(text: String) -> Self {
        Self { text, refused: false, unasked: true }
    }

    /// No connection could be made.
    fn dial(text: String, error: &io::Error) -> Self {
        Self { text, refused: error.kind() == io::ErrorKind::ConnectionRefused, unasked: false }
    }
}

impl From<String> for Fault {
    fn from(text: String) -> Self {
        Self { text, refused: false, unasked: false }
    }
}

impl From<Fault> for String {
    fn from(fault: Fault) -> Self {
        fault.text
    }
}

/// Runs a probe.
pub(crate) async fn probe(runtime: &dyn RuntimeService, target: Target<'_>, probe: &Probe) -> Answer {
    let asked = Timestamp::now();
    let limit = Duration::from_secs(u64::try_from(probe.timeout_seconds.unwrap_or(1).max(1)).unwrap_or(1));
    let mut answer = ask(runtime, target, probe, limit).await;
    for _ in 1..TRIES {
        if !answer.as_ref().is_err_and(|fault| fault.unasked) {
            break;
        }
        answer = ask(runtime, target, probe, limit).await;
    }
    let (outcome, message, refused) = match answer {
        Ok(warning) => (Some(Outcome::Success), warning.unwrap_or_default(), false),
        Err(Fault { text, unasked: true, .. }) => (None, text, false),
        Err(Fault { text, refused, .. }) => (Some(Outcome::Failure), text, refused && !asks_elsewhere(probe)),
    };
    Answer { asked, outcome, message: cut(message), refused }
}

/// Asks once. A success may have a warning.
async fn ask(
    runtime: &dyn RuntimeService,
    target: Target<'_>,
    probe: &Probe,
    limit: Duration,
) -> Result<Option<String>, Fault> {
    if let Some(action) = &probe.exec {
        let command = action.command.as_deref().unwrap_or_default();
        let command =
            env::expand_probe(command, target.container).map_err(|error| Fault::unasked(error.to_string()))?;
        exec(runtime, target, command, limit).await.map(|()| None)
    } else if let Some(action) = &probe.http_get {
        within(limit, http_get(target, action)).await
    } else if let Some(action) = &probe.tcp_socket {
        within(limit, tcp(target, action)).await.map(|()| None)
    } else if let Some(action) = &probe.grpc {
        within(limit, grpc(target, action)).await.map(|()| None)
    } else {
        Err("the probe has no handler".to_owned().into())
    }
}

/// Whether it is another host than the container's that is asked, and that cannot be had to say so more often than it is told.
fn asks_elsewhere(probe: &Probe) -> bool {
    let http = probe.http_get.as_ref().and_then(|action| action.host.as_ref());
    let tcp = probe.tcp_socket.as_ref().and_then(|action| action.host.as_ref());
    http.or(tcp).is_some_and(|host| !host.is_empty())
}

fn cut(mut text: String) -> String {
    text.truncate((0..=TEXT_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
    text
}

/// Runs a lifecycle hook.
pub(crate) async fn hook(
    runtime: &dyn RuntimeService,
    target: Target<'_>,
    handler: &LifecycleHandler,
    limit: Option<Duration>,
) -> Result<(), String> {
    // A hook without a limit of its own may take as long as it wants.
    let limit = limit.unwrap_or(Duration::from_secs(u64::from(u32::MAX)));
    if let Some(action) = &handler.exec {
        Ok(exec(runtime, target, action.command.clone().unwrap_or_default(), limit).await?)
    } else if let Some(action) = &handler.http_get {
        Ok(within(limit, http_get(target, action)).await.map(drop)?)
    } else if let Some(action) = &handler.tcp_socket {
        Ok(within(limit, tcp(target, action)).await?)
    } else if let Some(action) = &handler.sleep {
        let seconds = Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0));
        tokio::time::sleep(seconds.min(limit)).await;
        Ok(())
    } else {
        Ok(())
    }
}

async fn within<T>(limit: Duration, question: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let late = || format!("no answer within {} s", limit.as_secs_f64());
    timeout(limit, question).await.unwrap_or_else(|_| Err(late().into()))
}

async fn exec(
    runtime: &dyn RuntimeService,
    target: Target<'_>,
    cmd: Vec<String>,
    limit: Duration,
) -> Result<(), Fault> {
    let request = ExecSyncRequest {
        container_id: target.id.to_owned(),
        cmd,
        timeout: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
    };
    let answer = runtime.exec_sync(request).await.map_err(|error| match error {
        cri::Error::DeadlineExceeded(_) => Fault::from(error.to_string()),
        _ => Fault::unasked(error.to_string()),
    })?;
    if answer.exit_code == 0 {
        return Ok(());
    }
    let said = [answer.stdout, answer.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    Err(format!("command exited with {}: {}", answer.exit_code, said.trim_end()).into())
}

async fn tcp(target: Target<'_>, action: &TCPSocketAction) -> Result<(), Fault> {
    let address = address(target, action.host.as_deref(), &action.port).await?;
    let stream = TcpStream::connect(address).await;
    stream.map(drop).map_err(|error| Fault::dial(format!("dial tcp {address}: {error}"), &error))
}

async fn grpc(target: Target<'_>, action: &GRPCAction) -> Result<(), Fault> {
    let address = address(target, None, &IntOrString::Int(action.port)).await?;
    grpc::check(address, action.service.as_deref().unwrap_or_default()).await
}

/// A success may have a warning.
async fn http_get(target: Target<'_>, action: &HTTPGetAction) -> Result<Option<String>, Fault> {
    let address = address(target, action.host.as_deref(), &action.port).await?;
    http::get(address, action).await
}

/// Address and port that a handler names: the pod's own address unless it names a host.
async fn address(target: Target<'_>, host: Option<&str>, port: &IntOrString) -> Result<SocketAddr, Fault> {
    let port = port_of(target.container, port).map_err(Fault::unasked)?;
    let host = match host.filter(|host| !host.is_empty()) {
        Some(host) => host,
        None => target.address.ok_or_else(|| "the pod has no address yet".to_owned())?,
    };
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, port));
    }
    let mut found = tokio::net::lookup_host((host, port)).await.map_err(|error| format!("lookup {host}: {error}"))?;
    found.next().ok_or_else(|| format!("lookup {host}: no address").into())
}

/// A port by number, or by the name it has in the container's spec.
fn port_of(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => match text.parse() {
            Ok(number) => number,
            Err(_) => container
                .ports
                .iter()
                .flatten()
                .find(|known| known.name.as_deref() == Some(text))
                .map(|known| known.container_port)
                .ok_or_else(|| format!("couldn't find port: {text:?} in container {:?}", container.name))?,
        },
    };
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| format!("port {number} is out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    struct NoRuntime;
    impl RuntimeService for NoRuntime {}

    /// One that is asked in vain, so often.
    #[derive(Default)]
    struct Broken(std::sync::atomic::AtomicUsize);

    #[async_trait::async_trait]
    impl RuntimeService for Broken {
        async fn exec_sync(&self, _: ExecSyncRequest) -> Result<cri::v1::ExecSyncResponse, cri::Error> {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Err(cri::Error::Unavailable("gone".to_owned()))
        }
    }

    #[tokio::test]
    async fn a_runtime_that_does_not_run_it_says_nothing_of_the_container() {
        let (runtime, container) = (Broken::default(), container());
        let target = Target { container: &container, id: "x", address: None };
        let probe = serde_json::from_value(json!({ "exec": { "command": ["true"] } })).unwrap();
        let answer = super::probe(&runtime, target, &probe).await;
        assert_eq!((answer.outcome, answer.message.as_str()), (None, "gone"));
        assert_eq!(runtime.0.into_inner(), TRIES);
    }

    fn container() -> Container {
        serde_json::from_value(json!({"name": "c", "ports": [{"name": "web", "containerPort": 80}]})).unwrap()
    }

    /// Answers one request with `response`, and returns what was asked.
    async fn serve(response: &'static str) -> (u16, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 4096];
            let count = stream.read(&mut buffer).await.unwrap();
            stream.write_all(response.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&buffer[..count]).into_owned()
        });
        (port, served)
    }

    async fn ask(probe: serde_json::Value) -> (Outcome, String) {
        let answer = answer(probe).await;
        assert!(!answer.refused, "{answer:?}");
        (answer.outcome.unwrap(), answer.message)
    }

    async fn answer(probe: serde_json::Value) -> Answer {
        let container = container();
        let target = Target { container: &container, id: "x", address: Some("127.0.0.1") };
        super::probe(&NoRuntime, target, &serde_json::from_value(probe).unwrap()).await
    }

    #[tokio::test]
    async fn where_nobody_listens_the_container_is_not_asked() {
        // A port that is bound and not listened at is nobody else's.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();
        for handler in ["httpGet", "tcpSocket", "grpc"] {
            let answer = answer(json!({ handler: { "port": port } })).await;
            assert!(answer.refused && answer.outcome == Some(Outcome::Failure), "{handler}: {answer:?}");
        }
        let elsewhere = answer(json!({ "tcpSocket": { "host": "127.0.0.1", "port": port } })).await;
        assert!(!elsewhere.refused, "{elsewhere:?}");
        let (other, _) =
            serve(format!("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}/\r\n\r\n").leak()).await;
        let redirected = answer(json!({ "httpGet": { "port": other } })).await;
        assert!(!redirected.refused && redirected.outcome == Some(Outcome::Failure), "it was asked: {redirected:?}");
    }

    #[tokio::test]
    async fn an_http_answer_below_300_is_a_success() {
        let (port, served) = serve("HTTP/1.1 204 No Content\r\n\r\n").await;
        let headers = json!([{"name": "X-Who", "value": "me"}]);
        let (outcome, text) = ask(json!({"httpGet": {"path": "/a?b=c", "port": port, "httpHeaders": headers}})).await;
        assert_eq!((outcome, text.as_str()), (Outcome::Success, ""));
        let asked = served.await.unwrap().to_lowercase();
        assert!(asked.starts_with("get /a?b=c http/1.1\r\n"), "{asked}");
        assert!(asked.contains("x-who: me") && asked.contains("user-agent: kube-probe/"), "{asked}");
    }

    #[tokio::test]
    async fn a_redirection_to_another_host_is_a_success_with_a_warning() {
        let (port, _) =
            serve("HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 5\r\n\r\nthere").await;
        let (outcome, text) = ask(json!({"httpGet": {"port": port}})).await;
        let expected = "Probe terminated redirects, Response body: there";
        assert_eq!((outcome, text.as_str()), (Outcome::Success, expected));
    }

    #[tokio::test]
    async fn a_redirection_on_the_same_host_is_followed() {
        let (other, served) = serve("HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n").await;
        let location =
            format!("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{other}/b\r\nContent-Length: 0\r\n\r\n");
        let (port, _) = serve(location.leak()).await;
        let (outcome, text) = ask(json!({"httpGet": {"path": "/a", "port": port}})).await;
        assert_eq!((outcome, text.as_str()), (Outcome::Failure, "HTTP probe failed with statuscode: 500"));
        assert!(served.await.unwrap().starts_with("GET /b HTTP/1.1\r\n"));
    }

    #[tokio::test]
    async fn other_answers_fail_with_their_code() {
        let (port, _) = serve("HTTP/1.1 503 Unavailable\r\nContent-Length: 4\r\n\r\nbusy").await;
        let (outcome, text) = ask(json!({"httpGet": {"port": port}})).await;
        assert_eq!((outcome, text.as_str()), (Outcome::Failure, "HTTP probe failed with statuscode: 503"));
    }

    #[tokio::test]
    async fn silence_is_a_failure_after_the_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (outcome, text) = ask(json!({"httpGet": {"port": port}, "timeoutSeconds": 1})).await;
        assert_eq!((outcome, text.as_str()), (Outcome::Failure, "no answer within 1 s"));
        assert_eq!(ask(json!({"tcpSocket": {"port": port}})).await.0, Outcome::Success);
    }

    #[tokio::test]
    async fn ports_have_names() {
        assert_eq!(port_of(&container(), &IntOrString::String("web".into())), Ok(80));
        assert!(port_of(&container(), &IntOrString::String("nope".into())).unwrap_err().contains("nope"));
        assert!(port_of(&container(), &IntOrString::Int(70_000)).is_err());
    }
}
