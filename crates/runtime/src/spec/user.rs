//! Who runs a container: the forms of a user, resolved by the `/etc/passwd` and `/etc/group` of its own root.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::BorrowedFd;
use std::path::Path;

use cri::v1;
use serde::{Deserialize, Serialize};
use sys::rustix::io::Errno;

use super::SpecError;

/// Images are foreign: a file of users beyond this is refused (R6). The largest seen in practice are directories
/// exported to files, of some megabytes.
const FILE_BYTES_MAX: u64 = 10 << 20;
/// The largest id that runtimes take, as containerd and runc have it.
const ID_MAX: i64 = i32::MAX as i64;

/// A user as numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResolvedUser {
    /// User.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// All groups, the primary one among them, in ascending order.
    pub(crate) groups: Vec<u32>,
    /// The home directory that the image names for the user, else `/`.
    pub(crate) home: String,
}

/// Resolves the user of a container: that of the request, else the image's.
///
/// `root` is the container's root file system; nothing outside it is read, whatever links it holds.
///
/// # Errors
/// A name that the image does not have, a number out of range, or a file that is none.
pub(crate) fn resolve_user(
    root: BorrowedFd<'_>,
    context: Option<&v1::LinuxContainerSecurityContext>,
    image_user: &str,
) -> Result<ResolvedUser, SpecError> {
    let wanted = Wanted::of(context, image_user)?;
    let passwd = read(root, "/etc/passwd")?;
    let policy = context.map_or(0, |context| context.supplemental_groups_policy);
    let merge = match v1::SupplementalGroupsPolicy::try_from(policy) {
        Ok(v1::SupplementalGroupsPolicy::Merge) => true,
        Ok(v1::SupplementalGroupsPolicy::Strict) => false,
        Err(_) => return Err(SpecError::invalid("supplemental_groups_policy", policy, "is neither Merge nor Strict")),
    };
    let group = if merge || matches!(wanted.group, Some(Id::Name(_))) { read(root, "/etc/group")? } else { Vec::new() };
    let supplemental = context.map_or(&[][..], |context| &context.supplemental_groups);
    resolve(&wanted, &passwd, if merge { &group } else { &[] }, &group, supplemental)
}

/// A number or a name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Id {
    Number(u32),
    Name(String),
}

#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    user: Id,
    /// Absent: the user's own.
    group: Option<Id>,
}

impl Wanted {
    fn of(context: Option<&v1::LinuxContainerSecurityContext>, image_user: &str) -> Result<Self, SpecError> {
        let none = v1::LinuxContainerSecurityContext::default();
        let context = context.unwrap_or(&none);
        let group = match &context.run_as_group {
            Some(group) => Some(Id::Number(number("run_as_group", group.value)?)),
            None => None,
        };
        // A name wins over a number, as containerd has it.
        let user = match &context.run_as_user {
            _ if !context.run_as_username.is_empty() => Some(parse("run_as_username", &context.run_as_username)?),
            Some(user) => Some(Id::Number(number("run_as_user", user.value)?)),
            None => None,
        };
        match (user, group) {
            (Some(user), group) => Ok(Self { user, group }),
            (None, None) => Self::of_image(image_user),
            (None, Some(_)) => Err(SpecError::invalid(
                "run_as_group",
                context.run_as_group.as_ref().map_or(0, |group| group.value),
                "is specified without run_as_user",
            )),
        }
    }

    /// `name`, `uid`, and both with `:group` or `:gid`; empty is root.
    fn of_image(text: &str) -> Result<Self, SpecError> {
        let field = "the image's user";
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let user = if user.is_empty() { Id::Number(0) } else { parse(field, user)? };
        Ok(Self { user, group: group.map(|group| parse(field, group)).transpose()? })
    }
}

fn parse(field: &'static str, text: &str) -> Result<Id, SpecError> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return number(field, text.parse().unwrap_or(-1)).map(Id::Number);
    }
    if text.contains(':') {
        return Err(SpecError::invalid(field, text, "has a colon too many"));
    }
    Ok(Id::Name(text.to_owned()))
}

fn number(field: &'static str, value: i64) -> Result<u32, SpecError> {
    let valid = u32::try_from(value).ok().filter(|_| value <= ID_MAX);
    valid.ok_or_else(|| SpecError::invalid(field, value, format!("is not between 0 and {ID_MAX}")))
}

