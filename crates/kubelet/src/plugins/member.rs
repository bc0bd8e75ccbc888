//! One socket and the plugin behind it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use plugin::registration::registration_client::RegistrationClient;
use plugin::registration::{InfoRequest, RegistrationStatus};
use tokio::sync::watch;
use tonic::transport::Channel;

use super::{Handler, Plugin, Refusal, Seen};
use crate::retry::Rests;

/// How long a plugin may take to answer (upstream's limit for connecting).
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

type Handlers = Arc<[Arc<dyn Handler>]>;

/// A plugin that was taken, and who took it.
type Taken = (Plugin, Arc<dyn Handler>);

/// Registers whatever is behind the socket whenever it is made anew, until the registry ends.
pub(super) async fn run(
    socket: PathBuf,
    handlers: Handlers,
    tell: Arc<watch::Sender<Seen>>,
    mut seen: watch::Receiver<Seen>,
) {
    let mut taken: Option<Taken> = None;
    loop {
        let is_there = seen.borrow_and_update().socket.is_some();
        if !is_there {
            forget(&mut taken).await;
            tell.send_if_modified(|seen| {
                seen.is_over = seen.socket.is_none();
                false // It is asked for.
            });
        }
        tokio::select! {
            changed = seen.changed() => if changed.is_err() { return },
            () = register(&socket, &handlers, &mut taken), if is_there => {
                // It stays registered until its socket goes.
                if seen.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Tries until the plugin is registered. Dropped at any time.
async fn register(socket: &Path, handlers: &Handlers, taken: &mut Option<Taken>) {
    let mut rests = Rests::new();
    while let Err(refusal) = try_to_register(socket, handlers, taken).await {
        tracing::warn!(socket = %socket.display(), %refusal, "a plugin cannot be registered; trying again");
        rests.rest().await;
    }
}

async fn try_to_register(socket: &Path, handlers: &Handlers, taken: &mut Option<Taken>) -> Result<(), Refusal> {
    let channel = plugin::connect(socket).map_err(|error| Refusal(error.to_string()))?;
    let mut client = RegistrationClient::new(channel);
    let info = answered("GetInfo", client.get_info(InfoRequest {})).await?;
    let endpoint = if info.endpoint.is_empty() { socket.to_owned() } else { info.endpoint.into() };
    let plugin = Plugin { name: info.name, endpoint, versions: info.supported_versions };
    let Some(handler) = handlers.iter().find(|handler| handler.kind() == info.r#type).cloned() else {
        let refusal = Refusal(format!("this node takes no plugins of type {:?}", info.r#type));
        return Err(refused(&mut client, refusal).await);
    };
    // A plugin that was restarted is taken anew; if another one has come, the old one is gone.
    let is_other = |(old, by): &Taken| old.name != plugin.name || by.kind() != handler.kind();
    if taken.as_ref().is_some_and(is_other) {
        forget(taken).await;
    }
    *taken = Some((plugin.clone(), handler.clone()));
    if let Err(refusal) = handler.register(&plugin).await {
        forget(taken).await;
        return Err(refused(&mut client, refusal).await);
    }
    tracing::info!(kind = handler.kind(), name = plugin.name, endpoint = %plugin.endpoint.display(), "a plugin is registered");
    let status = RegistrationStatus { plugin_registered: true, error: String::new() };
    if let Err(refusal) = answered("NotifyRegistrationStatus", client.notify_registration_status(status)).await {
        // It does not know that it is registered, and would not serve.
        forget(taken).await;
        return Err(refusal);
    }
    Ok(())
}

async fn forget(taken: &mut Option<Taken>) {
    // It stays taken until this is done: whoever drops us half-way leaves the rest to the next.
    if let Some((plugin, handler)) = taken {
        handler.deregister(plugin).await;
        tracing::info!(kind = handler.kind(), name = plugin.name, "a plugin is gone");
    }
    *taken = None;
}

/// Tells the plugin, and gives the refusal back.
async fn refused(client: &mut RegistrationClient<Channel>, refusal: Refusal) -> Refusal {
    let status = RegistrationStatus { plugin_registered: false, error: refusal.0.clone() };
    let told = answered("NotifyRegistrationStatus", client.notify_registration_status(status)).await;
    if let Err(error) = told {
        tracing::debug!(%error, "a plugin did not hear that it was refused");
    }
    refusal
}

async fn answered<T>(
    call: &str,
    asked: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Refusal> {
    match tokio::time::timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Refusal(format!("{call}: {}", status.message()))),
        Err(_) => Err(Refusal(format!("{call}: no answer within {} s", ANSWER_WITHIN.as_secs()))),
    }
}
