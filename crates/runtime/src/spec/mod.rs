//! From CRI to OCI: what kubelets and clients ask for becomes one runtime configuration.
//!
//! ```text
//! prepare(config) ────────► Prepared: devices, seccomp profile, sources that were missing        (touches the host)
//! resolve_user(root, …) ──► ResolvedUser: numbers from the image's own /etc/passwd               (reads the root)
//!         │
//!         ▼
//! container_spec(input) ──► ContainerSpec ──► launch_plan, exec_plan                             (pure)
//!                                 └─────────► open_sources: detached mounts for the launch       (touches the host)
//! ```
//!
//! The defaults are those of containerd's CRI plugin, on which pods have come to depend. What cannot be honoured is
//! refused by name, never left out (R5).

mod cdi;
mod error;
mod mounts;
mod namespaces;
mod prepare;
mod process;
mod resources;
mod sandbox;
mod security;
mod signal;
mod user;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use cri::v1;
use executor::{ExecOptions, ExecPlan, HooksPlan, HostFacts, LaunchPlan, PlanError, oci};
use serde::{Deserialize, Serialize};

use crate::selinux::Labels;

pub(crate) use cdi::add_cdi;
pub(crate) use error::SpecError;
pub(crate) use prepare::{HostDevice, Prepared, prepare};
pub(crate) use resources::resources;
pub(crate) use sandbox::{container_sysctl, group_of, hostname_file, resolv_conf, sandbox_sysctls, sandbox_users};
pub(crate) use signal::{stop_signal, stop_signal_of_image};
pub(crate) use user::{ResolvedUser, resolve_user};

/// Everything that a container's configuration is made from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ContainerInput<'a> {
    /// The container's id.
    pub(crate) id: &'a str,
    /// Its sandbox's id.
    pub(crate) sandbox_id: &'a str,
    /// The container's request.
    pub(crate) config: &'a v1::ContainerConfig,
    /// The request of its sandbox.
    pub(crate) sandbox: &'a v1::PodSandboxConfig,
    /// Its image.
    pub(crate) image: &'a image::ImageConfig,
    /// Who runs it, see [`resolve_user`].
    pub(crate) user: &'a ResolvedUser,
    /// What was found on the host, see [`prepare`].
    pub(crate) prepared: &'a Prepared,
    /// Files of the sandbox that its containers share.
    pub(crate) files: &'a SandboxFiles,
    /// The namespaces to join, each with the path that the configuration names: `Network`, `Ipc` and `Uts` of the sandbox
    /// unless they are the host's; `User` where it has one; `Pid` that of the sandbox (POD) or of the target container
    /// (TARGET).
    pub(crate) namespaces: &'a BTreeMap<oci::NamespaceKind, String>,
    /// The container's control group below the hierarchy.
    pub(crate) cgroup_path: &'a str,
    /// The host.
    pub(crate) host: &'a Host,
    /// Its SELinux labels, if it has some.
    pub(crate) labels: Option<&'a Labels>,
}

/// Files of a sandbox on the host. What is absent is not mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SandboxFiles {
    /// Becomes `/etc/hostname`.
    pub(crate) hostname: Option<PathBuf>,
    /// Becomes `/etc/hosts` unless the request mounts one.
    pub(crate) hosts: Option<PathBuf>,
    /// Becomes `/etc/resolv.conf`.
    pub(crate) resolv_conf: Option<PathBuf>,
    /// The sandbox's tmpfs for `/dev/shm`. Without it, and unless IPC is the host's, each container has one of its own.
    pub(crate) shm: Option<PathBuf>,
}

/// What does not change while the node runs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Host {
    /// What the executor wants to know.
    pub(crate) facts: HostFacts,
    /// Huge pages can be limited by control group.
    pub(crate) hugetlb: bool,
    /// AppArmor is enabled in the kernel.
    pub(crate) apparmor: bool,
    /// As the operator has it, see [`crate::Config`].
    pub(crate) device_ownership_from_security_context: bool,
}

impl Host {
    /// Reads it from `/proc` and `/sys`; what the operator decides is as by default.
    ///
    /// # Errors
    /// No `/proc`.
    pub(crate) fn read(hierarchy: &sys::cgroup::Hierarchy) -> sys::Result<Self> {
        Ok(Self {
            facts: HostFacts::read()?,
            hugetlb: hierarchy.has_controller("hugetlb"),
            apparmor: sys::kernel::has_apparmor(),
            device_ownership_from_security_context: false,
        })
    }
}

/// A container, ready to be planned. Kept as long as the container, for the processes that are exec'd in it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ContainerSpec {
    /// The configuration.
    pub(crate) oci: oci::Spec,
    /// Images that are mounted as volumes, by the source path that stands for each in the configuration.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) images: BTreeMap<String, ImageMount>,
    /// The environment where some of it is not UTF-8, which the configuration cannot carry.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) raw_environment: Vec<CString>,
    /// What was asked for and means nothing on this host; to be logged once.
    #[serde(skip)]
    pub(crate) warnings: Vec<String>,
}

/// An image that is mounted as a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageMount {
    /// Name or id in the image store.
    pub(crate) image: String,
    /// The part of it that is mounted; empty for all.
    pub(crate) sub_path: String,
}

