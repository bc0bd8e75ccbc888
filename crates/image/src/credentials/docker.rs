//! Docker's configuration files: `config.json` (also as `.dockerconfigjson` in secrets) and the older `.dockercfg`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::keyring::Keyring;
use crate::Auth;

/// What such a file says.
#[derive(Debug, Default)]
pub(crate) struct DockerConfig {
    pub(crate) keyring: Keyring,
    /// Programs that have the credentials of a registry.
    pub(crate) helpers: Vec<(String, String)>,
    /// The program that has the credentials of all others.
    pub(crate) store: Option<String>,
    /// Entries that make no sense; they do not keep the others from working.
    pub(crate) faults: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    auths: Option<Map<String, Value>>,
    #[serde(default)]
    cred_helpers: Option<Map<String, Value>>,
    #[serde(default)]
    creds_store: Option<String>,
}

/// An entry as Docker, Podman and `kubectl create secret docker-registry` write it.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
    #[serde(rename = "registrytoken")]
    registry_token: Option<String>,
}

/// Reads a `config.json`.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<DockerConfig, String> {
    // What serde says of a fault may quote the value, which is a secret: only the place is told.
    let file: File = serde_json::from_slice(bytes).map_err(|e| malformed(&e))?;
    let mut config =
        DockerConfig { store: file.creds_store.filter(|name| !name.is_empty()), ..DockerConfig::default() };
    config.add(file.auths.unwrap_or_default());
    for (place, helper) in file.cred_helpers.unwrap_or_default() {
        match helper {
            Value::String(name) => config.helpers.push((place, name)),
            _ => config.faults.push(format!("credHelpers {place:?} is not a name")),
        }
    }
    Ok(config)
}

/// Reads a `.dockercfg`: the entries alone.
pub(crate) fn parse_dockercfg(bytes: &[u8]) -> Result<DockerConfig, String> {
    let entries: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| malformed(&e))?;
    let mut config = DockerConfig::default();
    config.add(entries);
    Ok(config)
}

fn malformed(error: &serde_json::Error) -> String {
    format!("it is malformed at line {} column {}", error.line(), error.column())
}

impl DockerConfig {
    fn add(&mut self, entries: Map<String, Value>) {
        for (place, value) in entries {
            match entry(value) {
                Ok(Some(auth)) => self.keyring.add(&place, auth),
                Ok(None) => {}
                Err(reason) => self.faults.push(format!("the entry of {place:?} {reason}")),
            }
        }
    }
}

/// Tokens win over a password, `auth` over `username` and `password`. An entry without anything is what Docker leaves
/// where a helper has the credentials.
fn entry(value: Value) -> Result<Option<Auth>, &'static str> {
    let entry: Entry = serde_json::from_value(value).map_err(|_| "is malformed")?;
    let some = |text: Option<String>| text.filter(|text| !text.is_empty());
    if let Some(token) = some(entry.identity_token) {
        return Ok(Some(Auth::IdentityToken(token)));
    }
    if let Some(token) = some(entry.registry_token) {
        return Ok(Some(Auth::RegistryToken(token)));
    }
    if let Some(auth) = some(entry.auth) {
        return decode(&auth).map(Some);
    }
    let (username, password) = (some(entry.username), some(entry.password));
    let nothing = username.is_none() && password.is_none();
    let basic = Auth::Basic { username: username.unwrap_or_default(), password: password.unwrap_or_default() };
    Ok((!nothing).then_some(basic))
}

/// base64 of `username:password`, with or without padding. Docker may leave NULs at its end.
fn decode(auth: &str) -> Result<Auth, &'static str> {
    const REASON: &str = "has an auth that is not base64 of username:password";
    let bytes = STANDARD_NO_PAD.decode(auth.trim().trim_end_matches('=')).map_err(|_| REASON)?;
    let text = String::from_utf8(bytes).map_err(|_| REASON)?;
    let (username, password) = text.split_once(':').ok_or(REASON)?;
    Ok(Auth::Basic { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Auth {
        Auth::Basic { username: username.into(), password: password.into() }
    }

    fn only(config: &DockerConfig, image: &str) -> Vec<Auth> {
        config.keyring.lookup(&image.parse().unwrap())
    }

    #[test]
    fn reads_every_form_of_an_entry() {
        let config = parse_config(
            br#"{"auths": {
                "a.io": {"auth": "dXNlcjpwYTpzcw=="}, "b.io": {"auth": "dXNlcjpwYTpzcw"},
                "c.io": {"username": "u", "password": "p", "email": "e"},
                "d.io": {"auth": "MDAwMDo=", "identitytoken": "it"}, "e.io": {"registrytoken": "rt"},
                "f.io": {}, "g.io": {"username": "ignored", "auth": "dTpw"}
            }, "credsStore": "", "HttpHeaders": {}, "psFormat": "x"}"#,
        )
        .unwrap();
        for (image, expected) in [
            ("a.io/x", vec![basic("user", "pa:ss")]),
            ("b.io/x", vec![basic("user", "pa:ss")]),
            ("c.io/x", vec![basic("u", "p")]),
            ("d.io/x", vec![Auth::IdentityToken("it".into())]),
            ("e.io/x", vec![Auth::RegistryToken("rt".into())]),
            ("f.io/x", vec![]),
            ("g.io/x", vec![basic("u", "p")]),
        ] {
            assert_eq!(only(&config, image), expected, "{image}");
        }
        assert!(config.faults.is_empty() && config.store.is_none());
    }

    #[test]
    fn a_bad_entry_spoils_only_itself() {
        let config = parse_config(
            br#"{"auths": {"a.io": {"auth": "no base64!"}, "b.io": 1, "c.io": {"auth": "dTpw"}, "d.io": {"auth": "dXNlcg=="}},
                "credHelpers": {"h.io": "ecr-login", "i.io": 2}}"#,
        )
        .unwrap();
        assert_eq!(only(&config, "c.io/x"), [basic("u", "p")]);
        assert_eq!(config.faults.len(), 4, "{:?}", config.faults);
        assert_eq!(config.helpers, [("h.io".to_owned(), "ecr-login".to_owned())]);
    }

    #[test]
    fn reads_the_old_file() {
        let config = parse_dockercfg(br#"{"https://index.docker.io/v1/": {"auth": "dTpw", "email": "x"}}"#).unwrap();
        assert_eq!(only(&config, "busybox"), [basic("u", "p")]);
    }

    #[test]
    fn a_fault_does_not_tell_secrets() {
        for bytes in [&br#"{"auths": "hunter2"}"#[..], b"hunter2", br#"{"auths": {}, "credsStore": ["hunter2"]}"#] {
            let fault = parse_config(bytes).unwrap_err();
            assert!(fault.contains("line 1") && !fault.contains("hunter2"), "{fault}");
        }
    }
}
