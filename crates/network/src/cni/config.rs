//! The operator's network configuration: which file it is, and what it says.
//!
//! The first file of the directory in the order of names decides, as with containerd: `.conflist` has a list of plugins,
//! `.conf` and `.json` have one. If it cannot be used, that is an error; another file is never used in its place.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Longest configuration that is read; real ones have a few kilobytes.
const FILE_MAX: u64 = 1 << 20;

/// A version of the CNI specification that we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Version {
    #[serde(rename = "0.3.0")]
    V0_3_0,
    #[serde(rename = "0.3.1")]
    V0_3_1,
    #[serde(rename = "0.4.0")]
    V0_4_0,
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [Version; 5] = [Version::V0_3_0, Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_0 => "0.3.0",
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    fn parse(text: &str) -> Option<Version> {
        Version::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

/// A network: plugins in the order in which they are called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetworkList {
    pub(crate) name: String,
    /// The highest version of those that the configuration names.
    pub(crate) version: Version,
    #[serde(default)]
    pub(crate) disable_check: bool,
    #[serde(default, rename = "disableGC")]
    pub(crate) disable_gc: bool,
    /// The plugins' own configurations as they were written.
    pub(crate) plugins: Vec<Map<String, Value>>,
}

/// The program of a plugin's configuration.
pub(crate) fn type_of(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {reason}")]
    Invalid { path: PathBuf, reason: String },
}

/// What tells that a configuration has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(Vec<(PathBuf, Option<SystemTime>, u64)>);

/// The configuration file that counts, and all that it may be made of; `None` when the directory has none.
pub(crate) fn find(dir: &Path) -> io::Result<Option<(PathBuf, Stamp)>> {
    let mut files = list(dir, &["conf", "conflist", "json"])?;
    if files.is_empty() {
        return Ok(None);
    }
    let first = files.swap_remove(0);
    let mut parts = vec![first.clone()];
    // Further plugins of a list lie in a directory beside it; which one, the list says.
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            parts.extend(list(&path, &["conf"])?);
        }
    }
    parts.sort();
    let stamp = |path: PathBuf| {
        let found = fs::metadata(&path).ok();
        let (time, size) =
            (found.as_ref().and_then(|found| found.modified().ok()), found.map_or(0, |found| found.len()));
        (path, time, size)
    };
    Ok(Some((first, Stamp(parts.into_iter().map(stamp).collect()))))
}

/// Files with these extensions, by name; none where there is no directory.
fn list(dir: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| extensions.contains(&extension)) && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a configuration.
pub(crate) fn load(path: &Path) -> Result<NetworkList, ConfigError> {
    let invalid = |path: &Path| {
        let path = path.to_owned();
        move |reason| ConfigError::Invalid { path, reason }
    };
    let object = read(path)?;
    if path.extension().is_none_or(|extension| extension != "conflist") {
        return parse_single(object).map_err(invalid(path));
    }
    let (mut list, only_inlined) = parse_list(object).map_err(invalid(path))?;
    if !only_inlined && let Some(dir) = path.parent() {
        let further = self::list(&dir.join(&list.name), &["conf"]);
        let further = further.map_err(|source| ConfigError::Read { path: dir.join(&list.name), source })?;
        for file in further {
            let plugin = read(&file)?;
            check_plugin(&plugin).map_err(invalid(&file))?;
            list.plugins.push(plugin);
        }
    }
    if list.plugins.is_empty() {
        return Err(invalid(path)("there is no plugin in it; add one to \"plugins\"".into()));
    }
    Ok(list)
}

fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(FILE_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    let invalid = |reason: String| ConfigError::Invalid { path: path.to_owned(), reason };
    if text.len() as u64 > FILE_MAX {
        return Err(invalid(format!("longer than {FILE_MAX} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| invalid(format!("no JSON object: {error}")))
}

pub(crate) fn parse_list(mut object: Map<String, Value>) -> Result<(NetworkList, bool), String> {
    let plugins = match object.remove("plugins") {
        None => Vec::new(),
        Some(Value::Array(plugins)) => plugins,
        Some(_) => return Err("\"plugins\" is no list".into()),
    };
    let plugins = plugins
        .into_iter()
        .map(|plugin| match plugin {
            Value::Object(plugin) => check_plugin(&plugin).map(|()| plugin),
            _ => Err("a plugin's configuration is no object".to_owned()),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let list = NetworkList {
        name: name(&object)?,
        version: version(&object)?,
        disable_check: flag(&object, "disableCheck")?,
        disable_gc: flag(&object, "disableGC")?,
        plugins,
    };
    Ok((list, flag(&object, "loadOnlyInlinedPlugins")?))
}

pub(crate) fn parse_single(object: Map<String, Value>) -> Result<NetworkList, String> {
    if !object.contains_key("type") && object.contains_key("plugins") {
        return Err("it has a list of plugins; rename it to *.conflist".into());
    }
    check_plugin(&object)?;
    let (name, version) = (name(&object)?, version(&object)?);
    Ok(NetworkList { name, version, disable_check: false, disable_gc: false, plugins: vec![object] })
}

fn check_plugin(plugin: &Map<String, Value>) -> Result<(), String> {
    match plugin.get("type").and_then(Value::as_str) {
        None | Some("") => Err("a plugin has no \"type\"".into()),
        Some(kind) if kind.contains('/') || kind.starts_with('.') => Err(format!("{kind:?} is no name of a plugin")),
        Some(_) => Ok(()),
    }
}

fn name(object: &Map<String, Value>) -> Result<String, String> {
    let name = object.get("name").and_then(Value::as_str).ok_or("\"name\" is missing")?;
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.bytes().all(good) {
        Ok(name.to_owned())
    } else {
        Err(format!("{name:?} is no network name; use letters, digits and _.-"))
    }
}

/// The highest version of `cniVersion` and `cniVersions` that we speak.
fn version(object: &Map<String, Value>) -> Result<Version, String> {
    let one = object.get("cniVersion").and_then(Value::as_str);
    let many = object.get("cniVersions").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let all: Vec<&str> = many.chain(one).collect();
    let known = all.iter().filter_map(|text| Version::parse(text)).max();
    known.ok_or_else(|| {
        let found =
            if all.is_empty() { "no \"cniVersion\"".to_owned() } else { format!("cniVersion {}", all.join(", ")) };
        format!("{found}; use one of 0.3.1, 0.4.0, 1.0.0, 1.1.0")
    })
}

/// A switch; the reference accepts it as text, too.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key:?} is {other}, not true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn load_first(dir: &tempfile::TempDir) -> Result<NetworkList, String> {
        let (path, _) = find(dir.path()).unwrap().expect("a file");
        let cut = format!("{}/", dir.path().display());
        load(&path).map_err(|error| error.to_string().replace(&cut, ""))
    }

    #[test]
    fn the_first_file_decides() {
        let one = r#"{"cniVersion":"0.4.0","name":"one","type":"bridge","x":1}"#;
        let dir = dir(&[("20-a.conflist", "{"), ("10-b.conf", one), ("05-c.txt", "{"), ("00-d.conflist/x", "")]);
        let list = load_first(&dir).unwrap();
        assert_eq!((list.name.as_str(), list.version, list.plugins.len()), ("one", Version::V0_4_0, 1));
        assert_eq!(list.plugins[0]["x"], 1, "what we do not know is passed on");
        assert_eq!(find(Path::new("/nonexistent")).unwrap(), None);
        fs::write(dir.path().join("00.json"), "[]").unwrap();
        assert!(load_first(&dir).unwrap_err().starts_with("00.json: no JSON object"), "broken, not passed over");
    }

    #[test]
    fn plugins_come_from_the_list_and_its_directory() {
        let list = |extra: &str| {
            format!(r#"{{"cniVersion":"1.0.0","name":"net","plugins":[{{"type":"a"}}],"disableCheck":"True"{extra}}}"#)
        };
        let directory = dir(&[
            ("10.conflist", &list("")),
            ("net/20.conf", r#"{"type":"c"}"#),
            ("net/10.conf", r#"{"type":"b"}"#),
            ("other/10.conf", r#"{"type":"d"}"#),
        ]);
        let loaded = load_first(&directory).unwrap();
        assert_eq!(loaded.plugins.iter().map(type_of).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert!(loaded.disable_check && !loaded.disable_gc);
        let stamp = |dir: &tempfile::TempDir| find(dir.path()).unwrap().unwrap().1;
        let before = stamp(&directory);
        assert_eq!(stamp(&directory), before);
        fs::write(directory.path().join("net/30.conf"), r#"{"type":"e"}"#).unwrap();
        assert_ne!(stamp(&directory), before);
        fs::write(directory.path().join("10.conflist"), list(r#","loadOnlyInlinedPlugins":true"#)).unwrap();
        assert_eq!(load_first(&directory).unwrap().plugins.len(), 1);
    }

    #[test]
    fn the_highest_version_of_both_is_spoken() {
        for (versions, expected) in [
            (r#""cniVersion":"0.3.1""#, "0.3.1"),
            (r#""cniVersion":"0.3.1","cniVersions":["0.4.0","1.1.0","1.0.0","9.0.0"]"#, "1.1.0"),
            (r#""cniVersion":"1.0.0","cniVersions":["0.4.0"]"#, "1.0.0"),
        ] {
            let directory = dir(&[("10.conf", &format!(r#"{{{versions},"name":"n","type":"t"}}"#))]);
            assert_eq!(load_first(&directory).unwrap().version.as_str(), expected);
        }
    }

    #[test]
    fn faults_are_named_with_file_and_remedy() {
        let t = r#""name":"n","type":"t""#;
        for (file, text, expected) in [
            ("1.conf", "".to_owned(), "1.conf: no JSON object: EOF while parsing a value at line 1 column 0"),
            ("1.conf", format!("{{{t}}}"), "1.conf: no \"cniVersion\"; use one of 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
            (
                "1.conf",
                format!(r#"{{"cniVersion":"0.2.0",{t}}}"#),
                "1.conf: cniVersion 0.2.0; use one of 0.3.1, 0.4.0, 1.0.0, 1.1.0",
            ),
            (
                "1.json",
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#.to_owned(),
                "1.json: it has a list of plugins; rename it to *.conflist",
            ),
            (
                "1.conflist",
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#.to_owned(),
                "1.conflist: there is no plugin in it; add one to \"plugins\"",
            ),
            (
                "1.conflist",
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#.to_owned(),
                "1.conflist: a plugin has no \"type\"",
            ),
            (
                "1.conf",
                r#"{"cniVersion":"1.0.0","name":"n","type":"../../bin/sh"}"#.to_owned(),
                "1.conf: \"../../bin/sh\" is no name of a plugin",
            ),
            (
                "1.conf",
                r#"{"cniVersion":"1.0.0","name":"../n","type":"t"}"#.to_owned(),
                "1.conf: \"../n\" is no network name; use letters, digits and _.-",
            ),
        ] {
            assert_eq!(load_first(&dir(&[(file, &text)])).unwrap_err(), expected, "{text}");
        }
    }
}
