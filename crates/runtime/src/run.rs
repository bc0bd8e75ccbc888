//! Making a sandbox.
//!
//! ```text
//! record ─┬─ network namespace and address ─┬─► keeper ─► Hello ─► record, READY
//!         ├─ shared memory and files ───────┤
//!         └─ control group ─────────────────┘
//! ```
//! What fails takes everything back; the client hears of no sandbox then.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use cri::v1::{self, ContainerEventType as Kind};
use cri::{Error, v1::NamespaceMode};
use executor::oci;
use keeper::protocol::{NamespaceKind, Role};
use keeper::{IdMapping, KeeperConfig, KeeperFds, UserNamespace};
use network::{AttachRequest, Dns, PortMapping, Protocol};
use sys::rustix::process::Pid;

use crate::client::{Client, ClientError};
use crate::core::{Core, blocking, failed, new_id, now};
use crate::driver::Handler;
use crate::record::{Progress, Records, SandboxRecord};
use crate::sandbox::{Phase, Sandbox};
use crate::single::Outcome;
use crate::stop::end_keeper;
use crate::table::Entered;
use crate::{files, group, info, launch, plugins, spec};

/// What keeps the kernel's OOM killer from a keeper. Less would not do: a Guaranteed container has -997, so that a keeper with -998
/// went before it where a pod's memory is files in memory, and the container's largest process is small.
const KEEPER_OOM_SCORE: i32 = -1000;

/// Makes a sandbox, or joins the making of one with its name.
pub(crate) async fn run(core: &Arc<Core>, request: v1::RunPodSandboxRequest) -> Result<String, Error> {
    let config = request.config.ok_or_else(|| Error::InvalidArgument("the sandbox's config is missing".into()))?;
    check(&config)?;
    let handler = handler_of(core, &config, &request.runtime_handler)?;
    loop {
        let sandbox = match core.table.enter_sandbox(fresh(core, &config, &request.runtime_handler, handler.as_ref())?)
        {
            Entered::New(sandbox) | Entered::There(sandbox) => sandbox,
        };
        if sandbox.phase() == Phase::Making {
            let (core, made) = (core.clone(), sandbox.clone());
            sandbox.run.run(&core.tasks.clone(), || make(core, made)).await?;
        }
        match sandbox.phase() {
            Phase::Ready => return Ok(sandbox.id.clone()),
            Phase::Gone => {} // Another caller's failed, or was removed: now it is our turn.
            _ => {
                return Err(Error::FailedPrecondition(format!(
                    "sandbox {} of that name and attempt is not ready any more; remove it, or raise the attempt",
                    sandbox.id
                )));
            }
        }
    }
}

fn fresh(
    core: &Core,
    config: &v1::PodSandboxConfig,
    name: &str,
    handler: Option<&Handler>,
) -> Result<Arc<Sandbox>, Error> {
    let id = new_id();
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let labels = core.selinux.of_sandbox(security.and_then(|security| security.selinux_options.as_ref()))?;
    let records = Records::new(core.sandboxes_dir().join(&id));
    let driver = handler.map(|handler| handler.driver(records.directory()));
    let record = SandboxRecord {
        id,
        created_at: now(),
        config: Some(config.clone()),
        handler: name.to_owned(),
        driver: driver.as_ref().map(|driver| driver.program.to_string_lossy().into_owned()).unwrap_or_default(),
        driver_arguments: driver.map(|driver| driver.arguments).unwrap_or_default(),
        parent_from_top: core.config.parents_from_top,
        ..SandboxRecord::default()
    };
    let (group, owns_group) = core.pod_group(&record);
    Ok(Sandbox::new(record, records, labels, group, owns_group))
}

fn check(config: &v1::PodSandboxConfig) -> Result<(), Error> {
    if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty() || metadata.uid.is_empty()) {
        return Err(Error::InvalidArgument("the sandbox's metadata needs name and uid".into()));
    }
    Ok(())
}

/// The handler of this name; none where this runtime itself is meant.
fn handler_of(core: &Core, config: &v1::PodSandboxConfig, name: &str) -> Result<Option<Handler>, Error> {
    let has_users = spec::sandbox_users(config)?.is_some();
    if name.is_empty() || name == info::NAME {
        return match info::remedy_for_users().filter(|_| has_users) {
            Some(remedy) => Err(Error::FailedPrecondition(format!(
                "user namespaces are not possible on this machine: {remedy}, or unset hostUsers"
            ))),
            None => Ok(None),
        };
    }
    let Some(handler) = core.handlers.get(name) else {
        // containerd's words, after which people search.
        let text = format!("failed to get sandbox runtime: no runtime for {name:?} is configured");
        return Err(Error::InvalidArgument(text));
    };
    if has_users && !handler.features.user_namespaces {
        let text = format!(
            "user namespaces are not possible with the runtime handler {name:?}, or on this kernel: its program does not name \
             them among its features; unset hostUsers"
        );
        return Err(Error::FailedPrecondition(text));
    }
    Ok(Some(handler.clone()))
}

