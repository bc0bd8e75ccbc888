//! What has to be found or made on the host before a configuration can be made. Everything here may wait for a file
//! system: run it away from the async threads.

use std::fs;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use cri::v1;
use cri::v1::security_profile::ProfileType;
use executor::oci;
use sys::rustix;
use sys::rustix::fs::{AtFlags, OFlags, StatxFlags, statx};

use super::security::AppArmorRequest;
use super::{Host, ImageMount, SpecError, cdi, security};
use crate::apparmor;
use crate::selinux::relabel::{self, RelabelError};

/// Largest seccomp profile that is read (R6); the largest in use have some ten thousand bytes.
const PROFILE_BYTES_MAX: u64 = 1 << 20;
/// Most device nodes of one container, so that a `host_path` of a strange directory cannot fill the daemon (R6).
const DEVICES_MAX: usize = 4096;
/// Directories below `/dev` without devices that a container could want: each has its own (containerd's list).
const NO_DEVICES: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];

/// What was found, or made, on the host for one container.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Prepared {
    /// Its devices.
    pub(crate) devices: Vec<HostDevice>,
    /// What devices of the Container Device Interface bring beside nodes.
    pub(crate) cdi: cdi::Edits,
    /// The profile of a `Localhost` seccomp request.
    pub(crate) seccomp: Option<oci::Seccomp>,
    /// The AppArmor profile to run under, which the kernel has; empty for none.
    pub(crate) apparmor: String,
    /// The host's own name, for containers in its network.
    pub(crate) hostname: String,
    /// What could not be had although nobody asked for it by name.
    pub(crate) warnings: Vec<String>,
}

/// A device of the host for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostDevice {
    /// Its node on the host.
    pub(crate) host_path: String,
    /// Its node in the container.
    pub(crate) node: oci::Device,
    /// Some of `rwm`.
    pub(crate) access: String,
}

/// Finds what `config` refers to on the host, and makes directories where a mount's source is missing, as containerd does.
/// Mounts that ask for it get the label of the container's files.
///
/// # Errors
/// What is not there, or not of the right kind; a source whose propagation cannot be what was asked for.
pub(crate) fn prepare(config: &v1::ContainerConfig, host: &Host, label: Option<&str>) -> Result<Prepared, SpecError> {
    let context = security::context(config);
    for mount in config.mounts.iter().filter(|mount| mount.image.is_none()) {
        prepare_source(mount)?;
        if let Some(label) = label.filter(|_| mount.selinux_relabel) {
            relabel(&mount.host_path, label)?;
        }
    }
    let mut devices = Vec::new();
    if context.privileged {
        add_directory(Path::new("/dev"), Path::new("/dev"), "rwm", &mut devices)?;
    }
    let of_host = devices.len();
    for device in &config.devices {
        add_device(device, &mut devices)?;
    }
    if host.device_ownership_from_security_context {
        devices[of_host..].iter_mut().for_each(|device| give(&mut device.node, context));
    }
    let directories = cdi::DIRECTORIES.map(Path::new);
    let mut cdi = cdi::edits(config.cdi_devices.iter().map(|device| device.name.as_str()), &directories)?;
    for device in std::mem::take(&mut cdi.devices) {
        add(device, &mut devices)?;
    }
    let (seccomp, hostname) = (localhost_profile(context)?, hostname()?);
    let mut warnings = Vec::new();
    let apparmor = apparmor_profile(context, host, &mut warnings)?;
    Ok(Prepared { devices, cdi, seccomp, apparmor, hostname, warnings })
}

/// The profile by its name in the kernel, where the default one is put now unless it is there.
fn apparmor_profile(
    context: &v1::LinuxContainerSecurityContext,
    host: &Host,
    warnings: &mut Vec<String>,
) -> Result<String, SpecError> {
    let policy = apparmor::Policy::of_kernel();
    let asked = match security::apparmor_request(context, host.apparmor)? {
        AppArmorRequest::Nothing => return Ok(String::new()),
        AppArmorRequest::Loaded(name) => {
            let loaded =
                policy.has(&name).map_err(|error| SpecError::host("look for AppArmor profile", &name, error))?;
            return if loaded { Ok(name) } else { Err(SpecError::NoProfile(name)) };
        }
        AppArmorRequest::Default { asked } => asked,
    };
    match policy.ensure_default() {
        Ok(()) => Ok(apparmor::DEFAULT.to_owned()),
        Err(error) if asked => Err(SpecError::host("load the AppArmor profile", apparmor::DEFAULT, error)),
        Err(error) => {
            let name = apparmor::DEFAULT;
            warnings
                .push(format!("AppArmor does not confine this container: profile {name} cannot be loaded: {error}"));
            Ok(String::new())
        }
    }
}

