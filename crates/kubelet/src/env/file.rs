//! Variables from a file of a volume, which an init container wrote (`fileKeyRef`).

use std::path::Path;

use k8s_openapi::api::core::v1::FileKeySelector;

use super::{EnvError, Sources};

/// A key of a file that an init container wrote into a volume.
pub(super) fn of_key(wanted: &FileKeySelector, sources: &Sources<'_>) -> Result<Option<Vec<u8>>, EnvError> {
    let root =
        sources.volumes.get(&wanted.volume_name).ok_or_else(|| EnvError::NoVolume(wanted.volume_name.clone()))?;
    let path = Path::new(&wanted.path);
    let failed = |source| EnvError::Read { path: path.to_owned(), source };
    let text = match read_below(root, path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && wanted.optional == Some(true) => return Ok(None),
        read => read.map_err(failed)?,
    };
    match parse_file(&text, &wanted.key) {
        Ok(None) if wanted.optional == Some(true) => Ok(None),
        Ok(None) => Err(EnvError::NoFileKey { path: path.to_owned(), key: wanted.key.clone() }),
        Ok(Some(value)) => Ok(Some(value.into_bytes())),
        Err((line, problem)) => Err(EnvError::Syntax { path: path.to_owned(), line, problem }),
    }
}

/// The largest environment file; the API server allows no more for all variables of a file.
const FILE_MAX: u64 = 64 * 1024;

fn read_below(root: &Path, path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    use std::os::fd::AsFd as _;
    use sys::rustix::io::Errno;

    let root = std::fs::File::open(root)?;
    let file = sys::path::open_file_in_root(root.as_fd(), path).map_err(|error| match error.errno {
        Errno::MEDIUMTYPE => std::io::Error::other("it is not a regular file"),
        errno => std::io::Error::from(errno),
    })?;
    let mut text = String::new();
    std::fs::File::from(file).take(FILE_MAX + 1).read_to_string(&mut text)?;
    match u64::try_from(text.len()) {
        Ok(length) if length <= FILE_MAX => Ok(text),
        _ => Err(std::io::Error::other("it is larger than 64 KiB")),
    }
}

/// Finds `KEY='value'`; a value may go over several lines.
fn parse_file(text: &str, key: &str) -> Result<Option<String>, (usize, &'static str)> {
    let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    while let Some((number, line)) = lines.next() {
        let line = line.trim_start_matches([' ', '\t']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, rest) = line.split_once('=').ok_or((number, "'=' is missing"))?;
        if name.trim_end() != name || name.is_empty() {
            return Err((number, "the name before '=' is empty or ends in a space"));
        }
        // As in a shell, `KEY= 'x'` sets KEY to nothing.
        if rest.starts_with([' ', '\t']) {
            continue;
        }
        let first = rest.strip_prefix('\'').ok_or((number, "the value must be enclosed in single quotes"))?;
        let value = quoted_value(first, number, &mut lines)?;
        if name == key {
            return Ok(Some(value).filter(|value| !value.is_empty()));
        }
    }
    Ok(None)
}

fn quoted_value<'a>(
    first: &'a str,
    number: usize,
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
) -> Result<String, (usize, &'static str)> {
    let mut value = String::new();
    let (mut line, mut at) = (first, number);
    loop {
        if let Some((end, after)) = line.split_once('\'') {
            value.push_str(end);
            let after = after.trim_start_matches([' ', '\t']);
            let clean = after.is_empty() || after.starts_with('#');
            return if clean { Ok(value) } else { Err((at, "there is something after the closing quote")) };
        }
        value.push_str(line);
        value.push('\n');
        (at, line) = lines.next().ok_or((number, "the quote is not closed"))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_variables() {
        let text = "# comment\nA='1'\n B='two\nlines' # end\nC= 'x'\n";
        assert_eq!(parse_file(text, "A"), Ok(Some("1".into())));
        assert_eq!(parse_file(text, "B"), Ok(Some("two\nlines".into())));
        assert_eq!(parse_file(text, "C"), Ok(None));
        assert_eq!(parse_file("A=1", "A"), Err((1, "the value must be enclosed in single quotes")));
        assert_eq!(parse_file("A='1\n", "A"), Err((1, "the quote is not closed")));
    }

    #[test]
    fn only_a_regular_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        let error = read_below(dir.path(), Path::new("d")).unwrap_err();
        assert_eq!(error.to_string(), "it is not a regular file");
    }

    #[test]
    fn a_file_that_is_too_large_is_told_and_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |bytes: usize| std::fs::write(dir.path().join("f"), format!("{}\nA='1'\n", "#".repeat(bytes))).unwrap();
        let read = || read_below(dir.path(), Path::new("f"));
        write(64 * 1024 - 7);
        assert_eq!(parse_file(&read().unwrap(), "A"), Ok(Some("1".into())));
        write(64 * 1024 - 6);
        assert_eq!(read().unwrap_err().to_string(), "it is larger than 64 KiB");
    }
}
