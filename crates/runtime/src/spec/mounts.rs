//! What a container finds where: the default file systems, the sandbox's files, and what the request mounts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cri::v1;
use cri::v1::MountPropagation;
use executor::oci::{IdMapping, Mount};

use super::namespaces::{self, Users, id_mapping, is_host};
use super::{ContainerInput, ImageMount, SpecError};

/// Options of `mount_options` that are honoured (KEP-5855).
const MOUNT_OPTIONS: [&str; 3] = ["noexec", "nodev", "nosuid"];

/// Stands for images among the sources. Nothing is ever looked for at this path: [`super::ContainerSpec::open_sources`]
/// knows which image each name means.
const IMAGE_SOURCE: &str = "/run/orlop/image-volume";

pub(super) struct Mounts {
    pub(super) list: Vec<Mount>,
    pub(super) images: BTreeMap<String, ImageMount>,
}

pub(super) fn mounts(
    input: &ContainerInput<'_>,
    context: &v1::LinuxContainerSecurityContext,
) -> Result<Mounts, SpecError> {
    let users = namespaces::users(input)?;
    let taken: BTreeSet<PathBuf> = input.config.mounts.iter().map(|mount| clean(&mount.container_path)).collect();
    let free = |mount: &Mount| {
        let at = clean(&mount.destination);
        // Whoever mounts a /dev of their own gets nothing of ours in it.
        let in_taken_dev = at.starts_with("/dev") && taken.contains(Path::new("/dev"));
        !in_taken_dev && !taken.contains(&at)
    };
    let mut images = BTreeMap::new();
    let mut rest = Vec::new();
    for mount in &input.config.mounts {
        rest.push(requested(mount, input.id, &users, &mut images)?);
    }
    let own = files(input, context, &users).into_iter().chain(volumes(input)).chain(devices(input, &users));
    rest.extend(own.filter(free));
    rest.extend(input.prepared.cdi.mounts.iter().filter(|mount| free(mount)).cloned());
    // Parents before what lies in them; the sort is stable.
    rest.sort_by_key(|mount| depth(&mount.destination));
    let list = defaults(input, context, &users).into_iter().filter(free).chain(rest).collect();
    Ok(Mounts { list, images })
}

/// A path without double and trailing slashes and dots.
fn clean(path: &str) -> PathBuf {
    Path::new("/").join(path).components().collect()
}

fn depth(path: &str) -> usize {
    clean(path).components().count()
}

fn mount(destination: &str, kind: &str, source: impl Into<String>, options: &[&str]) -> Mount {
    Mount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: source.into(),
        options: options.iter().map(|word| (*word).to_owned()).collect(),
        ..Mount::default()
    }
}

/// The file systems of every container.
fn defaults(input: &ContainerInput<'_>, context: &v1::LinuxContainerSecurityContext, users: &Users) -> Vec<Mount> {
    let writable = if context.privileged { "rw" } else { "ro" };
    let host_network = is_host(namespaces::of_sandbox(input.sandbox).network);
    let sysfs = if host_network && users.are_mapped() {
        // The kernel makes no sysfs for a network that the user namespace does not own.
        mount("/sys", "bind", "/sys", &["rbind", "rro", "nosuid", "noexec", "nodev"])
    } else {
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", writable])
    };
    let groups = if context.privileged {
        // A new mount of the host's groups would change their options for the whole host (nsdelegate); the host's own
        // mount does not.
        mount("/sys/fs/cgroup", "bind", "/sys/fs/cgroup", &["rbind", "rprivate", "nosuid", "noexec", "nodev"])
    } else {
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"])
    };
    let terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    // A group that is not mapped cannot own the terminals.
    let has_tty_group = users.gids.is_empty() || users.gids.iter().any(|range| covers(range, 5));
    let terminals = if has_tty_group { &terminals[..] } else { &terminals[..5] };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", terminals),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        sysfs,
        groups,
    ]
}

fn covers(range: &IdMapping, id: u32) -> bool {
    id.checked_sub(range.container_id).is_some_and(|offset| offset < range.size)
}

/// The sandbox's files. A read-only root makes them read-only, too.
fn files(input: &ContainerInput<'_>, context: &v1::LinuxContainerSecurityContext, users: &Users) -> Vec<Mount> {
    let files = input.files;
    let named =
        [("/etc/hostname", &files.hostname), ("/etc/hosts", &files.hosts), ("/etc/resolv.conf", &files.resolv_conf)];
    let mut options = vec!["rbind", "rprivate"];
    if context.readonly_rootfs {
        options.push("ro");
    }
    if users.are_mapped() {
        options.push("idmap");
    }
    let present = named.iter().filter_map(|(at, path)| Some((*at, path.as_ref()?)));
    let mut list: Vec<_> = present.map(|(at, path)| mount(at, "bind", path.to_string_lossy(), &options)).collect();
    list.push(shared_memory(input));
    list
}