async fn make(core: Arc<Core>, sandbox: Arc<Sandbox>) -> Outcome {
    if sandbox.phase() != Phase::Making {
        return Ok(()); // Somebody else made it between the look and the call.
    }
    let made = build(&core, &sandbox).await;
    match made {
        Ok(()) => {
            core.publish(Kind::ContainerCreatedEvent, &sandbox.id, &sandbox);
            core.publish(Kind::ContainerStartedEvent, &sandbox.id, &sandbox);
            Ok(())
        }
        Err(error) => {
            take_back(&core, &sandbox).await;
            Err(error)
        }
    }
}

async fn build(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Outcome {
    let begun = {
        let (core, sandbox) = (core.clone(), sandbox.clone());
        blocking(move || begin(&core, &sandbox))
    };
    let (root_is_initramfs, named) = (core.host.facts.root_is_initramfs, sandbox.clone());
    let shared = blocking(move || files::make(&named, root_is_initramfs));
    // A user namespace owns the network namespace of its pod, so that one is made by the keeper and connected later.
    let owned = spec::sandbox_users(&sandbox.config)?.is_some();
    let given =
        async { if owned || sandbox.host_network() { Ok(None) } else { attach(core, sandbox, None).await.map(Some) } };
    let (netns, entry, shared) = tokio::join!(given, begun, shared);
    let shared = shared.map_err(|error| failed("making the shared files of sandbox", &sandbox.id, &error))?;
    let (netns, entry) = (netns?, entry?);
    let client = Arc::new(start_keeper(core, sandbox, netns, &shared.namespace, &entry)?);
    let welcome = client.hello(Role::Control).await;
    let welcome = welcome.map_err(|error| failed("starting the keeper of sandbox", &sandbox.id, &error))?;
    {
        let mut live = sandbox.live();
        live.keeper = Some(client.clone());
        live.keeper_pid = welcome.pid;
    }
    if !entry.at_birth() {
        drop(settle(core, sandbox)); // Whoever needs it done asks again.
    }
    if owned {
        let netns = launch::namespace_of(sandbox, NamespaceKind::Net, None).await?;
        attach(core, sandbox, Some(netns)).await?;
    }
    files::put_hosts(sandbox, &shared)
        .map_err(|error| failed("writing the hosts file of sandbox", &sandbox.id, &error))?;
    plugins::run_sandbox(core, sandbox).await?;
    let record = sandbox.record(&core.boot_id, Progress::Made);
    sandbox.records.put_sandbox(&record).map_err(|error| failed("recording sandbox", &sandbox.id, &error))?;
    let mut live = sandbox.live();
    // A keeper that ends from here on is missed by whoever hears of it; one that ended before was not.
    if !client.is_open() {
        return Err(failed("making sandbox", &sandbox.id, &ClientError::Gone));
    }
    live.phase = Phase::Ready;
    Ok(())
}

/// Moves the keeper, and the first process of a pod with one process namespace, into the sandbox's group.
pub(crate) fn settle(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> impl Future<Output = Outcome> + use<> {
    let settled = sandbox.clone();
    sandbox.settle.join_or_begin(&core.tasks, || async move {
        let fail =
            |error: &(dyn std::error::Error + 'static)| failed("moving the keeper of sandbox", &settled.id, error);
        let keeper = settled.keeper().map_err(|error| fail(&error))?;
        let snapshot = keeper.snapshot().await.map_err(|error| fail(&error))?;
        let pids = [Some(snapshot.sandbox.pid), snapshot.reaper].into_iter().flatten();
        let pids: Vec<Pid> = pids.filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).collect();
        let group = settled.keeper_group();
        let moved = blocking(move || {
            let mut outside = pids.iter().filter(|pid| !group.processes().contains(pid));
            outside.try_for_each(|pid| group.add(*pid))
        });
        moved.await.map_err(|error| {
            tracing::warn!(sandbox = settled.id, %error, "the keeper is not in the control group of its pod");
            fail(&error)
        })
    })
}

/// Directory, record, control group.
fn begin(core: &Core, sandbox: &Sandbox) -> Result<sys::cgroup::Entry, Error> {
    let record = sandbox.record(&core.boot_id, Progress::Making);
    let written = sandbox.records.create().and_then(|()| sandbox.records.put_sandbox(&record));
    written.map_err(|error| failed("recording sandbox", &sandbox.id, &error))?;
    let group = sandbox.keeper_group();
    let entered = group.create().and_then(|()| group.entry());
    entered.map_err(|error| failed("making the control group of sandbox", &sandbox.id, &error))
}

/// Connects the sandbox; its network namespace, the one that was given or a new one.
async fn attach(core: &Core, sandbox: &Sandbox, netns: Option<OwnedFd>) -> Result<OwnedFd, Error> {
    let request = AttachRequest { netns, ..attach_request(sandbox)? };
    let attached = core.network.attach(request).await;
    let attachment = attached.map_err(|error| failed("connecting sandbox", &sandbox.id, &error))?;
    sandbox.live().ips = attachment.ips.iter().map(ToString::to_string).collect();
    Ok(attachment.netns)
}

fn attach_request(sandbox: &Sandbox) -> Result<AttachRequest, Error> {
    let (config, metadata) = (&sandbox.config, sandbox.metadata());
    let dns = config.dns_config.clone().unwrap_or_default();
    let ports = config.port_mappings.iter().filter(|port| port.host_port > 0);
    Ok(AttachRequest {
        sandbox_id: sandbox.id.clone(),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        port_mappings: ports.map(port_mapping).collect::<Result<_, _>>()?,
        annotations: config.annotations.clone().into_iter().collect(),
        dns: Dns { nameservers: dns.servers, search: dns.searches, options: dns.options, ..Dns::default() },
        netns: None,
    })
}

fn port_mapping(port: &v1::PortMapping) -> Result<PortMapping, Error> {
    let invalid = |what: &str, value: &dyn std::fmt::Display| {
        Error::InvalidArgument(format!("port mapping: {what} {value} cannot be used"))
    };
    let number = |what, value: i32| u16::try_from(value).map_err(|_| invalid(what, &value));
    let host_ip = match port.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid("host_ip", &text))?),
    };
    Ok(PortMapping {
        protocol: match port.protocol() {
            v1::Protocol::Tcp => Protocol::Tcp,
            v1::Protocol::Udp => Protocol::Udp,
            v1::Protocol::Sctp => Protocol::Sctp,
        },
        container_port: number("container_port", port.container_port)?,
        host_port: number("host_port", port.host_port)?,
        host_ip,
    })
}