fn hostname() -> Result<String, SpecError> {
    let path = "/proc/sys/kernel/hostname";
    let name = fs::read_to_string(path).map_err(|error| SpecError::host("read", path, error))?;
    Ok(name.trim_end().to_owned())
}

fn relabel(path: &str, label: &str) -> Result<(), SpecError> {
    relabel::path(Path::new(path), label).map_err(|error| match error {
        RelabelError::Refused(_) => SpecError::invalid("mounts.selinux_relabel", path, error.to_string()),
        RelabelError::Host(error) => SpecError::host("relabel the mount's source", path, error),
    })
}

/// A missing source becomes a directory; one that propagates has to lie on a mount that does.
fn prepare_source(mount: &v1::Mount) -> Result<(), SpecError> {
    let path = Path::new(&mount.host_path);
    if !path.is_absolute() {
        return Err(SpecError::invalid("mounts.host_path", &mount.host_path, "is not an absolute path"));
    }
    match fs::metadata(path) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(|error| SpecError::host("make the mount's source", path, error))?;
        }
        Err(error) => return Err(SpecError::host("examine the mount's source", path, error)),
    }
    let wanted = v1::MountPropagation::try_from(mount.propagation);
    if matches!(wanted, Ok(v1::MountPropagation::PropagationPrivate) | Err(_)) {
        return Ok(());
    }
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| SpecError::host("read", "/proc/self/mountinfo", error))?;
    let flags = StatxFlags::MNT_ID;
    let found = statx(rustix::fs::CWD, path, AtFlags::empty(), flags)
        .map_err(|errno| SpecError::host("examine the mount's source", path, errno))?;
    check_propagation(mount, found.stx_mnt_id, &mountinfo)
}

/// `rshared` needs a source on a shared mount, `rslave` one that is shared or a slave: anything else would pass nothing on.
fn check_propagation(mount: &v1::Mount, mount_id: u64, mountinfo: &str) -> Result<(), SpecError> {
    let line = mountinfo.lines().find(|line| {
        let id = line.split(' ').next().and_then(|id| id.parse::<u64>().ok());
        id == Some(mount_id)
    });
    let fields = || line.unwrap_or_default().split(" - ").next().unwrap_or_default().split(' ');
    let has = |tag: &str| fields().skip(6).any(|field| field.starts_with(tag));
    let at = fields().nth(4).unwrap_or("an unknown mount point");
    let bidirectional = mount.propagation == i32::from(v1::MountPropagation::PropagationBidirectional);
    let (holds, wanted) =
        if bidirectional { (has("shared:"), "shared") } else { (has("shared:") || has("master:"), "shared or slave") };
    if holds {
        return Ok(());
    }
    let problem = format!("is mounted on {at:?} but it is not a {wanted} mount: run `mount --make-rshared {at}`");
    Err(SpecError::invalid("mounts.host_path", &mount.host_path, problem))
}

/// A device, or all of a directory.
fn add_device(device: &v1::Device, devices: &mut Vec<HostDevice>) -> Result<(), SpecError> {
    let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
    if !access.bytes().all(|letter| b"rwm".contains(&letter)) {
        return Err(SpecError::invalid("devices.permissions", access, "has a letter beside r, w and m"));
    }
    let real = fs::canonicalize(&device.host_path)
        .map_err(|error| SpecError::host("find the device", &device.host_path, error))?;
    let inside = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
    if real.is_dir() {
        return add_directory(&real, Path::new(inside), access, devices);
    }
    let node = node(&real, Path::new(inside))?;
    let node =
        node.ok_or_else(|| SpecError::invalid("devices.host_path", &device.host_path, "is not a device node"))?;
    add(HostDevice { host_path: text(&real), node, access: access.to_owned() }, devices)
}