/// Makes the configuration of a container. Pure.
///
/// # Errors
/// The first request that cannot be honoured.
pub(crate) fn container_spec(input: &ContainerInput<'_>) -> Result<ContainerSpec, SpecError> {
    let context = security::context(input.config);
    let mut warnings = input.prepared.warnings.clone();
    security::check(input, context, &mut warnings)?;
    let environment = process::environment(input)?;
    let process = process::process(input, context, &environment)?;
    let mounts = mounts::mounts(input, context)?;
    let linux = linux(input, context, &process)?;
    let oci = oci::Spec {
        oci_version: oci::VERSION.to_owned(),
        process: Some(process),
        root: Some(oci::Root { path: "rootfs".into(), readonly: context.readonly_rootfs }),
        mounts: mounts.list,
        annotations: sandbox::annotations(input),
        hooks: Some(input.prepared.cdi.hooks.clone()).filter(|hooks| *hooks != oci::Hooks::default()),
        linux: Some(linux),
        ..oci::Spec::default()
    };
    let raw_environment = process::raw(&environment)?;
    Ok(ContainerSpec { oci, images: mounts.images, raw_environment, warnings })
}

fn linux(
    input: &ContainerInput<'_>,
    context: &v1::LinuxContainerSecurityContext,
    process: &oci::Process,
) -> Result<oci::Linux, SpecError> {
    let users = namespaces::users(input)?;
    let requested = input.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let mut resources = requested.map_or_else(|| Ok(oci::Resources::default()), |one| resources(one, input.host))?;
    resources.devices = security::device_rules(input.prepared, context);
    let (masked_paths, readonly_paths) = security::covered_paths(context);
    Ok(oci::Linux {
        uid_mappings: users.uids.clone(),
        gid_mappings: users.gids.clone(),
        resources: Some(resources),
        cgroups_path: input.cgroup_path.to_owned(),
        namespaces: namespaces::namespaces(input, context, &users)?,
        devices: security::devices(input.prepared, &users),
        seccomp: security::seccomp(input, context, process)?,
        masked_paths,
        readonly_paths,
        mount_label: input.labels.map(|labels| labels.file.clone()).unwrap_or_default(),
        ..oci::Linux::default()
    })
}

impl ContainerSpec {
    /// Writes the ids of its images in the place of their names, which may come to mean others.
    ///
    /// # Errors
    /// An image that is not in the store.
    pub(crate) fn resolve_images(&mut self, images: &image::Images) -> Result<(), SpecError> {
        for mount in self.images.values_mut() {
            mount.image = prepare::image_id(&mount.image, images)?.to_string();
        }
        Ok(())
    }

    /// The image that is mounted at `destination`.
    pub(crate) fn image_at(&self, destination: &str) -> Option<&str> {
        let mount = self.oci.mounts.iter().find(|mount| mount.destination == destination)?;
        self.images.get(&mount.source).map(|mount| mount.image.as_str())
    }

    /// Compiles the start of the container. `bundle` is where its hooks find what it is, if it has any.
    ///
    /// # Errors
    /// The first field that the executor cannot honour.
    pub(crate) fn launch_plan(&self, id: &str, bundle: &Path, facts: &HostFacts) -> Result<LaunchPlan, PlanError> {
        let mut plan = executor::plan(&self.oci, facts)?;
        if let Some(hooks) = &self.oci.hooks {
            let state = serde_json::json!({
                "ociVersion": oci::VERSION,
                "id": id,
                "bundle": bundle,
                "annotations": self.oci.annotations,
            });
            plan.hooks = HooksPlan {
                state: state.to_string(),
                create_container: executor::hook_plans(&hooks.create_container)?,
                start_container: executor::hook_plans(&hooks.start_container)?,
            };
        }
        if !self.raw_environment.is_empty() {
            plan.process.environment.clone_from(&self.raw_environment);
        }
        Ok(plan)
    }

    /// Compiles a further process in the container: its own with other arguments, as CRI's `Exec` and `ExecSync` want it.
    ///
    /// # Errors
    /// No arguments, or what the executor cannot honour.
    pub(crate) fn exec_plan(&self, args: &[String], tty: bool, facts: &HostFacts) -> Result<ExecPlan, PlanError> {
        let process = exec_process(&self.oci, args, tty);
        let options = ExecOptions { container: &self.oci, facts };
        let mut plan = executor::exec_plan(&process, options)?;
        if !self.raw_environment.is_empty() {
            plan.process.environment = process::exec_environment(&self.raw_environment, tty);
        }
        Ok(plan)
    }

    /// Opens the plan's sources, images included. Waits for the file systems they lie on.
    ///
    /// `made` are sources, by path, whose mount is there already. `user_namespace` is that of the sandbox, for mounts that
    /// are seen through its mapping.
    ///
    /// # Errors
    /// The first source that is missing or refuses an attribute.
    pub(crate) fn open_sources(
        &self,
        plan: &LaunchPlan,
        mut made: BTreeMap<String, OwnedFd>,
        user_namespace: Option<BorrowedFd<'_>>,
        images: &image::Images,
    ) -> Result<Vec<OwnedFd>, SpecError> {
        let label = self.oci.linux.as_ref().map(|linux| linux.mount_label.as_str()).filter(|label| !label.is_empty());
        let open = |source: &executor::plan::Source| match (self.images.get(&source.path), made.remove(&source.path)) {
            (Some(mount), _) => {
                let mount = prepare::mount_image(mount, images, label)?;
                Ok(executor::prepare::finish_source(source, mount, user_namespace)?)
            }
            (None, Some(mount)) => Ok(executor::prepare::finish_source(source, mount, user_namespace)?),
            (None, None) => Ok(executor::prepare::open_source(source, user_namespace)?),
        };
        plan.sources.iter().map(open).collect()
    }
}

/// The process of an exec: the container's own with other arguments.
pub(crate) fn exec_process(container: &oci::Spec, args: &[String], tty: bool) -> oci::Process {
    let own = container.process.clone().unwrap_or_default();
    let mut env = own.env;
    if tty {
        env.push(process::TERMINAL.to_owned());
    }
    oci::Process { args: args.to_vec(), terminal: tty, console_size: None, env, ..own }
}

#[cfg(test)]
mod tests;
