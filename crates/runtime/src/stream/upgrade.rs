//! What client and server agree on before they leave HTTP.

use bytes::Bytes;
use http::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::Full;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::status::Format;
use super::websocket::{Framing, Protocol};

const STREAM_PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOL_VERSIONS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const SPDY: &str = "SPDY/3.1";

pub(super) type Answer = Response<Full<Bytes>>;

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Exec or attach.
    RemoteCommand,
    PortForward,
}

/// How client and server will speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speech {
    Spdy(Version),
    WebSocket(Protocol, Version),
    /// SPDY inside of a WebSocket.
    Tunnel,
}

/// What differs between the versions of the protocol. Version 1 had bugs of the server that no client relies on
/// (kubernetes issues 13394 and 13395): it is served as version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    /// How the end is told: a status from version 4 on.
    pub(super) end: Format,
    /// Whether the client tells the size of its terminal: from version 3 on.
    pub(super) resize: bool,
}

/// Why a client gets no session.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    message: String,
    /// The versions of SPDY's protocol that it may ask for instead.
    accepted: Vec<&'static str>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), accepted: Vec::new() }
    }

    /// The client asks for none of the protocols that are served.
    fn none_of(offered: &[&str], served: impl Iterator<Item = &'static str>) -> Self {
        let served: Vec<&str> = served.collect();
        let message = format!("unable to upgrade: the client speaks {offered:?}, the server {served:?}");
        Self { accepted: served, ..Self::new(StatusCode::FORBIDDEN, message) }
    }

    /// What the client is told; the last answer of its connection.
    #[expect(clippy::disallowed_methods, reason = "one name")]
    pub(super) fn answer(self) -> Answer {
        let mut answer = Response::new(Full::new(self.message.into()));
        *answer.status_mut() = self.status;
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        for name in self.accepted {
            answer.headers_mut().append(ACCEPTED_PROTOCOL_VERSIONS, HeaderValue::from_static(name));
        }
        answer
    }
}

/// Agrees with a client on how to speak; the answer seals it.
///
/// # Errors
/// They speak no common protocol, or the request is malformed.
pub(super) fn agree(purpose: Purpose, headers: &HeaderMap) -> Result<(Speech, Answer), Refusal> {
    let wants = |name: HeaderName, word: &str| {
        let mut values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.any(|value| value.to_ascii_lowercase().contains(&word.to_ascii_lowercase()))
    };
    if wants(CONNECTION, "upgrade") && wants(UPGRADE, "websocket") {
        return agree_on_websocket(purpose, headers);
    }
    if wants(CONNECTION, "upgrade") && wants(UPGRADE, SPDY) {
        return agree_on_spdy(purpose, headers);
    }
    Err(Refusal::new(StatusCode::BAD_REQUEST, "unable to upgrade: the request asks for neither SPDY/3.1 nor websocket"))
}

fn agree_on_spdy(purpose: Purpose, headers: &HeaderMap) -> Result<(Speech, Answer), Refusal> {
    let served: &[(&str, Version)] = match purpose {
        Purpose::RemoteCommand => &[
            ("v4.channel.k8s.io", Version { end: Format::Json, resize: true }),
            ("v3.channel.k8s.io", Version { end: Format::Text, resize: true }),
            ("v2.channel.k8s.io", Version { end: Format::Text, resize: false }),
            ("channel.k8s.io", Version { end: Format::Text, resize: false }),
        ],
        Purpose::PortForward => &[("portforward.k8s.io", Version { end: Format::Text, resize: false })],
    };
    let offered = listed(headers, &STREAM_PROTOCOL_VERSION);
    if offered.is_empty() {
        let message = "unable to upgrade: the header X-Stream-Protocol-Version is missing or empty";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    }
    let (name, version) =
        preferred(&offered, served).ok_or_else(|| Refusal::none_of(&offered, served.iter().map(|(name, _)| *name)))?;
    let mut answer = switching(HeaderValue::from_static(SPDY));
    answer.headers_mut().insert(STREAM_PROTOCOL_VERSION, HeaderValue::from_static(name));
    Ok((Speech::Spdy(version), answer))
}

fn agree_on_websocket(purpose: Purpose, headers: &HeaderMap) -> Result<(Speech, Answer), Refusal> {
    let Some(key) = headers.get(SEC_WEBSOCKET_KEY) else {
        let message = "unable to upgrade: the header Sec-WebSocket-Key is missing";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    };
    let old = Version { end: Format::Text, resize: true };
    let new = Version { end: Format::Json, resize: true };
    let binary = Protocol { framing: Framing::Binary, half_close: false };
    let base64 = Protocol { framing: Framing::Base64, half_close: false };
    let half_close = Protocol { framing: Framing::Binary, half_close: true };
    let served: &[(&'static str, Speech)] = match purpose {
        Purpose::RemoteCommand => &[
            ("v5.channel.k8s.io", Speech::WebSocket(half_close, new)),
            ("v4.channel.k8s.io", Speech::WebSocket(binary, new)),
            ("v4.base64.channel.k8s.io", Speech::WebSocket(base64, new)),
            ("channel.k8s.io", Speech::WebSocket(binary, old)),
            ("base64.channel.k8s.io", Speech::WebSocket(base64, old)),
        ],
        Purpose::PortForward => &[
            ("SPDY/3.1+portforward.k8s.io", Speech::Tunnel),
            ("v4.channel.k8s.io", Speech::WebSocket(binary, new)),
            ("v4.base64.channel.k8s.io", Speech::WebSocket(base64, new)),
        ],
    };
    let offered = listed(headers, &SEC_WEBSOCKET_PROTOCOL);
    let mut answer = switching(HeaderValue::from_static("websocket"));
    let accept = derive_accept_key(key.as_bytes());
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if offered.is_empty() {
        return Ok((Speech::WebSocket(binary, old), answer));
    }
    let (name, speech) =
        preferred(&offered, served).ok_or_else(|| Refusal::none_of(&offered, served.iter().map(|(name, _)| *name)))?;
    answer.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    Ok((speech, answer))
}

/// The values of a header that may be repeated and have several values each.
fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|value| !value.is_empty()).collect()
}