/// Everything below a directory that is a device, but named pipes and the console.
fn add_directory(from: &Path, to: &Path, access: &str, devices: &mut Vec<HostDevice>) -> Result<(), SpecError> {
    let entries = fs::read_dir(from).map_err(|error| SpecError::host("list devices in", from, error))?;
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let (from, to) = (from.join(&name), to.join(&name));
        let Ok(kind) = entry.file_type() else { continue }; // It has just gone.
        if kind.is_dir() {
            if !NO_DEVICES.iter().any(|other| name == *other) {
                add_directory(&from, &to, access, devices)?;
            }
        } else if (kind.is_char_device() || kind.is_block_device()) && name != "console" {
            let Ok(Some(node)) = node(&from, &to) else { continue };
            add(HostDevice { host_path: text(&from), node, access: access.to_owned() }, devices)?;
        }
    }
    Ok(())
}

/// Gives a device to who runs the container, as containerd does where it is told to.
fn give(device: &mut oci::Device, context: &v1::LinuxContainerSecurityContext) {
    let id = |asked: &Option<v1::Int64Value>| {
        asked.as_ref().and_then(|asked| u32::try_from(asked.value).ok()).filter(|id| *id != 0)
    };
    device.uid = id(&context.run_as_user).or(device.uid);
    device.gid = id(&context.run_as_group).or(device.gid);
}

fn add(device: HostDevice, devices: &mut Vec<HostDevice>) -> Result<(), SpecError> {
    if devices.len() >= DEVICES_MAX {
        let problem = format!("makes more than {DEVICES_MAX} devices of one container");
        return Err(SpecError::invalid("devices.host_path", device.host_path, problem));
    }
    devices.push(device);
    Ok(())
}

pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The node at `from`, as it is to be at `to`; none if it is no device.
pub(super) fn node(from: &Path, to: &Path) -> Result<Option<oci::Device>, SpecError> {
    let stat = fs::symlink_metadata(from).map_err(|error| SpecError::host("examine the device", from, error))?;
    let kind = match stat.file_type() {
        kind if kind.is_char_device() => "c",
        kind if kind.is_block_device() => "b",
        kind if kind.is_fifo() => "p",
        _ => return Ok(None),
    };
    Ok(Some(oci::Device {
        path: text(to),
        kind: kind.to_owned(),
        major: rustix::fs::major(stat.rdev()),
        minor: rustix::fs::minor(stat.rdev()),
        file_mode: Some(stat.mode() & 0o7777),
        uid: Some(stat.uid()),
        gid: Some(stat.gid()),
    }))
}

fn localhost_profile(context: &v1::LinuxContainerSecurityContext) -> Result<Option<oci::Seccomp>, SpecError> {
    if context.privileged {
        return Ok(None);
    }
    match security::seccomp_request(context)? {
        Some((ProfileType::Localhost, path)) => read_profile(Path::new(&path)).map(Some),
        _ => Ok(None),
    }
}

fn read_profile(path: &Path) -> Result<oci::Seccomp, SpecError> {
    let malformed = |reason: String| SpecError::Malformed { path: PathBuf::from(path), reason };
    if !path.is_absolute() {
        return Err(malformed("a seccomp profile is named by its absolute path".to_owned()));
    }
    // Without O_NONBLOCK a named pipe would hold the daemon up for ever.
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or(0);
    let file = fs::File::options().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| SpecError::host("open the seccomp profile", path, error))?;
    if !file.metadata().is_ok_and(|stat| stat.is_file()) {
        return Err(malformed("the seccomp profile is not a regular file".to_owned()));
    }
    let mut bytes = Vec::new();
    let read = file.take(PROFILE_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| SpecError::host("read the seccomp profile", path, error))?;
    if u64::try_from(bytes.len()).map_or(true, |length| length > PROFILE_BYTES_MAX) {
        return Err(malformed(format!("the seccomp profile is longer than {PROFILE_BYTES_MAX} bytes")));
    }
    let profile: oci::Seccomp =
        serde_json::from_slice(&bytes).map_err(|error| malformed(format!("the seccomp profile: {error}")))?;
    if profile.default_action.is_empty() {
        return Err(malformed("the seccomp profile has no defaultAction".to_owned()));
    }
    if !profile.listener_path.is_empty() || notifies(&profile) {
        return Err(malformed(
            "the seccomp profile reports system calls (SCMP_ACT_NOTIFY, listenerPath), and nobody here would answer; \
             remove that, or let the pod use another profile"
                .to_owned(),
        ));
    }
    Ok(profile)
}

