//! Plain HTTP/1.1, for answers that are ready at once.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{Id, JoinSet};

/// A client says what it wants within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// A connection ends when what was asked within this time has been answered; whoever wants more comes again.
const STAY_MAX: Duration = Duration::from_secs(60);
/// Connections of one listener at once; more of them wait.
const CLIENTS_MAX: usize = 256;
/// Connections of one address; more of them are closed.
const OF_A_CLIENT_MAX: usize = 32;
/// After a connection could not be taken, as there was no descriptor left.
const BREATH: Duration = Duration::from_millis(100);

/// The body of every answer.
pub(crate) type Body = Full<Bytes>;

/// Who answers.
pub(crate) trait Answers: Clone + Send + Sync + 'static {
    /// The answer to one request.
    fn answer(&self, request: &Request<Incoming>) -> impl Future<Output = Response<Body>> + Send;

    /// Whether a client is answered at all.
    fn admits(&self, _client: &TcpStream) -> bool {
        true
    }
}

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, answers: impl Answers) {
    serve_from(|| listener.accept(), answers, STAY_MAX).await;
}

async fn serve_from<A>(mut accept: impl FnMut() -> A, answers: impl Answers, stay_max: Duration)
where
    A: Future<Output = io::Result<(TcpStream, SocketAddr)>>,
{
    let mut connections = JoinSet::new();
    let mut clients = Clients::default();
    loop {
        tokio::select! {
            Some(ended) = connections.join_next_with_id() => clients.forget(match ended {
                Ok((id, ())) => id,
                Err(error) => error.id(),
            }),
            accepted = accept(), if connections.len() < CLIENTS_MAX => match accepted {
                Ok((stream, peer)) if clients.have_room_for(peer.ip()) && answers.admits(&stream) => {
                    let task = connections.spawn(converse(stream, answers.clone(), stay_max));
                    clients.by.insert(task.id(), peer.ip());
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "a client cannot be accepted");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    }
}

/// Whose the connections are: not more than [`CLIENTS_MAX`].
#[derive(Debug, Default)]
struct Clients {
    by: HashMap<Id, IpAddr>,
}

impl Clients {
    fn have_room_for(&self, client: IpAddr) -> bool {
        self.by.values().filter(|one| **one == client).count() < OF_A_CLIENT_MAX
    }

    fn forget(&mut self, task: Id) {
        self.by.remove(&task);
    }
}

async fn converse(stream: TcpStream, answers: impl Answers, stay_max: Duration) {
    let service = service_fn(|request| {
        let answers = answers.clone();
        async move { Ok::<_, Infallible>(answers.answer(&request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = match tokio::time::timeout(stay_max, connection.as_mut()).await {
        Ok(ended) => Ok(ended),
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(PATIENCE, connection).await
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client went away"),
        Err(_) => tracing::debug!("a client takes too long and is left"),
    }
}

/// A text.
pub(crate) fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    with_type(status, "text/plain; charset=utf-8", text)
}

/// JSON.
pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    with_type(status, "application/json", value.to_string())
}

/// An answer of this type, which clients must not guess.
pub(crate) fn with_type(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpSocket;

    use super::*;

    #[derive(Clone)]
    struct Here;

    impl Answers for Here {
        async fn answer(&self, _request: &Request<Incoming>) -> Response<Body> {
            text(StatusCode::OK, "here")
        }
    }

    async fn client(from: [u8; 4], to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    /// Whether there is an answer; else the connection has been closed.
    async fn is_answered(stream: &mut TcpStream) -> bool {
        let mut heard = [0; 1024];
        stream.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").await.is_ok()
            && stream.read(&mut heard).await.is_ok_and(|length| length > 0)
    }

    #[tokio::test]
    async fn one_client_does_not_keep_others_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Here));
        let mut greedy = Vec::new();
        for _ in 0..=CLIENTS_MAX {
            greedy.push(client([127, 0, 0, 1], at).await);
        }
        assert!(is_answered(&mut client([127, 0, 0, 2], at).await).await);
        assert!(!is_answered(&mut greedy[OF_A_CLIENT_MAX]).await);
        assert!(is_answered(&mut greedy[0]).await);
        drop(greedy);
        // Those that have gone are forgotten as they are noticed.
        while !is_answered(&mut client([127, 0, 0, 1], at).await).await {}
    }

    #[tokio::test]
    async fn nobody_stays_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = client([127, 0, 0, 1], listener.local_addr().unwrap()).await;
        tokio::spawn(async move { serve_from(|| listener.accept(), Here, Duration::from_millis(10)).await });
        let asks = async { while is_answered(&mut client).await {} };
        tokio::time::timeout(Duration::from_secs(60), asks).await.expect("it is sent away");
    }

    #[tokio::test]
    async fn it_takes_a_breath_when_no_descriptor_is_left() {
        let tried = std::cell::Cell::new(0);
        let accept = || {
            tried.set(tried.get() + 1);
            std::future::ready(Err(io::Error::from(sys::rustix::io::Errno::MFILE)))
        };
        let looks = async {
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = serve_from(accept, Here, STAY_MAX) => {}
            () = looks => {}
        }
        assert!(tried.get() < 100, "{} times", tried.get());
    }
}
