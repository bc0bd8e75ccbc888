//! Another runtime, such as containerd or CRI-O, behind our traits: each call goes over its socket.
//!
//! A call that is given up, by its limit ([`Client::with_timeout`]) or by a caller that drops the future, is cancelled in the
//! other runtime. Streams have no limit.

use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{self, Either};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::calls::{image_calls, runtime_calls};
use crate::limits;
use crate::server::MESSAGE_MAX;
use crate::v1::image_service_client::ImageServiceClient;
use crate::v1::runtime_service_client::RuntimeServiceClient;
use crate::{Error, ImageService, Items, RuntimeService, v1};

/// How long a stream waits to be refused. A server in Go sends nothing before the first item, which may never come: after
/// this time it has taken the request.
const HEADERS_WITHIN: Duration = Duration::from_millis(250);

/// A runtime of another process. A handle: clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    /// How long most calls may take.
    timeout: Option<Duration>,
}

impl Client {
    /// The runtime that listens on the Unix socket at `path`. Connects with the first call, and again with the next one
    /// when the runtime was restarted; until then calls fail with [`Error::Unavailable`].
    ///
    /// # Errors
    /// The path is not valid UTF-8.
    pub fn new(path: &Path) -> Result<Self, Error> {
        let unusable = || Error::InvalidArgument(format!("{} is no path of a CRI socket", path.display()));
        let endpoint = path.to_str().map(|path| Endpoint::from_shared(format!("unix://{path}")));
        let channel = endpoint.and_then(Result::ok).ok_or_else(unusable)?.connect_lazy();
        let runtime = RuntimeServiceClient::new(channel.clone());
        let images = ImageServiceClient::new(channel);
        Ok(Self {
            runtime: runtime.max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX),
            images: images.max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX),
            timeout: None,
        })
    }

    /// Gives up a call that takes longer than `usual`, with [`Error::DeadlineExceeded`]. To stop and to execute takes its own
    /// time more, a sandbox may take twice as long, and a pull as long as it takes.
    #[must_use]
    pub fn with_timeout(self, usual: Duration) -> Self {
        Self { timeout: Some(usual), ..self }
    }
}

macro_rules! call {
    (
        $trait:ident by $client:ident;
        unary { $($call:ident = $method:ident($request:ident) -> $response:ident;)* }
        streaming { $($stream_call:ident = $stream_method:ident($stream_request:ident) -> $item:ident in $stream:ident;)* }
    ) => {
        #[async_trait::async_trait]
        impl $trait for Client {
            $(
                async fn $method(&self, request: v1::$request) -> Result<v1::$response, Error> {
                    let limit = self.timeout.and_then(|usual| limits::of(&request, usual));
                    let mut client = self.$client.clone();
                    answered(stringify!($call), limit, client.$method(request)).await
                }
            )*
            $(
                async fn $stream_method(&self, request: v1::$stream_request) -> Result<Items<v1::$item>, Error> {
                    let failed = |status| Error::from_status(stringify!($stream_call), status);
                    let mut client = self.$client.clone();
                    let call = Box::pin(async move { client.$stream_method(request).await });
                    Ok(match future::select(call, pin!(tokio::time::sleep(HEADERS_WITHIN))).await {
                        Either::Left((answer, _)) => answer.map_err(failed)?.into_inner().map_err(failed).boxed(),
                        Either::Right(((), call)) => {
                            stream::once(call).map_ok(Response::into_inner).try_flatten().map_err(failed).boxed()
                        }
                    })
                }
            )*
        }
    };
}

runtime_calls! { call! { RuntimeService by runtime; } }
image_calls! { call! { ImageService by images; } }

/// The answer to a call, if it comes within the limit.
async fn answered<T>(
    call: &'static str,
    limit: Option<Duration>,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    let late = |limit| Error::DeadlineExceeded(format!("{call}: the runtime has not answered within {limit:?}"));
    let answer = match limit {
        Some(limit) => tokio::time::timeout(limit, answer).await.map_err(|_| late(limit))?,
        None => answer.await,
    };
    Ok(answer.map_err(|status| Error::from_status(call, status))?.into_inner())
}

impl Error {
    /// What the other runtime said, or why it could not be asked.
    fn from_status(call: &'static str, status: Status) -> Self {
        let message = || format!("{call}: {}", described(&status));
        match status.code() {
            Code::NotFound => not_found(status.message()),
            Code::InvalidArgument | Code::OutOfRange => Self::InvalidArgument(message()),
            Code::AlreadyExists => Self::AlreadyExists(message()),
            Code::FailedPrecondition => Self::FailedPrecondition(message()),
            Code::DeadlineExceeded => Self::DeadlineExceeded(message()),
            Code::Unavailable => Self::Unavailable(message()),
            Code::ResourceExhausted => Self::ResourceExhausted(message()),
            Code::PermissionDenied | Code::Unauthenticated => Self::PermissionDenied(message()),
            Code::Unimplemented => Self::Unimplemented { call },
            _ => Self::Internal(message()),
        }
    }
}

/// Of the words of another runtime, which are for humans, what kind of object it lacks and which one.
fn not_found(message: &str) -> Error {
    let kinds = ["sandbox", "container", "image"];
    let kind = kinds.into_iter().find(|kind| message.contains(kind)).unwrap_or("object");
    let id = message.split('"').nth(1).unwrap_or(message);
    Error::NotFound { kind, id: id.to_owned() }
}

/// The message of a status, and where it came from this side the whole chain of causes.
fn described(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        // Layers of the transport often repeat the words of the one below.
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_other_runtimes() {
        let check = |message: &str, expect: &str| {
            let error = Error::from_status("ContainerStatus", Status::not_found(message));
            assert_eq!((error.code(), error.to_string().as_str()), (Code::NotFound, expect));
        };
        check(r#"an error occurred when try to find container "abc": not found"#, r#"container "abc" not found"#);
        check(r#"sandbox "s" of container "c": not found"#, r#"sandbox "s" not found"#);
        check("no such thing", r#"object "no such thing" not found"#);
    }

    #[tokio::test]
    async fn a_runtime_that_is_away() {
        let scratch = tempfile::tempdir().unwrap();
        let client = Client::new(&scratch.path().join("cri.sock")).unwrap();
        let error = client.version(v1::VersionRequest::default()).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        assert!(error.to_string().contains("No such file"), "{error}");
    }
}