fn start_keeper(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    netns: Option<OwnedFd>,
    mounts: &OwnedFd,
    entry: &sys::cgroup::Entry,
) -> Result<Client, Error> {
    let fail = |error: std::io::Error| failed("starting the keeper of sandbox", &sandbox.id, &error);
    let directory = std::fs::File::open(sandbox.records.directory()).map_err(fail)?;
    let fds = KeeperFds {
        directory: directory.as_fd(),
        network: netns.as_ref().map(|netns| netns.as_fd()),
        mounts: Some(mounts.as_fd()),
        cgroup: Some(entry).filter(|entry| entry.at_birth()),
    };
    let socket = core.zygote.spawn_keeper(keeper_config(sandbox)?, &fds).map_err(fail)?;
    let client = Client::new(socket, core.listener(sandbox));
    client.map_err(|error| failed("starting the keeper of sandbox", &sandbox.id, &error))
}

fn keeper_config(sandbox: &Sandbox) -> Result<KeeperConfig, Error> {
    let namespaces = sandbox.namespaces();
    let host_network = sandbox.host_network();
    let users = spec::sandbox_users(&sandbox.config)?;
    Ok(KeeperConfig {
        sandbox: sandbox.id.clone(),
        network: match (host_network, &users) {
            (true, _) => keeper::Network::Host,
            (false, Some(_)) => keeper::Network::New,
            (false, None) => keeper::Network::Given,
        },
        enters_network: sandbox.driver.is_none(),
        mounts: true,
        own_uts: !host_network,
        own_ipc: namespaces.ipc() != NamespaceMode::Node,
        shared_pid: namespaces.pid() == NamespaceMode::Pod,
        labels: sandbox
            .labels
            .as_ref()
            .map(|labels| keeper::Labels { process: labels.process.clone(), file: labels.file.clone() }),
        user: users.map(|(uids, gids)| UserNamespace { uids: id_mappings(uids), gids: id_mappings(gids) }),
        hostname: Some(files::hostname(sandbox)).filter(|name| !host_network && !name.is_empty()),
        sysctls: spec::sandbox_sysctls(&sandbox.config)?,
        oom_score_adj: KEEPER_OOM_SCORE,
        start_max_ms: u32::try_from(executor::START_MAX.as_millis()).unwrap_or(u32::MAX),
    })
}

fn id_mappings(ranges: Vec<oci::IdMapping>) -> Vec<IdMapping> {
    let one =
        |range: oci::IdMapping| IdMapping { inside: range.container_id, outside: range.host_id, count: range.size };
    ranges.into_iter().map(one).collect()
}

/// Removes what a failed making has left. What cannot be removed is found by `fsck`.
async fn take_back(core: &Core, sandbox: &Sandbox) {
    let warn = |step: &str, error: &dyn std::fmt::Display| tracing::warn!(sandbox = sandbox.id, %error, "{step}");
    end_keeper(sandbox).await;
    let keeper = sandbox.live().keeper.take();
    drop(keeper);
    if let Err(error) = core.network.detach(&sandbox.id).await {
        warn("disconnecting a sandbox that could not be made", &error);
    }
    if let Err(error) = end_groups(sandbox).await {
        warn("removing the control group of a sandbox that could not be made", &error);
    }
    if let Err(error) = sandbox.records.remove() {
        warn("removing the record of a sandbox that could not be made", &error);
    }
    sandbox.live().phase = Phase::Gone;
    core.table.remove_sandbox(sandbox);
}

/// Ends everything in the sandbox's own groups and removes them.
pub(crate) async fn end_groups(sandbox: &Sandbox) -> Result<(), sys::Error> {
    let group = if sandbox.owns_group { sandbox.group.clone() } else { sandbox.keeper_group() };
    group::end(&group).await
}