/// `memberships` is the file that further groups are taken from, `groups` the one that names are looked up in.
fn resolve(
    wanted: &Wanted,
    passwd: &[u8],
    memberships: &[u8],
    groups: &[u8],
    supplemental: &[i64],
) -> Result<ResolvedUser, SpecError> {
    let entry = users(passwd).find(|entry| match &wanted.user {
        Id::Number(uid) => entry.uid == *uid,
        Id::Name(name) => entry.name == name.as_bytes(),
    });
    let uid = match (&wanted.user, &entry) {
        (Id::Number(uid), _) => *uid,
        (Id::Name(_), Some(entry)) => entry.uid,
        (Id::Name(name), None) => {
            return Err(SpecError::Unknown { kind: "user", name: name.clone(), file: "/etc/passwd" });
        }
    };
    let gid = match &wanted.group {
        Some(Id::Number(gid)) => *gid,
        Some(Id::Name(name)) => group_named(groups, name)?,
        None => entry.as_ref().map_or(0, |entry| entry.gid),
    };
    let mut all = BTreeSet::from([gid]);
    if let Some(entry) = &entry {
        let member = |group: &Group<'_>| group.name != entry.name && group.members().any(|name| name == entry.name);
        all.extend(groups_of(memberships).filter(member).map(|group| group.gid));
    }
    for group in supplemental {
        all.insert(number("supplemental_groups", *group)?);
    }
    let home = entry.map(|entry| String::from_utf8_lossy(entry.home).into_owned()).filter(|home| !home.is_empty());
    Ok(ResolvedUser { uid, gid, groups: all.into_iter().collect(), home: home.unwrap_or_else(|| "/".to_owned()) })
}

fn group_named(groups: &[u8], name: &str) -> Result<u32, SpecError> {
    let found = groups_of(groups).find(|group| group.name == name.as_bytes());
    let unknown = || SpecError::Unknown { kind: "group", name: name.to_owned(), file: "/etc/group" };
    found.map(|group| group.gid).ok_or_else(unknown)
}

/// A line of passwd(5).
struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// A line of group(5).
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

impl<'a> Group<'a> {
    fn members(&self) -> impl Iterator<Item = &'a [u8]> {
        self.members.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
    }
}

/// Lines that are no entries (comments, blank, broken) are passed over, as C libraries do.
fn users(file: &[u8]) -> impl Iterator<Item = User<'_>> {
    lines(file).filter_map(|mut fields| {
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (id(fields.next()?)?, id(fields.next()?)?);
        let (_comment, home) = (fields.next(), fields.next().unwrap_or_default());
        Some(User { name, uid, gid, home })
    })
}

fn groups_of(file: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(file).filter_map(|mut fields| {
        let (name, _password) = (fields.next()?, fields.next()?);
        Some(Group { name, gid: id(fields.next()?)?, members: fields.next().unwrap_or_default() })
    })
}

fn lines(file: &[u8]) -> impl Iterator<Item = impl Iterator<Item = &[u8]>> {
    let lines = file.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let entries = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    entries.map(|line| line.split(|byte| *byte == b':'))
}

