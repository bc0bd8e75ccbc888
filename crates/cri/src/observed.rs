//! A runtime whose calls somebody counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::calls::{image_calls, runtime_calls};
use crate::{Error, ImageService, Items, RuntimeService, v1};

/// Hears how each call went.
pub trait Observer: Send + Sync + 'static {
    /// A call, as our method is called, has been answered.
    fn done(&self, call: &'static str, took: Duration, failed: bool);
}

/// A service that tells an observer of its calls. Of a stream, that it was opened.
pub struct Observed<S: ?Sized> {
    inner: Arc<S>,
    observer: Arc<dyn Observer>,
}

impl<S: ?Sized> Observed<S> {
    /// `inner`, observed.
    pub fn new(inner: Arc<S>, observer: Arc<dyn Observer>) -> Self {
        Self { inner, observer }
    }

    async fn tell<T>(&self, call: &'static str, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let begun = Instant::now();
        let answer = answer.await;
        self.observer.done(call, begun.elapsed(), answer.is_err());
        answer
    }
}

macro_rules! observe {
    (
        $trait:ident;
        unary { $($call:ident = $method:ident($request:ident) -> $response:ident;)* }
        streaming { $($stream_call:ident = $stream_method:ident($stream_request:ident) -> $item:ident in $stream:ident;)* }
    ) => {
        #[async_trait::async_trait]
        impl $trait for Observed<dyn $trait> {
            $(
                async fn $method(&self, request: v1::$request) -> Result<v1::$response, Error> {
                    self.tell(stringify!($method), self.inner.$method(request)).await
                }
            )*
            $(
                async fn $stream_method(&self, request: v1::$stream_request) -> Result<Items<v1::$item>, Error> {
                    self.tell(stringify!($stream_method), self.inner.$stream_method(request)).await
                }
            )*
        }
    };
}

runtime_calls! { observe! { RuntimeService; } }
image_calls! { observe! { ImageService; } }

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Knows its version and nothing else.
    struct Small;

    #[async_trait::async_trait]
    impl RuntimeService for Small {
        async fn version(&self, _: v1::VersionRequest) -> Result<v1::VersionResponse, Error> {
            Ok(v1::VersionResponse::default())
        }
    }

    #[derive(Default)]
    struct Heard(Mutex<Vec<(&'static str, bool)>>);

    impl Observer for Heard {
        fn done(&self, call: &'static str, _: Duration, failed: bool) {
            self.0.lock().unwrap().push((call, failed));
        }
    }

    #[tokio::test]
    async fn calls_and_failures_are_told() {
        let heard = Arc::new(Heard::default());
        let small: Arc<dyn RuntimeService> = Arc::new(Small);
        let observed = Observed::new(small, heard.clone());
        observed.version(v1::VersionRequest::default()).await.unwrap();
        observed.status(v1::StatusRequest::default()).await.unwrap_err();
        assert!(observed.get_container_events(v1::GetEventsRequest::default()).await.is_err());
        assert_eq!(*heard.0.lock().unwrap(), [("version", false), ("status", true), ("get_container_events", true)]);
    }
}
