//! Which credentials are for which image. Pure; the rules are upstream's (pkg/credentialprovider/keyring.go), so that a
//! secret that works on one node works on every node.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::glob;
use crate::{Auth, Reference};

/// Credentials by the places they are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Keyring<T = Auth> {
    /// From the last in the order of bytes to the first: a longer path comes before its beginning, a name before a wildcard.
    entries: BTreeMap<Reverse<String>, Vec<T>>,
}

impl<T> Default for Keyring<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new() }
    }
}

/// The key that `docker login` without a name writes, and what is left of it here.
const DOCKER_HUB_KEY: &str = "index.docker.io";
const DOCKER_HUB: &str = "docker.io";

impl<T: Clone> Keyring<T> {
    /// Adds credentials for a place: `host`, `host:port/path`, `https://host/v1/`, with wildcards in the host.
    pub(crate) fn add(&mut self, place: &str, auth: T) {
        self.entries.entry(Reverse(normalise(place))).or_default().push(auth);
    }

    pub(crate) fn extend(&mut self, other: Self) {
        for (place, auths) in other.entries {
            self.entries.entry(place).or_default().extend(auths);
        }
    }

    /// The same with something else for each of the credentials.
    pub(crate) fn map<U>(self, change: impl Fn(T) -> U) -> Keyring<U> {
        let changed = |auths: Vec<T>| auths.into_iter().map(&change).collect();
        Keyring { entries: self.entries.into_iter().map(|(place, auths)| (place, changed(auths))).collect() }
    }

    /// All credentials for `image`, the best match first. Those of the default registry hold for docker.io if nothing
    /// else matches.
    pub(crate) fn lookup(&self, image: &Reference) -> Vec<T> {
        let repository = image.repository();
        let matching = self.entries.iter().filter(|(Reverse(place), _)| matches(place, &repository));
        let found: Vec<T> = matching.flat_map(|(_, auths)| auths.iter().cloned()).collect();
        if found.is_empty() && image.host() == DOCKER_HUB {
            return self.entries.get(&Reverse(DOCKER_HUB_KEY.to_owned())).cloned().unwrap_or_default();
        }
        found
    }
}

/// Without scheme, API version and trailing slash.
fn normalise(place: &str) -> String {
    let bare = place.strip_prefix("https://").or_else(|| place.strip_prefix("http://")).unwrap_or(place);
    let (host, path) = split(bare);
    let path = path
        .strip_prefix("/v1")
        .or_else(|| path.strip_prefix("/v2"))
        .filter(|rest| rest.starts_with('/'))
        .unwrap_or(path);
    if path == "/" { host.to_owned() } else { format!("{host}{path}") }
}

/// Host (with port) and path (with its slash).
fn split(place: &str) -> (&str, &str) {
    place.split_at(place.find('/').unwrap_or(place.len()))
}

/// Whether credentials for `place` are for `repository`: as many labels in the host, each matching; the same port; and
/// the path is the beginning of the other.
pub(crate) fn matches(place: &str, repository: &str) -> bool {
    let ((place_host, place_path), (host, path)) = (split(place), split(repository));
    let ((place_name, place_port), (name, port)) = (split_port(place_host), split_port(host));
    let (wanted, labels) = (place_name.split('.'), name.split('.'));
    place_port == port
        && wanted.clone().count() == labels.clone().count()
        && path.starts_with(place_path)
        && wanted.zip(labels).all(|(wanted, label)| glob::matches(wanted, label))
}

fn split_port(host: &str) -> (&str, &str) {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') && (!name.contains(':') || name.ends_with(']')) => (name, port),
        _ => (host, ""),
    };
    (name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(name: &str) -> Auth {
        Auth::Basic { username: name.to_owned(), password: String::new() }
    }

    /// The places whose credentials are offered for `image`, in order.
    fn check(places: &[&str], image: &str, expected: &[&str]) {
        let mut keyring = Keyring::default();
        for place in places {
            keyring.add(place, auth(place));
        }
        let found = keyring.lookup(&image.parse().unwrap());
        let expected: Vec<Auth> = expected.iter().map(|place| auth(place)).collect();
        assert_eq!(found, expected, "{places:?} for {image}");
    }

    #[test]
    fn every_form_of_a_key_is_the_same_place() {
        for key in ["r.io", "r.io/", "http://r.io", "https://r.io/", "https://r.io/v1/", "r.io/v2/"] {
            check(&[key], "r.io/a/b", &[key]);
            check(&[key], "r.io:5000/a/b", &[]);
            check(&[key], "x.r.io/a", &[]);
        }
        check(&["r.io:5000"], "r.io:5000/a", &["r.io:5000"]);
        check(&["https://r.io/v1/team"], "r.io/team/x", &["https://r.io/v1/team"]);
        check(&["r.io/v2"], "r.io/a", &[]);
        check(&["[::1]:5000"], "[::1]:5000/a", &["[::1]:5000"]);
        check(&["[::1]"], "[::1]/a", &["[::1]"]);
    }

    #[test]
    fn the_longest_match_comes_first() {
        check(&["r.io", "r.io/a/b", "r.io/a"], "r.io/a/b/c:1", &["r.io/a/b", "r.io/a", "r.io"]);
        check(&["r.io/a", "r.io"], "r.io/ab", &["r.io/a", "r.io"]);
        check(&["*.io", "r.io"], "r.io/a", &["r.io", "*.io"]);
    }

    #[test]
    fn wildcards_match_one_label_each() {
        let ecr = "*.dkr.ecr.*.amazonaws.com";
        check(&[ecr], "123456789012.dkr.ecr.eu-west-1.amazonaws.com/app:1", &[ecr]);
        check(&[ecr], "dkr.ecr.eu-west-1.amazonaws.com/app", &[]);
        check(&["*.io"], "a.b.io/x", &[]);
        check(&["app*.k8s.io"], "app7.k8s.io/x", &["app*.k8s.io"]);
        check(&["k8s.*"], "k8s.io/x", &["k8s.*"]);
        check(&["*:5000"], "localhost:5000/x", &["*:5000"]);
        check(&["r.io/*"], "r.io/x", &[]);
    }

    #[test]
    fn docker_hub_has_two_names() {
        let hub = "https://index.docker.io/v1/";
        check(&[hub], "busybox", &[hub]);
        check(&[hub, "docker.io/library"], "busybox", &["docker.io/library"]);
        check(&["docker.io"], "me/app", &["docker.io"]);
        check(&[hub], "quay.io/a", &[]);
    }

    #[test]
    fn all_credentials_of_a_place_are_offered() {
        let mut keyring = Keyring::default();
        keyring.add("r.io", auth("first"));
        keyring.add("https://r.io/", auth("second"));
        let mut other = Keyring::default();
        other.add("r.io", auth("third"));
        keyring.extend(other);
        assert_eq!(keyring.lookup(&"r.io/x".parse().unwrap()), ["first", "second", "third"].map(auth));
    }
}
