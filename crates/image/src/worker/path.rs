//! Names in an archive, made safe before anything is done with them. Pure.

/// Why a name is refused; the words follow the entry's name in a message.
pub(crate) type Refusal = &'static str;

const COMPONENT_BYTES_MAX: usize = 255;

/// A path below the root: components without `.`, `..`, empty ones or slashes. None of them is the root itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Relative(Vec<u8>);

impl Relative {
    /// Checks the name of an entry: it must be relative and must not go up.
    pub(crate) fn parse(name: &[u8], bytes_max: usize) -> Result<Self, Refusal> {
        if name.starts_with(b"/") {
            return Err("has an absolute path");
        }
        Self::from_root(name, bytes_max)
    }

    /// As [`Relative::parse`], for targets of hard links: some builders write them with a leading slash, which means the image's root.
    pub(crate) fn from_root(name: &[u8], bytes_max: usize) -> Result<Self, Refusal> {
        if name.len() > bytes_max {
            return Err("has a path that is too long");
        }
        let mut path = Vec::with_capacity(name.len());
        for component in name.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return Err("leads out of the image with \"..\""),
                _ if component.len() > COMPONENT_BYTES_MAX => return Err("has a name longer than 255 bytes"),
                _ if component.contains(&0) => return Err("has a NUL byte in its name"),
                _ => {}
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(component);
        }
        Ok(Self(path))
    }

    pub(crate) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The directory (empty: the root) and the last component.
    pub(crate) fn split(&self) -> (&[u8], &[u8]) {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&self.0[..slash], &self.0[slash + 1..]),
            None => (&[], &self.0),
        }
    }
}

/// What a name means in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning<'a> {
    /// A file to make.
    Plain,
    /// `.wh.name`: name is deleted from the layers below.
    Whiteout(&'a [u8]),
    /// `.wh..wh..opq`: the directory hides all that the layers below have in it.
    Opaque,
    /// Book-keeping of AUFS, which no layer needs.
    Ignored,
}

/// What the last component of a path means (OCI image specification, "Whiteouts").
pub(crate) fn meaning(base: &[u8]) -> Result<Meaning<'_>, Refusal> {
    let Some(hidden) = base.strip_prefix(b".wh.") else { return Ok(Meaning::Plain) };
    match hidden {
        b".wh..opq" => Ok(Meaning::Opaque),
        b"" | b"." | b".." => Err("is a whiteout of nothing"),
        _ if hidden.starts_with(b".wh.") => Ok(Meaning::Ignored),
        _ => Ok(Meaning::Whiteout(hidden)),
    }
}

/// Follows symbolic links textually: `read_link` answers for a path without links what it points to, if it is a link.
/// The result has no links. Refused is what climbs above the root, where the kernel would silently stay.
pub(crate) fn follow<E>(
    path: &[u8],
    mut read_link: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, E>,
) -> Result<Result<Vec<u8>, Refusal>, E> {
    const LINKS_MAX: usize = 40;
    let mut todo: Vec<Vec<u8>> = components(path);
    let mut done: Vec<Vec<u8>> = Vec::new();
    let mut links = 0;
    while let Some(component) = todo.pop() {
        match component.as_slice() {
            b".." => {
                if done.pop().is_none() {
                    return Ok(Err("goes through a symbolic link that leads out of the image"));
                }
                continue;
            }
            _ => done.push(component),
        }
        let Some(target) = read_link(&done.join(&b'/'))? else { continue };
        links += 1;
        if links > LINKS_MAX {
            return Ok(Err("goes through too many symbolic links"));
        }
        done.pop();
        if target.starts_with(b"/") {
            done.clear();
        }
        todo.extend(components(&target));
    }
    Ok(Ok(done.join(&b'/')))
}

/// In reverse, ready to be popped.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned_or_refused() {
        let check = |name: &str, expected: Result<&str, ()>| {
            let got =
                Relative::parse(name.as_bytes(), 64).map(|path| String::from_utf8(path.bytes().to_vec()).unwrap());
            assert_eq!(got.as_deref().map_err(|_| ()), expected, "{name:?}");
        };
        check("a/b", Ok("a/b"));
        check("./a//b/.", Ok("a/b"));
        check("./", Ok(""));
        check("/etc/passwd", Err(()));
        check("../a", Err(()));
        check("a/../b", Err(()));
        check("a\0b", Err(()));
        check(&"a/".repeat(40), Err(()));
    }

    #[test]
    fn whiteouts_are_told_from_files() {
        assert_eq!(meaning(b"a"), Ok(Meaning::Plain));
        assert_eq!(meaning(b".wh.a"), Ok(Meaning::Whiteout(b"a")));
        assert_eq!(meaning(b".wh..wh..opq"), Ok(Meaning::Opaque));
        assert_eq!(meaning(b".wh..wh.plnk"), Ok(Meaning::Ignored));
        for trick in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(meaning(trick).is_err(), "{trick:?}");
        }
    }

    #[test]
    fn links_are_followed_inside_and_refused_outside() {
        let links = [("var/run", "/run"), ("a", "b/../c"), ("up", "../.."), ("d/up", ".."), ("loop", "loop")];
        let check = |path: &str, expected: Option<&str>| {
            let read = |path: &[u8]| -> Result<_, ()> {
                Ok(links.iter().find(|(name, _)| name.as_bytes() == path).map(|(_, target)| target.as_bytes().to_vec()))
            };
            let got = follow(path.as_bytes(), read).unwrap().ok().map(|path| String::from_utf8(path).unwrap());
            assert_eq!(got.as_deref(), expected, "{path}");
        };
        check("var/run/x", Some("run/x"));
        check("a/x", Some("c/x"));
        check("d/up/x", Some("x"));
        check("up/x", None);
        check("loop/x", None);
    }
}
