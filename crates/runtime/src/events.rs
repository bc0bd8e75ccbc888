//! Container events for those who listen (CRI `GetContainerEvents`).

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use cri::{Error, Items, v1};
use futures_util::Stream;
use tokio::sync::mpsc;

/// Events that wait for one listener: some thousand containers ending at once. One that is further behind is cut off and
/// asks for everything anew.
const BACKLOG: usize = 4096;

/// Who listens.
#[derive(Debug, Default)]
pub(crate) struct Bus {
    /// Held while an event is made and handed out, so that all listeners see one order and each event shows a state that
    /// is not older than that of the one before.
    listeners: Mutex<Vec<Listener>>,
}

#[derive(Debug)]
struct Listener {
    sender: mpsc::Sender<v1::ContainerEventResponse>,
    cut_off: Arc<AtomicBool>,
}

struct Events {
    receiver: mpsc::Receiver<v1::ContainerEventResponse>,
    cut_off: Arc<AtomicBool>,
    over: bool,
}

impl Bus {
    /// Hands an event to everybody who listens; nobody is waited for.
    pub(crate) fn publish(&self, event: impl FnOnce() -> v1::ContainerEventResponse) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| !listener.sender.is_closed());
        if listeners.is_empty() {
            return;
        }
        let event = event();
        listeners.retain(|listener| match listener.sender.try_send(event.clone()) {
            Ok(()) => true,
            Err(_) => {
                listener.cut_off.store(true, Ordering::Release);
                false
            }
        });
    }

    /// The events from now on.
    pub(crate) fn listen(&self) -> Items<v1::ContainerEventResponse> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let cut_off = Arc::new(AtomicBool::new(false));
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.push(Listener { sender, cut_off: cut_off.clone() });
        Box::pin(Events { receiver, cut_off, over: false })
    }

    /// Ends all streams.
    pub(crate) fn close(&self) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Stream for Events {
    type Item = Result<v1::ContainerEventResponse, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        match self.receiver.poll_recv(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(event)) => Poll::Ready(Some(Ok(event))),
            Poll::Ready(None) => {
                self.over = true;
                let behind = self.cut_off.load(Ordering::Acquire);
                Poll::Ready(behind.then(|| {
                    Err(Error::ResourceExhausted(format!(
                        "events were read too slowly: more than {BACKLOG} waited; subscribe again and list what there is"
                    )))
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    fn event(id: usize) -> v1::ContainerEventResponse {
        v1::ContainerEventResponse { container_id: id.to_string(), ..Default::default() }
    }

    #[tokio::test]
    async fn a_slow_listener_is_cut_off_and_told() {
        let bus = Bus::default();
        let (mut slow, mut quick) = (bus.listen(), bus.listen());
        for id in 0..=BACKLOG {
            bus.publish(|| event(id));
            assert_eq!(quick.next().await.unwrap().unwrap().container_id, id.to_string());
        }
        for id in 0..BACKLOG {
            assert_eq!(slow.next().await.unwrap().unwrap().container_id, id.to_string());
        }
        assert!(matches!(slow.next().await, Some(Err(Error::ResourceExhausted(_)))));
        assert!(slow.next().await.is_none());
        bus.publish(|| event(7));
        assert_eq!(quick.next().await.unwrap().unwrap().container_id, "7");
    }

    #[test]
    fn nothing_is_made_for_nobody() {
        let bus = Bus::default();
        drop(bus.listen());
        bus.publish(|| unreachable!("nobody listens"));
    }
}
