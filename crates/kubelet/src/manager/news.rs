//! What the runtime tells by itself, whatever becomes of its connection.

use std::collections::HashMap;
use std::sync::Arc;

use cri::service::Items;
use cri::v1::{ContainerEventResponse, GetEventsRequest};
use futures_util::{Stream, StreamExt as _, stream};

use crate::adopt::{self, Found};
use crate::context::Context;
use crate::retry::Rests;

type Events = Items<ContainerEventResponse>;

/// Something has happened in the runtime.
pub(super) enum News {
    Event(Box<ContainerEventResponse>),
    /// Events may be missing before this; what there is now.
    Gap(HashMap<String, Found>),
}

/// Asks for the runtime's events until it gives them.
pub(super) async fn subscribe(context: &Context) -> Events {
    let (mut rests, mut is_told) = (Rests::new(), false);
    loop {
        match context.parts.runtime.get_container_events(GetEventsRequest::default()).await {
            Ok(events) => {
                if is_told {
                    tracing::info!("the runtime gives events again");
                }
                return events;
            }
            Err(error) => {
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(%error, "the runtime gives no events; it is asked until it does");
                }
                rests.rest().await;
            }
        }
    }
}

/// All news from `events` on. When they end others are asked for, and what happened in between is looked up; whoever waits
/// for news can do other things meanwhile.
pub(super) fn follow(context: Arc<Context>, events: Events) -> impl Stream<Item = News> + Send {
    stream::unfold((context, events), |(context, mut events)| async move {
        loop {
            match events.next().await {
                Some(Ok(event)) => return Some((News::Event(Box::new(event)), (context, events))),
                Some(Err(error)) => tracing::warn!(%error, "the runtime's events"),
                None => {
                    let events = subscribe(&context).await;
                    let found = adopt::everything(&context).await;
                    return Some((News::Gap(found), (context, events)));
                }
            }
        }
    })
}