/// The first that the client offers, in its order.
fn preferred<T: Copy>(offered: &[&str], served: &[(&'static str, T)]) -> Option<(&'static str, T)> {
    offered.iter().find_map(|offer| served.iter().find(|(name, _)| name == offer).copied())
}

fn switching(to: HeaderValue) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.headers_mut().insert(UPGRADE, to);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.try_append(HeaderName::from_static(name), HeaderValue::from_static(value)).unwrap();
        }
        headers
    }

    fn spdy(purpose: Purpose, versions: &[&'static str]) -> Result<(Speech, Answer), Refusal> {
        let mut pairs = vec![("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        pairs.extend(versions.iter().map(|version| ("x-stream-protocol-version", *version)));
        agree(purpose, &headers(&pairs))
    }

    fn websocket(purpose: Purpose, protocols: &[&'static str]) -> Result<(Speech, Answer), Refusal> {
        let key = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        let mut pairs = vec![("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket"), key];
        pairs.extend(protocols.iter().map(|protocol| ("sec-websocket-protocol", *protocol)));
        agree(purpose, &headers(&pairs))
    }

    #[test]
    fn the_client_s_first_choice_that_is_served() {
        let check = |offered: &[&'static str], expect: &str| {
            let (_, answer) = spdy(Purpose::RemoteCommand, offered).unwrap();
            assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
            assert_eq!(answer.headers()["x-stream-protocol-version"], expect);
        };
        check(&["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"], "v4.channel.k8s.io");
        check(&["v2.channel.k8s.io, channel.k8s.io"], "v2.channel.k8s.io");
        check(&["channel.k8s.io"], "channel.k8s.io");
        let (speech, answer) = spdy(Purpose::PortForward, &["portforward.k8s.io"]).unwrap();
        assert_eq!(answer.headers()["upgrade"], "SPDY/3.1");
        assert!(matches!(speech, Speech::Spdy(_)));
    }

    #[test]
    fn websockets() {
        let check = |purpose, offered: &[&'static str], expect: Option<&str>, speech| {
            let (agreed, answer) = websocket(purpose, offered).unwrap();
            let named = answer.headers().get("sec-websocket-protocol").map(|value| value.to_str().unwrap());
            assert_eq!((named, agreed), (expect, speech));
            // The example of RFC 6455 §1.3.
            assert_eq!(answer.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        };
        let [old, new] = [Format::Text, Format::Json].map(|end| Version { end, resize: true });
        let protocol = |framing, half_close| Protocol { framing, half_close };
        let v5 = Speech::WebSocket(protocol(Framing::Binary, true), new);
        check(Purpose::RemoteCommand, &["v5.channel.k8s.io"], Some("v5.channel.k8s.io"), v5);
        let base64 = Speech::WebSocket(protocol(Framing::Base64, false), old);
        check(Purpose::RemoteCommand, &["base64.channel.k8s.io"], Some("base64.channel.k8s.io"), base64);
        check(Purpose::RemoteCommand, &[], None, Speech::WebSocket(protocol(Framing::Binary, false), old));
        let tunnel = "SPDY/3.1+portforward.k8s.io";
        check(Purpose::PortForward, &[tunnel], Some(tunnel), Speech::Tunnel);
    }

    #[test]
    fn refusals() {
        let check = |agreed: Result<(Speech, Answer), Refusal>, expect| {
            let answer = agreed.unwrap_err().answer();
            assert_eq!(answer.status(), expect);
            answer
        };
        check(agree(Purpose::RemoteCommand, &HeaderMap::new()), StatusCode::BAD_REQUEST);
        check(spdy(Purpose::RemoteCommand, &[]), StatusCode::BAD_REQUEST);
        let refused = check(spdy(Purpose::PortForward, &["v4.channel.k8s.io"]), StatusCode::FORBIDDEN);
        assert_eq!(refused.headers()["x-accepted-stream-protocol-versions"], "portforward.k8s.io");
        check(websocket(Purpose::RemoteCommand, &["soap"]), StatusCode::FORBIDDEN);
        let no_key = headers(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        check(agree(Purpose::PortForward, &no_key), StatusCode::BAD_REQUEST);
    }
}
