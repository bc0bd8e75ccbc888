//! Time spans of hosts.toml, CredentialProviderConfig and credential providers.

use std::time::Duration;

/// `1h30m`, `500ms`, `0`; or what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    configfile::spans::parse(text).ok_or_else(|| format!("{text:?} is not a duration; write 12h, 3s or 500ms"))
}
