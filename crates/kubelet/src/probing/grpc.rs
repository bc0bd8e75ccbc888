//! The gRPC health check (`grpc.health.v1.Health/Check`), by hand: one request, two fields.

use std::net::SocketAddr;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::Fault;

/// `HealthCheckResponse.ServingStatus`, by its numbers.
const STATUSES: [&str; 4] = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];

/// Asks whether `service` serves.
pub(super) async fn check(address: SocketAddr, service: &str) -> Result<(), Fault> {
    let failed = |error: hyper::Error| format!("gRPC with {address}: {error}");
    let dial = |error| Fault::dial(format!("timeout: failed to connect service {address}: {error}"), &error);
    let stream = TcpStream::connect(address).await.map_err(dial)?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(failed)?;
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, "kube-probe/1.37")
        .body(Full::new(message(service)))
        .map_err(|error| error.to_string())?;
    let asked = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let early = response.headers().get("grpc-status").cloned();
        let body = http_body_util::Limited::new(response.into_body(), 4096).collect().await;
        let body = body.map_err(|error| format!("gRPC with {address}: {error}"))?;
        let status = early.or_else(|| body.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned());
        Ok::<_, String>((status, body.to_bytes()))
    };
    let (status, body) = tokio::select! {
        answer = asked => answer?,
        Err(error) = connection => return Err(failed(error).into()),
    };
    match status.as_ref().map(|status| status.as_bytes()) {
        Some(b"0") => {}
        Some(b"12") => return Err("error: this server does not implement the grpc health protocol".to_owned().into()),
        other => {
            let code = other.map(String::from_utf8_lossy).unwrap_or_default();
            return Err(format!("error: health rpc failed with status {code}").into());
        }
    }
    match serving_status(&body) {
        "SERVING" => Ok(()),
        status => Err(format!("service unhealthy (responded with {status:?})").into()),
    }
}

/// Prefix of five bytes, then field 1 as a varint, which is left out for 0. A later status is none that is known here.
fn serving_status(body: &[u8]) -> &'static str {
    let number = match body.get(5..) {
        Some([0x08, number, ..]) => usize::from(*number),
        _ => 0,
    };
    STATUSES.get(number).unwrap_or(&STATUSES[0])
}

/// `HealthCheckRequest { service }` with gRPC's prefix.
fn message(service: &str) -> Bytes {
    let mut field = BytesMut::new();
    if !service.is_empty() {
        field.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            field.put_u8(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
            length >>= 7;
        }
        field.put_u8(u8::try_from(length).unwrap_or(0));
        field.put_slice(service.as_bytes());
    }
    let mut out = BytesMut::new();
    out.put_u8(0);
    out.put_u32(u32::try_from(field.len()).unwrap_or(0));
    out.put_slice(&field);
    out.freeze()
}
