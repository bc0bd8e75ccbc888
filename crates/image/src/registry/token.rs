//! Answers to challenges: which credentials go where, and tokens from token servers.

use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full};
use serde::Deserialize;

use super::challenge::Challenge;
use super::connection::{Body, Connections, Endpoint, Reach};
use super::hosts::{Host, Tls, Transport, default_host};
use super::{empty_body, read_limited};
use crate::config::Auth;

/// Why no token was given.
#[derive(Debug)]
pub(crate) enum TokenError {
    /// The token server refuses; its words.
    Refused(String),
    /// It cannot be asked, or answers nonsense.
    Unavailable(String),
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

const ANSWER_BYTES_MAX: usize = 1 << 20;
const CLIENT_ID: &str = "orlop";

/// The value of the `Authorization` header for a challenge; none if there is nothing to answer with.
pub(crate) async fn answer(
    connections: &Connections,
    host: &Host,
    challenge: &Challenge,
    default_scope: &str,
    auth: Option<&Auth>,
) -> Result<Option<String>, TokenError> {
    match (challenge, auth) {
        (_, Some(Auth::RegistryToken(token))) => Ok(Some(format!("Bearer {token}"))),
        (Challenge::Basic, Some(Auth::Basic { username, password })) => Ok(Some(basic(username, password))),
        (Challenge::Basic, _) => Ok(None),
        (Challenge::Bearer { realm, service, scope, .. }, auth) => {
            let ask = Ask { realm, service: service.as_deref(), scope: scope.as_deref().unwrap_or(default_scope) };
            ask.fetch(connections, host, auth).await.map(|token| Some(format!("Bearer {token}")))
        }
    }
}

pub(crate) fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

struct Ask<'a> {
    realm: &'a str,
    service: Option<&'a str>,
    scope: &'a str,
}

impl Ask<'_> {
    /// An identity token is exchanged by OAuth2 POST. A password goes by GET, which every token server knows, and by
    /// POST where GET is not taken.
    async fn fetch(&self, connections: &Connections, host: &Host, auth: Option<&Auth>) -> Result<String, TokenError> {
        let uri: Uri = self
            .realm
            .parse()
            .map_err(|e| TokenError::Unavailable(format!("its token server {:?} is not a URL: {e}", self.realm)))?;
        let endpoint = endpoint(&uri, host, auth.is_some(), connections.reach_from(&host.authority))?;
        match auth {
            None => self.get(connections, &endpoint, &uri, None).await.map_err(Into::into),
            Some(Auth::IdentityToken(token)) => self
                .post(connections, &endpoint, &uri, &[("grant_type", "refresh_token"), ("refresh_token", token)])
                .await
                .map_err(Into::into),
            Some(Auth::Basic { username, password }) => match self
                .get(connections, &endpoint, &uri, Some(basic(username, password)))
                .await
            {
                Err(Failure::Status(StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_FOUND)) => {
                    let form =
                        [("grant_type", "password"), ("username", username.as_str()), ("password", password.as_str())];
                    self.post(connections, &endpoint, &uri, &form).await.map_err(Into::into)
                }
                other => other.map_err(Into::into),
            },
            Some(Auth::RegistryToken(token)) => Ok(token.clone()),
        }
    }

    async fn get(
        &self,
        connections: &Connections,
        endpoint: &Endpoint,
        uri: &Uri,
        authorization: Option<String>,
    ) -> Result<String, Failure> {
        let mut query = vec![("scope", self.scope)];
        query.extend(self.service.map(|service| ("service", service)));
        let joint = if uri.query().is_some() { '&' } else { '?' };
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::builder().method(Method::GET).uri(format!("{path}{joint}{}", form_encode(&query)));
        if let Some(value) = authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        self.send(connections, endpoint, request.body(empty_body())).await
    }

    async fn post(
        &self,
        connections: &Connections,
        endpoint: &Endpoint,
        uri: &Uri,
        form: &[(&str, &str)],
    ) -> Result<String, Failure> {
        let mut fields = form.to_vec();
        fields.extend([("client_id", CLIENT_ID), ("scope", self.scope)]);
        fields.extend(self.service.map(|service| ("service", service)));
        let body = Full::new(Bytes::from(form_encode(&fields))).map_err(|never| match never {}).boxed_unsync();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        self.send(connections, endpoint, request.body(body)).await
    }

    async fn send(
        &self,
        connections: &Connections,
        endpoint: &Endpoint,
        request: Result<Request<Body>, http::Error>,
    ) -> Result<String, Failure> {
        let broken = |reason: String| Failure::Unavailable(format!("its token server {} {reason}", endpoint.authority));
        let request = request.map_err(|e| broken(format!("has an unusable address: {e}")))?;
        let response =
            connections.send(endpoint, request).await.map_err(|e| broken(format!("cannot be asked: {e}")))?;
        let status = response.status();
        let body = read_limited(response.into_body(), ANSWER_BYTES_MAX)
            .await
            .map_err(|e| broken(format!("breaks off: {e}")))?;
        if !status.is_success() {
            return Err(Failure::Status(status));
        }
        let answer: Answer =
            serde_json::from_slice(&body).map_err(|_| broken("answers with something that is no token".into()))?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        token.ok_or_else(|| broken("answers without a token".into()))
    }
}

enum Failure {
    /// Nothing else is told of the answer: a registry chooses who is asked, and the image's user reads what is told.
    Status(StatusCode),
    Unavailable(String),
}

impl From<Failure> for TokenError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Status(status) if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
                Self::Refused(format!("the token server answers {status}"))
            }
            Failure::Status(status) => Self::Unavailable(format!("the token server answers {status}")),
            Failure::Unavailable(reason) => Self::Unavailable(reason),
        }
    }
}

/// Credentials do not go in the clear to a token server, unless the registry itself is talked to in the clear.
fn endpoint(realm: &Uri, host: &Host, with_credentials: bool, reach: Reach) -> Result<Endpoint, TokenError> {
    let authority = realm
        .authority()
        .ok_or_else(|| TokenError::Unavailable(format!("its token server {realm} names no host")))?
        .to_string();
    let plain = realm.scheme_str() == Some("http");
    let clear_is_fine = host.transport != Transport::Tls || default_host(&authority).is_loopback();
    if plain && with_credentials && !clear_is_fine {
        return Err(TokenError::Refused(format!("credentials would go unencrypted to the token server {authority}")));
    }
    let same_host = authority == host.authority;
    let reach = if same_host { Reach::Anywhere } else { reach };
    let tls = if same_host {
        host.tls.clone()
    } else {
        Tls { authorities: host.tls.authorities.clone(), skip_verify: host.tls.skip_verify, clients: Vec::new() }
    };
    let transport = if plain { Transport::Plain } else { Transport::Tls };
    Ok(Endpoint { transport, authority, tls, dial_timeout: host.dial_timeout, reach })
}

/// `application/x-www-form-urlencoded`
pub(crate) fn form_encode(fields: &[(&str, &str)]) -> String {
    fields.iter().map(|(name, value)| format!("{}={}", percent(name), percent(value))).collect::<Vec<_>>().join("&")
}

fn percent(text: &str) -> String {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    text.bytes().map(|byte| if safe(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
