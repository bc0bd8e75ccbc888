//! What can be seen of a node from outside: its pods, its log lines, HTTP and DNS answers.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use testkit::pace;

use super::Voyage;

/// A pod as `orlop ps -o json` shows it.
#[derive(Debug, Clone)]
pub(super) struct PodView(Value);

impl PodView {
    pub(super) fn name(&self) -> &str {
        self.0["metadata"]["name"].as_str().unwrap_or_default()
    }

    pub(super) fn phase(&self) -> &str {
        self.0["status"]["phase"].as_str().unwrap_or_default()
    }

    pub(super) fn address(&self) -> anyhow::Result<IpAddr> {
        let text = self.0["status"]["podIP"].as_str().context("the pod has no address yet")?;
        Ok(text.parse()?)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready()["status"] == "True"
    }

    /// The condition Ready.
    pub(super) fn ready(&self) -> &Value {
        let conditions = self.0["status"]["conditions"].as_array();
        conditions.into_iter().flatten().find(|condition| condition["type"] == "Ready").unwrap_or(&Value::Null)
    }

    pub(super) fn container(&self) -> &Value {
        &self.0["status"]["containerStatuses"][0]
    }

    /// Whether the process of its first container runs.
    pub(super) fn is_running(&self) -> bool {
        self.container()["state"]["running"].is_object()
    }

    /// How the run before ended.
    pub(super) fn last_end(&self) -> &Value {
        &self.container()["lastState"]["terminated"]
    }

    pub(super) fn restarts(&self) -> u64 {
        self.container()["restartCount"].as_u64().unwrap_or(0)
    }
}

/// A line of the client's log.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    pub(super) number: u64,
    /// Seconds since the epoch at which the request began.
    pub(super) time: f64,
    /// The pod that answered, or the error.
    pub(super) result: Result<String, String>,
}

impl Voyage {
    /// The pods whose name begins with `prefix`, sorted by name.
    pub(super) fn pods(&self, prefix: &str) -> anyhow::Result<Vec<PodView>> {
        let pods: Vec<Value> = serde_json::from_str(&self.orlop(&["ps", "-o", "json"])?)?;
        let mut pods: Vec<PodView> =
            pods.into_iter().map(PodView).filter(|pod| pod.name().starts_with(prefix)).collect();
        pods.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(pods)
    }

    pub(super) fn pod(&self, name: &str) -> anyhow::Result<PodView> {
        self.pods(name)?.into_iter().find(|pod| pod.name() == name).with_context(|| format!("no pod {name}"))
    }

    /// `(reason, message)` of the events about a pod, in the order in which they were told first.
    pub(super) fn events(&self, pod: &str) -> anyhow::Result<Vec<(String, String)>> {
        let mut events: Vec<Value> =
            serde_json::from_str(&self.orlop(&["events", "--for", &format!("pod/{pod}"), "-o", "json"])?)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        events.sort_by_key(|event| text(&event["firstTimestamp"]));
        Ok(events.iter().map(|event| (text(&event["reason"]), text(&event["message"]))).collect())
    }

    /// All answers in the client's log.
    pub(super) fn answers(&self) -> anyhow::Result<Vec<Answer>> {
        self.orlop(&["logs", "client"])?.lines().map(parse_answer).collect()
    }

    pub(super) fn service_address(&self, name: &str) -> anyhow::Result<IpAddr> {
        let text = self.orlop(&["get", "service", name, "-o", "json"])?;
        let services: Vec<Value> = serde_json::from_str(&text)?;
        Ok(services[0]["spec"]["clusterIP"].as_str().context("the service has no address")?.parse()?)
    }
}

fn parse_answer(line: &str) -> anyhow::Result<Answer> {
    let wrong = || format!("not a line of the client: {line:?}");
    let mut words = line.splitn(4, ' ');
    let mut field =
        |name: &str| words.next().and_then(|word| word.strip_prefix(name)).map(str::to_owned).with_context(wrong);
    let (number, time) = (field("seq=")?.parse()?, field("time=")?.parse()?);
    let outcome = words.next().with_context(wrong)?;
    let rest = words.next().unwrap_or_default().to_owned();
    let result = match outcome {
        "ok" => Ok(rest.trim_start_matches("pod=").to_owned()),
        _ => Err(rest),
    };
    Ok(Answer { number, time, result })
}

/// `GET` or `POST` on a connection of its own; returns the status code and the JSON answer.
pub(super) fn http(method: &str, to: SocketAddr, path: &str) -> anyhow::Result<(u16, Value)> {
    let (status, body) = http_text(method, to, path)?;
    Ok((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
}

/// As [`http`], with the answer as it came.
pub(crate) fn http_text(method: &str, to: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let limit = pace::stretched(Duration::from_secs(3));
    let mut stream = TcpStream::connect_timeout(&to, limit).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(|| format!("{method} http://{to}{path}"))?;
    let (head, body) = text.split_once("\r\n\r\n").context("not HTTP")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("not HTTP")?;
    Ok((status, body.to_owned()))
}

/// Asks `server` for the IPv4 address of `name` (RFC 1035).
pub(super) fn resolve(server: IpAddr, name: &str) -> anyhow::Result<IpAddr> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_read_timeout(Some(pace::stretched(Duration::from_secs(3))))?;
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    socket.send_to(&query, (server, 53))?;
    let mut reply = [0; 512];
    let length = socket.recv(&mut reply).with_context(|| format!("ask {server} for {name}"))?;
    let answers = u16::from_be_bytes([reply[6], reply[7]]);
    if answers == 0 || length < query.len() + 16 {
        bail!("{server} knows no address of {name} (code {})", reply[3] & 15);
    }
    let address: [u8; 4] = reply[length - 4..length].try_into()?;
    // The last record ends the message unless the server added others; the test's server is ours and adds none.
    Ok(IpAddr::from(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_client() {
        let answer = parse_answer("seq=3 time=12.500 ok pod=ai-service-x").unwrap();
        assert_eq!(answer, Answer { number: 3, time: 12.5, result: Ok("ai-service-x".into()) });
        let failed = parse_answer("seq=4 time=1.0 failed error=TimeoutError('timed out')").unwrap();
        assert!(failed.result.is_err());
        assert!(parse_answer("hello").is_err());
    }
}
