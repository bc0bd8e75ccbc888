//! HTTP GET as upstream's prober does it: a fresh connection, no certificate checks, 200 to 399 is a success.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Asks; the text of a failure is upstream's where there is one.
pub(super) async fn get(address: SocketAddr, action: &HTTPGetAction) -> Result<(), String> {
    let request = request(address, action)?;
    let dial = |error: std::io::Error| format!("Get \"{}\": dial tcp {address}: {error}", request.uri());
    let stream = TcpStream::connect(address).await.map_err(dial)?;
    if action.scheme.as_deref() != Some("HTTPS") {
        return ask(stream, request).await;
    }
    let name = ServerName::IpAddress(address.ip().into());
    let stream = tokio_rustls::TlsConnector::from(trusting()).connect(name, stream).await;
    ask(stream.map_err(|error| format!("TLS with {address}: {error}"))?, request).await
}

fn request(address: SocketAddr, action: &HTTPGetAction) -> Result<Request<Empty<Bytes>>, String> {
    let path = action.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let uri: Uri = path.parse().map_err(|error| format!("path {path:?}: {error}"))?;
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    for one in action.http_headers.iter().flatten() {
        let bad = || format!("header {:?} cannot be sent", one.name);
        let name = header::HeaderName::from_bytes(one.name.as_bytes()).map_err(|_| bad())?;
        headers.append(name, HeaderValue::from_str(&one.value).map_err(|_| bad())?);
    }
    let defaults = [
        (header::HOST, HeaderValue::from_str(&address.to_string())),
        (header::USER_AGENT, Ok(HeaderValue::from_static("kube-probe/1.37"))),
        (header::ACCEPT, Ok(HeaderValue::from_static("*/*"))),
        (header::CONNECTION, Ok(HeaderValue::from_static("close"))),
    ];
    for (name, value) in defaults {
        if let (false, Ok(value)) = (headers.contains_key(&name), value) {
            headers.insert(name, value);
        }
    }
    Ok(request)
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<(), String> {
    let failed = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // The connection ends with the future that drives it: the probe's timeout ends both.
    let asked = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let status = response.status();
        // What it says is read to its end at most so far: some servers log a reset as an error.
        let _ = http_body_util::Limited::new(response.into_body(), 10 << 10).collect().await;
        Ok::<_, String>(status)
    };
    let status = tokio::select! {
        status = asked => status?,
        Err(error) = connection => return Err(failed(error)),
    };
    match status.as_u16() {
        200..400 => Ok(()),
        code => Err(format!("HTTP probe failed with statuscode: {code}")),
    }
}

/// A configuration that trusts any certificate, as upstream's probes do.
fn trusting() -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Arc::new(config)
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