/// Whether a process would wait for somebody who decides about its system calls.
fn notifies(profile: &oci::Seccomp) -> bool {
    let actions = profile.syscalls.iter().map(|rule| &rule.action).chain([&profile.default_action]);
    actions.into_iter().any(|action| action == "SCMP_ACT_NOTIFY")
}

/// The image that a name means now.
pub(super) fn image_id(name: &str, images: &image::Images) -> Result<image::Digest, SpecError> {
    let missing = || image_volume(name, image::Error::NoSuchImage(name.to_owned()));
    images.get(name).map(|image| image.id.clone()).ok_or_else(missing)
}

/// A detached mount of an image.
pub(super) fn mount_image(
    mount: &ImageMount,
    images: &image::Images,
    label: Option<&str>,
) -> Result<OwnedFd, SpecError> {
    let id = image_id(&mount.image, images)?;
    images.mount_image(&id, &mount.sub_path, label).map_err(|source| image_volume(&mount.image, source))
}

fn image_volume(image: &str, source: image::Error) -> SpecError {
    SpecError::ImageVolume { image: image.to_owned(), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;

    fn mount(path: &Path, propagation: v1::MountPropagation) -> v1::Mount {
        v1::Mount { host_path: text(path), propagation: propagation.into(), ..v1::Mount::default() }
    }

    #[test]
    fn missing_sources_become_directories() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, file) = (dir.path().join("a/b"), dir.path().join("file"));
        fs::write(&file, "").unwrap();
        let private = v1::MountPropagation::PropagationPrivate;
        let mounts = vec![mount(&missing, private), mount(&file, private)];
        prepare(&v1::ContainerConfig { mounts, ..v1::ContainerConfig::default() }, &Host::default(), None).unwrap();
        assert!(missing.is_dir() && file.is_file());
        let relative = v1::ContainerConfig { mounts: vec![mount(Path::new("a"), private)], ..Default::default() };
        assert!(prepare(&relative, &Host::default(), None).unwrap_err().to_string().contains("absolute"));
    }

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:27 / /private rw - tmpfs tmpfs rw
31 22 0:28 / /slave rw,nosuid master:5 propagate_from:2 - tmpfs shared:9 rw
";

    #[test]
    fn propagation_needs_a_mount_that_propagates() {
        let both = v1::MountPropagation::PropagationBidirectional;
        let down = v1::MountPropagation::PropagationHostToContainer;
        for (id, propagation, expect) in [
            (22, both, None),
            (22, down, None),
            (31, down, None),
            (31, both, Some("not a shared mount")),
            (30, down, Some("\"/private\" but it is not a shared or slave mount")),
            (99, both, Some("unknown mount point")),
        ] {
            let checked = check_propagation(&mount(Path::new("/x"), propagation), id, MOUNTINFO);
            match expect {
                None => assert!(checked.is_ok(), "{id} {propagation:?}"),
                Some(part) => {
                    let error = checked.unwrap_err().to_string();
                    assert!(error.contains(part), "{error}");
                }
            }
        }
    }

    fn device(host: &str, inside: &str, permissions: &str) -> v1::ContainerConfig {
        let device =
            v1::Device { host_path: host.into(), container_path: inside.into(), permissions: permissions.into() };
        v1::ContainerConfig { devices: vec![device], ..v1::ContainerConfig::default() }
    }

    #[test]
    fn devices_are_looked_up() {
        let found = prepare(&device("/dev/null", "/dev/mine", "rw"), &Host::default(), None).unwrap().devices;
        let [one] = &found[..] else { panic!("{found:?}") };
        assert_eq!((one.host_path.as_str(), one.access.as_str()), ("/dev/null", "rw"));
        assert_eq!((one.node.path.as_str(), one.node.kind.as_str()), ("/dev/mine", "c"));
        assert_eq!((one.node.major, one.node.minor), (1, 3));
        assert!(
            prepare(&device("/etc/passwd", "", "rwm"), &Host::default(), None)
                .unwrap_err()
                .to_string()
                .contains("not a device node")
        );
        assert!(
            prepare(&device("/dev/null", "", "rx"), &Host::default(), None)
                .unwrap_err()
                .to_string()
                .contains("beside r, w and m")
        );
        assert!(
            prepare(&device("/dev/none", "", "r"), &Host::default(), None)
                .unwrap_err()
                .to_string()
                .contains("/dev/none")
        );
    }

    #[test]
    fn devices_belong_to_who_runs_the_container_where_that_is_configured() {
        let own = |user: i64, group: Option<i64>, configured: bool| {
            let security_context = Some(v1::LinuxContainerSecurityContext {
                run_as_user: Some(v1::Int64Value { value: user }),
                run_as_group: group.map(|value| v1::Int64Value { value }),
                ..Default::default()
            });
            let linux = Some(v1::LinuxContainerConfig { security_context, ..Default::default() });
            let config = v1::ContainerConfig { linux, ..device("/dev/null", "", "rw") };
            let host = Host { device_ownership_from_security_context: configured, ..Host::default() };
            let node = prepare(&config, &host, None).unwrap().devices.remove(0).node;
            (node.uid, node.gid)
        };
        let of_host = own(1000, Some(2000), false);
        assert_ne!(of_host, (Some(1000), Some(2000)));
        assert_eq!(own(1000, Some(2000), true), (Some(1000), Some(2000)));
        assert_eq!(own(1000, None, true), (Some(1000), of_host.1));
        assert_eq!(own(0, Some(0), true), of_host);
    }

    #[test]
    fn directories_of_devices_are_expanded() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["disk", "pts"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("readme"), "").unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o640);
        for name in ["b", "a", "console", "disk/c", "pts/d"] {
            let kind = rustix::fs::FileType::CharacterDevice;
            let device = rustix::fs::makedev(1, 3);
            if rustix::fs::mknodat(rustix::fs::CWD, dir.path().join(name), kind, mode, device).is_err() {
                eprintln!("skipped: needs CAP_MKNOD");
                return;
            }
        }
        let found = prepare(&device(&text(dir.path()), "/dev/x", "r"), &Host::default(), None).unwrap().devices;
        let paths: Vec<_> = found.iter().map(|one| one.node.path.as_str()).collect();
        assert_eq!(paths, ["/dev/x/a", "/dev/x/b", "/dev/x/disk/c"]);
        assert_eq!(found[0].node.file_mode, Some(0o640));
    }

    fn localhost(path: &str) -> v1::ContainerConfig {
        let seccomp = v1::SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: path.into() };
        let security_context = Some(v1::LinuxContainerSecurityContext { seccomp: Some(seccomp), ..Default::default() });
        let linux = Some(v1::LinuxContainerConfig { security_context, ..Default::default() });
        v1::ContainerConfig { linux, ..v1::ContainerConfig::default() }
    }

    #[test]
    fn profiles_are_read_within_limits() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| text(&dir.path().join(name));
        fs::write(at("good"), r#"{"defaultAction":"SCMP_ACT_ALLOW","unknown":1}"#).unwrap();
        fs::write(at("bad"), "{").unwrap();
        fs::write(at("empty"), "{}").unwrap();
        let notify =
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#;
        fs::write(at("notify"), notify).unwrap();
        fs::write(at("listener"), r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x"}"#).unwrap();
        fs::File::create(at("long")).unwrap().set_len(PROFILE_BYTES_MAX + 1).unwrap();
        let fifo = CString::new(at("fifo")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for path in [at("good"), format!("localhost/{}", at("good"))] {
            let profile = prepare(&localhost(&path), &Host::default(), None).unwrap().seccomp.unwrap();
            assert_eq!(profile.default_action, "SCMP_ACT_ALLOW");
        }
        for (path, part) in [
            (at("bad"), "EOF"),
            (at("empty"), "defaultAction"),
            (at("long"), "longer than"),
            (at("notify"), "nobody here would answer"),
            (at("listener"), "nobody here would answer"),
            (at("fifo"), "not a regular file"),
            (at("none"), "seccomp profile"),
            ("relative".to_owned(), "absolute path"),
        ] {
            let error = prepare(&localhost(&path), &Host::default(), None).unwrap_err().to_string();
            assert!(error.contains(part), "{path}: {error}");
        }
    }
}
