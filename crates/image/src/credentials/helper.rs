//! Docker's credential helpers: `docker-credential-<name> get`, as `credHelpers` and `credsStore` of a `config.json` name them.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::program::{Program, ProgramError};
use crate::{Auth, Reference};

const TIME_LIMIT: Duration = Duration::from_secs(60);
/// What Docker calls its own registry.
const DOCKER_HUB_URL: &str = "https://index.docker.io/v1/";
/// Instead of a user name: the secret is an identity token.
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// The name of the helper that has the credentials for `image`, if one is named.
pub(crate) fn named<'a>(helpers: &'a [(String, String)], store: Option<&'a str>, image: &Reference) -> Option<&'a str> {
    let registry = server(image);
    let own = helpers.iter().find(|(place, _)| place == registry || place == image.host());
    own.map(|(_, helper)| helper.as_str()).or(store).filter(|name| !name.is_empty())
}

/// Asks the helper `name` in `directory`; none if it knows nothing of the image's registry.
pub(crate) async fn ask(directory: &Path, name: &str, image: &Reference) -> Result<Option<Auth>, String> {
    if name.contains('/') {
        return Err(format!("{name:?} is not the name of a credential helper"));
    }
    let program = Program {
        path: directory.join(format!("docker-credential-{name}")),
        arguments: vec!["get".into()],
        environment: Vec::new(),
        time_limit: TIME_LIMIT,
    };
    let answer = program.run(server(image).as_bytes()).await.map_err(|e| e.to_string())?;
    // The protocol says it in words, on standard output.
    if !answer.is_success() && String::from_utf8_lossy(&answer.output).contains("credentials not found") {
        return Ok(None);
    }
    if !answer.is_success() {
        return Err(ProgramError::to_string(&program.failure(answer)));
    }
    let answer: Answer = serde_json::from_slice(&answer.output)
        .map_err(|_| format!("{} answers with something that is no credentials", program.path.display()))?;
    Ok(auth(answer))
}

fn auth(answer: Answer) -> Option<Auth> {
    match (answer.username, answer.secret) {
        (_, secret) if secret.is_empty() => None,
        (username, token) if username == TOKEN_USER => Some(Auth::IdentityToken(token)),
        (username, password) => Some(Auth::Basic { username, password }),
    }
}

fn server(image: &Reference) -> &str {
    if image.host() == "docker.io" { DOCKER_HUB_URL } else { image.host() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_of_its_own_wins_over_the_store() {
        let helpers = [("r.io".to_owned(), "one".to_owned()), (DOCKER_HUB_URL.to_owned(), "hub".to_owned())];
        let check = |image: &str, store, expected| {
            assert_eq!(named(&helpers, store, &image.parse().unwrap()), expected, "{image}");
        };
        check("r.io/x", Some("store"), Some("one"));
        check("busybox", Some("store"), Some("hub"));
        check("q.io/x", Some("store"), Some("store"));
        check("q.io/x", None, None);
    }
}
