//! `WWW-Authenticate` challenges (RFC 9110 §11.6.1), as registries send them. Pure.

/// What a registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Challenge {
    /// User name and password.
    Basic,
    /// A token from a token server (distribution specification, "token authentication").
    Bearer {
        /// Where tokens are given out.
        realm: String,
        /// For whom.
        service: Option<String>,
        /// For what; `repository:<name>:pull`.
        scope: Option<String>,
        /// Why the last token was refused.
        error: Option<String>,
    },
}

/// Reads one header value, which may hold several challenges; a bearer one is preferred.
pub(crate) fn parse(header: &str) -> Option<Challenge> {
    let challenges = split(header);
    let bearer = challenges.iter().find(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    if let Some((_, parameters)) = bearer {
        let get = |name: &str| {
            parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
        };
        let realm = get("realm")?;
        return Some(Challenge::Bearer { realm, service: get("service"), scope: get("scope"), error: get("error") });
    }
    challenges.iter().any(|(scheme, _)| scheme.eq_ignore_ascii_case("basic")).then_some(Challenge::Basic)
}

type Parameters = Vec<(String, String)>;

/// `Scheme key=value, key="quoted", Scheme …` into schemes with their parameters.
fn split(header: &str) -> Vec<(String, Parameters)> {
    let mut challenges: Vec<(String, Parameters)> = Vec::new();
    let mut rest = header.trim();
    while !rest.is_empty() {
        let word_end = rest.find([' ', '=', ',']).unwrap_or(rest.len());
        let word = rest[..word_end].to_owned();
        rest = rest[word_end..].trim_start();
        if let Some(value) = rest.strip_prefix('=') {
            let (value, after) = take_value(value.trim_start());
            rest = after;
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word, value));
            }
        } else if !word.is_empty() {
            challenges.push((word, Vec::new()));
        }
        rest = rest.trim_start().trim_start_matches(',').trim_start();
    }
    challenges
}

fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
            error: None,
        })
    }

    #[test]
    fn reads_what_registries_send() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull,push""#;
        assert_eq!(
            parse(hub),
            bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:library/busybox:pull,push")
            )
        );
        assert_eq!(parse("Basic realm=\"ECR\", charset=UTF-8"), Some(Challenge::Basic));
        assert_eq!(parse("Basic realm=x, Bearer realm=\"https://t/\\\"q\""), bearer("https://t/\"q", None, None));
        assert_eq!(parse("bearer realm=https://t/"), bearer("https://t/", None, None));
        assert_eq!(parse("Bearer service=x"), None, "no realm");
        assert_eq!(parse("Negotiate"), None);
        assert_eq!(parse(""), None);
        assert_eq!(parse("=,=\"\",,\"Bearer"), None);
    }
}