/// `/dev/shm`: the host's, the sandbox's, or the container's own.
fn shared_memory(input: &ContainerInput<'_>) -> Mount {
    let at = "/dev/shm";
    if is_host(namespaces::of_sandbox(input.sandbox).ipc) {
        return mount(at, "bind", at, &["rbind", "rprivate"]);
    }
    match &input.files.shm {
        Some(path) => mount(at, "bind", path.to_string_lossy(), &["rbind", "rprivate"]),
        None => mount(at, "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
    }
}

/// Volumes that the image declares: the root's own directories, which stay writable where the root is not. Content and
/// life are those of the container, without a copy.
fn volumes(input: &ContainerInput<'_>) -> Vec<Mount> {
    let paths = input.image.config.volumes.iter().map(|path| clean(path));
    // The root would come to lie over everything that protects it; what leads there by a link, the executor refuses.
    let paths = paths.filter(|path| path.parent().is_some() && !path.components().any(|part| part.as_os_str() == ".."));
    paths.map(|path| mount(&path.to_string_lossy(), "bind", "", &["rbind", "rprivate"])).collect()
}

/// In a user namespace the kernel makes no device nodes: the host's appear as mounts.
fn devices(input: &ContainerInput<'_>, users: &Users) -> Vec<Mount> {
    if !users.are_mapped() {
        return Vec::new();
    }
    let bind =
        |device: &super::HostDevice| mount(&device.node.path, "bind", device.host_path.clone(), &["bind", "rprivate"]);
    input.prepared.devices.iter().map(bind).collect()
}

/// A mount of the request.
fn requested(
    wanted: &v1::Mount,
    container: &str,
    users: &Users,
    images: &mut BTreeMap<String, ImageMount>,
) -> Result<Mount, SpecError> {
    let at = &wanted.container_path;
    if clean(at) == Path::new("/") {
        return Err(SpecError::invalid("mounts.container_path", at, "would cover the container's whole root"));
    }
    if let Some(image) = &wanted.image {
        return image_mount(wanted, image, container, images);
    }
    let mut options = vec!["rbind", propagation(wanted)?];
    options.extend(read_only(wanted)?);
    options.extend(mount_options(wanted)?);
    if is_mapped(wanted, users)? {
        options.push("idmap");
    }
    Ok(mount(at, "bind", wanted.host_path.clone(), &options))
}

fn image_mount(
    wanted: &v1::Mount,
    image: &v1::ImageSpec,
    container: &str,
    images: &mut BTreeMap<String, ImageMount>,
) -> Result<Mount, SpecError> {
    if !wanted.readonly {
        return Err(SpecError::invalid("mounts.image", &image.image, "can be mounted read-only only: set readonly"));
    }
    // It is mounted so already, but another runtime sets what the options say and takes away the rest.
    let mut options = vec!["rbind", "rprivate", "ro", "nosuid", "nodev"];
    options.extend(mount_options(wanted)?);
    let source = format!("{IMAGE_SOURCE}/{container}/{}", images.len());
    let name = ImageMount { image: image.image.clone(), sub_path: wanted.image_sub_path.clone() };
    images.insert(source.clone(), name);
    Ok(mount(&wanted.container_path, "bind", source, &options))
}

fn mount_options(wanted: &v1::Mount) -> Result<Vec<&'static str>, SpecError> {
    let options = wanted.mount_options.iter().map(|word| {
        let known = MOUNT_OPTIONS.iter().find(|known| *known == word);
        let problem = || SpecError::invalid("mounts.mount_options", word, "is none of noexec, nodev and nosuid");
        known.copied().ok_or_else(problem)
    });
    options.collect()
}

fn propagation(wanted: &v1::Mount) -> Result<&'static str, SpecError> {
    match MountPropagation::try_from(wanted.propagation) {
        Ok(MountPropagation::PropagationPrivate) => Ok("rprivate"),
        Ok(MountPropagation::PropagationHostToContainer) => Ok("rslave"),
        Ok(MountPropagation::PropagationBidirectional) => Ok("rshared"),
        Err(_) => Err(SpecError::invalid("mounts.propagation", wanted.propagation, "is no propagation")),
    }
}

/// A mount that may be written keeps what its source has, read-only or not, so no option says so.
fn read_only(wanted: &v1::Mount) -> Result<Option<&'static str>, SpecError> {
    let field = "mounts.recursive_read_only";
    let private = wanted.propagation == i32::from(MountPropagation::PropagationPrivate);
    match (wanted.readonly, wanted.recursive_read_only) {
        (false, false) => Ok(None),
        (true, false) => Ok(Some("ro")),
        (true, true) if private => Ok(Some("rro")),
        (true, true) => Err(SpecError::invalid(field, &wanted.host_path, "needs private propagation")),
        (false, true) => Err(SpecError::invalid(field, &wanted.host_path, "conflicts with a writable mount")),
    }
}

/// Whether the mount is seen through the sandbox's mapping; one of its own would need a user namespace of its own.
fn is_mapped(wanted: &v1::Mount, users: &Users) -> Result<bool, SpecError> {
    if wanted.uid_mappings.is_empty() && wanted.gid_mappings.is_empty() {
        return Ok(false);
    }
    let same =
        |wanted: &[v1::IdMapping], of_pod: &[IdMapping]| wanted.iter().map(id_mapping).eq(of_pod.iter().copied());
    if same(&wanted.uid_mappings, &users.uids) && same(&wanted.gid_mappings, &users.gids) {
        return Ok(true);
    }
    let value = format!("{:?} {:?}", wanted.uid_mappings, wanted.gid_mappings);
    Err(SpecError::invalid("mounts.uidMappings", value, "are not those of the sandbox's user namespace"))
}
