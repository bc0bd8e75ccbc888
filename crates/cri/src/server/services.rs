//! Our traits as the services of the generated code.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::calls::{image_calls, runtime_calls};
use crate::{Error, ImageService, Items, RuntimeService, v1};

/// A service of ours, on the wire.
pub(super) struct Served<S: ?Sized> {
    pub(super) service: Arc<S>,
    /// Ends the streams that would go on for ever.
    pub(super) stop: CancellationToken,
}

/// What a streaming call sends.
type Outgoing<T> = BoxStream<'static, Result<T, Status>>;

/// Passes items on until the server stops. That ends a stream with an error: a list must not look complete.
fn outgoing<T: Send + 'static>(items: Items<T>, stop: CancellationToken) -> Outgoing<T> {
    stream::unfold(Some(items), move |items| {
        let stop = stop.clone();
        async move {
            let mut items = items?;
            tokio::select! {
                biased;
                item = items.next() => Some((item?.map_err(Status::from), Some(items))),
                () = stop.cancelled() => {
                    let stopped = Error::Unavailable("the runtime is being stopped".to_owned());
                    Some((Err(stopped.into()), None))
                }
            }
        }
    })
    .boxed()
}

macro_rules! serve {
    (
        $trait:ident by $generated:path;
        unary { $($call:ident = $method:ident($request:ident) -> $response:ident;)* }
        streaming { $($stream_call:ident = $stream_method:ident($stream_request:ident) -> $item:ident in $stream:ident;)* }
    ) => {
        #[async_trait::async_trait]
        impl $generated for Served<dyn $trait> {
            $(
                async fn $method(&self, request: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                    Ok(Response::new(self.service.$method(request.into_inner()).await?))
                }
            )*
            $(
                type $stream = Outgoing<v1::$item>;

                async fn $stream_method(
                    &self,
                    request: Request<v1::$stream_request>,
                ) -> Result<Response<Self::$stream>, Status> {
                    let items = self.service.$stream_method(request.into_inner()).await?;
                    Ok(Response::new(outgoing(items, self.stop.clone())))
                }
            )*
        }
    };
}

runtime_calls! { serve! { RuntimeService by v1::runtime_service_server::RuntimeService; } }
image_calls! { serve! { ImageService by v1::image_service_server::ImageService; } }

#[cfg(test)]
mod tests {
    use super::*;

    /// A list that is cut short by the end of the server must not look complete.
    #[tokio::test]
    async fn a_stream_ends_with_the_server() {
        let stop = CancellationToken::new();
        let mut items = outgoing(stream::iter([Ok(1)]).chain(stream::pending()).boxed(), stop.clone());
        assert_eq!(items.next().await.unwrap().unwrap(), 1);
        stop.cancel();
        assert_eq!(items.next().await.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
        assert!(items.next().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_items() {
        let stop = CancellationToken::new();
        let mut items = outgoing(stream::iter([Ok(1), Err(Error::Internal("x".to_owned()))]).boxed(), stop);
        assert_eq!(items.next().await.unwrap().unwrap(), 1);
        assert_eq!(items.next().await.unwrap().unwrap_err().code(), tonic::Code::Internal);
        assert!(items.next().await.is_none());
    }
}
