//! The `Registration` service, on which device plugins make themselves known.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;

use plugin::device::registration_server::{Registration, RegistrationServer};
use plugin::device::{Empty, RegisterRequest};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use super::{Devices, is_extended};
use crate::plugins::{Handler, Plugin, Refusal};

/// The version of the protocol that is spoken here.
const VERSION: &str = "v1beta1";
/// The name of the socket; plugins watch for it to be made anew, and register again then.
const SOCKET: &str = "kubelet.sock";

/// Listens. Sockets of plugins from before are removed, as upstream does it: who serves there makes a new one.
pub(super) async fn start(devices: &Arc<Devices>, tasks: &TaskTracker) -> Result<(), cri::server::BindError> {
    remove_sockets(&devices.dir);
    let listener = cri::server::bind(&devices.dir.join(SOCKET)).await?;
    let service = RegistrationServer::from_arc(Arc::new(Registrar { devices: devices.clone() }));
    let service = service.max_decoding_message_size(super::MESSAGE_MAX);
    tasks.spawn(cri::server::serve_calls(listener, service, devices.stop.clone()));
    Ok(())
}

/// All sockets but that of the node agent itself, which is replaced only if nobody listens there.
fn remove_sockets(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        if is_socket
            && entry.file_name() != SOCKET
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "a socket of a device plugin cannot be removed");
        }
    }
}

struct Registrar {
    devices: Arc<Devices>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let RegisterRequest { version, endpoint, resource_name, .. } = request.into_inner();
        check(&version, &endpoint, &resource_name).map_err(|fault| refuse(&resource_name, fault))?;
        let socket = self.devices.dir.join(endpoint);
        let connected = self.devices.connect(&resource_name, socket).await;
        connected.map_err(|error| refuse(&resource_name, error.to_string()))?;
        Ok(Response::new(Empty {}))
    }
}

#[async_trait::async_trait]
impl Handler for Devices {
    fn kind(&self) -> &'static str {
        "DevicePlugin"
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        if !plugin.versions.iter().any(|version| version == VERSION) {
            return Err(Refusal(format!("{VERSION} is not among the versions {:?}", plugin.versions)));
        }
        if !is_extended(&plugin.name) {
            return Err(Refusal(format!("the ResourceName {:?} is invalid", plugin.name)));
        }
        let devices = self.myself.upgrade().ok_or_else(|| Refusal("the node ends".to_owned()))?;
        devices.connect(&plugin.name, plugin.endpoint.clone()).await.map_err(|error| Refusal(error.to_string()))
    }

    async fn deregister(&self, plugin: &Plugin) {
        self.disconnect(&plugin.name, &plugin.endpoint);
    }
}

fn refuse(resource: &str, fault: String) -> Status {
    tracing::warn!(resource, fault, "a device plugin is not taken");
    Status::unknown(fault)
}

fn check(version: &str, endpoint: &str, resource: &str) -> Result<(), String> {
    if version != VERSION {
        return Err(format!(
            "requested API version {version:?} is not supported by kubelet. Supported version is [{VERSION:?}]"
        ));
    }
    if !is_extended(resource) {
        return Err(format!("the ResourceName {resource:?} is invalid"));
    }
    // It names a socket in this directory, and nothing else.
    if endpoint.is_empty() || endpoint == SOCKET || endpoint.contains('/') {
        return Err(format!("the endpoint {endpoint:?} is no socket in the directory of device plugins"));
    }
    Ok(())
}