fn id(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The bytes of a file below `root`; none where there is no file, as in images from scratch.
fn read(root: BorrowedFd<'_>, path: &'static str) -> Result<Vec<u8>, SpecError> {
    let malformed = |reason: String| SpecError::Malformed { path: format!("the image's {path}").into(), reason };
    let file = match sys::path::open_file_in_root(root, Path::new(path)) {
        Ok(file) => file,
        Err(error) => match error.errno {
            Errno::NOENT | Errno::NOTDIR => return Ok(Vec::new()),
            Errno::MEDIUMTYPE => return Err(malformed("is not a regular file".to_owned())),
            errno => return Err(SpecError::host("open the image's", path, errno)),
        },
    };
    let mut bytes = Vec::new();
    let limit = FILE_BYTES_MAX + 1; // One more tells a file that fits from one that does not.
    let read = File::from(file).take(limit).read_to_end(&mut bytes);
    let length = read.map_err(|error| SpecError::host("read the image's", path, error))?;
    if u64::try_from(length).is_ok_and(|length| length < limit) {
        return Ok(bytes);
    }
    Err(malformed(format!("is longer than {FILE_BYTES_MAX} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd as _, OwnedFd};

    const PASSWD: &str = "\
# users
root:x:0:0:root:/root:/bin/sh
web:x:1000:1001:Web:/srv/web:/bin/sh
broken:x:abc:1:::
short:x:7:8
+nis
";
    const GROUP: &str = "\
root:x:0:
web:x:1001:web
disk:x:6:root,web
docs:x:2000: web , other
";

    fn root(passwd: Option<&str>, group: Option<&str>) -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        for (name, text) in [("passwd", passwd), ("group", group)] {
            if let Some(text) = text {
                std::fs::write(dir.path().join("etc").join(name), text).unwrap();
            }
        }
        let fd = std::fs::File::open(dir.path()).unwrap().into();
        (dir, fd)
    }

    #[derive(Default)]
    struct Case<'a> {
        image: &'a str,
        user: Option<i64>,
        group: Option<i64>,
        name: &'a str,
        extra: &'a [i64],
        strict: bool,
    }

    fn check(case: &Case<'_>, expect: Result<(u32, u32, &[u32], &str), &str>) {
        let (_dir, fd) = root(Some(PASSWD), Some(GROUP));
        let value = |value| v1::Int64Value { value };
        let context = v1::LinuxContainerSecurityContext {
            run_as_user: case.user.map(value),
            run_as_group: case.group.map(value),
            run_as_username: case.name.to_owned(),
            supplemental_groups: case.extra.to_vec(),
            supplemental_groups_policy: i32::from(case.strict),
            ..v1::LinuxContainerSecurityContext::default()
        };
        match (resolve_user(fd.as_fd(), Some(&context), case.image), expect) {
            (Ok(found), Ok((uid, gid, groups, home))) => {
                let expect = ResolvedUser { uid, gid, groups: groups.to_vec(), home: home.to_owned() };
                assert_eq!(found, expect, "{:?}", context);
            }
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (found, expect) => panic!("{found:?} instead of {expect:?}"),
        }
    }

    #[test]
    fn users_of_images() {
        let image = |image| Case { image, ..Case::default() };
        check(&image(""), Ok((0, 0, &[0, 6], "/root")));
        check(&image("web"), Ok((1000, 1001, &[6, 1001, 2000], "/srv/web")));
        check(&image("1000"), Ok((1000, 1001, &[6, 1001, 2000], "/srv/web")));
        check(&image("web:disk"), Ok((1000, 6, &[6, 2000], "/srv/web")));
        check(&image("web:55"), Ok((1000, 55, &[6, 55, 2000], "/srv/web")));
        check(&image("4242:disk"), Ok((4242, 6, &[6], "/")));
        check(&image("4242"), Ok((4242, 0, &[0], "/")));
        check(&image("short"), Ok((7, 8, &[8], "/")));
        check(&image(":6"), Ok((0, 6, &[6], "/root")));
        check(&image("nobody"), Err("unable to find user nobody"));
        check(&image("broken"), Err("unable to find user broken"));
        check(&image("web:nogroup"), Err("unable to find group nogroup"));
        check(&image("2147483648"), Err("is not between 0 and 2147483647"));
        check(&image("-1"), Err("is not between"));
        check(&image("a:b:c"), Err("colon"));
    }

    #[test]
    fn users_of_requests_come_before_those_of_images() {
        check(
            &Case { image: "web", user: Some(5), ..Case::default() },
            Ok((5, 0, &[0], "/")), // Not in the image: no groups of anybody's.
        );
        check(
            &Case { user: Some(1000), group: Some(9), extra: &[3000], ..Case::default() },
            Ok((1000, 9, &[6, 9, 2000, 3000], "/srv/web")),
        );
        check(&Case { name: "web", ..Case::default() }, Ok((1000, 1001, &[6, 1001, 2000], "/srv/web")));
        check(&Case { image: "web", group: Some(9), ..Case::default() }, Err("without run_as_user"));
        check(&Case { user: Some(-7), ..Case::default() }, Err("run_as_user"));
    }

    #[test]
    fn a_strict_policy_takes_no_groups_from_the_image() {
        check(
            &Case { user: Some(1000), extra: &[3000], strict: true, ..Case::default() },
            Ok((1000, 1001, &[1001, 3000], "/srv/web")),
        );
        check(&Case { image: "web:disk", strict: true, ..Case::default() }, Ok((1000, 6, &[6], "/srv/web")));
    }

    #[test]
    fn an_image_without_files_knows_numbers_only() {
        let (_dir, fd) = root(None, None);
        let found = resolve_user(fd.as_fd(), None, "12:34").unwrap();
        assert_eq!(found, ResolvedUser { uid: 12, gid: 34, groups: vec![34], home: "/".to_owned() });
        assert!(resolve_user(fd.as_fd(), None, "web").is_err());
    }

    #[test]
    fn links_stay_in_the_image_and_other_kinds_of_files_are_refused() {
        let (dir, fd) = root(None, None);
        let passwd = dir.path().join("etc/passwd");
        std::os::unix::fs::symlink("/elsewhere/../../real", &passwd).unwrap();
        std::fs::write(dir.path().join("real"), "inside:x:9:9::/:\n").unwrap();
        std::fs::create_dir(dir.path().join("elsewhere")).unwrap();
        assert_eq!(resolve_user(fd.as_fd(), None, "inside").unwrap().uid, 9);
        std::fs::remove_file(&passwd).unwrap();
        sys::rustix::fs::mknodat(
            fd.as_fd(),
            "etc/passwd",
            sys::rustix::fs::FileType::Fifo,
            sys::rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let error = resolve_user(fd.as_fd(), None, "inside").unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let (dir, fd) = root(Some(""), None);
        let file = std::fs::File::options().write(true).open(dir.path().join("etc/passwd")).unwrap();
        file.set_len(FILE_BYTES_MAX + 1).unwrap();
        let error = resolve_user(fd.as_fd(), None, "web").unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
    }
}
