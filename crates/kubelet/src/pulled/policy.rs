//! Whether an image that is there may be had without credentials: `imagePullCredentialsVerificationPolicy`.

use std::collections::BTreeSet;

use super::name::without_tag;

/// Which images pods need credentials for though they are on the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Verification {
    /// None.
    Never,
    /// Those that a kubelet has pulled.
    #[default]
    NotPreloaded,
    /// All but these.
    NotListed(Allowlist),
    /// All.
    Always,
}

/// Images that every pod may have: `preloadedImagesVerificationAllowlist`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowlist {
    names: BTreeSet<String>,
    /// What names begin with, up to a slash.
    prefixes: Vec<String>,
}

impl Verification {
    /// Whether credentials are needed for `image`; `is_pulled` says that a kubelet has pulled it, or does.
    pub(super) fn is_needed(&self, image: &str, is_pulled: bool) -> bool {
        match self {
            Self::Never => false,
            Self::NotPreloaded => is_pulled,
            Self::NotListed(list) => !list.has(without_tag(image)),
            Self::Always => true,
        }
    }
}

impl Allowlist {
    /// Reads names without tag and digest, and beginnings of names that end with `/*`.
    ///
    /// # Errors
    /// The first pattern that is neither.
    pub fn parse(patterns: &[String]) -> Result<Self, String> {
        let mut list = Self::default();
        for pattern in patterns {
            let prefix = pattern.strip_suffix('*').filter(|prefix| prefix.ends_with('/'));
            let text = prefix.unwrap_or(pattern);
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:/[]".contains(&byte);
            if text.trim_end_matches('/').is_empty() || !text.bytes().all(is_plain) {
                return Err(format!("{pattern:?} is neither the name of an image nor the beginning of one before /*"));
            }
            match prefix {
                Some(prefix) => list.prefixes.push(prefix.to_owned()),
                None if without_tag(pattern) == pattern => drop(list.names.insert(pattern.clone())),
                None => return Err(format!("{pattern:?} has a tag or a digest; leave it out")),
            }
        }
        Ok(list)
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains(name) || self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_has_its_images() {
        let list = ["r.io/app", "q.io:5000/team/*"].map(str::to_owned);
        let listed = Verification::NotListed(Allowlist::parse(&list).unwrap());
        for (policy, image, is_pulled, expected) in [
            (&Verification::Never, "r.io/app:1", true, false),
            (&Verification::NotPreloaded, "r.io/app:1", false, false),
            (&Verification::NotPreloaded, "r.io/app:1", true, true),
            (&listed, "r.io/app:1", true, false),
            (&listed, "r.io/app2:1", false, true),
            (&listed, "q.io:5000/team/app@sha256:00", true, false),
            (&listed, "q.io:5000/team2/app", true, true),
            (&Verification::Always, "r.io/app:1", false, true),
        ] {
            assert_eq!(policy.is_needed(image, is_pulled), expected, "{policy:?} for {image}");
        }
    }

    #[test]
    fn patterns_with_a_fault_are_refused() {
        for pattern in ["", "*", "/*", "r.io/*/app", "r.io/app*", " r.io/app", "r.io/app:1", "r.io/app@sha256:00"] {
            assert!(Allowlist::parse(&[pattern.to_owned()]).is_err(), "{pattern:?}");
        }
    }
}
